"""Put a join into a model, take it out and fold it: plan -> validate -> mutate -> report.

A call that raises has changed nothing: everything that can fail happens before the first `setattr`.
`lape.plan` plans and validates, `lape.look` reports, `lape.record` is what a model remembers; here it is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lape.bias import ConstantBias, FoldedBias, NormalisedBias, PositionalAttention
from lape.errors import LapeError, UnsupportedModelError
from lape.grids import GridWatch, Places, ShuffleWatch
from lape.hosts import Anatomy, class_name, find_host, host_of_library
from lape.joined import FoldedNorm, FoldedPicked
from lape.joins import JOINS, Join, check_combination, join_named
from lape.layers import Size, at_sites, describe, grid_for
from lape.norm import PositionalNorm
from lape.overrides import GroupMatcher, NoWeightDecay, SavePretrained, SetInputSize
from lape.plan import Site, build_parts, check_host, check_pooling, own_bias_norms, own_kind
from lape.position import KINDS, Layout, PositionTable, kind_named
from lape.record import (
    NORMS,
    RECORD,
    TABLES,
    Conversion,
    conversion_of,
    encoder_of,
    method_of,
    norm_home,
    own_table,
    record_of,
    slot_of,
)


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
    if record_of(model) is not None:
        raise LapeError(f"the model is converted already ({describe(model)}): call lape.remove_(model) first")
    if chosen_kind is not None and chosen_kind.untouched:
        check_combination(chosen_join, chosen_kind)
        if warm_start:
            raise LapeError(f"warm_start=True with pe={pe!r}: there is no join to open; leave warm_start out")
        return _leave(model)
    host, root = find_host(model)
    anatomy = host.examine(root)
    kind = chosen_kind or own_kind(anatomy)
    check_combination(chosen_join, kind)
    if warm_start and not (chosen_join.normalised and chosen_kind is None):
        raise LapeError(
            f"warm_start=True with join={chosen_join.name!r} and pe={pe!r}: it keeps the model's own table and opens a "
            "gate behind each LN'; use join='LaPE' or 'LaPE-sharing' and pe=None"
        )
    check_host(host.name, anatomy, chosen_join, kind, new=chosen_kind is not None)
    check_pooling(host.name, anatomy, chosen_join)
    if kind.is_bias and anatomy.add_bias is None and not anatomy.own_bias:
        raise UnsupportedModelError(
            f"attention of {host.name} takes no mask per head: pe={kind.name!r} cannot be added"
        )
    wrappers, tables, watch = build_parts(anatomy, chosen_join, kind, new=chosen_kind is not None, gated=warm_start)
    conversion = Conversion(
        host=host.name,
        join=chosen_join.name,
        pe=kind.name,
        anatomy=anatomy,
        sites=tuple((path, wrapped) for path, wrapped, _ in wrappers),
        slot_order=tuple(slot_of(anatomy)[0]._parameters),
        warm_start=warm_start,
    )
    _mutate(conversion, chosen_join, wrappers, tables, watch, new=chosen_kind is not None)
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
    return model


def _leave(model: nn.Module) -> nn.Module:
    """Remembers a model without a change. What is known of it is that of its host, where it has one."""
    try:
        host, root = find_host(model)
        name, anatomy = host.name, host.examine(root)
    except UnsupportedModelError:
        name, root = class_name(type(model)), model
        anatomy = Anatomy(root, (), "", "", None, None, Layout((0, 0), 0), (1, 1), width=0, num_heads=0)
    order = tuple(slot_of(anatomy)[0]._parameters)
    setattr(root, RECORD, Conversion(name, "basic", "own", anatomy, sites=(), slot_order=order))
    return model


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
    owner, name = slot_of(anatomy)
    before = {id(parameter) for parameter in root.parameters()}
    own = own_table(anatomy)
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
        conversion.replaced_encoder = encoder_of(anatomy)
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
            owner, method = method_of(anatomy, anatomy.shuffle)
            setattr(owner, method, ShuffleWatch(owner, method, watch.grids))
            conversion.methods = (anatomy.shuffle,)
    if conversion.joins_own_bias and join.normalised:
        biases = own_bias_norms(anatomy)
        for bias in biases:
            setattr(bias.owner, bias.method, bias)
        root.add_module(NORMS, _nested({path: b.pe_norm for path, b in zip(anatomy.blocks, biases, strict=True)}))
        conversion.methods = tuple(own.method for own in anatomy.own_bias)
    names = {n for n, parameter in root.named_parameters() if id(parameter) not in before or n.startswith(TABLES)}
    if anatomy.table is not None:
        names.add(str(anatomy.table_slot))
    if conversion.joins_own_bias:
        theirs = {id(p) for b in anatomy.own_bias for p in method_of(anatomy, b.method)[0].parameters(recurse=False)}
        names |= {n for n, p in root.named_parameters() if id(p) in theirs and "relative_position" in n}
    overrides: dict[str, Callable[..., Any]] = {"no_weight_decay": NoWeightDecay(root, frozenset(names))}
    if hasattr(type(root), "group_matcher"):
        overrides["group_matcher"] = GroupMatcher(root)
    if hasattr(type(root), "set_input_size"):
        overrides["set_input_size"] = SetInputSize(root)
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
        delattr(*method_of(conversion.anatomy, path))
    if conversion.replaced_encoder is not None:
        assert conversion.anatomy.encoder is not None
        encoder = conversion.replaced_encoder.to(next(root.parameters()).device)
        _set_submodule(root, conversion.anatomy.encoder, encoder)
    owner, name = slot_of(conversion.anatomy)
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
    grid = grid_for(conversion, size)
    if grid not in (None, conversion.layout.grid):
        raise LapeError(
            f"size={size!r} is a grid of {grid}, the model's is {conversion.layout.grid}: "
            "create the model with that img_size, then load and fold it"
        )
    root = conversion.anatomy.root
    with torch.no_grad():
        constants = at_sites(conversion, None) if KINDS[conversion.pe].is_table and conversion.sites else []
        for layer, (path, _) in enumerate(conversion.sites):
            site = root.get_submodule(path)
            if isinstance(site, PositionalNorm):
                p_1ND = conversion.layout.spread(constants[layer][0])
                _set_submodule(root, path, _folded(site, p_1ND.clone()))
            elif isinstance(site, PositionalAttention):
                site.position_bias = FoldedBias(site.position_bias().clone())
        if conversion.joins_own_bias:
            for path in conversion.methods:
                owner, method = method_of(conversion.anatomy, path)
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
