"""The processes of one run: which one am I, add up, agree.

Started by `torchrun`, by `python -m torch.distributed.launch --use_env`, or by plain `python` (then there is one
process and no process group at all). NCCL on CUDA, gloo elsewhere.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lape.data.processes import GRACE, end_with_parent
from lape.errors import LapeError, LostError, reason_of

T = TypeVar("T")
# Joining, reading a folder and the like may take one machine longer than another; a step may not.
SETUP_SECONDS = 900.0
LAUNCH = "start with torchrun, which sets what is needed, or unset RANK, WORLD_SIZE and LOCAL_RANK for one process"
# How the backends say that another process is gone, or silent for too long.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|socket|recvValue failed", re.IGNORECASE
)


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world(device: str = "auto", timeout: float | None = None) -> Iterator[World]:
    """Join the processes that the launcher started (its environment variables say so), and leave them at the end.

    The group is left on errors too, so that nothing hangs and nothing warns. A group that is already open is used
    and stays open.

    Args:
        device: `auto` (CUDA when there is one), `cpu`, `cuda` (one a process), `cuda:N`, or another name of torch.
        timeout: seconds that `expect_answers` allows to later exchanges, for the message.

    Raises:
        LapeError: the launcher's variables make no sense, the device does not exist, or there are more processes than
            GPUs.
        LostError: another process has ended or does not answer.
    """
    rank, size, local_rank = _launcher_ranks()
    ours = size > 1 and not dist.is_initialized()
    if ours:
        _check_address()
    place = _device(device, local_rank, size)
    if ours:
        _open_group("nccl" if place.type == "cuda" else "gloo", rank, size)
    try:
        yield World(rank, size, place)
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or _LOST.search(str(error))
        if not (ours and lost):
            raise
        within = f" within {timeout:.0f} s (--dist-timeout)" if timeout else ""
        raise LostError(
            f"another process of this run has ended or did not answer{within}, its own message says why "
            f"({reason_of(error)[:160]}): this one ends, too; the last checkpoint stands, go on with --resume auto"
        ) from error
    finally:
        if ours:
            dist.destroy_process_group()


def _launcher_ranks() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as the launcher's variables say. Raises LapeError."""
    numbers = {}
    for name, least, otherwise in (("WORLD_SIZE", 1, 1), ("RANK", 0, 0), ("LOCAL_RANK", 0, 0)):
        text = os.environ.get(name)
        numbers[name] = otherwise if text is None else int(text) if text.isdecimal() else -1
        if numbers[name] < least:
            raise LapeError(f"{name}={text!r} in the environment must be a number from {least} on: {LAUNCH}")
    rank, size, local_rank = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]
    if rank >= size:
        raise LapeError(f"RANK={rank} in the environment, of WORLD_SIZE={size}: ranks count from 0; {LAUNCH}")
    if size > 1 and "RANK" not in os.environ:
        raise LapeError(f"WORLD_SIZE={size} without RANK in the environment: {LAUNCH}")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    if "WORLD_SIZE" not in os.environ and "SLURM_PROCID" in os.environ and tasks not in ("", "1"):
        raise LapeError(
            f"SLURM started {tasks} tasks, and without WORLD_SIZE each would do all of the work alone: start torchrun "
            "once a machine (recipes/slurm.sbatch), or set RANK=0 WORLD_SIZE=1 for one process"
        )
    return rank, size, local_rank


def _check_address() -> None:
    """Raises LapeError where the variables name no place to meet."""
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise LapeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment with MASTER_ADDR={host!r} and MASTER_PORT="
            f"{port!r}, which name no place to meet: {LAUNCH}"
        )
    problems = ["no answer within 10 s"]

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, int(port))
            problems.clear()
        except (OSError, UnicodeError) as error:
            problems[:] = [str(error)]

    thread = threading.Thread(target=look_up, daemon=True)  # which may take minutes
    thread.start()
    thread.join(10)
    if problems:
        raise LapeError(f"MASTER_ADDR={host!r} in the environment is not found ({problems[0]}): {LAUNCH}")


def _open_group(backend: str, rank: int, size: int) -> None:
    """Meet the other processes. Raises LapeError."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # what else starts processes may rightly end before them
        end_with_parent(2 * GRACE)
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    usual = usual and threading.current_thread() is threading.main_thread()
    if usual:  # torch waits in C++, deaf to Python's way of Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        wait = datetime.timedelta(seconds=SETUP_SECONDS)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        text = reason_of(error)
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        what = f"port {os.environ['MASTER_PORT']} is in use" if "EADDRINUSE" in text else "the processes do not meet"
        raise LapeError(f"{what} at {place} (MASTER_ADDR, MASTER_PORT; {text[:120]}): {LAUNCH}") from error
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def expect_answers(seconds: float) -> None:
    """From now on, a process that lets others wait for longer than this counts as dead."""
    if dist.is_initialized():
        dist.barrier()
    _wait_at_most(seconds)


def wait_for_others() -> None:
    """This process has nothing left to do but to wait for the others, however long their work may take."""
    _wait_at_most(SETUP_SECONDS)


def _wait_at_most(seconds: float) -> None:
    if not dist.is_initialized():
        return
    wait = datetime.timedelta(seconds=seconds)
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(wait)
    else:  # torch before 2.12
        dist.distributed_c10d._set_pg_timeout(wait)


def rank_and_size() -> tuple[int, int]:
    """Which process this is, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up each value over all processes, in float64 on the CPU; every process gets the same bits."""
    total = values.detach().cpu().double()
    if dist.is_initialized():
        total = total.to(_collective_device())
        dist.all_reduce(total)
    return total.cpu()


class Reading:
    """Numbers on their way from a device to this process, which goes on meanwhile."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._arrival: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrival = torch.cuda.Event(blocking=True)
            self._arrival.record()

    def read(self) -> list[float]:
        """Wait for them, and for nothing that was begun after them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers


def mean_over_ranks(tensor: Tensor, numbers: Sequence[float]) -> Tensor:
    """Float64 means over the processes of the values of `tensor` and, behind them, of their `numbers`.

    They lie where `tensor` does if that is on CUDA, and nothing is waited for; else on the CPU.
    """
    means = torch.tensor(numbers, dtype=torch.float64)
    if tensor.is_cuda:  # from pinned memory a copy is not waited for
        means = means.pin_memory().to(tensor.device, non_blocking=True)
    means = torch.cat([tensor.to(means.device).double(), means])
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return means


def all_of(text: str) -> list[str]:
    """What each process says, in the order of their ranks; every process gets all of it."""
    if not dist.is_initialized():
        return [text]
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def on_main(action: Callable[[], T]) -> T | None:
    """Run `action` on rank 0; all processes go on together, or all raise what went wrong there.

    Returns what `action` returned, None in the other processes. Raises LapeError where it raised one, or could not read
    or write a file.
    """
    result = None
    problems: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = action()
        except (LapeError, OSError) as error:
            problems = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(problems, src=0, device=_collective_device())
    if problems[0] is not None:
        raise LapeError(problems[0])
    return result


def _device(name: str, local_rank: int, size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise LapeError(f"device={name!r} but this machine has no CUDA: use --device cpu")
        index = local_rank if name == "cuda" or size > 1 else int(name.removeprefix("cuda:"))
        if index >= torch.cuda.device_count():
            raise LapeError(
                f"GPU {index} is asked for, this machine has {torch.cuda.device_count()}: "
                "start one process a GPU (--nproc_per_node), or use --device cpu"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise LapeError(f"device={name!r} does not work on this machine: use --device cpu") from None
    return torch.device(name)


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
