"""Hugging Face transformers, 4.x and 5.x: vision encoders with an absolute position table and pre-norm layers.

The library moved its block lists between versions, so the encoder is found by the class of its `embeddings` and its
layers by their class, wherever they are.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy
from lape.core.bias import OwnBias, masked
from lape.core.position import Grid, Layout
from lape.core.stages import Stage
from lape.errors import LapeError, UnsupportedModelError
from lape.host.base import Blueprint, Host, class_name
from lape.host.parts import POST_NORM, RELATIVE, SHARED, anatomy, check_blocks, children, instances, table_in


def _class(folder: str, name: str, file: str = "") -> str:
    """The full name of a class of the library, whose file is mostly named as its folder."""
    return f"transformers.models.{folder}.modeling_{file or folder}.{name}"


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


def _family(folder: str, name: str, file: str = "", **more: Any) -> Family:
    return Family(_class(folder, f"{name}Embeddings", file), _class(folder, f"{name}Layer", file), **more)


def _clip_like(
    folder: str, name: str, layer: str = "EncoderLayer", table: str = "position_embedding.weight", prefix_rows: int = 1
) -> Family:
    return Family(
        _class(folder, f"{name}VisionEmbeddings"),
        _class(folder, f"{name}{layer}"),
        norm="layer_norm1",
        attention="self_attn",
        table=f"embeddings.{table}",
        patch_embed="embeddings.patch_embedding",
        prefix_rows=prefix_rows,
    )


_FAMILIES = (
    _family("vit", "ViT"),
    _family("deit", "DeiT", prefix_rows=2),
    _family("vit_msn", "ViTMSN"),
    _family("vit_mae", "ViTMAE", shuffle="embeddings.random_masking", frozen_kind="2D_sin"),
    _family("ijepa", "IJepa", prefix_rows=0),
    _family("beit", "Beit"),
    _family("data2vec", "Data2VecVision", "data2vec_vision"),
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
FAMILIES = {family.embeddings: family for family in _FAMILIES}

_ROTARY = "it has rotary position embedding inside attention and no table to join"
_WINDOWS = "it cuts an image into windows, which stand side by side in the batch before its layers"
_VIDEO = "its tokens are those of a video: a grid has rows and columns only"
_REFUSED = {
    _class("siglip2", "Siglip2VisionEmbeddings"): (
        "it packs images of different grids into one batch, so that the position differs from image to image"
    ),
    _class("dinov3_vit", "DINOv3ViTEmbeddings"): _ROTARY,
    _class("yolos", "YolosEmbeddings"): (
        "its position table covers detection tokens behind the patches, and it resamples for every image size"
    ),
    _class("vitdet", "VitDetEmbeddings"): (
        "its blocks take maps with channels first, and its table has the row of a class token that it does not have"
    ),
    _class("vitpose_backbone", "VitPoseBackboneEmbeddings"): "it adds the class row of its table to every patch",
    _class("rf_detr", "RfDetrDinov2Embeddings"): _WINDOWS,
    _class("lw_detr", "LwDetrViTEmbeddings"): _WINDOWS,
    _class("mlcd", "MLCDVisionEmbeddings"): _ROTARY,
    _class("sapiens2", "Sapiens2Embeddings"): _ROTARY,
    _class("aimv2", "Aimv2VisionEmbeddings"): "its RMSNorm is the library's own; timm's AIMv2 can be converted",
    _class("videomae", "VideoMAEEmbeddings"): _VIDEO,
    _class("vivit", "VivitEmbeddings"): _VIDEO,
    _class("timesformer", "TimesformerEmbeddings"): _VIDEO,
}


def examine(root: nn.Module) -> Anatomy:
    """Where an encoder of the library keeps its layers, its table and its grid. Raises UnsupportedModelError."""
    name = class_name(type(root.get_submodule("embeddings")))
    if name in _REFUSED:
        raise UnsupportedModelError(f"{class_name(type(root))} cannot be converted: {_REFUSED[name]}")
    family = FAMILIES[name]
    blocks = instances(root, family.layer)
    check_blocks("Hugging Face", root, blocks, (family.layer,))
    first = root.get_submodule(blocks[0])
    norm, attention = getattr(first, family.norm), getattr(first, family.attention)
    if not isinstance(norm, nn.LayerNorm):
        raise UnsupportedModelError(f"{blocks[0]}.{family.norm} is a {class_name(type(norm))}, not a LayerNorm")
    config: Any = root.config
    grid, patch_size = measure(root)
    rows = family.prefix_rows if isinstance(family.prefix_rows, int) else getattr(config, family.prefix_rows)
    layout = Layout(grid, rows, config.num_register_tokens if family.registers else 0)
    table = table_in(root, family.table)
    shared = getattr(config, "use_shared_relative_position_bias", False)
    return anatomy(
        root,
        blocks,
        family.table,
        layout,
        norm=family.norm,
        attention=family.attention,
        patch_size=patch_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        patch_embed=family.patch_embed,
        add_bias=add_to_attention_mask if _takes_bias(attention) else None,
        own_kind="learnable" if table is None or table.requires_grad else family.frozen_kind,
        shuffle=family.shuffle,
        adds=("embeddings.forward",),
        beside=RELATIVE if getattr(config, "use_relative_position_bias", False) else SHARED if shared else None,
        own_bias=_own_bias(root, blocks, layout),
    )


def _own_bias(root: nn.Module, blocks: list[str], layout: Layout) -> tuple[OwnBias, ...]:
    """The module in each layer of BEiT and its kin that computes its relative position bias, where layers have one."""
    return tuple(
        OwnBias(f"{path}.{name}.forward", layout.num_patches, layout.num_prefix, (layout.grid,))
        for path in blocks
        for name, module in root.get_submodule(path).named_modules()
        if type(module).__name__ in ("BeitRelativePositionBias", "Data2VecVisionRelativePositionBias")
    )


def _takes_bias(attention: nn.Module) -> bool:
    """Whether a mask may differ from head to head: in transformers 4 there is none, or one for all heads."""
    import transformers

    new = int(transformers.__version__.split(".")[0]) >= 5
    return new and "attention_mask" in inspect.signature(attention.forward).parameters


def add_to_attention_mask(
    bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For attention(hidden_states, attention_mask=..., ...), an additive mask."""
    if len(args) > 1:
        x, mask, *rest = args
        return (x, masked(bias_1HNN, mask), *rest), kwargs
    return args, {**kwargs, "attention_mask": masked(bias_1HNN, kwargs.get("attention_mask"))}


def measure(root: nn.Module) -> tuple[Grid, tuple[int, int]]:
    """Grid and patch size that the model was made for."""
    config: Any = root.config
    (height, width), (ph, pw) = _pair(config.image_size), _pair(config.patch_size)
    return (height // ph, width // pw), (ph, pw)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def blueprint(model: nn.Module) -> Blueprint | None:
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


_SAM = (_class("sam", "SamVision"), _class("sam_hq", "SamHQVision"))


def examine_sam(root: nn.Module) -> Anatomy:
    """SAM, on maps: `layer_norm1` stands before the windows are cut, so a position joins the whole map."""
    blocks = children(root, "layers")
    check_blocks("Hugging Face", root, blocks, (class_name(type(root)).removesuffix("Encoder") + "Layer",))
    config: Any = root.config
    grid, patch_size = measure(root)
    return anatomy(
        root,
        blocks,
        "pos_embed" if root.pos_embed is not None else None,
        Layout(grid, prefix_rows=0),
        norm="layer_norm1",
        attention="attn",
        patch_size=patch_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        add_bias=None,
        beside=RELATIVE if config.use_rel_pos else None,
        maps=True,
    )


_SWIN = (  # with its copies
    _class("swin", "Swin"),
    _class("donut", "DonutSwin", "donut_swin"),
    _class("maskformer", "MaskFormerSwin", "maskformer_swin"),
)


def examine_swin(root: nn.Module) -> Anatomy:
    """Swin, on tokens whose grid halves from stage to stage; its table, where it has one, is over that of the first."""
    embeddings: Any = root.get_submodule("embeddings")
    prefix = class_name(type(embeddings)).removesuffix("Embeddings")
    blocks = instances(root, f"{prefix}Layer")
    check_blocks("Hugging Face", root, blocks, (f"{prefix}Layer",))
    config: Any = root.config
    grid: Grid = tuple(embeddings.patch_embeddings.grid_size)
    layout = Layout(grid, prefix_rows=0)
    stages: list[Stage] = []
    merging = None
    for path in instances(root, f"{prefix}Stage"):
        stage = root.get_submodule(path)
        width: Any = stage.get_submodule("blocks.0.layernorm_before").normalized_shape
        stages.append(Stage(len(children(stage, "blocks")), grid, width[0], merging, merges_map=False))
        merging, grid = f"{path}.downsample", ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return anatomy(
        root,
        blocks,
        "embeddings.position_embeddings",
        layout,
        f"the class adds it to {layout.num_rows} patches, which fails",
        norm="layernorm_before",
        attention="attention",
        patch_size=tuple(embeddings.patch_embeddings.patch_size),
        width=config.embed_dim,
        num_heads=config.num_heads[0],
        add_bias=None,
        adds=("embeddings.forward",),
        beside=RELATIVE,
        own_bias=_swin_bias(root, blocks),
        stages=tuple(stages),
    )


def _swin_bias(root: nn.Module, blocks: list[str]) -> tuple[OwnBias, ...]:
    """The module that computes the bias of each layer; earlier versions and the copies compute it inline."""
    modules: dict[str, Any] = dict(root.named_modules())
    paths = [f"{path}.attention.relative_position_bias" for path in blocks]
    if not all(hasattr(modules.get(path), "window_area") for path in paths):
        return ()
    return tuple(OwnBias(f"{path}.forward", modules[path].window_area) for path in paths)


_host = partial(Host, package="transformers", blueprint=blueprint)

TRANSFORMERS = _host(
    "Hugging Face vision encoder",
    root_classes=(*FAMILIES, *_REFUSED),
    root_child="embeddings",
    block_classes=tuple(family.layer for family in _FAMILIES),
    examine=examine,
    build=build,
    measure=measure,
    note="ViT, DeiT, DINOv2 (with registers), BEiT, Data2Vec, ViT-MSN, ViT-MAE, I-JEPA, DPT, TIPSv2, Pixio, the vision "
    "encoders of CLIP, MetaCLIP 2, AltCLIP, ChineseCLIP, CLIPSeg, OWL-ViT, OWLv2, BLIP, BLIP-2, SigLIP; what holds one",
    tested=("transformers 4.49.0 (without relative bias)", "transformers 5.23.0"),
    refused=_REFUSED,
)
SWIN = _host(
    "Hugging Face Swin",
    root_classes=tuple(f"{prefix}Embeddings" for prefix in _SWIN),
    root_child="embeddings",
    block_classes=tuple(f"{prefix}Layer" for prefix in _SWIN),
    examine=examine_swin,
    note="Swin, also in Donut and MaskFormer: its table or a new one, merged from stage to stage; one size",
    tested=("transformers 5.23.0",),
    refused={_class("swinv2", "Swinv2Layer"): POST_NORM},
)
SAM = _host(
    "Hugging Face SAM",
    root_classes=tuple(f"{prefix}Encoder" for prefix in _SAM),
    block_classes=tuple(f"{prefix}Layer" for prefix in _SAM),
    examine=examine_sam,
    note="SAM and SAM-HQ: the table of the image encoder, beside its relative bias; one size",
    tested=("transformers 5.23.0",),
)
HOSTS = (TRANSFORMERS, SWIN, SAM)
