"""What ImageNet-1K x 300 epochs of DeiT-Ti, S and B costs on 1, 4, 8 and 64 GPUs, on paper: docs/scale.md.

    python benchmarks/scale_model.py            write the tables of docs/scale.md
    python benchmarks/scale_model.py --check    exit with 1 when they say something else
    python benchmarks/scale_model.py --rate deit_tiny_patch16_224=6000 --cores 8 --print    other assumptions

Measured by this project: the loader (benchmarks/results/input_pipeline_*.json), one GPU (on_gpu_throughput_h200.json,
for 384 pixels) and two processes on two cores (two_processes_*.json); counted: parameters, products and bytes of a
checkpoint, from the model. Networks, disks and GPUs at 224 pixels are assumptions with a flag.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import torch

import lape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scale.md"
MODELS = {f"deit_{name}_patch16_224": short for name, short in (("tiny", "Ti"), ("small", "S"), ("base", "B"))}
TRAIN, VAL = 1_281_167, 50_000  # images of ImageNet-1K
GPUS = (1, 4, 8, 64)
ADVICE = {
    "compute": "the step is the longest part: more GPUs, or bf16 and --compile",
    "loader": "--decode fast, more cores a GPU, or images resized beforehand",
    "launch": "fewer GPUs, or a larger batch (another recipe); --compile",
    "all-reduce": "faster network, or fewer and fuller GPUs",
    "evaluation": "--dist-eval",
}


@dataclass(frozen=True)
class Assumptions:
    """What was not measured here. The rate of a GPU is that of training, images a second, mixed precision."""

    # Table 5 of the LaPE paper: an epoch of S takes 516 s on 4 V100, of B 590 s on 8, so 621 and 271 images a second
    # and GPU; times 3.7, the ratio of the memory bandwidths in NVIDIA's data sheets (H100 SXM 3.35, V100 0.9 TB/s).
    # Ti took 412 s there, hardly less than S, which points to the loader: twice S is assumed, having half its width.
    rate: dict[str, float] = field(
        default_factory=lambda: {
            "deit_tiny_patch16_224": 2 * 3.7 * 621,
            "deit_small_patch16_224": 3.7 * 621,
            "deit_base_patch16_224": 3.7 * 271,
        }
    )
    cores: int = 16  # for the loader of each GPU; speed is taken to grow with them
    global_batch: int = 1024  # DeiT's, on any number of GPUs
    least_step: float = 0.03  # seconds that launching the kernels of a step takes, however few its images are
    gpus_a_node: int = 8
    inside: float = 150e9  # bytes a second of an all-reduce within a node
    between: float = 25e9  # and between nodes, for each of them
    disk: float = 1e9  # bytes a second of writing a checkpoint
    dist_eval: bool = False  # evaluation is shared by the processes


@dataclass(frozen=True)
class Parts:
    """What was measured, of one model."""

    parameters: int
    checkpoint_bytes: int  # weights, their average, two moments of AdamW
    train_images_a_core: float
    eval_images_a_core: float  # of the exact path: a training is measured on it


@dataclass(frozen=True)
class Cost:
    """Hours of 300 epochs, and seconds of the parts."""

    loader: float  # of a step
    compute: float
    all_reduce: float
    evaluation: float  # of an epoch
    checkpoint: float
    hours: float
    limit: str  # what it waits for most


@cache
def measured(decode: str) -> dict[str, Parts]:
    """Read the loader's speed from the newest result file and count the models."""
    files = sorted(RESULTS.glob("input_pipeline_*.json"))
    speed = json.loads(files[-1].read_text())["speed"]
    train = speed["train"]["fast, 8 bit" if decode == "fast" else "exact"]["images_a_second_and_core"]
    parts = {}
    for name in MODELS:
        with torch.device("meta"):
            model = lape.create_model(name, "LaPE")
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts[name] = Parts(
            count, 4 * (2 * count + 2 * trained), train, speed["eval"]["exact"]["images_a_second_and_core"]
        )
    return parts


def cost(parts: Parts, rate: float, gpus: int, given: Assumptions, epochs: int = 300) -> Cost:
    """Steps overlap with loading, not with anything else: all-reduce is added in full, which is pessimistic."""
    batch = given.global_batch / gpus
    steps = TRAIN // given.global_batch
    loader = batch / (given.cores * parts.train_images_a_core)
    computing = batch / rate
    compute = max(computing, given.least_step)
    all_reduce = 0.0
    if gpus > 1:
        within = gpus <= given.gpus_a_node
        ring = 2 * (gpus - 1) / gpus * 4 * parts.parameters
        all_reduce = ring / (given.inside if within else given.between)
    shared = gpus if given.dist_eval else 1
    images = 2 * VAL / shared  # raw and averaged weights
    evaluation = max(images / (3 * rate), images / (given.cores * parts.eval_images_a_core))
    checkpoint = 1.25 * parts.checkpoint_bytes / given.disk  # and best_checkpoint.pth, now and then
    step = max(loader, compute + all_reduce)
    seconds = epochs * (steps * step + evaluation + checkpoint)
    waits = {"evaluation": evaluation, "loader": steps * (step - compute - all_reduce)}
    if step > loader:  # else the GPU waits for its images, and a faster one would gain nothing
        waits |= {
            "compute": steps * computing,
            "launch": steps * (compute - computing),
            "all-reduce": steps * all_reduce,
        }
    return Cost(loader, compute, all_reduce, evaluation, checkpoint, seconds / 3600, max(waits, key=lambda k: waits[k]))


def table(given: Assumptions, decode: str) -> str:
    parts = measured(decode)
    lines = [
        "| model | GPUs | loader, ms a step | GPU, ms | all-reduce, ms | evaluation, s | checkpoint, s "
        "| hours | GPU-hours | most time goes to | then |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, short in MODELS.items():
        for gpus in GPUS:
            found = cost(parts[name], given.rate[name], gpus, given)
            times = [f"{1e3 * value:.1f}" for value in (found.loader, found.compute, found.all_reduce)]
            lines.append(
                f"| DeiT-{short} | {gpus} | {' | '.join(times)} | {found.evaluation:.0f} | {found.checkpoint:.1f} "
                f"| {found.hours:.1f} | {gpus * found.hours:.0f} | {found.limit} | {ADVICE[found.limit]} |"
            )
    return "\n".join(lines)


def assumed() -> str:
    """The assumptions and the measured parts, as lists."""
    given, fast, exact = Assumptions(), measured("fast"), measured("exact")
    tiny = next(iter(MODELS))
    lines = ["Not measured here, assumed:", ""]
    rates = ", ".join(f"{short} {given.rate[name]:.0f}" for name, short in MODELS.items())
    lines += [
        f"- an H100 trains {rates} images a second (where from: `benchmarks/scale_model.py`) and evaluates three times",
        "  as many;",
        f"- {given.cores} cores a GPU, {given.gpus_a_node} GPUs a node; loaders scale with the cores;",
        f"- launching the kernels of a step takes at least {1e3 * given.least_step:.0f} ms;",
        f"- all-reduce at {given.inside / 1e9:.0f} GB/s within a node, {given.between / 1e9:.0f} GB/s between nodes, "
        "float32 gradients, nothing overlapped;",
        f"- checkpoints are written at {given.disk / 1e9:.0f} GB/s.",
        "",
        "Measured here, by `benchmarks/input_pipeline.py` (its file in `benchmarks/results` names the core):",
        "",
        f"- training images a second and core: {fast[tiny].train_images_a_core:.0f} with `--decode fast`, "
        f"{exact[tiny].train_images_a_core:.0f} with `exact`; validation images: {exact[tiny].eval_images_a_core:.0f};",
    ]
    sizes = ", ".join(
        f"{short} {fast[name].parameters / 1e6:.1f} M and {fast[name].checkpoint_bytes / 1e6:.0f} MB"
        for name, short in MODELS.items()
    )
    lines.append(f"- parameters and bytes of a checkpoint: {sizes}.")
    return "\n".join(lines)


def loader() -> str:
    """Whether 16 cores feed one H100 with DeiT-Ti."""
    given = Assumptions()
    name = next(iter(MODELS))
    lines = [
        "| `--decode` | images a second, 16 cores | DeiT-Ti on an H100, assumed | the loader has |",
        "|---|---|---|---|",
    ]
    for decode in ("exact", "fast"):
        cores = given.cores * measured(decode)[name].train_images_a_core
        verdict = "room" if cores > given.rate[name] else "too little"
        lines.append(
            f"| {decode} | {cores:.0f} | {given.rate[name]:.0f} | {verdict}: x {cores / given.rate[name]:.2f} |"
        )
    return "\n".join(lines)


def evaluation_shared() -> str:
    given = Assumptions()
    found = [
        cost(measured("fast")[name], given.rate[name], 64, Assumptions(dist_eval=shared)).hours
        for name in MODELS
        for shared in (False, True)
    ]
    cells = [
        f"DeiT-{short} {found[2 * i]:.1f} -> {found[2 * i + 1]:.1f} hours" for i, short in enumerate(MODELS.values())
    ]
    return "On 64 GPUs `--dist-eval` alone: " + ", ".join(cells) + "."


def cores() -> str:
    """DeiT-Ti on 8 GPUs with fewer cores."""
    name = next(iter(MODELS))
    lines = ["| cores a GPU | `exact`, hours | waits for | `fast`, hours | waits for |", "|---|---|---|---|---|"]
    for count in (2, 4, 8, 16):
        given = Assumptions(cores=count)
        found = [cost(measured(decode)[name], given.rate[name], 8, given) for decode in ("exact", "fast")]
        lines.append(f"| {count} | " + " | ".join(f"{one.hours:.1f} | {one.limit}" for one in found) + " |")
    return "\n".join(lines)


LARGE = {"deit_base_patch16_224": "DeiT-B", "deit3_large_patch16_384": "DeiT III-L"}
LARGE_SIDE, LARGE_EPOCHS = 384, 30  # DeiT fine-tunes for so long at that size
MEMORY = 80e9  # bytes of an H100


def large() -> str:
    """B and L at 384 pixels, with the rate of products and the memory that one GPU was measured to have with DeiT-B."""
    given = Assumptions()
    rows = json.loads((RESULTS / "on_gpu_throughput_h200.json").read_text())["results"]["DeiT-B"]["rows"]
    eager = {row["batch"]: row["LaPE"] for row in rows if (row["mode"], row["way"]) == ("training", "eager")}
    speed = eager[256]["flops_per_second"]
    kept = (eager[512]["peak_bytes"] - eager[128]["peak_bytes"]) / (512 - 128)  # of an image, by 12 layers
    lines = [
        "| model | GPUs | images at once, DDP | FSDP2 | GPU, ms a step | exchange, DDP, ms | FSDP2, ms "
        "| state a GPU, DDP, GB | FSDP2, GB | hours, DDP | FSDP2 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, short in LARGE.items():
        with torch.device("meta"):
            model = lape.create_model(name, "LaPE", img_size=LARGE_SIDE)
        depth, width, tokens = len(model.blocks), model.embed_dim, (LARGE_SIDE // 16) ** 2 + 1
        rate = speed / (6 * depth * (12 * width**2 * tokens + 2 * width * tokens**2))
        image = kept * depth * width * tokens / (12 * 768 * 197)
        count = sum(p.numel() for p in model.parameters())
        for gpus in GPUS:
            batch, away = given.global_batch / gpus, (gpus - 1) / gpus
            bandwidth = given.inside if gpus <= given.gpus_a_node else given.between
            states = (20 * count, 20 * count / gpus)  # float32: weights, gradients, two moments, average
            at_once = [min(batch, (MEMORY - state) // image) for state in states]
            parts = -(-batch // at_once[1])
            # DDP: a float32 all-reduce. FSDP2: bf16 weights before each forward and backward, float32 gradients once
            exchanges = [away * 8 * count / bandwidth, away * (parts * 4 + 4) * count / bandwidth]
            step = max(batch / rate, given.least_step)
            hours = [LARGE_EPOCHS * (TRAIN // given.global_batch) * (step + one) / 3600 for one in exchanges]
            cells = [f"{at_once[0]:.0f}", f"{at_once[1]:.0f}", f"{1e3 * step:.0f}"]
            cells += [f"{1e3 * one:.1f}" for one in exchanges] + [f"{one / 1e9:.1f}" for one in states]
            lines.append(f"| {short} | {gpus} | {' | '.join(cells + [f'{one:.1f}' for one in hours])} |")
    return "\n".join(lines)


def two_processes() -> str:
    """What `benchmarks/two_processes.py` measured."""
    found = json.loads(sorted(RESULTS.glob("two_processes_*.json"))[-1].read_text())
    rates, config = found["images_per_second"], found["config"]
    rows = [f"| {name} | {rate:.1f} |" for name, rate in rates.items()]
    strong, weak = found["strong_speed_up"], found["weak_efficiency"]
    spread = [f"{min(one['all']):.2f} to {max(one['all']):.2f}" for one in (strong, weak)]
    share = found["bytes_a_step"] / found["bytes_of_trained_parameters"]
    return "\n".join(
        [
            "| processes, images a step | images a second |",
            "|---|---|",
            *rows,
            "",
            f"Two processes are {strong['median']:.2f} times as fast as one with the same step ({spread[0]}), and keep",
            f"{weak['median']:.2f} of one's rate each ({spread[1]}): {config['model']} at {config['pixels']} pixels,",
            f"{config['rounds']} rounds, load before {found['load_before'][0]:.1f}, {found['hardware']['processor']}.",
            f"Gradients of a step: {found['bytes_a_step'] / 1e6:.2f} MB in {found['messages_a_step']:.1f} messages, "
            f"{share:.3f} times 4 bytes a trained parameter.",
        ]
    )


SECTIONS = {
    "loader": loader,
    "assumed": assumed,
    "evaluation": evaluation_shared,
    "cores": cores,
    "hours": lambda: table(Assumptions(), "fast"),
    "large": large,
    "processes": two_processes,
}


def filled(text: str) -> str:
    """The page with every marked part written anew."""
    for name, write in SECTIONS.items():
        start, end = f"<!-- {name}: written by benchmarks/scale_model.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
        assert pattern.search(text), f"docs/scale.md has no {start} ... {end}"
        text = pattern.sub(lambda _, s=start, w=write, e=end: f"{s}\n{w()}\n{e}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", action="store_true", help="print one table under the flags, write nothing")
    parser.add_argument("--decode", choices=("exact", "fast"), default="fast")
    parser.add_argument(
        "--rate", nargs="+", default=[], metavar="MODEL=IMAGES", help="training images a second and GPU"
    )
    numbers = [one for one in fields(Assumptions) if one.name not in ("rate", "dist_eval")]
    for one in numbers:
        kind = int if isinstance(one.default, int) else float
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=kind, default=one.default)
    parser.add_argument("--dist-eval", action="store_true")
    arguments = parser.parse_args()
    if arguments.print:
        rate = {**Assumptions().rate, **{k: float(v) for k, v in (text.split("=") for text in arguments.rate)}}
        values = {one.name: getattr(arguments, one.name) for one in numbers}
        print(table(Assumptions(rate=rate, dist_eval=arguments.dist_eval, **values), arguments.decode))
        return
    new = filled(PAGE.read_text())
    if arguments.check:
        sys.exit(new != PAGE.read_text())
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
