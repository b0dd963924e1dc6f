"""Which grid of patches a forward has: images of several sizes through one converted model.

The position chain depends on parameters and on the grid, never on the image. A host that accepts other sizes tells the
grid where it is certain, at its patch embedding; the wrappers look it up by the number of tokens that they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lape.errors import LapeError
from lape.position import Grid, Layout
from lape.wrap import Wrapper


class Grids:
    """The grids seen so far, by their number of patches. Shared by the wrappers of one model.

    Looked up during a forward, the grid of that count is the one noted last. Looked up again in a backward
    (activation checkpointing), a count that two grids share does not tell which was meant, and that is an error.
    """

    def __init__(self) -> None:
        self._by_count: dict[int, Grid] = {}
        self._ambiguous: set[int] = set()

    def note(self, grid: Grid) -> None:
        """A forward begins with this grid."""
        count = grid[0] * grid[1]
        if self._by_count.get(count, grid) != grid:
            self._ambiguous.add(count)
        self._by_count[count] = grid

    def of(self, layout: Layout, num_tokens: int) -> Grid | None:
        """The grid of `num_tokens` tokens; None for the layout's own. Raises LapeError when it is not known."""
        count = num_tokens - layout.num_prefix
        grid = self._by_count.get(count)
        if grid is None:
            if count == layout.num_patches:
                return None
            raise LapeError(
                f"{num_tokens} tokens arrived, the position table is for {layout.num_tokens} "
                f"({layout.num_prefix} prefix tokens and a grid of {layout.grid[0]} x {layout.grid[1]}): "
                "give images of the model's size"
            )
        if self._ambiguous and count in self._ambiguous and _in_backward():
            raise LapeError(
                f"two grids of {count} patches went through the model, so that recomputing activations cannot tell "
                "which is meant: use one of them a step, or no activation checkpointing"
            )
        return None if grid == layout.grid else grid

    def __deepcopy__(self, memo: dict[int, Any]) -> Grids:
        memo[id(self)] = copied = Grids()
        return copied

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Grids, ()


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def grid_of_map(y_BHWD: Tensor) -> Grid:
    """The grid of a patch embedding that returns a map (B, rows, columns, D)."""
    return y_BHWD.shape[1], y_BHWD.shape[2]


def grid_beside(output: tuple[Any, Grid]) -> Grid:
    """The grid of a patch embedding that returns (tokens, (rows, columns))."""
    return output[1][0], output[1][1]


class GridWatch(Wrapper):
    """The host's patch embedding; notes the grid of the images that it is given, (B, C, height, width).

    The grid is what `grid_from` reads in its output; without, it is reckoned from the size of the image.
    """

    inner = "host_patch_embed"

    def __init__(
        self,
        host_patch_embed: torch.nn.Module,
        grids: Grids,
        patch_size: tuple[int, int],
        pads: bool,
        grid_from: Callable[[Any], Grid] | None = None,
    ):
        super().__init__()
        self.host_patch_embed = host_patch_embed
        self._grids = (grids,)
        self.patch_size = patch_size
        self.pads = pads
        self._grid_from = grid_from

    def forward(self, pixels_BCHW: Tensor, *args: Any, **kwargs: Any) -> Any:
        if pixels_BCHW.ndim != 4:
            raise LapeError(
                f"patches of shape {tuple(pixels_BCHW.shape)} were given, whose place may differ from image to image: "
                "give images (B, C, height, width) of one size"
            )
        if self._grid_from is not None:
            output = self.host_patch_embed(pixels_BCHW, *args, **kwargs)
            self._grids[0].note(self._grid_from(output))
            return output
        extra = (self.patch_size[0] - 1, self.patch_size[1] - 1) if self.pads else (0, 0)
        height, width = pixels_BCHW.shape[-2:]
        self._grids[0].note(((height + extra[0]) // self.patch_size[0], (width + extra[1]) // self.patch_size[1]))
        return self.host_patch_embed(pixels_BCHW, *args, **kwargs)
