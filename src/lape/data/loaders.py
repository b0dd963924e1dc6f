"""Loaders whose every random choice can be repeated.

**Randomness.** What a training image becomes is a pure function of (seed, epoch, index, copy), and which images make
step s of an epoch is one of (seed, epoch, size of the global batch). So neither the number of loader processes, nor
how many processes share a global batch, nor an interruption changes what a model sees; no random state needs saving.

**Repeated augmentation** as in DeiT: each image of the shuffled order appears three times in a row, each time augmented
anew and, on several processes, each time on another one; an epoch still has about as many samples as the data set, so
it shows about a third of the images. DeiT cuts the epoch to a multiple of 256 (no sample at all below 256 images); here
it has as many whole batches as fit, for any number of images and processes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from lape.data.device import DeviceLoader, OnDevice
from lape.data.processes import begin_loader, end_loaders, loader_context, processors
from lape.errors import DataError, LapeError

if TYPE_CHECKING:
    from lape.data.fast import Patch
    from lape.recipe import Recipe

COPIES = 3  # of an image under repeated augmentation
EVAL_BATCH = 1.5  # DeiT's evaluation batch, as a multiple of the training batch
MOST_SKIPPED = 20  # unreadable images in a row; more is no accident
CPU = torch.device("cpu")

Key = tuple[int, int]  # index, copy
Item = TypeVar("Item")


class Items(Protocol):
    """A data set of (image (C, H, W), class number) items."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one optimizer step are dealt out: `total` = `size` x processes x `parts`."""

    size: int  # images that a process computes at once
    parts: int  # such batches a step, whose gradients are accumulated
    total: int


def check_batch(recipe: Recipe) -> None:
    """Raises LapeError for an odd batch under mixup or cutmix, which pair the images of a batch."""
    if not recipe.global_batch and mixes_images(recipe) and recipe.batch_size % 2:
        raise LapeError(
            f"batch_size={recipe.batch_size} is odd and mixup/cutmix pair the images of a batch: "
            f"use --batch-size {recipe.batch_size + 1}, or --mixup 0 --cutmix 0"
        )


def mixes_images(recipe: Recipe) -> bool:
    """Whether mixup or cutmix pair the images of a batch."""
    return recipe.mixup > 0 or recipe.cutmix > 0 or recipe.cutmix_minmax is not None


def batch_plan(recipe: Recipe, world_size: int = 1) -> BatchPlan:
    """Return the batches of a step. With `global_batch` their total is that on every number of processes.

    Raises LapeError where the processes cannot share the `global_batch` (under mixup or cutmix: in even batches).
    """
    mixes = mixes_images(recipe)
    if not recipe.global_batch:
        return BatchPlan(recipe.batch_size, 1, recipe.batch_size * world_size)
    share, remainder = divmod(recipe.global_batch, world_size)
    sizes = [n for n in range(1, min(recipe.batch_size, share) + 1) if share % n == 0 and not (mixes and n % 2)]
    if remainder or not sizes:
        step = world_size * (2 if mixes else 1)
        near = max(round(recipe.global_batch / step), 1) * step
        why = ", in even batches for mixup/cutmix" if mixes else ""
        raise LapeError(
            f"global_batch={recipe.global_batch} cannot be shared by {world_size} process(es) with at most "
            f"{recipe.batch_size} images at once{why}: use --global-batch {near} and --batch-size {step // world_size} "
            "or more"
        )
    return BatchPlan(sizes[-1], share // sizes[-1], recipe.global_batch)


def steps_per_epoch(n_samples: int, recipe: Recipe, world_size: int = 1) -> int:
    """Return the number of optimizer steps of an epoch: whole batches of all processes that fit into the samples.

    Raises DataError where not even one fits.
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
    dataset: Items,
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
    here, also when a worker met it; with `skip_corrupt` the loader's `omissions` names it.

    `device` is where `decode` "fast" normalises the batch, and leaves the images; others come in host memory.

    Raises DataError where no batch fits, LapeError where `skip_batches` is not a number of batches of this epoch.
    """
    batches = TrainBatches(len(dataset), recipe, epoch, rank, world_size, skip_batches)
    if isinstance(dataset, OnDevice):
        return DeviceLoader(dataset, batches, _hash(recipe.seed, epoch))
    return Loader(Samples(dataset, (recipe.seed, epoch), recipe.skip_corrupt), batches, recipe, device)


def eval_loader(
    dataset: Items, recipe: Recipe, *, rank: int = 0, world_size: int = 1, device: torch.device = CPU
) -> Loader | DeviceLoader:
    """Return the batches of one process in evaluation: images rank, rank + world_size, ...; none twice, none padded."""
    batches = eval_batches(range(rank, len(dataset), world_size), int(recipe.batch_size * EVAL_BATCH))
    if isinstance(dataset, OnDevice):
        return DeviceLoader(dataset, batches, 0)
    return Loader(Samples(dataset, None), batches, recipe, device)


class TrainBatches(Sampler[list[Key]]):
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

    def __iter__(self) -> Iterator[list[Key]]:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed)).tolist()
        images_at_once = self.plan.size * self.world_size
        for batch in range(self.skip * self.plan.parts, self.steps * self.plan.parts):
            places = range(batch * images_at_once + self.rank, (batch + 1) * images_at_once, self.world_size)
            yield [(order[place // self.copies], place % self.copies) for place in places]


def eval_batches(indices: range, batch_size: int) -> Sampler[list[Key]]:
    """The keys of each batch in evaluation, the last one shorter where they do not divide."""
    keys: Any = [(index, 0) for index in indices]
    return BatchSampler(keys, batch_size, drop_last=False)  # type: ignore[return-value]


class Batch(NamedTuple):
    """A batch on its way from a loader process. One that met an image it must not leave out holds the reason alone."""

    images: Tensor  # (B, C, H, W) float32; with `decode` "fast" (B, H, W, C) uint8
    targets: Tensor  # (B,) int64
    patches: Sequence[list[Patch]] = ()  # of 8-bit images: what is to be erased of each
    omissions: Sequence[str] = ()  # one line an image that `skip_corrupt` replaced, with its path and the reason
    unreadable: str = ""  # the line about the image for which there is no batch


class Samples(Dataset[tuple[Tensor, int]]):
    """A data set addressed by (index, copy), each item drawn from its own random stream.

    Python's, NumPy's and torch's CPU generators are seeded before each item and put back after the batch: an
    augmentation may use any of them, and the caller's streams do not notice. With `stream` None nothing is seeded.
    With `skip_corrupt` an image that cannot be read is replaced by the next one that can.
    """

    def __init__(self, dataset: Items, stream: tuple[int, int] | None, skip_corrupt: bool = False) -> None:
        self.dataset, self.stream, self.skip_corrupt = dataset, stream, skip_corrupt
        self._take: Callable[[int], Any] = getattr(dataset, "levels", dataset.__getitem__)  # 8-bit if it can

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        with _generators_kept():
            return self._draw(*key, self.dataset.__getitem__)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return a batch; a `DataError` that is raised in a worker would arrive wrapped in a traceback."""
        omissions: list[str] = []
        try:
            with _generators_kept():
                items = [self._draw_readable(*key, omissions) for key in keys]
        except DataError as error:
            way_out = "" if self.stream is None or self.skip_corrupt else ", or train without it: --skip-corrupt"
            return Batch(torch.empty(0), torch.empty(0), unreadable=f"{error}{way_out}")
        images, targets, *patches = (list(part) for part in zip(*items, strict=True))  # patches of 8-bit images
        return Batch(default_collate(images), default_collate(targets), next(iter(patches), []), omissions)

    def _draw_readable(self, index: int, copy: int, omissions: list[str]) -> Any:
        if not self.skip_corrupt:
            return self._draw(index, copy, self._take)
        for offset in range(MOST_SKIPPED):
            try:
                return self._draw((index + offset) % len(self), copy, self._take)
            except DataError as error:
                omissions.append(str(error))
        raise DataError(f"{MOST_SKIPPED} images in a row cannot be read, the last: {omissions[-1]}")

    def _draw(self, index: int, copy: int, take: Callable[[int], Item]) -> Item:
        if self.stream is not None:
            seed = _hash(*self.stream, index, copy)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would reseed CUDA as well
        return take(index)


class Loader(DataLoader[Any]):
    """Batches (images (B, C, H, W) float32, targets (B,)); raises the `DataError` of a sample."""

    def __init__(self, samples: Samples, batches: Sampler[list[Key]], recipe: Recipe, device: torch.device) -> None:
        workers = min(recipe.num_workers, processors())  # more only cost, and torch warns of them
        super().__init__(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=recipe.pin_mem and recipe.device != "cpu" and torch.cuda.is_available(),
            multiprocessing_context=loader_context() if workers else None,
            worker_init_fn=begin_loader,
            generator=torch.Generator(),  # its own, or starting an epoch would advance the caller's
        )
        self.omissions: list[str] = []  # a line for each image that was left out of the batches handed out so far
        self.samples, self.device = samples, device  # the device: where 8-bit batches are finished

    def __iter__(self) -> Generator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        with warnings.catch_warnings():
            # the workers decode images only, none of the locks that a forked thread may hold
            warnings.filterwarnings("ignore", message=".*fork.*may lead to deadlocks", category=DeprecationWarning)
            batches: Iterator[Batch] = super().__iter__()
        finish = getattr(self.samples.dataset, "finish", None)  # of 8-bit images
        try:
            for batch in batches:
                if batch.unreadable:
                    raise DataError(batch.unreadable)
                self.omissions += batch.omissions
                images = batch.images
                if finish is not None:
                    images = finish(images, batch.patches, self.device)
                yield images, batch.targets
        finally:
            end_loaders(batches)


def _as_it_is(batch: Any) -> Any:
    return batch


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
