"""The demo: what it writes agrees with what it measured, and it never promises more."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ends_well, with_forks
from training import TIMES

from lape.errors import LapeError
from lape.recipe import Recipe
from lape.study.compare import (
    DEMO_FILES,
    DEMO_ROWS,
    Study,
    _train_for_demo,
    claim_demo_folder,
    demo_stages,
    omission_sentences,
)
from lape.study.compare import demo as run_demo
from lape.study.numbers import Run, Variant, differences, holm, mean_std, pairs_of, summarise
from lape.study.options import DemoOptions
from lape.study.report import markdown_table, rows_of_differences, rows_of_variants, sentences
from lape.study.workers import Agenda, Stage, TimeIsUp, run_all
from lape.train.schedule import fit_warm_up

NARROW = Recipe.from_yaml(
    "digits", model_kwargs={"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}, batch_size=256
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """All of it, side by side, with a narrow model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "from_yaml", lambda _name, **changes: NARROW.replace(**changes))
        folder = tmp_path_factory.mktemp("demo")
        yield run_demo(DemoOptions(output_dir=str(folder), seeds=1, epochs=1, long_factor=2, workers=2))


@pytest.fixture(scope="module")
def alone(demo: Study, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The shorter trainings of the demo again, one after the other."""
    recipe = fit_warm_up(NARROW.replace(threads=1, num_workers=0, device="cpu", epochs=1), str, explicit=False)
    agenda = Agenda(demo_stages(recipe, 1, 2, 0), workers=1)
    return run_all(agenda, partial(_train_for_demo, tmp_path_factory.mktemp("alone")), str)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_files_are_written(demo: Study) -> None:
    assert {file.name for file in demo.folder.iterdir()} == set(DEMO_FILES) == {file.name for file in demo.files}
    assert all(file.stat().st_size > 500 for file in demo.files)


@pytest.mark.slow
def test_results_agree_with_the_runs(demo: Study) -> None:
    results = json.loads((demo.folder / "results.json").read_text())
    assert {(run["join"], run["pe_std"], run["epochs"], run["seed"]) for run in results["runs"]} == {
        (join, std, epochs, 0) for join, std in DEMO_ROWS for epochs in (1, 2)
    }
    final = {}
    for entry in results["variants"]:
        key = (entry["label"], entry["epochs"])
        chosen = [r for r in results["runs"] if (Run(**r).variant.label, r["epochs"]) == key]
        final[key] = statistics.fmean(run["accuracy"] for run in chosen)
        assert entry["final"] == {"mean": final[key], "std": None, "n": 1}
        for run in chosen:
            assert len(run["history"]) == run["epochs"]
            assert run["accuracy"] == run["history"][-1]["test_acc1"]
            assert run["best"] == max(epoch["test_acc1"] for epoch in run["history"])
    assert len(results["differences"]) == 2 * 6
    for gap in results["differences"]:
        expected = final[gap["of"], gap["epochs"]] - final[gap["against"], gap["epochs"]]
        assert gap["mean"] == pytest.approx(expected)
    assert results["versions"]["torch"] == torch.__version__
    assert results["seconds"] > 0
    assert results["recipe"]["epochs"] == 1
    assert "join_type" not in results["recipe"]


@pytest.mark.slow
def test_the_report_says_what_the_results_say(demo: Study) -> None:
    report = (demo.folder / "report.md").read_text()
    for entry in demo.results["variants"]:
        assert f" {entry['final']['mean']:.1f} |" in report
    for sentence in demo.results["sentences"]:
        assert sentence in report
    for name in set(DEMO_FILES) - {"report.md"}:
        assert name in report


@pytest.mark.slow
def test_processes_side_by_side_find_the_same(demo: Study, alone: list[Run]) -> None:
    beside = [run for run in demo.results["runs"] if run["epochs"] == 1]
    for run, expected in zip(beside, map(asdict, alone), strict=True):
        assert timeless(run) == timeless(expected)


def timeless(run: dict[str, Any]) -> dict[str, Any]:
    """A run without what another run of the same training has otherwise."""
    run = json.loads(json.dumps({key: value for key, value in run.items() if key != "seconds"}))
    return {**run, "history": [{key: e[key] for key in e if key not in TIMES} for e in run["history"]]}


@pytest.mark.slow
def test_the_number_of_threads_is_given_back(alone: list[Run]) -> None:
    assert len(alone) == len(DEMO_ROWS)
    assert torch.get_num_threads() == THREADS


THREADS = torch.get_num_threads()


# --- words ------------------------------------------------------------------------------------------------------------


def runs(epochs: int, basic: list[float], lape: list[float], join: str = "LaPE", std: float | None = None) -> list[Run]:
    def made(join: str, seed: int, accuracy: float, std: float | None = None) -> Run:
        return Run("vit", "learnable", join, epochs, seed, accuracy, accuracy + 1, 0.5, 1.0, [], "digits", pe_std=std)

    return [made("basic", s, a) for s, a in enumerate(basic)] + [made(join, s, a, std) for s, a in enumerate(lape)]


def words_on(trained: list[Run]) -> list[str]:
    return sentences(differences(trained, "basic"))


def test_mean_and_sample_deviation_are_paired_by_seed() -> None:
    trained = runs(30, [60.0, 70.0, 80.0], [90.0, 91.0, 95.0])
    assert summarise(trained, "basic")[0]["final"] == {"mean": 70.0, "std": 10.0, "n": 3}
    gap = differences(trained, "basic")[0]
    assert gap["each"] == [30.0, 21.0, 15.0]
    assert gap["std"] == pytest.approx(statistics.stdev([30, 21, 15]))
    assert mean_std([1.0])["std"] is None


@pytest.mark.parametrize(
    ("basic", "lape", "words"),
    [
        ([60, 62, 64], [90, 91, 95], ["LaPE is ahead of basic by 30.0 points", "3 of 3"]),
        ([90, 91, 95], [60, 62, 64], ["LaPE is behind basic by 30.0 points", "0 of 3"]),
        ([80, 70, 60], [70, 72, 71], ["ahead of basic by 1.0", "This may be chance"]),
        ([80, 70], [80, 70], ["level"]),
        ([80], [90], ["in one seed", "not measured"]),
    ],
)
def test_the_words_follow_the_numbers(basic: list[float], lape: list[float], words: list[str]) -> None:
    said = words_on(runs(30, basic, lape))
    assert len(said) == 1
    assert all(word in said[0] for word in words)


@pytest.mark.parametrize(
    ("long_basic", "long_lape", "word"),
    [([94], [98], "shrinks"), ([50], [98], "grows"), ([70], [100], "stays as large"), ([99], [97], "changes sides")],
)
def test_the_change_with_the_budget_is_over_common_seeds(
    long_basic: list[float], long_lape: list[float], word: str
) -> None:
    both = runs(30, [60, 0], [90, 0]) + runs(90, long_basic, long_lape)
    said = words_on(both)
    assert f"From 30 to 90 epochs the difference of LaPE to basic {word}: +30.0 against" in said[-1]
    assert "seed 0 in both" in said[-1]


def test_each_difference_names_what_it_can_be_due_to() -> None:
    rows = [Variant("vit", "learnable", join, None, std) for join, std in DEMO_ROWS]
    due = {(row.label, against.label): cause for row, against, cause in pairs_of(rows, "basic")}
    unit = "basic, P at std 1"
    assert due == {
        (unit, "basic"): "the scale of P at the start",
        ("LaPE-sharing", "basic"): "the join and the scale of P",
        ("LaPE-sharing", unit): "the join: P has unit scale in both at the start",
        ("LaPE", "basic"): "the join and the scale of P",
        ("LaPE", unit): "the join: P has unit scale in both at the start",
        ("LaPE", "LaPE-sharing"): "the chain",
    }
    paired = [
        Variant("vit", "learnable", join, norm, std)
        for std in (0.02, 1)
        for join, norm in (("basic", None), ("LaPE", "none"))
    ]
    due = {(row.label, against.label): cause for row, against, cause in pairs_of(paired, "basic")}
    assert due["LaPE (none), P at std 1", "basic, P at std 1"] == "the join"
    assert ("LaPE (none), P at std 1", "basic, P at std 0.02") not in due
    assert ("LaPE (none), P at std 0.02", "basic, P at std 1") not in due  # without a norm P keeps its scale


def test_holm_is_its_step_down_rule() -> None:
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_tables() -> None:
    trained = runs(30, [60.0, 70.0], [90.0, 91.0])
    results = {"variants": summarise(trained, "basic"), "differences": differences(trained, "basic")}
    assert rows_of_variants(results)[1] == ["vit", "learnable", "basic", "30", "2", "65.0 ± 7.1", "66.0 ± 7.1"]
    table = rows_of_differences(results)
    assert table[0] == ["join", "against", "due to", "seeds", "points", "95 % interval", "p"]
    assert table[1][:5] == ["LaPE", "basic", "the join and the scale of P", "2", "+25.5 ± 6.4"]
    low, high = (25.5 + sign * 12.706 * statistics.stdev([30, 21]) / 2**0.5 for sign in (-1, 1))
    assert table[1][5] == f"{low:+.1f} to {high:+.1f}"
    assert markdown_table(table).splitlines()[1] == "|" + "---|" * 7


# --- what is trained --------------------------------------------------------------------------------------------------


def test_one_seed_is_needed_and_the_longer_budget_comes_before_the_third() -> None:
    planned = demo_stages(Recipe.from_yaml("digits", epochs=30), 4, 90, 2)
    assert [(s.recipes[0].epochs, s.recipes[0].seed, s.needed) for s in planned] == [
        (30, 0, True),
        (30, 1, False),
        (90, 0, False),
        (30, 2, False),
        (30, 3, False),
        (90, 1, False),
    ]
    for stage in planned:
        assert [(recipe.join_type, recipe.pe_std) for recipe in stage.recipes] == list(DEMO_ROWS)
        assert len({recipe.replace(join_type="basic", pe_std=None).model_dump_json() for recipe in stage.recipes}) == 1


@pytest.mark.parametrize(("limit", "taken"), [(None, 6), (0.0, 1), (61.0, 4), (10**6, 6)])
def test_a_slow_machine_leaves_seeds_out(limit: float | None, taken: int) -> None:
    agenda = Agenda(demo_stages(Recipe.from_yaml("digits", epochs=30), 4, 90, 2), workers=2, time_limit=limit)
    count = 0
    while recipes := agenda.take():
        count += 1
        for recipe in recipes:  # one second an epoch; no time passes in this test
            run = runs(recipe.epochs, [50.0], [])[0]
            named = {"model": recipe.model, "join": recipe.join_type, "pe_std": recipe.pe_std, "seed": recipe.seed}
            agenda.add(replace(run, **named, seconds=float(recipe.epochs)))
    assert count == taken
    assert len(agenda.omissions) == 6 - taken
    assert bool(omission_sentences(agenda)) == (taken < 6)


@pytest.mark.parametrize(("workers", "rounds"), [(1, 3), (2, 2), (4, 1)])
@pytest.mark.parametrize("spare", [-5, 5])
def test_a_stage_lasts_as_many_rounds_as_its_workers_need(workers: int, rounds: int, spare: int) -> None:
    one = Recipe(epochs=10)
    stages = [Stage((one,)), Stage((one, one, one), needed=False)]
    agenda = Agenda(stages, workers, time_limit=10 * rounds + spare)
    agenda.take()
    agenda.add(replace(runs(10, [50.0], [])[0], seconds=10.0))
    assert bool(agenda.take()) == (spare > 0)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_time_limit_stops_what_runs(workers: int) -> None:
    """Also what is needed: what ended before is kept, and the rest is left out, in words."""
    if workers == 1:
        stop_what_runs(workers)
    else:
        ends_well(with_forks, stop_what_runs, workers)


def stop_what_runs(workers: int) -> None:
    stages = [Stage((Recipe(seed=0, epochs=1), Recipe(seed=1, epochs=10**6)))]
    agenda = Impatient(stages, workers, time_limit=600.0)
    assert [run.seed for run in run_all(agenda, endless, str)] == [0]
    assert agenda.omissions == stages
    assert "seed 0 of 1 epochs" in omission_sentences(agenda)[0]


class Impatient(Agenda):
    """Its time is up soon after the first training is done, however long that took."""

    def add(self, run: Run) -> None:
        super().add(run)
        self.time_limit = self.elapsed + 0.5


def test_time_is_up_behind_the_limit_and_not_before() -> None:
    agenda = Agenda([], workers=1, time_limit=100.0)
    agenda._began -= 50
    agenda.check_time()
    agenda._began -= 60
    with pytest.raises(TimeIsUp):
        agenda.check_time()


def endless(recipe: Recipe, tick: Callable[[], None]) -> Run:
    for _ in range(recipe.epochs):
        time.sleep(0.01)
        tick()
    return Run(recipe.model, recipe.pe, recipe.join_type, recipe.epochs, recipe.seed, 1.0, 1.0, 0.5, 1.0, [], "digits")


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers", [{"seeds": 0}, {"long_factor": 1}, {"long_seeds": 6}, {"workers": 0}, {"epochs": 0}]
)
def test_wrong_numbers_are_one_line_before_anything_is_made(tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(LapeError, match=f"{next(iter(numbers))}=.* allowed") as caught:
        run_demo(DemoOptions(output_dir=str(tmp_path / "out"), **numbers))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_no_demo_wrote_are_kept(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(LapeError, match=r"report\.md, which no demo wrote"):
        run_demo(DemoOptions(output_dir=str(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    (tmp_path / "results.json").write_text('{"made_by": "lape demo"}')
    assert claim_demo_folder(tmp_path) == tmp_path


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LapeError, match=r"cannot write into .*choose another --output-dir"):
        run_demo(DemoOptions(output_dir=str(tmp_path / "file")))


UNEVEN = """
import sys, time
from pathlib import Path
from lape.recipe import Recipe
from lape.study.workers import Agenda, Stage, run_all
from lape.train.faults import Stop

folder = Path(sys.argv[1])


def job(recipe, tick):
    (folder / f"training {recipe.seed}").touch()
    stop = Stop()
    with stop.on_signals():  # as a training does
        while not stop.is_set():
            time.sleep(0.01)
        raise SystemExit(143)


if __name__ == "__main__":
    run_all(Agenda([Stage((Recipe(seed=0), Recipe(seed=1)))], workers=2), job, str)
else:
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:  # the second worker is still importing
        (folder / "second").touch()
        time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_a_worker_that_trains_while_another_starts(tmp_path: Path) -> None:
    """The first must not take the recipe that waits for the second."""
    script = tmp_path / "script.py"
    script.write_text(UNEVEN)
    press_ctrl_c([str(script), str(tmp_path)], lambda _children: len(list(tmp_path.iterdir())) == 4)
    assert not (tmp_path / "training 1").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    options = DemoOptions(output_dir=str(tmp_path), epochs=500)
    code = f"""
from lape.study.compare import demo
from lape.study.options import DemoOptions
if __name__ == "__main__":
    demo({options!r})
"""
    press_ctrl_c(["-c", code], lambda children: len(children) == 3)  # the workers; a spawn starts a helper as well
    assert not list(tmp_path.iterdir())


def press_ctrl_c(arguments: list[str], ready: Callable[[list[int]], bool]) -> None:
    """Interrupt a Python process once it is ready, and see it and its children end. The limits only end a hang."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background would inherit deafness
    parent = subprocess.Popen([sys.executable, *arguments], preexec_fn=heeds, **quiet)
    listing = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    children: list[int] = []
    try:
        deadline = time.monotonic() + 300
        while not ready(children) and time.monotonic() < deadline:
            time.sleep(0.1)
            children = [int(pid) for pid in listing.read_text().split()]
        assert ready(children)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(300) != 0
        while any(_alive(pid) for pid in children) and time.monotonic() < deadline + 300:
            time.sleep(0.1)
        assert not any(_alive(pid) for pid in children)
    finally:
        for pid in (parent.pid, *children):
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        parent.wait()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
