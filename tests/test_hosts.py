"""Hugging Face and torchvision models: what attention and MLP get, against the formulas; undoing, saving, other sizes.

Every model has two small layers and random weights; nothing is downloaded.
"""

import copy

import pytest
import torch
from test_convert import MEANINGFUL, assert_same_structure, shake_position

import lape
from lape.core.joins import JOINS
from lape.core.position import KINDS, Layout
from lape.host import base

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
LIBRARIES = {
    "ViT": ("ViTModel", "ViTConfig", {}),
    "ViT classifier": ("ViTForImageClassification", "ViTConfig", {"num_labels": 3}),
    "DeiT": ("DeiTModel", "DeiTConfig", {}),
    "DeiT distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {"num_labels": 3}),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {}),
    "DINOv2 backbone": ("Dinov2Backbone", "Dinov2Config", {}),
    "DINOv2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"num_register_tokens": 3}),
    "ViT-MSN": ("ViTMSNModel", "ViTMSNConfig", {}),
    "I-JEPA": ("IJepaModel", "IJepaConfig", {}),
    "BEiT": ("BeitModel", "BeitConfig", {"use_absolute_position_embeddings": True}),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", {}),
}
HOSTS = [*LIBRARIES, "torchvision"]


def make(host: str, pe: str | None = None) -> torch.nn.Module:
    """A small model; skips a relative bias where the library's attention takes none (transformers 4)."""
    torch.manual_seed(1)
    if host == "torchvision":
        from torchvision.models import VisionTransformer

        size = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
        model: torch.nn.Module = VisionTransformer(**size, num_classes=3)
    else:
        transformers = pytest.importorskip("transformers")
        if pe and KINDS[pe].is_bias and transformers.__version__ < "5":
            pytest.skip("transformers 4 takes no bias per head; refused, as another test asserts")
        cls, config, extra = LIBRARIES[host]
        model = getattr(transformers, cls)(getattr(transformers, config)(**SMALL, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def output(model: torch.nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor:
    y = model(x, **kwargs)
    if isinstance(y, torch.Tensor):
        return y
    for name in ("logits", "last_hidden_state"):
        if getattr(y, name, None) is not None:
            return getattr(y, name)
    return y.feature_maps[0]


def capture(module: torch.nn.Module, into: list) -> None:
    """Records the first tensor that a module is given."""

    def hook(_, args, kwargs):
        into.append(args[0] if args else kwargs["hidden_states"])

    module.register_forward_pre_hook(hook, with_kwargs=True)


def received(model: torch.nn.Module, join: str, kind: str) -> list[torch.Tensor]:
    """What each block receives, (1, N, D), written out from the saved state: LN by hand, zero rows for bare tokens."""
    state, conversion = lape.to_reference_state_dict(model), lape.convert.converted.conversion_of(model)
    prefix = lape.files.names._prefix(model, conversion)
    layout, width = conversion.layout, conversion.anatomy.width
    slot = prefix + conversion.anatomy.table_slot

    def normed(p, path):
        centred = p - p.mean(-1, keepdim=True)
        eps = getattr(conversion.anatomy.root.get_submodule(path), conversion.anatomy.norm).eps
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return y * state[f"{prefix}{path}.pe_norm.weight"] + state[f"{prefix}{path}.pe_norm.bias"]

    def spread(p):
        zeros = torch.zeros(1, layout.bare, width)
        return torch.cat([p[:, : layout.prefix_rows], zeros, p[:, layout.prefix_rows :]], 1)

    chain, out = None, []
    for i, path in enumerate(conversion.anatomy.blocks):
        table = state[f"{slot}{i}" if join == "unshare" else slot].reshape(1, -1, width)
        if join == "LaPE":
            chain = normed(table if chain is None else chain, path)
        out.append(
            spread(
                {"LaPE": chain, "LaPE-sharing": normed(table, path) if join == "LaPE-sharing" else None}.get(
                    join, table
                )
            )
        )
    return out


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("join", "pe"), MEANINGFUL)
def test_converted_is_the_formula_is_folded_is_loaded_and_removed_is_the_original(host, join, pe, tmp_path):
    model, original = make(host, pe), make(host)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = output(original, x)
        lape.apply_(model, join, pe)
        shake_position(model)
        converted = output(model, x)
        check_layers(copy.deepcopy(model), x, join, pe)
        loaded = lape.load(lape.save(model, tmp_path / "model"))
        assert type(loaded) is type(original)
        folded = lape.fold_(copy.deepcopy(model))
        scale = converted.abs().max()
        for other in (loaded, folded):
            assert (output(other, x) - converted).abs().max() <= 2e-6 * scale
        lape.remove_(model)
        if pe == "learnable":
            model.load_state_dict(original.state_dict())
        assert_same_structure(model, original)
        assert torch.equal(output(model, x), before)


def check_layers(model: torch.nn.Module, x: torch.Tensor, join: str, pe: str) -> None:
    """Inside the forward: the stream that enters each block, what its attention sees, and what its MLP's norm gets."""
    conversion = lape.convert.converted.conversion_of(model)
    anatomy, site = conversion.anatomy, JOINS[join].site
    entered, attended = [], []
    token_norms = []
    for path in anatomy.blocks:
        block = anatomy.root.get_submodule(path)
        inner = getattr(block, "host_block", block)
        capture(block, entered)
        attention = getattr(inner, anatomy.attention)
        capture(getattr(attention, "host_attention", attention), attended)
        norm = getattr(inner, anatomy.norm)
        token_norms.append(getattr(norm, "token_norm", norm))
    output(model, x)
    assert len(entered) == len(attended) == 2
    p = received(model, join, pe) if KINDS[pe].is_table else [torch.zeros(())] * 2
    for h, seen, token_norm, p_l in zip(entered, attended, token_norms, p, strict=True):
        expected = {"input": token_norm(h), "block": token_norm(h + p_l), "norm": token_norm(h) + p_l}[site]
        if KINDS[pe].is_bias:
            expected = token_norm(h)
        assert (seen - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("host", HOSTS)
def test_the_stream_that_enters_the_blocks_has_the_position_once_or_not_at_all(host):
    """Two tables, one model: only `basic` lets the table reach the residual stream at the input."""
    x = torch.randn(1, 3, 16, 16)
    for join in ("basic", "LaPE"):
        model = lape.apply_(make(host), join)
        anatomy = lape.convert.converted.conversion_of(model).anatomy
        entered: list[torch.Tensor] = []
        capture(anatomy.root.get_submodule(anatomy.blocks[0]), entered)
        with torch.no_grad():
            output(model, x)
            for name, parameter in model.named_parameters():
                if "pos_embed" in name or name.endswith(anatomy.table_slot):
                    parameter.add_(1.5 * torch.randn_like(parameter))
            output(model, x)
        assert torch.equal(entered[0], entered[1]) is (join == "LaPE")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("join", "pe"), [("LaPE", None), ("unshare", None), ("LaPE", "2D_RPE")])
def test_every_new_parameter_gets_a_gradient(host, join, pe):
    model = lape.apply_(make(host, pe), join, pe).train()
    output(model, torch.randn(2, 3, 16, 16)).square().sum().backward()
    names = [n for n, p in model.named_parameters() if any(w in n for w in ("pe_norm", "lape_position", "bias_table"))]
    assert names
    gradients = {name: dict(model.named_parameters())[name].grad for name in names}
    assert all(gradient is not None for gradient in gradients.values())
    # Where only the class token is read, the last layer's relative bias cannot matter: it has none for that token.
    last = lape.convert.converted.conversion_of(model).anatomy.blocks[-1] if pe else "no such layer"
    assert all(gradient.any() for name, gradient in gradients.items() if last not in name)


@pytest.mark.parametrize("host", ["ViT", "DINOv2", "DINOv2 registers", "CLIP", "SigLIP", "BEiT"])
@pytest.mark.parametrize(("join", "pe"), [("share", None), ("LaPE", None), ("LaPE", "2D_RPE")])
def test_other_sizes_at_run_time(host, join, pe):
    """As the library offers them: the raw table is resampled for the grid of the images, before the chain."""
    if host == "BEiT" and pe == "2D_RPE":
        pytest.skip("BEiT hands its own bias over in the same mask; sizes are covered by the table")
    model = lape.apply_(make(host, pe), join, pe)
    shake_position(model)
    arguments = {} if host.startswith("DINO") or host == "BEiT" else {"interpolate_pos_encoding": True}
    wide, native = torch.randn(2, 3, 8, 32), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        at_home = output(model, native, **arguments)
        assert torch.equal(at_home, output(model, native))
        seen: list[torch.Tensor] = []
        twin = copy.deepcopy(model)
        anatomy = lape.convert.converted.conversion_of(twin).anatomy
        block = anatomy.root.get_submodule(anatomy.blocks[0])
        inner = getattr(block, "host_block", block)
        entered: list[torch.Tensor] = []
        capture(block, entered)
        attention = getattr(inner, anatomy.attention)
        capture(getattr(attention, "host_attention", attention), seen)
        output(twin, wide, **arguments)
        token_norm = getattr(inner, anatomy.norm)
        token_norm = getattr(token_norm, "token_norm", token_norm)
        if pe is None:
            p = lape.positions(model, (8, 32))[:1]
            expected = token_norm(entered[0] + p) if join == "share" else token_norm(entered[0]) + p
            assert (seen[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
            native_p = lape.positions(model)[:1]
            assert not torch.allclose(p, native_p)  # as many patches, another grid
        assert torch.equal(output(model, native), at_home)


def test_the_library_still_works_on_a_converted_model():
    model = lape.apply_(make("ViT classifier"))
    x = torch.randn(2, 3, 16, 16)
    y = model(x, output_hidden_states=True, labels=torch.tensor([0, 1]))
    assert len(y.hidden_states) == 3
    y.loss.backward()
    assert model.num_labels == 3
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # the second name is that of transformers 4
    model.train()
    model(x).logits.sum().backward()


def test_models_that_hold_an_encoder_are_converted_inside():
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8))
    lape.apply_(clip)
    assert lape.describe(clip).joined == 2
    backbone = transformers.Dinov2Config(**SMALL, out_features=["stage1", "stage2"], reshape_hidden_states=True)
    upernet = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, num_labels=4)
    ).train()
    lape.apply_(upernet)
    upernet(torch.randn(2, 3, 16, 16)).logits.sum().backward()
    norms = [p for n, p in upernet.named_parameters() if "pe_norm" in n]
    assert len(norms) == 4
    assert all(p.grad is not None for p in norms)


def test_refused_with_the_true_reason():
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ < "5":
        with pytest.raises(lape.UnsupportedModelError, match="takes no mask per head"):
            lape.apply_(make("CLIP"), "LaPE", "2D_RPE")
    swin = transformers.Swinv2Model(
        transformers.Swinv2Config(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[1])
    )
    with pytest.raises(lape.UnsupportedModelError, match="behind attention"):
        lape.apply_(swin)
    with pytest.raises(lape.LapeError, match="no position table of its own"):
        lape.apply_(transformers.BeitModel(transformers.BeitConfig(**SMALL)))


def test_a_table_for_a_model_whose_slot_is_a_plain_none():
    transformers = pytest.importorskip("transformers")
    model, x = transformers.BeitModel(transformers.BeitConfig(**SMALL)).eval(), torch.randn(1, 3, 16, 16)
    plain, attributes = output(model, x), set(vars(model.embeddings))
    lape.apply_(model, "basic", "learnable")
    shake_position(model)
    with torch.no_grad():
        model.embeddings.position_embeddings.add_(torch.randn(1, 17, 32))
    assert not torch.allclose(output(model, x), plain)
    assert set(vars(lape.remove_(model).embeddings)) == attributes
    assert torch.equal(output(model, x), plain)


# --------------------------------------------------------------------- a model of one's own


class OwnBlock(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before = torch.nn.LayerNorm(width)
        self.attend = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, width))

    def forward(self, x):
        y = self.before(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class OwnViT(torch.nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, width, 4, 4)
        self.where = torch.nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = torch.nn.ModuleList([OwnBlock(width) for _ in range(3)])

    def forward(self, x):
        x = self.patches(x).flatten(2).mT + self.where
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


def examine_own(root):
    return lape.Anatomy(
        root=root,
        blocks=tuple(f"layers.{i}" for i in range(len(root.layers))),
        norm="before",
        attention="attend",
        table="where",
        table_slot="where",
        layout=Layout(grid=(4, 4), prefix_rows=0),
        patch_size=(4, 4),
        width=16,
        num_heads=2,
    )


def test_a_hand_written_vit_is_registered_in_a_few_lines(monkeypatch):
    monkeypatch.setattr(base, "_HOSTS", dict(base._HOSTS))
    host = lape.Host(
        name="own",
        root_classes=(f"{OwnViT.__module__}.OwnViT",),
        block_classes=(f"{OwnBlock.__module__}.OwnBlock",),
        examine=examine_own,
    )
    assert lape.register_host(host) in lape.hosts()
    with pytest.raises(lape.LapeError, match="registered already"):
        lape.register_host(host)
    model, x = OwnViT(), torch.randn(2, 3, 16, 16)
    before = model(x)
    lape.apply_(model)
    assert lape.describe(model).joined == 3
    assert not torch.allclose(model(x), before)
    assert torch.equal(lape.remove_(model)(x), before)
