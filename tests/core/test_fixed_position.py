"""Rivals whose position is no table: rotary, 2-D ALiBi and LookHere, each against its equations written out."""

import copy
import math

import pytest
import timm
import torch
from formula import TOLERANCE, assert_same_structure
from torch import Tensor
from turned import turned

import lape
from lape.core.fixed import alibi_2d, look_here

SMALL = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
KINDS = ("RoPE", "RoPE-mixed", "ALiBi-2D", "LookHere")


def build(**more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more}).eval()


def photos(height: int = 24, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def bias_of(pe: str, head: int, heads: int, layer: int, layers: int, down: int, right: int) -> float:
    """What a query adds for a key so many rows below and columns to the right of it."""
    if pe == "ALiBi-2D":
        return -(2 ** (-8 * (head + 1) / heads)) * math.hypot(down, right)
    seen = (down <= 0, down >= 0, right <= 0, right >= 0)[head % 4]  # four heads: all of them look somewhere
    return -(1.5 - layer / (layers - 1)) * 0.5 * math.hypot(down, right) if seen else -math.inf


def written_out(model: torch.nn.Module, original: torch.nn.Module, x: Tensor, pe: str, grid: tuple[int, int]) -> Tensor:
    state, prefix = lape.to_reference_state_dict(model), original.num_prefix_tokens
    with torch.no_grad():
        original.pos_embed.zero_()
    n = grid[0] * grid[1]
    h = original.patch_embed.proj(x).flatten(2).mT
    h = torch.cat([original.cls_token.expand(len(x), -1, -1), h], dim=1) if prefix else h
    for layer, block in enumerate(original.blocks):
        a, y = block.attn, block.norm1(h)
        q, k, v = (part.unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for part in a.qkv(y).chunk(3, dim=-1))
        q, k = a.q_norm(q), a.k_norm(k)
        if pe.startswith("RoPE"):
            frequencies = state.get(f"blocks.{layer}.attn.rotary_frequencies")
            q, k = (turned(part, frequencies, grid, prefix) for part in (q, k))
        logits = q @ k.mT / math.sqrt(a.head_dim)
        if not pe.startswith("RoPE"):
            for i in range(n):
                for j in range(n):
                    down, right = j // grid[1] - i // grid[1], j % grid[1] - i % grid[1]
                    for head in range(a.num_heads):
                        b = bias_of(pe, head, a.num_heads, layer, len(original.blocks), down, right)
                        logits[:, head, prefix + i, prefix + j] += b
        h = h + a.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = h + block.mlp(block.norm2(h))
    return original.forward_head(original.norm(h))


@pytest.mark.parametrize("host", [{}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("pe", KINDS)
def test_written_out_is_converted_is_folded_is_loaded_and_removed_is_the_original(pe, host, tmp_path):
    model, original = build(**host), build(**host)
    x = photos()
    lape.apply_(model, "basic", pe)
    about = lape.describe(model)
    learned = 2 * 32 if pe == "RoPE-mixed" else 0
    assert (about.joined, about.input_addition, about.position_parameters) == (2, False, learned)
    with torch.no_grad():
        expected = written_out(model, copy.deepcopy(original), x, pe, (3, 4))
        loaded = lape.load(lape.save(model, tmp_path / "m", name="vit_tiny_patch16_224", **{**SMALL, **host}))
        for got in (model, loaded, copy.deepcopy(model), lape.fold_(copy.deepcopy(model))):
            assert (got(x) - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()
        lape.remove_(model)
        assert_same_structure(model, original)
        assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("pe", KINDS)
def test_another_size_goes_on_counting(pe):
    model = lape.apply_(build(dynamic_img_size=True), "basic", pe)
    with torch.no_grad():
        expected = written_out(model, build(), photos(40, 16), pe, (5, 2))
        assert (model(photos(40, 16)) - expected).abs().max() <= 5 * TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("pe", KINDS)
def test_gradients_half_precision_and_a_block_by_hand(pe):
    model = lape.apply_(build(), "basic", pe).train()
    model(photos()).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lape." in name)
    half = copy.deepcopy(model).to(torch.bfloat16).eval()
    assert half(photos().bfloat16()).isfinite().all()
    entered: list[Tensor] = []
    model.eval()
    handle = model.blocks[1].register_forward_pre_hook(lambda _m, args: entered.append(args[0].detach()))
    left: list[Tensor] = []
    behind = model.blocks[1].register_forward_hook(lambda _m, _a, y: left.append(y.detach()))
    model(photos())
    handle.remove()
    behind.remove()
    assert torch.allclose(model.blocks[1](entered[0]), left[0], atol=1e-6)


def test_axial_rotation_knows_offsets_alone() -> None:
    """q_i . k_j after turning depends on the offset of j from i, for any q and k."""
    from lape.core.rotary import axial, patch_coordinates, rotation

    cos, sin = rotation(axial(8), patch_coordinates((4, 5)), 0)
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def at(x: Tensor, n: int) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, n], sin[:, n]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten()

    assert torch.allclose(at(q, 0) @ at(k, 6), at(q, 7) @ at(k, 13), atol=1e-5)
    assert not torch.allclose(at(q, 0) @ at(k, 6), at(q, 0) @ at(k, 7), atol=1e-3)


@pytest.mark.parametrize(
    ("heads", "directed", "last"), [(4, 4, 0.5), (6, 4, 4.0**-2), (12, 8, 4.0**-4), (16, 8, 4.0**-4)]
)
def test_heads_of_look_here(heads, directed, last):
    bias = look_here((3, 3), heads, 0, 2)
    hidden = bias.isinf().flatten(1).any(1)
    assert hidden.tolist() == [True] * directed + [False] * (heads - directed)
    assert bias.diagonal(dim1=1, dim2=2).abs().max() == 0  # a patch sees itself
    finite = bias[-1].masked_fill(bias[-1].isinf(), 0.0)
    assert finite.min().item() == pytest.approx(-1.5 * last * math.sqrt(8))
    assert look_here((3, 3), heads, 1, 2)[0, 8, 0].item() == pytest.approx(-0.5 * 0.5 * math.sqrt(8))


def test_alibi_is_alike_in_all_layers() -> None:
    assert torch.equal(alibi_2d((2, 3), 4, 0, 5), alibi_2d((2, 3), 4, 3, 5))
    assert alibi_2d((1, 2), 8, 0, 1)[:, 0, 1].tolist() == pytest.approx([-(2.0**-h) for h in range(1, 9)])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: lape.apply_(build(num_heads=2), "basic", "LookHere"), "groups of four heads"),
        (lambda: lape.apply_(build(embed_dim=24), "basic", "RoPE"), "divisible by 4"),
        (lambda: lape.apply_(build(), "LaPE", "RoPE"), "turns queries and keys.*join='basic'"),
        (lambda: lape.apply_(build(), "LaPE", "ALiBi-2D"), "join='basic'"),
        (
            lambda: lape.apply_(timm.create_model("beit_base_patch16_224", depth=1), "basic", "RoPE"),
            "keeps its relative",
        ),
        (
            lambda: lape.apply_(timm.create_model("cait_xxs24_224", depth=1), "basic", "RoPE"),
            "has no blocks.0.attn.q_norm: use",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(call, text):
    with pytest.raises(lape.LapeError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("pe", ["ALiBi-2D", "LookHere"])
def test_given_biases_are_shown_and_drawn(pe, tmp_path):
    from lape.look.figures import visualize
    from lape.look.options import DrawOptions

    model = lape.create_model("vit_tiny_patch16_224", "basic", pe, **SMALL)
    assert lape.position_bias(model).shape == (2, 4, 12, 12)
    files = visualize(lape.save(model, tmp_path / "m"), tmp_path / "pictures", DrawOptions())
    assert files
