"""What stands in the place of LN'_l: the paper's Table 8 takes LN' apart into gain, normalisation, affine and bias.

`learned-norm` is a rival's: the length of the rows is one learned number and their directions stay (after Auto-PE,
arXiv 2505.13137, rebuilt from its description). Its unit is the square root of the width, so that it starts, as LN'
does, with a mean square of 1.

Shape legend: R rows of the position table, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import LapeError
from lape.names import PE_NORM_NAMES, match_name


@dataclass(frozen=True)
class PENorm:
    """One row of Table 8 (Yu et al., ICCV 2023), or another one."""

    name: str
    formula: str
    normalises: bool = False
    gain: Literal["none", "scalar", "vector"] = "none"
    bias: bool = False
    centred: bool = True  # whether the mean over the width is taken off before P is scaled

    def build(self, width: int, eps: float, like: Tensor) -> nn.Module:
        """The module of one layer, which starts as the identity or as a LayerNorm without affine."""
        if self.gain == "none" and not self.normalises:
            return nn.Identity()
        if self.gain == "scalar" or not self.normalises:
            gain = Gain(width, eps if self.normalises else None, self.gain == "scalar", self.bias, like)
            gain.centred = self.centred
            return gain
        affine = self.gain == "vector"
        return nn.LayerNorm(width, eps, affine, self.bias, device=like.device, dtype=like.dtype)


class Gain(nn.Module):
    """g p + b for p (1, R, D), or with an eps, g Norm(p) + b; g is one number or one a channel, b may be missing."""

    centred = True  # else Norm leaves the mean over the width where it is

    def __init__(self, width: int, eps: float | None, scalar: bool, bias: bool, like: Tensor):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(like.new_ones(1 if scalar else width))
        self.bias = nn.Parameter(like.new_zeros(width)) if bias else None

    def forward(self, p_1RD: Tensor) -> Tensor:
        if self.eps is not None:
            norm = F.layer_norm if self.centred else F.rms_norm
            p_1RD = norm(p_1RD, (self.width,), eps=self.eps)
        p_1RD = self.weight * p_1RD
        return p_1RD if self.bias is None else p_1RD + self.bias


PE_NORMS: dict[str, PENorm] = {
    norm.name: norm
    for norm in (
        PENorm("none", "P"),
        PENorm("scalar", "g P", gain="scalar"),
        PENorm("scale", "g * P", gain="vector"),
        PENorm("affine", "g * P + b", gain="vector", bias=True),
        PENorm("norm", "Norm(P)", normalises=True),
        PENorm("scalar-norm", "g Norm(P)", normalises=True, gain="scalar"),
        PENorm("scale-norm", "g * Norm(P)", normalises=True, gain="vector"),
        PENorm("layernorm", "g * Norm(P) + b", normalises=True, gain="vector", bias=True),
        PENorm("learned-norm", "g sqrt(D) P / |P|", normalises=True, gain="scalar", centred=False),
    )
}
assert tuple(PE_NORMS) == tuple(PE_NORM_NAMES)


def pe_norm_named(name: str) -> PENorm:
    """The one of this name, in any case. Raises LapeError that lists the known ones."""
    return PE_NORMS[match_name("pe_norm", name, PE_NORM_NAMES)]


def pe_norm_for(name: str | None, join: str, default: str | None) -> str | None:
    """The name of what a join has in the place of LN'_l: `default` when none is given; None where it has no such place.

    Raises LapeError where the given one has no meaning.
    """
    if name is None:
        return default
    norm = pe_norm_named(name)
    if default is None:
        raise LapeError(
            f"pe_norm={norm.name!r} with join={join!r}: position has no norm of its own there; leave it out"
        )
    if default == "none" != norm.name:
        raise LapeError(
            f"pe_norm={norm.name!r} with join={join!r}, which is LaPE-sharing without a norm: use that join"
        )
    return norm.name
