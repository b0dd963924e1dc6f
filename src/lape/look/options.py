"""The options of `lape visualize`: each has its name, default and meaning here alone.

The command line makes its flags of the fields, and their `help` is what `--help` says.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from lape.errors import LapeError

INCHES = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72}


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options; `text` is its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What is read from a checkpoint, and what is drawn of it; token, size and view as in `lape.positions`."""

    model_name: str | None = option(None, "name of the folder (default: model and join)")
    token: int | None = option(None, "patch whose map is drawn (default: the centre)")
    size: tuple[int, ...] | None = option(
        None, "image side, or height and width, pixels; of a video, frames first (default: the model's)"
    )
    view: Literal["seen", "received", "unbiased"] | None = option(
        None, "positions as attention sees them (unbiased: less the norm's bias) or a block receives them"
    )
    join_type: str | None = option(None, "must agree with the checkpoint, if it says")
    pe: str | None = option(None, "must agree with the checkpoint, if it says")
    ema: bool = option(False, "draw the averaged weights")
    layers: tuple[int, ...] | None = option(None, "layers to draw, from 0 (default: all, and the raw table)")
    range: Literal["-1..1", "0..1", "auto"] | None = option(
        None, "values between the ends of the colours; auto: those of what is drawn (default: -1..1; biases: symmetric)"
    )
    title: bool = option(True, "write above each figure what it shows")
    width: str | None = option(None, "width of each figure, such as 3.25in or 8.3cm (default: as the layers need)")
    dpi: int = option(300, "dots an inch in PNG and JPEG")

    def __post_init__(self) -> None:
        if not 1 <= self.dpi <= 2400:
            raise LapeError(f"dpi={self.dpi!r} is not allowed: give 1 to 2400 dots an inch, such as 300")
        if self.range not in (None, "-1..1", "0..1", "auto"):
            raise LapeError(f"range={self.range!r} is not known: use -1..1, 0..1 or auto")
        _ = self.inches

    @property
    def inches(self) -> float | None:
        """The width in inches. Raises LapeError for what is no length between 1 and 50 inches."""
        if self.width is None:
            return None
        match = re.fullmatch(r"(\d*\.?\d+) ?(in|cm|mm|pt)", self.width)
        inches = float(match[1]) * INCHES[match[2]] if match else math.nan
        if not 1 <= inches <= 50:
            raise LapeError(f"width={self.width!r} is not allowed: give 1 to 50 inches as 3.25in, 8.3cm, 83mm or 234pt")
        return inches

    @property
    def of_checkpoint(self) -> dict[str, Any]:
        """What is read of a checkpoint, as arguments of `restore_to_draw`."""
        return {"size": self.sides, "ema": self.ema, "join": self.join_type, "pe": self.pe}

    def layer_indices(self, count: int) -> list[int]:
        """The layers to draw, of `count`. Raises LapeError where there is no such layer."""
        for layer in self.layers or ():
            if not 0 <= layer < count:
                raise LapeError(f"layer {layer} is not one of the model's {count}: choose 0 to {count - 1}")
        return list(range(count)) if self.layers is None else sorted(set(self.layers))

    @property
    def sides(self) -> int | tuple[int, ...] | None:
        """The size as `lape.positions` takes it. Raises LapeError for more than three values."""
        if self.size is None:
            return None
        if len(self.size) > 3:
            values = " ".join(map(str, self.size))
            raise LapeError(f"--size {values} has {len(self.size)} values: give one, or height and width")
        return self.size[0] if len(self.size) == 1 else self.size
