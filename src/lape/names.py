"""The names of joins and position embeddings, and how a name that a user typed is matched. Loads nothing heavy."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from lape.errors import LapeError

VERSION = "0.2.0"

JOIN_NAMES = ("basic", "share", "unshare", "beside", "LaPE-sharing", "LaPE", "PVG", "MPVG")
PE_NAMES = (
    *("learnable", "1D_sin", "2D_sin", "1D_RPE", "2D_RPE"),
    *("RoPE", "RoPE-mixed", "ALiBi-2D", "LookHere", "PEG", "PEG-6", "none", "own"),
)
TABLE8_NAMES = ("none", "scalar", "scale", "affine", "norm", "scalar-norm", "scale-norm", "layernorm")
PE_NORM_NAMES = (*TABLE8_NAMES, "learned-norm")

# Fields of a recipe that a checkpoint says of itself.
FILE_SETTINGS = ("model", "join_type", "pe", "in_chans", "model_kwargs", "input_size", "eval_crop_ratio", "mean", "std")


def nearest(value: str, spellings: Iterable[str]) -> str | None:
    """Return the spelling that looks most like `value` (case, `-` and `_` do not count), or None."""
    plain = {_plain(name): name for name in spellings}
    matches = get_close_matches(_plain(value), plain, n=1)
    return plain[matches[0]] if matches else None


def printable(text: object) -> str:
    """A text of a file, a path or an error as one line for a terminal, a page or a message.

    What steers a terminal, breaks a line, turns the direction of reading or is no character is written as an escape.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def few(items: Sequence[object], limit: int = 5) -> str:
    """The first ones, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(str(item) for item in items[:limit]) + more


def tell(text: str) -> None:
    """Prints lines, each as a terminal may get it."""
    print("\n".join(map(printable, text.split("\n"))))


def match_name(kind: str, value: str, spellings: Iterable[str]) -> str:
    """Return the canonical spelling of `value`, matched without regard to case.

    Args:
        kind: what the name is for ("join", "pe"); only the message uses it.
        value: what the user wrote.
        spellings: the canonical ones.

    Raises:
        LapeError: `value` is none of them; the message lists them and names the nearest.
    """
    names = list(spellings)
    if not isinstance(value, str):
        raise LapeError(f"{kind}={value!r} is not a name: known are {', '.join(names)}")
    for name in names:
        if str(value).casefold() == name.casefold():
            return name
    guess = nearest(str(value), names)
    hint = f"; did you mean {guess!r}?" if guess else ""
    raise LapeError(f"unknown {kind} {value!r}: known are {', '.join(names)}{hint}")


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
