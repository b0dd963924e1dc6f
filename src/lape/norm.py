"""The idea of LaPE: position gets a LayerNorm of its own in each layer, and is handed on from layer to layer.

    x'_l     = MSA_l( LN_l(x_l) + P_(l+1) )        what attention sees                        (Eq. 9)
    P_(l+1)  = LN'_l(P_l),   P_0 = P               the chain; nothing else changes            (Eq. 11)

Token and position usually share one LayerNorm, LN_l(x_l + P): its statistics then scale the position by
sigma_P / sigma_(x+P), whatever the layer would need (Eq. 7). LN'_l has an affine of its own: 2 D parameters a block.
The residual stream and the MLP branch get no position. Equations: Yu et al., ICCV 2023.

No block of the host is rewritten: its own `norm1(x)` simply returns LN_l(x) + P_(l+1). A norm *asks* its predecessor
for P_l: it needs no state of a forward, and copies, checkpointing and compilation see ordinary arithmetic. So that the
predecessor need not compute it twice, it is handed over where that is safe (`lape.handover`, a pure cache).

Shape legend: B batch, N tokens, R rows of the position table, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from lape.grids import Grids
from lape.handover import HandOver
from lape.joined import Joined, PositionSource, add_position
from lape.position import Grid, Layout


class PositionalNorm(Joined):
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
        self._pe_norm = (pe_norm,)  # registered with the whole model: a sharded block could not lend it to the next one
        like = next(pe_norm.parameters())
        self.pe_gate = nn.Parameter(like.new_zeros(1)) if gated else None
        self.successor: HandOver | None = None  # where a later norm asks for P_(l+1)

    @property
    def pe_norm(self) -> nn.Module:
        """LN'_l."""
        return self._pe_norm[0]

    def position(self, grid: Grid | None = None) -> Tensor:
        """P_(l+1) = LN'_l(P_l), (1, R, D). The only place where a LayerNorm meets a position."""
        return self.pe_norm(super().position(grid))

    def received(self, grid: Grid | None = None) -> Tensor:
        """P_(l+1), times the gate where there is one, (1, R, D)."""
        p_1RD = self.position(grid)
        if self.successor is not None:
            self.successor.leave(p_1RD, grid)
        return p_1RD if self.pe_gate is None else self.pe_gate * p_1RD

    def forward(self, x_BND: Tensor) -> Tensor:
        y_BND = self.token_norm(x_BND)
        return add_position(self.token_norm, y_BND, self.token_position(y_BND))
