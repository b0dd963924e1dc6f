"""Rotary position: queries and keys are turned by angles that their patch's place decides. Knows no host.

Source: RoPE for Vision Transformers (Heo et al., ECCV 2024, arXiv 2403.13298), axial and mixed. For another grid the
places go on counting: nothing is resampled. Prefix tokens are not turned.
Shape legend: B batch, N tokens, H heads, n patches, d width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lape.core.forward import received
from lape.core.grids import wrong_number
from lape.core.joined import Joined
from lape.core.position import Grid
from lape.errors import LapeError

AXIAL_BASE, MIXED_BASE = 100.0, 10.0


def places(grid: Grid) -> Tensor:
    """(2, n): column and row of each patch."""
    row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return torch.stack([column, row]).float()


def axial(head_width: int) -> Tensor:
    """(2, 1, d / 2) frequencies by column and row: pair 2 t turns with the column, pair 2 t + 1 with the row.

    theta_t = 100^(-t / (d / 4)), t = 0 ... d / 4 - 1.
    """
    theta = _frequencies(head_width, AXIAL_BASE)
    still = torch.zeros_like(theta)
    by_column, by_row = torch.stack([theta, still], -1).flatten(), torch.stack([still, theta], -1).flatten()
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


class Rotating(Joined):
    """The norm (or nothing) that a host's queries or keys (B, H, N, d) pass: behind it they are turned."""

    def forward(self, x_BHNd: Tensor) -> Tensor:
        y_BHNd: Tensor = super().forward(x_BHNd)  # type: ignore[misc]
        cos_sin: Any = received(self, y_BHNd.transpose(1, 2))
        if isinstance(y_BHNd, Tensor) and not torch.jit.is_tracing() and cos_sin.shape[-2] != y_BHNd.shape[-2]:
            raise wrong_number(self._lape.anatomy.layout, y_BHNd.shape[-2])  # type: ignore[attr-defined]
        cos, sin = cos_sin
        first, second = y_BHNd.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
