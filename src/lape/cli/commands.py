"""The commands of `lape`. Nothing heavy is imported before a command needs it."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from lape.cli.app import GROUPS, _keywords, app, original, takes
from lape.errors import LapeError
from lape.recipe import Recipe, check_launch

if TYPE_CHECKING:
    from torch import Tensor

    from lape.files.read import Checkpoint


# What an evaluation reads; `lape eval` refuses the rest rather than ignore it.
STORED = ("model", "join_type", "pe", "in_chans", "model_kwargs", "input_size", "eval_crop_ratio", "mean", "std")
EVALUATION = (
    *STORED,
    *("data_path", "data_set", "inat_category", "batch_size", "num_workers", "pin_mem", "decode"),
    *("ema", "dist_eval", "device", "amp", "threads"),
)

# What the matrix of `lape compare` sets itself, and what means nothing for it.
NOT_COMPARED = (
    *("model", "pe", "join_type", "warm_start", "seed", "output_dir", "resume", "start_epoch", "eval", "dist_eval"),
    *("threads", "num_workers", "pin_mem", "world_size", "dist_url", "log_every"),
)


@app.command
def demo(
    *,
    output_dir: Annotated[str, Parameter(help="where report.md, results.json and the figures go")] = "lape-demo",
    seeds: Annotated[int, Parameter(help="trainings of each join")] = 5,
    epochs: Annotated[int | None, Parameter(help="length of a training (default: the packaged recipe's)")] = None,
    long_factor: Annotated[int, Parameter(help="the longer budget, as a multiple of the epochs")] = 3,
    long_seeds: Annotated[int, Parameter(help="trainings of each join with the longer budget; 0: none")] = 1,
    workers: Annotated[int, Parameter(help="trainings side by side, one thread each")] = 2,
    time_limit: Annotated[
        float | None, Parameter(help="seeds that would end later, in seconds, are left out; none: all are run")
    ] = 150.0,
) -> None:
    """Train basic and LaPE side by side on the packaged digits: a table, curves and a report in minutes."""
    from lape.study.demo import run_demo

    run_demo(
        output_dir,
        seeds=seeds,
        epochs=epochs,
        long_factor=long_factor,
        long_seeds=long_seeds,
        workers=workers,
        time_limit=time_limit,
    )


@original.default
@app.command(name="train")
@takes(Recipe.model_fields)
def train(
    *,
    recipe: Annotated[
        str | None,
        Parameter(help="YAML file, or the name of a packaged recipe; flags win over it", group=GROUPS["Recipe"]),
    ] = None,
    local_rank: Annotated[
        int | None, Parameter(help="accepted and ignored: the launcher's environment says it", group=GROUPS["Launcher"])
    ] = None,
    distributed: Annotated[
        bool, Parameter(help="accepted under a launcher, which decides", group=GROUPS["Launcher"], negative=())
    ] = False,
    cosub: Annotated[
        bool,
        Parameter(help="refused: cosub training is not part of this project", group=GROUPS["Launcher"], negative=()),
    ] = False,
    **given: Any,
) -> None:
    """Train a model, or evaluate one with --eval. Flags are those of DeiT and LaPE, `-` and `_` alike."""
    if cosub:
        raise LapeError("--cosub is not supported: leave it out, or train with facebookresearch/deit")
    if distributed and "WORLD_SIZE" not in os.environ:
        raise LapeError("--distributed needs a launcher: start with torchrun --nproc_per_node=N main.py ...")
    settings = Recipe.from_yaml(recipe, **given) if recipe else Recipe(**given)
    check_launch(settings)
    if settings.eval:
        from lape.train.evaluate import evaluate_checkpoint

        evaluate_checkpoint(settings)
    else:
        from lape.train.loop import train as run

        run(settings)


@app.command(name="compare")
@takes(name for name in Recipe.model_fields if name not in NOT_COMPARED)
def compare(
    *,
    output_dir: Annotated[str, Parameter(help="where cells and report go; what is done there is skipped")],
    recipe: Annotated[
        str, Parameter(help="YAML file, or the name of a packaged recipe; flags win over it", group=GROUPS["Recipe"])
    ] = "digits",
    joins: Annotated[tuple[str, ...], Parameter(help="joins to compare")] = ("basic", "LaPE"),
    pes: Annotated[tuple[str, ...], Parameter(help="kinds of position embedding")] = ("learnable",),
    models: Annotated[tuple[str, ...], Parameter(help="timm names (default: the recipe's)")] = (),
    rivals: Annotated[tuple[str, ...], Parameter(help="timm names, each trained as it is, by the same recipe")] = (),
    rival_kwargs: Annotated[
        dict[str, Any] | None,
        Parameter(
            help="--model-kwargs of the rivals (default: the same)",
            converter=_keywords,
            accepts_keys=False,
            n_tokens=-1,
            json_dict=False,
        ),
    ] = None,
    seeds: Annotated[tuple[int, ...], Parameter(help="seeds of each combination")] = (0, 1, 2),
    baseline: Annotated[
        str | None, Parameter(help="join that the others are compared with (default: basic, or the first)")
    ] = None,
    runs: Annotated[
        tuple[str, ...], Parameter(help="finished runs and checkpoints to show beside, in a table of their own")
    ] = (),
    workers: Annotated[int, Parameter(help="trainings side by side, one thread each; also on one GPU")] = 2,
    **given: Any,
) -> None:
    """Train joins, kinds, models and seeds by one recipe and compare them: table, test, curves, report, explorer."""
    from lape.study.compare import compare as run_matrix

    settings = Recipe.from_yaml(recipe, **given)
    run_matrix(
        settings,
        output_dir,
        joins=joins,
        pes=pes,
        models=models,
        rivals=rivals,
        rival_kwargs=rival_kwargs,
        seeds=seeds,
        baseline=baseline,
        runs=runs,
        workers=workers,
    )


@app.command(name="eval")
@takes(EVALUATION, STORED)
def evaluate(
    checkpoint: Annotated[str | None, Parameter(help=".pth file or folder written by lape.save")] = None,
    *,
    resume: Annotated[str | None, Parameter(help="the same as CHECKPOINT, the original's spelling")] = None,
    **given: Any,
) -> None:
    """Evaluate a checkpoint. What is not given (model, join, PE, input size) comes from the checkpoint."""
    if (checkpoint is None) == (resume is None):
        raise LapeError("give one checkpoint: lape eval CHECKPOINT (or --resume CHECKPOINT)")
    settings = Recipe(eval=True, resume=checkpoint or resume, **given)

    from lape.train.evaluate import evaluate_checkpoint

    evaluate_checkpoint(settings)


@app.command
def predict(
    *images: Annotated[str, Parameter(help="image files")],
    checkpoint: Annotated[str, Parameter(help=".pth file or folder written by lape.save")],
    top_k: Annotated[int, Parameter(help="how many classes to show for an image")] = 5,
    json: Annotated[
        str | None, Parameter(help="write it to this JSON file; -: stdout", allow_leading_hyphen=True)
    ] = None,
    csv: Annotated[
        str | None, Parameter(help="write it to this CSV file; -: stdout", allow_leading_hyphen=True)
    ] = None,
    device: Annotated[str, Parameter(help="auto (CUDA when there is one), cpu, cuda, cuda:N")] = "auto",
) -> None:
    """Classify images, with the transform and the class names stored in the checkpoint.

    Lines appear as images are done; files are written at the end.
    """
    if not images:
        raise LapeError("no image was given: lape predict IMAGE... --checkpoint CHECKPOINT")
    if top_k < 1:
        raise LapeError(f"--top-k {top_k} is not allowed: give 1 or more")

    for path in (json, csv):
        if path not in (None, "-") and not Path(str(path)).parent.is_dir():  # before the work, not after it
            raise LapeError(f"{path!r} cannot be written (no such folder): give a file in a folder that exists")

    from lape.train.evaluate import predictions

    rows: list[dict[str, Any]] = []
    for p in _shown(predictions(checkpoint, images, top_k=top_k, device=device), len(images)):
        best = list(zip(p.classes, p.probabilities, strict=True))
        rows += [
            {"image": p.path, "rank": rank, "class": name, "probability": probability}
            for rank, (name, probability) in enumerate(best, start=1)
        ]
        if "-" not in (json, csv):
            print("\n".join([p.path, *(f"  {100 * probability:6.2f} %  {name}" for name, probability in best)]))
    if json is not None:
        _write(json, _as_json(rows))
    if csv is not None:
        _write(csv, _as_csv(rows))


@app.command
def visualize(
    *checkpoints: Annotated[str, Parameter(help=".pth files or folders written by lape.save")],
    save_dir: Annotated[str | None, Parameter(help="the pictures go into SAVE_DIR/MODEL_NAME/")] = None,
    html: Annotated[str | None, Parameter(help="write the explorer, one file for the browser, here")] = None,
    image: Annotated[
        tuple[str, ...], Parameter(help="with --html: photographs to look at, for attention as well")
    ] = (),
    model_name: Annotated[str | None, Parameter(help="name of the folder (default: model and join)")] = None,
    token: Annotated[int | None, Parameter(help="patch whose map is drawn (default: the centre)")] = None,
    size: Annotated[
        tuple[int, ...] | None, Parameter(help="image side, or height and width, pixels (default: the model's)")
    ] = None,
    view: Annotated[
        Literal["seen", "received", "unbiased"] | None,
        Parameter(help="positions as attention sees them (unbiased: less the norm's bias) or a block receives them"),
    ] = None,
    join_type: Annotated[str | None, Parameter(help="must agree with the checkpoint, if it says")] = None,
    pe: Annotated[str | None, Parameter(help="must agree with the checkpoint, if it says")] = None,
    ema: Annotated[bool, Parameter(help="draw the averaged weights", negative=())] = False,
) -> None:
    """Draw what the position embedding became in every layer, and write the numbers (.npz).

    Several checkpoints are drawn side by side: in the explorer, and as one figure a kind of map in SAVE_DIR.
    """
    if not checkpoints:
        raise LapeError("no checkpoint was given: lape visualize CHECKPOINT --save-dir DIR")
    if save_dir is None and html is None:
        raise LapeError("nothing to write: give --save-dir DIR for pictures, --html FILE for the explorer, or both")
    if size is not None and len(size) > 2:
        raise LapeError(f"--size {' '.join(map(str, size))} has {len(size)} values: give one, or height and width")
    if image and html is None:
        raise LapeError("--image shows photographs in the explorer: give --html FILE as well")
    if save_dir is None and (token is not None or view is not None):
        raise LapeError("--token and --view choose what pictures show: give --save-dir DIR as well")
    if len(checkpoints) > 1 and model_name is not None and save_dir is not None:
        raise LapeError("--model-name names the folder of one checkpoint, several were given: leave it out")
    sides = size if size is None or len(size) == 2 else size[0]

    if save_dir is not None:
        from lape.look.figures import left_over
        from lape.look.figures import visualize as draw
        from lape.train.start import short

        for checkpoint in checkpoints:
            files = draw(
                checkpoint,
                save_dir,
                model_name=model_name,
                token=token,
                size=sides,
                view=view,
                join=join_type,
                pe=pe,
                ema=ema,
            )
            first = next(f for f in files if f.stem == "overview")
            print(f"{len(files)} files in {files[0].parent}, first look at {first}")
            if old := left_over(files):
                print(
                    f"{len(old)} of an earlier drawing are still in that folder ({short(old)}): they do not belong to "
                    "this one; remove them, or choose another --model-name"
                )
        if len(checkpoints) > 1:
            from lape.files.restore import load
            from lape.look.figures import compare as draw_together
            from lape.look.figures import sorts

            models = {c: load(c, model_name, join_type, pe, sides, ema)[0] for c in checkpoints}
            if max(map(len, sorts(models))) > 1:
                print(f"{len(draw_together(models, save_dir, view=view or 'seen'))} files of all models in {save_dir}")
            else:
                print("no figure of all models: one has positions, another a bias on attention logits")
    if html is not None:
        from lape.look.explorer.explorer import explore

        page = explore(
            checkpoints, html, images=image, size=sides, model_name=model_name, join=join_type, pe=pe, ema=ema
        )
        print(f"open {page} in a browser ({page.stat().st_size / 1e6:.1f} MB, works offline)")


@app.command
def export(
    checkpoint: Annotated[str, Parameter(help=".pth file or folder written by lape.save")],
    *,
    output_dir: Annotated[str, Parameter(help="gets folder/, model.pt2, model.onnx and export.json")],
    formats: Annotated[tuple[str, ...], Parameter(help="of folder, torch, onnx")] = ("folder", "torch", "onnx"),
    fold: Annotated[bool, Parameter(help="positions become constants")] = True,
    tolerance: Annotated[float, Parameter(help="largest difference of outputs, relative to the largest")] = 1e-4,
    data_path: Annotated[str, Parameter(help="folder with val/ to check on (default: the packaged digits)")] = "",
    images: Annotated[int, Parameter(help="how many images to check on")] = 64,
) -> None:
    """Write a model as torch.export, ONNX and a folder that loads offline, each checked against the eager model."""
    from lape.files.export import export as write
    from lape.files.read import read_checkpoint

    if images < 2:
        raise LapeError(f"--images {images} is not allowed: give 2 or more")
    pixels, data_name = sample_images(read_checkpoint(checkpoint), data_path, images)
    print(f"checked on {len(pixels)} images of {data_name}")
    write(checkpoint, output_dir, pixels, formats=formats, fold=fold, tolerance=tolerance)


@app.command
def bench(
    *,
    model: Annotated[str, Parameter(help="timm name of the Vision Transformer")] = Recipe.model_fields["model"].default,
    model_kwargs: Annotated[
        dict[str, Any] | None,
        Parameter(
            help="more arguments of the timm model: KEY=VALUE pairs or JSON",
            converter=_keywords,
            accepts_keys=False,
            n_tokens=-1,
            json_dict=False,
        ),
    ] = None,
    joins: Annotated[tuple[str, ...], Parameter(help="joins; the first is what others are compared with")] = (
        "basic",
        "LaPE",
    ),
    pe: Annotated[str | None, Parameter(help="kind of position embedding (default: the model's own)")] = None,
    fold: Annotated[bool, Parameter(help="folded forms as well, for inference", negative=())] = False,
    compile: Annotated[bool, Parameter(help="measure compiled models", negative=())] = False,
    amp: Annotated[Literal["none", "bf16", "fp16"], Parameter(help="mixed precision")] = "none",
    batch_size: Annotated[int, Parameter(help="images a step")] = Recipe.model_fields["batch_size"].default,
    image_size: Annotated[int | None, Parameter(help="side in pixels (default: the model's)")] = None,
    device: Annotated[str, Parameter(help="auto (CUDA when there is one), cpu, cuda, cuda:N")] = "auto",
    threads: Annotated[int, Parameter(help="CPU threads of torch; 0: torch decides")] = 0,
    rounds: Annotated[int, Parameter(help="how often each variant is timed, in turn")] = 20,
    train: Annotated[bool, Parameter(help="time a training step")] = True,
    inference: Annotated[bool, Parameter(help="time inference, and the latency of one image")] = True,
    peers: Annotated[
        tuple[str, ...], Parameter(help="the same ViT without lape beside it, of timm, torchvision, transformers")
    ] = (),
    json: Annotated[
        str | None, Parameter(help="write it to this JSON file; -: stdout", allow_leading_hyphen=True)
    ] = None,
) -> None:
    """Measure what joins cost: parameters, MACs, images a second, latency and memory, in interleaved rounds."""
    if threads < 0:
        raise LapeError(f"--threads {threads} is not allowed: give 0 or more")
    if json not in (None, "-") and (Path(json).is_dir() or not Path(json).parent.is_dir()):
        raise LapeError(f"--json {json!r} cannot be written: give a file in a folder that exists")

    import torch

    from lape.study.benchmark import benchmark, table

    if threads:
        torch.set_num_threads(threads)
    found = benchmark(
        model,
        joins,
        pe=pe,
        model_kwargs=model_kwargs,
        fold=fold,
        compiled=compile,
        amp=amp,
        batch_size=batch_size,
        image_size=image_size,
        device=device,
        rounds=rounds,
        train=train,
        inference=inference,
        peers=peers,
        say=(lambda line: print(line, file=sys.stderr)) if json == "-" else print,
    )
    if json is not None:
        _write(json, _as_json(found))
    if json != "-":
        print("\n".join(["", *table(found)]))


@app.command(name="check-data")
def check_data(
    data_path: Annotated[str, Parameter(help="folder with train/<class>/* and val/<class>/*")],
    *,
    json: Annotated[
        str | None, Parameter(help="write all findings to this JSON file; -: stdout", allow_leading_hyphen=True)
    ] = None,
    workers: Annotated[int, Parameter(help="processes; 0: one a processor")] = 0,
) -> None:
    """Open every image of a data folder before a long run; exit code 0 when training may start, else 2."""
    from lape.data.check import check_data as check

    report = check(data_path, workers=workers or None)
    if json is not None:
        _write(json, _as_json(report.to_dict()))
    if json != "-":
        for line in report.lines():
            print(line)
    if not report.fit:
        raise LapeError(f"{data_path} is not fit for training: {len(report.errors)} error(s) are listed above")


@app.command
def hosts() -> None:
    """List the models that can be converted, by the class of their blocks."""
    from lape.hosts import hosts as table

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


def sample_images(checkpoint: "Checkpoint", data_path: str, count: int) -> tuple["Tensor", str]:
    """`count` validation images, evenly spread, of a data set ("": the packaged digits), transformed; and its name."""
    import torch

    from lape.data.open import load_data
    from lape.files.restore import settings_of

    settings = settings_of(checkpoint, Recipe(data_path=data_path, num_workers=0))
    data = load_data(settings, train=False)
    val: Any = data.val
    step = max(1, len(val) // count)
    return torch.stack([val[i][0] for i in range(0, len(val), step)][:count]), data.name


def _class_names(paths: Iterable[str]) -> str:
    """Classes without their modules."""
    return ", ".join(path.rpartition(".")[2] for path in paths)


def _print_row(title: str, text: str) -> None:
    import shutil
    import textwrap

    width = max(shutil.get_terminal_size().columns, 40)
    start = f"  {title:<9}"
    print(textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False))


def _shown(items: Iterable[Any], total: int) -> Iterator[Any]:
    """The items, with a bar on stderr where both streams allow it: a terminal there, and no lines in its way."""
    if not sys.stderr.isatty() or sys.stdout.isatty() or total < 2:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, "classifying", total, console=Console(stderr=True), transient=True)


def _as_json(rows: Any) -> str:
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _as_csv(rows: list[dict[str, Any]]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write(path: str, text: str) -> None:
    if path == "-":
        print(text, end="")
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LapeError(f"{path!r} cannot be written ({error.strerror}): give a file in a folder that exists") from None
