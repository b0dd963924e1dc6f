"""Fused and plain attention in a training step and in inference, by precision and shape: writes a result file.

    python benchmarks/attention.py [--rounds 9] [--threads 2]

Rounds are interleaved; times are processor time of this process, so that other work disturbs little. It is the
measurement behind `--attention auto`.
"""

import argparse
import json
import resource
import statistics
from pathlib import Path

import timm
import torch

from lape.study.benchmark import machine

SHAPES = {
    "DeiT-Ti, 224": ("deit_tiny_patch16_224", {}, 8, 224),
    "DeiT-Ti, 384": ("deit_tiny_patch16_224", {"img_size": 384}, 2, 384),
    "DeiT-S, 224, 3 layers": ("deit_small_patch16_224", {"depth": 3}, 4, 224),
    "ViT-Lite, 32": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 256, "depth": 4, "num_heads": 4},
        64,
        32,
    ),
    "digits, 8": (
        "vit_tiny_patch16_224",
        {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4},
        128,
        8,
    ),
}


def processor_time() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, kwargs: dict, batch: int, size: int, bf16: bool, rounds: int) -> dict[str, list[float]]:
    """Ratios plain to fused, round by round."""
    models, optimizers = {}, {}
    for fused in (True, False):
        timm.layers.set_fused_attn(fused)
        torch.manual_seed(0)
        models[fused] = timm.create_model(name, num_classes=10, **kwargs).train()
        optimizers[fused] = torch.optim.AdamW(models[fused].parameters())
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    ratios: dict[str, list[float]] = {"training": [], "inference": []}
    for turn in range(rounds + 1):
        seconds: dict[tuple[str, bool], float] = {}
        for fused, model in models.items():
            begin = processor_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = torch.nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizers[fused].step()
            optimizers[fused].zero_grad()
            seconds["training", fused] = processor_time() - begin
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                begin = processor_time()
                model(x)
                seconds["inference", fused] = processor_time() - begin
        if turn:  # the first is warm-up
            for what, values in ratios.items():
                values.append(seconds[what, False] / seconds[what, True])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for shape, arguments in SHAPES.items():
        for precision in ("bf16", "fp32"):
            row: dict = {"shape": shape, "precision": precision}
            for what, values in measure(*arguments, precision == "bf16", given.rounds).items():
                low, middle, high = statistics.quantiles(values, n=4)
                row[what] = {"median": middle, "quartiles": [low, high]}
            rows.append(row)
            print(row, flush=True)
    results = {"rows": rows, "rounds": given.rounds, "threads": given.threads, "machine": machine(torch.device("cpu"))}
    path = Path(__file__).parent / "results" / f"attention_cpu{given.threads}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
