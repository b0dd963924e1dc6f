"""`lape compare` and `lape demo`: rows side by side by one recipe; those that lose are reported, too.

Each cell (a model, a kind, a join, a norm and a start of position, a seed) is one training on one thread; in a
comparison its folder holds `result.json` and the trained model, and a second run of the same command skips it.
Accuracies compared are those after the last epoch: the best epoch is chosen on the test images, so it is shown beside
them and never compared.
"""

import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape.errors import LapeError, UnsupportedModelError, check_file
from lape.names import JOIN_NAMES, PE_NAMES, PE_NORM_NAMES, TABLE8_NAMES, match_name
from lape.recipe import Recipe
from lape.study import report
from lape.study.numbers import Run, Variant, differences, summarise
from lape.study.options import CompareOptions, DemoOptions
from lape.study.pictures import check_figures
from lape.study.probing import draw as draw_probe
from lape.study.probing import validation_images
from lape.study.sweep import Outcome, conditions_of, evaluate_at, summary_of
from lape.study.sweep import draw as draw_sizes
from lape.study.workers import Agenda, Stage, explain_interruption, run_all
from lape.train.machine import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from lape.look.features import Features

ROW_FIELDS = {"model", "pe", "join_type", "pe_norm", "pe_std", "seed", "output_dir", "resume"}
ONE_THREAD = {"threads": 1, "num_workers": 0, "output_dir": "", "resume": ""}  # of each training


@dataclass(frozen=True)
class Study:
    """What a comparison or a demo wrote.

    Fields:
        folder: that holds the files
        results: what results.json holds
        files: what was written
    """

    folder: Path
    results: dict[str, Any]
    files: list[Path]


def compare(recipe: Recipe, options: CompareOptions, rows: Sequence[Variant] = ()) -> Study:
    """Trains every meaningful combination by one recipe and writes a report into `options.output_dir`.

    `recipe` is everything else, the same budget for all; its model counts where the options name none. `rows`, where
    there are some, take the place of the combinations that the options name. Raises LapeError before any training:
    unknown names, no combination with a meaning, a folder that cannot be written or holds a comparison by another
    recipe, a run that cannot be read.
    """
    options = with_preset(options)
    baseline, rows = _baseline_and_rows(recipe, options, rows)
    check_figures()
    variants, meaningless = combinations(recipe, rows)
    recipes = dict.fromkeys(variants, recipe) | _rivals(recipe, options, variants)
    _check_sizes(recipes, options)
    folder = _writable(Path(options.output_dir))
    plan = [
        variant.recipe(one).replace(seed=seed, **ONE_THREAD)
        for seed in options.seeds  # all variants of a seed first: what is there after a stop can be compared
        for variant, one in recipes.items()
    ]
    runs, remainder = _finished_and_missing(plan, folder)
    other_runs = [_other_run(path, recipe) for path in options.runs]

    print(f"{len(plan)} trainings of {recipe.epochs} epochs, {len(runs)} done before, {options.workers} at a time")
    agenda = Agenda([Stage((one,)) for one in remainder], options.workers)
    with explain_interruption(lambda: _status_line(plan, folder)):
        runs += run_all(
            agenda,
            partial(train_cell, folder),
            lambda r: f"  {r.model}, {r.pe}, {r.variant.label}, seed {r.seed}: {r.accuracy:.1f} % ({r.seconds:.0f} s)",
        )
    order = list(recipes)
    runs.sort(key=lambda run: (order.index(run.variant), run.seed))
    gaps = differences(runs, baseline)
    sizes = _under_conditions(folder, runs, recipes, options) if options.extras else {}
    features = _features_of(folder, runs, recipe, options.probe) if options.probe else {}
    rival_kwargs = dict(recipe.model_kwargs if options.rival_kwargs is None else options.rival_kwargs)
    results = {
        "made_by": "lape compare",
        "data": runs[0].data,
        "recipe": plan[0].model_dump(mode="json", exclude_unset=True, exclude=ROW_FIELDS),
        "rivals": {"models": list(options.rivals), "model_kwargs": rival_kwargs} if options.rivals else None,
        "baseline": baseline,
        "variants": summarise(runs, baseline),
        "differences": gaps,
        "meaningless": [{**variant._asdict(), "why": why} for variant, why in meaningless.items()],
        "others": other_runs,
        "sizes": {name: [[asdict(o) for o in outcomes] for outcomes in trainings] for name, trainings in sizes.items()},
        "conditions": {name: summary_of(trainings) for name, trainings in sizes.items()},
        "probe": {name: one.to_dict() for name, one in features.items()},
        "cells": [asdict(run) for run in runs],
        "workers": options.workers,
        "gpus": _gpus(recipe),
        **environment(),
        "sentences": report.sentences(gaps),
    }
    figures = {"sizes.png": draw_sizes(sizes, recipe.input_size)} if sizes else {}
    figures |= {"probe.png": draw_probe(features)} if features else {}
    return Study(folder, results, _report_on(folder, results, runs, figures))


def _baseline_and_rows(
    recipe: Recipe, options: CompareOptions, rows: Sequence[Variant]
) -> tuple[str, Sequence[Variant]]:
    """The join that others are compared with, and the rows. Raises LapeError for options that mean nothing."""
    joins, pes, norms = _checked_names(options)
    _check_numbers(recipe, options)
    rows = _checked_rows(options, rows, options.models or (recipe.model,), pes, joins, norms)
    if options.baseline:
        return match_name("baseline", options.baseline, joins), rows
    return "basic" if "basic" in joins else joins[0], rows


def _checked_names(options: CompareOptions) -> tuple[list[str], list[str], list[str]]:
    """The joins, kinds and norms of position, as they are spelt. Raises LapeError for another or one twice."""
    joins = [match_name("join", name, JOIN_NAMES) for name in options.joins]
    pes = [match_name("pe", name, PE_NAMES) for name in options.pes]
    norms = [match_name("pe_norm", name, PE_NORM_NAMES) for name in options.pe_norms]
    may_lack = {"rivals": options.rivals, "pe_norms": norms, "pe_stds": options.pe_stds}
    for name, values in {"joins": joins, "pes": pes, "seeds": options.seeds, **may_lack}.items():
        if (not values and name not in may_lack) or len(set(values)) != len(values):
            raise LapeError(f"{name}={list(values)}: give {'' if name in may_lack else 'at least one, and '}each once")
    return joins, pes, norms


def _check_numbers(recipe: Recipe, options: CompareOptions) -> None:
    """Raises LapeError for a number that means nothing, or conditions that do not fit the recipe's images."""
    for std in options.pe_stds:
        if not 1e-6 <= std <= 1e6:
            raise LapeError(f"pe_stds={std} is no standard deviation: give numbers from 1e-6 to 1e6, such as 0.02 1")
    if options.workers < 1:
        raise LapeError(f"workers={options.workers} is not allowed: choose 1 or more")
    if options.probe and options.probe < 4:
        raise LapeError(f"probe={options.probe} is not allowed: choose 4 images or more, or 0 for none")
    conditions_of(options, (recipe.input_size,) * 2, (1, 1))


def _checked_rows(
    options: CompareOptions,
    rows: Sequence[Variant],
    models: Sequence[str],
    pes: Sequence[str],
    joins: Sequence[str],
    norms: Sequence[str],
) -> Sequence[Variant]:
    """The given rows, those of the preset, or the combinations. Raises LapeError for an option that none of them has a
    place for."""
    if options.preset == "rivals" and not rows:
        usual = CompareOptions(output_dir=options.output_dir)
        for name in ("joins", "pes", "pe_norms", "pe_stds"):
            if getattr(options, name) != getattr(usual, name):
                raise LapeError(f"preset='rivals' has rows of its own: leave {name}={list(getattr(options, name))} out")
        rows = [Variant(model, *row) for model in models for row in RIVAL_POSITIONS]
    rows = rows or rows_of(models, pes, joins, norms or (None,), options.pe_stds or (None,))
    for name, place in (("pe_norms", "pe_norm"), ("pe_stds", "pe_std")):
        if getattr(options, name) and not any(getattr(row, place) is not None for row in rows):
            raise LapeError(f"{name}={list(getattr(options, name))}: none of the rows has a place for it; leave it out")
    return rows


def _report_on(folder: Path, results: dict[str, Any], runs: Sequence[Run], figures: dict[str, "Figure"]) -> list[Path]:
    """Writes the report of a comparison, and prints its table and sentences."""
    curves = report.accuracy_curves(runs, lambda run: f"{run.model}, {run.pe}")
    figures = {"curves.png": curves, **figures}
    files = report.write(folder, results, report.comparison_page(results), figures)
    if models := _explorable(folder, runs):
        files.append(report.explorer_page(folder / "report.html", results, models, figures))
    table = report.plain_table(report.rows_of_variants(results))
    more = [line for _, rows in report.tables_of_conditions(results) for line in ("", *report.plain_table(rows))]
    lines = ["", *table, *more, "", *results["sentences"], "", "Written:", *(f"  {file}" for file in files)]
    print("\n".join(lines))
    return files


def _under_conditions(
    folder: Path, runs: Sequence[Run], recipes: Mapping[Variant, Recipe], options: CompareOptions
) -> dict[str, list[list["Outcome"]]]:
    """Results under the conditions that are asked for: by name, a list for each seed."""
    from lape.files.read import read_checkpoint

    outcomes: dict[str, list[list[Outcome]]] = {}
    for run, name, model_folder in _runs_with_model(folder, runs):
        recipe = run.variant.recipe(recipes[run.variant])
        outcome = evaluate_at(read_checkpoint(model_folder), recipe, options, say=lambda _text: None)
        outcomes.setdefault(name, []).append(outcome)
    return outcomes


def _features_of(folder: Path, runs: Sequence[Run], recipe: Recipe, count: int) -> dict[str, "Features"]:
    """What the features of the first model of each variant that is still there keep of position, by name."""
    from lape.data.augment import eval_transform
    from lape.files.folder import load
    from lape.look.features import probe

    images, _name = validation_images(eval_transform(recipe), recipe, count)
    features: dict[str, Features] = {}
    for _, name, model_folder in _runs_with_model(folder, runs):
        if name not in features:
            features[name] = probe(load(model_folder), images)
    return features


def _runs_with_model(folder: Path, runs: Sequence[Run]) -> Iterator[tuple[Run, str, Path]]:
    """Yields (run, name of its row, folder of its model) for each run whose model is still there."""
    several = len({run.model for run in runs}) > 1
    for run in runs:
        model_folder = _cell_path(folder, run.variant, run.seed) / "model"
        if model_folder.exists():
            yield run, f"{run.variant.label}, {run.pe}" + (f", {run.model}" if several else ""), model_folder


PRESETS: dict[str, dict[str, Any]] = {
    "table7": {
        "joins": ("basic", "share", "unshare", "LaPE-sharing", "LaPE"),
        "pes": ("learnable", "1D_sin", "2D_sin", "1D_RPE", "2D_RPE"),
    },
    "table8": {"joins": ("basic", "LaPE"), "pe_norms": TABLE8_NAMES, "pe_stds": (0.02, 1.0)},
}
"""The tables of the paper that a comparison trains anew."""

RIVAL_POSITIONS: tuple[tuple[str, str, str | None, float | None], ...] = (
    ("none", "basic", None, None),
    ("learnable", "basic", None, None),
    ("learnable", "basic", None, 1.0),
    ("learnable", "LaPE", None, None),
    ("learnable", "LaPE-sharing", "learned-norm", None),
    ("2D_sin", "basic", None, None),
    ("2D_RPE", "basic", None, None),
    ("2D_RPE", "LaPE", None, None),
    *((pe, "basic", None, None) for pe in ("RoPE", "RoPE-mixed", "ALiBi-2D", "LookHere", "PEG", "PEG-6")),
)
"""Kind, join, norm of position and start of the table: the rows of the preset `rivals` (the option takes models)."""


def with_preset(options: CompareOptions) -> CompareOptions:
    """What was left at its default follows the preset."""
    defaults = CompareOptions(output_dir=options.output_dir)
    preset = PRESETS.get(options.preset or "", {})
    return replace(options, **{k: v for k, v in preset.items() if getattr(options, k) == getattr(defaults, k)})


def rows_of(
    models: Sequence[str],
    pes: Sequence[str],
    joins: Sequence[str],
    pe_norms: Sequence[str | None],
    pe_stds: Sequence[float | None],
) -> list[Variant]:
    """All combinations; norms of position where a join has one, starts where a kind has a table, one row elsewhere."""
    from lape.core.joins import JOINS
    from lape.core.position import KINDS

    rows = []
    for model, pe, join, std in itertools.product(models, pes, joins, pe_stds):
        kind, norms = KINDS[pe], pe_norms if JOINS[join].pe_norm == "layernorm" and KINDS[pe].is_table else (None,)
        rows += [Variant(model, pe, join, norm, std if kind.is_table else None) for norm in norms]
    return list(dict.fromkeys(rows))


def combinations(recipe: Recipe, rows: Sequence[Variant]) -> tuple[list[Variant], dict[Variant, str]]:
    """The rows that mean something, and the others with the reason.

    Raises LapeError when none does, or for a model or arguments that do not exist.
    """
    from lape.core.joins import JOINS, check_combination
    from lape.core.position import KINDS
    from lape.host.base import without_values
    from lape.train.start import build_model

    variants: list[Variant] = []
    meaningless: dict[Variant, str] = {}
    for row in rows:
        try:
            check_combination(JOINS[row.join], KINDS[row.pe], row.pe_norm)
        except LapeError as error:
            meaningless[row] = str(error)
            continue
        try:
            with without_values():
                build_model(row.recipe(recipe).replace(finetune=""), num_classes=1, say=lambda _text: None)
            variants.append(row)
        except UnsupportedModelError as error:
            meaningless[row] = str(error)
    if not variants:
        raise LapeError(f"nothing to train: {next(iter(meaningless.values()))}")
    return variants, meaningless


def _rivals(recipe: Recipe, options: CompareOptions, variants: Sequence[Variant]) -> dict[Variant, Recipe]:
    """The rivals as variants, with their recipe."""
    kwargs = options.rival_kwargs
    if not options.rivals:
        if kwargs is not None:
            raise LapeError(f"rival_kwargs={dict(kwargs)} without a rival: name some, or leave it out")
        return {}
    recipe = recipe if kwargs is None else recipe.replace(model_kwargs=dict(kwargs))
    rows = combinations(recipe, [Variant(model, "own", "basic") for model in options.rivals])[0]
    for row in rows:
        if row in variants:
            raise LapeError(f"{row.model} is a model and a rival with pe='own': leave it out of one")
    return dict.fromkeys(rows, recipe)


def _check_sizes(recipes: Mapping[Variant, Recipe], options: CompareOptions) -> None:
    """Raises LapeError, before anything is trained, for a size that a model of the comparison does not take."""
    from lape.host.base import without_values
    from lape.train.start import build_model

    for variant, recipe in recipes.items():
        sizes = {condition.size for condition in conditions_of(options, (recipe.input_size,) * 2, (1, 1))}
        for side in sorted({side for size in sizes for side in size} - {recipe.input_size}):
            at = variant.recipe(recipe).replace(finetune="", input_size=side)
            with without_values():
                build_model(at, num_classes=1, say=lambda _text: None)


def _gpus(recipe: Recipe) -> list[str]:
    """The GPUs that the trainings were dealt out to; none on a CPU."""
    import torch

    if recipe.device.startswith("cuda:"):
        return [torch.cuda.get_device_name(recipe.device)]
    if recipe.device not in ("auto", "cuda"):
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LapeError(f"cannot write into {folder} ({error.strerror}): choose another --output-dir") from None
    return folder


def _explorable(folder: Path, runs: Sequence[Run]) -> dict[str, Path]:
    """The first model of each variant that has positions to explore, at most six, by name."""
    from lape.core.position import KINDS

    models: dict[str, Path] = {}
    for run, name, model_folder in _runs_with_model(folder, runs):
        kind = KINDS[run.pe]
        if run.drawable and (kind.is_table or kind.is_bias) and len(models) < 6:
            models.setdefault(name, model_folder)
    return models


# --- cells ------------------------------------------------------------------------------------------------------------


def cell_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the result of one training lies."""
    return _cell_path(folder, Variant.of(recipe), recipe.seed)


def _cell_path(folder: Path, variant: Variant, seed: int) -> Path:
    model, pe, join, norm, std = variant
    suffix = ("" if norm is None else f".{norm}") + ("" if std is None else f".std{std:g}")
    return folder / "cells" / f"{model.replace('/', '_')}.{pe}.{join}{suffix}.seed{seed}"


def _finished_and_missing(plan: Sequence[Recipe], folder: Path) -> tuple[list[Run], list[Recipe]]:
    """The runs that are done, and the recipes of the others."""
    runs, remainder = [], []
    for recipe in plan:
        path = cell_folder(folder, recipe) / "result.json"
        check_file(path)
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            defaults = Recipe(as_original=()).model_dump(mode="json")  # keys that an older recipe lacks
            theirs = defaults | cell["recipe"]
            run = Run(**{"model": recipe.model, "pe": recipe.pe} | cell["run"])
            if not (0 <= run.accuracy <= 100 and 0 <= run.best <= 100):
                raise ValueError
        except FileNotFoundError:
            remainder.append(recipe)
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise LapeError(f"{path} is no result of a comparison: remove it, or choose another --output-dir") from None
        ours = recipe.model_dump(mode="json")
        odd = sorted(name for name in ours if theirs.get(name) != ours[name])
        if odd:
            raise LapeError(
                f"{path} was trained with {odd[0]}={theirs.get(odd[0])!r}, this comparison asks for {ours[odd[0]]!r}: "
                "choose another --output-dir, so that all have one recipe"
            )
        runs.append(run)
    return runs, remainder


def _status_line(plan: Sequence[Recipe], folder: Path) -> str:
    count = sum((cell_folder(folder, recipe) / "result.json").exists() for recipe in plan)
    return f"{count} of {len(plan)} trainings are done in {folder}; to go on where others were saved: the same command"


def train_cell(folder: Path, recipe: Recipe, tick: Callable[[], None]) -> Run:
    """Trains by one recipe, keeps the model, and writes result.json last: it says that the cell is done.

    While it trains, its checkpoints are in the cell's folder, so that one that was killed goes on after its last epoch.
    """
    from lape.files.atomic import write_content

    home = cell_folder(folder, recipe)
    run = _train(recipe.replace(output_dir=str(home / "training"), resume="auto"), home, tick)
    text = json.dumps({"recipe": recipe.model_dump(mode="json"), "run": asdict(run)}, indent=1, allow_nan=False) + "\n"
    write_content(home / "result.json", text)
    shutil.rmtree(home / "training")
    return run


def _train(recipe: Recipe, home: Path, tick: Callable[[], None]) -> Run:
    """Trains by one recipe, measures the positions of the model, and keeps it as `home`/model."""
    from lape.convert.converted import conversion_of
    from lape.core.position import KINDS
    from lape.data.augment import eval_transform
    from lape.files.folder import save
    from lape.look.measures import measure_all
    from lape.look.similarity import Maps
    from lape.train.loop import train

    result = train(recipe, on_epoch=lambda _line: tick(), say=lambda _text: None)
    model = result.model.cpu()
    measures: dict[str, Tensor] = {}
    drawable = not conversion_of(model).anatomy.stages
    if KINDS[recipe.pe].is_table and drawable:
        maps = Maps.of(model)
        measures = measure_all(maps.layers_Lnn, maps.patches_LnD, maps.grid)
    save(model, home / "model", transform=eval_transform(recipe).to_dict())
    return Run.of(recipe, result, measures, drawable)


def _other_run(path: str | PathLike[str], recipe: Recipe) -> dict[str, Any]:
    """A row of the report for a finished run (its log) or a checkpoint (evaluated on the recipe's data)."""
    from lape.files.read import read_checkpoint

    run = Path(path)
    log = run / "log.txt"
    check_file(log)
    if log.exists():
        checkpoint = read_checkpoint(run / "checkpoint.pth")
        try:
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            accuracies = [float(line["test_acc1"]) for line in lines]
            final, best = accuracies[-1], max(accuracies)
            if not all(0 <= accuracy <= 100 for accuracy in accuracies):
                raise ValueError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OSError):
            raise LapeError(
                f"{log} is no log of a training: one JSON line an epoch with test_acc1 is expected"
            ) from None
        about = {"final": final, "best": best, "measured": "by the run itself"}
    else:
        from lape.train.evaluate import evaluate_checkpoint

        checkpoint = read_checkpoint(run)
        data = ("data_path", "data_set", "columns")
        flags = {name: getattr(recipe, name) for name in data if name in recipe.model_fields_set}
        metrics = evaluate_checkpoint(
            Recipe(eval=True, resume=str(run), device=recipe.device, num_workers=0, **flags), say=lambda _text: None
        )
        about = {"final": metrics.acc1, "best": None, "measured": "here, on the data of this comparison"}
    args = checkpoint.args
    facts = {name: args.get(name) for name in ("model", "pe", "epochs", "seed")}
    return {"name": run.name, **facts, "join": args.get("join_type"), **about}


# --- the demo ---------------------------------------------------------------------------------------------------------

DEMO_BASELINE = "basic"
DEMO_ROWS: tuple[tuple[str, float | None], ...] = (
    ("basic", None),
    ("basic", 1.0),
    ("LaPE-sharing", None),
    ("LaPE", None),
)
"""Joins, and what their tables start with: the second row is the control of the scale that LN' gives P."""
DEMO_FILES = ("results.json", "report.md", "curves.png", "correlation.png")
DEMO = "lape demo"


def demo(options: DemoOptions) -> Study:
    """Trains `DEMO_ROWS` on the packaged digits with each seed, again with a longer budget, and reports.

    Raises LapeError before any training when `output_dir` cannot be written or holds files of these names that no demo
    wrote, or when a number makes no sense.
    """
    from lape.train.schedule import fit_warm_up

    _check_demo(options)
    recipe = Recipe.from_yaml("digits", threads=1, num_workers=0, device="cpu")
    if options.epochs is not None:
        recipe = fit_warm_up(recipe.replace(epochs=options.epochs), print, explicit=False)
    check_figures()
    folder = claim_demo_folder(Path(options.output_dir))
    stages = demo_stages(recipe, options.seeds, recipe.epochs * options.long_factor, options.long_seeds)
    agenda = Agenda(stages, options.workers, options.time_limit)
    rows = [Variant.of(one) for one in stages[0].recipes]
    print(
        f"{'; '.join(row.label for row in rows)}: on the packaged digits, {options.workers} trainings at a time, "
        f"up to {options.seeds} seeds",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as models:
        with explain_interruption(
            lambda: f"the demo was stopped, nothing was written to {folder}; to begin anew: the same command"
        ):
            runs = run_all(agenda, partial(_train_for_demo, Path(models)), _demo_line)
        if not runs:
            raise LapeError(f"no training ended within time_limit={options.time_limit:g}: give more seconds, or none")
        runs.sort(key=lambda run: (run.epochs, run.seed, rows.index(run.variant)))
        figures = {"curves.png": _demo_curves(runs), "correlation.png": _maps(Path(models), runs)}
    gaps = differences(runs, DEMO_BASELINE)
    results = {
        "made_by": DEMO,
        "data": runs[0].data,
        "recipe": recipe.model_dump(mode="json", exclude_unset=True, exclude={"join_type", "seed"}),
        "variants": summarise(runs, DEMO_BASELINE),
        "differences": gaps,
        "left_out": [{"epochs": s.recipes[0].epochs, "seed": s.recipes[0].seed} for s in agenda.omissions],
        "sentences": [*report.sentences(gaps), *omission_sentences(agenda)],
        "runs": [asdict(run) for run in runs],
        **environment(),
        "workers": options.workers,
        "seconds": agenda.elapsed,
    }
    files = report.write(folder, results, report.demo_page(results), figures)
    table = report.plain_table(report.without_constants(report.rows_of_variants(results)))
    print("\ntest accuracy, %: mean ± standard deviation over the seeds")
    print("\n".join([*(f"  {row}" for row in table), "", *results["sentences"]]))
    print("\n".join([f"\n{results['seconds']:.0f} s. Written:", *(f"  {file}" for file in files)]))
    return Study(folder, results, files)


def _check_demo(options: DemoOptions) -> None:
    """Raises LapeError for a number that makes no sense."""
    for name, least, most in (
        ("seeds", 1, None),
        ("long_factor", 2, None),
        ("long_seeds", 0, options.seeds),
        ("workers", 1, None),
    ):
        value = getattr(options, name)
        if value < least or (most is not None and value > most):
            rule = f"{least} or more" if most is None else f"{least} to {most}, the number of seeds"
            raise LapeError(f"{name}={value} is not allowed: choose {rule}")
    if options.time_limit is not None and not options.time_limit > 0:
        raise LapeError(f"time_limit={options.time_limit:g} is not allowed: choose seconds above 0, or none")


def claim_demo_folder(folder: Path) -> Path:
    """The folder, made and writable. Raises LapeError if it is not, or if a file would be lost that no demo wrote."""
    names = [name for name in DEMO_FILES if (_writable(folder) / name).exists()]
    check_file(folder / DEMO_FILES[0])
    try:
        ours = json.loads((folder / DEMO_FILES[0]).read_text(encoding="utf-8"))["made_by"] == DEMO
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if names and not ours:
        raise LapeError(f"{folder} holds {', '.join(names)}, which no demo wrote: choose another --output-dir")
    return folder


def demo_stages(recipe: Recipe, seeds: int, long_epochs: int, long_seeds: int) -> list[Stage]:
    """First what is needed, one seed; then one with the longer budget, then the others, the longer budget's last."""

    def stage(epochs: int, seed: int, needed: bool = False) -> Stage:
        rows = [Variant(recipe.model, recipe.pe, join, None, std) for join, std in DEMO_ROWS]
        return Stage(tuple(row.recipe(recipe).replace(seed=seed, epochs=epochs) for row in rows), needed)

    short = [stage(recipe.epochs, seed, needed=seed == 0) for seed in range(seeds)]
    long = [stage(long_epochs, seed) for seed in range(long_seeds)]
    return [*short[:2], *long[:1], *short[2:], *long[1:]]


def omission_sentences(agenda: Agenda) -> list[str]:
    """What the time limit left out, in a sentence."""
    if not agenda.omissions:
        return []
    names = (f"seed {stage.recipes[0].seed} of {stage.recipes[0].epochs} epochs" for stage in agenda.omissions)
    return [f"Left out, to end within {agenda.time_limit:.0f} s on this machine: {', '.join(names)}."]


def _train_for_demo(models: Path, recipe: Recipe, tick: Callable[[], None]) -> Run:
    return _train(recipe, cell_folder(models / str(recipe.epochs), recipe), tick)


def _demo_line(run: Run) -> str:
    return (
        f"  {run.variant.label:18}  seed {run.seed}, {run.epochs:>3} epochs: "
        f"{run.accuracy:5.1f} % of the test images right ({run.seconds:.0f} s)"
    )


def _demo_curves(runs: Sequence[Run]) -> "Figure":
    seeds = Counter(run.epochs for run in runs if run.variant == runs[0].variant)
    return report.accuracy_curves(
        runs,
        lambda run: f"{run.epochs} epochs, {seeds[run.epochs]} seed{'' if seeds[run.epochs] == 1 else 's'}",
    )


def _maps(models: Path, runs: Sequence[Run]) -> "Figure":
    """The positions of one model a row, of the first seed and budget, layer by layer with one colour range."""
    from lape.files.folder import load
    from lape.look.figures import COSINE, Strip, overview
    from lape.look.similarity import Maps, center_token, token_map

    strips, columns = [], []
    first = [run for run in runs if (run.epochs, run.seed) == (runs[0].epochs, runs[0].seed)]
    for run in first:
        home = _cell_path(models / str(run.epochs), run.variant, run.seed)
        maps = Maps.of(load(home / "model"))
        token, all_maps, columns = center_token(maps.grid), list(maps.columns.values()), list(maps.columns)
        strips.append(Strip(f"{run.variant.label}\nall patches", all_maps, maps.grid))
        strips.append(
            Strip(f"{run.variant.label}\ntoken {token}", [token_map(m, maps.grid) for m in all_maps], maps.grid, token)
        )
    title = f"positions as each layer sees them, after {runs[0].epochs} epochs, seed {runs[0].seed}"
    return overview(title, strips, columns, *COSINE)
