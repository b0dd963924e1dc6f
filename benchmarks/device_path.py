"""Images a second of the two data paths: PIL with loader processes, and `--data-on-device`, in interleaved runs.

    python benchmarks/device_path.py [--device cuda] [--images 2048] [--rounds 5] [--num-workers N] [--threads N]

Data: the packaged digits, and folders of JPEG files with waves and noise that the script writes for itself. Each round
takes one epoch's batches of every row by both paths, in turn, to where a training step would find them. CPU time is
that of this process and of its loader processes. `--folder` takes a folder of images of one size (CIFAR-10, say) in
place of the written ones of 32 x 32. Written: benchmarks/results/device_path_<device>.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lape.data.loaders import train_loader
from lape.data.open import load_data
from lape.data.processes import processors
from lape.recipe import Recipe
from lape.train.machine import environment

RESULTS = Path(__file__).parent / "results"
DEIT = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "repeated_aug": False}
PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0, "repeated_aug": False}
GREY = {"in_chans": 1, "input_size": 8}
ROWS = {
    "digits 8x8 grey, nothing random": ("", {**PLAIN, **GREY}),
    "digits 8x8 grey, DeiT's recipe": ("", {**DEIT, **GREY}),
    "folder 32x32, crop and flip": (32, {**PLAIN, "input_size": 32}),
    "folder 32x32, DeiT's recipe": (32, {**DEIT, "input_size": 32}),
    "folder 64x64, DeiT's recipe": (64, {**DEIT, "input_size": 64}),
}


def write_folder(root: Path, side: int, count: int) -> Path:
    """`count` training images and one validation image a class, in two classes."""
    rows, columns = np.mgrid[0:side, 0:side]
    for number in range(count + 2):
        draw = np.random.default_rng(number)
        waves = np.stack([rows * draw.integers(1, 9), columns * draw.integers(1, 9), rows + columns], axis=-1)
        values = (waves + draw.integers(0, 60, waves.shape)) % 256
        folder = root / ("train" if number < count else "val") / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{number}.jpg", quality=92)
    return root


def epoch_of(dataset: Any, recipe: Recipe, device: torch.device) -> Callable[[int], dict[str, float]]:
    def run(epoch: int) -> dict[str, float]:
        images, start, cpu = 0, time.perf_counter(), cpu_seconds()
        for batch, targets in train_loader(dataset, recipe, epoch=epoch):
            batch, targets = batch.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            images += len(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"images": images, "seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}

    return run


def cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    speeds = [run["images"] / run["seconds"] for run in runs]
    return {
        "images_per_second": statistics.median(speeds),
        "each": speeds,
        "cpu_microseconds_an_image": statistics.median(1e6 * run["cpu_seconds"] / run["images"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=2048, help="of a written folder's training set")
    parser.add_argument("--folder", type=Path, help="32 x 32 images as train/<class>/* and val/<class>/*, all are used")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which data and recipes")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-workers", type=int, default=processors(), help="loader processes of the PIL path")
    parser.add_argument("--threads", type=int, default=processors(), help="torch's, for the device path on a CPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    common = {"device": arguments.device, "num_workers": arguments.num_workers, "batch_size": arguments.batch_size}
    load_before, paths = os.getloadavg(), {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            side: write_folder(Path(scratch) / str(side), side, arguments.images)
            for side in {ROWS[name][0] for name in arguments.rows}
            if side and not (side == 32 and arguments.folder)
        }
        folders |= {32: arguments.folder} if arguments.folder else {}
        loading = {}
        for name in arguments.rows:
            side, fields = ROWS[name]
            settings = {**common, **fields, "data_path": str(folders[side]) if side else ""}
            for way in ("pil", "device"):
                recipe = Recipe(**settings, data_on_device=way == "device")
                start = time.perf_counter()
                dataset = load_data(recipe, val=False, device=device).train
                loading[name, way] = time.perf_counter() - start
                paths[name, way] = epoch_of(dataset, recipe, device)
                paths[name, way](0)
        times: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in paths}
        for epoch in range(1, arguments.rounds + 1):
            for key, run in paths.items():
                times[key].append(run(epoch))
    rows = {}
    for name in arguments.rows:
        row = {way: summary(times[name, way]) | {"open_seconds": loading[name, way]} for way in ("pil", "device")}
        ratios = [a / b for a, b in zip(row["device"]["each"], row["pil"]["each"], strict=True)]
        rows[name] = {**row, "ratio_median": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
        print(
            f"{name:34} PIL {row['pil']['images_per_second']:9.0f} img/s  device "
            f"{row['device']['images_per_second']:9.0f} img/s  x {rows[name]['ratio_median']:.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}]"
        )
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    result = {
        "rows": rows,
        "config": {name: value for name, value in vars(arguments).items() if name not in ("folder", "output")},
        "images_of": "folder" if arguments.folder else "this script",
        "gpu": hardware,
        "load_before": load_before,
        "date": datetime.now(UTC).date().isoformat(),
        **environment(),
    }
    short = re.sub(r"\W+", "-", hardware).lower() if hardware else f"cpu{os.cpu_count()}"
    RESULTS.mkdir(exist_ok=True)
    path = arguments.output or RESULTS / f"device_path_{short}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
