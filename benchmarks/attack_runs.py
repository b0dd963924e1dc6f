"""Attacks on a run that `benchmarks/attack.py` counts: kills, full disks and launchers' environments.

Each function returns {"tries", "right"} and, by name, what was not right: right is one line, exit code 2 (or a whole
checkpoint and no process left), within `LIMIT` seconds. Linux; disks of a given size need root (`unshare`).

    python benchmarks/attack_runs.py
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lape.errors import CheckpointError
from lape.files.read import read_checkpoint

ROOT = Path(__file__).parents[1]
LIMIT = 60.0
MODEL = "--model vit_tiny_patch16_224 --input-size 16 --model-kwargs embed_dim=16 depth=2 num_heads=2 patch_size=4"
SHARED = f"{MODEL} --device cpu --no-repeated-aug --batch-size 64".split()
TRAIN = ["train", *SHARED, "--threads", "1", "--log-every", "1"]


def lape(*arguments: str, wrapper: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """A process of its own session. Its lines go into a file: a pipe that is full would hold it."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **variables}
    command = [*wrapper, sys.executable, "-u", "-m", "lape", *arguments]
    lines = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        command, env=settings, start_new_session=True, stdout=lines, stderr=subprocess.STDOUT, text=True
    )
    process.stdout = lines
    return process


def lines_of(process: subprocess.Popen[str]) -> str:
    process.wait()
    assert process.stdout is not None
    with process.stdout as lines:
        lines.seek(0)
        return lines.read()


def processes_of(session: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                pids.append(int(stat.parent.name))
    return pids


def all_end(session: int, seconds: float = 10.0) -> bool:
    """Whether no process of a session is left within the promised time; those that are, are killed."""
    until = time.monotonic() + seconds
    while (left := processes_of(session)) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return not left


def one_line(process: subprocess.Popen[str]) -> str:
    """What was not right about the end of a wrong use, "" if nothing."""
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        all_end(process.pid, 0)
        return f"did not end within {LIMIT:.0f} s: {lines_of(process)[-200:]}"
    errors = lines_of(process)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    right = process.returncode == 2 and len(lines) == 1 and "Traceback" not in errors and all_end(process.pid)
    return "" if right else f"exit code {process.returncode}: {errors[-200:]}"


def count(tries: dict[str, Callable[[], str]]) -> dict[str, object]:
    wrong = {name: text for name, attempt in tries.items() if (text := attempt())}
    return {"tries": len(tries), "right": len(tries) - len(wrong), "wrong": wrong}


def launchers() -> dict[str, object]:
    """Environments that no launcher should leave."""
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables: dict[str, dict[str, str]] = {
            "no address": {"RANK": "0", "WORLD_SIZE": "2"},
            "empty": {"WORLD_SIZE": ""},
            "not numeric": {"WORLD_SIZE": "two", "RANK": "0"},
            "rank alone": {"RANK": "1"},
            "port in use": whole | {"MASTER_PORT": str(server.getsockname()[1])},
            "no such host": whole | {"MASTER_ADDR": "host.invalid", "MASTER_PORT": "29500"},
            "SLURM alone": {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        }
        return count({name: lambda v=v: one_line(lape(*TRAIN, **v)) for name, v in variables.items()})  # type: ignore


def full_disks(kilobytes: tuple[int, ...] = (4, 12, 60, 200)) -> dict[str, object]:
    """Trainings whose checkpoints outgrow a disk of a given size."""

    def train_on(size: int) -> str:
        with tempfile.TemporaryDirectory() as place:
            mount = f'mount -t tmpfs -o size={size}k tmpfs {place} && exec "$@"'
            wrapper = ("unshare", "-m", "bash", "-c", mount, "bash")
            return one_line(lape(*TRAIN, "--num-workers", "0", "--output-dir", f"{place}/out", wrapper=wrapper))

    return count({f"{size} kB": lambda size=size: train_on(size) for size in kilobytes})  # type: ignore[misc]


def images(folder: Path) -> Path:
    """Pictures that take a while to decode."""
    rng = np.random.default_rng(0)
    for place in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (folder / place).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{number}.png")
    return folder


def kills(number_of_each: int = 2) -> dict[str, object]:
    """A training, its loader process, a comparison: each ended from outside. Nothing is left, and a file is whole."""

    def end(what: str, number: signal.Signals, moment: float) -> str:
        with tempfile.TemporaryDirectory() as place:
            compare = ["compare", "--models", *SHARED[1:], "--epochs", "500", "--output-dir", place]
            train = [*TRAIN, "--num-workers", "2", "--epochs", "500", "--output-dir", place]
            if what == "loader process":  # images that are decoded anew in each epoch
                train += ["--data-path", str(images(Path(place) / "data")), "--batch-size", "4"]
            process = lape(*(compare if what == "comparison" else train))
            until = time.monotonic() + LIMIT
            while time.monotonic() < until and not list(Path(place).rglob("checkpoint.pth")):
                time.sleep(0.1)
            time.sleep(moment)
            victims = [process.pid]
            while what == "loader process" and process.pid in victims and time.monotonic() < until:
                victims = [pid for pid in processes_of(process.pid) if pid != process.pid] or victims
            os.kill(victims[0], number)
            ended = all_end(process.pid)
            errors = lines_of(process)
            if not ended or (what == "loader process" and process.returncode != 2):
                return f"exit code {process.returncode}, all ended within 10 s: {ended}: {errors[-200:]}"
            try:
                for path in Path(place).rglob("checkpoint.pth"):
                    read_checkpoint(path)
            except CheckpointError as error:
                return str(error)
            return "Traceback" if "Traceback" in errors else ""

    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    kinds = [(what, number) for what in ("training", "comparison") for number in signals]
    kinds.append(("loader process", signal.SIGKILL))
    return count(
        {
            f"{what}, {number.name}, {place}": lambda w=what, n=number, p=place: end(w, n, 0.3 * p)  # type: ignore[misc]
            for what, number in kinds
            for place in range(number_of_each)
        }
    )


def main() -> None:
    print(json.dumps({"launchers": launchers(), "full disks": full_disks(), "kills": kills(1)}, indent=1))


if __name__ == "__main__":
    main()
