"""Positions as pictures: the numbers of `lape.look.similarity`, drawn; nothing is derived from a model's weights here.

One colour scale throughout: -1..1 for cosine similarity, symmetric about zero for biases, on a diverging map that
colour-blind readers can tell apart; another range is on a map from dark to light. Figures are built without pyplot: no
window system, no global state.
Shape suffixes: L layers, N tokens, n patches (prefix tokens left out), D width, H heads.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.convert.converted import conversion_of
from lape.convert.positions import Description, View, describe
from lape.core.position import KINDS, Grid
from lape.errors import LapeError, check_finite, needs
from lape.files.atomic import keep_inputs, write_atomically
from lape.files.read import read_checkpoint
from lape.files.restore import restore_to_draw
from lape.look.colours import COLOURS
from lape.look.measures import MEASURES, measure_all
from lape.look.options import DrawOptions
from lape.look.similarity import (
    AXES,
    Maps,
    bias_to_show,
    center_token,
    check_token,
    place_of_token,
    similarity_by_distance,
    token_at,
    token_map,
)

with needs("plot"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator

COLOUR_MAP, ONE_SIDED = "RdBu_r", "viridis"
TEXT_SCALE = 0.8  # of their usual size, in a figure of a given width
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
VIEW_WORDS: dict[View, str] = {
    "seen": "each layer sees them",
    "received": "each layer receives them",
    "unbiased": "each layer sees them, without the bias of its norm",
}
COSINE = Normalize(-1, 1), "cosine similarity"


# --- one map ----------------------------------------------------------------------------------------------------------


def draw_map(axes: Axes, values: Tensor, grid: Grid, token: int | None, colours: Normalize, most_ticks: int = 8) -> Any:
    """One map as an image: (n, n) between all patches, or, with `token`, (rows, columns) of that patch, framed.

    Ticks count patches; those of an n x n map stand where a row of the grid, or a frame, begins. A token below 0 is not
    in the map. Returns the image.
    """
    height, width = values.shape
    colour_map = COLOUR_MAP if colours.vmin == -(colours.vmax or 0) else ONE_SIDED
    image = axes.imshow(values.numpy(), cmap=colour_map, norm=colours, interpolation="antialiased", aspect="equal")
    unit = 1 if token is not None else math.prod(grid[1:])
    axes.set_xticks(_ticks(width, unit, most_ticks))
    axes.set_yticks(_ticks(height, unit, most_ticks))
    if token is not None and token >= 0:
        row, column = divmod(token, grid[1])
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=0.9))
    return image


def _ticks(length: int, unit: int, most: int) -> list[int]:
    """0, step, 2 step, ... below length: at most `most` of them, step a round multiple of unit."""
    steps = (unit * base * 10**power for power in range(6) for base in (1, 2, 5))
    step = next(step for step in steps if math.ceil(length / step) <= most)
    return list(range(0, length, step))


def _box(figure: Figure, left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
    """A rectangle in inches as fractions of the figure."""
    total_width, total_height = figure.get_size_inches()
    return left / total_width, bottom / total_height, width / total_width, height / total_height


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def scale_to_width(figure: Figure, width: float | None) -> Figure:
    """The figure with everything in it larger or smaller, so that it is `width` inches wide; None: as it is."""
    old_width, old_height = map(float, figure.get_size_inches())
    factor = 1.0 if width is None else width / old_width
    if factor == 1.0:
        return figure
    figure.set_size_inches(old_width * factor, old_height * factor)
    letters: Any = figure.findobj(Text)
    sizes = [(text, text.get_fontsize() * factor) for text in letters]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            size = float(axis.get_tick_params().get("labelsize", 10.0)) * factor
            axis.set_tick_params(labelsize=size, length=3 * factor, width=0.8 * factor, pad=2 * factor)
        for edge in (*axes.spines.values(), *axes.patches):
            edge.set_linewidth(edge.get_linewidth() * factor)
        lines: Any = axes.lines
        for line in lines:
            line.set(linewidth=line.get_linewidth() * factor, markersize=line.get_markersize() * factor)
    for text, size in sizes:
        text.set_fontsize(size)
    return figure


def colour_range(choice: str | None, maps: Iterable[Tensor], usual: Normalize) -> Normalize:
    """The ends of the colours; for `auto` the least and the largest value of the maps (n, n) off their diagonals."""
    if choice is None:
        return usual
    if choice != "auto":
        least, largest = map(float, choice.split(".."))
        return Normalize(least, largest)
    values = [m[~torch.eye(m.shape[-1], dtype=torch.bool)] for m in maps if m.shape[-1] > 1]
    low, high = min(v.min().item() for v in values), max(v.max().item() for v in values)
    return Normalize(low, high if high > low else low + 1.0)


class Sheet:
    """A figure with one map and its colour bar, drawn again and again with other values: laid out only once."""

    def __init__(self, strip: Strip, colours: Normalize, unit: str, options: DrawOptions):
        values = next(m for m in strip.maps if m is not None)
        token, aspect = strip.token, strip.aspect
        width = min(4.2 * math.sqrt(max(aspect, 1.0)), 8.5) * min(aspect, 1.0)
        height = max(width / aspect, 1.2)
        left, right, bottom, top = 0.75, 1.05, 0.6, 0.65 if options.title else 0.1
        slack = max(0.0, 5.6 - (left + width + right)) / 2 if options.title else 0.0  # for a title above a narrow map
        self.figure = _figure(2 * slack + left + width + right, bottom + height + top)
        axes = self.figure.add_axes(_box(self.figure, slack + left, bottom, width, height))
        self._image = draw_map(axes, values, strip.grid, token, colours)
        axes.set_xlabel("patch" if token is None else "column of patches")
        if strip.frames > 1:
            wide = (values.shape[-1] + 1) // strip.frames
            frames = range(0, strip.frames, math.ceil(strip.frames / 16))
            axes.set_xticks([frame * wide + wide / 2 - 1 for frame in frames], list(map(str, frames)))
            axes.set_xlabel("frame")
        axes.set_ylabel("patch" if token is None else "row of patches")
        bar = self.figure.add_axes(_box(self.figure, slack + left + width + 0.12, bottom, 0.16, height))
        self.figure.colorbar(self._image, cax=bar).set_label(unit)
        top_y = 1 - 0.1 / self.figure.get_size_inches()[1]
        self._title = self.figure.text(0.5, top_y, "", ha="center", va="top", fontsize=10.5)
        self._letters = 12 * self.figure.get_size_inches()[0]  # in a line of the title
        self._titled = options.title
        scale_to_width(self.figure, options.inches)
        self._size = self._title.get_fontsize()

    def show(self, values: Tensor, title: str) -> Figure:
        self._image.set_data(values.numpy())
        if self._titled:
            longest = max(map(len, title.splitlines()))
            self._title.set(text=title, fontsize=self._size * min(1.0, self._letters / longest))
        return self.figure


# --- many maps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """One row of an overview, a map a column: all patches (token None) or one patch's map on the grid."""

    label: str
    maps: Sequence[Tensor | None]  # None leaves a place empty
    grid: Grid
    token: int | None = None
    about: str = ""  # what it is of, in words
    frames: int = 1  # side by side in each map

    @property
    def aspect(self) -> float:
        height, width = next(m for m in self.maps if m is not None).shape
        return width / height

    @property
    def axes_label(self) -> str:
        return "patch" if self.token is None else "row, column"


def overview(
    title: str,
    strips: Sequence[Strip],
    columns: Sequence[str],
    colours: Normalize,
    unit: str,
    width: float | None = None,
) -> Figure:
    """Strips under each other with one colour range and one bar; too many columns are broken into bands.

    `title` may be empty; `width` in inches.
    """
    gap, left, right, head = 0.12, 0.85, 0.95, 0.3
    stretch = min(max(math.sqrt(max(strip.aspect for strip in strips)), 1.0), 2.0)
    cell = 1.4 * stretch
    if width is None:
        bands = _bands(len(columns), most=int(18 / cell))
    else:
        inside = width / TEXT_SCALE - left - right
        bands = _bands(len(columns), most=int(inside / (0.6 * stretch + gap)))
        cell = min(cell, max(inside / len(bands[0]) - gap, 0.3))
    heights = [cell / max(strip.aspect, 1.0) for strip in strips]
    ticks_below = [k + 1 == len(strips) or strips[k + 1].axes_label != strips[k].axes_label for k in range(len(strips))]
    band_height = head + sum(heights) + sum(0.3 if ticks else gap for ticks in ticks_below) + 0.1
    total = left + len(bands[0]) * (cell + gap) + right
    total = max(total, 7.0) if title and width is None else total
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, int(12.2 * total))]
    top = 0.15 + 0.2 * len(lines)
    height = top + len(bands) * band_height + 0.05

    figure = _figure(total, height)
    for number, band in enumerate(bands):
        y = height - top - number * band_height - head
        for strip, strip_height, ticks in zip(strips, heights, ticks_below, strict=True):
            for place, column in enumerate(band):
                values = strip.maps[column]
                if values is None:
                    continue
                box = _box(figure, left + place * (cell + gap), y - strip_height, cell, strip_height)
                axes = figure.add_axes(box)
                draw_map(axes, values, strip.grid, strip.token, colours, most_ticks=4)
                axes.tick_params(labelsize=6.5, length=2, pad=1.5, labelleft=place == 0, labelbottom=ticks)
                if column == band[0] or strip.maps[column - 1] is None:
                    axes.set_ylabel(strip.label, fontsize=8, labelpad=3)
                    axes.tick_params(labelleft=True)
                if strip is strips[0] or strips[0].maps[column] is None:
                    axes.set_title(columns[column], fontsize=9, pad=4)
            y -= strip_height + (0.3 if ticks else gap)
    bar_height = min(height - top - head - 0.4, 4.0)
    bar = figure.add_axes(_box(figure, total - right + 0.1, height - top - head - bar_height, 0.14, bar_height))
    image = next(axes.images[0] for axes in figure.axes if axes.images)
    figure.colorbar(image, cax=bar).set_label(unit, fontsize=8)
    bar.tick_params(labelsize=7)
    figure.text(0.5, 1 - 0.12 / height, "\n".join(lines), ha="center", va="top", fontsize=11)
    return scale_to_width(figure, width)


def _bands(count: int, most: int) -> list[range]:
    """0..count-1 in consecutive ranges of nearly equal length, at most `most` each."""
    bands = math.ceil(count / max(most, 1))
    length = math.ceil(count / bands)
    return [range(start, min(start + length, count)) for start in range(0, count, length)]


# --- a model's pictures -----------------------------------------------------------------------------------------------


def visualize(
    source: str | PathLike[str] | nn.Module, save_dir: str | PathLike[str], options: DrawOptions | None = None
) -> list[Path]:
    """Draws what a model's positions became in every layer, into the folder `<save_dir>/<model_name>/`.

    Tables: `<join>_layer<i>_sim_overall.jpg` (cosine similarity of all patches), `<join>_layer<i>_sim_<k>thToken.jpg`
    (patch k with all, on the grid) and `PE_token_sim.jpg` (the same of the raw table, where there is one). Relative
    biases: `<join>_layer<i>_head<j>.jpg`. For both an `overview` (all layers); for tables also `places` (corner, edge,
    centre) and `measures` (curves over depth), each as PNG, PDF and SVG; `caption.txt` says what they show,
    `positions.npz` has the numbers. Layers count from 0. The names are those of the LaPE authors' script.

    `source` is a converted model, or a checkpoint that `lape.files.read.read_checkpoint` reads; of the options, join,
    pe and ema are for checkpoints: what it must hold (None: what it says), and whose weights. As model_name,
    deit_{t,s,b}[_distill]_... also says the model where the checkpoint does not. A relative bias has no views.
    Files that an earlier call drew there and this one does not replace stay; `leftovers` names them.

    Returns the files written. Raises LapeError for a model without positions, a token outside the grid, a view or size
    that means nothing, a checkpoint that cannot be read or contradicts join or pe, a folder that cannot be written.
    """
    options = options or DrawOptions()
    if isinstance(source, nn.Module):
        if options.join_type is not None or options.pe is not None or options.ema:
            raise LapeError(
                "join, pe and ema choose what is read from a checkpoint, and a model was given: leave them out"
            )
        model, name = source, options.model_name or f"{type(source).__name__}_{describe(source).join}"
    else:
        model, name = restore_to_draw(read_checkpoint(source), options.model_name, **options.of_checkpoint)
    about = describe(model)
    if name in ("", ".", "..") or Path(name).name != name:
        raise LapeError(f"model_name={name!r} is not the name of a folder: put the path into save_dir")
    pictures = Pictures(Path(save_dir) / name, options, () if isinstance(source, nn.Module) else (source,))
    if KINDS[about.pe].is_bias:
        if options.size is not None or options.view is not None:
            raise LapeError(f"pe={about.pe!r} is a bias on attention logits of one grid: leave size and view out")
        return _draw_biases(pictures, model, about, check_token(about.grid, options.token))
    view = options.view or "seen"
    maps = Maps.of(model, options.sides, view, frames=True)
    return _draw_positions(pictures, model, maps, about, check_token(maps.grid, options.token), view)


def leftovers(paths: Sequence[Path]) -> list[str]:
    """The names of pictures that an earlier call drew into the same folder, and the call that wrote these did not."""
    names = {path.name for path in paths}
    names_there = {path.name for path in paths[0].parent.glob("*") if _PICTURE.fullmatch(path.name)}
    return sorted(names_there - names)


_PICTURE = re.compile(
    r"[\w-]+_layer\d+_(sim_overall|sim_\d+thToken|head\d+)\.jpg|PE_token_sim\.jpg|(places|measures)\.(png|pdf|svg)"
)


def _draw_positions(
    pictures: Pictures, model: nn.Module, maps: Maps, about: Description, token: int, view: View
) -> list[Path]:
    what, options = _what(model, about, maps.grid), pictures.options
    indices = options.layer_indices(len(maps.layers_Lnn))
    layers = {f"layer {layer}": maps.layers_Lnn[layer] for layer in indices}
    table = maps.table_nn if options.layers is None else None
    by_column = layers if table is None else {"table P": table, **layers}
    scale = colour_range(options.range, by_column.values(), COSINE[0]), COSINE[1]
    legend = f"cosine similarity between positions as {VIEW_WORDS[view]}, {_range(scale[0])}"
    overall = Strip("all patches", list(layers.values()), maps.grid)
    single = _strip_of_token(f"token {token}", layers.values(), maps.grid, token)
    for strip, suffix, scope in (
        (overall, "sim_overall", "all patches with all"),
        (single, f"sim_{token}thToken", f"{_place(token, maps.grid)} with all patches, on the grid"),
    ):
        names = [f"{about.join}_layer{layer}_{suffix}.jpg" for layer in indices]
        pictures.add_maps(strip, list(layers), what, names, *scale)
        pictures.captions[f"{about.join}_layer*_{suffix}"] = f"{what}; {legend}; {scope}"
    if table is not None:
        raw = _strip_of_token(single.label, [table], maps.grid, token)
        pictures.add_maps(raw, ["table P"], what, ["PE_token_sim.jpg"], *scale)
        pictures.captions["PE_token_sim"] = f"{what}; the same of the raw table P"
    all_maps, columns = list(by_column.values()), list(by_column)
    strips = [replace(overall, maps=all_maps), *_strips_of_frames(single.label, all_maps, maps.grid, token)]
    title = f"{what}\npositions as {VIEW_WORDS[view]}"
    head = pictures.title(f"{title}; {_place(token, maps.grid)}")
    caption = f"{what}; {legend}. Above all patches with all, below {_place(token, maps.grid)} with all, on the grid"
    pictures.add_figure(overview(head, strips, columns, *scale, options.inches), "overview", caption)
    strips = [_strip_of_frame(f"{name}\n{k}", all_maps, maps.grid, k) for name, k in named_tokens(maps.grid).items()]
    figure = overview(pictures.title(title), strips, columns, *scale, options.inches)
    where = ", ".join(f"{name} ({_place(k, maps.grid)})" for name, k in named_tokens(maps.grid).items())
    pictures.add_figure(figure, "places", f"{what}; {legend}. A patch with all, on the grid: {where}")
    measures = measure_all(maps.layers_Lnn, maps.patches_LnD, maps.grid)
    figure = curves(pictures.title(what), {about.join: measures}, options.inches)
    pictures.add_figure(figure, "measures", f"{what}; {_measure_caption(measures)}")
    distance_K, similarity_LK = similarity_by_distance(maps.layers_Lnn, maps.grid)
    numbers = {
        "positions": maps.positions_LND,
        "correlation": maps.layers_Lnn,
        "token_maps": token_map(maps.layers_Lnn, maps.grid, token),
        "distance": distance_K,
        "similarity_by_distance": similarity_LK,
        **measures,
    }
    if maps.table_ND is not None and maps.table_nn is not None:
        numbers |= {"table": maps.table_ND, "table_correlation": maps.table_nn}
    return pictures.finish(numbers, about, grid=maps.grid, token=token, view=view)


def _strip_of_token(label: str, maps: Iterable[Tensor | None], grid: Grid, token: int) -> Strip:
    """One patch's part of each map (n, n), laid out on the grid; frames side by side, a column apart."""
    *frame, row, column = place_of_token(grid, token)
    rows, columns = grid[-2:]
    film = (rows, columns if not frame else grid[0] * (columns + 1) - 1)
    at = row * film[1] + column + sum(frame) * (columns + 1)
    parts = [None if m is None else _film(token_map(m, grid, token)) for m in maps]
    return Strip(label, parts, film, at, _place(token, grid), grid[0] if frame else 1)


def _film(map_TRC: Tensor) -> Tensor:
    """(frames, rows, columns) -> (rows, all columns), with nothing between frames; (rows, columns) as it is."""
    if map_TRC.ndim == 2:
        return map_TRC
    return F.pad(map_TRC, (0, 1), value=math.nan).transpose(0, 1).flatten(1)[:, :-1]


MOST_FRAMES = 6


def _strips_of_frames(label: str, maps: Sequence[Tensor | None], grid: Grid, token: int) -> list[Strip]:
    """As `_strip_of_token`, a strip a frame: the patch's own and others, evenly, of a video of many."""
    if len(grid) == 2:
        return [_strip_of_token(label, maps, grid, token)]
    frame = place_of_token(grid, token)[0]
    step = math.ceil(grid[0] / MOST_FRAMES)
    return [_strip_of_frame(f"{label}\nframe {t}", maps, grid, token, t) for t in range(frame % step, grid[0], step)]


def _strip_of_frame(
    label: str, maps: Iterable[Tensor | None], grid: Grid, token: int, frame: int | None = None
) -> Strip:
    """One patch's part of each map (n, n) in its own frame, or another one."""
    if len(grid) == 2:
        return _strip_of_token(label, maps, grid, token)
    token_frame, row, column = place_of_token(grid, token)
    parts = [None if m is None else token_map(m, grid, token)[token_frame if frame is None else frame] for m in maps]
    at = token_at(grid[1:], (row, column)) if frame in (None, token_frame) else -1
    return Strip(label, parts, grid[1:], at, _place(token, grid))


def named_tokens(grid: Grid) -> dict[str, int]:
    """The patches that readers look at first: in the corner, in the middle of the upper edge, in the centre.

    Of a video, those of the frame in the middle.
    """
    *frame, row, column = place_of_token(grid, center_token(grid))
    cells = {"corner": (0, 0), "edge": (0, column), "centre": (row, column)}
    return {name: token_at(grid, (*frame, *place)) for name, place in cells.items()}


def curves(title: str, series: Mapping[str, Mapping[str, Tensor]], width: float | None = None) -> Figure:
    """Measures over depth, a panel a measure and a line a model: name -> measure -> (L,) numbers; width in inches."""
    names = [name for name in MEASURES if any(name in measures for measures in series.values())]
    panel = 3.0 if width is None else 1.85
    wide = min(4, len(names), 4 if width is None else max(1, int(width / TEXT_SCALE / panel)))
    high = math.ceil(len(names) / wide)
    figure = _figure(panel * wide + 0.3, 2.15 * high + (0.75 if title else 0.2) + 0.2 * (len(series) > 1))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.99))
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        for index, (label, measures) in enumerate(series.items()):
            values = measures[name].double().cpu()
            values = values.where(values.isfinite(), math.nan)
            colour = COLOURS.get(label, SERIES[index % len(SERIES)])
            style = {"color": colour, "linestyle": ("-", "--", ":")[index // len(SERIES) % 3]}
            axes.plot(
                range(len(values)), values.numpy(), label=label, linewidth=1.6, marker="o", markersize=2.6, **style
            )
        axes.set_title(textwrap.fill(MEASURES[name].label, int(13 * panel)), fontsize=9.5)
        axes.set_xlabel("layer", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", useOffset=False)  # "+1.44e1" above a panel is overlooked
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        lines = [part for line in title.splitlines() for part in textwrap.wrap(line, int(12 * (panel * wide + 0.3)))]
        figure.suptitle("\n".join(lines), fontsize=10.5)
    if len(series) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(series), 4), frameon=False, fontsize=9)
    return scale_to_width(figure, width)


def draw_together(
    models: Mapping[str, nn.Module],
    save_dir: str | PathLike[str],
    *,
    view: View = "seen",
    options: DrawOptions | None = None,
) -> list[Path]:
    """Draws several models layer by layer in one figure with one colour scale, into `save_dir`.

    `comparison_overall` (all patches), `comparison_centre`, `comparison_corner`, `comparison_edge` (that patch with
    all) and `comparison_measures` (curves over depth), each as PNG, PDF and SVG; for two or more models with relative
    biases the same places as `comparison_bias_centre`, ..., mean over the heads; `comparison_caption.txt` says what is
    shown. Models may differ in depth and grid. Of the options, those count that say how figures look, and `layers`.

    Returns the files. Raises LapeError for fewer than two models of one sort, or a folder that cannot be written.
    """
    tables, biases = by_kind(models)
    if max(len(tables), len(biases)) < 2:
        raise LapeError(
            f"{len(tables)} of {len(models)} models have positions to compare, {len(biases)} a bias: give two or more "
            "of one sort"
        )
    pictures = Pictures(Path(save_dir), options or DrawOptions())
    if len(tables) > 1:
        _compare_tables(pictures, tables, view)
    if len(biases) > 1:
        _compare_biases(pictures, biases)
    pictures.write_captions("comparison_caption.txt")
    return pictures.paths


def by_kind(models: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The models with positions, and those with relative biases: each sort can be drawn in one figure."""
    kinds = {name: KINDS[describe(model).pe] for name, model in models.items()}
    tables = {name: model for name, model in models.items() if kinds[name].is_table}
    return tables, {name: model for name, model in models.items() if kinds[name].is_bias}


def _compare_biases(pictures: Pictures, models: Mapping[str, nn.Module]) -> None:
    biases = {name: bias_to_show(model).mean(1) for name, model in models.items()}
    for name, bias in biases.items():
        check_finite(bias, f"the biases of {name}")
    limit = max(bias.abs().max().item() for bias in biases.values()) or 1.0
    maps = {name: (describe(models[name]).grid, None, bias_Lnn) for name, bias_Lnn in biases.items()}
    rows, columns, colours = _rows(pictures.options, maps, Normalize(-limit, limit))
    for place in PLACES:
        title = f"bias of the patch in the {place}, mean of the heads"
        _side_by_side(pictures, title, rows, columns, place, (colours, "bias on attention logits"), f"bias_{place}")


def _compare_tables(pictures: Pictures, models: Mapping[str, nn.Module], view: View) -> None:
    maps = {name: Maps.of(model, view=view, frames=True) for name, model in models.items()}
    parts = {name: (m.grid, m.table_nn, m.layers_Lnn) for name, m in maps.items()}
    rows, columns, colours = _rows(pictures.options, parts, COSINE[0])
    title = f"positions as {VIEW_WORDS[view]}"
    _side_by_side(pictures, f"{title}, all patches", rows, columns, None, (colours, COSINE[1]), "overall")
    for place in PLACES:
        _side_by_side(pictures, f"{title}: patch in the {place}", rows, columns, place, (colours, COSINE[1]), place)
    measures = {name: measure_all(m.layers_Lnn, m.patches_LnD, m.grid) for name, m in maps.items()}
    figure = curves(pictures.title(title), measures, pictures.options.inches)
    caption = f"{', '.join(models)}; {title}; {_measure_caption(next(iter(measures.values())))}"
    pictures.add_figure(figure, "comparison_measures", caption)


Rows = dict[str, tuple[Grid, list[Tensor | None]]]


def _rows(
    options: DrawOptions, maps: Mapping[str, tuple[Grid, Tensor | None, Tensor]], usual: Normalize
) -> tuple[Rows, list[str], Normalize]:
    """(each model's grid and maps, column titles, colour range)"""
    indices = options.layer_indices(max(len(layers_Lnn) for _, _, layers_Lnn in maps.values()))
    has_table = options.layers is None and any(table is not None for _, table, _ in maps.values())
    rows: Rows = {}
    for name, (grid, table, layers_Lnn) in maps.items():
        layers = [layers_Lnn[layer] if layer < len(layers_Lnn) else None for layer in indices]
        rows[name] = grid, [table, *layers] if has_table else layers
    columns = [*(["table P"] if has_table else []), *(f"layer {layer}" for layer in indices)]
    all_maps = [m for _, row in rows.values() for m in row if m is not None]
    return rows, columns, colour_range(options.range, all_maps, usual)


PLACES = ("centre", "corner", "edge")


def _side_by_side(
    pictures: Pictures,
    title: str,
    rows: Rows,
    columns: Sequence[str],
    place: str | None,
    scale: tuple[Normalize, str],
    stem: str,
) -> None:
    """Each model's maps (n, n) in a row, or those of its patch in that place; a model of fewer layers ends earlier."""
    strips = [
        Strip(name, maps, grid) if place is None else _strip_of_frame(name, maps, grid, named_tokens(grid)[place])
        for name, (grid, maps) in rows.items()
    ]
    figure = overview(pictures.title(title), strips, columns, *scale, pictures.options.inches)
    caption = f"{title}: {scale[1]}, {_range(scale[0])}. From above: {', '.join(rows)}"
    pictures.add_figure(figure, f"comparison_{stem}", caption)


def _draw_biases(pictures: Pictures, model: nn.Module, about: Description, token: int) -> list[Path]:
    bias_LHnn, options = bias_to_show(model), pictures.options
    check_finite(bias_LHnn, "the biases")
    limit = bias_LHnn.abs().max().item() or 1.0
    indices = options.layer_indices(len(bias_LHnn))
    scale = (
        colour_range(options.range, bias_LHnn[indices].flatten(0, 1), Normalize(-limit, limit)),
        "bias on attention logits",
    )
    layers = [f"layer {layer}" for layer in indices]
    what = _what(model, about, about.grid)
    heads = bias_LHnn[indices].unbind(1)
    strips = [Strip(f"head {head}", list(bias_Lnn), about.grid) for head, bias_Lnn in enumerate(heads)]
    for head, strip in enumerate(strips):
        names = [f"{about.join}_layer{layer}_head{head}.jpg" for layer in indices]
        pictures.add_maps(strip, layers, what, names, *scale)
    legend = f"{what}; {scale[1]}, {_range(scale[0])}"
    pictures.captions[f"{about.join}_layer*_head*"] = f"{legend}; of all patches between all"
    strips = [_strip_of_token(strip.label, strip.maps, about.grid, token) for strip in strips]
    title = f"{what}\nbias of {_place(token, about.grid)}, head by head"
    figure = overview(pictures.title(title), strips, layers, *scale, options.inches)
    pictures.add_figure(figure, "overview", f"{legend}; {_place(token, about.grid)} with all patches, head by head")
    numbers = {"bias": bias_LHnn, "token_maps": token_map(bias_LHnn, about.grid, token)}
    return pictures.finish(numbers, about, grid=about.grid, token=token)


def _range(colours: Normalize) -> str:
    return f"colours from {colours.vmin:.3g} to {colours.vmax:.3g}"


def _measure_caption(measures: Mapping[str, Tensor]) -> str:
    """In words, what the panels of `curves` show."""
    return "measures over the layers: " + ", ".join(MEASURES[name].label for name in MEASURES if name in measures)


def _what(model: nn.Module, about: Description, grid: Grid) -> str:
    """What is drawn, by the model's own name: that of the folder may be any."""
    factory = conversion_of(model).factory
    name, kwargs = factory.get("name") or type(model).__name__, factory.get("kwargs") or {}
    sizes = [f"{word} {kwargs[key]}" for key, word in (("embed_dim", "width"), ("depth", "depth")) if key in kwargs]
    size = f" ({', '.join(sizes)})" if sizes else ""
    return f"{name}{size}: join {about.join}, pe {about.pe}, {' x '.join(map(str, grid))} patches"


def _place(token: int, grid: Grid) -> str:
    place = zip(AXES[-len(grid) :], place_of_token(grid, token), strict=True)
    return f"token {token} ({', '.join(f'{axis} {at}' for axis, at in place)})"


class Pictures:
    """A folder being written: each file appears whole or not at all. Raises LapeError when it cannot be written."""

    def __init__(self, folder: Path, options: DrawOptions, inputs: Sequence[str | PathLike[str]] = ()):
        self.folder, self.options, self.inputs = folder, options, inputs
        self.paths: list[Path] = []
        self.captions: dict[str, str] = {}  # of files, by their names without kind

    def title(self, text: str) -> str:
        """What stands above a figure, if anything does."""
        return text if self.options.title else ""

    def add(self, figure: Figure, name: str, **savefig: Any) -> None:
        kind = name.rpartition(".")[2]
        if kind in ("jpg", "png"):
            savefig["dpi"] = self.options.dpi
        if kind == "jpg":
            savefig["pil_kwargs"] = {"quality": 92, "subsampling": 0}
        # text stays text, letters are TrueType (publishers refuse Type 3), the ids are the same every time
        with rc_context({"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "lape"}):
            self._write(name, lambda file: figure.savefig(file, format=kind, **savefig))
        figure.set_layout_engine("none")  # laid out once: it takes as long as drawing

    def add_maps(
        self,
        strip: Strip,
        columns: Sequence[str],
        what: str,
        names: Sequence[str],
        colours: Normalize = COSINE[0],
        unit: str = COSINE[1],
    ) -> None:
        """One picture a map."""
        maps = [values for values in strip.maps if values is not None]
        sheet = Sheet(strip, colours, unit, self.options)
        for values, column, name in zip(maps, columns, names, strict=True):
            self.add(sheet.show(values, f"{column}, {strip.about or strip.label}\n{what}"), name)

    def add_figure(self, figure: Figure, stem: str, caption: str) -> None:
        """PNG, PDF and SVG, without a date in them: the same numbers give the same files."""
        self.captions[stem] = caption
        self.add(figure, f"{stem}.png")
        self.add(figure, f"{stem}.pdf", metadata={"CreationDate": None})
        self.add(figure, f"{stem}.svg", metadata={"Date": None})

    def finish(self, numbers: dict[str, Tensor], about: Description, **facts: Any) -> list[Path]:
        """Writes positions.npz (the arrays, and join, pe, num_prefix_tokens and `facts`) and caption.txt; returns the
        paths of all files."""
        facts |= {"join": about.join, "pe": about.pe, "num_prefix_tokens": about.prefix_tokens}
        arrays: dict[str, Any] = facts | {name: value.cpu().numpy() for name, value in numbers.items()}
        self._write("positions.npz", lambda file: np.savez_compressed(file, **arrays))
        self.write_captions("caption.txt")
        return self.paths

    def write_captions(self, name: str) -> None:
        """What each file shows, a line a file."""
        text = "".join(f"{stem}: {caption}.\n" for stem, caption in self.captions.items())
        self._write(name, lambda file: file.write(text.encode()))

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LapeError(f"cannot create the folder {self.folder} ({error.strerror}): choose another one") from None
        keep_inputs([self.folder / name], self.inputs)
        write_atomically(self.folder / name, write)
        self.paths.append(self.folder / name)
