"""The page of the explorer, written.

The file holds everything that it shows and asks no network for anything; its own policy (CSP) forbids it. Maps are
quantised to bytes and compressed; of a symmetric map only one triangle is kept. Numbers come from `lape.correlation`,
`lape.position_bias`, `lape.look.measures` and `lape.look.probe`; the page computes none.
Shape suffixes: L layers, H heads, Q query patches kept, n patches.
"""

import base64
import hashlib
import html
import io
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lape.convert.converted import conversion_of
from lape.convert.positions import Size, View, describe
from lape.core.position import KINDS, Grid
from lape.errors import LapeError, check_finite, needs
from lape.files.atomic import check_outputs, write_atomically
from lape.files.read import read_checkpoint
from lape.look.measures import MEASURES, measure_all
from lape.look.similarity import Maps, bias_to_show, grid_at, half_distance, locality_radius, monotonicity

BUDGET = 6_000_000  # bytes of the whole file; what would not fit is kept coarser, and the page says so
PHOTO_SIDE = 448  # pixels of the longer side of a photograph in the page
VIEWS: tuple[tuple[View, str], ...] = (
    ("seen", "as attention sees it"),
    ("unbiased", "without the bias of its norm"),
)


@dataclass(frozen=True)
class Photo:
    """A photograph as one model sees it: what the page shows, and the tensor (1, C, height, width) of the model."""

    name: str
    picture: str  # data: address of a JPEG
    pixels: Tensor


def explore(
    models: nn.Module | str | PathLike[str] | Sequence[Any] | Mapping[str, Any],
    path: str | PathLike[str],
    *,
    images: Sequence[str | PathLike[str]] = (),
    size: Size | None = None,
    title: str = "What position became",
    intro: str = "",
    model_name: str | None = None,
    join: str | None = None,
    pe: str | None = None,
    ema: bool = False,
    budget: int = BUDGET,
) -> Path:
    """Writes the explorer of one or more models into one HTML file and returns its path.

    Args:
        models: a converted model or a checkpoint (a path), several, or a mapping of names to them.
        images: image files, at most 8; each model's attention on them is added, as it would see them in evaluation.
        size: image size in pixels for the positions, as in `lape.positions`; not together with images.
        model_name, join, pe, ema: for checkpoints, as in `lape.look.figures.visualize`.
        intro: HTML to put above the explorer, trusted: escape what is not yours.
        budget: bytes. Attention, and biases that do not repeat, are kept for every second (third, ...) query patch
            where the file would grow larger; positions are always kept whole.

    Raises LapeError: a model without position, more images than 8, a checkpoint or an image that cannot be read, a file
    that cannot be written. Nothing is written then.
    """
    if len(images) > 8:
        raise LapeError(f"{len(images)} images were given: 8 at most, or the page grows too large")
    if images and size is not None:
        raise LapeError("size shows positions of another grid and images need the model's own: leave one of them out")
    target = Path(path)
    named = _named(models)
    check_outputs([target], [*images, *(source for source in named.values() if isinstance(source, Path))])

    def open_model(source: nn.Module | Path) -> tuple[nn.Module, dict[str, Any] | None]:
        if isinstance(source, nn.Module):
            return source, None
        from lape.files.restore import restore_to_draw

        checkpoint = read_checkpoint(source)
        model, _ = restore_to_draw(checkpoint, model_name, size=size, ema=ema, join=join, pe=pe)
        return model, checkpoint.transform

    cards = [_Card(name, *open_model(source), images, size) for name, source in named.items()]
    page = page_text(title, cards, intro, budget)
    write_atomically(target, lambda file: file.write(page.encode()))
    return target


def _named(models: Any) -> dict[str, nn.Module | Path]:
    """name -> model or checkpoint; a model's name is its class and join, a checkpoint's its file and folder."""
    if isinstance(models, Mapping):
        pairs = [(str(name), source) for name, source in models.items()]
    else:
        several = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
        pairs = [(_name_of(source), source) for source in several]
    if not pairs:
        raise LapeError("no model was given: name at least one")
    sources: dict[str, nn.Module | Path] = {}
    for name, source in pairs:
        unique = next(n for n in (name, *(f"{name} ({k})" for k in range(2, len(pairs) + 2))) if n not in sources)
        sources[unique] = source if isinstance(source, nn.Module) else Path(source)
    return sources


def _name_of(source: Any) -> str:
    if isinstance(source, nn.Module):
        return f"{type(source).__name__} {describe(source).join}"
    path = Path(source)
    return f"{path.parent.name}/{path.name}" if path.suffix and path.parent.name else path.name


class _Card:
    """One model of the page: its maps, measures and attention, as plain data."""

    def __init__(
        self, name: str, model: nn.Module, transform: dict[str, Any] | None, images: Sequence[Any], size: Size | None
    ):
        self.model, self.about = model, describe(model)
        self.grid = grid_at(model, size)
        self.size = size
        self.photos = [_photo(model, path, transform) for path in images]
        self.data: dict[str, Any] = {
            "name": name,
            "join": self.about.join,
            "pe": self.about.pe,
            "about": str(self.about),
            "grid": list(self.grid),
            "layers": self.about.blocks,
            "heads": conversion_of(model).anatomy.num_heads,
            "maps": [],
            "measures": [],
            "attention": [],
        }
        if KINDS[self.about.pe].is_table:
            self._add_positions()
        elif not KINDS[self.about.pe].is_bias and not images:
            raise LapeError(
                f"pe={self.about.pe!r}: there is nothing to show of {name} without images (attention), "
                f"{KINDS[self.about.pe].missing}"
            )

    def _add_maps(self, label: str, kind: str, first: int, layers: int, packed: dict[str, Any]) -> None:
        self.data["maps"].append({"label": label, "kind": kind, "first": first, "layers": layers, **packed})

    def _add_measure(self, label: str, hint: str, value_L: Tensor, **more: Any) -> None:
        self.data["measures"].append({"label": label, "hint": hint, "values": finite(value_L), **more})

    def _add_positions(self) -> None:
        for view, label in VIEWS:
            if view == "unbiased" and self.about.folded:
                continue
            maps = Maps.of(self.model, self.size, view)
            maps_Lnn = torch.stack(list(maps.columns.values()))
            first = 0 if maps.table_nn is None else -1
            self._add_maps(label, "cosine", first, len(maps_Lnn), triangle(maps_Lnn.numpy()))
            if view == "seen":
                for name, value_L in measure_all(maps.layers_Lnn, maps.patches_LnD, self.grid).items():
                    self._add_measure(MEASURES[name].label, MEASURES[name].hint, value_L)

    def add_bias(self, budget: int) -> None:
        bias_LHnn = bias_to_show(self.model)
        check_finite(bias_LHnn, f"the biases of {self.data['name']}")
        for measure in (locality_radius, monotonicity, half_distance):
            about = MEASURES[measure.__name__]
            value_L = measure(bias_LHnn.mean(1), self.grid)
            self._add_measure(f"bias: {about.label}", f"mean over heads; {about.hint}", value_L)
        packed = rows(bias_LHnn.numpy(), self.grid, budget, signed=True)
        self._add_maps("bias on attention", "bias", 0, len(bias_LHnn), packed)

    def add_attention(self, budget: int) -> None:
        from lape.look.probe import attention, attention_distance, rollout, token_and_position

        if not self.photos:
            return
        images = torch.cat([photo.pixels for photo in self.photos])
        prefix, each = self.about.prefix_tokens, budget // len(self.photos)
        for photo in self.photos:
            weights_LHnn = attention(self.model, photo.pixels)[:, 0, :, prefix:, prefix:].numpy()
            self.data["attention"].append(rows(weights_LHnn, self.grid, each, signed=False))
        self.data["rollout"] = [finite(r.flatten() / r.max()) for r in rollout(self.model, images)]
        distance_LH, hint = attention_distance(self.model, images), "on the photographs"
        dots = [finite(heads) for heads in distance_LH]
        self._add_measure("mean attention distance, pixels", f"{hint}; a dot a head", distance_LH.mean(1), dots=dots)
        if KINDS[self.about.pe].is_table:
            ratios = token_and_position(self.model, images)
            self._add_measure("position's share, σ_P / σ_(x+P)", hint, ratios.scale)
            hint = f"{hint}, after the token norm"
            self._add_measure("correlation of token and position", hint, ratios.correlation)


def finite(values: Tensor) -> list[float | None]:
    """Plain numbers of five digits; None for what is not finite."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


# --- numbers to bytes -------------------------------------------------------------------------------------------------


def blob(values: np.ndarray) -> str:
    """Bytes, compressed, as text."""
    return base64.b64encode(zlib.compress(values.tobytes(), 6)).decode()


def triangle(maps_Lnn: np.ndarray) -> dict[str, Any]:
    """Symmetric maps in [-1, 1]: the upper triangle, row by row, as round(127 s); off by at most 1/254."""
    i, j = np.triu_indices(maps_Lnn.shape[-1])
    return {"form": "triangle", "data": blob(np.rint(maps_Lnn[:, i, j] * 127).astype(np.int8)), "limit": 1.0}


def rows(maps_LHnn: np.ndarray, grid: Grid, budget: int, *, signed: bool) -> dict[str, Any]:
    """Maps head by head: all patches as keys, queries every `stride` rows and columns, the least that fits `budget`.

    Signed: round(127 b / limit). Unsigned (attention): round(255 a / peak), a peak for each layer, head and query,
    rows of attention being peaked and unlike in height. Queries that are left out look the same as the nearest kept.
    """
    packed: dict[str, Any] = {}
    for stride in range(1, max(grid) + 1):
        kept = [np.arange((side - 1) % stride // 2, side, stride) for side in grid]
        queries = (kept[0][:, None] * grid[1] + kept[1]).ravel()
        chosen = maps_LHnn[:, :, queries]
        packed = {"form": "rows", "heads": chosen.shape[1], "queries": [k.tolist() for k in kept]}
        if signed:
            limit = float(np.abs(maps_LHnn).max()) or 1.0
            packed |= {"limit": limit, "data": blob(np.rint(chosen * (127 / limit)).astype(np.int8))}
        else:
            peaks = np.maximum(chosen.max(-1), 1e-12).astype("<f4")
            levels = np.rint(chosen / peaks[..., None] * 255).astype(np.uint8)
            packed |= {"limit": 0.0, "peaks": blob(peaks), "data": blob(levels)}
        if len(packed["data"]) <= budget:
            break
    return packed


# --- photographs ------------------------------------------------------------------------------------------------------


def _photo(model: nn.Module, path: Any, stored: dict[str, Any] | None) -> Photo:
    """An image file as the model sees it: resized and cropped as in evaluation, with ImageNet's mean and deviation
    where a checkpoint does not say others."""
    from PIL import Image

    from lape.data.augment import EvalTransform
    from lape.data.images import load_image

    conversion = conversion_of(model)
    patch, grid = conversion.anatomy.patch_size, conversion.layout.grid
    size = (grid[0] * patch[0], grid[1] * patch[1])
    channels = _channels(model)
    if stored is None:
        grey: dict[str, Any] = {"mean": (0.5,), "std": (0.5,)} if channels == 1 else {}
        transform = EvalTransform(size, in_chans=channels, **grey)
    else:
        transform = replace(EvalTransform.from_dict(stored), input_size=size)
    pixels = transform.build()(load_image(path, channels))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (transform.mean, transform.std))
    levels = (pixels * std + mean).clamp(0, 1).mul(255).byte().expand(3, -1, -1)  # grey becomes RGB
    shown = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    factor = PHOTO_SIDE / max(shown.size)
    shown = shown.resize((round(shown.width * factor), round(shown.height * factor)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=82)
    picture = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Photo(Path(path).name, picture, pixels[None])


def _channels(model: nn.Module) -> int:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


# --- the page ---------------------------------------------------------------------------------------------------------


def page_text(title: str, cards: Sequence[_Card], intro: str, budget: int) -> str:
    """The page. Data go in as JSON in which no tag can end; the policy admits this script and this style alone."""
    script, style = (_part(f"explorer.{kind}") for kind in ("js", "css"))
    photos = [{"name": p.name, "src": p.picture} for p in cards[0].photos]
    spent = sum(map(len, (script, style, intro))) + sum(len(p["src"]) for p in photos) + 40_000
    spent += sum(len(m["data"]) for card in cards for m in card.data["maps"])
    if spent > budget:  # the second view of the positions is what can be done without
        for card in cards:
            spent -= sum(len(m["data"]) for m in card.data["maps"][1:])
            del card.data["maps"][1:]
    wishes = sum(bool(card.photos) + KINDS[card.about.pe].is_bias for card in cards)
    each = max(budget - spent, 0) // max(wishes, 1)
    for card in cards:
        if KINDS[card.about.pe].is_bias:
            card.add_bias(each)
        card.add_attention(each)
    data = {
        "title": title,
        "colours": colours(),
        "series": series([card.about.join for card in cards]),
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


def series(joins: Sequence[str]) -> list[str]:
    """A colour a model: that of its join, as in the curves of a report, where the joins tell the models apart."""
    from lape.look.colours import COLOURS
    from lape.look.figures import SERIES

    return [COLOURS[j] for j in joins] if len(set(joins)) == len(joins) else list(SERIES)


def colours() -> list[str]:
    """The diverging map of all figures, from its lowest to its highest, 65 colours."""
    with needs("plot"):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

    from lape.look.figures import COLOUR_MAP

    return [to_hex(c) for c in colormaps[COLOUR_MAP](np.linspace(0, 1, 65))]


def _part(name: str) -> str:
    return (resources.files("lape.look.explorer") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
