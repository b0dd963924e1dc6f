"""More measures of positions over depth; those of locality are in `lape.look.similarity`.

All take what `lape.positions` or `lape.correlation` gave; nothing is normalised here. Shape suffixes: L layers,
n patches (prefix tokens left out), D width, K patches in one direction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lape.core.position import Grid
from lape.look.similarity import coordinates, half_distance, locality_radius, mean_of_pairs, monotonicity, spearman

DIRECTIONS = 60  # bins of the circle, as many as LOOPE (arXiv 2504.14386) takes


def effective_rank(positions_LnD: Tensor) -> Tensor:
    """(L,) exp of the entropy of the singular values, of the positions with their mean over the patches taken off.

        r_l = exp(-sum_k p_k log p_k),   p_k = sigma_k / sum sigma

    The number of directions in which the patches differ, 0 when they do not. Source: Roy and Vetterli, "The effective
    rank", EUSIPCO 2007; the mean is taken off because what all patches share tells no patch where it is.
    """
    x = positions_LnD.detach().double().cpu()
    x = x - x.mean(-2, keepdim=True)
    sigma = torch.linalg.svdvals(x)
    sigma = sigma.where(sigma > 1e-9 * sigma.amax(-1, keepdim=True).clamp(min=1e-30), 0.0)
    share = sigma / sigma.sum(-1, keepdim=True).clamp(min=1e-30)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(-1)
    return torch.where(sigma.sum(-1) > 0, entropy.exp(), 0.0)


def layer_change(correlation_Lnn: Tensor) -> Tensor:
    """(L,) root mean square over pairs i != j of s_ij(l) - s_ij(l - 1): how much a layer changes the map before it.

    Between 0 (the same map) and 2. The first layer has none before it: NaN.
    """
    s = correlation_Lnn.double()
    return torch.cat([s.new_full((1,), math.nan), mean_of_pairs((s[1:] - s[:-1]).square()).sqrt()])


def directed_monotonicity(correlation_Lnn: Tensor, grid: Grid) -> Tensor:
    """(L,) mean over patches and directions of 1 - Spearman(distance, s_ij), the directions in 60 equal bins.

    2: similarity falls with every step, whichever way one walks; 1: no order. Directions with fewer than two patches
    are left out. After M_D of LOOPE (arXiv 2504.14386), whose bins and averages may differ in detail.
    """
    row, column = coordinates(grid).double().unbind(1)
    down, right = row - row[:, None], column - column[:, None]  # (n, n): from the patch of the row
    turn = torch.atan2(down, right) / (2 * math.pi) % 1
    bins = (turn * DIRECTIONS + 0.5).long() % DIRECTIONS
    n = len(row)
    group = (torch.arange(n)[:, None] * DIRECTIONS + bins).where(~torch.eye(n, dtype=torch.bool), -1).flatten()
    pair_GK = _members(group)  # of the flattened (n, n)
    if not len(pair_GK):
        return torch.ones(len(correlation_Lnn), dtype=torch.float64)
    mask = pair_GK >= 0
    distance = (down.square() + right.square()).sqrt().flatten()[pair_GK]
    similarity = correlation_Lnn.float().flatten(1)[:, pair_GK]  # float: what sums differ by is no order
    return (1 - spearman(mask, distance, similarity)).mean(-1)


def _members(group_m: Tensor) -> Tensor:
    """(G, K) the indices in each group of two or more, padded with -1; a group number below 0 is no group."""
    order = group_m.argsort(stable=True)
    order = order[group_m[order] >= 0]
    _, which, count = torch.unique_consecutive(group_m[order], return_inverse=True, return_counts=True)
    place = torch.arange(len(order)) - (count.cumsum(0) - count)[which]
    members = torch.full((len(count), int(count.max()) if len(count) else 0), -1)
    members[which, place] = order
    return members[count > 1]


def asymmetry(correlation_Lnn: Tensor, grid: Grid) -> Tensor:
    """(L,) mean of |s(i, i + o) - s(i, i - o)| over patches i and offsets o for which both stay on the grid.

    0: a patch's map is the same on both sides, as for sinusoidal tables, whose similarity depends on the offset alone.
    """
    rows, columns = grid
    total, count = correlation_Lnn.new_zeros(len(correlation_Lnn), dtype=torch.float64), 0
    maps = correlation_Lnn.double().reshape(*correlation_Lnn.shape[:-1], *grid)
    for row in range(rows):
        for column in range(columns):
            high, wide = min(row, rows - 1 - row), min(column, columns - 1 - column)
            window = maps[:, row * columns + column, row - high : row + high + 1, column - wide : column + wide + 1]
            total += (window - window.flip(-2, -1)).abs().sum((-2, -1))
            count += window.shape[-2] * window.shape[-1] - 1
    return total / max(count, 1)


def anisotropy(correlation_Lnn: Tensor, grid: Grid) -> Tensor:
    """(L,) mean similarity to the next patch in the row minus that to the next patch in the column; NaN without either.

    0: rows and columns count alike. Positive: a row is smoother than a column, as for `1D_sin`, which counts along
    the rows.
    """
    rows, columns = grid
    patch = torch.arange(rows * columns).view(grid)
    s = correlation_Lnn.double()
    along = s[:, patch[:, :-1].flatten(), patch[:, 1:].flatten()].mean(-1)
    across = s[:, patch[:-1].flatten(), patch[1:].flatten()].mean(-1)
    return along - across


@dataclass(frozen=True)
class Measure:
    """A number a layer, (L,): how it reads, and its function of what `takes` names."""

    label: str
    hint: str  # what its values say
    means: str  # what is better or worse
    of: Callable[..., Tensor]
    takes: str = "sg"  # s similarities (L, n, n), p positions (L, n, D), g grid
    planar: bool = False  # whether it is of rows and columns alone


MEASURES: dict[str, Measure] = {
    measure.of.__name__: measure
    for measure in (
        Measure(
            "locality radius",
            "0: like its neighbours only; 1: near and far alike",
            "Low: the layer tells near from far. 1 in all layers: position is lost.",
            locality_radius,
        ),
        Measure(
            "half distance, patches",
            "where half of the similarity is lost",
            "Short: sharp neighbourhoods. Unlike layers use position at several scales.",
            half_distance,
        ),
        Measure(
            "monotonicity",
            "2: falls with every step away; 1: no order",
            "Higher is more orderly. Below 1: far patches look nearer than near ones.",
            monotonicity,
        ),
        Measure(
            "directed monotonicity",
            "the same along each direction",
            "Far below monotonicity: order along some directions only (a cross, stripes).",
            directed_monotonicity,
            planar=True,
        ),
        Measure(
            "asymmetry",
            "0: the same on both sides of a patch",
            "Not worse by itself: a learned table may prefer a side. Noise raises it, too.",
            asymmetry,
            planar=True,
        ),
        Measure(
            "row - column similarity",
            "0: rows and columns count alike",
            "Far from 0: one axis is told apart better, seldom wanted for images.",
            anisotropy,
            planar=True,
        ),
        Measure(
            "effective rank",
            "directions in which the patches differ",
            "Higher: patches differ in more ways. Falling over depth: position fades.",
            effective_rank,
            takes="p",
        ),
        Measure(
            "change from layer to layer",
            "0: the map of the layer before",
            "0 in all layers: each sees the same position. High: each makes its own of it.",
            layer_change,
            takes="s",
        ),
    )
}


def measure_all(correlation_Lnn: Tensor, positions_LnD: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Every measure of `MEASURES` that the grid has, by name, (L,) each; positions without prefix tokens."""
    arguments = {"s": correlation_Lnn, "p": positions_LnD, "g": grid}
    measures = {name: measure for name, measure in MEASURES.items() if len(grid) == 2 or not measure.planar}
    return {name: measure.of(*(arguments[key] for key in measure.takes)) for name, measure in measures.items()}
