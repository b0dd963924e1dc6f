"""What a set of runs says, in numbers, words and curves. Every word is chosen from the numbers that were measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lape.look.colours import COLOURS
from lape.study.numbers import Run, mean_std, spell


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
