"""What joins have in common: a host module with a position put beside its output or before its input.

Shape legend: B batch, N tokens, R rows of the position table, D width.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from lape.errors import LapeError
from lape.grids import Grids, Places
from lape.position import Grid, Layout
from lape.wrap import Wrapper


class PositionSource(Protocol):
    """Anything that holds a position: a table, or a norm of the chain."""

    def position(self, grid: Grid | None = None) -> Tensor: ...


def laid_out(p_1ND: Tensor, x: Tensor) -> Tensor:
    """The position in the dtype and the layout of x: tokens (B, N, D), or a map (B, rows, columns, D)."""
    return (p_1ND if x.ndim == 3 else p_1ND.unflatten(1, x.shape[1:3])).to(x.dtype)


class Joined(Wrapper):
    """A host module with a position put before or behind it."""

    def __init__(self, source: PositionSource, layout: Layout, grids: Grids | None):
        super().__init__()
        # In a tuple, so that the source, which is registered elsewhere, does not become a child of this module too.
        self._source = (source,)
        self.layout = layout
        self.grids = grids  # None: one size only

    def position(self, grid: Grid | None = None) -> Tensor:
        """The position that this layer hands on, (1, R, D)."""
        return self._source[0].position(grid)

    def received(self, grid: Grid | None = None) -> Tensor:
        """The position that this layer's tokens receive, (1, R, D)."""
        return self.position(grid)

    def token_position(self, x_BND: Tensor) -> Tensor:
        """(1, N, D) in the dtype of x, zero for the tokens that own no row; for a map (B, rows, columns, D), a map.

        (B, N, D) where the host shuffles the patches of each image.
        """
        if x_BND.ndim == 4:  # a map tells its own grid
            own = tuple(x_BND.shape[1:3]) == self.layout.grid
            return laid_out(self.received(None if own else (x_BND.shape[1], x_BND.shape[2])), x_BND)
        if self.grids is None:
            if x_BND.shape[1] != self.layout.num_tokens:
                raise LapeError(
                    f"{x_BND.shape[1]} tokens arrived, the position is for {self.layout.num_tokens} (a grid of "
                    f"{self.layout.grid[0]} x {self.layout.grid[1]}): give images of the model's size"
                )
            return laid_out(self.layout.spread(self.received()), x_BND)
        num_tokens = x_BND.shape[1]
        p_1ND = self.layout.spread(self.received(self.grids.of(self.layout, num_tokens)))
        return laid_out(self.grids.pick(p_1ND, self.layout, num_tokens), x_BND)


class PositionalBlock(Joined):
    """Block_l(x + P): the position joins the residual stream (joins `share` and `unshare`)."""

    inner = "host_block"

    def __init__(self, host_block: nn.Module, source: PositionSource, layout: Layout, grids: Grids | None = None):
        super().__init__(source, layout, grids)
        self.host_block = host_block

    def forward(self, x_BND: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.host_block(x_BND + self.token_position(x_BND), *args, **kwargs)


class FoldedNorm(Wrapper):
    """LN_l(x) + c_l: `PositionalNorm` after folding, P_(l+1) being a constant for one grid."""

    inner = "token_norm"

    def __init__(self, token_norm: nn.Module, position_1ND: Tensor):
        super().__init__()
        self.token_norm = token_norm
        self.register_buffer("folded_position", position_1ND)

    def forward(self, x_BND: Tensor) -> Tensor:
        # Straight from the registries: at batch 1 attribute look-ups of a module are most of what folding costs.
        token_norm, p_1ND = self._modules["token_norm"], self._buffers["folded_position"]
        assert token_norm is not None
        assert p_1ND is not None
        y_BND: Tensor = token_norm(x_BND)
        if p_1ND.dtype != y_BND.dtype or y_BND.ndim != p_1ND.ndim:
            p_1ND = laid_out(p_1ND, y_BND)
        return add_position(token_norm, y_BND, p_1ND)


class FoldedPicked(FoldedNorm):
    """`FoldedNorm` of a host that shuffles patches: each image picks its rows of the constant."""

    def __init__(self, token_norm: nn.Module, position_1ND: Tensor, layout: Layout, places: Places):
        super().__init__(token_norm, position_1ND)
        self.layout = layout
        self.places = places

    def forward(self, x_BND: Tensor) -> Tensor:
        p_BND = self.places.pick(self.get_buffer("folded_position"), self.layout, x_BND.shape[1])
        return add_position(self.token_norm, self.token_norm(x_BND), laid_out(p_BND, x_BND))


def add_position(norm: nn.Module, y_BND: Tensor, p_1ND: Tensor) -> Tensor:
    """y + p; in place, at half the cost, where y is a LayerNorm's new output, which its backward does not need.

    Not where somebody's hook on that norm has seen y and may keep it.
    """
    fresh = isinstance(norm, nn.LayerNorm) and not norm._forward_hooks
    return y_BND.add_(p_1ND) if fresh else y_BND + p_1ND
