"""timm's other models of tokens (B, N, D): BEiT, CaiT, EVA, relative-position ViT and NaFlexViT, all pre-norm."""

from __future__ import annotations

from typing import Any

from torch import nn

from lape.bias import OwnBias
from lape.errors import UnsupportedModelError
from lape.grids import grid_beside, grid_of_map
from lape.hosts.base import RELATIVE, SHARED, Anatomy, Host
from lape.hosts.timm_parts import (
    POST_NORM,
    ROTARY,
    anatomy,
    children,
    layout_of,
    measure,
    own_biases,
    pooling,
)
from lape.position import Layout

_BEIT_BLOCK = "timm.models.beit.Block"
_CAIT_BLOCK = "timm.models.cait.LayerScaleBlock"
_EVA_BLOCK = "timm.models.eva.EvaBlock"
_VIT_BLOCK = "timm.models.vision_transformer.Block"
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
        (_VIT_BLOCK, _EVA_BLOCK),
        {},
        Layout(tuple(grid), 0, root.num_prefix_tokens),  # type: ignore[arg-type]
        embeds.patch_size,
        slot="embeds.pos_embed" if kind == "learned" else None,
        **pooling(root),
        patch_embed="embeds",
        grid_from=grid_beside,
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
    return Host(f"timm {name}", (root,), blocks, examine, note=note, tested=("timm 1.0.31",), **more)


HOSTS = (
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
        (_VIT_BLOCK, _EVA_BLOCK),
        examine_naflex,
        "images of one size a batch, any size; patches of mixed sizes are refused at run time",
    ),
)
