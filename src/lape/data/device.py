"""Images kept on the device as bytes, and the training recipe run there, batched, each image with its own draws.

The recipe is the one of `lape.data.augment`: `split_transform` reads its steps (torchvision's and timm's objects with
their numbers) and returns what runs once, on PIL images, and a batched twin of every random step. The pixels are
Pillow's (`lape.data.batched`); the draws have the same distributions, but are other ones, so a run differs from one on
the PIL path as by another seed. As on the PIL path they are a pure function of (seed, epoch, index, copy): `Stream`
hashes these numbers with the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014). Draws are made on the host, so that it never waits for the device, but for erasing's noise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lape.data import batched
from lape.data.images import ToMode
from lape.errors import DataError, LapeError

GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the odd number next to 2^64 / golden ratio, as int64
MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
FREE_PART = 0.5  # of the free memory that images may fill
CUBIC = {InterpolationMode.BILINEAR: False, InterpolationMode.BICUBIC: True, 2: False, 3: True}  # torchvision's, PIL's
LEAVE_OUT = "leave --data-on-device out"


class Stream:
    """Random numbers of each image of a batch: a function of its key, and of how many were drawn before."""

    def __init__(self, keys_B: Tensor) -> None:
        self.keys, self.draws = keys_B, 0

    @classmethod
    def of(cls, seed: int, index_B: Tensor, copy_B: Tensor) -> Stream:
        """`seed` stands for the run and the epoch; any 63 bits."""
        keys = torch.full_like(index_B, seed)
        for part in (index_B, copy_B):
            keys = _mix(keys + (part + 1) * GOLDEN)
        return cls(keys)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B,) float64 in [low, high)."""
        return low + (high - low) * _unit(self._bits())

    def integer(self, count: int | Tensor) -> Tensor:
        """(B,) int64 in 0..count - 1."""
        return (self.uniform() * count).long()

    def happens(self, probability: float) -> Tensor:
        return self.uniform() < probability

    def normal(self, mean: float, std: float) -> Tensor:
        deviation: Tensor = torch.special.ndtri(self.uniform().clamp(min=2.0**-53))
        return mean + std * deviation

    def noise(self, members: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal float32 (len(members), *shape) of these members of the batch, made on the device."""
        first = self._bits()[members].to(device, non_blocking=True)
        return _normal(first[:, None], torch.arange(1, math.prod(shape) + 1, device=device)).view(-1, *shape)

    def noise_at(self, members_m: Tensor, index_mk: Tensor) -> Tensor:
        """(m, k) on the host: of these members of the batch what `noise` has at these flat indices of its shape."""
        return _normal(self._bits()[members_m][:, None], index_mk + 1)

    def _bits(self) -> Tensor:
        self.draws += 1
        return _mix(self.keys + torch.tensor(self.draws) * GOLDEN)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which wraps around."""
    bits = (bits ^ _logical_shift(bits, 30)).mul_(MIX[0])
    bits = bits.bitwise_xor_(_logical_shift(bits, 27)).mul_(MIX[1])
    return bits.bitwise_xor_(_logical_shift(bits, 31))


def _normal(first: Tensor, step: Tensor) -> Tensor:
    """Standard normal float32 number `step` of a stream within a stream, whose first bits are given."""
    middle = (_unit(_mix(first + GOLDEN * step)) + 2.0**-54).float().clamp(2.0**-25, 1 - 2.0**-24)
    deviation: Tensor = torch.special.ndtri(middle)
    return deviation


def _logical_shift(bits: Tensor, by: int) -> Tensor:
    """Unsigned shift to the right of int64."""
    return (bits >> by) & ((1 << 64 - by) - 1)


def _unit(bits: Tensor) -> Tensor:
    return _logical_shift(bits, 11).double() * 2.0**-53


# Images (B, C, H, W) on the device, 8-bit until normalised -> images; may change those that it is given in place.
Step = Callable[[Tensor, Stream], Tensor]
Twin = Callable[[Any], Step]


def split_transform(transform: transforms.Compose) -> tuple[transforms.Compose, list[Step]]:
    """Return the steps that run once, PIL image to PIL image, and the batched twins of the others.

    Raises LapeError for a step, or a setting of it, that has no twin here.
    """
    steps = list(transform.transforms)
    count = next((number for number, step in enumerate(steps) if type(step) in TWINS), len(steps))
    once, rest = steps[:count], steps[count:]
    types = (ToMode, transforms.Resize, ResizeKeepRatio, transforms.CenterCrop)
    unknown = [step for step in once if type(step) not in types] + [step for step in rest if type(step) not in TWINS]
    if unknown:
        raise LapeError(f"{type(unknown[0]).__name__} is not made for batches on the device: {LEAVE_OUT}")
    twins = [(step, TWINS[type(step)]) for step in rest]
    return transforms.Compose(once), [make(step) for step, make in twins if make is not None]


class ResizedCrop:
    """torchvision's random resized crop: ten tries for a box, else the largest of an allowed shape."""

    def __init__(self, step: RandomResizedCropAndInterpolation) -> None:
        self.size, self.scale, self.ratio = step.size, step.scale, step.ratio
        self.cubic = _is_bicubic(step.interpolation)

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        return batched.resized_crop(images, self.boxes(stream, *images.shape[2:]), self.size, _draw_cubic(self, stream))

    def boxes(self, stream: Stream, height: int, width: int) -> Tensor:
        """(B, 4): top, left, height, width."""
        low, high = self.ratio
        wide = min(width, round(height * high)) if width / height > high else width
        tall = min(height, round(width / low)) if width / height < low else height
        middle = ((height - tall) // 2, (width - wide) // 2, tall, wide)
        return _boxes(stream, middle, self.scale, (math.log(low), math.log(high)), height, width)


class Crop:
    """A random place in the padded image."""

    def __init__(self, step: transforms.RandomCrop) -> None:
        self.size, self.padding, self.mode = step.size, step.padding, step.padding_mode
        if not isinstance(self.padding, int) or self.mode not in ("constant", "reflect") or step.fill:
            raise LapeError(f"a random crop with padding {self.padding} {self.mode} is not made here: {LEAVE_OUT}")

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        corners = [
            stream.integer(side + 2 * self.padding - length + 1) - self.padding
            for side, length in zip(images.shape[2:], self.size, strict=True)
        ]
        return batched.shifted_crop(images, torch.stack(corners, dim=1), self.size, self.mode)


class Flip:
    def __init__(self, step: transforms.RandomHorizontalFlip) -> None:
        self.p = step.p

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        flipped = stream.happens(self.p).to(images.device, non_blocking=True)
        return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


class Jitter:
    """torchvision's colour jitter: brightness, contrast and colour in an order of its own for each image."""

    def __init__(self, step: transforms.ColorJitter) -> None:
        if step.hue is not None:
            raise LapeError(f"colour jitter of the hue is not made for batches on the device: {LEAVE_OUT}")
        ranges = {"Brightness": step.brightness, "Contrast": step.contrast, "Color": step.saturation}
        self.ranges = {name: bounds for name, bounds in ranges.items() if bounds is not None}

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        factors = {name: stream.uniform(*bounds) for name, bounds in self.ranges.items()}
        order = torch.stack([stream.uniform() for _ in factors], dim=1).argsort(1)
        for turn in range(len(factors)):
            for number, (name, factor) in enumerate(factors.items()):
                _change(images, order[:, turn] == number, PIXELS[name], factor)
        return images


class Policy:
    """timm's RandAugment and AutoAugment: a list of operations is drawn `draws` times, and each of them applied with
    its own probability. All operations have the first one's spread and fill colour."""

    def __init__(self, lists: Sequence[Sequence[AugmentOp]], draws: int) -> None:
        self.ops = [op for some in lists for op in some]
        unknown = [op.name for op in self.ops if op.name not in ARGUMENTS]
        if unknown:  # cannot happen with timm 1.0.31
            raise LapeError(f"timm's operation {unknown[0]} is not made for batches on the device: {LEAVE_OUT}")
        self.draws, self.cubic = draws, _is_bicubic(self.ops[0].kwargs["resample"])
        rows = torch.arange(len(self.ops)).split([len(some) for some in lists])
        self.lists = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # numbers of operations
        self.chances = torch.tensor([op.prob for op in self.ops], dtype=torch.float64)
        self.magnitudes = torch.tensor([op.magnitude for op in self.ops], dtype=torch.float64)

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        for _ in range(self.draws):
            for which in self.lists[stream.integer(len(self.lists))].unbind(1):
                applies, level, unit = self.draw(which, stream)
                self._apply(images, torch.where(applies, which, -1), level, unit, _draw_cubic(self, stream))
        return images

    def draw(self, which: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) each: whether the operation is applied, its level, and a number in [0, 1) for what else it draws."""
        applies = (which >= 0) & (stream.uniform() <= self.chances[which])
        deviation, magnitude = self.ops[0].magnitude_std, self.magnitudes[which]
        level = magnitude * stream.uniform() if deviation == math.inf else magnitude + stream.normal(0, deviation)
        return applies, level.clamp(0, self.ops[0].magnitude_max or 10), stream.uniform()

    def _apply(self, images: Tensor, which: Tensor, level: Tensor, unit: Tensor, cubic: Tensor) -> None:
        height, width = images.shape[2:]
        matrices_B6 = torch.zeros(len(images), 6, dtype=torch.float64)
        affine = torch.zeros(len(images), dtype=torch.bool)
        for number, op in enumerate(self.ops):
            mine = which == number
            if not mine.any():
                continue
            argument = ARGUMENTS[op.name](level, unit, op.hparams)
            if op.name in PIXELS:
                _change(images, mine, PIXELS[op.name], argument)
            else:
                make, along = MATRICES[op.name]
                pixels = argument * (1 if along is None else images.shape[along])
                matrices_B6[mine] = make(pixels, height, width)[mine]
                affine |= mine
        members = affine.nonzero()[:, 0]
        if len(members):
            device = images.device
            fill = torch.tensor(self.ops[0].kwargs["fillcolor"], dtype=torch.uint8, device=device)
            at = members.to(device, non_blocking=True)
            images[at] = batched.warp(images[at], matrices_B6[members], fill, cubic[members])


class Normalise:
    def __init__(self, step: transforms.Normalize) -> None:
        self.mean, self.std = torch.as_tensor(step.mean), torch.as_tensor(step.std)

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        mean, std = (numbers.view(-1, 1, 1).to(images.device, non_blocking=True) for numbers in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)


class Erase:
    """timm's random erasing: rectangles, ten tries for each to fit, of zeros or of normal noise."""

    def __init__(self, step: RandomErasing) -> None:
        low, high = step.log_aspect_ratio  # of timm's height over width
        self.log_aspect, self.area = (-high, -low), (step.min_area, step.max_area)
        self.probability, self.counts, self.mode = step.probability, (step.min_count, step.max_count), step.mode

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        channels, height, width = images.shape[1:]
        device = images.device
        erased = stream.uniform() <= self.probability
        fewest, most = self.counts
        count = fewest + stream.integer(most - fewest + 1)
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        for number in range(most):
            box = _boxes(stream, (0, 0, 0, 0), self.area, self.log_aspect, height, width, spare=1, parts=count)
            members = (erased & (count > number)).nonzero()[:, 0]
            top, left, h, w = (part.view(-1, 1) for part in box[members].to(device, non_blocking=True).unbind(1))
            tall, wide = (rows >= top) & (rows < top + h), (columns >= left) & (columns < left + w)
            inside = tall[:, None, :, None] & wide[:, None, None, :]
            if self.mode == "pixel" and device.type == "cpu":  # on a GPU `nonzero` would make the host wait
                image, row, column = inside[:, 0].nonzero().unbind(1)
                layers = height * width * torch.arange(channels)
                index = (row * width + column)[:, None] + layers
                images[members[image], :, row, column] = stream.noise_at(members[image], index)
                continue
            shape = {"const": (), "rand": (channels, 1, 1), "pixel": (channels, height, width)}[self.mode]
            values: Tensor | float = stream.noise(members, shape, device) if shape else 0.0
            if len(members):
                at = members.to(device, non_blocking=True)
                images[at] = torch.where(inside, torch.as_tensor(values, device=device), images[at])
        return images


def _boxes(
    stream: Stream,
    fallback: Sequence[int],
    area: tuple[float, float],
    log_aspect: tuple[float, float],
    height: int,
    width: int,
    *,
    spare: int = 0,
    parts: Tensor | int = 1,
) -> Tensor:
    """(B, 4): top, left, height, width of the first of ten tries that leaves `spare` rows and columns, or `fallback`.

    A try has a part of the image's area, divided by `parts`, and an aspect (width over height).
    """
    box = torch.tensor(fallback).repeat(len(stream.keys), 1)
    pending = torch.ones(len(box), dtype=torch.bool)
    for _ in range(10):
        pixels = stream.uniform(*area) * height * width / parts
        aspect = stream.uniform(*log_aspect).exp()
        w, h = (pixels * aspect).sqrt().round().long(), (pixels / aspect).sqrt().round().long()
        top, left = stream.integer(height - h + 1), stream.integer(width - w + 1)
        fits = pending & (w <= width - spare) & (h <= height - spare)
        box[fits] = torch.stack([top, left, h, w], dim=1)[fits]
        pending &= ~fits
    return box


def _draw_cubic(step: ResizedCrop | Policy, stream: Stream) -> Tensor:
    if step.cubic is None:
        return stream.happens(0.5)
    return torch.full(stream.keys.shape, step.cubic)


def _change(images: Tensor, mine: Tensor, change: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> None:
    members = mine.nonzero()[:, 0]
    if len(members):
        at = members.to(images.device, non_blocking=True)
        images[at] = change(images[at], values[members])


Argument = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def _side(unit: Tensor) -> Tensor:
    return torch.where(unit < 0.5, -1.0, 1.0).double()


def _either_side(most: float, setting: str = "") -> Argument:
    """`most` at level 10, or what a setting of the policy says, to the left or the right."""
    return lambda level, unit, settings: _side(unit) * (level / 10 * float(settings.get(setting, most)))


def _integer(most: int, *, add: int = 0, sign: int = 1, top: int = 256) -> Argument:
    return lambda level, unit, settings: add + sign * (level / 10 * most).trunc().clamp(max=top)


ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")

# Level (0 to 10, beyond with mmax), a number in [0, 1), settings -> argument of an operation; the ranges are timm's.
ARGUMENTS: dict[str, Argument] = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), lambda level, unit, settings: level),
    "Rotate": _either_side(30.0),
    **dict.fromkeys(("ShearX", "ShearY"), _either_side(0.3)),
    **dict.fromkeys(("TranslateX", "TranslateY"), _either_side(250, "translate_const")),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), _either_side(0.45, "translate_pct")),
    "Posterize": _integer(4),
    "PosterizeIncreasing": _integer(4, add=4, sign=-1),
    "PosterizeOriginal": _integer(4, add=4),
    "Solarize": _integer(256),
    "SolarizeIncreasing": _integer(256, add=256, sign=-1),
    "SolarizeAdd": _integer(110, top=128),
    "Desaturate": lambda level, unit, settings: 1 - (0.5 + 0.5 * (level / 10)).clamp(0.5, 1.0),
    "GaussianBlur": lambda level, unit, settings: (0.1 + 1.9 * (level / 10)).clamp(0.1, 2.0),
    "GaussianBlurRand": lambda level, unit, settings: 0.1 + (2.0 * (level / 10).clamp(0, 1) - 0.1) * unit,
    **dict.fromkeys(ENHANCED, lambda level, unit, settings: level / 10 * 1.8 + 0.1),
    **{
        f"{name}Increasing": lambda level, unit, settings: (1 + _side(unit) * (level / 10 * 0.9)).clamp(min=0.1)
        for name in ENHANCED
    },
}

PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, _: batched.autocontrast(images),
    "Equalize": lambda images, _: batched.equalize(images),
    "Invert": lambda images, _: 255 - images,
    "SolarizeAdd": batched.solarize_add,
    "Desaturate": batched.color,
    **dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), batched.posterize),
    **dict.fromkeys(("Solarize", "SolarizeIncreasing"), batched.solarize),
    **dict.fromkeys(("GaussianBlur", "GaussianBlurRand"), batched.gaussian_blur),
    **{f"{name}{suffix}": getattr(batched, name.lower()) for name in ENHANCED for suffix in ("", "Increasing")},
}

# The map, and the dimension of the images (B, C, H, W) that its argument is a part of, None: none.
MATRICES: dict[str, tuple[Callable[[Tensor, int, int], Tensor], int | None]] = {
    "Rotate": (batched.rotation, None),
    "ShearX": (batched.shear_or_shift(1), None),
    "ShearY": (batched.shear_or_shift(3), None),
    "TranslateX": (batched.shear_or_shift(2), None),
    "TranslateY": (batched.shear_or_shift(5), None),
    "TranslateXRel": (batched.shear_or_shift(2), 3),
    "TranslateYRel": (batched.shear_or_shift(5), 2),
}


def _rand_augment(step: RandAugment) -> Step:
    if step.choice_weights is not None:
        raise LapeError(
            "RandAugment by weights is not made for batches on the device: use --aa rand-m9-mstd0.5-inc1, or "
            f"{LEAVE_OUT}"
        )
    return Policy([[op] for op in step.ops], step.num_layers)


def _is_bicubic(interpolation: Any) -> bool | None:
    """Whether it is bicubic; None for either of the two. Raises LapeError for another."""
    if isinstance(interpolation, list | tuple):
        return None
    if interpolation not in CUBIC:
        raise LapeError(
            f"train_interpolation {str(interpolation)!r} is not made for batches on the device: use bicubic, bilinear "
            f"or random, or {LEAVE_OUT}"
        )
    return CUBIC[interpolation]


TWINS: dict[type, Twin | None] = {
    RandomResizedCropAndInterpolation: ResizedCrop,
    transforms.RandomCrop: Crop,
    transforms.RandomHorizontalFlip: Flip,
    transforms.ColorJitter: Jitter,
    RandAugment: _rand_augment,
    AutoAugment: lambda step: Policy(step.policy, 1),
    MaybeToTensor: None,  # a part of Normalise
    transforms.ToTensor: None,
    transforms.Normalize: Normalise,
    RandomErasing: Erase,
}


class OnDevice(Dataset[tuple[Tensor, int]]):
    """`images` (n, C, H, W) and `targets` (n,) int64 on one device, and what is done to a batch of them: the twins for
    uint8 images, nothing for transformed ones."""

    def __init__(self, images: Tensor, targets: Tensor, steps: Sequence[Step]) -> None:
        self.images, self.targets, self.steps = images, targets, steps

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, targets = self.batch([(index, 0)], seed=0)
        return images[0], int(targets[0])

    def batch(self, samples: Sequence[tuple[int, int]], seed: int) -> tuple[Tensor, Tensor]:
        """Return the images (B, C, H, W) float32 of (index, copy) samples, and their targets (B,)."""
        index, copy = torch.tensor(samples).unbind(1)
        stream = Stream.of(seed, index, copy)
        at = index.to(self.images.device, non_blocking=True)
        images, targets = self.images[at], self.targets[at]
        for step in self.steps:
            images = step(images, stream)
        return images, targets


class DeviceLoader:
    """The batches of one epoch of an `OnDevice` set, with what `lape.data.loaders.Loader` offers."""

    def __init__(self, dataset: OnDevice, batch_sampler: Sampler[list[tuple[int, int]]], seed: int) -> None:
        self.dataset, self.batch_sampler, self.seed = dataset, batch_sampler, seed
        self.omissions: list[str] = []  # none: every image was read before the first step

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for samples in self.batch_sampler:
            yield self.dataset.batch(samples, self.seed)


class ToBytes:
    """What runs once on an image: PIL image -> (C, H, W) uint8, all of one size."""

    def __init__(self, once: transforms.Compose) -> None:
        self.once, self.convert = once, transforms.PILToTensor()
        self.shape: tuple[int, ...] | None = None

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.convert(self.once(image))
        if self.shape is None:
            self.shape = tuple(pixels.shape)
        if tuple(pixels.shape) != self.shape:
            (_, h, w), (_, high, wide) = self.shape, pixels.shape
            raise DataError(
                f"images of {w}x{h} and of {wide}x{high} pixels do not fit into one tensor: bring the folder to one "
                f"size first, or {LEAVE_OUT}"
            )
        return pixels


def allocate_images(count: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """An empty (count, *shape) uint8 tensor. Raises DataError where it would take more than half of the free memory."""
    size, free = count * math.prod(shape), _free_bytes(device)
    if size > FREE_PART * free:
        raise DataError(
            f"{count} images of {'x'.join(map(str, shape))} bytes need {size / 2**30:.2f} GiB on {device}, more than "
            f"half of the {free / 2**30:.2f} GiB that are free: {LEAVE_OUT}"
        )
    return torch.empty((count, *shape), dtype=torch.uint8, device=device)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system: the allocation itself will tell
        return math.inf
