"""Models of stages (Swin): the grid shrinks and the width grows, and the position follows through the host's own parts.

    within a stage    P_(l+1) = LN'_l(P_l)
    at its border     P <- merge(P)              the host's module that merges its tokens, applied to the position

LaPE (ICCV 2023) gives results for Swin and no equation for a border; this is the reading that adds no parameter. The
merging is run on one (1, n, D) position beside the B images. Shape legend: B batch, D width, n patches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lape.core.position import Grid


@dataclass(frozen=True)
class Stage:
    """Blocks of one grid and one width."""

    blocks: int  # how many
    grid: Grid
    width: int
    merging: str | None = None  # path of what makes this stage's tokens of those before; None: the first stage
    merges_map: bool = True  # whether it takes a map (1, rows, columns, D); else tokens (1, n, D) and their grid
    lead: int = 0  # tokens without a position that stand before all others in this stage

    def merge(self, merging: nn.Module, p_1nD: Tensor, grid: Grid) -> Tensor:
        """The position (1, n, D) of the stage before, which has this grid, as the position of this stage."""
        if self.merges_map:
            merged: Tensor = merging(p_1nD.unflatten(1, grid))
            return merged.flatten(1, 2)
        merged = merging(p_1nD, grid)
        return merged
