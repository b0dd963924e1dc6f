"""The idea of LaPE: position gets a LayerNorm of its own in each layer, and is handed on from layer to layer.

    x'_l     = MSA_l( LN_l(x_l) + P_(l+1) )        what attention sees                        (Eq. 9)
    P_(l+1)  = LN'_l(P_l),   P_0 = P               the chain; nothing else changes            (Eq. 11)

Token and position usually share one LayerNorm, LN_l(x_l + P): its statistics then scale the position by
sigma_P / sigma_(x+P), whatever the layer would need (Eq. 7). LN'_l has an affine of its own: 2 D parameters a block.
The residual stream and the MLP branch get no position. Equations: Yu et al., ICCV 2023.

No module of the host is replaced: its own norm becomes one of a subclass of its class, and returns LN_l(x) + P_(l+1).
All LN'_l lie in one module, `model.lape`, which computes the positions of all layers once a forward.

Shape legend: B batch, N tokens, R rows of the position table, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lape.core.forward import check_token_count, position_for
from lape.core.joined import Joined

Merge = Callable[[int, Tensor], Tensor]
"""(layer, position) -> the position as that block gets it: merged by the host's module where a stage begins there."""


def chain(p_1RD: Tensor, norms: Iterable[tuple[int, nn.Module]], merge: Merge) -> Iterator[Tensor]:
    """P_(l+1) = LN'_l(P_l) for each (l, LN'_l) in turn, from P_0."""
    for layer, norm in norms:
        p_1RD = norm(merge(layer, p_1RD))
        yield p_1RD


def sharing(p_1RD: Tensor, norms: Iterable[tuple[int, nn.Module]], merge: Merge) -> Iterator[Tensor]:
    """LN'_l(P) for each (l, LN'_l): all layers have the same position (join `LaPE-sharing`)."""
    for layer, norm in norms:
        p_1RD = merge(layer, p_1RD)
        yield norm(p_1RD)


class PositionalNorm(Joined):
    """LN_l(x) + P_(l+1): the norm before attention, with the position beside it."""

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND: Tensor = super().forward(x_BND)  # type: ignore[misc]
        p_1ND = position_for(self, y_BND)
        check_token_count(self, y_BND, p_1ND)
        in_place = self._lape_new and (torch.compiler.is_compiling() or not _is_watched())  # type: ignore[attr-defined]
        return y_BND.add_(p_1ND) if in_place else y_BND + p_1ND

    def extra_repr(self) -> str:
        host: Any = super()
        return f"{host.extra_repr()}, position beside it"


def _is_watched() -> bool:
    """Whether a dispatch mode may keep each tensor, or a transform of torch.func may batch one of two."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


def makes_new(norm: nn.Module) -> bool:
    """Whether a norm returns a tensor that nobody else has and its backward does not need: it may be added to."""
    return isinstance(norm, nn.LayerNorm) and type(norm).forward.__module__ in NEW_OUTPUT


NEW_OUTPUT = {"torch.nn.modules.normalization"}
"""Modules whose LayerNorms are known to do so; hosts add those of their library."""
