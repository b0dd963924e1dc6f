"""The idea of LaPE: position gets a LayerNorm of its own in each layer, and is handed on from layer to layer.

    x'_l     = MSA_l( LN_l(x_l) + P_(l+1) )        what attention sees                        (Eq. 9)
    P_(l+1)  = LN'_l(P_l),   P_0 = P               the chain; nothing else changes            (Eq. 11)

Token and position usually share one LayerNorm, LN_l(x_l + P): its statistics then scale the position by
sigma_P / sigma_(x+P), whatever the layer would need (Eq. 7). LN'_l has an affine of its own: 2 D parameters a block.
The residual stream and the MLP branch get no position. Equations: Yu et al., ICCV 2023.

No block of the host is rewritten: its own `norm1(x)` simply returns LN_l(x) + P_(l+1). A norm *asks* its predecessor
for P_l, so no state is written during a forward, and copies, checkpointing and compilation see ordinary arithmetic.

Shape legend: B batch, N tokens, R rows of the position table, D width.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from lape.grids import Grids
from lape.position import Grid, Layout
from lape.wrap import Wrapper


class PositionSource(Protocol):
    """Anything that holds a position: a table, or a norm of the chain."""

    def position(self, grid: Grid | None = None) -> Tensor: ...


class _Joined(Wrapper):
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
        """(1, N, D) in the dtype of x: zero for the tokens that own no row."""
        grid = None if self.grids is None else self.grids.of(self.layout, x_BND.shape[1])
        return self.layout.spread(self.received(grid)).to(x_BND.dtype)


class PositionalNorm(_Joined):
    """LN_l(x) + LN'_l(P_l): the norm before attention, with the position beside it.

    With `gated`, LN_l(x) + g_l LN'_l(P_l) with a learned scalar g_l that starts at zero: the host's function at first.
    """

    inner = "token_norm"

    def __init__(
        self,
        token_norm: nn.Module,
        pe_norm: nn.Module,
        source: PositionSource,
        layout: Layout,
        grids: Grids | None = None,
        *,
        gated: bool = False,
    ):
        super().__init__(source, layout, grids)
        self.token_norm = token_norm
        self.pe_norm = pe_norm
        like = next(pe_norm.parameters())
        self.pe_gate = nn.Parameter(like.new_zeros(1)) if gated else None

    def position(self, grid: Grid | None = None) -> Tensor:
        """P_(l+1) = LN'_l(P_l), (1, R, D). The only place where a LayerNorm meets a position."""
        return self.pe_norm(super().position(grid))

    def received(self, grid: Grid | None = None) -> Tensor:
        """P_(l+1), times the gate where there is one, (1, R, D)."""
        p_1RD = self.position(grid)
        return p_1RD if self.pe_gate is None else self.pe_gate * p_1RD

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND = self.token_norm(x_BND)
        return _add(self.token_norm, y_BND, self.token_position(y_BND))


class PositionalBlock(_Joined):
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
        y_BND = self.token_norm(x_BND)
        return _add(self.token_norm, y_BND, self.get_buffer("folded_position").to(y_BND.dtype))


def _add(norm: nn.Module, y_BND: Tensor, p_1ND: Tensor) -> Tensor:
    """y + p; in place, at half the cost, where y is a LayerNorm's new output, which its backward does not need.

    Not where somebody's hook on that norm has seen y and may keep it.
    """
    fresh = isinstance(norm, nn.LayerNorm) and not norm._forward_hooks
    return y_BND.add_(p_1ND) if fresh else y_BND + p_1ND
