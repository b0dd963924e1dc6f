"""CeiT: stem, LeFF and LCA against their equations, the published sizes, and what timm and lape expect of a model."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import MEANINGFUL, TOLERANCE, assert_same_structure, shake_position
from training import tiny

import lape
import lape.models
from lape.models.ceit import LeFF
from lape.recipe import Recipe
from lape.train.evaluate import evaluate_checkpoint
from lape.train.loop import train

NAME = "ceit_tiny_patch16_224"
SMALL = {"img_size": (32, 48), "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def make(**kwargs) -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(NAME, **{**SMALL, **kwargs})
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor).abs() if "running_var" in name else torch.randn_like(tensor) / 10)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "count", "published"), [(NAME, 6_356_904, 6.4), ("ceit_small_patch16_224", 24_204_840, 24.2)]
)
def test_the_published_number_of_parameters(name, count, published):
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert round(count / 1e6, 1) == published
    assert model.default_cfg["architecture"] == name
    assert model.blocks[0].norm1.eps == 1e-6
    assert model.pos_embed.requires_grad
    assert not model.pos_layer_embed.any()


def batch_normed(bn: torch.nn.BatchNorm2d, y: torch.Tensor) -> torch.Tensor:
    """With the running statistics; channels last."""
    return (y - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias


def test_leff_is_its_equations_and_the_class_token_passes_by():
    leff = make().blocks[0].mlp
    x = torch.randn(2, 7, 32)
    y = batch_normed(leff.bn1, x[:, 1:] @ leff.conv1.weight[:, :, 0, 0].T + leff.conv1.bias)
    padded = F.pad(F.gelu(y).reshape(2, 2, 3, -1), (0, 0, 1, 1, 1, 1))
    kernel = leff.conv2.weight[:, 0]  # (H, 3, 3)
    neighbours = sum(padded[:, i : i + 2, j : j + 3] * kernel[:, i, j] for i in range(3) for j in range(3))
    y = F.gelu(batch_normed(leff.bn2, neighbours.reshape(2, 6, -1) + leff.conv2.bias))
    y = batch_normed(leff.bn3, y @ leff.conv3.weight[:, :, 0, 0].T + leff.conv3.bias)
    assert torch.equal(leff(x)[:, 0], x[:, 0])
    assert (leff(x)[:, 1:] - y).abs().max() < 1e-5
    with pytest.raises(RuntimeError):  # of another grid
        leff(torch.randn(1, 10, 32))
    assert isinstance(leff, LeFF)


def test_layer_wise_class_token_attention_is_its_equations():
    model = make(depth=3)
    left = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _a, output: left.append(output[:, 0]))
    x = torch.randn(2, 3, 32, 48)
    features = model.forward_features(x)
    tokens = torch.stack(left, 1) + model.pos_layer_embed
    lca = model.lca
    q, k, v = lca.attn.qkv(lca.norm1(tokens)).chunk(3, -1)
    heads = []
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        logits = (q[:, -1:, part] * k[:, :, part]).sum(-1) / math.sqrt(16)  # the last layer's class token asks
        heads.append((logits.softmax(-1)[..., None] * v[:, :, part]).sum(1))
    y = tokens[:, -1] + lca.attn.proj(torch.cat(heads, -1))
    y = y + lca.mlp.fc2(F.gelu(lca.mlp.fc1(lca.norm2(y))))
    assert (features[:, 0] - model.norm(y)).abs().max() < 1e-5
    assert torch.equal(model.head(features[:, 0]), model(x))


def test_the_stem_quarters_the_image():
    embed = make().patch_embed
    x = torch.randn(1, 3, 32, 48)
    convolution, norm, _ = embed.backbone
    y = F.max_pool2d(norm(F.conv2d(x, convolution.weight, stride=2, padding=3)), 3, 2, 1)
    assert y.shape == (1, 64, 8, 12)
    assert torch.allclose(embed(x), F.conv2d(y, embed.proj.weight, embed.proj.bias, stride=4).flatten(2).mT, atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(("join", "pe"), MEANINGFUL)
def test_every_join_and_kind(join, pe, tmp_path):
    model, original = make(), make()
    x = torch.randn(2, 3, 32, 48)
    before = original(x)
    lape.apply_(model, join, pe)
    shake_position(model)
    expected = model(x)
    tolerance = 2 * TOLERANCE * expected.abs().max()
    assert (lape.fold_(copy.deepcopy(model))(x) - expected).abs().max() <= tolerance
    loaded = lape.load(lape.save(model, tmp_path / "model", name=NAME, **SMALL))
    assert (loaded(x) - expected).abs().max() <= tolerance
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    lape.remove_(model)
    if pe == "learnable":
        model.load_state_dict(original.state_dict(), strict=True)
    assert_same_structure(model, original)
    assert torch.equal(model(x), before)


def test_what_timm_expects_of_a_model():
    assert {NAME, "ceit_small_patch16_224"} <= set(timm.list_models("ceit_*"))
    model = make()
    x = torch.randn(2, 3, 32, 48)
    features, maps = model.forward_intermediates(x, indices=[0], norm=True)
    assert torch.equal(features, model.forward_features(x))
    ((from_timm, prefix),) = model.forward_intermediates(
        x, indices=[0], norm=True, intermediates_only=True, return_prefix_tokens=True
    )
    assert torch.equal(maps[0], from_timm)
    assert prefix.shape == (2, 1, 32)
    named = model.forward_intermediates(x, output_dict=True, return_prefix_tokens=True, output_fmt="NLC")
    assert {key: len(value) for key, value in named.items()} == {
        "image_features": 2,
        "image_intermediates": 2,
        "image_intermediates_prefix": 2,
    }
    assert (model(x, attn_mask=torch.zeros(1, 1, 7, 7)) - model(x)).abs().max() < 1e-5
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.set_input_size((16, 64))
    assert model(torch.randn(1, 3, 16, 64)).shape == (1, 3)
    getter = timm.create_model(NAME, features_only=True, out_indices=(0,), **{**SMALL, "depth": 3})
    assert [y.shape for y in getter(x)] == [(2, 32, 2, 3)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 40}, r"images of 40 x 40 pixels do not divide.*multiples of 16"),
        ({"patch_size": 8}, "patch_size=8.*16 pixels only"),
        ({"class_token": False, "global_pool": "avg"}, "class_token=False: CeiT has class_token=True only"),
        ({"reg_tokens": 2}, "reg_tokens=2"),
        ({"dynamic_img_size": True}, "dynamic_img_size=True"),
        ({"pretrained": True}, "has no pretrained weights: leave pretrained=True out"),
    ],
)
def test_wrong_use_is_one_line(kwargs, message):
    with pytest.raises(lape.LapeError, match=message):
        lape.create_model(NAME, **{**SMALL, **kwargs})


def test_images_of_another_size_are_refused():
    with pytest.raises(lape.LapeError, match=r"images of 32 x 32 pixels were given, the model is for 32 x 48"):
        make()(torch.randn(1, 3, 32, 32))
    with pytest.raises(lape.LapeError, match="patch_size=8"):
        make().set_input_size(patch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pe"), [(NAME, "learnable"), ("t2t_vit_7", "1D_sin")])
def test_trained_by_a_recipe_and_evaluated_from_its_file(name, pe, tmp_path):
    kwargs = {"embed_dim": 16, "depth": 1, "num_heads": 1}
    recipe = tiny(model=name, pe=pe, model_kwargs=kwargs, input_size=32, output_dir=str(tmp_path))
    result = train(recipe, say=lambda _text: None)
    path = str(tmp_path / "checkpoint.pth")
    found = evaluate_checkpoint(Recipe(eval=True, resume=path, num_workers=0), say=lambda _text: None)
    assert found.acc1 == result.accuracy
    finer = train(
        recipe.replace(output_dir="", finetune=path, input_size=48), say=lambda _text: None
    )  # the table is resampled from 2 x 2 to 3 x 3
    assert lape.grid(finer.model) == (3, 3)
