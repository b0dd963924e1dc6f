"""Which grid of patches a forward has, and which of its patches: images of several sizes, and shuffled ones.

The position chain depends on parameters and on the grid, never on the image. A host that accepts other sizes tells the
grid where it is certain, at its patch embedding; the wrappers look it up by the number of tokens that they are given.
A host that shuffles and drops patches (ViT-MAE) tells which it kept; each image's rows are then picked from the chain.

Shape legend: B batch, N tokens, K tokens that are kept, D width, H heads, n patches, k patches that are kept.
"""

from __future__ import annotations

import weakref
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

    def pick(self, p_1ND: Tensor, layout: Layout, num_tokens: int) -> Tensor:
        """The rows of the position that belong to the tokens at hand: all, in order."""
        return p_1ND

    def pick_pairs(self, bias_1HNN: Tensor, layout: Layout, num_tokens: int) -> Tensor:
        """The entries of a bias that belong to the tokens at hand: all, in order."""
        return bias_1HNN

    def __deepcopy__(self, memo: dict[int, Any]) -> Grids:
        memo[id(self)] = copied = type(self)()
        return copied

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _Forward:
    """One forward that told its places; lives as long as its graph does."""


class Places(Grids):
    """Which patches the tokens of each image are: told by a host that shuffles and drops patches, forward by forward.

    Two forwards of one model have different places, so a backward that recomputes activations is served only while
    the last forward is the only one that waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._grid: Grid | None = None
        self._kept: dict[torch.device, tuple[Tensor, _Forward | None]] = {}  # by device: replicas run side by side
        self._waiting: weakref.WeakSet[_Forward] = weakref.WeakSet()

    def note(self, grid: Grid) -> None:
        self._grid = grid

    def of(self, layout: Layout, num_tokens: int) -> Grid | None:
        """The grid of the images that the present tokens come from; None for the layout's own."""
        return None if self._grid == layout.grid else self._grid

    def note_kept(self, kept_Bk: Tensor, tokens_BkD: Tensor) -> None:
        """A forward goes on with these patches, numbered on the grid row by row, as these tokens."""
        forward = None
        if tokens_BkD.requires_grad and not torch.compiler.is_compiling():
            forward = _Forward()
            self._waiting.add(forward)
            tokens_BkD.register_hook(lambda _: self._waiting.discard(forward))  # the last step of its backward
        self._kept[kept_Bk.device] = (kept_Bk, forward)

    def _indices(self, device: torch.device, layout: Layout, num_tokens: int) -> Tensor:
        """(B, K) rows of the tokens: the prefix tokens', then the kept patches'."""
        found = self._kept.get(device)
        if found is None or found[0].shape[1] + layout.num_prefix != num_tokens:
            raise LapeError(
                f"{num_tokens} tokens arrived, whose places on the grid are not known: call the model with images, not "
                "its layers with tokens"
            )
        kept_Bk, forward = found
        if _in_backward() and (forward is None or set(self._waiting) - {forward}):
            raise LapeError(
                "recomputing activations cannot tell of which forward the shuffled patches are: one forward a "
                "backward, through embeddings that get a gradient, or no activation checkpointing"
            )
        prefix_Bp = torch.arange(layout.num_prefix, device=device).expand(len(kept_Bk), -1)
        return torch.cat([prefix_Bp, kept_Bk + layout.num_prefix], dim=1)

    def pick(self, p_1ND: Tensor, layout: Layout, num_tokens: int) -> Tensor:
        """(1, N, D) -> (B, K, D)."""
        return p_1ND[0][self._indices(p_1ND.device, layout, num_tokens)]

    def pick_pairs(self, bias_1HNN: Tensor, layout: Layout, num_tokens: int) -> Tensor:
        """(1, H, N, N) -> (B, H, K, K)."""
        rows_BK = self._indices(bias_1HNN.device, layout, num_tokens)
        return bias_1HNN[0][:, rows_BK[:, :, None], rows_BK[:, None, :]].transpose(0, 1)


class ShuffleWatch:
    """Stands in for a host's method that shuffles and drops patches, on its instance: notes which are kept.

    The method takes (B, n, D) tokens and returns (the kept ones in their new order, ..., ids_restore): the place of
    each patch in the shuffled order, (B, n).
    """

    def __init__(self, owner: torch.nn.Module, method: str, places: Places):
        self.owner, self.method, self.places = owner, method, places

    def __call__(self, tokens_BnD: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = getattr(type(self.owner), self.method)(self.owner, tokens_BnD, *args, **kwargs)
        tokens_BkD, ids_restore_Bn = output[0], output[-1]
        self.places.note_kept(ids_restore_Bn.argsort(dim=1)[:, : tokens_BkD.shape[1]], tokens_BkD)
        return output


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

    @property
    def grids(self) -> Grids:
        """Where the grid is noted."""
        return self._grids[0]

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
