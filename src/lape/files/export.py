"""Ship a model: torch.export, ONNX and a folder that loads offline, each checked against the eager model.

A position chain depends on parameters and grid alone, so `fold_` turns it into constants first; what is exported has
no norm of a position and no resampling left in it. Nothing is kept whose outputs differ by more than the tolerance.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lape.convert.apply import fold_
from lape.convert.converted import conversion_of
from lape.convert.positions import describe
from lape.convert.tended import CONFIG
from lape.errors import LapeError, check_finite, needs
from lape.files.atomic import keep_inputs, put_in_place, unfinished, write_atomically
from lape.files.folder import load, put_folder_in_place, save
from lape.files.read import WEIGHTS, Checkpoint, read_checkpoint
from lape.files.restore import restore
from lape.names import match_name

FORMATS = ("folder", "torch", "onnx")
REPORT = "export.json"
_FILES = {"folder": "folder", "torch": "model.pt2", "onnx": "model.onnx"}
BATCH = torch.export.Dim("batch", min=1, max=2**20)  # any number of images; torch 2.6 wants an upper end
TOLERANCE = 1e-4  # on logits, relative to the largest of them


@dataclass(frozen=True)
class Exported:
    """One exported file and how it compares with the eager, unfolded model on real images."""

    format: str
    path: str  # relative to the output folder
    megabytes: float
    max_difference: float  # of the outputs, relative to the largest eager output
    top1_agreement: float  # share of the images
    images: int
    operations: dict[str, int]  # kinds of nodes in the graph, ONNX only


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
    say: Callable[[str], None] = print,
) -> list[Exported]:
    """Exports a converted model and checks every file against the eager model.

    Args:
        source: a checkpoint, a folder written by `lape.save`, or a converted model (left as it is).
        output_dir: gets `model.onnx`, `model.pt2`, `folder/` and `export.json`; created when missing.
        images_BCHW: real images, transformed; at least 2. Their size is the size of the export.
        formats: of "folder", "torch" (torch.export) and "onnx" (opset 18 or newer, any batch size, one file).
        fold: whether positions become constants.
        tolerance: largest difference of the outputs, relative to the largest eager output.

    Raises:
        LapeError: an unknown format, a missing package (with its pip line), images that do not fit, or a file that
            differs by more than the tolerance or is not finite; what was in `output_dir` before is untouched then.
    """
    chosen = [match_name("format", name, FORMATS) for name in formats]
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
    shipped = copy.deepcopy(eager)
    if fold and not conversion_of(shipped).folded:
        fold_(shipped)
    target = Path(output_dir).expanduser()
    if checkpoint is not None:
        keep_inputs((target / name for name in _FILES.values()), [checkpoint.path])
    _make(target)
    with _writing(target), unfinished(target, ".export.") as place:
        done = []
        for name in chosen:
            with torch.no_grad():  # torch writes another graph where a mask could get a gradient
                path, run, operations = _WRITERS[name](shipped, checkpoint, images_BCHW, place)
            result = _compare(name, path, run, operations, images_BCHW, expected_BC, place)
            _judge(result, tolerance, say)
            done.append(result)
        report = {"model": str(describe(shipped)), "tolerance": tolerance, "torch": torch.__version__, "files": done}
        text = json.dumps(report, indent=2, default=asdict, allow_nan=False) + "\n"
        write_atomically(place / REPORT, lambda file: file.write(text.encode()))
        (target / REPORT).unlink(missing_ok=True)  # it says that all is in place, so it goes first and comes last
        for result in done:
            _move(place / result.path, target / result.path)
        put_in_place({place / REPORT: target / REPORT})
    return done


def _judge(result: Exported, tolerance: float, say: Callable[[str], None]) -> None:
    if not result.max_difference <= tolerance:  # NaN fails, too
        raise LapeError(
            f"{result.format}: outputs differ from the eager model by {result.max_difference:.1e} of the largest, more "
            f"than the tolerance of {tolerance:.1e}: nothing was written. Raise `tolerance` if that is enough"
        )
    say(
        f"{result.path}: {result.megabytes:.1f} MB, largest difference {result.max_difference:.1e}, "
        f"top-1 equal on {100 * result.top1_agreement:.1f} % of {result.images} images"
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LapeError(f"cannot write into {folder}: {error.strerror}; give another folder") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk, a quota or a limit is one line; others are no LapeError."""
    try:
        yield
    except OSError as error:
        raise LapeError(
            f"cannot write into {folder}: {error.strerror or error}; what was there before is untouched"
        ) from error


def _move(new: Path, place: Path) -> None:
    """Puts a finished file in its place; a folder as `save` does."""
    if new.is_dir():
        put_folder_in_place({name: (new / name).read_bytes() for name in (WEIGHTS, CONFIG)}, place)
    else:
        put_in_place({new: place})


def _compare(
    name: str,
    path: Path,
    run: Callable[[Tensor], Tensor],
    operations: dict[str, int],
    images_BCHW: Tensor,
    expected_BC: Tensor,
    base: Path,
) -> Exported:
    """Runs what was written on one image, and on all of them."""
    with torch.no_grad():
        got_BC = torch.cat([run(images_BCHW[:1]), run(images_BCHW[1:])])
    scale = expected_BC.abs().max().clamp(min=1e-12)
    files = [path] if path.is_file() else list(path.iterdir())
    return Exported(
        format=name,
        path=str(path.relative_to(base)),
        megabytes=round(sum(file.stat().st_size for file in files) / 1e6, 3),
        max_difference=((got_BC - expected_BC).abs().max() / scale).item(),
        top1_agreement=(got_BC.flatten(1).argmax(1) == expected_BC.flatten(1).argmax(1)).float().mean().item(),
        images=len(images_BCHW),
        operations=operations,
    )


Written = tuple[Path, Callable[[Tensor], Tensor], dict[str, int]]


def _write_folder(model: nn.Module, checkpoint: Checkpoint | None, _images: Tensor, folder: Path) -> Written:
    classes, transform = (checkpoint.classes, checkpoint.transform) if checkpoint is not None else (None, None)
    path = save(model, folder / _FILES["folder"], classes=classes, transform=transform)
    return path, _Outputs(load(path)), {}


def _write_torch(model: nn.Module, _checkpoint: Checkpoint | None, images_BCHW: Tensor, folder: Path) -> Written:
    path = folder / _FILES["torch"]
    with _quiet():
        program = torch.export.export(_Outputs(model), (images_BCHW[:2],), dynamic_shapes=({0: BATCH},))
        content = io.BytesIO()  # torch ends the process where it cannot write a file
        torch.export.save(program, content)
        path.write_bytes(content.getbuffer())
        module = torch.export.load(path).module()
    return path, module, {}


def _write_onnx(model: nn.Module, _checkpoint: Checkpoint | None, images_BCHW: Tensor, folder: Path) -> Written:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would look up an address, and write into the home folder
    with needs("export", ", or leave onnx out of `formats`"):
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter needs it)
    onnxruntime.disable_telemetry_events()
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
    operations = Counter(node.op_type for node in onnx.load(path).graph.node)
    session = onnxruntime.InferenceSession(path.as_posix(), providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels_BCHW.numpy()})[0])

    return path, run, dict(operations)


_WRITERS: dict[str, Callable[[nn.Module, Checkpoint | None, Tensor, Path], Written]] = {
    "folder": _write_folder,
    "torch": _write_torch,
    "onnx": _write_onnx,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' chatter; what goes wrong raises."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
