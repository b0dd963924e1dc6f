"""What a study leaves behind: sentences, tables, curves and pages. Every word is chosen from numbers of the runs."""

from __future__ import annotations

import html
import io
import json
import statistics
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.errors import needs
from lape.look.colours import COLOURS
from lape.study.numbers import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[str]]
"""A table: its header, and then its rows."""

# --- words ------------------------------------------------------------------------------------------------------------


def spell(value: dict[str, Any], sign: str = "") -> str:
    """'94.1 ± 1.1', or '94.1' for one value."""
    deviation = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:{sign}.1f}{deviation}"


def _standing(entry: dict[str, Any]) -> str:
    gap, of, against = entry["mean"], entry["of"], entry["against"]
    if round(abs(gap), 1) == 0:
        return f"{of} and {against} are level"
    return f"{of} is {'ahead of' if gap > 0 else 'behind'} {against} by {abs(gap):.1f} points"


def sentences(differences: Sequence[dict[str, Any]]) -> list[str]:
    """What each difference says, what it can be due to, and how it changes from the shortest to the longest budget."""
    several = len({(entry["model"], entry["pe"]) for entry in differences}) > 1
    count = sum(entry["p"] is not None for entry in differences)
    lines = []
    for entry in differences:
        epochs = f"After {entry['epochs']} epoch{'' if entry['epochs'] == 1 else 's'}"
        where = f" ({entry['model']}, {entry['pe']})" if several else ""
        line = f"{epochs}{where} {_standing(entry)}"
        if entry["p"] is None:
            line += ", in one seed: how much of it is chance was not measured."
        else:
            correction = f" after Holm's correction for {count} tests" if count > 1 else ""
            interval, p = spell_interval(entry["interval"], "+"), _p_value(entry["p_holm"], "= ")
            test = f"95 % interval {interval}, paired t-test p {p}{correction}"
            line += f", ahead in {entry['ahead']} of {entry['n']} seeds ({test})."
            line += "" if entry["p_holm"] < 0.05 else " This may be chance."
        lines.append(f"{line} Due to: {entry['cause']}.")
    return lines + trends(differences)


def trends(differences: Sequence[dict[str, Any]]) -> list[str]:
    """How each difference changes from the shortest to the longest budget, over the seeds that both have."""
    pairs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in differences:
        pairs.setdefault(tuple(entry[key] for key in ("model", "pe", "of", "against")), []).append(entry)
    lines = []
    for (_, _, of, against), entries in pairs.items():
        short, long = entries[0], entries[-1]
        seeds = [seed for seed in short["seeds"] if seed in long["seeds"]]
        if short is long or not seeds:
            continue
        before, after = (
            statistics.fmean(entry["each"][entry["seeds"].index(seed)] for seed in seeds) for entry in (short, long)
        )
        change = abs(after) - abs(before)
        word = "stays as large" if abs(change) < 0.5 else "shrinks" if change < 0 else "grows"
        word = "changes sides" if before * after < 0 else word
        names = f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
        lines.append(
            f"From {short['epochs']} to {long['epochs']} epochs the difference of {of} to {against} {word}: "
            f"{before:+.1f} against {after:+.1f} points ({names} in both)."
        )
    return lines


def spell_interval(interval: Sequence[float] | None, sign: str = "") -> str:
    """'93.0 to 95.2', or nothing."""
    return "" if interval is None else f"{interval[0]:{sign}.1f} to {interval[1]:{sign}.1f}"


def _p_value(p: float | None, equals: str = "") -> str:
    return "one seed" if p is None else "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of_variants(results: dict[str, Any]) -> Rows:
    """A row a variant and budget."""
    rows = [["model", "pe", "join", "epochs", "seeds", "last epoch", "best epoch"]]
    for v in results["variants"]:
        about = (v["model"], v["pe"], v["label"], str(v["epochs"]), str(len(v["seeds"])))
        rows.append([*about, spell(v["final"]), spell(v["best_epoch"])])
    return rows


def rows_of_differences(results: dict[str, Any]) -> Rows:
    """A row a pair of variants, with what their difference can be due to."""
    rows = [["model", "pe", "join", "against", "due to", "epochs", "seeds", "points", "95 % interval", "p"]]
    for d in results["differences"]:
        about = [d[key] for key in ("model", "pe", "of", "against", "cause")]
        numbers = [str(d["epochs"]), str(d["n"]), spell(d, "+"), spell_interval(d["interval"], "+")]
        rows.append([*about, *numbers, _p_value(d["p_holm"])])
    return without_constants(rows)


def tables_of_conditions(results: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """A table of other sizes and one of changed images, where these were asked for, each with its heading.

    A row a variant: at sizes accuracies with their 95 % interval over the seeds, on changed images shares of the clean.
    """
    for heading, at_size in (("At other sizes", True), ("On changed images", False)):
        rows: list[list[str]] = []
        for name, entries in results["conditions"].items():
            columns = [e for e in entries if (e["kind"] in ("clean", "size")) == at_size]
            if len(columns) > at_size:  # beside the clean images
                cells = map(_accuracy if at_size else spell_share, columns)
                head = ["", "seeds", *map(name_of_images, columns)]
                rows += [*([] if rows else [head]), [name, str(entries[0]["n"]), *cells]]
        if rows:
            yield heading, rows


def _accuracy(entry: dict[str, Any]) -> str:
    """'94.1 (93.0 to 95.2)', or '94.1' for one training."""
    interval = spell_interval(entry["interval"])
    return f"{entry['acc1']:.1f}" + (f" ({interval})" if interval else "")


def spell_share(entry: dict[str, Any]) -> str:
    """'87.3 %' of the accuracy on clean images, or nothing where that is 0."""
    return "" if entry["relative"] is None else f"{100 * entry['relative']:.1f} %"


def name_of_images(entry: dict[str, Any]) -> str:
    """Of a size or a change, in a table."""
    return f"{entry['name']} px" if entry["kind"] == "size" else str(entry["name"])


def without_constants(rows: Rows) -> Rows:
    """A table without those of the columns model, pe and epochs that hold one value throughout."""
    constant = ("model", "pe", "epochs")
    columns = [one for one in zip(*rows, strict=True) if one[0] not in constant or len(set(one[1:])) > 1]
    return [list(row) for row in zip(*columns, strict=True)]


def rows_of_others(others: Sequence[dict[str, Any]]) -> Rows:
    """The runs that were not trained here."""
    rows = [["run", "model", "pe", "join", "epochs", "last epoch", "best epoch", "measured"]]
    for other in others:
        about = ["?" if other[key] is None else str(other[key]) for key in ("name", "model", "pe", "join", "epochs")]
        best = "" if other["best"] is None else f"{other['best']:.1f}"
        rows.append([*about, f"{other['final']:.1f}", best, other["measured"]])
    return rows


def rows_of_measures(results: dict[str, Any]) -> Rows:
    """A row a layer: two measures of each variant, over the seeds of the shortest budget."""
    names = {"locality_radius": "locality radius", "monotonicity": "monotonicity"}
    shortest = min(variant["epochs"] for variant in results["variants"])
    first = [Run(**run) for run in results["runs"] if run["epochs"] == shortest]
    columns = [(name, variant) for name in names for variant in dict.fromkeys(run.variant for run in first)]
    rows = [["layer", *(f"{names[name]}, {variant.label}" for name, variant in columns)]]
    for layer in range(len(first[0].measures["monotonicity"])):
        values = ([run.measures[name][layer] for run in first if run.variant == variant] for name, variant in columns)
        means = ([value for value in column if value is not None] for column in values)
        rows.append([str(layer), *(f"{statistics.fmean(column):.2f}" if column else "-" for column in means)])
    return rows


def markdown_table(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plain_table(rows: Rows) -> list[str]:
    """Lines for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _html_table(rows: Rows) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# --- curves -----------------------------------------------------------------------------------------------------------


def accuracy_curves(runs: Sequence[Run], title_of: Callable[[Run], str]) -> Figure:
    """Test accuracy by epoch, a panel a title and a line a join: mean of the seeds, band from lowest to highest."""
    with needs("plot"):
        from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    for run in runs:
        panels.setdefault(title_of(run), {}).setdefault(run.variant.label, []).append(run.history)
    wide = min(len(panels), 3)
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(1.5 + 4.2 * wide, 0.4 + 3.4 * high), layout="constrained")
    places = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(places, panels.items(), strict=False):
        axes.set_title(title, fontsize=10)
        _draw_panel(axes, lines)
    low, high = places[0].get_ylim()  # fits what is drawn, and no accuracy lies outside of 0 to 100
    places[0].set_ylim(max(low, -1.0), min(high, 101.0))
    places[0].set_ylabel("test accuracy, %")
    lines_of_legend = places[len(panels) - 1].get_legend_handles_labels()
    if len(lines_of_legend[1]) > 8:  # too many for a place among the lines
        figure.legend(*lines_of_legend, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
        figure.set_size_inches(figure.get_figwidth() + 2.5, figure.get_figheight() + 0.2 * len(lines_of_legend[1]) / 3)
    else:
        places[len(panels) - 1].legend(loc="best", frameon=False)
    return figure


DASHES = ("-", "--", ":", "-.")
"""Of the rows of one join, which share its colour."""


MOST_POINTS = 30
"""Epochs up to which each is drawn as a point."""


def _draw_panel(axes: Axes, lines: Mapping[str, Sequence[Sequence[dict[str, float]]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    labels: list[str] = []
    other_joins = list(dict.fromkeys(join for label in lines if (join := label.partition(", ")[0]) not in COLOURS))
    epochs = max(len(history) for histories in lines.values() for history in histories)
    for place, (label, histories) in enumerate(lines.items()):
        steps = list(zip(*histories, strict=True))
        # after one epoch, points would hide others
        offset = 0.6 * ((place + 0.5) / len(lines) - 0.5) if epochs == 1 else 0.0
        x = [step[0]["epoch"] + 1 + offset for step in steps]
        y = [[entry["test_acc1"] for entry in step] for step in steps]
        join = label.partition(", ")[0]
        dashes = DASHES[sum(other.partition(", ")[0] == join for other in labels) % len(DASHES)]
        labels.append(label)
        mean = [statistics.fmean(values) for values in y]
        marker = "o" if epochs <= MOST_POINTS else ""
        colour = COLOURS.get(join) or f"C{other_joins.index(join)}"
        axes.plot(x, mean, dashes, marker=marker, markersize=4, color=colour, label=label, linewidth=1.8)
        lowest, highest = [min(v) for v in y], [max(v) for v in y]
        axes.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        if len(x) == 1:
            axes.vlines(x, lowest, highest, color=colour, linewidth=1)
    axes.set_xlabel("epoch")
    axes.set_xlim(max(0.6 - 0.02 * epochs, 0), 0.4 + 1.02 * epochs)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


# --- pages ------------------------------------------------------------------------------------------------------------

HOW_TO_READ = (
    "Accuracy on the test images in percent, mean ± standard deviation over the seeds. Compared are the values after "
    "the last epoch; the best epoch was chosen on the test images, so it flatters every row and is not compared. The "
    "differences are taken seed by seed; p is of Student's paired t-test, corrected for their number (Holm); "
    "intervals are of each difference alone."
)
HOW_MEASURED = {
    "At other sizes": "The same models, evaluated as by lape eval --sizes: each is built for the size by its own rule, "
    "images are resized and cropped by the evaluation transform of that size. The first column is the training size. "
    "In percent, with the 95 % interval of the mean over the seeds.",
    "On changed images": "The same models on images that are changed behind resizing and cropping: what is left of the "
    "accuracy on clean ones, mean over the seeds and levels.",
}
FEATURES = "Of the first seed, as by lape probe."
PICTURES = {"sizes.png": "Accuracy over the image size, and on changed images", "probe.png": "What the features keep"}
NOT_TRAINED_HERE = "Not trained here: nothing says that budget, data and recipe were the same."


def _spell_recipe(recipe: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in recipe.items())


def _machine(results: dict[str, Any]) -> Iterator[str]:
    hardware = results["hardware"]
    yield f"Machine: {hardware['processor']}, {hardware['cores']} cores, {hardware['system']}"
    yield f"Versions: {', '.join(f'{name} {version}' for name, version in results['versions'].items())}"
    yield f"Commit: {results['commit'] or 'not a git checkout'}"


def demo_page(results: dict[str, Any]) -> Iterator[str]:
    """The lines of the demo's report.md."""
    yield f"# Joins on {results['data']}\n"
    yield "Accuracy on the test images after the last epoch, in percent: mean ± standard deviation over the seeds.\n"
    yield markdown_table(without_constants(rows_of_variants(results))) + "\n"
    yield "## What the differences are due to\n"
    yield f"{HOW_TO_READ}\n\n{markdown_table(rows_of_differences(results))}\n"
    yield from (f"- {sentence}" for sentence in results["sentences"])
    yield "\n![Test accuracy by epoch](curves.png)\n"
    yield "The line is the mean of the seeds, the band their lowest and highest.\n"
    yield "## What position became\n"
    yield "![Cosine similarity of the positions, layer by layer](correlation.png)\n"
    yield (
        "Cosine similarity between the positions of the patches. Under basic a layer sees position through its token "
        "norm, under LaPE and LaPE-sharing through a norm of its own. Below: means over the seeds of the shortest "
        "budget. Locality radius: distance to the patches that a patch resembles more than most, as a share of the "
        "distance to all patches (1: near and far alike). Monotonicity: 2 where similarity falls with every step away, "
        "1 where there is no order.\n"
    )
    yield markdown_table(rows_of_measures(results)) + "\n"
    yield "## How it was run\n"
    yield f"- Recipe: {_spell_recipe(results['recipe'])}"
    yield f"- All: the same recipe, the same seeds, {results['workers']} trainings at a time, one thread each."
    yield from (f"- {line}" for line in _machine(results))
    yield f"- Time: {results['seconds']:.0f} s in all. Every run, epoch by epoch: results.json"


def comparison_page(results: dict[str, Any]) -> Iterator[str]:
    """The lines of a comparison's report.md."""
    yield f"# Comparison: {results['data']}\n"
    yield HOW_TO_READ + "\n"
    yield markdown_table(rows_of_variants(results)) + "\n"
    yield markdown_table(rows_of_differences(results)) + "\n"
    yield from (f"- {sentence}" for sentence in results["sentences"])
    yield "\n![Test accuracy by epoch](curves.png)\n"
    for heading, rows in tables_of_conditions(results):
        yield f"## {heading}\n\n{HOW_MEASURED[heading]}\n\n{markdown_table(rows)}\n"
    if results["conditions"]:
        yield f"![{PICTURES['sizes.png']}](sizes.png)\n"
    if results["probe"]:
        yield f"## Position in the features\n\n{FEATURES}\n\n![{PICTURES['probe.png']}](probe.png)\n"
    if results["others"]:
        yield f"## Other runs\n\n{NOT_TRAINED_HERE}\n\n{markdown_table(rows_of_others(results['others']))}\n"
    yield "## How it was run\n"
    yield from (f"- {line}" for line in _how(results))


def _how(results: dict[str, Any]) -> Iterator[str]:
    yield f"Recipe of all: {_spell_recipe(results['recipe'])}"
    if results["rivals"]:
        yield f"Rivals, as they are: {', '.join(results['rivals']['models'])}, {results['rivals']['model_kwargs']}"
    yield from (f"Left out: {m['model']}, {m['join']} with {m['pe']}: {m['why']}" for m in results["meaningless"])
    gpus = f", on {', '.join(results['gpus'])}" if results["gpus"] else ""
    yield f"Trainings: {results['workers']} at a time, one thread each{gpus}"
    yield from _machine(results)
    yield f"Time: {sum(cell['seconds'] for cell in results['cells']):.0f} s of training. Every epoch: results.json"


def explorer_page(
    path: Path, results: dict[str, Any], models: Mapping[str, Path], figures: Mapping[str, Figure]
) -> Path:
    """The report of a comparison as HTML, with some of its models (name -> folder) in the explorer below it."""
    from lape.look.explorer import explore

    sentences, how = (
        "".join(f"<li>{html.escape(line)}</li>" for line in lines) for lines in (results["sentences"], _how(results))
    )
    others = ""
    if results["others"]:
        others = f"<h2>Other runs</h2><p>{NOT_TRAINED_HERE}</p>{_html_table(rows_of_others(results['others']))}"
    image = _address(figures["curves.png"])
    tables = "".join(
        f"<h2>{heading}</h2><p>{HOW_MEASURED[heading]}</p>{_html_table(rows)}"
        for heading, rows in tables_of_conditions(results)
    )
    pictures = {
        name: f'<figure><img alt="{text}" src="{_address(figures[name])}"></figure>'
        for name, text in PICTURES.items()
        if name in figures
    }
    features = f"<h2>Position in the features</h2><p>{FEATURES}</p>" if results["probe"] else ""
    sections = f"{tables}{pictures.get('sizes.png', '')}{features}{pictures.get('probe.png', '')}"
    intro = (
        f'<div class="report"><p>{html.escape(HOW_TO_READ)}</p>{_html_table(rows_of_variants(results))}'
        f"{_html_table(rows_of_differences(results))}"
        f'<ul>{sentences}</ul><figure><img alt="Test accuracy by epoch" src="{image}"><figcaption>Test accuracy by '
        f"epoch: mean of the seeds, band from the lowest to the highest.</figcaption></figure>{sections}{others}"
        f"<h2>How it was run</h2><ul>{how}</ul>"
        f"<h2>What position became</h2><p>The models of seed {results['cells'][0]['seed']}"
        f"{', the first six' if len(models) == 6 else ''}.</p></div>"
    )
    return explore(models, path, title=f"Comparison: {results['data']}", intro=intro)


def _address(figure: Figure) -> str:
    """A figure as a picture inside of a page."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return f"data:image/png;base64,{b64encode(picture.getvalue()).decode()}"


def write(folder: Path, results: dict[str, Any], page: Iterator[str], figures: Mapping[str, Figure]) -> list[Path]:
    """Writes results.json (first: it says whose the folder is), report.md and the figures, each whole; their paths."""
    from lape.files.atomic import write_atomically, write_content

    texts = {"results.json": json.dumps(results, indent=1, allow_nan=False), "report.md": "\n".join(page)}
    for name, text in texts.items():
        write_content(folder / name, text + "\n")
    for name, figure in figures.items():
        write_atomically(folder / name, partial(figure.savefig, format="png", dpi=150))
    return [folder / name for name in (*texts, *figures)]
