"""Images kept on the device as bytes, and the training recipe run there, batched, each image with its own draws.

The recipe is the one of `lape.data.augment`: `split_transform` reads its steps (torchvision's and timm's objects with
their numbers) and returns what runs once, on PIL images, and a batched twin of every random step. The pixels are
Pillow's (`lape.data.batched`); the draws have the same distributions, but are other ones, so a run differs from one on
the PIL path as by another seed. As on the PIL path they are a pure function of (seed, epoch, index, copy): `Stream`
hashes these numbers with the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014). Draws are made on the host, so that it never waits for the device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
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
LEFT_OUT = "leave --data-on-device out"


class Stream:
    """Random numbers of each image of a batch: a function of its key, and of how many were drawn before."""

    def __init__(self, keys_B: Tensor) -> None:
        self.keys, self.drawn = keys_B, 0

    @classmethod
    def of(cls, seed: int, index_B: Tensor, copy_B: Tensor) -> Stream:
        """`seed` stands for the run and the epoch; any 63 bits."""
        keys = torch.full_like(index_B, seed)
        for part in (index_B, copy_B):
            keys = _mixed(keys + (part + 1) * GOLDEN)
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
        return mean + std * torch.special.ndtri(self.uniform().clamp(min=2.0**-53))

    def noise(self, chosen: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal float32 (len(chosen), *shape) of the chosen images, made on the device."""
        first = self._bits()[chosen].to(device, non_blocking=True)
        step = GOLDEN * torch.arange(1, math.prod(shape) + 1, device=device)
        middle = (_unit(_mixed(first[:, None] + step)) + 2.0**-54).float().clamp(2.0**-25, 1 - 2.0**-24)
        return torch.special.ndtri(middle).view(-1, *shape)

    def _bits(self) -> Tensor:
        self.drawn += 1
        return _mixed(self.keys + torch.tensor(self.drawn) * GOLDEN)


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which wraps around."""
    bits = (bits ^ _shifted(bits, 30)) * MIX[0]
    bits = (bits ^ _shifted(bits, 27)) * MIX[1]
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << 64 - by) - 1)


def _unit(bits: Tensor) -> Tensor:
    return _shifted(bits, 11).double() * 2.0**-53


# ------------------------------------------------------------------------------------------------ the steps

Step = Callable[[Tensor, Stream], Tensor]  # images (B, C, H, W) on the device, 8-bit until normalised
Twin = Callable[[Any], Step]


def split_transform(transform: transforms.Compose) -> tuple[transforms.Compose, list[Step]]:
    """Return the steps that run once, PIL image to PIL image, and the batched twins of the others.

    Raises:
        LapeError: a step, or a setting of it, that has no twin here.
    """
    steps = list(transform.transforms)
    once = []
    while steps and not isinstance(steps[0], tuple(TWINS)):
        step = steps.pop(0)
        if not isinstance(step, ToMode | transforms.Resize | ResizeKeepRatio | transforms.CenterCrop):
            raise LapeError(f"{type(step).__name__} is not made for batches on the device: {LEFT_OUT}")
        once.append(step)
    for step in steps:
        if type(step) not in TWINS:
            raise LapeError(f"{type(step).__name__} is not made for batches on the device: {LEFT_OUT}")
    twins = [(step, TWINS[type(step)]) for step in steps]
    return transforms.Compose(once), [make(step) for step, make in twins if make is not None]


@dataclass(frozen=True)
class ResizedCrop:
    """torchvision's random resized crop: ten tries for a box, else the largest of an allowed shape."""

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    cubic: bool | None  # None: either, an image

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        return batched.resized_crop(images, self.boxes(stream, *images.shape[2:]), self.size, _cubic(self, stream))

    def boxes(self, stream: Stream, height: int, width: int) -> Tensor:
        """(B, 4): top, left, height, width."""
        low, high = self.ratio
        wide = min(width, round(height * high)) if width / height > high else width
        tall = min(height, round(width / low)) if width / height < low else height
        middle = ((height - tall) // 2, (width - wide) // 2, tall, wide)
        return _boxes(stream, middle, self.scale, (math.log(low), math.log(high)), height, width)


@dataclass(frozen=True)
class Crop:
    """A random place in the padded image."""

    size: tuple[int, int]
    padding: int
    mode: str

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        corners = [
            stream.integer(side + 2 * self.padding - wanted + 1) - self.padding
            for side, wanted in zip(images.shape[2:], self.size, strict=True)
        ]
        return batched.shifted_crop(images, torch.stack(corners, dim=1), self.size, self.mode)


@dataclass(frozen=True)
class Flip:
    probability: float

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        flipped = stream.happens(self.probability).to(images.device, non_blocking=True)
        return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


@dataclass(frozen=True)
class Jitter:
    """torchvision's colour jitter: brightness, contrast and colour in an order of its own for each image."""

    ranges: dict[str, tuple[float, float]]

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        factors = {name: stream.uniform(*bounds) for name, bounds in self.ranges.items()}
        order = torch.stack([stream.uniform() for _ in factors], dim=1).argsort(1)
        for turn in range(len(factors)):
            for number, (name, factor) in enumerate(factors.items()):
                _change(images, order[:, turn] == number, PIXELS[name], factor)
        return images


class Policy:
    """timm's RandAugment and AutoAugment: some draws, each of a short list of operations with chances of their own."""

    def __init__(self, lists: Sequence[Sequence[AugmentOp]], layers: int, cubic: bool | None) -> None:
        """One of the `lists` is drawn `layers` times; all operations have the first one's spread and fill colour."""
        self.layers, self.cubic = layers, cubic
        self.ops = [op for some in lists for op in some]
        self.lists = torch.full((len(lists), max(map(len, lists))), -1)  # numbers of operations
        first = 0
        for row, some in zip(self.lists, lists, strict=True):
            row[: len(some)] = torch.arange(first, first + len(some))
            first += len(some)
        self.chances = torch.tensor([op.prob for op in self.ops], dtype=torch.float64)
        self.magnitudes = torch.tensor([op.magnitude for op in self.ops], dtype=torch.float64)

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        for _ in range(self.layers):
            for which in self.lists[stream.integer(len(self.lists))].unbind(1):
                used, level, unit = self.draw(which, stream)
                self._apply(images, torch.where(used, which, -1), level, unit, _cubic(self, stream))
        return images

    def draw(self, which: Tensor, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) each: whether the operation is applied, its level, and a number in [0, 1) for what else it draws."""
        used = (which >= 0) & (stream.uniform() <= self.chances[which])
        spread, magnitude = self.ops[0].magnitude_std, self.magnitudes[which]
        level = magnitude * stream.uniform() if spread == math.inf else magnitude + stream.normal(0, spread)
        return used, level.clamp(0, self.ops[0].magnitude_max or 10), stream.uniform()

    def _apply(self, images: Tensor, which: Tensor, level: Tensor, unit: Tensor, cubic: Tensor) -> None:
        height, width = images.shape[2:]
        maps = torch.zeros(len(images), 6, dtype=torch.float64)
        moved = torch.zeros(len(images), dtype=torch.bool)
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
                maps[mine] = make(pixels, height, width)[mine]
                moved |= mine
        places = moved.nonzero()[:, 0]
        if len(places):
            device = images.device
            fill = torch.tensor(self.ops[0].kwargs["fillcolor"], dtype=torch.uint8, device=device)
            at = places.to(device, non_blocking=True)
            images[at] = batched.warp(images[at], maps[places], fill, cubic[places])


@dataclass(frozen=True)
class Normalise:
    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor, stream: Stream | None = None) -> Tensor:
        mean, std = (numbers.view(-1, 1, 1).to(images.device, non_blocking=True) for numbers in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class Erase:
    """timm's random erasing: rectangles, ten tries for each to fit, of zeros or of normal noise."""

    probability: float
    area: tuple[float, float]
    log_aspect: tuple[float, float]
    counts: tuple[int, int]
    mode: str

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        channels, height, width = images.shape[1:]
        device = images.device
        erased = stream.uniform() <= self.probability
        fewest, most = self.counts
        count = fewest + stream.integer(most - fewest + 1)
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        for number in range(most):
            box = _boxes(stream, (0, 0, 0, 0), self.area, self.log_aspect, height, width, spare=1, parts=count)
            places = (erased & (count > number)).nonzero()[:, 0]
            top, left, h, w = (part.view(-1, 1) for part in box[places].to(device, non_blocking=True).unbind(1))
            inside = ((rows >= top) & (rows < top + h))[:, None, :, None] & ((columns >= left) & (columns < left + w))[
                :, None, None, :
            ]
            shape = {"const": (), "rand": (channels, 1, 1), "pixel": (channels, height, width)}[self.mode]
            written: Tensor | float = stream.noise(places, shape, device) if shape else 0.0
            if len(places):
                at = places.to(device, non_blocking=True)
                images[at] = torch.where(inside, torch.as_tensor(written, device=device), images[at])
        return images


def _boxes(
    stream: Stream,
    otherwise: Sequence[int],
    area: tuple[float, float],
    log_aspect: tuple[float, float],
    height: int,
    width: int,
    *,
    spare: int = 0,
    parts: Tensor | int = 1,
) -> Tensor:
    """(B, 4): top, left, height, width of the first of ten tries that leaves `spare` rows and columns, or `otherwise`.

    A try has a part of the image's area, divided by `parts`, and an aspect (width over height).
    """
    box = torch.tensor(otherwise).repeat(len(stream.keys), 1)
    wanted = torch.ones(len(box), dtype=torch.bool)
    for _ in range(10):
        pixels = stream.uniform(*area) * height * width / parts
        aspect = stream.uniform(*log_aspect).exp()
        w, h = (pixels * aspect).sqrt().round().long(), (pixels / aspect).sqrt().round().long()
        top, left = stream.integer(height - h + 1), stream.integer(width - w + 1)
        fits = wanted & (w <= width - spare) & (h <= height - spare)
        box[fits] = torch.stack([top, left, h, w], dim=1)[fits]
        wanted &= ~fits
    return box


def _cubic(step: ResizedCrop | Policy, stream: Stream) -> Tensor:
    if step.cubic is None:
        return stream.happens(0.5)
    return torch.full(stream.keys.shape, step.cubic)


def _change(images: Tensor, mine: Tensor, change: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> None:
    places = mine.nonzero()[:, 0]
    if len(places):
        at = places.to(images.device, non_blocking=True)
        images[at] = change(images[at], values[places])


# ------------------------------------------------------------------------------------------------ timm's operations

Argument = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def _side(unit: Tensor) -> Tensor:
    return torch.where(unit < 0.5, -1.0, 1.0).double()


def _none(level: Tensor, unit: Tensor, settings: dict[str, Any]) -> Tensor:
    return level


def _either_side(most: float) -> Argument:
    return lambda level, unit, settings: _side(unit) * (level / 10 * most)


def _by_setting(name: str, otherwise: float) -> Argument:
    return lambda level, unit, settings: _side(unit) * (level / 10 * float(settings.get(name, otherwise)))


def _factor(level: Tensor, unit: Tensor, settings: dict[str, Any]) -> Tensor:
    return level / 10 * 1.8 + 0.1


def _growing_factor(level: Tensor, unit: Tensor, settings: dict[str, Any]) -> Tensor:
    return (1 + _side(unit) * (level / 10 * 0.9)).clamp(min=0.1)


def _whole(most: int, *, add: int = 0, sign: int = 1, top: int = 256) -> Argument:
    return lambda level, unit, settings: add + sign * (level / 10 * most).trunc().clamp(max=top)


def _desaturated(level: Tensor, unit: Tensor, settings: dict[str, Any]) -> Tensor:
    return 1 - (0.5 + 0.5 * (level / 10)).clamp(0.5, 1.0)


def _radius(level: Tensor, unit: Tensor, settings: dict[str, Any]) -> Tensor:
    return (0.1 + 1.9 * (level / 10)).clamp(0.1, 2.0)


def _drawn_radius(level: Tensor, unit: Tensor, settings: dict[str, Any]) -> Tensor:
    return 0.1 + (2.0 * (level / 10).clamp(0, 1) - 0.1) * unit


# Level (0 to 10, beyond with mmax), a number in [0, 1), settings -> argument of an operation; the ranges are timm's.
ARGUMENTS: dict[str, Argument] = {
    "AutoContrast": _none,
    "Equalize": _none,
    "Invert": _none,
    "Rotate": _either_side(30.0),
    "ShearX": _either_side(0.3),
    "ShearY": _either_side(0.3),
    "TranslateX": _by_setting("translate_const", 250),
    "TranslateY": _by_setting("translate_const", 250),
    "TranslateXRel": _by_setting("translate_pct", 0.45),
    "TranslateYRel": _by_setting("translate_pct", 0.45),
    "Posterize": _whole(4),
    "PosterizeIncreasing": _whole(4, add=4, sign=-1),
    "PosterizeOriginal": _whole(4, add=4),
    "Solarize": _whole(256),
    "SolarizeIncreasing": _whole(256, add=256, sign=-1),
    "SolarizeAdd": _whole(110, top=128),
    "Desaturate": _desaturated,
    "GaussianBlur": _radius,
    "GaussianBlurRand": _drawn_radius,
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), _factor),
    **dict.fromkeys(
        ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"), _growing_factor
    ),
}

PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, _: batched.autocontrast(images),
    "Equalize": lambda images, _: batched.equalize(images),
    "Invert": lambda images, _: batched.invert(images),
    "SolarizeAdd": batched.solarize_add,
    **dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), batched.posterize),
    **dict.fromkeys(("Solarize", "SolarizeIncreasing"), batched.solarize),
    **dict.fromkeys(("GaussianBlur", "GaussianBlurRand"), batched.gaussian_blur),
    **dict.fromkeys(("Color", "ColorIncreasing", "Desaturate"), batched.color),
    **dict.fromkeys(("Contrast", "ContrastIncreasing"), batched.contrast),
    **dict.fromkeys(("Brightness", "BrightnessIncreasing"), batched.brightness),
    **dict.fromkeys(("Sharpness", "SharpnessIncreasing"), batched.sharpness),
}

# The map, and the dimension of the images (B, C, H, W) that its argument is a part of, None: none.
MATRICES: dict[str, tuple[Callable[[Tensor, int, int], Tensor], int | None]] = {
    "Rotate": (batched.rotation, None),
    "ShearX": (batched.shear_x, None),
    "ShearY": (batched.shear_y, None),
    "TranslateX": (batched.shift_x, None),
    "TranslateY": (batched.shift_y, None),
    "TranslateXRel": (batched.shift_x, 3),
    "TranslateYRel": (batched.shift_y, 2),
}


# ------------------------------------------------------------------------------------------------ twins


def _resized_crop(step: RandomResizedCropAndInterpolation) -> Step:
    return ResizedCrop(step.size, tuple(step.scale), tuple(step.ratio), _kernel(step.interpolation))


def _crop(step: transforms.RandomCrop) -> Step:
    if not isinstance(step.padding, int) or step.padding_mode not in ("constant", "reflect") or step.fill:
        raise LapeError(f"a random crop with padding {step.padding} {step.padding_mode} is not made here: {LEFT_OUT}")
    return Crop(tuple(step.size), step.padding, step.padding_mode)


def _jitter(step: transforms.ColorJitter) -> Step:
    named = {"Brightness": step.brightness, "Contrast": step.contrast, "Color": step.saturation}
    if step.hue is not None:
        raise LapeError(f"colour jitter of the hue is not made for batches on the device: {LEFT_OUT}")
    return Jitter({name: bounds for name, bounds in named.items() if bounds is not None})


def _rand_augment(step: RandAugment) -> Step:
    if step.choice_weights is not None:
        raise LapeError(
            "RandAugment by weights is not made for batches on the device: use --aa rand-m9-mstd0.5-inc1, or "
            f"{LEFT_OUT}"
        )
    return _policy([[op] for op in step.ops], step.num_layers)


def _policy(lists: Sequence[Sequence[AugmentOp]], layers: int) -> Step:
    unknown = [op.name for some in lists for op in some if op.name not in ARGUMENTS]
    if unknown:  # none of timm 1.0.31
        raise LapeError(f"timm's operation {unknown[0]} is not made for batches on the device: {LEFT_OUT}")
    return Policy(lists, layers, _kernel(lists[0][0].kwargs["resample"]))


def _erase(step: RandomErasing) -> Step:
    low, high = step.log_aspect_ratio  # of timm's height over width
    area, counts = (step.min_area, step.max_area), (step.min_count, step.max_count)
    return Erase(step.probability, area, (-high, -low), counts, step.mode)


def _kernel(interpolation: Any) -> bool | None:
    """Whether it is bicubic; None for either of the two. Raises LapeError for another."""
    if isinstance(interpolation, list | tuple):
        return None
    if interpolation not in CUBIC:
        raise LapeError(
            f"train_interpolation {str(interpolation)!r} is not made for batches on the device: use bicubic, bilinear "
            f"or random, or {LEFT_OUT}"
        )
    return CUBIC[interpolation]


TWINS: dict[type, Twin | None] = {
    RandomResizedCropAndInterpolation: _resized_crop,
    transforms.RandomCrop: _crop,
    transforms.RandomHorizontalFlip: lambda step: Flip(step.p),
    transforms.ColorJitter: _jitter,
    RandAugment: _rand_augment,
    AutoAugment: lambda step: _policy(step.policy, 1),
    MaybeToTensor: None,  # a part of Normalise
    transforms.ToTensor: None,
    transforms.Normalize: lambda step: Normalise(torch.as_tensor(step.mean), torch.as_tensor(step.std)),
    RandomErasing: _erase,
}


# ------------------------------------------------------------------------------------------------ data set and loader


class OnDevice(Dataset):
    """`images` (n, C, H, W) uint8 and `targets` (n,) int64 on the device, and what is done to a batch of them."""

    def __init__(self, images: Tensor, targets: Tensor, steps: Sequence[Step]) -> None:
        self.images, self.targets, self.steps = images, targets, steps

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, keys: Sequence[tuple[int, int]], seed: int) -> tuple[Tensor, Tensor]:
        """Return the images (B, C, H, W) float32 of (index, copy) keys, and their targets (B,)."""
        index, copy = torch.tensor(keys).unbind(1)
        stream = Stream.of(seed, index, copy)
        chosen = index.to(self.images.device, non_blocking=True)
        images, targets = self.images[chosen], self.targets[chosen]
        for step in self.steps:
            images = step(images, stream)
        return images, targets


class DeviceLoader:
    """The batches of one epoch of an `OnDevice` set, with what `lape.data.loaders.Loader` offers."""

    def __init__(self, dataset: OnDevice, batch_sampler: Sampler, seed: int) -> None:
        self.dataset, self.batch_sampler, self.seed = dataset, batch_sampler, seed
        self.skipped: list[str] = []  # none: every image was read before the first step

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for keys in self.batch_sampler:
            yield self.dataset.batch(keys, self.seed)


class ToBytes:
    """What runs once on an image: PIL image -> (C, H, W) uint8, all of one size."""

    def __init__(self, once: transforms.Compose) -> None:
        self.once, self.convert = once, transforms.PILToTensor()
        self.shape: tuple[int, ...] | None = None

    def __call__(self, image: Any) -> Tensor:
        pixels = self.convert(self.once(image))
        if self.shape is None:
            self.shape = tuple(pixels.shape)
        if tuple(pixels.shape) != self.shape:
            (_, h, w), (_, high, wide) = self.shape, pixels.shape
            raise DataError(
                f"images of {w}x{h} and of {wide}x{high} pixels do not fit into one tensor: bring the folder to one "
                f"size first, or {LEFT_OUT}"
            )
        return pixels


def room_for(count: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """An empty (count, *shape) uint8 tensor on the device.

    Raises:
        DataError: it would take more than half of the memory that is free there.
    """
    needed, free = count * math.prod(shape), _free_bytes(device)
    if needed > FREE_PART * free:
        raise DataError(
            f"{count} images of {'x'.join(map(str, shape))} bytes need {needed / 2**30:.2f} GiB on {device}, more than "
            f"half of the {free / 2**30:.2f} GiB that are free: {LEFT_OUT}"
        )
    return torch.empty((count, *shape), dtype=torch.uint8, device=device)


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system: the allocation itself will tell
        return math.inf
