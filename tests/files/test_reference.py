"""The numbers that the authors' code computed (float32, CPU, random weights), for every join and kind that it has.

Source: the public LaPE code, commit e188f7e (LaPE-sharing: 7f47432). `reference/manifest.json` says what each file is.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import lape
from lape.files.names import reference_names

FOLDER = Path(__file__).parents[1] / "reference"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
CASES = list(MANIFEST["cases"])
JOINS = {"LN": "LaPE"}  # their name for LaPE on relative position bias


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(facts of the case, the model with the authors' weights, the authors' tensors)"""
    facts, config = MANIFEST["cases"][request.param], MANIFEST["config"]
    tensors = load_file(FOLDER / f"{request.param}.safetensors")
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    model = lape.create_model(
        "deit_tiny_distilled_patch16_224" if facts["distilled"] else "deit_tiny_patch16_224",
        join=JOINS.get(facts["join_type"], facts["join_type"]),
        pe=facts["pe"],
        **{name: config[name] for name in names},
    ).eval()
    lape.load_reference_state_dict(model, part(tensors, "state/"))
    return facts, model, tensors


def test_logits_loss_and_gradients(case):
    facts, model, tensors = case
    model.zero_grad()
    logits = model(tensors["input"])
    loss = F.cross_entropy(logits, torch.tensor(MANIFEST["target"]))
    loss.backward()
    scale = tensors["logits"].abs().max()
    assert (logits - tensors["logits"]).abs().max() <= 1e-5 * scale
    assert abs(loss.item() - facts["loss"]) <= 1e-5 * facts["loss"]
    parameters = dict(model.named_parameters())
    inner = {name: key for key, name in reference_names(model).items()}
    for name, expected in part(tensors, "grad/").items():
        gradient = parameters[inner[name]].grad
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def test_what_each_block_receives(case):
    _, model, tensors = case
    if "layer_positions" in tensors:
        assert (lape.positions(model) - tensors["layer_positions"]).abs().max() <= 1e-6


def test_number_of_parameters(case):
    facts, model, _ = case
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == facts.get("trainable", facts["params"])


def test_state_dict_goes_both_ways(case):
    _, model, tensors = case
    expected, given = part(tensors, "state/"), lape.to_reference_state_dict(model)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("join", "parameters"), [("basic", 5_717_416), ("LaPE", 5_722_024)])
def test_deit_tiny_has_the_published_size(join, parameters):
    model = lape.create_model("deit_tiny_patch16_224", join=join)
    assert sum(p.numel() for p in model.parameters()) == parameters
