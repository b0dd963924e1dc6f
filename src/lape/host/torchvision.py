"""torchvision's `VisionTransformer` (vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14), Swin (swin_t, ...) and MViT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy
from lape.core.bias import BlockBias, masked
from lape.core.position import Grid, Layout
from lape.core.stages import Stage
from lape.errors import LapeError, UnsupportedModelError
from lape.host.base import Blueprint, Host, class_name
from lape.host.parts import POST_NORM, RELATIVE, Call, check_blocks, checked_anatomy, children, instances

_SWIN = "torchvision.models.swin_transformer"
_VIT = "torchvision.models.vision_transformer"
_BLOCKS = (f"{_VIT}.EncoderBlock",)


def add_to_multihead_mask(bias_1HNN: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """For nn.MultiheadAttention(query, key, value, attn_mask=...), whose additive mask is (B H, N, N)."""
    mask = masked(bias_1HNN, kwargs.get("attn_mask"))
    mask_bNN = mask.expand(args[0].shape[0], -1, -1, -1).flatten(0, 1)
    return args, {**kwargs, "attn_mask": mask_bNN}


def examine(root: nn.Module) -> Anatomy:
    """Where a torchvision VisionTransformer keeps its blocks, its table and its grid. Raises UnsupportedModelError."""
    vit: Any = root
    blocks = children(root, "encoder.layers")
    check_blocks("torchvision", root, blocks, _BLOCKS)
    patch, side = vit.patch_size, vit.image_size // vit.patch_size
    paths: dict[str, Any] = {"slot": "encoder.pos_embedding", "norm": "ln_1", "attention": "self_attention"}
    sizes = {"patch_size": (patch, patch), "width": vit.hidden_dim, "num_heads": vit.encoder.layers[0].num_heads}
    layout = Layout((side, side), prefix_rows=1)
    adds = ("encoder.forward",)
    more: dict[str, Any] = {"adds": adds, "queries_keys": "makes them inside of nn.MultiheadAttention"}
    return checked_anatomy(root, blocks, layout, add_bias=add_to_multihead_mask, **more, **paths, **sizes)


_ARGUMENTS = (
    "image_size patch_size hidden_dim mlp_dim dropout attention_dropout num_classes representation_size".split()
)

_OF_SWIN = (
    *"patch_size embed_dim depths num_heads window_size mlp_ratio dropout attention_dropout".split(),
    *("stochastic_depth_prob", "num_classes"),
)
_OF_MVIT = (
    *"spatial_size temporal_size block_setting residual_pool residual_with_cls_embed rel_pos_embed".split(),
    *"proj_after_attn dropout attention_dropout stochastic_depth_prob num_classes".split(),
    *("patch_embed_kernel", "patch_embed_stride", "patch_embed_padding"),
)


def blueprint(model: nn.Module) -> Blueprint | None:
    """The arguments of a plain VisionTransformer, read from its attributes; None for a model around one."""
    vit: Any = model
    if class_name(type(model)) != f"{_VIT}.VisionTransformer":
        return None
    arguments = {name: getattr(vit, name) for name in _ARGUMENTS}
    layers = vit.encoder.layers
    return "VisionTransformer", {**arguments, "num_layers": len(layers), "num_heads": layers[0].num_heads}


def check_arguments(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises LapeError for an argument that `blueprint` does not write."""
    names = {"SwinTransformer": _OF_SWIN, "MViT": _OF_MVIT}.get(name, (*_ARGUMENTS, "num_layers", "num_heads"))
    for argument in kwargs:
        if argument not in names:
            raise LapeError(f"{argument!r} is no argument of {name} that says what the model is")


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A torchvision VisionTransformer, Swin or MViT with random weights."""
    from torchvision.models import SwinTransformer, VisionTransformer
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    classes: dict[str, Any] = {"VisionTransformer": VisionTransformer, "SwinTransformer": SwinTransformer, "MViT": MViT}
    if name not in classes:
        raise LapeError(f"torchvision model {name!r} is not known here: {', '.join(classes)} are")
    if name == "MViT":
        settings = [MSBlockConfig(**block) for block in kwargs["block_setting"]]
        kwargs = {**kwargs, "block_setting": settings, "spatial_size": tuple(kwargs["spatial_size"])}
    model: nn.Module = classes[name](**kwargs)
    return model


def examine_swin(root: nn.Module, grid: Grid | None = None) -> Anatomy:
    """A torchvision Swin, which does not know the size of its images: `grid` is that of the first stage.

    Its relative bias stays, or is joined itself; a table is new. Raises UnsupportedModelError without a grid.
    """
    features, stages, blocks = children(root, "features"), [], []
    for path in instances(root, f"{_SWIN}.SwinTransformerBlockV2"):
        raise UnsupportedModelError(f"{path} is a {_SWIN}.SwinTransformerBlockV2: {POST_NORM}")
    if grid is None:
        raise UnsupportedModelError(
            "the model does not know the size of its images, over whose grid a position is laid: name it, for instance "
            "lape.apply_(model, grid=(56, 56)) for 224 x 224 pixels and patches of 4"
        )
    first, merging, stage_grid = grid, None, grid
    for path in features[1:]:
        if class_name(type(root.get_submodule(path))) == f"{_SWIN}.PatchMerging":
            merging, stage_grid = path, tuple((side + 1) // 2 for side in stage_grid)
            continue
        inside = children(root, path)
        check_blocks("torchvision", root, inside, (f"{_SWIN}.SwinTransformerBlock",))
        norm: Any = root.get_submodule(f"{inside[0]}.norm1")
        width = norm.normalized_shape[0]
        stages.append(Stage(len(inside), stage_grid, width, merging))
        blocks += inside
    attentions: list[Any] = [root.get_submodule(f"{path}.attn") for path in blocks]
    biases = [
        BlockBias(f"{path}.attn.get_relative_position_bias", math.prod(attention.window_size))
        for path, attention in zip(blocks, attentions, strict=True)
    ]
    conv: Any = root.get_submodule("features.0.0")
    sizes = {"patch_size": conv.kernel_size, "width": conv.out_channels, "num_heads": attentions[0].num_heads}
    fields = {"slot": None, "input": "features.0", "beside": RELATIVE, "own_bias": tuple(biases), "maps": True, **sizes}
    layout, names = Layout(first, prefix_rows=0), {"norm": "norm1", "attention": "attn"}
    return checked_anatomy(root, blocks, layout, add_bias=None, stages=tuple(stages), **names, **fields)


def swin_blueprint(model: nn.Module) -> Blueprint | None:
    """The arguments of a Swin, read off its modules; None for a model around one."""
    if class_name(type(model)) != f"{_SWIN}.SwinTransformer":
        return None
    features: Any = model.features
    stages: list[Any] = [stage for stage in features[1:] if isinstance(stage, nn.Sequential)]
    first, last = stages[0][0], stages[-1][-1]
    arguments = {
        "patch_size": list(features[0][0].kernel_size),
        "embed_dim": features[0][0].out_channels,
        "depths": [len(stage) for stage in stages],
        "num_heads": [stage[0].attn.num_heads for stage in stages],
        "window_size": list(first.attn.window_size),
        "mlp_ratio": first.mlp[0].out_features / first.mlp[0].in_features,
        "dropout": first.attn.dropout,
        "attention_dropout": first.attn.attention_dropout,
        "stochastic_depth_prob": last.stochastic_depth.p,
        "num_classes": model.num_classes,
    }
    return "SwinTransformer", arguments


VISION_TRANSFORMER = Host(
    name="torchvision VisionTransformer",
    root_classes=(f"{_VIT}.VisionTransformer",),
    block_classes=_BLOCKS,
    examine=examine,
    package="torchvision",
    blueprint=blueprint,
    build=build,
    check_arguments=check_arguments,
    note="vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14, at one size",
    tested=("torchvision 0.29.2",),
)
SWIN = Host(
    name="torchvision Swin",
    root_classes=(f"{_SWIN}.SwinTransformer",),
    block_classes=(f"{_SWIN}.SwinTransformerBlock",),
    examine=examine_swin,
    package="torchvision",
    blueprint=swin_blueprint,
    build=build,
    note="swin_t, swin_s, swin_b, with grid=(rows, columns): on its relative bias, or a new table; one size",
    tested=("torchvision 0.29.1",),
    user_arguments=("grid",),
    refused={f"{_SWIN}.SwinTransformerBlockV2": POST_NORM},
)
HOSTS = (VISION_TRANSFORMER, SWIN)
