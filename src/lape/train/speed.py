"""What is faster on this machine, and changes no result but by rounding."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lape.recipe import Recipe

PAYS = 3.0  # so many times as fast: worth a line
SIDE = 512  # of the matrices that are multiplied to see


@contextmanager
def attention_for(model: nn.Module, recipe: Recipe, device: torch.device) -> Iterator[str]:
    """Computes attention as the recipe says until the block ends; gives "fused" or "plain".

    `auto` is a rule, so that a run that goes on computes what it did: plain for bf16 on a CPU, where the backward of
    torch's fused attention is slow (a training step of DeiT-Ti takes 0.75 to 0.8 of the time without it, one of small
    grids 0.3 to 0.7; `benchmarks/attention.py`), fused everywhere else.
    """
    plain = recipe.attention == "plain" or (
        recipe.attention == "auto" and device.type == "cpu" and recipe.amp == "bf16"
    )
    flags = {
        module: module.fused_attn for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)
    }
    for module in flags:
        module.fused_attn = not plain  # type: ignore[assignment]
    try:
        yield "plain" if plain and flags else "fused"
    finally:
        for module, fused in flags.items():
            module.fused_attn = fused


def advice_on_precision(recipe: Recipe, device: torch.device) -> str:
    """One line where a CPU multiplies bf16 much faster than the fp32 that the recipe asks for; else empty."""
    if device.type != "cpu" or recipe.amp not in ("off", "auto"):
        return ""
    factor = _seconds(torch.float32) / _seconds(torch.bfloat16)
    return (
        "" if factor < PAYS else f"This CPU multiplies bf16 {factor:.0f} times as fast as fp32: --amp bf16 is faster."
    )


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of a few products of random square matrices."""
    a = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return min(times)
