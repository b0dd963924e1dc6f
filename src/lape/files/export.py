"""Ship a model: torch.export, ONNX and a folder that loads offline, each checked against the eager model.

A position chain depends on parameters and grid alone, so `fold_` turns it into constants first; what is exported has
no norm of a position and no resampling left in it. Nothing is kept whose outputs differ by more than the tolerance.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lape.convert.apply import fold_
from lape.convert.converted import conversion_of
from lape.convert.positions import describe
from lape.convert.tended import CONFIG
from lape.errors import LapeError, check_finite, needs
from lape.files.atomic import keep_inputs, put_in_place, unfinished, write_content
from lape.files.exported import DESCRIPTION, silent_onnxruntime
from lape.files.folder import load, put_folder_in_place, save
from lape.files.read import WEIGHTS, Checkpoint, read_checkpoint
from lape.files.restore import restore
from lape.names import match_name

REPORT = "export.json"
_FILES = {"folder": "folder", "torch": "model.pt2", "onnx": "model.onnx"}
FORMATS = tuple(_FILES)
BATCH = torch.export.Dim("batch", min=1, max=2**20)  # any number of images; torch 2.6 wants an upper end
TOLERANCE = 1e-4  # on logits, relative to the largest of them


@dataclass(frozen=True)
class ExportResult:
    """One exported file and how it compares with the eager, unfolded model on real images.

    Fields:
        format: folder, torch or onnx
        path: relative to the output folder
        megabytes: of the file, or of all in the folder
        max_difference: of the outputs, relative to the largest eager output
        top1_agreement: share of the images
        images: that both were run on
        operations: kinds of nodes in the graph, ONNX only
    """

    format: str
    path: str
    megabytes: float
    max_difference: float
    top1_agreement: float
    images: int
    operations: dict[str, int]


class _Outputs(nn.Module):
    """A model with one plain tensor as its output, whatever its library returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        y = self.model(pixels_BCHW)
        if isinstance(y, Tensor):
            return y
        for name in ("logits", "pooler_output", "last_hidden_state"):
            if getattr(y, name, None) is not None:
                output: Tensor = getattr(y, name)
                return output
        raise LapeError(f"the model returns a {type(y).__name__} without logits, pooler_output or last_hidden_state")


def export(
    source: str | Path | nn.Module,
    output_dir: str | Path,
    images_BCHW: Tensor,
    *,
    formats: Sequence[str] = FORMATS,
    fold: bool = True,
    tolerance: float = TOLERANCE,
    classes: list[str] | None = None,
    transform: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> list[ExportResult]:
    """Exports a converted model and checks every file against the eager model.

    Args:
        source: a checkpoint, a folder written by `lape.save`, or a converted model (left as it is).
        output_dir: gets `model.onnx`, `model.pt2`, `folder/` and `export.json`; created when missing.
        images_BCHW: real images, transformed; at least 2. Their size is the size of the export.
        formats: of "folder", "torch" (torch.export) and "onnx" (opset 18 or newer, any batch size, one file).
        fold: whether positions become constants.
        tolerance: largest difference of the outputs, relative to the largest eager output.
        classes: class names in the order of the outputs, stored in each file; default: those of the checkpoint.
        transform: what made the images (`EvalTransform.to_dict()`), likewise.

    Raises:
        LapeError: an unknown format, a missing package (with its pip line), images that do not fit, or a file that
            differs by more than the tolerance or is not finite; what was in `output_dir` before is untouched then.
    """
    names = [match_name("format", name, FORMATS) for name in formats]
    if images_BCHW.ndim != 4 or len(images_BCHW) < 2:
        raise LapeError(f"images of shape {tuple(images_BCHW.shape)}: (2 or more, channels, height, width) is needed")
    checkpoint: Checkpoint | None = None
    if isinstance(source, nn.Module):
        eager = source.eval()
    else:
        checkpoint = read_checkpoint(source)
        eager = restore(checkpoint, size=(images_BCHW.shape[2], images_BCHW.shape[3]))
    say(f"exporting {describe(eager)}")
    with torch.no_grad():
        expected_BC = _Outputs(eager)(images_BCHW)
    check_finite(expected_BC, f"the outputs of {'the model' if checkpoint is None else checkpoint.path}")
    product = copy.deepcopy(eager)
    about = {"classes": classes, "transform": transform}
    about = {name: value or getattr(checkpoint, name, None) for name, value in about.items()}
    if fold and not conversion_of(product).folded:
        fold_(product)
    target = Path(output_dir).expanduser()
    keep_inputs((target / name for name in _FILES.values()), [checkpoint.path] if checkpoint else [])
    with _writing(target), unfinished(target, ".export.") as place:
        results = []
        for name in names:
            with torch.no_grad():  # torch writes another graph where a mask could get a gradient
                artifact = _WRITERS[name](product, about, images_BCHW, place)
            result = _compare(name, artifact, images_BCHW, expected_BC)
            _judge(result, tolerance, say)
            results.append(result)
        report = {"model": str(describe(product)), "tolerance": tolerance, "torch": torch.__version__, "files": results}
        _put_in_place(results, report, place, target)
    return results


def _put_in_place(results: list[ExportResult], report: dict[str, Any], place: Path, target: Path) -> None:
    """The report says that all is in place, so it goes first and comes last."""
    write_content(place / REPORT, json.dumps(report, indent=2, default=asdict, allow_nan=False) + "\n")
    (target / REPORT).unlink(missing_ok=True)
    for result in results:
        new, old = place / result.path, target / result.path
        if new.is_dir():  # as `save` does
            put_folder_in_place({name: (new / name).read_bytes() for name in (WEIGHTS, CONFIG)}, old)
        else:
            put_in_place({new: old})
    put_in_place({place / REPORT: target / REPORT})


def _judge(result: ExportResult, tolerance: float, say: Callable[[str], None]) -> None:
    if not result.max_difference <= tolerance:  # NaN fails, too
        raise LapeError(
            f"{result.format}: outputs differ from the eager model by {result.max_difference:.1e} of the largest, more "
            f"than the tolerance of {tolerance:.1e}: nothing was written. Raise `tolerance` if that is enough"
        )
    say(
        f"{result.path}: {result.megabytes:.1f} MB, largest difference {result.max_difference:.1e}, "
        f"top-1 equal on {100 * result.top1_agreement:.1f} % of {result.images} images"
    )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes a folder. One that cannot be written, a full disk, a quota or a limit is one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise LapeError(
            f"cannot write into {folder}: {error.strerror or error}; what was there before is untouched, give another "
            "folder"
        ) from error


Artifact = tuple[Path, Callable[[Tensor], Tensor], dict[str, int]]
About = dict[str, Any]  # class names and transform, as `save` takes them


def _compare(name: str, artifact: Artifact, images_BCHW: Tensor, expected_BC: Tensor) -> ExportResult:
    """Runs what was written on one image, and on the others."""
    path, run, operations = artifact
    with torch.no_grad():
        outputs_BC = torch.cat([run(images_BCHW[:1]), run(images_BCHW[1:])])
    scale = expected_BC.abs().max().clamp(min=1e-12)
    files = [path] if path.is_file() else list(path.iterdir())
    return ExportResult(
        format=name,
        path=path.name,
        megabytes=round(sum(file.stat().st_size for file in files) / 1e6, 3),
        max_difference=((outputs_BC - expected_BC).abs().max() / scale).item(),
        top1_agreement=(outputs_BC.flatten(1).argmax(1) == expected_BC.flatten(1).argmax(1)).float().mean().item(),
        images=len(images_BCHW),
        operations=operations,
    )


def _write_folder(model: nn.Module, about: About, _images: Tensor, folder: Path) -> Artifact:
    path = save(model, folder / _FILES["folder"], **about)
    return path, _Outputs(load(path)), {}


def _write_torch(model: nn.Module, about: About, images_BCHW: Tensor, folder: Path) -> Artifact:
    path = folder / _FILES["torch"]
    with _quiet():
        program = torch.export.export(_Outputs(model), (images_BCHW[:2],), dynamic_shapes=({0: BATCH},), strict=False)
        content = io.BytesIO()  # torch ends the process where it cannot write a file
        torch.export.save(program, content, extra_files={f"{DESCRIPTION}.json": json.dumps(about)})
        path.write_bytes(content.getbuffer())
        module = torch.export.load(path).module()
    return path, module, {}


def _write_onnx(model: nn.Module, about: About, images_BCHW: Tensor, folder: Path) -> Artifact:
    with needs("export", ", or leave onnx out of `formats`"):
        import onnx
        import onnxscript  # noqa: F401  (the exporter needs it)

        onnxruntime = silent_onnxruntime()
    path = folder / _FILES["onnx"]
    with _quiet():
        torch.onnx.export(
            _Outputs(model),
            (images_BCHW[:2],),
            path,
            dynamo=True,
            input_names=["pixels"],
            output_names=["outputs"],
            dynamic_shapes=({0: BATCH},),
            external_data=False,
            verbose=False,
        )
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {DESCRIPTION: json.dumps(about)})
    onnx.save(graph, path)
    operations = Counter(node.op_type for node in graph.graph.node)
    session = onnxruntime.InferenceSession(path.as_posix(), providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels_BCHW.numpy()})[0])

    return path, run, dict(operations)


_WRITERS: dict[str, Callable[[nn.Module, About, Tensor, Path], Artifact]] = {
    "folder": _write_folder,
    "torch": _write_torch,
    "onnx": _write_onnx,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' chatter; what goes wrong raises."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
