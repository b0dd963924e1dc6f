"""How long commands take from a fresh process: processor time and time on the clock.

    python benchmarks/startup.py [--runs 5]

A digits checkpoint is trained first (one epoch, not counted); `eval` looks at the packaged 359 validation digits. What
a conversion adds to a script is seen from the two rows of `timm`, whose import is most of everything here.
"Fresh" is a new process; its files may lie in the page cache. Written: benchmarks/results/startup_cpu<cores>.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
AIMS = {"lape --help": 0.5, "lape eval": 3.0}  # seconds
LAPE = ["-m", "lape"]
MODEL = "timm.create_model('vit_tiny_patch16_224', depth=2)"


def run(arguments: list[str]) -> tuple[float, float]:
    """Return processor and clock seconds of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        run([*LAPE, "train", "--recipe", "digits", "--epochs", "1", "--output-dir", folder, "--device", "cpu"])
        checkpoint = str(Path(folder) / "checkpoint.pth")
        commands = {
            "lape --help": [*LAPE, "--help"],
            "lape train --help": [*LAPE, "train", "--help"],
            "lape hosts": [*LAPE, "hosts"],
            "lape eval": [*LAPE, "eval", checkpoint, "--device", "cpu"],
            "timm, a model": ["-c", f"import timm; {MODEL}"],
            "timm, converted": ["-c", f"import lape, timm; lape.apply_({MODEL}, 'LaPE')"],
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, command in commands.items():
                times[name].append(run(command))
    rows = {
        name: {
            "processor_s": statistics.median(one[0] for one in found),
            "clock_s": statistics.median(one[1] for one in found),
            "aim_s": AIMS.get(name),
        }
        for name, found in times.items()
    }
    result = {
        "commands": rows,
        "config": vars(arguments),
        "machine": {
            "cores": os.cpu_count(),
            "load_before": load,
            "python": sys.version.split()[0],
            "date": datetime.now(UTC).date().isoformat(),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"startup_cpu{os.cpu_count()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(
            f"{name:18} {row['processor_s']:6.2f} s processor {row['clock_s']:6.2f} s clock  aim {row['aim_s'] or '-'}"
        )


if __name__ == "__main__":
    main()
