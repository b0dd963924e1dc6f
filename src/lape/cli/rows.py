"""Rows of results as JSON and CSV files that grow as results come and are whole after each of them."""

import csv
import errno
import glob
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

from lape.errors import LapeError
from lape.files.atomic import hold, is_stream, remove_leftovers, write_content
from lape.names import printable

Row = dict[str, Any]


@contextmanager
def row_writer(json_path: str | None, csv_path: str | None) -> Iterator[Callable[[list[Row]], None]]:
    """What takes rows and writes them to these files ("-": stdout, None: nowhere). A file that was there before is
    replaced by the first rows. Raises LapeError where it cannot be written."""
    with ExitStack() as at_end:
        tables = [
            at_end.enter_context(_table(path, *form))
            for path, form in ((json_path, (json_text, "\n]\n")), (csv_path, (csv_text, "")))
            if path is not None
        ]

        def add(rows: list[Row]) -> None:
            for table in tables:
                table(rows)

        yield add


@contextmanager
def _table(path: str, text: Callable[[list[Row], bool], str], tail: str) -> Iterator[Callable[[list[Row]], None]]:
    """`tail` ends the file after each addition, and the next one is written over it."""
    if path == "-" or is_stream(path):  # nothing can be written over
        pieces: list[str] = []
        with destination(path) as write:
            yield lambda rows: pieces.append(text(rows, not pieces))
            write("".join(pieces) + tail if pieces else "")
        return
    place = Path(path)
    try:
        remove_leftovers(place.parent, f".{glob.escape(place.name)}.*.tmp")
        descriptor, temporary = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent)
    except OSError as error:
        raise LapeError(f"{path!r} cannot be written ({error.strerror}): give another file") from None
    hold(descriptor)
    first = True

    def add(rows: list[Row]) -> None:
        nonlocal first
        end = file.seek(0 if first else -len(tail), os.SEEK_END)
        try:
            _write(file.fileno(), text(rows, first) + tail)
            if first:
                os.replace(temporary, place)
                first = False
        except OSError as error:
            if not first:
                file.seek(end)
                file.truncate()
                _write(file.fileno(), tail)
            raise LapeError(f"{path!r} cannot be written ({error.strerror}): the rows before are") from None

    with os.fdopen(descriptor, "wb", buffering=0) as file:
        try:
            os.chmod(temporary, 0o644)
            yield add
            os.fsync(file.fileno())
        finally:
            if first:
                os.unlink(temporary)


@contextmanager
def destination(path: str) -> Iterator[Callable[[str], None]]:
    """What writes one text: a file as a whole, or to stdout ("-"), or into a pipe or a device, which is opened now: one
    that nobody reads would be waited for without end. Raises LapeError where it cannot be written."""
    if path == "-":
        yield lambda text: print(text, end="")
        return
    if not is_stream(path):
        yield partial(write_content, path)
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        reason = "nobody reads this pipe" if error.errno == errno.ENXIO else error.strerror
        raise LapeError(f"{path!r} cannot be written ({reason}): give another file") from None

    def write(text: str) -> None:
        try:
            _write(descriptor, text)
        except OSError as error:
            raise LapeError(f"{path!r} cannot be written ({error.strerror}): give another file") from None

    try:
        os.set_blocking(descriptor, True)
        yield write
    finally:
        os.close(descriptor)


def _write(descriptor: int, text: str) -> None:
    """All of it: a pipe, or a disk that is almost full, takes a part without an error."""
    rest = memoryview(text.encode())
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def json_text(rows: list[Row], first: bool) -> str:
    body = ",\n".join(indent(json.dumps(row, indent=1, ensure_ascii=False), " ") for row in rows)
    return ("[\n" if first else ",\n") + escaped(body)


def escaped(text: str) -> str:
    """JSON without characters that steer a terminal or that UTF-8 lacks, as file names in other encodings have them."""
    return re.sub(r"[^\n]", lambda m: m[0] if m[0].isprintable() else json.dumps(m[0])[1:-1], text)


def csv_text(rows: list[Row], first: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if first:
        writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is quoted as one that it takes for a text."""
    text = printable(value) if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@")) else text
