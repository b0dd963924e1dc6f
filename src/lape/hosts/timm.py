"""timm's pre-norm `VisionTransformer`: plain, DeiT, distilled, DeiT-III, registers, LayerScale, pooled."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lape.errors import LapeError, UnsupportedModelError
from lape.hosts.base import Anatomy, Host, check_blocks, class_name
from lape.names import nearest
from lape.position import Grid, Layout

_VIT = "timm.models.vision_transformer"
_BLOCKS = (f"{_VIT}.Block",)
_REFUSED = {
    f"{_VIT}.ResPostBlock": "its norm stands behind attention (post-norm), so no norm feeds attention",
    f"{_VIT}.ParallelScalingBlock": "one norm feeds attention and MLP at once, and the MLP must get no position",
    f"{_VIT}.DiffParallelScalingBlock": "one norm feeds attention and MLP at once, and the MLP must get no position",
    f"{_VIT}.ParallelThingsBlock": "it runs several attentions side by side, each with a norm of its own",
}


def examine(root: nn.Module) -> Anatomy:
    """Where a timm VisionTransformer keeps its blocks, its table and its grid. Raises UnsupportedModelError."""
    vit: Any = root
    paths = [f"blocks.{name}" for name, _ in vit.blocks.named_children()]
    check_blocks("timm", root, paths, _BLOCKS, _REFUSED)
    for path in paths:
        _check_block(path, root.get_submodule(path))
    if getattr(vit.patch_drop, "prob", 0.0) > 0:
        raise UnsupportedModelError(
            "patch_drop_rate > 0 removes tokens at random, so a token's position is no longer known in the blocks: "
            "create the model with patch_drop_rate=0"
        )
    grid, patch_size = measure(root)
    bare = vit.num_prefix_tokens if vit.no_embed_class else 0
    layout = Layout(grid, vit.num_prefix_tokens - bare, bare)
    table = vit.pos_embed
    if table is not None and tuple(table.shape[:2]) != (1, layout.num_rows):
        raise UnsupportedModelError(
            f"pos_embed has shape {tuple(table.shape)}, expected (1, {layout.num_rows}, width): "
            f"grid {grid[0]} x {grid[1]} and {layout.prefix_rows} prefix rows"
        )
    return Anatomy(
        root=root,
        blocks=tuple(paths),
        norm="norm1",
        attention="attn",
        table=None if table is None else "pos_embed",
        table_slot="pos_embed",
        layout=layout,
        patch_size=patch_size,
        width=vit.embed_dim,
        num_heads=vit.blocks[0].attn.num_heads,
        patch_embed="patch_embed" if vit.dynamic_img_size else None,
        pads=bool(getattr(vit.patch_embed, "dynamic_img_pad", False)),
    )


def measure(root: nn.Module) -> tuple[Grid, tuple[int, int]]:
    """Grid and patch size of the present input size."""
    patch_embed: Any = root.get_submodule("patch_embed")
    return tuple(patch_embed.grid_size), tuple(patch_embed.patch_size)


def _check_block(path: str, block: nn.Module) -> None:
    norm, attention = block.get_submodule("norm1"), block.get_submodule("attn")
    if not isinstance(norm, nn.LayerNorm):
        raise UnsupportedModelError(
            f"{path}.norm1 is a {class_name(type(norm))}, not a LayerNorm: LaPE is defined with LayerNorm"
        )
    if "attn_mask" not in inspect.signature(attention.forward).parameters:
        raise UnsupportedModelError(f"{path}.attn is a {class_name(type(attention))}, which takes no attn_mask")


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by name. Raises LapeError: an unknown name (the nearest is named), wrong arguments or size."""
    import timm

    if not timm.is_model(name.split(".")[0]):
        guess = nearest(name.split(".")[0], timm.list_models())
        raise LapeError(
            f"unknown model {name!r}{f'; did you mean {guess!r}?' if guess else ''}: see timm.list_models()"
        )
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LapeError(f"model {name!r} with {kwargs}: {reason}") from error
    patch_embed = getattr(model, "patch_embed", None)
    size, patch = getattr(patch_embed, "img_size", None), getattr(patch_embed, "patch_size", None)
    if size and patch and (size[0] % patch[0] or size[1] % patch[1]):
        raise LapeError(
            f"input size {size[0]} x {size[1]} is not divisible by the patch of {name}, {patch[0]} x {patch[1]}: "
            f"use {size[0] // patch[0] * patch[0] or patch[0]} or another multiple"
        )
    return model


VISION_TRANSFORMER = Host(
    name="timm VisionTransformer",
    root_classes=(f"{_VIT}.VisionTransformer",),
    block_classes=_BLOCKS,
    examine=examine,
    library="timm",
    build=build,
    measure=measure,
    note="plain, DeiT, distilled, DeiT-III, registers, LayerScale, class token or pooled",
    tested=("timm 1.0.31",),
    refused=_REFUSED,
)
