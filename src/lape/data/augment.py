"""From a PIL image to a normalised tensor: the evaluation transform, and DeiT's two training recipes.

The pieces are torchvision's and timm's; what is written here is which of them run, in DeiT's order and with DeiT's
numbers, for 1 or 3 channels. Everything works on 8-bit PIL images of one mode (`to_mode`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import ResizeKeepRatio, str_to_interp_mode
from torchvision import transforms

from lape.data.images import MODES, ToMode
from lape.errors import LapeError

if TYPE_CHECKING:
    from lape.recipe import Recipe


Transform = Callable[[Image.Image], torch.Tensor]

SMALL = 32  # DeiT's rule: up to this input size images are taken whole (CIFAR), above it they are resized and cropped
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
WARPABLE = ("random", "nearest", "bilinear", "bicubic")  # what PIL can shear and rotate with
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # means of ImageNet's three


@dataclass(frozen=True)
class EvalTransform:
    """What happens to an image in evaluation and prediction; stored with the checkpoint and printed.

    The short side is resized to `int(input_size / crop_ratio)`, the centre `input_size` is cropped, the result is
    scaled to [0, 1] and normalised by channel. As in DeiT, `crop_ratio` does not apply to an input size of 32 or
    less: there the whole image is used (an image that already has the size is not resampled). Orientation in EXIF is
    ignored and transparency dropped, as by torchvision. Raises LapeError for a value that is not allowed.

    Fields:
        input_size: pixels, one side or (height, width)
        crop_ratio: side of the crop over side of the resized image, in (0, 1]
        interpolation: name of a PIL filter, antialiased
        mean: of each channel, for values in [0, 1]
        std: likewise
        in_chans: 1 (grey) or 3 (RGB)
    """

    input_size: int | tuple[int, int]
    crop_ratio: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    in_chans: int = 3

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise LapeError(f"input_size={self.input_size} is not an image size: give one positive number of pixels")
        if not 0 < self.crop_ratio <= 1:
            raise LapeError(f"crop_ratio={self.crop_ratio} is not in (0, 1]: use 1.0, or 0.875 for DeiT's evaluation")
        if self.interpolation not in INTERPOLATIONS:
            raise LapeError(f"interpolation={self.interpolation!r} is unknown: use one of {', '.join(INTERPOLATIONS)}")
        _check_channels(self.in_chans, self.mean, self.std)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result in pixels."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else self.input_size

    @property
    def cover_size(self) -> tuple[int, int]:
        """Height and width that the image just covers after resizing, before the crop."""
        ratio = self.crop_ratio if max(self.size) > SMALL else 1.0
        height, width = (int(side / ratio) for side in self.size)
        return height, width

    def build(self) -> Transform:
        """Return the function of a PIL image of any mode to a float32 tensor (in_chans, height, width)."""
        return transforms.Compose(
            [
                ToMode(self.in_chans),
                _cover(self.cover_size, self.interpolation),
                transforms.CenterCrop(self.size),
                transforms.ToTensor(),
                transforms.Normalize(torch.tensor(self.mean), torch.tensor(self.std)),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, for JSON and for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> EvalTransform:
        """Read what `to_dict` wrote. Raises LapeError: keys are missing or unknown, or a value is not allowed."""
        names = {field.name for field in fields(cls)}
        if set(entries) != names:
            odd = ", ".join(sorted(set(entries) ^ names))
            raise LapeError(f"not a stored transform: {odd} is missing or unknown (needed: {', '.join(sorted(names))})")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()}
        return cls(**values)

    def __str__(self) -> str:
        (high, wide), (height, width) = self.cover_size, self.size
        numbers = f"mean {_join(self.mean)}, std {_join(self.std)}"
        kind = "grey" if self.in_chans == 1 else "RGB"
        return f"{kind}, resize to cover {high}x{wide} ({self.interpolation}), centre crop {height}x{width}, {numbers}"


def eval_transform(recipe: Recipe) -> EvalTransform:
    """Return the evaluation transform of a recipe (ImageNet's mean and std when it names none)."""
    mean, std = _normalisation(recipe)
    return EvalTransform(recipe.input_size, recipe.eval_crop_ratio, "bicubic", mean, std, recipe.in_chans)


def train_transform(recipe: Recipe, *, whole: bool = False) -> Transform:
    """DeiT's training transform of a recipe: 8-bit PIL image of the recipe's mode -> float32 (in_chans, size, size).

    Random resized crop (a random crop with 4 pixels of padding for an input size of 32 or less, after resizing images
    of another size, unless the recipe names the `scale` of a resized one), flip, then `aa`, or colour jitter where that
    is off, and random erasing. With `three_augment` (DeiT III): one of greyscale, solarise or blur and colour jitter
    instead of `aa` and erasing, and with `src` a random crop with 4 reflected pixels in place of the random resized
    one.

    `whole`: no crop and no flip, the image is resized whole; for data whose label a mirror or a cut would change.
    Raises LapeError for a policy, an interpolation, mean or std that cannot be used.
    """
    mean, std = _normalisation(recipe)
    if recipe.aa and not recipe.three_augment and recipe.train_interpolation not in WARPABLE:
        fix = f"use {', '.join(WARPABLE)}, or --aa none"
        raise LapeError(f"train_interpolation={recipe.train_interpolation!r} cannot shear and rotate: {fix}")
    typos = [part for part in recipe.aa.split("-")[1:] if part[0:1] != "t" and not any(c.isdigit() for c in part)]
    if typos:  # timm would ignore them
        raise LapeError(f"aa={recipe.aa!r}: {typos[0]!r} has no number, use e.g. rand-m9-mstd0.5-inc1, or none")
    try:
        transform: transforms.Compose = create_transform(
            recipe.input_size,
            is_training=True,
            scale=recipe.scale,  # type: ignore[arg-type]
            hflip=0.0 if whole else 0.5,
            color_jitter=recipe.color_jitter or None,  # type: ignore[arg-type]
            auto_augment="3a" if recipe.three_augment else recipe.aa or None,  # timm's 3a is DeiT III's choice of three
            interpolation=recipe.train_interpolation,
            mean=mean,
            std=std,
            re_prob=0.0 if recipe.three_augment else recipe.reprob,
            re_mode=recipe.remode,
            re_count=recipe.recount,
        )
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        raise LapeError(
            f"aa={recipe.aa!r} is no policy of timm ({error!r}): use rand-m9-mstd0.5-inc1, or none"
        ) from None
    crop = _crop(recipe, whole)
    if crop:
        transform.transforms[:1] = crop
    _keep_one_bit(transform)
    return transform


def is_augmented(recipe: Recipe) -> bool:
    """Whether a training image changes from one epoch to the next beyond crop and flip."""
    return bool(recipe.aa or recipe.color_jitter or recipe.reprob or recipe.three_augment)


def _crop(recipe: Recipe, whole: bool) -> list[Callable[..., Any]]:
    """Return what replaces the random resized crop, nothing where it stays."""
    size = (recipe.input_size, recipe.input_size)
    interpolation = "bicubic" if recipe.train_interpolation == "random" else recipe.train_interpolation
    resize = _cover(size, interpolation)
    if whole:
        return [resize, transforms.CenterCrop(size)]
    if recipe.src:
        return [resize, transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
    if recipe.input_size <= SMALL and not recipe.three_augment and recipe.scale is None:
        return [resize, transforms.RandomCrop(size, padding=4)]
    return []


def _cover(size: tuple[int, int], interpolation: str) -> Callable[..., Any]:
    """Resize, aspect kept, until the image just covers `size`; one that already fits is not touched."""
    if size[0] == size[1]:
        return transforms.Resize(size[0], str_to_interp_mode(interpolation))
    return ResizeKeepRatio(size, interpolation=interpolation)


def _keep_one_bit(transform: transforms.Compose) -> None:
    """Let timm's posterize keep at least one bit.

    timm may ask for 0 bits: Pillow 13 raises then (about once in 800 images under DeiT's policy), earlier ones
    return a black image. Only the operations of this transform are changed, timm itself is not.
    """
    operation: Any  # timm declares the function itself as its attribute's type
    for operation in operations(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterize, operation.aug_fn)


def _posterize(plain: Callable[..., Image.Image], image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return plain(image, max(1, bits), **kwargs)


def operations(transform: transforms.Compose) -> Iterator[AugmentOp]:
    """Return every operation of the policies in a transform."""
    for step in transform.transforms:
        if isinstance(step, RandAugment | AugMixAugment):
            yield from step.ops
        elif isinstance(step, AutoAugment):
            for policy in step.policy:
                yield from policy


def _normalisation(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    grey = recipe.in_chans == 1
    mean = recipe.mean or (GREY_MEAN if grey else IMAGENET_DEFAULT_MEAN)
    std = recipe.std or (GREY_STD if grey else IMAGENET_DEFAULT_STD)
    _check_channels(recipe.in_chans, mean, std)
    return tuple(mean), tuple(std)


def _check_channels(in_chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if in_chans not in MODES:
        raise LapeError(f"in_chans={in_chans} images cannot be read: use 1 (grey) or 3 (RGB)")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != in_chans:
            raise LapeError(
                f"{name}={_join(values)} has {len(values)} value(s): give one for each of {in_chans} channel(s)"
            )
    if not all(0 < value < math.inf for value in std):
        raise LapeError(f"std={_join(std)} divides the pixels: every value must be positive and finite")
    if not all(map(math.isfinite, mean)):
        raise LapeError(f"mean={_join(mean)} is taken off the pixels: every value must be finite")


def _join(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
