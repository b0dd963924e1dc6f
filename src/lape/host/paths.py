"""Models described by where their parts are: code that no library ships, models of one's own, and what to register.

Nothing is imported: a class is named by a string, its parts by attribute paths, and sizes are read off what is there.

Shape legend: R rows of the position table, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from torch import nn

from lape.core.anatomy import Anatomy
from lape.core.position import Grid, Layout
from lape.errors import LapeError, UnsupportedModelError
from lape.host.base import Host, add_host, class_name
from lape.host.parts import POST_NORM, RELATIVE, ROTARY, check_norms, checked_anatomy, table_in


@dataclass(frozen=True)
class Paths:
    """Where the parts of a Vision Transformer are, whose norm before attention feeds attention alone."""

    blocks: str = "blocks"  # the list of blocks, or of lists of them
    norm: str = "norm1"  # attributes of a block: the norm before attention
    attention: str = "attn"  # and the module that attends
    table: str | None = "pos_embed"  # the position parameter; None: the model adds none
    grid: Grid | None = None  # None: as the model's attributes say
    patch_size: int | tuple[int, ...] | None = None  # pixels; None: as they say
    prefix_rows: int | None = None  # None: the rows of the table that are not of patches
    bare: str | int = 0  # tokens without a row behind those with one: how many, or an attribute that says it
    maps: bool = False  # whether blocks take maps (B, rows, columns, D)
    more: Callable[[Any], dict[str, Any]] = field(default=lambda root: {})  # further fields of `Anatomy`


def examine(root: nn.Module, paths: Paths) -> Anatomy:
    """Where a model keeps its parts. Raises UnsupportedModelError naming what is not there."""
    blocks = _blocks(root, paths)
    check_norms(root, [f"{path}.{paths.norm}" for path in blocks])
    first: Any = root.get_submodule(blocks[0])
    width = next(getattr(first, paths.norm).parameters()).shape[-1]
    grid = paths.grid or _grid(root)
    patch = paths.patch_size or _first(root, "patch_size")
    table = None if paths.table is None else table_in(root, paths.table)
    bare = paths.bare if isinstance(paths.bare, int) else getattr(root, paths.bare)
    rows = paths.prefix_rows
    if rows is None:
        rows = 0 if table is None else table.numel() // width - math.prod(grid)
    frozen = table is not None and not table.requires_grad
    more = {"maps": paths.maps, "own_kind": "2D_sin" if frozen else "learnable", **paths.more(root)}
    layout = more.pop("layout", Layout(grid, max(rows, 0), bare))
    if isinstance(first, nn.TransformerEncoderLayer):
        more |= _of_torch(first)
    sizes = {"width": width, "num_heads": getattr(getattr(first, paths.attention), "num_heads", 1)}
    patch_size = (patch,) * len(grid) if isinstance(patch, int) else tuple(patch)
    parts = {"norm": paths.norm, "attention": paths.attention, "add_bias": None, "patch_size": patch_size}
    return checked_anatomy(root, blocks, layout, slot=paths.table, **{**parts, **sizes, **more})


def _blocks(root: nn.Module, paths: Paths) -> list[str]:
    """Paths of the blocks in their list, or in the lists (chunks) of which it consists."""
    cls = class_name(type(root))
    try:
        inside = root.get_submodule(paths.blocks)
    except AttributeError:
        raise UnsupportedModelError(f"{cls} has no {paths.blocks!r} that holds its blocks") from None
    with_norm = [
        p for p, m in inside.named_modules(prefix=paths.blocks) if hasattr(m, paths.norm) and p != paths.blocks
    ]
    blocks = [p for p in with_norm if hasattr(root.get_submodule(p), paths.attention)]
    if not blocks:
        raise UnsupportedModelError(f"{cls}.{paths.blocks} has no blocks with {paths.norm!r} and {paths.attention!r}")
    return blocks


def _of_torch(layer: nn.TransformerEncoderLayer) -> dict[str, Any]:
    """torch's own block: its fused path would pass the norm by."""
    if not layer.norm_first:
        raise UnsupportedModelError(f"{POST_NORM}: create nn.TransformerEncoderLayer with norm_first=True")
    if not layer.self_attn.batch_first:
        raise UnsupportedModelError("its tokens are (N, B, D): create nn.TransformerEncoderLayer with batch_first=True")
    return {"unfused": "activation_relu_or_gelu"}


def _first(root: Any, *names: str) -> Any:
    """The first of these attributes that the model or its patch embedding has. Raises UnsupportedModelError."""
    for owner in (root, getattr(root, "patch_embed", None)):
        for name in names:
            if (value := getattr(owner, name, None)) is not None and not callable(value):
                return value
    raise UnsupportedModelError(f"{class_name(type(root))} has no {' or '.join(names)}: name it for lape.register_host")


def _grid(root: Any) -> Grid:
    """Rows and columns as the model says them, or its image and patch size."""
    try:
        grid = _first(root, "grid_size", "patches_resolution")
    except UnsupportedModelError:
        image, patch = _first(root, "img_size", "image_size"), _first(root, "patch_size")
        sides = [(side, side) if isinstance(side, int) else tuple(side) for side in (image, patch)]
        grid = tuple(side // step for side, step in zip(*sides, strict=True))
    return (grid, grid) if isinstance(grid, int) else tuple(grid)


def host_by_paths(root_class: str, paths: Paths, name: str, note: str) -> Host:
    """A host whose models are of this class, "module.Class", and have their parts there."""
    return Host(name or root_class.rpartition(".")[2], (root_class,), (), partial(examine, paths=paths), note=note)


def examine_encoder(root: nn.Module, grid: Grid | None = None) -> Anatomy:
    """torch's nn.TransformerEncoder, over patches alone. Raises UnsupportedModelError without a grid."""
    if grid is None:
        raise UnsupportedModelError(
            "nn.TransformerEncoder does not know the grid of its tokens: lape.apply_(model, grid=(rows, columns)) "
            "where these are patches alone, or register the model around it: lape.register_host(YourModel, ...)"
        )
    return examine(root, Paths("layers", attention="self_attn", table=None, grid=grid, patch_size=1))


def register_host(host: Host | type[nn.Module], name: str = "", note: str = "", **where: Any) -> Host:
    """Adds a family of models of your own to those that can be converted, and returns its host.

    Args:
        host: the class of the models, or, for what attribute paths cannot say, a `lape.Host` with everything in it.
        name: of the host in messages and lists; by default the class's.
        where: paths of a class's parts, as for a plain Vision Transformer: `blocks` ("blocks", their list), `norm`
            ("norm1", of a block: the norm that feeds attention and nothing else), `attention` ("attn", of a block),
            `table` ("pos_embed", added once to the tokens; None: the model adds none), and what cannot be read off the
            model: `grid` (rows, columns), `patch_size` (pixels), `prefix_rows` (tokens before the patches that own a
            row of the table), `bare` (those that own none), `maps` (whether blocks take (B, rows, columns, D)).
    Raises LapeError when the name or the class is taken, or a path is not known here. `lape.suggest_host(model)` says
    what it would register.
    """
    if isinstance(host, Host):
        return add_host(host)
    names = [part.name for part in fields(Paths)]
    if wrong := sorted(set(where) - set(names)):
        raise LapeError(f"register_host does not know {', '.join(wrong)}: known are {', '.join(names)}")
    return add_host(host_by_paths(class_name(host), Paths(**where), name, note))


# ---------------------------------------------------------------- code that no library ships


def _dinov3(root: Any) -> dict[str, Any]:
    rows = 1 + root.n_storage_tokens  # a new table has rows for them, as in the libraries' DINOv3
    return {"patch_embed": "patch_embed", "beside": ROTARY, "layout": Layout(_grid(root), rows)}


HOSTS = (
    host_by_paths(
        "dinov2.models.vision_transformer.DinoVisionTransformer",
        Paths(
            bare="num_register_tokens",
            more=lambda root: {"patch_embed": "patch_embed", "adds": ("prepare_tokens_with_masks",)},
        ),
        name="DINOv2 (its own code)",
        note="its table, images of any size",
    ),
    host_by_paths(
        "dinov3.models.vision_transformer.DinoVisionTransformer",
        Paths(table=None, more=_dinov3),
        name="DINOv3 (its own code)",
        note="a new table beside rotary position embedding, pe='learnable'; images of any size",
    ),
    host_by_paths(
        "open_clip.transformer.VisionTransformer",
        Paths("transformer.resblocks", "ln_1", table="positional_embedding"),
        name="open_clip VisionTransformer",
        note="the image tower, at one size",
    ),
    host_by_paths(
        "segment_anything.modeling.image_encoder.ImageEncoderViT",
        Paths(maps=True, more=lambda root: {"beside": RELATIVE if root.blocks[0].attn.use_rel_pos else None}),
        name="SAM (its own code)",
        note="the image encoder, beside its relative bias; one size",
    ),
    host_by_paths(
        "models_mae.MaskedAutoencoderViT",
        Paths(more=lambda root: {"shuffle": "random_masking", "adds": ("forward_encoder",)}),
        name="MAE (its own code)",
        note="the encoder; its fine-tuning model is a timm VisionTransformer",
    ),
    host_by_paths(
        "models_v2.vit_models",
        Paths(prefix_rows=0, bare=1, more=lambda root: {"adds": ("forward_features",)}),
        name="DeiT III (its own code)",
        note="the class token has no position; DeiT's other models are timm VisionTransformers",
    ),
    Host(
        "torch TransformerEncoder",
        ("torch.nn.modules.transformer.TransformerEncoder",),
        ("torch.nn.modules.transformer.TransformerEncoderLayer",),
        examine_encoder,
        note="norm_first=True, over patches alone, grid=(rows, columns): a new table; where nothing else is supported",
        user_arguments=("grid",),
        last=True,
    ),
)
