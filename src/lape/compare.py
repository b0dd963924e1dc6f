"""`lape compare`: joins, kinds, models and seeds by one recipe; what is done is kept, and what loses is shown losing.

Each cell (a model, a kind, a join, a seed) is one training on one thread; its folder holds `result.json` and the
trained model, and a second run of the same command skips it. Accuracies compared are those after the last epoch:
the best epoch is chosen on the test images, so it is shown beside them and never compared.
"""

import html
import io
import json
import math
import shutil
import statistics
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lape.errors import LapeError, UnsupportedModelError
from lape.names import JOIN_NAMES, PE_NAMES, match_name
from lape.recipe import Recipe
from lape.report import Run, accuracy_curves, environment, markdown_table, mean_std, spell
from lape.workers import run_all

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("results.json", "report.md", "curves.png")
PAGE = "report.html"  # with the explorer inside; left out when no model has a position
MADE_BY = "lape compare"
VARIED = ("model", "pe", "join_type", "seed")


@dataclass(frozen=True)
class Cell:
    """A finished training."""

    model: str
    pe: str
    run: Run

    @property
    def variant(self) -> tuple[str, str, str]:
        return self.model, self.pe, self.run.join


@dataclass(frozen=True)
class Comparison:
    """What a comparison wrote and found."""

    folder: Path
    results: dict[str, Any]
    files: list[Path]


def compare(
    recipe: Recipe,
    output_dir: str | PathLike[str],
    *,
    joins: Sequence[str] = ("basic", "LaPE"),
    pes: Sequence[str] = ("learnable",),
    models: Sequence[str] = (),
    rivals: Sequence[str] = (),
    rival_kwargs: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    baseline: str | None = None,
    runs: Sequence[str | PathLike[str]] = (),
    workers: int = 2,
) -> Comparison:
    """Trains every meaningful combination by one recipe and writes a report into `output_dir`.

    Args:
        recipe: everything but model, pe, join and seed; the same budget for all.
        models: timm names, none: the recipe's.
        rivals: timm names, each trained once a seed as it is (pe="own"), whether it can be converted or not; rotary
            position, for instance. The recipe is the same for them.
        rival_kwargs: their model_kwargs, where those of the recipe have other names there; None: the recipe's.
        baseline: the join that the others are compared with, for the same model and kind; None: basic, or the first.
        runs: finished runs (folders with log.txt and checkpoint.pth) and checkpoints of others, which are evaluated
            on the recipe's data; shown in a table of their own, since nothing says that their budget was the same.
        workers: trainings side by side, a process each; on CUDA they share the GPU, or are dealt out to several.

    Raises LapeError before any training: unknown names, no combination with a meaning, a folder that cannot be written
    or holds a comparison by another recipe, a run that cannot be read.
    """
    joins, pes = ([match_name(what, name, known) for name in names] for what, names, known in
                  (("join", joins, JOIN_NAMES), ("pe", pes, PE_NAMES)))  # fmt: skip
    for name, values in (("joins", joins), ("pes", pes), ("seeds", seeds), ("rivals", rivals)):
        if (not values and name != "rivals") or len(set(values)) != len(values):
            raise LapeError(f"{name}={list(values)}: give at least one, and each once")
    if workers < 1:
        raise LapeError(f"workers={workers} is not allowed: choose 1 or more")
    baseline = match_name("baseline", baseline, joins) if baseline else ("basic" if "basic" in joins else joins[0])
    wanted, meaningless = combinations(recipe, models or (recipe.model,), pes, joins)
    theirs = recipe
    if rivals:
        theirs = recipe if rival_kwargs is None else recipe.replace(model_kwargs=dict(rival_kwargs))
        for row in combinations(theirs, rivals, ("own",), ("basic",))[0]:
            if row in wanted:
                raise LapeError(f"{row[0]} is a model and a rival with pe='own': leave it out of one")
            wanted.append(row)
    elif rival_kwargs is not None:
        raise LapeError(f"rival_kwargs={dict(rival_kwargs)} without a rival: name some, or leave it out")
    folder = _writable(Path(output_dir))
    common = {"threads": 1, "num_workers": 0, "output_dir": "", "resume": ""}
    planned = [
        (theirs if model in rivals and pe == "own" else recipe).replace(
            model=model, pe=pe, join_type=join, seed=seed, **common
        )
        for seed in seeds  # all variants of a seed first: what is there after a stop can be compared
        for model, pe, join in wanted
    ]
    done, waiting = _sort_out(planned, folder)
    others = [_other(path, recipe) for path in runs]

    print(f"{len(planned)} trainings of {recipe.epochs} epochs, {len(done)} done before, {workers} at a time")
    agenda = _Agenda(waiting, workers)
    cells = done + run_all(agenda, partial(train_cell, folder), _told)
    order = {variant: place for place, variant in enumerate(wanted)}
    cells.sort(key=lambda cell: (order[cell.variant], cell.run.seed))
    results = {
        "made_by": MADE_BY,
        "data": cells[0].run.data,
        "recipe": _shared(planned[0]),
        "rivals": {"models": list(rivals), "model_kwargs": theirs.model_kwargs} if rivals else None,
        "baseline": baseline,
        "variants": summarise(cells, baseline),
        "meaningless": [{"model": m, "pe": p, "join": j, "why": why} for (m, p, j), why in meaningless.items()],
        "others": others,
        "cells": [{"model": cell.model, "pe": cell.pe, **asdict(cell.run)} for cell in cells],
        "workers": workers,
        "gpus": _gpus(recipe),
        **environment(),
    }
    results["sentences"] = sentences(results)
    files = write(folder, results, cells)
    print(f"\n{_plain_table(table(results))}\n")
    print("\n".join([*results["sentences"], "", "Written:", *(f"  {file}" for file in files)]))
    return Comparison(folder, results, files)


def combinations(
    recipe: Recipe, models: Sequence[str], pes: Sequence[str], joins: Sequence[str]
) -> tuple[list[tuple[str, str, str]], dict[tuple[str, str, str], str]]:
    """(model, pe, join) that mean something, and the others with the reason.

    Raises LapeError when none does, or for a model or arguments that do not exist.
    """
    import torch

    from lape.build import build_model
    from lape.joins import JOINS, check_combination
    from lape.position import KINDS

    wanted, meaningless = [], {}
    for model in models:
        for pe in pes:
            for join in joins:
                try:
                    check_combination(JOINS[join], KINDS[pe])
                except LapeError as error:
                    meaningless[model, pe, join] = str(error)
                    continue
                one = recipe.replace(model=model, pe=pe, join_type=join, finetune="")
                try:
                    with torch.device("meta"):  # shapes only
                        build_model(one, num_classes=1, say=lambda _text: None)
                    wanted.append((model, pe, join))
                except UnsupportedModelError as error:
                    meaningless[model, pe, join] = str(error)
    if not wanted:
        raise LapeError(f"nothing to train: {next(iter(meaningless.values()))}")
    return wanted, meaningless


def _gpus(recipe: Recipe) -> list[str]:
    """The GPUs that the trainings were dealt out to; none on a CPU."""
    import torch

    if recipe.device != "auto" and not recipe.device.startswith("cuda"):
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _writable(folder: Path) -> Path:
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LapeError(f"cannot write into {folder} ({error.strerror}): choose another --output-dir") from None
    return folder


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass
class _Agenda:
    waiting: list[Recipe]
    workers: int

    def __post_init__(self) -> None:
        self.epochs = sum(recipe.epochs for recipe in self.waiting)

    def take(self) -> tuple[Recipe, ...]:
        return (self.waiting.pop(0),) if self.waiting else ()

    def finished(self, run: Run) -> None:
        """Nothing depends on it: all are trained."""


def cell_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the result of one training lies."""
    model = recipe.model.replace("/", "_")
    return folder / "cells" / f"{model}.{recipe.pe}.{recipe.join_type}.seed{recipe.seed}"


def _sort_out(planned: Sequence[Recipe], folder: Path) -> tuple[list[Cell], list[Recipe]]:
    """The cells that are done, and the recipes of the others."""
    done, waiting = [], []
    for recipe in planned:
        path = cell_folder(folder, recipe) / "result.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = (
                Recipe().model_dump(mode="json") | found["recipe"]
            )  # what an older recipe did not have was the default
            run = Run(**found["run"])
        except FileNotFoundError:
            waiting.append(recipe)
            continue
        except (OSError, ValueError, KeyError, TypeError):
            raise LapeError(f"{path} is no result of a comparison: remove it, or choose another --output-dir") from None
        asked = recipe.model_dump(mode="json")
        odd = sorted(name for name in asked if known.get(name) != asked[name])
        if odd:
            raise LapeError(
                f"{path} was trained with {odd[0]}={known.get(odd[0])!r}, this comparison asks for {asked[odd[0]]!r}: "
                "choose another --output-dir, so that all have one recipe"
            )
        done.append(Cell(recipe.model, recipe.pe, run))
    return done, waiting


def train_cell(folder: Path, recipe: Recipe, tick: Callable[[], None]) -> Cell:
    """Trains by one recipe, keeps the model, and writes result.json last: it says that the cell is done.

    While it trains, its checkpoints are in the cell's folder, so that one that was killed goes on after its last epoch.
    """
    from lape.checkpoint import save, write_atomically
    from lape.correlation import correlation
    from lape.look import grid, num_prefix_tokens, positions
    from lape.measures import measure_all
    from lape.position import KINDS
    from lape.record import conversion_of
    from lape.train import train

    home = cell_folder(folder, recipe)
    under_way = recipe.replace(output_dir=str(home / "training"), resume="auto")
    result = train(under_way, on_epoch=lambda _line: tick(), say=lambda _text: None)
    model = result.model.cpu()
    measures: dict[str, Tensor] = {}
    drawable = not conversion_of(model).anatomy.stages
    if KINDS[recipe.pe].is_table and drawable:
        seen_LnD = positions(model, view="seen").detach()[:, num_prefix_tokens(model) :]
        measures = measure_all(correlation(model), seen_LnD, grid(model))
    run = Run.of(recipe, result, measures, drawable)
    save(model, home / "model")
    text = json.dumps({"recipe": recipe.model_dump(mode="json"), "run": asdict(run)}, indent=1) + "\n"
    write_atomically(home / "result.json", partial(_write_text, text))
    shutil.rmtree(home / "training")
    return Cell(recipe.model, recipe.pe, run)


def _told(cell: Cell) -> str:
    run = cell.run
    return f"  {cell.model}, {cell.pe}, {run.join}, seed {run.seed}: {run.accuracy:.1f} % ({run.seconds:.0f} s)"


def _write_text(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _shared(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_unset=True, exclude={*VARIED, "output_dir", "resume"})


def _other(path: str | PathLike[str], recipe: Recipe) -> dict[str, Any]:
    """A finished run as its files tell it, or a checkpoint as it does on the recipe's data."""
    from lape.checkpoint import read_checkpoint

    found = Path(path)
    log = found / "log.txt"
    if log.exists():
        checkpoint = read_checkpoint(found / "checkpoint.pth")
        try:
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            accuracies = [float(line["test_acc1"]) for line in lines]
            final, best = accuracies[-1], max(accuracies)
        except (ValueError, KeyError, IndexError, TypeError):
            raise LapeError(
                f"{log} is no log of a training: one JSON line an epoch with test_acc1 is expected"
            ) from None
        about = {"final": final, "best": best, "measured": "by the run itself"}
    else:
        from lape.evaluate import evaluate_checkpoint

        checkpoint = read_checkpoint(found)
        given = {name: getattr(recipe, name) for name in ("data_path", "data_set") if name in recipe.model_fields_set}
        metrics = evaluate_checkpoint(
            Recipe(eval=True, resume=str(found), device=recipe.device, num_workers=0, **given), say=lambda _text: None
        )
        about = {"final": metrics.acc1, "best": None, "measured": "here, on the data of this comparison"}
    said = checkpoint.args
    named = {"model": said.get("model"), "pe": said.get("pe"), "join": said.get("join_type")}
    return {"name": found.name, **named, "epochs": said.get("epochs"), "seed": said.get("seed"), **about}


# --- numbers ----------------------------------------------------------------------------------------------------------


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


# --- what is left behind ----------------------------------------------------------------------------------------------


def write(folder: Path, results: dict[str, Any], cells: Sequence[Cell]) -> list[Path]:
    """Writes `FILES` and `PAGE` whole; returns what was written."""
    from lape.checkpoint import write_atomically

    panels: dict[str, dict[str, list[Any]]] = {}
    for cell in cells:
        panel = panels.setdefault(f"{cell.model}, {cell.pe}", {})
        panel.setdefault(cell.run.join, []).append(cell.run.history)
    picture = io.BytesIO()
    accuracy_curves(panels).savefig(picture, format="png", dpi=130)
    texts = {"results.json": json.dumps(results, indent=1), "report.md": "\n".join(_markdown(results))}
    for name, text in texts.items():
        write_atomically(folder / name, partial(_write_text, text + "\n"))
    write_atomically(folder / "curves.png", lambda file: _write_bytes(picture.getvalue(), file))
    files = [folder / name for name in FILES]
    page = _page(folder, results, cells, picture.getvalue())
    return files if page is None else [*files, page]


def _write_bytes(data: bytes, file: BinaryIO) -> None:
    file.write(data)


HOW_TO_READ = (
    "Accuracy on the test images in percent, mean ± standard deviation over the seeds. Compared are the values after "
    "the last epoch; the best epoch was chosen on the test images, so it flatters every row and is not compared. The "
    "difference is taken seed by seed; p is of Student's paired t-test."
)
NOT_TRAINED_HERE = "Not trained here: nothing says that budget, data and recipe were the same."


def _markdown(results: dict[str, Any]) -> Iterator[str]:
    yield f"# Comparison: {results['data']}\n"
    yield HOW_TO_READ + "\n"
    yield markdown_table(table(results)) + "\n"
    yield from (f"- {sentence}" for sentence in results["sentences"])
    yield "\n![Test accuracy by epoch](curves.png)\n"
    if results["others"]:
        yield f"## Other runs\n\n{NOT_TRAINED_HERE}\n\n{markdown_table(other_table(results))}\n"
    yield "## How it was run\n"
    yield from (f"- {line}" for line in _how(results))


def _how(results: dict[str, Any]) -> Iterator[str]:
    hardware, versions = results["hardware"], results["versions"]
    yield f"Recipe of all: {', '.join(f'{name}={value!r}' for name, value in results['recipe'].items())}"
    if results.get("rivals"):
        yield f"Rivals, as they are: {', '.join(results['rivals']['models'])}, {results['rivals']['model_kwargs']}"
    yield from (f"Left out: {m['model']}, {m['join']} with {m['pe']}: {m['why']}" for m in results["meaningless"])
    gpus = f", on {', '.join(results['gpus'])}" if results["gpus"] else ""
    yield f"Trainings: {results['workers']} at a time, one thread each{gpus}"
    yield f"Machine: {hardware['processor']}, {hardware['cores']} cores, {hardware['system']}"
    yield f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}"
    yield f"Commit: {results['commit'] or 'not a git checkout'}"
    yield f"Time: {sum(cell['seconds'] for cell in results['cells']):.0f} s of training. Every epoch: results.json"


def _page(folder: Path, results: dict[str, Any], cells: Sequence[Cell], picture: bytes) -> Path | None:
    """The report as HTML, the models of the first seed in the explorer below it."""
    from lape.explorer import explore
    from lape.position import KINDS

    shown: dict[str, Path] = {}
    several = len({cell.model for cell in cells}) > 1
    for cell in cells:
        name = f"{cell.run.join}, {cell.pe}" + (f", {cell.model}" if several else "")
        kind = KINDS[cell.pe]
        drawn = cell.run.drawable and (kind.is_table or kind.is_bias)
        if drawn and name not in shown and len(shown) < 6:
            recipe = Recipe(model=cell.model, pe=cell.pe, join_type=cell.run.join, seed=cell.run.seed)
            shown[name] = cell_folder(folder, recipe) / "model"
    if not shown:
        return None
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in results["sentences"])
    how = "".join(f"<li>{html.escape(line)}</li>" for line in _how(results))
    others = ""
    if results["others"]:
        others = f"<h2>Other runs</h2><p>{NOT_TRAINED_HERE}</p>{_html_table(other_table(results))}"
    image = f"data:image/png;base64,{b64encode(picture).decode()}"
    intro = (
        f'<div class="report"><p>{html.escape(HOW_TO_READ)}</p>{_html_table(table(results))}<ul>{said}</ul>'
        f'<figure><img alt="Test accuracy by epoch" src="{image}"><figcaption>Test accuracy by epoch: mean of the '
        f"seeds, band from the lowest to the highest.</figcaption></figure>{others}"
        f"<h2>How it was run</h2><ul>{how}</ul>"
        f"<h2>What position became</h2><p>The models of seed {cells[0].run.seed}"
        f"{', the first six' if len(shown) == 6 else ''}.</p></div>"
    )
    title = f"Comparison: {results['data']}"
    return explore(shown, folder / PAGE, title=title, intro=intro)


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
