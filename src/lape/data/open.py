"""The data of a recipe, opened and checked: sets, transforms and the device's copy put together."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from lape.data.augment import eval_transform, train_transform
from lape.data.device import Normalise, OnDevice, Step, Stream, ToBytes, allocate_images, split_transform
from lape.data.folders import one_class
from lape.data.loaders import CPU, Items, Loader, Samples, check_batch, eval_batches, steps_per_epoch
from lape.data.sets import CACHE_BYTES, Images, keep_if_still, list_cifar, list_digits, reader_of
from lape.errors import DataError, LapeError

if TYPE_CHECKING:
    from lape.data.fast import FastImages
    from lape.recipe import Recipe

READ_AT_ONCE = 256  # images of a loader's batch while they are put on the device


@dataclass
class Data:
    """A training and a validation set of (float32 image (in_chans, size, size), class index) items.

    A set that was not asked for is None. `name` is what the output calls the data.
    """

    train: Any
    val: Any
    classes: list[str]
    name: str


def load_data(
    recipe: Recipe, *, train: bool = True, val: bool = True, world_size: int = 1, device: torch.device | str = "cpu"
) -> Data:
    """Open and check the data of a recipe; nothing is written.

    Args:
        train: open the training set, and check that `world_size` batches fit into it. Without it train/ need not exist.
        val: open the validation set. With `decode` "fast" it is read that way where no training set is opened beside.
        device: where the images are put with `data_on_device`.

    Raises:
        DataError: a layout that cannot be trusted, or fewer images than one batch of all processes; with
            `data_on_device` an unreadable image, images of several sizes, or more of them than fit.
        LapeError: a batch or an augmentation that cannot work.
    """
    if train:
        check_batch(recipe)
    reader, root = reader_of(recipe)
    fast = recipe.decode == "fast"
    if fast and reader in (list_digits, list_cifar):
        raise LapeError("decode='fast' reads image files, these images are in memory already: use --decode exact")
    if fast and recipe.data_on_device:
        raise LapeError("decode='fast' with data_on_device=True: images are read once and kept; use --decode exact")
    transforms: dict[str, Any] = {}
    if train:
        transforms["train"] = train_transform(recipe, whole=reader is list_digits)
    if val:
        transforms["val"] = eval_transform(recipe).build()
    steps: dict[str, list[Step]] = {}
    if recipe.data_on_device:
        transforms, steps = _for_device(recipe, transforms, torch.device(device))
    images, read, classes, name = reader(recipe, root, tuple(transforms))
    sets: dict[str, Items] = {}
    for split, transform in transforms.items():
        plain = Images(*images[split], read, transform)
        sets[split] = keep_if_still(plain, recipe, split) if reader is list_digits and not steps else plain
        if fast and (split == "train" or not train):  # the images that a training is measured on stay exact
            sets[split] = _fast(plain, recipe, train=train)
    if train:
        if len(classes) < 2:
            raise DataError(one_class(root, classes))
        steps_per_epoch(len(sets["train"]), recipe, world_size)
    for split in steps:
        sets[split] = _put_on_device(sets[split], steps[split], recipe, torch.device(device))
    if "train" in steps:
        sets["train"] = _normalise_once(cast(OnDevice, sets["train"]))
    return Data(sets.get("train"), sets.get("val"), classes, name)


def _for_device(
    recipe: Recipe, transforms: dict[str, Any], device: torch.device
) -> tuple[dict[str, Any], dict[str, list[Step]]]:
    """Return, by split, the transform that runs once and the batched steps. Raises LapeError."""
    if recipe.skip_corrupt:
        raise LapeError(
            "skip_corrupt=True leaves images out by the epoch, data_on_device reads each once: use one of them"
        )
    if device.type not in ("cpu", "cuda"):
        raise LapeError(f"data_on_device needs float64 and was made for cuda and cpu, not {device.type}: leave it out")
    parts = {split: split_transform(transform) for split, transform in transforms.items()}
    once = {split: ToBytes(first) for split, (first, _) in parts.items()}
    return once, {split: rest for split, (_, rest) in parts.items()}


def _put_on_device(dataset: Any, steps: list[Step], recipe: Recipe, device: torch.device) -> OnDevice:
    """Read every image once. Raises DataError."""
    n = len(dataset)
    images, targets = allocate_images(n, dataset[0][0].shape, device), torch.empty(n, dtype=torch.long, device=device)
    start = 0
    with closing(iter(Loader(Samples(dataset, None), eval_batches(range(n), READ_AT_ONCE), recipe, CPU))) as batches:
        for batch, numbers in batches:
            images[start : start + len(batch)], targets[start : start + len(batch)] = batch, numbers
            start += len(batch)
    return OnDevice(images, targets, steps)


def _normalise_once(dataset: OnDevice) -> OnDevice:
    """Images to which nothing random happens, as floats where they fit: their batches are the same numbers always."""
    if 4 * dataset.images.nbytes > CACHE_BYTES or not all(isinstance(step, Normalise) for step in dataset.steps):
        return dataset
    images = dataset.images
    for step in dataset.steps:
        images = step(images, Stream(dataset.targets))
    return OnDevice(images, dataset.targets, [])


def _fast(plain: Images, recipe: Recipe, *, train: bool) -> FastImages:
    """The same files and classes, read by `lape.data.fast`."""
    from lape.data.fast import FastEval, FastImages, fast_train

    evaluation = eval_transform(recipe)
    transform = fast_train(recipe, plain.transform) if train else FastEval(evaluation)
    return FastImages(plain, recipe.in_chans, transform, evaluation.mean, evaluation.std)
