"""What can go wrong while a run runs: each is one line with the fix, exit code 2, and earlier files as they were."""

import itertools
import json
import re
import resource
import shutil
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from processes import Process, lape, launch
from training import KWARGS, quiet, read, run_until, tiny

from lape.cli.app import USER_ERROR, app, run
from lape.errors import DataError, LapeError
from lape.train.logs import LOG
from lape.train.loop import _count_steps, train
from lape.train.state import BEST, CHECKPOINT, PREVIOUS

FLAGS = "--model vit_tiny_patch16_224 --join-type LaPE --input-size 16 --batch-size 256 --device cpu --aa none"
FLAGS += " --reprob 0 --color-jitter 0"


def command(*more: str) -> list[str]:
    return ["train", *FLAGS.split(), "--model-kwargs", json.dumps(KWARGS), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CHECKPOINT, BEST, LOG) if (folder / name).exists()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """One epoch of a longer run."""
    folder = tmp_path_factory.mktemp("begun")
    run_until(1, tiny(epochs=3, output_dir=str(folder)))
    return folder


@pytest.fixture
def run_folder(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        MemoryError(),
        "allocate",
    ],
    ids=["cuda", "python", "cpu"],
)
def test_out_of_memory_names_the_knobs(run_folder, monkeypatch, capsys, error):
    def fail(*_args):
        if error == "allocate":
            return torch.empty(2**58)
        raise error

    monkeypatch.setattr("lape.train.loop.training_loss", fail)
    before = contents(run_folder)
    code = run(app, command("--output-dir", str(run_folder), "--resume", "auto", "--epochs", "3"))
    shown = capsys.readouterr().err
    assert code == USER_ERROR
    assert shown.count("\n") == 1
    knobs = ("--batch-size (now 256) with --global-batch", "--grad-checkpointing", "--model-ema-force-cpu")
    assert all(knob in shown for knob in knobs), shown
    assert contents(run_folder) == before


def test_other_errors_are_not_called_memory(run_folder, monkeypatch):
    def fail(*_args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("lape.train.loop.training_loss", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tiny(epochs=3, output_dir=str(run_folder), resume="auto"), say=quiet)


# ------------------------------------------------------------------------------------------------ disk


def lape_in_little_room(room: int, *tokens: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    lape(*tokens)


@pytest.mark.slow
def test_a_full_disk_keeps_the_earlier_files(run_folder):
    """A limit on the size of a file stands for the end of the disk: the write fails in the middle of a checkpoint."""
    before = contents(run_folder)
    flags = command("--output-dir", str(run_folder), "--resume", "auto", "--epochs", "3", "--num-workers", "0")
    done = Process(lape_in_little_room, len(before[CHECKPOINT]) // 2, *flags)
    _, errors = done.communicate()
    assert done.returncode == USER_ERROR, errors
    assert errors.count("\n") == 1, errors
    assert "cannot write" in errors
    assert "what was there before is untouched" in errors
    assert contents(run_folder) == before
    assert not list(run_folder.glob(".*.tmp"))
    assert not (run_folder / PREVIOUS).exists() or torch.load(run_folder / PREVIOUS, weights_only=True)


# ------------------------------------------------------------------------------------------------ images


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes of 12 training and 2 validation images."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return tmp_path / "data"


SMALL = {"batch_size": 4, "repeated_aug": False, "epochs": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_stops_the_run_and_is_named(images, tmp_path, workers, capsys):
    bad = images / "train" / "dog" / "07.png"
    bad.write_bytes(bad.read_bytes()[:100])
    more = ["--data-path", str(images), "--batch-size", "4", "--output-dir", str(tmp_path / "out")]
    code = run(app, command(*more, "--num-workers", str(workers), "--no-repeated-aug"))
    shown = capsys.readouterr().err
    assert code == USER_ERROR
    assert shown.count("\n") == 1
    assert str(bad) in shown
    assert "--skip-corrupt" in shown


def test_images_that_several_processes_left_out_are_added_up():
    """A report is a mean over the processes: 3 images of one of two are 1.5."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    state = SimpleNamespace(skipped_images=0, next_step=0, loss_sum=0.0, optimizer=optimizer)
    run = SimpleNamespace(state=state, world=SimpleNamespace(size=2))
    report = SimpleNamespace(read=lambda: [2.0, 1.0, 0.0, 1.5, 0.0])
    progress = SimpleNamespace(report=lambda **_numbers: None)
    assert _count_steps(run, deque([report, report]), True, progress, "") == (False, False)
    assert (state.skipped_images, state.next_step, state.loss_sum) == (6, 2, 4.0)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_corrupt_images_are_skipped_and_counted_when_asked(images, workers, capsys):
    for name in ("07.png", "08.png"):
        (images / "train" / "dog" / name).write_bytes(b"no image")
    said: list[str] = []
    recipe = tiny(**SMALL, data_path=str(images), skip_corrupt=True, num_workers=workers)
    result = train(recipe, say=said.append)
    # 07 is replaced by 08, which is replaced by 09
    assert [line["skipped_images"] for line in result.history] == [3, 3]
    assert said.count("Left out in this epoch: 3 unreadable image(s)") == 2
    shown = capsys.readouterr().err
    assert "left out: " in shown
    assert "07.png" in shown
    assert "08.png" in shown


def test_a_corrupt_validation_image_is_never_skipped(images):
    (images / "val" / "dog" / "00.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"val/dog/00.png"):
        train(tiny(**SMALL, data_path=str(images), skip_corrupt=True), say=quiet)


def test_a_corrupt_validation_image_does_not_cost_the_epoch(images, tmp_path):
    """The steps are saved before the run ends; with the image mended it goes on to the very same result."""
    bad = images / "val" / "dog" / "00.png"
    whole = bad.read_bytes()
    recipe = tiny(**SMALL, data_path=str(images), output_dir=str(tmp_path / "out"))
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"val/dog/00.png"):
        train(recipe, say=quiet)
    bad.write_bytes(whole)
    resumed = train(recipe.replace(resume="auto"), say=quiet)
    never_stopped = train(tiny(**SMALL, data_path=str(images)), say=quiet)
    assert len(resumed.history) == 2
    for (name, ours), theirs in zip(
        resumed.model.state_dict().items(), never_stopped.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.distributed
def test_nor_does_it_where_processes_share_the_evaluation(images, tmp_path):
    """The image is in the share of the second process; the first has the checkpoint to write."""
    bad = images / "val" / "cat" / "01.png"
    bad.write_bytes(bad.read_bytes()[:60])
    out = tmp_path / "out"
    flags = ["--data-path", str(images), "--batch-size", "4", "--no-repeated-aug", "--output-dir", str(out)]
    both = launch(2, lape, *command(*flags, "--dist-eval", "--dist-timeout", "20"))
    errors = "".join(process.communicate()[1] for process in both)
    assert all(process.returncode for process in both)
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert any(str(bad) in line and "[rank" not in line for line in said), errors
    saved = read(out / CHECKPOINT)
    assert (saved["epoch"], saved["step"]) == (-1, 3), "all three steps of the first epoch"
    assert saved["history"] == []


def test_a_data_set_of_corrupt_images_is_no_accident(images):
    for path in (images / "train").glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="20 images in a row"):
        train(tiny(**SMALL, data_path=str(images), skip_corrupt=True), say=quiet)


# ------------------------------------------------------------------------------------------------ services


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_service_names_the_pip_line(tmp_path, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(LapeError, match=f"pip install {name}"):
        train(tiny(log_to=(name,), output_dir=str(tmp_path / "out")), say=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_one_point_an_epoch_under_one_name(tmp_path, name, monkeypatch):
    """Against a stand-in that records calls: neither service is installed here."""
    pytest.importorskip("torch.utils.tensorboard")  # imported before importing is replaced
    calls: list[tuple] = []

    class Service:
        init = staticmethod(lambda **settings: calls.append(("init", settings)))
        log = staticmethod(lambda values, step: calls.append(("log", step, values["test/acc1"])))
        finish = staticmethod(lambda: calls.append(("finish",)))

    monkeypatch.setattr("lape.train.logs.importlib.util.find_spec", lambda _name: True)
    monkeypatch.setattr("lape.train.logs.importlib.import_module", lambda _name: Service)
    recipe = tiny(epochs=2, batch_size=512, output_dir=str(tmp_path), log_to=(name,), resume="auto")
    run_until(1, recipe)
    train(recipe, say=quiet)
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    assert [call[1] for call in calls if call[0] == "log"] == [0, 1]
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first["name"] == second["name"]
    assert first["resume"] == "allow"


def test_a_loader_that_starves_the_model_is_noticed(monkeypatch):
    from training import ALONE

    from lape.data.loaders import BatchPlan
    from lape.train.progress import Progress

    clock = itertools.count(step=4.0)
    monkeypatch.setattr("lape.train.progress.time.perf_counter", lambda: next(clock))
    said: list[str] = []
    progress = Progress("Epoch: [0]", 0, 3, BatchPlan(8, 1, 8), ALONE, 1, said.append)
    for _ in progress.over([1, 2, 3]):  # four seconds a look at the clock: one for the image, two for the step
        progress.report(loss=1.0, lr=0.1, grad_norm=2.0)
    assert progress.wait == 12.0
    assert "--num-workers" in said[-1]
    assert "img/s" in said[0]
    assert "MiB" in said[0]
    assert set(progress.timing()) == {"seconds", "data_seconds", "images_per_second", "peak_memory_mib"}


@pytest.mark.parametrize(("width", "shown", "left_out"), [(60, "loss: 2.3457", "img/s"), (110, "mean: 2.3457", "mem:")])
def test_the_bar_is_one_line_with_a_whole_time(width, shown, left_out, monkeypatch):
    import rich.console
    from training import ALONE

    from lape.data.loaders import BatchPlan
    from lape.train.progress import Progress, _open_bar

    console = rich.console.Console(width=width)
    monkeypatch.setattr(rich, "_console", console)
    progress = Progress("Epoch: [299]", 0, 1251, BatchPlan(1024, 1, 1024), ALONE, 10, print)
    progress._bar = bar = _open_bar(progress.title, 0, 1251)
    progress._start -= 20_000.0
    progress.report(loss=2.345678, lr=5e-4, grad_norm=1.0)
    bar.stop()
    with console.capture() as capture:
        console.print(bar.get_renderable())
    (line,) = capture.get().splitlines()
    assert shown in line
    assert left_out not in line
    assert re.search(r" 1/1251 (\d+:\d\d:\d\d|-:--:--) ", line.replace("   1/", " 1/"))
