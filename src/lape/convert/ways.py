"""The ways of joining, each with its whole life: what it adds, how it enters and leaves a model, folds and is stored.

A way is the module `model.lape`: it owns all that is new and computes, once a forward, what every joined place
receives. It does not hold the model: the caller hands over the host's table and merging in a `PositionRequest`.
`way_for` has the order in which the ways are asked.

Shape legend: B batch, N tokens, R rows of the position table, D width, L layers, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.core.anatomy import Anatomy, owner_and_name
from lape.core.bias import NormalisedBias, PositionBias, normalise
from lape.core.conditional import PEG, Generating
from lape.core.constants import constant
from lape.core.forward import Adding, Link, PositionRequest, Slot, Spanning, member, rows_of_host
from lape.core.grids import GridWatch, Shuffled, in_backward
from lape.core.joined import Joined, join_module
from lape.core.joins import Join
from lape.core.norm import Merge, PositionalNorm, chain, makes_new, sharing
from lape.core.pe_norms import PE_NORMS
from lape.core.position import Kind, Layout, resized
from lape.core.rotary import Jitter, Rotating, axial, jittered, mixed, patch_coordinates, rotation
from lape.core.sites import PositionalAttention, PositionalBlock, PositionalInput, PositionalStem, Unfused
from lape.errors import LapeError


@dataclass(frozen=True)
class Wish:
    """What is to be joined, and how."""

    anatomy: Anatomy
    join: Join
    kind: Kind
    new: bool = False  # whether the kind was named, so that the host's own position gives way
    warm_start: bool = False
    pe_norm: str | None = None  # what stands in the place of LN'_l, where the join has such a place
    std: float | None = None  # of a new table; None: the kind's or the host's own

    @property
    def like(self) -> Tensor:
        """A parameter whose device and dtype new ones get."""
        root = self.anatomy.root
        norm = root.get_submodule(self.anatomy.norm_of(0))
        return next(norm.parameters(), next(root.parameters()))

    @property
    def host_table(self) -> Tensor | None:
        table = self.anatomy.table
        return None if table is None else member(*owner_and_name(self.anatomy.root, table))

    def new_table(self, layer: int) -> nn.Parameter:
        """A table of the kind for a block, (1, R, D)."""
        values = self.kind.table(*self.anatomy.at(layer), self.anatomy.table_std, self.std)
        values = values.to(device=self.like.device, dtype=self.like.dtype)
        return nn.Parameter(values, requires_grad=not self.kind.frozen)


class Way(nn.Module):
    """One way of joining: as it stands, that of a model without position; subclasses override what differs."""

    computes_positions: ClassVar[bool] = False  # whether `forward` gives, by place, what is added there
    lazy: ClassVar[bool] = True  # whether `each` gives the same, one by one
    site: ClassVar[str] = "blocks"  # the places that it joins, in words
    mixin: type[Joined] | None = None  # what the modules there become
    uses_table: ClassVar[bool] = False  # whether the host's table is the position, or lies idle
    joins_host_bias: ClassVar[bool] = False  # whether the host's own relative bias is the position

    def __init__(self, wish: Wish):
        super().__init__()
        self.join, self.pe = wish.join.name, wish.kind.name
        self.new, self.warm_start, self.folded = wish.new, wish.warm_start, False
        self.pe_norm, self.std = wish.pe_norm, wish.std
        self.factory: dict[str, Any] = {}  # name and arguments of the model, when made by create_model
        self.hides_table = True  # whether the host's own addition of a table is switched off

    def each(self, request: PositionRequest) -> Iterator[Tensor]:
        """What each place receives, in their order."""
        raise NotImplementedError

    def forward(self, request: Any) -> Any:
        """What each place receives. Always by `model.lape(...)`, so that hooks and wrappers see the call.

        Five calls there are: with a request; with nothing (`AtInput`); with (place, host_bias) (`HostBias`); with
        (x, link, place) (`Generated`); with a request or (place, host_bias) (`Folded`).
        """
        return tuple(self.each(request))

    def adds_at_input(self, anatomy: Anatomy) -> bool:
        """Whether a table is added to the patch tokens."""
        return not self.hides_table

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        """For each place, the module under whose name files store its parameters."""
        return []

    def places(self, anatomy: Anatomy) -> list[str]:
        """Paths of the modules that are joined, in the order of the list."""
        return self.owners_in_files(anatomy)

    def taken_over(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Names of what the mixin takes over in each of them."""
        return ()

    def enter(self, link: Link) -> None:
        """Changes the model; whatever the user may have got wrong was refused before."""
        root, anatomy = link.root, link.anatomy
        root.add_module("lape", self.train(root.training))
        if self.mixin is not None:
            for place, path in enumerate(self.places(anatomy)):
                module = root.get_submodule(path)
                join_module(module, self.mixin, link, *self.taken_over(anatomy), place=place, new=makes_new(module))
            join_module(root, Spanning, link, *entry_methods(root))
            for path in anatomy.blocks if anatomy.unfused else ():
                join_module(root.get_submodule(path), Unfused, link, str(anatomy.unfused))
            if anatomy.shuffle is not None:
                owner, method = owner_and_name(root, anatomy.shuffle)
                join_module(owner, Shuffled, link, method)
            if anatomy.patch_embed is not None:
                join_module(root.get_submodule(anatomy.patch_embed), GridWatch, link)
        self._hide_host_position(link)

    def _hide_host_position(self, link: Link) -> None:
        """Hides the host's own position while its code adds it, and sets aside what has no part any more."""
        anatomy = link.anatomy
        encoder = anatomy.encoder if self.new else ()
        for path in (*(anatomy.tables if self.hides_table else ()), *encoder):
            hide(link, path)
        idle = [] if self.uses_table else list(anatomy.tables)
        for path in encoder:
            part = member(*owner_and_name(link.root, path))
            if isinstance(part, nn.Parameter):
                idle.append(path)
            elif isinstance(part, nn.Module):
                idle += [f"{path}.{name}" for name, _ in part.named_parameters()]
        for path in idle:
            set_aside(link, path)

    def fold(self, link: Link) -> Way:
        """The way of the folded model: constants for what parameters alone decide, by default this one."""
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
        fold, gate = (", folded" if self.folded else ""), (", warm start" if self.warm_start else "")
        return f"join={self.join}, pe={self.pe}{fold}{gate}"


class Untouched(Way):
    """No conversion: a plain model that says so, a rival in a comparison."""

    def adds_at_input(self, anatomy: Anatomy) -> bool:
        return anatomy.table is not None

    def enter(self, link: Link) -> None:
        link.root.add_module("lape", self)


class WithTable(Way):
    """A position per token, from one table: the host's own, a new one in its slot, or one that the host lacks."""

    uses_table = True

    def __init__(self, wish: Wish):
        super().__init__(wish)
        self.hides_table = not (wish.join.at_input or wish.warm_start)
        self.table_names: tuple[str, ...] = ()
        self._in_slot: list[nn.Parameter] = []  # a list, so that it is not registered; empty after `enter`
        host_table = wish.host_table
        if host_table is None:
            self._add_table(0, wish.new_table(0))
        elif wish.new:
            table = wish.new_table(0)
            self._in_slot = [nn.Parameter(table.data.reshape(host_table.shape), requires_grad=table.requires_grad)]

    def _add_table(self, layer: int, table: nn.Parameter) -> None:
        # no ParameterList: offloading loads only what a module owns itself
        self.table_names = (*self.table_names, f"table_{layer}")
        self.register_parameter(self.table_names[-1], table)

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        """The new ones that lie here, by name."""
        return {name: getattr(self, name) for name in self.table_names}

    def source(self, request: PositionRequest) -> Tensor:
        """P (1, R, D) of the grid that is asked for."""
        p_1RD = self.get_parameter("table_0") if request.table is None else request.table
        return p_1RD if request.grid is None else request.anatomy.resample(p_1RD, request.anatomy.layout, request.grid)

    def enter(self, link: Link) -> None:
        if self._in_slot:
            slot = str(link.anatomy.table_slot)
            owner, name = owner_and_name(link.root, slot)
            link.replaced[slot] = owner._parameters[name]  # type: ignore[assignment]
            owner._parameters[name] = self._in_slot.pop()  # in place: the order of parameters stays the host's
        super().enter(link)

    def _hide_host_position(self, link: Link) -> None:
        super()._hide_host_position(link)
        if self.tables and not self.hides_table and link.anatomy.table_slot is not None:
            hide(link, link.anatomy.table_slot)  # the host lacks a table: `stand_in` gives it ours

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {"lape.table_0": anatomy.table_slot or anatomy.table_key}

    def resize(self, old: Layout, new: Layout) -> None:
        for name, table in self.tables.items():
            setattr(self, name, nn.Parameter(resized(table, old, new), requires_grad=table.requires_grad))


class AtInput(WithTable):
    """The table is added to the patch tokens once (join `basic`), by the host's own code where it adds one."""

    def forward(self) -> Tensor:  # type: ignore[override]
        """The table that the host lacks, for its code to add."""
        return self.get_parameter("table_0")


class BehindStem(WithTable):
    """As `AtInput`, for a host that adds no table: behind the module that makes its patch tokens."""

    computes_positions, mixin = True, PositionalStem

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        return [str(anatomy.input)]

    def each(self, request: PositionRequest) -> Iterator[Tensor]:
        """P, (1, N, D)."""
        yield request.anatomy.layout.spread(self.source(request))


class AtBlocks(WithTable):
    """P joins the residual stream before each block (joins `share` and `unshare`)."""

    computes_positions, mixin, site = True, PositionalBlock, "block inputs"

    def __init__(self, wish: Wish):
        super().__init__(wish)
        self.per_block, table = wish.join.table_per_block, wish.host_table
        if not self.per_block:
            return
        raw: list[Tensor] = []
        if table is not None and not wish.new:  # a copy for each block, as the host's table reaches it
            anatomy, root = wish.anatomy, wish.anatomy.root
            with torch.no_grad():
                rows_1RD = rows_of_host(root, anatomy, table)
                raw = list(raw_positions(anatomy, partial(anatomy.merge, root), rows_1RD))
        for layer in range(1, len(wish.anatomy.blocks)):
            if raw and table is not None:
                self._add_table(layer, nn.Parameter(raw[layer].detach().clone(), table.requires_grad))
            else:
                self._add_table(layer, wish.new_table(layer))

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        return list(anatomy.blocks)

    def each(self, request: PositionRequest) -> Iterator[Tensor]:
        """W_l, or P as it reaches block l, (1, N, D)."""
        anatomy, grid = request.anatomy, request.grid
        if self.per_block:
            tables = [*([] if request.table is None else [request.table]), *self.tables.values()]
            resample = anatomy.resample
            positions = iter([p if grid is None else resample(p, anatomy.at(i)[0], grid) for i, p in enumerate(tables)])
        else:
            positions = raw_positions(anatomy, request.merge, self.source(request))
        for layer, p in zip(range(len(anatomy.blocks))[: request.count], positions, strict=False):
            yield anatomy.at(layer)[0].spread(p)

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        slot = anatomy.table_slot or anatomy.table_key
        if not self.per_block:
            return super().file_names(anatomy)
        return {slot: f"{slot}0"} | {f"lape.{name}": f"{slot}{name.removeprefix('table_')}" for name in self.tables}


class BesideNorms(WithTable):
    """P with a LayerNorm of its own beside each block's (`LaPE-sharing`, `LaPE`, `PVG`, `MPVG`), or without (`beside`).

    With `warm_start`, times a learned scalar g_l that starts at zero: the host's function at first.
    """

    computes_positions, mixin, site = True, PositionalNorm, "attention norms"

    def __init__(self, wish: Wish):
        super().__init__(wish)
        anatomy, like = wish.anatomy, wish.like
        self.chained, self.at_last = wish.join.chained, wish.join.at_last
        self.layers = tuple(range(wish.join.first, len(anatomy.blocks)))
        if anatomy.norm_feeds_more:
            self.mixin = PositionalInput  # type: ignore[assignment]
        self.norms = nn.ModuleDict()
        for key, path in zip([*map(str, self.layers), "last"], self._norms(anatomy), strict=False):
            width = anatomy.at(self._layer(key))[1]
            self.norms[key] = norm_like(anatomy.root.get_submodule(path), width, like, str(wish.pe_norm))
            if wish.warm_start:
                self.register_parameter(f"gate_{key}", nn.Parameter(like.new_zeros(1)))

    def _layer(self, key: str) -> int:
        return self.layers[-1] if key == "last" else int(key)

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        return [anatomy.blocks[layer] for layer in self.layers] + ([str(anatomy.last_norm)] if self.at_last else [])

    def _norms(self, anatomy: Anatomy) -> list[str]:
        return [anatomy.norm_of(layer) for layer in self.layers] + ([str(anatomy.last_norm)] if self.at_last else [])

    def places(self, anatomy: Anatomy) -> list[str]:
        if not anatomy.norm_feeds_more:
            return self._norms(anatomy)
        return [f"{anatomy.blocks[layer]}.{anatomy.attention}" for layer in self.layers]

    def each(self, request: PositionRequest) -> Iterator[Tensor]:
        """P_(l+1) = LN'_l(P_l), or LN'_l(P), (1, N, D). LN' on tables is called here only."""
        anatomy, p_1RD = request.anatomy, self.source(request)
        if request.grid is not None and anatomy.stages:
            raise LapeError(f"a model of stages has one image size: a map of {request.grid} is another one's")
        norms = [(int(key), norm) for key, norm in self.norms.items() if key != "last"]
        positions = (chain if self.chained else sharing)(p_1RD, norms[: request.count], request.merge)
        if self.at_last and request.last_place in (None, len(norms)):
            *_, raw = raw_positions(anatomy, request.merge, p_1RD)
            positions = itertools.chain(positions, map(self.norms["last"], [raw]))
        for key, p in zip(self.norms.keys(), positions, strict=False):
            layout = anatomy.at(self._layer(key))[0]
            yield layout.spread(getattr(self, f"gate_{key}") * p if self.warm_start else p)

    def bias(self, place: int) -> Tensor | None:
        key = list(self.norms)[place]
        bias: Tensor | None = getattr(self.norms[key], "bias", None)
        return getattr(self, f"gate_{key}") * bias if self.warm_start and bias is not None else bias

    def fold(self, link: Link) -> Way:
        way = Folded(self, link, link.compute(link.root, None), "folded_position")
        for path in link.anatomy.tables if self.hides_table else ():  # all that is left of them are the constants
            set_aside(link, path)
        return way

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        names = super().file_names(anatomy)
        for key, owner in zip(self.norms, self.owners_in_files(anatomy), strict=True):
            names |= {f"lape.norms.{key}": f"{owner}.pe_norm", f"lape.gate_{key}": f"{owner}.pe_gate"}
        return names


class AtLogits(Way):
    """A bias joins the attention logits of each block."""

    computes_positions, mixin, site = True, PositionalAttention, "attention biases"

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        return [f"{path}.{anatomy.attention}" for path in anatomy.blocks]

    def fold(self, link: Link) -> Way:
        return Folded(self, link, link.compute(link.root, None), "folded_bias")


class NewBias(AtLogits):
    """A learned relative position bias in each block; with join `LaPE`, its rows are normalised."""

    def __init__(self, wish: Wish):
        super().__init__(wish)
        layout, heads, axes = wish.anatomy.layout, wish.anatomy.num_heads, wish.kind.bias_axes
        make = partial(PositionBias, layout, heads, axes, normalised=wish.join.normalised, like=wish.like)
        self.biases = nn.ModuleList(make() for _ in wish.anatomy.blocks)

    def each(self, request: PositionRequest) -> Iterator[Tensor]:
        """The bias of each block, (1, H, N, N)."""
        yield from (bias(request.grid) for bias in self.biases[: request.count])

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {f"lape.biases.{i}": path for i, path in enumerate(self.owners_in_files(anatomy))}

    def resize(self, old: Layout, new: Layout) -> None:
        for bias in self.biases:
            bias.resize_(new)  # type: ignore[operator]


class FixedBias(AtLogits):
    """A bias in each block that nothing learns."""

    here: Tensor  # empty, goes where the model goes

    def __init__(self, wish: Wish):
        super().__init__(wish)
        assert wish.kind.fixed_bias is not None
        self.make = wish.kind.fixed_bias
        self.make(wish.anatomy.layout.grid, wish.anatomy.num_heads, 0, 1)  # raises here, before anything changes
        self.register_buffer("here", wish.like.new_empty(0), persistent=False)

    def each(self, request: PositionRequest) -> Iterator[Tensor]:
        """The bias of each block, (1, H, N, N); none where a prefix token takes part."""
        anatomy = request.anatomy
        grid, prefix, layers = request.grid or anatomy.layout.grid, anatomy.layout.num_prefix, len(anatomy.blocks)
        for layer in range(layers)[: request.count]:
            bias_Hnn = constant(self.make, self.here.device, grid, anatomy.num_heads, layer, layers)
            yield F.pad(bias_Hnn, (prefix, 0, prefix, 0))[None]


class Rotary(Way):
    """Queries and keys are turned behind the host's modules that make or norm them."""

    here: Tensor  # empty, goes where the model goes

    computes_positions, mixin, site = True, Rotating, "queries and keys"

    def __init__(self, wish: Wish):
        super().__init__(wish)
        anatomy, like = wish.anatomy, wish.like
        first: Any = anatomy.root.get_submodule(self.owners_in_files(anatomy)[0])
        self.head_width = getattr(first, "head_dim", anatomy.width // anatomy.num_heads)
        axial(self.head_width)  # raises here, before anything changes
        self.register_buffer("here", like.new_empty(0), persistent=False)
        self.learned = wish.kind.rotary == "mixed"
        for layer in range(len(anatomy.blocks) if self.learned else 0):
            start = mixed(self.head_width, anatomy.num_heads).to(device=like.device, dtype=like.dtype)
            self.register_parameter(f"frequencies_{layer}", nn.Parameter(start))
        self.jitter: Jitter | None = None  # of places in training, for each forward anew
        self.draw_5: Tensor | None = None

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        query = f"{anatomy.attention}.{anatomy.queries_keys[0]}"
        return [f"{path}.{query}".rpartition(".")[0] for path in anatomy.blocks]

    def taken_over(self, anatomy: Anatomy) -> tuple[str, ...]:
        return tuple(path.rpartition(".")[2] for path in anatomy.queries_keys)

    def each(self, request: PositionRequest) -> Iterator[Tensor]:
        """Cosine and sine for each block, (2, H, N, d / 2) or alike for all heads."""
        anatomy, device = request.anatomy, self.here.device
        grid = request.grid or anatomy.layout.grid
        place_2n = constant(patch_coordinates, device, grid)
        if self.training and self.jitter is not None:
            if self.draw_5 is None or not in_backward():  # activations are computed again with the same places
                self.draw_5 = 2 * torch.rand(5, device=device) - 1
            place_2n = jittered(place_2n, grid, self.draw_5, self.jitter)
        cos_sin: Tensor | None = None
        for layer in range(len(anatomy.blocks))[: request.count]:
            if self.learned:
                cos_sin = rotation(self.get_parameter(f"frequencies_{layer}"), place_2n, anatomy.layout.num_prefix)
            elif cos_sin is None:
                frequencies = constant(axial, device, self.head_width)
                cos_sin = rotation(frequencies, place_2n, anatomy.layout.num_prefix)
            yield cos_sin

    def fold(self, link: Link) -> Way:
        self.jitter = None
        return Folded(self, link, link.compute(link.root, None), "folded_rotation")

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        owners = enumerate(self.owners_in_files(anatomy))
        return {f"lape.frequencies_{layer}": f"{owner}.rotary_frequencies" for layer, owner in owners if self.learned}


class HostBias(Way):
    """The host's own relative bias: nothing new, or with join `LaPE`, a LayerNorm over its rows."""

    joins_host_bias, site = True, "attention biases"

    def __init__(self, wish: Wish):
        super().__init__(wish)
        self.block_biases = wish.anatomy.own_bias if wish.join.normalised else ()
        self.norms = nn.ModuleList()  # eps as in the reference
        for bias in self.block_biases:
            like = next(owner_and_name(wish.anatomy.root, bias.method)[0].parameters())
            self.norms.append(nn.LayerNorm(bias.keys, device=like.device, dtype=like.dtype))

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        return [bias.method.rpartition(".")[0] for bias in self.block_biases]

    def enter(self, link: Link) -> None:
        for place, bias in enumerate(self.block_biases):
            owner, method = owner_and_name(link.root, bias.method)
            join_module(owner, NormalisedBias, link, method, place=place)
        if self.block_biases:
            join_module(link.root, Spanning, link, *entry_methods(link.root))
        super().enter(link)

    def forward(self, place: int, host_bias: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """The host's bias of one block, its rows normalised."""
        bias = self.block_biases[place]
        return normalise(host_bias(), self.norms[place], bias.num_prefix, bias.keys)

    def fold(self, link: Link) -> Way:
        if not self.block_biases:
            return super().fold(link)
        biases = [getattr(*owner_and_name(link.root, bias.method))(*bias.args) for bias in self.block_biases]
        return Folded(self, link, biases, "folded_bias")

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {f"lape.norms.{i}": f"{path}.pe_norm" for i, path in enumerate(self.owners_in_files(anatomy))}

    def check_resize(self) -> None:
        if self.block_biases:
            raise LapeError("LN' over the rows of the host's bias has one size: set the input size before lape.apply_")


class Generated(Way):
    """Position is made of the tokens that leave block 0, or each of the first blocks."""

    mixin, site = Generating, "block outputs"

    def __init__(self, wish: Wish):
        super().__init__(wish)
        count = wish.kind.generators
        self.names = ["peg"] if count == 1 else [f"peg_{block}" for block in range(count)]
        for name in self.names:
            self.add_module(name, PEG(wish.anatomy.width, wish.like))

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        return list(anatomy.blocks[: len(self.names)])

    def forward(self, x: Tensor, link: Link, place: int) -> Tensor:  # type: ignore[override]
        """x, as it leaves a block, with the position of its patches."""
        layout, peg = link.anatomy.layout, cast(PEG, self._modules[self.names[place]])
        if link.anatomy.maps:
            return peg.add_to_map(x)
        return peg.add_to_tokens(x, link.grid_of(x) or layout.grid, layout.num_prefix)

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        owners = zip(self.names, self.owners_in_files(anatomy), strict=True)
        return {f"lape.{name}": f"{owner}.peg" for name, owner in owners}


class Folded(Way):
    """What another way computed from parameters alone, as one constant a place, for one grid."""

    lazy = False

    def __init__(self, way: Way, link: Link, constants: Sequence[Tensor], name: str):
        nn.Module.__init__(self)
        of_its_class = ("site", "uses_table", "joins_host_bias")
        for attribute in ("join", "pe", "new", "warm_start", "pe_norm", "std", "factory", "hides_table", *of_its_class):
            setattr(self, attribute, getattr(way, attribute))
        self.folded, self.name = True, name
        self._places, self._homes = way.places(link.anatomy), way.owners_in_files(link.anatomy)
        for place, tensor in enumerate(constants):
            self.register_buffer(f"constant_{place}", tensor.detach().clone())

    def places(self, anatomy: Anatomy) -> list[str]:
        return self._places

    def owners_in_files(self, anatomy: Anatomy) -> list[str]:
        return self._homes  # pickled under this name

    def forward(self, request_or_place: Any, _host_bias: Any = None) -> Any:
        """All constants; or, of a host's own bias, that of one place."""
        if isinstance(request_or_place, int):
            return self._buffers[f"constant_{request_or_place}"]
        request: PositionRequest = request_or_place
        if request.grid is not None:
            grid = request.anatomy.layout.grid
            raise LapeError(f"the model is folded for the grid {grid}, not {request.grid}: give images of its size")
        return tuple(self._buffers.values())

    def file_names(self, anatomy: Anatomy) -> dict[str, str]:
        return {f"lape.constant_{i}": f"{owner}.{self.name}" for i, owner in enumerate(self._homes)}

    def check_resize(self) -> None:
        raise LapeError("a folded model has one size: set the input size before lape.fold_")


def way_for(wish: Wish) -> Way:
    """The way that a wish needs, with all that it adds."""
    kind, anatomy, site = wish.kind, wish.anatomy, wish.join.site
    order: list[tuple[bool, type[Way]]] = [
        (kind.untouched, Untouched),
        (kind.conditional, Generated),
        (kind.fixed_bias is not None, FixedBias),
        (bool(kind.rotary), Rotary),
        (kind.is_bias and bool(anatomy.own_bias), HostBias),
        (kind.is_bias, NewBias),
        (not kind.is_table, Way),
        (site == "norm", BesideNorms),
        (site == "block", AtBlocks),
        (anatomy.table_slot is None and anatomy.input is not None, BehindStem),
        (True, AtInput),
    ]
    return next(way for applies, way in order if applies)(wish)


def way_of(link: Link) -> Way:
    """The way in which a model is joined; inside of what an adapter or a parallel wrapper puts around `root.lape`."""
    return next(module for module in link.root._modules["lape"].modules() if isinstance(module, Way))  # type: ignore


def entry_methods(root: nn.Module) -> list[str]:
    """The methods by which a forward of this model may begin."""
    entries = ("forward", "forward_features", "forward_intermediates")
    return [name for name in entries if callable(getattr(type(root), name, None))]


def adding_methods(root: nn.Module, anatomy: Anatomy) -> list[str]:
    """Paths of the methods that may add the host's table: its library's, and what a user's subclass overrides."""
    entries = entry_methods(root)
    modules = [next(cls for cls in type(root).__mro__ if name in vars(cls)).__module__ for name in entries]
    overrides = [n for n, module in zip(entries, modules, strict=True) if module.split(".")[0] not in _LIBRARIES]
    return list(dict.fromkeys([*anatomy.adds, *overrides])) or entries


_LIBRARIES = ("timm", "transformers", "torchvision", "lape")


def hide(link: Link, path: str) -> None:
    """The host's code sees nothing under this path while it adds its position."""
    owner, name = owner_and_name(link.root, path)
    join_module(owner, Slot, link, name)
    scopes = [owner_and_name(link.root, scope) for scope in adding_methods(link.root, link.anatomy)]
    for adder in dict.fromkeys(module for module, _ in scopes):
        join_module(adder, Adding, link, *(method for module, method in scopes if module is adder))


def set_aside(link: Link, path: str) -> None:
    """A parameter of the host that has no part any more stays under its key, as a buffer."""
    owner, name = owner_and_name(link.root, path)
    link.orders.setdefault(path.rpartition(".")[0], tuple(owner._parameters))
    parameter: Any = owner._parameters.pop(name)
    link.replaced[path] = parameter
    owner.register_buffer(name, parameter.detach())


def check_put_back(link: Link) -> None:
    """Raises LapeError when what `put_back` needs is not there."""
    device = next((p.device for p in link.root.parameters()), torch.device("meta"))
    for path, parameter in link.replaced.items():
        owner, name = owner_and_name(link.root, path)
        if name not in owner._parameters and name not in owner._buffers:
            raise LapeError(f"{path} became another kind of attribute after lape.apply_ (pruning?): undo that first")
        if name not in owner._buffers and parameter.is_meta and device.type != "meta":
            raise LapeError(f"the host's own {path} never got values (meta device): it can't be put back")


def put_back(link: Link) -> None:
    """Undoes what `set_aside` and a new table did to the host's parameters."""
    device = next((p.device for p in link.root.parameters()), None)
    for path, parameter in link.replaced.items():
        owner, name = owner_and_name(link.root, path)
        idle = owner._buffers.pop(name, None)
        values = idle.detach() if idle is not None else parameter.data.to(device)
        if parameter.is_meta:  # it takes no values
            parameter = nn.Parameter(values, requires_grad=parameter.requires_grad)
        parameter.data = values
        owner._parameters[name] = parameter
    for path, order in link.orders.items():
        parameters = link.root.get_submodule(path)._parameters
        for name in order:
            parameters[name] = parameters.pop(name)


def raw_positions(anatomy: Anatomy, merge: Merge, p_1RD: Tensor) -> Iterator[Tensor]:
    """The table as each block gets it, without norms."""
    for layer in range(len(anatomy.blocks)):
        p_1RD = merge(layer, p_1RD)
        yield p_1RD


def norm_like(token_norm: nn.Module, width: int, like: Tensor, pe_norm: str) -> nn.Module:
    """LN'_l: a LayerNorm with the eps of the token norm and an affine of its own (2 D parameters), or what replaces it.

    torch's RMSNorm may have no eps of its own (None: that of the dtype); LN' then has torch's default, 1e-5.
    """
    eps: Any = getattr(token_norm, "eps", getattr(token_norm, "variance_epsilon", None))  # the second is transformers'
    return PE_NORMS[pe_norm].build(width, 1e-5 if eps is None else eps, like)
