"""timm's hosts whose table or blocks are of a kind of their own: PiT, Qwen3-ViT, factorized tables, side by side."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import assert_host_keys, assert_same_structure, of_position, plain
from timm.models.vision_transformer import ParallelThingsBlock
from timm.optim import create_optimizer_v2
from zoo import NARROW, ON_4

import lape
from lape.convert.converted import conversion_of

_PIT = {"img_size": 40, "patch_size": 8, "stride": 4, "base_dims": (16, 16, 16), "depth": (1, 2, 1)}
HOSTS = {  # name, arguments, prefix tokens, of which have no row, image
    "PiT": ("pit_ti_224", {**_PIT, "heads": (1, 2, 2), "num_classes": 5}, 1, 1, (40, 40)),
    "PiT distilled": ("pit_ti_distilled_224", {**_PIT, "heads": (1, 2, 2), "num_classes": 5}, 2, 2, (40, 40)),
    "Qwen3-ViT": ("qwen3_vit_88m", {**ON_4, "pos_embed_grid_size": 4}, 0, 0, (16, 16)),
    "Qwen3-ViT, merging": ("qwen3_vit_88m_merge", {**ON_4, "pos_embed_grid_size": 4}, 0, 0, (16, 16)),
    "side by side": ("vit_tiny_patch16_224", {**ON_4, "block_fn": ParallelThingsBlock}, 1, 0, (16, 16)),
    "factorized": (
        "naflexvit_base_patch16_parfac_gap",
        {**NARROW, "patch_size": 4, "pos_embed_grid_size": (4, 4)},
        *(4, 4, (16, 16)),
    ),
}
CASES = [
    (host, join, pe)
    for host in HOSTS
    for join in ("basic", "share", "unshare", "LaPE-sharing", "LaPE")
    for pe in (None, "learnable")
    if not (pe and join == "basic" and host[:3] in ("PiT", "fac"))
    and not (host == "side by side" and join in ("share", "unshare"))
]


def make(host: str) -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(HOSTS[host][0], **HOSTS[host][1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def image(host: str) -> torch.Tensor:
    return torch.randn(2, 3, *HOSTS[host][4])


def raw_rows(model: torch.nn.Module, host: str, new: bool) -> torch.Tensor:
    state = {name.removeprefix("encoder."): tensor for name, tensor in model.state_dict().items()}
    if new and "lape.table_0" in state:
        return state["lape.table_0"]
    if host == "factorized":
        rows, columns = state["embeds.pos_embed_y"][0], state["embeds.pos_embed_x"][0]
        return torch.stack([rows[i // 4] + columns[i % 4] for i in range(16)])[None]
    table = state["pos_embed"]
    return table.flatten(2).mT if table.ndim == 4 else table


@pytest.mark.matrix
@pytest.mark.parametrize(("host", "join", "pe"), CASES)
def test_five_equalities(host, join, pe, tmp_path):
    name, arguments, prefix, bare, _ = HOSTS[host]
    model, original, x = make(host), make(host), image(host)
    with torch.no_grad():
        before = original(x)
        lape.apply_(model, join, pe)
        assert_host_keys(model, original, parameters=not (pe and host[:3] in ("PiT", "fac")))
        done = lape.describe(model)
        assert (done.prefix_tokens, done.positioned_prefix_tokens) == (prefix, prefix - bare)
        for key, parameter in model.named_parameters():
            if "lape." in key or "pos_embed" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        converted = model(x)
        if join == "LaPE":
            assert_norms_return_the_formula(copy.deepcopy(model).double(), host, x.double(), new=pe is not None)
        others = [lape.fold_(copy.deepcopy(model)), copy.deepcopy(model)]
        if host != "side by side":  # not made by a name and plain values
            others.append(lape.load(lape.save(model, tmp_path / "model", name=name, **arguments)))
        for other in others:
            assert (other(x) - converted).abs().max() <= 1e-5 * converted.abs().max()
        lape.remove_(model)
        assert_same_structure(model, original)
        model.load_state_dict(original.state_dict())
        assert torch.equal(model(x), before)


def assert_norms_return_the_formula(model, host, x, new) -> None:
    """y_l = LN_l(x_l) + P_(l+1); where a stage of PiT begins, P goes through the convolution as the tokens do."""
    conversion, seen = conversion_of(model), []
    anatomy, state = conversion.anatomy, lape.to_reference_state_dict(model)
    norms = [getattr(anatomy.root.get_submodule(path), anatomy.norm) for path in anatomy.blocks]
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, y: seen.append((plain(norm, *args), y)))
    model(x)
    p, bare = raw_rows(model, host, new), HOSTS[host][3]
    for path, norm, (alone, y) in zip(anatomy.blocks, norms, seen, strict=True):
        pool = f"{path.rpartition('.blocks')[0]}.pool"
        if path.endswith(".blocks.0") and f"{pool}.conv.weight" in state:
            side = int(p.shape[1] ** 0.5)
            maps, weight, bias = (
                p.mT.unflatten(2, (side, side)),
                state[f"{pool}.conv.weight"],
                state[f"{pool}.conv.bias"],
            )
            p = F.conv2d(maps, weight, bias, stride=2, padding=1, groups=maps.shape[1]).flatten(2).mT
        gain, shift = (state[f"{conversion.path}{path}.pe_norm.{name}"] for name in ("weight", "bias"))
        p = F.layer_norm(p, p.shape[-1:], gain, shift, norm.eps)
        expected = alone + F.pad(p, (0, 0, bare, 0))
        assert (y - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("host", HOSTS)
def test_every_new_parameter_learns_and_the_optimizer_knows_it(host):
    model = lape.apply_(make(host).train())
    model(image(host)).square().sum().backward()
    new = of_position(model)
    assert len(new) == 1 + 2 * lape.describe(model).blocks
    assert all(p.grad is not None and p.grad.any() for p in new.values())
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & {id(p) for p in new.values()}


@pytest.mark.parametrize("host", ["Qwen3-ViT", "factorized"])
def test_images_of_another_size_get_the_table_as_the_host_resamples_it(host):
    model = make(host)
    expected = torch.zeros(1, 24, 32)
    if host == "factorized":
        model.embeds._apply_factorized_pos_embed(expected, [6, 4])
    else:
        expected = model.encoder._pos_embed(torch.zeros(1, 6, 4, 32))[0]
    lape.apply_(model, "share")
    assert (lape.positions(model, (24, 16))[0, -24:] - expected).abs().max() <= 1e-6
    assert model(torch.randn(2, 3, 24, 16)).isfinite().all()


def test_branches_that_read_one_stream_take_no_position_from_it():
    with pytest.raises(lape.LapeError, match=r"join='share': several attentions .* read one stream"):
        lape.apply_(make("side by side"), "share")
