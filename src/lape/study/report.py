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
from typing import TYPE_CHECKING, Any, BinaryIO

from lape.errors import needs
from lape.look.colours import COLOURS
from lape.study.numbers import Run, mean_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[str]]
"""A table: its header, and then its rows."""

# --- words ------------------------------------------------------------------------------------------------------------


def spell(value: dict[str, Any], sign: str = "") -> str:
    """'94.1 ± 1.1', or '94.1' for one value."""
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:{sign}.1f}{spread}"


def _standing(join: str, baseline: str, gap: float, where: str = "") -> str:
    if round(abs(gap), 1) == 0:
        return f"{join} and {baseline}{where} are level"
    return f"{join}{where} is {'ahead of' if gap > 0 else 'behind'} {baseline} by {abs(gap):.1f} points"


ONE_SEED = ", in one seed: how much of it is chance was not measured."


def verdict(budget: dict[str, Any], baseline: str, candidate: str) -> str:
    """One sentence on one budget."""
    gap, epochs = budget["gap"], budget["epochs"]
    start = f"After {epochs} epoch{'' if epochs == 1 else 's'} {_standing(candidate, baseline, gap['mean'])}"
    if gap["n"] == 1:
        return start + ONE_SEED
    chance = " That is no more than the seeds differ among themselves." if abs(gap["mean"]) <= gap["std"] else ""
    ahead = f"{candidate} ahead in {gap['ahead']} of {gap['n']} seeds"
    return f"{start} ({ahead}, standard deviation of the difference {gap['std']:.1f}).{chance}"


def trend(short: dict[str, Any], long: dict[str, Any]) -> str:
    """How the gap changes with the budget, over the seeds that both budgets have."""
    seeds = [seed for seed in short["seeds"] if seed in long["seeds"]]
    before, after = (
        statistics.fmean(budget["gap"]["each"][budget["seeds"].index(seed)] for seed in seeds)
        for budget in (short, long)
    )
    change = abs(after) - abs(before)
    word = "stays as large" if abs(change) < 0.5 else "shrinks" if change < 0 else "grows"
    word = "changes sides" if before * after < 0 else word
    names = f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
    return (
        f"From {short['epochs']} to {long['epochs']} epochs the difference {word}: "
        f"{before:+.1f} against {after:+.1f} points ({names} in both)."
    )


def sentences_on_budgets(budgets: Sequence[dict[str, Any]], baseline: str, candidate: str) -> list[str]:
    """What the budgets say, one sentence each, and how the gap changes between the shortest and the longest."""
    change = [trend(budgets[0], budgets[-1])] if len(budgets) > 1 else []
    return [verdict(budget, baseline, candidate) for budget in budgets] + change


def sentences_on_variants(variants: Sequence[dict[str, Any]], baseline: str) -> list[str]:
    """What the differences say, one sentence each."""
    lines = []
    several = len({(variant["model"], variant["pe"]) for variant in variants}) > 1
    gaps = [(variant, variant["difference"]) for variant in variants if variant["difference"]]
    for variant, gap in gaps:
        where = f" ({variant['model']}, {variant['pe']})" if several else ""
        line = _standing(variant["join"], baseline, gap["mean"], where)
        if gap["p"] is None:
            lines.append(line + ONE_SEED)
            continue
        chance = "" if gap["p"] < 0.05 else " This may be chance."
        test = f"paired t-test: p {_p_value(gap['p'], '= ')}"
        lines.append(f"{line}, ahead in {gap['ahead']} of {gap['n']} seeds ({test}).{chance}")
    if sum(gap["p"] is not None for _, gap in gaps) > 1:
        lines.append(f"The p values are of each comparison alone, not corrected for there being {len(gaps)}.")
    return lines


def _p_value(p: float, equals: str = "") -> str:
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of_budgets(budgets: Sequence[dict[str, Any]], baseline: str, candidate: str) -> Rows:
    """A row a budget."""
    rows = [["epochs", "seeds", baseline, candidate, f"{candidate} - {baseline}"]]
    for budget in budgets:
        scores = [spell(budget["accuracy"][join]) for join in (baseline, candidate)]
        rows.append([str(budget["epochs"]), str(len(budget["seeds"])), *scores, spell(budget["gap"], "+")])
    return rows


def rows_of_variants(results: dict[str, Any]) -> Rows:
    """A row a variant."""
    rows = [["model", "pe", "join", "seeds", "last epoch", "best epoch", f"- {results['baseline']}", "p"]]
    for v in results["variants"]:
        gap = v["difference"]
        p = "" if gap is None else "one seed" if gap["p"] is None else _p_value(gap["p"])
        scores = [spell(v["final"]), spell(v["best_epoch"]), "" if gap is None else spell(gap, "+"), p]
        rows.append([v["model"], v["pe"], v["join"], str(len(v["seeds"])), *scores])
    return rows


def rows_of_others(others: Sequence[dict[str, Any]]) -> Rows:
    """The runs that were not trained here."""
    rows = [["run", "model", "pe", "join", "epochs", "last epoch", "best epoch", "measured"]]
    for other in others:
        about = ["?" if other[key] is None else str(other[key]) for key in ("name", "model", "pe", "join", "epochs")]
        best = "" if other["best"] is None else f"{other['best']:.1f}"
        rows.append([*about, f"{other['final']:.1f}", best, other["measured"]])
    return rows


def rows_of_measures(results: dict[str, Any]) -> Rows:
    """A row a layer: two measures of each join, over the seeds of the first budget."""
    names = {"locality_radius": "locality radius", "monotonicity": "monotonicity"}
    columns = [(name, join) for name in names for join in results["joins"]]
    first = [run for run in results["runs"] if run["epochs"] == results["budgets"][0]["epochs"]]
    rows = [["layer", *(f"{names[name]}, {join}" for name, join in columns)]]
    for layer in range(len(first[0]["measures"]["monotonicity"])):
        means = (
            mean_std([run["measures"][name][layer] for run in first if run["join"] == join])["mean"]
            for name, join in columns
        )
        rows.append([str(layer), *(f"{mean:.2f}" for mean in means)])
    return rows


def markdown_table(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def plain_table(rows: Rows, justify: Callable[[str, int], str] = str.ljust, gap: str = "  ") -> list[str]:
    """Lines for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [gap.join(map(justify, row, widths)).rstrip() for row in rows]


def _html_table(rows: Rows) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# --- curves -----------------------------------------------------------------------------------------------------------


def accuracy_curves(runs: Sequence[Run], title_of: Callable[[Run], str]) -> Figure:
    """Test accuracy by epoch, a panel a title and a line a join: mean of the seeds, band from lowest to highest."""
    with needs("plot"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    for run in runs:
        panels.setdefault(title_of(run), {}).setdefault(run.join, []).append(run.history)
    wide = min(len(panels), 3)
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(1.5 + 4.2 * wide, 0.4 + 3.4 * high), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(places, panels.items(), strict=False):
        axes.set_title(title, fontsize=10)
        _draw_panel(axes, lines)
    places[0].set_ylabel("test accuracy, %")
    places[len(panels) - 1].legend(loc="best", frameon=False)
    return figure


def _draw_panel(axes: Axes, lines: Mapping[str, Sequence[Sequence[dict[str, float]]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for join, histories in lines.items():
        steps = list(zip(*histories, strict=True))
        x = [step[0]["epoch"] + 1 for step in steps]
        y = [[entry["test_acc1"] for entry in step] for step in steps]
        colour = COLOURS.get(join)
        axes.plot(x, [statistics.fmean(values) for values in y], color=colour, label=join, linewidth=1.8)
        axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylim(0, 102)
    axes.set_xlim(0, max(len(history) for histories in lines.values() for history in histories))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


# --- pages ------------------------------------------------------------------------------------------------------------

HOW_TO_READ = (
    "Accuracy on the test images in percent, mean ± standard deviation over the seeds. Compared are the values after "
    "the last epoch; the best epoch was chosen on the test images, so it flatters every row and is not compared. The "
    "difference is taken seed by seed; p is of Student's paired t-test."
)
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
    baseline, candidate = results["joins"]
    budgets = results["budgets"]
    yield f"# {baseline} and {candidate}: {results['data']}\n"
    yield "Accuracy on the test images after the last epoch, in percent: mean ± standard deviation over the seeds.\n"
    yield markdown_table(rows_of_budgets(budgets, baseline, candidate)) + "\n"
    yield from (f"- {sentence}" for sentence in results["sentences"])
    yield "\n![Test accuracy by epoch](curves.png)\n"
    yield "The line is the mean of the seeds, the band their lowest and highest.\n"
    yield "## What position became\n"
    yield "![Cosine similarity of the positions, layer by layer](correlation.png)\n"
    yield (
        f"Cosine similarity between the positions of the patches. For {baseline} a layer sees position through its "
        f"token norm, for {candidate} through a norm of its own. Below: means over the seeds of the "
        f"{budgets[0]['epochs']}-epoch runs. Locality radius: distance to the patches that a patch resembles more than "
        "most, as a share of the distance to all patches (1: near and far alike). Monotonicity: 2 where similarity "
        "falls with every step away, 1 where there is no order.\n"
    )
    yield markdown_table(rows_of_measures(results)) + "\n"
    yield "## How it was run\n"
    yield f"- Recipe: {_spell_recipe(results['recipe'])}"
    yield f"- Both joins: the same recipe, the same seeds, {results['workers']} trainings at a time, one thread each."
    yield from (f"- {line}" for line in _machine(results))
    yield f"- Time: {results['seconds']:.0f} s in all. Every run, epoch by epoch: results.json"


def comparison_page(results: dict[str, Any]) -> Iterator[str]:
    """The lines of a comparison's report.md."""
    yield f"# Comparison: {results['data']}\n"
    yield HOW_TO_READ + "\n"
    yield markdown_table(rows_of_variants(results)) + "\n"
    yield from (f"- {sentence}" for sentence in results["sentences"])
    yield "\n![Test accuracy by epoch](curves.png)\n"
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


def explorer_page(path: Path, results: dict[str, Any], models: Mapping[str, Path], curves: Figure) -> Path:
    """The report of a comparison as HTML, with some of its models (name -> folder) in the explorer below it."""
    from lape.look.explorer import explore

    sentences, how = (
        "".join(f"<li>{html.escape(line)}</li>" for line in lines) for lines in (results["sentences"], _how(results))
    )
    others = ""
    if results["others"]:
        others = f"<h2>Other runs</h2><p>{NOT_TRAINED_HERE}</p>{_html_table(rows_of_others(results['others']))}"
    picture = io.BytesIO()
    curves.savefig(picture, format="png", dpi=130)
    image = f"data:image/png;base64,{b64encode(picture.getvalue()).decode()}"
    intro = (
        f'<div class="report"><p>{html.escape(HOW_TO_READ)}</p>{_html_table(rows_of_variants(results))}'
        f'<ul>{sentences}</ul><figure><img alt="Test accuracy by epoch" src="{image}"><figcaption>Test accuracy by '
        f"epoch: mean of the seeds, band from the lowest to the highest.</figcaption></figure>{others}"
        f"<h2>How it was run</h2><ul>{how}</ul>"
        f"<h2>What position became</h2><p>The models of seed {results['cells'][0]['seed']}"
        f"{', the first six' if len(models) == 6 else ''}.</p></div>"
    )
    return explore(models, path, title=f"Comparison: {results['data']}", intro=intro)


def text_writer(text: str) -> Callable[[BinaryIO], Any]:
    """What puts a text into an open file."""
    return lambda file: file.write(text.encode())


def write(folder: Path, results: dict[str, Any], page: Iterator[str], figures: Mapping[str, Figure]) -> list[Path]:
    """Writes results.json (first: it says whose the folder is), report.md and the figures, each whole; their paths."""
    from lape.files.atomic import write_atomically

    texts = {"results.json": json.dumps(results, indent=1, allow_nan=False), "report.md": "\n".join(page)}
    for name, text in texts.items():
        write_atomically(folder / name, text_writer(text + "\n"))
    for name, figure in figures.items():
        write_atomically(folder / name, partial(figure.savefig, format="png", dpi=150))
    return [folder / name for name in (*texts, *figures)]
