"""T2T-ViT: the T2T module against its equations, the published sizes, and what timm and lape expect of a model."""

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from formula import MEANINGFUL, TOLERANCE, assert_same_structure, shake_position

import lape
import lape.models
from lape.core.position import Layout, sin_1d
from lape.files.export import BATCH
from lape.models.t2t import TokenPerformer, TokensToToken

SMALL = {"img_size": (32, 48), "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def make(**kwargs) -> torch.nn.Module:
    torch.manual_seed(1)
    model = timm.create_model("t2t_vit_7", **{**SMALL, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "learn", "frozen", "published"),
    [("t2t_vit_7", 4_255_694, 197 * 256, 4.3), ("t2t_vit_14", 21_465_806, 197 * 384, 21.5)],
)
def test_the_published_number_of_parameters(name, learn, frozen, published):
    with torch.device("meta"):
        model = timm.create_model(name)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad is wanted) for wanted in (True, False)]
    assert counts == [learn, frozen]
    assert round(learn / 1e6, 1) == published
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert model.default_cfg["architecture"] == name
    assert model.blocks[0].attn.qkv.bias is None
    assert model.blocks[0].norm1.eps == 1e-5


def unfolded(x_BCHW: torch.Tensor, kernel: int, stride: int, pad: int) -> torch.Tensor:
    """The soft split written out: (B, N, C kernel kernel), zeros around the map."""
    padded = F.pad(x_BCHW, (pad,) * 4)
    rows, columns = ((side + 2 * pad - kernel) // stride + 1 for side in x_BCHW.shape[2:])
    windows = [
        padded[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel].flatten(1)
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(windows, dim=1)


def performed(layer: TokenPerformer, x_BND: torch.Tensor) -> torch.Tensor:
    """The performer written out, one pair of tokens at a time."""
    state = layer.state_dict()

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return y * state[f"{name}.weight"] + state[f"{name}.bias"]

    w = state["w"]

    def phi(u):
        return torch.exp(w @ u - u @ u / 2) / math.sqrt(len(w))

    width = w.shape[1]
    out = []
    for tokens in x_BND:
        kqv = linear(normed(tokens, "norm1"), "kqv")
        k, q, v = kqv[:, :width], kqv[:, width : 2 * width], kqv[:, 2 * width :]
        y = []
        for t in range(len(tokens)):
            weights = torch.stack([phi(q[t]) @ phi(k[s]) for s in range(len(tokens))])
            y.append((weights[:, None] * v).sum(0) / (weights.sum() + 1e-8))
        attended = v + linear(torch.stack(y), "proj")
        out.append(attended + linear(F.gelu(linear(normed(attended, "norm2"), "mlp.0")), "mlp.2"))
    return torch.stack(out)


def test_the_module_is_its_equations():
    torch.manual_seed(0)
    module = TokensToToken(img_size=(16, 32), in_chans=2, embed_dim=12, token_dim=8).eval()
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 2, 16, 32)
    y = performed(module.attention1, unfolded(x, 7, 4, 2))
    y = performed(module.attention2, unfolded(y.mT.reshape(2, 8, 4, 8), 3, 2, 1))
    y = unfolded(y.mT.reshape(2, 8, 2, 4), 3, 2, 1) @ module.project.weight.T + module.project.bias
    assert y.shape == (2, 2, 12)
    assert (module(x) - y).abs().max() < 1e-5
    assert torch.equal(module.train()(x) == y, torch.zeros_like(y, dtype=torch.bool))  # dropout in training


def test_random_features_are_orthogonal_frozen_and_estimate_the_exponential():
    layer = TokenPerformer(8, token_dim=64)
    assert layer.w.shape == (32, 64)
    assert torch.allclose(layer.w @ layer.w.T, 32 * torch.eye(32), atol=1e-4)
    assert "w" in layer.state_dict()
    assert "w" not in dict(layer.named_parameters())
    before = layer.w.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.w, before)
    q, k = 0.3 * torch.randn(2, 1, 4, 8)
    layer = TokenPerformer(8, token_dim=8)
    layer.w = torch.randn(200_000, 8)  # independent rows: the mean over features is the expectation
    estimate = layer.features(q) @ layer.features(k).mT
    assert (estimate - (q @ k.mT).exp()).abs().max() < 0.02


def test_the_performer_computes_in_float32_under_autocast():
    layer = TokenPerformer(8, token_dim=8).eval()
    x = torch.randn(1, 5, 8)
    seen = []
    features = layer.features
    layer.features = lambda u: seen.append(features(u)) or seen[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert [phi.dtype for phi in seen] == [torch.float32] * 2
    assert (y.float() - layer(x)).abs().max() < 0.1


def test_its_own_position_is_the_frozen_sinusoid():
    model = make()
    assert torch.equal(model.pos_embed.data, sin_1d(Layout((2, 3), 1), 32))
    assert not model.pos_embed.requires_grad
    model.init_weights()
    assert torch.equal(model.pos_embed.data, sin_1d(Layout((2, 3), 1), 32))
    lape.apply_(model)
    assert lape.describe(model).pe == "1D_sin"
    assert not model.pos_embed.requires_grad
    lape.remove_(model)
    assert not model.pos_embed.requires_grad
    with pytest.raises(lape.LapeError, match="repeat one frozen table"):
        lape.apply_(model, "unshare")


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
    loaded = lape.load(lape.save(model, tmp_path / "model", name="t2t_vit_7", **SMALL))
    assert (loaded(x) - expected).abs().max() <= tolerance
    frozen = {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert len(frozen) == (pe in ("1D_sin", "2D_sin"))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    lape.remove_(model).eval()
    assert_same_structure(model, original)
    assert torch.equal(model(x), before)


def test_what_timm_expects_of_a_model():
    assert {"t2t_vit_7", "t2t_vit_14"} <= set(timm.list_models("t2t_*"))
    model = make()
    x = torch.randn(2, 3, 32, 48)
    assert model.forward_features(x).shape == (2, 7, 32)
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.set_input_size((16, 64))
    assert model(torch.randn(1, 3, 16, 64)).shape == (1, 3)
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 40}, r"images of 40 x 40 pixels do not divide.*multiples of 16"),
        ({"img_size": 0}, "images of 0 x 0 pixels"),
        ({"patch_size": 8}, "patch_size=8.*16 pixels only"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, "does not pad"),
        ({"pretrained": True}, "t2t_vit_7 has no pretrained weights: leave pretrained=True out"),
        ({"widht": 8}, "takes no argument 'widht'"),
    ],
)
def test_wrong_use_is_one_line(kwargs, message):
    with pytest.raises(lape.LapeError, match=message):
        lape.create_model("t2t_vit_7", **{**SMALL, **kwargs})


def test_images_of_another_size_are_refused():
    with pytest.raises(lape.LapeError, match=r"images of 32 x 32 pixels were given, the model is for 32 x 48"):
        make()(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("join", ["PVG", "MPVG"])
def test_pooled_it_takes_what_pooled_models_take(join, tmp_path):
    pooled = {**SMALL, "class_token": False, "global_pool": "avg", "fc_norm": False}
    model = lape.create_model("t2t_vit_7", join, "1D_sin", **pooled).eval()
    shake_position(model)
    x = torch.randn(2, 3, 32, 48)
    expected = model(x)
    assert lape.describe(model).prefix_tokens == 0
    assert (lape.load(lape.save(model, tmp_path / "model"))(x) - expected).abs().max() <= 1e-6
    assert (lape.fold_(model)(x) - expected).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2t_vit_7", "ceit_tiny_patch16_224"])
def test_compiles_copies_and_exports(name):
    model = lape.create_model(name, "LaPE", "learnable", **SMALL).eval()
    x = torch.randn(2, 3, 32, 48)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - expected).abs().max() <= 1e-5
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    program = torch.export.export(lape.fold_(copy.deepcopy(model)), (x,), dynamic_shapes=({0: BATCH},))
    assert (program.module()(x[:1]) - expected[:1]).abs().max() <= 1e-5
