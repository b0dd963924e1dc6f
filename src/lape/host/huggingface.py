"""Hugging Face transformers, 4.x and 5.x: vision encoders with an absolute position table and pre-norm layers.

The library moved its block lists between versions, so the encoder is found by the class of its `embeddings` and its
layers by their class, wherever they are.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy
from lape.core.bias import OwnBias, masked
from lape.core.position import Grid, Layout
from lape.core.stages import Stage
from lape.errors import LapeError, UnsupportedModelError
from lape.host.base import RELATIVE, SHARED, Host, check_blocks, class_name


@dataclass(frozen=True)
class Family:
    """One architecture of the library, as data."""

    embeddings: str  # "module.Class"
    layer: str  # "module.Class"
    norm: str = "layernorm_before"
    attention: str = "attention"
    table: str = "embeddings.position_embeddings"
    patch_embed: str = "embeddings.patch_embeddings"
    prefix_rows: int | str = 1  # or the name of the config's entry
    registers: bool = False  # whether config.num_register_tokens tokens stand between class token and patches
    shuffle: str | None = None  # a method that shuffles and drops patches
    frozen_kind: str = "learnable"  # what the family's own table is while it is frozen


def _family(folder: str, name: str, **kwargs: Any) -> Family:
    module = f"transformers.models.{folder}.modeling_{folder}"
    return Family(f"{module}.{name}Embeddings", f"{module}.{name}Layer", **kwargs)


def _clip_like(
    folder: str, name: str, prefix_rows: int = 1, layer: str = "EncoderLayer", table: str = "position_embedding.weight"
) -> Family:
    module = f"transformers.models.{folder}.modeling_{folder}"
    return Family(
        f"{module}.{name}VisionEmbeddings",
        f"{module}.{name}{layer}",
        norm="layer_norm1",
        attention="self_attn",
        table=f"embeddings.{table}",
        patch_embed="embeddings.patch_embedding",
        prefix_rows=prefix_rows,
    )


def _data2vec_vision() -> Family:
    module = "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVision"
    return Family(f"{module}Embeddings", f"{module}Layer")


FAMILIES = {
    family.embeddings: family
    for family in (
        _family("vit", "ViT"),
        _family("deit", "DeiT", prefix_rows=2),
        _family("vit_msn", "ViTMSN"),
        _family("vit_mae", "ViTMAE", shuffle="embeddings.random_masking", frozen_kind="2D_sin"),
        _family("ijepa", "IJepa", prefix_rows=0),
        _family("beit", "Beit"),
        _data2vec_vision(),
        _family("dinov2", "Dinov2", norm="norm1"),
        _family("dinov2_with_registers", "Dinov2WithRegisters", norm="norm1", registers=True),
        _family("dpt", "DPTViT"),
        _family("tipsv2", "Tipsv2Vision", norm="norm1", registers=True),
        _family("pixio", "Pixio", prefix_rows="n_cls_tokens"),
        _clip_like("clip", "CLIP"),
        _clip_like("metaclip_2", "MetaClip2"),
        _clip_like("altclip", "AltCLIP"),
        _clip_like("chinese_clip", "ChineseCLIP", layer="VisionLayer"),
        _clip_like("clipseg", "CLIPSeg"),
        _clip_like("owlvit", "OwlViT"),
        _clip_like("owlv2", "Owlv2"),
        _clip_like("blip", "Blip", table="position_embedding"),
        _clip_like("blip_2", "Blip2", table="position_embedding"),
        _clip_like("siglip", "Siglip", prefix_rows=0),
    )
}

_ROTARY = "it has rotary position embedding inside attention and no table to join"
_WINDOWS = "it cuts an image into windows, which stand side by side in the batch before its layers"
_VIDEO = "its tokens are those of a video: a grid has rows and columns only"
_REFUSED_EMBEDDINGS = {
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionEmbeddings": (
        "it packs images of different grids into one batch, so that the position differs from image to image"
    ),
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTEmbeddings": _ROTARY,
    "transformers.models.yolos.modeling_yolos.YolosEmbeddings": (
        "its position table covers detection tokens behind the patches, and it resamples for every image size"
    ),
    "transformers.models.vitdet.modeling_vitdet.VitDetEmbeddings": (
        "its blocks take maps with channels first, and its table has the row of a class token that it does not have"
    ),
    "transformers.models.vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneEmbeddings": (
        "it adds the class row of its table to every patch"
    ),
    "transformers.models.rf_detr.modeling_rf_detr.RfDetrDinov2Embeddings": _WINDOWS,
    "transformers.models.lw_detr.modeling_lw_detr.LwDetrViTEmbeddings": _WINDOWS,
    "transformers.models.mlcd.modeling_mlcd.MLCDVisionEmbeddings": _ROTARY,
    "transformers.models.sapiens2.modeling_sapiens2.Sapiens2Embeddings": _ROTARY,
    "transformers.models.aimv2.modeling_aimv2.Aimv2VisionEmbeddings": (
        "its RMSNorm is the library's own; timm's AIMv2 can be converted"
    ),
    "transformers.models.videomae.modeling_videomae.VideoMAEEmbeddings": _VIDEO,
    "transformers.models.vivit.modeling_vivit.VivitEmbeddings": _VIDEO,
    "transformers.models.timesformer.modeling_timesformer.TimesformerEmbeddings": _VIDEO,
}


def add_to_attention_mask(
    bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For attention(hidden_states, attention_mask=..., ...), an additive mask."""
    args = list(args)  # type: ignore[assignment]
    if len(args) > 1:
        x, mask, *rest = args
        return (x, masked(bias_1HNN, mask), *rest), kwargs
    return tuple(args), {**kwargs, "attention_mask": masked(bias_1HNN, kwargs.get("attention_mask"))}


def examine(root: nn.Module) -> Anatomy:
    """Where an encoder of the library keeps its layers, its table and its grid. Raises UnsupportedModelError."""
    name = class_name(type(root.get_submodule("embeddings")))
    if name in _REFUSED_EMBEDDINGS:
        raise UnsupportedModelError(f"{class_name(type(root))} cannot be converted: {_REFUSED_EMBEDDINGS[name]}")
    family = FAMILIES[name]
    paths = [path for path, module in root.named_modules() if class_name(type(module)) == family.layer]
    check_blocks("Hugging Face", root, paths, (family.layer,), {})
    config: Any = root.config
    grid, patch_size = measure(root)
    rows = family.prefix_rows if isinstance(family.prefix_rows, int) else getattr(config, family.prefix_rows)
    layout = Layout(grid, rows, config.num_register_tokens if family.registers else 0)
    owner, _, slot = family.table.rpartition(".")
    table = getattr(root.get_submodule(owner), slot, None)
    if table is not None and table.shape[-2] != layout.num_rows:
        raise UnsupportedModelError(
            f"{family.table} has shape {tuple(table.shape)}, expected {layout.num_rows} rows: "
            f"grid {grid[0]} x {grid[1]} and {layout.prefix_rows} prefix rows"
        )
    first = root.get_submodule(paths[0])
    norm, attention = getattr(first, family.norm), getattr(first, family.attention)
    if not isinstance(norm, nn.LayerNorm):
        raise UnsupportedModelError(f"{paths[0]}.{family.norm} is a {class_name(type(norm))}, not a LayerNorm")
    return Anatomy(
        root=root,
        blocks=tuple(paths),
        norm=family.norm,
        attention=family.attention,
        table=None if table is None else family.table,
        table_slot=family.table,
        layout=layout,
        patch_size=patch_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        patch_embed=family.patch_embed,
        add_bias=add_to_attention_mask if _takes_bias(attention) else None,
        own_kind="learnable" if table is None or table.requires_grad else family.frozen_kind,
        shuffle=family.shuffle,
        adds=("embeddings.forward",),
        beside=_relative_position(config),
        own_bias=_own_bias(root, paths, layout),
    )


def _relative_position(config: Any) -> str | None:
    """What BEiT and its kin have inside attention."""
    if getattr(config, "use_relative_position_bias", False):
        return RELATIVE
    return SHARED if getattr(config, "use_shared_relative_position_bias", False) else None


def _own_bias(root: nn.Module, paths: list[str], layout: Layout) -> tuple[OwnBias, ...]:
    """The module in each layer that computes its relative position bias, by class; empty where layers have none."""
    found = [
        OwnBias(f"{path}.{name}.forward", layout.num_patches, layout.num_prefix, (layout.grid,))
        for path in paths
        for name, module in root.get_submodule(path).named_modules()
        if type(module).__name__ in ("BeitRelativePositionBias", "Data2VecVisionRelativePositionBias")
    ]
    return tuple(found)


def _takes_bias(attention: nn.Module) -> bool:
    """Whether a mask may differ from head to head: in transformers 4 there is none, or one for all heads."""
    import transformers

    new = int(transformers.__version__.split(".")[0]) >= 5
    return new and "attention_mask" in inspect.signature(attention.forward).parameters


def measure(root: nn.Module) -> tuple[Grid, tuple[int, int]]:
    """Grid and patch size that the model was made for."""
    config: Any = root.config
    (height, width), (ph, pw) = _pair(config.image_size), _pair(config.patch_size)
    return (height // ph, width // pw), (ph, pw)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def blueprint(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Class name and configuration of one of the library's own models; None for a model around one."""
    cls: Any = type(model)
    if not cls.__module__.startswith("transformers.models.") or not hasattr(model, "config"):
        return None
    config: Any = model.config
    return cls.__name__, json.loads(config.to_json_string(use_diff=False))


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """One of the library's own model classes from a configuration, with random weights."""
    import transformers

    cls: Any = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise LapeError(f"{name!r} is not a model class of transformers {transformers.__version__}")
    config_class: Any = cls.config_class
    model: nn.Module = cls(config_class.from_dict(kwargs))
    return model


TRANSFORMERS = Host(
    name="Hugging Face vision encoder",
    root_classes=(*FAMILIES, *_REFUSED_EMBEDDINGS),
    root_child="embeddings",
    block_classes=tuple(family.layer for family in FAMILIES.values()),
    examine=examine,
    package="transformers",
    blueprint=blueprint,
    build=build,
    measure=measure,
    note="ViT, DeiT, DINOv2 (with registers), BEiT, Data2Vec, ViT-MSN, ViT-MAE, I-JEPA, DPT, TIPSv2, Pixio, the vision "
    "encoders of CLIP, MetaCLIP 2, AltCLIP, ChineseCLIP, CLIPSeg, OWL-ViT, OWLv2, BLIP, BLIP-2, SigLIP; what holds one",
    tested=("transformers 4.49.0 (without relative bias)", "transformers 5.23.0"),
    refused=_REFUSED_EMBEDDINGS,
)


# SAM: maps (B, rows, columns, D), global and windowed attention, one size

_SAM = ("transformers.models.sam.modeling_sam.SamVision", "transformers.models.sam_hq.modeling_sam_hq.SamHQVision")


def examine_sam(root: nn.Module) -> Anatomy:
    """`layer_norm1` stands before the windows are cut, so a position joins the whole map."""
    prefix = class_name(type(root)).removesuffix("Encoder")
    paths = [f"layers.{name}" for name, _ in root.get_submodule("layers").named_children()]
    check_blocks("Hugging Face", root, paths, (f"{prefix}Layer",), {})
    config: Any = root.config
    grid, patch_size = measure(root)
    return Anatomy(
        root=root,
        blocks=tuple(paths),
        norm="layer_norm1",
        attention="attn",
        table="pos_embed" if root.pos_embed is not None else None,
        table_slot="pos_embed" if root.pos_embed is not None else None,
        layout=Layout(grid, prefix_rows=0),
        patch_size=patch_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        add_bias=None,
        beside=RELATIVE if config.use_rel_pos else None,
        maps=True,
    )


SAM = Host(
    name="Hugging Face SAM",
    root_classes=tuple(f"{prefix}Encoder" for prefix in _SAM),
    block_classes=tuple(f"{prefix}Layer" for prefix in _SAM),
    examine=examine_sam,
    package="transformers",
    blueprint=blueprint,
    note="SAM and SAM-HQ: the table of the image encoder, beside its relative bias; one size",
    tested=("transformers 5.23.0",),
)


# Swin, and its copies in Donut and MaskFormer: tokens (B, N, D) whose grid halves from stage to stage

_MODELS = "transformers.models"
_SWIN = (
    f"{_MODELS}.swin.modeling_swin.Swin",
    f"{_MODELS}.donut.modeling_donut_swin.DonutSwin",
    f"{_MODELS}.maskformer.modeling_maskformer_swin.MaskFormerSwin",
)
_SWIN_TABLE = "embeddings.position_embeddings"


def examine_swin(root: nn.Module) -> Anatomy:
    """Where a Swin of the library keeps its stages; its table, where it has one, is over the grid of the first."""
    embeddings: Any = root.get_submodule("embeddings")
    prefix = class_name(type(embeddings)).removesuffix("Embeddings")
    paths = [path for path, module in root.named_modules() if class_name(type(module)) == f"{prefix}Layer"]
    check_blocks("Hugging Face", root, paths, (f"{prefix}Layer",), {})
    config: Any = root.config
    grid, patch_size = tuple(embeddings.patch_embeddings.grid_size), tuple(embeddings.patch_embeddings.patch_size)
    layout = Layout(grid, prefix_rows=0)
    table: Tensor | None = embeddings.position_embeddings
    if table is not None and table.shape[-2] != layout.num_rows:
        raise UnsupportedModelError(
            f"{_SWIN_TABLE} has shape {tuple(table.shape)}, expected {layout.num_rows} rows: the class adds it to "
            f"{layout.num_rows} patches, which fails"
        )
    stages: list[Stage] = []
    merging = None
    for path, module in root.named_modules():
        if class_name(type(module)) == f"{prefix}Stage":
            width = module.get_submodule("blocks.0.layernorm_before").normalized_shape[0]
            stages.append(Stage(len(module.get_submodule("blocks")), grid, width, merging, merges_map=False))
            merging, grid = f"{path}.downsample", tuple((side + 1) // 2 for side in grid)
    return Anatomy(
        root=root,
        blocks=tuple(paths),
        norm="layernorm_before",
        attention="attention",
        table=None if table is None else _SWIN_TABLE,
        table_slot=_SWIN_TABLE,
        layout=layout,
        patch_size=patch_size,
        width=config.embed_dim,
        num_heads=config.num_heads[0],
        add_bias=None,
        adds=("embeddings.forward",),
        beside=RELATIVE,
        own_bias=_swin_bias(root, paths),
        stages=tuple(stages),
    )


def _swin_bias(root: nn.Module, paths: list[str]) -> tuple[OwnBias, ...]:
    """The module that computes the bias of each layer; earlier versions and the copies compute it inline."""
    own = [f"{path}.attention.relative_position_bias" for path in paths]
    found: list[Any] = [dict(root.named_modules()).get(path) for path in own]
    if not all(hasattr(module, "window_area") for module in found):
        return ()
    return tuple(OwnBias(f"{path}.forward", m.window_area) for path, m in zip(own, found, strict=True))


SWIN = Host(
    name="Hugging Face Swin",
    root_classes=tuple(f"{prefix}Embeddings" for prefix in _SWIN),
    root_child="embeddings",
    block_classes=tuple(f"{prefix}Layer" for prefix in _SWIN),
    examine=examine_swin,
    package="transformers",
    blueprint=blueprint,
    note="Swin, also in Donut and MaskFormer: its table or a new one, merged from stage to stage; one size",
    tested=("transformers 5.23.0",),
    refused={
        f"{_MODELS}.swinv2.modeling_swinv2.Swinv2Layer": (
            "its norm stands behind attention (post-norm), so no norm feeds attention"
        )
    },
)

HOSTS = (TRANSFORMERS, SWIN, SAM)
