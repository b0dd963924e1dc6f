"""The processes of one run: which one am I, add up, agree.

Started by `torchrun`, by `python -m torch.distributed.launch --use_env`, or by plain `python` (then there is one
process and no process group at all). NCCL on CUDA, gloo elsewhere.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lape.errors import LapeError, LostError

# Joining, reading a folder and the like may take one machine longer than another; a step may not.
SETUP_SECONDS = 900.0
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
        LapeError: the device does not exist, or there are more processes than GPUs.
        LostError: another process has ended or does not answer.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")), size)
    ours = size > 1 and not dist.is_initialized()
    if ours:
        backend, wait = "nccl" if chosen.type == "cuda" else "gloo", datetime.timedelta(seconds=SETUP_SECONDS)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=wait)
    try:
        yield World(rank, size, chosen)
    except RuntimeError as error:
        if not (ours and _is_loss(error)):
            raise
        within = f" within {timeout:.0f} s (--dist-timeout)" if timeout else ""
        raise LostError(
            f"another process of this run has ended or did not answer{within}, its own message says why "
            f"({' '.join(str(error).split())[:160]}): this one ends, too; the last checkpoint stands, go on with "
            "--resume auto"
        ) from error
    finally:
        if ours:
            dist.destroy_process_group()


def expect_answers(seconds: float) -> None:
    """From now on, a process that lets others wait for longer than this counts as dead."""
    if not dist.is_initialized():
        return
    dist.barrier()
    _wait_at_most(seconds)


def wait_for_others() -> None:
    """This process has nothing left to do but to wait for the others, however long their work may take."""
    if dist.is_initialized():
        _wait_at_most(SETUP_SECONDS)


def _wait_at_most(seconds: float) -> None:
    wait = datetime.timedelta(seconds=seconds)
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(wait)
    else:  # torch before 2.12
        dist.distributed_c10d._set_pg_timeout(wait)


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))


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


def all_of(text: str) -> list[str]:
    """What each process says, in the order of their ranks; every process gets all of it."""
    if not dist.is_initialized():
        return [text]
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, text)
    return said


def on_main(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; all processes go on together, or all raise what went wrong there.

    Raises:
        LapeError: `action` raised one, or could not read or write a file.
    """
    outcome: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except (LapeError, OSError) as error:
            outcome = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, device=_collective_device())
    if outcome[0] is not None:
        raise LapeError(outcome[0])


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
