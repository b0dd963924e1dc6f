"""What a set of runs says in numbers: means, differences seed by seed, and how likely they are chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lape.errors import needs
from lape.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from lape.train.loop import TrainResult

HISTORY = ("epoch", "train_loss", "test_loss", "test_acc1")  # of a line of the log, what a report keeps


@dataclass(frozen=True)
class Run:
    """One finished training. Accuracies in percent of the test images."""

    model: str
    pe: str
    join: str
    epochs: int
    seed: int
    accuracy: float  # after the last epoch
    best: float  # the best epoch, chosen on the test images: shown, never compared
    loss: float
    seconds: float
    history: list[dict[str, float]]  # of each epoch what `HISTORY` names
    data: str
    measures: dict[str, list[float | None]] = field(default_factory=dict)  # of its positions, one number a layer
    drawable: bool = True  # whether its positions are of one grid, so that one figure holds them

    @property
    def variant(self) -> tuple[str, str, str]:
        return self.model, self.pe, self.join

    @classmethod
    def of(cls, recipe: Recipe, result: TrainResult, measures: Mapping[str, Tensor], drawable: bool = True) -> Run:
        """What a training came to; `measures` are (L,) each, and what is not finite becomes None."""
        return cls(
            model=recipe.model,
            pe=recipe.pe,
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


def paired_t(gaps: Sequence[float]) -> dict[str, float | None]:
    """Student's paired t-test of "the mean difference is zero", two-sided, from the differences of the pairs.

    None for fewer than two pairs; for differences that are all equal t has no value, and p is 1 if they are 0, else 0.
    """
    with needs("train"):
        from scipy.stats import ttest_1samp

    if len(gaps) < 2:
        return {"t": None, "p": None}
    if statistics.stdev(gaps) == 0:
        return {"t": None, "p": 0.0 if gaps[0] else 1.0}
    test = ttest_1samp(gaps, 0.0)
    return {"t": float(test.statistic), "p": float(test.pvalue)}


def summarise(runs: Sequence[Run], baseline: str) -> list[dict[str, Any]]:
    """One entry a variant and budget: final and best-epoch accuracy, and by seed the difference to the baseline's."""
    final = {(run.variant, run.epochs, run.seed): run.accuracy for run in runs}
    entries = []
    for (model, pe, join), epochs in dict.fromkeys((run.variant, run.epochs) for run in runs):
        mine = [run for run in runs if (*run.variant, run.epochs) == (model, pe, join, epochs)]
        entry: dict[str, Any] = {
            "model": model,
            "pe": pe,
            "join": join,
            "epochs": epochs,
            "seeds": [run.seed for run in mine],
            "final": mean_std([run.accuracy for run in mine]),
            "best_epoch": mean_std([run.best for run in mine]),
            "difference": None,
        }
        against = [final.get(((model, pe, baseline), epochs, run.seed)) for run in mine]
        gaps = [run.accuracy - other for run, other in zip(mine, against, strict=True) if other is not None]
        if join != baseline and gaps:
            entry["difference"] = {**mean_std(gaps), **paired_t(gaps), "each": gaps, "ahead": sum(g > 0 for g in gaps)}
        entries.append(entry)
    return entries


def by_budget(variants: Sequence[dict[str, Any]], baseline: str, candidate: str) -> list[dict[str, Any]]:
    """A summary of two joins turned: one entry a budget, short ones first, with both accuracies and their gap."""
    final = {(entry["join"], entry["epochs"]): entry["final"] for entry in variants}
    return [
        {
            "epochs": entry["epochs"],
            "seeds": entry["seeds"],
            "accuracy": {join: final[join, entry["epochs"]] for join in (baseline, candidate)},
            "gap": {key: entry["difference"][key] for key in ("mean", "std", "n", "each", "ahead")},
        }
        for entry in sorted(variants, key=lambda entry: entry["epochs"])
        if entry["join"] == candidate
    ]
