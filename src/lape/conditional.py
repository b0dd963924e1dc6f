"""Conditional position: made of the tokens themselves, by a convolution over their grid (a rival of LaPE).

Knows no host. Shape legend: B batch, N tokens, D width, p prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lape.grids import Grids
from lape.position import Layout
from lape.wrap import Wrapper


class PositionGenerator(Wrapper):
    """y + PEG(y) for the patches y that leave a block; prefix tokens (class, registers) pass by.

    PEG is one depth-wise convolution, 3 x 3, zeros around the map, with bias: 10 D parameters. The zeros are what tells
    a token how far the border is. It follows block 0 and nothing else is added to the model; its initial values are
    torch's. Source: Chu et al., "Conditional Positional Encodings for Vision Transformers" (arXiv 2102.10882), whose
    default this is (CPVT with one PEG). It depends on the image, so no constant can take its place.
    """

    inner = "host_block"

    def __init__(self, host_block: nn.Module, width: int, layout: Layout, grids: Grids | None, like: Tensor):
        super().__init__()
        self.host_block = host_block
        self.layout = layout
        self.grids = grids  # None: one size only
        self.peg = nn.Conv2d(width, width, 3, padding=1, groups=width, device=like.device, dtype=like.dtype)

    def generate(self, x: Tensor) -> Tensor:
        """x with the position of its patches: tokens (B, N, D), or a map (B, rows, columns, D)."""
        if x.ndim == 4:
            return x + self.peg(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        grid = None if self.grids is None else self.grids.of(self.layout, x.shape[1])
        prefix_BpD, patches_BnD = x[:, : self.layout.num_prefix], x[:, self.layout.num_prefix :]
        map_BDrc = patches_BnD.mT.unflatten(2, grid or self.layout.grid)
        return torch.cat([prefix_BpD, patches_BnD + self.peg(map_BDrc).flatten(2).mT], dim=1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.host_block(*args, **kwargs)
        if isinstance(output, tuple):  # blocks that return their attention, too
            return (self.generate(output[0]), *output[1:])
        return self.generate(output)
