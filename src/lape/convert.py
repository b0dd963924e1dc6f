"""Put a join into a model, take it out, fold it, and say what was done: plan -> validate -> mutate -> report.

A call that raises has changed nothing: everything that can fail happens before the first `setattr`.
Shape legend: B batch, N tokens, R rows of the position table, D width, L layers, H heads, n patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lape.bias import ConstantBias, FoldedBias, NormalisedBias, PositionalAttention, PositionBias
from lape.conditional import PositionGenerator
from lape.errors import LapeError, UnsupportedModelError
from lape.grids import Grids, GridWatch, Places, ShuffleWatch
from lape.handover import HandOver
from lape.hosts import Anatomy, class_name, find_host, host_named, host_of_library
from lape.hosts.base import check_module
from lape.joined import FoldedNorm, FoldedPicked, PositionalBlock, PositionSource
from lape.joins import JOINS, Join, check_combination, join_named
from lape.norm import PositionalNorm
from lape.position import KINDS, Grid, Kind, Layout, PositionTable, kind_named
from lape.stages import Merged, PositionalInput

TABLES = "lape_position"  # name under which a converted model holds its position tables
NORMS = "lape_pe_norm"  # and its LN'_l, each under the path of its block
RECORD = "_lape"  # attribute of a converted model: its Conversion

Size = int | tuple[int, int]
View = Literal["received", "seen", "unbiased"]
Site = tuple[str, str, nn.Module]  # path of a host module, the name it gets in its wrapper, the wrapper


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


@dataclass(frozen=True)
class Description:
    """What was done to a model. `str()` is one readable line."""

    host: str
    join: str
    pe: str
    joined: int  # blocks that receive a position of their own
    last_norm: bool  # whether the norm before pooling receives one too
    blocks: int
    input_addition: bool  # whether the host still adds a table to its patch tokens
    grid: Grid
    prefix_tokens: int
    positioned_prefix_tokens: int  # those that own a row of the table
    parameters: int  # all of the model
    position_parameters: int  # tables, biases and PE norms
    warm_start: bool
    folded: bool
    beside: str | None = None  # position inside the host's attention, which was left alone

    def __str__(self) -> str:
        site = {"input": "blocks", "block": "block inputs", "norm": "attention norms"}[JOINS[self.join].site]
        site = "attention biases" if KINDS[self.pe].is_bias else site
        site = "block outputs" if KINDS[self.pe].conditional else site
        if KINDS[self.pe].untouched:
            return f"{self.host}: join={self.join} pe={self.pe}, left as it is, {self.parameters:,} parameters"
        bare = self.prefix_tokens - self.positioned_prefix_tokens
        return (
            f"{self.host}: join={self.join} pe={self.pe}{' (folded)' if self.folded else ''}"
            f"{' (warm start, gated)' if self.warm_start else ''}, "
            f"{self.joined}/{self.blocks} {site}{' and the last norm' if self.last_norm else ''} joined, "
            f"input addition {'on' if self.input_addition else 'off'}, "
            f"grid {self.grid[0]} x {self.grid[1]}, {self.prefix_tokens} prefix tokens"
            f"{f' ({bare} without a position)' if bare else ''}, "
            f"{f'{self.beside} kept, ' if self.beside else ''}"
            f"{self.parameters:,} parameters ({self.position_parameters:,} for position)"
        )


# ------------------------------------------------------------------------------------------------ convert


def apply_(model: nn.Module, join: str = "LaPE", pe: str | None = None, *, warm_start: bool = False) -> nn.Module:
    """Joins position and tokens the given way, in place, and returns the model.

    Args:
        model: a supported Vision Transformer, or a module that holds exactly one (see `lape.hosts()`).
        join: "basic", "share", "unshare", "LaPE-sharing", "LaPE", or, for models that pool their patches, "PVG" or
            "MPVG"; in any case.
        pe: None keeps the model's own position table and its values, or, where there is none, its relative bias; the
            name of a kind ("learnable", "1D_sin", "2D_sin", "1D_RPE", "2D_RPE", "PEG", "none") builds a new one in its
            place. "2D_RPE" is the model's own relative bias, values and all, where each block has one. "own", with
            join="basic", leaves any model as it is and only remembers that: a rival that is trained and saved like the
            others.
        warm_start: for a pretrained model and a join with LN'_l: the model's function is the host's at first. Its input
            addition stays, and attention sees LN_l(x) + g_l P_(l+1) with a learned gate g_l = 0 a layer, so that
            fine-tuning decides how much each layer takes. Folding turns the gates into constants too.

    Raises:
        UnsupportedModelError: the model is not supported; the message says why and how to register it.
        LapeError: unknown names, a meaningless combination, or a model that is converted already.
    The model is unchanged, bit for bit, when it raises. Source: Yu et al., ICCV 2023, Eq. 8-11 and Table 7.
    """
    chosen_join = join_named(join)
    chosen_kind = None if pe is None else kind_named(pe)
    if _record(model) is not None:
        raise LapeError(f"the model is converted already ({describe(model)}): call lape.remove_(model) first")
    if chosen_kind is not None and chosen_kind.untouched:
        check_combination(chosen_join, chosen_kind)
        if warm_start:
            raise LapeError(f"warm_start=True with pe={pe!r}: there is no join to open; leave warm_start out")
        return _leave(model)
    host, root = find_host(model)
    anatomy = host.examine(root)
    kind = chosen_kind or _own_kind(anatomy)
    check_combination(chosen_join, kind)
    if warm_start and not (chosen_join.normalised and chosen_kind is None):
        raise LapeError(
            f"warm_start=True with join={chosen_join.name!r} and pe={pe!r}: it keeps the model's own table and opens a "
            "gate behind each LN'; use join='LaPE' or 'LaPE-sharing' and pe=None"
        )
    _check_host(host.name, anatomy, chosen_join, kind, new=chosen_kind is not None)
    _check_pooling(host.name, anatomy, chosen_join)
    if kind.is_bias and anatomy.add_bias is None and not anatomy.own_bias:
        raise UnsupportedModelError(
            f"attention of {host.name} takes no mask per head: pe={kind.name!r} cannot be added"
        )
    wrappers, tables, watch = _build(anatomy, chosen_join, kind, new=chosen_kind is not None, gated=warm_start)
    conversion = Conversion(
        host=host.name,
        join=chosen_join.name,
        pe=kind.name,
        anatomy=anatomy,
        sites=tuple((path, wrapped) for path, wrapped, _ in wrappers),
        slot_order=tuple(_slot(anatomy)[0]._parameters),
        warm_start=warm_start,
    )
    _mutate(conversion, chosen_join, wrappers, tables, watch, new=chosen_kind is not None)
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = _SavePretrained(model)  # type: ignore[assignment]
    return model


def _leave(model: nn.Module) -> nn.Module:
    """Remembers a model without a change. What is known of it is that of its host, where it has one."""
    try:
        host, root = find_host(model)
        name, anatomy = host.name, host.examine(root)
    except UnsupportedModelError:
        name, root = class_name(type(model)), model
        anatomy = Anatomy(root, (), "", "", None, None, Layout((0, 0), 0), (1, 1), width=0, num_heads=0)
    order = tuple(_slot(anatomy)[0]._parameters)
    setattr(root, RECORD, Conversion(name, "basic", "own", anatomy, sites=(), slot_order=order))
    return model


def _own_kind(anatomy: Anatomy) -> Kind:
    if anatomy.table is not None:
        return KINDS[anatomy.own_kind]
    if anatomy.own_bias:
        return KINDS["2D_RPE"]
    has = f", its {anatomy.beside} stays as it is" if anatomy.beside else ""
    if anatomy.encoder is not None:
        has = f", {anatomy.encoder} computes its position ({class_name(type(_encoder(anatomy)))})"
    raise LapeError(f"the model has no position table of its own{has}: name a kind, for instance pe='learnable'")


def _check_host(name: str, anatomy: Anatomy, join: Join, kind: Kind, *, new: bool) -> None:
    """Raises LapeError for a kind that cannot be what its name says in this model."""
    if kind.conditional and anatomy.shuffle is not None:
        raise LapeError(
            f"pe={kind.name!r}: {name} leaves patches out and shuffles the others, so no patch has neighbours to look "
            "at: use pe='learnable'"
        )
    if anatomy.own_bias and kind.name == "2D_RPE":
        return
    if anatomy.beside and not kind.is_table and not kind.conditional:
        means = "a second bias would join it" if kind.is_bias else "the model would not be without a position"
        use = "pe='learnable', or pe='2D_RPE' for its own" if anatomy.own_bias else "pe='learnable'"
        raise LapeError(f"pe={kind.name!r}: {name} keeps its {anatomy.beside}, {means}: use {use}")
    if new and kind.is_table and join.at_input and anatomy.table_slot is None and anatomy.input is None:
        raise LapeError(f"join={join.name!r}: {name} has no place where it adds a table to its tokens: use join='LaPE'")


def _check_pooling(name: str, anatomy: Anatomy, join: Join) -> None:
    """Raises UnsupportedModelError where PVG or MPVG would meet a class token or find no last norm."""
    if not join.needs_pooling:
        return
    if not anatomy.pooled:
        raise UnsupportedModelError(
            f"join={join.name!r} is for models whose head pools the patches, this one ({name}) reads a class token or "
            "its pooling is not known: use join='LaPE', or for timm create it with class_token=False, "
            "global_pool='avg', fc_norm=False"
        )
    if join.at_last and anatomy.last_norm is None:
        raise UnsupportedModelError(
            f"join={join.name!r} puts position beside the last norm, and this model ({name}) has none before it pools: "
            "for timm create it with fc_norm=False, or use join='PVG'"
        )


def _encoder(anatomy: Anatomy) -> nn.Module:
    assert anatomy.encoder is not None
    return anatomy.root.get_submodule(anatomy.encoder)


def _slot(anatomy: Anatomy) -> tuple[nn.Module, str]:
    """The module that holds the host's table, and the table's name in it; an empty name where it cannot have one."""
    path, _, name = (anatomy.table_slot or "").rpartition(".")
    return anatomy.root.get_submodule(path), name


def _method(anatomy: Anatomy, path: str) -> tuple[nn.Module, str]:
    """The module that a method belongs to, and the method's name."""
    owner, _, name = path.rpartition(".")
    return anatomy.root.get_submodule(owner), name


def _own_bias_norms(anatomy: Anatomy) -> list[NormalisedBias]:
    """What stands in for the methods that compute the host's own bias: LN' over its rows, eps as in the reference."""
    found = []
    for own in anatomy.own_bias:
        owner, method = _method(anatomy, own.method)
        like = next(owner.parameters())
        found.append(NormalisedBias(owner, method, own, nn.LayerNorm(own.keys, device=like.device, dtype=like.dtype)))
    return found


def _own_table(anatomy: Anatomy) -> nn.Parameter | None:
    owner, name = _slot(anatomy)
    return owner._parameters.get(name)


def _build(
    anatomy: Anatomy, join: Join, kind: Kind, *, new: bool, gated: bool
) -> tuple[list[Site], list[PositionTable], GridWatch | None]:
    """The modules of a conversion: (path, name of the wrapped module in it, wrapper), tables, and the watch."""
    root, layout = anatomy.root, anatomy.layout
    blocks = [root.get_submodule(path) for path in anatomy.blocks]
    token_norms = [block.get_submodule(anatomy.norm) for block in blocks]
    like = next(token_norms[0].parameters(), next(root.parameters()))
    grids, watch = None, None
    if anatomy.patch_embed is not None and (join.site != "input" or kind.is_bias or kind.conditional):
        grids = Places() if anatomy.shuffle else Grids()
        embed = root.get_submodule(anatomy.patch_embed)
        watch = GridWatch(embed, grids, anatomy.patch_size, anatomy.pads, anatomy.grid_from)
    if kind.is_bias and anatomy.own_bias:  # nothing new but LN': see _own_bias_norms
        return [], [], None
    if kind.is_bias:
        assert anatomy.add_bias is not None
        biases: list[Site] = [
            (
                f"{path}.{anatomy.attention}",
                "host_attention",
                PositionalAttention(
                    block.get_submodule(anatomy.attention),
                    PositionBias(layout, anatomy.num_heads, kind.bias_axes, normalised=join.normalised, like=like),
                    layout,
                    grids,
                    anatomy.add_bias,
                ),
            )
            for path, block in zip(anatomy.blocks, blocks, strict=True)
        ]
        return biases, [], watch
    if kind.conditional:
        generator = PositionGenerator(blocks[0], anatomy.width, layout, grids, like)
        return [(anatomy.blocks[0], generator.inner, generator)], [], watch
    if not kind.is_table:
        return [], [], None

    def table(layer: int) -> PositionTable:
        own = _own_table(anatomy)
        layout, width = anatomy.at(layer)
        if not new and own is not None and layer == 0:
            return PositionTable(own, layout)
        if new or own is None:
            assert kind.build is not None
            std = {} if kind.frozen or anatomy.table_std is None else {"std": anatomy.table_std}
            values = kind.build(layout, width, **std).to(device=like.device, dtype=like.dtype)
            learns = not kind.frozen
        else:  # a copy for each block, as the host's table reaches it
            values = _raw_sources(anatomy, PositionTable(own, anatomy.layout))[layer].position().detach().clone()
            learns = own.requires_grad
        values = values if own is None or anatomy.stages else values.reshape(own.shape)
        return PositionTable(nn.Parameter(values, requires_grad=learns), layout)

    tables = [table(layer) for layer in range(len(blocks) if join.table_per_block else 1)]
    wrappers: list[Site] = []
    if join.site == "input":
        if anatomy.table_slot is None and anatomy.input is not None:
            added = PositionalInput(root.get_submodule(anatomy.input), tables[0], layout, None)
            wrappers.append((anatomy.input, "host_patch_embed", added))
        return wrappers, tables, None
    raw = _raw_sources(anatomy, tables[0])
    if join.site == "block":
        for layer, (path, block) in enumerate(zip(anatomy.blocks, blocks, strict=True)):
            own_source = tables[layer] if join.table_per_block else raw[layer]
            wrappers.append((path, "host_block", PositionalBlock(block, own_source, anatomy.at(layer)[0], grids)))
        return wrappers, tables, watch

    def norm(path: str, source: PositionSource, layer: int) -> PositionalNorm:
        token_norm = root.get_submodule(path)
        layout, width = anatomy.at(layer)
        pe_norm = _norm_like(token_norm, width, like)
        wrapper = PositionalNorm(token_norm, pe_norm, source, layout, grids, gated=gated)
        wrappers.append((path, "token_norm", wrapper))
        return wrapper

    source: PositionSource = tables[0]
    for layer, path in list(enumerate(anatomy.blocks))[join.first :]:
        source = _entered(anatomy, layer, source) if join.chained else raw[layer]
        wrapper = norm(f"{path}.{anatomy.norm}", source, layer)
        if join.chained and path != anatomy.blocks[-1]:
            source = HandOver(wrapper)
    if join.at_last:
        assert anatomy.last_norm is not None
        norm(anatomy.last_norm, raw[-1], len(blocks) - 1)
    return wrappers, tables, watch


def _entered(anatomy: Anatomy, layer: int, source: PositionSource) -> PositionSource:
    """The source as a block gets it: merged when a stage begins there."""
    for number, stage in enumerate(anatomy.stages):
        if stage.merging is not None and anatomy.layers_of(number).start == layer:
            merging = anatomy.root.get_submodule(stage.merging)
            return Merged(merging, source, anatomy.stages[number - 1].grid, stage.merges_map)
    return source


def _raw_sources(anatomy: Anatomy, table: PositionSource) -> list[PositionSource]:
    """The table as each block gets it, without norms."""
    found = [table]
    for layer in range(1, len(anatomy.blocks)):
        found.append(_entered(anatomy, layer, found[-1]))
    return found


def norm_home(anatomy: Anatomy, path: str) -> str:
    """The module to which the LN' of the norm at `path` is counted: its block, or for the last norm the norm itself."""
    block = path.removesuffix(f".{anatomy.norm}")
    return block if block in anatomy.blocks else path


def _norm_like(token_norm: nn.Module, width: int, like: Tensor) -> nn.LayerNorm:
    """LN'_l: a LayerNorm with the eps of the token norm and an affine of its own (2 D parameters).

    torch's RMSNorm may have no eps of its own (None: that of the dtype); LN' then has torch's default, 1e-5.
    """
    eps = 1e-5 if token_norm.eps is None else token_norm.eps
    return nn.LayerNorm(width, eps=eps, device=like.device, dtype=like.dtype)  # type: ignore[arg-type]


def _mutate(
    conversion: Conversion,
    join: Join,
    wrappers: list[Site],
    tables: list[PositionTable],
    watch: GridWatch | None,
    *,
    new: bool,
) -> None:
    """The only part of `apply_` that changes the model; nothing in it can be wrong use."""
    anatomy = conversion.anatomy
    root = anatomy.root
    owner, name = _slot(anatomy)
    before = {id(parameter) for parameter in root.parameters()}
    own = _own_table(anatomy)
    if new or join.site != "input":
        if new:
            conversion.replaced_table = own
        if join.at_input and tables and anatomy.table_slot is not None:
            owner.__dict__.pop(name, None)  # a host without a table may hold None there, which would hide it
            owner._parameters[name] = tables[0].pos_embed  # in place: the order of parameters stays the host's
        elif own is not None and not conversion.warm_start:
            # Zeros in the host's slot switch its input addition off, whatever its forward looks like.
            delattr(owner, name)
            owner.register_buffer(name, torch.zeros_like(own, requires_grad=False), persistent=False)
    if anatomy.encoder is not None and new:
        conversion.replaced_encoder = _encoder(anatomy)
        _set_submodule(root, anatomy.encoder, None)
    if tables and (join.site != "input" or wrappers):
        root.add_module(TABLES, nn.ModuleList(tables))
    for path, _, wrapper in wrappers:
        _set_submodule(root, path, wrapper)
    if join.normalised and tables:
        norms = {norm_home(anatomy, path): w.pe_norm for path, _, w in wrappers if isinstance(w, PositionalNorm)}
        root.add_module(NORMS, _nested(norms))
    if watch is not None:
        conversion.watch = anatomy.patch_embed
        _set_submodule(root, str(anatomy.patch_embed), watch)
        if anatomy.shuffle is not None and isinstance(watch.grids, Places):
            owner, method = _method(anatomy, anatomy.shuffle)
            setattr(owner, method, ShuffleWatch(owner, method, watch.grids))
            conversion.methods = (anatomy.shuffle,)
    if conversion.joins_own_bias and join.normalised:
        biases = _own_bias_norms(anatomy)
        for bias in biases:
            setattr(bias.owner, bias.method, bias)
        root.add_module(NORMS, _nested({path: b.pe_norm for path, b in zip(anatomy.blocks, biases, strict=True)}))
        conversion.methods = tuple(own.method for own in anatomy.own_bias)
    names = {n for n, parameter in root.named_parameters() if id(parameter) not in before or n.startswith(TABLES)}
    if anatomy.table is not None:
        names.add(str(anatomy.table_slot))
    if conversion.joins_own_bias:
        theirs = {id(p) for b in anatomy.own_bias for p in _method(anatomy, b.method)[0].parameters(recurse=False)}
        names |= {n for n, p in root.named_parameters() if id(p) in theirs and "relative_position" in n}
    overrides: dict[str, Callable[..., Any]] = {"no_weight_decay": _NoWeightDecay(root, frozenset(names))}
    if hasattr(type(root), "group_matcher"):
        overrides["group_matcher"] = _GroupMatcher(root)
    if hasattr(type(root), "set_input_size"):
        overrides["set_input_size"] = _SetInputSize(root)
    for method, override in overrides.items():
        setattr(root, method, override)
    conversion.overrides = tuple(overrides)
    setattr(root, RECORD, conversion)


def _nested(modules: dict[str, nn.Module]) -> nn.Module:
    """A module that holds each of these under its dotted path."""
    top = nn.Module()
    for path, module in modules.items():
        *parents, name = path.split(".")
        node = top
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(name, module)
    return top


class _NoWeightDecay:
    """The host's `no_weight_decay()` with the position's parameters added: P, biases and PE norms are not decayed."""

    def __init__(self, root: nn.Module, names: frozenset[str]):
        self.root = root
        self.names = names

    def __call__(self) -> set[str]:
        host = getattr(type(self.root), "no_weight_decay", None)
        return set(self.names) | (set(host(self.root)) if host else set())


class _SavePretrained:
    """transformers' `save_pretrained()`, whose config.json then says how the model was converted; `lape.load` reads it.

    Weights keep the names that they have in memory, whatever earlier names the library would write, so that its own
    Trainer finds all of them when it goes on from a checkpoint.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        save = type(model).save_pretrained
        conversion = _record(model)
        if conversion is None:
            return save(model, save_directory, *args, **kwargs)
        parameters = inspect.signature(save).parameters
        given = inspect.signature(save).bind(model, save_directory, *args, **kwargs).arguments
        state = dict(given.get("state_dict") or model.state_dict())
        seen: set[int] = set()  # a table that two modules read, as in a warm start, is written under both names
        for key, tensor in state.items():
            shared = tensor.numel() > 0 and tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            state[key] = tensor.clone() if shared else tensor
        given["state_dict"] = state
        if "save_original_format" in parameters:  # transformers 5
            given["save_original_format"] = False
        given |= given.pop("kwargs", {})
        model.config.lape = conversion.record()
        try:
            return save(**given)
        finally:
            del model.config.lape


class _GroupMatcher:
    """timm's `group_matcher()` for layer-wise learning rates: tables belong to the stem, LN'_l to block l."""

    def __init__(self, root: nn.Module):
        self.root = root

    def __call__(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], float]:
        host: Any = type(self.root)
        groups = host.group_matcher(self.root, coarse)
        if callable(groups):  # a function of the name, with the stem as group 0
            return lambda name: 0 if name.startswith(TABLES) else groups(name.removeprefix(f"{NORMS}."))
        blocks = groups["blocks"] if isinstance(groups["blocks"], list) else [(groups["blocks"], None)]
        mirrored = [(rf"^{NORMS}\.{pattern.removeprefix('^')}", order) for pattern, order in blocks]
        return {**groups, "stem": f"{groups['stem']}|{TABLES}", "blocks": [*blocks, *mirrored]}


class _SetInputSize:
    """timm's `set_input_size()` with the position resampled along: tables, biases and every wrapper's layout."""

    def __init__(self, root: nn.Module):
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        conversion: Conversion = getattr(self.root, RECORD)
        if conversion.folded:
            raise LapeError("a folded model has one size: set the input size before lape.fold_")
        if conversion.joins_own_bias and JOINS[conversion.join].normalised:
            raise LapeError("LN' over the rows of the host's bias has one size: set the input size before lape.apply_")
        if conversion.anatomy.stages:
            raise LapeError("a converted model of stages has one size: set the input size before lape.apply_")
        host: Any = type(self.root)
        host.set_input_size(self.root, *args, **kwargs)
        _resize(conversion)


def _resize(conversion: Conversion) -> None:
    """Brings a conversion to the size that its host has now."""
    anatomy = conversion.anatomy
    root, old = anatomy.root, conversion.layout
    measure = host_named(conversion.host).measure
    assert measure is not None
    grid, patch_size = measure(root)
    layout = replace(old, grid=grid)
    conversion.anatomy = replace(anatomy, layout=layout, patch_size=patch_size)
    for module in list(root.modules()):
        if isinstance(module, PositionTable | PositionBias):
            module.resize_(layout)
        elif isinstance(module, GridWatch):
            module.patch_size = patch_size
        elif isinstance(module, PositionalNorm | PositionalBlock | PositionalAttention | PositionGenerator):
            module.layout = layout
    if conversion.replaced_table is not None:
        spare = PositionTable(conversion.replaced_table, old)
        spare.resize_(layout)
        conversion.replaced_table = spare.pos_embed
    owner, name = _slot(anatomy)
    slot = owner._parameters.get(name)
    adds = conversion.adds_at_input
    if adds and TABLES in root._modules:  # host and chain read one table
        assert slot is not None
        root.get_submodule(f"{TABLES}.0").pos_embed = slot
    elif anatomy.table is not None and slot is not None and not adds:
        delattr(owner, name)  # the host has made a parameter of the zeros in its slot
        owner.register_buffer(name, torch.zeros_like(slot, requires_grad=False), persistent=False)


def _set_submodule(root: nn.Module, path: str, module: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def remove_(model: nn.Module) -> nn.Module:
    """Takes a join out again, in place, and returns the model: the host's classes, keys, order and numbers.

    A table that was kept returns with its present values; one that was replaced by another kind returns as it was.
    Raises LapeError when the model is not converted or is folded.
    """
    conversion = conversion_of(model)
    if conversion.folded:
        raise LapeError("a folded model cannot be turned back: keep a copy.deepcopy(model) from before lape.fold_")
    root = conversion.anatomy.root
    for path, wrapped in reversed(conversion.sites):
        _set_submodule(root, path, root.get_submodule(path).get_submodule(wrapped))
    if conversion.watch is not None:
        _set_submodule(root, conversion.watch, root.get_submodule(conversion.watch).get_submodule("host_patch_embed"))
    for path in conversion.methods:
        delattr(*_method(conversion.anatomy, path))
    if conversion.replaced_encoder is not None:
        assert conversion.anatomy.encoder is not None
        encoder = conversion.replaced_encoder.to(next(root.parameters()).device)
        _set_submodule(root, conversion.anatomy.encoder, encoder)
    owner, name = _slot(conversion.anatomy)
    if conversion.anatomy.table is None:  # the host had no table: its slot is empty again
        if name in owner._parameters:
            owner._parameters[name] = None
            if name not in conversion.slot_order:  # a plain attribute, as it was
                del owner._parameters[name]
                setattr(owner, name, None)
    else:
        table = conversion.replaced_table
        if table is None and TABLES in root._modules:
            table = root.get_parameter(f"{TABLES}.0.pos_embed")
        if table is not None:
            table.data = table.data.to(next(root.parameters()).device)
            if name in owner._buffers:
                delattr(owner, name)
            owner.register_parameter(name, table)
            _reorder(owner._parameters, conversion.slot_order)
    for name in (TABLES, NORMS):
        root._modules.pop(name, None)
    for attribute in (*conversion.overrides, RECORD):
        delattr(root, attribute)
    model.__dict__.pop("save_pretrained", None)
    return model


def _reorder(parameters: dict[str, Any], order: tuple[str, ...]) -> None:
    for name in order:
        parameters[name] = parameters.pop(name)


def fold_(model: nn.Module, size: Size | None = None) -> nn.Module:
    """Replaces everything that is computed from parameters alone by constants, in place; returns the model.

    The chain of LayerNorms is evaluated once (by `positions`) and each layer keeps its result, so that a folded LaPE
    costs one addition a layer; a relative position bias is gathered and normalised once. `basic`, `share` and
    `unshare` compute nothing and stay as they are. Folding is one way and for one image size.

    Raises LapeError when the model is not converted, is folded already, has another grid than `size` asks for, or a
    position that no constant can stand for (pe="PEG", "own").
    """
    conversion = conversion_of(model)
    if conversion.folded:
        raise LapeError("the model is folded already")
    kind = KINDS[conversion.pe]
    if kind.conditional or kind.untouched:
        raise LapeError(
            f"pe={kind.name!r} cannot be folded: {kind.missing}, so no constant takes its place; use the model as it "
            "is (lape export --no-fold)"
        )
    grid = _grid_for(conversion, size)
    if grid not in (None, conversion.layout.grid):
        raise LapeError(
            f"size={size!r} is a grid of {grid}, the model's is {conversion.layout.grid}: "
            "create the model with that img_size, then load and fold it"
        )
    root = conversion.anatomy.root
    with torch.no_grad():
        constants = _at_sites(conversion, None) if KINDS[conversion.pe].is_table and conversion.sites else []
        for layer, (path, _) in enumerate(conversion.sites):
            site = root.get_submodule(path)
            if isinstance(site, PositionalNorm):
                p_1ND = conversion.layout.spread(constants[layer][0])
                _set_submodule(root, path, _folded(site, p_1ND.clone()))
            elif isinstance(site, PositionalAttention):
                site.position_bias = FoldedBias(site.position_bias().clone())
        if conversion.joins_own_bias:
            for path in conversion.methods:
                owner, method = _method(conversion.anatomy, path)
                own: NormalisedBias = getattr(owner, method)
                owner.register_buffer("folded_bias", own(*own.own.args).clone())
                setattr(owner, method, ConstantBias(owner))
    if JOINS[conversion.join].normalised:
        for name in (TABLES, NORMS):
            root._modules.pop(name, None)
    conversion.folded = True
    return model


def _folded(site: PositionalNorm, position_1ND: Tensor) -> FoldedNorm:
    if isinstance(site.grids, Places):
        return FoldedPicked(site.token_norm, position_1ND, site.layout, site.grids)
    return FoldedNorm(site.token_norm, position_1ND)


# ------------------------------------------------------------------------------------------------ look


def _record(model: nn.Module) -> Conversion | None:
    check_module(model)
    return next((module.__dict__[RECORD] for module in model.modules() if RECORD in module.__dict__), None)


def conversion_of(model: nn.Module) -> Conversion:
    """The record of a converted model. Raises LapeError for a model that is not converted."""
    conversion = _record(model)
    if conversion is None:
        raise LapeError(f"this {type(model).__name__} is not converted: call lape.apply_(model) first")
    return conversion


def describe(model: nn.Module) -> Description:
    """What was done to a converted model. Raises LapeError for a model that is not converted."""
    conversion = conversion_of(model)
    join, anatomy = JOINS[conversion.join], conversion.anatomy
    no_decay = getattr(anatomy.root, "no_weight_decay", None)
    undecayed = no_decay.names if isinstance(no_decay, _NoWeightDecay) else frozenset()
    own = _own_table(anatomy) is not None or (join.site == "input" and TABLES in anatomy.root._modules)
    sizes = {name: parameter.numel() for name, parameter in anatomy.root.named_parameters()}
    position_names = undecayed | ({str(anatomy.table_slot)} if own else set())
    return Description(
        host=conversion.host,
        join=conversion.join,
        pe=conversion.pe,
        joined=_num_joined(conversion),
        last_norm=join.at_last,
        blocks=len(anatomy.blocks),
        input_addition=own and (join.at_input or conversion.warm_start),
        grid=conversion.layout.grid,
        prefix_tokens=conversion.layout.num_prefix,
        positioned_prefix_tokens=conversion.layout.prefix_rows,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        position_parameters=sum(sizes.get(name, 0) for name in position_names),
        warm_start=conversion.warm_start,
        folded=conversion.folded,
        beside=None if conversion.joins_own_bias else anatomy.beside,
    )


def _num_joined(conversion: Conversion) -> int:
    """Blocks that receive a position of their own."""
    if conversion.joins_own_bias:
        return len(conversion.methods)
    blocks = [path for path, wrapped in conversion.sites if wrapped != "host_patch_embed"]
    return len(blocks) - JOINS[conversion.join].at_last


def grid(model: nn.Module) -> Grid:
    """(rows, columns) of patches of a converted model. Raises LapeError where its parts are not known (pe="own")."""
    return _known(conversion_of(model)).layout.grid


def num_prefix_tokens(model: nn.Module) -> int:
    """Tokens before the first patch (class, distillation, registers) of a converted model; raises as `grid`."""
    return _known(conversion_of(model)).layout.num_prefix


def _known(conversion: Conversion) -> Conversion:
    if not conversion.anatomy.blocks:
        raise LapeError(f"pe={conversion.pe!r}: a {conversion.host} was left as it is, its parts are not known here")
    return conversion


def _grid_for(conversion: Conversion, size: Size | None) -> Grid | None:
    """The grid of an image of `size` pixels (side, or height and width); None stays None."""
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else size
    patch_height, patch_width = conversion.anatomy.patch_size
    rule = f"give pixels, a side or (height, width), in multiples of the patch of {patch_height} x {patch_width}"
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise LapeError(f"size={size!r} is no image size: {rule}")
    height, width = sides
    if min(height, width) <= 0 or height % patch_height or width % patch_width:
        raise LapeError(f"size={size!r} is no multiple of the patch: {rule}")
    return height // patch_height, width // patch_width


def positions(
    model: nn.Module, size: Size | None = None, view: View = "received", *, stage: int | None = None
) -> Tensor:
    """What each block receives as position: (L, N, D), prefix tokens first; zero for tokens that own no row.

    LaPE: P_(l+1) = LN'_l(P_l); LaPE-sharing: LN'_l(P); share and basic: P in every layer (basic adds it once, and the
    residual stream carries it on); unshare: W_l; PVG and MPVG: P in block 0, as basic, then P_l = LN'_l(P_(l-1)).
    `view="seen"` shows what attention makes of it: where position shares the token norm, LN_l of the above (the paper's
    figures: Eq. 7 without its per-token factor); a position with a norm of its own looks the same in both views.
    `view="unbiased"` is "seen" without the bias of the norm that made it, which all patches share and which hides in
    what they differ.

    Args:
        size: image size in pixels, a side or (height, width); the raw table is resampled before the chain.
        stage: for a model of stages (Swin), whose grids and widths differ: which stage, from 0.
    Raises:
        LapeError: not converted, no absolute position (RPE: use `position_bias`), a size that the patch does not
            divide, a folded model or a model of stages at another size, the bias of a norm that was folded away, or
            a stage that there is not.
    The result carries gradients, unlike that of `correlation`.
    """
    conversion = conversion_of(model)
    anatomy, join = conversion.anatomy, JOINS[conversion.join]
    if view not in get_args(View):
        raise LapeError(f"unknown view {view!r}: known are {', '.join(map(repr, get_args(View)))}")
    if not KINDS[conversion.pe].is_table:
        kind = KINDS[conversion.pe]
        fix = f"there is nothing to show, {kind.missing}"
        fix = "lape.position_bias(model) gives its bias" if kind.is_bias else fix
        raise LapeError(f"pe={conversion.pe!r} has no position per token: {fix}")
    target = _grid_for(conversion, size)
    _check_stage(anatomy, stage, target)
    if conversion.folded and join.normalised:
        if view == "unbiased":
            raise LapeError("the model is folded, the bias of its norms is gone: view='unbiased' needs it unfolded")
        if target not in (None, conversion.layout.grid):
            raise LapeError(f"the model is folded for the grid {conversion.layout.grid}, size={size!r} is {target}")
    layout = conversion.layout if target is None else replace(conversion.layout, grid=target)
    sites = _at_sites(conversion, target)
    added = _at_input(conversion, target) if join.at_input else []
    layers = []
    for layer, path in enumerate(anatomy.blocks):
        if join.normalised and layer >= join.first:  # a norm of its own has made it already
            p_1RD, bias = sites[layer - join.first]
        else:
            token_norm = getattr(anatomy.root.get_submodule(path), anatomy.norm)
            p_1RD = sites[layer][0] if join.site == "block" else added[layer]
            bias = getattr(token_norm, "bias", None)
            p_1RD = p_1RD if view == "received" else token_norm(p_1RD)
        p_1RD = p_1RD - bias if view == "unbiased" and bias is not None else p_1RD
        layers.append(p_1RD if anatomy.stages or p_1RD.shape[1] == layout.num_tokens else layout.spread(p_1RD))
    return torch.cat(layers if stage is None else layers[anatomy.layers_of(stage)])


def _check_stage(anatomy: Anatomy, stage: int | None, target: Grid | None) -> None:
    last = len(anatomy.stages) - 1
    if not anatomy.stages:
        if stage is not None:
            raise LapeError(f"stage={stage!r}: all blocks of this model have one grid, leave stage out")
        return
    if stage not in range(last + 1):
        raise LapeError(
            f"stage={stage!r}: position has another grid and width in each stage, so no one tensor or figure "
            f"holds it; name a stage from 0 to {last}: lape.positions(model, stage=0)"
        )
    if target not in (None, anatomy.layout.grid):
        raise LapeError(f"a model of stages has one size: its grid is {anatomy.layout.grid}, not {target}")


def _at_input(conversion: Conversion, grid: Grid | None) -> list[Tensor]:
    """What is added to the tokens once, as it reaches each block, (1, R, D)."""
    own = _own_table(conversion.anatomy)
    if own is None:
        own = conversion.anatomy.root.get_parameter(f"{TABLES}.0.pos_embed")
    sources = _raw_sources(conversion.anatomy, PositionTable(own, conversion.layout))
    return [source.position(grid) for source in sources]


def _at_sites(conversion: Conversion, grid: Grid | None) -> list[tuple[Tensor, Tensor | None]]:
    """What each joined place receives, (1, R, D), or (1, N, D) when folded, and the bias (D,) that is part of it."""
    received: list[tuple[Tensor, Tensor | None]] = []
    for path, _ in conversion.sites:
        site: Any = conversion.anatomy.root.get_submodule(path)
        if isinstance(site, FoldedNorm):
            received.append((site.get_buffer("folded_position"), None))
        elif isinstance(site, PositionalNorm):
            bias = site.pe_norm.get_parameter("bias")
            received.append((site.received(grid), bias if site.pe_gate is None else site.pe_gate * bias))
        else:
            received.append((site.received(grid), None))
    return received


def last_position(model: nn.Module) -> Tensor:
    """What the norm before pooling receives as position, (1, N, D): LN'(P) for MPVG. LapeError for other joins."""
    conversion = conversion_of(model)
    if not JOINS[conversion.join].at_last:
        raise LapeError(f"join={conversion.join!r} gives the last norm no position: only join='MPVG' does")
    p_1RD, _ = _at_sites(conversion, None)[-1]
    return p_1RD if conversion.folded else conversion.layout.spread(p_1RD)


def position_bias(model: nn.Module) -> Tensor:
    """The bias between patches that each block adds to its attention logits: (L, H, n, n). RPE only, else LapeError."""
    conversion = conversion_of(model)
    if not KINDS[conversion.pe].is_bias:
        kind = KINDS[conversion.pe]
        fix = "lape.positions(model) gives its positions" if kind.is_table else kind.missing
        raise LapeError(f"pe={conversion.pe!r} has no bias on attention logits: {fix}")
    if conversion.joins_own_bias:
        return _own_biases(conversion)
    prefix = conversion.layout.num_prefix
    sites = [conversion.anatomy.root.get_submodule(path) for path, _ in conversion.sites]
    return torch.cat([site.get_submodule("position_bias")()[:, :, prefix:, prefix:] for site in sites])


def _own_biases(conversion: Conversion) -> Tensor:
    found = []
    for own in conversion.anatomy.own_bias:
        owner, method = _method(conversion.anatomy, own.method)
        bias: Tensor = getattr(owner, method)(*own.args)
        found.append(bias.reshape(1, *bias.shape[-3:])[..., own.num_prefix :, own.num_prefix :])
    if len({bias.shape for bias in found}) > 1:
        raise LapeError("blocks have biases of different heads or windows: there is no one (L, H, n, n) to give")
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------ create


def create_model(
    name: str, join: str = "LaPE", pe: str | None = None, *, warm_start: bool = False, **timm_kwargs: Any
) -> nn.Module:
    """A timm model by name, converted. Remembers name and arguments for `lape.save`.

    Args:
        name: a timm model, for instance "deit_tiny_patch16_224".
        join, pe, warm_start: as for `apply_`.
        timm_kwargs: handed to `timm.create_model` (img_size, num_classes, pretrained, drop_path_rate, depth, ...).

    Raises:
        LapeError: an unknown model (the nearest names are listed), wrong arguments, or an image size that the patch
            does not divide. UnsupportedModelError: a model that cannot be converted.
    """
    join_named(join)
    if pe is not None:
        kind_named(pe)
    return build("timm", name, timm_kwargs, join, pe, warm_start=warm_start)


def build(
    library: str, name: str, kwargs: dict[str, Any], join: str, pe: str | None, *, warm_start: bool = False
) -> nn.Module:
    """A model of a library by name and arguments, converted; it remembers them for `lape.save`."""
    host = host_of_library(library)
    assert host.build is not None
    try:
        made = host.build(name, kwargs)
    except UnsupportedModelError as error:  # of a model that takes other arguments: here it need not be supported
        if pe is None or not kind_named(pe).untouched:
            raise
        raise LapeError(f"model {name!r} with {kwargs}: {error.__cause__}") from error
    model = apply_(made, join, pe, warm_start=warm_start)
    plain = {key: value for key, value in kwargs.items() if key not in ("pretrained", "checkpoint_path")}
    conversion_of(model).factory.update(library=library, name=name, kwargs=plain)
    return model
