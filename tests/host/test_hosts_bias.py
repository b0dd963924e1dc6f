"""Hosts with a relative position bias of their own: LaPE on it, a LayerNorm over each row of each block's bias."""

import copy
import pickle
import warnings
from importlib.metadata import version

import pytest
import timm
import torch
from formula import TOLERANCE, assert_same_structure
from timm.optim import create_optimizer_v2
from zoo import SMALL, TINY, output

import lape

ON_4 = {**TINY, "depth": 2}
# host -> (name, arguments, path of the method in a block, its arguments, prefix tokens)
HOSTS = {
    "BEiT": ("beit_base_patch16_224", {}, "attn._get_rel_pos_bias", (), 1),
    "BEiT with a table": ("beit_base_patch16_224", {"use_abs_pos_emb": True}, "attn._get_rel_pos_bias", (), 1),
    "relative position, MLP": ("vit_relpos_small_patch16_224", {}, "attn.rel_pos.get_bias", (), 0),
    "relative position, table": (
        "vit_relpos_small_patch16_224",
        {"rel_pos_type": "bias", "class_token": True},
        "attn.rel_pos.get_bias",
        (),
        1,
    ),
    "Hugging Face BEiT": ("Beit", {"use_relative_position_bias": True}, None, ((4, 4),), 1),
    "Data2Vec": ("Data2VecVision", {"use_relative_position_bias": True}, None, ((4, 4),), 1),
}
TABLED = "BEiT with a table"
TRANSFORMERS_5 = version("transformers") >= "5"
REASON = "one for all blocks.*stays as it is.*pe='learnable'"


def make(host: str) -> torch.nn.Module:
    name, kwargs, *_ = HOSTS[host]
    torch.manual_seed(1)
    if "_" in name:
        model = timm.create_model(name, **ON_4, **kwargs)
    else:
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SMALL, **kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lape." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def methods(model: torch.nn.Module, host: str) -> list[tuple[torch.nn.Module, str]]:
    """The module of each block that computes its bias, and the method's name; written down here, not asked for."""
    _, _, path, _, _ = HOSTS[host]
    if path is None:
        found = [m for m in model.modules() if type(m).__name__.endswith("VisionRelativePositionBias")]
        found = found or [m for m in model.modules() if type(m).__name__.endswith("RelativePositionBias")]
        return [(module, "forward") for module in found]
    owner, _, method = path.rpartition(".")
    return [(block.get_submodule(owner), method) for block in model.blocks]


def written_out(model: torch.nn.Module, original: torch.nn.Module, host: str) -> torch.nn.Module:
    """The original with its biases normalised by hand: numbers from the converted model's state dict."""
    state = lape.to_reference_state_dict(model)
    twin = copy.deepcopy(original)
    *_, args, prefix = HOSTS[host]
    weights = [t for n, t in state.items() if n.endswith("pe_norm.weight")]
    biases = [t for n, t in state.items() if n.endswith("pe_norm.bias")]
    assert len(weights) == len(biases) == 2
    for (owner, method), weight, bias in zip(methods(twin, host), weights, biases, strict=True):
        b = getattr(owner, method)(*args).clone()
        rows = b[..., prefix:, prefix:]
        centred = rows - rows.mean(-1, keepdim=True)
        b[..., prefix:, prefix:] = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
        setattr(owner, method, lambda *_, b=b, **__: b)
    return twin


@pytest.mark.matrix
@pytest.mark.parametrize("host", HOSTS)
def test_five_equalities(host, tmp_path):
    model, original = make(host), make(host)
    name, extra, *_ = HOSTS[host]
    by_name = {"name": name, **ON_4, **extra} if "_" in name else {}
    x = torch.randn(2, 3, 16, 16)
    pe = "2D_RPE" if host == TABLED else None
    with torch.no_grad():
        before = output(original, x)
        shaken(lape.apply_(model, "LaPE", pe))
        converted = output(model, x)
        if host == TABLED:
            original.pos_embed.zero_()
        expected = output(written_out(model, original, host), x)
        loaded = lape.load(lape.save(model, tmp_path / "model", **by_name))
        folded = lape.fold_(copy.deepcopy(model))
        folded_loaded = lape.load(lape.save(folded, tmp_path / "folded", **by_name))
        twins = [copy.deepcopy(model), model]
        if not (host in ("Hugging Face BEiT", "Data2Vec") and not TRANSFORMERS_5):  # 4: its own cache cannot be pickled
            twins.insert(1, pickle.loads(pickle.dumps(model)))
        for other in (loaded, folded, folded_loaded, *twins):
            assert (output(other, x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert (lape.position_bias(folded) - lape.position_bias(model)).abs().max() <= 1e-6
        assert not torch.allclose(converted, before)
        assert not any("norms" in name for name in folded.state_dict())
        for other in twins:
            lape.remove_(other)
            assert_same_structure(other, original)
            assert torch.equal(output(other, x), before)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_said_and_counted(host):
    pe = "2D_RPE" if host == TABLED else None
    plain = sum(p.numel() for p in make(host).parameters()) - (17 * 32 if host == TABLED else 0)
    model = lape.apply_(make(host), "LaPE", pe)
    done = lape.describe(model)
    assert (done.pe, done.joined, done.beside, done.input_addition) == ("2D_RPE", 2, None, False)
    assert done.parameters == plain + 2 * 2 * 16  # gain and shift over the 16 keys, in two blocks
    rows = 0 if "MLP" in host else 7 * 7 + 3  # offsets on 4 x 4, and to, from and within the class token
    assert done.position_parameters == 2 * 2 * 16 + 2 * rows * 2  # two heads
    assert lape.position_bias(model).shape == (2, 2, 16, 16)
    rows = lape.position_bias(model)
    assert rows.mean(-1).abs().max() <= 1e-5
    with pytest.raises(lape.LapeError, match="has no position per token: lape"):
        lape.positions(model)
    lape.remove_(model)
    basic = lape.apply_(model, "basic", pe)
    assert lape.describe(basic).joined == 0
    assert torch.equal(lape.position_bias(basic), lape.position_bias(lape.apply_(make(host), "basic", "2D_RPE")))


@pytest.mark.parametrize("host", HOSTS)
def test_every_new_parameter_gets_a_gradient(host):
    model = lape.apply_(make(host).train(), "LaPE", "2D_RPE")
    y = output(model, torch.randn(2, 3, 16, 16))
    (y * torch.randn_like(y)).sum().backward()
    new = [p for n, p in model.named_parameters() if "lape." in n or "relative_position_bias_table" in n]
    assert len(new) == (4 if "MLP" in host else 6)
    assert all(p.grad is not None and p.grad.any() for p in new)
    if hasattr(model, "group_matcher"):
        groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5).param_groups
        assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if any(p is q for q in new))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["BEiT", "relative position, MLP", "Hugging Face BEiT"])
@torch.no_grad()
def test_compiled(host):
    model, x = shaken(lape.apply_(make(host))), torch.randn(2, 3, 16, 16)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(output(compiled, x), output(model, x), atol=1e-5)


def test_checkpointed():
    x = torch.randn(2, 3, 16, 16)
    model = shaken(lape.apply_(make("BEiT")))
    model.set_grad_checkpointing(True)
    assert torch.equal(model(x.requires_grad_()), shaken(lape.apply_(make("BEiT")))(x))


def test_refused_and_unchanged():
    shared = timm.create_model("vit_srelpos_small_patch16_224", **ON_4)
    with pytest.raises(lape.LapeError, match=REASON):
        lape.apply_(shared)
    shared_beit = timm.create_model(
        "beit_base_patch16_224", **ON_4, use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    )
    with pytest.raises(lape.LapeError, match=REASON):
        lape.apply_(shared_beit)
    for join in ("share", "unshare", "LaPE-sharing"):
        model = make("BEiT")
        with pytest.raises(lape.LapeError, match="means nothing: each block has its own bias"):
            lape.apply_(model, join)
        assert_same_structure(model, make("BEiT"))
    with pytest.raises(lape.LapeError, match="a second bias would join it: use pe='learnable', or pe='2D_RPE' for its"):
        lape.apply_(make("BEiT"), "LaPE", "1D_RPE")


def test_one_size_said_in_one_line():
    model = lape.apply_(make("BEiT"))
    with pytest.raises(lape.LapeError, match="has one size: set the input size before"):
        model.set_input_size(img_size=(8, 16))
    basic = lape.apply_(make("BEiT"), "basic")
    with warnings.catch_warnings(action="ignore"):  # timm's own, resizing its bias
        basic.set_input_size(img_size=(8, 16))
    assert lape.position_bias(basic).shape == (2, 2, 8, 8)
    sized = lape.apply_(make("Hugging Face BEiT"))
    with pytest.raises(lape.LapeError, match="between 8 patches arrived, its LayerNorm is for 16"):
        sized(torch.randn(1, 3, 8, 16))
