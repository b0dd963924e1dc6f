"""CeiT: a convolutional stem, blocks whose MLP looks at neighbouring patches, and attention over all class tokens.

    Image-to-Tokens   convolution 7 x 7 of 64 channels, stride 2, without bias; BatchNorm; max-pooling 3 x 3, stride 2;
                      patches of 4 x 4 of that map: 16 pixels a token                                  (Section 3.1)
    LeFF              in the place of the MLP; the class token passes by                               (Section 3.2)
    LCA               the class tokens of all layers attend to each other, that of the last one is read (Section 3.3)

The blocks are timm's `Block` with LeFF as their `mlp_layer`, in timm's `VisionTransformer`, so that they are converted
as every other one; LCA, one more of them over the class tokens, stands behind and gets no position of the image. The
table is learned, the class token owns a row.

Source: Yuan et al., "Incorporating Convolution Designs into Visual Transformers", ICCV 2021 (arXiv 2103.11816). From
the authors' released code: 64 channels of the stem, biases of q, k, v and of all convolutions of LeFF, no activation
behind its last BatchNorm, LayerNorm eps 1e-6, a learned table of layers on the class tokens that starts at zero, no
stochastic depth in LCA.

Parameters at 224 pixels and 1,000 classes (`tests/models/test_ceit.py` counts them):

                           here       published
    ceit_tiny_patch16_224   6,356,904    6.4M
    ceit_small_patch16_224  24,204,840   24.2M

CeiT-T: stem 9,408 + 128 + 196,800, class token 192, table 197 x 192 = 37,824, 12 blocks of 456,000 (of which LeFF
307,008), LCA 444,864 and its table 12 x 192 = 2,304, last norm 384, classifier 193,000.

Shape legend: B batch, N tokens, D width, H hidden channels, L layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import HybridEmbed, LayerNorm, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lape.core.position import Grid
from lape.errors import LapeError
from lape.models.registry import check_images, create, imagenet_cfg

Pair = tuple[int, int]
PATCH = 4  # of the stem's map, which has a quarter of the image's sides


def stem(in_chans: int, channels: int = 64, device: Any = None, dtype: Any = None) -> nn.Sequential:
    """Images -> a map (B, channels, height / 4, width / 4)."""
    return nn.Sequential(
        nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False, device=device, dtype=dtype),
        nn.BatchNorm2d(channels, device=device, dtype=dtype),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


class ImageToTokens(HybridEmbed):
    """timm's patches of a feature map, here of the stem's."""

    def __init__(self, img_size: int | Pair = 224, patch_size: int | Pair = 16, in_chans: int = 3, **kwargs: Any):
        if patch_size not in (16, (16, 16)):
            raise LapeError(f"patch_size={patch_size}: the stem of CeiT makes patches of 16 pixels only")
        dd: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        sides = to_2tuple(img_size)
        if any(side < 16 or side % 16 for side in sides):
            raise LapeError(
                f"images of {sides[0]} x {sides[1]} pixels do not divide into the patches of CeiT: give multiples of 16"
            )
        super().__init__(stem(in_chans, **dd), img_size, patch_size=PATCH, in_chans=in_chans, **kwargs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_images(x_BCHW, self.img_size)
        tokens_BND: Tensor = super().forward(x_BCHW)  # type: ignore[no-untyped-call]
        return tokens_BND


class LeFF(nn.Module):
    """Locally-enhanced feed-forward on the grid of patches: GELU(BN(1 x 1)), GELU(BN(3 x 3 depth-wise)), BN(1 x 1).

    (B, 1 + N, D) -> the same shape; the first token, of the class, passes by. `grid_size` is set by the model.
    """

    grid_size: Grid

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Any = None,
        bias: bool = True,
        drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_features, hidden_features, 1, bias=bias, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_features, **dd)
        self.conv2 = nn.Conv2d(hidden_features, hidden_features, 3, padding=1, groups=hidden_features, bias=bias, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_features, **dd)
        self.conv3 = nn.Conv2d(hidden_features, in_features, 1, bias=bias, **dd)
        self.bn3 = nn.BatchNorm2d(in_features, **dd)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)

    def forward(self, x_BND: Tensor) -> Tensor:
        class_B1D, patches_BND = x_BND[:, :1], x_BND[:, 1:]
        map_BHrc = self.act(self.bn1(self.conv1(patches_BND.mT.unflatten(2, self.grid_size))))
        map_BHrc = self.act(self.bn2(self.conv2(map_BHrc)))
        map_BDrc = self.drop(self.bn3(self.conv3(map_BHrc)))
        return torch.cat([class_B1D, map_BDrc.flatten(2).mT], dim=1)


class CeiT(VisionTransformer):
    """timm's VisionTransformer with the stem, LeFF and LCA. Its features: what LCA reads, then the patches.

    Raises LapeError for what CeiT has no form of: several prefix tokens or none, and images of varying size.
    """

    def __init__(self, **kwargs: Any):
        only_forms = {"class_token": True, "reg_tokens": 0, "dynamic_img_size": False, "dynamic_img_pad": False}
        for name, only in only_forms.items():
            if kwargs.get(name, only) != only:
                raise LapeError(f"{name}={kwargs[name]}: CeiT has {name}={only} only, leave it out")
        norm_layer = kwargs.setdefault("norm_layer", partial(LayerNorm, eps=1e-6))
        super().__init__(**{"embed_layer": ImageToTokens, "mlp_layer": LeFF, **kwargs})
        self.lca = Block(
            self.embed_dim,
            num_heads=kwargs.get("num_heads", 12),
            mlp_ratio=kwargs.get("mlp_ratio", 4.0),
            qkv_bias=kwargs.get("qkv_bias", True),
            proj_drop=kwargs.get("proj_drop_rate", 0.0),
            attn_drop=kwargs.get("attn_drop_rate", 0.0),
            norm_layer=norm_layer,
        )
        self.lca.apply(self._init_weights)
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_layer_embed = nn.Parameter(torch.zeros(1, len(self.blocks), self.embed_dim))
        self._tell_grid()

    def _tell_grid(self) -> None:
        for block in self.blocks:
            block.get_submodule("mlp").grid_size = self.patch_embed.grid_size

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another image size, for good. The patch stays 16 x 16."""
        if patch_size is not None:
            raise LapeError(f"patch_size={patch_size}: the stem of CeiT makes patches of 16 pixels only")
        super().set_input_size(img_size)
        self._tell_grid()

    def read_layers(self, tokens: list[Tensor]) -> Tensor:
        """The features (B, N, D) of the tokens that left each block: LCA's class token and the last patches, normed."""
        classes_BLD = torch.stack([x_BND[:, 0] for x_BND in tokens], dim=1) + self.pos_layer_embed[:, : len(tokens)]
        features_BND: Tensor = self.norm(torch.cat([self.lca(classes_BLD)[:, -1:], tokens[-1][:, 1:]], dim=1))
        return features_BND

    def _layers(self, x_BCHW: Tensor, attn_mask: Tensor | None, is_causal: bool) -> list[Tensor]:
        """The tokens (B, N, D) that leave each block."""
        x_BND = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x_BCHW))))
        tokens = []
        for block in self.blocks:
            if attn_mask is not None or is_causal:
                x_BND = block(x_BND, attn_mask=attn_mask, is_causal=is_causal)
            else:
                x_BND = checkpoint(block, x_BND) if self.grad_checkpointing else block(x_BND)
            tokens.append(x_BND)
        return tokens

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D), the class token first; mask and order as in timm."""
        return self.read_layers(self._layers(x, attn_mask, is_causal))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's, with LCA in the final features."""
        options: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal}
        if intermediates_only:
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, True, output_dict, **options
            )
        assert output_fmt in ("NCHW", "NLC")
        tokens = self._layers(x, **options)
        outputs = [tokens[i] for i in feature_take_indices(len(self.blocks), indices)[0]]
        outputs = [self.norm(x_BND) if norm else x_BND for x_BND in outputs]
        maps = [x_BND[:, 1:] for x_BND in outputs]
        if output_fmt == "NCHW":
            maps = [x_BnD.mT.unflatten(2, self.patch_embed.grid_size) for x_BnD in maps]
        prefixes = [x_BND[:, :1] for x_BND in outputs]
        features = self.read_layers(tokens)
        if output_dict:
            parts = {"image_features": features, "image_intermediates": maps}
            return {**parts, "image_intermediates_prefix": prefixes} if return_prefix_tokens else parts
        return features, list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps


_SIZES: dict[str, dict[str, Any]] = {
    "ceit_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "ceit_small_patch16_224": {"embed_dim": 384, "depth": 12, "num_heads": 6},
}
default_cfgs = generate_default_cfgs({name: imagenet_cfg(0.875, "patch_embed.backbone.0") for name in _SIZES})


@register_model
def ceit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CeiT-T: 12 blocks of width 192, 3 heads; 6.4 M parameters."""
    name = "ceit_tiny_patch16_224"
    return create(CeiT, name, pretrained, **{**_SIZES[name], **kwargs})


@register_model
def ceit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CeiT-S: 12 blocks of width 384, 6 heads; 24.2 M parameters."""
    name = "ceit_small_patch16_224"
    return create(CeiT, name, pretrained, **{**_SIZES[name], **kwargs})
