"""Rotary position written out, and put into a host that was not converted: behind its own attention's door."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def turned(x_BHNd: Tensor, frequencies: Tensor | None, grid: tuple[int, int], prefix: int) -> Tensor:
    """One complex number after the other: x e^(i (theta_x column + theta_y row))."""
    out = x_BHNd.clone()
    _, heads, count, width = x_BHNd.shape
    for head in range(heads):
        for n in range(prefix, count):
            row, column = divmod(n - prefix, grid[1])
            for pair in range(width // 2):
                if frequencies is None:
                    angle = (row if pair % 2 else column) * 100 ** (-(pair // 2) / (width // 4))
                else:
                    angle = float(frequencies[0, head, pair] * column + frequencies[1, head, pair] * row)
                value = torch.complex(x_BHNd[:, head, n, 2 * pair], x_BHNd[:, head, n, 2 * pair + 1])
                value = value * complex(math.cos(angle), math.sin(angle))
                out[:, head, n, 2 * pair], out[:, head, n, 2 * pair + 1] = value.real, value.imag
    return out


class AllTurned:
    """In this context torch's fused attention turns its queries and keys; `calls` counts them."""

    def __init__(self, grid: tuple[int, int], prefix: int):
        self.grid, self.prefix, self.calls = grid, prefix, 0

    def __enter__(self) -> "AllTurned":
        self.fused = F.scaled_dot_product_attention

        def attention(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> Tensor:
            self.calls += 1
            query, key = (turned(x, None, self.grid, self.prefix) for x in (query, key))
            return self.fused(query, key, *args, **kwargs)

        F.scaled_dot_product_attention = attention
        return self

    def __exit__(self, *_error: object) -> None:
        F.scaled_dot_product_attention = self.fused
