"""Where a model keeps what a join touches. Knows no library: a host fills it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lape.core.bias import AddBias, BlockBias, add_to_attn_mask
from lape.core.position import Grid, Layout, resample, rows_of
from lape.core.stages import Stage


def patches_of_shuffle(tokens_BnD: Tensor, output: tuple[Tensor, ...]) -> Tensor:
    """(B, k) patches that a shuffle keeps, of its output (the kept ones in their new order, ..., the place of each)."""
    return output[-1].argsort(dim=1)[:, : output[0].shape[1]]


@dataclass(frozen=True)
class Form:
    """How a host's parameters are a table. A new table takes its slot only where they are its rows."""

    read: Callable[..., Tensor] = rows_of  # (the table, its other inputs) -> (1, R, D)
    parts: tuple[str, ...] = ()  # paths of further parameters that it is made of
    shared: tuple[str, ...] = ()  # and of those that serve more than the table

    @property
    def inputs(self) -> tuple[str, ...]:
        """Paths of what is read beside the table."""
        return (*self.parts, *self.shared)


@dataclass(frozen=True)
class Anatomy:
    """Where a model keeps what a join touches. Paths are relative to `root`.

    Fields:
        root: the module that owns table and blocks
        blocks: paths of the blocks, in the order of the forward
        norm: attribute of a block: the LayerNorm before attention
        attention: attribute of a block: the module that attends
        table: path of the input's position table, (1, R, D) or (R, D); None when the model has none
        table_slot: path under which a table would be read by the host's forward; None: it adds none
        layout: how its tokens stand to the table's rows
        patch_size: pixels, along each axis of the grid
        width: of the tokens that the first block gets
        num_heads: of its attention
        pixels: of the images that it is made for, where these are not grid x patch size
        patch_embed: path of what takes the pixels, when images of other sizes are welcome
        pads: whether it pads an image to whole patches
        grid_from: the grid, read in its output; None: reckoned from the image size
        add_bias: how a bias gets into attention; None: it cannot
        beside: position inside attention, which stays
        own_bias: each block's own relative bias, if any, which pe="2D_RPE" joins
        encoder: paths of what the host's position is computed by or of; a table replaces it
        pooled: whether its head pools the patches and reads no class token
        last_norm: path of the norm between the blocks and that pooling, over the same tokens
        table_std: of the values that a learnable table starts with, where that is not the kind's
        own_kind: what the host's own table is
        shuffle: path of a method that shuffles and drops patches, see lape.core.grids.Shuffled
        stages: of a model whose grid shrinks; `layout` and `width` are those of the first
        input: path of what makes the patch tokens, behind which a table can be added without a slot
        adds: paths of the methods in which the host adds its table; (): in its forward
        maps: whether blocks take maps (B, rows, columns, D) and not tokens (B, N, D)
        channels_first: whether those maps enter a block as (B, D, rows, columns)
        form: how parameters are the table, where one is not simply its rows
        table_key: in files, of a table that the host lacks
        resample: the table of another grid, as the host makes it
        windows: (P (1, N, D), grid, layer) -> (W, ...): P as the tokens of an image stand in the batch of a block;
            None: just so
        norm_feeds_more: whether a norm before attention also feeds the stream: attention's input is joined
        kept_patches: (input, output of that method) -> (B, k)
        packed_grids: the grid of each image, read in what `patch_embed` is called with; None where images are not
            packed
        norms: paths of the norms, layer by layer, where they are not attributes of "blocks"
        unfused: attribute of a block that must read as 0, or a fused path passes its norm by
        queries_keys: in attention, the modules that last make or norm queries and keys; or why there are none
        branches: whether "blocks" are branches of blocks, several attentions side by side
    """

    root: nn.Module
    blocks: tuple[str, ...]
    norm: str
    attention: str
    table: str | None
    table_slot: str | None
    layout: Layout
    patch_size: tuple[int, ...]
    width: int
    num_heads: int
    pixels: tuple[int, ...] | None = None
    patch_embed: str | None = None
    pads: bool = False
    grid_from: Callable[[Any], Grid] | None = None
    add_bias: AddBias | None = add_to_attn_mask
    beside: str | None = None
    own_bias: tuple[BlockBias, ...] = ()
    encoder: tuple[str, ...] = ()
    pooled: bool = False
    last_norm: str | None = None
    table_std: float | None = None
    own_kind: str = "learnable"
    shuffle: str | None = None
    stages: tuple[Stage, ...] = ()
    input: str | None = None
    adds: tuple[str, ...] = ()
    maps: bool = False
    channels_first: bool = False
    form: Form = Form()
    table_key: str = "pos_embed"
    resample: Callable[[Tensor, Layout, Grid], Tensor] = resample
    windows: Callable[[Tensor, Grid, int], Tensor] | None = None
    norm_feeds_more: bool = False
    kept_patches: Callable[[Any, Any], Tensor] = patches_of_shuffle
    packed_grids: Callable[..., list[Grid] | None] | None = None
    norms: tuple[str, ...] = ()
    unfused: str | None = None
    queries_keys: tuple[str, str] | str = ("q_norm", "k_norm")
    branches: bool = False

    @property
    def tables(self) -> tuple[str, ...]:
        """Paths of all parameters that are the table."""
        return () if self.table is None else (self.table, *self.form.parts)

    def without_table(self) -> Anatomy:
        """With its own table as something that a new one replaces, where that cannot take its slot."""
        return replace(self, table=None, table_slot=None, encoder=self.tables, form=Form(), table_key="new_table")

    def norm_of(self, layer: int) -> str:
        """Path of the norm before attention in a layer."""
        return self.norms[layer] if self.norms else f"{self.blocks[layer]}.{self.norm}"

    def at(self, layer: int) -> tuple[Layout, int]:
        """Layout and width of a block."""
        for stage in self.stages:
            if layer < stage.blocks:
                return replace(self.layout, grid=stage.grid, lead=stage.lead), stage.width
            layer -= stage.blocks
        return self.layout, self.width

    def layers_of(self, stage: int) -> slice:
        """The blocks of a stage."""
        start = sum(s.blocks for s in self.stages[:stage])
        return slice(start, start + self.stages[stage].blocks)

    def merge(self, root: nn.Module, layer: int, p_1RD: Tensor) -> Tensor:
        """A position as a block gets it: merged by the host's own module when a stage begins there."""
        for number, stage in enumerate(self.stages):
            if stage.merging is not None and self.layers_of(number).start == layer:
                grid = self.stages[number - 1].grid
                return stage.merge(root.get_submodule(stage.merging), p_1RD, grid)
        return p_1RD


def owner_and_name(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module in which something lies, and its name there."""
    owner, _, name = path.rpartition(".")
    return (root.get_submodule(owner) if owner else root), name  # torch 2.6 cannot trace get_submodule("")
