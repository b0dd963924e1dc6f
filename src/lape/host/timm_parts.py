"""What timm's models have in common: one position table, patches on a grid, blocks that begin with `norm1`, `attn`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy
from lape.core.bias import AddBias, OwnBias, add_to_attn_mask, masked
from lape.core.norm import NEW_OUTPUT
from lape.core.position import Grid, Layout
from lape.errors import UnsupportedModelError
from lape.host.base import check_blocks, check_norm, class_name

NEW_OUTPUT.add("timm.layers.norm")

ROTARY = "rotary position embedding in attention"

# Reasons for classes of blocks, one wording for all modules.
POST_NORM = "its norm stands behind attention (post-norm), so no norm feeds attention"
PARALLEL = "one norm feeds attention and MLP at once, and the MLP must get no position"

_NO_MASK = ("timm.layers.diff_attention.DiffAttention",)  # its two paths disagree on the heads of a mask


def children(root: nn.Module, path: str) -> list[str]:
    """Paths of the children of a block list, in the order of the forward."""
    return [f"{path}.{name}" for name, _ in root.get_submodule(path).named_children()]


def anatomy(
    root: nn.Module,
    blocks: list[str],
    allowed: tuple[str, ...],
    refused: dict[str, str],
    layout: Layout,
    patch_size: tuple[int, int],
    *,
    slot: str | None = "pos_embed",
    **more: Any,
) -> Anatomy:
    """The anatomy of a model whose blocks have `norm1` and `attn`; raises UnsupportedModelError with the reason.

    Args:
        slot: path of the table; the model may lack the table itself (None). A slot of None: its forward adds none.
        more: further fields of `Anatomy`.
    """
    check_blocks("timm", root, blocks, allowed, refused)
    for path in blocks:
        check_norm(f"{path}.norm1", root.get_submodule(f"{path}.norm1"))
    if getattr(getattr(root, "patch_drop", None), "prob", 0.0) > 0:
        raise UnsupportedModelError(
            "patch_drop_rate > 0 removes tokens at random, so a token's position is no longer known in the blocks: "
            "create the model with patch_drop_rate=0"
        )
    table = None if slot is None else _table(root, slot, layout)
    norm = root.get_submodule(f"{blocks[0]}.norm1")
    attention = root.get_submodule(f"{blocks[0]}.attn")
    return Anatomy(
        root=root,
        blocks=tuple(blocks),
        norm="norm1",
        attention="attn",
        table=slot if table is not None else None,
        table_slot=slot,
        layout=layout,
        patch_size=patch_size,
        width=_width(norm),
        num_heads=attention.num_heads,  # type: ignore[arg-type]
        **{"add_bias": mask_of(attention), **more},
    )


def own_biases(like: OwnBias, owners: list[str]) -> tuple[OwnBias, ...]:
    """The same method of each of these modules."""
    return tuple(replace(like, method=f"{path}.{like.method}") for path in owners)


def _table(root: nn.Module, slot: str, layout: Layout) -> Tensor | None:
    owner, _, name = slot.rpartition(".")
    table: Tensor | None = getattr(root.get_submodule(owner), name, None)
    expected = ((1, layout.num_rows), (1, *layout.grid))
    if table is not None and tuple(table.shape[:-1]) not in expected:
        raise UnsupportedModelError(
            f"{slot} has shape {tuple(table.shape)}, expected (1, {layout.num_rows}, width): "
            f"grid {layout.grid[0]} x {layout.grid[1]} and {layout.prefix_rows} prefix rows"
        )
    return table


def _width(norm: nn.Module) -> int:
    shape: Any = norm.normalized_shape
    return shape[-1]


def mask_of(attention: nn.Module) -> AddBias | None:
    """How a bias gets into an attention of timm; None when it takes none."""
    parameters = inspect.signature(attention.forward).parameters
    if class_name(type(attention)) in _NO_MASK:
        return None
    if "attn_mask" in parameters:
        return add_to_attn_mask
    return add_to_shared_bias if "shared_rel_pos_bias" in parameters else None


def add_to_shared_bias(
    bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """For BEiT's attention(x, shared_rel_pos_bias=...), an additive bias that broadcasts to (B, H, N, N)."""
    return args, {**kwargs, "shared_rel_pos_bias": masked(bias_1HNN, kwargs.get("shared_rel_pos_bias"))}


def measure(root: nn.Module) -> tuple[Grid, tuple[int, int]]:
    """Grid of the present input size, and the pixels of the image for each patch."""
    patch_embed: Any = root.get_submodule("patch_embed")
    if getattr(patch_embed, "grid_size", None) is None or not hasattr(patch_embed, "feat_ratio"):
        raise UnsupportedModelError(
            f"patch_embed is a {class_name(type(patch_embed))}, which does not tell its grid: "
            "use timm's PatchEmbed or HybridEmbed"
        )
    return tuple(patch_embed.grid_size), tuple(patch_embed.feat_ratio(as_scalar=False))


def pooling(root: nn.Module) -> dict[str, Any]:
    """`pooled` and `last_norm` of an anatomy, for models with `global_pool`, `norm` and perhaps `fc_norm` behind it.

    Where `fc_norm` does the work, `norm` is an Identity: then no norm stands between the blocks and the pooling.
    """
    averages = getattr(root, "global_pool", "token") in ("avg", "avgmax", "max")
    pooled = averages and not (getattr(root, "pool_include_prefix", False) and root.num_prefix_tokens)
    norm = root._modules.get("norm")
    return {"pooled": pooled, "last_norm": None if norm is None or isinstance(norm, nn.Identity) else "norm"}


def layout_of(root: nn.Module, grid: Grid) -> Layout:
    """The layout of a model that tells `num_prefix_tokens` and perhaps `no_embed_class`."""
    prefix: int = root.num_prefix_tokens  # type: ignore[assignment]
    return Layout(grid, 0, prefix) if getattr(root, "no_embed_class", False) else Layout(grid, prefix)
