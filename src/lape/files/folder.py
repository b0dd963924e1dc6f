"""A model as a folder: save it, load it, push it to the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import operator
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lape.convert.converted import conversion_of
from lape.convert.positions import Size
from lape.convert.tended import CONFIG, sealed
from lape.errors import LapeError, arguments_as
from lape.files.atomic import put_in_place, remove_leftovers, write_content
from lape.files.blueprint import COMPILED, blueprint_of, unwrapped
from lape.files.names import to_reference_state_dict
from lape.files.read import FORMAT, HUB, WEIGHTS, _hub, staging_path
from lape.files.restore import SIZE_NAMES, restore
from lape.files.vet import check_entries


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
        name, timm_kwargs: the timm model and its arguments, where `timm.create_model` or `lape.create_model` did not
            make it. Models of transformers and torchvision tell theirs.
        classes: class names in the order of the outputs.
        transform: the evaluation transform (`EvalTransform.to_dict()`).

    Raises LapeError when how to build the model is not known, when what that makes is not the model at hand (other
    blocks, another head than its library makes), or when the folder cannot be written. Nothing is written then.
    """
    from safetensors.torch import save as to_bytes

    model = unwrapped(model)
    conversion, factory = conversion_of(model), blueprint_of(model, name, timm_kwargs)
    names, anatomy = to_reference_state_dict(model), conversion.anatomy
    state = {key.replace(f"{COMPILED}.", ""): tensor.contiguous() for key, tensor in names.items()}
    weights = to_bytes(state)
    config = {
        "format": FORMAT,
        "library": factory["library"],
        "model": factory["name"],
        "model_kwargs": factory["kwargs"],
        **conversion.record(),
        # (height, width), behind the frames of a video
        "input_size": anatomy.pixels or tuple(map(operator.mul, anatomy.layout.grid, anatomy.patch_size)),
        "classes": classes,
        "transform": transform,
    }
    try:
        text = json.dumps(sealed(config, {WEIGHTS: hashlib.sha256(weights).hexdigest()}), indent=2) + "\n"
    except TypeError as error:
        raise LapeError(f"config.json takes plain values only: {error} in {factory['kwargs']} or {transform}") from None
    check_entries(Path(path), {"model_kwargs": factory["kwargs"], "model": factory["name"]}, config)
    path = Path(path).expanduser()
    put_folder_in_place({WEIGHTS: weights, CONFIG: text.encode()}, path)
    return path


def put_folder_in_place(contents: Mapping[str, bytes], path: Path) -> None:
    """Writes weights and config.json of a model, over an earlier one where there is one.

    One transaction: when config.json is in place the folder is the new model, whose weights still wait beside the
    earlier ones'; until then it is the earlier model. Raises LapeError when the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LapeError(f"cannot create the folder {path}: {error.strerror}") from error
    staging = staging_path(path / WEIGHTS, hashlib.sha256(contents[WEIGHTS]).hexdigest())
    for place, content in ((staging, contents[WEIGHTS]), (path / CONFIG, contents[CONFIG])):
        write_content(place, content)
    put_in_place({staging: path / WEIGHTS})
    remove_leftovers(path, f".{'[0-9a-f]' * 16}.{WEIGHTS}")  # by saves that were killed
    remove_leftovers(path, f"..{'[0-9a-f]' * 16}.{WEIGHTS}.*.tmp")


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


def load(
    path: str | Path,
    *,
    model: str | None = None,
    join: str | None = None,
    pe: str | None = None,
    input_size: Size | None = None,
    ema: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """The model of a file, in eval mode. Nothing in the file is executed.

    Args:
        path: a folder written by `save` (or by transformers' `save_pretrained` of a converted model), a `.pth` of a
            training run, of DeiT or of the LaPE authors, "hf-hub:OWNER/NAME" or an https address.
        model, join, pe: for a file that does not say them; they must agree with one that does.
        input_size: image side in pixels, or (height, width): None is the file's own, for another one the position table
            is resampled. Also spelled img_size, as in timm, or image_size.
        ema: the averaged weights of a training run.
        timm_kwargs: arguments of the model on top of what the file says (drop_path_rate, ...).

    Raises:
        CheckpointError: no such file, one that cannot be read safely, that does not say what is needed, contradicts
            what was given, or does not fit the model.
        LapeError: an unknown name, or two image sizes.
    """
    sizes = [input_size, *(timm_kwargs.pop(name, None) for name in SIZE_NAMES)]
    sizes = [size for size in sizes if size is not None]
    if len(sizes) > 1:
        raise LapeError(f"input_size was given more than once ({', '.join(map(str, sizes))}): give it once")
    with arguments_as(size="`input_size`"):
        return restore(path, size=next(iter(sizes), None), ema=ema, model=model, join=join, pe=pe, **timm_kwargs)
