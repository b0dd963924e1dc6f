"""What was done to a model, and what position each of its layers gets: the one place that computes it.

Shape legend: B batch, N tokens, R rows of the position table, D width, L layers, H heads, n patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lape.errors import LapeError
from lape.hosts import Anatomy
from lape.joined import FoldedNorm
from lape.joins import JOINS
from lape.norm import PositionalNorm
from lape.overrides import NoWeightDecay
from lape.plan import raw_sources
from lape.position import KINDS, Grid, PositionTable
from lape.record import TABLES, Conversion, conversion_of, known, method_of, own_table

Size = int | tuple[int, int]
View = Literal["received", "seen", "unbiased"]


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


def describe(model: nn.Module) -> Description:
    """What was done to a converted model. Raises LapeError for a model that is not converted."""
    conversion = conversion_of(model)
    join, anatomy = JOINS[conversion.join], conversion.anatomy
    no_decay = getattr(anatomy.root, "no_weight_decay", None)
    undecayed = no_decay.names if isinstance(no_decay, NoWeightDecay) else frozenset()
    own = own_table(anatomy) is not None or (join.site == "input" and TABLES in anatomy.root._modules)
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
    return known(conversion_of(model)).layout.grid


def num_prefix_tokens(model: nn.Module) -> int:
    """Tokens before the first patch (class, distillation, registers) of a converted model; raises as `grid`."""
    return known(conversion_of(model)).layout.num_prefix


def grid_for(conversion: Conversion, size: Size | None) -> Grid | None:
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
    target = grid_for(conversion, size)
    _check_stage(anatomy, stage, target)
    if conversion.folded and join.normalised:
        if view == "unbiased":
            raise LapeError("the model is folded, the bias of its norms is gone: view='unbiased' needs it unfolded")
        if target not in (None, conversion.layout.grid):
            raise LapeError(f"the model is folded for the grid {conversion.layout.grid}, size={size!r} is {target}")
    layout = conversion.layout if target is None else replace(conversion.layout, grid=target)
    sites = at_sites(conversion, target)
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
    own = own_table(conversion.anatomy)
    if own is None:
        own = conversion.anatomy.root.get_parameter(f"{TABLES}.0.pos_embed")
    sources = raw_sources(conversion.anatomy, PositionTable(own, conversion.layout))
    return [source.position(grid) for source in sources]


def at_sites(conversion: Conversion, grid: Grid | None) -> list[tuple[Tensor, Tensor | None]]:
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
    p_1RD, _ = at_sites(conversion, None)[-1]
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
        owner, method = method_of(conversion.anatomy, own.method)
        bias: Tensor = getattr(owner, method)(*own.args)
        found.append(bias.reshape(1, *bias.shape[-3:])[..., own.num_prefix :, own.num_prefix :])
    if len({bias.shape for bias in found}) > 1:
        raise LapeError("blocks have biases of different heads or windows: there is no one (L, H, n, n) to give")
    return torch.cat(found)
