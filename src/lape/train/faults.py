"""What a machine can do to a run, said in one line: out of memory, a loader process that was killed, SIGTERM."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lape.errors import LapeError
from lape.recipe import Recipe


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as schedulers of shared machines send it; the loop looks at it after each step."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def explained(recipe: Recipe) -> Iterator[None]:
    """Turn running out of memory into a `LapeError` that names the flags that need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise LapeError(_out_of_memory(recipe, text)) from error
        if "DataLoader worker" in text and "killed by signal" in text:
            raise LapeError(
                f"a loader process was killed ({text[:120]}), mostly for lack of host memory or of shared memory: "
                "lower --num-workers, or give the container more of /dev/shm; the last checkpoint stands"
            ) from error
        raise


def _out_of_memory(recipe: Recipe, text: str) -> str:
    ways = [f"a smaller --batch-size (now {recipe.batch_size})"]
    if not recipe.global_batch:
        ways[0] += " with --global-batch to keep the images of a step"
    if not recipe.grad_checkpointing:
        ways.append("--grad-checkpointing")
    if recipe.amp == "off":
        ways.append("--amp bf16")
    if recipe.model_ema and not recipe.model_ema_force_cpu:
        ways.append("--model-ema-force-cpu")
    return f"out of memory ({text[:160]}): try {', '.join(ways)}; the last checkpoint stands"


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use so far, in MiB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def make_deterministic() -> None:
    """Let torch use only algorithms that give the same bits again. Raises LapeError when CUDA is set up already."""
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
