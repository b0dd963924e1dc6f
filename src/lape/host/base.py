"""The table of hosts: which Vision Transformers can be converted, recognised by the class of their blocks.

A host says where things are in a model of its library; it never runs or changes the model. Classes are named by
strings, so that no library is imported before a model of it is at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lape.core.anatomy import Anatomy
from lape.core.position import Grid
from lape.errors import LapeError, UnsupportedModelError

ANOTHER = "another one is added by lape.register_host, lape.suggest_host(model) says how"

Blueprint = tuple[str, dict[str, Any]]
"""A name of the library and plain (JSON) arguments."""


@dataclass(frozen=True)
class Host:
    """One family of models: how it is recognised and how its parts are found.

    Fields:
        name: in messages and lists
        root_classes: "module.Class" of the module that owns table and blocks, subclasses included
        block_classes: "module.Class" of blocks whose norm stands before attention, exact
        examine: examine(root, **user_arguments) returns the anatomy or raises UnsupportedModelError with the true
            reason
        measure: grid and patch size after a resize
        note: one line for `lape hosts`
        package: the name under which saved models say who can build them again
        blueprint: how to build a whole model again, if it tells
        build: builds it, unconverted, with random weights
        current: arguments of `build` that the root is made with now
        check_arguments: raises for what no file may ask `build`
        root_child: when given, `root_classes` name the class of this child instead of the root's
        tested: versions that the tests ran with
        user_arguments: what only a user knows, such as the grid: handed over by keyword
        last: whether it counts only in a model in which no other host is found
        refused: "module.Class" of blocks -> the reason
    """

    name: str
    root_classes: tuple[str, ...]
    block_classes: tuple[str, ...]
    examine: Callable[..., Anatomy]
    measure: Callable[[nn.Module], tuple[Grid, tuple[int, ...]]] | None = None
    note: str = ""
    package: str = ""
    blueprint: Callable[[nn.Module], Blueprint | None] | None = None
    build: Callable[[str, dict[str, Any]], nn.Module] | None = None
    current: Callable[[nn.Module], dict[str, Any]] | None = None
    check_arguments: Callable[[str, Mapping[str, Any]], None] | None = None
    root_child: str | None = None
    tested: tuple[str, ...] = ()
    user_arguments: tuple[str, ...] = ()
    last: bool = False
    refused: dict[str, str] = field(default_factory=dict)


def class_name(cls: type) -> str:
    """The name under which a class stands in the table: "module.Class"."""
    return f"{cls.__module__}.{cls.__qualname__}"


def of_constructors(classes: Iterable[type]) -> list[inspect.Parameter]:
    """The parameters of the constructors that these classes define themselves, without `self`."""
    constructors = [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)]
    return [p for init in constructors for p in inspect.signature(init).parameters.values() if p.name != "self"]


_HOSTS: dict[str, Host] = {}


def add_host(host: Host) -> Host:
    """Adds a host to the table. Raises LapeError when the name or a root class is taken."""
    for other in _HOSTS.values():
        if other.name == host.name or set(other.root_classes) & set(host.root_classes):
            problem = f"host {host.name!r} is registered already, as {other.name!r}"
            raise LapeError(f"{problem}: choose another name and classes")
    _HOSTS[host.name] = host
    return host


def host_named(name: str) -> Host:
    """The registered host of this name."""
    return _HOSTS[name]


def host_of_library(library: str) -> Host:
    """The host that builds models of this library. Raises LapeError when there is none."""
    builders = {host.package: host for host in reversed(_HOSTS.values()) if host.build is not None}
    if library not in builders:
        names = ", ".join(sorted(builders))
        raise LapeError(f"no host builds models of the library {library!r}: known are {names}; see lape.register_host")
    return builders[library]


def hosts() -> tuple[Host, ...]:
    """All registered hosts."""
    return tuple(_HOSTS.values())


def find_host(model: nn.Module) -> tuple[Host, nn.Module]:
    """The host of the one convertible model inside `model` (often `model` itself), and that model.

    Raises UnsupportedModelError when there is none or more than one. Of one inside another, the outer one counts.
    """
    check_module(model)
    name = class_name(type(model))
    roots = list(_roots(model))
    roots = [root for root in roots if not root[2].last] or roots
    paths = [path for path, *_ in roots]
    roots = [root for root in roots if not any(p != root[0] and (not p or root[0].startswith(f"{p}.")) for p in paths)]
    if len(roots) == 1:
        return roots[0][2], roots[0][1]
    if roots:
        advice = f"name one, lape.apply_(model, at={roots[0][0]!r})"
        inside = ", ".join(path for path, *_ in roots)
        raise UnsupportedModelError(f"{name} holds {len(roots)} convertible models ({inside}): {advice}")
    reasons = {block: reason for host in _HOSTS.values() for block, reason in host.refused.items()}
    for path, module in model.named_modules():
        if (block := class_name(type(module))) in reasons:
            where = f"{path} is a {block}: " if path else ""
            raise UnsupportedModelError(f"{name} is not a supported model: {where}{reasons[block]}")
    raise UnsupportedModelError(
        f"{name} is not a supported model; supported are {', '.join(_HOSTS)} (`lape hosts` lists their classes); "
        f"{ANOTHER}"
    )


class _Unfilled(TorchFunctionMode):
    """What fills a tensor with values does nothing where there are none: torch works out its shape in Python."""

    fills = frozenset(getattr(Tensor, name) for name in "uniform_ normal_ erfinv_ clamp_ mul_ add_ fill_ zero_".split())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.fills and args[0].is_meta and not any(isinstance(value, Tensor) for value in args[1:]):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Models that are built in it have shapes only: they lie on the meta device."""
    with torch.device("meta"), _Unfilled():
        yield


@contextmanager
def watching(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks in the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode, and each of its modules in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_module(model: object) -> None:
    """Raises LapeError unless this is a model at all."""
    if not isinstance(model, nn.Module):
        name = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise LapeError(f"{name:.80} is not a model: give a torch.nn.Module, for instance timm.create_model(...)")


def _roots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Host]]:
    """(path, module, host) of all that a host knows by its class, or by that of a child."""
    is_root: dict[tuple[type, str], bool] = {}  # hundreds of modules have a dozen classes
    for path, module in model.named_modules():
        for host in _HOSTS.values():
            cls = type(module if host.root_child is None else module._modules.get(host.root_child))
            if (cls, host.name) not in is_root:
                is_root[cls, host.name] = any(class_name(base) in host.root_classes for base in cls.__mro__)
            if is_root[cls, host.name]:
                yield path, module, host
