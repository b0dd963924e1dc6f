"""Where a run is written down: what it was (`run.json`), its epochs (`log.txt`, `log.csv`), its
curves (TensorBoard; wandb and trackio when asked).

Curves have one point an epoch. TensorBoard's file is written anew from the run's history at every start, so a run that
goes on shows one curve, whatever was lost or repeated in between.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lape.errors import LapeError, needs
from lape.files.atomic import write_content
from lape.recipe import Recipe
from lape.train.distributed import World
from lape.train.machine import describe_start

RUN, LOG, TABLE, BOARD = "run.json", "log.txt", "log.csv", "tensorboard"


def check_services(recipe: Recipe) -> None:
    """Refuse a service whose package is missing. Raises LapeError."""
    for name in recipe.log_to:
        if importlib.util.find_spec(name) is None:
            raise LapeError(f"--log-to {name} needs its package: pip install {name}, or leave the flag out")
        if not recipe.output_dir:
            raise LapeError(f"--log-to {name} needs a folder that keeps the run's name: add --output-dir")


class Curves:
    """The curves of a run in `recipe.output_dir`; `history` are the lines of log.txt so far."""

    def __init__(self, recipe: Recipe, history: list[dict[str, Any]], run_id: str) -> None:
        with needs("train"):
            from torch.utils.tensorboard import SummaryWriter

        self._usual = threading.excepthook  # TensorBoard's own thread meets a full disk; what waits for it is told
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else self._usual(args)
        folder = Path(recipe.output_dir) / BOARD
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self.board = SummaryWriter(str(folder))
        for line in history:
            self._draw(line)
        self.board.flush()
        self.services = [self._open(name, recipe, run_id) for name in recipe.log_to]

    @staticmethod
    def _open(name: str, recipe: Recipe, run_id: str) -> Any:
        service = importlib.import_module(name)
        settings: dict[str, Any] = {"project": "lape", "config": recipe.model_dump(mode="json"), "resume": "allow"}
        label = f"{Path(recipe.output_dir).resolve().name}-{run_id[:8]}"
        settings |= {"id": run_id, "dir": recipe.output_dir} if name == "wandb" else {}
        service.init(name=label, **settings)
        return service

    def add(self, line: dict[str, Any]) -> None:
        """Draw an epoch."""
        with _full_disk():
            self._draw(line)
            self.board.flush()
        for service in self.services:
            service.log(_points(line), step=line["epoch"])

    def _draw(self, line: dict[str, Any]) -> None:
        for tag, value in _points(line).items():
            self.board.add_scalar(tag, value, line["epoch"])

    def close(self) -> None:
        with _full_disk():
            self.board.close()
        threading.excepthook = self._usual
        for service in self.services:
            service.finish()


@contextmanager
def _full_disk() -> Iterator[None]:
    """Curves can be drawn again from the log; a disk that is full ends no run for them."""
    try:
        yield
    except OSError as error:
        print(f"no curves: {error.strerror or error}", file=sys.stderr)


def _points(line: dict[str, Any]) -> dict[str, float]:
    """`test_ema_acc1` of a log line becomes the curve `test_ema/acc1`."""
    points = {}
    for name, value in line.items():
        if name == "epoch" or not isinstance(value, int | float):
            continue
        topic = next((topic for topic in ("test_ema", "test", "train") if name.startswith(topic + "_")), "run")
        points[f"{topic}/{name.removeprefix(topic + '_')}"] = value
    return points


def write_log(history: list[dict[str, Any]], folder: Path) -> None:
    """log.txt (one JSON line an epoch) and log.csv (one row an epoch), whole."""
    names = list(dict.fromkeys(name for line in history for name in line))
    # names and numbers: nothing to quote
    rows = [names, *(["" if line.get(name) is None else str(line[name]) for name in names] for line in history)]
    write_content(folder / LOG, "".join(json.dumps(line) + "\n" for line in history))
    write_content(folder / TABLE, "".join(",".join(row) + "\n" for row in rows))


def open_curves(recipe: Recipe, history: list[dict[str, Any]], world: World, place: tuple[int, int]) -> Curves | None:
    """Write run.json and begin the curves of a run with files. `place`: (epoch, step) that it begins with."""
    return Curves(recipe, history, record_run(recipe, world, place)) if recipe.output_dir else None


def record_run(recipe: Recipe, world: World, place: tuple[int, int]) -> str:
    """Write `run.json`: the configuration, and for each start (epoch, step), command, commit, versions and hardware.

    Returns the identity of the run, the same for all its starts.
    """
    path = Path(recipe.output_dir) / RUN
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        run_id, starts = str(record.get("id") or uuid.uuid4().hex), list(record.get("starts") or [])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # it was not written here
        run_id, starts = uuid.uuid4().hex, []
    content = {
        "id": run_id,
        "recipe": recipe.model_dump(mode="json"),
        "starts": [*starts, {"epoch": place[0], "step": place[1], **describe_start(world), "seed": recipe.seed}],
    }
    write_content(path, json.dumps(content, indent=1) + "\n")
    return run_id
