"""What is faster: it changes no result but by rounding, is a rule, and leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import nn
from zoo import image, make

import lape
from lape.recipe import Recipe
from lape.train import speed
from lape.train.loop import train
from lape.train.speed import advice_on_precision, attention_for

NARROW = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def fused(model: nn.Module) -> list[bool]:
    return [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]


@pytest.mark.parametrize(
    ("recipe", "device", "way"),
    [
        ({"amp": "bf16"}, CPU, "plain"),
        ({"amp": "bf16"}, GPU, "fused"),
        ({"amp": "off"}, CPU, "fused"),
        ({"amp": "bf16", "attention": "fused"}, CPU, "fused"),
        ({"amp": "off", "attention": "plain"}, GPU, "plain"),
    ],
)
def test_the_rule_holds_inside_the_block_only(recipe: dict[str, Any], device: torch.device, way: str) -> None:
    model = make()
    model.blocks[0].attn.fused_attn = False  # of its user
    before = fused(model)
    assert set(before) == {False, True}
    with attention_for(model, Recipe(**recipe), device) as chosen:
        assert chosen == way
        assert set(fused(model)) == {way == "fused"}
    assert fused(model) == before


@pytest.mark.parametrize(("join", "pe"), [("basic", "learnable"), ("LaPE", "learnable"), ("LaPE", "2D_RPE")])
def test_plain_attention_is_the_fused_one(join: str, pe: str) -> None:
    model = lape.apply_(make(), join, pe).double()
    x = image(model).double()
    outputs = []
    for way in ("fused", "plain"):
        with attention_for(model, Recipe(attention=way), CPU):
            outputs.append(model(x))
    assert torch.allclose(*outputs, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_training_computes_as_the_recipe_says_and_hands_back_the_model_as_it_was(tmp_path, monkeypatch) -> None:
    seen = set()
    forward = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (seen.add("fused"), forward(*args, **kwargs))[1],
    )
    for amp, expected in (("bf16", set()), ("off", {"fused"})):
        seen.clear()
        recipe = Recipe.from_yaml(
            "digits", epochs=1, join_type="LaPE", amp=amp, threads=1, device="cpu", model_kwargs=NARROW
        )
        model = train(recipe, say=lambda _text: None).model
        assert seen == expected
        assert set(fused(model)) == {True}
        lape.save(model, tmp_path / amp)


def test_advice_is_given_where_bf16_pays(monkeypatch) -> None:
    monkeypatch.setattr(speed, "_seconds", {torch.float32: 4.0, torch.bfloat16: 1.0}.get)
    assert "4 times as fast" in advice_on_precision(Recipe(amp="off"), CPU)
    assert advice_on_precision(Recipe(amp="bf16"), CPU) == advice_on_precision(Recipe(amp="off"), GPU) == ""
    monkeypatch.setattr(speed, "_seconds", {torch.float32: 2.0, torch.bfloat16: 1.0}.get)
    assert advice_on_precision(Recipe(amp="off"), CPU) == ""
