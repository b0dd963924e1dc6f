"""Models of stages (Swin): the grid shrinks and the width grows, and the position follows through the host's own parts.

    within a stage    P_(l+1) = LN'_l(P_l)
    at its border     P <- merge(P)              the host's module that merges its tokens, applied to the position

LaPE (ICCV 2023) gives results for Swin and no equation for a border; this is the reading that adds no parameter. The
merging is run on one (1, n, D) position beside the B images. Shape legend: B batch, N tokens, D width, n patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lape.errors import LapeError
from lape.joined import Joined, PositionSource
from lape.position import Grid


@dataclass(frozen=True)
class Stage:
    """Blocks of one grid and one width."""

    blocks: int  # how many
    grid: Grid
    width: int
    merging: str | None = None  # path of what makes this stage's tokens of those before; None: the first stage
    merges_map: bool = True  # whether it takes a map (1, rows, columns, D); else tokens (1, n, D) and their grid


class Merged:
    """The position of a stage: that of the stage before, merged as the host merges its tokens."""

    def __init__(self, merging: nn.Module, source: PositionSource, grid: Grid, merges_map: bool):
        self.merging, self.source, self.grid, self.merges_map = merging, source, grid, merges_map

    def position(self, grid: Grid | None = None) -> Tensor:
        """(1, n, D) of the stage's own grid. Raises LapeError when another one is asked for."""
        if grid is not None:
            raise LapeError(f"a model of stages has one image size: a map of {grid[0]} x {grid[1]} is another one's")
        p_1nD = self.source.position()
        if not self.merges_map:
            merged: Tensor = self.merging(p_1nD, self.grid)
            return merged
        merged = self.merging(p_1nD.unflatten(1, self.grid))
        return merged.flatten(1, 2)


class PositionalInput(Joined):
    """A table added to the patch tokens of a host that adds none, behind its patch embedding (join `basic`)."""

    inner = "host_patch_embed"

    def __init__(self, host_patch_embed: nn.Module, *args: Any):
        super().__init__(*args)
        self.host_patch_embed = host_patch_embed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = self.host_patch_embed(*args, **kwargs)
        return x + self.token_position(x)
