"""What a conversion will be: refused with the reason, or the modules that it takes. Nothing here changes a model.

Shape legend: B batch, N tokens, R rows of the position table, D width, L layers, H heads.
"""

from __future__ import annotations

from torch import Tensor, nn

from lape.bias import NormalisedBias, PositionalAttention, PositionBias
from lape.conditional import PositionGenerator
from lape.errors import LapeError, UnsupportedModelError
from lape.grids import Grids, GridWatch, Places
from lape.handover import HandOver
from lape.hosts import Anatomy, class_name
from lape.joined import PositionalBlock, PositionSource
from lape.joins import Join
from lape.norm import PositionalNorm
from lape.position import KINDS, Kind, PositionTable
from lape.record import encoder_of, method_of, own_table
from lape.stages import Merged, PositionalInput

Site = tuple[str, str, nn.Module]  # path of a host module, the name it gets in its wrapper, the wrapper


def own_kind(anatomy: Anatomy) -> Kind:
    if anatomy.table is not None:
        return KINDS[anatomy.own_kind]
    if anatomy.own_bias:
        return KINDS["2D_RPE"]
    has = f", its {anatomy.beside} stays as it is" if anatomy.beside else ""
    if anatomy.encoder is not None:
        has = f", {anatomy.encoder} computes its position ({class_name(type(encoder_of(anatomy)))})"
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
    if anatomy.beside and not kind.is_table and not kind.conditional:
        means = "a second bias would join it" if kind.is_bias else "the model would not be without a position"
        use = "pe='learnable', or pe='2D_RPE' for its own" if anatomy.own_bias else "pe='learnable'"
        raise LapeError(f"pe={kind.name!r}: {name} keeps its {anatomy.beside}, {means}: use {use}")
    if new and kind.is_table and join.at_input and anatomy.table_slot is None and anatomy.input is None:
        raise LapeError(f"join={join.name!r}: {name} has no place where it adds a table to its tokens: use join='LaPE'")


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


def own_bias_norms(anatomy: Anatomy) -> list[NormalisedBias]:
    """What stands in for the methods that compute the host's own bias: LN' over its rows, eps as in the reference."""
    found = []
    for own in anatomy.own_bias:
        owner, method = method_of(anatomy, own.method)
        like = next(owner.parameters())
        found.append(NormalisedBias(owner, method, own, nn.LayerNorm(own.keys, device=like.device, dtype=like.dtype)))
    return found


def build_parts(
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
    if kind.is_bias and anatomy.own_bias:  # nothing new but LN': see own_bias_norms
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
        own = own_table(anatomy)
        layout, width = anatomy.at(layer)
        if not new and own is not None and layer == 0:
            return PositionTable(own, layout)
        if new or own is None:
            assert kind.build is not None
            std = {} if kind.frozen or anatomy.table_std is None else {"std": anatomy.table_std}
            values = kind.build(layout, width, **std).to(device=like.device, dtype=like.dtype)
            learns = not kind.frozen
        else:  # a copy for each block, as the host's table reaches it
            values = raw_sources(anatomy, PositionTable(own, anatomy.layout))[layer].position().detach().clone()
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
    raw = raw_sources(anatomy, tables[0])
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


def raw_sources(anatomy: Anatomy, table: PositionSource) -> list[PositionSource]:
    """The table as each block gets it, without norms."""
    found = [table]
    for layer in range(1, len(anatomy.blocks)):
        found.append(_entered(anatomy, layer, found[-1]))
    return found


def _norm_like(token_norm: nn.Module, width: int, like: Tensor) -> nn.LayerNorm:
    """LN'_l: a LayerNorm with the eps of the token norm and an affine of its own (2 D parameters).

    torch's RMSNorm may have no eps of its own (None: that of the dtype); LN' then has torch's default, 1e-5.
    """
    eps = 1e-5 if token_norm.eps is None else token_norm.eps
    return nn.LayerNorm(width, eps=eps, device=like.device, dtype=like.dtype)  # type: ignore[arg-type]
