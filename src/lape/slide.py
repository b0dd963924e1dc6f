"""Shear and translation of 8-bit images, two to five times as fast as Pillow's and one level from it at most.

Pillow interpolates every pixel of every affine map from its 4 x 4 neighbours. A shear or a translation moves whole
rows, or columns, along themselves: a line needs the 4 neighbours in it, with the same weights for all its pixels.

The weights are cubic convolution with a = -1 (R. Keys, "Cubic Convolution Interpolation for Digital Image Processing",
1981, eq. 4 with another constant), the result is cut to 0..255 and truncated, the border repeated for neighbours, and
what comes from outside is filled: found from Pillow's numbers. They agree but for rounding (`tests/test_slide.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    n = levels.shape[dim]
    whole = shift.floor()
    weights = _weights(shift - whole)
    places = torch.arange(-1, n + 2)
    if shift.ndim == 0:
        near = levels.index_select(dim, (places + int(whole)).clamp_(0, n - 1))
        shape = near.shape
    else:
        along = (places[:, None] + whole.long()).clamp_(0, n - 1)
        across = torch.arange(len(shift))
        shape = torch.Size((n + 3, width, channels) if dim == 0 else (height, n + 3, channels))
        index = along * width + across if dim == 0 else along.T + across[:, None] * width
        near = levels.reshape(-1, channels).index_select(0, index.reshape(-1))
        weights = weights.repeat_interleave(channels, 1)[:, None, :] if dim == 0 else weights[:, :, None]
    near = near.reshape(shape[0], -1).float()  # a pixel's channels are neighbours, so that a row is one loop
    step, size = (1, n) if dim == 0 else (channels, n * channels)
    moved = near.narrow(dim, 0, size) * weights[0]
    for k in (1, 2, 3):
        moved.addcmul_(near.narrow(dim, k * step, size), weights[k])
    result = moved.clamp_(0, 255).to(torch.uint8).reshape(height, width, channels)
    origin = (torch.arange(n) + 0.5).reshape(-1, *[1] * shift.ndim) + shift
    outside = (origin < 0) | (origin >= n)
    if outside.any():
        if shift.ndim == 0:
            outside = outside[:, None].expand(n, width if dim == 0 else height)
        result[outside if dim == 0 else outside.T] = torch.as_tensor(fill, dtype=torch.uint8)
    return result


def _weights(t: Tensor) -> Tensor:
    """Return the weights of the neighbours -1, 0, 1, 2 at a distance t in [0, 1) from neighbour 0: (4, *t.shape)."""
    return torch.stack([-t * (1 - t) ** 2, t**3 - 2 * t**2 + 1, -(t**3) + t**2 + t, -(t**2) * (1 - t)]).float()


def _shear(levels: Tensor, factor: float, dim: int, fill: Fill) -> Tensor:
    lines = levels.shape[1 - dim]
    return slide(levels, (torch.arange(lines, dtype=torch.float64) + 0.5) * factor, dim, fill)


def _translate(levels: Tensor, pixels: float, dim: int, fill: Fill) -> Tensor:
    return slide(levels, torch.tensor(pixels, dtype=torch.float64), dim, fill)


def _translate_part(levels: Tensor, part: float, dim: int, fill: Fill) -> Tensor:
    return _translate(levels, part * levels.shape[dim], dim, fill)


SLIDES: dict[str, tuple[Callable[[Tensor, float, int, Any], Tensor], int]] = {
    f"{name}{axis}{suffix}": (function, dim)
    for name, suffix, function in (
        ("Shear", "", _shear),
        ("Translate", "", _translate),
        ("Translate", "Rel", _translate_part),
    )
    for axis, dim in (("X", 1), ("Y", 0))
}
"""timm's names of these operations -> the function of (levels, the operation's number, dim, fill), and its dim."""
