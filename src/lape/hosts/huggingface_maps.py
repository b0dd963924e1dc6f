"""Hugging Face transformers' SAM encoder: maps (B, rows, columns, D), global and windowed attention, one size."""

from __future__ import annotations

from typing import Any

from torch import nn

from lape.hosts.base import RELATIVE, Anatomy, Host, check_blocks, class_name
from lape.hosts.huggingface import blueprint, measure
from lape.position import Layout

_PREFIXES = (
    "transformers.models.sam.modeling_sam.SamVision",
    "transformers.models.sam_hq.modeling_sam_hq.SamHQVision",
)


def examine(root: nn.Module) -> Anatomy:
    """`layer_norm1` stands before the windows are cut, so a position joins the whole map."""
    prefix = class_name(type(root)).removesuffix("Encoder")
    paths = [f"layers.{name}" for name, _ in root.get_submodule("layers").named_children()]
    check_blocks("Hugging Face", root, paths, (f"{prefix}Layer",), {})
    config: Any = root.config
    grid, patch_size = measure(root)
    return Anatomy(
        root=root,
        blocks=tuple(paths),
        norm="layer_norm1",
        attention="attn",
        table="pos_embed" if root.pos_embed is not None else None,
        table_slot="pos_embed" if root.pos_embed is not None else None,
        layout=Layout(grid, prefix_rows=0),
        patch_size=patch_size,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        add_bias=None,
        beside=RELATIVE if config.use_rel_pos else None,
    )


HOST = Host(
    name="Hugging Face SAM",
    root_classes=tuple(f"{prefix}Encoder" for prefix in _PREFIXES),
    block_classes=tuple(f"{prefix}Layer" for prefix in _PREFIXES),
    examine=examine,
    package="transformers",
    blueprint=blueprint,
    note="SAM and SAM-HQ: the table of the image encoder, beside its relative bias; one size",
    tested=("transformers 5.23.0",),
)
