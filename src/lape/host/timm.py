"""timm's Vision Transformers, and the models of `lape.models`, which are built like them.

Plain ones first; then other models of tokens (B, N, D), models on maps (B, rows, columns, D), and models of stages.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import torch
from torch import nn

from lape.core.anatomy import Anatomy
from lape.core.bias import OwnBias
from lape.core.grids import grid_beside, grid_of_map
from lape.core.position import Layout
from lape.core.stages import Stage
from lape.errors import LapeError, UnsupportedModelError
from lape.host.base import RELATIVE, SHARED, Host, class_name, find_host
from lape.host.timm_parts import PARALLEL, POST_NORM, ROTARY, anatomy, children, layout_of, measure, own_biases, pooling
from lape.names import nearest

_VIT = "timm.models.vision_transformer"
_BLOCKS = (f"{_VIT}.Block",)
_REFUSED = {
    f"{_VIT}.ResPostBlock": POST_NORM,
    f"{_VIT}.ParallelScalingBlock": PARALLEL,
    f"{_VIT}.DiffParallelScalingBlock": PARALLEL,
    f"{_VIT}.ParallelThingsBlock": "it runs several attentions side by side, each with a norm of its own",
    # Models that hold blocks like the above in another arrangement.
    "timm.models.crossvit.MultiScaleBlock": (
        "two branches with a position table each exchange their class tokens, so there is no one position to hand on"
    ),
    "timm.models.mobilevit.MobileVitBlock": (
        "it has no position embedding, and attends between the pixels of one place in all patches"
    ),
    "timm.models.mobilevit.MobileVitV2Block": (
        "it has no position embedding, and attends between the pixels of one place in all patches"
    ),
    "timm.models.pit.PoolingVisionTransformer": (
        "a convolution pools tokens and widens them between its stages, so that the position of a stage is not "
        "that of the next"
    ),
    "timm.models.qwen3_vit.Qwen3VitEncoder": (
        "it resamples its position table for every image in a way of its own, beside rotary position embedding"
    ),
}


def examine(root: nn.Module) -> Anatomy:
    """Where a timm VisionTransformer keeps its blocks, its table and its grid. Raises UnsupportedModelError."""
    grid, patch_size = measure(root)
    return anatomy(
        root,
        children(root, "blocks"),
        _BLOCKS,
        _REFUSED,
        layout_of(root, grid),
        patch_size,
        patch_embed="patch_embed" if getattr(root, "dynamic_img_size", False) else None,
        grid_from=grid_of_map,
        adds=("_pos_embed",),
        **pooling(root),
        own_kind=getattr(root, "own_pe", "learnable"),
    )


def blueprint(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The name under which timm made a model; `current` has its arguments. None for a model around one."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if hasattr(config, "get") else None
    return (name, {}) if name else None


def current(root: nn.Module) -> dict[str, Any]:
    """Arguments of timm's constructor, as far as the model shows them, those that it takes."""
    model: Any = root
    embed, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", None)
    head, reg = getattr(model, "head", None), getattr(model, "reg_token", None)
    shown: dict[str, Any] = {
        "img_size": getattr(embed, "img_size", None),
        "patch_size": getattr(embed, "patch_size", None),
        "in_chans": getattr(getattr(embed, "proj", None), "in_channels", None),
        "num_classes": head.out_features
        if isinstance(head, nn.Linear)
        else 0
        if isinstance(head, nn.Identity)
        else None,
        "reg_tokens": None if reg is None else reg.shape[1],
        "class_token": getattr(model, "cls_token", None) is not None,
        "embed_dim": getattr(model, "embed_dim", None),
        "depth": len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None,
        "num_heads": getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None,
        "fc_norm": isinstance(getattr(model, "fc_norm", None), nn.LayerNorm),
        "pre_norm": not isinstance(getattr(model, "norm_pre", None), nn.Identity),
        "init_values": getattr(getattr(blocks[0], "ls1", None), "init_values", None) if blocks else None,
    }
    for name in ("global_pool", "no_embed_class", "dynamic_img_size", "pool_include_prefix"):
        shown[name] = getattr(model, name, None)
    shown["dynamic_img_pad"] = getattr(embed, "dynamic_img_pad", None)
    classes: Any = type(root).__mro__
    taken = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    return {name: value for name, value in shown.items() if name in taken and value is not None}


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by name. Raises LapeError: an unknown name (the nearest is named), wrong arguments or size."""
    import timm

    import lape.models  # noqa: F401  they are known to timm from here on

    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        asked, known = str(name).split(".")[0], timm.list_models()
        guess = nearest(asked, known) or next((model for model in known if asked and model.startswith(asked)), None)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise LapeError(f"unknown model {name!r}: {hint}timm.list_models() has all names")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, AssertionError) as error:
        raise _explained(name, kwargs, error) from error
    patch_embed = getattr(model, "patch_embed", None)
    size, patch = getattr(patch_embed, "img_size", None), getattr(patch_embed, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if size and patch and (size[0] % patch[0] or size[1] % patch[1]):
        raise LapeError(
            f"input size {size[0]} x {size[1]} is not divisible by the patch of {name}, {patch[0]} x {patch[1]}: "
            f"use {size[0] // patch[0] * patch[0] or patch[0]} or another multiple"
        )
    return model


def _explained(name: str, kwargs: dict[str, Any], error: Exception) -> LapeError:
    """Why a model cannot be made: it is none that can be converted, or an argument that it does not take."""
    import timm

    with torch.device("meta"):
        plain = timm.create_model(name)
    try:
        find_host(plain)
    except UnsupportedModelError as unsupported:
        return unsupported
    reason = " ".join(str(error).split()) or type(error).__name__
    wrong = re.search(r"unexpected keyword argument '(\w+)'", reason)
    if wrong is None:
        return LapeError(f"model {name!r} with {kwargs}: {reason}")
    guess = nearest(wrong[1], inspect.signature(type(plain).__init__).parameters)
    hint = f"; did you mean {guess!r}?" if guess else ""
    return LapeError(f"model {name!r} takes no argument {wrong[1]!r}{hint}")


_TIMM: dict[str, Any] = {"package": "timm", "blueprint": blueprint, "current": current, "tested": ("timm 1.0.31",)}

VISION_TRANSFORMER = Host(
    name="timm VisionTransformer",
    root_classes=(f"{_VIT}.VisionTransformer",),
    block_classes=_BLOCKS,
    examine=examine,
    build=build,
    **_TIMM,
    measure=measure,
    note="plain, DeiT, distilled, DeiT-III, registers, LayerScale, class token or pooled, behind a CNN (hybrid)",
    refused=_REFUSED,
)


_BEIT_BLOCK = "timm.models.beit.Block"
_CAIT_BLOCK = "timm.models.cait.LayerScaleBlock"
_EVA_BLOCK = "timm.models.eva.EvaBlock"
_RELPOS = "timm.models.vision_transformer_relpos"
_EVA_REFUSED = {"timm.models.eva.EvaBlockPostNorm": POST_NORM}
_RELPOS_REFUSED = {f"{_RELPOS}.ResPostRelPosBlock": POST_NORM}


def examine_beit(root: nn.Module) -> Anatomy:
    """BEiT: the class token owns a row; its relative bias, shared or each block's own, stays or is joined itself."""
    grid, patch_size = measure(root)
    blocks = children(root, "blocks")
    biased = [root.get_submodule(f"{path}.attn").relative_position_bias_table is not None for path in blocks]
    own = OwnBias("_get_rel_pos_bias", grid[0] * grid[1], num_prefix=1)
    return anatomy(
        root,
        blocks,
        (_BEIT_BLOCK,),
        {},
        Layout(grid, prefix_rows=1),
        patch_size,
        beside=RELATIVE if any(biased) else SHARED if root.rel_pos_bias is not None else None,
        own_bias=own_biases(own, [f"{path}.attn" for path in blocks]) if all(biased) else (),
        **pooling(root),
    )


def examine_cait(root: nn.Module) -> Anatomy:
    """CaiT: patches only; the class token enters behind them, through class attention, and has no position."""
    grid, patch_size = measure(root)
    return anatomy(root, children(root, "blocks"), (_CAIT_BLOCK,), {}, Layout(grid, prefix_rows=0), patch_size)


def examine_eva(root: nn.Module) -> Anatomy:
    """EVA: an absolute table, rotary embedding inside attention, or both; the table is joined, the rotation stays."""
    grid, patch_size = measure(root)
    return anatomy(
        root,
        children(root, "blocks"),
        (_EVA_BLOCK,),
        _EVA_REFUSED,
        layout_of(root, grid),
        patch_size,
        patch_embed="patch_embed" if root.dynamic_img_size else None,
        grid_from=grid_of_map,
        adds=("_pos_embed",),
        beside=ROTARY if root.rope is not None else None,
        **pooling(root),
    )


def examine_relpos(root: nn.Module) -> Anatomy:
    """Relative-position ViT: it has no table and adds none; its bias is joined, or a new table beside it."""
    grid, patch_size = measure(root)
    layout = layout_of(root, grid)
    blocks = children(root, "blocks")
    own = OwnBias("get_bias", layout.num_patches, num_prefix=layout.num_prefix)
    shared = root.shared_rel_pos is not None
    return anatomy(
        root,
        blocks,
        (f"{_RELPOS}.RelPosBlock",),
        _RELPOS_REFUSED,
        layout,
        patch_size,
        slot=None,
        beside=SHARED if shared else RELATIVE,
        own_bias=() if shared else own_biases(own, [f"{path}.attn.rel_pos" for path in blocks]),
        **pooling(root),
    )


def examine_naflex(root: nn.Module) -> Anatomy:
    """NaFlexViT on images (B, C, height, width): prefix tokens own no rows, the grid follows the image."""
    embeds: Any = root.get_submodule("embeds")
    kind, grid = embeds.pos_embed_type, embeds.pos_embed_grid_size
    if kind == "factorized":
        raise UnsupportedModelError(
            "its position is the sum of a table of rows and one of columns: use pos_embed='learned'"
        )
    if grid is None:
        raise UnsupportedModelError(
            "the model does not know a grid: create it with pos_embed_grid_size=(rows, columns)"
        )
    if kind == "learned":
        _check_resampling(embeds)
    return anatomy(
        root,
        children(root, "blocks"),
        (_BLOCKS[0], _EVA_BLOCK),
        {},
        Layout(tuple(grid), 0, root.num_prefix_tokens),  # type: ignore[arg-type]
        embeds.patch_size,
        slot="embeds.pos_embed" if kind == "learned" else None,
        **pooling(root),
        patch_embed="embeds",
        grid_from=grid_beside,
        adds=("embeds.forward",),
        beside=ROTARY if root.rope is not None else None,
    )


def _check_resampling(embeds: nn.Module) -> None:
    """The table is resampled for nearly every image here, so the way of it is part of the model."""
    usual = {"interp_mode": "bicubic", "antialias": True, "align_corners": False, "ar_preserving": False}
    for name, value in usual.items():
        own = getattr(embeds, f"pos_embed_{name}")
        if own != value:
            raise UnsupportedModelError(
                f"its position table is resampled with {name}={own!r}, which the join would not keep: "
                f"create the model with pos_embed_{name}={value!r}"
            )


def _host(name: str, root: str, blocks: tuple[str, ...], examine: Any, note: str, **more: Any) -> Host:
    return Host(f"timm {name}", (root,), blocks, examine, note=note, **_TIMM, **more)


TOKEN_HOSTS = (
    _host(
        "BEiT",
        "timm.models.beit.Beit",
        (_BEIT_BLOCK,),
        examine_beit,
        "its table, or its relative bias",
        measure=measure,
    ),
    _host(
        "CaiT",
        "timm.models.cait.Cait",
        (_CAIT_BLOCK,),
        examine_cait,
        "the blocks between patches; class attention comes behind them and gets no position",
    ),
    _host(
        "EVA",
        "timm.models.eva.Eva",
        (_EVA_BLOCK,),
        examine_eva,
        "the absolute table, also beside rotary position embedding",
        measure=measure,
        refused=_EVA_REFUSED,
    ),
    _host(
        "relative-position ViT",
        f"{_RELPOS}.VisionTransformerRelPos",
        (f"{_RELPOS}.RelPosBlock",),
        examine_relpos,
        "on its relative bias, or a new table beside it, pe='learnable'",
        measure=measure,
        refused=_RELPOS_REFUSED,
    ),
    _host(
        "NaFlexViT",
        "timm.models.naflexvit.NaFlexVit",
        (_BLOCKS[0], _EVA_BLOCK),
        examine_naflex,
        "images of one size a batch, any size; patches of mixed sizes are refused at run time",
    ),
)

_SAM_BLOCK = "timm.models.vision_transformer_sam.Block"
_VOLO_BLOCK = "timm.models.volo.Transformer"
_VOLO_AT = 2  # VOLO adds its table before network[2], behind the outlookers and the downsampling
_XCIT_BLOCK = "timm.models.xcit.XCABlock"


def examine_sam(root: nn.Module) -> Anatomy:
    """SAM's ViT: `norm1` stands before the windows are cut, so a position joins the whole map."""
    grid, patch_size = measure(root)
    first: Any = root.get_submodule("blocks.0")
    rotary = root.rope_global is not None
    return anatomy(
        root,
        children(root, "blocks"),
        (_SAM_BLOCK,),
        {},
        Layout(grid, prefix_rows=0),
        patch_size,
        slot="pos_embed" if root.pos_embed is not None else None,
        beside=ROTARY if rotary else RELATIVE if first.attn.use_rel_pos else None,
        add_bias=None,
        maps=True,
    )


def examine_volo(root: nn.Module) -> Anatomy:
    """VOLO: the transformer blocks behind its table; outlookers come before it, class attention has no position."""
    model: Any = root
    stem, down = model.patch_embed, model.network[1]
    if class_name(type(down)) != "timm.models.volo.Downsample":
        raise UnsupportedModelError(f"network.1 is a {class_name(type(down))}: its downsampling is expected there")
    stride = math.prod(layer.stride[0] for layer in (stem.conv[0], stem.proj, down.proj))
    blocks = [path for i in range(_VOLO_AT, len(model.network)) for path in children(root, f"network.{i}")]
    layout = Layout(tuple(model.pos_embed.shape[1:3]), prefix_rows=0)
    return anatomy(root, blocks, (_VOLO_BLOCK,), {}, layout, (stride, stride), add_bias=None, maps=True)


def examine_xcit(root: nn.Module) -> Anatomy:
    """XCiT: its position comes from a module, in whose place a table can be joined; attention is over channels."""
    embed: Any = root.get_submodule("patch_embed")
    rows, columns = (side // embed.patch_size for side in embed.img_size)
    return anatomy(
        root,
        children(root, "blocks"),
        (_XCIT_BLOCK,),
        {},
        Layout((rows, columns), prefix_rows=0),
        (embed.patch_size, embed.patch_size),
        slot=None,
        patch_embed="patch_embed",
        grid_from=grid_beside,
        encoder="pos_embed" if root.pos_embed is not None else None,
    )


MAP_HOSTS = (
    Host(
        "timm SAM ViT",
        ("timm.models.vision_transformer_sam.VisionTransformerSAM",),
        (_SAM_BLOCK,),
        examine_sam,
        note="beside its relative bias, global and windowed attention",
        **_TIMM,
    ),
    Host(
        "timm VOLO",
        ("timm.models.volo.VOLO",),
        (_VOLO_BLOCK,),
        examine_volo,
        note="the transformer blocks behind its table; class attention gets no position",
        **_TIMM,
    ),
    Host(
        "timm XCiT",
        ("timm.models.xcit.Xcit",),
        (_XCIT_BLOCK,),
        examine_xcit,
        note="a table in place of its Fourier encoding, pe='learnable' or '2D_sin'; class attention gets no position",
        **_TIMM,
    ),
)

_SWIN = "timm.models.swin_transformer"
_SWIN_BLOCKS = (f"{_SWIN}.SwinTransformerBlock",)


def examine_swin(root: nn.Module) -> Anatomy:
    """Swin: `norm1` stands before the windows are cut and shifted, so a position joins the whole map of a stage.

    Its relative bias stays, or is joined itself; a table is new, over the grid of the first stage.
    """
    grid, patch_size = measure(root)
    blocks, stages, biases = [], [], []
    for number, (name, stage) in enumerate(root.get_submodule("layers").named_children()):
        paths = children(root, f"layers.{name}.blocks")
        first: Any = root.get_submodule(paths[0])
        merging: Any = stage.get_submodule("downsample")
        if number and class_name(type(merging)) != f"{_SWIN}.PatchMerging":
            raise UnsupportedModelError(
                f"layers.{name}.downsample is a {class_name(type(merging))}, not a PatchMerging"
            )
        path = f"layers.{name}.downsample" if number else None
        stages.append(Stage(len(paths), tuple(first.input_resolution), first.norm1.normalized_shape[0], path))
        blocks += paths
        for path in paths:
            block: Any = root.get_submodule(path)
            biases.append(OwnBias(f"{path}.attn._get_rel_pos_bias", block.attn.window_area))
    return anatomy(
        root,
        blocks,
        _SWIN_BLOCKS,
        {},
        Layout(grid, prefix_rows=0),
        patch_size,
        slot=None,
        beside=RELATIVE,
        own_bias=tuple(biases),
        stages=tuple(stages),
        input="patch_embed",
        maps=True,
    )


STAGE_HOSTS = (
    Host(
        "timm Swin",
        (f"{_SWIN}.SwinTransformer",),
        _SWIN_BLOCKS,
        examine_swin,
        note="on its relative bias, or a new table beside it, pe='learnable', merged from stage to stage; one size",
        **_TIMM,
        refused={
            "timm.models.swin_transformer_v2.SwinTransformerV2Block": POST_NORM,
            "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": POST_NORM,
            f"{_SWIN}.SwinTransformerBlock": (
                "its model was taken apart by features_only=True: create it with feature_cls='getter', too"
            ),
        },
    ),
)

_COMPACT = "lape.models.compact"
_COMPACT_BLOCKS = (f"{_COMPACT}.CompactBlock",)


def examine_compact(root: nn.Module) -> Anatomy:
    """Blocks like timm's up to attention; a new learnable table starts as the models' own does."""
    grid, patch_size = measure(root)
    blocks = children(root, "blocks")
    std: float = root.table_std  # type: ignore[assignment]
    pooled = root.num_prefix_tokens == 0  # CVT and CCT: sequence pooling, behind `norm`
    layout = layout_of(root, grid)
    return anatomy(
        root, blocks, _COMPACT_BLOCKS, {}, layout, patch_size, table_std=std, pooled=pooled, last_norm="norm"
    )


_COMPACT_TRANSFORMER = Host(
    name="lape CompactTransformer",
    root_classes=(f"{_COMPACT}.CompactTransformer",),
    block_classes=_COMPACT_BLOCKS,
    examine=examine_compact,
    measure=measure,
    note="ViT-Lite, CVT and CCT for small images, see lape.models",
    **_TIMM,
)

HOSTS = (VISION_TRANSFORMER, *TOKEN_HOSTS, *MAP_HOSTS, *STAGE_HOSTS, _COMPACT_TRANSFORMER)
