"""The models that tests convert: tiny, with random weights away from their initial values, nothing downloaded."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.volo import VOLO

import lape.models  # noqa: F401  they are known to timm from here on
from lape.core.position import KINDS

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}

HOSTS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "pooled with class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "DeiT-III": ("deit3_small_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "registers without rows": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True}),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "norm before blocks": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "7 x 3 grid": ("vit_tiny_patch16_224", {"img_size": (28, 12)}),
    "any size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
}


def make(host: str = "plain", **kwargs) -> VisionTransformer:
    name, extra = HOSTS[host]
    torch.manual_seed(1)
    model = timm.create_model(name, **{**TINY, **extra, **kwargs})
    with torch.no_grad():  # away from the initial values, where gains of one and zero biases hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def image(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


# Hugging Face and torchvision, two small layers each
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


def make_foreign(host: str, pe: str | None = None) -> torch.nn.Module:
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


NARROW = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
ON_4 = {**TINY, "depth": 2}

# family -> (timm's name, arguments, PE kind that is needed, prefix tokens, of which have no row, position that stays)
FAMILIES = {
    "hybrid": ("vit_tiny_r_s16_p8_224", {**NARROW, "img_size": (64, 96)}, None, 1, 0, None),
    "RMSNorm": ("vit_tiny_patch16_224", {**ON_4, "norm_layer": "rmsnorm"}, None, 1, 0, None),
    "torch RMSNorm": ("vit_tiny_patch16_224", {**ON_4, "norm_layer": torch.nn.RMSNorm}, None, 1, 0, None),
    "differential attention": ("vit_tiny_patch16_224", {**ON_4, "attn_layer": "diff"}, None, 1, 0, None),
    "BEiT": ("beit_base_patch16_224", {**ON_4, "use_abs_pos_emb": True, "use_rel_pos_bias": False}, None, 1, 0, None),
    "BEiT with bias": ("beit_base_patch16_224", ON_4, "learnable", 1, 0, "relative"),
    "BEiT with shared bias": (
        "beit_base_patch16_224",
        {**ON_4, "use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        None,
        1,
        0,
        "relative",
    ),
    "CaiT": ("cait_xxs24_224", {**ON_4, "depth_token_only": 1}, None, 0, 0, None),
    "EVA": ("eva_giant_patch14_224", {**ON_4, "mlp_ratio": 2}, None, 1, 0, None),
    "EVA-02": ("eva02_tiny_patch14_224", ON_4, None, 1, 0, "rotary"),
    "EVA with mixed rotation": ("vit_small_patch16_rope_mixed_ape_224", ON_4, None, 1, 1, "rotary"),
    "DINOv3": ("vit_small_patch16_dinov3", ON_4, "learnable", 5, 0, "rotary"),
    "relative position": ("vit_relpos_small_patch16_224", ON_4, "learnable", 0, 0, "relative"),
    "shared relative position": ("vit_srelpos_small_patch16_224", ON_4, "learnable", 0, 0, "relative"),
    "NaFlexViT": (
        "naflexvit_base_patch16_gap",
        {**NARROW, "patch_size": 4, "pos_embed_grid_size": (4, 4)},
        None,
        4,
        4,
        None,
    ),
    "NaFlexViT, bilinear": (
        "naflexvit_base_patch16_siglip",
        {**NARROW, "patch_size": 4, "pos_embed_grid_size": (4, 4)},
        *(None, 0, 0, None),
    ),
    "NaFlexViT, keeping aspect": (
        "naflexvit_base_patch16_par_gap",
        {**NARROW, "patch_size": 4, "pos_embed_grid_size": (4, 4)},
        *(None, 4, 4, None),
    ),
    "SAM": (
        "samvit_base_patch16",
        {**ON_4, "window_size": 3, "global_attn_indexes": (1,), "neck_chans": 16},
        None,
        0,
        0,
        "relative",
    ),
    "VOLO": (
        VOLO,  # the class: its entry points fix the number of layers
        {
            "img_size": 48,
            "layers": (1, 2, 1),
            "embed_dims": (16, 32, 32),
            "num_heads": (2, 2, 2),
            "stem_hidden_dim": 8,
            "downsamples": (True, False, False),
            "outlook_attention": (True, False, False),
            "num_classes": 5,
        },
        None,
        0,
        0,
        None,
    ),
    "T2T-ViT": ("t2t_vit_7", {**NARROW, "img_size": (32, 48)}, "learnable", 1, 0, None),
    "CeiT": ("ceit_tiny_patch16_224", {**NARROW, "img_size": (32, 48)}, None, 1, 0, None),
    "XCiT": ("xcit_nano_12_p16_224", {**NARROW, "img_size": (64, 48)}, "learnable", 0, 0, None),
}


def make_family(family: str, **kwargs) -> torch.nn.Module:
    name, extra, *_ = FAMILIES[family]
    torch.manual_seed(1)
    kwargs = {**extra, **kwargs}
    model = timm.create_model(name, **kwargs) if isinstance(name, str) else name(**kwargs)
    with torch.no_grad():  # away from the initial values, where gains of one and zero biases hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def family_image(family: str, batch: int = 2) -> torch.Tensor:
    size = FAMILIES[family][1].get("img_size", 16)
    return torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size))


def _images(*size):
    return lambda: (torch.randn(2, 3, *(size or (16, 16))),)


def _without(*names, **more):
    return {**{key: value for key, value in SMALL.items() if key not in names}, **more}


def _packed():
    return torch.randn(2, 16, 48), torch.ones(2, 16).long(), torch.tensor([[4, 4], [4, 4]])


_QUERIES = {"num_queries": 5, "num_blocks": 1, "num_register_tokens": 2, "num_labels": 3, "num_hidden_layers": 3}
_V_JEPA = {"crop_size": 16, "frames_per_clip": 4, "tubelet_size": 2, "mlp_ratio": 2, "pred_hidden_size": 48}
_PADDLE = {"pretrain_image_size": 12, "mlp_ratio": 2, "window_block_indices": [0]}

# transformers: family -> (class in its folder, config's arguments, inputs, PE kind that is needed, prefix tokens
# with a row, without, position that stays)
WIDE = {
    "dinov3_vit": ("DINOv3ViTModel", {**SMALL, "num_register_tokens": 3}, _images(), "learnable", 4, 0, "rotary"),
    "sapiens2": (
        "Sapiens2Model",
        {**SMALL, "num_register_tokens": 3, "num_key_value_attention_heads": 2},
        *(_images(), "learnable", 4, 0, "rotary"),
    ),
    "mlcd": ("MLCDVisionModel", SMALL, _images(), "learnable", 1, 0, "rotary"),
    "internvl": (
        "InternVLVisionModel",
        {**SMALL, "image_size": [16, 16], "patch_size": [4, 4]},
        _images(),
        "learnable",
        1,
        0,
        None,
    ),
    "kosmos2": ("Kosmos2VisionModel", SMALL, _images(), None, 1, 0, None),
    "git": ("GitVisionModel", SMALL, _images(), None, 1, 0, None),
    "instructblip": ("InstructBlipVisionModel", SMALL, _images(), None, 1, 0, None),
    "instructblipvideo": ("InstructBlipVideoVisionModel", SMALL, _images(), None, 1, 0, None),
    "janus": ("JanusVisionModel", {**SMALL, "mlp_ratio": 2}, _images(), None, 0, 0, None),
    "phi4_multimodal": (
        "Phi4MultimodalVisionModel",
        {**SMALL, "crop_size": 16},
        *(lambda: (torch.randn(2, 3, 16, 16), torch.ones(2, 4, 4).bool()), None, 0, 0, None),
    ),
    "ovis2": (
        "Ovis2VisionModel",
        {**SMALL, "hidden_stride": 2, "num_visual_indicator_tokens": 2, "vocab_size": 50},
        *(_images(), None, 0, 0, None),
    ),
    "aimv2": ("Aimv2VisionModel", SMALL, _images(), None, 0, 0, None),
    "idefics": ("IdeficsVisionTransformer", _without("hidden_size", embed_dim=32), _images(), None, 1, 0, None),
    "idefics2": ("Idefics2VisionTransformer", SMALL, _images(), None, 0, 0, None),
    "idefics3": ("Idefics3VisionTransformer", SMALL, _images(), None, 0, 0, None),
    "smolvlm": ("SmolVLMVisionTransformer", SMALL, _images(), None, 0, 0, None),
    "siglip2": ("Siglip2VisionModel", _without("image_size", num_patches=16), _packed, None, 0, 0, None),
    "vitpose_backbone": (
        "VitPoseBackbone",
        {**SMALL, "image_size": [64, 32], "patch_size": [16, 16], "mlp_ratio": 2},
        *(_images(64, 32), None, 0, 0, None),
    ),
    "vitdet": (
        "VitDetModel",
        {**SMALL, **_PADDLE, "window_size": 3, "use_relative_position_embeddings": True},
        *(_images(), None, 0, 0, "relative"),
    ),
    "lw_detr": ("LwDetrViTBackbone", {**SMALL, **_PADDLE, "num_windows": 4}, _images(), None, 0, 0, None),
    "rf_detr": (
        "RfDetrDinov2Backbone",
        {**SMALL, "mlp_ratio": 2, "num_windows": 2, "window_block_indexes": [0], "out_features": ["stage2"]},
        *(_images(), None, 1, 0, None),
    ),
    "sam3": (
        "Sam3ViTModel",
        {**SMALL, "pretrain_image_size": 8, "window_size": 2, "global_attn_indexes": [1]},
        *(_images(), None, 0, 0, "rotary"),
    ),
    "yolos": (
        "YolosModel",
        {**SMALL, "image_size": [16, 24], "num_detection_tokens": 3},
        *(_images(16, 24), None, 1, 0, "between blocks"),
    ),
    "eomt": ("EomtForUniversalSegmentation", {**SMALL, **_QUERIES, "mlp_ratio": 2}, _images(), None, 0, 3, None),
    "eomt_dinov3": (
        "EomtDinov3ForUniversalSegmentation",
        {**SMALL, **_QUERIES},
        _images(),
        "learnable",
        3,
        0,
        "rotary",
    ),
    "audio_spectrogram_transformer": (
        "ASTModel",
        _without("image_size", frequency_stride=3, time_stride=4, max_length=24, num_mel_bins=16),
        *(lambda: (torch.randn(2, 24, 16),), None, 2, 0, None),
    ),
    "vivit": (
        "VivitModel",
        _without("patch_size", num_frames=4, tubelet_size=[2, 4, 4]),
        *(lambda: (torch.randn(2, 4, 3, 16, 16),), None, 1, 0, None),
    ),
    "mllama": (
        "MllamaVisionModel",
        {
            **_without("num_attention_heads", attention_heads=2, num_global_layers=1, max_num_tiles=4),
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        lambda: (torch.randn(2, 1, 4, 3, 16, 16), torch.tensor([[1], [2]]), torch.tensor([[[1, 0] * 2], [[1, 1] * 2]])),
        *(None, 1, 0, "tiles"),
    ),
    "timesformer": (
        "TimesformerModel",
        {**SMALL, "num_frames": 3},
        *(lambda: (torch.randn(2, 3, 3, 16, 16),), None, 1, 0, None),
    ),
    "videomae": (
        "VideoMAEModel",
        {**SMALL, "num_frames": 4, "tubelet_size": 2},
        *(lambda: (torch.randn(2, 4, 3, 16, 16),), "learnable", 0, 0, None),
    ),
    "vjepa2": (
        "VJEPA2Model",
        {
            **_without("image_size", "intermediate_size", hidden_size=48, **_V_JEPA),
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
        },
        *(lambda: (torch.randn(2, 4, 3, 16, 16),), "learnable", 0, 0, "rotary"),
    ),
    "hiera": (
        "HieraModel",
        {
            "embed_dim": 16,
            "image_size": [64, 64],
            "patch_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "depths": [1, 2, 1],
            "num_heads": [1, 2, 4],
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False, False],
            "query_stride": [2, 2],
            "num_query_pool": 2,
        },
        *(_images(64, 64), None, 0, 0, None),
    ),
    "sam2": (
        "Sam2HieraDetModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "image_size": [56, 48],
            "patch_kernel_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "query_stride": [2, 2],
            "num_query_pool_stages": 1,
            "blocks_per_stage": [1, 2],
            "embed_dim_per_stage": [16, 32],
            "num_attention_heads_per_stage": [1, 2],
            "window_positional_embedding_background_size": [3, 3],
            "window_size_per_stage": [2, 3],
            "global_attention_blocks": [2],
        },
        *(_images(56, 48), None, 0, 0, None),
    ),
    "llama4": (
        "Llama4VisionModel",
        {
            **SMALL,
            "intermediate_size": 128,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 8,
            "projector_output_dim": 8,
            "vision_output_dim": 8,
        },
        *(_images(), None, 0, 0, "rotary"),
    ),
}


def make_wide(family: str, **more) -> torch.nn.Module:
    import importlib

    name, arguments, *_ = WIDE[family]
    file = "vision" if family == "idefics" else f"modeling_{family}"
    cls = getattr(importlib.import_module(f"transformers.models.{family}.{file}"), name)
    config = getattr(cls, "config_class", None)
    if config is None:  # a plain module
        config = importlib.import_module(f"transformers.models.{family}.configuration_{family}").IdeficsVisionConfig
    torch.manual_seed(1)
    model = cls(config(**arguments, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def wide_output(model: torch.nn.Module, inputs: tuple) -> torch.Tensor:
    y = model(*inputs)
    names = ("last_hidden_state", "masks_queries_logits", "feature_maps")
    first = next(value for name in names if (value := getattr(y, name, None)) is not None)
    return first[0] if isinstance(first, tuple) else first
