"""timm's models that keep the patches on their grid: VOLO and SAM as maps (B, rows, columns, D), and XCiT."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lape.errors import UnsupportedModelError
from lape.grids import grid_beside
from lape.hosts.base import RELATIVE, Anatomy, Host, class_name
from lape.hosts.timm_parts import ROTARY, anatomy, children, measure
from lape.position import Layout

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
    return anatomy(root, blocks, (_VOLO_BLOCK,), {}, layout, (stride, stride), add_bias=None)


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


HOSTS = (
    Host(
        "timm SAM ViT",
        ("timm.models.vision_transformer_sam.VisionTransformerSAM",),
        (_SAM_BLOCK,),
        examine_sam,
        note="beside its relative bias, global and windowed attention",
        tested=("timm 1.0.31",),
    ),
    Host(
        "timm VOLO",
        ("timm.models.volo.VOLO",),
        (_VOLO_BLOCK,),
        examine_volo,
        note="the transformer blocks behind its table; class attention gets no position",
        tested=("timm 1.0.31",),
    ),
    Host(
        "timm XCiT",
        ("timm.models.xcit.Xcit",),
        (_XCIT_BLOCK,),
        examine_xcit,
        note="a table in place of its Fourier encoding, pe='learnable' or '2D_sin'; class attention gets no position",
        tested=("timm 1.0.31",),
    ),
)
