"""A run ends, with one line, and no process is left: lost loader processes, launchers, full disks, gone parents."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import LIMIT, SERVER, Process, all_end, lape, session_of
from training import KWARGS, quiet, read, tiny

from lape.cli.app import USER_ERROR, app, run
from lape.cli.rows import row_writer
from lape.data.loaders import Batch, Samples
from lape.errors import LapeError
from lape.files.atomic import write_atomically
from lape.train.distributed import join_world
from lape.train.loop import train
from lape.train.state import CHECKPOINT

ROOT = Path(__file__).parents[2]
FLAGS = "--model vit_tiny_patch16_224 --input-size 16 --device cpu --batch-size 64 --no-repeated-aug --aa none"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def command(*more: str) -> list[str]:
    return ["train", *FLAGS.split(), "--model-kwargs", json.dumps(KWARGS), "--num-workers", "2", *more]


def begin(*arguments: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=settings, start_new_session=True, **pipes)


# ------------------------------------------------------------------------------------------------ loader processes


class Unsendable:
    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def no_room(_samples, _keys):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


FAULTS = {
    "killed": lambda _samples, _keys: os.kill(os.getpid(), signal.SIGKILL),
    "no memory for the bus": lambda _samples, _keys: os.kill(os.getpid(), signal.SIGBUS),
    "ended": lambda _samples, _keys: os._exit(3),
    "no shared memory": no_room,
    "a batch that cannot be sent": lambda _samples, _keys: Batch(Unsendable(), Unsendable()),
    "no memory": lambda _samples, _keys: [bytearray(2**60)],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("trained")
    train(tiny(output_dir=str(out)), say=quiet)
    return str(out / CHECKPOINT)


@pytest.mark.matrix
@LINUX
@pytest.mark.parametrize("what", ["training", "its evaluation", "an evaluation", "reading once"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_loader_process_is_one_line_and_the_others_end(checkpoint, monkeypatch, capsys, fault, what):
    whole = Samples.__getitems__

    def batch(samples, keys):
        fails = (samples.stream is None) == (what != "training") and multiprocessing.parent_process() is not None
        return FAULTS[fault](samples, keys) if fails else whole(samples, keys)

    monkeypatch.setattr(Samples, "__getitems__", batch)
    monkeypatch.setattr("lape.data.loaders.processors", lambda: 2)
    monkeypatch.setattr("lape.data.sets.CACHE_BYTES", 0)
    evaluation = ["eval", checkpoint, "--device", "cpu", "--num-workers", "2"]
    once = ["--data-on-device"] if what == "reading once" else []
    capsys.readouterr()
    code = run(app, evaluation if what == "an evaluation" else command("--epochs", "2", "--batch-size", "512", *once))
    shown = capsys.readouterr().err
    assert code == USER_ERROR, shown
    assert shown.count("\n") == 1, shown
    assert "Traceback" not in shown
    assert ("out of memory" if fault == "no memory" else "--num-workers") in shown
    assert not multiprocessing.active_children()


ENDS = {"ValueError('a bug')": 1, "KeyboardInterrupt": -signal.SIGINT, "SystemExit(7)": 7}
DRIVER = """
import os, sys
from lape.data.loaders import train_loader
from lape.data.open import load_data
from lape.recipe import Recipe

for error in sys.argv[1:]:  # each in a fork, which ends as an interpreter does, without importing all this again
    sys.stdout.flush()
    if pid := os.fork():
        print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        continue
    os.setsid()
    recipe = Recipe(num_workers=2, batch_size=8, input_size=16, repeated_aug=False)
    batches = iter(train_loader(load_data(recipe).train, recipe, epoch=0))
    next(batches)
    kept = batches.gi_frame.f_locals["batches"]  # beyond the reach of the garbage collector
    kept.itself = kept
    raise eval(error)
"""


@LINUX
@pytest.mark.slow
def test_python_ends_though_loader_processes_run_and_an_error_keeps_them():
    process = begin("-c", DRIVER, *ENDS)
    output, errors = process.communicate(timeout=LIMIT)
    ends = [[int(word) for word in line.split()] for line in output.splitlines()]
    assert [code for _, code in ends] == list(ENDS.values()), errors
    assert all(all_end(pid) for pid, _ in ends)


# ------------------------------------------------------------------------------------------------ parents that are gone


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    assert process.stdout is not None
    while text not in (line := process.stdout.readline()):
        assert line or process.poll() is None, process.stderr.read() if process.stderr else ""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_whatever_ends_a_training_its_loader_processes_end(tmp_path, number):
    process = Process(lape, *command("--epochs", "500", "--output-dir", str(tmp_path), "--log-every", "1"))
    process.wait_for("Epoch: [0]")
    process.signal(number) if number == signal.SIGKILL else os.killpg(process.pid, number)  # as a terminal does
    output, errors = process.communicate()
    assert all_end(process.pid)
    if number != signal.SIGKILL:  # of which a loader process may say that its pipe is gone
        assert "Traceback" not in errors
        assert process.returncode == 128 + number
        assert f"in {tmp_path / CHECKPOINT}; to go on: the same command with --resume auto" in output
        assert read(tmp_path / CHECKPOINT)["step"] + read(tmp_path / CHECKPOINT)["epoch"] > -1


def compare_with_forks(*tokens: str) -> None:
    """With workers that need not import all there is again: this process has computed nothing yet."""
    multiprocessing.get_context = lambda _method: SERVER.get_context("fork")  # type: ignore[assignment]
    lape(*tokens)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("when", ["workers start", "workers train"])
def test_whatever_ends_a_comparison_its_workers_end(tmp_path, number, when):
    model = ["--models", "vit_tiny_patch16_224", "--model-kwargs", json.dumps(KWARGS), "--input-size", "16"]
    tokens = ["compare", "--output-dir", str(tmp_path), "--epochs", "500", "--device", "cpu", *model]
    process = Process(lape if when == "workers start" else compare_with_forks, *tokens)
    process.wait_until(
        lambda: (
            len(session_of(process.pid)) >= 3
            if when == "workers start"
            else len(list(tmp_path.glob(f"cells/*/training/{CHECKPOINT}"))) >= 2
        )
    )
    process.signal(number)
    assert all_end(process.pid)
    output, errors = process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), errors
    if number != signal.SIGKILL:  # else a child that starts may miss its parent
        assert "Traceback" not in errors
        assert f": 0 of 6 trainings are done in {tmp_path}; to go on" in output
        assert output.count({signal.SIGINT: "Ctrl-C"}.get(number, number.name)) == 1


@LINUX
@pytest.mark.distributed
def test_processes_whose_launcher_is_killed_save_and_end(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lape"]
    process = begin(*launch, *command("--epochs", "500", "--output-dir", str(tmp_path), "--log-every", "1"))
    wait_for_line(process, "Epoch: [0]")
    process.kill()
    assert all_end(process.pid)
    process.communicate(timeout=LIMIT)
    assert read(tmp_path / CHECKPOINT)["epoch"] < 499


# ------------------------------------------------------------------------------------------------ launchers


BUSY = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "busy"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR=''"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "1"}, "RANK=1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        (BUSY | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (BUSY | {"MASTER_PORT": "65536"}, "MASTER_PORT='65536'"),
        (BUSY | {"MASTER_ADDR": "host.invalid", "MASTER_PORT": "29511"}, "MASTER_ADDR='host.invalid'"),
        (BUSY | {"MASTER_ADDR": "a..b", "MASTER_PORT": "29511"}, "MASTER_ADDR='a..b'"),
        (BUSY, "is in use"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "SLURM started 4 tasks"),
    ],
)
def test_a_launch_that_cannot_work_is_one_line(monkeypatch, capsys, variables, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lape.cli.app.time.sleep", quiet)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(server.getsockname()[1]) if value == "busy" else value)
        assert run(app, command()) == USER_ERROR
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1, shown
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("value", ["two", "", "-1", "1.5"])
def test_a_launchers_variable_is_no_concern_of_what_meets_no_other_process(monkeypatch, value):
    """The flags are made when the command line is imported, before anything could catch an error."""
    from lape.cli.original import LauncherFlags

    monkeypatch.setenv("WORLD_SIZE", value)
    LauncherFlags()
    with pytest.raises(LapeError, match="world_size=4"):
        LauncherFlags(world_size=4)


def test_one_task_of_slurm_is_a_process_like_any_other(monkeypatch):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    with join_world("cpu") as world:
        assert world.size == 1


@LINUX
@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_waits_for_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    process = Process(join, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    process.wait_for("ready")
    process.wait_until(lambda: not catches_ctrl_c(process.pid))  # torch waits, in C++
    process.signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT


def join() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("ready", flush=True)
    with join_world("cpu"):
        pass


def catches_ctrl_c(pid: int) -> bool:
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return mask is not None and bool(int(mask[1], 16) >> (signal.SIGINT - 1) & 1)


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", str(2**64)], "must be less than"),
        (["--cutmix-minmax", "0.9", "0.1"], "least < most"),
        (["--cutmix-minmax", "0.5", "0.51"], "a pixel of 16 apart"),
        (["--model", "vit_tiny_patch16_224.nope"], "vit_tiny_patch16_224.augreg_in21k"),
        (["--resume", "https://lape.invalid/x.pth"], "cannot be downloaded"),
        (["--resume", "/dev/zero"], "a pipe or a device"),
        (["--finetune", "PIPE"], "a pipe or a device"),
        (["--recipe", "PIPE"], "a pipe or a device"),
        (["--recipe", "/dev/zero"], "a pipe or a device"),
        (["--recipe", "NUL"], "NUL character"),
        (["--recipe", "DEEP"], "deep nesting"),
        (["--recipe", "REFERS"], "without *references"),
        (["--model-kwargs", '{"a":' * 20000], "is not JSON"),
        (["--opt", "fusedadam"], "cannot run here"),
        (["--opt", "adahessian"], "cannot run here"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_value_that_cannot_be_is_one_line_before_data_is_read(tmp_path, monkeypatch, capsys, flags, said):
    if "--opt" in flags and flags[1] == "fusedadam" and torch.cuda.is_available():
        pytest.skip("it may run on CUDA")
    texts = {"NUL": 'data_path: "a\\0b"', "DEEP": "lr: " + "[" * 100_000, "REFERS": "lr: &a [1]\nmin_lr: *a"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / "PIPE")
    monkeypatch.chdir(tmp_path)
    if flags[0] not in ("--model", "--finetune"):  # a model is built for the classes of the data
        monkeypatch.setattr("lape.train.loop.load_data", None)
    assert run(app, command(*flags)) == USER_ERROR
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("resume", ["auto", CHECKPOINT])
def test_another_optimizer_than_the_files_is_refused_by_name(tmp_path, resume):
    recipe = tiny(opt="momentum", output_dir=str(tmp_path))
    train(recipe, say=quiet)
    resume = resume if resume == "auto" else str(tmp_path / resume)
    with pytest.raises(LapeError, match=r"opt='momentum'.*opt='adamw'.*--opt momentum"):
        train(tiny(epochs=2, output_dir=str(tmp_path), resume=resume), say=quiet)
    train(recipe.replace(opt="Momentum", epochs=2, resume=resume), say=quiet)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(tiny(output_dir=str(folder)), say=quiet)
    return folder / CHECKPOINT


@pytest.mark.parametrize(
    ("entry", "new", "said"),
    [
        ("exp_avg", torch.zeros(3), r"exp_avg is of shape \(3,\), not of shape"),
        ("exp_avg_sq", torch.zeros(3, 3, 3, 3, 3), "exp_avg_sq is of shape"),
        ("exp_avg_sq", torch.zeros(1), "exp_avg_sq is a number"),  # that a step would take for all values
        ("exp_avg_sq", [torch.zeros(2)], "exp_avg_sq is"),
        ("exp_avg_sq", None, "exp_avg_sq is missing"),
        ("step", "x", "step is str, not a number"),
        ("amsgrad", "yes", "amsgrad is str, not bool"),
    ],
)
def test_a_state_of_an_optimizer_that_does_not_fit_is_one_line(tmp_path, trained, entry, new, said):
    content = read(trained)
    state, groups = content["optimizer"]["state"], content["optimizer"]["param_groups"]
    place = groups[0] if entry in groups[0] else state[max(state, key=lambda n: state[n]["exp_avg"].ndim)]
    if new is None:
        del place[entry]
    else:
        place[entry] = new
    torch.save(content, tmp_path / "changed.pth")
    with pytest.raises(LapeError, match=rf"changed.pth does not fit this one: .*{said}.*--finetune"):
        train(tiny(epochs=2, output_dir=str(tmp_path / "b"), resume=str(tmp_path / "changed.pth")), say=quiet)


# ------------------------------------------------------------------------------------------------ full disks


@pytest.fixture
def small_disk():
    """No file may grow beyond 100 kB, which every writer meets as it does a full disk or a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("writer", [torch.save, lambda content, file: file.write(pickle.dumps(content[0].tolist()))])
def test_a_file_larger_than_the_disk_is_one_line_and_nothing_is_left(tmp_path, writer):
    path = tmp_path / "c.pth"
    path.write_bytes(b"before")
    content = [torch.zeros(50_000), torch.zeros(500_000), torch.zeros(50_000)]
    with pytest.raises(LapeError, match=r"cannot write .*c.pth: File too large; what was there before is untouched"):
        write_atomically(path, lambda file: writer(content, file))
    assert [one.name for one in tmp_path.iterdir()] == ["c.pth"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("room", [1, 40, 100])
@pytest.mark.parametrize("form", ["json", "csv"])
def test_rows_that_a_full_disk_cuts_off_go_and_those_before_stay(tmp_path, form, room):
    """A disk that is almost full takes a part of what is written, and says nothing before the next part."""
    path, row = tmp_path / f"rows.{form}", {"image": "a" * 40, "rank": 1}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = {"json_path": None, "csv_path": None, f"{form}_path": str(path)}
    with row_writer(**files) as add:
        add([row])
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, before[1]))
        try:
            with pytest.raises(LapeError, match=r"\(File too large\): the rows before are"):
                add([row] * 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LapeError, match="a pipe or a device"):
        write_atomically(tmp_path / "pipe", lambda file: file.write(b"x"))
    assert (tmp_path / "pipe").is_fifo()
