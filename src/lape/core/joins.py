"""The joins as data: where the position enters, and from which source (docs/joins.md has them as a table).

x_l tokens entering block l, P the position table, LN_l the host's norm before attention, LN'_l a norm of its own
(or another one of `lape.core.pe_norms`).

PVG and MPVG are for models that pool their patches and read no class token (Maximizing the Position Embedding for
Vision Transformers with Global Average Pooling, AAAI 2025): the input addition stays, block 0 gets nothing more, and
MPVG puts position beside the last norm too. Their equations are rebuilt from the text and the counts of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lape.core.pe_norms import pe_norm_for
from lape.core.position import Kind
from lape.errors import LapeError
from lape.names import JOIN_NAMES, match_name


@dataclass(frozen=True)
class Join:
    """One way to join position and tokens."""

    name: str
    site: Literal["input", "block", "norm"]  # added to the patch tokens once, to x_l, or beside LN_l(x_l)
    formula: str  # what attention of block l sees
    table_per_block: bool = False
    chained: bool = False  # LN'_l takes its predecessor's output instead of P
    at_input: bool = False  # P is added to the tokens once; where there are norms too, block 0 gets nothing more
    at_last: bool = False  # LN'(P) beside the last norm, the one before pooling
    normless: bool = False  # P itself in the place of LN'_l(P)

    @property
    def normalised(self) -> bool:
        """Whether position stays out of the token norm, and has, as a rule, a LayerNorm of its own."""
        return self.site == "norm"

    @property
    def pe_norm(self) -> str | None:
        """What stands in the place of LN'_l when nothing else is asked for; None where there is no such place."""
        return None if not self.normalised else "none" if self.normless else "layernorm"

    @property
    def needs_pooling(self) -> bool:
        """Whether it is for models that read no class token."""
        return self.normalised and self.at_input

    @property
    def first(self) -> int:
        """The first block that receives a position of its own."""
        return int(self.needs_pooling)


JOINS: dict[str, Join] = {
    join.name: join
    for join in (
        Join("basic", "input", "LN_l(x_l), x_0 = tokens + P", at_input=True),
        Join("share", "block", "LN_l(x_l + P), the sum stays in the residual stream"),
        Join("unshare", "block", "LN_l(x_l + W_l), the sum stays in the residual stream", table_per_block=True),
        Join("beside", "norm", "LN_l(x_l) + P", normless=True),
        Join("LaPE-sharing", "norm", "LN_l(x_l) + LN'_l(P)"),
        Join("LaPE", "norm", "LN_l(x_l) + P_(l+1), P_(l+1) = LN'_l(P_l)", chained=True),
        Join(
            "PVG",
            "norm",
            "LN_l(x_l) + P_l, P_l = LN'_l(P_(l-1)) for l > 0; x_0 = tokens + P_0",
            chained=True,
            at_input=True,
        ),
        Join(
            "MPVG", "norm", "as PVG, and LN(x_L) + LN'(P_0) before pooling", chained=True, at_input=True, at_last=True
        ),
    )
}
assert tuple(JOINS) == tuple(JOIN_NAMES)


def join_named(name: str) -> Join:
    """The join of this name, in any case. Raises LapeError that lists the known ones."""
    return JOINS[match_name("join", name, JOIN_NAMES)]


def check_combination(join: Join, kind: Kind, pe_norm: str | None = None) -> None:
    """Raises LapeError for a join, a kind and a norm of position that mean nothing together."""
    norm = pe_norm_for(pe_norm, join.name, join.pe_norm)
    if not kind.is_table and norm != join.pe_norm:
        raise LapeError(f"pe_norm={pe_norm!r} with pe={kind.name!r}, which has no table: leave it out")
    if kind.is_bias and join.name not in ("basic", "LaPE"):
        raise LapeError(
            f"join={join.name!r} with pe={kind.name!r} means nothing: each block has its own bias on attention logits; "
            "use join='basic' (plain bias) or join='LaPE' (LayerNorm over its rows)"
        )
    if kind.fixed_bias is not None and join.name != "basic":
        raise LapeError(
            f"join={join.name!r} with pe={kind.name!r}: its bias is given and its rows are not to be normalised; "
            "use join='basic'"
        )
    if not kind.is_bias and not kind.is_table and join.name != "basic":
        raise LapeError(
            f"join={join.name!r} with pe={kind.name!r}: there is no position to join, {kind.missing}; use join='basic'"
        )
    if join.table_per_block and kind.frozen:
        raise LapeError(
            f"join={join.name!r} with pe={kind.name!r} would repeat one frozen table in every block: "
            "use join='share', or pe='learnable'"
        )
