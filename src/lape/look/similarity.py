"""Positions as numbers: cosine similarity between patches, and measures of how local it is.

    s_ij = <w_i, w_j> / (|w_i| |w_j|)                      position correlation (LaPE, ICCV 2023, Eq. 12)

w_i is what a block has of the position of patch i. It comes from `lape.positions`, the one place where positions are
computed: nothing is normalised here. Shape suffixes: L layers, N tokens, n patches (prefix tokens left out), D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lape.convert.converted import conversion_of
from lape.convert.positions import Size, View, grid_for, position_bias, positions, table_of
from lape.convert.positions import grid as default_grid
from lape.core.joins import JOINS
from lape.core.position import Grid
from lape.errors import LapeError, check_finite, needs


def correlation(model: nn.Module, size: Size | None = None, view: View = "seen", *, stage: int | None = None) -> Tensor:
    """Cosine similarity between the positions of all patches, layer by layer.

    `model` is a converted model; `size` the image size in pixels (None: the model's own); `view` and
    `stage` as in `lape.positions`. Returns (L, n, n) in [-1, 1], float32 on the CPU. Raises what `lape.positions` does.
    """
    anatomy = conversion_of(model).anatomy
    first = 0 if stage is None or stage not in range(len(anatomy.stages)) else anatomy.layers_of(stage).start
    layout = anatomy.at(first)[0]
    return cosine(positions(model, size, view, stage=stage)[:, layout.patches])


def cosine(positions_LnD: Tensor) -> Tensor:
    """Cosine similarity of the rows, (..., n, D) -> (..., n, n), float32 on the CPU.

    Summed in float64, so the diagonal is exactly 1. A row of zeros has no direction: its similarity to every row,
    itself included, is 0. Raises NotFiniteError for NaN and infinite ones.
    """
    rows = positions_LnD.detach().to("cpu", torch.float64)
    check_finite(rows, "positions")
    length = rows.norm(dim=-1, keepdim=True)
    direction = torch.where(length > 0, rows / length.where(length > 0, 1.0), 0.0)
    return (direction @ direction.mT).clamp(-1, 1).float()


def bias_to_show(model: nn.Module) -> Tensor:
    """`lape.position_bias`, float32 on the CPU; -inf, where a head may not look, as the lowest value that is finite."""
    bias_LHnn = position_bias(model).detach().float().cpu()
    return bias_LHnn.clamp(min=bias_LHnn.where(bias_LHnn.isfinite(), 0.0).min())


def grid_at(model: nn.Module, size: Size | None = None) -> Grid:
    """(rows, columns) of patches of an image of `size` pixels that `lape.positions` accepts; None: the model's."""
    return default_grid(model) if size is None else grid_for(conversion_of(model), size) or ()


def raw_table(model: nn.Module, size: Size | None = None) -> Tensor | None:
    """P (N, D), before any layer's norm, prefix tokens first; None where no single table is left (unshare, folded)."""
    conversion = conversion_of(model)
    join = JOINS[conversion.join]
    if join.table_per_block or (join.normalised and conversion.folded):
        return None
    if not join.normalised:
        return positions(model, size)[0].detach()
    return conversion.layout.spread(table_of(conversion, grid_at(model, size)))[0].detach()


@dataclass(frozen=True)
class Maps:
    """Positions of one model on one grid, and the similarity between those of its patches."""

    grid: Grid
    patches: slice  # where they are among the tokens
    positions_LND: Tensor  # prefix tokens first
    layers_Lnn: Tensor
    table_ND: Tensor | None  # the raw table, where one is left
    table_nn: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, size: Size | None = None, view: View = "seen", *, frames: bool = False) -> Maps:
        """Arguments and errors are those of `lape.positions`; a grid of frames is an error without `frames`."""
        positions_LND = positions(model, size, view).detach()
        grid = grid_at(model, size)
        if len(grid) != 2 and not (frames and len(grid) == 3):
            sides = " x ".join(map(str, grid))
            raise LapeError(
                f"this is drawn of rows and columns, the grid is {sides}: lape visualize draws frames, "
                "lape.correlation(model) has the numbers"
            )
        patches, table_ND = conversion_of(model).layout.patches, raw_table(model, size)
        table_nn = None if table_ND is None else cosine(table_ND[patches])
        maps_Lnn = cosine(positions_LND[:, patches])
        return cls(grid, patches, positions_LND, maps_Lnn, table_ND, table_nn)

    @property
    def patches_LnD(self) -> Tensor:
        """The positions of the patches alone."""
        return self.positions_LND[:, self.patches]

    @property
    def columns(self) -> dict[str, Tensor]:
        """Every map (n, n) by what stands above it: the table's, if there is one, and each layer's."""
        layers = {f"layer {layer}": map_nn for layer, map_nn in enumerate(self.layers_Lnn)}
        return layers if self.table_nn is None else {"table P": self.table_nn, **layers}


def within_frames(map_nn: Tensor, grid: Grid) -> Tensor:
    """Of a map between all patches its parts within a frame, (T, m, m), m = rows x columns; T is 1 for an image."""
    frames, patches = math.prod(grid[:-2]), math.prod(grid[-2:])
    return map_nn.reshape(frames, patches, frames, patches).diagonal(dim1=0, dim2=2).movedim(-1, 0)


AXES = ("frame", "row", "column")
"""Of a grid, its last ones."""


def token_at(grid: Grid, place: Sequence[int]) -> int:
    """The patch at (row, column), or (frame, row, column)."""
    return int(np.ravel_multi_index(tuple(place), grid))


def place_of_token(grid: Grid, token: int) -> tuple[int, ...]:
    """(row, column), or (frame, row, column)."""
    return tuple(map(int, np.unravel_index(token, grid)))


def center_token(grid: Grid) -> int:
    """The patch in the middle; up and left of it where a side is even. 90 on 14 x 14, as in the LaPE authors' plots."""
    return token_at(grid, [(side - 1) // 2 for side in grid])


def check_token(grid: Grid, token: int | None) -> int:
    """The patch's index, the centre for None. Raises LapeError outside the grid."""
    if token is None:
        return center_token(grid)
    if not 0 <= token < math.prod(grid):
        names = AXES[-len(grid) :]
        rule = names[0] + "".join(f" x {side} + {name}" for side, name in zip(grid[1:], names[1:], strict=True))
        raise LapeError(
            f"token {token} is outside the {' x '.join(map(str, grid))} grid of patches: "
            f"choose 0 to {math.prod(grid) - 1} ({rule})"
        )
    return token


def token_map(correlation_Lnn: Tensor, grid: Grid, token: int | None = None) -> Tensor:
    """Row `token` of each (n, n) map laid out on the grid, (..., n, n) -> (..., *grid); None is the centre."""
    token = check_token(grid, token)
    return correlation_Lnn[..., token, :].reshape(*correlation_Lnn.shape[:-2], *grid)


# --- measures ---------------------------------------------------------------------------------------------------------


def coordinates(grid: Grid) -> Tensor:
    """(n, 2) row and column of each patch, (n, 3) frame, row and column on a grid of frames."""
    return torch.cartesian_prod(*map(torch.arange, grid))


def squared_distances(grid: Grid) -> Tensor:
    """(n, n) squared Euclidean distance between patches, in patches: whole numbers, so equal ones compare equal."""
    place = coordinates(grid)
    return (place[:, None] - place[None, :]).square().sum(-1)


def similarity_by_distance(correlation_Lnn: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Mean similarity against distance: c_l(d) = mean of s_ij over all pairs with |i - j| = d.

    Returns the distances that occur on the grid, in patches, ascending from 0, (K,), and the means (L, K).
    """
    values_Lm = correlation_Lnn.double().flatten(-2)
    squares, group = torch.unique(squared_distances(grid).flatten(), return_inverse=True)
    sums = values_Lm.new_zeros(*values_Lm.shape[:-1], len(squares)).index_add_(-1, group, values_Lm)
    return squares.double().sqrt(), sums / group.bincount()


def half_distance(correlation_Lnn: Tensor, grid: Grid) -> Tensor:
    """(L,) distance, in patches, at which the mean similarity c_l(d) has lost half of what there is to lose.

    The smallest d with c_l(d) <= (c_l(0) + m_l) / 2, m_l being the mean of s_ij over all pairs i != j; linear between
    the distances that occur. inf where c_l never falls. (A level common to all pairs, as the bias of a LayerNorm adds
    one, does not hide the fall.)
    """
    distance, curve = similarity_by_distance(correlation_Lnn, grid)
    start = curve[..., :1]
    below = curve <= (level := (start + mean_of_pairs(correlation_Lnn)[..., None]) / 2)
    after = below.int().argmax(-1, keepdim=True)
    before = (after - 1).clamp(min=0)
    high, low = curve.gather(-1, before), curve.gather(-1, after)
    share = (high - level) / (high - low).where(high > low, 1.0)
    crossing = distance[before] + share * (distance[after] - distance[before])
    return torch.where(below.any(-1, keepdim=True) & (level < start), crossing, torch.inf).squeeze(-1)


def locality_radius(correlation_Lnn: Tensor, grid: Grid) -> Tensor:
    """(L,) mean distance to the patches that a patch resembles more than most, as a share of that to all patches.

        r_l = sum_ij e_ij d_ij / sum_ij e_ij  /  mean_ij d_ij,      e_ij = max(s_ij - m_l, 0)

    m_l is the mean of s_ij over all pairs i != j. Near 0: a patch resembles itself and its neighbours. 1: near and far
    patches alike (also where all similarities are equal).
    """
    distance = squared_distances(grid).double().sqrt()
    excess = (correlation_Lnn.double() - mean_of_pairs(correlation_Lnn)[..., None, None]).clamp(min=0)
    total = excess.sum((-2, -1))
    radius = (excess * distance).sum((-2, -1)) / total.where(total > 0, 1.0)
    return torch.where(total > 0, radius / distance.mean().clamp(min=1e-12), 1.0)


def mean_of_pairs(correlation_Lnn: Tensor) -> Tensor:
    """(L,) mean over i != j."""
    s, n = correlation_Lnn.double(), correlation_Lnn.shape[-1]
    return (s.sum((-2, -1)) - s.diagonal(dim1=-2, dim2=-1).sum(-1)) / max(n * (n - 1), 1)


def monotonicity(correlation_Lnn: Tensor, grid: Grid) -> Tensor:
    """(L,) undirected monotonicity: mean over patches i of 1 - Spearman(r, mean of s_ij over |i - j| = r).

    2: similarity falls with every step away from a patch; 1: no order; 0: it rises. Where all similarities are equal
    the rank correlation counts as 0. Source: M_U of LOOPE (arXiv 2504.14386).
    """
    distance, ring_nn = torch.unique(squared_distances(grid).double().sqrt(), return_inverse=True)
    shape = (len(ring_nn), len(distance))  # (n, K)
    count_nK = torch.zeros(shape, dtype=torch.float64).scatter_add_(1, ring_nn, torch.ones_like(ring_nn).double())
    s_Lnn = correlation_Lnn.double()
    sum_LnK = s_Lnn.new_zeros(*s_Lnn.shape[:-2], *shape).scatter_add_(-1, ring_nn.expand_as(s_Lnn), s_Lnn)
    mean_LnK = (sum_LnK / count_nK.clamp(min=1)).float()  # float: what sums differ by is no order
    return (1 - spearman(count_nK > 0, distance.expand(shape), mean_LnK)).mean(-1)


def spearman(mask_GK: Tensor, a_GK: Tensor, b_LGK: Tensor) -> Tensor:
    """(L, G) rank correlation along the last axis over the entries of the mask; 0 without spread. Ties share ranks.

    Layer by layer, which keeps what is sorted at a time small.
    """
    a = _centred_ranks(mask_GK, a_GK)
    return torch.stack([_cosine_or_zero(a, _centred_ranks(mask_GK, b_GK)) for b_GK in b_LGK])


def _centred_ranks(mask_GK: Tensor, values_GK: Tensor) -> Tensor:
    """Ranks less their mean, 0 outside of the mask."""
    with needs("plot"):
        from scipy.stats import rankdata

    rank = torch.from_numpy(rankdata(values_GK.where(mask_GK, torch.inf).numpy(), axis=-1)).where(mask_GK, 0.0)
    return (rank - rank.sum(-1, keepdim=True) / mask_GK.sum(-1, keepdim=True).clamp(min=1)).where(mask_GK, 0.0)


def _cosine_or_zero(a: Tensor, b: Tensor) -> Tensor:
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / scale.where(scale > 0, 1.0), 0.0)
