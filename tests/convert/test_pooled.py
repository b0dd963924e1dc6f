"""PVG and MPVG: position for models that pool their patches (AAAI 2025): equalities, counts, refusals, looks."""

import copy

import pytest
import timm
import torch
from formula import TOLERANCE, assert_same_structure, of_position, plain, shake_position, written_out
from zoo import TINY, image

import lape
from lape.look.probe import token_and_position

POOLED = {"class_token": False, "global_pool": "avg", "fc_norm": False}
CASES = [
    (join, pe, extra)
    for join in ("PVG", "MPVG")
    for pe in (None, "learnable", "1D_sin", "2D_sin")
    for extra in ({}, {"img_size": (28, 12)})
] + [
    ("PVG", "2D_sin", {"fc_norm": True}),
    ("MPVG", None, {"reg_tokens": 2}),
    ("MPVG", None, {"reg_tokens": 2, "no_embed_class": True}),
    ("MPVG", "2D_sin", {"class_token": True}),  # there, but not read
    ("MPVG", None, {"dynamic_img_size": True}),
]


def make(**kwargs) -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **POOLED, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.matrix
@pytest.mark.parametrize(("join", "pe", "extra"), CASES, ids=str)
def test_five_equalities(join, pe, extra, tmp_path):
    """written out = converted = folded = saved and loaded; removed = original, bit for bit."""
    model, original = make(**extra), make(**extra)
    x = image(model)
    lape.remove_(lape.apply_(model, join, pe))
    assert_same_structure(model, original)
    assert torch.equal(model(x), original(x))
    lape.apply_(model, join, pe)
    shake_position(model)
    arguments = {"name": "vit_tiny_patch16_224", **TINY, **POOLED, **extra}
    with torch.no_grad():
        converted = model(x)
        expected = written_out(model, original, x, join, pe or "learnable")
        loaded = lape.load(lape.save(model, tmp_path / "model", **arguments))
        folded = lape.fold_(copy.deepcopy(model))
        folded_loaded = lape.load(lape.save(folded, tmp_path / "folded", **arguments))
        assert torch.equal(folded_loaded(x), folded(x))
        for what, got in {"converted": converted, "loaded": loaded(x), "folded": folded(x)}.items():
            assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max(), what
    lape.remove_(model)
    if pe is None:
        assert_same_structure(model, original)
    else:
        model.load_state_dict(original.state_dict(), strict=True)
        assert torch.equal(model(x), original(x))


@pytest.mark.parametrize(
    ("size", "join", "count"),
    [
        ("small", "PVG", 22_058_344),
        ("small", "MPVG", 22_059_112),
        ("base", "PVG", 86_583_016),
        ("base", "MPVG", 86_584_552),
    ],
)
def test_the_published_counts_of_parameters(size, join, count):
    with torch.device("meta"):
        model = lape.create_model(f"deit_{size}_patch16_224", join, **POOLED)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("join", ["PVG", "MPVG"])
def test_every_new_parameter_learns(join):
    model = lape.apply_(make(), join).train()
    torch.nn.functional.cross_entropy(model(image(model)), torch.tensor([0, 1])).backward()
    new = of_position(model)
    assert len([name for name in new if "lape.norms" in name]) == 2 * (len(model.blocks) - 1 + (join == "MPVG"))
    for name, parameter in new.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_with_mean_pooling_the_last_position_is_a_constant_of_the_head():
    """mean(LN(x) + LN'(P)) = mean(LN(x)) + mean(LN'(P)): the second term does not depend on the image."""
    pvg, mpvg = lape.apply_(make(), "PVG"), lape.apply_(make(), "MPVG")
    shake_position(mpvg)
    state = {
        key: tensor for key, tensor in lape.to_reference_state_dict(mpvg).items() if not key.startswith("norm.pe_")
    }
    lape.load_reference_state_dict(pvg, state)
    with torch.no_grad():
        pvg.head.bias += pvg.head.weight @ lape.last_position(mpvg)[0].mean(0)
        x = image(mpvg, 4)
        assert torch.allclose(pvg(x), mpvg(x), atol=1e-5)


@pytest.mark.parametrize("join", ["PVG", "MPVG"])
def test_looks(join):
    model = lape.apply_(make(), join)
    shake_position(model)
    described = lape.describe(model)
    assert (described.joined, described.blocks, described.last_norm) == (2, 3, join == "MPVG")
    assert described.input_addition
    assert f"2/3 attention norms{' and the last norm' if join == 'MPVG' else ''} joined, input addition on" in str(
        described
    )
    received, seen, unbiased = (lape.positions(model, view=view) for view in ("received", "seen", "unbiased"))
    assert torch.equal(received[0], model.pos_embed[0])
    assert torch.equal(seen[0], plain(model.blocks[0].norm1, model.pos_embed)[0])
    assert torch.equal(seen[1:], received[1:])
    assert torch.allclose(unbiased[0] + model.blocks[0].norm1.bias, seen[0], atol=1e-6)
    assert torch.allclose(unbiased[1] + model.lape.norms["1"].bias, seen[1], atol=1e-6)
    assert lape.correlation(model).shape == (3, 16, 16)
    assert token_and_position(model, image(model)).scale.shape == (3,)
    folded = lape.fold_(copy.deepcopy(model))
    assert torch.allclose(lape.positions(folded), received, atol=1e-6)
    if join == "MPVG":
        assert torch.allclose(lape.last_position(folded), lape.last_position(model), atol=1e-6)
    else:
        with pytest.raises(lape.LapeError, match="only join='MPVG' does"):
            lape.last_position(model)


@pytest.mark.parametrize("join", ["PVG", "MPVG"])
def test_block_0_is_watched_where_basic_adds_its_position(join):
    """Equation 7 in block 0, its position being in the tokens that enter; the two terms' sum in those behind it."""
    model = lape.apply_(make(), join)
    shake_position(model)
    x = image(model)
    received, whole_of = lape.positions(model), []
    model.blocks[0].register_forward_pre_hook(lambda _module, args: whole_of.append(args[0]))
    for block in model.blocks[1:]:
        block.norm1.register_forward_hook(lambda _module, _args, output: whole_of.append(output))
    found = token_and_position(model, x)
    for layer, whole in enumerate(whole_of):
        ratio = received[layer].std(-1, correction=0) / whole.std(-1, correction=0)
        assert found.scale[layer].item() == pytest.approx(ratio.mean().item(), rel=1e-4)


def test_another_size_at_load_and_at_run_time():
    model, other = lape.apply_(make(dynamic_img_size=True), "MPVG"), lape.apply_(make(dynamic_img_size=True), "MPVG")
    x = torch.randn(2, 3, 24, 20)
    other.set_input_size(img_size=(24, 20))
    with torch.no_grad():
        assert torch.allclose(model(x), other(x), atol=1e-5)
    assert dict(other.named_parameters())["pos_embed"].shape == (1, 30, 32)  # the one table, of the new grid


def test_a_warm_start_is_the_host_at_first():
    model, original = lape.apply_(make(), "MPVG", warm_start=True), make()
    x = image(model)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize(
    ("join", "kwargs", "reason"),
    [
        ("PVG", {"class_token": True, "global_pool": "token"}, "reads a class token.*class_token=False"),
        ("MPVG", {"class_token": True, "global_pool": "token"}, "reads a class token.*class_token=False"),
        ("MPVG", {"fc_norm": True}, "none before it pools.*fc_norm=False"),
        ("PVG", {"reg_tokens": 2, "pool_include_prefix": True}, "its pooling is not known"),
    ],
)
def test_refused_with_the_reason(join, kwargs, reason):
    model = make(**kwargs)
    keys = list(model.state_dict())
    with pytest.raises(lape.UnsupportedModelError, match=reason):
        lape.apply_(model, join)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["cait_xxs24_224"])
def test_class_attention_reads_a_class_token(name):
    model = timm.create_model(name, depth=1, embed_dim=32, num_heads=2, depth_token_only=1, img_size=32)
    with pytest.raises(lape.UnsupportedModelError, match="reads a class token"):
        lape.apply_(model, "PVG")


@pytest.mark.parametrize("name", ["cvt_2_4_32", "cct_2_3x2_32"])
def test_sequence_pooling_reads_the_last_position(name):
    model = lape.create_model(name, "MPVG", img_size=16).eval()
    shake_position(model)
    x = torch.randn(2, 3, 16, 16)
    seen = []
    model.seq_pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inside = []
    model.norm.register_forward_pre_hook(lambda norm, args: inside.append(plain(norm, args[0])))
    model(x)
    assert torch.allclose(seen[0], inside[0] + lape.last_position(model), atol=1e-6)
    with pytest.raises(lape.UnsupportedModelError, match="reads a class token"):
        lape.create_model("vit_lite_2_4_32", "MPVG", img_size=16)
