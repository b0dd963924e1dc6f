"""`lape demo`: basic and LaPE side by side on the packaged digits, by one recipe, in a few minutes on two cores.

Every number that it writes was measured in the run. Each training is a process's only work, on one thread, so its
result does not depend on how many run side by side.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lape.errors import LapeError
from lape.recipe import Recipe
from lape.study.numbers import Run, mean_std
from lape.study.report import curves, markdown_table, rows, sentences, summarise
from lape.study.workers import run_all
from lape.train.machine import environment

if TYPE_CHECKING:
    from torch import Tensor


BASELINE, CANDIDATE = "basic", "LaPE"
FILES = ("results.json", "report.md", "curves.png", "correlation.png")
MADE_BY = "lape demo"


@dataclass(frozen=True)
class Trained:
    """A run, and what its model made of position: cosine similarity of its table (n, n) and of each layer (L, n, n)."""

    run: Run
    table_nn: "Tensor"
    layers_Lnn: "Tensor"
    grid: tuple[int, int]


@dataclass(frozen=True)
class Demo:
    """What a demo wrote and found."""

    folder: Path
    results: dict[str, Any]  # what results.json holds

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in FILES]


def run_demo(
    output_dir: str | PathLike[str] = "lape-demo",
    *,
    seeds: int = 5,
    epochs: int | None = None,
    long_factor: int = 3,
    long_seeds: int = 1,
    workers: int = 2,
    time_limit: float | None = 150.0,
) -> Demo:
    """Trains `basic` and `LaPE` with each seed, again with a longer budget, and writes `FILES` into `output_dir`.

    Args:
        seeds: runs of each join, seeds 0 to seeds - 1.
        epochs: length of a run, None the packaged recipe's.
        long_factor, long_seeds: the longer budget is long_factor x epochs with long_seeds seeds; 0 seeds: none.
        workers: processes side by side, one thread each.
        time_limit: seconds. A seed beyond the first two (the first of the longer budget) is left out, of both joins,
            when the runs before it say that it would end later; the report names it. None: nothing is left out.

    Raises LapeError before any training when `output_dir` cannot be written or holds files of these names that no demo
    wrote, or when a number makes no sense.
    """
    for name, value, least, most in (
        ("seeds", seeds, 1, None),
        ("long_factor", long_factor, 2, None),
        ("long_seeds", long_seeds, 0, seeds),
        ("workers", workers, 1, None),
    ):
        if value < least or (most is not None and value > most):
            allowed = f"{least} or more" if most is None else f"{least} to {most}, the number of seeds"
            raise LapeError(f"{name}={value} is not allowed: choose {allowed}")
    recipe = Recipe.from_yaml("digits", threads=1, num_workers=0, device="cpu")
    recipe = recipe if epochs is None else recipe.replace(epochs=epochs)
    folder = claim(Path(output_dir))

    agenda = Agenda(stages(recipe, seeds, recipe.epochs * long_factor, long_seeds), workers, time_limit)
    print(f"{BASELINE} and {CANDIDATE} on the packaged digits, {workers} trainings at a time, up to {seeds} seeds")
    trained = sorted(train_all(agenda), key=lambda one: (one.run.epochs, one.run.seed, one.run.join))
    runs = [one.run for one in trained]
    summary = summarise(runs, BASELINE, CANDIDATE)
    results = {
        "made_by": MADE_BY,
        "data": runs[0].data,
        "recipe": recipe.model_dump(mode="json", exclude_unset=True, exclude={"join_type", "seed"}),
        "joins": [BASELINE, CANDIDATE],
        "budgets": summary,
        "left_out": [{"epochs": stage.epochs, "seed": stage.seed} for stage in agenda.left_out],
        "sentences": [*sentences(summary, BASELINE, CANDIDATE), *agenda.sentences()],
        "runs": [asdict(run) for run in runs],
        **environment(),
        "workers": workers,
        "seconds": agenda.elapsed,
    }
    write(folder, results, trained)
    tell(folder, results)
    return Demo(folder, results)


def claim(folder: Path) -> Path:
    """The folder, made and found writable. Raises LapeError, also when a file would be lost that no demo wrote."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LapeError(f"cannot write into {folder} ({error.strerror}): choose another --output-dir") from None
    found = [name for name in FILES if (folder / name).exists()]
    if found and not _is_demo(folder / FILES[0]):
        raise LapeError(f"{folder} holds {', '.join(found)}, which no demo wrote: choose another --output-dir")
    return folder


def _is_demo(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --- what is trained --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """The same seed and budget for both joins; `needed`: whatever the time."""

    recipes: tuple[Recipe, ...]
    needed: bool

    @property
    def epochs(self) -> int:
        return self.recipes[0].epochs

    @property
    def seed(self) -> int:
        return self.recipes[0].seed


def stages(recipe: Recipe, seeds: int, long_epochs: int, long_seeds: int) -> list[Stage]:
    """First what is needed: two seeds, and one with the longer budget; then the others, the longer budget's last."""

    def stage(epochs: int, seed: int, needed: bool) -> Stage:
        joins = (BASELINE, CANDIDATE)
        return Stage(tuple(recipe.replace(join_type=join, seed=seed, epochs=epochs) for join in joins), needed)

    short = [stage(recipe.epochs, seed, needed=seed < 2) for seed in range(seeds)]
    long = [stage(long_epochs, seed, needed=seed < 1) for seed in range(long_seeds)]
    return [*short[:1], *long[:1], *short[1:], *long[1:]]


class Agenda:
    """Hands out stages, and leaves out those that would end after the time limit."""

    def __init__(self, planned: Sequence[Stage], workers: int, time_limit: float | None):
        self.waiting = list(planned)
        self.left_out: list[Stage] = []
        self.workers = workers
        self.time_limit = time_limit
        self._began = time.perf_counter()
        self._finished: list[Run] = []
        self._taken = 0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    @property
    def epochs(self) -> int:
        """Of all trainings that were handed out or wait."""
        return self._taken + sum(stage.epochs * len(stage.recipes) for stage in self.waiting)

    def take(self) -> tuple[Recipe, ...]:
        """What to train next; empty when nothing is left."""
        while self.waiting:
            stage = self.waiting.pop(0)
            if stage.needed or self._in_time(stage):
                self._taken += stage.epochs * len(stage.recipes)
                return stage.recipes
            self.left_out.append(stage)
        return ()

    def finished(self, run: Run) -> None:
        self._finished.append(run)

    def _in_time(self, stage: Stage) -> bool:
        if self.time_limit is None:
            return True
        pace = sum(run.seconds for run in self._finished) / max(sum(run.epochs for run in self._finished), 1)
        rounds = math.ceil(len(stage.recipes) / self.workers)
        return self.elapsed + rounds * stage.epochs * pace <= self.time_limit

    def sentences(self) -> list[str]:
        if not self.left_out:
            return []
        named = ", ".join(f"seed {stage.seed} of {stage.epochs} epochs" for stage in self.left_out)
        return [f"Left out, to end within {self.time_limit:.0f} s on this machine: {named}."]


def train_one(recipe: Recipe, tick: Callable[[], None]) -> Trained:
    """Trains by one recipe and measures the positions of the model; calls `tick` after every epoch."""
    from lape.layers import grid, num_prefix_tokens
    from lape.look.similarity import correlation, cosine, half_distance, locality_radius, monotonicity, raw_table
    from lape.train.loop import train

    result = train(recipe, on_epoch=lambda _line: tick(), say=lambda _text: None)
    layers_Lnn, patches = correlation(result.model), grid(result.model)
    table_ND = raw_table(result.model)
    assert table_ND is not None
    measures = (locality_radius, half_distance, monotonicity)
    run = Run.of(recipe, result, {measure.__name__: measure(layers_Lnn, patches) for measure in measures})
    return Trained(run, cosine(table_ND[num_prefix_tokens(result.model) :]), layers_Lnn, patches)


def train_all(agenda: Agenda) -> list[Trained]:
    """Trains what the agenda hands out, and says how far it is."""

    def told(one: Trained) -> str:
        run = one.run
        return (
            f"  {run.join:5}  seed {run.seed}, {run.epochs:>3} epochs: "
            f"{run.accuracy:5.1f} % of the test images right ({run.seconds:.0f} s)"
        )

    return run_all(agenda, train_one, told)


# --- what is left behind ----------------------------------------------------------------------------------------------


def write(folder: Path, results: dict[str, Any], trained: Sequence[Trained]) -> None:
    """Writes `FILES`, results.json first: it marks the folder as a demo's."""
    from lape.files.atomic import write_atomically

    shown = [one for one in trained if (one.run.epochs, one.run.seed) == (trained[0].run.epochs, trained[0].run.seed)]
    report = "\n".join(_report(results)) + "\n"
    figures = {"curves.png": curves([one.run for one in trained], results["joins"]), "correlation.png": _maps(shown)}
    texts = {"results.json": json.dumps(results, indent=1) + "\n", "report.md": report}
    for name, text in texts.items():
        write_atomically(folder / name, partial(_write_text, text))
    for name, figure in figures.items():
        write_atomically(folder / name, partial(figure.savefig, format="png", dpi=150))


def _write_text(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _maps(trained: Sequence[Trained]) -> Any:
    """The positions of one model a join, layer by layer, with one colour range."""
    from lape.look.figures import COSINE, Strip, overview
    from lape.look.similarity import center_token, token_map

    strips = []
    for one in sorted(trained, key=lambda one: one.run.join != BASELINE):
        maps, token = [one.table_nn, *one.layers_Lnn], center_token(one.grid)
        strips.append(Strip(f"{one.run.join}\nall patches", maps, one.grid))
        strips.append(Strip(f"{one.run.join}\ntoken {token}", [token_map(m, one.grid) for m in maps], one.grid, token))
    columns = ["table P", *(f"layer {layer}" for layer in range(len(trained[0].layers_Lnn)))]
    run = trained[0].run
    title = f"positions as each layer sees them, after {run.epochs} epochs, seed {run.seed}"
    return overview(title, strips, columns, *COSINE)


def _report(results: dict[str, Any]) -> Iterator[str]:
    baseline, candidate = results["joins"]
    hardware, versions, recipe = results["hardware"], results["versions"], results["recipe"]
    budgets = results["budgets"]
    yield f"# {baseline} and {candidate}: {results['data']}\n"
    yield "Accuracy on the test images after the last epoch, in percent: mean ± standard deviation over the seeds.\n"
    yield markdown_table(rows(budgets, baseline, candidate)) + "\n"
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
    yield markdown_table(list(_measured(results))) + "\n"
    yield "## How it was run\n"
    yield f"- Recipe: {', '.join(f'{name}={value!r}' for name, value in recipe.items())}"
    yield f"- Both joins: the same recipe, the same seeds, {results['workers']} trainings at a time, one thread each."
    yield f"- Machine: {hardware['processor']}, {hardware['cores']} cores, {hardware['system']}"
    yield f"- Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield f"- Commit: {results['commit'] or 'not a git checkout'}"
    yield f"- Time: {results['seconds']:.0f} s in all. Every run, epoch by epoch: results.json"


def _measured(results: dict[str, Any]) -> Iterator[list[str]]:
    """A header and a row a layer: two measures of each join, over the seeds of the first budget."""
    names = {"locality_radius": "locality radius", "monotonicity": "monotonicity"}
    epochs = results["budgets"][0]["epochs"]
    yield ["layer"] + [f"{title}, {join}" for title in names.values() for join in results["joins"]]
    chosen = {
        (name, join): [
            run["measures"][name] for run in results["runs"] if (run["join"], run["epochs"]) == (join, epochs)
        ]
        for name in names
        for join in results["joins"]
    }
    for layer in range(len(results["runs"][0]["measures"]["monotonicity"])):
        means = (mean_std([values[layer] for values in of_runs])["mean"] for of_runs in chosen.values())
        yield [str(layer), *(f"{mean:.2f}" for mean in means)]


def tell(folder: Path, results: dict[str, Any]) -> None:
    """Prints the table, what it says, and where the files are."""
    table = rows(results["budgets"], *results["joins"])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    print("\ntest accuracy, %: mean ± standard deviation over the seeds")
    for row in table:
        print("  " + "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("\n".join(["", *results["sentences"], f"\n{results['seconds']:.0f} s. Written:"]))
    for name in FILES:
        print(f"  {folder / name}")
