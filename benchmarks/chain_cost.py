"""What the chain of position norms costs as models grow deeper, wider and see larger images.

    python benchmarks/chain_cost.py [--rounds 5] [--device cpu]

For each size: how many LayerNorms `lape.positions` runs (one a layer: linear in the depth), its time, and the time of a
forward of one image by `basic` and by `LaPE`, in interleaved rounds. The norms of a forward are counted as well, by
torch's dispatcher. Exit code 1 when the chain takes more or less than one norm a layer.
Result: benchmarks/results/chain_cost_<device>.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lape
from lape.study.benchmark import Variant, compare, describe_machine, inference_run, machine, time_rounds
from lape.train.distributed import join_world

RESULTS = Path(__file__).parent / "results"
SIZES = [  # layers, width, pixels; patch 16, heads of 64
    *((layers, 192, 224) for layers in (6, 12, 24, 48)),
    *((12, width, 224) for width in (384, 768)),
    *((12, 192, pixels) for pixels in (448, 1024)),
    (48, 192, 1024),
]


class Norms(TorchDispatchMode):
    """Counts LayerNorms."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name == "aten::native_layer_norm"
        return function(*args, **(kwargs or {}))


def norms(run) -> int:
    with torch.no_grad(), Norms() as seen:
        run()
    return seen.count


def one_size(layers: int, width: int, pixels: int, rounds: int, device: torch.device) -> dict:
    shape = {"depth": layers, "embed_dim": width, "num_heads": max(1, width // 64), "img_size": pixels}
    x = torch.randn(1, 3, pixels, pixels, device=device)
    models = {}
    for join in ("basic", "LaPE"):
        torch.manual_seed(0)
        models[join] = lape.create_model("vit_tiny_patch16_224", join, **shape).to(device).eval()

    def chain() -> None:
        with torch.inference_mode():
            lape.positions(models["LaPE"])

    runs = {join: inference_run(Variant(join, model, model), x) for join, model in models.items()}
    counted = {
        "norms_of_positions": norms(lambda: lape.positions(models["LaPE"])),
        "norms_of_a_forward": {join: norms(lambda m=model: m(x)) for join, model in models.items()},
    }
    times = time_rounds({**runs, "positions": chain}, rounds, device)
    rows = {name: compare(seconds, times["basic"]) for name, seconds in times.items()}
    return {"layers": layers, "width": width, "pixels": pixels, **counted, "times": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="two small sizes, to see that it works")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    with join_world(given.device) as world:
        found = machine(world.device)
        print(describe_machine(found))
        for layers, width, pixels in [(2, 64, 32), (4, 64, 32)] if given.tiny else SIZES:
            row = one_size(layers, width, pixels, given.rounds, world.device)
            rows.append(row)
            times = row["times"]
            print(
                f"{layers:3} layers, width {width:4}, {pixels:4} px: {row['norms_of_positions']:3} norms, chain "
                f"{1e3 * times['positions']['seconds']:7.2f} ms, forward {1e3 * times['basic']['seconds']:9.1f} ms, "
                f"LaPE / basic {times['LaPE']['ratio']:.3f}",
                flush=True,
            )
    where = "cuda" if world.device.type == "cuda" else f"cpu{found['hardware']['cores']}"
    output = given.output or RESULTS / f"chain_cost_{where}.json"
    output.write_text(json.dumps({"rounds": given.rounds, **found, "sizes": rows}, indent=1) + "\n")
    print(f"written: {output.name}")
    linear = all(row["norms_of_positions"] == row["layers"] for row in rows)
    linear &= all(r["norms_of_a_forward"]["LaPE"] - r["norms_of_a_forward"]["basic"] == r["layers"] for r in rows)
    return 0 if linear else 1


if __name__ == "__main__":
    sys.exit(main())
