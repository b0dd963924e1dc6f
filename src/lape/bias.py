"""Relative position: a learned bias on attention logits, LaPE on it or on the host's own, and what receives it.

Knows no host. Shape legend: B batch, N tokens, D width, H heads, n patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import LapeError
from lape.grids import Grids
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

    For another grid the table is resampled over its offsets (bicubic for row and column offsets, linear along the
    raster order) and the affine over the keys (bicubic), in float32.
    """

    def __init__(self, layout: Layout, num_heads: int, axes: int, *, normalised: bool, like: Tensor):
        super().__init__()
        self.axes = axes
        self.layout = layout
        size = math.prod(_offsets(layout.grid, axes))
        self.relative_position_bias_table = nn.Parameter(like.new_empty(size, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        index_nn = offset_index(layout.grid, axes).to(like.device)
        self.register_buffer("relative_position_index", index_nn, persistent=False)
        self.pe_norm = nn.LayerNorm(layout.num_patches, device=like.device, dtype=like.dtype) if normalised else None

    def position_bias(self, grid: Grid | None = None) -> Tensor:
        """(H, n, n): the bias between patches, of another grid when one is given."""
        if grid is None:
            index_nn: Tensor = self.get_buffer("relative_position_index")
            bias_Hnn = self.relative_position_bias_table[index_nn].permute(2, 0, 1)
            return bias_Hnn if self.pe_norm is None else self.pe_norm(bias_Hnn)
        index_nn = offset_index(grid, self.axes).to(self.relative_position_bias_table.device)
        bias_Hnn = self._table_for(grid)[index_nn].permute(2, 0, 1)
        if self.pe_norm is None:
            return bias_Hnn
        weight_n, bias_n = (_resample_rows(affine_n, self.layout.grid, grid) for affine_n in self.pe_norm.parameters())
        return F.layer_norm(bias_Hnn, weight_n.shape, weight_n, bias_n, self.pe_norm.eps)

    def _table_for(self, grid: Grid) -> Tensor:
        old, new = (_offsets(g, self.axes) for g in (self.layout.grid, grid))
        return _resample_rows(self.relative_position_bias_table, old, new)

    def resize_(self, layout: Layout) -> None:
        """Makes this the bias of another grid, for good."""
        table = self._table_for(layout.grid).detach().clone()
        if self.pe_norm is not None:
            for name, affine_n in list(self.pe_norm.named_parameters()):
                values_n = _resample_rows(affine_n.detach(), self.layout.grid, layout.grid)
                setattr(self.pe_norm, name, nn.Parameter(values_n.clone()))
            self.pe_norm.normalized_shape = (layout.num_patches,)
        self.relative_position_bias_table = nn.Parameter(table)
        self.relative_position_index = offset_index(layout.grid, self.axes).to(table.device)
        self.layout = layout

    def forward(self, grid: Grid | None = None) -> Tensor:
        """(1, H, N, N): the bias between all tokens, zero where a prefix token takes part."""
        prefix = self.layout.num_prefix
        return F.pad(self.position_bias(grid), (prefix, 0, prefix, 0))[None]

    def extra_repr(self) -> str:
        return f"offsets={self.relative_position_bias_table.shape[0]}, grid={self.layout.grid}"


def _offsets(grid: Grid, axes: int) -> Grid:
    """Rows and columns of the bias table laid out by its offsets."""
    return (1, 2 * grid[0] * grid[1] - 1) if axes == 1 else (2 * grid[0] - 1, 2 * grid[1] - 1)


def _resample_rows(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """(old cells, ...) -> (new cells, ...) over a grid of cells, in float32; an equal grid is a no-op."""
    if old == new:
        return rows
    image = rows.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    if old[0] == new[0] == 1:
        image = F.interpolate(image[:, :, 0], size=new[1], mode="linear", align_corners=True)[:, :, None]
    else:
        image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    return image.flatten(2)[0].T.reshape(-1, *rows.shape[1:]).to(rows.dtype)


class FoldedBias(nn.Module):
    """`PositionBias` after folding: a constant for one grid."""

    folded_bias: Tensor

    def __init__(self, bias_1HNN: Tensor):
        super().__init__()
        self.register_buffer("folded_bias", bias_1HNN)

    def forward(self, grid: Grid | None = None) -> Tensor:
        """(1, H, N, N): the bias between all tokens."""
        return self.folded_bias


@dataclass(frozen=True)
class OwnBias:
    """Where a block of a host computes a relative position bias of its own."""

    method: str  # path of the method, which returns (1, H, N, N) or (H, N, N)
    keys: int  # n: the patches that a patch attends to, all or those of its window
    num_prefix: int = 0  # tokens before them
    args: tuple[Any, ...] = ()  # what the method is called with to show the bias


class NormalisedBias:
    """LaPE on a bias that a host computes itself; stands in for the host's method, on its instance.

    b_Hi = LN'(b_Hi) over the n keys of query patch i, as `PositionBias` does it for a new bias. What the host adds
    where a prefix token takes part stays as it is.
    """

    def __init__(self, owner: nn.Module, method: str, own: OwnBias, pe_norm: nn.LayerNorm):
        self.owner, self.method, self.own, self.pe_norm = owner, method, own, pe_norm

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        bias: Tensor = getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)
        prefix, keys = self.own.num_prefix, self.pe_norm.normalized_shape[0]
        if bias.shape[-1] != prefix + keys:
            raise LapeError(
                f"a bias between {bias.shape[-1] - prefix} patches arrived, its LayerNorm is for {keys}: give "
                "images of the model's size"
            )
        normed = self.pe_norm(bias[..., prefix:, prefix:])
        if not prefix:
            return normed
        rows = torch.cat([bias[..., prefix:, :prefix], normed], dim=-1)
        return torch.cat([bias[..., :prefix, :], rows], dim=-2)


class ConstantBias:
    """`NormalisedBias` after folding: a buffer of the host's module."""

    def __init__(self, owner: nn.Module):
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.owner.get_buffer("folded_bias")


AddBias = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""(bias_1HNN, args, kwargs of the host's attention) -> the args and kwargs with the bias in its mask."""


def add_to_attn_mask(bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
    """For attention(x, attn_mask=...), an additive or boolean mask that broadcasts to (B, H, N, N): timm."""
    x, *rest = args
    mask = rest.pop(0) if rest else kwargs.pop("attn_mask", None)
    return (x, *rest), {**kwargs, "attn_mask": masked(bias_1HNN, mask)}


def masked(bias_1HNN: Tensor, mask: Tensor | None) -> Tensor:
    """The bias with a caller's mask on top; in a boolean mask True takes part in attention."""
    if mask is None:
        return bias_1HNN
    if mask.dtype == torch.bool:
        return bias_1HNN.masked_fill(~mask, float("-inf"))
    return bias_1HNN + mask


class PositionalAttention(Wrapper):
    """The host's attention with a position bias on its logits, handed over in its mask."""

    inner = "host_attention"

    def __init__(
        self,
        host_attention: nn.Module,
        position_bias: PositionBias | FoldedBias,
        layout: Layout,
        grids: Grids | None = None,
        add_bias: AddBias = add_to_attn_mask,
    ):
        super().__init__()
        self.host_attention = host_attention
        self.position_bias = position_bias
        self.layout = layout
        self.grids = grids
        self._add_bias = add_bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_BND: Tensor = args[0] if args else kwargs["hidden_states"]
        grid = None if self.grids is None else self.grids.of(self.layout, x_BND.shape[1])
        bias_1HNN = self.position_bias(grid).to(x_BND.dtype)
        if self.grids is not None:
            bias_1HNN = self.grids.pick_pairs(bias_1HNN, self.layout, x_BND.shape[1])
        args, kwargs = self._add_bias(bias_1HNN, args, kwargs)
        return self.host_attention(*args, **kwargs)
