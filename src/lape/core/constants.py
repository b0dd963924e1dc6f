"""Tensors that no parameter decides: made once for a device, registered nowhere, so that nothing can overwrite them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_CACHE: dict[Hashable, Tensor] = {}
_MOST = 64


def constant(make: Callable[..., Tensor], device: torch.device, *args: Any) -> Tensor:
    """`make(*args)` on a device. Not to be written to."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return make(*args).to(device)
    key = (make, device, args)
    if key not in _CACHE:
        with torch.inference_mode(False):
            tensor = make(*args).to(device)
        if type(tensor) is not Tensor or tensor.is_meta:  # a fake one, of a mode that ends
            return tensor
        if len(_CACHE) >= _MOST:
            _CACHE.clear()
        _CACHE[key] = tensor
    return _CACHE[key]
