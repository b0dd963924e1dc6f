"""`lape compare`: joins, kinds, models and seeds by one recipe; what is done is kept, and what loses is shown losing.

Each cell (a model, a kind, a join, a seed) is one training on one thread; its folder holds `result.json` and the
trained model, and a second run of the same command skips it. Accuracies compared are those after the last epoch:
the best epoch is chosen on the test images, so it is shown beside them and never compared.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.errors import LapeError, UnsupportedModelError
from lape.names import JOIN_NAMES, PE_NAMES, match_name
from lape.recipe import Recipe
from lape.study.numbers import Cell, Run, sentences, summarise, table
from lape.study.workers import run_all
from lape.study.write import _plain_table, _write_text, cell_folder, write
from lape.train.machine import environment

if TYPE_CHECKING:
    from torch import Tensor

MADE_BY = "lape compare"
VARIED = ("model", "pe", "join_type", "seed")


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

    from lape.joins import JOINS, check_combination
    from lape.position import KINDS
    from lape.train.start import build_model

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
    from lape.files.atomic import write_atomically
    from lape.files.folder import save
    from lape.layers import grid, num_prefix_tokens, positions
    from lape.look.measures import measure_all
    from lape.look.similarity import correlation
    from lape.position import KINDS
    from lape.record import conversion_of
    from lape.train.loop import train

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


def _shared(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_unset=True, exclude={*VARIED, "output_dir", "resume"})


def _other(path: str | PathLike[str], recipe: Recipe) -> dict[str, Any]:
    """A finished run as its files tell it, or a checkpoint as it does on the recipe's data."""
    from lape.files.read import read_checkpoint

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
        from lape.train.evaluate import evaluate_checkpoint

        checkpoint = read_checkpoint(found)
        given = {name: getattr(recipe, name) for name in ("data_path", "data_set") if name in recipe.model_fields_set}
        metrics = evaluate_checkpoint(
            Recipe(eval=True, resume=str(found), device=recipe.device, num_workers=0, **given), say=lambda _text: None
        )
        about = {"final": metrics.acc1, "best": None, "measured": "here, on the data of this comparison"}
    said = checkpoint.args
    named = {"model": said.get("model"), "pe": said.get("pe"), "join": said.get("join_type")}
    return {"name": found.name, **named, "epochs": said.get("epochs"), "seed": said.get("seed"), **about}
