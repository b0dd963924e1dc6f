"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from lape.errors import LapeError, check_file


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], object], *, previous: str | Path | None = None
) -> None:
    """Calls `write(file)` on a temporary file beside `path`, syncs it to disk and renames it: whole or not at all.

    Args:
        previous: in the same folder; what was at `path` is kept under this name.

    Raises LapeError when the folder cannot be written; an earlier file at `path` is untouched then.
    """
    path = Path(path)
    check_file(path)  # a device would be replaced
    temporary = None
    problem: OSError | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            checked = _Checked(file)
            try:
                write(cast(BinaryIO, checked))
                file.flush()
            finally:
                problem = checked.problem
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if previous is not None and path.exists():
            _keep(path, Path(previous))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        problem = problem or (error if isinstance(error, OSError) else None)
        if problem is not None:
            raise LapeError(
                f"cannot write {path}: {problem.strerror or problem}; what was there before is untouched"
            ) from error
        raise


class _Checked:
    """A file that remembers why it could not be written: torch's writer says it in other words, as a RuntimeError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.problem: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.problem = error
            raise


def _keep(path: Path, previous: Path) -> None:
    """Gives the file a second name, in one step; both names stay valid when the first gets a new file."""
    fresh = path.with_name(f".{path.name}.kept.tmp")
    fresh.unlink(missing_ok=True)
    try:
        os.link(path, fresh)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, fresh)
    os.replace(fresh, previous)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable. Systems that cannot open folders (Windows) do so themselves."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
