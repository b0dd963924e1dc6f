"""A model as a folder: save it, load it, push it to the Hugging Face Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lape.convert import build, fold_
from lape.errors import LapeError
from lape.files.atomic import write_atomically
from lape.files.read import CONFIG, FORMAT, HUB, WEIGHTS, _hub, read_checkpoint
from lape.files.restore import model_from_checkpoint
from lape.hosts import host_named
from lape.record import Conversion, conversion_of
from lape.reference import to_reference_state_dict


def save(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    classes: list[str] | None = None,
    transform: dict[str, Any] | None = None,
    **timm_kwargs: Any,
) -> Path:
    """Writes a converted model as a folder: `model.safetensors` and `config.json` (model name, join, PE kind, grid,
    image size, class names, evaluation transform). `lape.load` reads it, without running any code from it.

    Args:
        name, timm_kwargs: the timm model and its arguments; needed for a timm model that was not made by
            `lape.create_model`. Models of transformers and torchvision tell theirs.
        classes: class names in the order of the outputs.
        transform: the evaluation transform (`EvalTransform.to_dict()`).

    Raises LapeError when how to build the model is not known, or the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    conversion = conversion_of(model)
    factory = conversion.factory
    if name:
        factory = {"library": "timm", "name": name, "kwargs": timm_kwargs}
    elif (
        not factory
        and conversion.anatomy.blocks  # else it has no host
        and (blueprint := host_named(conversion.host).blueprint) is not None
        and (made := blueprint(model))
    ):
        factory = {"library": host_named(conversion.host).package, "name": made[0], "kwargs": made[1]}
    if not factory:
        raise LapeError(
            "how to build this model again is not known: give its timm name and arguments, "
            "lape.save(model, path, name=..., ...), or save the state_dict yourself"
        )
    state = {key: tensor.contiguous() for key, tensor in to_reference_state_dict(model).items()}
    config = {
        "format": FORMAT,
        "library": factory["library"],
        "model": factory["name"],
        "model_kwargs": factory["kwargs"],
        "join": conversion.join,
        "pe": conversion.pe,
        "warm_start": conversion.warm_start,
        "folded": conversion.folded,
        "grid": conversion.layout.grid,
        "input_size": _pixels(conversion),
        "classes": classes,
        "transform": transform,
    }
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise LapeError(f"config.json takes plain values only: {error} in {factory['kwargs']} or {transform}") from None
    if name:
        _check_factory(model, factory)
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LapeError(f"cannot create the folder {path}: {error.strerror}") from error
    write_atomically(path / WEIGHTS, lambda file: file.write(to_bytes(state)))
    write_atomically(path / CONFIG, lambda file: file.write(text.encode()))
    return path


def _pixels(conversion: Conversion) -> tuple[int, int]:
    """(height, width) of the images that a model is made for."""
    (rows, columns), (height, width) = conversion.layout.grid, conversion.anatomy.patch_size
    return rows * height, columns * width


def _check_factory(model: nn.Module, factory: dict[str, Any]) -> None:
    """Raises LapeError unless this name and these arguments make a model of the same parts and shapes."""
    conversion = conversion_of(model)
    pe = None if conversion.warm_start else conversion.pe
    with torch.device("meta"):
        twin = build(
            factory["library"],
            factory["name"],
            factory["kwargs"],
            conversion.join,
            pe,
            warm_start=conversion.warm_start,
        )
        if conversion.folded:
            fold_(twin)
    ours, theirs = ({key: tuple(t.shape) for key, t in m.state_dict().items()} for m in (model, twin))
    if ours != theirs:
        key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
        raise LapeError(
            f"name={factory['name']!r} with {factory['kwargs']} makes another model: {key} is {theirs.get(key)} there "
            f"and {ours.get(key)} here; give the arguments that this model was made with"
        )


def push_to_hub(model: nn.Module, repo_id: str, *, private: bool | None = None, **save_kwargs: Any) -> str:
    """Uploads a converted model to the Hugging Face Hub, in the files of `save`; returns its address for `load`.

    Needs huggingface_hub and its login. `save_kwargs` go to `save` (name, classes, transform, ...). Raises LapeError
    when the model cannot be saved or huggingface_hub is missing; what the Hub refuses is its own error.
    """
    api = _hub().HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, **save_kwargs)
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a lape model")
    return HUB + repo_id


def load(path: str | Path, **timm_kwargs: Any) -> nn.Module:
    """The model of a folder written by `save` (or by transformers' `save_pretrained` of a converted model), of a `.pth`
    of a training run, or of "hf-hub:OWNER/NAME", in eval mode.

    `timm_kwargs` go to the model on top of what the file says. Nothing in the file is executed. Raises CheckpointError.
    """
    return model_from_checkpoint(read_checkpoint(path), **timm_kwargs)
