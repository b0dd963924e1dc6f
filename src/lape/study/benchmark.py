"""What a join costs: parameters, MACs, speed, latency and memory, beside the same ViT of other libraries.

Every variant is timed once a round, in an order that is drawn anew for each round, and compared with the first one
within the round: what else the machine does falls on all alike. Shape legend: B batch, C classes, D width, L layers.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.convert.apply import create_model, fold_
from lape.convert.converted import conversion_of, conversions
from lape.core.joins import JOINS, join_named
from lape.errors import LapeError
from lape.files.restore import logits_of
from lape.names import match_name
from lape.study.options import BenchOptions
from lape.train.distributed import join_world
from lape.train.evaluate import autocast
from lape.train.machine import environment

PEERS = ("timm", "torchvision", "transformers")
PRECISIONS = ("none", "bf16", "fp16")
WARM_UP = 3  # calls of each variant before the first round; compilation falls into them
SHORTEST = 0.05  # seconds: a quicker call is repeated within its round until it takes about as long
RESAMPLES = 2000
MINOR_PACKAGES = ("python", "numpy", "pillow", "cuda", "cudnn")  # versions that the line on the machine leaves out


@dataclass
class Variant:
    """One model of a run, on its device."""

    name: str
    model: nn.Module
    call: Callable[[Tensor], Tensor]  # (B, C, height, width) -> logits (B, classes); compiled where asked for
    learns: bool = True  # a folded model is for inference only
    numbers: dict[str, Any] = field(default_factory=dict)


def benchmark(options: BenchOptions, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures joins of a timm model, and the same ViT of other libraries, in one run on one machine.

    A peer has random weights and the same depth, width, heads, MLP and patch; one that is not installed is left out,
    with a line. A training step is forward, cross-entropy, backward and AdamW.

    Returns plain JSON: the settings, hardware and versions, and one entry a variant with parameters, macs
    (multiplications and additions of one image, counted by torch in matrix products and convolutions), seconds and
    ratios to the first join. Raises LapeError for wrong input, and when the device's memory does not suffice.
    """
    _check(options)
    joins = list(dict.fromkeys(join_named(join).name for join in options.joins))
    peers = list(dict.fromkeys(match_name("peer", peer, PEERS) for peer in options.peers))
    precision = match_name("amp", options.amp, PRECISIONS).replace("none", "off")
    if options.threads:
        torch.set_num_threads(options.threads)
    with join_world(options.device) as world:
        autocast(precision, world.device)
        size = {} if options.image_size is None else {"img_size": options.image_size}
        kwargs = dict(options.model_kwargs or {}) | size
        models = _models_by_join(options.model, joins, options.pe, kwargs, options.fold)
        models |= _peers(peers, options.model, kwargs, next(iter(models.values())), say)
        variants = [
            Variant(
                name,
                model.to(world.device),
                _caller(model, options.compile),
                learns=not any(c.folded for c in conversions(model)),
            )
            for name, model in models.items()
        ]
        input_size = _input_size(variants[0].model)
        about = machine(world.device, [peer for peer in peers if peer in models])
        say(f"{options.model}, {input_size[1]} x {input_size[2]} pixels, {describe_machine(about)}")
        with _memory_errors():
            measure(variants, input_size, options, precision, world.device)
    settings = asdict(options) | {"joins": joins, "model_kwargs": kwargs, "peers": peers}
    settings |= {"input_size": list(input_size), "reference": variants[0].name}
    redundant = ("image_size", "device", "threads")  # they show in the input size and the hardware
    settings = {name: value for name, value in settings.items() if name not in redundant}
    return {"settings": settings, **about, "variants": {v.name: v.numbers for v in variants}}


def _check(options: BenchOptions) -> None:
    if not options.joins:
        raise LapeError(f"no join was given: use one or more of {', '.join(JOINS)}")
    for name, least, rule in (
        ("rounds", 3, "3 or more, a spread needs them"),
        ("batch_size", 1, "1 or more"),
        ("image_size", 1, "pixels, a multiple of the model's patch"),
        ("threads", 0, "0 or more"),
    ):
        value = getattr(options, name)
        if value is not None and value < least:
            raise LapeError(f"--{name.replace('_', '-')} {value} is not allowed: give {rule}")
    if not (options.train or options.inference):
        raise LapeError("nothing to measure: leave out --no-train or --no-inference")


# ------------------------------------------------------------------------------------------------ what is measured


def _models_by_join(
    name: str, joins: Sequence[str], pe: str | None, kwargs: dict[str, Any], fold: bool
) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {}
    for join in joins:
        torch.manual_seed(0)  # the same host weights in each
        models[join] = create_model(name, join, pe, **kwargs)
        if fold and JOINS[join].normalised:
            models[f"{join} folded"] = fold_(copy.deepcopy(models[join]))
    return models


def _peers(
    libraries: Sequence[str], name: str, kwargs: dict[str, Any], model: nn.Module, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """The same Vision Transformer without `lape`, from each library that is here."""
    models: dict[str, nn.Module] = {}
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            say(f"{library} is not installed, so its ViT is left out: pip install {library}")
        elif library == "timm":
            import timm

            models[library] = timm.create_model(name, **kwargs)
        else:
            make = {"torchvision": _torchvision, "transformers": _transformers}[library]
            models[library] = make(_sizes(name, model), getattr(model, "num_classes", 1000))
    return models


def _sizes(name: str, model: nn.Module) -> dict[str, Any]:
    """By their names in transformers. Raises LapeError for a model that its and torchvision's plain ViT cannot be."""
    anatomy = conversion_of(model).anatomy
    (rows, columns), (patch, patch_width) = anatomy.layout.grid, anatomy.patch_size
    hidden = getattr(getattr(anatomy.root.get_submodule(anatomy.blocks[0]), "mlp", None), "fc1", None)
    plain = type(model).__name__ == "VisionTransformer" and isinstance(hidden, nn.Linear)
    if not plain or rows != columns or patch != patch_width or anatomy.layout.num_prefix != 1:
        raise LapeError(
            f"--peers torchvision and transformers have the plain ViT only (square, one class token), {name} is none: "
            "use --peers timm"
        )
    assert isinstance(hidden, nn.Linear)
    return {
        "image_size": rows * patch,
        "patch_size": patch,
        "num_channels": _input_size(model)[0],
        "hidden_size": anatomy.width,
        "num_hidden_layers": len(anatomy.blocks),
        "num_attention_heads": anatomy.num_heads,
        "intermediate_size": hidden.out_features,
    }


def _torchvision(sizes: dict[str, Any], classes: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    if (channels := sizes["num_channels"]) != 3:
        raise LapeError(f"--peers torchvision: its ViT takes 3 channels, not {channels}: leave it out")
    order = "image_size patch_size num_hidden_layers num_attention_heads hidden_size intermediate_size".split()
    image, patch, layers, heads, width, hidden = (sizes[name] for name in order)
    return VisionTransformer(image, patch, layers, heads, width, hidden, num_classes=classes)


def _transformers(sizes: dict[str, Any], classes: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config: Any = ViTConfig(**sizes)
    config.num_labels = classes
    return ViTForImageClassification(config)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a converted model is for."""
    anatomy = conversion_of(model).anatomy
    stem = next((m for m in anatomy.root.modules() if isinstance(m, nn.Conv2d)), None)
    (rows, columns), (height, width) = anatomy.layout.grid, anatomy.patch_size
    return (3 if stem is None else stem.in_channels), rows * height, columns * width


def _caller(model: nn.Module, compiled: bool) -> Callable[[Tensor], Tensor]:
    run = torch.compile(model) if compiled else model
    return lambda pixels_BCHW: logits_of(run(pixels_BCHW))


# ------------------------------------------------------------------------------------------------ how it is measured


def measure(
    variants: Sequence[Variant], size: tuple[int, int, int], options: BenchOptions, precision: str, device: torch.device
) -> None:
    """Fills `numbers` of each variant. `size` is (channels, height, width), `precision` "off", "bf16" or "fp16"."""
    torch.manual_seed(0)
    image, batch = (torch.randn(n, *size, device=device) for n in (1, options.batch_size))
    for variant in variants:
        variant.model.eval()
        parameters = sum(p.numel() for p in variant.model.parameters())
        variant.numbers |= {"parameters": parameters, "macs": macs(variant.model, image)}
    parts = [("inference", batch), ("latency", image)] if options.inference else []
    for part, x in [*parts, ("training", batch)] if options.train else parts:
        runs: dict[str, Callable[[], None]] = {}
        participants = [v for v in variants if v.learns or part != "training"]
        for variant in participants:
            variant.model.train(part == "training")
            optimizer = None
            if part == "training":
                runs[variant.name], optimizer = training_run(variant, x, precision)
            else:
                runs[variant.name] = inference_run(variant, x, precision)
            memory = peak_memory(runs[variant.name], variant.model, device, optimizer)
            variant.numbers[part] = {"batch": len(x), "peak_bytes": memory}
        _add_times(participants, part, time_rounds(runs, options.rounds, device))


def _add_times(variants: Sequence[Variant], part: str, times: dict[str, list[float]]) -> None:
    first = variants[0]
    for variant in variants:
        numbers = variant.numbers[part]
        numbers |= relative_times(times[variant.name], times[first.name])
        numbers["images_per_second"] = numbers["batch"] / numbers["seconds"]
        numbers["memory_ratio"] = numbers["peak_bytes"] / first.numbers[part]["peak_bytes"]


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiplications with additions of one forward, as torch's FlopCounterMode finds them (two FLOPs each)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention as plain matrix products: the counter does not know every fused kernel, MultiheadAttention's for one.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
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
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()

    return run, optimizer


def time_rounds(runs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call: one value a round, the order drawn anew each round; warm-up apart."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    quickest = min(_seconds(run, 1, device) for run in runs.values())
    repeats = max(1, round(SHORTEST / max(quickest, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, draw = list(runs), random.Random(0)
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


def relative_times(times: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Median seconds, and the median ratio to the reference within a round with its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(times, baseline, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    interval = [medians[int(RESAMPLES * 0.025)], medians[int(RESAMPLES * 0.975) - 1]]
    return {
        "seconds": statistics.median(times),
        "seconds_quartiles": [statistics.quantiles(times, n=4)[i] for i in (0, 2)],
        "ratio": statistics.median(ratios),
        "ratio_interval": interval,
        "seconds_each_round": list(times),
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
    model.zero_grad()
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    static = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _wait(device)
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
    return int(max(0, *itertools.accumulate(change for _, change in changes)))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's library writes to the process's stderr."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise LapeError("the device's memory does not suffice: use a smaller --batch-size, or fewer --joins") from None


# ------------------------------------------------------------------------------------------------ what is shown


def machine(device: torch.device, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Versions (of these packages as well), hardware, threads, the load before, and the commit."""
    about = environment(device)
    about["versions"] |= {name: metadata.version(name) for name in packages if name not in about["versions"]}
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    about["hardware"] |= {"threads": torch.get_num_threads(), "load_before": load}
    return about


def describe_machine(about: dict[str, Any]) -> str:
    """Hardware and versions in one line."""
    hardware, versions = about["hardware"], about["versions"]
    where = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} of {hardware['cores']} cores"
    return f"{where}; {', '.join(f'{name} {versions[name]}' for name in versions if name not in MINOR_PACKAGES)}"


def variant_lines(results: dict[str, Any]) -> list[str]:
    """For a terminal, a block a part: one line a variant, ratios to the first one with their interval."""
    settings, variants = results["settings"], results["variants"]
    blocks = [[["", "parameters", "MACs"]]]
    blocks[0] += [[name, f"{entry['parameters']:,}", _with_unit(entry["macs"])] for name, entry in variants.items()]
    for part in ("inference", "latency", "training"):
        batches = [entry[part]["batch"] for entry in variants.values() if part in entry]
        if batches:
            rows = [[name, *_cells(part, entry.get(part))] for name, entry in variants.items()]
            blocks.append([["", f"{part}, batch {batches[0]}", "time ratio [95 %]", "peak MB", "ratio"], *rows])
    amp = "" if settings["amp"] == "none" else f", {settings['amp']} autocast"
    how = f"{'compiled' if settings['compile'] else 'eager'}{amp}, {settings['rounds']} interleaved rounds"
    lines = [line for block in blocks for line in (*_align(block), "")]
    note = f"{how}; ratios to {settings['reference']}; MACs of one image, in matrix products and convolutions"
    return [*lines[:-1], note]


def _with_unit(count: int) -> str:
    return f"{count / 1e9:.3f} G" if count >= 1e8 else f"{count / 1e6:.3f} M"


def _cells(part: str, numbers: dict[str, Any] | None) -> list[str]:
    if numbers is None:
        return ["-"] * 4
    low, high = numbers["ratio_interval"]
    speed = f"{numbers['images_per_second']:.1f} img/s" if part != "latency" else f"{1e3 * numbers['seconds']:.2f} ms"
    memory = [f"{numbers['peak_bytes'] / 1e6:.1f}", f"{numbers['memory_ratio']:.4f}"]
    return [speed, f"{numbers['ratio']:.3f} [{low:.3f}, {high:.3f}]", *memory]


def _align(rows: list[list[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    name, *numbers = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(name), *map(str.rjust, row[1:], numbers)]).rstrip() for row in rows]
