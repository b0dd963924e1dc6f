"""P_(l+1) on its way to the next layer, so that a forward computes the chain once: L norms, not L (L + 1) / 2.

A norm asks its predecessor for P_l, and that one asks its own: nothing is written, and nothing can be out of date, but
each layer computes all before it. A `HandOver` stands between two norms and keeps what the first has just computed
until the second asks, once. It is a pure cache: it may be empty at any time, is used once, is never copied or pickled,
and is believed only when nothing that decides the value has changed. It stays empty where a value must be computed
anew: in a backward and under saved-tensor hooks (activation checkpointing), and while torch.compile traces.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lape.position import Grid

if TYPE_CHECKING:
    from lape.norm import PositionalNorm


def _hooks_on_saved_tensors() -> bool:
    """Whether somebody packs what autograd saves. Torch has no public way to ask: where it cannot tell, assume so."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    except (AttributeError, TypeError):
        return True


class HandOver:
    """The position source of the norm after `norm`: P_(l+1) as just computed, else as `norm` computes it."""

    def __init__(self, norm: PositionalNorm):
        self._start(norm)
        norm.successor = self

    def _start(self, norm: PositionalNorm) -> None:
        self.norm = norm
        self._kept = threading.local()

    def position(self, grid: Grid | None = None) -> Tensor:
        """P_(l+1), (1, R, D)."""
        if not torch.compiler.is_dynamo_compiling() and (kept := self._kept.__dict__.pop("position", None)) is not None:
            state, p_1RD, spent = kept
            if not spent and _same(state, self._state(grid)):
                return p_1RD
        return self.norm.position(grid)

    def leave(self, p_1RD: Tensor, grid: Grid | None) -> None:
        """`norm` has computed this in a forward, and its successor may ask for it."""
        if torch.compiler.is_dynamo_compiling() or (state := self._state(grid)) is None:
            return
        spent: list[bool] = []
        if p_1RD.requires_grad:  # a graph that has given its gradient gives no other
            p_1RD.register_hook(lambda _: spent.append(True))
        self._kept.position = (state, p_1RD, spent)

    def _state(self, grid: Grid | None) -> list[Any] | None:
        """All that decides P_(l+1), or None where it must be computed anew: grid, modes, every parameter's version."""
        if torch._C._current_graph_task_id() != -1 or _hooks_on_saved_tensors():
            return None
        parameters: list[Any] = []
        source: Any = self
        while not isinstance(source, nn.Module):  # the table ends the walk
            if isinstance(source, HandOver):
                parameters += source.norm.pe_norm._parameters.values()
                source = source.norm._source[0]
            else:  # a border between stages
                parameters += source.merging.parameters()
                source = source.source
        parameters += source._parameters.values()
        parameters = [p for p in parameters if p is not None]  # a LayerNorm may have no bias
        if not all(isinstance(p, nn.Parameter) for p in parameters):  # a transform's own, such as vmap's
            return None
        try:
            versions = [p._version for p in parameters]
        except RuntimeError:  # made in inference mode: without one
            return None
        kind = parameters[0].device.type
        if kind == "meta":  # no values, and no autocast to ask about
            return None
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        modes = [grid, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast]
        return [*modes, *versions, *parameters]

    def __getstate__(self) -> dict[str, Any]:
        return {"norm": self.norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start(state["norm"])


def _same(kept: list[Any], now: list[Any] | None) -> bool:
    """Parameters are compared by identity, all else by value."""
    return (
        now is not None
        and len(kept) == len(now)
        and all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(kept, now, strict=True))
    )
