"""What our models around timm's `VisionTransformer` share: how timm makes them, and its descriptions of them."""

from __future__ import annotations

from typing import Any

from timm.models._builder import build_model_with_cfg
from torch import Tensor, nn

from lape.core.position import Grid
from lape.errors import LapeError


def imagenet_cfg(crop_pct: float, first_conv: str | None) -> dict[str, Any]:
    """timm's description of a model for 224 pixels and ImageNet-1K, without weights.

    Args:
        crop_pct: side of the crop over side of the resized image in the evaluation of its authors.
        first_conv: path of the convolution that sees the pixels; None where there is none.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
        "license": "apache-2.0",
    }


def check_images(x_BCHW: Tensor, img_size: Grid, otherwise: str = "call set_input_size") -> None:
    """Raises LapeError for images of another size than the model's, with what to do beside creating another model."""
    height, width = x_BCHW.shape[-2:]
    if (height, width) != img_size:
        raise LapeError(
            f"images of {height} x {width} pixels were given, the model is for {img_size[0]} x {img_size[1]}: "
            f"create it with that img_size, or {otherwise}"
        )


def check_untrained(name: str, pretrained: bool) -> None:
    """Raises LapeError when weights are asked for: there are none of our models."""
    if pretrained:
        raise LapeError(f"{name} has no pretrained weights: leave pretrained=True out and train it (`lape recipes`)")


def create(cls: type[nn.Module], name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """The model of an entry point, features_only included. Raises LapeError when weights are asked for."""
    check_untrained(name, pretrained)
    out_indices = kwargs.pop("out_indices", 3)
    features = {"out_indices": out_indices, "feature_cls": "getter"}
    model: nn.Module = build_model_with_cfg(cls, name, False, feature_cfg=features, **kwargs)
    return model
