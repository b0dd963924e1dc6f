"""Rivals under the same recipe: position made of tokens (PEG), and models that are trained as they are (own)."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import TOLERANCE, assert_same_structure, plain
from timm.optim import create_optimizer_v2
from torch.utils.checkpoint import checkpoint
from training import tiny
from zoo import FAMILIES, HOSTS, SMALL, TINY, family_image, image, make, make_family, make_foreign
from zoo import output as foreign_output

import lape
from lape.cli import app as cli
from lape.core.conditional import PEG, Generating
from lape.core.joined import join_module
from lape.recipe import Recipe
from lape.study.compare import compare
from lape.study.options import CompareOptions
from lape.train.evaluate import evaluate_checkpoint
from lape.train.loop import train

ROPE = "vit_small_patch16_rope_mixed_224"


def generated(x: torch.Tensor, state: dict, prefix: int, grid: tuple[int, int], block: int = 0) -> torch.Tensor:
    """y + PEG(y), written out by shifted maps: tokens (B, N, D)."""
    rows, columns = grid
    patches = x[:, prefix:].reshape(len(x), rows, columns, -1)
    around = F.pad(patches, (0, 0, 1, 1, 1, 1))
    weight = state[f"blocks.{block}.peg.weight"][:, 0]
    y = sum(around[:, i : i + rows, j : j + columns] * weight[:, i, j] for i in range(3) for j in range(3))
    y = patches + y + state[f"blocks.{block}.peg.bias"]
    return torch.cat([x[:, :prefix], y.flatten(1, 2)], dim=1)


@pytest.mark.parametrize("host", HOSTS)
def test_peg_is_its_equation_is_loaded_and_removed_is_the_original(host, tmp_path):
    model, original = make(host), make(host)
    x = image(model)
    before = original(x)
    lape.apply_(model, "basic", "PEG")
    done = lape.describe(model)
    assert (done.joined, done.input_addition, done.position_parameters) == (1, False, 10 * 32)
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.__setitem__("left", plain(m, args[0])))
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.__setitem__("entered", args[0]))
    converted = model(x)
    expected = generated(seen["left"], lape.to_reference_state_dict(model), done.prefix_tokens, done.grid)
    assert (seen["entered"] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    bare = make(host)
    bare.pos_embed.data.zero_()
    bare.blocks[0].register_forward_hook(
        lambda _m, _a, y: generated(y, lape.to_reference_state_dict(model), done.prefix_tokens, done.grid)
    )
    assert (bare(x) - converted).abs().max() <= TOLERANCE * converted.abs().max()  # no other position is left
    name, extra = HOSTS[host]
    loaded = lape.load(lape.save(model, tmp_path / "model", name=name, **{**TINY, **extra}))
    assert torch.equal(loaded(x), converted)
    lape.remove_(model)
    for block in model.blocks[:2]:
        block._forward_pre_hooks.clear()
    assert_same_structure(model, original)
    assert torch.equal(model(x), before)


def test_peg_behind_six_blocks_is_its_equation(tmp_path):
    depth = {"depth": 7, "dynamic_img_size": True}
    model, bare = make(**depth), make(**depth)
    lape.apply_(model, "basic", "PEG-6")
    done, state = lape.describe(model), lape.to_reference_state_dict(model)
    assert (done.joined, done.input_addition, done.position_parameters) == (6, False, 6 * 10 * 32)
    assert len({model.lape.get_submodule(f"peg_{i}").weight.sum().item() for i in range(6)}) == 6
    with torch.no_grad():
        bare.pos_embed.zero_()
        grid = [(4, 4)]
        for i, block in enumerate(bare.blocks[:6]):
            block.register_forward_hook(lambda _m, _a, y, i=i: generated(y, state, 1, grid[0], i))
        for grid[0] in ((4, 4), (6, 2)):
            x = torch.randn(2, 3, *(4 * side for side in grid[0]))
            assert (bare(x) - model(x)).abs().max() <= TOLERANCE * bare(x).abs().max()
        loaded = lape.load(lape.save(model, tmp_path / "model", name="vit_tiny_patch16_224", **{**TINY, **depth}))
        assert torch.equal(loaded(x), model(x))


def test_peg_behind_six_blocks_needs_as_many_of_one_grid():
    with pytest.raises(lape.UnsupportedModelError, match=r"PEG-6.*first 6 blocks of one grid.*has 3: use pe='PEG'"):
        lape.apply_(make(), "basic", "PEG-6")
    with pytest.raises(lape.UnsupportedModelError, match=r"PEG-6.*has stages"):
        lape.apply_(
            timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 4), num_heads=(1, 2), embed_dim=16),
            "basic",
            "PEG-6",
        )


@pytest.mark.parametrize("family", ["EVA-02", "CaiT", "NaFlexViT", "SAM", "VOLO", "XCiT", "T2T-ViT", "CeiT"])
def test_peg_in_other_families(family):
    model, original = make_family(family), make_family(family)
    x = family_image(family)
    lape.apply_(model, "basic", "PEG")
    model(x).square().sum().backward()
    peg = next(m for m in model.modules() if isinstance(m, PEG))
    assert peg.weight.grad.any()
    assert peg.bias.grad.any()
    lape.remove_(model)
    assert_same_structure(model, original)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("host", ["ViT", "DINOv2 registers", "BEiT", "SigLIP", "torchvision"])
def test_peg_in_other_libraries(host, tmp_path):
    model, original = make_foreign(host), make_foreign(host)
    x = torch.randn(2, 3, 16, 16)
    lape.apply_(model, "basic", "PEG")
    assert lape.describe(model).joined == 1
    got = foreign_output(model, x)
    assert (foreign_output(lape.load(lape.save(model, tmp_path / "model")), x) - got).abs().max() <= 1e-6
    got.square().sum().backward()
    peg = next(m for m in model.modules() if isinstance(m, PEG))
    assert peg.weight.grad.any()
    lape.remove_(model)
    assert_same_structure(model, original)
    assert torch.equal(foreign_output(model, x), foreign_output(original, x))


def test_peg_reads_a_map_as_it_reads_its_tokens():
    model = lape.apply_(make("7 x 3 grid"), "basic", "PEG")
    peg = model.lape.peg
    x = torch.randn(2, 22, 32)
    as_map = peg.add_to_map(x[:, 1:].unflatten(1, (7, 3)))
    assert torch.allclose(as_map.flatten(1, 2), peg.add_to_tokens(x, (7, 3), 1)[:, 1:], atol=1e-6)


def test_peg_behind_blocks_that_return_a_tuple():
    class Block(torch.nn.Module):
        def forward(self, x):
            return x, "attention"

    model = lape.apply_(make(), "basic", "PEG")
    block = Block()
    join_module(block, Generating, model.blocks[0]._lape, place=0)
    x = torch.randn(2, 17, 32)
    output, attention = block(x)
    assert attention == "attention"
    assert torch.equal(output, model.lape.peg.add_to_tokens(x, (4, 4), 1))


@pytest.mark.parametrize("size", [(24, 12), (8, 32)])
def test_peg_follows_the_grid_of_the_images(size):
    model = lape.apply_(make("any size"), "basic", "PEG")
    model(image(model))
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda m, args: seen.__setitem__("left", plain(m, args[0])))
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.__setitem__("entered", args[0]))
    model(torch.randn(2, 3, *size))
    expected = generated(seen["left"], lape.to_reference_state_dict(model), 1, (size[0] // 4, size[1] // 4))
    assert (seen["entered"] - expected).abs().max() <= TOLERANCE * expected.abs().max()
    fixed = lape.apply_(make(), "basic", "PEG")
    fixed.set_input_size((8, 12))
    assert fixed(torch.randn(2, 3, 8, 12)).isfinite().all()


@pytest.mark.slow
def test_peg_copies_recomputes_compiles_and_is_not_decayed():
    model = lape.apply_(make("registers"), "basic", "PEG")
    x = image(model)
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
    group = next(g for g in groups if any(p is model.lape.peg.weight for p in g["params"]))
    qkv = next(g for g in groups if any(p is model.blocks[0].attn.qkv.weight for p in g["params"]))
    assert (group["weight_decay"], qkv["weight_decay"]) == (0, 0.1)
    assert group["lr_scale"] == qkv["lr_scale"]
    forward = model.blocks[0].forward
    model(x).square().sum().backward()
    gradient = model.lape.peg.weight.grad.clone()
    model.zero_grad()
    model.blocks[0].forward = lambda h: checkpoint(forward, h, use_reentrant=False)
    model(x).square().sum().backward()
    assert torch.allclose(model.lape.peg.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_peg_needs_whole_grids():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(**SMALL)
    with pytest.raises(lape.LapeError, match=r"pe='PEG': .*shuffles the others.*use pe='learnable'"):
        lape.apply_(transformers.ViTMAEModel(config), "basic", "PEG")


@pytest.mark.parametrize(
    ("pe", "why"), [("PEG", "made of the tokens of each image"), ("own", "the model was left as it is")]
)
def test_what_has_no_constant_and_no_table_says_so(pe, why):
    model = lape.apply_(make(), "basic", pe)
    for ask in (lape.positions, lape.position_bias, lape.correlation, lape.fold_):
        with pytest.raises(lape.LapeError, match=f"pe='{pe}'.*{why}"):
            ask(model)
    assert not lape.describe(model).folded
    with pytest.raises(lape.LapeError, match=f"nothing to show of m without images.*{why}"):
        lape.explore({"m": model}, "e.html")
    with pytest.raises(lape.LapeError, match=f"join='LaPE' with pe='{pe}'.*{why}; use join='basic'"):
        lape.apply_(make(), "LaPE", pe)
    with pytest.raises(lape.LapeError, match="warm_start=True"):
        lape.apply_(make(), "basic", pe, warm_start=True)


# --------------------------------------------------------------------------------------------------- left as it is


@pytest.mark.parametrize("family", ["EVA with mixed rotation", "DINOv3", "relative position", "XCiT"])
def test_a_model_left_as_it_is_is_the_hosts_bit_for_bit(family, tmp_path):
    name, extra, *_ = FAMILIES[family]
    model, original = make_family(family), make_family(family)
    x = family_image(family)
    state = {path: set(vars(module)) for path, module in model.named_modules()}
    lape.apply_(model, "basic", "own")
    assert torch.equal(model(x), original(x))
    assert list(model.state_dict()) == list(original.state_dict())
    assert str(lape.describe(model)).endswith(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    loaded = lape.load(lape.save(model, tmp_path / "model", name=name, **extra))
    assert torch.equal(loaded(x), model(x))
    lape.remove_(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == state


def test_a_model_that_no_host_knows_is_left_as_it_is(tmp_path):
    kwargs = {"num_classes": 5}
    model = lape.create_model("resnet10t", "basic", "own", **kwargs).eval()
    x = torch.randn(2, 3, 32, 32)
    assert "ResNet: join=basic pe=own, left as it is" in str(lape.describe(model))
    assert torch.equal(lape.load(lape.save(model, tmp_path / "model"))(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    for ask in (lape.grid, lape.num_prefix_tokens, lambda m: lape.explore({"m": m}, tmp_path / "e.html")):
        with pytest.raises(
            lape.LapeError, match=r"a timm\.models\.resnet\.ResNet was left as it is, its parts are not"
        ):
            ask(model)
    foreign = lape.apply_(torch.nn.Linear(2, 2), "basic", "own")
    with pytest.raises(lape.LapeError, match="how to build this model again is not known"):
        lape.save(foreign, tmp_path / "foreign")
    with pytest.raises(lape.LapeError, match="converted already"):
        lape.apply_(foreign, "basic", "own")
    assert vars(lape.remove_(foreign)).keys() == vars(torch.nn.Linear(2, 2)).keys()
    with pytest.raises(lape.LapeError, match=r"resnet10t.*unexpected keyword argument 'img_size'"):
        lape.create_model("resnet10t", "basic", "own", img_size=32)
    with pytest.raises(lape.UnsupportedModelError, match="ResNet is not a supported model"):
        lape.create_model("resnet10t", "basic", "learnable", img_size=32)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "pe"), [(ROPE, "own"), ("vit_tiny_patch16_224", "PEG"), ("vit_tiny_patch16_224", "own")]
)
def test_rivals_are_trained_evaluated_and_resumed_as_others_are(model, pe, tmp_path):
    recipe = tiny(model=model, pe=pe, join_type="basic", output_dir=str(tmp_path / "run"), epochs=2)
    result = train(recipe, say=lambda _text: None)
    found = evaluate_checkpoint(
        Recipe(eval=True, resume=str(tmp_path / "run" / "checkpoint.pth"), num_workers=0), say=lambda _text: None
    )
    assert found.acc1 == result.accuracy
    again = train(recipe.replace(resume="auto", epochs=3), say=lambda _text: None)
    whole = train(recipe.replace(output_dir="", epochs=3), say=lambda _text: None)
    assert again.history[-1]["epoch"] == 2
    assert again.history[:2] == result.history
    assert len(whole.history) == 3


@pytest.mark.slow
def test_one_table_of_rivals(tmp_path: Path) -> None:
    size = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 1, "class_token": False, "global_pool": "avg"}
    size["init_values"] = 1e-5  # LayerScale, which timm's rotary models have
    recipe = Recipe.from_yaml("digits", epochs=1, batch_size=256, model_kwargs={**size, "fc_norm": False})
    rivals = ("vit_small_patch16_rope_224", ROPE)
    options = CompareOptions(
        output_dir=str(tmp_path / "c"),
        joins=("basic", "LaPE", "MPVG"),
        pes=("none", "PEG", "2D_RPE", "learnable"),
        rivals=rivals,
        rival_kwargs={**size, "use_fc_norm": False},
        seeds=(0,),
        workers=1,
    )
    found = compare(recipe, options)
    rows = [(v["model"], v["pe"], v["join"]) for v in found.results["variants"]]
    vit = recipe.model
    assert rows == [
        (vit, "none", "basic"),
        (vit, "PEG", "basic"),
        (vit, "2D_RPE", "basic"),
        (vit, "2D_RPE", "LaPE"),
        (vit, "learnable", "basic"),
        (vit, "learnable", "LaPE"),
        (vit, "learnable", "MPVG"),
        *((rival, "own", "basic") for rival in rivals),
    ]
    left_out = [(m["join"], m["pe"]) for m in found.results["meaningless"]]
    assert left_out == [("LaPE", "none"), ("MPVG", "none"), ("LaPE", "PEG"), ("MPVG", "PEG"), ("MPVG", "2D_RPE")]
    report = (tmp_path / "c" / "report.md").read_text()
    assert all(rival in report for rival in rivals)
    assert "'use_fc_norm': False" in report
    model = lape.load(tmp_path / "c" / "cells" / f"{ROPE}.own.basic.seed0" / "model")
    assert isinstance(model.norm, torch.nn.LayerNorm)
    assert model.global_pool == "avg"
    without = lape.load(tmp_path / "c" / "cells" / f"{vit}.none.basic.seed0" / "model")
    axial = lape.load(tmp_path / "c" / "cells" / f"{rivals[0]}.own.basic.seed0" / "model")
    assert lape.describe(axial).parameters == lape.describe(without).parameters
    assert json.loads((tmp_path / "c" / "results.json").read_text())["variants"] == found.results["variants"]


@pytest.mark.parametrize(
    ("rivals", "message"),
    [
        ((), "rival_kwargs={} without a rival"),
        (("vit_small_patch16_rop_224",), "unknown model 'vit_small_patch16_rop_224': did you mean"),
        (("resnet18",), r"resnet18.*unexpected keyword argument"),
        ((ROPE, ROPE), "each once"),
    ],
)
def test_wrong_rivals_are_one_line_before_anything_is_made(rivals, message, tmp_path):
    recipe = Recipe.from_yaml("digits", epochs=1)
    out = str(tmp_path / "out")
    options = CompareOptions(output_dir=out, rivals=rivals, rival_kwargs=None if rivals else {})
    with pytest.raises(lape.LapeError, match=message):
        compare(recipe, options)
    twice = CompareOptions(output_dir=out, models=(ROPE,), joins=("basic",), pes=("own",), rivals=(ROPE,))
    with pytest.raises(lape.LapeError, match="is a model and a rival"):
        compare(recipe, twice)
    assert not (tmp_path / "out").exists()


def test_the_command_has_rivals(monkeypatch):
    import lape.study.compare

    calls = []
    monkeypatch.setattr(lape.study.compare, "compare", lambda _recipe, options: calls.append(options))
    flags = f"compare --output-dir d --pes none PEG learnable --rivals {ROPE} vit_small_patch16_rope_224"
    flags += " --rival-kwargs init_values=1e-5 depth=2"
    assert cli.run(cli.app, flags.split()) == 0
    assert calls[0].rivals == (ROPE, "vit_small_patch16_rope_224")
    assert calls[0].pes == ("none", "PEG", "learnable")
    assert calls[0].rival_kwargs == {"init_values": 1e-5, "depth": 2}


def test_timm_names_of_the_documentation_exist():
    assert {ROPE, "vit_small_patch16_rope_224"} <= set(timm.list_models())
