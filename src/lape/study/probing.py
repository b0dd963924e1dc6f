"""`lape probe`: what the features of models keep of position, as numbers and one figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lape.data.augment import EvalTransform
from lape.errors import LapeError, needs
from lape.files.atomic import write_content
from lape.files.read import read_checkpoint
from lape.files.restore import is_checkpoint, published, restore, transform_of
from lape.look.features import LABELS, Features, probe
from lape.recipe import Recipe
from lape.study.options import ProbeOptions
from lape.study.pictures import check_writable, short_names, write_figure
from lape.study.sweep import MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABSTRACT = "solid: as they are; dashed: without the position subspace of each depth"


def probe_models(models: Sequence[str], options: ProbeOptions) -> dict[str, Features]:
    """Probes each model on the same images, prints a table and writes what `options` asks for.

    Raises LapeError: no such model, too few images, a file that cannot be written; before the work where it can be.
    """
    check_writable(options.json, options.plot, [*models, *options.images, options.data_path])
    if len(set(models)) != len(models):
        raise LapeError(f"a model was given twice among {', '.join(models)}: give each once")
    features: dict[str, Features] = {}
    pairs = [_model_of(name, options) for name in models]  # refused now, not after the others
    for name, (model, transform) in zip(models, pairs, strict=True):
        images, source = _images(transform, options)
        features[name] = probe(model, images, energy=options.energy)
        print(f"{name}: {len(images)} images of {source}\n{transform}")
        print("\n".join(_table(features[name])))
    about = {"made_by": "lape probe", "energy": options.energy}
    if options.json is not None:
        results = {**about, "models": {name: one.to_dict() for name, one in features.items()}}
        write_content(options.json, json.dumps(results, indent=1) + "\n")
    if options.plot is not None:
        short = dict(zip(features, short_names(list(features)), strict=True))
        write_figure(draw({short[name]: one for name, one in features.items()}), options.plot)
    return features


def _model_of(name: str, options: ProbeOptions) -> tuple[nn.Module, EvalTransform]:
    """A checkpoint, or where there is no such file a model of timm with its published weights, and its transform."""
    if is_checkpoint(name):
        checkpoint = read_checkpoint(name, unconverted=True)
        return restore(checkpoint, ema=options.ema), transform_of(checkpoint)
    import timm

    model = published(name, options.pretrained)
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    chans, height, width = data["input_size"]
    settings = {"mean": data["mean"], "std": data["std"], "interpolation": data["interpolation"], "in_chans": chans}
    return model, EvalTransform((height, width), data["crop_pct"], **settings)


def _images(transform: EvalTransform, options: ProbeOptions) -> tuple[Tensor, str]:
    """The images, transformed, and what they are."""
    if not options.images:
        recipe = Recipe(data_path=options.data_path, in_chans=transform.in_chans)
        return validation_images(transform, recipe, options.count)
    from lape.data.images import load_image

    prepare = transform.build()
    return torch.stack([prepare(load_image(path, transform.in_chans)) for path in options.images]), "files"


def validation_images(transform: EvalTransform, recipe: Recipe, count: int) -> tuple[Tensor, str]:
    """Evenly spread ones of the recipe's data, and what it is called. Raises LapeError for fewer than four."""
    from lape.data.sets import Images, reader_of

    if count < 4:
        raise LapeError(f"count={count}: a probe needs 4 images or more, half to fit and half to test")
    reader, root = reader_of(recipe)
    sources, read, _classes, name = reader(recipe, root, ("val",))
    return evenly(Images(*sources["val"], read, transform.build()), count), name


def evenly(images: Any, count: int) -> Tensor:
    """`count` images (count, C, height, width) of a data set, evenly spread, or all where it has fewer."""
    step = max(1, len(images) // count)
    return torch.stack([images[i][0] for i in range(0, len(images), step)][:count])


def _table(features: Features) -> list[str]:
    """One line a depth; what a measure is without the position subspace stands behind it in brackets."""
    names = list(LABELS)
    lines = ["depth  " + "  ".join(f"{name:>14}" for name in names)]
    for depth in range(len(features.subspaces)):
        cells = []
        for name in names:
            cell = f"{features.plain[name][depth]:.3f}"
            cells.append(f"{cell} ({features.without[name][depth]:.3f})" if name in features.without else cell)
        lines.append(f"{depth:>5}  " + "  ".join(f"{cell:>14}" for cell in cells))
    return [*lines, "in brackets: without the position subspace"]


def draw(features: Mapping[str, Features]) -> Figure:
    """A panel a measure over depth, a colour a model."""
    with needs("plot"):
        from matplotlib.figure import Figure
    from lape.look.figures import SERIES

    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for axes, (name, label) in zip(panels, LABELS.items(), strict=True):
        for place, (model, measures) in enumerate(features.items()):
            colour, marker = SERIES[place % len(SERIES)], MARKERS[place // len(SERIES) % len(MARKERS)]
            for values, style in ((measures.plain[name], "-"), (measures.without.get(name), "--")):
                if values is not None:
                    curve = values.double().where(values.isfinite(), math.nan)
                    text = model if style == "-" else None
                    axes.plot(range(len(curve)), curve.numpy(), style, color=colour, label=text, marker=marker, ms=3.2)
        axes.set_title(label, fontsize=9.5)
        axes.set_xlabel("depth: blocks passed", fontsize=8)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7.5)
    figure.suptitle(f"Position in the patch tokens ({ABSTRACT})", fontsize=10.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False, fontsize=9)
    return figure
