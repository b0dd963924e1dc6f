"""Trainings side by side: one process each, one thread each, so that a result does not depend on how many there are.

On CUDA the processes share the GPU; where there are several GPUs they are dealt out to them in turn.
"""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lape.data.processes import GRACE, end_with_parent
from lape.errors import LapeError
from lape.recipe import Recipe
from lape.study.numbers import Run, Variant
from lape.train.faults import Stop

Job = Callable[[Recipe, Callable[[], None]], Run]
"""Trains by a recipe, and calls its second argument after every epoch."""


@dataclass(frozen=True)
class Stage:
    """Trainings that are all done or all left out; `needed`: whatever the time."""

    recipes: tuple[Recipe, ...]
    needed: bool = True

    @property
    def epochs(self) -> int:
        return sum(recipe.epochs for recipe in self.recipes)


class TimeIsUp(Exception):
    """What runs is stopped, and not waited for."""


class Agenda:
    """Hands out stages, and leaves out those that would end after the time limit (seconds; None: there is none)."""

    def __init__(self, stages: Sequence[Stage], workers: int, time_limit: float | None = None):
        self.stages = tuple(stages)
        self.queue = list(stages)
        self.workers = workers
        self.time_limit = time_limit
        self._began = time.perf_counter()
        self._runs: list[Run] = []
        self._epochs_taken = 0

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._began

    @property
    def epochs(self) -> int:
        """Of all trainings that were handed out or wait."""
        return self._epochs_taken + sum(stage.epochs for stage in self.queue)

    def take(self) -> tuple[Recipe, ...]:
        """What to train next; empty when nothing is left."""
        while self.queue:
            stage = self.queue.pop(0)
            if stage.needed or self._in_time(stage):
                self._epochs_taken += stage.epochs
                return stage.recipes
        return ()

    @property
    def omissions(self) -> list[Stage]:
        """The stages that are not whole: not begun, or stopped at the time limit."""
        cells = {(run.variant, run.seed, run.epochs) for run in self._runs}
        return [s for s in self.stages if {(Variant.of(r), r.seed, r.epochs) for r in s.recipes} - cells]

    def check_time(self) -> None:
        """Raises TimeIsUp behind the time limit."""
        if self.time_limit is not None and self.elapsed > self.time_limit:
            raise TimeIsUp

    def add(self, run: Run) -> None:
        """Count a training that has ended."""
        self._runs.append(run)

    def _in_time(self, stage: Stage) -> bool:
        if self.time_limit is None:
            return True
        pace = sum(run.seconds for run in self._runs) / max(sum(run.epochs for run in self._runs), 1)
        rounds = math.ceil(len(stage.recipes) / self.workers)
        return self.elapsed + rounds * stage.recipes[0].epochs * pace <= self.time_limit


def run_all(agenda: Agenda, job: Job, line_of: Callable[[Run], str]) -> list[Run]:
    """Trains what the agenda hands out, and says how far it is: a bar on a terminal, a line a training."""
    runs: list[Run] = []
    way = _in_turn if agenda.workers == 1 else _side_by_side
    with _progress(agenda) as (tick, say), suppress(TimeIsUp), closing(way(agenda, job, tick)) as results:
        for run in results:
            agenda.add(run)
            runs.append(run)
            say(line_of(run))
    return runs


@contextmanager
def explain_interruption(line: Callable[[], str]) -> Iterator[None]:
    """Whoever ends what is in here by a signal is told what is there, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        code = end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 0
        with suppress(OSError):  # a closed terminal
            print(f"{signal.Signals(code - 128).name if code > 128 else 'Ctrl-C'}: {line()}", flush=True)
        raise


def _in_turn(agenda: Agenda, job: Job, tick: Callable[[], None]) -> Generator[Run]:
    import torch

    def in_time() -> None:
        tick()
        agenda.check_time()

    threads, stop = torch.get_num_threads(), Stop()
    try:
        with stop.on_signals():  # a training has its own while it runs
            while recipes := agenda.take():
                for recipe in recipes:
                    yield job(recipe, in_time)
                    if stop.is_set():
                        stop.leave()
    finally:
        torch.set_num_threads(threads)


def _side_by_side(agenda: Agenda, job: Job, tick: Callable[[], None]) -> Generator[Run]:
    context = multiprocessing.get_context("spawn")  # a fork of a process that ran torch can hang
    ticks, places = context.SimpleQueue(), context.SimpleQueue()
    for place in range(agenda.workers):
        places.put(place)
    children_before = set(multiprocessing.active_children())
    stop = Stop()  # rather than an exception anywhere, also in the start of a worker, which would be in no list then
    try:
        with stop.on_signals(), ProcessPoolExecutor(agenda.workers, context, _start_worker, (ticks, places)) as pool:
            try:
                pending: set[Future[Run]] = set()
                while True:
                    if stop.is_set():
                        stop.leave()
                    while len(pending) < agenda.workers and (recipes := agenda.take()):
                        with _deaf_children():
                            pending |= {pool.submit(_work, job, recipe) for recipe in recipes}
                    if not pending:
                        return
                    futures, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    while not ticks.empty():
                        ticks.get()
                        tick()
                    for future in futures:
                        yield future.result()
                    agenda.check_time()
            except BaseException:  # a signal above all: do not wait for what runs
                _end(set(multiprocessing.active_children()) - children_before)
                raise
    except BrokenProcessPool:
        if stop.wait(0.5):  # the signal went to the workers, too, and their end was seen first
            stop.leave()
        raise LapeError(
            "a training process ended before its work was done (memory?): try workers=1; "
            'a script that calls this needs `if __name__ == "__main__":`'
        ) from None


def _end(workers: Collection[Any]) -> None:
    """Each may finish its step and save, all in the same time."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + GRACE
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        worker.kill()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """What starts in here never hears Ctrl-C, not while it imports either; this process hears it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_ticks: Any = None  # in a worker: where it says that an epoch is over


def _start_worker(ticks: Any, places: Any) -> None:
    global _ticks
    _ticks = ticks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    end_with_parent(GRACE)
    _take_gpu(places.get())


def _take_gpu(place: int) -> None:
    """Make `--device auto` and `cuda` mean one of the GPUs in turn, by the variable that names a process its own.

    Several trainings on one GPU take turns in computing; their memory adds up.
    """
    import torch

    os.environ["LOCAL_RANK"] = str(place % max(1, torch.cuda.device_count()))


def _work(job: Job, recipe: Recipe) -> Run:
    try:
        return job(recipe, lambda: _ticks.put(None))
    except SystemExit:  # SIGTERM, above all: the pool would catch it, and this process take the next recipe
        os._exit(128 + signal.SIGTERM)


@contextmanager
def _progress(agenda: Agenda) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """Yields (call after every epoch, print a line)."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        yield (lambda: None), (lambda text: print(text, flush=True))
        return
    count = (bars.TextColumn("epochs"), bars.BarColumn(), bars.MofNCompleteColumn())
    with bars.Progress(*count, bars.TimeElapsedColumn(), bars.TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=agenda.epochs)
        yield (
            lambda: progress.update(task, advance=1, total=agenda.epochs),
            lambda text: progress.console.print(text, markup=False),
        )
