"""Models of stages (Swin): the grid shrinks and the width grows, and the position follows through the host's own parts.

    within a stage    P_(l+1) = LN'_l(P_l)
    at its border     P <- merge(P)              the host's module that merges its tokens, applied to the position

LaPE (ICCV 2023) gives results for Swin and no equation for a border; this is the reading that adds no parameter. The
merging is run on one (1, n, D) position beside the B images. Shape legend: B batch, D width, n patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lape.core.position import Grid


def over_map(merging: nn.Module, p_1nD: Tensor, grid: Grid) -> Tensor:
    """By a module that takes a map (1, rows, columns, D)."""
    output: Tensor = merging(p_1nD.unflatten(1, grid))
    return output.flatten(1, 2)


def over_tokens(merging: nn.Module, p_1nD: Tensor, grid: Grid) -> Tensor:
    """By a module that takes tokens (1, n, D) and their grid."""
    output: Tensor = merging(p_1nD, grid)
    return output


@dataclass(frozen=True)
class Stage:
    """Blocks of one grid and one width."""

    blocks: int  # how many
    grid: Grid
    width: int
    merging: str | None = None  # path of what makes this stage's tokens of those before; None: the first stage
    merge: Callable[[nn.Module, Tensor, Grid], Tensor] = over_map  # (that, P of the stage before, its grid) -> P
    lead: int = 0  # tokens without a position that stand before all others in this stage
