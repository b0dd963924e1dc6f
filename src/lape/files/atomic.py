"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from lape.errors import LapeError


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], object], *, previous: str | Path | None = None
) -> None:
    """Calls `write(file)` on a temporary file beside `path`, syncs it to disk and renames it: whole or not at all.

    Temporary files that killed processes have left for the same `path` are removed.

    Args:
        previous: in the same folder; what was at `path` is kept under this name.

    Raises LapeError when the folder cannot be written; an earlier file at `path` is untouched then.
    """
    path = Path(path)
    check_place(path)
    temporary = None
    problem: OSError | None = None
    try:
        remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.tmp")
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        hold(descriptor)
        with os.fdopen(descriptor, "wb") as file:
            recorder = _RecordingFile(file)
            try:
                write(cast(BinaryIO, recorder))
                file.flush()
            finally:
                problem = recorder.problem
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            if previous is not None and path.exists():
                _keep(path, Path(previous))
            put_in_place({Path(temporary): path})
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        problem = problem or (error if isinstance(error, OSError) else None)
        if problem is not None:
            raise LapeError(
                f"cannot write {path}: {problem.strerror or problem}; what was there before is untouched"
            ) from error
        raise


def write_content(path: str | Path, content: str | bytes) -> None:
    """`write_atomically` of what is known as a whole; a text in UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    write_atomically(path, lambda file: file.write(data))


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether it is a pipe or a device, or stands for a file that is open (/dev/stdout): no place to rename to."""
    place = os.fspath(path)
    try:
        mode = os.stat(place).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return True
    except (OSError, ValueError):  # what is not there may be a link all the same
        pass
    for _ in range(40):
        folder = os.path.realpath(os.path.dirname(place))
        if folder == "/dev" or folder.startswith("/proc/"):
            return True
        if not os.path.islink(place):
            break
        place = os.path.join(os.path.dirname(place), os.readlink(place))
    return False


def check_place(path: str | os.PathLike[str]) -> None:
    """Raises LapeError for what `is_stream`: it would be replaced by a file."""
    if is_stream(path):
        raise LapeError(
            f"{path} is a pipe or a device, or stands for an open file: name a file that can be written as a whole"
        )


def check_outputs(
    outputs: Iterable[str | os.PathLike[str] | None],
    inputs: Iterable[str | os.PathLike[str]] = (),
    *,
    streams: bool = False,
) -> None:
    """Before the work: raises LapeError where a file cannot be written, would be written twice, or would replace what
    is read. None and "-" are no files. `streams`: pipes and devices will do."""
    outputs_by_place: dict[str, str] = {}
    files = [os.fspath(path) for path in outputs if path is not None and path != "-"]
    for path in files:
        if not streams:
            check_place(path)
        stream, folder = is_stream(path), os.path.dirname(path) or "."
        try:
            place = os.path.realpath(path)
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "a folder")
            if not stream:
                tempfile.NamedTemporaryFile(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=".tmp").close()
        except (OSError, ValueError) as error:
            reason = (
                f"no folder {folder}" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
            )
            raise LapeError(f"{path!r} cannot be written ({reason}): name a file in a folder that is there") from None
        if place in outputs_by_place and not stream:
            raise LapeError(f"{outputs_by_place[place]!r} and {path!r} are one file: give two")
        outputs_by_place[place] = path
    keep_inputs(files, inputs)


def keep_inputs(outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raises LapeError where writing an output would replace what is read; links count as what they point to.

    What is in a folder that is read is read.
    """
    sources = [Path(path).resolve() for path in inputs if os.path.exists(path)]
    for output in filter(os.path.exists, outputs):
        place = Path(output).resolve()
        for source in sources:
            if os.path.samefile(place, source) or place in source.parents or source in place.parents:
                raise LapeError(f"{output} would replace what is read ({source}): give another file, nothing was done")


def put_in_place(places: Mapping[Path, Path]) -> None:
    """Renames whole files to where they belong, one straight after the other, and makes that durable."""
    for file, place in places.items():
        os.replace(file, place)
    for folder in {place.parent for place in places.values()}:
        _sync_folder(folder)


def hold(descriptor: int) -> bool:
    """Whether this open file or folder could be locked as this process's, until it is closed or the process ends."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # Windows; somebody else's; a file system without locks
        return False
    return True


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes what matches and no living process holds: it was left by one that was killed."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if hold(descriptor):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(descriptor)


class _RecordingFile:
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


@contextlib.contextmanager
def unfinished(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `folder` for what is not finished, removed in the end, and what killed processes left of such."""
    remove_leftovers(folder, f"{glob.escape(prefix)}*")
    with tempfile.TemporaryDirectory(dir=folder, prefix=prefix) as place:
        descriptor = os.open(place if os.name == "posix" else os.devnull, os.O_RDONLY)
        try:
            hold(descriptor)
            yield Path(place)
        finally:
            os.close(descriptor)
