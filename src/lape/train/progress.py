"""How an epoch is shown while it runs: a bar on a terminal, a line every few steps elsewhere; and where time went."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

from lape.names import tell
from lape.train.faults import peak_memory

if TYPE_CHECKING:
    from lape.data.loaders import BatchPlan
    from lape.train.distributed import World

Say = Callable[[str], None]  # takes a line of output
STARVATION = 0.3  # part of an epoch spent on waiting for images from which on the output gives advice
BAR = 10  # characters of the bar itself
BAR_AND_TIME = BAR + len("/") + len("0:00:00") + 4  # and what stands between the columns
MATTERS = 10.0  # seconds; a shorter epoch is dominated by starting the loader


def silence(_text: str) -> None:
    """Where the lines of all processes but the first go."""


def duration(seconds: float) -> datetime.timedelta:
    """In whole seconds: hours, minutes and seconds as a text."""
    return datetime.timedelta(seconds=int(seconds))


class Progress:
    """The steps of one epoch.

    Args:
        title: what a line starts with.
        first: the step it begins with, of all `steps`; not 0 where a run goes on within an epoch.
        line_interval: steps between two lines.
        say: where lines go. A bar is drawn only where it is print or tell, and stdout a terminal.
    """

    def __init__(
        self, title: str, first: int, steps: int, plan: BatchPlan, world: World, line_interval: int, say: Say
    ) -> None:
        self.title, self.first, self.steps, self.line_interval, self.say = title, first, steps, line_interval, say
        self.images, self.device = plan.total, world.device
        self.reports = 0  # by this call
        self.loss_sum, self.finite = 0.0, 0  # of the steps with a finite loss
        self.wait = self.seconds = 0.0
        self._start = 0.0
        self._bar: Any = None

    def over(self, loader: Iterable[Any]) -> Generator[Any, None, None]:
        """The batches of a loader, with the time that was spent on waiting for them."""
        self._start = mark = time.perf_counter()
        if self.say in (print, tell) and sys.stdout.isatty():
            self._bar = _open_bar(self.title, self.first, self.steps)
        batches = iter(loader)
        try:
            for batch in batches:
                self.wait += time.perf_counter() - mark
                yield batch
                mark = time.perf_counter()
        finally:
            del batches  # ends the loader's processes
            if self._bar is not None:
                self._bar.stop()
        self.seconds = time.perf_counter() - self._start
        if self.seconds > MATTERS and self.wait >= STARVATION * self.seconds:
            part = round(100 * self.wait / self.seconds)
            self.say(
                f"{part}% of the epoch was spent on waiting for images ({self.wait / self.reports:.3f} s of "
                f"{self.seconds / self.reports:.3f} s a step): raise --num-workers, or use --decode fast or smaller "
                "files"
            )

    def report(self, *, loss: float, lr: float, grad_norm: float) -> None:
        """Show a step that is done."""
        self.reports += 1
        if math.isfinite(loss):
            self.loss_sum, self.finite = self.loss_sum + loss, self.finite + 1
        pace = (time.perf_counter() - self._start) / self.reports
        data = self.wait / self.reports
        mean = self.loss_sum / max(self.finite, 1)
        speed, memory = f"{self.images / pace:.0f} img/s", f"mem: {peak_memory(self.device):.0f} MiB"
        rate, losses, gradient = f"lr: {lr:.6f}", f"loss: {loss:.4f} ({mean:.4f})", f"grad: {grad_norm:.3f}"
        if self._bar is not None:
            fields = (
                f"loss: {loss:.4f}",
                f"mean: {mean:.4f}",
                speed,
                rate,
                gradient,
                f"data: {data / pace:.0%}",
                memory,
            )
            # the last go first on a narrow terminal
            room = self._bar.console.width - len(self.title) - 2 * len(str(self.steps)) - BAR_AND_TIME
            count = max((n for n in range(len(fields) + 1) if len("  ".join(fields[:n])) <= room), default=0)
            self._bar.update(self._bar.task_ids[0], advance=1, values="  ".join(fields[:count]))
            return
        step = self.first + self.reports - 1
        if step % self.line_interval == 0 or step == self.steps - 1:
            eta = duration(pace * (self.steps - 1 - step))
            place = f"[{step:{len(str(self.steps))}d}/{self.steps}]"
            self.say(
                f"{self.title}  {place}  eta: {eta}  {rate}  {losses}  {gradient}  "
                f"time: {pace:.4f}  data: {data:.4f}  {speed}  {memory}"
            )

    def timing(self) -> dict[str, float]:
        """Seconds of training and of waiting for data in it; images a second of all processes; the most memory used."""
        return {
            "seconds": round(self.seconds, 3),
            "data_seconds": round(self.wait, 3),
            "images_per_second": round(self.images * self.reports / self.seconds, 1),
            "peak_memory_mib": round(peak_memory(self.device), 1),
        }


def _open_bar(title: str, first: int, steps: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn(title.replace("[", r"\[")),
        BarColumn(BAR),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
        transient=True,
    )
    bar.add_task(title, total=steps, completed=first, values="")
    bar.start()
    return bar
