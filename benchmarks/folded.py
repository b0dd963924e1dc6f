"""Inference and training of one model with several joins, against the unconverted host, in interleaved runs.

    python benchmarks/folded.py [--model deit_tiny_patch16_224] [--batch 1 16] [--runs 30] [--device cpu]

Each round times every variant once, in turn; the ratio is taken within a round, against the unconverted model, so that
what else the machine does falls on all alike. Written: benchmarks/results/folded_<device>_<model>.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import lape

RESULTS = Path(__file__).parent / "results"


def variants(name: str) -> dict[str, torch.nn.Module]:
    """The unconverted host first; all with the same host weights."""
    torch.manual_seed(0)
    host = timm.create_model(name)
    made = {"host": host}
    for join in ("basic", "share", "LaPE-sharing", "LaPE"):
        made[join] = lape.apply_(copy.deepcopy(host), join)
    made["LaPE folded"] = lape.fold_(lape.apply_(copy.deepcopy(host), "LaPE"))
    return made


def infer(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def train_step(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return run


def seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(runs: dict[str, Callable[[], None]], rounds: int, warm_up: int, device: torch.device) -> dict[str, dict]:
    """Median seconds of each, and the median and quartiles of its ratio to `host` within a round."""
    for run in runs.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # nobody always comes after the same one
            times[name].append(seconds(runs[name], device))
    out = {}
    for name in names:
        ratios = [mine / host for mine, host in zip(times[name], times["host"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        out[name] = {
            "median_s": statistics.median(times[name]),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": [low, high],
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--train-batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--train-runs", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    models = {name: model.to(device) for name, model in variants(arguments.model).items()}
    size = models["host"].default_cfg["input_size"]
    result: dict = {"inference": {}, "training": {}}
    for batch in arguments.batch:
        x = torch.randn(batch, *size, device=device)
        runs = {name: infer(model, x) for name, model in models.items()}
        result["inference"][str(batch)] = measure(runs, arguments.runs, 3, device)
    x = torch.randn(arguments.train_batch, *size, device=device)
    runs = {name: train_step(model, x) for name, model in models.items() if name != "LaPE folded"}
    result["training"][str(arguments.train_batch)] = measure(runs, arguments.train_runs, 1, device)
    result["parameters"] = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    result["config"] = vars(arguments)
    result["machine"] = {
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lape": lape.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"folded_{device.type}{os.cpu_count()}_{arguments.model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for kind, batches in result.items():
        if kind in ("inference", "training"):
            for batch, rows in batches.items():
                for name, row in rows.items():
                    low, high = row["ratio_quartiles"]
                    print(
                        f"{kind:9} batch {batch:>3} {name:13} {1e3 * row['median_s']:8.1f} ms   "
                        f"x {row['ratio_median']:.3f} [{low:.3f}, {high:.3f}]"
                    )
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
