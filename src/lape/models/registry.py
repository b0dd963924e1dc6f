"""What our models around timm's `VisionTransformer` share: how timm makes them, and its descriptions of them.

Shape legend: B batch, C channels, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

from timm.layers import to_2tuple
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


class Stem(nn.Module):
    """In the place of timm's `PatchEmbed`: images (B, C, height, width) -> tokens (B, N, D), row by row.

    A subclass has `tokens(x_BCHW)` and the grid of an image, `dynamic_feat_size(img_size)`, which raises LapeError for
    an image that does not fit.

    Args:
        img_size: pixels, a side or (height, width).
        patch: pixels from one token to the next, along both axes.
        strict_img_size: whether images of `img_size` only are taken.
        output_fmt: "NHWC" for maps (B, rows, columns, D); timm asks for them with dynamic_img_size=True.

    Raises LapeError for padded images.
    """

    def __init__(
        self,
        img_size: int | Grid,
        patch: int,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        dynamic_img_pad: bool = False,
    ):
        super().__init__()
        if dynamic_img_pad:
            raise LapeError("dynamic_img_pad=True: this model does not pad images, leave it out")
        assert output_fmt in (None, "NHWC")
        self.strict_img_size, self.flatten = strict_img_size, output_fmt is None
        self.patch_size = (patch, patch)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | Grid | None = None, patch_size: int | Grid | None = None) -> None:
        """Another image size in pixels; the patch stays. No parameter depends on it. Raises LapeError."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise LapeError(f"patch_size={patch_size}: this stem makes patches of {self.patch_size[0]} pixels only")
        if img_size is not None:
            self.img_size = to_2tuple(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = math.prod(self.grid_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | Grid:
        """Pixels from one token to the next."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        """The grid of an image (height, width)."""
        raise NotImplementedError

    def tokens(self, x_BCHW: Tensor) -> Tensor:
        """Images -> (B, N, D)."""
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.strict_img_size:
            check_images(x_BCHW, self.img_size, "with dynamic_img_size=True")
        x_BND = self.tokens(x_BCHW)
        return x_BND if self.flatten else x_BND.unflatten(1, self.dynamic_feat_size((x_BCHW.shape[2], x_BCHW.shape[3])))


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
