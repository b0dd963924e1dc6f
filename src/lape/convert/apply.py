"""Put a join into a model, take it out and fold it: plan -> validate -> mutate.

A call that raises has changed nothing: everything that can fail happens before the first change. `convert.plan` refuses
with the reason, `convert.ways` has what each way of joining does, `convert.positions` shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lape.convert.converted import conversion_of
from lape.convert.plan import check_fresh, check_std, plan
from lape.convert.positions import Size, grid_for
from lape.convert.tended import Saved, Tended, tended_methods
from lape.convert.ways import Wish, check_put_back, put_back, way_for
from lape.core.anatomy import Anatomy, Form
from lape.core.forward import Link
from lape.core.joined import LINK, Joined, join_module, leave_module, subclass
from lape.core.joins import check_combination, join_named
from lape.core.position import KINDS, Grid, Layout, kind_named
from lape.errors import LapeError, UnsupportedModelError, needs
from lape.host import Host, class_name, find_host, host_of_library
from lape.host.timm import NOT_THE_MODEL


def apply_(
    model: nn.Module,
    join: str = "LaPE",
    pe: str | None = None,
    *,
    warm_start: bool = False,
    std: float | None = None,
    pe_norm: str | None = None,
    at: str | None = None,
    grid: Grid | None = None,
) -> nn.Module:
    """Joins position and tokens the given way, in place, and returns the model.

    Args:
        model: a supported Vision Transformer, or a module that holds exactly one (see `lape.hosts()`).
        join: "basic", "share", "unshare", "beside", "LaPE-sharing", "LaPE", or, for models that pool their patches,
            "PVG" or "MPVG"; in any case.
        pe: None keeps the model's own position table and its values, or, where there is none, its relative bias; the
            name of a kind ("learnable", "1D_sin", "2D_sin", "1D_RPE", "2D_RPE", "RoPE", "RoPE-mixed", "ALiBi-2D",
            "LookHere", "PEG", "PEG-6", "none") builds a new one in its place. "2D_RPE" is the model's own bias, values
            and all, where each block has one. "own", with join="basic", leaves any model as it is and only
            remembers that: a rival that is trained and saved like the others.
        warm_start: for a pretrained model and a join with LN'_l: the model's function is the host's at first. Its input
            addition stays, and attention sees LN_l(x) + g_l P_(l+1) with a learned gate g_l = 0 a layer, so that
            fine-tuning decides how much each layer takes. Folding turns the gates into constants too.
        std: standard deviation that a new table starts with: the same random numbers on another scale. None: timm's
            0.02 or the host's own. LN' makes any scale 1 at the start; the other joins do not: it is their control.
        pe_norm: what stands in the place of LN'_l (Table 8): "none" (P itself), "scalar" (g P), "scale" (g * P),
            "affine" (g * P + b), "norm" (Norm(P)), "scalar-norm", "scale-norm", "layernorm", which is LN', or
            "learned-norm" (g sqrt(D) P / |P|).
        at: the path of a part, such as "vision_tower", where the model holds more than one Vision Transformer.
        grid: (rows, columns) of patches, for a model that does not know it (torchvision's Swin,
            nn.TransformerEncoder).

    Raises:
        UnsupportedModelError: the model is not supported; the message says why and how to register it.
        LapeError: unknown names, a meaningless combination, or a model that is converted already.
    The model is unchanged, bit for bit, when it raises. Source: Yu et al., ICCV 2023, Eq. 8-11 and Table 7.
    """
    chosen_join = join_named(join)
    new_kind = None if pe is None else kind_named(pe)
    check_fresh(model)
    if new_kind is not None and new_kind.untouched:
        check_combination(chosen_join, new_kind, pe_norm)
        if warm_start:
            raise LapeError(f"warm_start=True with pe={pe!r}: there is no join to open; leave warm_start out")
        check_std(std, new_kind)
        return _leave(model)
    host, root = find_host(_part(model, at))
    anatomy = anatomy_of(host, root, grid)
    if new_kind is not None and new_kind.is_table and anatomy.table is not None and anatomy.form != Form():
        anatomy = anatomy.without_table()
    way = plan(host, anatomy, chosen_join, new_kind, warm_start=warm_start, pe_norm=pe_norm, std=std)
    link = Link(root, host.name, anatomy, listed=way.computes_positions)
    way.enter(link)
    join_module(root, Tended, link, *tended_methods(root))
    if hasattr(type(model), "save_pretrained"):
        join_module(model, Saved, link, "save_pretrained")
    return model


def _part(model: nn.Module, at: str | None) -> nn.Module:
    """The part under a path. Raises LapeError, naming the parts that there are."""
    if not at:
        return model
    try:
        return model.get_submodule(at)
    except AttributeError:
        names = ", ".join(name for name, _ in model.named_children())
        raise LapeError(f"at={at!r}: this {type(model).__name__} has no such part; it consists of {names}") from None


def anatomy_of(host: Host, root: nn.Module, grid: Grid | None) -> Anatomy:
    """The anatomy of a model; `grid` is what the user says. Raises LapeError for a grid that the model knows itself."""
    if grid is None:
        return host.examine(root)
    if "grid" not in host.user_arguments:
        raise LapeError(f"grid={grid!r}: {host.name} knows its own grid, leave it out")
    if len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        raise LapeError(f"grid={grid!r} is no grid: give (rows, columns) of patches")
    return host.examine(root, grid=tuple(grid))


def _needs_grid(model: nn.Module, at: str | None) -> bool:
    try:
        return "grid" in find_host(_part(model, at))[0].user_arguments
    except UnsupportedModelError:
        return False


def _leave(model: nn.Module) -> nn.Module:
    """A model without a change that says so. What is known of it is that of its host, where it has one."""
    try:
        host, root = find_host(model)
        name, anatomy = host.name, host.examine(root)
    except UnsupportedModelError:
        name, root = class_name(type(model)), model
        anatomy = Anatomy(root, (), "", "", None, None, Layout((0, 0), 0), (1, 1), width=0, num_heads=0)
    way = way_for(Wish(anatomy, join_named("basic"), KINDS["own"]))
    root.__dict__[LINK] = link = Link(root, name, anatomy, listed=False)
    way.enter(link)
    return model


def remove_(model: nn.Module) -> nn.Module:
    """Takes a join out again, in place, and returns the model: the host's classes, keys, order and numbers.

    A table that was kept returns with its present values; one that was replaced by another kind returns as it was.
    Raises LapeError when the model is not converted, is folded, or has a joined module whose class was changed since.
    """
    conversion = conversion_of(model)
    if conversion.folded:
        raise LapeError("a folded model cannot be turned back: keep a copy.deepcopy(model) from before lape.fold_")
    link = conversion.link
    modules: dict[str, Any] = {
        path: m for path, m in model.named_modules() if isinstance(m, Joined) and m.__dict__[LINK] is link
    }
    for path, module in modules.items():
        if type(module) is not subclass(module._host, *module._roles):
            raise LapeError(f"{path} became a {class_name(type(module))} after lape.apply_: undo that first")
    check_put_back(link)
    put_back(link)
    for module in modules.values():
        leave_module(module)
    link.root.__dict__.pop(LINK, None)
    del link.root._modules["lape"]
    return model


def fold_(model: nn.Module, size: Size | None = None) -> nn.Module:
    """Replaces everything that is computed from parameters alone by constants, in place; returns the model.

    The chain of LayerNorms is evaluated once and the result of each layer kept, so that a folded LaPE costs one
    addition a layer; a relative position bias is gathered and normalised once. `basic`, `share` and `unshare` compute
    nothing and stay as they are. Folding is one way and for one image size. The host's keys stay; its table, which is
    part of the constants, becomes a buffer.

    Raises LapeError when the model is not converted, is folded already, has another grid than `size` asks for, or a
    position that no constant can stand for (pe="PEG", "own").
    """
    conversion = conversion_of(model)
    if conversion.folded:
        raise LapeError("the model is folded already")
    kind, link = KINDS[conversion.pe], conversion.link
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
    with torch.no_grad():
        link.root.add_module("lape", conversion.way.fold(link))
    return model


def create_model(
    name: str,
    join: str = "LaPE",
    pe: str | None = None,
    *,
    warm_start: bool = False,
    std: float | None = None,
    pe_norm: str | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """A timm model by name, converted. Remembers name and arguments for `lape.save`.

    Args:
        name: a timm model, for instance "deit_tiny_patch16_224".
        join, pe, warm_start, std, pe_norm: as for `apply_`.
        timm_kwargs: handed to `timm.create_model` (img_size, num_classes, pretrained, drop_path_rate, depth, ...).

    Raises:
        LapeError: an unknown model (the nearest names are listed), wrong arguments, or an image size that the patch
            does not divide. UnsupportedModelError: a model that cannot be converted.
    """
    join_named(join)
    if pe is not None:
        kind_named(pe)
    return build("timm", name, timm_kwargs, join, pe, warm_start=warm_start, std=std, pe_norm=pe_norm)


def build(
    library: str,
    name: str,
    kwargs: dict[str, Any],
    join: str,
    pe: str | None,
    *,
    at: str | None = None,
    grid: Grid | None = None,
    **choices: Any,
) -> nn.Module:
    """A model of a library by name and arguments, converted; it remembers them for `lape.save`.

    `grid` is for a model that does not know its own; `choices` are the other arguments of `apply_`.
    """
    host = host_of_library(library)
    assert host.build is not None
    try:
        with needs("huggingface" if library == "transformers" else "all"):
            model = host.build(name, kwargs)
    except UnsupportedModelError as error:  # of a model that takes other arguments: here it need not be supported
        if pe is None or not kind_named(pe).untouched:
            raise
        raise LapeError(f"model {name!r} with {kwargs}: {error.__cause__}") from error
    apply_(model, join, pe, at=at, grid=grid if grid and _needs_grid(model, at) else None, **choices)
    plain = {key: value for key, value in kwargs.items() if key not in NOT_THE_MODEL}
    conversion_of(model).factory.update(library=library, name=name, kwargs=plain)
    return model
