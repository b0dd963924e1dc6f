"""Further vision encoders of transformers, a tiny model each: what attention sees, folded, saved, removed, refused."""

import copy

import pytest
import torch
from formula import TOLERANCE, assert_same_structure, check_layers, of_position, plain, shake_position
from zoo import SMALL, output

import lape

transformers = pytest.importorskip("transformers", minversion="5")
# name -> (model, config, arguments, prefix tokens with a row, without)
FAMILIES = {
    "MetaCLIP 2": ("MetaClip2VisionModel", "MetaClip2VisionConfig", {}, 1, 0),
    "AltCLIP": ("AltCLIPVisionModel", "AltCLIPVisionConfig", {}, 1, 0),
    "ChineseCLIP": ("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", {}, 1, 0),
    "CLIPSeg": ("CLIPSegVisionModel", "CLIPSegVisionConfig", {}, 1, 0),
    "OWL-ViT": ("OwlViTVisionModel", "OwlViTVisionConfig", {}, 1, 0),
    "OWLv2": ("Owlv2VisionModel", "Owlv2VisionConfig", {}, 1, 0),
    "BLIP": ("BlipVisionModel", "BlipVisionConfig", {}, 1, 0),
    "BLIP-2": ("Blip2VisionModel", "Blip2VisionConfig", {}, 1, 0),
    "DPT": ("DPTModel", "DPTConfig", {"backbone_out_indices": [0, 1, 1, 1]}, 1, 0),
    "TIPSv2": ("Tipsv2VisionModel", "Tipsv2VisionConfig", {"num_register_tokens": 2}, 1, 2),
    "Pixio": ("PixioModel", "PixioConfig", {"n_cls_tokens": 3}, 3, 0),
    "SAM": ("SamVisionModel", "SamVisionConfig", {"window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48}, 0, 0),
    "SAM-HQ": (
        "SamHQVisionModel",
        "SamHQVisionConfig",
        {"window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48},
        0,
        0,
    ),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    cls, config, extra, *_ = FAMILIES[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**SMALL, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAMILIES)
def test_converted_is_the_formula_folded_loaded_and_removed_is_the_original(name, tmp_path):
    rows, bare = FAMILIES[name][3:]
    x, original = torch.randn(2, 3, 16, 16), make(name)
    for join in ("basic", "share", "LaPE"):
        model = make(name)
        with torch.no_grad():
            lape.apply_(model, join)
            done = lape.describe(model)
            assert (done.joined, done.grid) == (0 if join == "basic" else 2, (4, 4))
            assert (done.prefix_tokens, done.positioned_prefix_tokens) == (rows + bare, rows)
            shake_position(model)
            if "SAM" not in name:  # whose attention gets windows
                check_layers(copy.deepcopy(model), x, join, "learnable")
            y = output(model, x)
            folded = lape.fold_(copy.deepcopy(model))
            loaded = lape.load(lape.save(model, tmp_path / join))
            for other in (folded, loaded):
                assert (output(other, x) - y).abs().max() <= 2 * TOLERANCE * y.abs().max()
            lape.remove_(model)
            assert_same_structure(model, original)
            model.load_state_dict(original.state_dict())
            assert torch.equal(output(model, x), output(original, x))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_new_parameter_gets_a_gradient(name):
    model = lape.apply_(make(name).train())
    y = output(model, torch.randn(2, 3, 16, 16))
    (y * torch.randn_like(y)).sum().backward()
    new = of_position(model).values()
    assert len(new) == 5
    assert all(p.grad is not None and p.grad.any() for p in new)


@pytest.mark.parametrize("name", ["SAM", "SAM-HQ"])
def test_sam_gets_the_position_as_a_map_before_the_windows_are_cut(name):
    model = lape.apply_(make(name))
    shake_position(model)
    anatomy = lape.convert.converted.conversion_of(model).anatomy
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    norms = [anatomy.root.get_submodule(path).layer_norm1 for path in anatomy.blocks]
    for norm in norms:
        norm.register_forward_hook(lambda _m, args, y: seen.append((args[0], y)))
    output(model, torch.randn(2, 3, 16, 16))
    p = lape.to_reference_state_dict(model)[next(n for n in lape.to_reference_state_dict(model) if "pos_embed" in n)]
    for norm, pe_norm, (x, y) in zip(norms, anatomy.root.lape.norms.values(), seen, strict=True):
        p = pe_norm(p)
        expected = plain(norm, x) + p
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_models_of_segmentation_and_detection_are_converted_inside():
    four = {**SMALL, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4}
    dpt = transformers.DPTConfig(**four, fusion_hidden_size=8, num_labels=3, use_auxiliary_head=False)
    model = transformers.DPTForSemanticSegmentation(dpt).eval()
    assert lape.describe(lape.apply_(model)).joined == 4
    assert model(torch.randn(1, 3, 16, 16)).logits.isfinite().all()
    vision = transformers.Dinov2Config(**SMALL, out_features=["stage2"], reshape_hidden_states=True)
    matte = transformers.VitMatteConfig(backbone_config=vision, hidden_size=32, fusion_hidden_sizes=[16, 8, 8, 8])
    assert lape.describe(lape.apply_(transformers.VitMatteForImageMatting(matte))).joined == 2


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        ("DetrModel", "DetrConfig", "DetrModel is not a supported model; supported are"),
    ],
)
def test_refused_with_the_true_reason(model, config, reason):
    extra = {"backbone_config": transformers.ResNetConfig(), "use_timm_backbone": False} if "Detr" in model else {}
    with torch.device("meta"):
        made = getattr(transformers, model)(getattr(transformers, config)(**extra))
    with pytest.raises(lape.UnsupportedModelError, match=reason):
        lape.apply_(made)
