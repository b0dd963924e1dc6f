"""The fast way from an image file to pixels (`--decode fast`); the plain one, Pillow's, is in `lape.data.augment`.

What is different, and what it does to a pixel:

- JPEGs are decoded by torchvision. Both use libjpeg-turbo: the same bytes come out (`tests/data/test_pixels.py`).
- They are resized by torch's 8-bit kernel instead of Pillow's. Both are antialiased, with coefficients in fixed point
  that are rounded differently: at most `LEVELS` of 255, and most pixels do not differ.
- Shears and translations of the policy are computed by `slide`, below: at most one level from Pillow's.
- They stay 8-bit until they are on the device, a quarter of the bytes; there the batch becomes float and is normalised,
  with the plain path's operations in their order. What random erasing writes is drawn with the image, put in there.

Every random number is drawn by the plain path's own transforms, in their order: an image gets the same crop, flip,
policy and erasing on both. What is no RGB or grey JPEG (PNG, CMYK, damaged) is read by Pillow, whose verdict counts.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lape.data.augment import SMALL, EvalTransform, Transform, operations
from lape.data.images import Source, check_shape, open_source, reading
from lape.data.sets import Images
from lape.errors import LapeError

try:  # torchvision 0.29 announces that it will give its decoders up; Pillow's are slower and give the same bytes
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # pragma: no cover
    decode_jpeg = None  # type: ignore[assignment]
if TYPE_CHECKING:
    from lape.recipe import Recipe

LEVELS = 2  # of 255: the most that resizing differs from Pillow's, on photographs
JPEG = b"\xff\xd8\xff"
FILTERS = ("bilinear", "bicubic")  # that torch's 8-bit kernel has

Patch = tuple[int, int, int, int, Tensor]
"""Top, bottom, left, right of an area, and what erasing writes there: (C, h, w) or (C, 1, 1) float32."""

Levels = tuple[Tensor, "list[Patch]"]
"""An image on its way: (H, W, C) uint8, and what is to be erased of it, in this order, after the normalisation."""


def read_levels(path: Source, in_chans: int, plain: Callable[[Any], Image.Image]) -> Tensor:
    """Return the pixels of an image file as uint8 (1 or `in_chans`, H, W); one channel stands for equal ones.

    `plain` reads a file that is not a JPEG with these channels, or says what is wrong with it.
    """
    if decode_jpeg is not None:
        with reading(path), open_source(path) as file:
            data = file.read()
        levels = _decode(data) if data.startswith(JPEG) else None
        if levels is not None and levels.shape[0] in (1, in_chans):
            with reading(path):
                check_shape(levels.shape[2], levels.shape[1])
            return levels
    return F.pil_to_tensor(plain(path))


def _decode(data: bytes) -> Tensor | None:
    """Return a JPEG's (C, H, W), None if it is damaged or of a kind that torchvision does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            bytes_ = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return cast(Tensor, decode_jpeg(bytes_, mode=ImageReadMode.UNCHANGED))
        except RuntimeError:
            return None


@dataclass(frozen=True)
class FastEval:
    """`EvalTransform` on 8-bit tensors: resize, centre crop."""

    plain: EvalTransform

    def __post_init__(self) -> None:
        _check_filter("interpolation", self.plain.interpolation)
        if self.plain.cover_size[0] != self.plain.cover_size[1]:
            raise LapeError(f"decode='fast' needs a square image, not {self.plain.size}: use decode='exact'")

    def __call__(self, levels: Tensor) -> Levels:
        kernel = InterpolationMode(self.plain.interpolation)
        levels = F.resize(_batch_of_one(levels), [self.plain.cover_size[0]], interpolation=kernel, antialias=True)[0]
        return _by_pixel(F.center_crop(levels, list(self.plain.size)), self.plain.in_chans), []


class FastTrain:
    """DeiT's training transform: crop and flip on 8-bit tensors, then the policy, erasing as a patch.

    `plain` is what `lape.data.augment.train_transform` built; its own steps draw every random number.
    """

    def __init__(self, plain: Any, in_chans: int) -> None:
        steps = copy.deepcopy(plain)
        operation: Any
        for operation in operations(steps):
            operation.aug_fn = _Operation(operation.name, operation.aug_fn)
        self.crop, self.flip, *rest = steps.transforms
        self.eraser = rest.pop() if isinstance(rest[-1], RandomErasing) else None
        self.policy, self.in_chans = rest[:-2], in_chans  # without the steps to a normalised tensor

    def __call__(self, levels: Tensor) -> Levels:
        top, left, height, width = self.crop.get_params(levels, self.crop.scale, self.crop.ratio)
        filters = self.crop.interpolation
        kernel = random.choice(filters) if isinstance(filters, tuple | list) else filters  # as timm does
        part = _batch_of_one(levels[:, top : top + height, left : left + width])
        levels = F.resize(part, list(self.crop.size), interpolation=kernel, antialias=True)[0]
        image: Any = _by_pixel(self.flip(levels), self.in_chans)
        for step in self.policy:
            image = step(image if isinstance(step, RandAugment | AutoAugment) else _to_pil(image))
        pixels = _to_levels(image)
        recorder = _Recorder(torch.Size((pixels.shape[2], *pixels.shape[:2])))
        if self.eraser is not None:
            self.eraser(recorder)
        return pixels, recorder.patches


class _Recorder:
    """Stands for the normalised image in timm's random erasing, and remembers what is written into it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.patches: list[Patch] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        self.patches.append((rows.start, rows.stop, columns.start, columns.stop, values))


@dataclass(frozen=True)
class _Operation:
    """An operation of timm's policies, for images that become Pillow's only where that is needed."""

    name: str
    plain: Callable[..., Any]

    def __call__(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and self.name in SLIDES and kwargs.get("resample") == Image.Resampling.BICUBIC:
            function, dim = SLIDES[self.name]
            return function(_to_levels(image), args[0], dim, kwargs["fillcolor"])
        return self.plain(_to_pil(image), *args, **kwargs)


def _to_pil(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze(2).numpy())


def _to_levels(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    levels = torch.from_numpy(np.array(image))
    return levels if levels.ndim == 3 else levels[:, :, None]


def _batch_of_one(levels: Tensor) -> Tensor:
    """(C, H, W) -> (1, C, H, W) with a pixel's channels as neighbours, for which torch's kernel is fastest."""
    return levels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)


def _by_pixel(levels: Tensor, in_chans: int) -> Tensor:
    """(1 or C, H, W) -> contiguous (H, W, C)."""
    return levels.expand(in_chans, -1, -1).permute(1, 2, 0).contiguous()


def fast_train(recipe: Recipe, plain: Transform) -> FastTrain:
    """The fast form of a training transform. Raises LapeError for one without random resized crop, or of a filter that
    is not in `FILTERS`."""
    if recipe.src or (recipe.input_size <= SMALL and not recipe.three_augment):
        what = "src=True" if recipe.src else f"input_size={recipe.input_size}"
        raise LapeError(f"decode='fast' makes random resized crops, which {what} has none of: use --decode exact")
    _check_filter("train_interpolation", recipe.train_interpolation, ("random", *FILTERS))
    return FastTrain(plain, recipe.in_chans)


def _check_filter(name: str, value: str, filters: tuple[str, ...] = FILTERS) -> None:
    if value not in filters:
        raise LapeError(f"decode='fast' has no {name}={value!r}: use {', '.join(filters)}, or --decode exact")


class FastImages(Images):
    """Image files whose batches stay 8-bit until they are on the device.

    An item is (float32 image (in_chans, H, W), class number), as everywhere; the loader takes `levels` and finishes
    whole batches.

    Args:
        plain: the same files, read by Pillow.
        transform: what comes between reading and normalising.
        mean, std: of each channel, for values in [0, 1].
    """

    def __init__(
        self,
        plain: Images,
        in_chans: int,
        transform: Callable[[Tensor], Levels],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(plain.sources, plain.targets, plain.read, plain.transform)
        self.in_chans, self.to_levels = in_chans, transform
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, target, patches = self.levels(index)
        return self.finish(pixels[None], [patches], torch.device("cpu"))[0], target

    def levels(self, index: int) -> tuple[Tensor, int, list[Patch]]:
        """Return an item as it travels: (H, W, C) uint8, its class number, and what is erased."""
        pixels, patches = self.to_levels(read_levels(self.sources[index], self.in_chans, self.read))
        return pixels, self.targets[index], patches

    def finish(self, levels_BHWC: Tensor, patches: Sequence[list[Patch]], device: torch.device) -> Tensor:
        """Return the batch on the device: float32 (B, C, H, W), normalised, erased."""
        levels = levels_BHWC.to(device, non_blocking=True).permute(0, 3, 1, 2)
        images = torch.empty(levels.shape, device=device).copy_(levels)
        images.div_(255).sub_(self.mean.to(device)).div_(self.std.to(device))
        for image, areas in zip(images, patches, strict=True):
            for top, bottom, left, right, values in areas:
                image[:, top:bottom, left:right] = values.to(device, non_blocking=True)
        return images


# --- shears and translations: two to five times as fast as Pillow's, one level from it at most ---
#
# Pillow interpolates every pixel of every affine map from its 4 x 4 neighbours. A shear or a translation moves whole
# rows, or columns, along themselves: a line needs the 4 neighbours in it, with the same weights for all its pixels.
# The weights are cubic convolution with a = -1 (R. Keys, "Cubic Convolution Interpolation for Digital Image
# Processing", 1981, eq. 4 with another constant), the result is cut to 0..255 and truncated, the border repeated for
# neighbours, and what comes from outside is filled. They agree but for rounding (`tests/data/test_slide.py`).

Fill = int | Sequence[int]


def slide(levels: Tensor, shift: Tensor, dim: int, fill: Fill) -> Tensor:
    """Return the image whose pixel p of a line comes from p + shift of it.

    Args:
        levels: (H, W, C) uint8.
        shift: pixels, float64: one number, or one for each line, (H,) for `dim` 1 and (W,) for `dim` 0.
        dim: 1: rows slide, 0: columns.
        fill: levels of what comes from outside.
    """
    height, width, channels = levels.shape
    n, lines = levels.shape[dim], levels.shape[1 - dim]
    shift = shift.expand(lines)
    floor = shift.floor()
    weights_4L = _weights(shift - floor)
    along = (torch.arange(-1, n + 2)[:, None] + floor.long()).clamp_(0, n - 1)
    across = torch.arange(lines)
    if dim == 0:
        index, shape = along * width + across, (n + 3, width * channels)
        weights, step = weights_4L.repeat_interleave(channels, 1)[:, None, :], 1
    else:
        index, shape = along.T + across[:, None] * width, (height, (n + 3) * channels)
        weights, step = weights_4L[:, :, None], channels  # a pixel's channels are neighbours
    neighbours, size = levels.reshape(-1, channels).index_select(0, index.reshape(-1)).reshape(shape).float(), n * step
    total = neighbours.narrow(dim, 0, size) * weights[0]
    for k in (1, 2, 3):
        total.addcmul_(neighbours.narrow(dim, k * step, size), weights[k])
    result = total.clamp_(0, 255).to(torch.uint8).reshape(height, width, channels)
    origin = torch.arange(n)[:, None] + 0.5 + shift
    outside = (origin < 0) | (origin >= n)
    result[outside if dim == 0 else outside.T] = torch.as_tensor(fill, dtype=torch.uint8)
    return result


def _weights(t: Tensor) -> Tensor:
    """Return the weights of the neighbours -1, 0, 1, 2 at a distance t in [0, 1) from neighbour 0: (4, *t.shape)."""
    return torch.stack([-t * (1 - t) ** 2, t**3 - 2 * t**2 + 1, -(t**3) + t**2 + t, -(t**2) * (1 - t)]).float()


Slide = Callable[[Tensor, float, int, Fill], Tensor]


def _shear(levels: Tensor, factor: float, dim: int, fill: Fill) -> Tensor:
    lines = levels.shape[1 - dim]
    return slide(levels, (torch.arange(lines, dtype=torch.float64) + 0.5) * factor, dim, fill)


def _translate(levels: Tensor, pixels: float, dim: int, fill: Fill) -> Tensor:
    return slide(levels, torch.tensor(pixels, dtype=torch.float64), dim, fill)


def _translate_part(levels: Tensor, part: float, dim: int, fill: Fill) -> Tensor:
    return _translate(levels, part * levels.shape[dim], dim, fill)


SLIDES: dict[str, tuple[Slide, int]] = {
    "ShearX": (_shear, 1),
    "ShearY": (_shear, 0),
    "TranslateX": (_translate, 1),
    "TranslateY": (_translate, 0),
    "TranslateXRel": (_translate_part, 1),
    "TranslateYRel": (_translate_part, 0),
}
"""timm's names of these operations -> the function of (levels, the operation's number, dim, fill), and its dim."""
