"""What a set of runs says in numbers: means, differences seed by seed, and how likely they are chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from lape.errors import needs
from lape.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from lape.train.loop import TrainResult

HISTORY = ("epoch", "train_loss", "test_loss", "test_acc1")  # of a line of the log, what a report keeps
LEVEL = 0.95  # of the intervals


class Variant(NamedTuple):
    """A row of a comparison: what its trainings have for themselves."""

    model: str
    pe: str
    join: str
    pe_norm: str | None = None  # in the place of LN', None: what the join has there
    pe_std: float | None = None  # of the table at the start, None: the model's own

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        return cls(recipe.model, recipe.pe, recipe.join_type, recipe.pe_norm, recipe.pe_std)

    def recipe(self, common: Recipe) -> Recipe:
        """The recipe of its trainings."""
        position = {"pe_norm": self.pe_norm, "pe_std": self.pe_std}
        return common.replace(model=self.model, pe=self.pe, join_type=self.join, **position)

    @property
    def label(self) -> str:
        """The join, and what differs from what it has by itself."""
        norm = "" if self.pe_norm is None else f" ({self.pe_norm})"
        return f"{self.join}{norm}" + ("" if self.pe_std is None else f", P at std {self.pe_std:g}")


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
    pe_norm: str | None = None
    pe_std: float | None = None

    @property
    def variant(self) -> Variant:
        return Variant(self.model, self.pe, self.join, self.pe_norm, self.pe_std)

    @classmethod
    def of(cls, recipe: Recipe, result: TrainResult, measures: Mapping[str, Tensor], drawable: bool = True) -> Run:
        """What a training came to; `measures` are (L,) each, and what is not finite becomes None."""
        return cls(
            **Variant.of(recipe)._asdict(),
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
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of the mean; None for fewer than two values."""
    with needs("train"):
        from scipy.stats import t

    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [mean - half, mean + half]


def paired_t(gaps: Sequence[float]) -> dict[str, Any]:
    """Student's paired t-test of "the mean difference is zero", two-sided, and the mean's 95 % interval.

    None for fewer than two pairs; for differences that are all equal t has no value, and p is 1 if they are 0, else 0.
    """
    with needs("train"):
        from scipy.stats import ttest_1samp

    if len(gaps) < 2:
        return {"t": None, "p": None, "interval": None}
    if statistics.stdev(gaps) == 0:
        return {"t": None, "p": 0.0 if gaps[0] else 1.0, "interval": [gaps[0], gaps[0]]}
    test = ttest_1samp(gaps, 0.0)
    return {"t": float(test.statistic), "p": float(test.pvalue), "interval": interval(gaps)}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p values corrected for their number by Holm's step-down rule (1979); None stays None and is not counted."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted, largest = list(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = largest
    return adjusted


def summarise(runs: Sequence[Run], baseline: str) -> list[dict[str, Any]]:
    """One entry a variant and budget: accuracies, and by seed the difference to the baseline with the same start."""
    entries = []
    for variant, epochs in dict.fromkeys((run.variant, run.epochs) for run in runs):
        mine = [run for run in runs if (run.variant, run.epochs) == (variant, epochs)]
        against = variant._replace(join=baseline, pe_norm=None)
        entries.append(
            {
                **variant._asdict(),
                "label": variant.label,
                "epochs": epochs,
                "seeds": [run.seed for run in mine],
                "final": mean_std([run.accuracy for run in mine]),
                "best_epoch": mean_std([run.best for run in mine]),
                "difference": None if variant == against else difference(runs, variant, against, epochs),
            }
        )
    return entries


def difference(runs: Sequence[Run], variant: Variant, against: Variant, epochs: int) -> dict[str, Any] | None:
    """Of one variant to another, over the seeds that both have; None where there is none."""
    scores = [
        {run.seed: run.accuracy for run in runs if (run.variant, run.epochs) == (v, epochs)} for v in (variant, against)
    ]
    seeds = [seed for seed in scores[0] if seed in scores[1]]
    gaps = [scores[0][seed] - scores[1][seed] for seed in seeds]
    if not gaps:
        return None
    return {**mean_std(gaps), **paired_t(gaps), "each": gaps, "seeds": seeds, "ahead": sum(gap > 0 for gap in gaps)}


def pairs_of(variants: Iterable[Variant], baseline: str) -> Iterator[tuple[Variant, Variant, str]]:
    """What is worth comparing: a row, the row that is its control, and what the difference can be due to.

    A norm gives P unit scale at the start, whatever the table's, so its control is the baseline at unit scale.
    """
    from lape.core.joins import JOINS
    from lape.core.pe_norms import PE_NORMS

    rows = list(variants)
    for row in rows:
        kin = [other for other in rows if (other.model, other.pe) == (row.model, row.pe)]
        bases = [other for other in kin if other.join == baseline]
        if row.join == baseline:
            yield from ((row, base, "the scale of P at the start") for base in bases[:1] if row != base)
            continue
        norm = PE_NORMS[row.pe_norm or JOINS[row.join].pe_norm or "none"]
        for base in bases:
            if base.pe_std == row.pe_std:
                yield row, base, "the join and the scale of P" if norm.normalises and row.pe_std != 1 else "the join"
            elif base.pe_std == 1 and norm.normalises:
                yield row, base, "the join: P has unit scale in both at the start"
        sharing = row._replace(join="LaPE-sharing")
        if row.join == "LaPE" and sharing in kin:
            yield row, sharing, "the chain"
        bare = row._replace(pe_norm="none")
        if row.pe_norm == "layernorm" and bare in kin:
            yield row, bare, "LN' itself" if row.pe_std == 1 else "LN' itself and the scale of P"
        unit = row._replace(join="beside", pe_std=1.0)
        if row.join == "LaPE-sharing" and row.pe_norm is None and unit in kin:
            yield row, unit, "LN' itself: P has unit scale in both at the start"


def differences(runs: Sequence[Run], baseline: str) -> list[dict[str, Any]]:
    """Each pair worth comparing at each budget; `p_holm` is corrected for all that are listed."""
    entries = []
    variants = list(dict.fromkeys(run.variant for run in runs))
    for epochs in sorted({run.epochs for run in runs}):
        for variant, against, cause in pairs_of(variants, baseline):
            gap = difference(runs, variant, against, epochs)
            if gap is not None:
                names = {"of": variant.label, "against": against.label, "cause": cause, "epochs": epochs}
                entries.append({"model": variant.model, "pe": variant.pe, **names, **gap})
    for entry, p in zip(entries, holm([entry["p"] for entry in entries]), strict=True):
        entry["p_holm"] = p
    return entries
