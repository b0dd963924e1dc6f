"""The options of `lape visualize`: each has its name, default and meaning here alone.

The command line makes its flags of the fields, and their `help` is what `--help` says.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from lape.errors import LapeError


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options; `text` is its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What is read from a checkpoint, and what is drawn of it; token, size and view as in `lape.positions`."""

    model_name: str | None = option(None, "name of the folder (default: model and join)")
    token: int | None = option(None, "patch whose map is drawn (default: the centre)")
    size: tuple[int, ...] | None = option(None, "image side, or height and width, pixels (default: the model's)")
    view: Literal["seen", "received", "unbiased"] | None = option(
        None, "positions as attention sees them (unbiased: less the norm's bias) or a block receives them"
    )
    join_type: str | None = option(None, "must agree with the checkpoint, if it says")
    pe: str | None = option(None, "must agree with the checkpoint, if it says")
    ema: bool = option(False, "draw the averaged weights")

    @property
    def sides(self) -> int | tuple[int, int] | None:
        """The size as `lape.positions` takes it. Raises LapeError for more than two values."""
        if self.size is None:
            return None
        if len(self.size) > 2:
            values = " ".join(map(str, self.size))
            raise LapeError(f"--size {values} has {len(self.size)} values: give one, or height and width")
        return self.size[0] if len(self.size) == 1 else (self.size[0], self.size[1])
