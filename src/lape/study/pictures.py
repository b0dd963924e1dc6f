"""The files of one figure or of numbers: refused before the work, written whole after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lape.errors import LapeError, needs
from lape.files.atomic import check_outputs, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_writable(json_file: str | None, picture: str | None, inputs: Sequence[str]) -> None:
    """Raises LapeError before the work: files that are read or cannot be written, a picture of no known kind."""
    if "-" in (json_file, picture):
        raise LapeError("'-' is taken for no file here, lines are printed to stdout already: name a file")
    check_outputs([json_file, picture], inputs)
    if picture is not None:
        if Path(picture).suffix not in (".png", ".pdf", ".svg"):
            raise LapeError(f"--plot {picture!r} names no kind of picture: end it in .png, .pdf or .svg")
        check_figures()


def check_figures() -> None:
    """Raises LapeError where nothing can be drawn: before the work, not after hours."""
    with needs("plot"):
        import matplotlib  # noqa: F401


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the parts that all of them begin or end with; the last part of a single one."""
    parts = [Path(path).parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    while min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return [str(Path(*p)) for p in parts]


def write_figure(figure: Figure, path: str) -> None:
    """As the kind of picture that its name ends in."""
    kind = Path(path).suffix.removeprefix(".")
    write_atomically(Path(path), lambda file: figure.savefig(file, format=kind, dpi=150))
