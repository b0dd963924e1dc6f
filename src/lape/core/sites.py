"""The other places where a position joins: the residual stream before a block, and the logits of attention.

Shape legend: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lape.core.forward import check_token_count, position_for, tokens_keyword
from lape.core.joined import Joined


class Unfused(Joined):
    """A block with an attribute that reads as 0, which keeps the host from a path without its modules."""

    @classmethod
    def takes_over(cls, host: type, name: str) -> Any:
        return property(lambda self: 0, lambda self, value: self.__dict__.update({name: value}))


class PositionalBlock(Joined):
    """Block_l(x + P): the position joins the residual stream (joins `share` and `unshare`)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_BND: Tensor = args[0] if args else kwargs.pop(tokens_keyword(kwargs))
        if self._lape.anatomy.channels_first:  # type: ignore[attr-defined]
            p_1DRC = position_for(self, x_BND.movedim(1, -1)).movedim(-1, 1)
            return super().forward(x_BND + p_1DRC, *args[1:], **kwargs)  # type: ignore[misc]
        p_1ND = position_for(self, x_BND)
        check_token_count(self, x_BND, p_1ND)
        return super().forward(x_BND + p_1ND, *args[1:], **kwargs)  # type: ignore[misc]


class PositionalInput(Joined):
    """LN_l(x) + P_(l+1) for attention alone, where its norm feeds the residual stream, too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = "" if args else tokens_keyword(kwargs)
        y: Tensor = args[0] if args else kwargs[name]
        p = position_for(self, y)
        check_token_count(self, y, p)
        if args:
            return super().forward(y + p, *args[1:], **kwargs)  # type: ignore[misc]
        return super().forward(**{**kwargs, name: y + p})  # type: ignore[misc]


class PositionalStem(Joined):
    """What makes the patch tokens of a host that adds no table: the position is added behind it (join `basic`)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        p = position_for(self, x, layer=-1)
        check_token_count(self, x, p)
        return x + p


class PositionalAttention(Joined):
    """The host's attention with a position bias on its logits, handed over in its mask."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_BND: Tensor = args[0] if args else kwargs[tokens_keyword(kwargs)]
        bias_1HNN = position_for(self, x_BND)
        args, kwargs = self._lape.anatomy.add_bias(bias_1HNN, args, kwargs)  # type: ignore[attr-defined]
        return super().forward(*args, **kwargs)  # type: ignore[misc]
