"""Comparisons: every number from the runs, nothing trained twice, what loses shown losing."""

import json
import math
import os
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from processes import ends_well, with_forks

import lape
from lape.cli import app as cli
from lape.errors import LapeError
from lape.files.read import read_checkpoint
from lape.look.colours import COLOURS
from lape.names import JOIN_NAMES, TABLE8_NAMES
from lape.recipe import Recipe
from lape.study.compare import Study, cell_folder, combinations, compare, rows_of, train_cell, with_preset
from lape.study.numbers import Run, Variant, differences, paired_t, summarise
from lape.study.options import CompareOptions
from lape.study.report import MOST_POINTS, accuracy_curves, explorer_page, sentences
from lape.study.workers import Agenda, Stage, run_all
from lape.train.loop import train

TINY = Recipe.from_yaml(
    "digits", epochs=1, batch_size=256, model_kwargs={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
)


def options(folder: Path, **given: Any) -> CompareOptions:
    return CompareOptions(output_dir=str(folder), **given)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Study:
    joins, pes = ("basic", "share", "LaPE"), ("learnable", "2D_RPE")
    return compare(TINY, options(tmp_path_factory.mktemp("compare"), joins=joins, pes=pes, seeds=(0, 1), workers=1))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_combination_with_a_meaning_is_trained(comparison: Study) -> None:
    cells = comparison.results["cells"]
    assert (comparison.results["workers"], comparison.results["gpus"]) == (1, [])
    assert len(cells) == 2 * (3 + 2)
    assert {(c["pe"], c["join"]) for c in cells if c["pe"] == "2D_RPE"} == {("2D_RPE", "basic"), ("2D_RPE", "LaPE")}
    assert [(m["join"], m["pe"]) for m in comparison.results["meaningless"]] == [("share", "2D_RPE")]
    assert {file.name for file in comparison.files} == {"results.json", "report.md", "curves.png", "report.html"}
    assert json.loads((comparison.folder / "results.json").read_text())["variants"] == comparison.results["variants"]


def test_numbers_are_those_of_the_runs(comparison: Study) -> None:
    for variant in comparison.results["variants"]:
        runs = [c for c in comparison.results["cells"] if (c["pe"], c["join"]) == (variant["pe"], variant["join"])]
        assert variant["final"]["mean"] == statistics.fmean(run["accuracy"] for run in runs)
        assert variant["best_epoch"]["mean"] == statistics.fmean(run["best"] for run in runs)
        if variant["join"] == "basic":
            assert variant["difference"] is None
        else:
            base = [c for c in comparison.results["cells"] if (c["pe"], c["join"]) == (variant["pe"], "basic")]
            gaps = [a["accuracy"] - b["accuracy"] for a, b in zip(runs, base, strict=True)]
            assert variant["difference"]["each"] == gaps
    report = (comparison.folder / "report.md").read_text()
    page = (comparison.folder / "report.html").read_text()
    for variant in comparison.results["variants"]:
        assert f"{variant['final']['mean']:.1f}" in report
        assert f"{variant['final']['mean']:.1f}" in page
    for sentence in comparison.results["sentences"]:
        assert sentence in report


def test_a_cell_is_the_training_of_its_recipe(comparison: Study) -> None:
    cell = next(c for c in comparison.results["cells"] if (c["pe"], c["join"], c["seed"]) == ("learnable", "LaPE", 1))
    threads = torch.get_num_threads()
    recipe = TINY.replace(join_type="LaPE", seed=1, threads=1, num_workers=0)
    alone = train(recipe, say=lambda _text: None)
    torch.set_num_threads(threads)
    assert (cell["accuracy"], cell["loss"]) == (alone.accuracy, alone.loss)
    saved = lape.load(comparison.folder / "cells" / f"{recipe.model}.learnable.LaPE.seed1" / "model")
    assert torch.equal(lape.positions(saved), lape.positions(alone.model))


def test_what_is_done_is_skipped_and_what_is_missing_is_trained(
    comparison: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    import lape.train.loop

    shutil.copytree(comparison.folder, tmp_path / "copy")
    lost = next((tmp_path / "copy" / "cells").glob("*learnable.LaPE.seed0"))
    (lost / "result.json").unlink()
    trained: list[Recipe] = []
    monkeypatch.setattr(
        lape.train.loop, "train", lambda recipe, **kwargs: (trained.append(recipe), train(recipe, **kwargs))[1]
    )
    again = compare(TINY, options(tmp_path / "copy", joins=("basic", "LaPE"), seeds=(0, 1), workers=1))
    assert [(r.join_type, r.seed) for r in trained] == [("LaPE", 0)]
    kept = [v for v in comparison.results["variants"] if v["pe"] == "learnable" and v["join"] != "share"]
    assert [v["final"] for v in again.results["variants"]] == [v["final"] for v in kept]
    with pytest.raises(LapeError, match=r"trained with epochs=1, this comparison asks for 2.*choose another"):
        compare(TINY.replace(epochs=2), options(tmp_path / "copy", joins=("basic",), seeds=(0,)))


@pytest.mark.slow
def test_a_cell_that_was_stopped_goes_on_after_its_last_epoch(tmp_path: Path) -> None:
    recipe = TINY.replace(epochs=3, join_type="LaPE", threads=1, num_workers=0, output_dir="", resume="")
    threads = torch.get_num_threads()
    calm = train_cell(tmp_path / "calm", recipe, lambda: None)
    epochs = []

    def pull_the_plug() -> None:
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_cell(tmp_path / "stopped", recipe, pull_the_plug)
    resumed = train_cell(tmp_path / "stopped", recipe, lambda: epochs.append(1))
    torch.set_num_threads(threads)
    assert len(epochs) == 3  # one of them only after the stop
    assert resumed.history == calm.history
    assert resumed.measures == calm.measures
    assert not (cell_folder(tmp_path / "stopped", recipe) / "training").exists()


@pytest.mark.slow
def test_data_on_the_device_side_by_side(tmp_path: Path) -> None:
    """Several seeds and joins at once on one device, which holds the images once a process."""
    recipe = TINY.replace(data_on_device=True, aa="rand-m9-mstd0.5-inc1", reprob=0.25)
    recipes = [recipe.replace(join_type="LaPE", threads=1, num_workers=0, seed=seed) for seed in (0, 1)]
    ends_well(with_forks, train_beside, tmp_path / "two", recipes)
    beside = [json.loads((cell_folder(tmp_path / "two", one) / "result.json").read_text())["run"] for one in recipes]
    alone = [train_cell(tmp_path / "one", one, bool) for one in recipes]
    assert [run["history"] for run in beside] == [run.history for run in alone]


def train_beside(folder: Path, recipes: list[Recipe]) -> None:
    run_all(Agenda([Stage((one,)) for one in recipes], 2), partial(train_cell, folder), str)


def test_trainings_are_dealt_out_to_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from lape.study import workers

    monkeypatch.setenv("LOCAL_RANK", "0")
    for gpus, expected in ((0, "000"), (1, "000"), (2, "010")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        found = []
        for place in range(3):
            workers._take_gpu(place)
            found.append(os.environ["LOCAL_RANK"])
        assert "".join(found) == expected


def test_what_was_trained_on_a_gpu_is_measured_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids and distances are made there; a CUDA model is stood in for by one that only its `cpu` makes whole."""
    moved, positions = [], lape.convert.positions.positions

    def checked(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
        assert moved == [model]
        return positions(model, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "cpu", lambda model: (moved.append(model), model)[1])
    monkeypatch.setattr("lape.convert.positions.positions", checked)
    compare(TINY, options(tmp_path, joins=("LaPE",), seeds=(0,), workers=1))
    assert len(moved) == 1


def test_finished_runs_and_foreign_checkpoints_have_a_table_of_their_own(tmp_path: Path) -> None:
    run = train(TINY.replace(output_dir=str(tmp_path / "run"), join_type="share"), say=lambda _text: None)
    others = [tmp_path / "run", tmp_path / "run" / "checkpoint.pth"]
    found = compare(TINY, options(tmp_path / "c", joins=("basic",), pes=("none",), seeds=(0,), runs=others, workers=1))
    first, second = found.results["others"]
    assert (first["join"], first["epochs"], first["final"]) == ("share", 1, run.accuracy)
    assert second["final"] == pytest.approx(run.accuracy)
    assert second["measured"].startswith("here")
    assert "Not trained here" in (tmp_path / "c" / "report.md").read_text()
    assert not (tmp_path / "c" / "report.html").exists()  # pe=none has no position to explore


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "freedom", "p"),  # two-sided critical values of printed tables
    [(12.7062, 1, 0.05), (4.30265, 2, 0.05), (2.77645, 4, 0.05), (9.92484, 2, 0.01), (2.22814, 10, 0.05),
     (3.16927, 10, 0.01), (2.26216, 9, 0.05), (63.6567, 1, 0.01), (0.0, 5, 1.0), (-2.77645, 4, 0.05)],
)  # fmt: skip
def test_student_t_agrees_with_printed_tables(t: float, freedom: int, p: float) -> None:
    """The differences are built to have this t: mean t / sqrt(n), deviation 1."""
    n = freedom + 1
    spread = torch.arange(n).double()
    gaps = (spread - spread.mean()) / spread.std() + t / math.sqrt(n)
    test = paired_t(gaps.tolist())
    assert (test["t"], test["p"]) == pytest.approx((t, p), rel=2e-5, abs=1e-12)
    if p == 0.05:  # the 95 % interval ends where the difference would not be significant any more
        assert min(abs(end) for end in test["interval"]) == pytest.approx(0.0, abs=2e-5)


def test_paired_t_is_mean_over_standard_error() -> None:
    found = paired_t([1.0, 2.0, 3.0])
    assert found["t"] == pytest.approx(2 / (1 / math.sqrt(3)))
    assert found["p"] == pytest.approx(0.0741799, rel=1e-5)
    assert paired_t([1.0]) == {"t": None, "p": None, "interval": None}
    assert paired_t([0.0, 0.0]) == {"t": None, "p": 1.0, "interval": [0.0, 0.0]}


def runs(join: str, accuracies: list[float]) -> list[Run]:
    return [Run("vit", "learnable", join, 3, s, a, a + 2, 0.5, 1.0, [], "d") for s, a in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ([60.0, 61.0, 62.5], ["behind basic by 28.8 points", "0 of 3", "p < 0.001"]),
        ([95.0, 96.0, 96.5], ["ahead of basic by 5.8 points", "3 of 3"]),
        ([95.0, 80.0, 96.5], ["ahead of basic by 0.5", "This may be chance"]),
        ([89.0, 90.0, 91.0], ["level"]),
        ([95.0], ["ahead of", "in one seed"]),
    ],
)
def test_a_join_that_loses_is_shown_losing(candidate: list[float], words: list[str]) -> None:
    trained = runs("basic", [89.0, 90.0, 91.0]) + runs("LaPE", candidate)
    variants = summarise(trained, "basic")
    said = sentences(differences(trained, "basic"))
    assert len(said) == 1
    assert all(word in said[0] for word in words), said
    assert variants[1]["best_epoch"]["mean"] == pytest.approx(variants[1]["final"]["mean"] + 2)


@pytest.mark.parametrize("count", [5, 6])
def test_the_page_says_when_it_shows_some_of_the_models(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"processor": "p", "cores": 1, "system": "s"}
    results = {"data": "d", "baseline": "basic", "cells": [{"seed": 3, "seconds": 1.0}], "recipe": {}, "rivals": None}
    results |= {"workers": 1, "hardware": about, "versions": {}, "commit": "c"}
    results |= {"conditions": {}, "probe": {}}
    results |= {name: [] for name in ("variants", "differences", "sentences", "others", "meaningless", "gpus")}
    monkeypatch.setattr("lape.look.explorer.explore", lambda *_, title, intro: intro)
    page = explorer_page(
        Path("page"), results, dict.fromkeys(map(str, range(count)), Path("m")), {"curves.png": Figure()}
    )
    assert ("models of seed 3, the first six" in str(page)) == (count == 6)


def test_a_tie_is_not_ahead() -> None:
    variants = summarise(runs("basic", [90.0, 90.0, 90.0]) + runs("LaPE", [90.0, 91.0, 89.0]), "basic")
    assert (variants[1]["difference"]["ahead"], variants[1]["difference"]["mean"]) == (1, 0)


def test_seconds_are_those_of_all_starts_of_a_run() -> None:
    line = {"epoch": 0, "train_loss": 1.0, "test_loss": 1.0, "test_acc1": 50.0, "seconds": 4.0}
    result = SimpleNamespace(
        accuracy=50.0, best_accuracy=50.0, loss=1.0, history=[line, line], data_name="d", seconds=5
    )
    assert Run.of(Recipe(), result, {}).seconds == 8.0  # type: ignore[arg-type]


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"joins": ("basic", "LaPA")}, "unknown join 'LaPA'"),
        ({"pes": ("3D_sin",)}, "unknown pe"),
        ({"joins": ("share",), "pes": ("2D_RPE",)}, "nothing to train"),
        ({"seeds": (0, 0)}, "each once"),
        ({"seeds": ()}, "at least one"),
        ({"workers": 0}, "workers=0"),
        ({"pe_norms": ("rms",)}, "unknown pe_norm 'rms'"),
        ({"pe_stds": (0.0,)}, "pe_stds=0.0 is no"),
        ({"pe_stds": (math.nan,)}, "pe_stds=nan is no"),
        ({"pe_stds": (1.0, 1.0)}, "each once"),
        ({"baseline": "share"}, "unknown baseline 'share'"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_made(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(LapeError, match=message) as caught:
        compare(TINY, options(tmp_path / "out", **given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_wrong_folders_and_runs_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LapeError, match="cannot write into"):
        compare(TINY, options(tmp_path / "file"))
    with pytest.raises(LapeError, match="no such checkpoint"):
        compare(TINY, options(tmp_path / "a", runs=(str(tmp_path / "absent.pth"),)))
    home = tmp_path / "b" / "cells" / f"{TINY.model}.learnable.basic.seed0"
    home.mkdir(parents=True)
    (home / "result.json").write_text("{}")
    with pytest.raises(LapeError, match="is no result of a comparison"):
        compare(TINY, options(tmp_path / "b", joins=("basic",), seeds=(0,)))


def combine(models: list[str], pes: list[str], joins: list[str], norms: Any = (None,), stds: Any = (None,)) -> Any:
    return combinations(Recipe(input_size=16), rows_of(models, pes, joins, norms, stds))


def test_starts_and_norms_make_rows_where_they_mean_something() -> None:
    rows = combine(
        ["cvt_2_4_32"], ["learnable", "2D_RPE"], ["basic", "beside", "LaPE"], ("norm", "scalar"), (0.02, 1.0)
    )
    assert [row.label for row in rows[0]] == [
        *("basic, P at std 0.02", "basic, P at std 1", "beside, P at std 0.02", "beside, P at std 1"),
        *(f"LaPE ({norm}), P at std {std}" for std in ("0.02", "1") for norm in ("norm", "scalar")),
        *("basic", "LaPE"),  # a bias on logits has neither
    ]
    assert [row.join for row in rows[1]] == ["beside"]  # with 2D_RPE


@pytest.mark.parametrize(("preset", "rows", "left_out"), [("table7", 5 * 3 - 2 + 2 * 2, 6 + 2), ("table8", 2 + 16, 0)])
def test_presets_are_the_papers_tables(preset: Any, rows: int, left_out: int) -> None:
    chosen = with_preset(CompareOptions(output_dir="x", preset=preset))
    norms, stds = chosen.pe_norms or (None,), chosen.pe_stds or (None,)
    wanted, odd = combine(["vit_lite_2_4_32"], list(chosen.pes), list(chosen.joins), norms, stds)
    assert (len(wanted), len(odd)) == (rows, left_out)
    assert with_preset(CompareOptions(output_dir="x", preset=preset, joins=("share",))).joins == ("share",)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"sizes": ("12", "13")}, "input size 13 x 13 is not divisible"),
        ({"sizes": ("12x10",)}, "input size 10 x 10 is not divisible"),
        ({"preset": "rivals", "pes": ("PEG",)}, "rows of its own: leave pes=.'PEG'. out"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_trainings(tmp_path: Path, asked: dict, text: str) -> None:
    with pytest.raises(LapeError, match=text):
        compare(TINY, options(tmp_path / "o", seeds=(0,), workers=1, **asked))
    assert not (tmp_path / "o").exists()


def test_cells_of_starts_and_norms_are_kept_apart(tmp_path: Path) -> None:
    found = compare(
        TINY, options(tmp_path, joins=("basic", "LaPE"), pe_stds=(1.0,), pe_norms=("norm",), seeds=(0,), workers=1)
    )
    assert [cell.name for cell in sorted((tmp_path / "cells").iterdir())] == [
        f"{TINY.model}.learnable.LaPE.norm.std1.seed0",
        f"{TINY.model}.learnable.basic.std1.seed0",
    ]
    saved = lape.load(next((tmp_path / "cells").glob("*LaPE*")) / "model")
    assert (lape.describe(saved).pe_norm, lape.describe(saved).std) == ("norm", 1.0)
    assert [gap["cause"] for gap in found.results["differences"]] == ["the join"]


def test_combinations_keep_the_order_that_was_asked_for() -> None:
    name = "cvt_2_4_32"
    wanted, odd = combine([name], ["none", "2D_sin"], ["LaPE", "basic"])
    assert [row[:3] for row in wanted] == [(name, "none", "basic"), (name, "2D_sin", "LaPE"), (name, "2D_sin", "basic")]
    assert list(odd) == [Variant(name, "none", "LaPE")]


def test_a_join_that_a_model_cannot_have_is_left_out_with_the_reason() -> None:
    names = ["vit_lite_2_4_32", "cvt_2_4_32"]
    wanted, odd = combine(names, ["learnable"], ["basic", "MPVG"])
    assert [(row.model, row.join) for row in wanted] == [(names[0], "basic"), (names[1], "basic"), (names[1], "MPVG")]
    assert "reads a class token" in odd[Variant(names[0], "learnable", "MPVG")]
    with pytest.raises(LapeError, match=r"nothing to train: .*ResNet is not a supported model"):
        combine(["resnet18"], ["learnable"], ["basic"])
    with pytest.raises(LapeError, match="unknown model 'vit_lite_9'"):
        combine(["vit_lite_9"], ["learnable"], ["basic"])


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import lape.study.compare

    calls: list[tuple[Recipe, CompareOptions]] = []
    monkeypatch.setattr(lape.study.compare, "compare", lambda *given: calls.append(given))
    flags = "compare --output-dir d --joins basic share --seeds 3 4 --epochs 7 --pes 2D_sin learnable --runs r/a"
    assert cli.run(cli.app, flags.split()) == 0
    recipe, given = calls[0]
    assert recipe.epochs == 7
    assert given == options("d", joins=("basic", "share"), seeds=(3, 4), pes=("2D_sin", "learnable"), runs=("r/a",))
    assert cli.run(cli.app, ["compare", "--output-dir", "d", "--join-type", "LaPE"]) == 2
    assert "--join" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_stages_is_compared_though_no_one_figure_holds_its_positions(tmp_path: Path) -> None:
    kwargs = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "patch_size": 2}
    recipe = TINY.replace(model="swin_tiny_patch4_window7_224", input_size=16, model_kwargs=kwargs)
    found = compare(recipe, options(tmp_path, joins=("basic", "LaPE"), seeds=(0,), workers=1))
    assert [cell["measures"] for cell in found.results["cells"]] == [{}, {}]
    assert {file.name for file in found.files} == {"results.json", "report.md", "curves.png"}
    saved = read_checkpoint(next((tmp_path / "cells").glob("*LaPE*")) / "model")
    assert saved.num_classes == 10  # its classifier has another name than that of most


def test_every_join_has_a_colour_of_its_own() -> None:
    assert sorted(COLOURS) == sorted(JOIN_NAMES)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_report_of_a_model_that_pools(tmp_path: Path) -> None:
    pooled = {**TINY.model_kwargs, "class_token": False, "global_pool": "avg", "fc_norm": False}
    joins = ("basic", "PVG", "MPVG")
    found = compare(TINY.replace(model_kwargs=pooled), options(tmp_path, joins=joins, seeds=(0,), workers=1))
    assert [variant["join"] for variant in found.results["variants"]] == list(joins)
    page = (tmp_path / "report.html").read_text()
    assert all(COLOURS[join] in page for join in joins)


def test_no_two_rows_of_table_8_look_alike_in_the_curves() -> None:
    rows = [Variant("vit", "learnable", "LaPE", norm, std) for norm in TABLE8_NAMES for std in (0.02, 1.0)]
    rows += [Variant("vit", "learnable", "basic", None, std) for std in (0.02, 1.0)]
    line = [{"epoch": 0, "train_loss": 1.0, "test_loss": 1.0, "test_acc1": 50.0}]
    trained = [
        Run("vit", "learnable", row.join, 1, 0, 50.0, 50.0, 1.0, 1.0, line, "d", pe_norm=row.pe_norm, pe_std=row.pe_std)
        for row in rows
    ]
    (axes,) = accuracy_curves(trained, lambda _run: "vit").axes
    looks = {(drawn.get_color(), drawn.get_linestyle()) for drawn in axes.get_lines()}
    assert len(looks) == len(rows) == len(axes.get_lines())
    assert all(drawn.get_marker() == "o" for drawn in axes.get_lines())  # of one epoch, a line would not be seen
    assert len({float(drawn.get_xdata()[0]) for drawn in axes.get_lines()}) == len(rows)  # none hides another
    assert [tick for tick in axes.get_xticks() if 0.6 < tick < 1.4] == [1]


@pytest.mark.parametrize("epochs", [1, 8, 40])
def test_the_axes_fit_what_was_reached(epochs: int) -> None:
    def run(join: str, seed: int) -> Run:
        line = [
            {"epoch": e, "train_loss": 1.0, "test_loss": 1.0, "test_acc1": 9.0 + seed + e / epochs}
            for e in range(epochs)
        ]
        return Run("vit", "learnable", join, epochs, seed, 9.0, 9.0, 1.0, 1.0, line, "d")

    figure = accuracy_curves([run(join, seed) for join in ("basic", "LaPE") for seed in (0, 1)], lambda _run: "vit")
    (axes,) = figure.axes
    (low, high), (first, last) = axes.get_ylim(), axes.get_xlim()
    assert 8 < low < 9
    assert 10 < high < 12
    assert 0 <= first < 1
    assert epochs < last < epochs * 1.03 + 1
    assert {drawn.get_marker() for drawn in axes.get_lines()} == ({""} if epochs > MOST_POINTS else {"o"})
    spread = [line.get_segments() for line in axes.collections if hasattr(line, "get_segments")]
    assert len(spread) == (2 if epochs == 1 else 0)  # from the lowest seed to the highest, where a band has no width
