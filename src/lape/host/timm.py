"""timm's Vision Transformers, and the models of `lape.models`, which are built like them: one row for each family."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lape.core.anatomy import Anatomy
from lape.core.bias import OwnBias
from lape.core.grids import grid_beside, grid_of_map
from lape.core.position import Grid, Layout
from lape.core.stages import Stage
from lape.errors import LapeError, UnsupportedModelError
from lape.host.base import Blueprint, Host, class_name, find_host
from lape.host.parts import POST_NORM, RELATIVE, SHARED, check_blocks, children
from lape.host.timm_parts import ROTARY, anatomy, bare_prefix, layout_of, measure, own_biases, patches_only, pooling
from lape.names import nearest


def blueprint(model: nn.Module) -> Blueprint | None:
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


Fields = dict[str, Any]
"""Fields of `Anatomy` by name."""


def _host(
    name: str,
    root_class: str,
    block_classes: tuple[str, ...],
    note: str,
    read: Callable[[Any, list[str], Layout], Fields] | None = None,
    *,
    blocks: Callable[[nn.Module], list[str]] = lambda root: children(root, "blocks"),
    layout: Callable[[Any, Grid], Layout] = layout_of,
    measure: Callable[[nn.Module], tuple[Grid, tuple[int, int]]] = measure,
    refused: dict[str, str] | None = None,
    **fields: Any,
) -> Host:
    """One family: `fields` hold for all its models, `read(root, blocks, layout)` gives those that differ."""
    reasons = refused or {}

    def examine(root: nn.Module) -> Anatomy:
        grid, patch_size = measure(root)
        paths, place = blocks(root), layout(root, grid)
        check_blocks("timm", root, paths, block_classes, reasons)
        own = {} if read is None else read(root, paths, place)
        return anatomy(root, paths, place, patch_size=patch_size, **{**fields, **own})

    return Host(
        name,
        (root_class,),
        block_classes,
        examine,
        measure,
        note,
        package="timm",
        blueprint=blueprint,
        build=build,
        current=current,
        tested=("timm 1.0.31",),
        refused=reasons,
    )


_PARALLEL = "one norm feeds attention and MLP at once, and the MLP must get no position"
_PIXELS = "it has no position embedding, and attends between the pixels of one place in all patches"
_VIT = "timm.models.vision_transformer"
_BLOCK = f"{_VIT}.Block"
_EVA_BLOCK = "timm.models.eva.EvaBlock"
_RELPOS = "timm.models.vision_transformer_relpos"
_SWIN = "timm.models.swin_transformer"
_REFUSED = {
    f"{_VIT}.ResPostBlock": POST_NORM,
    f"{_VIT}.ParallelScalingBlock": _PARALLEL,
    f"{_VIT}.DiffParallelScalingBlock": _PARALLEL,
    f"{_VIT}.ParallelThingsBlock": "it runs several attentions side by side, each with a norm of its own",
    # Models that hold blocks like the above in another arrangement.
    "timm.models.crossvit.MultiScaleBlock": (
        "two branches with a position table each exchange their class tokens, so there is no one position to hand on"
    ),
    "timm.models.mobilevit.MobileVitBlock": _PIXELS,
    "timm.models.mobilevit.MobileVitV2Block": _PIXELS,
    "timm.models.pit.PoolingVisionTransformer": (
        "a convolution pools tokens and widens them between its stages, so that the position of a stage is not "
        "that of the next"
    ),
    "timm.models.qwen3_vit.Qwen3VitEncoder": (
        "it resamples its position table for every image in a way of its own, beside rotary position embedding"
    ),
}
_SWIN_REFUSED = {
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": POST_NORM,
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": POST_NORM,
    f"{_SWIN}.SwinTransformerBlock": (
        "its model was taken apart by features_only=True: create it with feature_cls='getter', too"
    ),
}


def _vit(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """ViT and EVA: images of any size by `dynamic_img_size`; EVA's rotation inside attention stays."""
    return {
        "patch_embed": "patch_embed" if getattr(root, "dynamic_img_size", False) else None,
        "own_kind": getattr(root, "own_pe", "learnable"),
        "beside": ROTARY if getattr(root, "rope", None) is not None else None,
        **pooling(root),
    }


def _beit(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """Its relative bias, shared or each block's own, stays or is joined itself."""
    biased = [root.get_submodule(f"{path}.attn").relative_position_bias_table is not None for path in blocks]
    return {
        "beside": RELATIVE if any(biased) else SHARED if root.rel_pos_bias is not None else None,
        "own_bias": own_biases([f"{path}.attn._get_rel_pos_bias" for path in blocks], layout) if all(biased) else (),
        **pooling(root),
    }


def _relpos(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """It has no table and adds none; its bias is joined, or a new table beside it."""
    shared = root.shared_rel_pos is not None
    return {
        "beside": SHARED if shared else RELATIVE,
        "own_bias": () if shared else own_biases([f"{path}.attn.rel_pos.get_bias" for path in blocks], layout),
        **pooling(root),
    }


def _measure_naflex(root: Any) -> tuple[Grid, tuple[int, int]]:
    embeds = root.embeds
    if embeds.pos_embed_type == "factorized":
        raise UnsupportedModelError(
            "its position is the sum of a table of rows and one of columns: use pos_embed='learned'"
        )
    if embeds.pos_embed_grid_size is None:
        raise UnsupportedModelError(
            "the model does not know a grid: create it with pos_embed_grid_size=(rows, columns)"
        )
    return tuple(embeds.pos_embed_grid_size), embeds.patch_size


def _naflex(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """On images (B, C, height, width). Its table is resampled for nearly every image: the way is part of the model."""
    learned = root.embeds.pos_embed_type == "learned"
    usual = {"interp_mode": "bicubic", "antialias": True, "align_corners": False, "ar_preserving": False}
    for name, value in usual.items() if learned else ():
        own = getattr(root.embeds, f"pos_embed_{name}")
        if own != value:
            raise UnsupportedModelError(
                f"its position table is resampled with {name}={own!r}, which the join would not keep: "
                f"create the model with pos_embed_{name}={value!r}"
            )
    return {
        "slot": "embeds.pos_embed" if learned else None,
        "beside": ROTARY if root.rope is not None else None,
        **pooling(root),
    }


def _sam(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """`norm1` stands before the windows are cut, so a position joins the whole map."""
    relative = root.get_submodule(f"{blocks[0]}.attn").use_rel_pos
    return {
        "slot": "pos_embed" if root.pos_embed is not None else None,
        "beside": ROTARY if root.rope_global is not None else RELATIVE if relative else None,
    }


def _measure_volo(root: Any) -> tuple[Grid, tuple[int, int]]:
    stem, down = root.patch_embed, root.network[1]
    if class_name(type(down)) != "timm.models.volo.Downsample":
        raise UnsupportedModelError(f"network.1 is a {class_name(type(down))}: its downsampling is expected there")
    stride = math.prod(layer.stride[0] for layer in (stem.conv[0], stem.proj, down.proj))
    return tuple(root.pos_embed.shape[1:3]), (stride, stride)


def _blocks_of_volo(root: nn.Module) -> list[str]:
    """Those behind its table, which it adds before network[2]: outlookers and a downsampling come before it."""
    return [path for stage in children(root, "network")[2:] for path in children(root, stage)]


def _measure_xcit(root: Any) -> tuple[Grid, tuple[int, int]]:
    rows, columns = root.patch_embed.img_size
    side = root.patch_embed.patch_size
    return (rows // side, columns // side), (side, side)


def _xcit(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """Its position comes from a module, in whose place a table can be joined; attention is over channels."""
    return {"encoder": "pos_embed" if root.pos_embed is not None else None}


def _blocks_of_swin(root: nn.Module) -> list[str]:
    return [path for stage in children(root, "layers") for path in children(root, f"{stage}.blocks")]


def _swin(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """`norm1` stands before the windows are cut and shifted, so a position joins the whole map of a stage.

    Its relative bias stays, or is joined itself; a table is new, over the grid of the first stage.
    """
    stages = []
    for number, path in enumerate(children(root, "layers")):
        merging = class_name(type(root.get_submodule(f"{path}.downsample")))
        if number and merging != f"{_SWIN}.PatchMerging":
            raise UnsupportedModelError(f"{path}.downsample is a {merging}, not a PatchMerging")
        inside = children(root, f"{path}.blocks")
        first = root.get_submodule(inside[0])
        grid, width = tuple(first.input_resolution), first.norm1.normalized_shape[0]
        stages.append(Stage(len(inside), grid, width, f"{path}.downsample" if number else None))
    windows = [(f"{path}.attn._get_rel_pos_bias", root.get_submodule(f"{path}.attn").window_area) for path in blocks]
    return {"stages": tuple(stages), "own_bias": tuple(OwnBias(method, area) for method, area in windows)}


def _compact(root: Any, blocks: list[str], layout: Layout) -> Fields:
    """A new learnable table starts as the models' own does; CVT and CCT pool a sequence, behind `norm`."""
    return {"table_std": root.table_std, "pooled": root.num_prefix_tokens == 0, "last_norm": "norm"}


VISION_TRANSFORMER = _host(
    "timm VisionTransformer",
    f"{_VIT}.VisionTransformer",
    (_BLOCK,),
    "plain, DeiT, distilled, DeiT-III, registers, LayerScale, class token or pooled, behind a CNN (hybrid)",
    _vit,
    refused=_REFUSED,
    grid_from=grid_of_map,
    adds=("_pos_embed",),
)

HOSTS = (
    VISION_TRANSFORMER,
    _host("timm BEiT", "timm.models.beit.Beit", ("timm.models.beit.Block",), "its table, or its relative bias", _beit),
    _host(
        "timm CaiT",
        "timm.models.cait.Cait",
        ("timm.models.cait.LayerScaleBlock",),
        "the blocks between patches; class attention comes behind them and gets no position",
        layout=patches_only,
    ),
    _host(
        "timm EVA",
        "timm.models.eva.Eva",
        (_EVA_BLOCK,),
        "the absolute table, also beside rotary position embedding",
        _vit,
        refused={"timm.models.eva.EvaBlockPostNorm": POST_NORM},
        grid_from=grid_of_map,
        adds=("_pos_embed",),
    ),
    _host(
        "timm relative-position ViT",
        f"{_RELPOS}.VisionTransformerRelPos",
        (f"{_RELPOS}.RelPosBlock",),
        "on its relative bias, or a new table beside it, pe='learnable'",
        _relpos,
        refused={f"{_RELPOS}.ResPostRelPosBlock": POST_NORM},
        slot=None,
    ),
    _host(
        "timm NaFlexViT",
        "timm.models.naflexvit.NaFlexVit",
        (_BLOCK, _EVA_BLOCK),
        "images of one size a batch, any size; patches of mixed sizes are refused at run time",
        _naflex,
        layout=bare_prefix,
        measure=_measure_naflex,
        patch_embed="embeds",
        grid_from=grid_beside,
        adds=("embeds.forward",),
    ),
    _host(
        "timm SAM ViT",
        "timm.models.vision_transformer_sam.VisionTransformerSAM",
        ("timm.models.vision_transformer_sam.Block",),
        "beside its relative bias, global and windowed attention",
        _sam,
        layout=patches_only,
        add_bias=None,
        maps=True,
    ),
    _host(
        "timm VOLO",
        "timm.models.volo.VOLO",
        ("timm.models.volo.Transformer",),
        "the transformer blocks behind its table; class attention gets no position",
        blocks=_blocks_of_volo,
        layout=patches_only,
        measure=_measure_volo,
        add_bias=None,
        maps=True,
    ),
    _host(
        "timm XCiT",
        "timm.models.xcit.Xcit",
        ("timm.models.xcit.XCABlock",),
        "a table in place of its Fourier encoding, pe='learnable' or '2D_sin'; class attention gets no position",
        _xcit,
        layout=patches_only,
        measure=_measure_xcit,
        slot=None,
        patch_embed="patch_embed",
        grid_from=grid_beside,
    ),
    _host(
        "timm Swin",
        f"{_SWIN}.SwinTransformer",
        (f"{_SWIN}.SwinTransformerBlock",),
        "on its relative bias, or a new table beside it, pe='learnable', merged from stage to stage; one size",
        _swin,
        blocks=_blocks_of_swin,
        layout=patches_only,
        refused=_SWIN_REFUSED,
        slot=None,
        input="patch_embed",
        beside=RELATIVE,
        maps=True,
    ),
    _host(
        "lape CompactTransformer",
        "lape.models.compact.CompactTransformer",
        ("lape.models.compact.CompactBlock",),
        "ViT-Lite, CVT and CCT for small images, see lape.models",
        _compact,
    ),
)
