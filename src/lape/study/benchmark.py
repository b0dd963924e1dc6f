"""What a join costs: parameters, MACs, speed, latency and memory, beside the same ViT of other libraries.

Every variant is timed once a round, in an order that is drawn anew for each round, and compared with the first one
within the round: what else the machine does falls on all alike. Shape legend: B batch, C classes, D width, L layers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.convert import create_model, fold_
from lape.errors import LapeError
from lape.hosts import host_of_library
from lape.joins import JOINS, join_named
from lape.names import match_name
from lape.record import RECORD, conversion_of
from lape.train.distributed import join_world
from lape.train.evaluate import autocast
from lape.train.machine import environment

PEERS = ("timm", "torchvision", "transformers")
PRECISIONS = ("none", "bf16", "fp16")
WARM_UP = 3  # calls of each variant before the first round; compilation falls into them
SHORTEST = 0.05  # seconds: a quicker call is repeated within its round until it takes about as long
RESAMPLES = 2000


@dataclass
class Variant:
    """One model of a run, on its device."""

    name: str
    model: nn.Module
    call: Callable[[Tensor], Tensor]  # (B, C, height, width) -> logits (B, classes); compiled where asked for
    learns: bool = True  # a folded model is for inference only
    numbers: dict[str, Any] = field(default_factory=dict)


def benchmark(
    model: str,
    joins: Sequence[str] = ("basic", "LaPE"),
    *,
    pe: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    fold: bool = False,
    compiled: bool = False,
    amp: str = "none",
    batch_size: int = 64,
    image_size: int | None = None,
    device: str = "auto",
    rounds: int = 20,
    train: bool = True,
    inference: bool = True,
    peers: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures joins of a timm model, and the same ViT of other libraries, in one run on one machine.

    Args:
        model, pe, model_kwargs: as for `lape.create_model`.
        joins: the first one is what all others are compared with.
        fold: the folded form of each join with LN' as well (inference only).
        compiled: all variants go through torch.compile.
        amp: "none", "bf16" or "fp16": torch's autocast; fp16 needs CUDA and trains with a gradient scaler.
        image_size: pixels, None: the model's own.
        rounds: how often each variant is timed, 3 or more.
        train: a training step: forward, cross-entropy, backward, AdamW.
        inference: images a second at `batch_size`, and the latency of a single image.
        peers: of "timm" (the unconverted model), "torchvision", "transformers": random weights, the same depth, width,
            heads, MLP and patch. One that is not installed is left out, with a line.

    Returns:
        Plain JSON: the settings, hardware and versions, and one entry a variant with parameters, macs (multiplications
        and additions of one image, counted by torch in matrix products and convolutions), seconds and ratios.
    Raises LapeError for wrong input, and when the device's memory does not suffice.
    """
    names = list(dict.fromkeys(join_named(join).name for join in joins))
    wanted = list(dict.fromkeys(match_name("peer", peer, PEERS) for peer in peers))
    precision = match_name("amp", amp, PRECISIONS).replace("none", "off")
    _check(names, rounds, batch_size, image_size, train, inference)
    with join_world(device) as world:
        autocast(precision, world.device)
        kwargs = dict(model_kwargs or {}) | ({} if image_size is None else {"img_size": image_size})
        made = _variants(model, names, pe, kwargs, fold)
        made |= _peers(wanted, model, kwargs, next(iter(made.values())), say)
        variants = [
            Variant(name, model_.to(world.device), _caller(model_, compiled), learns=not _is_folded(model_))
            for name, model_ in made.items()
        ]
        size = _input_size(variants[0].model)
        found = machine(world.device, [name for name in wanted if name in made])
        say(f"{model}, {size[1]} x {size[2]} pixels, {describe_machine(found)}")
        with _memory_errors():
            measure(variants, size, batch_size, rounds, precision, world.device, train, inference)
    settings = {
        "model": model,
        "joins": names,
        "pe": pe,
        "model_kwargs": kwargs,
        "fold": fold,
        "compile": compiled,
        "amp": amp,
        "batch_size": batch_size,
        "rounds": rounds,
        "train": train,
        "inference": inference,
        "peers": wanted,
        "input_size": list(size),
        "reference": variants[0].name,
    }
    return {"settings": settings, **found, "variants": {v.name: v.numbers for v in variants}}


def _check(
    names: list[str], rounds: int, batch_size: int, image_size: int | None, train: bool, inference: bool
) -> None:
    if not names:
        raise LapeError(f"no join was given: use one or more of {', '.join(JOINS)}")
    if rounds < 3:
        raise LapeError(f"--rounds {rounds} is not allowed: give 3 or more, a spread needs them")
    if batch_size < 1:
        raise LapeError(f"--batch-size {batch_size} is not allowed: give 1 or more")
    if image_size is not None and image_size < 1:
        raise LapeError(f"--image-size {image_size} is not allowed: give pixels, a multiple of the model's patch")
    if not (train or inference):
        raise LapeError("nothing to measure: leave out --no-train or --no-inference")


# ------------------------------------------------------------------------------------------------ what is measured


def _variants(
    name: str, joins: Sequence[str], pe: str | None, kwargs: dict[str, Any], fold: bool
) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for join in joins:
        torch.manual_seed(0)  # the same host weights in each
        made[join] = create_model(name, join, pe, **kwargs)
        if fold and JOINS[join].normalised:
            made[f"{join} folded"] = fold_(copy.deepcopy(made[join]))
    return made


def _peers(
    wanted: Sequence[str], name: str, kwargs: dict[str, Any], converted: nn.Module, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """The same Vision Transformer without `lape`, from each library that is here."""
    made: dict[str, nn.Module] = {}
    for library in wanted:
        if importlib.util.find_spec(library) is None:
            say(f"{library} is not installed, so its ViT is left out: pip install {library}")
            continue
        if library == "timm":
            build = host_of_library("timm").build
            assert build is not None
            made[library] = build(name, kwargs)
        else:
            made[library] = _BUILDERS[library](_dimensions(name, converted))
    return made


@dataclass(frozen=True)
class _Dimensions:
    image: int
    patch: int
    channels: int
    width: int
    layers: int
    heads: int
    hidden: int
    classes: int


def _dimensions(name: str, converted: nn.Module) -> _Dimensions:
    """Raises LapeError for a model that torchvision's and transformers' plain ViT cannot be."""
    anatomy = conversion_of(converted).anatomy
    (rows, columns), (patch, patch_width) = anatomy.layout.grid, anatomy.patch_size
    hidden = getattr(getattr(anatomy.root.get_submodule(anatomy.blocks[0]), "mlp", None), "fc1", None)
    plain = type(converted).__name__ == "VisionTransformer" and isinstance(hidden, nn.Linear)
    if not plain or rows != columns or patch != patch_width or anatomy.layout.num_prefix != 1:
        raise LapeError(
            f"--peers torchvision and transformers have the plain ViT only (square, one class token), {name} is none: "
            "use --peers timm"
        )
    assert isinstance(hidden, nn.Linear)
    return _Dimensions(
        image=rows * patch,
        patch=patch,
        channels=_input_size(converted)[0],
        width=anatomy.width,
        layers=len(anatomy.blocks),
        heads=anatomy.num_heads,
        hidden=hidden.out_features,
        classes=getattr(converted, "num_classes", 1000),
    )


def _torchvision(d: _Dimensions) -> nn.Module:
    from torchvision.models import VisionTransformer

    if d.channels != 3:
        raise LapeError(f"--peers torchvision: its ViT takes 3 channels, not {d.channels}: leave it out")
    return VisionTransformer(d.image, d.patch, d.layers, d.heads, d.width, d.hidden, num_classes=d.classes)


def _transformers(d: _Dimensions) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config: Any = ViTConfig(
        hidden_size=d.width,
        num_hidden_layers=d.layers,
        num_attention_heads=d.heads,
        intermediate_size=d.hidden,
        image_size=d.image,
        patch_size=d.patch,
        num_channels=d.channels,
    )
    config.num_labels = d.classes
    return ViTForImageClassification(config)


_BUILDERS: dict[str, Callable[[_Dimensions], nn.Module]] = {"torchvision": _torchvision, "transformers": _transformers}


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a converted model is for."""
    anatomy = conversion_of(model).anatomy
    stem = next((m for m in anatomy.root.modules() if isinstance(m, nn.Conv2d)), None)
    (rows, columns), (height, width) = anatomy.layout.grid, anatomy.patch_size
    return (3 if stem is None else stem.in_channels), rows * height, columns * width


def _is_folded(model: nn.Module) -> bool:
    return RECORD in model.__dict__ and conversion_of(model).folded


def _caller(model: nn.Module, compiled: bool) -> Callable[[Tensor], Tensor]:
    run = torch.compile(model) if compiled else model

    def call(pixels_BCHW: Tensor) -> Tensor:
        output = run(pixels_BCHW)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    return call


# ------------------------------------------------------------------------------------------------ how it is measured


def measure(
    variants: Sequence[Variant],
    size: tuple[int, int, int],
    batch_size: int,
    rounds: int,
    precision: str,
    device: torch.device,
    train: bool,
    inference: bool,
) -> None:
    """Fills `numbers` of each variant. `size` is (channels, height, width), `precision` "off", "bf16" or "fp16"."""
    torch.manual_seed(0)
    one, many = (torch.randn(n, *size, device=device) for n in (1, batch_size))
    for variant in variants:
        variant.model.eval()
        parameters = list(variant.model.parameters())
        variant.numbers |= {"parameters": sum(p.numel() for p in parameters), "macs": macs(variant.model, one)}
    if inference:
        for name, x in (("inference", many), ("latency", one)):
            runs = {v.name: inference_run(v, x, precision) for v in variants}
            for variant in variants:
                variant.model.eval()
                memory = peak_memory(runs[variant.name], variant.model, device)
                variant.numbers[name] = {"batch": len(x), "peak_bytes": memory}
            _add_times(variants, name, time_rounds(runs, rounds, device))
    if train:
        learning = [v for v in variants if v.learns]
        runs = {}
        for variant in learning:
            variant.model.train()
            runs[variant.name], optimizer = training_run(variant, many, precision)
            memory = peak_memory(runs[variant.name], variant.model, device, optimizer)
            variant.numbers["training"] = {"batch": len(many), "peak_bytes": memory}
        _add_times(learning, "training", time_rounds(runs, rounds, device))


def _add_times(variants: Sequence[Variant], name: str, times: dict[str, list[float]]) -> None:
    first = variants[0]
    for variant in variants:
        numbers = variant.numbers[name]
        numbers |= compare(times[variant.name], times[first.name])
        numbers["images_per_second"] = numbers["batch"] / numbers["seconds"]
        numbers["memory_ratio"] = numbers["peak_bytes"] / first.numbers[name]["peak_bytes"]


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiplications with additions of one forward, as torch's FlopCounterMode finds them (two FLOPs each)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention as plain matrix products: the counter does not know every fused kernel, MultiheadAttention's for one.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops() // 2)


def inference_run(variant: Variant, x: Tensor, precision: str = "off") -> Callable[[], None]:
    """One forward in inference mode."""

    def run() -> None:
        with torch.inference_mode(), autocast(precision, x.device):
            variant.call(x)

    return run


def training_run(
    variant: Variant, x: Tensor, precision: str = "off"
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """One training step with AdamW, and its optimizer."""
    optimizer = torch.optim.AdamW([p for p in variant.model.parameters() if p.requires_grad], lr=1e-5)
    scaler = torch.amp.GradScaler(x.device.type, enabled=precision == "fp16")
    target_B = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, x.device):
            loss = F.cross_entropy(variant.call(x).float(), target_B)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return run, optimizer


def time_rounds(
    runs: dict[str, Callable[[], None]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of each call: one value a round, the order drawn anew each round; warm-up apart."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    quickest = min(_seconds(run, 1, device) for run in runs.values())
    repeats = max(1, round(SHORTEST / max(quickest, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, draw = list(runs), random.Random(seed)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(_seconds(runs[name], repeats, device))
    return times


def _seconds(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(mine: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Median seconds, and the median ratio to the reference within a round with its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(mine, reference, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    interval = [medians[int(RESAMPLES * 0.025)], medians[int(RESAMPLES * 0.975) - 1]]
    return {
        "seconds": statistics.median(mine),
        "seconds_quartiles": [statistics.quantiles(mine, n=4)[i] for i in (0, 2)],
        "ratio": statistics.median(ratios),
        "ratio_interval": interval,
        "seconds_each_round": list(mine),
    }


def peak_memory(
    run: Callable[[], None], model: nn.Module, device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Bytes of tensors at the fullest moment of a call, weights, buffers and the optimizer's state counted in.

    CUDA: torch's own peak. CPU: the sum over what torch's allocator reports to its profiler, allocation by allocation;
    what libraries keep for themselves (thread pools, packed weights) is in neither.
    """
    for _ in range(2):  # the optimizer's state, and what is compiled or chosen at first use
        run()
    gradients = {id(p): p.grad for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    gradients.clear()
    kept = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        kept += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    static = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return static + torch.cuda.max_memory_allocated(device) - before
    return static + _peak_on_cpu(run)


def _peak_on_cpu(run: Callable[[], None]) -> int:
    with tempfile.TemporaryDirectory() as folder, _silent():
        path = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    if not changes:
        raise RuntimeError("torch's profiler reported no allocation")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's library writes to the process's stderr."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise LapeError("the device's memory does not suffice: use a smaller --batch-size, or fewer --joins") from None


# ------------------------------------------------------------------------------------------------ what is shown


def machine(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Versions (of these packages as well), hardware, threads, the load before, and the commit."""
    found = environment()
    found["versions"] |= {name: metadata.version(name) for name in packages}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    found["hardware"] |= {"device": str(device), "gpu": gpu, "threads": torch.get_num_threads(), "load_before": load}
    return found


def describe_machine(found: dict[str, Any]) -> str:
    """Hardware and versions in one line."""
    hardware, versions = found["hardware"], found["versions"]
    where = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} of {hardware['cores']} cores"
    libraries = ", ".join(f"{name} {versions[name]}" for name in versions if name not in ("python", "numpy"))
    return f"{where}; {libraries}"


def table(found: dict[str, Any]) -> list[str]:
    """Lines for a terminal: one a variant, ratios to the first one with their interval."""
    settings, variants = found["settings"], found["variants"]
    head = ["", "parameters", "MACs"]
    parts = [(name, title) for name, title in _PARTS if any(name in numbers for numbers in variants.values())]
    for name, title in parts:
        batch = next(numbers[name]["batch"] for numbers in variants.values() if name in numbers)
        head += [f"{title}, batch {batch}", "time ratio [95 %]", "peak MB", "ratio"]
    rows = [head]
    for name, numbers in variants.items():
        row = [name, f"{numbers['parameters']:,}", _scaled(numbers["macs"])]
        for part, _ in parts:
            row += _cells(part, numbers.get(part))
        rows.append(row)
    amp = "" if settings["amp"] == "none" else f", {settings['amp']} autocast"
    how = f"{'compiled' if settings['compile'] else 'eager'}{amp}, {settings['rounds']} interleaved rounds"
    note = f"{how}; ratios to {settings['reference']}; MACs of one image, in matrix products and convolutions"
    return [*_aligned(rows, len(parts)), note]


def _scaled(count: int) -> str:
    return f"{count / 1e9:.3f} G" if count >= 1e8 else f"{count / 1e6:.3f} M"


_PARTS = (("inference", "inference"), ("latency", "latency"), ("training", "training"))


def _cells(part: str, numbers: dict[str, Any] | None) -> list[str]:
    if numbers is None:
        return ["-"] * 4
    low, high = numbers["ratio_interval"]
    speed = f"{numbers['images_per_second']:.1f} img/s" if part != "latency" else f"{1e3 * numbers['seconds']:.2f} ms"
    memory = [f"{numbers['peak_bytes'] / 1e6:.1f}", f"{numbers['memory_ratio']:.4f}"]
    return [speed, f"{numbers['ratio']:.3f} [{low:.3f}, {high:.3f}]", *memory]


def _aligned(rows: list[list[str]], parts: int) -> list[str]:
    """One block a part below each other, so that lines stay short."""
    lines: list[str] = []
    blocks: Iterable[range] = [range(1, 3), *(range(3 + 4 * i, 7 + 4 * i) for i in range(parts))]
    for block in blocks:
        shown = [[row[0], *(row[i] for i in block)] for row in rows]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        for row in shown:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
        lines.append("")
    return lines[:-1]
