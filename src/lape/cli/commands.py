"""The commands of `lape`. Nothing heavy is imported before a command needs it."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from lape import __version__
from lape.cli.app import EVALUATION, GROUPS, app, original, takes, takes_options
from lape.cli.original import LauncherFlags, OriginalFlags
from lape.cli.rows import destination, escaped, row_writer
from lape.errors import DataError, LapeError, arguments_as
from lape.files.atomic import check_outputs
from lape.look.options import DrawOptions
from lape.names import FILE_SETTINGS, few, printable, tell
from lape.options import ExportOptions, PredictOptions
from lape.recipe import Recipe
from lape.study.options import BenchOptions, CompareOptions, DemoOptions, ProbeOptions, SweepOptions

if TYPE_CHECKING:
    from torch import Tensor

    from lape.files.read import Checkpoint


RECIPE = Parameter(help="YAML file, or the name of a packaged recipe; flags win over it", group=GROUPS["Recipe"])
Original = Annotated[OriginalFlags, Parameter(name="*")]
Launcher = Annotated[LauncherFlags, Parameter(name="*")]
JsonFile = Annotated[str | None, Parameter(help="write it to this JSON file; -: stdout", allow_leading_hyphen=True)]

OF_THE_DATA = ("data_path", "data_set", "inat_category", "columns")

# What the matrix of `lape compare` sets itself, and what means nothing for it.
NOT_COMPARED = (
    *("model", "pe", "join_type", "pe_std", "pe_norm", "warm_start", "seed", "output_dir", "resume", "start_epoch"),
    *("eval", "dist_eval", "threads", "num_workers", "pin_mem", "log_every"),
)


@app.command
@takes_options(DemoOptions)
def demo(options: DemoOptions) -> None:
    """Train basic and LaPE side by side on the packaged digits: a table, curves and a report in minutes."""
    from lape.study.compare import demo as run_demo

    run_demo(options)


@original.default
@takes(Recipe.model_fields)
def main(
    *,
    recipe: Annotated[str | None, RECIPE] = None,
    _original: Original = OriginalFlags(),  # noqa: B008
    _launcher: Launcher = LauncherFlags(),  # noqa: B008
    **flags: Any,
) -> None:
    """Train a model, or evaluate one with --eval. Flags are those of DeiT and LaPE, `-` and `_` alike."""
    if recipe is None:  # the original's warm-up is as long as it says, also in a run that is shorter
        flags.setdefault("warmup_epochs", Recipe.model_fields["warmup_epochs"].default)
    _train(recipe, flags)


@app.command(name="train")
@takes(Recipe.model_fields)
def train(
    *,
    recipe: Annotated[str | None, RECIPE] = None,
    _original: Original = OriginalFlags(),  # noqa: B008
    _launcher: Launcher = LauncherFlags(),  # noqa: B008
    **flags: Any,
) -> None:
    """Train a model, or evaluate one with --eval. Flags are those of DeiT and LaPE, `-` and `_` alike."""
    _train(recipe, flags)


def _train(recipe: str | None, flags: dict[str, Any]) -> None:
    settings = Recipe.from_yaml(recipe, **flags) if recipe else Recipe(**flags)
    if settings.eval:
        from lape.train.evaluate import evaluate_checkpoint

        evaluate_checkpoint(settings)
    else:
        from lape.train.loop import train as run

        run(settings)


@app.command(name="compare")
@takes_options(CompareOptions)
@takes(name for name in Recipe.model_fields if name not in NOT_COMPARED)
def compare(
    options: CompareOptions,
    *,
    recipe: Annotated[str, RECIPE] = "digits",
    _original: Original = OriginalFlags(),  # noqa: B008
    **flags: Any,
) -> None:
    """Train joins, kinds, models and seeds by one recipe and compare them: table, test, curves, report, explorer."""
    from lape.study.compare import compare as run_comparison

    run_comparison(Recipe.from_yaml(recipe, **flags), options)


@app.command(name="eval")
@takes_options(SweepOptions)
@takes(EVALUATION, FILE_SETTINGS)
def evaluate(
    sweep: SweepOptions,
    checkpoint: Annotated[tuple[str, ...], Parameter(help=".pth files or folders written by lape.save")] = (),
    *,
    resume: Annotated[str | None, Parameter(help="the same as CHECKPOINT, the original's spelling")] = None,
    **flags: Any,
) -> None:
    """Evaluate a checkpoint, with more flags at other sizes and on changed images as well.

    What is not given (model, join, PE, input size) comes from the checkpoint. Several are told together at other sizes
    and on changed images, those that differ in their seed alone as one model with an interval.
    """
    paths = [path for path in (*checkpoint, resume) if path is not None]
    if not paths or (len(paths) > 1 and not sweep.extras):
        several = "; several are for --sizes and changed images" if paths else ""
        raise LapeError(f"give one checkpoint: lape eval CHECKPOINT (or --resume CHECKPOINT){several}")
    settings = Recipe(eval=True, resume=paths[0], **flags)
    if sweep.extras or sweep.json or sweep.plot:
        from lape.study.sweep import sweep as run_sweep

        run_sweep(paths, settings, sweep)
        return

    from lape.train.evaluate import evaluate_checkpoint

    evaluate_checkpoint(settings)


@app.command
def predict(
    *images: Annotated[str, Parameter(help="image files, and folders of them with all below")],
    options: Annotated[PredictOptions, Parameter(name="*")],
    json: JsonFile = None,
    csv: Annotated[
        str | None, Parameter(help="write it to this CSV file; -: stdout", allow_leading_hyphen=True)
    ] = None,
) -> None:
    """Classify images, with the transform and the class names stored in the checkpoint.

    Lines appear, and files grow, as images are done. One that cannot be read is left out, named, and ends it with 2.
    """
    if not images:
        raise LapeError("no image was given: lape predict IMAGE_OR_FOLDER... --checkpoint CHECKPOINT")
    if json is not None and json == csv:
        raise LapeError(f"--json and --csv are both {json!r}: give two files")

    from lape.data.folders import image_files
    from lape.data.images import assumption
    from lape.train.evaluate import predictions

    files = image_files(images)
    check_outputs([json, csv], [*files, options.checkpoint], streams=True)
    note = ""
    problems: list[str] = []
    with row_writer(json, csv) as add:
        for p in _with_bar(predictions(files, options, problems), len(files)):
            if not note and (note := assumption(p.path)):
                print(f"{printable(p.path)}: {note}; said of the first such image", file=sys.stderr)
            best = list(zip(p.classes, p.probabilities, strict=True))
            add(
                [
                    {"image": p.path, "rank": rank, "class": name, "probability": probability}
                    for rank, (name, probability) in enumerate(best, start=1)
                ]
            )
            if "-" not in (json, csv):
                lines = [f"  {100 * probability:6.2f} %  {printable(name)}" for name, probability in best]
                print("\n".join([printable(p.path), *lines]))
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{len(problems)} of {len(files)} images are left out: {'; '.join(problems[:10])}{more}")


@app.command
@arguments_as(model="--model-name deit_t_LaPE", join="--join-type", pe="--pe", size="--size", ema="--ema")
@takes_options(DrawOptions)
def visualize(
    options: DrawOptions,
    *checkpoints: Annotated[str, Parameter(help=".pth files or folders written by lape.save")],
    save_dir: Annotated[str | None, Parameter(help="the pictures go into SAVE_DIR/MODEL_NAME/")] = None,
    html: Annotated[str | None, Parameter(help="write the explorer, one file for the browser, here")] = None,
    image: Annotated[
        tuple[str, ...], Parameter(help="with --html: photographs to look at, for attention and tokens as well")
    ] = (),
) -> None:
    """Draw what the position embedding became in every layer, and write the numbers (.npz).

    Several checkpoints are drawn side by side: in the explorer, and as one figure a kind of map in SAVE_DIR.
    """
    if not checkpoints:
        raise LapeError("no checkpoint was given: lape visualize CHECKPOINT --save-dir DIR")
    if save_dir is None and html is None:
        raise LapeError("nothing to write: give --save-dir DIR for pictures, --html FILE for the explorer, or both")
    if image and html is None:
        raise LapeError("--image shows photographs in the explorer: give --html FILE as well")
    of_checkpoint = options.of_checkpoint  # a size that cannot be is refused here, before a file is read
    for name in ("token", "view", "layers", "range", "title", "width", "dpi"):
        if save_dir is None and getattr(options, name) != getattr(DrawOptions(), name):
            flag = "--no-title" if name == "title" else f"--{name}"
            raise LapeError(f"{flag} is of pictures: give --save-dir DIR as well")
    if len(checkpoints) > 1 and options.model_name is not None and save_dir is not None:
        raise LapeError("--model-name names the folder of one checkpoint, several were given: leave it out")
    if save_dir is not None:
        _draw(checkpoints, save_dir, options)
    if html is not None:
        from lape.look.explorer import explore

        page = explore(checkpoints, html, images=image, model_name=options.model_name, **of_checkpoint)
        print(f"open {printable(page)} in a browser ({page.stat().st_size / 1e6:.1f} MB, works offline)")


def _draw(checkpoints: Sequence[str], save_dir: str, options: DrawOptions) -> None:
    """The pictures of `lape visualize`."""
    from lape.convert.positions import describe
    from lape.files.read import read_checkpoint
    from lape.files.restore import restore_to_draw
    from lape.look import figures

    for checkpoint in checkpoints:
        files = figures.visualize(checkpoint, save_dir, options)
        first = next(f for f in files if f.stem == "overview")
        print(f"{len(files)} files in {printable(files[0].parent)}, first look at {printable(first)}")
        if leftovers := figures.leftovers(files):
            print(
                f"{len(leftovers)} of an earlier drawing are still in that folder ({few(leftovers, 4)}): they do not "
                "belong to this one; remove them, or choose another --model-name"
            )
    if len(checkpoints) == 1:
        return
    models = {
        c: restore_to_draw(read_checkpoint(c), options.model_name, **options.of_checkpoint)[0] for c in checkpoints
    }
    joins = [describe(model).join for model in models.values()]
    if len(set(joins)) == len(models):  # shorter than their paths
        models = dict(zip(joins, models.values(), strict=True))
    if max(map(len, figures.by_kind(models))) > 1:
        files = figures.draw_together(models, save_dir, view=options.view or "seen", options=options)
        print(f"{len(files)} files of all models in {printable(save_dir)}")
    else:
        print("no figure of all models: one has positions, another a bias on attention logits")


@app.command
@arguments_as(ema="--ema", energy="--energy", count="--count")
@takes_options(ProbeOptions)
def probe(
    options: ProbeOptions,
    *models: Annotated[str, Parameter(help=".pth files, folders written by lape.save, or names of timm's models")],
) -> None:
    """Measure how much position the features of each layer hold: probes, similarity, what stays in a mean image."""
    if not models:
        raise LapeError("no model was given: lape probe CHECKPOINT... --images FILE...")
    from lape.study.probing import probe_models

    probe_models(models, options)


@app.command
@arguments_as(tolerance="--tolerance", formats="--formats")
def export(
    checkpoint: Annotated[str, Parameter(help=".pth file or folder written by lape.save")],
    *,
    options: Annotated[ExportOptions, Parameter(name="*")],
) -> None:
    """Write a model as torch.export, ONNX and a folder that loads offline, each checked against the eager model."""
    from lape.files.export import export as write
    from lape.files.read import read_checkpoint

    pixels, data_name, transform = sample_images(read_checkpoint(checkpoint), options.data_path, options.images)
    tell(f"checked on {len(pixels)} images of {data_name}")
    settings = options.model_dump(exclude={"data_path", "images"})
    write(checkpoint, images_BCHW=pixels, transform=transform, say=tell, **settings)


@app.command
@takes_options(BenchOptions)
def bench(
    options: BenchOptions,
    *,
    json: JsonFile = None,
) -> None:
    """Measure what joins cost: parameters, MACs, images a second, latency and memory, in interleaved rounds."""
    check_outputs([json], streams=True)

    from lape.study.benchmark import benchmark, variant_lines

    with destination(json or "-") as write:
        results = benchmark(options, say=(lambda line: print(line, file=sys.stderr)) if json == "-" else print)
        if json is not None:
            write(_as_json(results))
    if json != "-":
        print("\n".join(["", *variant_lines(results)]))


@app.command(name="check-data")
def check_data(
    data_path: Annotated[
        str, Parameter(help="folder with train/<class>/* and val/<class>/*, or parquet, arrow or tar files")
    ],
    *,
    columns: Annotated[
        tuple[str, str] | None,
        Parameter(help="of parquet and arrow files: the image's column and the class's, if in doubt"),
    ] = None,
    json: Annotated[
        str | None, Parameter(help="write all findings to this JSON file; -: stdout", allow_leading_hyphen=True)
    ] = None,
    workers: Annotated[int, Parameter(help="processes; 0: one a processor")] = 0,
) -> None:
    """Open every image of a data folder before a long run; exit code 0 when training may start, else 2."""
    from lape.data.check import check_data as check

    check_outputs([json], [data_path], streams=True)
    with destination(json or "-") as write:
        report = check(data_path, columns=columns or (), workers=workers or None)
        if json is not None:
            write(_as_json(report.to_dict()))
    if json != "-":
        for line in report.lines():
            print(printable(line))
    if not report.fit:
        raise LapeError(f"{data_path} is not fit for training: {len(report.errors)} error(s) are listed above")


@app.command
def recipes(
    name: Annotated[str | None, Parameter(help="print this one, to be changed and given as a file")] = None,
) -> None:
    """List the packaged recipes, which `lape train --recipe NAME` runs, or print one: lape recipes NAME > FILE.yaml."""
    from lape.recipe import packaged, text_of

    if name is not None:
        print(text_of(name), end="")
        return
    width = max(map(len, packaged()))
    for recipe in packaged():
        print(f"{recipe:<{width}}  {text_of(recipe).partition(chr(10))[0].removeprefix('# ').rstrip('.')}")


@app.command
def hosts(
    *,
    json: JsonFile = None,
) -> None:
    """List the models that can be converted, by the class of their blocks."""
    from lape.host import hosts as table

    if json is not None:
        fields = ("name", "tested", "root_classes", "block_classes", "note", "refused")
        check_outputs([json], streams=True)
        with destination(json) as write:
            write(_as_json([{field: getattr(host, field) for field in fields} for host in table()]))
        return
    for host in table():
        reasons: dict[str, list[str]] = {}
        for name, reason in host.refused.items():
            reasons.setdefault(reason, []).append(name)
        print(f"{host.name} ({', '.join(host.tested)})" if host.tested else host.name)
        rows = [
            ("models", _class_names(host.root_classes) if host.root_child is None else ""),
            ("blocks", _class_names(host.block_classes)),
            ("done", host.note),
            *(("refused", f"{_class_names(names)}: {reason}") for reason, names in reasons.items()),
        ]
        for title, text in rows:
            if text:
                _print_row(title, text)


@app.command
def version() -> None:
    """Print the versions of lape and of what it runs on, for a bug report."""
    import platform
    from importlib import metadata

    print(f"lape {__version__}\nPython {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "timm", "torchvision", "transformers", "numpy", "onnxruntime"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed")


@app.command
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="bash, zsh or fish")]) -> None:
    """Print a completion script. In ~/.bashrc: eval "$(lape completion bash)"; likewise for zsh."""
    print(app.generate_completion(prog_name="lape", shell=shell), end="")


def sample_images(checkpoint: "Checkpoint", data_path: str | None, count: int) -> tuple["Tensor", str, dict[str, Any]]:
    """`count` validation images, evenly spread, transformed; what they are of, and the transform.

    `data_path` "" is the packaged digits, None what the checkpoint was trained on where that is still there.
    """
    from lape.data.open import load_data
    from lape.files.restore import settings_of, transform_of
    from lape.study.probing import evenly

    data_flags = {name: checkpoint.args[name] for name in OF_THE_DATA if checkpoint.args.get(name)}
    gone = data_path is None and "data_path" in data_flags and not Path(data_flags["data_path"]).exists()
    flags = {"data_path": data_path} if data_path is not None else {} if gone else data_flags
    settings = settings_of(checkpoint, Recipe(**flags, num_workers=0))
    data = load_data(settings, train=False)
    pixels = evenly(data.val, count)
    name = f"{data.name}, since {data_flags['data_path']} is not there" if gone else data.name
    transform = transform_of(checkpoint)
    height, width = pixels.shape[-2:]
    if transform.size != (height, width):
        transform = replace(transform, input_size=height if height == width else (height, width))
    return pixels, name, transform.to_dict()


def _class_names(paths: Iterable[str]) -> str:
    """Classes without their modules."""
    return ", ".join(path.rpartition(".")[2] for path in paths)


def _print_row(title: str, text: str) -> None:
    import shutil
    import textwrap

    width = max(shutil.get_terminal_size().columns, 40)
    start = f"  {title:<9}"
    print(textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False))


def _with_bar(items: Iterable[Any], total: int) -> Iterator[Any]:
    """The items, with a bar on stderr where both streams allow it: a terminal there, and no lines in its way."""
    if not sys.stderr.isatty() or sys.stdout.isatty() or total < 2:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, "classifying", total, console=Console(stderr=True), transient=True)


def _as_json(rows: Any) -> str:
    return escaped(json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"
