"""torchvision's MViT (mvit_v1_b, mvit_v2_s): attention over (frames, rows, columns) that pools, block by block.

Shape legend: R rows of the position table, D width, T frames, n places of a frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lape.core.anatomy import Anatomy, Form
from lape.core.position import Grid, Layout
from lape.core.stages import Stage
from lape.host.base import Blueprint, Host, class_name
from lape.host.parts import RELATIVE, check_blocks, check_norms, checked_anatomy, children
from lape.host.torchvision import build, check_arguments

_MVIT = "torchvision.models.video.mvit"


def examine(root: nn.Module) -> Anatomy:
    """Where an MViT keeps its blocks, which pool their queries or widen the stream, and its table.

    A stage is a run of blocks of one grid and width; what leads to the next is the block before it, along its skip. The
    first version has a table, of frames + places; the second a bias made of the queries, which stays. Raises
    UnsupportedModelError.
    """
    vit: Any = root
    blocks, encoding = children(root, "blocks"), vit.pos_encoding
    check_blocks("torchvision", root, blocks, (f"{_MVIT}.MultiscaleBlock",))
    check_norms(root, [f"{path}.norm1" for path in blocks])
    grid, layers = (encoding.temporal_size, *encoding.spatial_size), list(vit.blocks)
    stages, merging, start, stage_grid = [], None, 0, grid
    for i, layer in enumerate(layers, 1):
        if i < len(layers) and layer.project is None and layer.pool_skip is None:
            continue
        stages.append(Stage(i - start, stage_grid, layers[start].attn.embed_dim, merging, _skipped))
        merging, start = blocks[i - 1], i
        if layer.pool_skip is not None:
            pool = layer.pool_skip.pool
            steps = zip(stage_grid, pool.kernel_size, pool.stride, pool.padding, strict=True)
            stage_grid = tuple((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in steps)
    table: dict[str, Any] = {"slot": None, "beside": RELATIVE}
    if encoding.spatial_pos is not None:
        axis_tables = ("pos_encoding.temporal_pos", "pos_encoding.class_pos")
        table = {"slot": "pos_encoding.spatial_pos", "form": Form(_of_frames_and_places, axis_tables)}
    attention = layers[0].attn
    sizes = {"patch_size": vit.conv_proj.stride, "width": attention.embed_dim, "num_heads": attention.num_heads}
    more = {"norm_feeds_more": layers[0].proj_after_attn, "input": "pos_encoding", "adds": ("pos_encoding.forward",)}
    parts = {"norm": "norm1", "attention": "attn", "add_bias": None, "stages": tuple(stages), **table, **sizes, **more}
    return checked_anatomy(root, blocks, Layout(grid, prefix_rows=1), **parts)


def _of_frames_and_places(places_nD: Tensor, frames_TD: Tensor, class_D: Tensor) -> Tensor:
    patches_TnD = frames_TD[:, None] + places_nD
    return torch.cat([class_D[None], patches_TnD.flatten(0, 1)])[None]


def _skipped(block: Any, p_1RD: Tensor, grid: Grid) -> Tensor:
    """The position beside which a block's attention is added: as the block makes its stream wider, and pools it."""
    if block.project is not None and block.proj_after_attn:
        p_1RD = block.project(block.norm1(p_1RD))
    if block.pool_skip is not None:
        p_1RD = block.pool_skip(p_1RD, grid)[0]
    return p_1RD if block.project is None or block.proj_after_attn else block.project(block.norm2(p_1RD))


def blueprint(model: nn.Module) -> Blueprint | None:
    """The arguments of an MViT, read off its modules; None for a model around one."""
    if class_name(type(model)) != f"{_MVIT}.MViT":
        return None
    vit: Any = model
    first, last, conv = vit.blocks[0], vit.blocks[-1], vit.conv_proj
    sides = zip((vit.pos_encoding.temporal_size, *vit.pos_encoding.spatial_size), conv.stride, strict=True)
    frames, *pixels = (side * step for side, step in sides)
    return "MViT", {
        "spatial_size": pixels,
        "temporal_size": frames,
        "block_setting": [_setting(block) for block in vit.blocks],
        "residual_pool": first.attn.residual_pool,
        "residual_with_cls_embed": first.attn.residual_with_cls_embed,
        "rel_pos_embed": vit.pos_encoding.spatial_pos is None,
        "proj_after_attn": first.proj_after_attn,
        "dropout": vit.head[0].p,
        "attention_dropout": first.attn.project[1].p if len(first.attn.project) > 1 else 0.0,
        "stochastic_depth_prob": last.stochastic_depth.p,
        "num_classes": vit.head[1].out_features,
        "patch_embed_kernel": list(conv.kernel_size),
        "patch_embed_stride": list(conv.stride),
        "patch_embed_padding": list(conv.padding),
    }


def _setting(block: Any) -> dict[str, Any]:
    """What torchvision's MSBlockConfig says of a block."""
    pools = {"q": block.attn.pool_q, "kv": block.attn.pool_k}
    kernels = {f"kernel_{name}": list(part.pool.kernel_size) if part else [] for name, part in pools.items()}
    strides = {f"stride_{name}": list(part.pool.stride) if part else [] for name, part in pools.items()}
    widths = {"input_channels": block.attn.embed_dim, "output_channels": block.mlp[3].out_features}
    return {"num_heads": block.attn.num_heads, **widths, **kernels, **strides}


HOSTS = (
    Host(
        name="torchvision MViT",
        root_classes=(f"{_MVIT}.MViT",),
        block_classes=(f"{_MVIT}.MultiscaleBlock",),
        examine=examine,
        package="torchvision",
        blueprint=blueprint,
        build=build,
        check_arguments=check_arguments,
        note="mvit_v1_b: its table; mvit_v2_s: a new one beside its relative bias; pooled as the stream is, one size",
        tested=("torchvision 0.29.2",),
    ),
)
