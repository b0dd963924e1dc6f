"""The Compact Transformers: parameter counts, the forward written out, every join and kind, timm's methods."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import MEANINGFUL, TOLERANCE, assert_same_structure, shake_position
from timm.optim import create_optimizer_v2

import lape
import lape.models
from lape.core.joins import JOINS
from lape.core.position import KINDS
from lape.files.export import BATCH
from lape.models.compact import MODELS, SIZES, CompactTransformer, SequencePool

TINY = {"img_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
FAMILIES = {"ViT-Lite": "vit_lite_2_4_32", "CVT": "cvt_2_4_32", "CCT 3x1": "cct_7_3x1_32", "CCT 7x2": "cct_7_7x2_224"}
PUBLISHED = {  # millions of parameters with a learnable table, as the authors print them (rounded or cut off)
    "vit_lite_7_4_32": 3.717,
    "vit_lite_6_4_32": 3.191,
    "cvt_7_4_32": 3.717,
    "cvt_6_4_32": 3.190,
    "cct_2_3x2_32": 0.284,
    "cct_4_3x2_32": 0.482,
    "cct_6_3x2_32": 3.327,
    "cct_7_3x2_32": 3.853,
    "cct_7_3x1_32": 3.760,
    "cct_6_3x1_32": 3.233,
    "cct_14_7x2_224": 22.36,
}


POOLED = [(join, pe) for join in ("PVG", "MPVG") for pe in ("learnable", "1D_sin", "2D_sin")]


def skip_unless_pooled(family: str, join: str) -> None:
    if JOINS[join].needs_pooling and family == "ViT-Lite":
        pytest.skip("it reads a class token: refused, as another test asserts")


def make(family: str, **kwargs) -> CompactTransformer:
    torch.manual_seed(1)
    size = {"img_size": (32, 48)} if family == "CCT 7x2" else {}  # a grid of 2 x 3
    model = timm.create_model(FAMILIES[family], **{**TINY, **size, **kwargs})
    with torch.no_grad():  # away from the initial values, where gains of one and zero biases hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def image(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def count(name: str) -> int:
    """Parameters by the arithmetic in the module's docstring."""
    cfg = MODELS[name]
    width, ratio, depth = cfg["embed_dim"], int(cfg["mlp_ratio"]), cfg["depth"]
    classes, cls = (10 if cfg["img_size"] == 32 else 1000), int(cfg.get("class_token", False))
    block = 4 * width + 3 * width**2 + (width**2 + width) + (2 * ratio * width**2 + ratio * width + width)
    if "patch_size" in cfg:
        stem, side = 3 * cfg["patch_size"] ** 2 * width + width, cfg["img_size"] // cfg["patch_size"]
    else:
        k, layers = cfg["kernel_size"], cfg["conv_layers"]
        stem = 3 * k * k * width if layers == 1 else 3 * k * k * 64 + 64 * k * k * width
        side = cfg["img_size"] // (2 * (2 if k == 7 else 1)) ** layers
    pool = width if cls else width + 1  # the class token, or the score of sequence pooling
    return depth * block + 2 * width + width * classes + classes + (side**2 + cls) * width + stem + pool


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    assert found == count(name)
    if name in PUBLISHED:
        digits = 2 if PUBLISHED[name] > 10 else 3
        cut = int(found / 1e6 * 10**digits) / 10**digits
        assert PUBLISHED[name] in (cut, round(found / 1e6, digits))


def test_published_models_by_their_exact_numbers():
    exact = {"vit_lite_7_4_32": 3_716_874, "cvt_7_4_32": 3_716_619, "cct_7_3x1_32": 3_760_139, "cct_2_3x2_32": 283_723}
    for name, number in exact.items():
        assert sum(parameter.numel() for parameter in timm.create_model(name).parameters()) == number
    # LaPE adds 2 D a block: the paper's CIFAR models grow by 7 * 512.
    model = lape.create_model("cct_7_3x1_32", join="LaPE")
    assert lape.describe(model).parameters == 3_760_139 + 7 * 512


def attention(x: torch.Tensor, state: dict, path: str, heads: int, bias: torch.Tensor | None) -> torch.Tensor:
    batch, tokens, width = x.shape
    q, k, v = (
        (x @ weight.T).view(batch, tokens, heads, -1).transpose(1, 2) for weight in state[f"{path}.qkv.weight"].chunk(3)
    )
    logits = q @ k.mT / (width // heads) ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    joined = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
    return F.linear(joined, state[f"{path}.proj.weight"], state[f"{path}.proj.bias"])


def written_out(model: CompactTransformer, x: torch.Tensor, join: str = "basic") -> torch.Tensor:
    """The models by the formulas of their module, from the numbers of a state dict; joins as in the README."""
    state = lape.to_reference_state_dict(model) if hasattr(model, "_lape") else model.state_dict()

    def norm(x: torch.Tensor, path: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{path}.weight"], state[f"{path}.bias"], eps=1e-5)

    convolutions = [key for key in state if key.startswith("patch_embed") and key.endswith("weight")]
    if "patch_embed.layers.0.bias" in state:
        x = F.conv2d(x, state[convolutions[0]], state["patch_embed.layers.0.bias"], stride=4)
    else:
        for key in convolutions:
            kernel = state[key].shape[-1]
            x = F.conv2d(x, state[key], stride=max(1, kernel // 2 - 1), padding=max(1, kernel // 2)).relu()
            x = F.max_pool2d(x, 3, 2, 1)
    h = x.flatten(2).transpose(1, 2)
    if "cls_token" in state:
        h = torch.cat([state["cls_token"].expand(len(h), -1, -1), h], dim=1)
    p = state.get("pos_embed")
    if join in ("basic", "PVG", "MPVG") and p is not None:
        h = h + p
    layer = 0
    while f"blocks.{layer}.norm1.weight" in state:
        path = f"blocks.{layer}"
        if join in ("share", "unshare"):
            h = h + (p if join == "share" else state[f"pos_embed{layer}"])
        seen = norm(h, f"{path}.norm1")
        if join == "beside":
            seen = seen + p
        if "LaPE" in join or ("PVG" in join and layer > 0):
            own = norm(p, f"{path}.pe_norm")
            p = p if join == "LaPE-sharing" else own
            seen = seen + own
        h = norm(h + attention(seen, state, f"{path}.attn", 2, None), f"{path}.norm2")
        hidden = F.gelu(F.linear(h, state[f"{path}.mlp.fc1.weight"], state[f"{path}.mlp.fc1.bias"]))
        h = h + F.linear(hidden, state[f"{path}.mlp.fc2.weight"], state[f"{path}.mlp.fc2.bias"])
        layer += 1
    h = norm(h, "norm") + (norm(state["pos_embed"], "norm.pe_norm") if join == "MPVG" else 0)
    if "cls_token" in state:
        pooled = h[:, 0]
    else:
        weight = F.linear(h, state["seq_pool.score.weight"], state["seq_pool.score.bias"]).softmax(dim=1)
        pooled = (weight * h).sum(dim=1)
    return F.linear(pooled, state["head.weight"], state["head.bias"])


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2 * TOLERANCE * expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_the_written_out_formula(family):
    for pos_embed in ("learnable", "sine", "none"):
        model = make(family, pos_embed=pos_embed)
        x = image(model)
        assert close(model(x), written_out(model, x))


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("join", "pe"), [*MEANINGFUL, *POOLED])
def test_five_equalities(family, join, pe, tmp_path):
    skip_unless_pooled(family, join)
    model, original = make(family), make(family)
    x = image(model)
    before = original(x)
    name = FAMILIES[family]
    kwargs = {**TINY, **({"img_size": (32, 48)} if family == "CCT 7x2" else {})}
    lape.apply_(model, join, pe)
    shake_position(model)
    with torch.no_grad():
        converted = model(x)
        if not KINDS[pe].is_bias:
            assert close(converted, written_out(model, x, join))
        loaded = lape.load(lape.save(model, tmp_path / "model", name=name, **kwargs))
        assert close(loaded(x), converted)
        assert close(lape.fold_(copy.deepcopy(model))(x), converted)
    if KINDS[pe].is_table:
        assert lape.positions(model).shape == (3, original.num_prefix_tokens + original.patch_embed.num_patches, 32)
        n = original.patch_embed.num_patches
        assert lape.correlation(model).shape == (3, n, n)
    lape.remove_(model)
    if pe == "learnable":
        assert_same_structure(model, original)
    with torch.no_grad():
        model.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(model(x), before)


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("join", "pe"), [(j, None) for j in JOINS] + MEANINGFUL + POOLED)
def test_removed_is_the_original_bit_for_bit(family, join, pe):
    skip_unless_pooled(family, join)
    model, original = make(family), make(family)
    lape.remove_(lape.apply_(model, join, pe))
    assert_same_structure(model, original)
    x = image(model)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("join", ["PVG", "MPVG"])
def test_joins_for_pooled_patches_refuse_a_class_token(join):
    with pytest.raises(lape.UnsupportedModelError, match=r"reads a class token"):
        lape.apply_(make("ViT-Lite"), join)


@pytest.mark.parametrize("pe", ["1D_RPE", "2D_RPE"])
def test_a_relative_bias_is_added_to_the_logits_of_patches(pe):
    model = lape.apply_(make("ViT-Lite", depth=1), "LaPE", pe)
    shake_position(model)
    seen = {}
    model.blocks[0].attn.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], out=out))
    model(image(model))
    state = model.state_dict()
    bias = F.pad(lape.position_bias(model)[0], (1, 0, 1, 0))
    assert close(seen["out"], attention(seen["x"], state, "blocks.0.attn", 2, bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_new_parameter_learns(family):
    model = lape.apply_(make(family), "LaPE").train()
    model(image(model, 4)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in silent if name != "seq_pool.score.bias"] == []  # a softmax does not see its bias


def test_a_new_table_starts_as_the_models_own():
    for build in (lambda: make_table(None), lambda: make_table("learnable")):
        assert 0.18 < build().std() < 0.22


def make_table(pe: str | None) -> torch.Tensor:
    model = lape.create_model("cct_2_3x2_32", join="LaPE", pe=pe)
    return lape.to_reference_state_dict(model)["pos_embed"]


def test_sequence_pooling_is_a_weighted_mean():
    pool = SequencePool(4)
    same = torch.randn(1, 1, 4).expand(1, 7, 4)
    assert torch.allclose(pool(same), same[:, 0])


@pytest.mark.slow
def test_names_are_found_without_importing_the_models():
    code = (
        "import sys, lape; assert 'lape.models' not in sys.modules; "
        "print(lape.describe(lape.create_model('cct_2_3x2_32', join='LaPE')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "2/2 attention norms joined, input addition off, grid 8 x 8, 0 prefix tokens" in done.stdout
    assert set(timm.list_models(module="compact")) == set(MODELS)


def test_configuration_is_that_of_small_images():
    model = timm.create_model("cvt_4_4_32")
    assert model.pretrained_cfg["mean"] == (0.4914, 0.4822, 0.4465)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert (model.num_classes, timm.create_model("cct_7_7x2_224", num_classes=3).num_classes) == (10, 3)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cct_7_3x1_3", {}, r"did you mean 'cct_7_3x1_32'"),
        ("cct_2_3x2_32", {"pretrained": True}, r"cct_2_3x2_32 has no pretrained weights: .*train it"),
        ("cvt_2_4_32", {"img_size": 30}, r"30 x 30 is not divisible by the patch of cvt_2_4_32, 4 x 4"),
        ("cvt_2_4_32", {"img_size": 3}, r"img_size=3 is too small"),
        ("cct_2_3x2_32", {"conv_layer": 3}, r"takes no argument 'conv_layer'; did you mean 'conv_layers'"),
        ("cct_2_3x2_32", {"pos_embed": "learn"}, r"pos_embed='learn' is not known: use 'learnable', 'sine', 'none'"),
    ],
)
def test_wrong_use_is_told_in_one_line(name, kwargs, message):
    with pytest.raises(lape.LapeError, match=message) as raised:
        lape.create_model(name, **kwargs)
    assert "\n" not in str(raised.value)


def test_images_of_another_size_are_refused():
    model = make("CCT 3x1")
    with pytest.raises(lape.LapeError, match=r"images of 24 x 16 pixels were given, the model is for 16 x 16"):
        model(torch.randn(1, 3, 24, 16))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("join", JOINS)
def test_set_input_size(family, join):
    skip_unless_pooled(family, join)
    model = lape.apply_(make(family), join)
    before = lape.positions(model)
    model.set_input_size((32, 64))
    assert lape.grid(model) == model.patch_embed.grid_size
    assert model(image(model)).shape == (2, 5)
    assert lape.positions(model).shape[1] == model.num_prefix_tokens + model.patch_embed.num_patches
    assert before.shape[1] != lape.positions(model).shape[1]


def test_methods_of_timm():
    model = lape.apply_(make("CCT 3x1"), "LaPE")
    x = image(model)
    features = model.forward_features(x)
    assert features.shape == (2, 64, 32)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.head(model.forward_head(features, pre_logits=True)), model(x))
    plain = model(x)
    model.set_grad_checkpointing(True)
    assert torch.equal(model.train()(x), model.train()(x)) is False  # dropout and stochastic depth are on
    assert torch.equal(model.eval()(x), plain)
    model.set_grad_checkpointing(False)
    assert {"pos_embed", "lape.norms.0.weight", "lape.norms.2.bias"} <= model.no_weight_decay()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(7)
    assert model.get_classifier() is model.head
    assert model(x).shape == (2, 7)
    assert not model.head.bias.any()  # a new head starts as the published ones, std 0.02; torch's has 0.1 here
    assert 0.01 < model.head.weight.std() < 0.03
    with pytest.raises(lape.LapeError, match=r"global_pool='avg': this model pools by 'seq' only"):
        model.reset_classifier(3, "avg")


def test_stochastic_depth_grows_linearly_and_dropout_is_the_published():
    model = timm.create_model("cct_7_3x1_32")
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 6 for i in range(7)])
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.1}
    assert set(SIZES) == {2, 4, 6, 7, 14}


@pytest.mark.slow
def test_export_compiles_without_a_break():
    model = lape.fold_(lape.apply_(make("CCT 3x1"), "LaPE"))
    x = image(model)
    assert close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vit_lite_2_4_32", "cvt_2_4_32", "cct_2_3x2_32", "t2t_vit_7", "ceit_tiny_patch16_224"]
)
def test_every_family_is_exported_for_any_batch(name):
    size = {"img_size": 32, "depth": 1} if name[0] in "tc" and "32" not in name else {"img_size": 16}
    model = lape.fold_(lape.create_model(name, **size)).eval()
    side = size["img_size"]
    program = torch.export.export(model, (torch.randn(2, 3, side, side),), dynamic_shapes=({0: BATCH},))
    x = torch.randn(5, 3, side, side)
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)


def test_the_name_of_a_family_gets_a_hint():
    for family in ("cvt", "cct", "ceit", "vit_lite", "t2t_vit"):
        with pytest.raises(lape.LapeError, match=f"did you mean '{family}"):
            lape.create_model(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_timm_offers_for_its_vision_transformer(family, tmp_path):
    """Features of every block, registers, images of any size; and a sine table is kept as one."""
    model = make(family, pos_embed="sine", reg_tokens=2, dynamic_img_size=True)
    x = image(model)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, *model.patch_embed.grid_size)] * 3
    assert (model.table_kind, model.pos_embed.requires_grad) == ("1D_sin", False)
    lape.apply_(model)
    loaded = lape.load(lape.save(model, tmp_path / "model"))
    larger = torch.randn(1, 3, *(2 * side for side in model.patch_embed.img_size))
    assert torch.equal(loaded(larger), model(larger))
    assert lape.describe(loaded).pe == "1D_sin"
    features = timm.create_model(FAMILIES[family], features_only=True, out_indices=1, **TINY)
    assert len(features(torch.randn(1, 3, 16, 16))) == 1
