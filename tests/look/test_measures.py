"""Measures over depth: known answers, above all for sinusoidal tables on small grids."""

import math

import pytest
import torch
from scipy.stats import spearmanr

import lape
from lape.core.position import Layout, sin_1d, sin_2d
from lape.look.measures import (
    MEASURES,
    anisotropy,
    asymmetry,
    directed_monotonicity,
    effective_rank,
    layer_change,
    measure_all,
)
from lape.look.similarity import cosine

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}


def distances(grid: tuple[int, int]) -> torch.Tensor:
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double()
    return torch.cdist(place, place)


# --- effective rank ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "expected"), [((1, 1), 0.0), ((1, 2), 1.0), ((2, 1), 1.0), ((2, 2), 2.0)])
def test_effective_rank_of_sinusoids_on_the_smallest_grids(grid: tuple[int, int], expected: float) -> None:
    """Two rows differ in one direction, two columns in another, and both differ by the same amount."""
    found = effective_rank(sin_2d(Layout(grid, 0), 32))
    assert found.tolist() == pytest.approx([expected])


def test_effective_rank_counts_equal_directions_and_ignores_a_common_offset() -> None:
    simplex = torch.eye(5)[None]  # five corners of a simplex lie in four dimensions
    assert effective_rank(simplex).tolist() == pytest.approx([4.0])
    assert effective_rank(simplex + 7).tolist() == pytest.approx([4.0])
    assert effective_rank(torch.ones(2, 5, 3)).tolist() == [0.0, 0.0]
    p = torch.tensor([0.75, 0.25])  # singular values 3 : 1
    spread = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])[None]
    assert effective_rank(spread).item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


# --- from layer to layer ----------------------------------------------------------------------------------------------


def test_layer_change_is_the_root_mean_square_over_pairs() -> None:
    first = torch.eye(3)
    maps = torch.stack([first, first, 0.5 * torch.ones(3, 3) + 0.5 * first, -torch.ones(3, 3) + 2 * first])
    found = layer_change(maps)
    assert math.isnan(found[0])
    assert found[1:].tolist() == pytest.approx([0.0, 0.5, 1.5])


# --- direction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (2, 5)])
def test_what_falls_with_distance_is_monotonic_in_each_direction(grid: tuple[int, int]) -> None:
    d = distances(grid)
    maps = torch.stack([-d, d, torch.ones_like(d)])
    assert directed_monotonicity(maps, grid).tolist() == pytest.approx([2.0, 0.0, 1.0])
    assert directed_monotonicity(torch.ones(1, 1, 1), (1, 1)).tolist() == [1.0]


def test_sinusoids_fall_along_rows_and_columns_of_a_small_grid() -> None:
    """All of sin_2d's angles of a 3 x 3 grid are below pi, so cos falls with every step."""
    maps = cosine(sin_2d(Layout((3, 3), 0), 32))
    assert directed_monotonicity(maps, (3, 3)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("grid", [(3, 4), (5, 5)])
def test_sinusoids_are_symmetric_and_a_lopsided_map_is_not(grid: tuple[int, int]) -> None:
    maps = cosine(sin_2d(Layout(grid, 0), 32))
    assert asymmetry(maps, grid).item() == pytest.approx(0.0, abs=1e-6)
    column = torch.arange(grid[0] * grid[1]) % grid[1]
    lopsided = (column[None] - column[:, None]).double()[None]  # s(i, i + o) - s(i, i - o) = 2 o
    assert asymmetry(lopsided, grid).item() > 0.5
    assert asymmetry(torch.tensor([[[0.0, 0, 0], [1, 0, 3], [0, 0, 0]]]), (1, 3)).item() == pytest.approx(2.0)


def test_anisotropy_tells_rows_from_columns() -> None:
    assert anisotropy(cosine(sin_2d(Layout((4, 4), 0), 32)), (4, 4)).item() == pytest.approx(0.0, abs=1e-6)
    frequency = [10000 ** (-k / 32) for k in range(0, 32, 2)]
    expected = sum(math.cos(f) - math.cos(4 * f) for f in frequency) / 16  # 1D_sin: a row down is 4 steps
    found = anisotropy(cosine(sin_1d(Layout((4, 4), 0), 32)), (4, 4)).item()
    assert found == pytest.approx(expected, abs=1e-6)


# --- all of them, and the view without bias ---------------------------------------------------------------------------


def test_every_measure_gives_a_number_a_layer() -> None:
    torch.manual_seed(0)
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", "2D_sin", **{**SMALL, "img_size": (16, 56)})
    found = measure_all(lape.correlation(model), lape.positions(model)[:, 1:], (2, 7))
    assert set(found) == set(MEASURES)
    assert all(values.shape == (3,) for values in found.values())
    assert all(torch.isfinite(values[1:]).all() for values in found.values())


@pytest.mark.parametrize("join", ["basic", "share", "unshare", "LaPE-sharing", "LaPE"])
def test_a_large_bias_hides_differences_and_its_view_shows_them(join: str) -> None:
    torch.manual_seed(0)
    model = lape.create_model("vit_tiny_patch16_224", join, "learnable", **SMALL)
    without = lape.correlation(model, view="unbiased")
    assert torch.equal(without, lape.correlation(model, view="seen"))  # biases start at zero
    with torch.no_grad():
        model.blocks[2].norm1.bias.fill_(50.0)
        if join.startswith("LaPE"):
            model.lape.norms["2"].bias.fill_(50.0)
    assert lape.correlation(model, view="seen")[2].min() > 0.99
    assert torch.allclose(lape.correlation(model, view="unbiased")[2], without[2], atol=1e-4)


def test_of_a_gated_bias_what_comes_through_the_gate_is_taken_off() -> None:
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", warm_start=True, **SMALL)
    with torch.no_grad():
        model.lape.gate_1.fill_(0.5)
        model.lape.norms["1"].bias.copy_(torch.randn(model.embed_dim))
    received, unbiased = (lape.positions(model, view=view)[1] for view in ("received", "unbiased"))
    assert torch.allclose(unbiased, received - 0.5 * model.lape.norms["1"].bias, atol=1e-6)


def test_a_folded_bias_is_gone() -> None:
    model = lape.fold_(lape.create_model("vit_tiny_patch16_224", "LaPE", "learnable", **SMALL))
    with pytest.raises(lape.LapeError, match="bias of its norms is gone"):
        lape.positions(model, view="unbiased")


def test_the_two_halves_of_2d_sin_are_column_and_row() -> None:
    table = sin_2d(Layout((2, 3), 0), 8)[0].reshape(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not torch.equal(table[0, 0, :4], table[0, 1, :4])


@pytest.mark.parametrize(("rows", "columns"), [(4, 5), (1, 5)])
def test_directions_are_bins_around_the_axes(rows: int, columns: int) -> None:
    """By hand, patch by patch: the first of 60 directions has straight to the right in its middle."""
    n = rows * columns
    s = torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    scores = []
    for here in range(n):
        bins: dict[int, list[tuple[float, float]]] = {}
        for there in set(range(n)) - {here}:
            down, right = there // columns - here // columns, there % columns - here % columns
            turn = math.floor(math.degrees(math.atan2(down, right)) / 6 + 0.5) % 60
            bins.setdefault(turn, []).append((math.hypot(down, right), s[here, there].item()))
        scores += [1 - spearmanr(*zip(*pairs, strict=True)).statistic for pairs in bins.values() if len(pairs) > 1]
    found = directed_monotonicity(s[None], (rows, columns))
    assert found.item() == pytest.approx(sum(scores) / len(scores))
