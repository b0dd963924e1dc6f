"""How an epoch is shown while it runs: a bar on a terminal, a line every few steps elsewhere; and where time went."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

STARVED = 0.5  # part of an epoch spent on waiting for images from which on the output gives advice
MATTERS = 10.0  # seconds; a shorter epoch is dominated by starting the loader


class Progress:
    """The steps of one epoch.

    Args:
        title: what a line starts with.
        first: the step it begins with; not 0 where a run goes on within an epoch.
        steps: how many the epoch has.
        every: steps between two lines.
        say: where lines go. A bar is drawn only where it is print and stdout a terminal.
    """

    def __init__(self, title: str, first: int, steps: int, every: int, say: Callable[[str], None]):
        self.title, self.first, self.steps, self.every, self.say = title, first, steps, every, say
        self.done = 0  # by this call
        self.loss_sum = 0.0
        self.waited = self.seconds = 0.0
        self._began = 0.0
        self._bar: Any = None

    def over(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader, with the time that was spent on waiting for them."""
        self._began = mark = time.perf_counter()
        if self.say is print and sys.stdout.isatty():
            self._bar = _open_bar(self.title, self.first, self.steps)
        try:
            for batch in loader:
                self.waited += time.perf_counter() - mark
                yield batch
                mark = time.perf_counter()
        finally:
            if self._bar is not None:
                self._bar.stop()
        self.seconds = time.perf_counter() - self._began
        if self.seconds > MATTERS and self.waited > STARVED * self.seconds:
            part = round(100 * self.waited / self.seconds)
            self.say(f"{part}% of the epoch was spent on waiting for images: raise --num-workers, or use smaller files")

    def report(self, *, loss: float, lr: float) -> None:
        """Show a step that is done."""
        self.done += 1
        self.loss_sum += loss
        values = f"lr: {lr:.6f}  loss: {loss:.4f} ({self.loss_sum / self.done:.4f})"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, values=values)
            return
        step = self.first + self.done - 1
        if step % self.every == 0 or step == self.steps - 1:
            each = (time.perf_counter() - self._began) / self.done
            eta = datetime.timedelta(seconds=int(each * (self.steps - 1 - step)))
            place = f"[{step:{len(str(self.steps))}d}/{self.steps}]"
            data = self.waited / self.done
            self.say(f"{self.title}  {place}  eta: {eta}  {values}  time: {each:.4f}  data: {data:.4f}")

    def timing(self, batch: int) -> dict[str, float]:
        """Seconds of training and of waiting for data in it; images a second, a step having `batch` of them."""
        return {
            "seconds": round(self.seconds, 3),
            "data_seconds": round(self.waited, 3),
            "images_per_second": round(batch * self.done / self.seconds, 1),
        }


def _open_bar(title: str, first: int, steps: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn(title.replace("[", r"\[")),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
        transient=True,
    )
    bar.add_task(title, total=steps, completed=first, values="")
    bar.start()
    return bar
