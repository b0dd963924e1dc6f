"""Conversion of every host and join: the five equalities, undoing, refusing, copying, compiling, training."""

import copy
import io
import itertools
import pickle

import pytest
import timm
import torch
from formula import (
    ANYWHERE,
    MEANINGFUL,
    TOLERANCE,
    assert_host_keys,
    assert_same_structure,
    hosts_with,
    shake_position,
    written_out,
)
from processes import ends_well, python
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import HOSTS, TINY, image, make

import lape
from lape.convert.ways import norm_like
from lape.core.position import KINDS

WHOLE = ("plain", "distilled", "registers without rows", "7 x 3 grid")  # hosts that meet every join and kind
RIGHT = {*MEANINGFUL, *(("basic", pe) for pe in ("PEG", "PEG-6", "own", "RoPE", "RoPE-mixed", "ALiBi-2D", "LookHere"))}


@pytest.mark.matrix
@pytest.mark.parametrize(("join", "pe", "host"), hosts_with(MEANINGFUL, HOSTS, WHOLE))
def test_five_equalities(host, join, pe, tmp_path):
    """written out = converted = folded = saved and loaded; removed = original, bit for bit."""
    model, original = make(host), make(host)
    x = image(model)
    before = original(x)
    assert lape.apply_(model, join, pe) is model
    assert_host_keys(model, original, parameters=KINDS[pe].is_table)
    shake_position(model)
    name, extra = HOSTS[host]
    with torch.no_grad():
        converted = model(x)
        expected = written_out(model, original, x, join, pe)
        folder = lape.save(model, tmp_path / "model", name=name, **{**TINY, **extra})
        loaded = lape.load(folder)
        folded = lape.fold_(copy.deepcopy(model))
        folded_loaded = lape.load(lape.save(folded, tmp_path / "folded", name=name, **{**TINY, **extra}))
    assert torch.equal(folded_loaded(x), folded(x))
    scale = expected.abs().max()
    for what, got in {"converted": converted, "loaded": loaded(x), "folded": folded(x)}.items():
        assert (got - expected).abs().max() <= TOLERANCE * scale, what
    lape.remove_(model)
    if pe == "learnable":  # the trained table stays the model's; put the original's back to compare all numbers
        assert_same_structure(model, original)
    with torch.no_grad():
        model.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(model(x), before)


@pytest.mark.matrix
@pytest.mark.parametrize(("join", "pe", "host"), hosts_with([(j, None) for j in ANYWHERE] + MEANINGFUL, HOSTS, WHOLE))
def test_removed_is_the_original_bit_for_bit(host, join, pe):
    model, original = make(host), make(host)
    lape.remove_(lape.apply_(model, join, pe))
    assert_same_structure(model, original)
    for key, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    x = image(model)
    assert torch.equal(model(x), original(x))
    lape.apply_(model, join, pe)  # and it can be applied again


def test_a_model_without_a_table_of_its_own():
    model = make(pos_embed="none")
    with pytest.raises(lape.LapeError, match=r"no position table of its own.*pe='learnable'"):
        lape.apply_(model, "LaPE")
    lape.apply_(model, "LaPE", "2D_sin")
    assert not torch.equal(lape.positions(model), torch.zeros(()))
    lape.remove_(model)
    assert_same_structure(model, make(pos_embed="none"))
    lape.apply_(model, "basic", "learnable")
    assert lape.describe(model).input_addition
    lape.remove_(model)
    assert_same_structure(model, make(pos_embed="none"))


def test_names_are_matched_without_case_and_unknown_ones_are_listed():
    assert lape.describe(lape.apply_(make(), "lape", "LEARNABLE")).join == "LaPE"
    with pytest.raises(
        lape.LapeError,
        match=r"unknown join 'LaP': known are basic, share, unshare, beside, LaPE-sharing, LaPE, PVG, MPVG",
    ):
        lape.apply_(make(), "LaP")
    with pytest.raises(lape.LapeError, match=r"unknown pe '3D_sin': known are .*1D_sin"):
        lape.apply_(make(), "LaPE", "3D_sin")


@pytest.mark.parametrize(
    ("join", "pe"),
    sorted(set(itertools.product(ANYWHERE, KINDS)) - RIGHT),
    ids=lambda name: name,
)
def test_meaningless_combinations_are_refused_by_name_and_change_nothing(join, pe):
    model, original = make(), make()
    with pytest.raises(lape.LapeError, match=f"join='{join}' with pe='{pe}'.*use join="):
        lape.apply_(model, join, pe)
    assert_same_structure(model, original)


def test_twenty_one_combinations_have_a_meaning():
    assert len(MEANINGFUL) == 6 + 5 + 5 + 2 + 2 + 1


REFUSED = {
    "post-norm": (
        lambda: timm.create_model("vit_tiny_patch16_224", block_fn=post_norm(), **TINY),
        "ResPostBlock.*behind",
    ),
    "no transformer": (lambda: timm.create_model("resnet18"), "ResNet is not a supported model.*register_host"),
    "windows": (
        lambda: timm.create_model("swinv2_tiny_window8_256", depths=(1, 1, 1, 1)),
        "SwinTransformerV2Block.*behind",
    ),
    "dropped patches": (lambda: make(patch_drop_rate=0.5), "patch_drop_rate"),
    "two models": (lambda: torch.nn.ModuleList([make(), make()]), "holds 2 convertible models"),
    "no norm": (lambda: make(norm_layer=torch.nn.Identity), "Identity: the norm before attention must be"),
}


def post_norm():
    from timm.models.vision_transformer import ResPostBlock

    return ResPostBlock


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_converted_are_refused_with_the_reason_and_unchanged(name):
    build, reason = REFUSED[name]
    model = build()
    state = copy.deepcopy(model.state_dict())
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(lape.UnsupportedModelError, match=reason):
        lape.apply_(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())


def test_applying_twice_and_removing_twice_are_refused():
    model = lape.apply_(make())
    keys = list(model.state_dict())
    with pytest.raises(lape.LapeError, match=r"converted already .*remove_"):
        lape.apply_(model, "share")
    assert list(model.state_dict()) == keys
    lape.remove_(model)
    with pytest.raises(lape.LapeError, match="not converted"):
        lape.remove_(model)


def test_the_one_model_inside_another_is_converted():
    outer = torch.nn.Sequential(make(), torch.nn.Softmax(-1))
    lape.apply_(outer)
    assert lape.describe(outer).joined == 3
    assert torch.equal(outer(torch.ones(1, 3, 16, 16)), outer[0](torch.ones(1, 3, 16, 16)).softmax(-1))


# --------------------------------------------------------------------- copies, checkpointing, compiling, training


@pytest.mark.parametrize(("join", "pe"), MEANINGFUL)
def test_copies_after_a_forward_are_whole_and_independent(join, pe):
    model = lape.apply_(make("distilled"), join, pe)
    shake_position(model)
    x = image(model)
    before = model(x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(x), before)
        assert lape.describe(twin) == lape.describe(model)
        lape.remove_(twin)
    if KINDS[pe].is_table:
        assert lape.positions(model).abs().max() == 0


@pytest.mark.slow
def test_a_pickle_works_in_another_process(tmp_path):
    model = lape.apply_(make())
    x = image(model)
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "model.pt")
    code = (
        "import sys, torch; d = torch.load(sys.argv[1], weights_only=False); "
        "torch.set_num_threads(1); assert torch.equal(d['model'](d['x']), d['y'])"
    )
    ends_well(python, code, str(tmp_path / "model.pt"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("join", "pe"), MEANINGFUL)
def test_activation_checkpointing_gives_the_same_gradients(join, pe, reentrant):
    model = lape.apply_(make(), join, pe)
    shake_position(model)
    x = image(model)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda h, *a, f=forward, **k: checkpoint(f, h, *a, use_reentrant=reentrant, **k)
    model(x.requires_grad_()).square().sum().backward()
    for name, gradient in expected.items():
        got = dict(model.named_parameters())[name].grad
        assert (got - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-6), name


def test_timm_grad_checkpointing_switch():
    model = lape.apply_(make())
    x = image(model)
    expected = model(x)
    model.set_grad_checkpointing(True)
    got = model.train()(x)
    assert torch.equal(got, expected)
    got.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(("join", "pe"), [("basic", None), ("share", None), ("LaPE", None), ("LaPE", "2D_RPE")])
def test_compiles_to_one_graph(join, pe):
    model = lape.apply_(make("registers without rows"), join, pe)
    x = image(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    got = compiled(x)
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.matrix
@pytest.mark.parametrize(("join", "pe", "host"), hosts_with(MEANINGFUL, HOSTS, WHOLE))
def test_every_trainable_parameter_gets_a_gradient(host, join, pe):
    model = lape.apply_(make(host), join, pe).train()
    model(image(model, 4)).square().sum().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trainable.values())
    without = {name for name, p in trainable.items() if not p.grad.any()}
    if KINDS[pe].is_bias and model.global_pool == "token":
        # The head reads prefix tokens only, and prefix tokens get no bias: the last layer's cannot matter (nor does it
        # in the reference, whose gradient there is zero too).
        assert without == {name for name in trainable if name.startswith("lape.biases.2.")}
    else:
        assert not without
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == (1 if KINDS[pe].frozen else 0)


@pytest.mark.parametrize(("join", "pe"), MEANINGFUL)
def test_weight_decay_and_layer_decay_know_the_position(join, pe):
    from timm.optim import create_optimizer_v2

    model = lape.apply_(make("distilled"), join, pe)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_position = any(word in name for word in ("pos_embed", "lape.", "_token"))
        if parameter.requires_grad and (is_position or parameter.ndim <= 1):
            assert decay[id(parameter)] == 0, name
        elif parameter.requires_grad:
            assert decay[id(parameter)] == 0.1, name
    layered = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in layered.param_groups for p in group["params"]}
    stem = scale[id(model.cls_token)]
    for name, parameter in model.named_parameters():
        if "pos_embed" in name and parameter.requires_grad:
            assert scale[id(parameter)] == stem, name


def test_tokens_without_a_row_receive_nothing():
    for host, bare in (("DeiT-III", 1), ("registers without rows", 4), ("distilled", 0), ("registers", 0)):
        model = lape.apply_(make(host))
        shake_position(model)
        received = lape.positions(model)
        prefix = lape.num_prefix_tokens(model)
        assert (received[:, :prefix] == 0).all(-1).sum(-1).tolist() == [bare] * 3
        assert (received[:, prefix:] != 0).any(-1).all()
        assert lape.describe(model).positioned_prefix_tokens == prefix - bare


def test_description_says_what_was_done():
    text = str(lape.describe(lape.apply_(make("registers without rows"))))
    for words in (
        "join=LaPE",
        "3/3 attention norms joined",
        "input addition off",
        "grid 4 x 4",
        "4 without a position",
    ):
        assert words in text
    assert "position beside it" in repr(lape.apply_(make()))
    model = lape.apply_(make())
    assert lape.describe(model).position_parameters == 17 * 32 + 3 * 2 * 32
    assert isinstance(model.blocks[0].norm1, type(make().blocks[0].norm1))


def test_folding_leaves_nothing_to_compute():
    model = lape.fold_(lape.apply_(make()))
    assert not [name for name, _ in model.named_parameters() if "lape." in name or "pos_embed" in name]
    assert lape.positions(model).shape == (3, 17, 32)
    for wrong in (lape.remove_, lape.fold_):
        with pytest.raises(lape.LapeError, match="folded"):
            wrong(model)


# --------------------------------------------------------------------- positions at any size


def test_positions_at_another_size_resample_the_raw_table_before_the_chain():
    model = lape.apply_(make(img_size=(8, 32)))
    assert lape.grid(model) == (2, 8)
    assert torch.equal(lape.positions(model, (8, 32)), lape.positions(model))
    other = lape.positions(model, 16)  # 4 x 4: as many patches as 2 x 8, and still another grid
    assert other.shape == lape.positions(model).shape
    assert not torch.allclose(other, lape.positions(model))
    assert lape.positions(model, (12, 20)).shape == (3, 1 + 15, 32)
    with pytest.raises(lape.LapeError, match="no multiple of the patch"):
        lape.positions(model, 17)


def test_what_attention_sees_of_a_position_that_shares_the_norm():
    model = lape.apply_(make(), "share")
    assert torch.equal(lape.positions(model, view="seen")[1], model.blocks[1].norm1(model.pos_embed)[0])
    model = lape.apply_(make(), "LaPE")
    assert torch.equal(lape.positions(model, view="seen"), lape.positions(model))


def test_relative_positions_are_asked_for_by_their_own_function():
    model = lape.apply_(make(), "LaPE", "2D_RPE")
    assert lape.position_bias(model).shape == (3, 2, 16, 16)
    with pytest.raises(lape.LapeError, match="position_bias"):
        lape.positions(model)
    with pytest.raises(lape.LapeError, match=r"lape\.positions"):
        lape.position_bias(lape.apply_(make()))
    with pytest.raises(lape.LapeError, match="nothing to show"):
        lape.positions(lape.apply_(make(), "basic", "none"))


@pytest.mark.parametrize("learns", [True, False])
def test_the_tables_of_unshare_learn_as_the_hosts_did(learns):
    model = make()
    model.pos_embed.requires_grad_(learns)
    lape.apply_(model, "unshare")
    tables = [parameter for name, parameter in model.named_parameters() if "table" in name or "pos_embed" in name]
    assert [table.requires_grad for table in tables] == [learns] * 3


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_mask_of_the_caller_is_kept_beside_the_bias(mask):
    model = lape.apply_(make(), "basic", "2D_RPE")
    shake_position(model)
    attention, host_attention = model.blocks[0].attn, make().blocks[0].attn
    bias = model.lape.biases[0]()
    x = torch.randn(2, 17, 32)
    allowed = torch.ones(17, 17, dtype=torch.bool).tril()
    given = allowed if mask == "bool" else torch.zeros(17, 17).masked_fill(~allowed, float("-inf"))
    expected = host_attention(x, attn_mask=bias.masked_fill(~allowed, float("-inf")))
    assert torch.equal(attention(x, attn_mask=given), expected)
    assert not torch.equal(attention(x, attn_mask=given), attention(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = lape.apply_(make("DeiT-III")).to(dtype)
    assert model(image(model).to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert lape.apply_(make())(torch.randn(1, 3, 16, 16)).isfinite().all()


def test_creating_models():
    model = lape.create_model("vit_tiny_patch16_224", "share", "2d_sin", **TINY)
    assert lape.describe(model).pe == "2D_sin"
    with pytest.raises(
        lape.LapeError, match=r"unknown model 'deit_tinny_patch16_224': did you mean 'deit_tiny_patch16_224'"
    ):
        lape.create_model("deit_tinny_patch16_224")
    with pytest.raises(lape.LapeError, match=r"65 x 65 is not divisible.*use 64"):
        lape.create_model("deit_tiny_patch16_224", img_size=65)
    with pytest.raises(lape.LapeError, match=r"takes no argument 'dpth'; did you mean 'depth'"):
        lape.create_model("deit_tiny_patch16_224", dpth=1)
    with pytest.raises(lape.UnsupportedModelError, match="ResNet is not a supported model"):
        lape.create_model("resnet18", img_size=64)  # which a ResNet does not take: not the point
    with pytest.raises(lape.UnsupportedModelError, match="ResNet"):
        lape.create_model("resnet18")


def test_saved_bytes_hold_no_module(tmp_path):
    """What is saved is tensors by name: a state dict of a converted model survives torch.save and strict loading."""
    model, twin = lape.apply_(make()), lape.apply_(make())
    shake_position(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    x = image(model)
    assert torch.equal(model(x), twin(x))


# --------------------------------------------------------------------- images of other sizes

TABLE_AND_BIAS = [(join, pe) for join, pe in MEANINGFUL if pe in ("learnable", "2D_RPE", "1D_RPE")]


@pytest.mark.parametrize(("pe", "learns"), [("learnable", True), ("2D_sin", False)])
def test_a_new_table_learns_at_another_size_as_before(pe, learns):
    model = lape.create_model("vit_tiny_patch16_224", "LaPE", pe, pos_embed="none", **TINY)
    model.set_input_size(img_size=(16, 32))
    assert model.lape.table_0.shape == (1, 1 + 4 * 8, 32)
    assert model.lape.table_0.requires_grad == learns


def test_a_norm_of_position_has_the_eps_of_the_token_norm():
    rms_norm = pytest.importorskip("transformers.models.aimv2.modeling_aimv2").Aimv2RMSNorm
    like = torch.empty(0)
    norms = (nn.LayerNorm(8, eps=0.25), nn.RMSNorm(8, eps=0.5), rms_norm(8, eps=0.125), nn.RMSNorm(8))
    assert [norm_like(norm, 8, like, "layernorm").eps for norm in norms] == [0.25, 0.5, 0.125, 1e-5]


@pytest.mark.parametrize("host", ["plain", "registers without rows"])
@pytest.mark.parametrize(("join", "pe"), TABLE_AND_BIAS)
def test_another_size_at_run_time_equals_a_model_resized_to_it(host, join, pe):
    """dynamic_img_size: the table is resampled in the forward; set_input_size: for good. And back again."""
    dynamic = lape.apply_(make(host, dynamic_img_size=True), join, pe)
    shake_position(dynamic)
    static = lape.apply_(make(host), join, pe)
    static.load_state_dict(dynamic.state_dict(), strict=True)
    native, wide = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 32)  # as many patches: only the grid differs
    at_home = static(native)
    assert torch.equal(dynamic(native), at_home)
    keys = list(static.state_dict())
    for x in (wide, torch.randn(2, 3, 24, 20)):
        resized = copy.deepcopy(static)
        resized.set_input_size(img_size=tuple(x.shape[-2:]))
        assert lape.describe(resized).grid == (x.shape[-2] // 4, x.shape[-1] // 4)
        assert list(resized.state_dict()) == keys
        expected = resized(x)
        assert (dynamic(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
        folded = lape.fold_(copy.deepcopy(resized))(x)
        assert (folded - expected).abs().max() <= TOLERANCE * expected.abs().max()
        lape.remove_(resized)
        plain = make(host)
        plain.set_input_size(img_size=tuple(x.shape[-2:]))
        assert [(k, v.shape) for k, v in resized.state_dict().items()] == [
            (k, v.shape) for k, v in plain.state_dict().items()
        ]
    assert torch.equal(dynamic(native), at_home)


def test_two_sizes_in_one_step_with_and_without_checkpointing():
    model = lape.apply_(make(dynamic_img_size=True)).train()
    shake_position(model)
    big, small = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    (model(big).square().sum() + model(small).square().sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for reentrant in (False, True):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        for block in twin.blocks:
            forward = block.forward
            block.forward = lambda h, *a, f=forward, **k: checkpoint(f, h, *a, use_reentrant=reentrant, **k)  # noqa: B023
        (twin(big).square().sum() + twin(small).square().sum()).backward()
        for name, gradient in expected.items():
            got = dict(twin.named_parameters())[name].grad
            assert (got - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-6), name


def test_two_grids_of_one_count_cannot_be_told_apart_when_recomputing():
    model = lape.apply_(make(dynamic_img_size=True)).train()
    model.set_grad_checkpointing(True)
    loss = model(torch.randn(2, 3, 16, 16)).sum() + model(torch.randn(2, 3, 8, 32)).sum()
    with pytest.raises(lape.LapeError, match="two grids of 16 patches"):
        loss.backward()


@pytest.mark.slow
def test_any_size_compiles_to_one_graph():
    model = lape.apply_(make(dynamic_img_size=True))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((16, 16), (8, 32), (24, 20)):
        x = torch.randn(2, 3, *size)
        expected = model(x)
        assert (compiled(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()


# --------------------------------------------------------------------- warm start


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("join", ["LaPE", "LaPE-sharing"])
def test_a_warm_start_is_the_host_at_first_and_learns(host, join, tmp_path):
    model, original = make(host), make(host)
    x = image(model)
    lape.apply_(model, join, warm_start=True)
    assert lape.describe(model).input_addition
    assert torch.equal(model(x), original(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the gates open in the first step, the norms behind them move in the second
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    with torch.no_grad():
        trained = model(x)
        assert not torch.equal(trained, original(x))
        received, norm = lape.positions(model)[0], model.lape.norms["0"]
        assert torch.equal(received[received.any(-1)], (model.lape.gate_0 * norm(model.pos_embed))[0])
        name, extra = HOSTS[host]
        loaded = lape.load(lape.save(model, tmp_path / "m", name=name, **{**TINY, **extra}))
        assert torch.equal(loaded(x), trained)
        folded = lape.fold_(copy.deepcopy(model))
        assert (folded(x) - trained).abs().max() <= TOLERANCE * trained.abs().max()
    lape.remove_(model)
    assert_same_structure(model, original)


def test_a_warm_start_survives_another_size():
    model, original = lape.apply_(make(), warm_start=True), make()
    for m in (model, original):
        m.set_input_size(img_size=(8, 24))
    x = torch.randn(2, 3, 8, 24)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize(("join", "pe"), [("share", None), ("basic", None), ("LaPE", "2D_sin")])
def test_a_warm_start_without_meaning_is_refused(join, pe):
    with pytest.raises(lape.LapeError, match="warm_start=True with join="):
        lape.apply_(make(), join, pe, warm_start=True)


@pytest.mark.parametrize("model", [None, "deit_tiny_patch16_224", torch.nn.Linear, 3])
@pytest.mark.parametrize("call", [lape.apply_, lape.remove_, lape.describe, lape.fold_, lape.positions])
def test_what_is_no_model_is_said_to_be_none(call, model):
    with pytest.raises(lape.LapeError, match="is not a model: give a"):
        call(model)


@pytest.mark.parametrize("size", ["x", 1.5, (1, 2, 3), (16, "x"), 0, -4, 17])
def test_what_is_no_size_is_said_to_be_none(size):
    with pytest.raises(lape.LapeError, match=r"size=.* is no .*in multiples of the patch of 4 x 4"):
        lape.positions(lape.apply_(make()), size)


@pytest.mark.parametrize("kwargs", [{"join": 3}, {"join": None}, {"join": ["LaPE"]}, {"pe": 5}])
def test_what_is_no_name_is_said_to_be_none(kwargs):
    with pytest.raises(lape.LapeError, match="is not a name: known are"):
        lape.apply_(make(), **kwargs)
