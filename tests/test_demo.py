"""The demo: what it writes agrees with what it measured, and it never promises more."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lape.errors import LapeError
from lape.recipe import Recipe
from lape.study.compare import DEMO_FILES, Study, claim, demo_stages, late
from lape.study.compare import demo as run_demo
from lape.study.numbers import Run, by_budget, mean_std, summarise
from lape.study.options import DemoOptions
from lape.study.report import markdown_table, rows_of_budgets, sentences_on_budgets
from lape.study.workers import Agenda


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run_demo(
        DemoOptions(output_dir=str(tmp_path_factory.mktemp("demo")), seeds=1, epochs=1, long_factor=2, workers=1)
    )


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_files_are_written(demo: Study) -> None:
    assert {file.name for file in demo.folder.iterdir()} == set(DEMO_FILES) == {file.name for file in demo.files}
    assert all(file.stat().st_size > 500 for file in demo.files)


@pytest.mark.slow
def test_results_agree_with_the_runs(demo: Study) -> None:
    results = json.loads((demo.folder / "results.json").read_text())
    assert [budget["epochs"] for budget in results["budgets"]] == [1, 2]
    assert {(run["join"], run["epochs"], run["seed"]) for run in results["runs"]} == {
        (join, epochs, 0) for join in ("basic", "LaPE") for epochs in (1, 2)
    }
    for budget in results["budgets"]:
        final = {}
        for join in ("basic", "LaPE"):
            chosen = [run for run in results["runs"] if (run["join"], run["epochs"]) == (join, budget["epochs"])]
            final[join] = statistics.fmean(run["accuracy"] for run in chosen)
            assert budget["accuracy"][join] == {"mean": final[join], "std": None, "n": 1}
            for run in chosen:
                assert len(run["history"]) == budget["epochs"]
                assert run["accuracy"] == run["history"][-1]["test_acc1"]
                assert run["best"] == max(entry["test_acc1"] for entry in run["history"])
        assert budget["gap"]["mean"] == pytest.approx(final["LaPE"] - final["basic"])
    assert results["versions"]["torch"] == torch.__version__
    assert results["seconds"] > 0
    assert results["recipe"]["epochs"] == 1
    assert "join_type" not in results["recipe"]


@pytest.mark.slow
def test_the_report_says_what_the_results_say(demo: Study) -> None:
    report = (demo.folder / "report.md").read_text()
    for budget in demo.results["budgets"]:
        for join in ("basic", "LaPE"):
            assert f" {budget['accuracy'][join]['mean']:.1f} |" in report
    for sentence in demo.results["sentences"]:
        assert sentence in report
    for name in set(DEMO_FILES) - {"report.md"}:
        assert name in report


@pytest.mark.slow
def test_processes_side_by_side_find_the_same(demo: Study, tmp_path: Path) -> None:
    other = run_demo(DemoOptions(output_dir=str(tmp_path), seeds=1, epochs=1, long_seeds=0, workers=2))
    alone = [run for run in demo.results["runs"] if run["epochs"] == 1]
    timeless = [{key: value for key, value in run.items() if key != "seconds"} for run in alone]
    for run, expected in zip(other.results["runs"], timeless, strict=True):
        run = json.loads(json.dumps({key: value for key, value in run.items() if key != "seconds"}))
        assert [e.pop("seconds", None) for e in run["history"]] == [e.pop("seconds", None) for e in expected["history"]]
        assert run == json.loads(json.dumps(expected))


@pytest.mark.slow
def test_the_number_of_threads_is_given_back(demo: Study) -> None:
    assert torch.get_num_threads() == THREADS


THREADS = torch.get_num_threads()


# --- words ------------------------------------------------------------------------------------------------------------


def runs(epochs: int, basic: list[float], lape: list[float]) -> list[Run]:
    def made(join: str, seed: int, accuracy: float) -> Run:
        return Run("vit", "learnable", join, epochs, seed, accuracy, accuracy + 1, 0.5, 1.0, [], "digits")

    return [made("basic", s, a) for s, a in enumerate(basic)] + [made("LaPE", s, a) for s, a in enumerate(lape)]


def budgets_of(trained: list[Run]) -> list[dict[str, Any]]:
    return by_budget(summarise(trained, "basic"), "basic", "LaPE")


def words_on(trained: list[Run]) -> list[str]:
    return sentences_on_budgets(budgets_of(trained), "basic", "LaPE")


def test_mean_and_sample_deviation_are_paired_by_seed() -> None:
    budget = budgets_of(runs(30, [60.0, 70.0, 80.0], [90.0, 91.0, 95.0]))[0]
    assert budget["accuracy"]["basic"] == {"mean": 70.0, "std": 10.0, "n": 3}
    assert budget["gap"]["each"] == [30.0, 21.0, 15.0]
    assert budget["gap"]["std"] == pytest.approx(statistics.stdev([30, 21, 15]))
    assert mean_std([1.0])["std"] is None


@pytest.mark.parametrize(
    ("basic", "lape", "words"),
    [
        ([60, 62, 64], [90, 91, 95], ["LaPE is ahead of basic by 30.0 points", "3 of 3"]),
        ([90, 91, 95], [60, 62, 64], ["LaPE is behind basic by 30.0 points", "0 of 3"]),
        ([80, 70, 60], [70, 72, 71], ["ahead of basic by 1.0", "no more than the seeds differ"]),
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
    assert f"From 30 to 90 epochs the difference {word}: +30.0 against" in said[-1]
    assert "seed 0 in both" in said[-1]


def test_table() -> None:
    table = rows_of_budgets(budgets_of(runs(30, [60.0, 70.0], [90.0, 91.0])), "basic", "LaPE")
    assert table[1] == ["30", "2", "65.0 ± 7.1", "90.5 ± 0.7", "+25.5 ± 6.4"]
    assert markdown_table(table).splitlines()[1] == "|---|---|---|---|---|"


# --- what is trained --------------------------------------------------------------------------------------------------


def test_two_seeds_and_one_long_run_are_needed_and_come_first() -> None:
    planned = demo_stages(Recipe.from_yaml("digits", epochs=30), 4, 90, 2)
    assert [(s.recipes[0].epochs, s.recipes[0].seed, s.needed) for s in planned] == [
        (30, 0, True),
        (90, 0, True),
        (30, 1, True),
        (30, 2, False),
        (30, 3, False),
        (90, 1, False),
    ]
    for stage in planned:
        basic, lape = stage.recipes
        assert (basic.join_type, lape.join_type) == ("basic", "LaPE")
        assert basic.replace(join_type="LaPE") == lape


@pytest.mark.parametrize(("limit", "taken"), [(None, 6), (0.0, 3), (31.0, 5), (10**6, 6)])
def test_a_slow_machine_leaves_seeds_out(limit: float | None, taken: int) -> None:
    agenda = Agenda(demo_stages(Recipe.from_yaml("digits", epochs=30), 4, 90, 2), workers=2, time_limit=limit)
    count = 0
    while recipes := agenda.take():
        count += 1
        for recipe in recipes:  # one second an epoch; no time passes in this test
            run = runs(recipe.epochs, [50.0], [])[0]
            agenda.finished(replace(run, seconds=float(recipe.epochs)))
    assert count == taken
    assert len(agenda.left_out) == 6 - taken
    assert agenda.epochs == sum(2 * e for e in (30, 90, 30, 30, 30, 90)[:taken])
    assert bool(late(agenda)) == (taken < 6)


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
    assert claim(tmp_path) == tmp_path


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
