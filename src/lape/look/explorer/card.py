"""What the explorer shows of one model, as plain data: positions, tokens, attention, measures over depth.

Numbers come from `lape.look` and are the model's own; the page computes none. A model that is not converted has no
position to show, what it makes of images is shown all the same. Shape suffixes: L layers, H heads, E depths, n patches.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lape.convert.converted import Conversion, conversion_of, conversions, require_host
from lape.convert.positions import Size, View, describe
from lape.core.position import KINDS, Grid
from lape.errors import LapeError, UnsupportedModelError, check_finite
from lape.host import class_name
from lape.look.explorer.pack import by_frame, finite, rows, triangle
from lape.look.measures import MEASURES, measure_all
from lape.look.similarity import (
    Maps,
    bias_to_show,
    cosine,
    grid_at,
    locality_radius,
    mean_of_pairs,
    within_frames,
)
from lape.look.watch import Attention, Watch, anatomy_of

PHOTO_SIDE = 448  # pixels of the longer side of a photograph in the page
VIEWS: dict[View, str] = {"seen": "as attention sees it", "unbiased": "without the bias of its norm"}


@dataclass(frozen=True)
class Photo:
    """A photograph as one model sees it: what the page shows, and the tensor (1, C, height, width) of the model."""

    name: str
    picture: str  # data: address of a JPEG
    pixels: Tensor


class Card:
    """One model of the page. `data` is what the page gets."""

    def __init__(
        self, name: str, model: nn.Module, transform: dict[str, Any] | None, images: Sequence[Any], size: Size | None
    ):
        self.name, self.model, self.size = name, model, size
        self.conversion = _conversion_to_show(name, model, bool(images))
        self.photos = [photo(model, path, transform) for path in images]
        self.data: dict[str, Any] = {part: [] for part in ("prefix", "maps", "tokens", "attention", "measures")}
        self.data |= {"name": name, "heads": 0, "notes": {}}
        if self.conversion is None:
            watch = Watch(model, self.photos[0].pixels)
            self.grid, layers = watch.grid, len(watch.blocks)
            state = "left as it is" if conversions(model) else "not converted"
            join, what = None, f"{type(model).__name__}, {state}"
            about = f"{class_name(type(model))}, {state}"
        else:
            description = describe(model)
            self.grid, layers, about = grid_at(model, size), description.blocks, str(description)
            self.data["heads"] = self.conversion.anatomy.num_heads
            join, what = description.join, f"join {description.join}, position {description.pe}"
            if KINDS[description.pe].untouched:
                what = f"{type(model).__name__}, left as it is"
        grid = " × ".join(map(str, self.grid))
        self.data |= {"join": join, "about": about, "facts": f"{what}, {layers} layers, {grid} patches"}
        self.data |= {"layers": layers, "grid": list(self.grid[-2:]), "frames": math.prod(self.grid[:-2])}
        if self.kind is not None and self.kind.is_table:
            self._add_positions()
        else:
            self.data["notes"]["position"] = "no position of each token: this model is not converted or has none"

    @property
    def kind(self) -> Any:
        """The kind of its position, None where it is not converted."""
        return None if self.conversion is None else KINDS[self.conversion.pe]

    @property
    def wishes(self) -> int:
        """How many kinds of maps share what is left of the page's bytes."""
        return 2 * bool(self.photos) + (self.kind is not None and self.kind.is_bias)

    def _add_maps(self, label: str, kind: str, first: int, layers: int, pack: dict[str, Any]) -> None:
        self.data["maps"].append({"label": label, "kind": kind, "first": first, "layers": layers, **pack})

    def _add_measure(self, label: str, hint: str, means: str, value_L: Tensor, **more: Any) -> None:
        entry = {"label": label, "hint": hint, "means": means, "values": finite(value_L), **more}
        self.data["measures"].append(entry)

    def _add_positions(self) -> None:
        assert self.conversion is not None
        for view, label in VIEWS.items():
            if view == "unbiased" and self.conversion.folded:
                continue
            maps = Maps.of(self.model, self.size, view, frames=True)
            maps_TLnn = torch.stack([within_frames(map_nn, self.grid) for map_nn in maps.columns.values()], dim=1)
            first = 0 if maps.table_nn is None else -1
            self._add_maps(label, "cosine", first, maps_TLnn.shape[1], by_frame(maps_TLnn.numpy()))
            if view == "seen":
                for name, value_L in measure_all(maps.layers_Lnn, maps.patches_LnD, self.grid).items():
                    about = MEASURES[name]
                    self._add_measure(about.label, about.hint, about.means, value_L)

    def add_rest(self, budget: int) -> None:
        """Adds what may be kept coarser to fit: biases, tokens and attention, `budget` bytes for each."""
        if self.kind is not None and self.kind.is_bias:
            self._add_bias(budget)
        if not self.photos:
            return
        for part, add in (("tokens", self._add_tokens), ("attention", self._add_attention)):
            try:
                add(budget // len(self.photos))
            except UnsupportedModelError as error:  # the other parts can still be looked at
                self.data["notes"][part] = str(error)
        if not any(self.data[part] for part in ("maps", "tokens", "attention")):
            raise LapeError(f"there is nothing to show of {self.name}: {self.data['notes']['attention']}")

    def _add_bias(self, budget: int) -> None:
        bias_LHnn = bias_to_show(self.model)
        check_finite(bias_LHnn, f"the biases of {self.name}")
        for name in ("locality_radius", "monotonicity", "half_distance"):
            about = MEASURES[name]
            value_L = about.of(bias_LHnn.mean(1), self.grid)
            self._add_measure(f"bias: {about.label}", f"mean over heads; {about.hint}", about.means, value_L)
        pack = rows(bias_LHnn.numpy(), self.grid, budget, signed=True)
        self._add_maps("bias on attention", "bias", 0, len(bias_LHnn), pack)

    def _add_tokens(self, budget: int) -> None:
        """Similarity of all tokens with all, of every depth; the first is what enters the first block."""
        watch = Watch(self.model, self.photos[0].pixels)
        self._name_prefix(watch.num_prefix)
        patches, patch_maps = watch.patches, []
        for one in self.photos:
            maps_Enn = cosine(torch.cat(watch.tokens(one.pixels))[:, : patches.stop])
            patch_maps.append(maps_Enn[1:, patches, patches])
            pack = triangle(maps_Enn.numpy())
            if len(pack["data"]) > budget:
                pack = rows(maps_Enn[:, None].numpy(), self.grid, budget, signed=True)
            self.data["tokens"].append({"kind": "cosine", "first": -1, "layers": len(maps_Enn), **pack})
        for label, hint, means, measure in TOKEN_MEASURES:
            values = torch.stack([measure(maps_Lnn, self.grid) for maps_Lnn in patch_maps])
            self._add_measure(label, f"on the photographs; {hint}", means, values.mean(0))

    def _add_attention(self, budget: int) -> None:
        from lape.look.probe import attention, attention_distance, rollout, token_and_position

        images = torch.cat([one.pixels for one in self.photos])
        watch = Attention(self.model, images)
        self._name_prefix(watch.num_prefix)
        for one in self.photos:
            weights_LHNN = attention(self.model, one.pixels)[:, 0, :, : watch.patches.stop, : watch.patches.stop]
            pack = rows(weights_LHNN.numpy(), self.grid, budget, signed=False)
            self.data["heads"] = weights_LHNN.shape[1]
            self.data["attention"].append({"kind": "attention", "first": 0, "layers": len(weights_LHNN), **pack})
        self.data["rollout"] = [finite(r.flatten() / r.max()) for r in rollout(self.model, images)]
        distance_LH, hint = attention_distance(self.model, images), "on the photographs"
        dots = [finite(heads) for heads in distance_LH]
        means = "Trained models often look near in early and far in late layers. Heads at one height do alike."
        self._add_measure(
            "mean attention distance, pixels", f"{hint}; a dot a head", means, distance_LH.mean(1), dots=dots
        )
        if self.kind is not None and self.kind.is_table:
            ratios = token_and_position(self.model, images)
            means = "Near 0: content drowns position. Near 1: content hardly counts."
            self._add_measure("position's share, σ_P / σ_(x+P)", hint, means, ratios.scale)
            means = "0: independent. Below 0: tokens work against the position."
            hint = f"{hint}, after the token norm"
            self._add_measure("correlation of token and position", hint, means, ratios.correlation)

    def _name_prefix(self, count: int) -> None:
        names = {name.rpartition(".")[2] for name, _ in self.model.named_parameters()}
        special_names = []
        if names & {"cls_token", "class_token", "class_embedding", "cls_embed", "class_embed"}:
            special_names.append("class")
        if names & {"dist_token", "distillation_token"}:
            special_names.append("distillation")
        word = "register" if special_names else "extra"
        rest = [f"{word} {k + 1}" for k in range(count - len(special_names))]
        self.data["prefix"] = [*special_names[:count], *rest]


TOKEN_MEASURES: tuple[tuple[str, str, str, Callable[[Tensor, Grid], Tensor]], ...] = (
    (
        "tokens: mean similarity",
        "1: all patches alike",
        "Rising to 1 over depth: features collapse, patches can no longer be told apart.",
        lambda maps_Lnn, _grid: mean_of_pairs(maps_Lnn),
    ),
    (
        "tokens: locality radius",
        "0: like neighbours only; 1: near and far alike",
        "Low: tokens know, or share, their place. Rising: content takes over.",
        locality_radius,
    ),
)


def _conversion_to_show(name: str, model: nn.Module, has_images: bool) -> Conversion | None:
    """How the model is converted, None where it is not, or was left as it is and is watched (`has_images`) like others.

    Raises LapeError where nothing could be shown.
    """
    if not conversions(model):
        if not has_images:
            raise LapeError(
                f"{name} is not converted, there is nothing to show of it without images (attention, similarity of "
                "tokens): give images, or call lape.apply_(model) first for positions"
            )
        return None
    conversion = conversion_of(model)
    if not has_images:
        require_host(conversion)
    kind = KINDS[conversion.pe]
    if not has_images and not kind.is_table and not kind.is_bias:
        raise LapeError(
            f"pe={conversion.pe!r}: there is nothing to show of {name} without images (attention), {kind.missing}"
        )
    return conversion if conversion.anatomy.blocks else None


# --- photographs ------------------------------------------------------------------------------------------------------


def photo(model: nn.Module, path: Any, entries: dict[str, Any] | None) -> Photo:
    """An image file as the model sees it: resized and cropped as in evaluation, with mean and deviation of a checkpoint
    or of timm's configuration of the model, ImageNet's where neither says them."""
    from PIL import Image

    from lape.data.augment import EvalTransform
    from lape.data.images import load_image

    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    channels_in = channels.in_channels if isinstance(channels, nn.Conv2d) else 3
    size = _image_size(model)
    if entries is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        normal: dict[str, Any] = {key: tuple(config[key]) for key in ("mean", "std") if config.get(key)}
        if any(len(value) != channels_in for value in normal.values()) or (channels_in == 1 and not normal):
            normal = {"mean": (0.5,) * channels_in, "std": (0.5,) * channels_in}
        transform = EvalTransform(size or (224, 224), in_chans=channels_in, **normal)
    else:
        transform = EvalTransform.from_dict(entries)
        transform = replace(transform, input_size=size or transform.input_size)
    pixels = transform.build()(load_image(path, channels_in))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (transform.mean, transform.std))
    levels = (pixels * std + mean).clamp(0, 1).mul(255).byte().expand(3, -1, -1)  # grey becomes RGB
    picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    factor = PHOTO_SIDE / max(picture.size)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    address = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Photo(Path(path).name, address, pixels[None])


def _image_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that a model is for, None where nothing tells.

    Raises LapeError for a model of videos.
    """
    joined = any(c.anatomy.blocks for c in conversions(model))
    try:
        anatomy = anatomy_of(model)
        if len(grid := anatomy.layout.grid) == 3:
            convert = "" if joined else " and call lape.apply_(model) for its positions"
            raise LapeError(
                f"{type(model).__name__} is for videos ({' x '.join(map(str, grid))} patches: frames, rows, columns), "
                f"photographs cannot be shown to it: leave images (--image) out{convert}"
            )
        if len(anatomy.patch_size) == 2:
            sides = zip(anatomy.layout.grid, anatomy.patch_size, strict=True)
            height, width = (None if joined else anatomy.pixels) or (side * step for side, step in sides)
            return height, width
    except UnsupportedModelError:
        pass
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config["input_size"][-2:]) if config.get("input_size") else None
