"""Times `lape visualize` of DeiT-B, from the start of the command to its last file; writes one JSON file.

    python benchmarks/visualize_time.py

The checkpoint holds random weights: what is drawn costs the same. The limit is 20 s on two cores. On a machine that
does other work the time that passes says little: the processor time of the command, and the load beside it, are
written too.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import lape
from lape.train.machine import environment

LIMIT = 20.0
REPEATS = 3


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        lape.save(lape.create_model("deit_base_patch16_224", "LaPE"), home / "deit_b")
        seconds: dict[str, list[float]] = {"pictures": [], "explorer": []}
        processor: dict[str, list[float]] = {"pictures": [], "explorer": []}
        load = os.getloadavg()[0]
        files = {}
        for repeat in range(REPEATS):
            for what, flags in (("pictures", ["--save-dir", str(home / f"out{repeat}")]),
                                ("explorer", ["--html", str(home / f"e{repeat}.html")])):  # fmt: skip
                began, spent = time.perf_counter(), _spent()
                command = [sys.executable, "-m", "lape", "visualize", str(home / "deit_b"), *flags]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds[what].append(round(time.perf_counter() - began, 2))
                processor[what].append(round(_spent() - spent, 2))
        files["pictures"] = sum(1 for path in (home / "out0").rglob("*") if path.is_file())
        files["explorer_bytes"] = (home / "e0.html").stat().st_size
    result = {
        "what": "lape visualize of deit_base_patch16_224, join LaPE, process start to last file, seconds",
        "seconds": seconds,
        "median": {what: statistics.median(values) for what, values in seconds.items()},
        "processor_seconds": processor,
        "load_before": round(load, 1),
        "limit": LIMIT,
        **files,
        **environment(),
    }
    path = Path(__file__).parent / "results" / "visualize_time.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["median"]), f"-> {path}")


def _spent() -> float:
    """Processor seconds of all commands that ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
