"""Relative position: a learned bias on attention logits, LaPE on it or on the host's own, and what receives it.

Knows no host. Shape legend: B batch, N tokens, D width, H heads, n patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from lape.core.constants import constant
from lape.core.joined import Joined
from lape.core.position import Grid, Layout, same_grid
from lape.errors import LapeError


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
        self.pe_norm = nn.LayerNorm(layout.num_patches, device=like.device, dtype=like.dtype) if normalised else None

    def position_bias(self, grid: Grid | None = None) -> Tensor:
        """(H, n, n): the bias between patches, of another grid when one is given."""
        grid = grid or self.layout.grid
        table = self._table_for(grid)
        bias_Hnn = table[constant(offset_index, table.device, grid, self.axes)].permute(2, 0, 1)
        if self.pe_norm is None:
            return bias_Hnn
        if same_grid(grid, self.layout.grid):
            rows_Hnn: Tensor = self.pe_norm(bias_Hnn)
            return rows_Hnn
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
    if same_grid(old, new):
        return rows
    image = rows.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    if old[0] == new[0] == 1:
        image = F.interpolate(image[:, :, 0], size=new[1], mode="linear", align_corners=True)[:, :, None]
    else:
        image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    return image.flatten(2)[0].T.reshape(-1, *rows.shape[1:]).to(rows.dtype)


@dataclass(frozen=True)
class BlockBias:
    """Where a block of a host computes a relative position bias of its own."""

    method: str  # path of the method, which returns (1, H, N, N) or (H, N, N)
    keys: int  # n: the patches that a patch attends to, all or those of its window
    num_prefix: int = 0  # tokens before them
    args: tuple[Any, ...] = ()  # what the method is called with to show the bias


def normalise(bias: Tensor, pe_norm: nn.Module, num_prefix: int, keys: int) -> Tensor:
    """LaPE on a bias (..., N, N) that a host computes: b_Hi = LN'(b_Hi) over the n keys of query patch i.

    As `PositionBias` does it for a new bias. What the host adds where a prefix token takes part stays as it is.
    """
    if bias.shape[-1] != num_prefix + keys:
        raise LapeError(
            f"a bias between {bias.shape[-1] - num_prefix} patches arrived, its LayerNorm is for {keys}: give "
            "images of the model's size"
        )
    patch_bias: Tensor = pe_norm(bias[..., num_prefix:, num_prefix:])
    if not num_prefix:
        return patch_bias
    rows = torch.cat([bias[..., num_prefix:, :num_prefix], patch_bias], dim=-1)
    return torch.cat([bias[..., :num_prefix, :], rows], dim=-2)


class NormalisedBias(Joined):
    """The owner of the host's method that computes a bias, whose rows LN' normalises."""

    def _around(self, host_method: Any, *args: Any, **kwargs: Any) -> Any:
        root: Any = self._lape.running  # type: ignore[attr-defined]
        return root.lape(self._lape_place, lambda: host_method(self, *args, **kwargs))  # type: ignore[attr-defined]


AddBias = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""(bias_1HNN, args, kwargs of the host's attention) -> the args and kwargs with the bias in its mask."""


def add_to_attn_mask(
    bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For attention(x, attn_mask=...), an additive or boolean mask that broadcasts to (B, H, N, N): timm."""
    x, *rest = args
    mask = rest.pop(0) if rest else kwargs.pop("attn_mask", None)
    return (x, *rest), {**kwargs, "attn_mask": masked(bias_1HNN, mask)}


torch.fx.wrap("masked")  # whether there is a mask is known when a traced graph runs


def masked(bias_1HNN: Tensor, mask: Tensor | None) -> Tensor:
    """The bias with a caller's mask on top; in a boolean mask True takes part in attention."""
    if mask is None:
        return bias_1HNN
    if mask.dtype == torch.bool:
        return bias_1HNN.masked_fill(~mask, float("-inf"))
    return bias_1HNN + mask
