"""Positions as pictures: the numbers of `lape.look.similarity`, drawn; nothing is derived from a model's weights here.

One colour scale throughout: -1..1 for cosine similarity, symmetric about zero for biases, on a diverging map that
colour-blind readers can tell apart. Figures are built without pyplot: no window system, no global state.
Shape suffixes: L layers, N tokens, n patches (prefix tokens left out), D width, H heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor, nn

from lape.convert.positions import Description, View, describe, position_bias
from lape.core.position import KINDS, Grid
from lape.errors import LapeError, needs
from lape.files.atomic import write_atomically
from lape.files.read import read_checkpoint
from lape.files.restore import restore_to_draw
from lape.look.colours import COLOURS
from lape.look.measures import MEASURES, measure_all
from lape.look.options import DrawOptions
from lape.look.similarity import Maps, center_token, check_token, similarity_by_distance, token_map

with needs("plot"):
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

COLOUR_MAP = "RdBu_r"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
WHO: dict[View, str] = {
    "seen": "each layer sees them",
    "received": "each layer receives them",
    "unbiased": "each layer sees them, without the bias of its norm",
}
COSINE = Normalize(-1, 1), "cosine similarity"


# --- one map ----------------------------------------------------------------------------------------------------------


def draw_map(axes: Axes, values: Tensor, grid: Grid, token: int | None, norm: Normalize, most_ticks: int = 8) -> Any:
    """One map as an image: (n, n) between all patches, or, with `token`, (rows, columns) of that patch, framed.

    Ticks count patches; those of an n x n map stand where a row of the grid begins. Returns the image.
    """
    height, width = values.shape
    image = axes.imshow(values.numpy(), cmap=COLOUR_MAP, norm=norm, interpolation="antialiased", aspect="equal")
    unit = 1 if token is not None else grid[1]
    axes.set_xticks(_ticks(width, unit, most_ticks))
    axes.set_yticks(_ticks(height, unit, most_ticks))
    if token is not None:
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


class Sheet:
    """A figure with one map and its colour bar, drawn again and again with other values: laid out only once."""

    def __init__(self, values: Tensor, grid: Grid, token: int | None, norm: Normalize, unit: str):
        aspect = values.shape[-1] / values.shape[-2]
        width = min(4.2 * math.sqrt(max(aspect, 1.0)), 8.5) * min(aspect, 1.0)
        height = max(width / aspect, 1.2)
        left, right, bottom, top = 0.75, 1.05, 0.6, 0.65
        slack = max(0.0, 5.6 - (left + width + right)) / 2  # room for the title above a narrow map
        self.figure = _figure(2 * slack + left + width + right, bottom + height + top)
        axes = self.figure.add_axes(_box(self.figure, slack + left, bottom, width, height))
        self._image = draw_map(axes, values, grid, token, norm)
        axes.set_xlabel("patch" if token is None else "column of patches")
        axes.set_ylabel("patch" if token is None else "row of patches")
        bar = self.figure.add_axes(_box(self.figure, slack + left + width + 0.12, bottom, 0.16, height))
        self.figure.colorbar(self._image, cax=bar).set_label(unit)
        top_y = 1 - 0.1 / self.figure.get_size_inches()[1]
        self._title = self.figure.text(0.5, top_y, "", ha="center", va="top", fontsize=10.5)

    def show(self, values: Tensor, title: str) -> Figure:
        self._image.set_data(values.numpy())
        self._title.set_text(title)
        return self.figure


# --- many maps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """One row of an overview, a map a column: all patches (token None) or one patch's map on the grid."""

    label: str
    maps: Sequence[Tensor | None]  # None leaves a place empty
    grid: Grid
    token: int | None = None

    @property
    def aspect(self) -> float:
        height, width = next(m for m in self.maps if m is not None).shape
        return width / height

    @property
    def axes_label(self) -> str:
        return "patch" if self.token is None else "row, column"


def overview(title: str, strips: Sequence[Strip], columns: Sequence[str], norm: Normalize, unit: str) -> Figure:
    """Strips under each other with one colour range and one bar; too many columns are broken into bands."""
    cell = 1.4 * min(max(math.sqrt(max(strip.aspect for strip in strips)), 1.0), 2.0)
    bands = _bands(len(columns), most=int(18 / cell))
    heights = [cell / max(strip.aspect, 1.0) for strip in strips]
    labelled = [k + 1 == len(strips) or strips[k + 1].axes_label != strips[k].axes_label for k in range(len(strips))]
    gap, left, right, top, head = 0.12, 0.85, 0.95, 0.55, 0.3
    band_height = head + sum(heights) + sum(0.3 if ticks else gap for ticks in labelled) + 0.1
    width = max(left + len(bands[0]) * (cell + gap) + right, 7.0)
    height = top + len(bands) * band_height + 0.05

    figure = _figure(width, height)
    for number, band in enumerate(bands):
        y = height - top - number * band_height - head
        for strip, strip_height, ticks in zip(strips, heights, labelled, strict=True):
            for place, column in enumerate(band):
                values = strip.maps[column]
                if values is None:
                    continue
                box = _box(figure, left + place * (cell + gap), y - strip_height, cell, strip_height)
                axes = figure.add_axes(box)
                draw_map(axes, values, strip.grid, strip.token, norm, most_ticks=4)
                axes.tick_params(labelsize=6.5, length=2, pad=1.5, labelleft=place == 0, labelbottom=ticks)
                if column == band[0] or strip.maps[column - 1] is None:
                    axes.set_ylabel(strip.label, fontsize=8, labelpad=3)
                    axes.tick_params(labelleft=True)
                if strip is strips[0] or strips[0].maps[column] is None:
                    axes.set_title(columns[column], fontsize=9, pad=4)
            y -= strip_height + (0.3 if ticks else gap)
    bar_height = min(height - top - head - 0.4, 4.0)
    bar = figure.add_axes(_box(figure, width - right + 0.1, height - top - head - bar_height, 0.14, bar_height))
    shown = next(axes.images[0] for axes in figure.axes if axes.images)
    figure.colorbar(shown, cax=bar).set_label(unit, fontsize=8)
    bar.tick_params(labelsize=7)
    figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=11)
    return figure


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
    biases: `<join>_layer<i>_head<j>.jpg`. Both: `overview` (all layers), tables also `places` (corner, edge and centre)
    and `measures` (curves over depth), each as PNG, PDF and SVG; and the numbers in `positions.npz`.
    Layers count from 0. The names are those of the LaPE authors' script.

    `source` is a converted model, or a checkpoint that `lape.files.read.read_checkpoint` reads; of the options, join,
    pe and ema are for checkpoints: what it must hold (None: what it says), and whose weights. As model_name,
    deit_{t,s,b}[_distill]_... also says the model where the checkpoint does not. A relative bias has no views.
    Files that an earlier call drew there and this one does not replace stay; `left_over` names them.

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
        model, name = restore_to_draw(
            read_checkpoint(source),
            options.model_name,
            size=options.sides,
            ema=options.ema,
            join=options.join_type,
            pe=options.pe,
        )
    about = describe(model)
    if name in ("", ".", "..") or Path(name).name != name:
        raise LapeError(f"model_name={name!r} is not the name of a folder: put the path into save_dir")
    pictures = Pictures(Path(save_dir) / name)
    if KINDS[about.pe].is_bias:
        if options.size is not None or options.view is not None:
            raise LapeError(f"pe={about.pe!r} is a bias on attention logits of one grid: leave size and view out")
        return _draw_biases(pictures, model, about, check_token(about.grid, options.token))
    view = options.view or "seen"
    maps = Maps.of(model, options.sides, view)
    return _draw_positions(pictures, maps, about, check_token(maps.grid, options.token), view)


def left_over(written: Sequence[Path]) -> list[str]:
    """The names of pictures that an earlier call drew into the same folder, and the call that wrote these did not."""
    mine = {path.name for path in written}
    there = {path.name for path in written[0].parent.glob("*") if _DRAWN.fullmatch(path.name)}
    return sorted(there - mine)


_DRAWN = re.compile(
    r"[\w-]+_layer\d+_(sim_overall|sim_\d+thToken|head\d+)\.jpg|PE_token_sim\.jpg|(places|measures)\.(png|pdf|svg)"
)


def _draw_positions(pictures: Pictures, maps: Maps, about: Description, token: int, view: View) -> list[Path]:
    what = _what(pictures.folder, about, maps.grid)
    layers = maps.columns
    table = layers.pop("table P", None)
    overall = Strip("all patches", list(layers.values()), maps.grid)
    single = _strip_of_token(f"token {token}", layers.values(), maps.grid, token)
    for strip, suffix in ((overall, "sim_overall"), (single, f"sim_{token}thToken")):
        pictures.add_maps(
            strip, list(layers), what, [f"{about.join}_layer{i}_{suffix}.jpg" for i in range(len(layers))]
        )
    if table is not None:
        raw = _strip_of_token(single.label, [table], maps.grid, token)
        pictures.add_maps(raw, ["table P"], what, ["PE_token_sim.jpg"])
    every, columns = list(maps.columns.values()), list(maps.columns)
    strips = [replace(overall, maps=every), _strip_of_token(single.label, every, maps.grid, token)]
    title = f"{what}\npositions as {WHO[view]}"
    pictures.add_figure(overview(f"{title}; {_place(token, maps.grid)}", strips, columns, *COSINE), "overview")
    strips = [_strip_of_token(f"{name}\n{k}", every, maps.grid, k) for name, k in places(maps.grid).items()]
    pictures.add_figure(overview(title, strips, columns, *COSINE), "places")
    measures = measure_all(maps.layers_Lnn, maps.patches_LnD, maps.grid)
    pictures.add_figure(curves(what, {about.join: measures}), "measures")
    distance_K, similarity_LK = similarity_by_distance(maps.layers_Lnn, maps.grid)
    numbers = {
        "positions": maps.positions_LND,
        "correlation": maps.layers_Lnn,
        "token_maps": token_map(maps.layers_Lnn, maps.grid, token),
        "distance": distance_K,
        "similarity_by_distance": similarity_LK,
        **measures,
    }
    if maps.table_ND is not None and table is not None:
        numbers |= {"table": maps.table_ND, "table_correlation": table}
    return pictures.finish(numbers, about, grid=maps.grid, token=token, view=view)


def _strip_of_token(label: str, maps: Iterable[Tensor | None], grid: Grid, token: int) -> Strip:
    """One patch's part of each map (n, n), laid out on the grid."""
    return Strip(label, [None if m is None else token_map(m, grid, token) for m in maps], grid, token)


def places(grid: Grid) -> dict[str, int]:
    """The patches that readers look at first: in the corner, in the middle of the upper edge, in the centre."""
    center = center_token(grid)
    return {"corner": 0, "edge": center % grid[1], "centre": center}


def curves(title: str, series: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Measures over depth, a panel a measure and a line a model: name -> measure -> (L,) numbers."""
    names = [name for name in MEASURES if any(name in measured for measured in series.values())]
    wide = min(4, len(names))
    high = math.ceil(len(names) / wide)
    figure = _figure(3.0 * wide + 0.3, 2.15 * high + 0.75 + 0.2 * (len(series) > 1))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.99))
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, names, strict=False):
        for index, (label, measured) in enumerate(series.items()):
            values = measured[name].double().cpu()
            values = values.where(values.isfinite(), math.nan)
            colour = COLOURS.get(label, SERIES[index % len(SERIES)])
            style = {"color": colour, "linestyle": ("-", "--", ":")[index // len(SERIES) % 3]}
            axes.plot(
                range(len(values)), values.numpy(), label=label, linewidth=1.6, marker="o", markersize=2.6, **style
            )
        axes.set_title(MEASURES[name].label, fontsize=9.5)
        axes.set_xlabel("layer", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10.5)
    if len(series) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(series), 4), frameon=False, fontsize=9)
    return figure


def draw_together(models: Mapping[str, nn.Module], save_dir: str | PathLike[str], *, view: View = "seen") -> list[Path]:
    """Draws several models layer by layer in one figure with one colour scale, into `save_dir`.

    `comparison_overall` (all patches), `comparison_centre`, `comparison_corner`, `comparison_edge` (that patch with
    all) and `comparison_measures` (curves over depth), each as PNG, PDF and SVG; for two or more models with relative
    biases the same places as `comparison_bias_centre`, ..., mean over the heads. Models may differ in depth and grid.

    Returns the files. Raises LapeError for fewer than two models of one sort, or a folder that cannot be written.
    """
    tables, biased = sorts(models)
    if max(len(tables), len(biased)) < 2:
        raise LapeError(
            f"{len(tables)} of {len(models)} models have positions to compare, {len(biased)} a bias: give two or more "
            "of one sort"
        )
    pictures = Pictures(Path(save_dir))
    if len(tables) > 1:
        _compare_tables(pictures, tables, view)
    if len(biased) > 1:
        _compare_biases(pictures, biased)
    return pictures.written


def sorts(models: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The models with positions, and those with relative biases: each sort can be drawn in one figure."""
    kinds = {name: KINDS[describe(model).pe] for name, model in models.items()}
    tables = {name: model for name, model in models.items() if kinds[name].is_table}
    return tables, {name: model for name, model in models.items() if kinds[name].is_bias}


def _compare_biases(pictures: Pictures, models: Mapping[str, nn.Module]) -> None:
    biases = {name: position_bias(model).detach().float().cpu().mean(1) for name, model in models.items()}
    limit = max(_largest(bias) for bias in biases.values()) or 1.0
    rows = {name: (describe(models[name]).grid, list(bias_Lnn)) for name, bias_Lnn in biases.items()}
    columns = [f"layer {layer}" for layer in range(max(map(len, biases.values())))]
    for place in PLACES:
        title = f"bias of the patch in the {place}, mean of the heads"
        figure = _side_by_side(title, rows, columns, place, Normalize(-limit, limit), "bias on attention logits")
        pictures.add_figure(figure, f"comparison_bias_{place}")


def _compare_tables(pictures: Pictures, models: Mapping[str, nn.Module], view: View) -> None:
    maps = {name: Maps.of(model, view=view) for name, model in models.items()}
    columns = ["table P", *(f"layer {layer}" for layer in range(max(len(m.layers_Lnn) for m in maps.values())))]
    rows = {name: (m.grid, [m.table_nn, *m.layers_Lnn]) for name, m in maps.items()}
    title = f"positions as {WHO[view]}"
    pictures.add_figure(_side_by_side(f"{title}, all patches", rows, columns, None, *COSINE), "comparison_overall")
    for place in PLACES:
        figure = _side_by_side(f"{title}: patch in the {place}", rows, columns, place, *COSINE)
        pictures.add_figure(figure, f"comparison_{place}")
    measures = {name: measure_all(m.layers_Lnn, m.patches_LnD, m.grid) for name, m in maps.items()}
    pictures.add_figure(curves(title, measures), "comparison_measures")


PLACES = ("centre", "corner", "edge")


def _side_by_side(
    title: str,
    rows: Mapping[str, tuple[Grid, Sequence[Tensor | None]]],
    columns: Sequence[str],
    place: str | None,
    norm: Normalize,
    unit: str,
) -> Figure:
    """Each model's maps (n, n) in a row, or those of its patch in that place; a model of fewer layers ends earlier."""
    strips = []
    for name, (grid, maps) in rows.items():
        maps = [*maps, *[None] * (len(columns) - len(maps))]
        strips.append(
            Strip(name, maps, grid) if place is None else _strip_of_token(name, maps, grid, places(grid)[place])
        )
    return overview(title, strips, columns, norm, unit)


def _largest(bias: Tensor) -> float:
    """Of the absolute values; where a head may not look, the bias is minus infinity."""
    return bias.where(bias.isfinite(), 0.0).abs().max().item()


def _draw_biases(pictures: Pictures, model: nn.Module, about: Description, token: int) -> list[Path]:
    bias_LHnn = position_bias(model).detach().float().cpu()
    limit = _largest(bias_LHnn) or 1.0
    scale = Normalize(-limit, limit), "bias on attention logits"
    layers = [f"layer {layer}" for layer in range(len(bias_LHnn))]
    what = _what(pictures.folder, about, about.grid)
    strips = [Strip(f"head {head}", list(bias_Lnn), about.grid) for head, bias_Lnn in enumerate(bias_LHnn.unbind(1))]
    for head, strip in enumerate(strips):
        names = [f"{about.join}_layer{layer}_head{head}.jpg" for layer in range(len(layers))]
        pictures.add_maps(strip, layers, what, names, *scale)
    strips = [_strip_of_token(strip.label, strip.maps, about.grid, token) for strip in strips]
    title = f"{what}\nbias of {_place(token, about.grid)}, head by head"
    pictures.add_figure(overview(title, strips, layers, *scale), "overview")
    numbers = {"bias": bias_LHnn, "token_maps": token_map(bias_LHnn, about.grid, token)}
    return pictures.finish(numbers, about, grid=about.grid, token=token)


def _what(folder: Path, about: Description, grid: Grid) -> str:
    return f"{folder.name}: join {about.join}, pe {about.pe}, {grid[0]} x {grid[1]} patches"


def _place(token: int, grid: Grid) -> str:
    return f"token {token} (row {token // grid[1]}, column {token % grid[1]})"


class Pictures:
    """A folder being written: each file appears whole or not at all. Raises LapeError when it cannot be written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[Path] = []

    def add(self, figure: Figure, name: str, **options: Any) -> None:
        kind = name.rpartition(".")[2]
        if kind == "jpg":
            options["pil_kwargs"] = {"quality": 92, "subsampling": 0}
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lape"}):  # text stays text; the same ids every time
            self._write(name, lambda file: figure.savefig(file, format=kind, **options))

    def add_maps(
        self,
        strip: Strip,
        columns: Sequence[str],
        what: str,
        names: Sequence[str],
        norm: Normalize = COSINE[0],
        unit: str = COSINE[1],
    ) -> None:
        """One picture a map."""
        maps = [values for values in strip.maps if values is not None]
        sheet = Sheet(maps[0], strip.grid, strip.token, norm, unit)
        for values, column, name in zip(maps, columns, names, strict=True):
            label = strip.label if strip.token is None else _place(strip.token, strip.grid)
            self.add(sheet.show(values, f"{column}, {label}\n{what}"), name)

    def add_figure(self, figure: Figure, stem: str) -> None:
        """PNG, PDF and SVG, without a date in them: the same numbers give the same files."""
        self.add(figure, f"{stem}.png", dpi=150)
        self.add(figure, f"{stem}.pdf", metadata={"CreationDate": None})
        self.add(figure, f"{stem}.svg", metadata={"Date": None})

    def finish(self, numbers: dict[str, Tensor], about: Description, **facts: Any) -> list[Path]:
        """Writes positions.npz: the arrays, and join, pe, num_prefix_tokens and `facts` beside them."""
        facts |= {"join": about.join, "pe": about.pe, "num_prefix_tokens": about.prefix_tokens}
        arrays: dict[str, Any] = facts | {name: value.cpu().numpy() for name, value in numbers.items()}
        self._write("positions.npz", lambda file: np.savez_compressed(file, **arrays))
        return self.written

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LapeError(f"cannot create the folder {self.folder} ({error.strerror}): choose another one") from None
        write_atomically(self.folder / name, write)
        self.written.append(self.folder / name)
