"""Biases on attention logits that nothing learns: 2-D ALiBi and LookHere. Knows no host.

Each gives (H, n, n) for a grid, the number of heads, and which layer of how many it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lape.errors import LapeError


def _offsets(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(n, n) rows and columns from query i to key j: positive down and to the right."""
    row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return row[None] - row[:, None], column[None] - column[:, None]


def _distance(grid: tuple[int, int]) -> Tensor:
    down, right = _offsets(grid)
    return (down.square() + right.square()).float().sqrt()


def alibi_2d(grid: tuple[int, int], heads: int, _layer: int, _layers: int) -> Tensor:
    """b_hij = -m_h |i - j|, |i - j| the Euclidean distance in patches, m_h = 2^(-8 h / H) for h = 1 ... H.

    ALiBi (Press et al., arXiv 2108.12409) with the distance of two dimensions, as in CROMA (arXiv 2311.00566).
    """
    slope_H = torch.exp2(-8 * torch.arange(1, heads + 1) / heads)
    return -slope_H[:, None, None] * _distance(grid)


def look_here(grid: tuple[int, int], heads: int, layer: int, layers: int) -> Tensor:
    """b_hij = -s_l m_h |i - j| where head h may look, else -inf (LookHere-180, Fuller et al., arXiv 2405.13985).

    Heads in groups of four look up, down, left and right, the query's own row or column included; as many groups as
    fit into two thirds of the heads, at least one; the others look everywhere. Slopes of the g-th group: m = 2^-g; of
    the free heads: 4^-1, 4^-2, 4^-3, 4^-4, in equal parts when there are more. s_l falls from 1.5 in the first layer
    to 0.5 in the last. The paper has 12 and 16 heads; other numbers follow the same rule.
    """
    if heads < 4:
        raise LapeError(f"pe='LookHere' turns groups of four heads, the model has {heads}: use pe='ALiBi-2D'")
    down, right = _offsets(grid)
    groups = max(heads * 2 // 3 // 4, 1)
    free = heads - 4 * groups
    slope_H = [2.0**-g for g in range(1, groups + 1) for _ in range(4)]
    slope_H += [4.0 ** -(1 + f // -(-free // 4)) for f in range(free)]
    visible_Hnn = torch.stack([down <= 0, down >= 0, right <= 0, right >= 0]).repeat(groups, 1, 1)
    visible_Hnn = torch.cat([visible_Hnn, visible_Hnn.new_ones(free, *down.shape)])
    layer_slope = 1.5 - (layer / (layers - 1) if layers > 1 else 0.0)
    bias_Hnn = -layer_slope * torch.tensor(slope_H)[:, None, None] * _distance(grid)
    return bias_Hnn.masked_fill(~visible_Hnn, float("-inf"))
