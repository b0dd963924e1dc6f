"""Hugging Face transformers, 4.x and 5.x: vision encoders with an absolute position table and pre-norm layers.

The library moved its block lists between versions, so the encoder is found by the class of its `embeddings` and its
layers by their class, wherever they are.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.core.anatomy import Anatomy, Form
from lape.core.bias import BlockBias, masked
from lape.core.grids import grid_of_map
from lape.core.position import Grid, Layout, resample
from lape.core.stages import Stage, over_tokens
from lape.errors import LapeError
from lape.host.base import Blueprint, Host, class_name
from lape.host.configurations import ORIGIN, check_entries, check_origin, declared_in
from lape.host.parts import (
    POST_NORM,
    RELATIVE,
    ROTARY,
    SHARED,
    Call,
    check_blocks,
    check_norms,
    checked_anatomy,
    children,
    instances,
    table_in,
)


def _class(folder: str, name: str, file: str = "") -> str:
    """The full name of a class of the library, whose file is mostly named as its folder."""
    return f"transformers.models.{folder}.modeling_{file or folder}.{name}"


Sizes = tuple[Grid, tuple[int, ...]]
"""Grid and patch size."""


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _divided(pixels: tuple[int, ...], patch: tuple[int, ...]) -> Sizes:
    return tuple(side // step for side, step in zip(pixels, patch, strict=True)), patch


def _sizes(root: Any) -> Sizes:
    return _divided(_pair(root.config.image_size), _pair(root.config.patch_size))


@dataclass(frozen=True)
class Family:
    """One architecture of the library, as data; `read(root, blocks, layout)` gives fields of `Anatomy` beside it."""

    owner: str  # "module.Class" of the encoder's embeddings, or of an encoder without
    layer: str  # "module.Class" of the blocks, wherever they are, unless
    layers: str | None = None  # their list is in one place
    norm: str = "layernorm_before"
    attention: str = "attention"
    table: str | None = "embeddings.position_embeddings"  # None: the encoder adds none
    patch_embed: str | None = "embeddings.patch_embeddings"
    prefix_rows: int | str = 1  # or the name of the config's entry
    bare: int = 0  # class tokens without a row
    registers: bool = False  # whether config.num_register_tokens tokens stand between class token and patches
    shuffle: str | None = None  # a method that shuffles and drops patches
    frozen_kind: str = "learnable"  # what the family's own table is while it is frozen
    read: Callable[[Any, list[str], Layout], dict[str, Any]] = lambda root, blocks, layout: {}
    sizes: Callable[[Any], Sizes] = _sizes
    suffix_rows: int | str = 0  # tokens behind the patches that own a row, or the name of the config's entry


def _family(folder: str, name: str, file: str = "", **more: Any) -> Family:
    return Family(_class(folder, f"{name}Embeddings", file), _class(folder, f"{name}Layer", file), **more)


def _clip_like(
    folder: str, name: str, layer: str = "EncoderLayer", weight: str = ".weight", rows: int = 1, **more: Any
) -> Family:
    table, patches = f"embeddings.position_embedding{weight}", "embeddings.patch_embedding"
    classes = _class(folder, f"{name}VisionEmbeddings"), _class(folder, f"{name}{layer}")
    more = {"norm": "layer_norm1", "attention": "self_attn", "table": table, "patch_embed": patches, **more}
    return Family(*classes, prefix_rows=rows, **more)


# ---------------------------------------------------------------- encoders without a table, and with rotary position


def _rotary(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    return {"beside": ROTARY, "input": "embeddings"}


def _dinov3_like(folder: str, name: str, **more: Any) -> Family:
    """As timm's: a new table has rows for class token and registers, too."""
    return _family(folder, name, norm="norm1", table=None, registers=True, read=_rotary, **more)


# ------------------------------------------------------ tables read or resampled in ways of their own


def _class_row_everywhere(table_1RD: Tensor) -> Tensor:
    return table_1RD[:, 1:] + table_1RD[:, :1]


def _vitpose(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    return {"form": Form(_class_row_everywhere), "add_bias": None, "input": "embeddings"}


def _for_image(table_1RD: Tensor, skip: int, source_grid: Grid, grid: Grid, resample: Callable[..., Tensor]) -> Tensor:
    """A table of the grid of pretraining, as the model adds it."""
    rows_1RD: Tensor = resample(table_1RD[:, skip:], Layout(source_grid, 0), grid)
    return rows_1RD


def _pretrained_grid(root: Any, layout: Layout, skip: int, resample: Callable[..., Tensor]) -> dict[str, Any]:
    source_grid, _ = _divided(_pair(root.config.pretrain_image_size), _pair(root.config.patch_size))
    form = Form(partial(_for_image, skip=skip, source_grid=source_grid, grid=layout.grid, resample=resample))
    return {"form": form, "resample": resample}


_bicubic = partial(resample, antialias=False)


def _vitdet(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    """On maps, whose table has the row of a class token that the model does not have."""
    beside = RELATIVE if root.config.use_relative_position_embeddings else None
    table = "embeddings.position_embeddings" if root.embeddings.position_embeddings is not None else None
    fields = _pretrained_grid(root, layout, 1, _bicubic) if table else {}
    return {"slot": table, "beside": beside, "add_bias": None, "maps": True, "channels_first": True, **fields}


def _tiled(p_1RD: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """The table side by side with itself, cut at the border."""
    tile = p_1RD.unflatten(1, layout.grid)
    times = [1, *(side // period + 1 for side, period in zip(grid, layout.grid, strict=True)), 1]
    rows_1RD: Tensor = tile.repeat(*times)[:, : grid[0], : grid[1]].flatten(1, 2)
    return rows_1RD


def _sam3(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    return {"beside": ROTARY, "add_bias": None, "maps": True, **_pretrained_grid(root, layout, 0, _tiled)}


def _in_windows(p_1ND: Tensor, grid: Grid, layer: int, side: int, prefix: int) -> Tensor:
    """(1, N, D) -> (side x side, n, D): the patches of each window, behind the prefix tokens."""
    (rows, columns), patches_1nD = grid, p_1ND[:, prefix:]
    windows_WnD = (
        patches_1nD.reshape(side, rows // side, side, columns // side, -1).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    )
    return torch.cat([p_1ND[:, :prefix].expand(side**2, -1, -1), windows_WnD], dim=1)


def _lw_detr(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    windows = partial(_in_windows, side=root.config.num_windows_side, prefix=0)
    return {"windows": windows, "add_bias": None, **_pretrained_grid(root, layout, 1, _bicubic)}


def _rf_detr(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    windows = partial(_in_windows, side=root.config.num_windows, prefix=1)
    return {"windows": windows if root.config.num_windows > 1 else None, "add_bias": None}


def _yolos(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    beside = "a table added to the stream between blocks" if root.config.use_mid_position_embeddings else None
    return {"resample": _bicubic, "beside": beside, "add_bias": None}


# ---------------------------------------------------------------- images of several grids


def _patch_ids(ids_BN: Tensor, rows: Any) -> Tensor:
    """The host looks up the rows of each image itself, and patches are rows."""
    return ids_BN


def _nearest_rows(p_1RD: Tensor, layout: Layout, grid: Grid) -> Tensor:
    """As the host picks them: the row in which the upper left corner of a patch lies."""
    places = [
        (torch.arange(n) * (side / n)).clamp(max=side - 1e-6).long() for n, side in zip(grid, layout.grid, strict=True)
    ]
    rows_1RD: Tensor = p_1RD.unflatten(1, layout.grid)[:, places[0]][:, :, places[1]].flatten(1, 2)
    return rows_1RD


def _picks(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    method = "embeddings.position_embedding.forward"
    return {"shuffle": method, "kept_patches": _patch_ids, "resample": _nearest_rows, "add_bias": None}


def _grids_of_shapes(pixels: Tensor, spatial_shapes: Tensor) -> list[Grid]:
    return [tuple(shape) for shape in spatial_shapes.tolist()]


def _siglip2(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    watch = {"packed_grids": _grids_of_shapes, "patch_embed": "embeddings"}
    table = {"resample": partial(resample, mode="bilinear"), "add_bias": None}
    return {**watch, **table, "queries_keys": "takes images of several grids"}


def _siglip2_sizes(root: Any) -> Sizes:
    side = math.isqrt(root.config.num_patches)
    return (side, side), _pair(root.config.patch_size)


# ---------------------------------------------------------------- sound and video


def _ast_sizes(root: Any) -> Sizes:
    config, (frequency, time) = root.config, (root.config.frequency_stride, root.config.time_stride)
    rows, columns = (config.num_mel_bins - config.patch_size), (config.max_length - config.patch_size)
    return (rows // frequency + 1, columns // time + 1), (frequency, time)


def _ast(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    return {"pixels": (root.config.num_mel_bins, root.config.max_length)}


def _video_sizes(root: Any) -> Sizes:
    config: Any = root.config
    tubelet = config.tubelet_size
    patch = (tubelet, *_pair(config.patch_size)) if isinstance(tubelet, int) else tuple(tubelet)
    frames = getattr(config, "num_frames", None) or config.frames_per_clip
    pixels = (frames, *_pair(getattr(config, "image_size", None) or config.crop_size))
    return _divided(pixels, patch)


def _videomae(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    """Its sine table is a plain tensor, in whose place a table can be joined; pe='1D_sin' has the same values."""
    return {"encoder": ("embeddings.position_embeddings",), "input": "embeddings", "add_bias": None}


def _timesformer_sizes(root: Any) -> Sizes:
    grid, patch = _sizes(root)
    spatial = root.config.attention_type == "space_only"
    return (grid, patch) if spatial else ((root.config.num_frames, *grid), (1, *patch))


def _timesformer(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    """P_(t, i) = table_i + times_t. An attention along time and one within a frame are two layers, in this order:

    x' = x + MSA(LN(x)) holds for each by itself, with a norm that feeds it alone.
    """
    fields: dict[str, Any] = {"add_bias": None, "input": "embeddings"}
    if len(layout.grid) == 2:  # each frame is an image of the batch
        return fields
    fields |= {"form": Form(_sum_over_time, ("embeddings.time_embeddings",)), "windows": _frames_last}
    if root.config.attention_type == "divided_space_time":
        parts = (("temporal_attention", "temporal_layernorm"), ("attention", "layernorm_before"))
        layers = [(f"{path}.{attention}", f"{path}.{norm}") for path in blocks for attention, norm in parts]
        fields["blocks"], fields["norms"] = zip(*layers, strict=True)
        fields |= {"branches": True, "windows": _along_time_then_within_frames}
    return fields


def _sum_over_time(table_1RD: Tensor, times_1TD: Tensor) -> Tensor:
    patches_1TnD = table_1RD[:, None, 1:] + times_1TD[:, :, None]
    return torch.cat([table_1RD[:, :1], patches_1TnD.flatten(1, 2)], dim=1)


def _frames_last(p_1ND: Tensor, grid: Grid, layer: int) -> Tensor:
    """In the order of TimeSformer's tokens: the frames of a place side by side."""
    patches_1nD = p_1ND[:, 1:].unflatten(1, (grid[0], -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([p_1ND[:, :1], patches_1nD], dim=1)


def _along_time_then_within_frames(p_1ND: Tensor, grid: Grid, layer: int) -> Tensor:
    """(1, N, D) -> (places, T, D), patches alone, or (T, 1 + places, D); the stream itself before the first layer."""
    if layer < 0:
        return _frames_last(p_1ND, grid, layer)
    patches_TnD: Tensor = p_1ND[0, 1:].unflatten(0, (grid[0], -1))
    if layer % 2 == 0:
        return patches_TnD.transpose(0, 1)
    return torch.cat([p_1ND[:, :1].expand(grid[0], -1, -1), patches_TnD], dim=1)


# ---------------------------------------------------------------- Hiera: attention pools its queries at a border


def _by_border(block: Any, p_1nD: Tensor, grid: Grid, norm: str, strides: tuple[int, ...]) -> Tensor:
    """The position as the block at a border makes the stream: normed, projected and pooled by its largest values."""
    map_1DRC = block.proj(getattr(block, norm)(p_1nD)).transpose(1, 2).unflatten(2, grid)
    return F.max_pool2d(map_1DRC, strides).flatten(2).transpose(1, 2)


def _hiera_like(root: Any, blocks: list[str], layout: Layout, dims: tuple[str, str], norm: str) -> dict[str, Any]:
    """Stages that begin behind the block whose attention pools; its norm feeds the stream, too."""
    layers: list[Any] = [root.get_submodule(path) for path in blocks]
    stages: list[Stage] = []
    grid, merging, start, merge = layout.grid, None, 0, over_tokens
    for i, layer in enumerate([*layers[1:], None], 1):
        width, width_out = (getattr(layers[i - 1], name) for name in dims)
        if width_out == width and layer is not None:
            continue
        stages.append(Stage(i - start, grid, getattr(layers[start], dims[0]), merging, merge))
        stride = layers[i - 1].query_stride
        pools = stride is not None and stride != 1
        strides = tuple(root.config.query_stride) if pools else (1, 1)
        merging, start, merge = blocks[i - 1], i, partial(_by_border, norm=norm, strides=strides)
        grid = tuple(side // step for side, step in zip(grid, strides, strict=True))
    return {"stages": tuple(stages), "norm_feeds_more": True, "patch_embed": None, "add_bias": None}


def _hiera(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    config, dims = root.config, ("hidden_size", "hidden_size_output")
    order = partial(_unrolled, strides=tuple(config.query_stride), stages=len(config.depths), grid0=layout.grid)
    sizes = {"windows": order, "width": config.embed_dim, "num_heads": config.num_heads[0]}
    return {**_hiera_like(root, blocks, layout, dims, "layernorm_before"), **sizes}


def _unrolled(p_1nD: Tensor, grid: Grid, layer: int, strides: tuple[int, int], stages: int, grid0: Grid) -> Tensor:
    """In the order of Hiera's tokens: the places within a window in front, the windows behind."""
    poolings = round(math.log(grid0[0] / grid[0], strides[0]))
    cells = p_1nD.unflatten(1, grid)
    for _ in range(stages - 1 - poolings):
        (rows, columns), (down, along) = cells.shape[1:3], strides
        cells = cells.reshape(-1, rows // down, down, columns // along, along, p_1nD.shape[-1])
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    tokens: Tensor = cells.reshape(1, -1, p_1nD.shape[-1])
    return tokens


def _stride_sizes(root: Any) -> Sizes:
    return _divided(_pair(root.config.image_size), _pair(root.config.patch_stride))


def _sam2(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    """On maps; attention gets windows, padded at the border. Its table is one of the image and one of a window."""
    fields = _hiera_like(root, blocks, layout, ("dim", "dim_out"), "layer_norm1")
    sizes = tuple(root.get_submodule(path).window_size for path in blocks)
    form = Form(partial(_image_and_window, grid=layout.grid), ("pos_embed_window",))
    watch = {"patch_embed": "patch_embed", "grid_from": grid_of_map}
    adds = {"adds": ("_get_pos_embed",), "form": form}
    return {**fields, **watch, **adds, "windows": partial(_padded_windows, sizes=sizes)}


def _image_and_window(image_1DHW: Tensor, window_1DHW: Tensor, grid: Grid) -> Tensor:
    image = F.interpolate(image_1DHW, size=grid, mode="bicubic")
    times = [side // period for side, period in zip(image.shape, window_1DHW.shape, strict=True)]
    return (image + window_1DHW.tile(times)).flatten(2).transpose(1, 2)


def _padded_windows(p_1nD: Tensor, grid: Grid, layer: int, sizes: tuple[int, ...]) -> Tensor:
    """(1, n, D) -> (W, side, side, D), zero where an image is padded to whole windows."""
    side, cells = sizes[layer], p_1nD.unflatten(1, grid)
    cells = F.pad(cells, (0, 0, 0, -grid[1] % side, 0, -grid[0] % side))
    rows, columns = cells.shape[1] // side, cells.shape[2] // side
    return cells[0].reshape(rows, side, columns, side, -1).transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------- tiles of an image in one sequence


def _mllama(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    """Joined is the table that all tiles share; what tells tiles apart, by the shape of the image, stays added."""
    tiles, path = root.config.max_num_tiles, "gated_positional_embedding"
    fields = {"form": Form(_gated, shared=(f"{path}.gate",)), "windows": partial(_in_tiles, tiles=tiles)}
    adds = {"adds": (f"{path}.forward",), "add_bias": None, "beside": "gated embeddings of tiles"}
    return {**fields, **adds, "num_heads": root.config.attention_heads}


def _gated(table_RD: Tensor, gate: Tensor) -> Tensor:
    return ((1 - gate.tanh()) * table_RD)[None]


def _in_tiles(p_1ND: Tensor, grid: Grid, layer: int, tiles: int) -> Tensor:
    """Each tile's tokens padded to a multiple of 8, one tile behind the other."""
    return F.pad(p_1ND, (0, 0, 0, -p_1ND.shape[1] % 8)).repeat(1, tiles, 1)


# ---------------------------------------------------------------- queries that enter in the last blocks


def _eomt(root: Any, blocks: list[str], layout: Layout) -> dict[str, Any]:
    config, width, count = root.config, root.config.hidden_size, len(blocks)
    first = Stage(count - config.num_blocks, layout.grid, width)
    stages = (first, Stage(config.num_blocks, layout.grid, width, lead=config.num_queries))
    rotary = {"beside": ROTARY, "input": "embeddings"} if hasattr(root, "rope_embeddings") else {}
    return {"stages": stages, "patch_embed": None, "add_bias": None, **rotary}


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
        stages.append(Stage(len(inside), grid, width, merging, over_tokens))
        merging, grid = f"{path}.downsample", ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    # Earlier versions and the copies compute the bias inline.
    modules, paths = dict(root.named_modules()), [f"{path}.attention.relative_position_bias" for path in blocks]
    separate = all(hasattr(modules.get(path), "window_area") for path in paths)
    biases = [BlockBias(f"{path}.forward", modules[path].window_area) for path in paths if separate]
    return {
        "width": root.config.embed_dim,
        "num_heads": root.config.num_heads[0],
        "add_bias": None,
        "beside": RELATIVE,
        "own_bias": tuple(biases),
        "stages": tuple(stages),
        "reason": f"the class adds it to {layout.num_patches} patches, which fails",
    }


_EOMT: dict[str, Any] = {"norm": "norm1", "table": "embeddings.position_embeddings.weight"}
_VIDEO: dict[str, Any] = {"patch_embed": None, "sizes": _video_sizes}
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
    _clip_like("kosmos2", "Kosmos2", layer="VisionEncoderLayer"),
    _clip_like("git", "Git", layer="VisionEncoderLayer"),
    _clip_like("instructblip", "InstructBlip", weight=""),
    _clip_like("instructblipvideo", "InstructBlipVideo", weight=""),
    _clip_like("janus", "Janus", layer="VisionEncoderLayer", rows=0),
    _clip_like("phi4_multimodal", "Phi4Multimodal", layer="VisionEncoderLayer", rows=0),
    _clip_like("ovis2", "Ovis2", layer="VisionEncoderLayer", rows=0, norm="rms_norm1", attention="attention"),
    _clip_like("aimv2", "Aimv2", rows=0, norm="rms_norm1", attention="attention", patch_embed="embeddings.patch_embed"),
    replace(
        _clip_like("idefics", "Idefics"),
        owner="transformers.models.idefics.vision.IdeficsVisionEmbeddings",
        layer="transformers.models.idefics.vision.IdeficsVisionEncoderLayer",
    ),
    *(
        _clip_like(folder, name, rows=0, patch_embed=None, read=_picks)
        for folder, name in (("idefics2", "Idefics2"), ("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
    ),
    _clip_like("siglip2", "Siglip2", rows=0, read=_siglip2, sizes=_siglip2_sizes),
    _clip_like("mlcd", "MLCD", table=None, read=_rotary),
    _family("internvl", "InternVLVision"),
    _family("vitpose_backbone", "VitPoseBackbone", prefix_rows=0, read=_vitpose),
    _family("vitdet", "VitDet", norm="norm1", patch_embed="embeddings.projection", prefix_rows=0, read=_vitdet),
    _family("lw_detr", "LwDetrViT", patch_embed="embeddings.projection", prefix_rows=0, read=_lw_detr),
    _family("rf_detr", "RfDetrDinov2", norm="norm1", read=_rf_detr),
    _family("sam3", "Sam3ViT", norm="layer_norm1", patch_embed=None, prefix_rows=0, read=_sam3),
    _family("hiera", "Hiera", attention="attn", prefix_rows=0, read=_hiera, sizes=_stride_sizes),
    _family("yolos", "Yolos", suffix_rows="num_detection_tokens", read=_yolos),
    _dinov3_like("dinov3_vit", "DINOv3ViT"),
    _dinov3_like("sapiens2", "Sapiens2"),
    _family("eomt", "Eomt", prefix_rows=0, bare=1, registers=True, read=_eomt, **_EOMT),
    _family("eomt_dinov3", "EomtDinov3", norm="norm1", table=None, registers=True, read=_eomt),
    _family("audio_spectrogram_transformer", "AST", patch_embed=None, prefix_rows=2, sizes=_ast_sizes, read=_ast),
    _family("vivit", "Vivit", **_VIDEO),
    _family("timesformer", "Timesformer", patch_embed=None, read=_timesformer, sizes=_timesformer_sizes),
    _family("videomae", "VideoMAE", table=None, prefix_rows=0, read=_videomae, **_VIDEO),
    _family("vjepa2", "VJEPA2", norm="norm1", table=None, prefix_rows=0, read=_rotary, **_VIDEO),
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
_LLAMA_4 = Family(
    _class("llama4", "Llama4VisionModel"),
    _class("llama4", "Llama4VisionEncoderLayer"),
    norm="input_layernorm",
    attention="self_attn",
    table="positional_embedding_vlm",
    patch_embed=None,
    prefix_rows=0,
    suffix_rows=1,
    read=lambda root, blocks, layout: {"beside": ROTARY, "adds": ("forward",), "add_bias": None},
)
_MLLAMA = Family(
    _class("mllama", "MllamaVisionModel"),
    _class("mllama", "MllamaVisionEncoderLayer"),
    norm="input_layernorm",
    attention="self_attn",
    table="gated_positional_embedding.embedding",
    patch_embed=None,
    read=_mllama,
)
_SAM_2 = Family(
    _class("sam2", "Sam2HieraDetModel"),
    _class("sam2", "Sam2MultiScaleBlock"),
    norm="layer_norm1",
    attention="attn",
    table="pos_embed",
    prefix_rows=0,
    read=_sam2,
    sizes=_stride_sizes,
)
FAMILIES = {family.owner: family for family in (*_ENCODERS, *_SWINS, *_SAMS, _LLAMA_4, _MLLAMA, _SAM_2)}

_REFUSALS = {
    _class("videoprism", "VideoPrismLayer"): (
        "a spatial and a temporal encoder with a table each follow each other, so there is no one position to hand on"
    ),
    _class("videomt", "VideomtLayer"): "its last blocks run once a frame, on queries of the frame before",
}


def _family_of(root: nn.Module) -> Family:
    return FAMILIES[class_name(type(root._modules.get("embeddings", root)))]


def examine(root: nn.Module) -> Anatomy:
    """Where an encoder of the library keeps its layers, its table and its grid. Raises UnsupportedModelError."""
    family = _family_of(root)
    blocks = children(root, family.layers) if family.layers else instances(root, family.layer)
    check_blocks("Hugging Face", root, blocks, (family.layer,))
    first = root.get_submodule(blocks[0])
    check_norms(root, [f"{path}.{family.norm}" for path in blocks])
    attention = getattr(first, family.attention)
    config: Any = root.config
    grid, patch_size = family.sizes(root)
    rows = family.prefix_rows if isinstance(family.prefix_rows, int) else getattr(config, family.prefix_rows)
    registers = family.bare + (config.num_register_tokens if family.registers else 0)
    if family.registers and family.table is None:  # a new table
        rows, registers = rows + registers, 0
    suffix = family.suffix_rows if isinstance(family.suffix_rows, int) else getattr(config, family.suffix_rows)
    layout = Layout(grid, rows, registers, suffix_rows=suffix)
    table = None if family.table is None else table_in(root, family.table)
    shared = getattr(config, "use_shared_relative_position_bias", False)
    fields: dict[str, Any] = {
        "slot": family.table,
        "width": getattr(config, "hidden_size", None),
        "num_heads": getattr(config, "num_attention_heads", None),
        "patch_embed": family.patch_embed,
        "add_bias": add_to_attention_mask if _takes_bias(attention) else None,
        "own_kind": "learnable" if table is None or table.requires_grad else family.frozen_kind,
        "shuffle": family.shuffle,
        "adds": ("embeddings.forward",),
        "beside": RELATIVE if getattr(config, "use_relative_position_bias", False) else SHARED if shared else None,
        "own_bias": _block_biases(root, blocks, layout),
        "queries_keys": _projections(attention),
        **family.read(root, blocks, layout),
    }
    fields = {"norm": family.norm, "attention": family.attention, "patch_size": patch_size, **fields}
    return checked_anatomy(root, fields.pop("blocks", blocks), layout, **fields)


def _block_biases(root: nn.Module, blocks: list[str], layout: Layout) -> tuple[BlockBias, ...]:
    """The module in each layer of BEiT and its kin that computes its relative position bias, where layers have one."""
    return tuple(
        BlockBias(f"{path}.{name}.forward", layout.num_patches, layout.num_prefix, (layout.grid,))
        for path in blocks
        for name, module in root.get_submodule(path).named_modules()
        if type(module).__name__ in ("BeitRelativePositionBias", "Data2VecVisionRelativePositionBias")
    )


def _projections(attention: nn.Module) -> tuple[str, str] | str:
    """What makes queries and keys, where nothing stands between it and their product; or why there is no such."""
    modules = dict(attention.named_modules())
    if any("norm" in path and not isinstance(module, nn.Identity) for path, module in modules.items()):
        return "norms them in a form of its own"
    for query, key in (("q_proj", "k_proj"), ("query", "key")):
        for path in modules:
            if path.rpartition(".")[2] == query and (twin := path.removesuffix(query) + key) in modules:
                return path, twin
    return "makes them in one module"


def _takes_bias(attention: nn.Module) -> bool:
    """Whether a mask may differ from head to head: in transformers 4 there is none, or one for all heads."""
    import transformers

    major = int(transformers.__version__.split(".")[0])
    return major >= 5 and "attention_mask" in inspect.signature(attention.forward).parameters


def add_to_attention_mask(bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """For attention(hidden_states, attention_mask=..., ...), an additive mask."""
    if len(args) > 1:
        x, mask, *rest = args
        return (x, masked(bias_1HNN, mask), *rest), kwargs
    return args, {**kwargs, "attention_mask": masked(bias_1HNN, kwargs.get("attention_mask"))}


def measure(root: nn.Module) -> Sizes:
    """Grid and patch size that the model was made for."""
    return _family_of(root).sizes(root)


def blueprint(model: nn.Module) -> Blueprint | None:
    """Class name and configuration of one of the library's own models; None for a model around one."""
    cls: Any = type(model)
    if not cls.__module__.startswith("transformers.models.") or not hasattr(model, "config"):
        return None
    config: Any = model.config
    entries = declared_in(type(config), json.loads(config.to_json_string(use_diff=False)))
    if config._attn_implementation == "eager":  # else the library's default
        entries["attn_implementation"] = "eager"
    return cls.__name__, entries


def check_arguments(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises LapeError for what `check_entries` refuses in a configuration of this model class."""
    check_entries(_model_class(name).config_class, kwargs)


def _model_class(name: str) -> Any:
    import transformers

    cls: Any = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise LapeError(f"{name!r} is not a model class of transformers {transformers.__version__}")
    return cls


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """One of the library's own model classes from a configuration, with random weights."""
    cls = _model_class(name)
    entries = {key: value for key, value in kwargs.items() if key not in ORIGIN}
    config = cls.config_class.from_dict(entries, attn_implementation=kwargs.get("attn_implementation"))
    check_origin(config.to_dict())  # what the file does not say is the library's default
    model: nn.Module = cls(config)
    return model


def _host(name: str, families: tuple[Family, ...], note: str, reasons: dict[str, str], *earlier: str) -> Host:
    """One row of the table."""
    roots = [family.owner for family in families]
    layers = tuple(family.layer for family in families)
    child = "embeddings" if roots[0].endswith("Embeddings") else None
    host = Host(name, tuple(roots), layers, examine, measure, note, "transformers", blueprint, build)
    versions = (*earlier, "transformers 5.24.0")
    return replace(host, root_child=child, check_arguments=check_arguments, refused=reasons, tested=versions)


HOSTS = (
    _host(
        "Hugging Face vision encoder",
        _ENCODERS,
        "ViT, DeiT, DINOv2 (with registers), DINOv3, BEiT, Data2Vec, ViT-MSN, ViT-MAE, I-JEPA, DPT, TIPSv2, "
        "Pixio, EoMT, Hiera, ViTPose, VitDet, YOLOS, LW-DETR, RF-DETR, Sapiens 2, SAM 3, AST (sound), ViViT, "
        "VideoMAE, TimeSformer, V-JEPA 2, the vision encoders of CLIP, MetaCLIP 2, MLCD, AltCLIP, ChineseCLIP, "
        "CLIPSeg, OWL-ViT, OWLv2, BLIP, BLIP-2, InstructBLIP, SigLIP, SigLIP 2, AIMv2, InternVL, Idefics (1 to "
        "3), SmolVLM, Ovis 2, Janus, Kosmos-2, GIT, Phi-4; what holds one",
        _REFUSALS,
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
    _host(
        "Hugging Face SAM 2",
        (_SAM_2,),
        "the table of the image encoder, of image and window, pooled from stage to stage; one size",
        {},
    ),
    _host(
        "Hugging Face Llama vision",
        (_LLAMA_4, _MLLAMA),
        "Llama 4: the table of the encoder beside rotary position embedding, its class token stands last; Mllama "
        "(Llama 3.2): the table that all tiles share, beside their own; one size",
        {},
    ),
)
