"""Training steps of `lape` against a LaPE ViT written out from the equations, as the original computes it.

    python benchmarks/original_style.py [--model deit_tiny_patch16_224] [--batch-size 16] [--rounds 12] [--device cpu]

The baseline computes Eq. 8-11 of Yu et al. (ICCV 2023) step by step: LN_l(x) and LN'_l(P_l) as separate norms, their
sum as an addition of its own, attention as matrix product, softmax, matrix product. It gets the weights of the
converted timm model, and its logits must be equal first (`TOLERANCE`, relative to the largest logit). Then all train in
interleaved rounds: the baseline in float32, `lape` in float32 and with bf16 autocast, and the baseline with bf16
autocast as well, so that precision and implementation can be told apart. Speed-ups are baseline / lape within a round.

Also written: which share of the machine's matrix-product rate (torch.matmul of 2048 x 2048, measured in the same run,
in that precision) each step reaches. Result: benchmarks/results/original_style_<device>_<model>.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lape
from lape.convert.converted import conversion_of
from lape.study.benchmark import Variant, describe_machine, machine, relative_times, time_rounds, training_run
from lape.train.distributed import join_world

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-5


class WrittenOutBlock(nn.Module):
    """x + MSA(LN(x) + P'), then + MLP(LN(x)); P' = LN'(P) goes to the next block."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.pe_norm, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def attend(self, x_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits_BHNN = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return self.proj((logits_BHNN.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x_BND: Tensor, p_1ND: Tensor) -> tuple[Tensor, Tensor]:
        p_1ND = self.pe_norm(p_1ND)
        x_BND = x_BND + self.attend(self.norm1(x_BND) + p_1ND)
        hidden = nn.functional.gelu(self.fc1(self.norm2(x_BND)))
        return x_BND + self.fc2(hidden), p_1ND


class WrittenOut(nn.Module):
    """A ViT with a class token and LaPE; patches by a convolution, logits from the class token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        anatomy = conversion_of(model).anatomy
        width, patch = anatomy.width, anatomy.patch_size
        rows, hidden = anatomy.layout.num_rows, model.blocks[0].mlp.fc1.out_features
        self.patches = nn.Conv2d(model.patch_embed.proj.in_channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, width))
        self.blocks = nn.ModuleList(WrittenOutBlock(width, anatomy.num_heads, hidden) for _ in anatomy.blocks)
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, model.num_classes)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BND = self.patches(pixels_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], dim=1)
        p_1ND = self.pos_embed
        for block in self.blocks:
            x_BND, p_1ND = block(x_BND, p_1ND)
        return self.head(self.norm(x_BND)[:, 0])


def written_out(model: nn.Module) -> WrittenOut:
    """The baseline with the weights of a converted model."""
    baseline = WrittenOut(model)
    ours = {"patches": "patch_embed.proj", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    weights = lape.to_reference_state_dict(model)

    def name_there(name: str) -> str:
        *above, module, kind = name.split(".") if "." in name else ("", name)
        return ".".join([*above, ours.get(module, module), kind]).lstrip(".")

    baseline.load_state_dict({name: weights.pop(name_there(name)) for name in baseline.state_dict()})
    assert not weights, f"the baseline has no place for {', '.join(weights)}"
    return baseline


def largest_difference(model: nn.Module, baseline: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected, got = baseline.eval()(x), model.eval()(x)
    return ((got - expected).abs().max() / expected.abs().max()).item()


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


def run(given: argparse.Namespace, device: torch.device) -> dict:
    torch.manual_seed(0)
    model = lape.create_model(given.model, "LaPE", **given.model_kwargs).to(device)
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
    precisions = {
        "written out, fp32": (baseline, "off"),
        "lape, fp32": (model, "off"),
        "written out, bf16 autocast": (written_out(model).to(device), "bf16"),
        "lape, bf16 autocast": (lape.create_model(given.model, "LaPE", **given.model_kwargs).to(device), "bf16"),
    }
    steps = {}
    for name, (m, precision) in precisions.items():
        m.train()
        steps[name], _ = training_run(Variant(name, m, m), x, precision)
    flops = training_flops(model, x)
    dtypes = {"off": torch.float32, "bf16": torch.bfloat16}
    products = {precision: product(dtype, device, given.product) for precision, dtype in dtypes.items()}
    rates = time_rounds(products, max(3, given.rounds // 2), device)
    rates = {precision: 2 * given.product**3 / min(seconds) for precision, seconds in rates.items()}
    times = time_rounds(steps, given.rounds, device)
    first = next(iter(steps))
    variants = {}
    for name, (_, precision) in precisions.items():
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
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with join_world(given.device) as world:
        found = run(given, world.device)
    where = "cuda" if world.device.type == "cuda" else f"cpu{found['hardware']['cores']}"
    output = given.output or RESULTS / f"original_style_{where}_{given.model}.json"
    output.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["variants"].items():
        low, high = row["speed_up_interval"]
        print(
            f"{name:28} {1e3 * row['seconds']:8.1f} ms a step   {row['speed_up']:.3f} times as fast "
            f"[{low:.3f}, {high:.3f}]   {100 * row['share_of_matmul_rate']:.0f} % of matmul"
        )
    print(f"written: {output.name}")


if __name__ == "__main__":
    main()
