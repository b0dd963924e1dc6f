"""A host's module that takes part in a join stays the same object: it gets a subclass of its own class.

Name, key, parameters, hooks and attributes stay; `isinstance` holds; `forward` calls the host's. As a class made at run
time cannot be found by its name, such a module is copied and unpickled by making its class again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

Role = tuple[type["Joined"], tuple[str, ...]]
"""A mixin, and the names of the host's methods or attributes that it takes over."""

LINK = "_lape"  # attribute of each joined module: what the joined modules of one model share


class Joined:
    """Base of the mixins. Each instance has, in `_lape`, the link to the model that it belongs to."""

    _host: ClassVar[type]
    _roles: ClassVar[tuple[Role, ...]] = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts: Any = object.__reduce_ex__(self, 2)  # (how to make one, what of, state, ...)
        state = parts[2:]
        return (_made_again, (self._host, self._roles), *state)

    @classmethod
    def takes_over(cls, host: type, name: str) -> Any:
        """What stands in the subclass under a name that the role gives: here, a method around the host's."""

        @functools.wraps(getattr(host, name))  # so that its signature can still be read
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            # this role's `_around`, whatever other roles it has, and the host's method as it is now
            return cls._around(self, getattr(host, name), *args, **kwargs)

        return method

    def _around(self, host_method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return host_method(self, *args, **kwargs)


@functools.cache
def subclass(host: type, *roles: Role) -> type:
    """The class of a host's module in these roles; the host's own without any.

    It keeps the host's name, by which libraries look classes up. Not its module where that is torch's: tools that trace
    take torch's modules for leaves and would not see the position.
    """
    cls = host
    for mixin, names in roles:
        home = mixin.__module__ if host.__module__.startswith("torch.") else host.__module__
        members = {name: mixin.takes_over(cls, name) for name in names}
        cls = type(host.__name__, (mixin, cls), {"__module__": home, "__qualname__": host.__qualname__, **members})
    if roles:
        cls._host, cls._roles = host, roles  # type: ignore[attr-defined]
    return cls


def _made_again(host: type, roles: tuple[Role, ...]) -> Any:
    cls: Any = subclass(host, *roles)
    return cls.__new__(cls)


def join_module(module: nn.Module, role: type[Joined], link: Any, *names: str, **state: Any) -> None:
    """Gives a module one more role, or more names in one that it has, and the state that the role needs."""
    cls: Any = type(module)
    host, roles = (cls._host, dict(cls._roles)) if isinstance(module, Joined) else (cls, {})
    module.__dict__.update({LINK: link, **{f"_lape_{name}": value for name, value in state.items()}})
    roles[role] = tuple(dict.fromkeys((*roles.get(role, ()), *names)))
    module.__class__ = subclass(host, *roles.items())


def leave_module(module: nn.Module) -> None:
    """Makes a module the host's again."""
    module.__class__ = type(module)._host  # type: ignore[attr-defined]
    for name in [name for name in module.__dict__ if name == LINK or name.startswith(f"{LINK}_")]:
        del module.__dict__[name]


def host_forward(module: nn.Module, *args: Any) -> Any:
    """What a module returns as the host's own, without the position that joins it."""
    cls: Any = type(module)
    return (cls._host if isinstance(module, Joined) else cls).forward(module, *args)
