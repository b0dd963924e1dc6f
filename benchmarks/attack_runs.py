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

from lape.errors import CheckpointError
from lape.files.read import read_checkpoint

LIMIT = 60.0
MODEL = "--model vit_tiny_patch16_224 --input-size 16 --model-kwargs embed_dim=16 depth=2 num_heads=2 patch_size=4"
SHARED = f"{MODEL} --device cpu --no-repeated-aug --batch-size 64".split()
TRAIN = ["train", *SHARED, "--threads", "1", "--log-every", "1"]


def lape(*arguments: str, wrapper: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [*wrapper, sys.executable, "-u", "-m", "lape", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=settings, start_new_session=True, **pipes)  # type: ignore[call-overload]


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
        errors = process.communicate(timeout=LIMIT)[1]
    except subprocess.TimeoutExpired:
        all_end(process.pid, 0)
        return f"did not end within {LIMIT:.0f} s"
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


def kills(number_of_each: int = 2) -> dict[str, object]:
    """A training, its loader process, a comparison: each ended from outside. Nothing is left, and a file is whole."""

    def end(what: str, number: signal.Signals, moment: float) -> str:
        with tempfile.TemporaryDirectory() as place:
            compare = ["compare", "--models", *SHARED[1:], "--epochs", "500", "--output-dir", place]
            train = [*TRAIN, "--num-workers", "2", "--epochs", "500", "--output-dir", place]
            process = lape(*(compare if what == "comparison" else train))
            until = time.monotonic() + LIMIT
            while time.monotonic() < until and not list(Path(place).rglob("checkpoint.pth")):
                time.sleep(0.1)
            time.sleep(moment)
            others = [pid for pid in processes_of(process.pid) if pid != process.pid]
            if what == "loader process" and not others:
                all_end(process.pid, 0)
                return "no loader process was running"
            os.kill(others[0] if what == "loader process" else process.pid, number)
            if not all_end(process.pid):
                return "a process was left after 10 s"
            errors = process.communicate()[1]
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
