"""Errors that a user can cause. Everything else is a bug and may show its traceback.

The command line prints a `LapeError` as one line and exits with 2, so each message names the value that was
given, what is allowed, and the fix.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class LapeError(ValueError):
    """Wrong use: the message names the value, the allowed ones and the fix."""


class UnsupportedModelError(LapeError):
    """The model cannot be converted: the message names the class found, what is supported and how to register one."""


class DataError(LapeError):
    """A data set that cannot be trusted: missing, empty, mislabelled or corrupt. The message names the path."""


class CheckpointError(LapeError):
    """A file that is not a checkpoint, is unsafe to load, or does not fit the model. The message names the keys."""


class NotFiniteError(LapeError):
    """A result that is NaN or infinite, so that nothing can be said of it. The message names what computed it."""


class LostError(LapeError):
    """Another process of the run is gone or silent."""


def check_finite(values: "Tensor", what: str) -> None:
    """Raises NotFiniteError where one of the values is NaN or infinite. `what`: "the outputs of ..."."""
    count = values.numel() - int(values.isfinite().sum())
    if count:
        raise NotFiniteError(
            f"{what} are not finite: {count} of {values.numel()} values are NaN or infinite; use weights from before "
            "they were lost"
        )


def check_file(path: str | os.PathLike[str], kind: type[LapeError] = LapeError) -> None:
    """Raises `kind` for a pipe or a device, which could be read for ever. What is no path, or missing, passes."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise kind(f"{path} is a pipe or a device, no file that can be read as a whole: copy it into a file")


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line; they raise what they like."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def needs(extra: str, otherwise: str = "") -> Iterator[None]:
    """Imports in here may need one of the package's extras: what is missing is one line with the command.

    Raises LapeError, which ends in `otherwise`, another way out.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lape"):
            raise
        raise LapeError(f"{error.name} is not installed: pip install 'lape[{extra}]'{otherwise}") from error


@contextmanager
def arguments_as(**names: str) -> Iterator[None]:
    """Errors name an argument as `size`, in backticks; here they get the caller's word for it, such as --input-size."""
    try:
        yield
    except LapeError as error:
        message = re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[0]), str(error))
        raise type(error)(message) from error
