"""What the features of any Vision Transformer keep of position, layer by layer, and taking it out of them.

Converted or not, of the residual stream. Only patch tokens count, prefix tokens are left out; depths as in
`lape.look.watch`.
Shape suffixes: B images, N tokens, n patches, D width, E depths (layers + 1), k directions of a subspace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lape.core.position import Grid
from lape.errors import LapeError, check_finite
from lape.look.measures import effective_rank
from lape.look.probe import fit_places, places
from lape.look.similarity import squared_distances
from lape.look.watch import BATCH, Watch

ENERGY = 0.95  # of the variance of the mean image's tokens that the position subspace has to hold


@dataclass(frozen=True)
class Subspace:
    """The directions in which patches differ when images are averaged, at one depth."""

    mean_D: Tensor  # of all patch tokens
    basis_Dk: Tensor  # orthonormal
    share: float  # of the tokens' variance that is variance between places: 0 none, 1 all
    rank: float  # effective rank of the mean image's tokens

    def without(self, x: Tensor) -> Tensor:
        """Tokens (..., D) with the directions taken out, their mean kept."""
        basis, mean = self.basis_Dk.to(x), self.mean_D.to(x)
        return x - (x - mean) @ basis @ basis.T


@dataclass(frozen=True)
class Features:
    """What `probe` measured, (E,) each by the names of `LABELS`; NaN where there is nothing to measure.

    Fields:
        grid: (rows, columns) of patches
        images: how many were measured
        plain: the measures of the tokens
        without: the same with each depth's position subspace taken out of its tokens
        subspaces: of each depth, from the input on
    """

    grid: Grid
    images: int
    plain: dict[str, Tensor]
    without: dict[str, Tensor]
    subspaces: tuple[Subspace, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what is not finite is None."""

        def values(measures: dict[str, Tensor]) -> dict[str, list[float | None]]:
            return {name: [v if math.isfinite(v) else None for v in m.tolist()] for name, m in measures.items()}

        directions = [subspace.basis_Dk.shape[1] for subspace in self.subspaces]
        about = {"grid": list(self.grid), "images": self.images, "directions": directions}
        return {**about, "plain": values(self.plain), "without": values(self.without)}


LABELS = {
    "row": "row read by a linear probe, R²",
    "column": "column read by a linear probe, R²",
    "ssdc": "similarity against distance, r",
    "share": "share of variance by place",
    "rank": "effective rank of the mean",
    "shift": "invariance to a shift by one patch",
}


def probe(model: nn.Module, images_BCHW: Tensor, *, ridge: float = 1e-3, energy: float = ENERGY) -> Features:
    """How much position the patch tokens of every depth hold.

    row, column: R^2 of a ridge regression of the patch's row and column on its token, as in `lape.look.probe`.
    ssdc: mean over images of Pearson's r, over pairs i != j, between cosine similarity of tokens and distance of
        patches; below 0 where near patches are alike. After Mannes, arXiv 2606.00124, whose details may differ.
    share: variance of the mean token of a place, over places, as a share of all variance; what chance adds to a mean of
        few images is taken off (the variance component of a one-way analysis of variance), so 0 means none.
    rank: effective rank of those means; few images add directions.
    shift: 1 - E|x - x'|^2 / (2 v), x a token, x' that of the same content in the image shifted by one patch, v the
        tokens' variance: 1 when a token knows nothing of its place, 0 when it is as another one. Images wrap around,
        and what was wrapped is left out. Mean of a step right and a step down.

    The first half of the images fits probe and subspace, the second half is measured.

    Args:
        images_BCHW: transformed as in evaluation, of a size that the model takes; at least 4.
        ridge: as in `lape.look.probe.where_am_i`.
        energy: share of the variance of the mean tokens that the subspace holds, by the fewest directions.

    Raises LapeError: too few images, a model whose blocks are not found or whose tokens are no one grid.
    """
    _check(images_BCHW, 4, "a probe fits on half of them and tests on half", energy)
    watch, half = Watch(model, images_BCHW), len(images_BCHW) // 2
    fit, test = images_BCHW[:half], images_BCHW[half:]
    grams, means, within = _sums(watch, fit)
    subspaces = tuple(subspace_of(m, w, half, energy) for m, w in zip(means, within, strict=True))
    readouts = [[_readout(gram, watch.grid, ridge, half, s) for s in (None, sub)]
                for gram, sub in zip(grams, subspaces, strict=True)]  # fmt: skip
    tallies = [[_Tally(watch.grid, readout) for readout in pair] for pair in readouts]
    for batch in torch.split(test, BATCH):
        shifts = [watch(batch.roll(step, axis)) for step, axis in watch.steps]
        for depth, x_BnD in enumerate(watch(batch)):
            for which, take in enumerate((lambda x: x, subspaces[depth].without)):
                tallies[depth][which].add(take(x_BnD), [take(tokens[depth]) for tokens in shifts])
    plain, without = (_stack([pair[which].measures() for pair in tallies]) for which in range(2))
    plain["share"] = torch.tensor([subspace.share for subspace in subspaces])
    plain["rank"] = torch.tensor([subspace.rank for subspace in subspaces])
    return Features(watch.grid, len(images_BCHW), plain, without, subspaces)


def _check(images_BCHW: Tensor, least: int, why: str, energy: float) -> None:
    """Raises LapeError for what is no batch of images, and for a share that is none."""
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[0] < least:
        raise LapeError(f"images of shape {shape}: give (B, C, height, width) with B {least} or more, {why}")
    check_finite(images_BCHW, "the images")
    if not 0 < energy <= 1:
        raise LapeError(f"energy={energy} is no share of a variance: give a number above 0, at most 1")


def debias_(model: nn.Module, images_BCHW: Tensor, *, depth: int = -1, energy: float = ENERGY) -> RemovableHandle:
    """Takes the position subspace out of the patch tokens of a depth (-1: the last), in every forward from now on.

    The directions are those of `probe`, fitted on all of these images. Nothing in the model changes but a hook:
    `.remove()` on what is returned undoes it. `lape.save` does not store it. Raises what `probe` does.
    """
    _check(images_BCHW, 2, "a mean is of several", energy)
    watch = Watch(model, images_BCHW)
    depths = len(watch.blocks) + 1
    if not -depths <= depth < depths:
        raise LapeError(f"depth={depth} is none of the model's: choose 0 to {depths - 1}, or -1 for the last")
    _, means, within = _sums(watch, images_BCHW)
    subspace = subspace_of(means[depth], within[depth], len(images_BCHW), energy)
    start, stop = watch.patches.start, watch.patches.stop

    def clean(tokens: Tensor) -> Tensor:
        x_BND = tokens.flatten(1, -2)
        patches = subspace.without(x_BND[:, watch.patches])
        return torch.cat([x_BND[:, :start], patches, x_BND[:, stop:]], dim=1).reshape(tokens.shape)

    def before(_block: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (clean(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": clean(kwargs["hidden_states"])}

    def behind(_block: nn.Module, _args: Any, output: Any) -> Any:
        return (clean(output[0]), *output[1:]) if isinstance(output, tuple) else clean(output)

    if depth % depths == 0:
        return watch.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return watch.blocks[depth % depths - 1].register_forward_hook(behind)


# --- sums over images -------------------------------------------------------------------------------------------------


def _sums(watch: Watch, images_BCHW: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor], list[float]]:
    """By depth: gram and cross products for the probe, the mean token of each place (n, D), the variance around it."""
    place_n2 = places(watch.grid)
    sums: list[list[Tensor]] = []
    for batch in torch.split(images_BCHW, BATCH):
        for depth, tokens_BnD in enumerate(watch(batch)):
            x_BnD = F.pad(tokens_BnD.double(), (0, 1), value=1.0)
            rows = x_BnD.flatten(0, 1)
            products = [rows.T @ rows, rows.T @ place_n2.repeat(len(x_BnD), 1), x_BnD.sum(0)[:, :-1]]
            if depth == len(sums):
                sums.append(products)
            else:
                sums[depth] = [a + b for a, b in zip(sums[depth], products, strict=True)]
    for depth, (*_, tokens_nD) in enumerate(sums):
        check_finite(tokens_nD, f"the patch tokens at depth {depth}")
    count = len(images_BCHW)
    means = [s[2] / count for s in sums]
    squares = [s[0].diagonal()[:-1].sum() - count * m.square().sum() for s, m in zip(sums, means, strict=True)]
    within = [max(square.item(), 0.0) / (len(place_n2) * max(count - 1, 1)) for square in squares]
    return [(s[0], s[1]) for s in sums], means, within


def subspace_of(mean_nD: Tensor, within: float, images: int, energy: float) -> Subspace:
    """The position subspace: `mean_nD` are means over `images`, `within` the variance (sum over D) around them."""
    centre_D = mean_nD.mean(0)
    deviation_nD = mean_nD - centre_D
    _, sigma, directions = torch.linalg.svd(deviation_nD, full_matrices=False)
    part = sigma.square().cumsum(0) / sigma.square().sum().clamp(min=1e-30)
    real = sigma > 1e-9 * sigma.amax().clamp(min=1e-30)
    count = min(int((part < energy - 1e-12).sum()) + 1, int(real.sum()))
    n = len(mean_nD)
    between = max(deviation_nD.square().sum().item() / n - within * (1 - 1 / n) / images, 0.0)
    share = between / (between + within) if between + within > 0 else 0.0
    return Subspace(centre_D, directions[:count].T.contiguous(), share, effective_rank(mean_nD[None]).item())


def _readout(
    products: tuple[Tensor, Tensor], grid: Grid, ridge: float, images: int, subspace: Subspace | None
) -> Tensor:
    """The ridge regression (D + 1, 2) of row and column; of tokens without a subspace by the same products."""
    gram, cross = products
    full_gram = gram[None]
    if subspace is not None:
        width = len(gram) - 1
        projection = subspace.basis_Dk @ subspace.basis_Dk.T
        affine = torch.eye(width + 1, dtype=gram.dtype)
        affine[:width, :width] -= projection
        affine[width, :width] = subspace.mean_D @ projection
        gram, cross = affine.T @ gram @ affine, affine.T @ cross
    return fit_places(gram[None], cross[None], ridge, full_gram)[0]  # one penalty, so that both can be compared


class _Tally:
    """Sums over the images of a test, at one depth."""

    def __init__(self, grid: Grid, readout: Tensor):
        self.grid, self.readout = grid, readout
        self.place_n2 = places(grid)
        distance = squared_distances(grid).double().sqrt()
        self.pairs = ~torch.eye(len(distance), dtype=torch.bool)
        far = distance[self.pairs]
        self.far = F.normalize(far - far.mean(), dim=0) if len(far) else far
        self.count, self.errors, self.ssdc = 0, torch.zeros(2).double(), 0.0
        self.sum, self.square, self.shift_errors = torch.zeros(1).double(), 0.0, torch.zeros(2).double()

    def add(self, x_BnD: Tensor, shifts: Sequence[Tensor]) -> None:
        x = x_BnD.double()
        estimate = x @ self.readout[:-1] + self.readout[-1]
        self.errors += (estimate - self.place_n2).square().sum((0, 1))
        unit = F.normalize(x, dim=-1)
        similarity = (unit @ unit.mT)[:, self.pairs]
        deviation = F.normalize(similarity - similarity.mean(-1, keepdim=True), dim=-1)
        self.ssdc += (deviation @ self.far).sum().item() if len(self.far) else math.nan
        self.count += len(x)
        self.sum = self.sum + x.sum((0, 1))
        self.square += x.square().sum().item()
        map_BrcD = x.unflatten(1, self.grid)
        axes = [axis for axis, side in zip((1, 2), self.grid, strict=True) if side > 1]
        for axis, neighbour in zip(axes, shifts, strict=True):
            length = self.grid[axis - 1] - 1
            here = map_BrcD.narrow(axis, 0, length)
            there = neighbour.double().unflatten(1, self.grid).narrow(axis, 1, length)
            self.shift_errors[axis - 1] += (here - there).square().sum(-1).mean((1, 2)).sum()

    def measures(self) -> dict[str, float]:
        total = self.place_n2.square().sum(0) * self.count
        row, column = torch.where(total > 0, 1 - self.errors / total.clamp(min=1e-12), torch.nan).tolist()
        tokens = self.count * len(self.place_n2)
        variance = self.square / tokens - (self.sum / tokens).square().sum().item()
        steps = [m / self.count for m, side in zip(self.shift_errors.tolist(), self.grid, strict=True) if side > 1]
        shift = 1 - sum(steps) / len(steps) / (2 * variance) if steps and variance > 1e-12 else math.nan
        return {"row": row, "column": column, "ssdc": self.ssdc / self.count, "shift": shift}


def _stack(measures: Sequence[dict[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([entry[name] for entry in measures]) for name in measures[0]}
