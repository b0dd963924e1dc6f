"""Hugging Face and torchvision models: what attention and MLP get, against the formulas; undoing, saving, other sizes.

Every model has two small layers and random weights; nothing is downloaded.
"""

import copy
from functools import partial

import pytest
import torch
from formula import (
    MEANINGFUL,
    assert_host_keys,
    assert_same_structure,
    capture,
    check_layers,
    hosts_with,
    of_position,
    plain,
    shake_position,
)
from zoo import LIBRARIES, SMALL, output
from zoo import make_foreign as make

import lape
from lape.core.position import KINDS, Layout
from lape.host import base

HOSTS = [*LIBRARIES, "torchvision"]
WHOLE = ("ViT", "DeiT distilled", "SigLIP", "torchvision")  # hosts that meet every join and kind


@pytest.mark.matrix
@pytest.mark.parametrize(("join", "pe", "host"), hosts_with(MEANINGFUL, HOSTS, WHOLE))
def test_converted_is_the_formula_is_folded_is_loaded_and_removed_is_the_original(host, join, pe, tmp_path):
    model, original = make(host, pe), make(host)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = output(original, x)
        lape.apply_(model, join, pe)
        assert_host_keys(model, original, parameters=KINDS[pe].is_table)
        shake_position(model)
        converted = output(model, x)
        check_layers(copy.deepcopy(model), x, join, pe)
        loaded = lape.load(lape.save(model, tmp_path / "model"))
        assert isinstance(loaded, type(original))
        folded = lape.fold_(copy.deepcopy(model))
        scale = converted.abs().max()
        for other in (loaded, folded):
            assert (output(other, x) - converted).abs().max() <= 2e-6 * scale
        lape.remove_(model)
        if pe == "learnable":
            model.load_state_dict(original.state_dict())
        assert_same_structure(model, original)
        assert torch.equal(output(model, x), before)


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
                if name.endswith(anatomy.table_slot):
                    parameter.add_(1.5 * torch.randn_like(parameter))
            output(model, x)
        assert torch.equal(entered[0], entered[1]) is (join == "LaPE")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("join", "pe"), [("LaPE", None), ("unshare", None), ("LaPE", "2D_RPE")])
def test_every_new_parameter_gets_a_gradient(host, join, pe):
    model = lape.apply_(make(host, pe), join, pe).train()
    output(model, torch.randn(2, 3, 16, 16)).square().sum().backward()
    gradients = {name: p.grad for name, p in of_position(model).items()}
    assert gradients
    assert all(gradient is not None for gradient in gradients.values())
    # Where only the class token is read, the last layer's relative bias cannot matter: it has none for that token.
    last = len(lape.convert.converted.conversion_of(model).anatomy.blocks) - 1
    assert all(gradient.any() for name, gradient in gradients.items() if f"lape.biases.{last}." not in name)


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
        entered: list[torch.Tensor] = []
        capture(block, entered)
        capture(getattr(block, anatomy.attention), seen)
        output(twin, wide, **arguments)
        token_norm = partial(plain, getattr(block, anatomy.norm))
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
    norms = [p for n, p in upernet.named_parameters() if "lape.norms" in n]
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
    before, attributes = output(model, x), set(vars(model.embeddings))
    lape.apply_(model, "basic", "learnable")
    shake_position(model)
    with torch.no_grad():
        model.lape.table_0.add_(torch.randn(1, 17, 32))
    assert not torch.allclose(output(model, x), before)
    assert set(vars(lape.remove_(model).embeddings)) == attributes
    assert torch.equal(output(model, x), before)


# --------------------------------------------------------------------- a model of one's own


def test_tokens_without_a_row_show_no_position_and_the_class_token_its_own():
    model = lape.apply_(make("DINOv2 registers"), "share")
    received, seen = (lape.positions(model, view=view) for view in ("received", "seen"))
    assert not seen[:, 1:4].any()
    norms = [layer.norm1 for layer in model.modules() if hasattr(layer, "norm1")]
    for layer, norm in enumerate(norms):
        expected = norm(received[layer])
        assert torch.allclose(seen[layer, 0], expected[0])
        assert torch.allclose(seen[layer, 4:], expected[4:])


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
