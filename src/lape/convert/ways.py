"""The ways of joining, each with its whole life: what it adds, how it enters and leaves a model, folds and is stored.

A way is the module `model.lape`: it owns all that is new and computes, once a forward, what every joined place
receives. It does not hold the model: who calls it hands over the host's table and how a block gets it. The ways are
asked in the order of `WAYS` whether they cover a join and a kind.

Shape legend: B batch, N tokens, R rows of the position table, D width, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lape.core.anatomy import Anatomy, place_of
from lape.core.bias import OwnBiasMethod, PositionBias, normalise
from lape.core.conditional import PEG, Generating
from lape.core.forward import Adding, Link, Slot, Spanning, owned
from lape.core.grids import GridWatch, Shuffled
from lape.core.joined import Joined, join_module
from lape.core.joins import Join
from lape.core.norm import Entered, PositionalNorm, beside, chain, makes_new
from lape.core.position import Grid, Kind, Layout, resample, resized, rows_of
from lape.core.sites import PositionalAttention, PositionalBlock, PositionalStem
from lape.errors import LapeError

SPANNED = ("forward", "forward_features", "forward_intermediates")


class Way(nn.Module):
    """One way of joining. A subclass says when it is needed (`covers`), and overrides what differs."""

    listed: ClassVar[bool] = False  # whether it computes a list: by place, what is added there
    site: ClassVar[str] = "blocks"  # the places that it joins, in words
    mixin: ClassVar[type[Joined] | None] = None  # what the modules there become
    uses_table: ClassVar[bool] = True  # whether the host's table is the position, or lies idle
    joins_host_bias: ClassVar[bool] = False  # whether the host's own relative bias is the position

    def __init__(self, join: Join, kind: Kind, anatomy: Anatomy, *, new: bool, warm_start: bool):
        super().__init__()
        self.join = join.name
        self.pe = kind.name
        self.warm_start = warm_start
        self.folded = False
        self.factory: dict[str, Any] = {}  # name and arguments of the model, when made by create_model
        self.new = new  # whether the kind was named, so that the host's own position gives way
        self.hides_table = True  # whether the host's own addition of a table is switched off

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        """Whether this is the way for them."""
        raise NotImplementedError

    def adds_at_input(self, anatomy: Anatomy) -> bool:
        """Whether a table is added to the patch tokens."""
        return not self.hides_table

    def places(self, anatomy: Anatomy) -> list[str]:
        """Paths of the modules that are joined, in the order of the list."""
        return []

    def homes(self, anatomy: Anatomy) -> list[str]:
        """For each place, the module to which files count what belongs to it."""
        return self.places(anatomy)

    def enter(self, link: Link) -> None:
        """Joins the model. Nothing in it can be wrong use."""
        root, anatomy = link.root, link.anatomy
        root.add_module("lape", self)
        if self.mixin is not None:
            for place, path in enumerate(self.places(anatomy)):
                module = root.get_submodule(path)
                join_module(module, self.mixin, link, place=place, new=makes_new(module))
            join_module(root, Spanning, link, *spanned(root))
            if anatomy.shuffle is not None:
                owner, method = place_of(root, anatomy.shuffle)
                join_module(owner, Shuffled, link, method)
        if self.mixin is not None and anatomy.patch_embed is not None:
            join_module(root.get_submodule(anatomy.patch_embed), GridWatch, link)
        self._take_slot(link)

    def _take_slot(self, link: Link) -> None:
        """Hides the host's own position while its code adds it, and sets aside what has no part any more."""
        root, anatomy = link.root, link.anatomy
        hidden = [anatomy.table_slot if anatomy.table is not None else None, anatomy.encoder if self.new else None]
        for path in hidden:
            if path is not None and self.hides_table:
                hide(link, path)
        if anatomy.table is not None and anatomy.table_slot is not None and not self.uses_table:
            set_aside(link, anatomy.table_slot)
        if anatomy.encoder is not None and self.new:
            for name, _ in list(root.get_submodule(anatomy.encoder).named_parameters()):
                set_aside(link, f"{anatomy.encoder}.{name}")

    def fold(self, link: Link) -> Way:
        """What takes its place when everything that parameters alone decide is a constant: by default nothing."""
        self.folded = True
        return self

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        """Beginnings of the model's keys -> those in files, where they differ."""
        return {}

    def bias(self, place: int) -> Tensor | None:
        """The bias (D,) that is part of what a place receives, when position has a norm of its own there."""
        return None

    def check_resize(self) -> None:
        """Raises LapeError when it has one size."""

    def resize(self, old: Layout, new: Layout) -> None:
        """Follows its model to another grid, for good."""

    def extra_repr(self) -> str:
        folded, gated = (", folded" if self.folded else ""), (", warm start" if self.warm_start else "")
        return f"join={self.join}, pe={self.pe}{folded}{gated}"


def way_of(link: Link) -> Way:
    """The way in which a model is joined; inside of what an adapter or a parallel wrapper puts around `root.lape`."""
    return next(module for module in link.root._modules["lape"].modules() if isinstance(module, Way))  # type: ignore


def spanned(root: nn.Module) -> list[str]:
    return [name for name in SPANNED if callable(getattr(type(root), name, None))]


def hide(link: Link, path: str) -> None:
    """The host's code sees nothing under this path while it adds its position."""
    owner, name = place_of(link.root, path)
    join_module(owner, Slot, link, name)
    scopes = [place_of(link.root, scope) for scope in link.anatomy.adds or spanned(link.root)]
    for adder in dict.fromkeys(module for module, _ in scopes):
        join_module(adder, Adding, link, *(method for module, method in scopes if module is adder))


def set_aside(link: Link, path: str) -> None:
    """A parameter of the host that has no part any more stays under its key, as a buffer."""
    owner, name = place_of(link.root, path)
    link.orders.setdefault(path.rpartition(".")[0], tuple(owner._parameters))
    parameter: Any = owner._parameters.pop(name)
    link.replaced[path] = parameter
    owner.register_buffer(name, parameter.detach())


def put_back(link: Link) -> None:
    """Undoes what `set_aside` and a new table did to the host's parameters."""
    device = next((p.device for p in link.root.parameters()), None)
    for path, parameter in link.replaced.items():
        owner, name = place_of(link.root, path)
        idle = owner._buffers.pop(name, None)
        parameter.data = idle.detach() if idle is not None else parameter.data.to(device)
        owner._parameters[name] = parameter
    for path, order in link.orders.items():
        parameters = link.root.get_submodule(path)._parameters
        for name in order:
            parameters[name] = parameters.pop(name)


class WithTable(Way):
    """A position per token, from one table: the host's own, a new one in its slot, or one that the host lacks."""

    def __init__(self, join: Join, kind: Kind, anatomy: Anatomy, *, new: bool, warm_start: bool):
        super().__init__(join, kind, anatomy, new=new, warm_start=warm_start)
        self.hides_table = not (join.at_input or warm_start)
        self.table_names: tuple[str, ...] = ()
        self._in_slot: list[nn.Parameter] = []  # until `enter`
        own = link_table(anatomy)
        if own is None or new:
            made = new_table(anatomy, kind, 0)
            if own is None:
                self._add_table(0, made)
            else:
                self._in_slot = [nn.Parameter(made.data.reshape(own.shape), requires_grad=made.requires_grad)]

    def _add_table(self, layer: int, table: nn.Parameter) -> None:
        self.table_names = (
            *self.table_names,
            f"table_{layer}",
        )  # no list of parameters: offloading loads a module's own
        self.register_parameter(self.table_names[-1], table)

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        """The new ones that lie here, by name."""
        return {name: getattr(self, name) for name in self.table_names}

    def source(self, table: Tensor | None, grid: Grid | None, anatomy: Anatomy) -> Tensor:
        """P (1, R, D) of a grid."""
        p_1RD = self.get_parameter("table_0") if table is None else table
        return p_1RD if grid is None else resample(p_1RD, anatomy.layout, grid)

    def enter(self, link: Link) -> None:
        if self._in_slot:
            slot = str(link.anatomy.table_slot)
            owner, name = place_of(link.root, slot)
            link.replaced[slot] = owner._parameters[name]  # type: ignore[assignment]
            owner._parameters[name] = self._in_slot.pop()  # in place: the order of parameters stays the host's
        super().enter(link)

    def _take_slot(self, link: Link) -> None:
        super()._take_slot(link)
        if self.tables and not self.hides_table and link.anatomy.table_slot is not None:
            hide(link, link.anatomy.table_slot)  # and lends the table that the host lacks

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {"lape.table_0": anatomy.table_slot or "pos_embed"}

    def resize(self, old: Layout, new: Layout) -> None:
        for name, table in self.tables.items():
            setattr(self, name, nn.Parameter(resized(table, old, new), requires_grad=table.requires_grad))


class AtInput(WithTable):
    """The table is added to the patch tokens once (join `basic`), by the host's own code where it adds one."""

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.is_table and join.site == "input"

    def forward(self) -> Tensor:
        """The table that the host lacks, for its code to add."""
        return self.get_parameter("table_0")


class BehindStem(WithTable):
    """As `AtInput`, for a host that adds no table: behind the module that makes its patch tokens."""

    listed = True
    mixin = PositionalStem

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.is_table and join.site == "input" and anatomy.table_slot is None and anatomy.input is not None

    def places(self, anatomy: Anatomy) -> list[str]:
        return [str(anatomy.input)]

    def forward(
        self, table: Tensor | None, anatomy: Anatomy, entered: Entered, grid: Grid | None, upto: int | None
    ) -> tuple[Tensor, ...]:
        """P, (1, N, D)."""
        return (anatomy.layout.spread(self.source(table, grid, anatomy)),)


class AtBlocks(WithTable):
    """P joins the residual stream before each block (joins `share` and `unshare`)."""

    listed = True
    site = "block inputs"
    mixin = PositionalBlock

    def __init__(self, join: Join, kind: Kind, anatomy: Anatomy, *, new: bool, warm_start: bool):
        super().__init__(join, kind, anatomy, new=new, warm_start=warm_start)
        self.per_block = join.table_per_block
        if not self.per_block:
            return
        candidates: list[Any] = self._in_slot or [*self.tables.values(), link_table(anatomy)]
        first = candidates[0]
        for layer in range(1, len(anatomy.blocks)):
            if new or link_table(anatomy) is None:
                made = new_table(anatomy, kind, layer)
            else:  # a copy for each block, as the host's table reaches it
                with torch.no_grad():
                    entered = partial(anatomy.entered, anatomy.root)
                    raw = list(raw_positions(anatomy, entered, rows_of(first)))
                made = nn.Parameter(raw[layer].detach().clone(), requires_grad=first.requires_grad)
            self._add_table(layer, made)

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.is_table and join.site == "block"

    def places(self, anatomy: Anatomy) -> list[str]:
        return list(anatomy.blocks)

    def forward(
        self, table: Tensor | None, anatomy: Anatomy, entered: Entered, grid: Grid | None, upto: int | None
    ) -> tuple[Tensor, ...]:
        """W_l, or P as it reaches block l, (1, N, D)."""
        if not self.per_block:
            made = raw_positions(anatomy, entered, self.source(table, grid, anatomy))
        else:
            own: list[Tensor] = [] if table is None else [table]
            made = (
                p if grid is None else resample(p, anatomy.at(layer)[0], grid)
                for layer, p in enumerate([*own, *self.tables.values()])
            )
        return tuple(anatomy.layout.spread(p) for p, _ in zip(made, range(_number(upto, anatomy)), strict=False))

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        slot = anatomy.table_slot or "pos_embed"
        if not self.per_block:
            return super().file_names(anatomy)
        names = {f"lape.{name}": f"{slot}{name.removeprefix('table_')}" for name in self.tables}
        return {slot: f"{slot}0", **names}


class BesideNorms(WithTable):
    """P with a LayerNorm of its own beside each block's (joins `LaPE-sharing`, `LaPE`, `PVG`, `MPVG`).

    With `warm_start`, times a learned scalar g_l that starts at zero: the host's function at first.
    """

    listed = True
    site = "attention norms"
    mixin = PositionalNorm

    def __init__(self, join: Join, kind: Kind, anatomy: Anatomy, *, new: bool, warm_start: bool):
        super().__init__(join, kind, anatomy, new=new, warm_start=warm_start)
        self.chained, self.at_last = join.chained, join.at_last
        self.layers = tuple(range(join.first, len(anatomy.blocks)))
        root = anatomy.root
        norms = {str(layer): f"{anatomy.blocks[layer]}.{anatomy.norm}" for layer in self.layers}
        if join.at_last:
            norms["last"] = str(anatomy.last_norm)
        like = like_of(anatomy)
        self.norms = nn.ModuleDict(
            {
                key: norm_like(root.get_submodule(path), anatomy.at(self._layer(key))[1], like)
                for key, path in norms.items()
            }
        )
        for key in norms if warm_start else ():
            setattr(self, f"gate_{key}", nn.Parameter(like.new_zeros(1)))

    def _layer(self, key: str) -> int:
        return self.layers[-1] if key == "last" else int(key)

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.is_table and join.site == "norm"

    def places(self, anatomy: Anatomy) -> list[str]:
        last = [str(anatomy.last_norm)] if self.at_last else []
        return [f"{anatomy.blocks[layer]}.{anatomy.norm}" for layer in self.layers] + last

    def homes(self, anatomy: Anatomy) -> list[str]:
        last = [str(anatomy.last_norm)] if self.at_last else []
        return [anatomy.blocks[layer] for layer in self.layers] + last

    def forward(
        self, table: Tensor | None, anatomy: Anatomy, entered: Entered, grid: Grid | None, upto: int | None
    ) -> tuple[Tensor, ...]:
        """P_(l+1) = LN'_l(P_l), or LN'_l(P), (1, N, D). The only place where a LayerNorm meets a position."""
        p_1RD = self.source(table, grid, anatomy)
        if grid is not None and anatomy.stages:
            raise LapeError(f"a model of stages has one image size: a map of {grid[0]} x {grid[1]} is another one's")
        norms = [(self._layer(key), norm) for key, norm in self.norms.items() if key != "last"]
        made = list((chain if self.chained else beside)(p_1RD, norms[: None if upto is None else upto + 1], entered))
        if self.at_last and upto in (None, len(norms)):
            *_, raw = raw_positions(anatomy, entered, p_1RD)
            made.append(self.norms["last"](raw))
        if self.warm_start:
            made = [getattr(self, f"gate_{key}") * p for key, p in zip(self.norms, made, strict=False)]
        return tuple(anatomy.layout.spread(p) for p in made)

    def bias(self, place: int) -> Tensor | None:
        key = list(self.norms)[place]
        bias: Tensor = self.norms[key].get_parameter("bias")
        return getattr(self, f"gate_{key}") * bias if self.warm_start else bias

    def fold(self, link: Link) -> Way:
        folded = Folded(self, link, link.compute(link.root, None), "folded_position")
        if self.hides_table and link.anatomy.table is not None:  # all that is left of it are the constants
            set_aside(link, link.anatomy.table)
        return folded

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        homes = dict(zip(self.norms, self.homes(anatomy), strict=True))
        norms = {f"lape.norms.{key}": f"{home}.pe_norm" for key, home in homes.items()}
        gates = {f"lape.gate_{key}": f"{home}.pe_gate" for key, home in homes.items()}
        return {**super().file_names(anatomy), **norms, **gates}


class NewBias(Way):
    """A relative position bias on the logits of each block, new; with join `LaPE`, its rows normalised."""

    listed = True
    site = "attention biases"
    mixin = PositionalAttention
    uses_table = False

    def __init__(self, join: Join, kind: Kind, anatomy: Anatomy, *, new: bool, warm_start: bool):
        super().__init__(join, kind, anatomy, new=new, warm_start=warm_start)
        like, heads = like_of(anatomy), anatomy.num_heads
        self.biases = nn.ModuleList(
            PositionBias(anatomy.layout, heads, kind.bias_axes, normalised=join.normalised, like=like)
            for _ in anatomy.blocks
        )

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.is_bias

    def places(self, anatomy: Anatomy) -> list[str]:
        return [f"{path}.{anatomy.attention}" for path in anatomy.blocks]

    def forward(
        self, table: Tensor | None, anatomy: Anatomy, entered: Entered, grid: Grid | None, upto: int | None
    ) -> tuple[Tensor, ...]:
        """The bias of each block, (1, H, N, N)."""
        return tuple(bias(grid) for bias in self.biases[: _number(upto, anatomy)])

    def fold(self, link: Link) -> Way:
        return Folded(self, link, link.compute(link.root, None), "folded_bias")

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {f"lape.biases.{i}": path for i, path in enumerate(self.places(anatomy))}

    def resize(self, old: Layout, new: Layout) -> None:
        for bias in self.biases:
            bias.resize_(new)  # type: ignore[operator]


class HostBias(Way):
    """The host's own relative bias: nothing new, or with join `LaPE`, a LayerNorm over its rows."""

    site = "attention biases"
    uses_table = False
    joins_host_bias = True

    def __init__(self, join: Join, kind: Kind, anatomy: Anatomy, *, new: bool, warm_start: bool):
        super().__init__(join, kind, anatomy, new=new, warm_start=warm_start)
        self.own = anatomy.own_bias if join.normalised else ()
        like = [next(place_of(anatomy.root, own.method)[0].parameters()) for own in self.own]
        self.norms = nn.ModuleList(
            nn.LayerNorm(own.keys, device=p.device, dtype=p.dtype) for own, p in zip(self.own, like, strict=True)
        )  # eps as in the reference

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.is_bias and bool(anatomy.own_bias)

    def places(self, anatomy: Anatomy) -> list[str]:
        return [own.method.rpartition(".")[0] for own in self.own]

    def enter(self, link: Link) -> None:
        for place, own in enumerate(self.own):
            owner, method = place_of(link.root, own.method)
            join_module(owner, OwnBiasMethod, link, method, place=place)
        if self.own:
            join_module(link.root, Spanning, link, *spanned(link.root))
        super().enter(link)

    def forward(self, place: int, host_bias: Callable[[], Tensor]) -> Tensor:
        """The host's bias of one block, its rows normalised."""
        own = self.own[place]
        return normalise(host_bias(), self.norms[place], own.num_prefix, own.keys)

    def fold(self, link: Link) -> Way:
        if not self.own:
            return super().fold(link)
        return Folded(self, link, [_shown(link.root, own) for own in self.own], "folded_bias")

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {f"lape.norms.{i}": f"{path}.pe_norm" for i, path in enumerate(self.places(anatomy))}

    def check_resize(self) -> None:
        if self.own:
            raise LapeError("LN' over the rows of the host's bias has one size: set the input size before lape.apply_")


def _shown(root: nn.Module, own: Any) -> Tensor:
    """The bias that a host's method gives."""
    owner, method = place_of(root, own.method)
    bias: Tensor = getattr(owner, method)(*own.args)
    return bias


class Generated(Way):
    """Position is made of the tokens that leave block 0."""

    site = "block outputs"
    mixin = Generating
    uses_table = False

    def __init__(self, join: Join, kind: Kind, anatomy: Anatomy, *, new: bool, warm_start: bool):
        super().__init__(join, kind, anatomy, new=new, warm_start=warm_start)
        self.peg = PEG(anatomy.width, like_of(anatomy))

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.conditional

    def places(self, anatomy: Anatomy) -> list[str]:
        return [anatomy.blocks[0]]

    def forward(self, x: Tensor, link: Link) -> Tensor:
        """x with the position of its patches."""
        layout = link.anatomy.layout
        if link.anatomy.maps:
            return self.peg.beside_map(x)
        return self.peg.beside(x, link.grid_of(x) or layout.grid, layout.num_prefix)

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {"lape.peg": f"{anatomy.blocks[0]}.peg"}


class NoPosition(Way):
    """The host's position is switched off and nothing takes its place: the control."""

    uses_table = False

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return not kind.untouched


class Untouched(Way):
    """No conversion: a plain model that says so, a rival in a comparison."""

    @staticmethod
    def covers(anatomy: Anatomy, join: Join, kind: Kind) -> bool:
        return kind.untouched

    def adds_at_input(self, anatomy: Anatomy) -> bool:
        return anatomy.table is not None

    def enter(self, link: Link) -> None:
        link.root.add_module("lape", self)


WAYS = (BehindStem, AtInput, AtBlocks, BesideNorms, HostBias, NewBias, Generated, Untouched, NoPosition)


class Folded(Way):
    """What another way computed from parameters alone, as one constant a place, for one grid."""

    def __init__(self, way: Way, link: Link, constants: Sequence[Tensor], name: str):
        nn.Module.__init__(self)
        for attribute in ("join", "pe", "warm_start", "factory", "new", "hides_table", "uses_table", "joins_host_bias"):
            setattr(self, attribute, getattr(way, attribute))
        self.folded, self.name = True, name
        self.site = way.site  # type: ignore[misc]
        self._places, self._homes = way.places(link.anatomy), way.homes(link.anatomy)
        for place, constant in enumerate(constants):
            self.register_buffer(f"constant_{place}", constant.detach().clone())

    def places(self, anatomy: Anatomy) -> list[str]:
        return self._places

    def homes(self, anatomy: Anatomy) -> list[str]:
        return self._homes

    def forward(self, table: Any, anatomy: Any, entered: Any = None, grid: Grid | None = None, upto: Any = None) -> Any:
        """All constants; or, of a host's own bias, that of one place."""
        if isinstance(table, int):
            return self._buffers[f"constant_{table}"]
        if grid is not None:
            own = anatomy.layout.grid
            raise LapeError(
                f"the model is folded for the grid {own}, these images have {grid}: give images of its size"
            )
        return tuple(self._buffers.values())

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {f"lape.constant_{i}": f"{home}.{self.name}" for i, home in enumerate(self._homes)}

    def check_resize(self) -> None:
        raise LapeError("a folded model has one size: set the input size before lape.fold_")


def raw_positions(anatomy: Anatomy, entered: Entered, p_1RD: Tensor) -> Iterator[Tensor]:
    """The table as each block gets it, without norms."""
    for layer in range(len(anatomy.blocks)):
        p_1RD = entered(layer, p_1RD)
        yield p_1RD


def link_table(anatomy: Anatomy) -> Tensor | None:
    """The host's own table."""
    if anatomy.table is None:
        return None
    table: Tensor | None = owned(*place_of(anatomy.root, anatomy.table))
    return table


def like_of(anatomy: Anatomy) -> Tensor:
    """A parameter whose device and dtype new ones get."""
    norm = anatomy.root.get_submodule(f"{anatomy.blocks[0]}.{anatomy.norm}")
    return next(norm.parameters(), next(anatomy.root.parameters()))


def new_table(anatomy: Anatomy, kind: Kind, layer: int) -> nn.Parameter:
    """A table of a kind for a block, (1, R, D)."""
    assert kind.build is not None
    like, (layout, width) = like_of(anatomy), anatomy.at(layer)
    std = {} if kind.frozen or anatomy.table_std is None else {"std": anatomy.table_std}
    values = kind.build(layout, width, **std).to(device=like.device, dtype=like.dtype)
    return nn.Parameter(values, requires_grad=not kind.frozen)


def norm_like(token_norm: nn.Module, width: int, like: Tensor) -> nn.LayerNorm:
    """LN'_l: a LayerNorm with the eps of the token norm and an affine of its own (2 D parameters).

    torch's RMSNorm may have no eps of its own (None: that of the dtype); LN' then has torch's default, 1e-5.
    """
    eps: Any = 1e-5 if token_norm.eps is None else token_norm.eps
    return nn.LayerNorm(width, eps=eps, device=like.device, dtype=like.dtype)


def _number(upto: int | None, anatomy: Anatomy) -> int:
    return len(anatomy.blocks) if upto is None else upto + 1
