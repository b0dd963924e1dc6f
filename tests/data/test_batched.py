"""Batched operations against Pillow's on each image: equal bits, but for a few pixels of `warp` and `resized_crop`."""

import numpy as np
import pytest
import torch
from pictures import pictures
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lape.data import batched

SIZES = [(33, 37), (8, 8), (2, 5)]
FILL = {1: (115,), 3: (124, 116, 104)}
GREY_LEVELS = 0.02  # mean difference that float32 in place of float64 or fixed point may make


def stacked(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.atleast_3d(np.array(image)) for image in images])).permute(0, 3, 1, 2)


def difference(found: torch.Tensor, expected: list[Image.Image]) -> torch.Tensor:
    assert found.dtype == torch.uint8
    return (found.int() - stacked(expected).int()).abs()


def spread(low: float, high: float) -> torch.Tensor:
    return torch.linspace(low, high, 12, dtype=torch.float64)


ENHANCED = {"brightness": "Brightness", "contrast": "Contrast", "color": "Color", "sharpness": "Sharpness"}
POINTWISE = {
    "posterize": (ImageOps.posterize, torch.arange(12) % 8 + 1),
    "solarize": (ImageOps.solarize, spread(0, 256).long()),
}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", SIZES)
class TestEqualBits:
    @pytest.mark.parametrize("name", ENHANCED)
    def test_blends(self, size, mode, name):
        images = pictures(*size, mode)
        factors = torch.cat([spread(0.1, 1.9)[:10], torch.tensor([0.0, 1.0])])
        made = [
            getattr(ImageEnhance, ENHANCED[name])(one).enhance(float(f)) for one, f in zip(images, factors, strict=True)
        ]
        assert difference(getattr(batched, name)(stacked(images), factors), made).max() == 0

    @pytest.mark.parametrize("name", POINTWISE)
    def test_tables_with_a_strength(self, size, mode, name):
        images, (function, strengths) = pictures(*size, mode), POINTWISE[name]
        made = [function(one, int(strength)) for one, strength in zip(images, strengths, strict=True)]
        assert difference(getattr(batched, name)(stacked(images), strengths), made).max() == 0

    @pytest.mark.parametrize("name", ["autocontrast", "equalize"])
    def test_tables_without(self, size, mode, name):
        images = pictures(*size, mode)
        made = [getattr(ImageOps, name)(one) for one in images]
        assert difference(getattr(batched, name)(stacked(images)), made).max() == 0

    def test_solarize_add(self, size, mode):
        images, added = pictures(*size, mode), torch.arange(12) * 10
        made = [one.point(lambda v, a=int(a): min(255, v + a) if v < 128 else v) for one, a in zip(images, added)]  # noqa: B905
        assert difference(batched.solarize_add(stacked(images), added), made).max() == 0


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", SIZES)
def test_gaussian_blur(size, mode):
    images, radii = pictures(*size, mode), spread(0.1, 6)
    made = [one.filter(ImageFilter.GaussianBlur(radius)) for one, radius in zip(images, radii.tolist(), strict=True)]
    assert difference(batched.gaussian_blur(stacked(images), radii), made).max() == 0


def test_autocontrast_of_every_range():
    """Where the stretched value is a whole number but for rounding, one bit of the scale decides."""
    for low in range(0, 256, 5):
        rows = [np.arange(low, high + 1, dtype=np.uint8)[None] for high in range(low + 1, 256, 7)]
        for row in rows:
            found = batched.autocontrast(torch.from_numpy(row)[None, None])
            assert difference(found, [ImageOps.autocontrast(Image.fromarray(row))]).max() == 0


MAPS = {
    "rotation": ((-30, 30), lambda v: ("rotate", v), batched.rotation),
    "shear_x": ((-0.3, 0.3), lambda v: (1, v, 0, 0, 1, 0), batched.shear_or_shift(1)),
    "shear_y": ((-0.3, 0.3), lambda v: (1, 0, 0, v, 1, 0), batched.shear_or_shift(3)),
    "shift_x": ((-16.3, 16.1), lambda v: (1, 0, v, 0, 1, 0), batched.shear_or_shift(2)),
    "shift_y": ((-16.3, 16.1), lambda v: (1, 0, 0, 0, 1, v), batched.shear_or_shift(5)),
}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("name", MAPS)
def test_warp(name, resample, mode):
    images, (bounds, matrix, maps_of) = pictures(33, 37, mode), MAPS[name]
    channels, values = len(mode), spread(*bounds)
    made = []
    for image, value in zip(images, values.tolist(), strict=True):
        if name == "rotation":
            made.append(image.rotate(value, resample=resample, fillcolor=FILL[channels]))
        else:
            affine = Image.Transform.AFFINE
            made.append(image.transform(image.size, affine, matrix(value), resample, fillcolor=FILL[channels]))
    cubic = torch.full((12,), resample == Image.Resampling.BICUBIC)
    maps = maps_of(values, 33, 37)
    off = difference(batched.warp(stacked(images), maps, torch.tensor(FILL[channels], dtype=torch.uint8), cubic), made)
    assert off.max() <= 1
    assert off.float().mean() < GREY_LEVELS


@pytest.mark.parametrize("size", [(16, 16), (48, 40)])
def test_resized_crop_with_a_kernel_of_each(size):
    images, draw = pictures(33, 37, "RGB"), np.random.default_rng(0)
    cubic, boxes, made = torch.arange(12) % 2 == 0, [], []
    for image, bent in zip(images, cubic, strict=True):
        h, w = int(draw.integers(5, 34)), int(draw.integers(5, 38))
        top, left = int(draw.integers(0, 34 - h)), int(draw.integers(0, 38 - w))
        boxes.append([top, left, h, w])
        kernel = Image.Resampling.BICUBIC if bent else Image.Resampling.BILINEAR
        made.append(image.crop((left, top, left + w, top + h)).resize(size[::-1], kernel))
    off = difference(batched.resized_crop(stacked(images), torch.tensor(boxes), size, cubic), made)
    assert off.max() <= 2
    assert off.float().mean() < GREY_LEVELS


@pytest.mark.parametrize(("mode", "numpy"), [("constant", "constant"), ("reflect", "reflect")])
def test_shifted_crop(mode, numpy):
    images = stacked(pictures(9, 7, "RGB", 5))
    padded = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode=numpy))
    corners = torch.tensor([[-4, -4], [0, 0], [4, 2], [-1, 3], [3, -2]])
    found = batched.shifted_crop(images, corners, (9, 7), mode)
    for one, whole, (top, left) in zip(found, padded, (corners + 4).tolist(), strict=True):
        assert torch.equal(one, whole[:, top : top + 9, left : left + 7])
