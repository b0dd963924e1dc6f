"""What a machine can do to a run, said in one line: out of memory, a loader process that was killed, signals."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from lape.data.processes import SIGNALS
from lape.errors import LapeError
from lape.recipe import Recipe

TWICE = 0.5  # seconds between two presses of Ctrl-C; a terminal and a launcher send what is one press twice
# What torch says of a loader process that is gone, cannot start, or finds no room for its images.
_LOADER = re.compile(
    r"DataLoader worker \(pid.*(killed|exited)|[Pp]in memory thread exited|shared memory( object|\(shm\))|"
    r"unable to (mmap|open|resize|stat)|items of ancdata|[Tt]oo many open files|can't start new thread"
)
_NO_ROOM = (errno.EAGAIN, errno.EMFILE, errno.ENFILE)  # for another process


class Stop(threading.Event):
    """Set by the first signal that asks for an end; the loop looks at it after each step, an evaluation, each batch."""

    cause: signal.Signals | None = None  # None as well where the signal came to another process of the run

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.cause == signal.SIGINT else (self.cause or signal.SIGTERM).name

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGHUP, as schedulers and closed terminals send them, and Ctrl-C set it; Ctrl-C twice raises.

        Those that whoever started the process wants ignored (nohup) are left alone.
        """
        if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
            yield
            return
        first_press = 0.0

        def handle(number: int, _frame: object) -> None:
            nonlocal first_press
            now = time.monotonic()
            if number == signal.SIGINT and first_press and now - first_press > TWICE:
                raise KeyboardInterrupt
            if number == signal.SIGINT and not first_press:
                first_press = now
            if not self.is_set():
                self.cause = signal.Signals(number)
                self.set()

        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        ours = [number for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)]
        for number in ours:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, handlers[number])

    def leave(self) -> NoReturn:
        """End as by the signal: KeyboardInterrupt, or SystemExit with a shell's code for it."""
        if self.cause == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.cause or signal.SIGTERM))


class Stopped(Exception):
    """What was under way is left unfinished, as its `Stop` is set."""


@contextmanager
def explain_faults(recipe: Recipe) -> Iterator[None]:
    """Turn running out of memory, and the loss of a loader process, into a `LapeError` that names the way out."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        text, note = _reason(error), "" if recipe.eval else "; the last checkpoint stands"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise LapeError(_out_of_memory(recipe, text) + note) from error
        if _LOADER.search(text) or (isinstance(error, OSError) and error.errno in _NO_ROOM):
            raise LapeError(
                f"a loader process was lost ({text[:160]}), mostly for lack of memory, of /dev/shm, or of allowed "
                f"processes and open files (ulimit): lower --num-workers (now {recipe.num_workers}), or give the "
                f"container more of them{note}"
            ) from error
        raise


def _reason(error: BaseException) -> str:
    """An error's text in one line; one from another process comes with its traceback, whose last line says it."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())


def _out_of_memory(recipe: Recipe, text: str) -> str:
    ways = [f"a smaller --batch-size (now {recipe.batch_size})"]
    if not recipe.global_batch and not recipe.eval:
        ways[0] += " with --global-batch to keep the images of a step"
    if not recipe.grad_checkpointing and not recipe.eval:
        ways.append("--grad-checkpointing")
    if recipe.amp == "off":
        ways.append("--amp bf16")
    if recipe.model_ema and not recipe.model_ema_force_cpu and not recipe.eval:
        ways.append("--model-ema-force-cpu")
    return f"out of memory ({text[:160]}): try {', '.join(ways)}"


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use so far, in MiB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def make_deterministic() -> None:
    """Let torch use only algorithms that give the same bits again. Raises LapeError when CUDA is set up already."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
