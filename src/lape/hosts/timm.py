"""timm's pre-norm `VisionTransformer`: plain, DeiT, distilled, DeiT-III, registers, LayerScale, pooled, hybrid."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from lape.errors import LapeError, UnsupportedModelError
from lape.grids import grid_of_map
from lape.hosts import timm_maps, timm_stages, timm_tokens
from lape.hosts.base import Anatomy, Host, find_host
from lape.hosts.timm_parts import PARALLEL, POST_NORM, anatomy, children, layout_of, measure, pooling
from lape.names import nearest

_VIT = "timm.models.vision_transformer"
_BLOCKS = (f"{_VIT}.Block",)
_REFUSED = {
    f"{_VIT}.ResPostBlock": POST_NORM,
    f"{_VIT}.ParallelScalingBlock": PARALLEL,
    f"{_VIT}.DiffParallelScalingBlock": PARALLEL,
    f"{_VIT}.ParallelThingsBlock": "it runs several attentions side by side, each with a norm of its own",
    # Models that hold blocks like the above in another arrangement.
    "timm.models.crossvit.MultiScaleBlock": (
        "two branches with a position table each exchange their class tokens, so there is no one position to hand on"
    ),
    "timm.models.mobilevit.MobileVitBlock": (
        "it has no position embedding, and attends between the pixels of one place in all patches"
    ),
    "timm.models.mobilevit.MobileVitV2Block": (
        "it has no position embedding, and attends between the pixels of one place in all patches"
    ),
    "timm.models.pit.PoolingVisionTransformer": (
        "a convolution pools tokens and widens them between its stages, so that the position of a stage is not "
        "that of the next"
    ),
    "timm.models.qwen3_vit.Qwen3VitEncoder": (
        "it resamples its position table for every image in a way of its own, beside rotary position embedding"
    ),
}


def examine(root: nn.Module) -> Anatomy:
    """Where a timm VisionTransformer keeps its blocks, its table and its grid. Raises UnsupportedModelError."""
    grid, patch_size = measure(root)
    return anatomy(
        root,
        children(root, "blocks"),
        _BLOCKS,
        _REFUSED,
        layout_of(root, grid),
        patch_size,
        patch_embed="patch_embed" if getattr(root, "dynamic_img_size", False) else None,
        grid_from=grid_of_map,
        **pooling(root),
        own_kind=getattr(root, "own_pe", "learnable"),
    )


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by name. Raises LapeError: an unknown name (the nearest is named), wrong arguments or size."""
    import timm

    import lape.models  # noqa: F401  they are known to timm from here on

    if not isinstance(name, str) or not timm.is_model(name.split(".")[0]):
        asked, known = str(name).split(".")[0], timm.list_models()
        guess = nearest(asked, known) or next((model for model in known if asked and model.startswith(asked)), None)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise LapeError(f"unknown model {name!r}: {hint}timm.list_models() has all names")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, AssertionError) as error:
        raise _explained(name, kwargs, error) from error
    patch_embed = getattr(model, "patch_embed", None)
    size, patch = getattr(patch_embed, "img_size", None), getattr(patch_embed, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if size and patch and (size[0] % patch[0] or size[1] % patch[1]):
        raise LapeError(
            f"input size {size[0]} x {size[1]} is not divisible by the patch of {name}, {patch[0]} x {patch[1]}: "
            f"use {size[0] // patch[0] * patch[0] or patch[0]} or another multiple"
        )
    return model


def _explained(name: str, kwargs: dict[str, Any], error: Exception) -> LapeError:
    """Why a model cannot be made: it is none that can be converted, or an argument that it does not take."""
    import timm

    with torch.device("meta"):
        plain = timm.create_model(name)
    try:
        find_host(plain)
    except UnsupportedModelError as unsupported:
        return unsupported
    reason = " ".join(str(error).split()) or type(error).__name__
    wrong = re.search(r"unexpected keyword argument '(\w+)'", reason)
    if wrong is None:
        return LapeError(f"model {name!r} with {kwargs}: {reason}")
    guess = nearest(wrong[1], inspect.signature(type(plain).__init__).parameters)
    hint = f"; did you mean {guess!r}?" if guess else ""
    return LapeError(f"model {name!r} takes no argument {wrong[1]!r}{hint}")


VISION_TRANSFORMER = Host(
    name="timm VisionTransformer",
    root_classes=(f"{_VIT}.VisionTransformer",),
    block_classes=_BLOCKS,
    examine=examine,
    package="timm",
    build=build,
    measure=measure,
    note="plain, DeiT, distilled, DeiT-III, registers, LayerScale, class token or pooled, behind a CNN (hybrid)",
    tested=("timm 1.0.31",),
    refused=_REFUSED,
)

HOSTS = (VISION_TRANSFORMER, *timm_tokens.HOSTS, *timm_maps.HOSTS, *timm_stages.HOSTS)
