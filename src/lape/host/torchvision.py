"""torchvision's `VisionTransformer`: vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy
from lape.core.bias import masked
from lape.core.position import Layout
from lape.errors import LapeError
from lape.host.base import Blueprint, Host, class_name
from lape.host.parts import POST_NORM, Call, anatomy, check_blocks, children

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
    return anatomy(root, blocks, layout, add_bias=add_to_multihead_mask, adds=adds, **paths, **sizes)


_ARGUMENTS = (
    "image_size patch_size hidden_dim mlp_dim dropout attention_dropout num_classes representation_size".split()
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
    for argument in kwargs:
        if argument not in (*_ARGUMENTS, "num_layers", "num_heads"):
            raise LapeError(f"{argument!r} is no argument of VisionTransformer that says what the model is")


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A torchvision VisionTransformer with random weights."""
    from torchvision.models import VisionTransformer

    if name != "VisionTransformer":
        raise LapeError(f"torchvision model {name!r} is not known here: VisionTransformer is")
    return VisionTransformer(**kwargs)


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
    refused={
        "torchvision.models.swin_transformer.SwinTransformerBlock": (
            "the model does not know the size of its images, over whose grid a position is laid; timm's Swin does"
        ),
        "torchvision.models.swin_transformer.SwinTransformerBlockV2": POST_NORM,
    },
)
