"""timm's families of Vision Transformers, a tiny model each: what is joined, what is left alone, what is refused."""

import copy
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import ANYWHERE, TOLERANCE, assert_host_keys, assert_same_structure, of_position, plain, shake_position
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from timm.models.vision_transformer_sam import window_partition
from timm.optim import create_optimizer_v2
from zoo import FAMILIES, ON_4
from zoo import family_image as image
from zoo import make_family as make

import lape
from lape.host.base import without_values

NO_SLOT = ("relative position", "shared relative position", "XCiT")  # their forward adds no table
CASES = [(family, join) for family in FAMILIES for join in ANYWHERE if not (join == "basic" and family in NO_SLOT)]
RESIZED = ("T2T-ViT", "CeiT", "hybrid", "BEiT", "BEiT with bias", "EVA", "EVA-02", "DINOv3", "relative position")


def converted(family: str, join: str = "LaPE", **kwargs) -> torch.nn.Module:
    model = lape.apply_(make(family, **kwargs), join, FAMILIES[family][2])
    shake_position(model)
    return model


def host_without_position(family: str) -> torch.nn.Module:
    """The host with zeros in its table, or without its encoder: what the token stream of a LaPE model must be."""
    model = make(family)
    if family == "XCiT":
        model.pos_embed = None
        return model
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] == "pos_embed":
            parameter.data.zero_()
    return model


def blocks_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {path: model.get_submodule(path) for path in lape.convert.converted.conversion_of(model).anatomy.blocks}


def chain(model: torch.nn.Module) -> list[torch.Tensor]:
    """P_1 ... P_L by the formula, from the numbers of the state dict alone; zero for tokens without a row."""
    state, done = lape.to_reference_state_dict(model), lape.describe(model)
    table = next(tensor for name, tensor in state.items() if name.split(".")[-1] == "pos_embed")
    width = table.shape[-1]
    p, chained = table.reshape(1, -1, width), []
    bare, rows = done.prefix_tokens - done.positioned_prefix_tokens, done.positioned_prefix_tokens
    for path, block in blocks_of(model).items():
        eps = block.norm1.eps or 1e-5
        p = F.layer_norm(p, (width,), state[f"{path}.pe_norm.weight"], state[f"{path}.pe_norm.bias"], eps=eps)
        chained.append(torch.cat([p[:, :rows], p.new_zeros(1, bare, width), p[:, rows:]], dim=1))
    return chained


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_sees_token_norm_plus_position_and_nothing_else_does(family):
    model, bare_host = converted(family), host_without_position(family)
    _, _, _, prefix, bare, beside = FAMILIES[family]
    done = lape.describe(model)
    assert (done.prefix_tokens, done.positioned_prefix_tokens) == (prefix, prefix - bare)
    assert (beside or "") in (done.beside or "")
    assert done.joined == done.blocks
    assert not done.input_addition
    seen: dict[tuple[str, str], torch.Tensor] = {}
    for path, block in blocks_of(model).items():
        for name in ("", "norm1", "attn"):
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, key=(path, name): seen.__setitem__(key, args[0])
            )
    x = image(family)
    model(x)
    for (path, block), p in zip(blocks_of(model).items(), chain(model), strict=True):
        tokens, attended = seen[path, "norm1"], seen[path, "attn"]
        assert torch.equal(tokens, seen[path, ""])  # the norm reads the stream itself
        expected = plain(block.norm1, tokens) + (p if tokens.ndim == 3 else p.unflatten(1, tokens.shape[1:3]))
        if getattr(block, "window_size", 0):
            expected, _ = window_partition(expected, block.window_size)
        assert (attended - expected).abs().max() <= TOLERANCE * expected.abs().max()
    # With attention silent nothing that holds a position is left: stream, MLP and head are those of the bare host.
    for path, block in blocks_of(model).items():
        for attention in (block.attn, bare_host.get_submodule(path).attn):
            attention.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
    assert torch.equal(model(x), bare_host(x))


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "join"), CASES)
def test_folded_saved_and_removed(family, join, tmp_path):
    name, extra, pe, *_ = FAMILIES[family]
    model, original = make(family), make(family)
    x = image(family)
    lape.apply_(model, join, pe)
    assert_host_keys(model, original, parameters=family != "XCiT")  # whose encoder a table replaces
    shake_position(model)
    expected = model(x)
    tolerance = TOLERANCE * expected.abs().max()
    folded = lape.fold_(copy.deepcopy(model))
    assert (folded(x) - expected).abs().max() <= tolerance
    if family not in ("VOLO", "torch RMSNorm"):  # not made by a name and plain values
        loaded = lape.load(lape.save(model, tmp_path / "model", name=name, **extra))
        assert (loaded(x) - expected).abs().max() <= tolerance
    lape.remove_(model)
    assert_same_structure(model, original)
    with torch.no_grad():  # the trained table stays the model's; put the original's back to compare all numbers
        model.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(model(x), original(x))


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "join"), CASES)
def test_removed_at_once_is_the_original_bit_for_bit(family, join):
    for pe in dict.fromkeys((FAMILIES[family][2], "2D_sin" if join != "unshare" else "learnable")):
        model, original = make(family), make(family)
        lape.remove_(lape.apply_(model, join, pe))
        assert_same_structure(model, original)
        for key, tensor in original.state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key
    x = image(family)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_new_parameter_learns_and_the_optimizer_knows_it(family):
    model = converted(family)
    (model(image(family)) * torch.randn(5)).sum().backward()
    new = of_position(model)
    assert len(new) == 1 + 2 * lape.describe(model).blocks
    assert all(p.grad is not None and p.grad.any() for p in new.values())
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
    settings = {id(p): group for group in groups for p in group["params"]}
    assert all(settings[id(p)]["weight_decay"] == 0 for p in new.values())
    (table,) = (p for name, p in new.items() if ".norms." not in name)
    assert settings[id(table)]["lr_scale"] == min(group["lr_scale"] for group in groups)  # of the stem
    for layer, block in enumerate(blocks_of(model).values()):
        for kind in ("weight", "bias"):
            p = new[f"lape.norms.{layer}.{kind}"]
            assert settings[id(p)]["lr_scale"] == settings[id(block.norm1.weight)]["lr_scale"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_keeps_working_in_timm(family):
    model = converted(family)
    x = image(family)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    final, maps = model.forward_intermediates(x)
    assert (final - features).abs().max() <= TOLERANCE * features.abs().max()
    assert all(y.ndim == 4 for y in maps)
    before = model.eval()(x)
    model.set_grad_checkpointing(True)
    assert torch.equal(model(x.requires_grad_()), before)
    model(x).sum().backward()
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    lape.remove_(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_only_models_are_converted(family):
    if family == "VOLO":
        getter = FeatureGetterNet(make(family), out_indices=(0, 2))
    else:
        getter = make(family, features_only=True, out_indices=(0, 1))
    twin = copy.deepcopy(getter)
    lape.apply_(getter, "LaPE", FAMILIES[family][2])
    shake_position(getter)
    x = image(family)
    maps, bare = getter(x), twin(x)
    assert [y.shape for y in maps] == [y.shape for y in bare]
    assert not torch.equal(maps[-1], bare[-1])


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, resizing its bias
@pytest.mark.parametrize("join", ["basic", "share", "LaPE"])
@pytest.mark.parametrize("family", RESIZED)
def test_set_input_size(family, join):
    if (family, join) not in CASES:
        return
    model = converted(family, join)
    x = image(family)
    stride = lape.convert.converted.conversion_of(model).anatomy.patch_size[0]
    before, size = model(x), tuple(model.patch_embed.img_size)
    keys = list(model.state_dict())
    model.set_input_size(img_size=(3 * stride, 2 * stride))
    assert lape.grid(model) == (3, 2)
    assert list(model.state_dict()) == keys
    assert model(torch.randn(2, 3, 3 * stride, 2 * stride)).isfinite().all()
    lape.remove_(model)
    host = make(family)
    host.set_input_size(img_size=(3 * stride, 2 * stride))
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in host.state_dict().items()]
    assert size == tuple(make(family).patch_embed.img_size)
    assert before.isfinite().all()


@pytest.mark.parametrize(
    ("family", "kwargs", "size", "whole"),
    [
        ("NaFlexViT", {}, (24, 12), (24, 12)),
        ("XCiT", {}, (80, 33), (80, 48)),  # its convolutions round up
        ("EVA", {"dynamic_img_size": True}, (24, 12), (24, 12)),
        ("EVA-02", {"dynamic_img_size": True}, (8, 32), (8, 32)),
        ("T2T-ViT", {"dynamic_img_size": True}, (64, 16), (64, 16)),
        ("hybrid", {"dynamic_img_size": True}, (128, 70), (128, 64)),
        ("hybrid", {"dynamic_img_size": True, "dynamic_img_pad": True}, (128, 70), (128, 96)),
    ],
)
def test_images_of_another_size_get_the_position_of_their_own_grid(family, kwargs, size, whole):
    model = converted(family, **kwargs)
    inputs = []
    attention = list(blocks_of(model).values())[-1]
    attention.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    attention.norm1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    at_home = model(image(family))
    assert model(torch.randn(2, 3, *size)).isfinite().all()
    tokens, attended = inputs[-2:]
    expected = lape.positions(model, whole)[-1]
    added = (attended - plain(attention.norm1, tokens))[0]
    assert added.shape == expected.shape
    assert (added - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert at_home.isfinite().all()


@pytest.mark.parametrize("family", ["CaiT", "EVA-02", "NaFlexViT", "SAM", "VOLO", "XCiT"])
def test_copies_by_pickle(family):
    model, x = converted(family), image(family)
    expected = model(x)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["NaFlexViT", "VOLO"])  # a watched grid, and a map that tells its own
@torch.no_grad()
def test_compiles_to_one_graph(family):
    model, x = converted(family), image(family)
    expected = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - expected).abs().max() <= 10 * TOLERANCE * expected.abs().max()


def packed(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Patches of images of these grids in one batch, with zeros behind the last of each."""
    count = max(rows * columns for rows, columns in grids)
    batch = {"patches": torch.zeros(len(grids), count, 48), "patch_coord": torch.zeros(len(grids), count, 2).long()}
    batch["patch_valid"] = torch.zeros(len(grids), count).bool()
    for i, (rows, columns) in enumerate(grids):
        n = rows * columns
        batch["patches"][i, :n] = torch.randn(n, 48)
        batch["patch_coord"][i, :n] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_valid"][i, :n] = True
    return batch


@pytest.mark.parametrize("family", ["NaFlexViT", "NaFlexViT, bilinear", "NaFlexViT, keeping aspect"])
@pytest.mark.parametrize("join", ["basic", "share", "LaPE"])
def test_packed_images_each_get_the_position_of_their_own_grid(family, join):
    model, batch = converted(family, join), packed((4, 4), (2, 3), (3, 2))
    together = model(batch)
    for i, n in enumerate((16, 6, 6)):
        alone = {name: tensor[i : i + 1, :n] for name, tensor in batch.items()}
        assert (together[i] - model(alone)[0]).abs().max() <= 1e-5 * together.abs().max()
    lape.remove_(model).load_state_dict(make(family).state_dict())
    assert torch.equal(model(batch), make(family)(batch))


def test_packed_images_of_one_grid_may_be_padded():
    model = converted("NaFlexViT", "LaPE")
    batch = {name: tensor[1:] for name, tensor in packed((4, 4), (2, 3), (2, 3)).items()}  # as long as the model's own
    together = model(batch)
    for i in range(2):
        alone = {name: tensor[i : i + 1, :6] for name, tensor in batch.items()}
        assert (together[i] - model(alone)[0]).abs().max() <= 1e-5 * together.abs().max()


@pytest.mark.parametrize("family", ["NaFlexViT", "NaFlexViT, bilinear", "NaFlexViT, keeping aspect"])
def test_a_table_is_resampled_as_the_host_does(family):
    host = make(family)
    expected = torch.zeros(1, 18, 32)
    host.embeds._apply_learned_pos_embed(expected, (6, 3))
    model = lape.apply_(host, "share")
    assert (lape.positions(model, (24, 12))[0, -18:] - expected).abs().max() <= 1e-6


def test_a_bias_joins_where_attention_takes_one():
    for family in ("BEiT", "EVA", "hybrid", "NaFlexViT"):
        for join in ("basic", "LaPE"):
            model = lape.apply_(make(family), join, "2D_RPE")
            shake_position(model)
            bare_host, x = host_without_position(family), image(family)
            assert not torch.allclose(model(x), bare_host(x))
            for name, parameter in model.named_parameters():
                if "lape.biases" in name:
                    parameter.data.zero_()
            assert (model(x) - bare_host(x)).abs().max() <= TOLERANCE * bare_host(x).abs().max()
    for family in ("CaiT", "VOLO", "XCiT", "differential attention"):
        with pytest.raises(lape.UnsupportedModelError, match="takes no mask per head: pe='2D_RPE'"):
            lape.apply_(make(family), "basic", "2D_RPE")


@pytest.mark.parametrize(
    ("family", "join", "pe", "reason"),
    [
        ("shared relative position", "LaPE", None, r"one for all blocks\) stays as it is.*pe='learnable'"),
        ("DINOv3", "LaPE", None, "no position table of its own, its rotary position embedding.*pe='learnable'"),
        ("XCiT", "LaPE", None, "pos_embed computes its position .*PositionalEncodingFourier.*pe='learnable'"),
        ("relative position", "basic", "learnable", "no place where it adds a table.*use join='LaPE'"),
        ("XCiT", "basic", "2D_sin", "no place where it adds a table.*use join='LaPE'"),
        ("EVA-02", "basic", "none", "keeps its rotary.*would not be without a position"),
        ("SAM", "basic", "none", "keeps its relative.*would not be without a position"),
        ("BEiT with bias", "LaPE", "1D_RPE", "keeps its relative.*a second bias"),
    ],
)
def test_kinds_that_would_not_be_what_they_say_are_refused(family, join, pe, reason):
    model, original = make(family), make(family)
    with pytest.raises(lape.LapeError, match=reason):
        lape.apply_(model, join, pe)
    assert_same_structure(model, original)


def test_the_control_without_position():
    for family in ("CaiT", "VOLO", "XCiT", "NaFlexViT"):
        x = image(family)
        model = lape.apply_(make(family), "basic", "none")
        assert torch.equal(model(x), host_without_position(family)(x))
        assert_same_structure(lape.remove_(model), make(family))


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("vit_tiny_patch16_224", {**ON_4, "block_fn": ParallelScalingBlock}, "the MLP must get no position"),
        ("vit_tiny_patch16_224", {**ON_4, "block_fn": DiffParallelScalingBlock}, "the MLP must get no position"),
        ("vit_base_patch16_rpn_224", ON_4, r"ResPostBlock.*post-norm"),
        ("vit_relpos_small_patch16_rpn_224", ON_4, r"ResPostRelPosBlock.*post-norm"),
        ("eva02_enormous_patch14_clip_224", ON_4, r"EvaBlockPostNorm.*post-norm"),
        ("eva02_tiny_patch14_224", {**ON_4, "patch_drop_rate": 0.5}, "patch_drop_rate > 0 removes tokens"),
        ("cait_xxs24_224", {**ON_4, "norm_layer": torch.nn.BatchNorm1d}, "norm1 is a .*BatchNorm1d"),
        ("swinv2_tiny_window8_256", {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1)}, "post-norm"),
        ("crossvit_tiny_240", {"depth": ((1, 1, 0),) * 3}, "two branches"),
        ("mobilevit_xxs", {}, "no position embedding"),
        ("mobilevitv2_050", {}, "no position embedding"),
    ],
)
def test_refused_with_the_true_reason_and_unchanged(name, kwargs, reason):
    model = timm.create_model(name, **kwargs)
    state = copy.deepcopy(model.state_dict())
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(lape.UnsupportedModelError, match=reason):
        lape.apply_(model, "LaPE")
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())


@pytest.mark.slow
def test_the_table_of_architectures_is_that_of_this_code():
    """Every architecture of the installed timm is in docs/hosts.md, and a sample of the rows comes out again."""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("host_table", root / "benchmarks" / "host_table.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # for its dataclass
    spec.loader.exec_module(script)
    written = json.loads((root / "benchmarks" / "results" / "hosts_timm.json").read_text())
    if written["versions"]["timm"] != timm.__version__:
        pytest.skip("the table is of another timm")
    rows = [script.Row(**{**row, "grid": row["grid"] and tuple(row["grid"])}) for row in written["architectures"]]
    assert [row.name for row in rows] == [n for module in script.MODULES for n in timm.list_models(module=module)]
    assert script.page(rows, written["versions"]) == (root / "docs" / "hosts.md").read_text()
    for row in rows[::29]:
        assert script.examine(row.module, row.name) == row


# Whole models and backbones; encoders by themselves are converted in tests/host/test_hosts_wide.py.
AS_THEY_ARE = """
    EomtForUniversalSegmentation Siglip2ForImageClassification VivitForVideoClassification
    TimesformerForVideoClassification VitDetBackbone YolosForObjectDetection LwDetrForObjectDetection
    RfDetrForObjectDetection HieraForImageClassification Sam2Model MllamaVisionModel swin_t mvit_v1_b
"""
KIND_NAMED = """
    DINOv3ViTModel DINOv3ViTBackbone CHMv2ForDepthEstimation EomtDinov3ForUniversalSegmentation
    VideoMAEForVideoClassification VJEPA2ForVideoClassification mvit_v2_s
"""


def test_the_table_of_the_other_libraries_is_that_of_its_results():
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("host_table", root / "benchmarks" / "host_table.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    written = json.loads((root / "benchmarks" / "results" / "hosts_others.json").read_text())
    rows = [script.Row(**{**row, "grid": row["grid"] and tuple(row["grid"])}) for row in written["architectures"]]
    assert script.page(rows, written["versions"], script.OTHERS) == (root / "docs" / "hosts-others.md").read_text()
    assert {"transformers", "torchvision"} == {row.module for row in rows}
    status = {row.name: row.status for row in rows}
    for name in AS_THEY_ARE.split():
        assert status[name] == "converted", name
    for name in KIND_NAMED.split():
        assert status[name] == "converted with pe='learnable'", name


def test_a_model_without_values_has_its_shapes_and_what_lies_elsewhere_gets_values():
    with without_values():
        model, elsewhere = timm.create_model("vit_tiny_patch16_224", depth=1), torch.zeros(2, device="cpu").add_(1)
    real = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert all(p.is_meta for p in model.parameters())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert elsewhere.tolist() == [1, 1]
    assert torch.zeros(2).add_(1).tolist() == [1, 1]
