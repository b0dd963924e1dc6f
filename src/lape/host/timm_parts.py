"""What timm's models have in common: one position table, patches on a grid, blocks that begin with `norm1`, `attn`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy
from lape.core.bias import AddBias, OwnBias, add_to_attn_mask, masked
from lape.core.norm import NEW_OUTPUT
from lape.core.position import Grid, Layout
from lape.errors import UnsupportedModelError
from lape.host import parts
from lape.host.base import class_name

NEW_OUTPUT.add("timm.layers.norm")

ROTARY = "rotary position embedding in attention"
_NO_MASK = ("timm.layers.diff_attention.DiffAttention",)  # its two paths disagree on the heads of a mask


def anatomy(
    root: nn.Module, blocks: list[str], layout: Layout, *, slot: str | None = "pos_embed", **more: Any
) -> Anatomy:
    """The anatomy of a model whose blocks have `norm1` and `attn`; raises UnsupportedModelError with the reason.

    Args:
        slot: path of the table; the model may lack the table itself (None). A slot of None: its forward adds none.
        more: further fields of `Anatomy`.
    """
    for path in blocks:
        parts.check_norm(f"{path}.norm1", root.get_submodule(f"{path}.norm1"))
    if getattr(getattr(root, "patch_drop", None), "prob", 0.0) > 0:
        raise UnsupportedModelError(
            "patch_drop_rate > 0 removes tokens at random, so a token's position is no longer known in the blocks: "
            "create the model with patch_drop_rate=0"
        )
    first: Any = root.get_submodule(blocks[0])
    more = {"add_bias": mask_of(first.attn), "width": first.norm1.normalized_shape[-1], **more}
    return parts.anatomy(
        root, blocks, slot, layout, norm="norm1", attention="attn", num_heads=first.attn.num_heads, **more
    )


def own_biases(methods: list[str], layout: Layout) -> tuple[OwnBias, ...]:
    """The bias of each block between all tokens, computed by these methods."""
    return tuple(OwnBias(method, layout.num_patches, layout.num_prefix) for method in methods)


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


def patches_only(root: nn.Module, grid: Grid) -> Layout:
    """The layout of a model whose blocks see no other tokens."""
    return Layout(grid, prefix_rows=0)


def bare_prefix(root: Any, grid: Grid) -> Layout:
    """The layout of a model whose prefix tokens own no rows of the table."""
    return Layout(grid, 0, root.num_prefix_tokens)


def layout_of(root: Any, grid: Grid) -> Layout:
    """The layout of a model that tells `num_prefix_tokens` and perhaps `no_embed_class`."""
    return bare_prefix(root, grid) if getattr(root, "no_embed_class", False) else Layout(grid, root.num_prefix_tokens)
