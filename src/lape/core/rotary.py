"""Rotary position: queries and keys are turned by angles that their patch's place decides. Knows no host.

Source: RoPE for Vision Transformers (Heo et al., ECCV 2024, arXiv 2403.13298), axial and mixed. For another grid the
places go on counting: nothing is resampled. Prefix tokens are not turned.
Shape legend: B batch, N tokens, H heads, n patches, d width of a head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lape.core.forward import THREAD, position_for, tokens_keyword
from lape.core.grids import wrong_number_error
from lape.core.joined import Joined
from lape.core.position import Grid
from lape.errors import LapeError

AXIAL_BASE, MIXED_BASE = 100.0, 10.0

Jitter = tuple[float, float, float]
"""At most: shift as a share of half the grid, factor of each axis, factor of both (DINOv3, arXiv 2508.10104)."""


def patch_coordinates(grid: Grid) -> Tensor:
    """(2, n): column and row of each patch."""
    row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return torch.stack([column, row]).float()


def axial(head_width: int) -> Tensor:
    """(2, 1, d / 2) frequencies by column and row: pair 2 t turns with the column, pair 2 t + 1 with the row.

    theta_t = 100^(-t / (d / 4)), t = 0 ... d / 4 - 1.
    """
    theta = _frequencies(head_width, AXIAL_BASE)
    zero = torch.zeros_like(theta)
    by_column, by_row = torch.stack([theta, zero], -1).flatten(), torch.stack([zero, theta], -1).flatten()
    return torch.stack([by_column, by_row])[:, None]


def mixed(head_width: int, heads: int) -> Tensor:
    """(2, H, d / 2) frequencies to start a layer with: 10^(-t / (d / 4)), two at right angles, turned at random a head.

    All of them learn: d H = D parameters a layer.
    """
    theta = _frequencies(head_width, MIXED_BASE)
    turn = torch.rand(heads, 1) * 2 * math.pi
    angle = torch.cat([turn.expand(-1, len(theta)), (turn + math.pi / 2).expand(-1, len(theta))], dim=1)
    return torch.stack([angle.cos(), angle.sin()]) * theta.repeat(2)


def _frequencies(head_width: int, base: float) -> Tensor:
    if head_width % 4:
        raise LapeError(f"rotary position needs heads of a width divisible by 4, not {head_width}: use pe='2D_RPE'")
    return base ** (-torch.arange(head_width // 4).float() / (head_width // 4))


def rotation(frequency_2Hd: Tensor, place_2n: Tensor, num_prefix: int) -> Tensor:
    """(2, H, N, d / 2) cosine and sine of the angles theta_x p_x + theta_y p_y; 0 for prefix tokens."""
    angle_Hnd = torch.einsum("ahd,an->hnd", frequency_2Hd.float(), place_2n)
    angle_HNd = F.pad(angle_Hnd, (0, 0, num_prefix, 0))
    return torch.stack([angle_HNd.cos(), angle_HNd.sin()])


def jittered(place_2n: Tensor, grid: Grid, draw_5: Tensor, jitter: Jitter) -> Tensor:
    """Places p as r j (p + t n / 2): shifted and scaled along each axis, then scaled as a whole.

    `draw_5` in -1 ... 1: t = shift draw (two, n patches along the axis), j = axes^draw (two), r = whole^draw.
    """
    shift, axes, whole = jitter
    half_2 = place_2n.new_tensor(grid[::-1]) / 2
    scale_2 = axes ** draw_5[2:4] * whole ** draw_5[4]
    return scale_2[:, None] * (place_2n + (shift * draw_5[:2] * half_2)[:, None])


class Rotating(Joined):
    """Attention whose queries and keys are turned behind the modules that make them, or norm them.

    The attributes that it takes over read as themselves, and inside of its forward as what turns their output: so
    what an adapter puts in their place is turned, too.
    """

    @classmethod
    def takes_over(cls, host: type, name: str) -> Any:
        def read(self: Any) -> Any:
            turn, module = THREAD.rotation, self._modules[name]
            return module if turn is None or turn[0] is not self else partial(_turned, module, turn[1])

        return property(read)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_BND: Any = args[0] if args else kwargs[tokens_keyword(kwargs)]
        cos_sin, outer = position_for(self, x_BND), THREAD.rotation
        if isinstance(x_BND, Tensor) and not torch.jit.is_tracing() and cos_sin.shape[-2] != x_BND.shape[1]:
            raise wrong_number_error(self._lape.anatomy.layout, x_BND.shape[1])  # type: ignore[attr-defined]
        THREAD.rotation = (self, cos_sin)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            THREAD.rotation = outer


def _turned(module: Any, cos_sin: Tensor, x: Tensor) -> Tensor:
    """What a module makes of x, (B, H, N, d) or (B, N, H d), turned."""
    y = module(x)
    cos, sin = cos_sin.to(y.dtype)
    heads_first = y.ndim == 4
    y_BHNd = y if heads_first else y.unflatten(-1, (-1, 2 * cos.shape[-1])).transpose(1, 2)
    first, second = y_BHNd.unflatten(-1, (-1, 2)).unbind(-1)
    y_BHNd = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return y_BHNd if heads_first else y_BHNd.transpose(1, 2).flatten(2)
