"""Hugging Face transformers, 4.x and 5.x: vision encoders with an absolute position table and pre-norm layers.

The library moved its block lists between versions, so the encoder is found by the class of its `embeddings` and its
layers by their class, wherever they are.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy
from lape.core.bias import OwnBias, masked
from lape.core.position import Grid, Layout
from lape.core.stages import Stage
from lape.errors import LapeError, UnsupportedModelError
from lape.host.base import Blueprint, Host, class_name
from lape.host.parts import POST_NORM, RELATIVE, SHARED, Call, anatomy, check_blocks, children, instances, table_in


def _class(folder: str, name: str, file: str = "") -> str:
    """The full name of a class of the library, whose file is mostly named as its folder."""
    return f"transformers.models.{folder}.modeling_{file or folder}.{name}"


@dataclass(frozen=True)
class Family:
    """One architecture of the library, as data; `read(root, blocks, layout)` gives fields of `Anatomy` beside it."""

    owner: str  # "module.Class" of the encoder's embeddings, or of an encoder without
    layer: str  # "module.Class" of the blocks, wherever they are, unless
    layers: str | None = None  # their list is in one place
    norm: str = "layernorm_before"
    attention: str = "attention"
    table: str = "embeddings.position_embeddings"
    patch_embed: str | None = "embeddings.patch_embeddings"
    prefix_rows: int | str = 1  # or the name of the config's entry
    registers: bool = False  # whether config.num_register_tokens tokens stand between class token and patches
    shuffle: str | None = None  # a method that shuffles and drops patches
    frozen_kind: str = "learnable"  # what the family's own table is while it is frozen
    read: Callable[[Any, list[str], Layout], dict[str, Any]] = lambda root, blocks, layout: {}


def _family(folder: str, name: str, file: str = "", **more: Any) -> Family:
    return Family(_class(folder, f"{name}Embeddings", file), _class(folder, f"{name}Layer", file), **more)


def _clip_like(folder: str, name: str, layer: str = "EncoderLayer", weight: str = ".weight", rows: int = 1) -> Family:
    table, patches = f"embeddings.position_embedding{weight}", "embeddings.patch_embedding"
    classes = _class(folder, f"{name}VisionEmbeddings"), _class(folder, f"{name}{layer}")
    return Family(*classes, None, "layer_norm1", "self_attn", table, patches, rows)


def _sam(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    """On maps: `layer_norm1` stands before the windows are cut, so a position joins the whole map."""
    slot = "pos_embed" if root.pos_embed is not None else None
    beside = RELATIVE if root.config.use_rel_pos else None
    return {"slot": slot, "add_bias": None, "adds": (), "beside": beside, "maps": True}


def _swin(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    """On tokens whose grid halves from stage to stage; a table, where there is one, is over that of the first."""
    prefix = class_name(type(root.embeddings)).removesuffix("Embeddings")
    stages: list[Stage] = []
    grid, merging = layout.grid, None
    for path in instances(root, f"{prefix}Stage"):
        inside = children(root, f"{path}.blocks")
        width = root.get_submodule(f"{inside[0]}.layernorm_before").normalized_shape[0]
        stages.append(Stage(len(inside), grid, width, merging, merges_map=False))
        merging, grid = f"{path}.downsample", ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    # Earlier versions and the copies compute the bias inline.
    modules, paths = dict(root.named_modules()), [f"{path}.attention.relative_position_bias" for path in blocks]
    own = all(hasattr(modules.get(path), "window_area") for path in paths)
    return {
        "width": root.config.embed_dim,
        "num_heads": root.config.num_heads[0],
        "add_bias": None,
        "beside": RELATIVE,
        "own_bias": tuple(OwnBias(f"{path}.forward", modules[path].window_area) for path in paths) if own else (),
        "stages": tuple(stages),
        "reason": f"the class adds it to {layout.num_patches} patches, which fails",
    }


_ENCODERS = (
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
    _clip_like("blip", "Blip", weight=""),
    _clip_like("blip_2", "Blip2", weight=""),
    _clip_like("siglip", "Siglip", rows=0),
)
_SWIN: dict[str, Any] = {"patch_embed": None, "prefix_rows": 0, "read": _swin}
_SWINS = (  # with its copies
    _family("swin", "Swin", **_SWIN),
    _family("donut", "DonutSwin", "donut_swin", **_SWIN),
    _family("maskformer", "MaskFormerSwin", "maskformer_swin", **_SWIN),
)
_SAM = ("layers", "layer_norm1", "attn", "pos_embed", None, 0)
_SAMS = (
    Family(_class("sam", "SamVisionEncoder"), _class("sam", "SamVisionLayer"), *_SAM, read=_sam),
    Family(_class("sam_hq", "SamHQVisionEncoder"), _class("sam_hq", "SamHQVisionLayer"), *_SAM, read=_sam),
)
FAMILIES = {family.owner: family for family in (*_ENCODERS, *_SWINS, *_SAMS)}

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
    name = class_name(type(root._modules.get("embeddings", root)))
    if name in _REFUSED:
        raise UnsupportedModelError(f"{class_name(type(root))} cannot be converted: {_REFUSED[name]}")
    family = FAMILIES[name]
    blocks = children(root, family.layers) if family.layers else instances(root, family.layer)
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
    fields: dict[str, Any] = {
        "slot": family.table,
        "width": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "patch_embed": family.patch_embed,
        "add_bias": add_to_attention_mask if _takes_bias(attention) else None,
        "own_kind": "learnable" if table is None or table.requires_grad else family.frozen_kind,
        "shuffle": family.shuffle,
        "adds": ("embeddings.forward",),
        "beside": RELATIVE if getattr(config, "use_relative_position_bias", False) else SHARED if shared else None,
        "own_bias": _own_bias(root, blocks, layout),
        **family.read(root, blocks, layout),
    }
    return anatomy(root, blocks, layout, norm=family.norm, attention=family.attention, patch_size=patch_size, **fields)


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


def add_to_attention_mask(bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
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


# Entries of a configuration that name weights, files or code: a backbone of the Hub, a kernel, a class to import.
_ELSEWHERE = frozenset(
    "backbone use_timm_backbone use_pretrained_backbone backbone_kwargs auto_map custom_pipelines trust_remote_code "
    "quantization_config compression_config model_args architecture pretrained_cfg adapter_kwargs use_kernels "
    "kernel_config base_model_name_or_path".split()
)
_ATTENTION = ("eager", "sdpa")


def check_arguments(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises LapeError for an entry, at any depth, that has the library fetch weights, a kernel or code, or that
    is named like a method of configurations."""
    config_class = _model_class(name).config_class
    for key, value in _entries(kwargs):
        if key in _ELSEWHERE and value not in (None, False, "", {}, []):
            raise LapeError(f"{key!r} names weights or code of somewhere else")
        if "attn_implementation" in key and value not in (None, False, *_ATTENTION):
            raise LapeError(f"{key!r} may be {' or '.join(_ATTENTION)}, not {value!r}")
        if key.startswith("__") or callable(getattr(config_class, key, None)):
            raise LapeError(f"{key!r} is no entry of a configuration")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            if key not in ("id2label", "label2id"):
                yield from _entries(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _entries(inner)


def _model_class(name: str) -> Any:
    import transformers

    cls: Any = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise LapeError(f"{name!r} is not a model class of transformers {transformers.__version__}")
    return cls


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """One of the library's own model classes from a configuration, with random weights."""
    cls = _model_class(name)
    config = cls.config_class.from_dict(kwargs)
    check_arguments(name, config.to_dict())  # what the file does not say is the library's default
    model: nn.Module = cls(config)
    return model


def _host(name: str, families: tuple[Family, ...], note: str, refused: dict[str, str], *earlier: str) -> Host:
    """One row of the table. Refused embeddings are roots as well: `examine` says why."""
    roots = [family.owner for family in families] + [name for name in refused if name.endswith("Embeddings")]
    layers = tuple(family.layer for family in families)
    child = "embeddings" if roots[0].endswith("Embeddings") else None
    host = Host(name, tuple(roots), layers, examine, measure, note, "transformers", blueprint, build)
    host = replace(host, root_child=child, check_arguments=check_arguments, refused=refused)
    return replace(host, tested=(*earlier, "transformers 5.23.0"))


HOSTS = (
    _host(
        "Hugging Face vision encoder",
        _ENCODERS,
        "ViT, DeiT, DINOv2 (with registers), BEiT, Data2Vec, ViT-MSN, ViT-MAE, I-JEPA, DPT, TIPSv2, Pixio, the "
        "vision encoders of CLIP, MetaCLIP 2, AltCLIP, ChineseCLIP, CLIPSeg, OWL-ViT, OWLv2, BLIP, BLIP-2, SigLIP; "
        "what holds one",
        _REFUSED,
        "transformers 4.49.0 (without relative bias)",
    ),
    _host(
        "Hugging Face Swin",
        _SWINS,
        "Swin, also in Donut and MaskFormer: its table or a new one, merged from stage to stage; one size",
        {_class("swinv2", "Swinv2Layer"): POST_NORM},
    ),
    _host(
        "Hugging Face SAM",
        _SAMS,
        "SAM and SAM-HQ: the table of the image encoder, beside its relative bias; one size",
        {},
    ),
)
