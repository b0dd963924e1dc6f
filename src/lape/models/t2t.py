"""T2T-ViT: two light attentions over overlapping patches make the tokens of an ordinary ViT with a fixed position.

    soft split 7 x 7, stride 4 -> performer -> soft split 3 x 3, stride 2 -> performer -> soft split 3 x 3, stride 2
    -> linear map to the width of the ViT: 16 pixels a token, as in DeiT                                (Section 3.1)

The blocks are timm's `Block` in timm's `VisionTransformer`, so that it is converted as every other one. Its position is
the sinusoid of the token number, the class token counted as the first, and is not trained (`pos_embed`, frozen).

Source: Yuan et al., "Tokens-to-Token ViT", ICCV 2021 (arXiv 2101.11986): widths, depths and token width 64 are those of
its Table 1; queries, keys and values have no bias in the blocks and have one in the performers, half as many random
features as the token width, dropout 0.1 in the performers, LayerNorm eps 1e-5, from the authors' released code
(yitu-opensource/T2T-ViT). Their pretrained weights scale attention otherwise and are not offered here.

Parameters at 224 pixels and 1,000 classes (`tests/models/test_t2t.py` counts them):

                     learn       with the frozen sinusoid    published
    t2t_vit_7     4,255,694          4,306,126                 4.3M
    t2t_vit_14   21,465,806         21,541,454                21.5M

T2T-ViT-7: performers 41,318 and 124,544, projection 147,712, class token 256, 7 blocks of 526,336, last norm 512,
classifier 257,000; 197 x 256 = 50,432 do not learn. The random features (2 x 32 x 64) are buffers.

Shape legend: B batch, N tokens, D width, m random features.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lape.core.position import Grid, Layout, sin_1d
from lape.errors import LapeError
from lape.models.registry import Stem, create, imagenet_cfg

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding of the three soft splits
PATCH = math.prod(stride for _, stride, _ in SPLITS)


class TokenPerformer(nn.Module):
    """Attention in linear time by positive random features, one head, from width `dim` to `token_dim`.

        k, q, v = three linear maps of LN(x)
        phi(u)  = exp(w u - |u|^2 / 2) / sqrt(m),  w (m, token_dim) orthogonal rows of length sqrt(m), never trained
        y_t     = sum_s phi(q_t) phi(k_s) v_s / (sum_s phi(q_t) phi(k_s) + 1e-8)
        x'      = v + W y,  output x' + MLP(LN(x'))

    phi(q) phi(k) estimates exp(q k) (Choromanski et al., ICLR 2021, "Rethinking Attention with Performers"). The width
    changes, so v takes the place of x in the residual. phi is computed in float32: its exponents leave half precision.
    """

    w: Tensor

    def __init__(self, dim: int, token_dim: int, drop: float = 0.1, device: Any = None, dtype: Any = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.kqv = nn.Linear(dim, 3 * token_dim, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)
        self.drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(token_dim, **dd)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim, **dd), nn.GELU(), nn.Linear(token_dim, token_dim, **dd), nn.Dropout(drop)
        )
        self.register_buffer("w", torch.empty(token_dim // 2, token_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the random features anew."""
        nn.init.orthogonal_(self.w, gain=math.sqrt(len(self.w)))

    def features(self, u_BND: Tensor) -> Tensor:
        """phi, (B, N, m), in float32."""
        u_BND, w_mD = u_BND.float(), self.w.float()
        return (u_BND @ w_mD.T - u_BND.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w_mD))

    def attend(self, x_BND: Tensor) -> Tensor:
        """The attention, with v as its residual."""
        k_BND, q_BND, v_BND = self.kqv(x_BND).chunk(3, dim=-1)
        with torch.autocast(x_BND.device.type, enabled=False):
            k_BNm, q_BNm = self.features(k_BND), self.features(q_BND)
            sums_BDm = v_BND.float().mT @ k_BNm
            weight_BN1 = q_BNm @ k_BNm.sum(1)[..., None]
            y_BND = q_BNm @ sums_BDm.mT / (weight_BN1 + 1e-8)
        output_BND: Tensor = v_BND + self.drop(self.proj(y_BND.to(v_BND.dtype)))
        return output_BND

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND = self.attend(self.norm1(x_BND))
        mlp_BND: Tensor = self.mlp(self.norm2(y_BND))
        return y_BND + mlp_BND


class TokensToToken(Stem):
    """The T2T module. Takes images of whole patches of 16 pixels; `how`: of `Stem`."""

    def __init__(
        self,
        img_size: int | Grid = 224,
        patch_size: int | Grid = PATCH,
        in_chans: int = 3,
        embed_dim: int = 768,
        token_dim: int = 64,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **how: Any,
    ):
        super().__init__(img_size, PATCH, **how)
        self.set_input_size(patch_size=patch_size)
        dd = {"device": device, "dtype": dtype}
        kernels = [kernel for kernel, _, _ in SPLITS]
        self.splits = nn.ModuleList(nn.Unfold(kernel, padding=pad, stride=stride) for kernel, stride, pad in SPLITS)
        self.attention1 = TokenPerformer(in_chans * kernels[0] ** 2, token_dim, **dd)
        self.attention2 = TokenPerformer(token_dim * kernels[1] ** 2, token_dim, **dd)
        self.project = nn.Linear(token_dim * kernels[2] ** 2, embed_dim, bias=bias, **dd)

    def dynamic_feat_size(self, img_size: Grid) -> Grid:
        height, width = img_size
        if min(height, width) < PATCH or height % PATCH or width % PATCH:
            raise LapeError(
                f"images of {height} x {width} pixels do not divide into the patches of T2T-ViT: "
                f"give multiples of {PATCH}"
            )
        return height // PATCH, width // PATCH

    def tokens(self, x_BCHW: Tensor) -> Tensor:
        rows, columns = self.dynamic_feat_size((x_BCHW.shape[2], x_BCHW.shape[3]))
        first, second, third = self.splits
        x_BND: Tensor = self.attention1(first(x_BCHW).mT)
        x_BND = self.attention2(second(x_BND.mT.unflatten(2, (4 * rows, 4 * columns))).mT)
        x_BND = self.project(third(x_BND.mT.unflatten(2, (2 * rows, 2 * columns))).mT)
        return x_BND


class T2TViT(VisionTransformer):
    """timm's VisionTransformer behind the T2T module, with a frozen sinusoid as its position."""

    table_kind = "1D_sin"

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("embed_layer", TokensToToken)
        kwargs.setdefault("norm_layer", partial(LayerNorm, eps=1e-5))
        super().__init__(**{"qkv_bias": False, **kwargs})
        self._fix_position()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's initialisation, but for the class token (std 0.02) and the position."""
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._fix_position()

    def _fix_position(self) -> None:
        if self.pos_embed is None:
            return
        grid = self.patch_embed.grid_size
        layout = Layout(grid, self.pos_embed.shape[1] - math.prod(grid))
        with torch.no_grad():
            self.pos_embed.copy_(sin_1d(layout, self.embed_dim))
        self.pos_embed.requires_grad_(False)


default_cfgs = generate_default_cfgs({name: imagenet_cfg(0.9, None) for name in ("t2t_vit_7", "t2t_vit_14")})


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """T2T-ViT-7: 7 blocks of width 256, 4 heads, MLP ratio 2; 4.3 M parameters."""
    sizes: dict[str, Any] = {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}
    return create(T2TViT, "t2t_vit_7", pretrained, **{**sizes, **kwargs})


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """T2T-ViT-14: 14 blocks of width 384, 6 heads, MLP ratio 3; 21.5 M parameters."""
    sizes: dict[str, Any] = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}
    return create(T2TViT, "t2t_vit_14", pretrained, **{**sizes, **kwargs})
