"""Kill a training 20 times with SIGKILL, at random moments and while it writes, and compare it with one never stopped.

    python benchmarks/kill_and_resume.py [--images D] [--kills 20] [--output FILE.json]

The packaged digits are trained by one process and by two; with `--images D` (D/train/<class>/*, D/val/<class>/*, such
as a part of CIFAR-10) those, too. Each start is the same command with `--resume auto`. After every kill all checkpoints
must load; at the end weights, EMA, optimizer, schedule, best metric and log must equal those of the other run, bit for
bit. Exit code 0 when they do. Linux only (it finds a launcher's processes under /proc).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lape.errors import CheckpointError
from lape.files.read import read_checkpoint
from lape.train.distributed import World
from lape.train.machine import describe_start
from lape.train.state import BEST, CHECKPOINT, LOG, PREVIOUS

ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "data_seconds", "images_per_second", "peak_memory_mib"}
STATE = ("optimizer", "lr_scheduler", "scaler", "epoch", "step", "max_accuracy", "best")
MODEL = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
COMMON = (
    "--model vit_tiny_patch16_224 --join-type LaPE --input-size 16 --drop 0.1 --warmup-epochs 1 --device cpu "
    "--threads 1 --log-every 1 --save-steps 5 --resume auto --epochs 8"
)
DIGITS = f"{COMMON} --aa none --no-repeated-aug"


def command(flags: str, processes: int, out: Path) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, "-u", *(launcher if processes > 1 else []), "main.py"]
    return [*start, *flags.split(), "--model-kwargs", json.dumps(MODEL), "--output-dir", str(out)]


def begin(flags: str, processes: int, out: Path) -> tuple[subprocess.Popen, threading.Event]:
    """Start the command; the event is set when the first step is done."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        command(flags, processes, out),
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    training = threading.Event()

    def listen() -> None:
        for line in process.stdout:
            if line.startswith("Epoch:"):
                training.set()
        training.set()  # it ended

    threading.Thread(target=listen, daemon=True).start()
    return process, training


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def kill(process: subprocess.Popen) -> None:
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def kill_at_random(process: subprocess.Popen, out: Path, after: float, at_a_write: bool) -> str:
    """Kill after `after` seconds, then, if asked, as soon as a checkpoint is being written. Returns what happened."""
    end = time.monotonic() + after
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    until = time.monotonic() + 20
    writing = False
    while at_a_write and process.poll() is None and time.monotonic() < until and not writing:
        writing = any(name.startswith(".") and name.endswith(".tmp") for name in os.listdir(out))
    if process.poll() is not None:
        return "finished"
    kill(process)
    return "while writing" if writing else "within a step"


def torn(out: Path) -> list[str]:
    found = []
    for path in (out / name for name in (CHECKPOINT, PREVIOUS, BEST)):
        try:
            if path.exists():
                read_checkpoint(path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def same(one, other) -> bool:
    if isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def compare(out: Path, whole: Path) -> dict[str, bool]:
    found, wanted = read_checkpoint(out / CHECKPOINT), read_checkpoint(whole / CHECKPOINT)
    equal = {"weights": same(found.model, wanted.model), "EMA": same(found.model_ema, wanted.model_ema)}
    equal |= {key: same(found.raw[key], wanted.raw[key]) for key in STATE}
    equal["best weights"] = same(read_checkpoint(out / BEST).model, read_checkpoint(whole / BEST).model)
    equal["log"] = log_of(out) == log_of(whole)
    points = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("test/acc1")
    equal["curve without a repeated epoch"] = [point.step for point in points] == list(range(len(log_of(whole))))
    equal["nothing half-written left"] = not list(out.glob(".*.tmp"))
    return equal


def scenario(flags: str, processes: int, kills: int, folder: Path, chance: random.Random) -> dict:
    whole = folder / "whole"
    process, training = begin(flags, processes, whole)
    training.wait()
    began = time.monotonic()
    assert process.wait() == 0, f"the run that is not stopped failed: {' '.join(command(flags, processes, whole))}"
    seconds = time.monotonic() - began
    moments: dict[str, int] = {"within a step": 0, "while writing": 0}
    bad: list[str] = []
    runs: list[dict[str, bool]] = []
    while sum(moments.values()) < kills:
        out = folder / f"killed{len(runs)}"
        while True:
            process, training = begin(flags, processes, out)
            training.wait()
            if sum(moments.values()) == kills:
                what = "finished"
            else:
                what = kill_at_random(process, out, chance.uniform(0, seconds / 8), chance.random() < 0.5)
            if what == "finished":
                assert process.wait() == 0, "a resumed run failed"
                break
            moments[what] += 1
            bad += torn(out)
            print(f"  kill {sum(moments.values())}: {what}", flush=True)
        runs.append(compare(out, whole))
    return {
        "command": " ".join(command(flags, processes, Path("OUT"))[1:]),
        "processes": processes,
        "seconds of a run never stopped": round(seconds, 1),
        "kills": moments,
        "runs": len(runs),
        "torn files": bad,
        "equal": {key: all(run[key] for run in runs) for key in runs[0]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder with train/<class>/* and val/<class>/* to do the same with")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output = given.output or ROOT / f"benchmarks/results/kill_and_resume_cpu{os.cpu_count()}_{date.today()}.json"
    tasks = {
        "digits, 1 process, 0 loader processes": (f"{DIGITS} --batch-size 64 --num-workers 0", 1),
        "digits, 2 processes, 2 loader processes each": (f"{DIGITS} --batch-size 32 --num-workers 2", 2),
    }
    if given.images:
        flags = f"{COMMON} --data-path {given.images} --batch-size 64 --num-workers 2"
        tasks["image folder, 1 process, 2 loader processes"] = (flags, 1)
    results = {}
    for name, (flags, processes) in tasks.items():
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = scenario(flags, processes, given.kills, Path(folder), random.Random(given.seed))
        if given.images:
            results[name]["command"] = results[name]["command"].replace(given.images, "D")
        start = describe_start(World(0, 1, torch.device("cpu")))
        start["command"] = ["benchmarks/kill_and_resume.py", "--kills", str(given.kills)]
        output.write_text(json.dumps({"start": start, "results": results}, indent=1) + "\n")
        print(json.dumps(results[name], indent=1), flush=True)
    return 0 if all(all(r["equal"].values()) and not r["torn files"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
