"""A trained model at other image sizes and on changed images: `lape eval --sizes, --corruptions, ...`.

Every condition is one evaluation of all validation images by `lape.train.evaluate.evaluate`. At another size the model
is built for it by its own rule (a position table is resampled before any LN' sees it). Images are changed after they
are resized and cropped, before they are normalised; what is random depends on the number of the image alone.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from lape.core.position import KINDS
from lape.data.augment import eval_transform
from lape.data.changes import CORRUPTIONS, Change, occluded, shifted, shuffled
from lape.data.loaders import eval_loader
from lape.data.open import Data
from lape.data.sets import Images, reader_of
from lape.errors import CheckpointError, LapeError, needs
from lape.files.atomic import write_content
from lape.files.read import Checkpoint, read_checkpoint
from lape.files.restore import count_classes, labels_of, restore_with, settings_of, size_of
from lape.look.watch import Watch
from lape.recipe import Recipe
from lape.study.numbers import Variant, interval
from lape.study.options import Conditions, SweepOptions
from lape.study.pictures import check_writable, short_names, write_figure
from lape.study.report import name_of_images, plain_table, spell_interval, spell_share
from lape.train.distributed import join_world
from lape.train.evaluate import evaluate, number_as

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Size = tuple[int, int]
CLEAN = "clean"
MARKERS = "os^Pv"  # tell models apart whose colours are the same


@dataclass(frozen=True)
class Condition:
    """One evaluation: images of a size, changed or not."""

    kind: str  # clean, size, or the kind of change
    name: str
    size: Size
    level: float | None = None  # severity, pixels or share
    change: Change | None = None


@dataclass(frozen=True)
class Outcome:
    """What a condition came to; accuracies in percent.

    Fields:
        kind: clean, size, or the kind of change
        name: of the size or change
        level: severity, pixels or share; None where there is none
        size: (height, width) of the images
        transform: of evaluation, in words
        acc1: top-1
        acc5: top-5
        loss: mean cross entropy
        count: of images
        relative: share of the accuracy on clean images of the model's size
    """

    kind: str
    name: str
    level: float | None
    size: Size
    transform: str
    acc1: float
    acc5: float
    loss: float
    count: int
    relative: float | None = None


class ChangedImages(Dataset[tuple[Tensor, int]]):
    """Images that are changed between cropping and normalising."""

    def __init__(self, plain: Images, change: Change):
        assert isinstance(plain.transform, transforms.Compose)
        self.plain, self.change = plain, change
        *before, self.normalise = plain.transform.transforms
        self.before = transforms.Compose(before)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image_CHW = self.before(self.plain.read(self.plain.sources[index]))
        generator = torch.Generator().manual_seed(index)
        return self.normalise(self.change(image_CHW, generator)), self.plain.targets[index]


def parse_size(text: str) -> Size:
    """(height, width) of "224" or "224x320". Raises LapeError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise LapeError(f"--sizes {text!r} is no image size: give a side in pixels or HEIGHTxWIDTH, as 224x320")
    return int(sides[0]), int(sides[-1])


def conditions_of(options: Conditions, size: Size, patch: Size) -> list[Condition]:
    """All that is asked for, the clean images of the training size first. Raises LapeError for what is out of range."""
    conditions = [Condition(CLEAN, CLEAN, size)]
    conditions += [Condition("size", name_of(s), s) for s in dict.fromkeys(map(parse_size, options.sizes)) if s != size]
    corruptions = tuple(CORRUPTIONS)
    names = corruptions if options.corruptions == ("all",) else options.corruptions
    for name in names:
        if name not in corruptions:
            raise LapeError(f"--corruptions {name!r} is not known: use all, or some of {', '.join(corruptions)}")
    for severity in options.severities:
        if severity not in range(1, 6):
            raise LapeError(f"--severities {severity} is not allowed: choose from 1 to 5")
    for name in names:
        for level in options.severities:
            conditions.append(Condition("corruption", name, size, level, partial(CORRUPTIONS[name], severity=level)))
    if options.shuffle_patches:
        conditions.append(Condition("shuffle", "patches shuffled", size, None, partial(shuffled, patch=patch)))
    for pixels in options.shift:
        if not 0 < pixels < min(size):
            raise LapeError(f"--shift {pixels} is not allowed: choose 1 to {min(size) - 1} pixels")
        conditions.append(Condition("shift", "shifted", size, pixels, partial(shifted, pixels=pixels)))
    for share in options.occlude:
        if not 0 < share < 1:
            raise LapeError(f"--occlude {share} is no share of the patches: choose between 0 and 1")
        conditions.append(Condition("occlusion", "occluded", size, share, partial(occluded, share=share, patch=patch)))
    return list({(c.kind, c.name, c.size, c.level): c for c in conditions}.values())  # each once


def name_of(size: tuple[int, ...]) -> str:
    """The size as it is written: 224, or 224x320."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def evaluate_at(checkpoint: Checkpoint, recipe: Recipe, options: Conditions, say: Any = print) -> list[Outcome]:
    """Evaluates a checkpoint in every condition; `recipe` as `settings_of` gave it.

    Raises LapeError before the first evaluation where a size is none that the model takes.
    """
    model_size: Size = (recipe.input_size, recipe.input_size)
    if recipe.decode == "fast":
        raise LapeError("decode='fast' reads images of one size, unchanged: leave it out with sizes and changes")
    with join_world(recipe.device) as world:
        if world.size > 1:
            raise LapeError("sizes and changes are evaluated by one process: start without torchrun")
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        reader, root = reader_of(recipe)
        sources, read, classes, name = reader(recipe, root, ("val",))

        def model_at(size: Size) -> nn.Module:
            learned_bias = size != model_size and KINDS[recipe.pe].bias_axes > 0
            at: Any = restore_with(checkpoint, recipe, model_size if learned_bias else size)
            if learned_bias:  # resampled by the model that has it, as a file's table is while it is read
                at.set_input_size(img_size=size)
            model: nn.Module = at.to(world.device)
            return model

        model = model_at(model_size)
        plain = Images(*sources["val"], read, eval_transform(recipe).build())
        outputs = count_classes(checkpoint, model, model_size, recipe.in_chans)
        note = number_as(Data(None, plain, classes, name), checkpoint, labels_of(model), outputs)
        patch = (
            patch_of(model, model_size, recipe.in_chans) if options.shuffle_patches or options.occlude else model_size
        )
        conditions = conditions_of(options, model_size, patch)
        for size in {condition.size for condition in conditions} - {model_size}:
            count_classes(checkpoint, model_at(size), size, recipe.in_chans)  # refused now, not after the others
        say(f"Data: {name}\n{note}".rstrip())
        outcomes: list[Outcome] = []
        for condition in conditions:
            transform = eval_transform(recipe)
            transform = transform if condition.size == model_size else replace(transform, input_size=condition.size)
            images = Images(plain.sources, plain.targets, read, transform.build())
            data: Any = images if condition.change is None else ChangedImages(images, condition.change)
            at = model if condition.size == model_size else model_at(condition.size)
            loader = eval_loader(data, recipe, device=world.device)
            metrics = evaluate(at, loader, world.device, amp=recipe.amp, shared=False)
            about = (condition.kind, condition.name, condition.level, condition.size, str(transform))
            outcomes.append(Outcome(*about, metrics.acc1, metrics.acc5, metrics.loss, metrics.count))
            level = "" if condition.level is None else f" {condition.level:g}"
            say(f"  {condition.name}{level}: {metrics.acc1:.2f} % ({transform})")
        clean = outcomes[0].acc1
        return [replace(outcome, relative=outcome.acc1 / clean if clean else None) for outcome in outcomes]


def patch_of(model: nn.Module, size: Size, in_chans: int) -> Size:
    """Height and width in pixels of the patches of an image. Raises LapeError where the tokens are no one grid."""
    rows, columns = Watch(model, torch.zeros(1, in_chans, *size)).grid
    return size[0] // rows, size[1] // columns


def sweep(paths: Sequence[str], recipe: Recipe, options: SweepOptions) -> dict[str, Any]:
    """`lape eval` with other sizes and changed images: a table a model, and the files that `options` names.

    Checkpoints that differ in their seed alone are one model, whose means and intervals are given.
    """
    check_writable(options.json, options.plot, [*paths, recipe.data_path])
    if options.plot is not None and not options.extras:
        raise LapeError(NO_FIGURE)
    if len({Path(path).resolve() for path in paths}) != len(paths):
        raise LapeError(f"a checkpoint was given twice among {', '.join(paths)}: give each once")
    checkpoints = {path: _open_checkpoint(recipe.replace(resume=path)) for path in paths}
    for one, other in itertools.combinations(paths, 2):
        if _same_weights(checkpoints[one][0].model, checkpoints[other][0].model):
            raise LapeError(f"{one} and {other} hold the same weights, which are one training: give one of them")
    sizes = {side for _, _, side in checkpoints.values()}
    if len(sizes) > 1:
        raise LapeError(f"the checkpoints were trained at {sorted(sizes)} pixels: give those of one size")
    variants = {
        path: (Variant.of(one), checkpoint.args.get("epochs")) for path, (checkpoint, one, _) in checkpoints.items()
    }
    names = dict(zip(paths, short_names(paths), strict=True))
    models: dict[str, list[list[Outcome]]] = {}
    members: dict[str, list[str]] = {}
    for path, (checkpoint, settings, _) in checkpoints.items():
        name = next(names[other] for other in paths if variants[other] == variants[path])
        print(f"{path}:")
        models.setdefault(name, []).append(evaluate_at(checkpoint, settings, options))
        members.setdefault(name, []).append(path)
        results: dict[str, Any] = {
            "made_by": "lape eval",
            "training_size": max(sizes),
            "models": _tables(models, members),
        }
        if options.json is not None:  # after each: the next one may fail, or be interrupted
            write_content(options.json, json.dumps(results, indent=1) + "\n")
    for model in results["models"]:
        count = len(model["checkpoints"])
        heading = "" if len(paths) == 1 else f"{model['name']}, {count} checkpoint{'s' * (count > 1)}"
        print("\n".join(["", *filter(None, [heading]), *plain_table(rows_of(model["summary"]))]))
    if options.plot is not None:
        write_figure(draw(models, max(sizes)), options.plot)
    return results


def _same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _tables(models: Mapping[str, list[list[Outcome]]], members: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """What the JSON file holds of each model."""
    return [
        {
            "name": name,
            "checkpoints": members[name],
            "outcomes": [[asdict(outcome) for outcome in outcomes] for outcomes in trainings],
            "summary": summary_of(trainings),
        }
        for name, trainings in models.items()
    ]


def _open_checkpoint(recipe: Recipe) -> tuple[Checkpoint, Recipe, int]:
    """The checkpoint that a recipe names, its settings, and the side of the images that it was trained with."""
    checkpoint = read_checkpoint(recipe.resume)
    if not recipe.data_path and checkpoint.args.get("data_path"):
        raise CheckpointError(f"{recipe.resume} was not trained on the packaged digits: give --data-path with val/")
    size = size_of(checkpoint)
    if size is not None and size[0] != size[1] and "input_size" not in recipe.model_fields_set:
        raise CheckpointError(f"{recipe.resume} is for images of {name_of(size)} pixels: give --input-size SIDE")
    settings = settings_of(checkpoint, recipe)
    return checkpoint, settings, settings.input_size if size is None else size[0]


def summary_of(trainings: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    """One entry a size or change, means over levels and trainings; last the mean of all changes, each counted once.

    `acc1` is in percent, with its 95 % interval over the trainings; `relative` a share of the clean accuracy.
    """
    summaries = [_means(outcomes) for outcomes in trainings]
    entries: list[dict[str, Any]] = []
    for group in zip(*summaries, strict=True):
        accuracies, shares = [entry["acc1"] for entry in group], [entry["relative"] for entry in group]
        about = {"interval": interval(accuracies), "n": len(group), "relative": _mean_share(shares)}
        entries.append({**group[0], "acc1": statistics.fmean(accuracies), **about})
    return entries


def _means(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of one training."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.kind, outcome.name), []).append(outcome)
    entries: list[dict[str, Any]] = []
    for (kind, name), group in groups.items():
        share = _mean_share([o.relative for o in group])
        levels = [o.level for o in group if o.level is not None]
        mean = statistics.fmean(o.acc1 for o in group)
        entries.append({"kind": kind, "name": name, "levels": levels, "acc1": mean, "relative": share})
    changes = [entry for entry in entries if entry["kind"] not in (CLEAN, "size")]
    if len(changes) > 1:
        accuracies, shares = [entry["acc1"] for entry in changes], [entry["relative"] for entry in changes]
        means = {"acc1": statistics.fmean(accuracies), "relative": _mean_share(shares)}
        entries.append({"kind": "mean", "name": "mean of changes", "levels": [], **means})
    return entries


def _mean_share(shares: Sequence[float | None]) -> float | None:
    """None where one is missing: shares of a clean accuracy of 0."""
    return None if None in shares else statistics.fmean(share for share in shares if share is not None)


def rows_of(summary: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The summary as a table."""
    rows = [["images", "levels", "acc@1", "95 % interval", "of clean"]]
    for entry in summary:
        levels, accuracy = " ".join(f"{level:g}" for level in entry["levels"]), f"{entry['acc1']:.2f}"
        rows.append([name_of_images(entry), levels, accuracy, spell_interval(entry["interval"]), spell_share(entry)])
    return [row[:3] + row[4:] for row in rows] if summary[0]["n"] == 1 else rows


NO_FIGURE = "nothing to draw but one number: give --sizes or a change, or leave --plot out"


def draw(models: Mapping[str, Sequence[Sequence[Outcome]]], training_size: int) -> Figure:
    """Accuracy over size with the training size marked, and what changes leave of the clean accuracy.

    `models`: by name, the outcomes of each of its trainings; the band is the mean's 95 % interval over them.
    """
    with needs("plot"):
        from matplotlib.figure import Figure
    from lape.look.figures import SERIES

    first = next(iter(models.values()))[0]
    names = [e["name"] for e in _means(first) if e["kind"] not in (CLEAN, "size")]
    sizes = [o for o in first if o.kind in (CLEAN, "size")]
    visible = [len(sizes) > 1, bool(names)]
    if not any(visible):
        raise LapeError(NO_FIGURE)
    figure = Figure(figsize=(1.0 + 4.6 * sum(visible), 4.2), layout="constrained")
    panels = iter(figure.subplots(1, sum(visible), squeeze=False)[0])
    colours = {name: SERIES[i % len(SERIES)] for i, name in enumerate(models)}
    if visible[0]:
        axes = next(panels)
        for name, trainings in models.items():
            place = list(models).index(name) // len(SERIES)
            bands = len(models) <= len(SERIES)  # of more, they would hide each other
            _draw_sizes(axes, name, trainings, colours[name], MARKERS[place % len(MARKERS)], bands)
        axes.axvline(training_size, color="0.5", linestyle=":", linewidth=1)
        names_at: dict[float, list[str]] = {training_size: ["training size"]}
        for outcome in sizes:
            if outcome.size[0] != outcome.size[1]:
                names_at.setdefault(side_of(outcome.size), []).append(name_of(outcome.size))
        for side, text in {side: ", ".join(names) for side, names in names_at.items()}.items():
            how: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right"}
            axes.annotate(text, (side, 0.02), fontsize=7.5, color="0.4", **how)
        axes.set_xlabel("image size, square root of the pixels", fontsize=9)
        axes.set_ylabel("accuracy, %", fontsize=9)
    if visible[1]:
        axes = next(panels)
        high = 0.8 / len(models)
        for place, (name, trainings) in enumerate(models.items()):
            shares = [{e["name"]: e["relative"] for e in _means(training)} for training in trainings]
            values = [100 * statistics.fmean(t[change] or 0.0 for t in shares) for change in names]
            where = [i + high * (place - (len(models) - 1) / 2) for i in range(len(names))]
            axes.barh(where, values, high, color=colours[name], label=name)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("accuracy, % of that on clean images", fontsize=9)
    for axes in figure.axes:
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    inches = 0.6 + 0.075 * max(map(len, labels))  # of an entry: its line and its letters
    wide = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside lower center", ncols=wide, frameon=False, fontsize=8.5)
    return figure


def _draw_sizes(
    axes: Any, name: str, trainings: Sequence[Sequence[Outcome]], colour: str, marker: str, band: bool
) -> None:
    """Square sizes as a line with a band, the others as marks."""
    by_size: dict[Size, list[float]] = {}
    for training in trainings:
        for outcome in training:
            if outcome.kind in (CLEAN, "size"):
                by_size.setdefault(outcome.size, []).append(outcome.acc1)
    square = sorted(size for size in by_size if size[0] == size[1])
    means = [statistics.fmean(by_size[size]) for size in square]
    axes.plot([size[0] for size in square], means, marker=marker, ms=4.5, color=colour, label=name)
    if band and len(trainings) > 1:
        bands = [interval(by_size[size]) or (0.0, 0.0) for size in square]
        low, high = ([min(max(band[end], 0.0), 100.0) for band in bands] for end in (0, 1))
        axes.fill_between([size[0] for size in square], low, high, color=colour, alpha=0.15, linewidth=0)
    for size in by_size:
        if size not in square:
            axes.plot(side_of(size), statistics.fmean(by_size[size]), marker, ms=6, color=colour, fillstyle="none")


def side_of(size: Size) -> float:
    """Of the square with as many pixels."""
    return float((size[0] * size[1]) ** 0.5)
