"""Where a position embedding comes from: the kinds, their tables and biases, and another grid's version of them.

Knows no host and no join. Shape legend: B batch, N tokens, R rows of a table, D width, H heads, n patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.core.fixed import alibi_2d, look_here
from lape.errors import LapeError
from lape.names import PE_NAMES, match_name

Grid = tuple[int, ...]
"""Patches along each axis: rows and columns; for a video, frames first."""


@dataclass(frozen=True)
class Layout:
    """How the tokens of a model stand to the rows of its position table.

    Tokens: `lead` tokens that own no row (queries), `prefix_rows` prefix tokens that own one (class, distillation),
    `bare` prefix tokens that own none (registers, `no_embed_class`), the patches of `grid` in row-major order, and
    `suffix_rows` tokens that own a row (detection). Tokens without a row receive no position.
    """

    grid: Grid
    prefix_rows: int
    bare: int = 0
    lead: int = 0
    suffix_rows: int = 0

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def num_prefix(self) -> int:
        """Tokens before the first patch."""
        return self.lead + self.prefix_rows + self.bare

    @property
    def num_rows(self) -> int:
        return self.prefix_rows + self.num_patches + self.suffix_rows

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches + self.suffix_rows

    @property
    def patches(self) -> slice:
        """Where the patches are among the tokens."""
        return slice(self.num_prefix, -self.suffix_rows or None)

    def spread(self, p_1RD: Tensor) -> Tensor:
        """(1, R, D) rows -> (1, N, D) tokens: zero for the tokens that own no row."""
        if not self.bare and not self.lead:
            return p_1RD
        lead, bare = (p_1RD.new_zeros(1, count, p_1RD.shape[-1]) for count in (self.lead, self.bare))
        return torch.cat([lead, p_1RD[:, : self.prefix_rows], bare, p_1RD[:, self.prefix_rows :]], dim=1)


def same_grid(one: Grid, other: Grid) -> bool:
    """Whether two grids are equal. One whose sides a graph leaves open is no other: asking would fix them."""
    return all(type(side) is int for side in (*one, *other)) and one == other


def resample(
    p_1RD: Tensor,
    layout: Layout,
    grid: Grid,
    *,
    mode: str = "bicubic",
    antialias: bool = True,
    align_corners: bool = False,
    square: bool = False,
) -> Tensor:
    """The table of `layout.grid` for another grid, in float32; rows of other tokens untouched.

    Bicubic with antialiasing over rows and columns, unless a host resamples its own in another way; then linear along
    the axes before them (frames). With `square`, it is cut from a resampled square, which keeps the aspect ratio. An
    equal grid returns the very same tensor. (Equal token counts do not: (8, 32) -> (16, 16) is resampled.)
    """
    if same_grid(grid, layout.grid):
        return p_1RD
    last = p_1RD.shape[1] - layout.suffix_rows
    patches_1nD = p_1RD[:, layout.prefix_rows : last]
    image = patches_1nD.float().unflatten(1, (-1, *layout.grid[-2:]))[0].movedim(-1, 1)  # (frames, D, rows, columns)
    size = (max(grid[-2:]),) * 2 if square else grid[-2:]
    image = F.interpolate(image, size=size, mode=mode, antialias=antialias, align_corners=align_corners)
    image = (image[:, :, : grid[-2], : grid[-1]] if square else image).flatten(2)  # (frames, D, patches)
    if grid[:-2] != layout.grid[:-2]:
        image = F.interpolate(image.permute(2, 1, 0), size=math.prod(grid[:-2]), mode="linear").permute(2, 1, 0)
    patches_1nD = image.transpose(1, 2).flatten(0, 1)[None].to(p_1RD.dtype)
    return torch.cat([p_1RD[:, : layout.prefix_rows], patches_1nD, p_1RD[:, last:]], dim=1)


def sin_cos(coordinate_n: Tensor, width: int) -> Tensor:
    """(n,) coordinates -> (n, width): sin in the even columns, cos in the odd ones (Vaswani et al. 2017, 3.5)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = coordinate_n.double()[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def sin_1d(layout: Layout, width: int) -> Tensor:
    """(1, R, D): the row number, prefix rows counted as the first positions (as the LaPE reference does)."""
    _check_width("1D_sin", width, 2)
    return sin_cos(torch.arange(layout.num_rows), width).float()[None]


def sin_2d(layout: Layout, width: int) -> Tensor:
    """(1, R, D): the column in the first half of the width, the row in the second; prefix rows are zero."""
    _check_width("2D_sin", width, 4)
    if len(layout.grid) != 2:
        raise LapeError(f"pe='2D_sin' is for rows and columns, the grid is {layout.grid}: use pe='learnable'")
    row_n, column_n = torch.meshgrid(*(torch.arange(side) for side in layout.grid), indexing="ij")
    patches = torch.cat([sin_cos(axis.flatten(), width // 2) for axis in (column_n, row_n)], dim=1)
    return F.pad(patches.float(), (0, 0, layout.prefix_rows, layout.suffix_rows))[None]


def learnable(layout: Layout, width: int, std: float = 0.02) -> Tensor:
    """(1, R, D) from a normal distribution, truncated at 2 absolute; std 0.02 is timm's and the reference's."""
    return nn.init.trunc_normal_(torch.empty(1, layout.num_rows, width), std=std)


def _check_width(kind: str, width: int, multiple: int) -> None:
    if width % multiple:
        raise LapeError(f"pe={kind!r} needs a width divisible by {multiple}, not {width}: use pe='learnable'")


SINUSOIDS = 0.5**0.5  # root mean square of sines and cosines in pairs


@dataclass(frozen=True)
class Kind:
    """A kind: a table added to tokens, a bias on logits, turned queries and keys, one made of the tokens, or none."""

    name: str
    build: Callable[..., Tensor] | None = None  # tables only: (1, R, D) for a layout and a width, free ones by std
    frozen: bool = False
    bias_axes: int = 0  # biases only: 1 offset along the raster order, 2 row and column offsets
    generators: int = 0  # made of the tokens of each image behind so many blocks
    fixed_bias: Callable[..., Tensor] | None = None  # (H, n, n) of grid, heads, layer, number of layers
    rotary: Literal["", "axial", "mixed"] = ""  # queries and keys turned
    untouched: bool = False  # whatever the model itself does
    note: str = ""

    @property
    def is_table(self) -> bool:
        return self.build is not None

    def table(self, layout: Layout, width: int, base_std: float | None, std: float | None) -> Tensor:
        """(1, R, D) at the start: free values by `base_std` (None: 0.02), all scaled to the standard deviation `std`.

        So another `std` is the same table on another scale. Of a frozen one, `std` is the root mean square of the
        patches' rows.
        """
        assert self.build is not None
        base_std = SINUSOIDS if self.frozen else 0.02 if base_std is None else base_std
        table = self.build(layout, width) if self.frozen else self.build(layout, width, base_std)
        return table if std is None else table * (std / base_std)

    @property
    def conditional(self) -> bool:
        return self.generators > 0

    @property
    def is_bias(self) -> bool:
        return self.bias_axes > 0 or self.fixed_bias is not None

    @property
    def missing(self) -> str:
        """Why there is no position to show, join or fold, for kinds without table and bias."""
        if self.conditional:
            return "its position is made of the tokens of each image"
        if self.rotary:
            return "its position turns queries and keys"
        return "the model was left as it is" if self.untouched else "it has none"


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("learnable", learnable, note="free table, truncated normal, std 0.02 or the host's own"),
        Kind("1D_sin", sin_1d, frozen=True, note="fixed sine and cosine of the token number"),
        Kind("2D_sin", sin_2d, frozen=True, note="fixed sine and cosine of column and row"),
        Kind("1D_RPE", bias_axes=1, note="learned bias on attention logits by offset in raster order"),
        Kind("2D_RPE", bias_axes=2, note="learned bias on attention logits by row and column offset"),
        Kind("RoPE", rotary="axial", note="queries and keys turned by column and row"),
        Kind("RoPE-mixed", rotary="mixed", note="queries and keys turned by learned frequencies of column and row"),
        Kind("ALiBi-2D", fixed_bias=alibi_2d, note="fixed bias on attention logits: minus the distance, by head"),
        Kind("LookHere", fixed_bias=look_here, note="as ALiBi-2D, and heads look up, down, left or right only"),
        Kind("PEG", generators=1, note="made of the tokens behind block 0 by a depth-wise convolution (CPVT)"),
        Kind("PEG-6", generators=6, note="as PEG, behind each of the first six blocks"),
        Kind("none", note="no position at all, the control"),
        Kind("own", untouched=True, note="the model stays as it is, whatever its position: a rival in a comparison"),
    )
}
assert tuple(KINDS) == tuple(PE_NAMES)


def kind_named(name: str) -> Kind:
    """The kind of this name, in any case. Raises LapeError that lists the known ones."""
    return KINDS[match_name("pe", name, PE_NAMES)]


def rows_of(table: Tensor) -> Tensor:
    """A table (1, R, D), (R, D) or (1, rows, columns, D) as (1, R, D)."""
    return table if table.ndim == 3 else table.reshape(1, -1, table.shape[-1])


def resized(table: Tensor, old: Layout, new: Layout) -> Tensor:
    """A table for another grid, in its own form; the very same tensor for an equal one."""
    if old.grid == new.grid:
        return table
    rows_1RD = resample(rows_of(table.detach()), old, new.grid)
    shape = {2: rows_1RD.shape[1:], 3: rows_1RD.shape, 4: (1, *new.grid, rows_1RD.shape[-1])}[table.ndim]
    return rows_1RD.reshape(shape).clone()
