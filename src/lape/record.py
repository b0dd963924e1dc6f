"""What a converted model remembers of its conversion, and where its parts are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lape.errors import LapeError
from lape.hosts import Anatomy
from lape.hosts.base import check_module
from lape.joins import JOINS
from lape.position import KINDS, Layout

TABLES = "lape_position"  # name under which a converted model holds its position tables
NORMS = "lape_pe_norm"  # and its LN'_l, each under the path of its block
RECORD = "_lape"  # attribute of a converted model: its Conversion


@dataclass
class Conversion:
    """What `apply_` did to a model, and what `remove_` needs to undo it."""

    host: str
    join: str
    pe: str
    anatomy: Anatomy  # of the model as it was found
    sites: tuple[tuple[str, str], ...]  # (path of a wrapper, name of the wrapped module in it)
    slot_order: tuple[str, ...]  # the parameter names of the table's owner before the conversion
    replaced_encoder: nn.Module | None = None  # the host's own position module when a table took its place
    watch: str | None = None  # path of the wrapped patch embedding, where the grid may vary
    replaced_table: nn.Parameter | None = None  # the host's own table when another kind took its place
    overrides: tuple[str, ...] = ()  # methods of the host that were extended on the instance
    methods: tuple[str, ...] = ()  # paths of methods of its parts, likewise
    factory: dict[str, Any] = field(default_factory=dict)  # name and kwargs, when made by create_model
    warm_start: bool = False
    folded: bool = False

    @property
    def layout(self) -> Layout:
        return self.anatomy.layout

    @property
    def adds_at_input(self) -> bool:
        """Whether the host's own forward adds a table that holds the position."""
        return self.warm_start or (JOINS[self.join].at_input and KINDS[self.pe].is_table)

    @property
    def joins_own_bias(self) -> bool:
        """Whether the position is the host's own relative bias."""
        return KINDS[self.pe].is_bias and bool(self.anatomy.own_bias)

    def record(self) -> dict[str, Any]:
        """What files say of it, as plain values."""
        said = {"join": self.join, "pe": self.pe, "warm_start": self.warm_start, "folded": self.folded}
        return {**said, "grid": list(self.layout.grid)}


def encoder_of(anatomy: Anatomy) -> nn.Module:
    assert anatomy.encoder is not None
    return anatomy.root.get_submodule(anatomy.encoder)


def slot_of(anatomy: Anatomy) -> tuple[nn.Module, str]:
    """The module that holds the host's table, and the table's name in it; an empty name where it cannot have one."""
    path, _, name = (anatomy.table_slot or "").rpartition(".")
    return anatomy.root.get_submodule(path), name


def method_of(anatomy: Anatomy, path: str) -> tuple[nn.Module, str]:
    """The module that a method belongs to, and the method's name."""
    owner, _, name = path.rpartition(".")
    return anatomy.root.get_submodule(owner), name


def own_table(anatomy: Anatomy) -> nn.Parameter | None:
    owner, name = slot_of(anatomy)
    return owner._parameters.get(name)


def norm_home(anatomy: Anatomy, path: str) -> str:
    """The module to which the LN' of the norm at `path` is counted: its block, or for the last norm the norm itself."""
    block = path.removesuffix(f".{anatomy.norm}")
    return block if block in anatomy.blocks else path


def record_of(model: nn.Module) -> Conversion | None:
    check_module(model)
    return next((module.__dict__[RECORD] for module in model.modules() if RECORD in module.__dict__), None)


def conversion_of(model: nn.Module) -> Conversion:
    """The record of a converted model. Raises LapeError for a model that is not converted."""
    conversion = record_of(model)
    if conversion is None:
        raise LapeError(f"this {type(model).__name__} is not converted: call lape.apply_(model) first")
    return conversion


def known(conversion: Conversion) -> Conversion:
    if not conversion.anatomy.blocks:
        raise LapeError(f"pe={conversion.pe!r}: a {conversion.host} was left as it is, its parts are not known here")
    return conversion
