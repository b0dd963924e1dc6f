"""Everything that is worth a GPU's minutes, in one call, in the order of its worth; results are written as they come.

    python benchmarks/on_gpu.py --out FOLDER [--cifar FOLDER or .tar.gz] [--minutes 9.5] [--commit HASH]
    python benchmarks/on_gpu.py --out FOLDER --scale-down --device cpu      # the same with tiny sizes, anywhere

    tests       tests/train/test_cuda.py
    ratios      DeiT-Ti, batch 1 and 256, bf16 autocast and fp32, inference and training: timm's model, LaPE, folded
                LaPE and the equations written out (`written_out.py`), eager and compiled, in interleaved rounds
    throughput  DeiT-Ti, -S and -B in bf16, basic and LaPE: images a second at several batches, share of the rate that
                torch.matmul reaches, peak memory
    data        CIFAR-10 to where a step finds it: Pillow in loader processes, and --data-on-device (`device_path.py`)
    steps       epochs of `lape train` on CIFAR-10: as it is, and with the device waited for after every step
    training    ViT-Lite on CIFAR-10 by `lape train`: basic, basic whose table starts at std 1, LaPE; several seeds

Compilation takes longer than all measurements. So every configuration of `ratios` and `throughput` is a process of its
own: all build, compile and warm up at once, on all cores and while the tests run, and then wait; each is let go when it
is its turn. The trainings run from the start; while something is measured they are halted (SIGSTOP), so that it is
alone. A process that fails or is late costs its own numbers only. Processes are forked before CUDA is set up, so torch
and timm are imported once.

Each part writes FOLDER/<part>.json: settings, commit, versions, hardware, status and results; summary.json says what
became of the parts. Seconds are medians of the rounds with the lowest and the highest; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from written_out import largest_difference, written_out

import lape

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "ratios", "throughput", "data", "steps", "training")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "numpy", "pillow", "triton", "pydantic")
ARMS = ("basic", "basic, table at std 1", "LaPE")
Run = Callable[[], None]
JSON = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    models: dict[str, str] = field(
        default_factory=lambda: {
            "DeiT-Ti": "deit_tiny_patch16_224",
            "DeiT-S": "deit_small_patch16_224",
            "DeiT-B": "deit_base_patch16_224",
        }
    )
    model_kwargs: JSON = field(default_factory=dict)
    ratio_batches: tuple[int, ...] = (256, 1)
    rounds: int = 20
    seconds: float = 7.0  # of one table of rounds; not all rounds are run where they take longer
    shortest: float = 0.03  # seconds of one value; a quicker call is repeated within it
    inference_batches: tuple[int, ...] = (256, 1024)
    training_batches: tuple[int, ...] = (128, 256, 512)
    compiled_batches: tuple[int, int] = (1024, 256)  # of inference and of training
    product: int = 8192
    rows: tuple[str, ...] = ("folder 32x32, crop and flip", "folder 32x32, DeiT's recipe")
    data_rounds: int = 3
    data_images: int = 50_000
    data_batch: int = 256
    waits: int = 3  # pairs of epochs, with and without
    epochs: int = 20
    seeds: tuple[int, ...] = (0, 1, 2, 3)  # the last ones if time allows
    at_once: int = 2  # seeds, of three trainings each
    trained: str = "vit_lite_7_4_32"
    recipe: JSON = field(default_factory=dict)
    limits: JSON = field(
        default_factory=lambda: {
            "tests": 240,
            "prepare": 200,
            "ratios": 160,
            "throughput": 120,
            "data": 75,
            "steps": 90,
            "training": 700,
        }
    )


TINY = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
SMALL = Sizes(
    models={"DeiT-Ti": "deit_tiny_patch16_224"},
    model_kwargs=TINY,
    ratio_batches=(4, 1),
    rounds=3,
    seconds=1.0,
    shortest=0.0,
    inference_batches=(2, 4),
    training_batches=(2, 4),
    compiled_batches=(4, 4),
    product=64,
    rows=("folder 32x32, crop and flip",),
    data_rounds=2,
    data_images=64,
    data_batch=32,
    waits=3,
    epochs=1,
    seeds=(0,),
    trained="vit_lite_4_4_32",
    recipe={"input_size": 8, "in_chans": 1, "mean": [0.3], "std": [0.4], "batch_size": 256, "warmup_epochs": 0}
    | {"model_kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 2}},
)


# ------------------------------------------------------------------------------------------------ processes


class Link:
    """What a process of a part says to the one that started it."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def ready(self) -> None:
        """Everything is compiled and warm: wait for the turn."""
        self.connection.send(("ready", "", time.monotonic()))
        self.connection.recv()

    def send(self, found: JSON) -> None:
        """Results so far; later ones replace them."""
        self.connection.send(("found", found, time.monotonic()))


class Worker:
    """One such process, with a process group of its own, so that it ends with all that it started."""

    def __init__(self, name: str, log: Path, target: Callable[..., None], *arguments: Any) -> None:
        self.name, self.log = name, log
        self.found: JSON = {}
        self.state, self.error = "started", ""
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}  # from the start, of each state
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = context.Process(target=_child, args=(theirs, log, target, arguments))
        self.process.start()
        theirs.close()

    def follow(self, state: str, deadline: float) -> bool:
        """Wait until it is `state` ("ready" or "done"), at most until the deadline (`time.monotonic`)."""
        while self.state not in (state, "done", "failed"):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                if not self.connection.poll(min(left, 1.0)):
                    continue
                kind, value, at = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(5)
                kind, value, at = "failed", f"ended by itself: {_tail(self.log)}", time.monotonic()
            if kind == "found":
                self.found = value
                continue
            self.state = kind
            self.seconds[kind] = round(at - self.began, 1)
            self.error = value
        return self.state == state

    def go(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send("go")
        self.state = "going"
        self.seconds["go"] = round(time.monotonic() - self.began, 1)

    def signal(self, number: int) -> None:
        """To it and to all that it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(10)
        if self.state not in ("done", "failed"):
            self.error = f"stopped after {time.monotonic() - self.began:.0f} s ({self.state}): {_tail(self.log)}"
            self.state = "stopped"

    def told(self) -> JSON:
        log = {"log": _tail(self.log, 4000)} if self.error else {}
        return {"status": self.state, "error": self.error or None, **log, "seconds": self.seconds, **self.found}


def _child(connection: Any, log: Path, target: Callable[..., None], arguments: Sequence[Any]) -> None:
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        target(Link(connection), *arguments)
        connection.send(("done", "", time.monotonic()))
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(("failed", f"{type(error).__name__}: {error}"[:2000], time.monotonic()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.close()
        os._exit(0)  # nothing of the parent's is to be cleaned up here


def _tail(log: Path, size: int = 1500) -> str:
    return log.read_text(errors="replace")[-size:].strip() if log.exists() else ""


# ------------------------------------------------------------------------------------------------ clocks


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, repeats: int, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return (time.perf_counter() - start) / repeats


def time_rounds(runs: dict[str, Run], sizes: Sizes, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a call: one value of each a round, in an order drawn anew; at least three rounds."""
    repeats = {name: max(1, math.ceil(sizes.shortest / seconds_of(run, 2, device))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, draw, end = list(runs), random.Random(0), time.monotonic() + sizes.seconds
    for done in range(sizes.rounds):
        if done >= 3 and time.monotonic() > end:
            break
        draw.shuffle(order)
        for name in order:
            times[name].append(seconds_of(runs[name], repeats[name], device))
    return times


def spread(values: Sequence[float]) -> JSON:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def ratio(mine: Sequence[float], reference: Sequence[float]) -> JSON:
    """Within a round."""
    return spread([a / b for a, b in zip(mine, reference, strict=True)])


def autocast(precision: str, device: torch.device, cache: bool = True) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=cache)


def compiled(model: nn.Module, device: torch.device, sizes: Sizes) -> nn.Module:
    """Anew for each model and shape; only traced in a small run on a CPU."""
    torch._dynamo.config.cache_size_limit = 64  # the models share code: torch would give up after eight
    backend = "eager" if device.type == "cpu" and sizes is SMALL else "inductor"
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)


def inference(call: Callable[[Tensor], Tensor], x_BCHW: Tensor, precision: str) -> Run:
    def run() -> None:
        with torch.inference_mode(), autocast(precision, x_BCHW.device):
            call(x_BCHW)

    return run


def training(model: nn.Module, call: Callable[[Tensor], Tensor], x_BCHW: Tensor, precision: str) -> tuple[Run, Any]:
    """A step: forward, cross-entropy, backward, AdamW; and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    target_B = torch.zeros(len(x_BCHW), dtype=torch.long, device=x_BCHW.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, x_BCHW.device):
            loss = F.cross_entropy(call(x_BCHW).float(), target_B)
        loss.backward()
        optimizer.step()

    return run, optimizer


def graphed(model: nn.Module, x_BCHW: Tensor, precision: str) -> Run:
    """The eager kernels of a forward as one CUDA graph: what they take when nothing waits for Python."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), autocast(precision, x_BCHW.device, cache=False):
        with torch.cuda.stream(aside):
            for _ in range(3):
                model(x_BCHW)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            model(x_BCHW)
    return graph.replay


def peak_bytes(run: Run, model: nn.Module, optimizer: Any, device: torch.device) -> int | None:
    """Of tensors at the fullest moment of a call: weights and the optimizer's state counted in, other models' not."""
    if device.type != "cuda":
        return None
    run()
    for parameter in model.parameters():
        parameter.grad = None
    kept = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        kept += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = [one for one in kept if one.device.type == "cuda"]
    static = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    wait(device)
    return static + torch.cuda.max_memory_allocated(device) - before


def patiently(run: Run, device: torch.device, tries: int = 12) -> None:
    """Call it; while other processes hold the memory, wait for them."""
    for left in reversed(range(tries)):
        try:
            run()
            wait(device)
            break
        except torch.OutOfMemoryError:
            if not left:
                raise
        torch.cuda.empty_cache()
        time.sleep(5)
    forget(device)


def forget(device: torch.device) -> None:
    """Give what is cached back, so that the others have it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def shake(model: nn.Module) -> nn.Module:
    """Away from the initial values, where gains of one and zero biases hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def images(batch: int, model: nn.Module, device: torch.device) -> Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, device=device)


def card(device: torch.device) -> JSON:
    if device.type != "cuda":
        return {"device": str(device), "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    precision = {"float32_matmul_precision": torch.get_float32_matmul_precision()}
    precision["cudnn_allow_tf32"] = torch.backends.cudnn.allow_tf32
    return {"device": found.name, "memory": found.total_memory, "cuda": torch.version.cuda, **precision}


# ------------------------------------------------------------------------------------------------ parts


def ratios(link: Link, sizes: Sizes, where: str, precision: str, mode: str, batch: int) -> None:
    """One table: four models (a folded one does not learn), eager, compiled and, for one image, as a CUDA graph."""
    device = torch.device(where)
    torch.manual_seed(0)
    name = sizes.models["DeiT-Ti"]
    host = shake(timm.create_model(name, **sizes.model_kwargs)).to(device)
    converted = lape.apply_(copy.deepcopy(host), "LaPE")
    with torch.no_grad():
        for key, parameter in converted.named_parameters():
            if "pe_norm" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    models = {"timm": host, "LaPE": converted}
    models["LaPE folded"] = lape.fold_(copy.deepcopy(converted))
    models["written out"] = written_out(converted)
    x, few = images(batch, host, device), images(2, host, device)
    differences = {key: largest_difference(model, models["written out"], few) for key, model in models.items()}
    for key in ("LaPE", "LaPE folded"):
        assert differences[key] < 1e-3, f"{key} is not what was written out: {differences[key]}"
    if mode == "training":
        del models["LaPE folded"]

    runs: dict[str, dict[str, Run]] = {"eager": {}, "compiled": {}}
    optimizers: dict[tuple[str, str], Any] = {}
    warm: dict[str, float] = {}
    for key, model in models.items():
        model.train(mode == "training")
        for way in ("eager", "compiled"):
            call = compiled(model, device, sizes) if way == "compiled" else model
            began = time.perf_counter()
            if mode == "training":
                runs[way][key], optimizers[way, key] = training(model, call, x, precision)
            else:
                runs[way][key] = inference(call, x, precision)
            for _ in range(3):
                patiently(runs[way][key], device)
            warm[f"{key}, {way}"] = time.perf_counter() - began
            link.send({"warm_up_seconds": warm})
        model.zero_grad(set_to_none=True)
    if device.type == "cuda" and mode == "inference" and batch == 1:
        runs["graph"] = {key: graphed(model, x, precision) for key, model in models.items()}
    forget(device)
    link.ready()

    found: JSON = {"model": name, "precision": precision, "mode": mode, "batch": batch, **card(device)}
    found |= {"warm_up_seconds": warm, "differences": differences, "ways": {}}
    flat = {f"{key}, {way}": run for way, some in runs.items() for key, run in some.items()}
    end = time.monotonic() + min(1.0, sizes.seconds / 4)
    while time.monotonic() < end:  # until the clocks are up
        flat["timm, eager"]()
        wait(device)
    times = time_rounds(flat, sizes, device)
    for way, some in runs.items():
        rows = {}
        for key in some:
            mine = times[f"{key}, {way}"]
            rows[key] = {"seconds": spread(mine), "to_timm": ratio(mine, times[f"timm, {way}"])}
            rows[key]["written_out_to_this"] = ratio(times[f"written out, {way}"], mine)
            rows[key]["images_per_second"] = batch / statistics.median(mine)
            rows[key]["each"] = mine
            if way != "graph":
                rows[key]["peak_bytes"] = peak_bytes(some[key], models[key], optimizers.get((way, key)), device)
        found["ways"][way] = rows
        link.send(found)


def throughput(link: Link, sizes: Sizes, where: str, size: str) -> None:
    """One model: basic and LaPE, inference and training, eager at all batches and compiled at one."""
    device = torch.device(where)
    torch.manual_seed(0)
    joins = ("basic", "LaPE")
    models = {join: lape.create_model(sizes.models[size], join, **sizes.model_kwargs).to(device) for join in joins}
    calls = {join: {"eager": model, "compiled": compiled(model, device, sizes)} for join, model in models.items()}
    infer_at, train_at = sizes.compiled_batches
    x = {batch: images(batch, models["basic"], device) for batch in {*sizes.inference_batches, *sizes.training_batches}}
    x |= {batch: images(batch, models["basic"], device) for batch in sizes.compiled_batches}
    optimizers = {}
    steps: dict[tuple[str, str, int], Run] = {}
    for join, model in models.items():
        model.eval()
        patiently(inference(calls[join]["compiled"], x[infer_at], "bf16"), device)
        model.train()
        for way, batches in (("compiled", (train_at,)), ("eager", sizes.training_batches)):
            for batch in batches:
                steps[join, way, batch], optimizers[join, way, batch] = training(
                    model, calls[join][way], x[batch], "bf16"
                )
        for _ in range(2):
            patiently(steps[join, "compiled", train_at], device)
        model.zero_grad(set_to_none=True)
    flops = {
        mode: flops_of_image(models["basic"].train(mode == "training"), mode, device)
        for mode in ("inference", "training")
    }
    forget(device)
    link.ready()

    found: JSON = {"model": sizes.models[size], "precision": "bf16", **card(device), "flops_of_an_image": flops}
    rates = [matmul_rate(sizes, device)]
    rows: list[JSON] = []
    found |= {"matmul_size": sizes.product, "rows": rows}
    short = dataclasses.replace(sizes, seconds=sizes.seconds / 4, rounds=max(3, sizes.rounds // 2))
    plans = [("inference", "compiled", infer_at), ("training", "compiled", train_at)]
    plans += [("training", "eager", batch) for batch in sorted(sizes.training_batches, key=lambda b: b != train_at)]
    plans += [("inference", "eager", batch) for batch in sizes.inference_batches]
    for mode, way, batch in plans:
        runs: dict[str, Run] = {}
        for join, model in models.items():
            model.train(mode == "training")
            runs[join] = (
                steps[join, way, batch] if mode == "training" else inference(calls[join][way], x[batch], "bf16")
            )
        row: JSON = {"mode": mode, "way": way, "batch": batch}
        try:
            for run in runs.values():
                run()
            times = time_rounds(runs, short, device)
            for join, mine in times.items():
                speed = batch / statistics.median(mine)
                row[join] = {"seconds": spread(mine), "to_basic": ratio(mine, times["basic"]), "each": mine}
                row[join] |= {"images_per_second": speed, "flops_per_second": speed * flops[mode]}
                optimizer = optimizers[join, way, batch] if mode == "training" else None
                row[join]["peak_bytes"] = peak_bytes(runs[join], models[join], optimizer, device)
                models[join].zero_grad(set_to_none=True)
            if row["LaPE"]["peak_bytes"]:
                row["peak_ratio"] = row["LaPE"]["peak_bytes"] / row["basic"]["peak_bytes"]
        except torch.OutOfMemoryError as error:
            row["error"] = str(error)[:200]
            forget(device)
        rows.append(row)
        rates.append(matmul_rate(sizes, device))
        best = max(rates)
        found["matmul_flops_per_second"] = {"best": best, "each": rates}
        for one in rows:
            for join in joins:
                if join in one:
                    one[join]["share_of_matmul_rate"] = one[join]["flops_per_second"] / best
        link.send(found)


def flops_of_image(model: nn.Module, mode: str, device: torch.device) -> float:
    """Of matrix products and convolutions, as torch counts them in attention's plain form."""
    x = images(2, model, device)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.set_grad_enabled(mode == "training"),
    ):
        out = model(x).sum()
        if mode == "training":
            out.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(x)


def matmul_rate(sizes: Sizes, device: torch.device) -> float:
    """FLOP/s of one bf16 product of random square matrices, the median of five samples of ten."""
    a, b = (torch.randn(sizes.product, sizes.product, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run() -> None:
        torch.matmul(a, b)

    seconds_of(run, 3, device)
    return 2 * sizes.product**3 / statistics.median(seconds_of(run, 10, device) for _ in range(5))


def tests(link: Link, sizes: Sizes, scratch: Path) -> None:
    """tests/train/test_cuda.py, skipped without a GPU. What the libraries warn of is in the log, and no error."""
    report = scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=10", f"--junitxml={report}"]
    command += ["-n", "4"]
    code = subprocess.run([*command, "-W", "default", "tests/train/test_cuda.py"], cwd=ROOT).returncode
    cases = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        cases.append({"name": case.get("name"), "seconds": float(case.get("time") or 0)})
        cases[-1]["outcome"] = "passed" if bad is None else bad.tag
        if bad is not None and bad.tag != "skipped":
            cases[-1]["message"] = f"{bad.get('message')}\n{(bad.text or '')[-1500:]}"
    outcomes = [case["outcome"] for case in cases]
    counts = {name: outcomes.count(name) for name in ("passed", "failure", "error", "skipped")}
    link.send({"exit_code": int(code), "counts": counts, "cases": cases})


def data(link: Link, sizes: Sizes, where: str, cifar: Path | None, scratch: Path) -> None:
    """Both data paths; with CIFAR-10 all its training images, else written ones."""
    output = scratch / "device_path.json"
    flags = ["--device", where, "--rounds", str(sizes.data_rounds), "--batch-size", str(sizes.data_batch)]
    flags += ["--images", str(sizes.data_images), "--output", str(output), "--rows", *sizes.rows]
    if sizes is SMALL:
        flags += ["--num-workers", "1", "--threads", "1"]
    elif cifar is not None:
        flags += ["--folder", str(cifar)]
    sys.argv = ["device_path.py", *flags]
    runpy.run_path(str(ROOT / "benchmarks" / "device_path.py"), run_name="__main__")
    link.send(json.loads(output.read_text()))


def recipe_of(sizes: Sizes, where: str, cifar: Path | None, arm: str) -> JSON:
    """Of a training; without CIFAR-10 the packaged digits."""
    settings: JSON = yaml.safe_load((ROOT / "src/lape/recipes" / "cifar10_matrix_cpu.yaml").read_text()) | {
        "model": sizes.trained,
        "join_type": "LaPE" if arm == "LaPE" else "basic",
        "pe_std": 1.0 if arm == "basic, table at std 1" else None,
        "epochs": sizes.epochs,
        "amp": "bf16",
        "device": where,
        "data_on_device": True,
        "num_workers": 0 if sizes is SMALL else 2,
        "data_path": "" if cifar is None else str(cifar),
    }
    return settings | sizes.recipe


def steps(link: Link, sizes: Sizes, where: str, cifar: Path | None) -> None:
    """One training whose epochs in turn leave the device alone and wait for it after every step; the first is none."""
    import lape.train.loop as loop
    from lape.recipe import Recipe

    recipe = Recipe(**recipe_of(sizes, where, cifar, "LaPE"))
    launch, waits = loop._launch_update, False

    def launch_update(*arguments: Any) -> Any:
        reading = launch(*arguments)
        if waits:
            wait(torch.device(where))
        return reading

    loop._launch_update = launch_update
    rounds: dict[str, list[float]] = {"as it is": [], "waiting": []}

    def on_epoch(line: JSON) -> None:
        nonlocal waits
        if line["epoch"]:
            rounds["waiting" if waits else "as it is"].append(line["images_per_second"])
            link.send(found | {"images_per_second": rounds})
        waits = not waits

    found: JSON = {"recipe": recipe.model_dump(mode="json", exclude_unset=True, exclude={"data_path"})} | card(
        torch.device(where)
    )
    loop.train(recipe.replace(epochs=2 * sizes.waits + 1, warmup_epochs=0), on_epoch=on_epoch, say=lambda _text: None)
    gain = ratio(rounds["as it is"], rounds["waiting"])
    link.send(found | {"images_per_second": rounds, "as_it_is_to_waiting": gain})


def train(link: Link, sizes: Sizes, where: str, cifar: Path | None, folder: Path, arm: str, seed: int) -> None:
    """One training by `lape train`: one seed starts all arms alike but for what the arm is about."""
    settings = recipe_of(sizes, where, cifar, arm) | {"seed": seed, "output_dir": str(folder / "run")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    link.send({"recipe": settings})
    torch.set_num_threads(1)
    sys.argv = ["lape", "train", "--recipe", str(folder / "recipe.yaml")]
    try:
        runpy.run_module("lape", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"lape train ended with {end.code}: {_tail(folder / 'log')}") from None


def trained(worker: Worker, folder: Path) -> JSON:
    """What a training has written so far."""
    log = folder / "run" / "log.txt"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    kept = ("epoch", "train_loss", "test_loss", "test_acc1", "seconds", "data_seconds", "images_per_second")
    history = [{key: line[key] for key in kept if key in line} for line in lines]
    found = worker.told() | {"epochs_done": len(history), "history": history}
    if history:
        found["accuracy"] = history[-1]["test_acc1"]
    found.pop("recipe", None)
    return found


def compared(rows: list[JSON], epochs: int) -> JSON:
    """Accuracy of each arm after the last epoch, and its difference to basic, seed by seed, of whole trainings."""
    whole = {(row["arm"], row["seed"]): row["accuracy"] for row in rows if row["epochs_done"] == epochs}
    found: JSON = {}
    for arm in ARMS:
        mine = {seed: accuracy for (one, seed), accuracy in whole.items() if one == arm}
        gaps = [accuracy - whole["basic", seed] for seed, accuracy in mine.items() if ("basic", seed) in whole]
        found[arm] = {"accuracies": mine, "mean": statistics.fmean(mine.values()) if mine else None}
        found[arm]["difference_to_basic"] = {"each": gaps, "mean": statistics.fmean(gaps) if gaps else None}
    return found


# ------------------------------------------------------------------------------------------------ all of it


class Session:
    """One call of this script."""

    def __init__(self, given: argparse.Namespace, sizes: Sizes, scratch: Path) -> None:
        self.given, self.sizes, self.scratch, self.out = given, sizes, scratch, given.out
        self.began = time.monotonic()
        self.end = self.began + 60 * given.minutes
        self.folders: dict[str, Path] = {}  # of trainings
        self.trainings: list[tuple[str, int, Worker]] = []
        self.disturbed: dict[str, int] = {}  # epochs of a training that began while something else ran
        self.summary: JSON = {}
        self.about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": given.commit or _commit(),
            "versions": {"python": sys.version.split()[0], "lape": lape.__version__} | _versions(),
            "hardware": {"processor": _processor(), "cores": os.cpu_count(), "gpu": _gpu()},
            "scaled_down": given.scale_down,
        }
        self.workers: dict[str, dict[str, Worker]] = {part: {} for part in PARTS}

    def start(self, part: str, name: str, target: Callable[..., None], *arguments: Any) -> Worker:
        log = self.scratch / (re.sub(r"\W+", "_", f"{part} {name}") + ".log")
        worker = Worker(name, log, target, *arguments)
        self.workers[part][name] = worker
        return worker

    def deadline(self, part: str) -> float:
        return min(self.end, time.monotonic() + self.sizes.limits[part])

    def write(self, part: str, results: Any, **more: Any) -> None:
        settings = {"device": self.given.device, "sizes": dataclasses.asdict(self.sizes)}
        content = {"part": part, **self.about, "settings": settings, **more, "results": results}
        path = self.out / f"{part}.json"
        path.with_suffix(".new").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    def note(self, part: str, **what: Any) -> None:
        self.summary[part] = {**what, "ended_at_second": round(time.monotonic() - self.began, 1)}
        print(f"== {part}: {self.summary[part]}", flush=True)
        text = json.dumps({**self.about, "parts": self.summary}, indent=1)
        (self.out / "summary.json").write_text(text + "\n")

    def note_workers(self, part: str) -> None:
        states = [worker.state for worker in self.workers[part].values()]
        errors = {name: worker.error[:400] for name, worker in self.workers[part].items() if worker.error}
        self.note(part, states={state: states.count(state) for state in set(states)}, errors=errors)

    # one method a part

    def begin(self, parts: Sequence[str]) -> None:
        """Start the tests, and everything that compiles beside them."""
        where, sizes = self.given.device, self.sizes
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each, many compile at once
        if where == "cpu":  # once for all; on a GPU this process must stay away from CUDA, which tracing looks at
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
        if "tests" in parts:
            self.start("tests", "test_cuda", tests, sizes, self.scratch)
        if "ratios" in parts:
            for batch in sizes.ratio_batches:
                for precision in ("bf16", "fp32"):
                    for mode in ("inference", "training"):
                        name = f"{mode}, batch {batch}, {precision}"
                        if not self.given.only or re.search(self.given.only, name):
                            self.start("ratios", name, ratios, sizes, where, precision, mode, batch)
        if "throughput" in parts:
            for size in sizes.models:
                self.start("throughput", size, throughput, sizes, where, size)

    def begin_trainings(self, parts: Sequence[str], cifar: Path | None) -> None:
        if "training" in parts:
            for seed in self.sizes.seeds[: self.sizes.at_once]:
                self.start_trainings(cifar, seed)

    def tests(self) -> None:
        worker = self.workers["tests"]["test_cuda"]
        worker.follow("done", self.deadline("tests"))
        worker.stop()
        self.write("tests", worker.told())
        print(_tail(worker.log, 5000), flush=True)
        self.note("tests", status=worker.state, error=worker.error[:400], counts=worker.found.get("counts"))

    def prepared(self) -> None:
        """Wait for all that compile, then halt the trainings and who is late, so that each is measured alone."""
        end = min(self.end, self.began + self.sizes.limits["prepare"])
        compiling = [*self.workers["ratios"].values(), *self.workers["throughput"].values()]
        for worker in compiling:
            if not worker.follow("ready", end) and worker.state == "started":
                worker.signal(signal.SIGSTOP)
        self.halt_trainings()
        print(f"== prepared: { {worker.name: worker.seconds for worker in compiling} }", flush=True)

    def in_turn(self, part: str) -> None:
        end = self.deadline(part)
        workers = self.workers[part]
        for worker in sorted(workers.values(), key=lambda worker: worker.state == "started"):  # the late ones last
            if worker.state == "started" and time.monotonic() < end:
                worker.signal(signal.SIGCONT)
                worker.follow("ready", end)
            if worker.state == "ready" and time.monotonic() < end:
                worker.go()
                worker.follow("done", end)
            worker.stop()
            self.write(part, {name: one.told() for name, one in workers.items()})
        for worker in workers.values():
            if worker.state == "failed":
                print(f"-- {worker.name}: {_tail(worker.log, 3000)}", flush=True)
        self.note_workers(part)

    def data(self, cifar: Path | None) -> None:
        end = self.deadline("data")
        worker = self.start("data", "both", data, self.sizes, self.given.device, cifar, self.scratch)
        worker.follow("done", end)
        worker.stop()
        self.write("data", worker.told())
        print(_tail(worker.log, 1500), flush=True)
        self.note("data", status=worker.state, error=worker.error[:400])

    def steps(self, cifar: Path | None) -> None:
        end = self.deadline("steps")
        worker = self.start("steps", "ViT-Lite", steps, self.sizes, self.given.device, cifar)
        worker.follow("done", end)
        worker.stop()
        self.write("steps", worker.told())
        self.note("steps", status=worker.state, error=worker.error[:400])

    def start_trainings(self, cifar: Path | None, seed: int) -> None:
        for arm in ARMS:
            name = f"{arm}, seed {seed}"
            self.folders[name] = self.scratch / re.sub(r"\W+", "_", name)
            self.folders[name].mkdir()
            arguments = (self.sizes, self.given.device, cifar, self.folders[name], arm, seed)
            self.trainings.append((arm, seed, self.start("training", name, train, *arguments)))

    def halt_trainings(self) -> None:
        for _, _, worker in self.trainings:
            worker.signal(signal.SIGSTOP)
        time.sleep(1.0 if self.trainings else 0.0)  # what they have launched ends

    def training(self, cifar: Path | None) -> None:
        """Let them go on to their end; then those of another seed, if they will come to theirs."""
        end = min(self.deadline("training"), self.end - self.given.leave)
        for _, _, worker in self.trainings:
            worker.signal(signal.SIGCONT)
            worker.seconds["alone"] = round(time.monotonic() - worker.began, 1)
            history = trained(worker, self.folders[worker.name])["history"]
            self.disturbed[worker.name] = len(history) + 1 if worker.seconds["alone"] > 1 else 0
        waiting = [seed for seed in self.sizes.seeds if seed not in {seed for _, seed, _ in self.trainings}]
        while time.monotonic() < end:
            running = {
                seed
                for _, seed, worker in self.trainings
                if not worker.follow("done", time.monotonic() + 0.05) and worker.state == "started"
            }
            found = self.tell_trainings(cifar)
            if waiting and len(running) < self.sizes.at_once:
                each = [line["seconds"] for row in found for line in row["history"][row["epochs_disturbed"] :]]
                needed = 1.2 * self.sizes.epochs * max(each, default=0.0) + (25 if found else 0)
                if time.monotonic() + needed < end:
                    self.start_trainings(cifar, waiting.pop(0))
                    continue
                waiting.clear()
            if not running:
                break
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))
        for _, _, worker in self.trainings:
            if worker.state == "started":
                worker.signal(signal.SIGTERM)  # it saves after its step
        for _, _, worker in self.trainings:
            worker.follow("done", time.monotonic() + 2)
            worker.stop()
            if worker.state != "done":
                print(f"-- {worker.name}: {worker.error[-600:]}", flush=True)
        self.tell_trainings(cifar)
        self.note_workers("training")

    def tell_trainings(self, cifar: Path | None) -> list[JSON]:
        found = [
            {
                "arm": arm,
                "seed": seed,
                "epochs_disturbed": self.disturbed.get(worker.name, 0),
                **trained(worker, self.folders[worker.name]),
            }
            for arm, seed, worker in self.trainings
        ]
        recipe = next((worker.found["recipe"] for _, _, worker in self.trainings if "recipe" in worker.found), {})
        own = ("data_path", "output_dir", "finetune", "join_type", "seed")
        recipe = {key: value for key, value in recipe.items() if key not in own}
        what = "CIFAR-10 as JPEG files" if cifar else "the packaged digits"
        at_once = len(ARMS) * self.sizes.at_once
        summed = compared(found, self.sizes.epochs)
        self.write("training", found, compared=summed, recipe=recipe, data=what, side_by_side=at_once)
        return found


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _processor() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def _gpu() -> str | None:
    """Asked from outside: this process must not set CUDA up, or it could not be forked."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


@contextlib.contextmanager
def unpacked(cifar: Path | None, scratch: Path) -> Iterator[Path | None]:
    """CIFAR-10 as a folder."""
    if cifar is None or cifar.is_dir():
        yield cifar
        return
    with tarfile.open(cifar) as archive:
        archive.extractall(scratch / "cifar", filter="data")
    yield scratch / "cifar"


def show(session: Session) -> None:
    """The results in short, last of all."""
    for part in PARTS[1:]:
        path = session.out / f"{part}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        results = content["results"]
        print(f"\n{part}")
        if part == "ratios":
            for name, table in results.items():
                for way, rows in table.get("ways", {}).items():
                    cells = [
                        f"{key} {1e3 * row['seconds']['median']:.3f} ms x{row['to_timm']['median']:.3f}"
                        for key, row in rows.items()
                    ]
                    print(f"  {name}, {way}: {'; '.join(cells)}")
        elif part == "throughput":
            for name, table in results.items():
                for row in table.get("rows", []):
                    cells = [
                        f"{join} {row[join]['images_per_second']:.0f} img/s, {row[join]['share_of_matmul_rate']:.1%}, "
                        f"{(row[join]['peak_bytes'] or 0) / 2**30:.2f} GiB"
                        for join in ("basic", "LaPE")
                        if join in row
                    ]
                    print(f"  {name}, {row['mode']}, {row['way']}, {row['batch']}: {'; '.join(cells)}")
        elif part == "data":
            for name, row in results.get("rows", {}).items():
                speeds = [f"{way} {row[way]['images_per_second']:.0f} img/s" for way in ("pil", "device")]
                print(f"  {name}: {'; '.join(speeds)}")
        elif part == "steps":
            print(f"  {results.get('images_per_second')}, {results.get('as_it_is_to_waiting')}")
        else:
            for row in results:
                last = (row["history"] or [{}])[-1]
                print(f"  {row['arm']}, seed {row['seed']}: {row['epochs_done']} epochs, {last}")
            print(f"  {json.dumps(content['compared'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where results are written")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together, after the imports")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", default="", help="regular expression: tables of ratios, by name")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as train/<class>/* and val/<class>/*, or its .tar.gz")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale-down", action="store_true", help="tiny sizes; trains on the packaged digits")
    parser.add_argument("--commit", default=os.environ.get("LAPE_COMMIT", ""), help="where there is no git")
    parser.add_argument("--rounds", type=int, help="of each table")
    parser.add_argument("--epochs", type=int, help="of the trainings")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings, the last ones if time allows")
    parser.add_argument("--at-once", type=int, help="seeds, of three trainings each")
    parser.add_argument("--leave", type=float, default=12.0, help="seconds at the end for stopping trainings")
    given = parser.parse_args()
    changes = {name: getattr(given, name) for name in ("rounds", "epochs", "at_once") if getattr(given, name)}
    changes |= {"seeds": tuple(given.seeds)} if given.seeds else {}
    sizes = SMALL if given.scale_down else Sizes()
    for name, value in changes.items():  # in place: SMALL is known by identity
        object.__setattr__(sizes, name, value)
    given.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="on_gpu_"))
    session = Session(given, sizes, scratch)
    try:
        cifar = None if given.scale_down else given.cifar
        session.begin(given.parts)
        with unpacked(cifar, scratch) as folder:
            session.begin_trainings(given.parts, folder)
            acts: dict[str, Callable[[], None]] = {
                "tests": session.tests,
                "prepared": session.prepared,
                "ratios": lambda: session.in_turn("ratios"),
                "throughput": lambda: session.in_turn("throughput"),
                "data": lambda: session.data(folder),
                "steps": lambda: session.steps(folder),
                "training": lambda: session.training(folder),
            }
            for name, act in acts.items():
                if name != "prepared" and name not in given.parts:
                    continue
                if time.monotonic() > session.end - 2 and name != "training":  # those have run all the time
                    session.note(name, status="left out: no time left")
                    continue
                try:
                    act()
                except Exception:
                    traceback.print_exc()
                    session.note(name, status="failed", error=traceback.format_exc()[-1500:])
        show(session)
    finally:
        left = [worker for workers in session.workers.values() for worker in workers.values()]
        for worker in left:
            worker.signal(signal.SIGKILL)
        for worker in left:
            worker.stop()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
