"""Compact Transformers for small images: ViT-Lite, CVT and CCT (Hassani et al. 2021, arXiv 2104.05704).

The models of the paper's CIFAR rows (Yu et al., ICCV 2023, Table 2). Names: family _ depth _ patch side (ViT-Lite, CVT)
or kernel x layers of the convolutional tokenizer (CCT) _ image side: `vit_lite_7_4_32`, `cvt_7_4_32`, `cct_7_3x1_32`.

    tokens    ViT-Lite, CVT: a convolution whose stride is its kernel, with bias.  CCT: layers of convolution without
              bias (stride max(1, k // 2 - 1), padding max(1, k // 2)), ReLU and max-pooling (3, stride 2, padding 1)
    block     y = x + MSA(LN(x));  z = LN'(y);  out = z + MLP(z):  the second norm stands ON the residual stream
    head      LN, then ViT-Lite: its class token; CVT, CCT: sum_i softmax_i(w . x_i + b) x_i over the tokens; linear

Parameters, with width D, MLP ratio m, depth L, N rows of the position table (a class token owns one), K classes:
block 4 D + 3 D D + (D D + D) + (2 m D D + m D + D); last norm 2 D; head D K + K; table N D; ViT-Lite's class token D;
pooling D + 1; patches 3 k k D + D; tokenizer 3 k k D, or 3 k k 64 + 64 k k D for two layers.
ViT-Lite-7/4 on 32 x 32 with 10 classes: 7 * 526,336 + 512 + 2,570 + 65 * 256 + 256 + 12,544 = 3,716,874.

Published: dropout in attention 0.1 and stochastic depth 0.1 in training, tables from a normal distribution of std 0.2.
There are no weights. Shape legend: B batch, C channels, N tokens, D width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lape.core.position import Grid, Layout, learnable, sin_1d
from lape.errors import LapeError
from lape.models.registry import Stem, create, imagenet_cfg

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # mean and std of the training images, in [0, 1]
HIDDEN_PLANES = 64  # channels between two layers of a convolutional tokenizer

Position = Literal["learnable", "sine", "none"]
Size = int | tuple[int, int]


class Tokenizer(Stem):
    """Patches, or the convolutional tokenizer of CCT.

    Args:
        patch_size: side of non-overlapping patches; None for a convolutional tokenizer.
        kernel_size: side of the kernel of each convolutional layer, which ReLU and max-pooling follow.
        conv_layers: how many of them.
        bias: of the patches' convolution.
        how: of `Stem`.
    """

    def __init__(
        self,
        img_size: Size = 32,
        patch_size: int | None = None,
        in_chans: int = 3,
        embed_dim: int = 256,
        kernel_size: int = 3,
        conv_layers: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **how: Any,
    ):
        dd = {"device": device, "dtype": dtype}
        modules: list[nn.Module] = []
        self.steps: list[tuple[int, int, int]] = []  # kernel, stride and padding of whatever shrinks the map
        if patch_size is not None:
            modules.append(nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias, **dd))
            self.steps.append((patch_size, patch_size, 0))
        else:
            planes = [in_chans, *[HIDDEN_PLANES] * (conv_layers - 1), embed_dim]
            stride, padding = max(1, kernel_size // 2 - 1), max(1, kernel_size // 2)
            for channels_in, channels_out in pairwise(planes):
                modules += [
                    nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding, bias=False, **dd),
                    nn.ReLU(),
                ]
                modules.append(nn.MaxPool2d(3, 2, 1))
                self.steps += [(kernel_size, stride, padding), (3, 2, 1)]
        super().__init__(img_size, math.prod(stride for _, stride, _ in self.steps), **how)
        self.layers = nn.Sequential(*modules)

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        rows, columns = img_size
        for kernel, stride, padding in self.steps:
            rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (rows, columns))
        if min(rows, columns) < 1:
            size = img_size[0] if img_size[0] == img_size[1] else img_size
            ratio = self.patch_size[0]
            raise LapeError(f"img_size={size!r} is too small: a token stands for {ratio} x {ratio} pixels")
        return rows, columns

    def tokens(self, x_BCHW: Tensor) -> Tensor:
        x_BND: Tensor = self.layers(x_BCHW).flatten(2).mT
        return x_BND


class CompactBlock(Block):
    """timm's block with its second norm on the residual stream: y = x + MSA(norm1(x)); z = norm2(y); z + MLP(z)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attention_BND = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x_BND: Tensor = self.norm2(x + self.drop_path1(self.ls1(attention_BND)))
        out_BND: Tensor = x_BND + self.drop_path2(self.ls2(self.mlp(x_BND)))
        return out_BND


class SequencePool(nn.Module):
    """Tokens (B, N, D) -> (B, D): their mean, weighted by a softmax over a learned score of each."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x_BND: Tensor) -> Tensor:
        weight_BN1: Tensor = self.score(x_BND).softmax(dim=1)
        return (weight_BN1.mT @ x_BND).squeeze(1)


class CompactTransformer(VisionTransformer):
    """ViT-Lite, CVT or CCT: timm's VisionTransformer with the above in it, the pooling where there is no class token.

    Args:
        patch_size: side of a patch (ViT-Lite, CVT); None: the convolutional tokenizer of CCT.
        kernel_size, conv_layers: of that tokenizer.
        class_token: a class token is the image's representation (ViT-Lite); else sequence pooling.
        pos_embed: "learnable", "sine" (fixed, by token number) or "none".
        kwargs: of timm's class; defaults are those of the published models of depth 7 for CIFAR-10.

    Raises LapeError: an unknown pos_embed, another pooling, or images too small for one token.
    """

    table_std = 0.2  # of the values that a learnable position table starts with

    def __init__(
        self,
        patch_size: int | None = None,
        kernel_size: int = 3,
        conv_layers: int = 1,
        class_token: bool = False,
        pos_embed: Position = "learnable",
        **kwargs: Any,
    ):
        if pos_embed not in get_args(Position):
            raise LapeError(f"pos_embed={pos_embed!r} is not known: use {', '.join(map(repr, get_args(Position)))}")
        if not class_token:
            _check_pooling(kwargs.pop("global_pool", None))
        parts: dict[str, Any] = {
            "patch_size": patch_size,
            "embed_layer": partial(Tokenizer, kernel_size=kernel_size, conv_layers=conv_layers),
            "block_fn": CompactBlock,
            "global_pool": "token" if class_token else "",
            "pos_embed": "none" if pos_embed == "none" else "learn",
            "weight_init": "skip",
        }
        super().__init__(class_token=class_token, **{**_DEFAULTS, **parts, **kwargs})
        self.pos_embed_argument = pos_embed
        if not class_token:
            self.seq_pool = SequencePool(self.embed_dim)
        self.init_weights()

    @property
    def table_kind(self) -> str:
        """The kind of its own table."""
        return "1D_sin" if self.pos_embed_argument == "sine" else "learnable"

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """The published start."""
        for module in self.modules():
            _initialise(module)
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if self.reg_token is not None:  # none of the published has them
            nn.init.normal_(self.reg_token, std=1e-6)
        if self.pos_embed is None:
            return
        layout = Layout(self.patch_embed.grid_size, self.num_prefix_tokens)
        frozen = self.table_kind == "1D_sin"
        table = sin_1d(layout, self.embed_dim) if frozen else learnable(layout, self.embed_dim, self.table_std)
        with torch.no_grad():
            self.pos_embed.copy_(table)
        self.pos_embed.requires_grad_(not frozen)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's; what pools belongs to the last layer."""
        groups: dict[str, Any] = super().group_matcher(coarse)
        return {**groups, "blocks": [*groups["blocks"], (r"^seq_pool", (99999,))]}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; 0 classes: none. Raises LapeError for another pooling than the model's."""
        if hasattr(self, "seq_pool"):
            _check_pooling(global_pool)
            global_pool = None
        super().reset_classifier(num_classes, global_pool)
        _initialise(self.head)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, N, D) -> (B, D)."""
        pooled_BD: Tensor = self.seq_pool(x) if hasattr(self, "seq_pool") else super().pool(x, pool_type)
        return pooled_BD


def _check_pooling(global_pool: str | None) -> None:
    """Raises LapeError for another pooling than that of a sequence, which timm has no word for."""
    if global_pool not in (None, "", "seq"):
        raise LapeError(f"global_pool={global_pool!r}: this model pools by 'seq' only; leave it out")


def _initialise(module: nn.Module) -> None:
    """Linear layers from a truncated normal distribution of std 0.02, convolutions as in He et al. 2015."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)


# ------------------------------------------------------------------------------------------------ names

SIZES: dict[int, dict[str, Any]] = {  # by depth
    2: {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    4: {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    6: {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    7: {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    14: {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "embed_dim": 384},
}
_PATCHES = {  # ViT-Lite and CVT differ in the class token only
    f"{family}_{depth}_4_32": {**SIZES[depth], "patch_size": 4, "class_token": family == "vit_lite", "img_size": 32}
    for family in ("vit_lite", "cvt")
    for depth in (2, 4, 6, 7)
}
_CONVOLUTIONS = {
    f"cct_{depth}_{kernel}x{layers}_{side}": SIZES[depth]
    | {"kernel_size": kernel, "conv_layers": layers, "img_size": side}
    for depth, kernel, layers, side in (
        *((2, 3, 2, 32), (4, 3, 2, 32), (6, 3, 1, 32), (6, 3, 2, 32), (7, 3, 1, 32), (7, 3, 2, 32)),
        *((7, 7, 2, 224), (14, 7, 2, 224), (14, 7, 2, 384)),
    )
}
_DEFAULTS = {
    **SIZES[7],
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate"), 0.1),
    "img_size": 32,
    "num_classes": 10,
    "qkv_bias": False,
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
MODELS: dict[str, dict[str, Any]] = {**_PATCHES, **_CONVOLUTIONS}


def _cfg(name: str) -> dict[str, Any]:
    side, small = MODELS[name]["img_size"], MODELS[name]["img_size"] == 32
    cfg = imagenet_cfg(1.0 if small else 0.9, "patch_embed.layers.0") | {"input_size": (3, side, side)}
    return cfg | {"num_classes": 10, "mean": CIFAR10[0], "std": CIFAR10[1]} if small else cfg


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in MODELS})


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        settings = {**MODELS[name], "num_classes": _cfg(name)["num_classes"], **kwargs}
        return create(CompactTransformer, name, pretrained, **settings)

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}: a `CompactTransformer` of depth {MODELS[name]['depth']}."
    return entry


for _name in MODELS:
    globals()[_name] = register_model(_entry_point(_name))
