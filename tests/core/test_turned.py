"""Rotary position in hosts of all libraries against fused attention whose arguments are turned, and DINOv3's jitter."""

import copy
import math

import pytest
import torch
from formula import TOLERANCE, assert_same_structure
from torch import nn
from training import STATE, Killed, kill_at, quiet, read, same, tiny
from turned import AllTurned
from zoo import family_image, make, make_family, make_foreign, make_wide, output, wide_output

import lape
from lape.core.rotary import axial, jittered, patch_coordinates, rotation
from lape.train.loop import train
from lape.train.start import build_model

FUSED = ("ViT", "DeiT distilled", "DINOv2 registers", "I-JEPA", "CLIP", "SigLIP")


@pytest.mark.parametrize("host", FUSED)
def test_in_transformers_it_is_its_equation_is_loaded_folded_and_removed(host, tmp_path):
    model, original = make_foreign(host), make_foreign(host)
    plain, x = lape.apply_(make_foreign(host), "basic", "none"), torch.randn(2, 3, 16, 16)
    lape.apply_(model, "basic", "RoPE")
    about = lape.describe(model)
    assert (about.joined, about.input_addition, about.position_parameters) == (2, False, 0)
    with torch.no_grad():
        with AllTurned(about.grid, about.prefix_tokens) as door:
            expected = output(plain, x)
        assert door.calls == 2
        assert (output(plain, x) - expected).abs().max() > 1e-3 * expected.abs().max()
        loaded = lape.load(lape.save(model, tmp_path / "m"))
        for one in (model, loaded, copy.deepcopy(model), lape.fold_(copy.deepcopy(model))):
            assert (output(one, x) - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()
        lape.remove_(model)
        assert_same_structure(model, original)
        assert torch.equal(output(model, x), output(original, x))


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["internvl", "kosmos2", "janus", "ovis2", "vitpose_backbone"])
def test_in_other_encoders_of_transformers(family):
    inputs = (torch.randn(2, 3, 64, 32) if family == "vitpose_backbone" else torch.randn(2, 3, 16, 16),)
    model, plain = (lape.apply_(make_wide(family), "basic", pe) for pe in ("RoPE", "none"))
    about = lape.describe(model)
    with torch.no_grad(), AllTurned(about.grid, about.prefix_tokens) as door:
        expected = wide_output(plain, inputs)
    assert door.calls == 2
    assert (wide_output(model, inputs) - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("family", ["hybrid", "EVA", "T2T-ViT", "differential attention"])
def test_in_families_of_timm(family):
    x = family_image(family)
    model, plain = (lape.apply_(make_family(family), "basic", pe) for pe in ("RoPE", "none"))
    about = lape.describe(model)
    with torch.no_grad(), AllTurned(about.grid, about.prefix_tokens):
        expected = plain(x)
    assert (model(x) - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()


def test_mixed_frequencies_learn_in_transformers():
    model = lape.apply_(make_foreign("ViT"), "basic", "RoPE-mixed")
    assert lape.describe(model).position_parameters == 2 * 32
    output(model, torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "frequencies" in name)


def test_what_an_adapter_puts_around_a_projection_is_turned():
    """As LoRA does: another module under the same name, which holds the host's."""

    def adapted(model: nn.Module) -> nn.Module:
        attention = next(m for m in model.modules() if {"q_proj", "k_proj"} <= m._modules.keys())
        torch.manual_seed(3)
        attention.q_proj = nn.Sequential(attention.q_proj, nn.Linear(32, 32))
        return model

    model, plain = (lape.apply_(make_foreign("CLIP"), "basic", pe) for pe in ("RoPE", "none"))
    x, about = torch.randn(2, 3, 16, 16), lape.describe(model)
    with torch.no_grad():
        before = output(model, x)
        with AllTurned(about.grid, about.prefix_tokens):
            expected = output(adapted(plain), x)
        found = output(adapted(model), x)
    assert not torch.allclose(found, before, atol=1e-3)
    assert (found - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: make("any size"), lambda: make_foreign("ViT")])
def test_it_compiles_whole(build):
    model, x = lape.apply_(build(), "basic", "RoPE-mixed"), torch.randn(2, 3, 16, 16)
    expected = output(model, x) if hasattr(model, "config") else model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = output(compiled, x) if hasattr(model, "config") else compiled(x)
    assert (found - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: make_foreign("torchvision"), "inside of nn.MultiheadAttention: use pe='2D_RPE'"),
        (lambda: make_wide("siglip2"), "takes images of several grids"),
        (lambda: make_wide("instructblip"), "makes them in one module"),
        (lambda: make_wide("idefics2"), "not one grid in all blocks"),
        (lambda: make_wide("janus", use_qk_norm=True), "norms them in a form of its own"),
        (lambda: make_family("BEiT"), "has no blocks.0.attn.q_norm"),
    ],
)
def test_hosts_without_a_door_are_refused_by_name(build, why):
    model = build()
    before = set(model.state_dict())
    with pytest.raises(lape.UnsupportedModelError, match=f"RoPE.*{why}") as caught:
        lape.apply_(model, "basic", "RoPE")
    assert "\n" not in str(caught.value)
    assert set(model.state_dict()) == before


def test_packed_images_of_several_grids_are_refused():
    model = lape.apply_(make_family("NaFlexViT"), "basic", "RoPE")
    patches = torch.randn(2, 16, 48)
    grids = [torch.cartesian_prod(torch.arange(rows), torch.arange(16 // rows)) for rows in (4, 2)]
    packed = {"patches": patches, "patch_coord": torch.stack(grids), "patch_valid": torch.ones(2, 16).bool()}
    with pytest.raises(lape.LapeError, match=r"images of several grids.* are packed in this batch"):
        model(packed)


# ---------------------------------------------------------------- jitter


def moved(column: float, row: float, grid: tuple[int, int], draw: list[float], jitter: tuple[float, float, float]):
    shift, axes, whole = jitter
    r = math.exp(draw[4] * math.log(whole))
    column = r * math.exp(draw[2] * math.log(axes)) * (column + shift * draw[0] * grid[1] / 2)
    return column, r * math.exp(draw[3] * math.log(axes)) * (row + shift * draw[1] * grid[0] / 2)


def test_jitter_is_its_equation():
    grid, jitter, draw = (3, 5), (0.3, 1.5, 2.0), [0.1, -0.9, 0.7, -0.2, 0.6]
    coordinates = patch_coordinates(grid)
    place = jittered(coordinates, grid, torch.tensor(draw), jitter)
    expected = [moved(n % 5, n // 5, grid, draw, jitter) for n in range(15)]
    assert torch.allclose(place.T, torch.tensor(expected), atol=1e-5)
    assert torch.equal(jittered(coordinates, grid, torch.tensor(draw), (0.0, 1.0, 1.0)), coordinates)


def rope(jitter: tuple[float, float, float] | None) -> nn.Module:
    model = lape.apply_(make("any size"), "basic", "RoPE")
    model.lape.jitter = jitter
    return model


def test_jitter_moves_places_in_training_alone_by_torchs_generator():
    x, still, model = torch.randn(2, 3, 16, 16), rope(None), rope((0.5, 1.5, 2.0))
    assert torch.equal(model(x), still(x))  # in evaluation
    model.train()
    torch.manual_seed(5)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(model(x), first)
    torch.manual_seed(5)
    draw = 2 * torch.rand(5) - 1
    place = jittered(patch_coordinates((4, 4)), (4, 4), draw, model.lape.jitter)
    with torch.no_grad():
        made = model.lape(model._lape.request(model, None))
    assert not torch.equal(made[0], rotation(axial(16), place, 1))  # drawn anew
    torch.manual_seed(5)
    made = model.lape(model._lape.request(model, None))
    assert all(torch.equal(one, rotation(axial(16), place, 1)) for one in made)  # one draw for all blocks


def test_jittered_places_are_the_same_where_activations_are_computed_again():
    x, gradients = torch.randn(2, 3, 16, 16), []
    for again in (False, True):
        model = rope((0.5, 1.5, 2.0)).train()
        if again:
            model.set_grad_checkpointing(True)
        torch.manual_seed(5)
        model(x).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_jittered_run_that_goes_on_ends_with_the_same_bits(tmp_path):
    recipe = tiny(pe="RoPE", join_type="basic", rope_jitter=(0.5, 1.5, 2.0), epochs=2, save_steps=4, log_every=1)
    recipe = recipe.replace(batch_size=128)
    train(recipe.replace(output_dir=str(tmp_path / "whole")), say=quiet)
    with pytest.raises(Killed):
        train(recipe.replace(output_dir=str(tmp_path / "cut")), say=kill_at(1, 6))
    train(recipe.replace(output_dir=str(tmp_path / "cut"), resume="auto"), say=quiet)
    ours, theirs = (read(tmp_path / name / "checkpoint.pth") for name in ("cut", "whole"))
    assert all(same(ours[key], theirs[key]) for key in STATE)
    assert build_model(recipe, 10, say=quiet).lape.jitter == (0.5, 1.5, 2.0)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_jitter": (0.0, 1.0)}, "2 value.*3 are needed"),
        ({"rope_jitter": (0.0, 1.0, 0.5)}, r"rope_jitter=\[0.0, 1.0, 0.5\].*two factors of 1 to 100"),
        ({"rope_jitter": (math.nan, 1.0, 1.0)}, "rope_jitter"),
        ({"rope_jitter": (0.0, 1.0, 2.0), "pe": "2D_RPE"}, "pe='2D_RPE': it moves the places.*use pe='RoPE'"),
    ],
)
def test_jitter_without_a_meaning_is_one_line(changes, why):
    with pytest.raises(lape.LapeError, match=why):
        train(tiny(**{"pe": "RoPE", "join_type": "basic", **changes}), say=quiet)
