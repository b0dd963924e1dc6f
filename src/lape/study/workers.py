"""Trainings side by side: one process each, one thread each, so that a result does not depend on how many there are.

On CUDA the processes share the GPU; where there are several GPUs they are dealt out to them in turn.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from lape.errors import LapeError
from lape.recipe import Recipe
from lape.study.numbers import Run

Job = Callable[[Recipe, Callable[[], None]], Any]
"""Trains by a recipe, calls its second argument after every epoch; its result has a `.run`."""


class Agenda(Protocol):
    """Says what to train next."""

    workers: int

    @property
    def epochs(self) -> int:
        """Of all trainings, as far as it is known now."""

    def take(self) -> Sequence[Recipe]:
        """What to train next; empty when nothing is left."""

    def finished(self, run: Run) -> None: ...


def run_all(agenda: Agenda, job: Job, told: Callable[[Any], str]) -> list[Any]:
    """Trains what the agenda hands out, and says how far it is: a bar on a terminal, a line (`told`) a training."""
    done = []
    with _progress(agenda) as (tick, say):
        for one in (_in_turn if agenda.workers == 1 else _side_by_side)(agenda, job, tick):
            done.append(one)
            say(told(one))
    return done


def _in_turn(agenda: Agenda, job: Job, tick: Callable[[], None]) -> Iterator[Any]:
    import torch

    threads = torch.get_num_threads()
    try:
        while recipes := agenda.take():
            for recipe in recipes:
                one = job(recipe, tick)
                agenda.finished(one.run)
                yield one
    finally:
        torch.set_num_threads(threads)


def _side_by_side(agenda: Agenda, job: Job, tick: Callable[[], None]) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")  # a fork of a process that ran torch can hang
    ticks, places = context.SimpleQueue(), context.SimpleQueue()
    for place in range(agenda.workers):
        places.put(place)
    others = set(multiprocessing.active_children())
    try:
        with ProcessPoolExecutor(agenda.workers, context, _start_worker, (ticks, places)) as pool:
            try:
                pending: set[Future[Any]] = set()
                while True:
                    while len(pending) < agenda.workers and (recipes := agenda.take()):
                        pending |= {pool.submit(_work, job, recipe) for recipe in recipes}
                    if not pending:
                        return
                    done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not ticks.empty():
                        ticks.get()
                        tick()
                    for future in done:
                        agenda.finished(future.result().run)
                        yield future.result()
            except BaseException:  # Ctrl-C above all: do not wait for what runs
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                raise
    except BrokenProcessPool:
        raise LapeError(
            "a training process ended before its work was done (memory?): try workers=1; "
            'a script that calls this needs `if __name__ == "__main__":`'
        ) from None


_ticks: Any = None  # in a worker: where it says that an epoch is over


def _start_worker(ticks: Any, places: Any) -> None:
    global _ticks
    _ticks = ticks
    _take_gpu(places.get())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers


def _take_gpu(place: int) -> None:
    """Make `--device auto` and `cuda` mean one of the GPUs in turn, by the variable that names a process its own.

    Several trainings on one GPU take turns in computing; their memory adds up.
    """
    import torch

    os.environ["LOCAL_RANK"] = str(place % max(1, torch.cuda.device_count()))


def _work(job: Job, recipe: Recipe) -> Any:
    parent = multiprocessing.parent_process()

    def tick() -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit("the parent process is gone")
        _ticks.put(None)

    return job(recipe, tick)


@contextmanager
def _progress(agenda: Agenda) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """Yields (call after every epoch, print a line)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(highlight=False)
    if not console.is_terminal:
        yield (lambda: None), (lambda text: print(text, flush=True))
        return
    columns = (TextColumn("epochs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=agenda.epochs)
        yield (
            lambda: progress.update(task, advance=1, total=agenda.epochs),
            lambda text: progress.console.print(text, markup=False),
        )
