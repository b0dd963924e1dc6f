"""Data sets, checked before anything runs, and loaders whose every random choice can be repeated.

**Layouts.** `D/train/<class>/*` and `D/val/<class>/*` (torchvision's `ImageFolder`, classes in its lexical order),
CIFAR-10 and CIFAR-100 in the original's Python files, iNaturalist 2018 and 2019 as DeiT lays them out, and the digits
inside the package. A layout that cannot be trusted is a `DataError` of one line; a corrupt image is one that names the
file, when it is read. It is never replaced by another, unless `skip_corrupt` asks for that in training, where each is
named and counted.

**Randomness.** What a training image becomes is a pure function of (seed, epoch, index, copy), and which images make
step s of an epoch is one of (seed, epoch, size of the global batch). So neither the number of loader processes, nor
how many processes share a global batch, nor an interruption changes what a model sees; no random state needs saving.

**Repeated augmentation** as in DeiT: each image of the shuffled order appears three times in a row, each time augmented
anew and, on several processes, each time on another one; an epoch still has about as many samples as the data set, so
it shows about a third of the images. DeiT cuts the epoch to a multiple of 256 (no sample at all below 256 images); here
it has as many whole batches as fit, for any number of images and processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lape.augment import EvalTransform, Transform, eval_transform, is_augmented, to_mode, train_transform
from lape.device_data import DeviceLoader, OnDevice, Step, ToBytes, room_for, split_transform
from lape.errors import DataError, LapeError

if TYPE_CHECKING:
    from lape.pixels import FastImages
    from lape.recipe import Recipe

__all__ = [
    "BatchPlan",
    "Data",
    "EvalTransform",
    "batch_plan",
    "check_batch",
    "eval_loader",
    "eval_transform",
    "load_data",
    "load_image",
    "steps_per_epoch",
    "train_loader",
    "train_transform",
]

COPIES = 3  # of an image under repeated augmentation
EVAL_BATCH = 1.5  # DeiT's evaluation batch, as a multiple of the training batch
MOST_SKIPPED = 20  # unreadable images in a row; more is no accident
READ_AT_ONCE = 256  # images of a loader's batch while they are put on the device
CACHE_BYTES = 2**28  # tensors of an unaugmented in-memory data set are kept up to this size
CPU = torch.device("cpu")
LAYOUT = "--data-path must name a folder with train/<class>/* and val/<class>/*"


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
        recipe: `data_path` (empty: the packaged digits), `data_set`, and what the transforms need.
        train: open the training set, and check that `world_size` batches fit into it. Without it train/ need not exist.
        val: open the validation set. With `decode` "fast" it is read that way where no training set is opened beside.
        world_size: number of training processes.
        device: where the images are put with `data_on_device`.

    Raises:
        DataError: a layout that cannot be trusted, or fewer images than one batch of all processes; with
            `data_on_device` an unreadable image, images of several sizes, or more of them than fit.
        LapeError: a batch or an augmentation that cannot work.
    """
    if train:
        check_batch(recipe)
    read, root = _reader(recipe)
    build: dict[str, Callable[[], Transform]] = {
        "train": partial(train_transform, recipe, whole=read is _digits),
        "val": eval_transform(recipe).build,
    }
    wanted = [split for split, asked in (("train", train), ("val", val)) if asked]
    fast = recipe.decode == "fast"
    if fast and read in (_digits, _cifar):
        raise LapeError("decode='fast' reads image files, these images are in memory already: use --decode exact")
    if fast and recipe.data_on_device:
        raise LapeError("decode='fast' with data_on_device=True: images are read once and kept; use --decode exact")
    made = {split: build[split]() for split in wanted}
    steps: dict[str, list[Step]] = {}
    if recipe.data_on_device:
        made, steps = _for_device(recipe, made, torch.device(device))
    sets, classes, name = read(recipe, root, made)
    if fast and train:  # the images that a training is measured on stay exact
        sets["train"] = _fast(sets["train"], recipe, train=True)
    elif fast and val:
        sets["val"] = _fast(sets["val"], recipe, train=False)
    if train:
        if len(classes) < 2:
            raise DataError(
                f"{root} has one class, {classes[0]!r}: nothing can be learned; is it the right folder level?"
            )
        steps_per_epoch(len(_sized(sets["train"])), recipe, world_size)
    for split in steps:
        sets[split] = _put_on_device(sets[split], steps[split], recipe, torch.device(device))
    return Data(sets.get("train"), sets.get("val"), classes, name)


def _for_device(
    recipe: Recipe, made: dict[str, Any], device: torch.device
) -> tuple[dict[str, Any], dict[str, list[Step]]]:
    """Return, by split, the transform that runs once and the batched steps. Raises LapeError."""
    if recipe.skip_corrupt:
        raise LapeError(
            "skip_corrupt=True leaves images out by the epoch, data_on_device reads each once: use one of them"
        )
    if device.type not in ("cpu", "cuda"):
        raise LapeError(f"data_on_device needs float64 and was made for cuda and cpu, not {device.type}: leave it out")
    parts = {split: split_transform(transform) for split, transform in made.items()}
    once = {split: ToBytes(first) for split, (first, _) in parts.items()}
    return once, {split: rest for split, (_, rest) in parts.items()}


def _put_on_device(dataset: Any, steps: list[Step], recipe: Recipe, device: torch.device) -> OnDevice:
    """Read every image once. Raises DataError."""
    n = len(_sized(dataset))
    images, targets = room_for(n, dataset[0][0].shape, device), torch.empty(n, dtype=torch.long, device=device)
    first = 0
    for some, numbers in _loader(Samples(dataset, None), EvalBatches(range(n), READ_AT_ONCE), recipe, CPU):
        images[first : first + len(some)], targets[first : first + len(some)] = some, numbers
        first += len(some)
    return OnDevice(images, targets, steps)


def load_image(path: str | os.PathLike[str], in_chans: int = 3) -> Image.Image:
    """Decode a whole image file to 8-bit grey (`in_chans` 1) or RGB (3).

    Raises:
        DataError: not an image, corrupt, truncated, or pixels of unknown range; names the file.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # PIL's remarks on EXIF, palettes and size change nothing in the pixels
            image = Image.open(file)
            image.load()
            return to_mode(image, in_chans)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image that can be read: replace or remove the file") from None
    except Exception as error:  # PIL's decoders raise what they like on a corrupt file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read image {path} ({reason}): replace or remove the file") from error


def check_header(path: str | os.PathLike[str]) -> None:
    """Read the header of an image file, not its pixels. Raises DataError where it is missing or no image."""
    try:
        with warnings.catch_warnings(), Image.open(path):
            warnings.simplefilter("ignore")
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image that can be read: replace or remove the file") from None
    except Exception as error:  # PIL's decoders raise what they like on a corrupt file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read image {path} ({reason}): replace or remove the file") from error


def _fast(plain: Any, recipe: Recipe, *, train: bool) -> FastImages:
    """The same files and classes, read by `lape.pixels`."""
    from lape.pixels import FastEval, FastImages, fast_train, read_levels

    paths = plain.sources if isinstance(plain, Images) else [path for path, _ in plain.samples]
    read = partial(read_levels, in_chans=recipe.in_chans, plain=partial(load_image, in_chans=recipe.in_chans))
    shown = eval_transform(recipe)
    transform = fast_train(recipe, plain.transform) if train else FastEval(shown)
    return FastImages(paths, plain.targets, read, transform, shown.mean, shown.std)


# -- loaders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one optimizer step are dealt out: `total` = `size` x processes x `parts`."""

    size: int  # images that a process computes at once
    parts: int  # such batches a step, whose gradients are accumulated
    total: int


def check_batch(recipe: Recipe) -> None:
    """Refuse an odd batch under mixup or cutmix, which pair the images of a batch.

    Raises:
        LapeError: names the batch size and the fix.
    """
    if not recipe.global_batch and _mixes(recipe) and recipe.batch_size % 2:
        raise LapeError(
            f"batch_size={recipe.batch_size} is odd and mixup/cutmix pair the images of a batch: "
            f"use --batch-size {recipe.batch_size + 1}, or --mixup 0 --cutmix 0"
        )


def _mixes(recipe: Recipe) -> bool:
    return recipe.mixup > 0 or recipe.cutmix > 0 or recipe.cutmix_minmax is not None


def batch_plan(recipe: Recipe, world_size: int = 1) -> BatchPlan:
    """Return the batches of a step. With `global_batch` their total is that on every number of processes.

    Raises:
        LapeError: the processes cannot share the `global_batch` (under mixup or cutmix: in even batches).
    """
    mixes = _mixes(recipe)
    if not recipe.global_batch:
        return BatchPlan(recipe.batch_size, 1, recipe.batch_size * world_size)
    each, rest = divmod(recipe.global_batch, world_size)
    sizes = [n for n in range(1, min(recipe.batch_size, each) + 1) if each % n == 0 and not (mixes and n % 2)]
    if rest or not sizes:
        step = world_size * (2 if mixes else 1)
        near = max(round(recipe.global_batch / step), 1) * step
        why = ", in even batches for mixup/cutmix" if mixes else ""
        raise LapeError(
            f"global_batch={recipe.global_batch} cannot be shared by {world_size} process(es) with at most "
            f"{recipe.batch_size} images at once{why}: use --global-batch {near} and --batch-size {step // world_size} "
            "or more"
        )
    return BatchPlan(sizes[-1], each // sizes[-1], recipe.global_batch)


def steps_per_epoch(n_samples: int, recipe: Recipe, world_size: int = 1) -> int:
    """Return the number of optimizer steps of an epoch: whole batches of all processes that fit into the samples.

    Raises:
        DataError: not even one fits.
    """
    plan = batch_plan(recipe, world_size)
    if n_samples < plan.total:
        fits = n_samples // world_size
        fix = f"--batch-size {fits} or less" if fits else f"at most {n_samples} processes"
        fix = f"--global-batch {fits * world_size} or less" if fits and recipe.global_batch else fix
        raise DataError(
            f"batch size {plan.size * plan.parts} x {world_size} process(es) = {plan.total} is larger than the "
            f"training set of {n_samples} image(s), an epoch would have no step: use {fix}"
        )
    return n_samples // plan.total


def train_loader(
    dataset: Dataset,
    recipe: Recipe,
    *,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    skip_batches: int = 0,
    device: torch.device = CPU,
) -> Loader | DeviceLoader:
    """Return the batches of one epoch that belong to one process: (B, in_chans, H, W) float32 and (B,) int64.

    All processes get the same number of full batches: for each of `steps_per_epoch` less `skip_batches` steps (those
    that were trained before an interruption) as many as `batch_plan` has parts. A `DataError` of a sample is raised
    here, also when a worker met it; with `skip_corrupt` the loader's `skipped` names it.

    Args:
        device: where `decode` "fast" normalises the batch, and leaves the images; others come in host memory.

    Raises:
        DataError: no batch fits.
        LapeError: `skip_batches` is not a number of batches of this epoch.
    """
    batches = TrainBatches(len(_sized(dataset)), recipe, epoch, rank, world_size, skip_batches)
    if isinstance(dataset, OnDevice):
        return DeviceLoader(dataset, batches, _hash(recipe.seed, epoch))
    return _loader(Samples(dataset, (recipe.seed, epoch), recipe.skip_corrupt), batches, recipe, device)


def eval_loader(
    dataset: Dataset, recipe: Recipe, *, rank: int = 0, world_size: int = 1, device: torch.device = CPU
) -> Loader | DeviceLoader:
    """Return the batches of one process in evaluation: images rank, rank + world_size, ...; none twice, none padded.

    `device` is as in `train_loader`.
    """
    batches = EvalBatches(range(rank, len(_sized(dataset)), world_size), int(recipe.batch_size * EVAL_BATCH))
    if isinstance(dataset, OnDevice):
        return DeviceLoader(dataset, batches, 0)
    return _loader(Samples(dataset, None), batches, recipe, device)


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """The (index, copy) keys of each batch of one process in one epoch.

    The epoch is one list shared by all processes, dealt out in turn: step s is the same set of samples for every
    number of processes, and of parts, with the same global batch.
    """

    def __init__(self, n: int, recipe: Recipe, epoch: int, rank: int, world_size: int, skip: int) -> None:
        self.n, self.rank, self.world_size, self.skip = n, rank, world_size, skip
        self.plan = batch_plan(recipe, world_size)
        self.steps = steps_per_epoch(n, recipe, world_size)
        self.copies = COPIES if recipe.repeated_aug else 1
        self.seed = _hash(recipe.seed, epoch)
        if not 0 <= skip <= self.steps:
            raise LapeError(f"cannot skip {skip} batches of an epoch of {self.steps}: give a number between the two")

    def __len__(self) -> int:
        return (self.steps - self.skip) * self.plan.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed)).tolist()
        together = self.plan.size * self.world_size
        for batch in range(self.skip * self.plan.parts, self.steps * self.plan.parts):
            places = range(batch * together + self.rank, (batch + 1) * together, self.world_size)
            yield [(order[place // self.copies], place % self.copies) for place in places]


class EvalBatches(Sampler[list[tuple[int, int]]]):
    """The keys of each batch of one process in evaluation, the last one shorter where they do not divide."""

    def __init__(self, indices: range, batch_size: int) -> None:
        self.indices, self.batch_size = indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(index, 0) for index in self.indices[first : first + self.batch_size]]


class Samples(Dataset):
    """A data set addressed by (index, copy), each item drawn from its own random stream.

    Python's, NumPy's and torch's CPU generators are seeded before each item and put back after the batch: an
    augmentation may use any of them, and the caller's streams do not notice. With `stream` None nothing is seeded.
    With `skip_corrupt` an image that cannot be read is replaced by the next one that can.
    """

    def __init__(self, dataset: Dataset, stream: tuple[int, int] | None, skip_corrupt: bool = False) -> None:
        self.dataset, self.stream, self.skip_corrupt = dataset, stream, skip_corrupt
        self._take: Callable[[int], Any] = getattr(
            dataset, "levels", dataset.__getitem__
        )  # of a batch: 8-bit if it can

    def __len__(self) -> int:
        return len(_sized(self.dataset))

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        with _generators_kept():
            return self._draw(*key, self.dataset.__getitem__)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Any:
        """Return a batch, or the `DataError` met: raised in a worker it would arrive wrapped in a traceback."""
        try:
            if isinstance(self.dataset, InMemory):
                return self.dataset.batch([index for index, _ in keys])
            skipped: list[str] = []
            with _generators_kept():
                items = [self._draw_readable(*key, skipped) for key in keys]
            return (items, skipped) if skipped else items
        except DataError as error:
            way_out = "" if self.stream is None or self.skip_corrupt else ", or train without it: --skip-corrupt"
            return DataError(f"{error}{way_out}")

    def _draw_readable(self, index: int, copy: int, skipped: list[str]) -> Any:
        if not self.skip_corrupt:
            return self._draw(index, copy, self._take)
        for further in range(MOST_SKIPPED):
            try:
                return self._draw((index + further) % len(self), copy, self._take)
            except DataError as error:
                skipped.append(str(error))
        raise DataError(f"{MOST_SKIPPED} images in a row cannot be read, the last: {skipped[-1]}")

    def _draw(self, index: int, copy: int, take: Callable[[int], Any]) -> Any:
        if self.stream is not None:
            seed = _hash(*self.stream, index, copy)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed CUDA as well
        return take(index)


class Loader(DataLoader):
    """A `DataLoader` that raises a sample's `DataError` as it was; `skipped` are those of images that were left out."""

    def __init__(self, *args: Any, device: torch.device = CPU, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped: list[str] = []  # of the batches handed out so far
        self.device = device  # where 8-bit batches are finished

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with warnings.catch_warnings():
            # the workers decode images only, none of the locks that a forked thread may hold
            warnings.filterwarnings("ignore", message=".*fork.*may lead to deadlocks", category=DeprecationWarning)
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, DataError):
                break
            if len(batch) == 3:
                self.skipped += batch[2]
            images, targets = batch[:2]
            if isinstance(images, tuple):
                images = self.dataset.dataset.finish(*images, self.device)  # type: ignore[attr-defined]
            yield images, targets
        else:
            return
        del batches  # stops the workers; left to the garbage collector, that takes torch ten seconds
        raise DataError(str(batch))


def _loader(samples: Samples, batches: Sampler, recipe: Recipe, device: torch.device) -> Loader:
    # more workers than processors only cost, and torch warns of them; tensors in memory need none
    workers = 0 if isinstance(samples.dataset, InMemory) else min(recipe.num_workers, processors())
    return Loader(
        samples,
        batch_sampler=batches,
        device=device,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=recipe.pin_mem and recipe.device != "cpu" and torch.cuda.is_available(),
        # fork: a fresh interpreter would import torch again in every worker of every epoch
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_outlive_sigterm,
        generator=torch.Generator(),  # its own, or starting an epoch would advance the caller's
    )


def _outlive_sigterm(_worker: int) -> None:
    """A launcher sends SIGTERM to loader processes, too; they end with the training process, which saves first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(batch: Any) -> Any:
    if isinstance(batch, DataError) or (isinstance(batch, tuple) and isinstance(batch[0], torch.Tensor)):
        return batch
    items, skipped = batch if isinstance(batch, tuple) else (batch, [])
    if isinstance(items[0][0], tuple):  # 8-bit
        levels, targets = default_collate([(pixels, target) for (pixels, _), target in items])
        images: Any = (levels, [patches for (_, patches), _ in items])
    else:
        images, targets = default_collate(items)
    return (images, targets, skipped) if skipped else (images, targets)


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hash(*parts: int) -> int:
    """Return 63 well-mixed bits of some integers, the same on every machine."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def _generators_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _sized(dataset: Dataset) -> Sized:
    assert isinstance(dataset, Sized)
    return dataset


# -- data sets ---------------------------------------------------------------------------------------------------------

Opened = tuple[dict[str, Dataset], list[str], str]  # the sets by split, the classes, the name


class Images(Dataset):
    """Images in memory or in files, read by `read(source)`: (image, target) items."""

    def __init__(self, sources: Any, targets: Sequence[int], read: Callable, transform: Transform) -> None:
        self.sources, self.targets, self.read, self.transform = sources, targets, read, transform

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.read(self.sources[index])), self.targets[index]


class InMemory(Dataset):
    """A data set without randomness, transformed once: `images` (n, in_chans, H, W) float32, `targets` (n,) int64."""

    def __init__(self, dataset: Images) -> None:
        self.images = torch.stack([dataset[index][0] for index in range(len(dataset))])
        self.targets = torch.tensor(dataset.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.targets[index])

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images and targets of some indices, in one indexing operation."""
        chosen = torch.tensor(indices, dtype=torch.long)
        return self.images[chosen], self.targets[chosen]


def _reader(recipe: Recipe) -> tuple[Callable[..., Opened], Path]:
    root = Path(recipe.data_path).expanduser()
    if recipe.data_path:
        _check_root(root)
        return READERS[recipe.data_set], root
    if recipe.data_set != "IMNET":
        raise DataError(f"--data-set {recipe.data_set} needs --data-path: nothing is downloaded, name its folder")
    return _digits, root


def _check_root(root: Path) -> None:
    if not root.exists():
        raise DataError(f"data folder {root} does not exist: {LAYOUT}, or be left out for the packaged digits")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a data folder: unpack it; {LAYOUT}")
    if not _names(root):
        raise DataError(f"data folder {root} is empty: {LAYOUT}")


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the packaged digits: images (n, 8, 8) uint8 with values 0..16, labels (n,) uint8; "train" or "val".

    1,797 handwritten digits by 13 people, 8 x 8 pixels that count the ink of 4 x 4 cells: the test part of the UCI
    repository's "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
    https://doi.org/10.24432/C50P49), licence CC BY 4.0. Of each class the images number 2, 7, 12, ... (counted from 0
    in the file's order) are the validation set: 359 images, 1,438 remain for training, each class in proportion.

    The file was made from `sklearn/datasets/data/digits.csv.gz` of the scikit-learn 1.9.1 wheel, nothing else changed:

        table = np.loadtxt("digits.csv.gz", delimiter=",").astype(np.uint8)
        np.savez_compressed("digits.npz", images=table[:, :64].reshape(-1, 8, 8), labels=table[:, 64])
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    turn = np.zeros(len(labels), dtype=int)  # how many of its class come before each image
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    chosen = (turn % 5 == 2) == (split == "val")
    return images[chosen], labels[chosen]


def _digits(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """Digits are neither cropped nor mirrored in training; with no other augmentation they become tensors at once."""
    sets: dict[str, Dataset] = {}
    for split, transform in transforms.items():
        images, labels = digits(split)
        grey = np.round(images * (255 / 16)).astype(np.uint8)
        found = Images(grey, labels.tolist(), partial(_from_array, in_chans=recipe.in_chans), transform)
        fits = len(grey) * recipe.in_chans * recipe.input_size**2 * 4 <= CACHE_BYTES
        still = split == "val" or not is_augmented(recipe)
        sets[split] = InMemory(found) if fits and still else found
    return sets, [str(label) for label in range(10)], "packaged digits (8x8, UCI)"


def _from_array(pixels: np.ndarray, in_chans: int) -> Image.Image:
    return to_mode(Image.fromarray(pixels), in_chans)


def _folders(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """`root/<split>/<class>/*`; the other split's classes are compared where it exists, even if it is not used."""
    classes = {split: _classes(root, split) for split in transforms}
    for split in {"train", "val"} - set(classes):
        present = _subfolders(root / split) if (root / split).is_dir() else []
        if present:
            classes[split] = present
    if len(classes) == 2 and classes["train"] != classes["val"]:
        raise DataError(f"classes of {root}/train and {root}/val differ: {_difference(classes)}; make both the same")
    sets: dict[str, Dataset] = {
        split: _folder(root / split, recipe, transform) for split, transform in transforms.items()
    }
    return sets, next(iter(classes.values())), _counted(str(root), sets, next(iter(classes.values())))


def _folder(folder: Path, recipe: Recipe, transform: Transform) -> ImageFolder:
    found = ImageFolder(
        str(folder),
        transform=transform,
        loader=partial(load_image, in_chans=recipe.in_chans),
        is_valid_file=is_image,
        allow_empty=True,  # reported here, with the folder and the fix
    )
    counts = np.bincount(found.targets, minlength=len(found.classes))
    empty = [folder / name for name, count in zip(found.classes, counts, strict=True) if not count]
    for path in empty:
        _names(path)  # an unreadable folder looks empty to torchvision
    if empty:
        kinds = " ".join(IMG_EXTENSIONS)
        raise DataError(
            f"no image in class folder {_first(empty)}: put images there ({kinds}) or remove it from train and val"
        )
    return found


def _classes(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{root} has no folder {split}/ (it holds {_first(_names(root))}): {LAYOUT}")
    classes = _subfolders(folder)
    flat = [name for name in _names(folder) if is_image(name) and name not in classes]
    if flat:
        fix = f"move every image to {folder}/<class>/"
        raise DataError(f"{folder} holds {len(flat)} image(s) outside class folders ({_first(flat)}): {fix}")
    if not classes:
        raise DataError(f"{folder} has no class folders: {LAYOUT}")
    return classes


def _subfolders(folder: Path) -> list[str]:
    return [name for name in _names(folder) if (folder / name).is_dir()]


def _names(folder: Path) -> list[str]:
    """List a folder in lexical order, torchvision's."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot read folder {folder} ({error.strerror}): make it readable for this user") from None


def is_image(path: str) -> bool:
    """Whether the name is an image's; macOS leaves `._x.jpg` beside x.jpg, which is none."""
    return has_file_allowed_extension(path, IMG_EXTENSIONS) and not os.path.basename(path).startswith("._")


def _difference(classes: dict[str, list[str]]) -> str:
    train, val = set(classes["train"]), set(classes["val"])
    parts = {"train": sorted(train - val), "val": sorted(val - train)}
    return ", ".join(f"only in {split}: {_first(names)}" for split, names in parts.items() if names)


def _first(names: Sequence[Any], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return " ".join(str(name) for name in names[:most]) + rest


def _counted(what: str, sets: dict[str, Dataset], classes: list[str]) -> str:
    words = {"train": "training", "val": "validation"}
    counts = ", ".join(f"{len(_sized(found))} {words[split]} images" for split, found in sets.items())
    return f"{what} ({len(classes)} classes, {counts})"


def _cifar(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """CIFAR-100 as in DeiT, or CIFAR-10 where the folder holds that; the official Python files, never downloaded."""
    known = {"CIFAR-100": CIFAR100, "CIFAR-10": CIFAR10}
    name = next((name for name, kind in known.items() if (root / kind.base_folder).is_dir()), None)
    if name is None:
        wanted = " or ".join(f"{root / kind.base_folder}" for kind in known.values())
        raise DataError(f"no CIFAR in {root}: unpack the Python version of the official archive, to get {wanted}")
    sets: dict[str, Dataset] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy on how the official files were pickled, long ago
            for split in transforms:
                found = known[name](str(root), train=split == "train", download=False)
                read = partial(_from_array, in_chans=recipe.in_chans)
                sets[split] = Images(found.data, found.targets, read, transforms[split])
    except (RuntimeError, OSError) as error:
        folder = root / known[name].base_folder
        raise DataError(
            f"{folder} is incomplete or altered ({type(error).__name__}): unpack the archive again"
        ) from error
    return sets, list(found.classes), _counted(f"{name} in {root}", sets, found.classes)


def _inat(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """iNaturalist: `train<year>.json`, `val<year>.json`, `categories.json`; labels in DeiT's order.

    A label is numbered when the training annotations first mention it. `file_name` is <set>/<group>/<category>/<file>;
    the images lie there, or without <group> as DeiT has them.
    """
    year = {"INAT": 2018, "INAT19": 2019}[recipe.data_set]
    listing = _json(root / f"train{year}.json")
    table = _json(root / "categories.json")
    try:
        label_of = {int(entry.get("id", place)): str(entry[recipe.inat_category]) for place, entry in enumerate(table)}
        seen = dict.fromkeys(label_of[int(entry["category_id"])] for entry in listing["annotations"])
        number = {label: place for place, label in enumerate(seen)}
        sets: dict[str, Dataset] = {}
        for split, transform in transforms.items():
            images = listing["images"] if split == "train" else _json(root / f"{split}{year}.json")["images"]
            parts = [entry["file_name"].split("/") for entry in images]
            targets = [number[label_of[int(part[2])]] for part in parts]
            paths = _inat_paths(root, parts)
            sets[split] = Images(paths, targets, partial(load_image, in_chans=recipe.in_chans), transform)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LapeError):
            raise
        raise DataError(
            f"the json files in {root} are not iNaturalist {year} ({type(error).__name__}: {error}) or have no "
            f"inat_category {recipe.inat_category!r}: check the files, or use --inat-category name"
        ) from error
    return sets, list(number), _counted(f"iNaturalist {year} in {root}", sets, list(number))


def _inat_paths(root: Path, parts: list[list[str]]) -> list[str]:
    whole = ["/".join([str(root), *part]) for part in parts]
    short = ["/".join([str(root), part[0], *part[2:]]) for part in parts]
    for paths in (whole, short):
        if paths and os.path.exists(paths[0]):
            return paths
    raise DataError(f"no image at {_first(whole[:1] + short[:1]) or root}: unpack the images beside the json files")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): an iNaturalist folder holds it") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): get the file again") from None


READERS: dict[str, Callable[..., Opened]] = {"IMNET": _folders, "CIFAR": _cifar, "INAT": _inat, "INAT19": _inat}
