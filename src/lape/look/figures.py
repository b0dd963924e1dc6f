"""Positions as pictures: the numbers of `lape.look.similarity`, drawn; nothing is derived from a model's weights here.

One colour scale throughout: -1..1 for cosine similarity, symmetric about zero for biases, on a diverging map that
colour-blind readers can tell apart. Figures are built without pyplot: no window system, no global state.
Shape suffixes: L layers, N tokens, n patches (prefix tokens left out), D width, H heads.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from lape.errors import LapeError
from lape.files.atomic import write_atomically
from lape.files.restore import load
from lape.layers import Description, Size, View, describe, position_bias, positions
from lape.look.colours import COLOURS as JOIN_COLOURS
from lape.look.measures import MEASURES, measure_all
from lape.look.similarity import (
    center_token,
    check_token,
    cosine,
    grid_at,
    raw_table,
    similarity_by_distance,
    token_map,
)
from lape.position import KINDS, Grid

COLOURS = "RdBu_r"
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
    image = axes.imshow(values.numpy(), cmap=COLOURS, norm=norm, interpolation="antialiased", aspect="equal")
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
    source: str | PathLike[str] | nn.Module,
    save_dir: str | PathLike[str],
    *,
    model_name: str | None = None,
    token: int | None = None,
    size: Size | None = None,
    view: View | None = None,
    join: str | None = None,
    pe: str | None = None,
    ema: bool = False,
) -> list[Path]:
    """Draws what a model's positions became in every layer, into the folder `<save_dir>/<model_name>/`.

    Tables: `<join>_layer<i>_sim_overall.jpg` (cosine similarity of all patches), `<join>_layer<i>_sim_<k>thToken.jpg`
    (patch k with all, on the grid) and `PE_token_sim.jpg` (the same of the raw table, where there is one). Relative
    biases: `<join>_layer<i>_head<j>.jpg`. Both: `overview` (all layers), tables also `places` (corner, edge and centre)
    and `measures` (curves over depth), each as PNG, PDF and SVG; and the numbers in `positions.npz`.
    Layers count from 0. The names are those of the LaPE authors' script.

    Args:
        source: a converted model, or a checkpoint that `lape.files.read.read_checkpoint` reads.
        model_name: names the folder; deit_{t,s,b}[_distill]_... also says the model where the checkpoint does not.
        token: index k of the patch, row x columns + column; None is the centre (90 on 14 x 14).
        size: image size in pixels, None the model's own.
        view: as in `lape.positions`, None is "seen"; a relative bias has no views.
        join, pe, ema: for a checkpoint: what it must hold (None: what it says); draw its averaged weights.

    Files that an earlier call drew there and this one does not replace stay; `left_over` names them.

    Returns the files written. Raises LapeError for a model without positions, a token outside the grid, a view or size
    that means nothing, a checkpoint that cannot be read or contradicts join or pe, a folder that cannot be written.
    """
    if isinstance(source, nn.Module):
        if join is not None or pe is not None or ema:
            raise LapeError(
                "join, pe and ema choose what is read from a checkpoint, and a model was given: leave them out"
            )
        model, name = source, model_name or f"{type(source).__name__}_{describe(source).join}"
    else:
        model, name = load(source, model_name, join, pe, size, ema)
    about = describe(model)
    if name in ("", ".", "..") or Path(name).name != name:
        raise LapeError(f"model_name={name!r} is not the name of a folder: put the path into save_dir")
    if KINDS[about.pe].is_bias:
        if size is not None or view is not None:
            raise LapeError(f"pe={about.pe!r} is a bias on attention logits of one grid: leave size and view out")
        return _draw_biases(model, Path(save_dir) / name, about, token)
    return _draw_positions(model, Path(save_dir) / name, about, token, size, view or "seen")


def left_over(written: Sequence[Path]) -> list[str]:
    """The names of pictures that an earlier call drew into the same folder, and the call that wrote these did not."""
    mine = {path.name for path in written}
    there = {path.name for path in written[0].parent.glob("*") if _DRAWN.fullmatch(path.name)}
    return sorted(there - mine)


_DRAWN = re.compile(
    r"[\w-]+_layer\d+_(sim_overall|sim_\d+thToken|head\d+)\.jpg|PE_token_sim\.jpg|(places|measures)\.(png|pdf|svg)"
)


def _draw_positions(
    model: nn.Module, folder: Path, about: Description, token: int | None, size: Size | None, view: View
) -> list[Path]:
    positions_LND = positions(model, size, view).detach()
    table_ND = raw_table(model, size)
    grid = grid_at(model, size)
    token = check_token(grid, token)
    correlation_Lnn = cosine(positions_LND[:, about.prefix_tokens :])
    maps_Lhw = token_map(correlation_Lnn, grid, token)
    overall, single = (
        Strip("all patches", list(correlation_Lnn), grid),
        Strip(f"token {token}", list(maps_Lhw), grid, token),
    )
    layers = [f"layer {layer}" for layer in range(len(correlation_Lnn))]
    what = _what(folder, about, grid)

    pictures = Pictures(folder)
    pictures.add_maps(overall, layers, what, [f"{about.join}_layer{i}_sim_overall.jpg" for i in range(len(layers))])
    pictures.add_maps(
        single, layers, what, [f"{about.join}_layer{i}_sim_{token}thToken.jpg" for i in range(len(layers))]
    )
    numbers = {"positions": positions_LND, "correlation": correlation_Lnn, "token_maps": maps_Lhw}
    if table_ND is not None:
        raw_nn = cosine(table_ND[about.prefix_tokens :])
        raw_hw = token_map(raw_nn, grid, token)
        pictures.add_maps(replace(single, maps=[raw_hw]), ["table P"], what, ["PE_token_sim.jpg"])
        numbers |= {"table": table_ND, "table_correlation": raw_nn}
        overall, single = replace(overall, maps=[raw_nn, *overall.maps]), replace(single, maps=[raw_hw, *single.maps])
        layers = ["table P", *layers]
    pictures.add_figure(
        overview(f"{what}\npositions as {WHO[view]}; {_place(token, grid)}", [overall, single], layers, *COSINE),
        "overview",
    )
    strips = [
        Strip(f"{name}\n{patch}", list(token_map(torch.stack(overall.maps), grid, patch)), grid, patch)  # type: ignore[arg-type]
        for name, patch in places(grid).items()
    ]
    pictures.add_figure(overview(f"{what}\npositions as {WHO[view]}", strips, layers, *COSINE), "places")
    measured = measure_all(correlation_Lnn, positions_LND[:, about.prefix_tokens :], grid)
    pictures.add_figure(curves(what, {about.join: measured}), "measures")
    numbers["distance"], numbers["similarity_by_distance"] = similarity_by_distance(correlation_Lnn, grid)
    numbers |= measured
    return pictures.finish(numbers, about, grid=grid, token=token, view=view)


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
            colour = JOIN_COLOURS.get(label, SERIES[index % len(SERIES)])
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


def compare(models: Mapping[str, nn.Module], save_dir: str | PathLike[str], *, view: View = "seen") -> list[Path]:
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


PLACES = ("centre", "corner", "edge")


def _compare_biases(pictures: "Pictures", models: Mapping[str, nn.Module]) -> None:
    biases = {name: position_bias(model).detach().float().cpu().mean(1) for name, model in models.items()}
    depth, limit = max(map(len, biases.values())), max(bias.abs().max().item() for bias in biases.values()) or 1.0
    columns = [f"layer {layer}" for layer in range(depth)]
    for place in PLACES:
        strips = []
        for name, bias_Lnn in biases.items():
            grid = describe(models[name]).grid
            token = places(grid)[place]
            maps = [*token_map(bias_Lnn, grid, token), *[None] * (depth - len(bias_Lnn))]
            strips.append(Strip(name, maps, grid, token))
        title = f"bias of the patch in the {place}, mean of the heads"
        figure = overview(title, strips, columns, Normalize(-limit, limit), "bias on attention logits")
        pictures.add_figure(figure, f"comparison_bias_{place}")


def _compare_tables(pictures: "Pictures", tables: Mapping[str, nn.Module], view: View) -> None:
    depth = max(describe(model).blocks for model in tables.values())
    maps: dict[str, list[Tensor | None]] = {}
    measured = {}
    for name, model in tables.items():
        seen_LnD = positions(model, view=view).detach()[:, describe(model).prefix_tokens :]
        table = raw_table(model)
        maps[name] = [None if table is None else cosine(table[describe(model).prefix_tokens :]), *cosine(seen_LnD)]
        maps[name] += [None] * (depth + 1 - len(maps[name]))
        measured[name] = measure_all(cosine(seen_LnD), seen_LnD, grid_at(model))
    columns = ["table P", *(f"layer {layer}" for layer in range(depth))]
    strips = [Strip(name, maps[name], grid_at(model)) for name, model in tables.items()]
    title = f"positions as {WHO[view]}"
    pictures.add_figure(overview(f"{title}, all patches", strips, columns, *COSINE), "comparison_overall")
    for place in PLACES:
        strips = []
        for name, model in tables.items():
            grid, token = grid_at(model), places(grid_at(model))[place]
            rows = [None if m is None else token_map(m, grid, token) for m in maps[name]]
            strips.append(Strip(name, rows, grid, token))
        pictures.add_figure(overview(f"{title}: patch in the {place}", strips, columns, *COSINE), f"comparison_{place}")
    pictures.add_figure(curves(title, measured), "comparison_measures")


def _draw_biases(model: nn.Module, folder: Path, about: Description, token: int | None) -> list[Path]:
    bias_LHnn = position_bias(model).detach().float().cpu()
    grid = about.grid
    token = check_token(grid, token)
    maps_LHhw = token_map(bias_LHnn, grid, token)
    limit = bias_LHnn.abs().max().item() or 1.0
    scale = Normalize(-limit, limit), "bias on attention logits"
    layers = [f"layer {layer}" for layer in range(len(bias_LHnn))]
    what = _what(folder, about, grid)

    pictures = Pictures(folder)
    for head, bias_Lnn in enumerate(bias_LHnn.unbind(1)):
        names = [f"{about.join}_layer{layer}_head{head}.jpg" for layer in range(len(layers))]
        pictures.add_maps(Strip(f"head {head}", list(bias_Lnn), grid), layers, what, names, *scale)
    strips = [Strip(f"head {head}", list(maps), grid, token) for head, maps in enumerate(maps_LHhw.unbind(1))]
    title = f"{what}\nbias of {_place(token, grid)}, head by head"
    pictures.add_figure(overview(title, strips, layers, *scale), "overview")
    return pictures.finish({"bias": bias_LHnn, "token_maps": maps_LHhw}, about, grid=grid, token=token)


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
