"""Conditional position: made of the tokens themselves, by a convolution over their grid (a rival of LaPE).

Knows no host. Shape legend: B batch, N tokens, D width, p prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lape.core.joined import Joined
from lape.core.position import Grid


class PEG(nn.Conv2d):
    """y + PEG(y) for patches y; prefix tokens (class, registers) pass by.

    PEG is one depth-wise convolution, 3 x 3, zeros around the map, with bias: 10 D parameters. The zeros are what tells
    a token how far the border is. One follows block 0, or (PEG-6) one each of the blocks 0 to 5, and nothing else is
    added to the model; initial values are torch's. Source: Chu et al., "Conditional Positional Encodings for Vision
    Transformers" (arXiv 2102.10882), whose default is one. It depends on the image, so no constant can take its place.
    """

    def __init__(self, width: int, like: Tensor):
        super().__init__(width, width, 3, padding=1, groups=width, device=like.device, dtype=like.dtype)

    def add_to_map(self, x_BRCD: Tensor) -> Tensor:
        """A map (B, rows, columns, D) with the position of its patches."""
        position_BDRC: Tensor = self(x_BRCD.permute(0, 3, 1, 2))
        return x_BRCD + position_BDRC.permute(0, 2, 3, 1)

    def add_to_tokens(self, x: Tensor, grid: Grid, num_prefix: int) -> Tensor:
        """Tokens (B, N, D) with the position of their patches."""
        prefix_BpD, patches_BnD = x[:, :num_prefix], x[:, num_prefix:]
        map_BDrc = patches_BnD.transpose(1, 2).unflatten(2, grid)
        return torch.cat([prefix_BpD, patches_BnD + self(map_BDrc).flatten(2).transpose(1, 2)], dim=1)


class Generating(Joined):
    """The block behind which position is generated: what leaves it has the position already."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        link: Any = self._lape  # type: ignore[attr-defined]
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        first, *more = output if isinstance(output, tuple) else (output,)  # some return their attention, too
        first = link.running.lape(first, link, self._lape_place)  # type: ignore[attr-defined]
        return (first, *more) if isinstance(output, tuple) else first
