"""The table of hosts: which Vision Transformers can be converted, told by the class of their blocks.

A host says where things are in a model of its library; it never runs or changes the model. Classes are named by
strings, so that no library is imported before a model of it is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lape.core.anatomy import Anatomy
from lape.core.position import Grid
from lape.errors import LapeError, UnsupportedModelError

RELATIVE = "relative position bias in attention"
SHARED = "relative position bias in attention (one for all blocks)"


Blueprint = tuple[str, dict[str, Any]]
"""A name of the library and plain (JSON) arguments."""


@dataclass(frozen=True)
class Host:
    """One family of models: how it is recognised and how its parts are found.

    `examine(root)` returns the anatomy or raises UnsupportedModelError with the true reason.
    """

    name: str
    root_classes: tuple[str, ...]  # "module.Class" of the module that owns table and blocks, subclasses included
    block_classes: tuple[str, ...]  # "module.Class" of blocks whose norm stands before attention, exact
    examine: Callable[[nn.Module], Anatomy]
    measure: Callable[[nn.Module], tuple[Grid, tuple[int, int]]] | None = None  # grid and patch size after a resize
    note: str = ""
    package: str = ""  # the name under which saved models say who can build them again
    blueprint: Callable[[nn.Module], Blueprint | None] | None = None  # how to build a whole model again, if it tells
    build: Callable[[str, dict[str, Any]], nn.Module] | None = None  # builds it, unconverted, with random weights
    current: Callable[[nn.Module], dict[str, Any]] | None = None  # arguments of `build` that the root is made with now
    root_child: str | None = None  # when given, `root_classes` name the class of this child instead of the root's
    tested: tuple[str, ...] = ()  # versions that the tests ran with
    refused: dict[str, str] = field(default_factory=dict)  # "module.Class" of blocks -> the reason


def class_name(cls: type) -> str:
    """The name under which a class stands in the table: "module.Class"."""
    return f"{cls.__module__}.{cls.__qualname__}"


_HOSTS: dict[str, Host] = {}


def register_host(host: Host) -> Host:
    """Adds a host to the table, for models of your own. Raises LapeError when the name or a root class is taken."""
    for other in _HOSTS.values():
        if other.name == host.name or set(other.root_classes) & set(host.root_classes):
            raise LapeError(
                f"host {host.name!r} is registered already, as {other.name!r}: choose another name and classes"
            )
    _HOSTS[host.name] = host
    return host


def host_named(name: str) -> Host:
    """The registered host of this name."""
    return _HOSTS[name]


def host_of_library(library: str) -> Host:
    """The host that builds models of this library. Raises LapeError when there is none."""
    for host in _HOSTS.values():
        if host.package == library and host.build is not None:
            return host
    known = ", ".join(sorted({host.package for host in _HOSTS.values() if host.build is not None}))
    raise LapeError(f"no host builds models of the library {library!r}: known are {known}; see lape.register_host")


def hosts() -> tuple[Host, ...]:
    """All registered hosts."""
    return tuple(_HOSTS.values())


def find_host(model: nn.Module) -> tuple[Host, nn.Module]:
    """The host of the one convertible model inside `model` (often `model` itself), and that model.

    Raises UnsupportedModelError when there is none or more than one.
    """
    check_module(model)
    found = [(host, module) for module in model.modules() for host in _HOSTS.values() if _is_root(module, host)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnsupportedModelError(
            f"{class_name(type(model))} holds {len(found)} convertible models: pass the one you mean, not the whole"
        )
    refused = {name: reason for host in _HOSTS.values() for name, reason in host.refused.items()}
    for path, module in model.named_modules():
        if (name := class_name(type(module))) in refused:
            where = f"{path} is a {name}: " if path else ""
            raise UnsupportedModelError(f"{class_name(type(model))} is not a supported model: {where}{refused[name]}")
    raise UnsupportedModelError(
        f"{class_name(type(model))} is not a supported model; supported are {', '.join(_HOSTS)} (`lape hosts` lists "
        "their classes); another one is added by lape.register_host(lape.Host(...))"
    )


def check_module(model: object) -> None:
    """Raises LapeError unless this is a model at all."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise LapeError(f"{what:.80} is not a model: give a torch.nn.Module, for instance timm.create_model(...)")


def _is_root(module: nn.Module, host: Host) -> bool:
    told_by = module if host.root_child is None else module._modules.get(host.root_child)
    return told_by is not None and not {class_name(cls) for cls in type(told_by).__mro__}.isdisjoint(host.root_classes)


_TOKEN_NORMS = ("RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32", "RMSNorm")


def check_norm(path: str, norm: nn.Module) -> None:
    """Raises UnsupportedModelError unless a norm normalises each token over its width: LayerNorm, RMSNorm and alike.

    The token norm stays the host's own. LN' is a LayerNorm beside any of them, as in Eq. 11, with the host's eps.
    """
    if not isinstance(norm, nn.LayerNorm) and type(norm).__name__ not in _TOKEN_NORMS:
        raise UnsupportedModelError(
            f"{path} is a {class_name(type(norm))}: the norm before attention must be a LayerNorm or an RMSNorm"
        )


def check_blocks(
    host_name: str, root: nn.Module, paths: list[str], allowed: tuple[str, ...], why: dict[str, str]
) -> None:
    """Raises UnsupportedModelError, naming class and reason, unless every block is of an allowed class."""
    if not paths:
        raise UnsupportedModelError(f"{class_name(type(root))} has no blocks: nothing to convert")
    for path in paths:
        name = class_name(type(root.get_submodule(path)))
        if name not in allowed:
            reason = why.get(name, "the place of its attention norm is not known")
            raise UnsupportedModelError(
                f"{path} is a {name}: {reason}; {host_name} blocks that can be converted: {', '.join(allowed)}; "
                "another one is added by lape.register_host(lape.Host(...))"
            )
