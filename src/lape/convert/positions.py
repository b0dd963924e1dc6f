"""What was done to a model, and what position each of its layers gets.

Shape legend: B batch, N tokens, R rows of the position table, D width, L layers, H heads, n patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lape.convert.converted import Conversion, conversion_of, require_host
from lape.convert.tended import position_names
from lape.convert.ways import raw_positions
from lape.core.anatomy import Anatomy, owner_and_name
from lape.core.joined import host_forward
from lape.core.joins import JOINS
from lape.core.position import KINDS, Grid
from lape.errors import LapeError

Size = int | tuple[int, ...]
View = Literal["received", "seen", "unbiased"]


@dataclass(frozen=True)
class Description:
    """What was done to a model. `str()` is one readable line.

    Fields:
        host: the family that the model belongs to
        join: name of the join
        pe: kind of position
        site: the places that are joined, in words
        joined: blocks that receive a position of their own
        last_norm: whether the norm before pooling receives one too
        blocks: that the model has now
        input_addition: whether the host still adds a table to its patch tokens
        grid: (rows, columns) of patches, frames first
        prefix_tokens: tokens before the first patch
        positioned_prefix_tokens: those that own a row of the table
        parameters: all of the model
        position_parameters: tables, biases and PE norms
        warm_start: whether it began as the host, behind gates
        folded: whether positions are constants
        pe_norm: what stands in the place of LN'_l, where the join has such a place
        std: what a new table was started with, where that was chosen
        beside: position inside the host's attention, which was left alone
    """

    host: str
    join: str
    pe: str
    site: str
    joined: int
    last_norm: bool
    blocks: int
    input_addition: bool
    grid: Grid
    prefix_tokens: int
    positioned_prefix_tokens: int
    parameters: int
    position_parameters: int
    warm_start: bool
    folded: bool
    pe_norm: str | None = None
    std: float | None = None
    beside: str | None = None

    def __str__(self) -> str:
        if KINDS[self.pe].untouched:
            return f"{self.host}: join={self.join} pe={self.pe}, left as it is, {self.parameters:,} parameters"
        bare = self.prefix_tokens - self.positioned_prefix_tokens
        return (
            f"{self.host}: join={self.join} pe={self.pe}{' (folded)' if self.folded else ''}"
            f"{' (warm start, gated)' if self.warm_start else ''}{self._start}, "
            f"{self.joined}/{self.blocks} {self.site}{' and the last norm' if self.last_norm else ''} joined, "
            f"input addition {'on' if self.input_addition else 'off'}, "
            f"grid {' x '.join(map(str, self.grid))}, {self.prefix_tokens} prefix tokens"
            f"{f' ({bare} without a position)' if bare else ''}, "
            f"{f'{self.beside} kept, ' if self.beside else ''}"
            f"{self.parameters:,} parameters ({self.position_parameters:,} for position)"
        )

    @property
    def _start(self) -> str:
        norm = "" if self.pe_norm in (None, JOINS[self.join].pe_norm) else f", pe_norm={self.pe_norm}"
        return norm + ("" if self.std is None else f", table started at std {self.std:g}")


def describe(model: nn.Module) -> Description:
    """What was done to a converted model. Raises LapeError for a model that is not converted."""
    conversion = conversion_of(model)
    join, anatomy, way = JOINS[conversion.join], conversion.anatomy, conversion.way
    sizes = {name: parameter.numel() for name, parameter in conversion.root.named_parameters()}
    places = conversion.places()
    return Description(
        host=conversion.host,
        join=conversion.join,
        pe=conversion.pe,
        site=way.site,
        joined=sum(place is not None for place in places),
        last_norm=join.at_last,
        blocks=len(places),
        input_addition=way.adds_at_input(anatomy),
        grid=conversion.layout.grid,
        prefix_tokens=conversion.layout.num_prefix,
        positioned_prefix_tokens=conversion.layout.prefix_rows,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        position_parameters=sum(sizes.get(name, 0) for name in position_names(conversion.link)),
        **conversion.choices,
        folded=conversion.folded,
        beside=None if way.joins_host_bias else anatomy.beside,
    )


def grid(model: nn.Module) -> Grid:
    """(rows, columns) of patches of a converted model. Raises LapeError where its parts are not known (pe="own")."""
    return require_host(conversion_of(model)).layout.grid


def num_prefix_tokens(model: nn.Module) -> int:
    """Tokens before the first patch (class, distillation, registers) of a converted model; raises as `grid`."""
    return require_host(conversion_of(model)).layout.num_prefix


def grid_for(conversion: Conversion, size: Size | None) -> Grid | None:
    """The grid of an image of `size` pixels (side, or height and width); None stays None."""
    if size is None:
        return None
    patch = conversion.anatomy.patch_size
    sides = (size,) * len(patch) if isinstance(size, int) and len(patch) < 3 else size
    form = {2: "pixels, a side or (height, width)", 3: "(frames, height, width)"}.get(len(patch), f"{len(patch)} sides")
    rule = f"give {form}, in multiples of the patch of {' x '.join(map(str, patch))}"
    if not isinstance(sides, tuple | list) or len(sides) != len(patch) or not all(type(side) is int for side in sides):
        raise LapeError(f"size={size!r} is no image size: {rule}")
    if tuple(sides) == conversion.anatomy.pixels:
        return conversion.layout.grid
    if min(sides) <= 0 or any(side % step for side, step in zip(sides, patch, strict=True)):
        raise LapeError(f"size={size!r} is no multiple of the patch: {rule}")
    return tuple(side // step for side, step in zip(sides, patch, strict=True))


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
    target = grid_for(conversion, size)
    _check_stage(anatomy, stage, target)
    if conversion.folded and join.normalised:
        if view == "unbiased":
            raise LapeError("the model is folded, the bias of its norms is gone: view='unbiased' needs it unfolded")
        if target not in (None, conversion.layout.grid):
            raise LapeError(f"the model is folded for the grid {conversion.layout.grid}, size={size!r} is {target}")
    target = None if target == conversion.layout.grid else target
    by_place = conversion.link.compute(conversion.root, target) if conversion.link.listed else []
    raw = _input_positions(conversion, target) if join.at_input else []
    at_input = [anatomy.at(layer)[0].spread(p) for layer, p in enumerate(raw)]
    layers: list[Tensor | None] = []
    for layer, place in enumerate(conversion.places()):
        p_1ND = by_place[place] if place is not None else at_input[layer] if at_input else None
        layers.append(_in_view(conversion, layer, place, p_1ND, view))
    if any(p is None for p in layers):  # a block that was put in after the conversion receives nothing
        zeros = torch.zeros_like(next(p for p in [*layers, *by_place] if p is not None))
        layers = [zeros if p is None else p for p in layers]
    return torch.cat(layers if stage is None else layers[anatomy.layers_of(stage)])  # type: ignore[arg-type]


def table_of(conversion: Conversion, grid: Grid | None = None) -> Tensor:
    """P (1, R, D), before any norm: the table in the host's slot, or the one that it lacks."""
    table = conversion.link.table(conversion.root)
    table = conversion.root.get_parameter("lape.table_0") if table is None else table
    return table if grid is None else conversion.anatomy.resample(table, conversion.layout, grid)


def tables_of(conversion: Conversion) -> list[nn.Parameter]:
    """The position tables that learn: one, or one a block (`unshare`)."""
    slot = conversion.anatomy.table_slot if conversion.way.uses_table else None
    parameters = conversion.root.named_parameters()
    return [p for name, p in parameters if p.requires_grad and (name == slot or name.startswith("lape.table_"))]


def _input_positions(conversion: Conversion, grid: Grid | None) -> list[Tensor]:
    """What is added to the tokens once, as it reaches each block, (1, R, D)."""
    merge = partial(conversion.anatomy.merge, conversion.root)
    return list(raw_positions(conversion.anatomy, merge, table_of(conversion, grid)))


def _in_view(conversion: Conversion, layer: int, place: int | None, p_1ND: Tensor | None, view: View) -> Tensor | None:
    """What one block receives, in a view; None when nothing."""
    if p_1ND is None or view == "received":
        return p_1ND
    anatomy, layout = conversion.anatomy, conversion.anatomy.at(layer)[0]
    if place is not None and JOINS[conversion.join].normalised:  # a norm of its own has made it already
        bias = None if conversion.folded else conversion.way.bias(place)
    else:
        norm = conversion.root.get_submodule(anatomy.norm_of(layer))
        p_1ND, bias = host_forward(norm, p_1ND), getattr(norm, "bias", None)
    p_1ND = p_1ND if view == "seen" or bias is None else p_1ND - bias
    rows = p_1ND.shape[1] - layout.bare - layout.lead
    return p_1ND * layout.spread(p_1ND.new_ones(1, rows, 1))


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


def last_position(model: nn.Module) -> Tensor:
    """What the norm before pooling receives as position, (1, N, D): LN'(P) for MPVG. LapeError for other joins."""
    conversion = conversion_of(model)
    if not JOINS[conversion.join].at_last:
        raise LapeError(f"join={conversion.join!r} gives the last norm no position: only join='MPVG' does")
    return conversion.link.compute(conversion.root, None)[-1]


def position_bias(model: nn.Module) -> Tensor:
    """The bias between patches that each block adds to its attention logits: (L, H, n, n). RPE only, else LapeError."""
    conversion = conversion_of(model)
    if not KINDS[conversion.pe].is_bias:
        kind = KINDS[conversion.pe]
        fix = "lape.positions(model) gives its positions" if kind.is_table else kind.missing
        raise LapeError(f"pe={conversion.pe!r} has no bias on attention logits: {fix}")
    patches, link = conversion.layout.patches, conversion.link
    if conversion.way.joins_host_bias:
        return _host_biases(conversion)
    return torch.cat([bias[:, :, patches, patches] for bias in link.compute(link.root, None)])


def _host_biases(conversion: Conversion) -> Tensor:
    biases = []
    for block_bias in conversion.anatomy.own_bias:
        owner, method = owner_and_name(conversion.root, block_bias.method)
        bias: Tensor = getattr(owner, method)(*block_bias.args)
        biases.append(bias.reshape(1, *bias.shape[-3:])[..., block_bias.num_prefix :, block_bias.num_prefix :])
    if len({bias.shape for bias in biases}) > 1:
        raise LapeError("blocks have biases of different heads or windows: there is no one (L, H, n, n) to give")
    return torch.cat(biases)
