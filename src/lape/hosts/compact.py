"""The Compact Transformers of `lape.models`: ViT-Lite with a class token, CVT and CCT without."""

from __future__ import annotations

from torch import nn

from lape.hosts.base import Anatomy, Host
from lape.hosts.timm_parts import anatomy, children, layout_of, measure

_MODELS = "lape.models.compact"
_BLOCKS = (f"{_MODELS}.CompactBlock",)


def examine(root: nn.Module) -> Anatomy:
    """Blocks like timm's up to attention; a new learnable table starts as the models' own does."""
    grid, patch_size = measure(root)
    blocks = children(root, "blocks")
    std: float = root.table_std  # type: ignore[assignment]
    pooled = root.num_prefix_tokens == 0  # CVT and CCT: sequence pooling, behind `norm`
    layout = layout_of(root, grid)
    return anatomy(root, blocks, _BLOCKS, {}, layout, patch_size, table_std=std, pooled=pooled, last_norm="norm")


COMPACT_TRANSFORMER = Host(
    name="lape CompactTransformer",
    root_classes=(f"{_MODELS}.CompactTransformer",),
    block_classes=_BLOCKS,
    examine=examine,
    measure=measure,
    note="ViT-Lite, CVT and CCT for small images, see lape.models",
    tested=("timm 1.0.31",),
)
