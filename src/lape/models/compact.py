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
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from timm.layers import Attention, DropPath, Mlp, to_2tuple
from timm.models._builder import build_model_with_cfg
from timm.models._manipulate import checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from lape.core.position import Grid, Layout, learnable, resample, sin_1d
from lape.errors import LapeError
from lape.models.registry import check_images, check_untrained, imagenet_cfg

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # mean and std of the training images, in [0, 1]
HIDDEN_PLANES = 64  # channels between two layers of a convolutional tokenizer

Position = Literal["learnable", "sine", "none"]
Size = int | tuple[int, int]


class Tokenizer(nn.Module):
    """Images (B, C, height, width) -> tokens (B, N, D), row by row.

    Args:
        img_size: pixels, a side or (height, width).
        patch: side of non-overlapping patches; None for a convolutional tokenizer.
        kernel: side of the kernel of each convolutional layer, which ReLU and max-pooling follow.
        layers: how many of them.
    """

    def __init__(self, img_size: Size, in_chans: int, width: int, patch: int | None, kernel: int, layers: int):
        super().__init__()
        modules: list[nn.Module] = []
        self.steps: list[tuple[int, int, int]] = []  # kernel, stride and padding of whatever shrinks the map
        if patch is not None:
            modules.append(nn.Conv2d(in_chans, width, patch, patch))
            self.steps.append((patch, patch, 0))
        else:
            planes = [in_chans, *[HIDDEN_PLANES] * (layers - 1), width]
            stride, padding = max(1, kernel // 2 - 1), max(1, kernel // 2)
            for channels_in, channels_out in pairwise(planes):
                modules += [nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False), nn.ReLU()]
                modules.append(nn.MaxPool2d(3, 2, 1))
                self.steps += [(kernel, stride, padding), (3, 2, 1)]
        self.layers = nn.Sequential(*modules)
        self.ratio = math.prod(stride for _, stride, _ in self.steps)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: Size) -> None:
        """Tells the size of the images that will come. Raises LapeError when they are too small for one token."""
        self.img_size = to_2tuple(img_size)
        self.patch_size = (self.ratio, self.ratio)  # pixels from one token to the next
        self.grid_size = self.dynamic_feat_size(self.img_size)
        if min(self.grid_size) < 1:
            raise LapeError(
                f"img_size={img_size!r} is too small: a token stands for {self.ratio} x {self.ratio} pixels"
            )

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels from one token to the next."""
        return self.ratio if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> Grid:
        """The grid of tokens of images (height, width)."""
        rows, columns = img_size
        for kernel, stride, padding in self.steps:
            rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (rows, columns))
        return rows, columns

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_images(x_BCHW, self.img_size)
        x_BND: Tensor = self.layers(x_BCHW).flatten(2).mT
        return x_BND


class CompactBlock(nn.Module):
    """y = x + MSA(norm1(x)); z = norm2(y); z + MLP(z)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop: float, attn_drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, qkv_bias=False, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND = x_BND + self.drop_path(self.attn(self.norm1(x_BND)))
        z_BND = self.norm2(y_BND)
        out_BND: Tensor = z_BND + self.drop_path(self.mlp(z_BND))
        return out_BND


class SequencePool(nn.Module):
    """Tokens (B, N, D) -> (B, D): their mean, weighted by a softmax over a learned score of each."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x_BND: Tensor) -> Tensor:
        weight_BN1: Tensor = self.score(x_BND).softmax(dim=1)
        return (weight_BN1.mT @ x_BND).squeeze(1)


class CompactTransformer(nn.Module):
    """ViT-Lite, CVT or CCT, with the methods of a timm model.

    Args:
        img_size: pixels, a side or (height, width).
        patch_size: side of a patch (ViT-Lite, CVT); None: the convolutional tokenizer of CCT.
        kernel_size, conv_layers: of that tokenizer.
        class_token: a class token is the image's representation (ViT-Lite); else sequence pooling.
        pos_embed: "learnable", "sine" (fixed, by token number) or "none".
        drop_rate: before the head.
        pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: behind the position, in the projections of
            attention and MLP, on attention weights, and of the last block (linear from 0 at the first).

    Raises LapeError: an unknown pos_embed, or images too small for one token.
    """

    table_std = 0.2  # of the values that a learnable position table starts with

    def __init__(
        self,
        img_size: Size = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        patch_size: int | None = None,
        kernel_size: int = 3,
        conv_layers: int = 1,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        class_token: bool = False,
        pos_embed: Position = "learnable",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ):
        super().__init__()
        if pos_embed not in get_args(Position):
            raise LapeError(f"pos_embed={pos_embed!r} is not known: use {', '.join(map(repr, get_args(Position)))}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.grad_checkpointing = False

        self.patch_embed = Tokenizer(img_size, in_chans, embed_dim, patch_size, kernel_size, conv_layers)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = self._position(pos_embed)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = [drop_path_rate * layer / max(1, depth - 1) for layer in range(depth)]
        self.blocks = nn.Sequential(
            *(CompactBlock(embed_dim, num_heads, mlp_ratio, proj_drop_rate, attn_drop_rate, rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.seq_pool = None if class_token else SequencePool(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def _position(self, kind: Position) -> nn.Parameter | None:
        layout = Layout(self.patch_embed.grid_size, self.num_prefix_tokens)
        if kind == "none":
            return None
        if kind == "sine":
            return nn.Parameter(sin_1d(layout, self.embed_dim), requires_grad=False)
        return nn.Parameter(learnable(layout, self.embed_dim, self.table_std))

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """For layer-wise learning rates: what belongs to the stem and to each block."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^seq_pool", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations twice instead of keeping them."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: Size) -> None:
        """Makes this a model of images of another size; its table is resampled (bicubic)."""
        old = Layout(self.patch_embed.grid_size, self.num_prefix_tokens)
        self.patch_embed.set_input_size(img_size)
        if self.pos_embed is not None and old.grid != self.patch_embed.grid_size:
            table_1RD = resample(self.pos_embed.detach(), old, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(table_1RD.clone(), requires_grad=self.pos_embed.requires_grad)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; 0 classes: none. Raises LapeError for another pooling than the model's."""
        pooling = "token" if self.seq_pool is None else "seq"
        if global_pool not in (None, pooling):
            raise LapeError(f"global_pool={global_pool!r}: this model pools by {pooling!r} only; leave it out")
        self.num_classes = num_classes
        like = self.norm.weight
        self.head = nn.Linear(self.embed_dim, num_classes).to(like) if num_classes else nn.Identity()
        _initialise(self.head)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Tokens (B, N, D) behind the last norm, a class token first."""
        x_BND: Tensor = self.patch_embed(x_BCHW)
        if self.cls_token is not None:
            x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        if self.pos_embed is not None:
            x_BND = x_BND + self.pos_embed
        x_BND = self.pos_drop(x_BND)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x_BND = checkpoint_seq(self.blocks, x_BND)
        else:
            x_BND = self.blocks(x_BND)
        x_BND = self.norm(x_BND)
        return x_BND

    def forward_head(self, x_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of tokens; `pre_logits`: the pooled (B, D)."""
        x_BD: Tensor = x_BND[:, 0] if self.seq_pool is None else self.seq_pool(x_BND)
        x_BD = self.head_drop(x_BD)
        return x_BD if pre_logits else self.head(x_BD)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))


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
MODELS: dict[str, dict[str, Any]] = {**_PATCHES, **_CONVOLUTIONS}


def _cfg(name: str) -> dict[str, Any]:
    side, small = MODELS[name]["img_size"], MODELS[name]["img_size"] == 32
    cfg = imagenet_cfg(1.0 if small else 0.9, "patch_embed.layers.0") | {"input_size": (3, side, side)}
    return cfg | {"num_classes": 10, "mean": CIFAR10[0], "std": CIFAR10[1]} if small else cfg


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in MODELS})


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        check_untrained(name, pretrained)
        settings = {**MODELS[name], "num_classes": _cfg(name)["num_classes"], **kwargs}
        model: nn.Module = build_model_with_cfg(CompactTransformer, name, False, **settings)
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}: a `CompactTransformer` of depth {MODELS[name]['depth']}."
    return entry


for _name in MODELS:
    globals()[_name] = register_model(_entry_point(_name))
