"""The conversion of a model, read off its modules: nothing is noted down that pruning or slicing could make untrue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lape.convert.ways import Way, way_of
from lape.core.anatomy import Anatomy, Form
from lape.core.forward import Link
from lape.core.joined import LINK, Joined
from lape.core.position import Layout
from lape.errors import LapeError
from lape.host import check_module

CHOICES = {"warm_start": "warm_start", "std": "pe_std", "pe_norm": "pe_norm"}
"""What a user chooses beside join and kind: arguments of `lape.apply_`, and their names in files and recipes."""


@dataclass(frozen=True)
class Conversion:
    """How a model is converted."""

    path: str  # of the converted model in the module that was asked about, with its dot
    link: Link
    way: Way

    @property
    def root(self) -> nn.Module:
        return self.link.root

    @property
    def host(self) -> str:
        return self.link.host

    @property
    def anatomy(self) -> Anatomy:
        return self.link.anatomy

    @property
    def layout(self) -> Layout:
        return self.anatomy.layout

    @property
    def join(self) -> str:
        return self.way.join

    @property
    def pe(self) -> str:
        return self.way.pe

    @property
    def warm_start(self) -> bool:
        return self.way.warm_start

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen beside join and kind: arguments of `lape.apply_`."""
        return {name: getattr(self.way, name) for name in CHOICES}

    @property
    def folded(self) -> bool:
        return self.way.folded

    @property
    def factory(self) -> dict[str, Any]:
        """Library, name and arguments of the model, when `create_model` or `load` made it; empty else."""
        return self.way.factory

    def record(self) -> dict[str, Any]:
        """What files say of it, as plain values."""
        choices = {"join": self.join, "pe": self.pe, **{CHOICES[name]: value for name, value in self.choices.items()}}
        form = {"own_table": True} if self.anatomy.form != Form() else {}  # which a new one of this kind would not be
        place = {"grid": list(self.layout.grid), "at": self.path.rstrip(".")}
        return {**choices, "folded": self.folded, **form, **place}

    def places(self) -> list[int | None]:
        """For each block that the model has now: its place in what `root.lape` computes, None when it is not joined."""
        modules, places = dict(self.root.named_modules()), []
        for layer, path in enumerate(self.anatomy.blocks):
            if path not in modules:  # pruned away
                continue
            inside = [*modules[path].modules(), modules.get(self.anatomy.norm_of(layer))]
            members = [m for m in inside if isinstance(m, Joined) and m.__dict__[LINK] is self.link]
            places.append(next((m._lape_place for m in members if hasattr(m, "_lape_place")), None))
        return places


def conversions(model: nn.Module) -> list[Conversion]:
    """All converted models in a module."""
    check_module(model)
    links = [(path, module.__dict__[LINK]) for path, module in model.named_modules() if LINK in module.__dict__]
    roots = [(path, link) for path, link in links if link.root is model.get_submodule(path)]
    return [Conversion(f"{path}." if path else "", link, way_of(link)) for path, link in roots]


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion of the one converted model in a module. Raises LapeError when there is none, or more than one."""
    candidates = conversions(model)
    if not candidates:
        raise LapeError(f"this {type(model).__name__} is not converted: call lape.apply_(model) first")
    if len(candidates) > 1:
        names = ", ".join(conversion.path.rstrip(".") for conversion in candidates)
        raise LapeError(f"this {type(model).__name__} holds {len(candidates)} converted models: pass one of {names}")
    return candidates[0]


def require_host(conversion: Conversion) -> Conversion:
    """The conversion itself. Raises LapeError where it has no host: a model that was left as it is."""
    if not conversion.anatomy.blocks:
        raise LapeError(f"pe={conversion.pe!r}: a {conversion.host} was left as it is, its parts are not known here")
    return conversion
