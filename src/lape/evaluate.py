"""Exact evaluation: every image counts once, whatever the number of processes; and prediction for single images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lape.checkpoint import Checkpoint, read_checkpoint
from lape.convert import conversion_of, create_model, describe
from lape.distributed import join_world, rank_and_size, sum_over_ranks
from lape.errors import CheckpointError, DataError, LapeError
from lape.recipe import Recipe
from lape.reference import load_reference_state_dict

# What a checkpoint knows about itself. The first four must not be contradicted by a flag.
IDENTITY = ("model", "join_type", "pe", "in_chans")
STORED = (*IDENTITY, "model_kwargs", "input_size", "eval_crop_ratio", "mean", "std")


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
    model: nn.Module, loader: DataLoader, device: torch.device, *, amp: str = "off", shared: bool = True
) -> Metrics:
    """Top-1, top-5 and cross entropy of a model, which is left in eval mode.

    Nothing is padded: each image's outcome is put into its place, and the places are added up over the processes. So
    any number of processes gives the same result, and every image is seen to count once.
    With fewer than five classes, top-5 is over all of them.

    Args:
        loader: batches of (images (B, C, H, W), class numbers (B,)), from `lape.data.eval_loader`.
        shared: the processes' loaders split the data set (image i to process i modulo their number); False when each
            has the whole of it.
    """
    model.eval()
    rank, size = rank_and_size() if shared else (0, 1)
    place = rank
    outcome = torch.zeros(4, len(loader.dataset), dtype=torch.float64)  # type: ignore[arg-type]
    with autocast(amp, device):
        for images, targets in loader:
            targets = targets.to(device, non_blocking=True)
            logits = model(images.to(device, non_blocking=True)).float()
            hit = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="none")
            places = torch.arange(place, place + size * len(targets), size)
            outcome[:, places] += torch.stack([torch.ones_like(loss), hit[:, 0], hit.any(dim=1), loss]).cpu()
            place = int(places[-1]) + size
    if shared:
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


def evaluate_checkpoint(recipe: Recipe, *, say: Callable[[str], None] = print) -> Metrics:
    """Evaluate `recipe.resume` on the validation images of `recipe`, as the original's `--eval --resume` does.

    What the user gave no flag for (model, join, position embedding, image size, transform) the file decides; the
    number of classes is that of the file's head, which may have more outputs than the data has classes.

    Raises:
        CheckpointError: no such file, or a flag contradicts it.
        DataError: the data has other classes than the model.
    """
    from lape.data import eval_loader, eval_transform, load_data

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
        recipe = settings_of(checkpoint, recipe)
        if recipe.ema:
            checkpoint = averaged(checkpoint)
        autocast(recipe.amp, world.device)
        data = load_data(recipe, train=False)
        check_classes(checkpoint, data.classes)
        model = restore_model(checkpoint, recipe, recipe.input_size).to(world.device)
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
        CheckpointError: the checkpoint cannot be read.
    """
    from lape.data import EvalTransform, eval_transform, load_image

    checkpoint = read_checkpoint(checkpoint_path)
    recipe = settings_of(checkpoint, Recipe())
    stored = checkpoint.transform
    transform = EvalTransform.from_dict(stored) if stored else eval_transform(recipe)
    prepare = transform.build()
    images = [load_image(path, transform.in_chans) for path in image_paths]  # all, before the first is classified
    with join_world(device) as world:
        model = restore_model(checkpoint, recipe, transform.input_size).to(world.device)
        predictions = []
        for path, image in zip(image_paths, images, strict=True):
            with torch.no_grad():
                probabilities_C = model(prepare(image)[None].to(world.device)).float().softmax(dim=1)[0]
            best = probabilities_C.topk(min(top_k, len(probabilities_C)))
            names = [_class_name(checkpoint, int(index)) for index in best.indices]
            predictions.append(Prediction(str(path), names, [float(p) for p in best.values]))
    return predictions


def settings_of(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe, with what the checkpoint says of itself wherever the user gave no flag.

    Raises:
        CheckpointError: a flag that was given names another model, join, position embedding or channel count.
    """
    said = _renamed(checkpoint.args.get("model_kwargs") or {}) | _renamed(checkpoint.transform or {}) | checkpoint.args
    stored = {name: said[name] for name in STORED if said.get(name) is not None}
    if not isinstance(stored.get("input_size", 0), int):
        del stored["input_size"]  # not square: only the stored transform can say it
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
    """What a transform or a timm model calls by another name than the flags do."""
    flags = {"crop_ratio": "eval_crop_ratio", "img_size": "input_size"}
    return {flags.get(name, name): value for name, value in said.items()}


def restore_model(checkpoint: Checkpoint, recipe: Recipe, input_size: int | tuple[int, int]) -> nn.Module:
    """The checkpoint's model in eval mode, for images of `input_size` pixels: its position table is resampled."""
    kwargs = {**recipe.model_kwargs, "img_size": input_size, "in_chans": recipe.in_chans}
    if checkpoint.num_classes is not None:
        kwargs["num_classes"] = checkpoint.num_classes
    model = create_model(recipe.model, recipe.join_type, recipe.pe, **kwargs)
    return load_reference_state_dict(model, checkpoint.model, source_grid=source_grid(checkpoint, model)).eval()


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
    patch = conversion_of(model).anatomy.patch_size if patches is None else tuple(patches.shape[-2:])
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
    if checkpoint.num_classes is not None and checkpoint.num_classes < len(classes):
        raise DataError(
            f"the data has {len(classes)} classes, the head of {checkpoint.path} has {checkpoint.num_classes} outputs: "
            "give the data it was trained on"
        )


def _class_name(checkpoint: Checkpoint, index: int) -> str:
    return checkpoint.classes[index] if checkpoint.classes is not None else str(index)


def _silence(_text: str) -> None:
    pass
