"""What a set of runs says in numbers: means, differences seed by seed, and how likely they are chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lape.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from lape.train.loop import TrainResult

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


@dataclass(frozen=True)
class Cell:
    """A finished training."""

    model: str
    pe: str
    run: Run

    @property
    def variant(self) -> tuple[str, str, str]:
        return self.model, self.pe, self.run.join


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and count."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "n": len(values)}


def spell(value: dict[str, Any], sign: str = "") -> str:
    """'94.1 ± 1.1', or '94.1' for one value."""
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:{sign}.1f}{spread}"


def two_sided_p(t: float, freedom: int) -> float:
    """P(|T| >= |t|) for Student's t with a whole number of degrees of freedom.

    With theta = atan(t / sqrt(nu)) the probability within is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4):
        nu even:  sin(theta) (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ... to cos^(nu-2))
        nu odd:   2/pi (theta + sin(theta) (cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ... to cos^(nu-2)))
    """
    theta = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    within = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max(0.0, 1.0 - within)


def paired_t(gaps: Sequence[float]) -> dict[str, float | None]:
    """Student's paired t-test of "the mean difference is zero": t = mean / (std / sqrt(n)), n - 1 degrees of freedom.

    None for fewer than two pairs; for differences that are all equal t has no value, and p is 1 if they are 0, else 0.
    """
    if len(gaps) < 2:
        return {"t": None, "p": None}
    mean, spread = statistics.fmean(gaps), statistics.stdev(gaps)
    if spread == 0:
        return {"t": None, "p": 1.0 if mean == 0 else 0.0}
    t = mean / (spread / math.sqrt(len(gaps)))
    return {"t": t, "p": two_sided_p(t, len(gaps) - 1)}


def summarise(cells: Sequence[Cell], baseline: str) -> list[dict[str, Any]]:
    """One entry a variant: final and best-epoch accuracy over the seeds, and by seed the difference to the baseline."""
    final = {(cell.variant, cell.run.seed): cell.run.accuracy for cell in cells}
    entries = []
    for variant in dict.fromkeys(cell.variant for cell in cells):
        model, pe, join = variant
        mine = [cell.run for cell in cells if cell.variant == variant]
        entry: dict[str, Any] = {
            "model": model,
            "pe": pe,
            "join": join,
            "seeds": [run.seed for run in mine],
            "final": mean_std([run.accuracy for run in mine]),
            "best_epoch": mean_std([run.best for run in mine]),
            "difference": None,
        }
        against = [final.get(((model, pe, baseline), run.seed)) for run in mine]
        gaps = [run.accuracy - other for run, other in zip(mine, against, strict=True) if other is not None]
        if join != baseline and gaps:
            entry["difference"] = {**mean_std(gaps), **paired_t(gaps), "each": gaps, "ahead": sum(g > 0 for g in gaps)}
        entries.append(entry)
    return entries


def sentences(results: dict[str, Any]) -> list[str]:
    """What the differences say, one sentence each."""
    baseline, said = results["baseline"], []
    several = len({(v["model"], v["pe"]) for v in results["variants"]}) > 1
    compared = [variant for variant in results["variants"] if variant["difference"]]
    for variant in compared:
        gap, size = variant["difference"], abs(variant["difference"]["mean"])
        where = f" ({variant['model']}, {variant['pe']})" if several else ""
        if round(size, 1) == 0:
            found = f"{variant['join']} and {baseline}{where} are level"
        else:
            side = "ahead of" if gap["mean"] > 0 else "behind"
            found = f"{variant['join']}{where} is {side} {baseline} by {size:.1f} points"
        if gap["p"] is None:
            said.append(f"{found}, in one seed: how much of it is chance was not measured.")
        else:
            clear = "" if gap["p"] < 0.05 else " This may be chance."
            said.append(
                f"{found}, ahead in {gap['ahead']} of {gap['n']} seeds (paired t-test: p {_p(gap['p'], '= ')}).{clear}"
            )
    if len([v for v in compared if v["difference"]["p"] is not None]) > 1:
        said.append(f"The p values are of each comparison alone, not corrected for there being {len(compared)}.")
    return said


def _p(p: float, equals: str = "") -> str:
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def table(results: dict[str, Any]) -> list[list[str]]:
    """A header and a row a variant."""
    rows = [["model", "pe", "join", "seeds", "last epoch", "best epoch", f"- {results['baseline']}", "p"]]
    for v in results["variants"]:
        gap = v["difference"]
        p = "" if gap is None else "one seed" if gap["p"] is None else _p(gap["p"])
        scores = [spell(v["final"]), spell(v["best_epoch"]), "" if gap is None else spell(gap, "+"), p]
        rows.append([v["model"], v["pe"], v["join"], str(len(v["seeds"])), *scores])
    return rows


def other_table(results: dict[str, Any]) -> list[list[str]]:
    """The runs that were not trained here; empty without any."""
    if not results["others"]:
        return []
    rows = [["run", "model", "pe", "join", "epochs", "last epoch", "best epoch", "measured"]]
    for other in results["others"]:
        known = ["?" if other[key] is None else str(other[key]) for key in ("name", "model", "pe", "join", "epochs")]
        best = "" if other["best"] is None else f"{other['best']:.1f}"
        rows.append([*known, f"{other['final']:.1f}", best, other["measured"]])
    return rows
