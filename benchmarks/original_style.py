"""Training steps of `lape` against a LaPE ViT written out from the equations, as the original computes it.

    python benchmarks/original_style.py [--model deit_tiny_patch16_224] [--batch-size 16] [--rounds 12] [--device cpu]

The baseline (`written_out.py`) gets the weights of the converted timm model, and its logits must be equal first
(`TOLERANCE`, relative to the largest logit). Then all train in interleaved rounds, in float32 and with bf16 autocast,
so that precision and implementation can be told apart: the baseline, timm's model, and `lape` with the attention that
`lape train` chooses, with torch's fused attention, and compiled. Speed-ups are baseline / this within a round.

Also written: which share of the machine's matrix-product rate (torch.matmul of 2048 x 2048, measured in the same run,
in that precision) each step reaches. Result: benchmarks/results/original_style_<device>_<model>.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from written_out import largest_difference, written_out

import lape
from lape.recipe import Recipe
from lape.study.benchmark import Variant, describe_machine, machine, relative_times, time_rounds, training_run
from lape.train.distributed import join_world
from lape.train.speed import attention_for

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-5


def training_flops(model: nn.Module, x: Tensor) -> int:
    """Of matrix products and convolutions, forward and backward, as torch counts them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def product(dtype: torch.dtype, device: torch.device, size: int) -> Callable[[], None]:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def run() -> None:
        torch.matmul(a, b)

    return run


def converted(given: argparse.Namespace, device: torch.device) -> nn.Module:
    return lape.create_model(given.model, "LaPE", **given.model_kwargs).to(device)


def basic(given: argparse.Namespace, device: torch.device) -> nn.Module:
    return timm.create_model(given.model, **given.model_kwargs).to(device)


def run(given: argparse.Namespace, device: torch.device, chosen: ExitStack) -> dict:
    torch.manual_seed(0)
    model = converted(given, device)
    with torch.no_grad():  # away from the initial values, where gains of one and zero biases hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    found = machine(device)
    baseline = written_out(model).to(device)
    size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    x = torch.randn(given.batch_size, *size, device=device)
    difference = largest_difference(model, baseline, x)
    print(
        f"{describe_machine(found)}\nlargest difference of logits: {difference:.1e} (at most {TOLERANCE:.0e} allowed)"
    )
    if not difference <= TOLERANCE:
        raise SystemExit("the baseline does not compute what the converted model does")
    rows = {
        "written out, fp32": (baseline, "off", "fused", False),
        "timm, fp32": (basic(given, device), "off", "auto", False),
        "lape, fp32": (model, "off", "auto", False),
        "written out, bf16 autocast": (written_out(model).to(device), "bf16", "fused", False),
        "timm, bf16 autocast": (basic(given, device), "bf16", "fused", False),
        "lape, bf16 autocast, fused attention": (converted(given, device), "bf16", "fused", False),
        "lape, bf16 autocast": (converted(given, device), "bf16", "auto", False),
        "lape, bf16 autocast, compiled": (converted(given, device), "bf16", "auto", True),
    }
    if given.eager:
        rows.pop("lape, bf16 autocast, compiled")
    precisions = {name: precision for name, (_, precision, _, _) in rows.items()}
    steps = {}
    for name, (m, precision, attention, compiled) in rows.items():
        m.train()
        recipe = Recipe(amp=precision, attention=attention)
        chosen.enter_context(attention_for(m, recipe, device))
        steps[name], _ = training_run(Variant(name, m, torch.compile(m) if compiled else m), x, precision)
    flops = training_flops(model, x)
    dtypes = {"off": torch.float32, "bf16": torch.bfloat16}
    products = {precision: product(dtype, device, given.product) for precision, dtype in dtypes.items()}
    rates = time_rounds(products, max(3, given.rounds // 2), device)
    rates = {precision: 2 * given.product**3 / min(seconds) for precision, seconds in rates.items()}
    times = time_rounds(steps, given.rounds, device)
    first = next(iter(steps))
    variants = {}
    for name, precision in precisions.items():
        variants[name] = relative_times(times[first], times[name]) | {
            "seconds": relative_times(times[name], times[name])["seconds"]
        }
        variants[name]["speed_up"], variants[name]["speed_up_interval"] = (
            variants[name].pop("ratio"),
            variants[name].pop("ratio_interval"),
        )
        variants[name]["seconds_each_round"] = times[name]
        variants[name].pop("seconds_quartiles")
        variants[name]["flops_per_second"] = flops / variants[name]["seconds"]
        variants[name]["share_of_matmul_rate"] = variants[name]["flops_per_second"] / rates[precision]
    settings = {key: value for key, value in vars(given).items() if key != "output"}
    return {
        "settings": settings,
        **found,
        "largest_difference": difference,
        "tolerance": TOLERANCE,
        "flops_of_a_step": flops,
        "matmul_flops_per_second": {"fp32": rates["off"], "bf16": rates["bf16"]},
        "variants": variants,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="JSON")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--product", type=int, default=2048, help="side of the matrices whose product is timed")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, which takes a minute")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with join_world(given.device) as world, ExitStack() as chosen:
        found = run(given, world.device, chosen)
    where = "cuda" if world.device.type == "cuda" else f"cpu{found['hardware']['cores']}"
    output = given.output or RESULTS / f"original_style_{where}_{given.model}.json"
    output.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["variants"].items():
        low, high = row["speed_up_interval"]
        print(
            f"{name:38} {1e3 * row['seconds']:8.1f} ms a step   {row['speed_up']:.3f} times as fast "
            f"[{low:.3f}, {high:.3f}]   {100 * row['share_of_matmul_rate']:.0f} % of matmul"
        )
    print(f"written: {output.name}")


if __name__ == "__main__":
    main()
