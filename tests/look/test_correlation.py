"""Positions as numbers: known answers for sinusoidal tables, and agreement with `lape.positions`."""

import math

import pytest
import torch

import lape
from lape.core.position import Layout, sin_2d
from lape.look.similarity import (
    center_token,
    check_token,
    correlation,
    cosine,
    grid_at,
    half_distance,
    locality_radius,
    monotonicity,
    raw_table,
    similarity_by_distance,
    spearman,
    squared_distances,
    token_map,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}


def model_with(join: str, pe: str, name: str = "vit_tiny_patch16_224", **kwargs: object) -> torch.nn.Module:
    """A small model whose norms are not the identity, as after training."""
    torch.manual_seed(0)
    model = lape.create_model(name, join, pe, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def sin_map(grid: tuple[int, int]) -> torch.Tensor:
    return cosine(sin_2d(Layout(grid, 1), 32)[:, 1:])


# --- cosine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 4), (4, 4), (2, 7)])
def test_sinusoidal_similarity_depends_on_the_offset_only(grid: tuple[int, int]) -> None:
    found = sin_map(grid)[0]
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(grid[0] * grid[1]))
    by_offset: dict[tuple[int, int], list[float]] = {}
    for i in range(len(found)):
        for j in range(len(found)):
            (r, c), (s, d) = divmod(i, grid[1]), divmod(j, grid[1])
            by_offset.setdefault((abs(r - s), abs(c - d)), []).append(found[i, j].item())
    assert len(by_offset) == grid[0] * grid[1]
    for values in by_offset.values():
        assert max(values) - min(values) < 1e-6


def test_sinusoidal_similarity_is_the_mean_cosine_of_the_angles() -> None:
    """sin a sin b + cos a cos b = cos(a - b): the similarity at an offset is a mean of cosines."""
    frequencies = [10000 ** (-k / 16) for k in range(0, 16, 2)]
    expected = sum(math.cos(2 * f) + math.cos(1 * f) for f in frequencies) / 16  # one column and two rows away
    found = sin_map((4, 4))[0]
    assert found[0, 2 * 4 + 1].item() == pytest.approx(expected, abs=1e-6)


def test_a_row_of_zeros_resembles_nothing_and_tiny_rows_count() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3e20, 4e20]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.6], [0.0, 0.6, 1.0]])
    assert torch.allclose(cosine(rows), expected)
    assert cosine(rows.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("join", ["basic", "share", "LaPE-sharing", "LaPE"])
def test_correlation_is_that_of_the_positions_without_prefix_tokens(join: str) -> None:
    model = model_with(join, "learnable", "deit_tiny_distilled_patch16_224")
    seen = lape.positions(model, view="seen")
    assert seen.shape == (3, 2 + 16, 32)
    patches = seen[:, 2:].detach()
    expected = torch.nn.functional.cosine_similarity(patches[:, :, None], patches[:, None], dim=-1)
    found = lape.correlation(model)
    assert found.shape == (3, 16, 16)
    assert not found.requires_grad
    assert torch.allclose(found, expected, atol=1e-5)


def test_views_differ_where_position_shares_the_token_norm_and_only_there() -> None:
    shared, own = model_with("basic", "learnable"), model_with("LaPE", "learnable")
    assert not torch.allclose(correlation(shared), correlation(shared, view="received"), atol=1e-3)
    assert torch.equal(correlation(own), correlation(own, view="received"))


def test_another_image_size_is_another_grid() -> None:
    model = model_with("LaPE", "learnable")
    assert correlation(model, size=(16, 64)).shape == (3, 16, 16)
    assert grid_at(model, (16, 64)) == (2, 8)
    assert grid_at(model, 48) == (6, 6)
    assert grid_at(model) == lape.grid(model) == (4, 4)


def test_no_position_no_correlation() -> None:
    with pytest.raises(lape.LapeError, match="nothing to show"):
        correlation(model_with("basic", "none"))
    with pytest.raises(lape.LapeError, match="position_bias"):
        correlation(model_with("LaPE", "2D_RPE"))


@pytest.mark.parametrize("join", ["basic", "share", "LaPE-sharing", "LaPE"])
def test_raw_table_is_the_parameter(join: str) -> None:
    model = model_with(join, "learnable")
    table = lape.to_reference_state_dict(model)["pos_embed"]
    found = raw_table(model)
    assert found is not None
    assert torch.equal(found, table[0])


def test_no_single_raw_table() -> None:
    assert raw_table(model_with("unshare", "learnable")) is None
    assert raw_table(lape.fold_(model_with("LaPE", "learnable"))) is None


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_centre_is_token_90_on_14_by_14() -> None:
    assert center_token((14, 14)) == 90
    assert center_token((3, 3)) == 4
    assert center_token((7, 28)) == 3 * 28 + 13
    assert center_token((1, 1)) == 0


def test_token_map_is_a_row_of_the_map() -> None:
    maps = sin_map((3, 4))
    for token in range(12):
        assert torch.equal(token_map(maps, (3, 4), token).flatten(1), maps[:, token])
    assert token_map(maps, (3, 4))[0, 1, 1] == 1  # the centre itself


@pytest.mark.parametrize("token", [-1, 12])
def test_a_token_outside_the_grid_is_refused(token: int) -> None:
    with pytest.raises(lape.LapeError, match=rf"token {token} is outside the 3 x 4 grid .* 0 to 11"):
        check_token((3, 4), token)


# --- measures ---------------------------------------------------------------------------------------------------------


def by_rule(grid: tuple[int, int], rule) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """A map (1, n, n) whose similarity is a function of the distance."""
    return rule(squared_distances(grid).double().sqrt())[None].float()


def test_curve_of_similarity_against_distance() -> None:
    distance, curve = similarity_by_distance(by_rule((4, 5), lambda d: 1 - d / 10), (4, 5))
    assert distance[:4].tolist() == pytest.approx([0, 1, math.sqrt(2), 2])
    assert distance[-1].item() == pytest.approx(5)
    assert torch.allclose(curve[0], 1 - distance / 10)


def test_monotonicity_of_rising_falling_and_flat() -> None:
    grid = (4, 5)
    maps = torch.cat([by_rule(grid, rule) for rule in (lambda d: 1 - d / 10, lambda d: d / 10, lambda d: 0.3 + 0 * d)])
    assert monotonicity(maps, grid).tolist() == pytest.approx([2, 0, 1])


def test_half_distance() -> None:
    grid = (1, 4)  # mean of pairs: distances 1, 2, 3 occur 3, 2, 1 times
    linear = by_rule(grid, lambda d: 1 - d / 4)
    level = (1 + (0.75 * 3 + 0.5 * 2 + 0.25) / 6) / 2
    assert half_distance(linear, grid).item() == pytest.approx(4 * (1 - level))
    assert half_distance(by_rule(grid, lambda d: (d == 0).double()), grid).item() == pytest.approx(0.5)
    assert half_distance(by_rule(grid, lambda d: 0 * d + 1), grid).item() == math.inf


def test_locality_radius() -> None:
    grid = (4, 4)
    itself = by_rule(grid, lambda d: (d == 0).double())
    near = by_rule(grid, lambda d: (d <= 1).double())
    far = by_rule(grid, lambda d: (d > 3).double())
    flat = by_rule(grid, lambda d: 0 * d + 0.4)
    found = locality_radius(torch.cat([itself, near, far, flat]), grid).tolist()
    assert found[0] == pytest.approx(0)
    assert 0 < found[1] < 1 < found[2]
    assert found[3] == 1


def test_measures_do_not_see_a_level_common_to_all_pairs() -> None:
    grid = (4, 5)
    maps = by_rule(grid, lambda d: torch.exp(-d))
    raised = 0.6 + 0.4 * maps
    for measure in (half_distance, locality_radius, monotonicity):
        assert torch.allclose(measure(maps, grid), measure(raised, grid), atol=1e-5)


def test_rank_correlation_with_ties_and_gaps_is_that_of_what_is_there() -> None:
    from scipy.stats import spearmanr  # slow to import, where nothing else of a process needs it

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (6, 9), generator=generator), torch.randint(0, 5, (2, 6, 9), generator=generator)
    there = torch.rand(6, 9, generator=generator) > 0.3
    there[0] = False
    a[1] = 3  # no spread
    expected = [[0.0, 0.0, *(spearmanr(a[g][there[g]], x[g][there[g]]).statistic for g in range(2, 6))] for x in b]
    assert torch.allclose(spearman(there, a.double(), b.double()), torch.tensor(expected, dtype=torch.float64))
