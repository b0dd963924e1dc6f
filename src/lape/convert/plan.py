"""What a conversion will be: refused with the reason, or the way that it takes. Nothing here changes a model."""

from __future__ import annotations

import torch
from torch import nn

from lape.convert.converted import conversions
from lape.convert.ways import Way, Wish, adding_methods, entry_methods, way_for
from lape.core.anatomy import Anatomy, owner_and_name
from lape.core.joins import Join, check_combination
from lape.core.pe_norms import pe_norm_for
from lape.core.position import KINDS, Kind
from lape.errors import LapeError, UnsupportedModelError
from lape.host import Host, class_name


def plan(
    host: Host,
    anatomy: Anatomy,
    join: Join,
    new_kind: Kind | None,
    *,
    warm_start: bool = False,
    pe_norm: str | None = None,
    std: float | None = None,
) -> Way:
    """The way of joining, with all that it adds. Raises LapeError for what has no meaning in this model."""
    kind = new_kind or host_kind(anatomy)
    check_combination(join, kind, pe_norm)
    check_std(std, new_kind)
    if warm_start and (kind.is_bias or not (join.normalised and new_kind is None)):
        raise LapeError(
            f"warm_start=True with join={join.name!r} and pe={new_kind and new_kind.name!r}: it keeps the model's own "
            "table and opens a gate behind each LN'; use join='LaPE' or 'LaPE-sharing' and pe=None"
        )
    check_host(host.name, anatomy, join, kind, new=new_kind is not None)
    check_pooling(host.name, anatomy, join)
    if kind.is_bias and anatomy.add_bias is None and not anatomy.own_bias:
        raise UnsupportedModelError(
            f"attention of {host.name} takes no mask per head: pe={kind.name!r} cannot be added"
        )
    with torch.inference_mode(False):
        new, norm = new_kind is not None, pe_norm_for(pe_norm, join.name, join.pe_norm)
        way = way_for(Wish(anatomy, join, kind, new=new, warm_start=warm_start, pe_norm=norm, std=std))
    check_forwards(anatomy, way)
    return way


STDS = (1e-6, 1e6)
"""What a table may start with: files hold it to the same."""


def check_std(std: float | None, new_kind: Kind | None) -> None:
    """Raises LapeError for a standard deviation that is none, or that no new table would start with."""
    if std is None:
        return
    low, high = STDS
    if isinstance(std, bool) or not isinstance(std, int | float) or not low <= std <= high:
        raise LapeError(f"std={std!r} is no standard deviation of a table: give {low:g} to {high:g}, such as 0.02 or 1")
    if new_kind is None or not new_kind.is_table:
        reason = "the model's own position stays" if new_kind is None else f"pe={new_kind.name!r} has no table"
        raise LapeError(f"std={std!r} is what a new table starts with, and {reason}: name one, as pe='learnable'")


WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def check_fresh(model: nn.Module) -> None:
    """Raises LapeError for a model that is converted already, or wrapped so that new parameters would be missed."""
    for conversion in conversions(model):
        join, pe = conversion.join, conversion.pe
        raise LapeError(f"the model is converted already (join={join} pe={pe}): call lape.remove_(model) first")
    for path, module in model.named_modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in WRAPPERS), None)
        if wrapper is not None:
            raise UnsupportedModelError(
                f"{path or 'the model'} is in {wrapper} already, which would not know of the new parameters: call "
                "lape.apply_ first, then wrap the model"
            )


def check_forwards(anatomy: Anatomy, way: Way) -> None:
    """Raises UnsupportedModelError when a module has two places, or somebody has replaced a method that takes part."""
    root, paths = anatomy.root, way.places(anatomy)
    if len({id(root.get_submodule(path)) for path in paths}) < len(paths):
        raise UnsupportedModelError("blocks share a module that would be joined: each place needs a module of its own")
    methods = [(path, "forward") for path in [*paths, *([anatomy.patch_embed] if anatomy.patch_embed else [])]]
    if (way.hides_table and anatomy.table) or (way.new and anatomy.encoder):
        methods += [scope.rpartition(".")[::2] for scope in adding_methods(root, anatomy)]
        methods += [("", name) for name in entry_methods(root) if name != "forward"]
    for path, method in methods:
        if method in root.get_submodule(path).__dict__:
            raise UnsupportedModelError(
                f"{path + '.' if path else ''}{method} was replaced on the module (as accelerate's hooks do), so that "
                "the position would not be seen: call lape.apply_ before that"
            )


def host_kind(anatomy: Anatomy) -> Kind:
    """The kind of the host's own position. Raises LapeError when it has none that can be joined."""
    if anatomy.table is not None:
        return KINDS[anatomy.own_kind]
    if anatomy.own_bias:
        return KINDS["2D_RPE"]
    has = f", its {anatomy.beside} stays as it is" if anatomy.beside else ""
    if anatomy.encoder:
        encoder = type(getattr(*owner_and_name(anatomy.root, anatomy.encoder[0])))
        has = f", {anatomy.encoder[0]} computes its position ({class_name(encoder)})"
    raise LapeError(f"the model has no position table of its own{has}: name a kind, for instance pe='learnable'")


def check_host(name: str, anatomy: Anatomy, join: Join, kind: Kind, *, new: bool) -> None:
    """Raises LapeError for a kind that cannot be what its name says in this model."""
    if kind.conditional and anatomy.shuffle is not None:
        raise LapeError(
            f"pe={kind.name!r}: {name} leaves patches out and shuffles the others, so no patch has neighbours to look "
            "at: use pe='learnable'"
        )
    if anatomy.own_bias and kind.name == "2D_RPE":
        return
    plain = len(anatomy.layout.grid) == 2 and not (anatomy.layout.suffix_rows or anatomy.windows)
    if not plain and (kind.is_bias or kind.rotary or kind.conditional):
        raise LapeError(f"pe={kind.name!r} is for one grid of rows and columns, which the blocks of {name} do not have")
    if kind.generators > 1 and (anatomy.stages or len(anatomy.blocks) < kind.generators):
        raise UnsupportedModelError(
            f"pe={kind.name!r} is behind the first {kind.generators} blocks of one grid and width, {name} has "
            f"{'stages' if anatomy.stages else len(anatomy.blocks)}: use pe='PEG'"
        )
    if anatomy.branches and join.site == "block":
        raise LapeError(
            f"join={join.name!r}: several attentions of {name} read one stream, so it would get the position several "
            "times: use join='LaPE'"
        )
    if anatomy.beside and not kind.is_table and not kind.conditional:
        means = "a second bias would join it" if kind.is_bias else "the model would not be without a position"
        use = "pe='learnable', or pe='2D_RPE' for its own" if anatomy.own_bias else "pe='learnable'"
        raise LapeError(f"pe={kind.name!r}: {name} keeps its {anatomy.beside}, {means}: use {use}")
    if kind.rotary:
        check_rotary(name, anatomy, kind)
    if new and kind.is_table and join.at_input and anatomy.table_slot is None and anatomy.input is None:
        raise LapeError(f"join={join.name!r}: {name} has no place where it adds a table to its tokens: use join='LaPE'")


def check_rotary(name: str, anatomy: Anatomy, kind: Kind) -> None:
    """Raises UnsupportedModelError where queries and keys pass nothing behind which they could be turned."""
    why, modules = anatomy.queries_keys, dict(anatomy.root.named_modules())
    if not isinstance(why, str):
        paths = [f"{block}.{anatomy.attention}.{part}" for block in anatomy.blocks for part in why]
        why = next((f"has no {path}" for path in paths if path not in modules), "")
    if anatomy.shuffle or anatomy.stages or anatomy.maps:
        why = "has not one grid in all blocks"
    if why:
        raise UnsupportedModelError(
            f"pe={kind.name!r} turns queries and keys behind the modules that make or norm them, and {name} {why}: "
            "use pe='2D_RPE', or a model with rotary embedding of its own and pe='own'"
        )


def check_pooling(name: str, anatomy: Anatomy, join: Join) -> None:
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
