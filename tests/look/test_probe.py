"""What is watched while a model looks at images: attention, token statistics, probes; for every host."""

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lape
from lape.look.probe import attention, attention_distance, last_norm, rollout, token_and_position, where_am_i
from lape.look.watch import _Weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}


def model_with(
    join: str = "LaPE", pe: str = "learnable", name: str = "vit_tiny_patch16_224", **kw: object
) -> nn.Module:
    torch.manual_seed(0)
    return lape.create_model(name, join, pe, **{**SMALL, **kw}).train()


def photos(count: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pe", ["learnable", "2D_RPE"])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_what_the_blocks_compute(pe: str, fused: bool) -> None:
    """Rebuilt from the weights: softmax(q k^T / sqrt(d) + bias) of what the attention module was given."""
    model = model_with("LaPE", pe).eval()
    given: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = fused
        block.attn.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    found = attention(model, photos())
    assert found.shape == (3, 3, 2, 17, 17)
    assert torch.allclose(found.sum(-1), torch.ones(3, 3, 2, 17), atol=1e-5)
    bias = F.pad(lape.position_bias(model).detach(), (1, 0, 1, 0)) if pe == "2D_RPE" else torch.zeros(3, 1, 1, 1)
    for layer, (block, x) in enumerate(zip(model.blocks, given, strict=True)):
        q, k, _ = block.attn.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        assert torch.allclose(found[layer], (q @ k.mT / 4 + bias[layer]).softmax(-1), atol=1e-5)


@pytest.mark.parametrize("how", [{"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.eye(5, dtype=torch.bool)}])
def test_weights_are_those_that_torch_attends_with(how: dict[str, Any]) -> None:
    """Also of queries that share keys: their product with the values is what torch's attention gives."""
    seen: list[torch.Tensor] = []
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    with _Weights(seen.append):
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **how)
    torch.testing.assert_close(seen[0] @ value.repeat_interleave(2, dim=1), out, rtol=1e-5, atol=1e-5)


def test_watching_changes_nothing() -> None:
    model = model_with(drop_rate=0.5)
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    for watch in (attention, rollout, token_and_position, where_am_i, last_norm):
        first, second = (str(watch(model, photos())) for _ in range(2))
        assert first == second  # no dropout while watching
    assert [module.training for module in model.modules()] == modes
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def test_attention_of_other_hosts() -> None:
    torchvision = pytest.importorskip("torchvision.models")
    model = lape.apply_(
        torchvision.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4)
    )
    found = attention(model, photos())
    assert found.shape == (2, 3, 2, 17, 17)
    assert torch.allclose(found.sum(-1), torch.ones(2, 3, 2, 17), atol=1e-5)
    transformers = pytest.importorskip("transformers")
    for how in ("sdpa", "eager"):
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
        config._attn_implementation = how
        hf = lape.apply_(transformers.ViTModel(config))
        found = attention(hf, photos())
        assert found.shape == (2, 3, 2, 17, 17)
        assert torch.allclose(found.sum(-1), torch.ones(2, 3, 2, 17), atol=1e-5)
        assert token_and_position(hf, photos()).scale.shape == (2,)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "samvit_base_patch16"])
def test_attention_of_models_that_are_not_converted(name: str) -> None:
    """Rotary with registers, with a relative bias, and with images and heads merged."""
    timm = pytest.importorskip("timm")
    kwargs = {"global_attn_indexes": (0, 1, 2)} if "sam" in name else {}
    model = timm.create_model(name, **SMALL, **kwargs)
    found, first = attention(model, photos()), attention(model, photos()[:1])
    tokens = 16 + getattr(model, "num_prefix_tokens", 0)
    assert found.shape == (3, 3, 2, tokens, tokens)
    assert torch.allclose(found.sum(-1), torch.ones(3, 3, 2, tokens), atol=1e-5)
    assert torch.allclose(found[:, :1], first, atol=1e-5)  # each image by itself
    assert attention_distance(model, photos()).shape == (3, 2)
    assert torch.allclose(rollout(model, photos()).sum((-2, -1)), torch.ones(3), atol=1e-5)


def test_conversion_does_not_change_what_is_read() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    before = attention(model, photos())
    assert torch.equal(attention(lape.apply_(model, "basic"), photos()), before)


def test_attention_over_channels_is_none_between_tokens() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("xcit_nano_12_p8_224", img_size=32, embed_dim=32, depth=2, num_heads=2)  # 16 each
    with pytest.raises(lape.UnsupportedModelError, match="XCA attends over channels"):
        attention(model, photos())


def test_of_a_block_that_attends_twice_the_first_counts() -> None:
    model = model_with()
    once = attention(model, photos())
    attend = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda x, **how: attend(attend(x, **how), **how)
    twice = attention(model, photos())
    assert torch.equal(twice[:2], once[:2])
    assert twice.shape == once.shape


def uniform(model: nn.Module) -> nn.Module:
    """Attention of equal weights: queries are zero."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:32] = 0
            block.attn.qkv.bias[:32] = 0
    return model


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 56)])
def test_distance_of_uniform_attention_is_the_mean_distance(height: int, width: int) -> None:
    model = uniform(model_with(name="deit_tiny_distilled_patch16_224", img_size=(height, width)))
    place = torch.cartesian_prod(torch.arange(height // 8), torch.arange(width // 8)).float() * 8
    expected = torch.cdist(place, place).mean().item()
    found = attention_distance(model, photos(18, height, width))
    assert found.shape == (3, 2)
    assert found.flatten().tolist() == pytest.approx([expected] * 6, rel=1e-5)


@pytest.mark.parametrize(("patch", "image"), [((4, 16), (16, 32)), ((16, 4), (32, 16))])
def test_distance_counts_the_sides_of_a_patch_that_is_no_square(patch: tuple[int, int], image: tuple[int, int]) -> None:
    model = uniform(model_with(patch_size=patch, img_size=image))
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float() * torch.tensor(patch)
    expected = torch.cdist(place, place).mean().item()
    assert attention_distance(model, photos(2, *image)).flatten().tolist() == pytest.approx([expected] * 6, rel=1e-5)


def test_rollout_of_uniform_attention_is_uniform_and_sums_to_one() -> None:
    found = rollout(uniform(model_with()), photos())
    assert found.shape == (3, 4, 4)
    assert torch.allclose(found, torch.full_like(found, 1 / 16), atol=1e-6)
    pooled = rollout(model_with(class_token=False, global_pool="avg"), photos())
    assert torch.allclose(pooled.sum((-2, -1)), torch.ones(3), atol=1e-5)


def test_rollout_multiplies_the_layers() -> None:
    model = model_with()
    step = [(a.mean(1) + torch.eye(17)) / 2 for a in attention(model, photos())]
    row = (step[2] @ step[1] @ step[0])[:, 0, 1:]
    assert torch.allclose(rollout(model, photos()).flatten(1), row / row.sum(-1, keepdim=True), atol=1e-6)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_ratio_of_basic_in_the_first_layer_is_equation_7() -> None:
    model = model_with("basic").eval()
    entering: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    model(photos())
    w, x = model.pos_embed[:, 1:], entering[0][:, 1:]
    expected = (w.std(-1, correction=0) / x.std(-1, correction=0)).mean().item()
    entering.clear()
    found = token_and_position(model, photos())
    assert found.scale[0].item() == pytest.approx(expected, rel=1e-4)
    y, p = model.blocks[0].norm1(x), model.blocks[0].norm1(w).expand_as(x)
    each = [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(y.flatten(0, 1), p.flatten(0, 1), strict=True)]
    assert found.correlation[0].item() == pytest.approx(torch.stack(each).mean().item(), abs=1e-5)


@pytest.mark.parametrize("join", ["basic", "share", "unshare", "LaPE-sharing", "LaPE"])
def test_ratios_of_every_join(join: str) -> None:
    found = token_and_position(model_with(join), photos())
    assert found.scale.shape == found.correlation.shape == (3,)
    assert (found.scale > 0).all()
    assert (found.correlation.abs() <= 1).all()
    if join.startswith("LaPE"):  # two independent terms of deviation 1
        assert found.scale[0].item() == pytest.approx(1 / math.sqrt(2), abs=0.05)


def test_position_alone_tells_where() -> None:
    """Tokens without an image: with a position row and column are read exactly, without one not at all."""
    blank = torch.zeros(4, 3, 32, 32)
    assert where_am_i(model_with("basic", "2D_sin"), blank, ridge=1e-9)[0].tolist() == pytest.approx([1, 1], abs=1e-3)
    lape_model = model_with("LaPE", "2D_sin")
    assert where_am_i(lape_model, blank)[0].tolist() == pytest.approx([0, 0], abs=1e-3)  # P is not in the stream
    assert where_am_i(lape_model, blank, "seen", ridge=1e-9)[0].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert where_am_i(model_with("basic", "none"), blank)[0].tolist() == pytest.approx([0, 0], abs=1e-3)
    line = where_am_i(model_with("basic", "2D_sin", img_size=(8, 32)), torch.zeros(2, 3, 8, 32))
    assert line[:, 0].isnan().all()


@pytest.mark.parametrize("what", ["stream", "seen"])
def test_a_ridge_pulls_the_probe_to_the_middle_of_the_grid(what: Literal["stream", "seen"]) -> None:
    """Without an image every token is a row of the table: R^2 falls from 1 to 0 as the ridge grows."""
    blank = torch.zeros(2, 3, 32, 32)
    model = model_with("basic", "2D_sin")
    scores = [where_am_i(model, blank, what, ridge=ridge)[0] for ridge in (1e-9, 1.0, 1e9)]
    assert scores[0].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert ((scores[1] > 0.01) & (scores[1] < 0.99)).all()
    assert scores[2].tolist() == pytest.approx([0, 0], abs=1e-3)


def test_last_norm() -> None:
    model = model_with(pre_norm=True)  # a norm before the blocks is not it
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
        model.norm.bias.copy_(torch.arange(32.0))
    found = last_norm(model, photos(18))
    assert torch.equal(found.weight, model.norm.weight)  # type: ignore[arg-type]
    assert found.bias_variance == pytest.approx((32**2 - 1) / 12)
    assert found.cosine.shape == (18, 17)
    assert found.length_before.shape == found.length_after.shape == (18, 4, 4)
    with pytest.raises(lape.LapeError, match="norms its pooled features"):
        last_norm(model_with(global_pool="avg", class_token=False, fc_norm=True), photos())


# --- wrong use --------------------------------------------------------------------------------------------------------


def test_wrong_use_is_one_line() -> None:
    model = model_with()
    for watch in (attention, rollout, token_and_position, where_am_i, last_norm, attention_distance):
        for images in (photos(3, 16, 16), photos(3)[0], photos(0)):
            with pytest.raises(lape.LapeError) as caught:
                watch(model, images)
            assert "\n" not in str(caught.value)
        with pytest.raises(lape.LapeError, match=r"not converted|no stack of equal blocks"):
            watch(nn.Linear(2, 2), photos())
    with pytest.raises(lape.LapeError, match="2 or more"):
        where_am_i(model, photos(1))
    with pytest.raises(lape.LapeError, match="'stream' and 'seen'"):
        where_am_i(model, photos(), "all")  # type: ignore[arg-type]
    with pytest.raises(lape.LapeError, match="position_bias"):
        token_and_position(model_with("LaPE", "2D_RPE"), photos())


class Odd(nn.Module):
    """Attention by none of torch's functions."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: object) -> torch.Tensor:
        return x.mean(1, keepdim=True).expand_as(x)


def test_attention_that_cannot_be_watched_is_said() -> None:
    model = model_with()
    model.blocks[1].attn = Odd()
    with pytest.raises(lape.LapeError, match="2 of 3 layers"):
        attention(model, photos())
