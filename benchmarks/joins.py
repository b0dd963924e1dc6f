"""What LaPE costs beside basic: eager (with training), compiled by torch, and by onnxruntime; batch 1 and a larger one.

    python benchmarks/joins.py [--model deit_tiny_patch16_224] [--batch-size 16] [--rounds 30] [--device cpu]

Aims: a training step of LaPE at most 1.01 of basic, its memory at most 1.005; folded LaPE 1.00 of basic within the
noise in all three. `--only eager` leaves out compilation (minutes) and export. All by `lape.study.benchmark`, in
interleaved rounds; onnxruntime runs the files that `lape export` writes. Result:
benchmarks/results/joins_<device>_<model>.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lape
from lape.files.export import export
from lape.study.benchmark import benchmark, compare, table, time_rounds

RESULTS = Path(__file__).parent / "results"
WAYS = ("eager", "compiled", "onnxruntime")


def by_torch(given: argparse.Namespace, compiled: bool) -> dict[str, Any]:
    found = benchmark(
        given.model,
        ["basic", "LaPE"],
        model_kwargs=given.model_kwargs,
        fold=True,
        compiled=compiled,
        batch_size=given.batch_size,
        device=given.device,
        rounds=given.rounds,
        train=not compiled,
        peers=[] if compiled else ["timm"],
    )
    print("\n".join(table(found)), flush=True)
    return found


def by_onnxruntime(given: argparse.Namespace) -> dict[str, Any]:
    """basic, LaPE and folded LaPE as `lape export` writes them; each file was checked against the eager model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, join, fold in (("basic", "basic", False), ("LaPE", "LaPE", False), ("LaPE folded", "LaPE", True)):
            torch.manual_seed(0)
            model = lape.create_model(given.model, join, **given.model_kwargs).eval()
            images = torch.randn(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
            export(model, Path(folder) / name, images, formats=("onnx",), fold=fold, say=lambda _: None)
            path = (Path(folder) / name / "model.onnx").as_posix()
            sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    variants: dict[str, Any] = {name: {} for name in sessions}
    for part, batch in (("latency", 1), ("inference", given.batch_size)):
        pixels = torch.randn(batch, *images.shape[1:]).numpy()
        runs = {name: _call(session, pixels) for name, session in sessions.items()}
        times = time_rounds(runs, given.rounds, torch.device("cpu"))
        for name in sessions:
            variants[name][part] = {"batch": batch, **compare(times[name], times["basic"])}
            low, high = variants[name][part]["ratio_interval"]
            ratio, seconds = variants[name][part]["ratio"], variants[name][part]["seconds"]
            print(
                f"onnxruntime, batch {batch:2} {name:12} {1e3 * seconds:8.2f} ms  {ratio:.3f} [{low:.3f}, {high:.3f}]"
            )
    return {"version": onnxruntime.__version__, "variants": variants}


def _call(session: Any, pixels: Any) -> Callable[[], None]:
    def run() -> None:
        session.run(None, {"pixels": pixels})

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="JSON")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    found: dict[str, Any] = {}
    for way in given.only:
        found[way] = by_onnxruntime(given) if way == "onnxruntime" else by_torch(given, compiled=way == "compiled")
    hardware = next((found[way]["hardware"] for way in ("eager", "compiled") if way in found), {"device": "cpu"})
    where = "cuda" if hardware["device"].startswith("cuda") else f"cpu{hardware.get('cores', '')}"
    output = given.output or RESULTS / f"joins_{where}_{given.model}.json"
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {output.name}")


if __name__ == "__main__":
    main()
