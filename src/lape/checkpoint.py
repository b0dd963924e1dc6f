"""Files: read any checkpoint without running its code, write whole or not at all, save and load models."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from lape.convert import build, fold_
from lape.errors import CheckpointError, LapeError
from lape.hosts import host_named
from lape.joins import join_named
from lape.position import kind_named
from lape.record import Conversion, conversion_of
from lape.reference import load_reference_state_dict, to_reference_state_dict

HEADS = ("head.weight", "head.fc.weight")  # of a classifier: in most models of timm, in those of stages
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = "lape-1"
PROCESSOR = "preprocessor_config.json"  # of transformers
HUB = "hf-hub:"  # in front of OWNER/NAME, as timm spells it

_JOIN_ALIASES = {"ln": "LaPE"}  # the reference's name for LaPE on relative position bias


# ------------------------------------------------------------------------------------------------ read


@dataclass(frozen=True)
class Checkpoint:
    """What a file says. `model` holds the authors' names (those of a converted model in a folder of transformers);
    `args` the flags of the run that wrote it."""

    path: Path
    kind: Literal["pth", "folder"]
    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)  # every other entry: epoch, optimizer, ...

    @property
    def num_classes(self) -> int | None:
        """Outputs of the classifier, None without one."""
        head = next((self.model[name] for name in HEADS if name in self.model), None)
        return None if head is None else head.shape[0]

    @property
    def package(self) -> str:
        """Who builds the model."""
        return self.raw.get("library") or "timm"

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the outputs, when the file holds them."""
        return self.raw.get("classes")

    @property
    def transform(self) -> dict[str, Any] | None:
        """The evaluation transform, when the file holds it."""
        return self.raw.get("transform")

    def setting(self, name: str, given: Any = None) -> Any:
        """The value of a flag: the given one, else what the file says.

        Raises CheckpointError when both speak and differ, or when neither does.
        """
        said = self.args.get(name)
        if given is None and said is None:
            flag = name.replace("_", "-")
            raise CheckpointError(f"{self.path} does not say its {name}: give it by --{flag}")
        if given is not None and said is not None and given != said:
            flag = name.replace("_", "-")
            raise CheckpointError(f"--{flag} {given} was given, but {self.path} holds a model with {name}={said}")
        return said if given is None else given


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint of this project, of DeiT or of the LaPE authors, or a folder written by `save`, or by
    `save_pretrained` of a converted model of transformers.

    "hf-hub:OWNER/NAME" and https addresses are downloaded first (asked for by their user). Nothing in the file is
    executed: `torch.load(weights_only=True)` with `argparse.Namespace`, a plain record that DeiT-style files hold, as
    the only addition.

    Raises CheckpointError: no such file, not a checkpoint, torn, or a pickle that wants to run code.
    """
    if str(path).startswith("https://"):
        return _from_contents(
            Path(str(path)),
            torch.hub.load_state_dict_from_url(str(path), map_location="cpu", check_hash=True, weights_only=True),
        )
    if str(path).startswith(HUB):
        return _read_folder(_download(str(path).removeprefix(HUB)))
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"{path!r} is no path: give a .pth file or a folder written by lape.save")
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}; give a .pth file or a folder written by lape.save")
    return _from_contents(path, _unpickle_safely(path))


def _unpickle_safely(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {_first_line(error)}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on foreign pickle protocols: what cannot be read raises anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = _wanted_global(str(error))
        if wanted:
            raise CheckpointError(
                f"{path} wants to run {wanted} while loading: refused, nothing was executed. Only tensors, plain "
                "values and argparse.Namespace are read"
            ) from None
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read without running code from it: refused, nothing was executed"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint, the file is cut off or damaged: copy or save it again"
        ) from error


def _wanted_global(message: str) -> str | None:
    for marker in ("Unsupported global: GLOBAL ", "Unsupported class ", "Trying to load unsupported GLOBAL "):
        if marker in message:
            return message.split(marker, 1)[1].split()[0].rstrip(".,")
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _from_contents(path: Path, contents: Any) -> Checkpoint:
    if not isinstance(contents, dict):
        raise CheckpointError(
            f"{path} holds a {type(contents).__name__}, not a checkpoint: a dict with 'model' is expected"
        )
    rest = dict(contents)
    state = next((rest.pop(key) for key in ("model", "state_dict") if isinstance(rest.get(key), dict)), None)
    if state is None:
        if not rest or not all(isinstance(value, Tensor) for value in rest.values()):
            raise CheckpointError(
                f"{path} has no 'model': its keys are {', '.join(map(str, list(rest)[:8])) or 'none'}"
            )
        state, rest = rest, {}
    args = rest.pop("args", None) or {}
    ema = rest.pop("model_ema", None) or None
    return Checkpoint(
        path=path,
        kind="pth",
        model=_plain_names(path, state),
        model_ema=None if ema is None else _plain_names(path, ema),
        args=_known_args(vars(args) if isinstance(args, argparse.Namespace) else dict(args)),
        raw=rest,
    )


def _plain_names(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Names without the prefixes of DistributedDataParallel and torch.compile."""
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise CheckpointError(f"{path}: 'model' is not a state dict of named tensors")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def _known_args(args: dict[str, Any]) -> dict[str, Any]:
    """The flags with joins and kinds in today's spelling."""
    if isinstance(args.get("join_type"), str):
        name = args["join_type"]
        args["join_type"] = _JOIN_ALIASES.get(name.casefold()) or join_named(name).name
    if isinstance(args.get("pe"), str):
        args["pe"] = kind_named(args["pe"]).name
    return args


def model_from_checkpoint(
    checkpoint: Checkpoint,
    *,
    model: str | None = None,
    join: str | None = None,
    pe: str | None = None,
    input_size: int | tuple[int, int] | None = None,
    ema: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """The converted model of a checkpoint, in eval mode. What is None is taken from the file.

    Raises CheckpointError when the file does not say something that is needed, contradicts what was given, or does
    not fit the model; LapeError for unknown names.
    """
    state = checkpoint.model_ema if ema else checkpoint.model
    if state is None:
        raise CheckpointError(f"{checkpoint.path} holds no averaged (EMA) weights")
    kwargs = {**(checkpoint.args.get("model_kwargs") or {}), **timm_kwargs}
    if "img_size" not in kwargs and (checkpoint.kind == "pth" or input_size is not None):
        kwargs["img_size"] = checkpoint.setting("input_size", input_size)
    if checkpoint.package == "timm" and checkpoint.num_classes is not None:
        kwargs.setdefault("num_classes", checkpoint.num_classes)
    if (in_chans := checkpoint.args.get("in_chans")) is not None:
        kwargs.setdefault("in_chans", in_chans)
    warm_start = bool(checkpoint.args.get("warm_start"))
    made = build(
        checkpoint.package,
        checkpoint.setting("model", model),
        kwargs,
        checkpoint.setting("join_type", None if join is None else join_named(join).name),
        None if warm_start else checkpoint.setting("pe", None if pe is None else kind_named(pe).name),
        warm_start=warm_start,
    )
    if checkpoint.raw.get("folded"):
        fold_(made)
    return load_reference_state_dict(made, state).eval()


# ------------------------------------------------------------------------------------------------ write


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], object], *, previous: str | Path | None = None
) -> None:
    """Calls `write(file)` on a temporary file beside `path`, syncs it to disk and renames it: whole or not at all.

    Args:
        previous: in the same folder; what was at `path` is kept under this name.

    Raises LapeError when the folder cannot be written; an earlier file at `path` is untouched then.
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if previous is not None and path.exists():
            _keep(path, Path(previous))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise LapeError(
                f"cannot write {path}: {error.strerror or error}; what was there before is untouched"
            ) from error
        raise


def _keep(path: Path, previous: Path) -> None:
    """Gives the file a second name, in one step; both names stay valid when the first gets a new file."""
    fresh = path.with_name(f".{path.name}.kept.tmp")
    fresh.unlink(missing_ok=True)
    try:
        os.link(path, fresh)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, fresh)
    os.replace(fresh, previous)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable. Systems that cannot open folders (Windows) do so themselves."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def _read_folder(path: Path) -> Checkpoint:
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no saved model: {CONFIG} cannot be read ({_first_line(error)})") from error
    if isinstance(config, dict) and "transformers_version" in config:
        return _read_pretrained(path, config)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path / CONFIG} is not of format {FORMAT!r}")
    state = _unpickle_safely(path / WEIGHTS)
    kwargs = dict(config["model_kwargs"])
    args = {"model": config["model"], "join_type": config["join"], "pe": config["pe"], "model_kwargs": kwargs}
    args["warm_start"] = bool(config.get("warm_start"))
    raw = {key: config.get(key) for key in ("library", "folded", "classes", "transform", "grid", "input_size")}
    return Checkpoint(path=path, kind="folder", model=state, args=args, raw=raw)


def _read_pretrained(path: Path, config: dict[str, Any]) -> Checkpoint:
    """A folder that `save_pretrained` of a converted transformers model wrote, by hand or by its Trainer."""
    record = config.pop("lape", None)
    if not isinstance(record, dict):
        raise CheckpointError(
            f"{path} holds a transformers model that is not converted: load it with its from_pretrained(), then call "
            "lape.apply_; a converted model that was passed to lape.apply_ as a part of another one is written by "
            "lape.save"
        )
    index = path / f"{WEIGHTS}.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [WEIGHTS]
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= _unpickle_safely(path / Path(shard).name)
    args = {"model": config["architectures"][0], "join_type": record["join"], "pe": record["pe"]}
    args |= {"warm_start": record["warm_start"], "model_kwargs": config}
    raw = {"library": "transformers", "folded": record["folded"], "grid": record["grid"], "transform": _processor(path)}
    return Checkpoint(path=path, kind="folder", model=state, args=args, raw=raw)


def _processor(path: Path) -> dict[str, Any] | None:
    """The evaluation transform that an image processor saved beside a model amounts to, None without one.

    Its size, crop, filter, mean and deviation. A processor that squeezes an image into a square is taken for one that
    covers the square and cuts it out of the centre, which is the same for square images.
    """
    file = path / PROCESSOR
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text())
        size, crop = said["size"], said.get("crop_size") if said.get("do_center_crop") else None
        seen = crop or size
        height, width = (seen["height"], seen["width"]) if "height" in seen else [seen["shortest_edge"]] * 2
        resized = size.get("shortest_edge") or size["height"]
        normal = said.get("do_normalize", True)
        return {
            "input_size": height if height == width else [height, width],
            "crop_ratio": min(1.0, height / resized),
            "interpolation": _FILTERS[said.get("resample", 2)],
            "mean": said["image_mean"] if normal else [0.0] * len(said["image_mean"]),
            "std": said["image_std"] if normal else [1.0] * len(said["image_std"]),
            "in_chans": len(said["image_mean"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{file} is no image processor with size, image_mean and image_std: remove it, or save with lape.save"
        ) from None


_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # numbers of PIL


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


_FETCHED = (CONFIG, WEIGHTS, "model-*-of-*.safetensors", f"{WEIGHTS}.index.json", PROCESSOR)


def _download(repo_id: str) -> Path:
    """The files of `save` or `save_pretrained` from the Hugging Face Hub; nothing else is fetched."""
    try:
        return Path(_hub().snapshot_download(repo_id, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{HUB}{repo_id} cannot be downloaded: {_first_line(error)}") from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise LapeError("the Hugging Face Hub needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def load(path: str | Path, **timm_kwargs: Any) -> nn.Module:
    """The model of a folder written by `save` (or by transformers' `save_pretrained` of a converted model), of a `.pth`
    of a training run, or of "hf-hub:OWNER/NAME", in eval mode.

    `timm_kwargs` go to the model on top of what the file says. Nothing in the file is executed. Raises CheckpointError.
    """
    return model_from_checkpoint(read_checkpoint(path), **timm_kwargs)
