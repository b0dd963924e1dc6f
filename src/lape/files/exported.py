"""A classifier from an exported file: what `lape predict` reads beside checkpoints.

ONNX is data: operations of a fixed list, and tensors. A .pt2 file is not: `torch.export.load` unpickles whatever the
file says is pickled, and evaluates its symbolic shapes as Python. So none is read here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lape.data.augment import EvalTransform
from lape.errors import CheckpointError, LapeError, check_file, needs
from lape.files.read import read_checkpoint
from lape.files.restore import transform_of
from lape.files.vet import check_entries, first_line

DESCRIPTION = "lape"  # the entry of an ONNX file's metadata with class names and transform, as JSON
ENDINGS = (".onnx", ".pt2")


class Classifier(NamedTuple):
    """What is needed of a model in order to classify images."""

    transform: EvalTransform
    classes: list[str]  # a name for each output
    logits: Callable[[Tensor], Tensor]  # of images (B, C, H, W): (B, classes)


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a name is that of an ONNX or torch.export file."""
    return Path(path).suffix in ENDINGS


def all_names(names: Sequence[str] | None, outputs: int) -> list[str]:
    """A name for each output; those without one have their number."""
    return [*(names or []), *(str(number) for number in range(len(names or []), outputs))][:outputs]


def read_exported(path: str | os.PathLike[str], described_by: str | None, device: str) -> Classifier:
    """The classifier in an ONNX file, run by onnxruntime on the processor.

    Args:
        described_by: a checkpoint whose transform and class names it has, for a file that stores none.

    Raises:
        CheckpointError: a .pt2 file, a file that is no ONNX or no classifier of images, or one without a description.
        LapeError: another device; onnxruntime is missing (with its pip line).
    """
    path = Path(path).expanduser()
    if path.suffix == ".pt2":
        raise CheckpointError(
            f"{path} cannot be read without running what it says (torch.export.load unpickles it): give the .onnx file "
            "or the folder that lape export writes beside it, or the checkpoint"
        )
    if device not in ("auto", "cpu"):
        raise LapeError(f"device={device!r}: an ONNX file is run on the processor here, leave --device out")
    session = _session(path)
    description = _description(path, session.get_modelmeta().custom_metadata_map.get(DESCRIPTION))
    if described_by is not None:
        checkpoint = read_checkpoint(described_by)
        transform, names = transform_of(checkpoint), checkpoint.classes
    elif description.get("transform") is None:
        raise CheckpointError(
            f"{path} does not say how images are prepared for it: give --described-by CHECKPOINT, the model it was "
            "exported from, or export that again with lape export"
        )
    else:
        transform, names = EvalTransform.from_dict(description["transform"]), description.get("classes")

    def logits(pixels_BCHW: Tensor) -> Tensor:
        try:
            (place,) = session.get_inputs()
            return torch.from_numpy(session.run(None, {place.name: pixels_BCHW.numpy()})[0])
        except Exception as error:  # of onnxruntime, all of them Exceptions
            shape = tuple(pixels_BCHW.shape)
            raise CheckpointError(f"{path} cannot classify images of shape {shape}: {first_line(error)}") from None

    outputs = logits(torch.zeros(1, transform.in_chans, *transform.size))
    if outputs.ndim != 2 or len(outputs) != 1:
        raise CheckpointError(f"{path} gives {tuple(outputs.shape)} for one image, not one row of class logits")
    return Classifier(transform, all_names(names, outputs.shape[1]), logits)


def _session(path: Path) -> Any:
    if not path.is_file():
        check_file(path, CheckpointError)
        raise CheckpointError(f"no such file: {path}; give the model.onnx that lape export wrote")
    with needs("export"):
        onnxruntime = silent_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    try:  # bytes, which can name no other file as their weights
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"{path} is not an ONNX file that can be run: {first_line(error)}") from None


def silent_onnxruntime() -> Any:
    """The package, which would look up an address and write into the home folder otherwise."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _description(path: Path, text: str | None) -> dict[str, Any]:
    """Class names and transform. Raises CheckpointError where they are anything else."""
    try:
        description = json.loads(text or "{}")
        if not isinstance(description, dict):
            raise ValueError("no mapping")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a description that is none ({first_line(error)}): export it again") from None
    check_entries(path, {}, {name: description.get(name) for name in ("classes", "transform")})
    return description
