"""Which grid of patches a forward has, and which of its patches: images of several sizes, and shuffled ones.

Positions depend on parameters and on the grid, never on the image. A host that accepts other sizes tells the grid where
it is certain, behind its patch embedding. A host that shuffles and drops patches (ViT-MAE) tells which it kept; each
image's rows are then picked from the positions.

Shape legend: B batch, N tokens, K tokens that are kept, D width, H heads, n patches, k patches that are kept.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from lape.core.joined import Joined
from lape.core.position import Grid, Layout
from lape.errors import LapeError


def grid_of_map(y_BHWD: Tensor) -> Grid:
    """The grid of a patch embedding that returns a map (B, rows, columns, D)."""
    return y_BHWD.shape[1], y_BHWD.shape[2]


def grid_beside(output: tuple[Any, Grid]) -> Grid:
    """The grid of a patch embedding that returns (tokens, (rows, columns))."""
    return output[1][0], output[1][1]


class GridWatch(Joined):
    """The host's patch embedding; tells the grid of the images that it is given, (B, C, height, width)."""

    def forward(self, pixels_BCHW: Tensor, *args: Any, **kwargs: Any) -> Any:
        link: Any = self._lape  # type: ignore[attr-defined]
        anatomy = link.anatomy
        grids = anatomy.packed_grids(pixels_BCHW, *args, **kwargs) if anatomy.packed_grids else None
        if grids is None and pixels_BCHW.ndim != 4:
            raise LapeError(
                f"patches of shape {tuple(pixels_BCHW.shape)} were given, whose place may differ from image to image: "
                "give images (B, C, height, width) of one size"
            )
        output = super().forward(pixels_BCHW, *args, **kwargs)  # type: ignore[misc]
        if grids is not None and set(grids) == {grids[0]} and math.prod(grids[0]) == pixels_BCHW.shape[1]:
            (grid, *_), grids = grids, None  # packed, and yet of one grid
            link.tell(grid)
        elif grids is None:
            link.tell(_grid_of_images(anatomy, pixels_BCHW, output))
        if anatomy.packed_grids is not None:
            link.recall.note_forward(grids, output[0] if isinstance(output, tuple) else output)
        if grids is not None:
            link.tell_each(grids, anatomy.layout.num_prefix + pixels_BCHW.shape[1])
        return output


def _grid_of_images(anatomy: Any, pixels_BCHW: Tensor, output: Any) -> Grid:
    if anatomy.grid_from is not None:
        grid: Grid = anatomy.grid_from(output)
        return grid
    sides = zip(pixels_BCHW.shape[-2:], anatomy.patch_size, strict=True)
    return tuple((side + (patch - 1) * anatomy.pads) // patch for side, patch in sides)


class Shuffled(Joined):
    """The owner of a host's method that shuffles and drops patches; tells which are kept.

    Or that picks rows of its table for each image. What is kept is read in its call, see `Anatomy.kept_patches`.
    """

    def _around(self, host_method: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        link: Any = self._lape  # type: ignore[attr-defined]
        output = host_method(self, x, *args, **kwargs)
        tokens_BkD = output[0] if isinstance(output, tuple) else output
        link.tell_patches(link.anatomy.kept_patches(x, output), tokens_BkD)
        return output


def rows_of_patches(layout: Layout, patches_Bk: Tensor) -> Tensor:
    """(B, K) rows of the tokens: the prefix tokens', then the kept patches'."""
    prefix_Bp = torch.arange(layout.num_prefix, device=patches_Bk.device).expand(len(patches_Bk), -1)
    return torch.cat([prefix_Bp, patches_Bk + layout.num_prefix], dim=1)


def pick(p: Tensor, rows_BK: Tensor) -> Tensor:
    """The entries of the kept tokens: (1, N, D) -> (B, K, D), or of a bias (1, H, N, N) -> (B, H, K, K)."""
    if p.ndim == 3:
        return p[0][rows_BK]
    return p[0][:, rows_BK[:, :, None], rows_BK[:, None, :]].transpose(0, 1)


def in_backward() -> bool:
    """Whether this runs in a backward, where activations are computed again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _PendingForward:
    """A forward whose backward may still come: it lives as long as its graph does. `plain`: all patches of one grid."""

    def __init__(self, plain: bool):
        self.plain = plain


class Recall:
    """What past forwards noted of their grids and kept patches, for a module that is called outside of a forward.

    Above all in a backward that recomputes activations. It cannot tell of which forward: a count of patches that two
    grids share is an error there, and so are kept patches, and packed images, while another forward waits for its
    backward too.
    """

    def __init__(self) -> None:
        self._grids: dict[int, Grid] = {}  # by their number of patches
        self._ambiguous: set[int] = set()
        self._notes: dict[torch.device, tuple[Any, _PendingForward | None]] = {}  # replicas run side by side
        self._pending: weakref.WeakSet[_PendingForward] = weakref.WeakSet()

    def note(self, grid: Grid) -> None:
        count = grid[0] * grid[1]
        if self._grids.get(count, grid) != grid:
            self._ambiguous.add(count)
        self._grids[count] = grid

    def note_forward(self, patches: Any, tokens: Tensor) -> None:
        """What a forward tells of its images: the patches kept (B, k), a list of grids, or None, one grid."""
        forward = None
        node = tokens.grad_fn  # of a view of what was written to in place, Tensor.register_hook crashes (torch 2.14)
        if node is not None and not torch.compiler.is_compiling():
            forward = _PendingForward(plain=patches is None)
            self._pending.add(forward)
            node.register_prehook(lambda _: self._pending.discard(forward))  # the last step of its backward
        self._notes[tokens.device] = (patches, forward)

    def last_note(self, device: torch.device) -> Any:
        """What the last forward there noted. Raises LapeError in a backward that may be another one's."""
        patches, forward = self._notes.get(device, (None, None))
        others = [other for other in self._pending if other is not forward]
        differ = patches is not None or not all(other.plain for other in others)
        if in_backward() and differ and (forward is None or others):
            raise LapeError(
                "recomputing activations cannot tell of which forward the shuffled or packed patches are: one forward "
                "a backward, through embeddings that get a gradient, or no activation checkpointing"
            )
        return patches

    def grid(self, layout: Layout, num_tokens: int) -> Grid | None:
        """The grid of so many tokens; None for the layout's own. Raises LapeError when it is not known."""
        count = num_tokens - layout.num_tokens + layout.num_patches
        grid = self._grids.get(count)
        if grid is None:
            if count == layout.num_patches:
                return None
            raise wrong_number_error(layout, num_tokens)
        if count in self._ambiguous and in_backward():
            raise LapeError(
                f"two grids of {count} patches went through the model, so that recomputing activations cannot tell "
                "which is meant: use one of them a step, or no activation checkpointing"
            )
        return None if grid == layout.grid else grid

    def only(self, layout: Layout) -> Grid | None:
        """The one grid that went through the model. Raises LapeError when there were several."""
        if len(set(self._grids.values())) > 1 or self._ambiguous:
            raise LapeError("windows of two grids went through the model: use one image size, or call the whole model")
        return next(iter(self._grids.values()), None)

    def patches(self, layout: Layout, device: torch.device, num_tokens: int) -> Tensor:
        """(B, k) patches that so many tokens are. Raises LapeError when they are not known."""
        patches_Bk: Tensor | None = self.last_note(device)
        if patches_Bk is None or patches_Bk.shape[1] + layout.num_prefix != num_tokens:
            raise LapeError(
                f"{num_tokens} tokens arrived, whose places on the grid are not known: call the model with images, not "
                "its layers with tokens"
            )
        return patches_Bk


def wrong_number_error(layout: Layout, num_tokens: int) -> LapeError:
    return LapeError(
        f"{num_tokens} tokens arrived, the position is for {layout.num_tokens} ({layout.num_prefix} prefix tokens and "
        f"a grid of {' x '.join(map(str, layout.grid))}): give images of the model's size, whole"
    )
