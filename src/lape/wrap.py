"""A module that stands in front of another one and otherwise looks like it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """Holds a host module under the name `inner`; attributes that it lacks are the host module's own."""

    inner: str

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inner:  # not there yet: while copying or unpickling
                raise
            return getattr(super().__getattr__(self.inner), name)
