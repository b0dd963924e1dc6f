"""Exact evaluation: every image counts once, whatever the number of processes; and prediction for single images."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lape.convert.positions import describe
from lape.data.augment import eval_transform
from lape.data.device import DeviceLoader
from lape.data.folders import image_files
from lape.data.images import check_header, load_image
from lape.data.loaders import eval_loader
from lape.data.open import Data, load_data
from lape.errors import CheckpointError, DataError, LapeError, NotFiniteError, check_finite
from lape.files.exported import Classifier, all_names, is_exported, read_exported
from lape.files.read import Checkpoint, read_checkpoint
from lape.files.restore import (
    check_outputs,
    count_classes,
    labels_of,
    logits_of,
    restore_with,
    settings_of,
    transform_of,
)
from lape.names import few, tell
from lape.options import PredictOptions
from lape.recipe import Recipe
from lape.train.distributed import World, all_of, join_world, rank_and_size, sum_over_ranks, wait_for_others
from lape.train.faults import Stopped, explain_faults
from lape.train.progress import Say, silence
from lape.train.speed import attention_for

STOPPED = "stopped"  # in place of what a process could not read
T = TypeVar("T")

PREDICT_BATCH = 32  # images that `predict` decodes and classifies at a time


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found: accuracies in percent, cross entropies. `str()` is the original's line.

    Fields:
        acc1: top-1
        acc5: top-5, over all classes where there are fewer
        loss: mean over images
        batch_loss: what the original prints: the mean over batches of their means, in which a short last batch weighs
            as much
        count: of images
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
    """The most probable classes of one image, best first.

    Fields:
        path: of the image
        classes: names
        probabilities: of these classes, in 0..1
    """

    path: str
    classes: list[str]
    probabilities: list[float]


def autocast(amp: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context that computes in mixed precision: `off`, `bf16`, `fp16`, or `auto` (on CUDA fp16, as in DeiT).

    Raises LapeError for fp16 without CUDA, where its small range has no gradient scaler to help.
    """
    if amp == "fp16" and device.type != "cuda":
        raise LapeError(f"amp='fp16' needs CUDA, the device is {device.type!r}: use --amp bf16 or --amp off")
    if amp == "auto":
        amp = "fp16" if device.type == "cuda" else "off"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def _outcomes(
    model: nn.Module,
    loader: DataLoader[Any] | DeviceLoader,
    device: torch.device,
    amp: str,
    shared: bool,
    stop: threading.Event | None,
) -> tuple[Tensor, str]:
    """Of this process's images, each in its place: how often seen, top-1, top-5, loss, (4, images); what went wrong."""
    rank, size = rank_and_size() if shared else (0, 1)
    place, problem = rank, ""
    outcome = torch.zeros(4, len(loader.dataset), device=device)  # type: ignore[arg-type]
    batches = iter(loader)
    try:
        with autocast(amp, device):
            for images, targets in batches:
                if stop is not None and stop.is_set():
                    problem = STOPPED
                    break
                targets = targets.to(device, non_blocking=True)
                logits = logits_of(model(images.to(device, non_blocking=True))).float()
                hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
                loss = F.cross_entropy(logits, targets, reduction="none")
                count = torch.ones_like(loss)
                end = place + size * len(targets)
                outcome[:, place:end:size] += torch.stack([count, hits[:, 0], hits.any(dim=1), loss])
                place = end
    except DataError as error:
        problem = str(error)
    finally:
        if isinstance(batches, Generator):  # its processes; an error would keep it
            batches.close()
    return outcome.cpu().double(), problem


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any] | DeviceLoader,
    device: torch.device,
    *,
    amp: str = "off",
    shared: bool = True,
    stop: threading.Event | None = None,
) -> Metrics:
    """Top-1, top-5 (over all classes where there are fewer) and cross entropy of a model, which is left in eval mode.

    Nothing is padded: each image's outcome is put into its place, and the places are added up over the processes. So
    any number of processes gives the same result, and every image is seen to count once.

    Args:
        loader: batches of (images (B, C, H, W), class numbers (B,)), from `lape.data.loaders.eval_loader`.
        shared: the processes' loaders split the data set (image i to process i modulo their number); False when each
            has the whole of it.
        stop: ends the evaluation when it is set.

    Raises:
        DataError: an image cannot be read. Where the data is shared every process raises, once all are done.
        NotFiniteError: outputs are NaN or infinite; every process raises.
        Stopped: by `stop`; where the data is shared, that of any process.
    """
    model.eval()
    outcome, problem = _outcomes(model, loader, device, amp, shared, stop)
    if problem and shared:
        wait_for_others()
    problems = [text for text in (all_of(problem) if shared else [problem]) if text]
    if STOPPED in problems:
        raise Stopped
    if problems:
        raise DataError("; ".join(problems))  # every process names it: the launcher ends the others with the first
    if shared:
        outcome = sum_over_ranks(outcome)
    counts, hit1, hit5, losses = outcome
    assert bool((counts == 1).all()), f"{int((counts != 1).sum())} of {len(counts)} images did not count once"
    if count := int((~losses.isfinite()).sum()):
        raise NotFiniteError(
            f"the outputs for {count} of {len(losses)} images are NaN or infinite: they have no accuracy"
        )
    batches = losses.split(loader.batch_sampler.batch_size)  # type: ignore[union-attr]
    return Metrics(
        acc1=100 * hit1.mean().item(),
        acc5=100 * hit5.mean().item(),
        loss=losses.mean().item(),
        batch_loss=torch.stack([batch.mean() for batch in batches]).mean().item(),
        count=len(counts),
    )


def evaluate_data(
    model: nn.Module, data: Data, recipe: Recipe, world: World, stop: threading.Event | None = None
) -> Metrics:
    """Evaluate on the validation images; with `dist_eval` the processes share them. `stop`: as in `evaluate`."""
    rank, size = (world.rank, world.size) if recipe.dist_eval else (0, 1)
    loader = eval_loader(data.val, recipe, rank=rank, world_size=size, device=world.device)
    if next(model.parameters()).device != world.device:  # an EMA in host memory
        model = copy.deepcopy(model).to(world.device)
    return evaluate(model, loader, world.device, amp=recipe.amp, shared=recipe.dist_eval, stop=stop)


def evaluate_checkpoint(recipe: Recipe, *, say: Say = tell) -> Metrics:
    """Evaluate `recipe.resume` on the validation images of `recipe`, as the original's `--eval --resume` does.

    What the user gave no flag for (model, join, position embedding, image size, transform) the file decides; the
    number of classes is that of the file's head, which may have more outputs than the data has classes.

    Raises:
        CheckpointError: no such file, or a flag contradicts it.
        DataError: the data has classes that the model has not; one that lacks some is evaluated, and they are said.
        NotFiniteError: the model's outputs are NaN or infinite.
    """
    if not recipe.resume:
        raise CheckpointError("evaluation needs a checkpoint: give --resume CHECKPOINT")
    with join_world(recipe.device) as world, explain_faults(recipe):
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        say = say if world.is_main else silence
        checkpoint = read_checkpoint(recipe.resume)
        if not recipe.data_path and checkpoint.args.get("data_path"):
            raise CheckpointError(
                f"no --data-path was given, and {recipe.resume} was not trained on the packaged digits: "
                "give the folder that holds val/"
            )
        height, width = transform_of(checkpoint).size
        if height != width and "input_size" not in recipe.model_fields_set:
            raise CheckpointError(
                f"{recipe.resume} is for images of {height} x {width} pixels and evaluation takes square ones: "
                "give --input-size SIDE, or classify images with lape predict"
            )
        recipe = settings_of(checkpoint, recipe)
        autocast(recipe.amp, world.device)
        data = load_data(recipe, train=False, device=world.device)
        model = restore_with(checkpoint, recipe, recipe.input_size).to(world.device)
        outputs = count_classes(checkpoint, model, recipe.input_size, recipe.in_chans)
        note = number_as(data, checkpoint, labels_of(model), outputs)
        say(f"Data: {data.name}")
        if note:
            say(note)
        weights = "averaged (EMA) weights of " if recipe.ema else ""
        say(f"Model: {recipe.model} from {weights}{recipe.resume}")
        say(f"{describe(model)}\nTransform: {eval_transform(recipe)}")
        if recipe.decode == "fast":
            say("Decode: fast, resized pixels may differ by 2 of 255 levels; published numbers use --decode exact")
        with attention_for(model, recipe, world.device):
            metrics = evaluate_data(model, data, recipe, world)
        say(str(metrics))
        say(f"Accuracy of the network on the {metrics.count} test images: {metrics.acc1:.1f}%")
        say(f"Loss over all images: {metrics.loss:.4f} (the line above averages the means of batches)")
        return metrics


def number_as(data: Data, checkpoint: Checkpoint, labels: list[str] | None, outputs: int) -> str:
    """Give the validation images the class numbers of a checkpoint, by the names it stores; without names, their own.

    `labels`, of a transformers model, are used where every class of the data is among them. Returns a line on what
    could not be matched, "" if all was. Raises DataError for images of a class that the checkpoint does not know, or
    more classes than its head has `outputs`.
    """
    names = checkpoint.classes or (labels if labels and set(data.classes) <= set(labels) else None)
    if not names:
        check_outputs(checkpoint, data.classes, outputs)
        if outputs == len(data.classes):
            return ""
        return (
            f"{checkpoint.path} stores no class names and has {outputs} outputs: the first {len(data.classes)} are "
            "taken for the classes of the data, in their order"
        )
    targets = torch.as_tensor(data.val.targets)
    present = [data.classes[number] for number in targets.unique().tolist()]
    odd = [name for name in present if name not in names]
    if odd:
        raise DataError(
            f"the data has images of {len(odd)} class(es) that {checkpoint.path} was not trained on ({few(odd)}; it "
            f"knows {len(names)}: {few(names)}): give the data it was trained on"
        )
    numbers = torch.tensor([names.index(name) if name in names else -1 for name in data.classes])
    targets = numbers.to(targets.device)[targets]
    data.val.targets = targets if isinstance(data.val.targets, torch.Tensor) else targets.tolist()
    absent = [name for name in names if name not in present]
    return f"{len(absent)} of the {len(names)} classes have no image here: {few(absent)}" if absent else ""


def predict(checkpoint_path: str | Path, image_paths: Sequence[str | Path], **options: Any) -> list[Prediction]:
    """Classify images with the transform and the class names that the checkpoint stores.

    A file that stores no names (DeiT's, the LaPE authors') gives class numbers.

    Args:
        options: `top_k` (how many classes to return, at most all) and `device`, as in `PredictOptions`.

    Raises:
        LapeError: an option is not allowed.
        DataError: a file is missing or no image; the message names it.
        CheckpointError: the checkpoint cannot be read, or its model is no classifier.
        NotFiniteError: probabilities are NaN or infinite; the message names the first image.
    """
    return list(predictions(image_paths, PredictOptions(checkpoint=str(checkpoint_path), **options)))


def predictions(
    image_paths: Sequence[str | Path], options: PredictOptions, problems: list[str] | None = None
) -> Iterator[Prediction]:
    """As `predict`, one after the other: images are decoded and classified in batches of `PREDICT_BATCH`.

    Before the first one is classified, every file is opened and its header read, so that a missing file or one that is
    no image costs no work. A file that is cut off shows in its batch only. With a list for `problems`, files that are
    there and cannot be read, links to nothing and those that went meanwhile are named in it and left out.
    """

    def readable(paths: Sequence[str | Path], read: Callable[[str | Path], T]) -> Iterator[tuple[str | Path, T]]:
        for path in paths:
            try:
                yield path, read(path)
            except DataError as error:
                if problems is None or (read is check_header and not os.path.lexists(path)):
                    raise
                problems.append(str(error))

    with _classifier(options) as (transform, names, logits):
        image_paths = [path for path, _ in readable(image_files(image_paths), check_header)]
        prepare = transform.build()
        for first in range(0, len(image_paths), PREDICT_BATCH):
            batch = image_paths[first : first + PREDICT_BATCH]
            images = list(readable(batch, lambda path: prepare(load_image(path, transform.in_chans))))
            if not images:
                continue
            pixels_BCHW = torch.stack([image for _, image in images])
            with torch.no_grad():
                probabilities_BK = logits(pixels_BCHW).float().softmax(dim=1)
            for (path, _), probabilities_K in zip(images, probabilities_BK, strict=True):
                check_finite(probabilities_K, f"the outputs of {options.checkpoint} for {path}")
            best = probabilities_BK.topk(min(options.top_k, len(names)))
            for (path, _), values, indices in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
                yield Prediction(str(path), [names[index] for index in indices], values)


@contextmanager
def _classifier(options: PredictOptions) -> Iterator[Classifier]:
    """The model of a checkpoint, or of an exported file."""
    if is_exported(options.checkpoint):
        yield read_exported(options.checkpoint, options.described_by, options.device)
        return
    if options.described_by is not None:
        raise LapeError(f"described_by={options.described_by!r} is for .onnx files: {options.checkpoint} is none")
    checkpoint = read_checkpoint(options.checkpoint)
    transform = transform_of(checkpoint)
    with join_world(options.device) as world:
        model = restore_with(checkpoint, settings_of(checkpoint, Recipe()), transform.input_size).to(world.device)
        outputs = count_classes(checkpoint, model, transform.input_size, transform.in_chans)
        names = all_names(checkpoint.classes or labels_of(model), outputs)
        yield Classifier(transform, names, lambda pixels_BCHW: logits_of(model(pixels_BCHW.to(world.device))))
