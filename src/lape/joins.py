"""The joins as data: where the position enters, and from which source (see the table in the README).

x_l tokens entering block l, P the position table, LN_l the host's norm before attention, LN'_l a norm of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lape.errors import LapeError
from lape.names import JOIN_NAMES, match_name
from lape.position import Kind


@dataclass(frozen=True)
class Join:
    """One way to join position and tokens."""

    name: str
    site: Literal["input", "block", "norm"]  # added to the patch tokens once, to x_l, or beside LN_l(x_l)
    formula: str  # what attention of block l sees
    table_per_block: bool = False
    chained: bool = False  # LN'_l takes its predecessor's output instead of P

    @property
    def normalised(self) -> bool:
        """Whether position has a LayerNorm of its own."""
        return self.site == "norm"


JOINS: dict[str, Join] = {
    join.name: join
    for join in (
        Join("basic", "input", "LN_l(x_l), x_0 = tokens + P"),
        Join("share", "block", "LN_l(x_l + P), the sum stays in the residual stream"),
        Join("unshare", "block", "LN_l(x_l + W_l), the sum stays in the residual stream", table_per_block=True),
        Join("LaPE-sharing", "norm", "LN_l(x_l) + LN'_l(P)"),
        Join("LaPE", "norm", "LN_l(x_l) + P_(l+1), P_(l+1) = LN'_l(P_l)", chained=True),
    )
}
assert tuple(JOINS) == tuple(JOIN_NAMES)


def join_named(name: str) -> Join:
    """The join of this name, in any case. Raises LapeError that lists the known ones."""
    return JOINS[match_name("join", name, JOIN_NAMES)]


def check_combination(join: Join, kind: Kind) -> None:
    """Raises LapeError for a join and a kind that mean nothing together."""
    if kind.is_bias and join.name not in ("basic", "LaPE"):
        raise LapeError(
            f"join={join.name!r} with pe={kind.name!r} means nothing: each block has its own bias on attention logits; "
            "use join='basic' (plain bias) or join='LaPE' (LayerNorm over its rows)"
        )
    if not kind.is_bias and not kind.is_table and join.name != "basic":
        raise LapeError(f"join={join.name!r} with pe={kind.name!r}: there is no position to join; use join='basic'")
    if join.table_per_block and kind.frozen:
        raise LapeError(
            f"join={join.name!r} with pe={kind.name!r} would repeat one frozen table in every block: "
            "use join='share', or pe='learnable'"
        )
