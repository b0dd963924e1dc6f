"""A run that goes on from its files ends with the same bits: kills, torn files, several processes, other step sizes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from processes import launch, main_py, run_together
from training import (
    KWARGS,
    STATE,
    Killed,
    Stop,
    kill_at,
    log_without_times,
    quiet,
    read,
    run_until,
    same,
    stop_after,
    tiny,
)

from lape.cli.app import USER_ERROR, app, run
from lape.errors import CheckpointError, LapeError
from lape.train.logs import LOG
from lape.train.loop import train
from lape.train.state import BEST, CHECKPOINT, LOCK, PREVIOUS, checkpoint_to_resume

ROOT = Path(__file__).parents[2]
FULL = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "drop": 0.1, "epochs": 2, "warmup_epochs": 1, "batch_size": 128}


def assert_same_run(found: Path, wanted: Path) -> None:
    ours, theirs = read(found / CHECKPOINT), read(wanted / CHECKPOINT)
    for key in STATE:
        assert same(ours[key], theirs[key]), key
    assert same(read(found / BEST)["model"], read(wanted / BEST)["model"])
    assert log_without_times(found) == log_without_times(wanted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny(**FULL, output_dir=str(folder)), say=quiet)
    return folder


@pytest.mark.slow
def test_killed_within_an_epoch_and_resumed(uninterrupted, tmp_path):
    """With processes that load; without, see the torn file below."""
    recipe = tiny(**FULL, output_dir=str(tmp_path), num_workers=2, save_steps=4, resume="auto", log_every=1)
    for epoch, step in ((0, 6), (1, 2), (1, 9)):  # of 11 steps
        with pytest.raises(Killed):
            train(recipe, say=kill_at(epoch, step))
    content = read(tmp_path / CHECKPOINT)
    assert (content["epoch"], content["step"]) == (0, 8)
    assert content["loss_sum"] > 0
    train(recipe, say=quiet)
    assert_same_run(tmp_path, uninterrupted)


def test_minutes_save_within_an_epoch(tmp_path):
    recipe = tiny(epochs=1, output_dir=str(tmp_path), save_minutes=1e-9, log_every=1)
    with pytest.raises(Killed):
        train(recipe, say=_stop_at_third)
    assert read(tmp_path / CHECKPOINT)["step"] == 2


def _stop_at_third(text: str) -> None:
    if text.startswith("Epoch: [0]  [2/5]"):
        raise Killed


@pytest.mark.slow
def test_a_torn_newest_file_loses_four_steps_and_not_the_run(uninterrupted, tmp_path):
    recipe = tiny(**FULL, output_dir=str(tmp_path), save_steps=4, resume="auto", log_every=1)
    with pytest.raises(Killed):
        train(recipe, say=kill_at(0, 9))
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[:-1000])
    assert read(tmp_path / PREVIOUS)["step"] == 4
    said: list[str] = []
    train(recipe, say=said.append)
    assert any(CHECKPOINT in text and "skipped" in text for text in said)
    assert any(PREVIOUS in text and "after epoch -1 and step 4 of the next" in text for text in said)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("what", ["torn", "foreign", "pickle"])
def test_auto_without_a_whole_file_names_it_and_touches_nothing(tmp_path, capsys, what):
    file = tmp_path / CHECKPOINT
    if what == "torn":
        file.write_bytes(b"PK\x03\x04 half a file")
    elif what == "foreign":
        torch.save({"model": {"head.weight": torch.zeros(1)}}, file)
    else:
        import pickle

        file.write_bytes(pickle.dumps(os.system))
    before = file.read_bytes()
    code = run(app, ["train", "--output-dir", str(tmp_path), "--resume", "auto", "--device", "cpu"])
    shown = capsys.readouterr()
    assert code == USER_ERROR
    assert shown.err.count("\n") == 1
    assert CHECKPOINT in shown.err
    assert "no whole checkpoint" in shown.err
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize("furthest", [CHECKPOINT, PREVIOUS, BEST])
def test_auto_takes_the_file_that_is_furthest_by_epoch_and_step(tmp_path, furthest):
    optimizer = {"optimizer": {"state": {}, "param_groups": []}, "optimizer_names": []}
    for name in (CHECKPOINT, PREVIOUS, BEST):
        place = {"epoch": 1, "step": 3 if name == furthest else 2}
        torch.save({"model": {"head.weight": torch.zeros(1)}, **optimizer, **place}, tmp_path / name)
    checkpoint = checkpoint_to_resume(tiny(output_dir=str(tmp_path), resume="auto"), quiet)
    assert checkpoint is not None
    assert checkpoint.path.name == furthest


def test_auto_in_a_finished_run_completes_its_files_and_ends(tmp_path):
    recipe = tiny(epochs=2, output_dir=str(tmp_path), resume="auto")
    train(recipe, say=quiet)
    wanted, log = read(tmp_path / CHECKPOINT), (tmp_path / LOG).read_text()
    # killed after the last best_checkpoint.pth, before checkpoint.pth and log.txt
    shutil.copy(tmp_path / CHECKPOINT, tmp_path / BEST)
    shutil.move(tmp_path / PREVIOUS, tmp_path / CHECKPOINT)
    (tmp_path / LOG).write_text(log.splitlines()[0] + "\n")
    said: list[str] = []
    result = train(recipe, say=said.append)
    assert "nothing is left to train" in said[-1]
    assert len(result.history) == 2
    assert same(read(tmp_path / CHECKPOINT)["model"], wanted["model"])
    assert (tmp_path / LOG).read_text() == log


def test_steps_of_another_size_within_an_epoch_are_refused(tmp_path):
    recipe = tiny(output_dir=str(tmp_path), save_steps=1, log_every=1)
    with pytest.raises(Killed):
        train(recipe, say=_stop_at_third)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(LapeError, match="add --global-batch 256"):
        train(recipe.replace(resume="auto", batch_size=128), say=quiet)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    train(recipe.replace(resume="auto", batch_size=128, global_batch=256), say=quiet)
    assert read(tmp_path / CHECKPOINT)["epoch"] == 0


@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_schedule_follows_the_formula_across_a_resume(tmp_path, late):
    settings = {"epochs": 6, "warmup_epochs": 2, "lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6, "batch_size": 512}
    settings |= {"output_dir": str(tmp_path), "resume": "auto", "model_ema": False}
    run_until(3, tiny(**settings, as_original=("schedule",) if late else ()))
    recipe = tiny(**settings)  # no flag: as the run began
    with pytest.raises(Stop):
        train(recipe, on_epoch=stop_after(5), say=quiet)
    train(recipe, say=quiet)
    lines = log_without_times(tmp_path)
    assert len(lines) == 6
    for line in lines:
        epoch = max(line["epoch"] - late, 0)
        cosine = 1e-5 + (1e-3 - 1e-5) * (1 + torch.cos(torch.tensor(torch.pi * epoch / 6, dtype=torch.float64))) / 2
        expected = 1e-6 + epoch * (1e-3 - 1e-6) / 2 if epoch < 2 else float(cosine)
        assert line["train_lr"] == pytest.approx(expected, rel=1e-9), epoch


def test_curves_go_on_without_a_repeated_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny(epochs=3, batch_size=512, output_dir=str(tmp_path), resume="auto", save_steps=1, log_every=1)
    run_until(1, recipe)
    with pytest.raises(Stop):
        train(recipe, on_epoch=stop_after(2), say=quiet)
    result = train(recipe, say=quiet)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(point.step, point.value) for point in events.Scalars("test/acc1")]
    assert points == [(line["epoch"], pytest.approx(line["test_acc1"])) for line in result.history]
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0].split(",")[:2] == ["train_lr", "train_loss"]
    assert [row.split(",")[rows[0].split(",").index("epoch")] for row in rows[1:]] == ["0", "1", "2"]
    run_file = json.loads((tmp_path / "run.json").read_text())
    assert [start["epoch"] for start in run_file["starts"]] == [0, 1, 2]
    assert run_file["recipe"]["batch_size"] == 512
    assert run_file["starts"][0]["versions"]["torch"] == torch.__version__


# ------------------------------------------------------------------------------------------------ real processes


def flags(out: Path, *more: str) -> list[str]:
    words = "--model vit_tiny_patch16_224 --join-type LaPE --input-size 16 --batch-size 64 --epochs 2 --device cpu"
    words += " --drop 0.1 --warmup-epochs 1 --aa none --no-repeated-aug --save-steps 3 --resume auto --log-every 1"
    return [*words.split(), "--model-kwargs", json.dumps(KWARGS), "--output-dir", str(out), *more]


# Large enough for DistributedDataParallel to add up in several places, and in another order with three than with two.
WIDE = {"embed_dim": 192, "depth": 2, "num_heads": 3, "patch_size": 4}
THREE = ["--model-kwargs", json.dumps(WIDE), "--batch-size", "60", "--global-batch", "180", "--epochs", "1"]
THREE += ["--num-workers", "0"]


@pytest.mark.distributed
def test_three_processes_killed_within_an_epoch_and_resumed(tmp_path):
    run_together(3, main_py, *flags(tmp_path / "whole", *THREE))
    processes = launch(3, main_py, *flags(tmp_path / "out", *THREE))
    processes[0].wait_for("Epoch: [0]  [4/7]")
    for process in processes:
        process.signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert read(tmp_path / "out" / CHECKPOINT)["step"] in (3, 6)
    run_together(3, main_py, *flags(tmp_path / "out", *THREE))
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def launched_by_torchrun(out: Path, *more: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "main.py"]
    return subprocess.Popen(
        [sys.executable, *launcher, *flags(out, *more)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen, text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.distributed
def test_sigterm_to_the_launcher_saves_within_the_epoch(tmp_path):
    """As a scheduler sends it. torchrun hands it on to the loader's processes, too, which must not die first."""
    process = launched_by_torchrun(tmp_path, "--num-workers", "2")
    wait_for(process, "Epoch: [0]")
    os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=180)
    assert "SIGTERM: saved after step" in output, errors
    assert read(tmp_path / CHECKPOINT)["step"] > 0


@pytest.mark.distributed
def test_a_dead_process_ends_the_run_with_a_reason_and_keeps_the_checkpoint(tmp_path):
    first, second = launch(2, main_py, *flags(tmp_path, "--num-workers", "0"))
    first.wait_for("Epoch: [0]  [ 4/11]")
    second.signal(signal.SIGKILL)
    _, errors = first.communicate()
    assert first.returncode == USER_ERROR, errors
    assert "error: another process of this run has ended or did not answer" in errors
    second.communicate()
    assert read(tmp_path / CHECKPOINT)["step"] == 3


def test_processes_that_see_different_files_are_refused(tmp_path):
    from lape.files.read import Checkpoint
    from lape.train.distributed import World
    from lape.train.state import agree

    agree(None, World(0, 1, torch.device("cpu")))
    torch.manual_seed(0)
    checkpoint = Checkpoint(tmp_path / "c.pth", "pth", {}, raw={"epoch": 3, "step": 2})
    agree(checkpoint, World(0, 1, torch.device("cpu")))
    large = Checkpoint(tmp_path / "c.pth", "pth", {}, raw={"epoch": 2**53, "step": 2**62 + 1})
    for others, wrong in (
        ([], ""),
        ([f"epoch {2**53}, step {2**62 + 1}"], ""),
        (["nothing"], "process 1 from nothing"),
        ([f"epoch {2**53}, step {2**62}"], "step"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lape.train.state.all_of", lambda mine, others=others: [mine, *others])
            with pytest.raises(LapeError, match=wrong) if wrong else nullcontext():
                agree(large, World(0, 3, torch.device("cpu")))


def test_a_file_without_training_state_is_refused(tmp_path):
    torch.save({"model": {"head.weight": torch.zeros(10, 16)}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no optimizer and no epoch: start from it with --finetune"):
        train(tiny(resume=str(tmp_path / "w.pth")), say=quiet)


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    holder += "; time.sleep(60)"
    train(tiny(output_dir=str(tmp_path)), say=quiet)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / LOCK)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(LapeError, match="another process is training"):
            train(tiny(epochs=2, output_dir=str(tmp_path), resume="auto"), say=quiet)
        other.kill()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    train(tiny(epochs=2, output_dir=str(tmp_path), resume="auto"), say=quiet)
