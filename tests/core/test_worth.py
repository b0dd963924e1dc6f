"""The controls of LaPE: the scale that a table starts with, and what stands in the place of LN' (Table 8)."""

import copy
import json
import math

import pytest
import torch
from formula import TOLERANCE, assert_host_keys, shake_position, written_out
from zoo import TINY, image, make

import lape
from lape.core.pe_norms import PE_NORMS
from lape.errors import LapeError
from lape.recipe import Recipe
from lape.train.distributed import World
from lape.train.start import build_model
from lape.train.state import initial_state

D = TINY["embed_dim"]
ADDED = {"none": 0, "scalar": 1, "scale": D, "affine": 2 * D}  # parameters a block; Norm() itself has none
SMALL = {
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "input_size": 32,
}


@pytest.mark.matrix
@pytest.mark.parametrize("join", ["LaPE", "LaPE-sharing"])
@pytest.mark.parametrize("pe_norm", PE_NORMS)
def test_each_row_of_table_8_is_its_equation(join, pe_norm, tmp_path):
    """written out = converted = folded = saved and loaded; removed = the host."""
    model, original = make(), make()
    x = image(model)
    lape.apply_(model, join, "learnable", pe_norm=pe_norm)
    assert_host_keys(model, original)
    shake_position(model)
    expected = written_out(model, original, x, join, "learnable", pe_norm)
    loaded = lape.load(lape.save(model, tmp_path / "model", name="vit_tiny_patch16_224", **TINY))
    assert lape.describe(loaded) == lape.describe(model)
    assert lape.describe(model).pe_norm == pe_norm
    for got in (model, loaded, lape.fold_(copy.deepcopy(model))):
        assert (got(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    lape.remove_(model)
    assert list(model.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("pe_norm", PE_NORMS)
def test_parameters_of_each_row(pe_norm):
    model = lape.apply_(make(), "LaPE", "learnable", pe_norm=pe_norm)
    kind = {"norm": "none", "scalar-norm": "scalar", "scale-norm": "scale", "layernorm": "affine",
            "learned-norm": "scalar"}.get(pe_norm, pe_norm)  # fmt: skip
    added = sum(p.numel() for name, p in model.named_parameters() if "lape.norms" in name)
    assert added == ADDED[kind] * len(model.blocks)


@pytest.mark.parametrize(
    ("pe_norm", "pairs"), [("layernorm", {"none", "affine"}), ("norm", {"layernorm"}), ("scalar", {"none", "scale"})]
)
def test_rows_that_start_alike(pe_norm, pairs):
    """Gains start at 1 and biases at 0, so at the start a row differs from another by normalising alone."""

    def logits(name):
        torch.manual_seed(0)
        model = lape.apply_(make(), "LaPE", "learnable", pe_norm=name, std=0.5)
        return model(image(model))

    for other in pairs:
        alike = ("norm" in pe_norm) == ("norm" in other)
        assert torch.allclose(logits(pe_norm), logits(other), atol=1e-6) == alike, other


@pytest.mark.parametrize(
    ("name", "value"), [("pe_std", v) for v in (0, -1, 1e9, "1", [1.0], True)] + [("pe_norm", "a b"), ("pe_norm", 3)]
)
def test_a_file_that_says_something_else_is_refused_by_that_name(name, value, tmp_path):
    model = lape.apply_(make(), "LaPE", "learnable", pe_norm="norm", std=1.0)
    config = lape.save(model, tmp_path / "model", name="vit_tiny_patch16_224", **TINY) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), name: value}))
    with pytest.raises(lape.CheckpointError, match=f"says {name}=.*refused"):
        lape.load(tmp_path / "model")


def test_beside_is_lape_sharing_without_a_norm():
    torch.manual_seed(0)
    one = lape.apply_(make(), "beside", "learnable", std=1.0)
    torch.manual_seed(0)
    other = lape.apply_(make(), "LaPE-sharing", "learnable", std=1.0, pe_norm="none")
    x = image(one)
    assert torch.equal(one(x), other(x))
    assert not [name for name, _ in one.named_parameters() if name.startswith("lape.")]
    assert torch.equal(lape.positions(one)[0], lape.positions(one)[-1])
    warm, host = lape.apply_(make(), "beside", warm_start=True), make()
    assert torch.equal(warm(x), host(x))


@pytest.mark.parametrize("join", ["basic", "share", "unshare", "beside", "LaPE-sharing", "LaPE"])
def test_a_start_is_the_same_table_on_another_scale(join):
    def table(std):
        torch.manual_seed(0)
        model = lape.apply_(make(), join, "learnable", std=std)
        return model, model.pos_embed.detach()

    _, usual = table(None)
    model, scaled = table(1.0)
    assert torch.allclose(scaled, usual * 50, rtol=1e-6)  # timm's is 0.02
    assert lape.describe(model).std == 1.0
    assert "table started at std 1" in str(lape.describe(model))


@pytest.mark.parametrize("pe", ["1D_sin", "2D_sin"])
def test_of_a_frozen_table_the_start_is_its_root_mean_square(pe):
    model = lape.apply_(make(), "basic", pe, std=1.0)
    rows = model.pos_embed[:, lape.num_prefix_tokens(model) :] if pe == "2D_sin" else model.pos_embed
    assert rows.square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-6)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"join": "basic", "pe": "learnable", "pe_norm": "norm"}, "no norm of its own"),
        ({"join": "beside", "pe": "learnable", "pe_norm": "norm"}, "LaPE-sharing without a norm"),
        ({"pe": "learnable", "pe_norm": "rms"}, "unknown pe_norm 'rms': known are none, scalar"),
        ({"pe": "2D_RPE", "pe_norm": "norm"}, "no table"),
        ({"std": 1.0}, "own position stays.*pe='learnable'"),
        ({"pe": "2D_RPE", "std": 1.0}, "has no table"),
        ({"join": "basic", "pe": "own", "std": 1.0}, "has no table"),
        ({"pe": "learnable", "std": 0.0}, "no standard deviation"),
        ({"pe": "learnable", "std": math.nan}, "no standard deviation"),
        ({"pe": "learnable", "std": math.inf}, "no standard deviation"),
        ({"pe": "learnable", "std": "1"}, "no standard deviation"),
    ],
)
def test_what_has_no_meaning_is_refused_and_changes_nothing(arguments, words):
    model, original = make(), make()
    with pytest.raises(LapeError, match=words) as caught:
        lape.apply_(model, **arguments)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("join", ["basic", "unshare", "LaPE"])
def test_the_table_has_a_learning_rate_of_its_own(join):
    recipe = Recipe(**SMALL, join_type=join, pe_lr_scale=10.0, unscale_lr=True, lr=1e-3, warmup_epochs=0, device="cpu")
    model = build_model(recipe, 10)
    state = initial_state(recipe, model, World(0, 1, torch.device("cpu")))
    rates = {id(p): group["lr"] for group in state.optimizer.param_groups for p in group["params"]}
    tables = [p for name, p in model.named_parameters() if name == "pos_embed" or name.startswith("lape.table_")]
    assert len(tables) == (2 if join == "unshare" else 1)
    assert len(rates) == len(list(model.parameters()))
    for parameter in model.parameters():
        is_table = any(parameter is table for table in tables)
        assert rates[id(parameter)] == pytest.approx(1e-2 if is_table else 1e-3)
    with pytest.raises(LapeError, match="no position table that learns"):
        initial_state(
            recipe, build_model(recipe.replace(pe="1D_sin", join_type="basic"), 10), World(0, 1, torch.device("cpu"))
        )
