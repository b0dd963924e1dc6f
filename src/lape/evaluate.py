"""Exact evaluation: every image counts once, whatever the number of processes; and prediction for single images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lape.augment import EvalTransform, eval_transform
from lape.checkpoint import Checkpoint, read_checkpoint
from lape.convert import build, fold_
from lape.device_data import DeviceLoader
from lape.distributed import all_of, join_world, rank_and_size, sum_over_ranks, wait_for_others
from lape.errors import CheckpointError, DataError, LapeError
from lape.look import describe
from lape.recipe import Recipe
from lape.record import conversion_of
from lape.reference import load_reference_state_dict

# What a checkpoint knows about itself. The first must not be contradicted by a flag.
IDENTITY = ("model", "join_type", "pe", "in_chans", "warm_start")
STORED = ("model", "join_type", "pe", "in_chans", "model_kwargs", "input_size", "eval_crop_ratio", "mean", "std")
PREDICT_BATCH = 32  # images that `predict` decodes and classifies at a time


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found: accuracies in percent, cross entropies, number of images.

    `loss` is the mean over images. `batch_loss` is what the original prints: the mean over batches of their means, in
    which a short last batch weighs as much as a full one. `str()` is the original's line.
    """

    acc1: float
    acc5: float
    loss: float
    batch_loss: float
    count: int

    def __str__(self) -> str:
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.batch_loss:.3f}"

    def log(self, prefix: str) -> dict[str, float]:
        """Entries of log.txt: DeiT's keys with DeiT's meaning, and the exact loss."""
        values = {"loss": self.batch_loss, "acc1": self.acc1, "acc5": self.acc5, "exact_loss": self.loss}
        return {f"{prefix}_{name}": value for name, value in values.items()}


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    path: str
    classes: list[str]
    probabilities: list[float]


def autocast(amp: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that computes in mixed precision.

    Args:
        amp: `off`, `bf16`, `fp16`, or `auto`: fp16 on CUDA as in DeiT, else off.

    Raises:
        LapeError: fp16 without CUDA, where its small range has no gradient scaler to help.
    """
    if amp == "fp16" and device.type != "cuda":
        raise LapeError(f"amp='fp16' needs CUDA, the device is {device.type!r}: use --amp bf16 or --amp off")
    if amp == "auto":
        amp = "fp16" if device.type == "cuda" else "off"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader | DeviceLoader, device: torch.device, *, amp: str = "off", shared: bool = True
) -> Metrics:
    """Top-1, top-5 and cross entropy of a model, which is left in eval mode.

    Nothing is padded: each image's outcome is put into its place, and the places are added up over the processes. So
    any number of processes gives the same result, and every image is seen to count once.
    With fewer than five classes, top-5 is over all of them.

    Args:
        loader: batches of (images (B, C, H, W), class numbers (B,)), from `lape.data.eval_loader`.
        shared: the processes' loaders split the data set (image i to process i modulo their number); False when each
            has the whole of it.

    Raises:
        DataError: an image cannot be read. Where the data is shared every process raises, once all are done.
    """
    model.eval()
    rank, size = rank_and_size() if shared else (0, 1)
    place = rank
    outcome = torch.zeros(4, len(loader.dataset), dtype=torch.float64)  # type: ignore[arg-type]
    unread: list[DataError] = []
    with autocast(amp, device):
        for images, targets in _until_unread(loader, unread) if shared else loader:
            targets = targets.to(device, non_blocking=True)
            logits = logits_of(model(images.to(device, non_blocking=True))).float()
            hit = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="none")
            places = torch.arange(place, place + size * len(targets), size)
            outcome[:, places] += torch.stack([torch.ones_like(loss), hit[:, 0], hit.any(dim=1), loss]).cpu()
            place = int(places[-1]) + size
    if shared:
        _fail_together(unread)
        outcome = sum_over_ranks(outcome)
    seen, hit1, hit5, losses = outcome
    assert bool((seen == 1).all()), f"{int((seen != 1).sum())} of {len(seen)} images did not count once"
    batches = losses.split(loader.batch_sampler.batch_size)  # type: ignore[union-attr]
    return Metrics(
        acc1=100 * hit1.mean().item(),
        acc5=100 * hit5.mean().item(),
        loss=losses.mean().item(),
        batch_loss=torch.stack([batch.mean() for batch in batches]).mean().item(),
        count=len(seen),
    )


def _until_unread(loader: DataLoader | DeviceLoader, unread: list[DataError]) -> Iterator[Any]:
    """The batches up to one that cannot be read: its error is kept, as the other processes wait for this one."""
    try:
        yield from loader
    except DataError as error:
        unread.append(error)
        wait_for_others()


def _fail_together(unread: list[DataError]) -> None:
    said = all_of("; ".join(map(str, unread)))  # every process names it: the launcher ends the others with the first
    if any(said):
        raise DataError("; ".join(filter(None, said)))


def evaluate_checkpoint(recipe: Recipe, *, say: Callable[[str], None] = print) -> Metrics:
    """Evaluate `recipe.resume` on the validation images of `recipe`, as the original's `--eval --resume` does.

    What the user gave no flag for (model, join, position embedding, image size, transform) the file decides; the
    number of classes is that of the file's head, which may have more outputs than the data has classes.

    Raises:
        CheckpointError: no such file, or a flag contradicts it.
        DataError: the data has other classes than the model.
    """
    from lape.data import eval_loader, load_data

    if not recipe.resume:
        raise CheckpointError("evaluation needs a checkpoint: give --resume CHECKPOINT")
    with join_world(recipe.device) as world:
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        tell = say if world.is_main else _silence
        checkpoint = read_checkpoint(recipe.resume)
        if not recipe.data_path and checkpoint.args.get("data_path"):
            raise CheckpointError(
                f"no --data-path was given, and {recipe.resume} was not trained on the packaged digits: "
                "give the folder that holds val/"
            )
        pixels = stored_size(checkpoint)
        if pixels is not None and pixels[0] != pixels[1] and "input_size" not in recipe.model_fields_set:
            raise CheckpointError(
                f"{recipe.resume} is for images of {pixels[0]} x {pixels[1]} pixels and evaluation takes square ones: "
                "give --input-size SIDE, or classify images with lape predict"
            )
        recipe = settings_of(checkpoint, recipe)
        if recipe.ema:
            checkpoint = averaged(checkpoint)
        autocast(recipe.amp, world.device)
        data = load_data(recipe, train=False, device=world.device)
        check_classes(checkpoint, data.classes)
        model = restore_model(checkpoint, recipe, recipe.input_size).to(world.device)
        outputs = check_classifier(checkpoint, model, recipe.input_size, recipe.in_chans)
        check_outputs(checkpoint, data.classes, outputs)
        tell(f"Data: {data.name}")
        weights = "averaged (EMA) weights of " if recipe.ema else ""
        tell(f"Model: {recipe.model} from {weights}{recipe.resume}")
        tell(f"{describe(model)}\nTransform: {eval_transform(recipe)}")
        if recipe.decode == "fast":
            tell("Decode: fast, resized pixels may differ by 2 of 255 levels; published numbers use --decode exact")
        rank, size = (world.rank, world.size) if recipe.dist_eval else (0, 1)
        loader = eval_loader(data.val, recipe, rank=rank, world_size=size, device=world.device)
        metrics = evaluate(model, loader, world.device, amp=recipe.amp, shared=recipe.dist_eval)
        tell(str(metrics))
        tell(f"Accuracy of the network on the {metrics.count} test images: {metrics.acc1:.1f}%")
        tell(f"Loss over all images: {metrics.loss:.4f} (the line above averages the means of batches)")
        return metrics


def predict(
    checkpoint_path: str | Path, image_paths: Sequence[str | Path], *, top_k: int = 5, device: str = "auto"
) -> list[Prediction]:
    """Classify images with the transform and the class names that the checkpoint stores.

    A file that stores no names (DeiT's, the LaPE authors') gives class numbers.

    Args:
        top_k: how many classes to return, at most all.

    Raises:
        DataError: a file is missing or no image; the message names it.
        CheckpointError: the checkpoint cannot be read, or its model is no classifier.
    """
    return list(predictions(checkpoint_path, image_paths, top_k=top_k, device=device))


def predictions(
    checkpoint_path: str | Path, image_paths: Sequence[str | Path], *, top_k: int = 5, device: str = "auto"
) -> Iterator[Prediction]:
    """As `predict`, one after the other: images are decoded and classified in batches of `PREDICT_BATCH`.

    Before the first one is classified, every file is opened and its header read, so that a missing file or one that is
    no image costs no work. A file that is cut off shows in its batch only.
    """
    from lape.data import check_header, load_image

    checkpoint = read_checkpoint(checkpoint_path)
    transform = transform_of(checkpoint)
    prepare = transform.build()
    for path in image_paths:
        check_header(path)
    with join_world(device) as world:
        model = restore_model(checkpoint, settings_of(checkpoint, Recipe()), transform.input_size).to(world.device)
        outputs = check_classifier(checkpoint, model, transform.input_size, transform.in_chans)
        names = checkpoint.classes or labels_of(model) or []
        names = [*names, *(str(number) for number in range(len(names), outputs))]
        for first in range(0, len(image_paths), PREDICT_BATCH):
            paths = image_paths[first : first + PREDICT_BATCH]
            pixels_BCHW = torch.stack([prepare(load_image(path, transform.in_chans)) for path in paths])
            with torch.no_grad():
                probabilities_BK = logits_of(model(pixels_BCHW.to(world.device))).float().softmax(dim=1)
            best = probabilities_BK.topk(min(top_k, outputs))
            for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
                yield Prediction(str(path), [names[index] for index in indices], values)


def transform_of(checkpoint: Checkpoint) -> EvalTransform:
    """The stored evaluation transform; else a recipe's, at the model's own size, (height, width) where not square."""
    if checkpoint.transform:
        return EvalTransform.from_dict(checkpoint.transform)
    transform = eval_transform(settings_of(checkpoint, Recipe()))
    size = stored_size(checkpoint)
    return transform if size is None or size[0] == size[1] else replace(transform, input_size=size)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor (timm, torchvision), or `.logits` (transformers)."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def check_classifier(checkpoint: Checkpoint, model: nn.Module, input_size: int | tuple[int, int], in_chans: int) -> int:
    """The number of classes that a model tells apart, found by classifying an empty image.

    Raises:
        CheckpointError: it has no classifier, or gives no (1, K) logits for an image of this size.
    """
    height, width = _sides(input_size)
    parameter = next(model.parameters())
    with torch.no_grad():
        output = model(torch.zeros(1, in_chans, height, width, device=parameter.device, dtype=parameter.dtype))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if getattr(model, "num_classes", None) == 0 or logits is None or logits.ndim != 2:
        raise CheckpointError(
            f"{checkpoint.path} holds a {type(model).__name__} without a classifier: save one that ends in class "
            "logits (timm with num_classes, ...ForImageClassification), or look at it with lape visualize"
        )
    return logits.shape[1]


def labels_of(model: nn.Module) -> list[str] | None:
    """The class names in the configuration of a transformers model, None where it has none."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return None if not labels else [labels[number] for number in sorted(labels)]


def settings_of(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe, with what the checkpoint says of itself wherever the user gave no flag.

    Raises:
        CheckpointError: a flag that was given names another model, join, position embedding or channel count.
    """
    size = stored_size(checkpoint)
    said = _renamed(checkpoint.args.get("model_kwargs") or {}) | _renamed(checkpoint.transform or {}) | checkpoint.args
    stored = {name: said[name] for name in STORED if said.get(name) is not None}
    stored["warm_start"] = bool(said.get("warm_start"))  # no flag of an evaluation: the file alone knows
    stored.pop("input_size", None)
    if size is not None and size[0] == size[1]:  # not square: only the transform can say it
        stored["input_size"] = size[0]
    if checkpoint.kind == "folder":
        stored.setdefault("in_chans", 3)
    given = recipe.model_fields_set
    asked = recipe.replace(**{name: value for name, value in stored.items() if name not in given})
    known = Recipe(**{name: stored[name] for name in IDENTITY if name in stored})  # the same spelling as the flags
    for name in IDENTITY:
        if name in stored and getattr(asked, name) != getattr(known, name):
            raise CheckpointError(
                f"{name}={getattr(asked, name)!r} contradicts {checkpoint.path}, which was trained with "
                f"{name}={getattr(known, name)!r}: leave the flag out"
            )
    return asked


def _renamed(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a transform or a model of a library calls by another name than the flags do."""
    flags = {"crop_ratio": "eval_crop_ratio", "num_channels": "in_chans"}
    flags |= dict.fromkeys(_SIZE_NAMES, "input_size")
    inner = said.get("vision_config")  # of a model for images and texts
    said = {**(inner if isinstance(inner, Mapping) else {}), **said}
    return {flags.get(name, name): value for name, value in said.items()}


def stored_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that a checkpoint says it is for, None where it does not say."""
    kwargs, transform = (_renamed(said or {}) for said in (checkpoint.args.get("model_kwargs"), checkpoint.transform))
    said = (checkpoint.args, transform, kwargs, checkpoint.raw)
    size = next((one["input_size"] for one in said if one.get("input_size") is not None), None)
    return None if size is None else _sides(size)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def restore_model(checkpoint: Checkpoint, recipe: Recipe, input_size: int | tuple[int, int]) -> nn.Module:
    """The checkpoint's model in eval mode, for images of `input_size` pixels: its position table is resampled.

    A folder of `lape.save` builds its model of any library by its own arguments, folded where it was folded.

    Raises:
        CheckpointError: a folder whose model has one size only and is asked for another, or arguments of a timm model
            for one of another library.
    """
    kwargs = dict(recipe.model_kwargs)
    if checkpoint.kind == "pth":
        kwargs |= {"img_size": input_size, "in_chans": recipe.in_chans}
    elif _sides(input_size) != _own_size(checkpoint):
        kwargs |= _resizing(checkpoint, input_size)
    if checkpoint.package == "timm" and checkpoint.num_classes is not None:
        kwargs["num_classes"] = checkpoint.num_classes
    if checkpoint.package != "timm" and recipe.model_kwargs != checkpoint.args.get("model_kwargs"):
        raise CheckpointError(
            f"{checkpoint.path} holds a model of {checkpoint.package} and says how it is built: leave model_kwargs out"
        )
    warm_start = bool(checkpoint.args.get("warm_start"))
    pe = None if warm_start else recipe.pe
    model = build(checkpoint.package, recipe.model, kwargs, recipe.join_type, pe, warm_start=warm_start)
    if checkpoint.raw.get("folded"):
        return load_reference_state_dict(fold_(model), checkpoint.model).eval()
    return load_reference_state_dict(model, checkpoint.model, source_grid=source_grid(checkpoint, model)).eval()


_SIZE_NAMES = ("img_size", "image_size")  # of timm; of torchvision and transformers


def _own_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(height, width) of the model in a folder, whatever its transform says."""
    return stored_size(replace(checkpoint, raw={**checkpoint.raw, "transform": None}))


def _resizing(checkpoint: Checkpoint, input_size: int | tuple[int, int]) -> dict[str, Any]:
    """The argument that makes the model of a folder for images of another size. Raises CheckpointError."""
    own, asked = _own_size(checkpoint), _sides(input_size)
    fix = f"it is for {own[0]} x {own[1]} pixels; leave --input-size out" if own else "leave --input-size out"
    if checkpoint.raw.get("folded"):
        raise CheckpointError(f"{checkpoint.path} is folded, images of {asked[0]} x {asked[1]} do not fit: {fix}")
    if checkpoint.package == "timm":
        return {"img_size": asked}
    if "image_size" not in (checkpoint.args.get("model_kwargs") or {}):
        raise CheckpointError(f"{checkpoint.path} cannot be resized to {asked[0]} x {asked[1]} pixels: {fix}")
    return {"image_size": input_size}


def averaged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its moving average as the weights. Raises CheckpointError where it holds none."""
    if checkpoint.model_ema is None:
        raise CheckpointError(f"{checkpoint.path} holds no averaged (EMA) weights: leave --ema out")
    return replace(checkpoint, model=checkpoint.model_ema)


def source_grid(checkpoint: Checkpoint, model: nn.Module) -> tuple[int, int] | None:
    """The (rows, columns) that a file's position table is for.

    Its patch size is that of its patch embedding, the model's where that has another name. A file that does not say
    its image size (DeiT's releases) has a square grid. None when it has no table.
    """
    size = checkpoint.args.get("input_size") or (checkpoint.args.get("model_kwargs") or {}).get("img_size")
    patches = checkpoint.model.get("patch_embed.proj.weight")
    anatomy = conversion_of(model).anatomy
    if not anatomy.blocks:  # left as it is, nothing is known of its grid
        return None
    patch = anatomy.patch_size
    if patches is not None:  # a stem may stand before them: compare kernels, not kernel and pixels
        own = getattr(getattr(anatomy.root, "patch_embed", None), "proj", None)
        kernel = patch if own is None else tuple(own.weight.shape[-2:])
        patch = tuple(pixels * new // old for pixels, new, old in zip(patch, patches.shape[-2:], kernel, strict=True))
    if checkpoint.raw.get("grid"):
        return tuple(checkpoint.raw["grid"])
    if size:
        height, width = (size, size) if isinstance(size, int) else size
        return height // patch[0], width // patch[1]
    table = checkpoint.model.get("pos_embed")
    if table is None:
        return None
    prefix = conversion_of(model).layout.prefix_rows
    if "dist_token" in checkpoint.model and prefix == 1:  # the file has a row more for it
        prefix = 2
    side = math.isqrt(table.shape[-2] - prefix)
    return side, side


def check_classes(checkpoint: Checkpoint, classes: list[str]) -> None:
    if checkpoint.classes is not None and checkpoint.classes != classes:
        odd = sorted(set(checkpoint.classes) ^ set(classes))[:3] or classes[:3]
        raise DataError(
            f"the data has {len(classes)} classes, {checkpoint.path} was trained on {len(checkpoint.classes)} others "
            f"(they differ in {', '.join(odd)}): their numbers would not match; give the data it was trained on"
        )
    if checkpoint.num_classes is not None:
        check_outputs(checkpoint, classes, checkpoint.num_classes)


def check_outputs(checkpoint: Checkpoint, classes: list[str], outputs: int) -> None:
    """Raises DataError where the data has more classes than the model has outputs."""
    if outputs < len(classes):
        raise DataError(
            f"the data has {len(classes)} classes, the head of {checkpoint.path} has {outputs} outputs: "
            "give the data it was trained on"
        )


def _silence(_text: str) -> None:
    pass
