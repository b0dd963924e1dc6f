"""Evaluate one checkpoint with 1, 2, 3 and 4 processes: the numbers must not depend on how many there are.

    python benchmarks/exact_evaluation.py [--output FILE.json]

The validation set is that of the packaged digits, 359 images: a prime number, so no number of processes divides it. A
small model is trained for six epochs first. Exit code 0 when top-1, top-5 and the number of images agree exactly and
the loss to 1e-6.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from lape.recipe import Recipe
from lape.train.distributed import World
from lape.train.loop import train
from lape.train.machine import describe_start
from lape.train.state import CHECKPOINT

ROOT = Path(__file__).parents[1]
PROCESSES = (1, 2, 3, 4)
WORKER = """
import dataclasses, json, os, sys
from lape.train.evaluate import evaluate_checkpoint
from lape.recipe import Recipe
recipe = Recipe(resume=sys.argv[1], eval=True, ema=sys.argv[3] == "ema", dist_eval=True, device="cpu", threads=1)
metrics = evaluate_checkpoint(recipe, say=lambda text: None)
if os.environ.get("RANK", "0") == "0":
    open(sys.argv[2], "w").write(json.dumps(dataclasses.asdict(metrics)))
"""


def measure(processes: int, weights: str, checkpoint: Path, folder: Path) -> dict[str, float]:
    script, answer = folder / "worker.py", folder / f"{processes}.json"
    script.write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *launcher, str(script), str(checkpoint), str(answer), weights],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(answer.read_text())
    keys = {"acc1": "top-1", "acc5": "top-5", "loss": "loss", "count": "images seen"}
    return {"weights": weights, "processes": processes, **{new: found[old] for old, new in keys.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output = given.output or ROOT / f"benchmarks/results/exact_evaluation_cpu{os.cpu_count()}_{date.today()}.json"
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.from_yaml("digits", epochs=6, warmup_epochs=1, output_dir=folder, device="cpu", model_ema=True)
        train(recipe.replace(model_ema_warmup=True))
        checkpoint = Path(folder) / CHECKPOINT
        rows = [measure(n, weights, checkpoint, Path(folder)) for weights in ("raw", "ema") for n in PROCESSES]
    alike = all(
        row[key] == first[key]
        for row in rows
        for first in [next(one for one in rows if one["weights"] == row["weights"])]
        for key in ("top-1", "top-5", "images seen")
    )
    losses = {weights: [row["loss"] for row in rows if row["weights"] == weights] for weights in ("raw", "ema")}
    spread = {weights: max(found) - min(found) for weights, found in losses.items()}
    start = describe_start(World(0, 1, torch.device("cpu")))
    start["command"] = ["benchmarks/exact_evaluation.py"]
    content = {"start": start, "rows": rows, "counts agree exactly": alike, "largest difference of the loss": spread}
    output.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print(row)
    print(f"counts agree exactly: {alike}; largest difference of the loss: {spread}")
    return 0 if alike and max(spread.values()) <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
