"""Two hosts, one of which is cut off and comes back: an elastic torchrun goes on from the last checkpoint each time.

    sudo python benchmarks/two_hosts.py [--output FILE.json]

Two network namespaces with a cable between them stand for the hosts; they share the file system, as those of a cluster
do. Needs Linux, root and iproute2; leaves nothing behind. What happens:

1. Both train together, with gloo.
2. The cable is cut. The first host notices within `--dist-timeout`, and goes on alone from the last checkpoint.
3. The second host is switched off and on again, the cable is put back, and its torchrun started anew: it joins, the
   first host's processes are told to stop, save, and both go on.
4. The result is compared with a run by two processes on one host that nothing happened to. `--global-batch` keeps the
   images of each step, so both see the same, and differ by rounding only.

Exit code 0 when the run ended, every epoch is in the log once, and the validation losses differ by less than 1e-3.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

from lape.train.distributed import World
from lape.train.logs import RUN
from lape.train.machine import describe_start
from lape.train.state import LOG

ROOT = Path(__file__).parents[1]
HOSTS = {"lape-a": "10.77.0.1", "lape-b": "10.77.0.2"}
TIMEOUT = 20
MODEL = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
FLAGS = (
    "--model vit_tiny_patch16_224 --join-type LaPE --input-size 16 --device cpu --threads 1 --epochs 60 "
    "--warmup-epochs 1 --aa none --reprob 0 --mixup 0 --cutmix 0 --drop-path 0 --no-repeated-aug --num-workers 0 "
    f"--batch-size 64 --global-batch 64 --save-steps 5 --resume auto --dist-timeout {TIMEOUT} --dist-eval"
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def network() -> Iterator[None]:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)
        ip("netns", "add", host)
    try:
        first, second = HOSTS
        ip("link", "add", first, "type", "veth", "peer", "name", second)
        for host, address in HOSTS.items():
            ip("link", "set", host, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", host)
            ip("-n", host, "link", "set", host, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            ip("netns", "del", host)


def begin(host: str | None, out: Path, log: Path) -> subprocess.Popen:
    """torchrun on a host; without one, two processes here."""
    launcher = [sys.executable, "-u", "-m", "torch.distributed.run", "--max-restarts", "10"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    if host is None:
        launcher += ["--standalone", "--nproc-per-node", "2"]
    else:
        first = next(iter(HOSTS.values()))
        launcher = ["ip", "netns", "exec", host, *launcher, "--nnodes", "1:2", "--nproc-per-node", "1"]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29400", "--rdzv-id", "lape"]
        # a namespace has no name that resolves to its address, so torchrun cannot find out where the store is to be
        launcher += ["--local-addr", HOSTS[host], "--rdzv-conf", f"is_host={int(HOSTS[host] == first)}"]
        environ["GLOO_SOCKET_IFNAME"] = host
        environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else a host that joins later waits for an address in vain
    command = [*launcher, "main.py", *FLAGS.split(), "--model-kwargs", json.dumps(MODEL), "--output-dir", str(out)]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in family(int(child)))]


def switch_off(process: subprocess.Popen) -> None:
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def starts(out: Path) -> list[dict]:
    path = out / RUN
    return json.loads(path.read_text())["starts"] if path.exists() else []


def wait_until(what: str, true, process: subprocess.Popen, seconds: float = 240) -> float:
    began = time.monotonic()
    while not true():
        if process.poll() is not None:
            raise SystemExit(f"waiting until {what}: the run ended with {process.returncode}")
        if time.monotonic() - began > seconds:
            raise SystemExit(f"waiting until {what}: nothing within {seconds} s")
        time.sleep(0.2)
    return round(time.monotonic() - began, 1)


def epochs(out: Path) -> int:
    return len((out / LOG).read_text().splitlines()) if (out / LOG).exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep-logs", type=Path, help="folder for what the processes print")
    given = parser.parse_args()
    output = given.output or ROOT / f"benchmarks/results/two_hosts_cpu{os.cpu_count()}_{date.today()}.json"
    happened: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as scratch, network():
        folder = Path(scratch)
        logs = given.keep_logs or folder
        out, whole = folder / "out", folder / "whole"
        first, second = (begin(host, out, logs / f"{host}.log") for host in HOSTS)
        try:
            wait_until("both train", lambda: epochs(out) >= 3, first)
            ip("-n", "lape-b", "link", "set", "lape-b", "down")
            alone = len(starts(out)) + 1
            seconds = wait_until("the first host goes on alone", lambda: len(starts(out)) >= alone, first)
            happened["seconds from the cut until the first host trains alone"] = seconds
            before = epochs(out)
            wait_until("it has trained alone", lambda: epochs(out) >= before + 3, first)
            switch_off(second)
            ip("-n", "lape-b", "link", "set", "lape-b", "up")
            again = len(starts(out)) + 1
            second = begin("lape-b", out, logs / "lape-b.log")
            seconds = wait_until("both train again", lambda: len(starts(out)) >= again, first)
            happened["seconds from the second host's start until both train"] = seconds
            happened["exit codes"] = f"{first.wait(600)}, {second.wait(60)}"
        finally:
            switch_off(first)
            switch_off(second)
        calm = begin(None, whole, logs / "whole.log")
        happened["exit code of the run without a cut"] = calm.wait(900)
        lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
        calm_lines = [json.loads(line) for line in (whole / LOG).read_text().splitlines()]
        began = [{key: start[key] for key in ("epoch", "step", "processes")} for start in starts(out)]
    losses = [abs(a["test_exact_loss"] - b["test_exact_loss"]) for a, b in zip(lines, calm_lines, strict=True)]
    start = describe_start(World(0, 1, torch.device("cpu")))
    start["command"] = ["benchmarks/two_hosts.py"]
    result = {
        "start": start,
        "flags": FLAGS,
        "happened": happened,
        "starts of the run": began,
        "epochs in the log": [line["epoch"] for line in lines] == list(range(60)),
        "largest difference of a validation loss": max(losses),
        "validation loss at the end": lines[-1]["test_exact_loss"],
        "top-1 at the end": [lines[-1]["test_acc1"], calm_lines[-1]["test_acc1"]],
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sizes = [start["processes"] for start in began]
    return 0 if result["epochs in the log"] and max(losses) < 1e-3 and 1 in sizes and sizes[-1] == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
