"""Hugging Face transformers' Swin, and its copies in Donut and MaskFormer: tokens (B, N, D) whose grid halves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lape.bias import OwnBias
from lape.errors import UnsupportedModelError
from lape.hosts.base import RELATIVE, Anatomy, Host, check_blocks, class_name
from lape.hosts.huggingface import blueprint
from lape.position import Layout
from lape.stages import Stage

_MODELS = "transformers.models"
_PREFIXES = (
    f"{_MODELS}.swin.modeling_swin.Swin",
    f"{_MODELS}.donut.modeling_donut_swin.DonutSwin",
    f"{_MODELS}.maskformer.modeling_maskformer_swin.MaskFormerSwin",
)
_TABLE = "embeddings.position_embeddings"


def examine(root: nn.Module) -> Anatomy:
    """Where a Swin of the library keeps its stages; its table, where it has one, is over the grid of the first."""
    embeddings: Any = root.get_submodule("embeddings")
    prefix = class_name(type(embeddings)).removesuffix("Embeddings")
    paths = [path for path, module in root.named_modules() if class_name(type(module)) == f"{prefix}Layer"]
    check_blocks("Hugging Face", root, paths, (f"{prefix}Layer",), {})
    config: Any = root.config
    grid, patch_size = tuple(embeddings.patch_embeddings.grid_size), tuple(embeddings.patch_embeddings.patch_size)
    layout = Layout(grid, prefix_rows=0)
    table: Tensor | None = embeddings.position_embeddings
    if table is not None and table.shape[-2] != layout.num_rows:
        raise UnsupportedModelError(
            f"{_TABLE} has shape {tuple(table.shape)}, expected {layout.num_rows} rows: the class adds it to "
            f"{layout.num_rows} patches, which fails"
        )
    stages: list[Stage] = []
    merging = None
    for path, module in root.named_modules():
        if class_name(type(module)) == f"{prefix}Stage":
            width = module.get_submodule("blocks.0.layernorm_before").normalized_shape[0]
            stages.append(Stage(len(module.get_submodule("blocks")), grid, width, merging, merges_map=False))
            merging, grid = f"{path}.downsample", tuple((side + 1) // 2 for side in grid)
    return Anatomy(
        root=root,
        blocks=tuple(paths),
        norm="layernorm_before",
        attention="attention",
        table=None if table is None else _TABLE,
        table_slot=_TABLE,
        layout=layout,
        patch_size=patch_size,
        width=config.embed_dim,
        num_heads=config.num_heads[0],
        add_bias=None,
        beside=RELATIVE,
        own_bias=_own_bias(root, paths),
        stages=tuple(stages),
    )


def _own_bias(root: nn.Module, paths: list[str]) -> tuple[OwnBias, ...]:
    """The module that computes the bias of each layer; earlier versions and the copies compute it inline."""
    own = [f"{path}.attention.relative_position_bias" for path in paths]
    found: list[Any] = [dict(root.named_modules()).get(path) for path in own]
    if not all(hasattr(module, "window_area") for module in found):
        return ()
    return tuple(OwnBias(f"{path}.forward", m.window_area) for path, m in zip(own, found, strict=True))


HOST = Host(
    name="Hugging Face Swin",
    root_classes=tuple(f"{prefix}Embeddings" for prefix in _PREFIXES),
    root_child="embeddings",
    block_classes=tuple(f"{prefix}Layer" for prefix in _PREFIXES),
    examine=examine,
    package="transformers",
    blueprint=blueprint,
    note="Swin, also in Donut and MaskFormer: its table or a new one, merged from stage to stage; one size",
    tested=("transformers 5.23.0",),
    refused={
        f"{_MODELS}.swinv2.modeling_swinv2.Swinv2Layer": (
            "its norm stands behind attention (post-norm), so no norm feeds attention"
        )
    },
)
