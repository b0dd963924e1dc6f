"""The page of the explorer, written.

The file holds everything that it shows and asks no network for anything; its own policy (CSP) forbids it. What it shows
of a model is made in `card`, its bytes in `pack`; its script is the files of SCRIPTS, one after the other.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from torch import nn

from lape.convert.converted import conversions
from lape.convert.positions import Size, describe
from lape.errors import LapeError, needs
from lape.files.atomic import check_outputs, write_content
from lape.files.read import read_checkpoint
from lape.look.explorer.card import Card
from lape.look.explorer.pack import halve_frames

BUDGET = 6_000_000  # bytes of the whole file; what would not fit is kept coarser, and the page says so
SCRIPTS = ("base", "maps", "state", "paint", "picker", "cards", "charts", "save", "controls", "main")


class OfCheckpoint(TypedDict, total=False):
    """What is said of models in checkpoints, as in `lape.look.figures.visualize`."""

    model_name: str | None
    join: str | None
    pe: str | None
    ema: bool


def explore(
    models: nn.Module | str | PathLike[str] | Sequence[Any] | Mapping[str, Any],
    path: str | PathLike[str],
    *,
    images: Sequence[str | PathLike[str]] = (),
    size: Size | None = None,
    title: str = "What position became",
    intro: str = "",
    budget: int = BUDGET,
    **of_checkpoint: Unpack[OfCheckpoint],
) -> Path:
    """Writes the explorer of one or more models into one HTML file and returns its path.

    Args:
        models: a model, a checkpoint (a path), or the name of a model of timm with published weights; several, or a
            mapping of names to them. A model that is not converted has no positions to show, and needs images.
        images: image files, at most 8; each model's attention on them and the similarity of its tokens are added, as it
            would see them in evaluation.
        size: image size in pixels for the positions, as in `lape.positions`; not together with images.
        intro: HTML to put above the explorer, trusted: escape what is not yours.
        budget: bytes. Attention, tokens, and biases that do not repeat, are kept for every second (third, ...) query
            patch where the file would grow larger; positions are always kept whole, of a video those within a frame,
            of every second (fourth, ...) frame if need be.
        of_checkpoint: model_name, join, pe, ema: for checkpoints, as in `lape.look.figures.visualize`.

    Raises LapeError: a model with nothing to show, more images than 8, a checkpoint or an image that cannot
    be read, a file that cannot be written. Nothing is written then.
    """
    if unknown := sorted(of_checkpoint.keys() - OfCheckpoint.__annotations__):
        raise TypeError(f"explore() got an unexpected keyword argument {unknown[0]!r}")
    if len(images) > 8:
        raise LapeError(f"{len(images)} images were given: 8 at most, or the page grows too large")
    if images and size is not None:
        raise LapeError("size shows positions of another grid and images need the model's own: leave one of them out")
    target = Path(path)
    sources = _sources(models)
    check_outputs([target], [*images, *(source for source in sources.values() if isinstance(source, str))])

    def open_model(source: nn.Module | str) -> tuple[nn.Module, dict[str, Any] | None]:
        if isinstance(source, nn.Module):
            return source, None
        import timm

        from lape.files.restore import is_checkpoint, published, restore_to_draw

        if not is_checkpoint(source) and timm.is_model(source):
            return published(source), None
        checkpoint = read_checkpoint(source, unconverted=True)
        model, _ = restore_to_draw(checkpoint, size=size, **of_checkpoint)
        return model, checkpoint.transform

    cards = [Card(name, *open_model(source), images, size) for name, source in sources.items()]
    page = page_text(title, cards, intro, budget)
    write_content(target, page)
    return target


def _sources(models: Any) -> dict[str, nn.Module | str]:
    """name -> model or checkpoint; a model's name is its class and join, a checkpoint's its file and folder."""
    if isinstance(models, Mapping):
        pairs = [(str(name), source) for name, source in models.items()]
    else:
        several = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
        pairs = [(_name_of(source), source) for source in several]
    if not pairs:
        raise LapeError("no model was given: name at least one")
    sources: dict[str, nn.Module | str] = {}
    for name, source in pairs:
        unique = next(n for n in (name, *(f"{name} ({k})" for k in range(2, len(pairs) + 2))) if n not in sources)
        sources[unique] = source if isinstance(source, nn.Module) else os.fspath(source)
    return sources


def _name_of(source: Any) -> str:
    if isinstance(source, nn.Module):
        return f"{type(source).__name__}{f' {describe(source).join}' if conversions(source) else ''}"
    path = Path(source)
    return f"{path.parent.name}/{path.name}" if path.suffix and path.parent.name else path.name


# --- the page ---------------------------------------------------------------------------------------------------------


def page_text(title: str, cards: Sequence[Card], intro: str, budget: int) -> str:
    """The page. Data go in as JSON in which no tag can end; the policy admits this script and this style alone."""
    style, script = _part("explorer.css"), "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    photos = [{"name": p.name, "src": p.picture} for p in cards[0].photos]
    total = sum(map(len, (script, style, intro))) + sum(len(p["src"]) for p in photos) + 40_000
    total += sum(len(m["data"]) for card in cards for m in card.data["maps"])
    if total > budget:  # the second view of the positions is what can be done without
        for card in cards:
            total -= sum(len(m["data"]) for m in card.data["maps"][1:])
            del card.data["maps"][1:]
    positions = [m for card in cards for m in card.data["maps"]]
    while total > budget and any(len(m["frames"]) > 1 for m in positions):
        longest = max(positions, key=lambda m: len(m["frames"]))
        total -= len(longest["data"])
        halve_frames(longest)
        total += len(longest["data"])
    share = max(budget - total, 0) // max(sum(card.wishes for card in cards), 1)
    for card in cards:
        card.add_rest(share)
    data = {
        "title": title,
        "colours": colours(),
        "series": series([card.data["join"] for card in cards]),
        "images": photos,
        "models": [card.data for card in cards],
    }
    parts = {
        "title": html.escape(title),
        "intro": intro,
        "style": style,
        "script": script,
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "script_hash": _hash(script),
        "style_hash": _hash(style),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("explorer.html"))


def series(joins: Sequence[str | None]) -> list[str]:
    """A colour a model: that of its join, as in the curves of a report, where the joins tell the models apart."""
    from lape.look.colours import COLOURS
    from lape.look.figures import SERIES

    join_colours = [COLOURS[join] for join in joins if join in COLOURS]
    return join_colours if len(set(join_colours)) == len(joins) else list(SERIES)


def colours() -> dict[str, list[str]]:
    """The maps of all figures, from the lowest to the highest, 65 colours each: two-sided and one-sided."""
    with needs("plot"):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

    from lape.look.figures import COLOUR_MAP, ONE_SIDED

    maps = {"both": COLOUR_MAP, "one": ONE_SIDED}
    return {side: [to_hex(c) for c in colormaps[name](np.linspace(0, 1, 65))] for side, name in maps.items()}


def _part(name: str) -> str:
    return (resources.files("lape.look.explorer") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
