"""Everything that is worth a GPU's minutes, in one call and in the order of its worth; results as the parts write them.

    python benchmarks/on_gpu.py [--out FOLDER] [--minutes 25] [--cifar FOLDER] [--photographs FOLDER]

1. tests/test_cuda.py; 2. what LaPE costs beside basic and beside the equations written out; 3. the data path on the
device; 4. CIFAR-10: ViT-Lite, CVT and CCT for 310 epochs, as far as the minutes reach (a later call goes on where
--runs is kept). A part that fails does not stop the others. FOLDER gets new result files and summary.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where new result files are copied to")
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as train/<class>/* and val/<class>/*")
    parser.add_argument("--photographs", type=Path, help="photographs for the input pipeline")
    parser.add_argument("--runs", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()

    python, end = sys.executable, time.monotonic() + 60 * given.minutes
    before = {path: path.stat().st_mtime for path in RESULTS.glob("*.json")}
    parts = {
        "tests": [python, "-m", "pytest", "-q", str(ROOT / "tests" / "test_cuda.py")],
        "joins": [python, str(ROOT / "benchmarks" / "joins.py"), "--device", given.device],
        "original_style": [python, str(ROOT / "benchmarks" / "original_style.py"), "--device", given.device],
        "device_path": [python, str(ROOT / "benchmarks" / "device_path.py"), "--device", given.device],
    }
    if given.photographs:
        parts["input_pipeline"] = [
            python,
            str(ROOT / "benchmarks" / "input_pipeline.py"),
            "--data",
            str(given.photographs),
        ]
    if given.cifar:
        matrix = [python, str(ROOT / "benchmarks" / "cifar_matrix.py"), "--full", "--cifar", str(given.cifar)]
        parts["cifar_matrix"] = [*matrix, "--runs", str(given.runs / "cifar"), "--workers", "4"]
    summary = {}
    for name, command in parts.items():
        left = end - time.monotonic()
        if left < 30:
            summary[name] = {"left_out": "no time left"}
            continue
        began = time.monotonic()
        try:
            code: int | str = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = "stopped: no time left"
        summary[name] = {"exit": code, "seconds": round(time.monotonic() - began, 1)}
        print(f"== {name}: {summary[name]}", flush=True)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        for path in RESULTS.glob("*.json"):
            if before.get(path) != path.stat().st_mtime:
                shutil.copy(path, given.out)
        (given.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
