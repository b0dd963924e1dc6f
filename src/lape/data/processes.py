"""Processes that end: with their parent, when they are told to, and without waiting for one that does not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from typing import Any, TypeVar

from torch.utils.data._utils import signal_handling

from lape.errors import LapeError

Item = TypeVar("Item")
Result = TypeVar("Result")

GRACE = 4.0  # seconds in which a process that is asked to end may finish its step and save
LOOK = 0.5  # seconds between two looks at the parent

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]


def end_with_parent(grace: float = 0.0) -> None:
    """From now on this process ends when the one that started it is gone: at once, or by SIGTERM and after `grace`.

    A thread looks: the kernel's own signal for it comes when the thread that forked ends, and on Linux alone.
    """
    process = multiprocessing.parent_process()
    parent = os.getppid() if process is None else process.pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        if grace:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, chunk: int, fix: str
) -> Iterator[Result]:
    """The results of a function, in order, computed in processes, `chunk` items at a time; with 1 worker, here.

    Raises LapeError, which ends in `fix`, where a process was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    try:
        with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
            yield from pool.map(function, items, chunksize=chunk)
    except BrokenProcessPool:
        raise LapeError(f"a process that reads images was killed, mostly for lack of memory: {fix}") from None


def begin_loader(_worker: int) -> None:
    """The start of a loader process, which ends with its parent and outlives what is sent to its whole group.

    A terminal or a launcher sends its signals to loader processes, too; the training process saves first.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    # A batch that cannot be sent (no room in /dev/shm) would be dropped, and waited for without end.
    Queue._on_queue_feeder_error = staticmethod(lambda _error, _batch: os._exit(1))  # type: ignore[attr-defined]


if sys.platform == "linux":
    from multiprocessing.context import ForkContext, ForkProcess
    from multiprocessing.popen_fork import Popen

    class _Popen(Popen):
        def terminate(self) -> None:
            """Loader processes ignore SIGTERM, and Python's exit waits without end for those that it terminates."""
            self.kill()

    class _LoaderProcess(ForkProcess):
        @staticmethod
        def _Popen(process_obj: Any) -> _Popen:
            return _Popen(process_obj)

    class _Loaders(ForkContext):
        Process = _LoaderProcess


def loader_context() -> Any:
    """How loader processes start. Fork: a fresh interpreter would import torch again in each of every epoch."""
    return _Loaders() if sys.platform == "linux" else multiprocessing.get_context()


def end_loaders(batches: Any) -> None:
    """End the processes of torch's iterator over a loader, at once and whatever they do.

    Torch asks them and waits for each in turn, and without end for its thread that reads what a killed one left half
    written. After a whole epoch it has ended them already.
    """
    if getattr(batches, "_shutdown", True):  # without processes there is no such attribute
        return
    batches._shutdown = True
    signal_handling._remove_worker_pids(id(batches))  # or their end would be an error in the main thread
    batches._worker_pids_set = False
    for worker in batches._workers:
        worker.kill()
    for worker in batches._workers:
        worker.join(GRACE)
    if hasattr(batches, "_pin_memory_thread"):
        batches._pin_memory_thread_done_event.set()
        batches._worker_result_queue.put((None, None))
        batches._pin_memory_thread.join(GRACE)
    for queue in (*batches._index_queues, batches._worker_result_queue):
        queue.cancel_join_thread()
