"""What a set of runs says, in numbers, words and curves. Every word is chosen from the numbers that were measured."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from lape.train import TrainResult

COLOURS = {  # Okabe and Ito, told apart by colour-blind readers
    "basic": "#D55E00",
    "LaPE": "#0072B2",
    "LaPE-sharing": "#56B4E9",
    "share": "#E69F00",
    "unshare": "#009E73",
    "PVG": "#CC79A7",
    "MPVG": "#7B3294",  # theirs are used up: a purple, darker than all but LaPE's blue
}

HISTORY = ("epoch", "train_loss", "test_loss", "test_acc1")  # of a line of the log, what a report keeps


@dataclass(frozen=True)
class Run:
    """One finished training. Accuracies in percent of the test images."""

    join: str
    epochs: int
    seed: int
    accuracy: float  # after the last epoch
    best: float  # the best epoch, chosen on the test images: shown, never compared
    loss: float
    seconds: float
    history: list[dict[str, float]]  # epoch, train_loss, test_loss, test_acc1
    data: str
    measures: dict[str, list[float | None]] = field(default_factory=dict)  # of its positions, one number a layer
    drawable: bool = True  # whether its positions are of one grid, so that one figure holds them

    @classmethod
    def of(cls, recipe: Recipe, result: TrainResult, measures: Mapping[str, Tensor], drawable: bool = True) -> Run:
        """What a training found; `measures` are (L,) each, and what is not finite becomes None."""
        return cls(
            join=recipe.join_type,
            epochs=recipe.epochs,
            seed=recipe.seed,
            accuracy=result.accuracy,
            best=result.best_accuracy,
            loss=result.loss,
            seconds=max(result.seconds, sum(line["seconds"] for line in result.history)),  # those before a resume too
            history=[{key: line[key] for key in HISTORY} for line in result.history],
            data=result.data_name,
            measures={
                name: [value if math.isfinite(value) else None for value in values.tolist()]
                for name, values in measures.items()
            },
            drawable=drawable,
        )


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and count."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "n": len(values)}


def summarise(runs: Sequence[Run], baseline: str, candidate: str) -> list[dict[str, Any]]:
    """One entry a budget, short budgets first: each join's final accuracy, and candidate - baseline seed by seed."""
    budgets = []
    for epochs in sorted({run.epochs for run in runs}):
        final = {(run.join, run.seed): run.accuracy for run in runs if run.epochs == epochs}
        seeds = sorted({seed for _, seed in final})
        gaps = [final[candidate, seed] - final[baseline, seed] for seed in seeds]
        budgets.append(
            {
                "epochs": epochs,
                "seeds": seeds,
                "accuracy": {join: mean_std([final[join, seed] for seed in seeds]) for join in (baseline, candidate)},
                "gap": {**mean_std(gaps), "each": gaps, "ahead": sum(gap > 0 for gap in gaps)},
            }
        )
    return budgets


# --- words ------------------------------------------------------------------------------------------------------------


def spell(value: dict[str, Any], sign: str = "") -> str:
    """'94.1 ± 1.1', or '94.1' for one value."""
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:{sign}.1f}{spread}"


def verdict(budget: dict[str, Any], baseline: str, candidate: str) -> str:
    """One sentence on one budget."""
    gap, seeds = budget["gap"], len(budget["seeds"])
    size = abs(gap["mean"])
    after = f"After {budget['epochs']} epoch{'' if budget['epochs'] == 1 else 's'}"
    if round(size, 1) == 0:
        found = f"{candidate} and {baseline} are level"
    else:
        found = f"{candidate} is {'ahead of' if gap['mean'] > 0 else 'behind'} {baseline} by {size:.1f} points"
    if seeds == 1:
        return f"{after} {found}, in one seed: how much of it is chance was not measured."
    spread = gap["std"]
    chance = " That is no more than the seeds differ among themselves." if size <= spread else ""
    ahead = f"{candidate} ahead in {gap['ahead']} of {seeds} seeds, standard deviation of the difference {spread:.1f}"
    return f"{after} {found} ({ahead}).{chance}"


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
    named = f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
    return (
        f"From {short['epochs']} to {long['epochs']} epochs the difference {word}: "
        f"{before:+.1f} against {after:+.1f} points ({named} in both)."
    )


def sentences(budgets: Sequence[dict[str, Any]], baseline: str, candidate: str) -> list[str]:
    """What the budgets say, one sentence each, and how the gap changes between the shortest and the longest."""
    said = [verdict(budget, baseline, candidate) for budget in budgets]
    return said + ([trend(budgets[0], budgets[-1])] if len(budgets) > 1 else [])


def rows(budgets: Sequence[dict[str, Any]], baseline: str, candidate: str) -> list[list[str]]:
    """The table of results: a header and a row a budget."""
    header = ["epochs", "seeds", baseline, candidate, f"{candidate} - {baseline}"]
    return [header] + [
        [
            str(budget["epochs"]),
            str(len(budget["seeds"])),
            *(spell(budget["accuracy"][join]) for join in (baseline, candidate)),
            spell(budget["gap"], "+"),
        ]
        for budget in budgets
    ]


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


# --- curves -----------------------------------------------------------------------------------------------------------


Histories = Sequence[Sequence[dict[str, float]]]
"""One list of log lines a seed, each with `epoch` and `test_acc1`."""


def curves(runs: Sequence[Run], joins: Sequence[str]) -> Any:
    """Test accuracy by epoch: one panel a budget; the mean over seeds is the line, the lowest and highest the band."""
    panels = {}
    for epochs in sorted({run.epochs for run in runs}):
        chosen = {join: [r.history for r in runs if (r.epochs, r.join) == (epochs, join)] for join in joins}
        seeds = len(chosen[joins[-1]])
        panels[f"{epochs} epochs, {seeds} seed{'' if seeds == 1 else 's'}"] = chosen
    return accuracy_curves(panels)


def accuracy_curves(panels: Mapping[str, Mapping[str, Histories]]) -> Any:
    """Title -> label -> histories: a panel a title, a line a label (mean of the seeds, band from lowest to highest)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    wide = min(len(panels), 3)
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(1.5 + 4.2 * wide, 0.4 + 3.4 * high), layout="constrained")
    FigureCanvasAgg(figure)
    axes_of = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for axes in axes_of[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(axes_of, panels.items(), strict=False):
        longest = 1
        for label, histories in lines.items():
            steps = list(zip(*histories, strict=True))
            longest = max(longest, len(steps))
            x = [step[0]["epoch"] + 1 for step in steps]
            y = [[entry["test_acc1"] for entry in step] for step in steps]
            colour = COLOURS.get(label)
            axes.plot(x, [statistics.fmean(values) for values in y], color=colour, label=label, linewidth=1.8)
            lowest, highest = [min(v) for v in y], [max(v) for v in y]
            axes.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylim(0, 102)
        axes.set_xlim(0, longest)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes_of[0].set_ylabel("test accuracy, %")
    axes_of[len(panels) - 1].legend(loc="best", frameon=False)
    return figure


# --- where it ran -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions, hardware and, in a checkout, the commit."""
    packages = ("lape", "torch", "timm", "numpy")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    hardware = {
        "processor": _processor(),
        "cores": len(_cores()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"versions": versions, "hardware": hardware, "commit": _commit()}


def _cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(os.cpu_count() or 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, marked when it was changed since; None elsewhere."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit} with changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
