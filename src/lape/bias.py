"""Relative position: a learned bias on attention logits, LaPE on it, and the attention that receives it.

Knows no host. Shape legend: B batch, N tokens, D width, H heads, n patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.position import Grid, Layout
from lape.wrap import Wrapper


def offset_index(grid: Grid, axes: int) -> Tensor:
    """(n, n) row of the bias table for query i and key j: their offset i - j, shifted to start at 0.

    axes=2: (row offset) * (2 columns - 1) + column offset; axes=1: the offset in raster order.
    """
    if axes == 1:
        grid = (1, grid[0] * grid[1])
    rows, columns = grid
    y_n, x_n = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    dy_nn = y_n[:, None] - y_n[None] + rows - 1
    dx_nn = x_n[:, None] - x_n[None] + columns - 1
    return dy_nn * (2 * columns - 1) + dx_nn


class PositionBias(nn.Module):
    """Relative position bias on attention logits, and LaPE on it: LayerNorm over each row of the bias.

    b_Hij = table[offset(i, j), H]; with `normalised`, b_Hi = LN'(b_Hi) over the n keys of query i, with an affine of
    its own (2n parameters, eps 1e-5, as in the reference). Prefix tokens get no bias.
    """

    def __init__(self, layout: Layout, num_heads: int, axes: int, *, normalised: bool, like: Tensor):
        super().__init__()
        index_nn = offset_index(layout.grid, axes)
        size = int(index_nn.max()) + 1
        self.layout = layout
        self.relative_position_bias_table = nn.Parameter(like.new_empty(size, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", index_nn.to(like.device), persistent=False)
        self.pe_norm = nn.LayerNorm(layout.num_patches, device=like.device, dtype=like.dtype) if normalised else None

    def position_bias(self) -> Tensor:
        """(H, n, n): the bias between patches."""
        index_nn: Tensor = self.get_buffer("relative_position_index")
        bias_Hnn = self.relative_position_bias_table[index_nn].permute(2, 0, 1)
        return bias_Hnn if self.pe_norm is None else self.pe_norm(bias_Hnn)

    def forward(self) -> Tensor:
        """(1, H, N, N): the bias between all tokens, zero where a prefix token takes part."""
        prefix = self.layout.num_prefix
        return F.pad(self.position_bias(), (prefix, 0, prefix, 0))[None]

    def extra_repr(self) -> str:
        return f"offsets={self.relative_position_bias_table.shape[0]}, grid={self.layout.grid}"


class FoldedBias(nn.Module):
    """`PositionBias` after folding: a constant for one grid."""

    def __init__(self, bias_1HNN: Tensor):
        super().__init__()
        self.register_buffer("folded_bias", bias_1HNN)

    def forward(self) -> Tensor:
        """(1, H, N, N): the bias between all tokens."""
        return self.get_buffer("folded_bias")


class PositionalAttention(Wrapper):
    """The host's attention with a position bias on its logits, handed over as `attn_mask`."""

    inner = "host_attention"

    def __init__(self, host_attention: nn.Module, position_bias: PositionBias | FoldedBias):
        super().__init__()
        self.host_attention = host_attention
        self.position_bias = position_bias

    def forward(self, x_BND: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Any:
        bias_1HNN = self.position_bias().to(x_BND.dtype)
        if attn_mask is None:
            mask = bias_1HNN
        elif attn_mask.dtype == torch.bool:  # True takes part in attention
            mask = bias_1HNN.masked_fill(~attn_mask, float("-inf"))
        else:
            mask = bias_1HNN + attn_mask
        return self.host_attention(x_BND, attn_mask=mask, **kwargs)
