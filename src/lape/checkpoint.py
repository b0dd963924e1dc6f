"""Files: read any checkpoint without running its code, map names to the LaPE reference's and back, save and load.

Names. A converted model holds its parts where PyTorch puts them (`blocks.0.norm1.token_norm.weight`,
`lape_position.0.pos_embed`); files hold the names of the authors' code (`blocks.0.norm1.weight`, `pos_embed`), which
for the host's own parameters are the host's. `reference_names` is the one table between the two.
"""

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

from lape.bias import offset_index
from lape.convert import TABLES, Conversion, conversion_of, create_model
from lape.errors import CheckpointError, LapeError
from lape.joins import JOINS, join_named
from lape.position import KINDS, Grid, kind_named, resample

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = "lape-1"

_JOIN_ALIASES = {"ln": "LaPE"}  # the reference's name for LaPE on relative position bias
_INDEX = "relative_position_index"  # a buffer in the reference's files; derived from the grid here


# ------------------------------------------------------------------------------------------------ names


def reference_names(model: nn.Module) -> dict[str, str]:
    """The model's state-dict keys -> the names of the authors' files, for a converted model."""
    conversion = conversion_of(model)
    rename = [(f"{path}.{wrapped}.", f"{path}.") for path, wrapped in conversion.sites]
    if conversion.watch is not None:
        rename.append((f"{conversion.watch}.host_patch_embed.", f"{conversion.watch}."))
    norm = conversion.anatomy.norm
    for path, wrapped in conversion.sites:
        if wrapped == "token_norm":
            rename.append((f"{path}.pe_norm.", f"{path.removesuffix(norm)}pe_norm."))
        elif wrapped == "host_attention":
            rename.append((f"{path}.position_bias.", f"{path}."))
    for i in range(len(conversion.anatomy.blocks)):
        number = str(i) if JOINS[conversion.join].table_per_block else ""
        rename.append((f"{TABLES}.{i}.pos_embed", f"pos_embed{number}"))

    def reference_name(key: str) -> str:
        return next((new + key.removeprefix(old) for old, new in rename if key.startswith(old)), key)

    return {key: reference_name(key) for key in conversion.anatomy.root.state_dict()}


def to_reference_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a converted model under the names and in the shapes of the authors' files; nothing is left out.

    `1D_sin` tables are (R, D) there, and relative position biases come with their index. Raises LapeError for a folded
    model, which has no such form.
    """
    conversion = conversion_of(model)
    if conversion.folded:
        raise LapeError("a folded model has no parameters of position left to name: save the model before lape.fold_")
    names = reference_names(model)
    state = {names[key]: tensor for key, tensor in conversion.anatomy.root.state_dict().items()}
    if conversion.pe == "1D_sin" and "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][0]
    return state | {key: index_nn.clone() for key, index_nn in _indices(conversion).items()}


def _indices(conversion: Conversion) -> dict[str, Tensor]:
    axes = KINDS[conversion.pe].bias_axes
    if not axes:
        return {}
    return {f"{path}.{_INDEX}": offset_index(conversion.layout.grid, axes) for path, _ in conversion.sites}


def load_reference_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, source_grid: Grid | None = None
) -> nn.Module:
    """Loads a state dict with the authors' names into a converted model, strictly, and returns the model.

    Args:
        source_grid: the (rows, columns) that the tables in `state_dict` are for; when given and another than the
            model's, tables are resampled (bicubic, float32, before the chain). None: shapes must agree.

    Raises:
        CheckpointError: keys missing or unexpected, or shapes that differ; the message names them. The model is
            unchanged then.
    """
    conversion = conversion_of(model)
    own = conversion.anatomy.root.state_dict()
    names = reference_names(model)
    given = dict(state_dict)
    for key, index_nn in _indices(conversion).items():
        other = given.pop(key, None)
        if other is not None and not torch.equal(other, index_nn):
            raise CheckpointError(f"{key} is not that of a {conversion.layout.grid} grid: the file is for another grid")
    missing = [name for name in names.values() if name not in given]
    unexpected = sorted(given.keys() - set(names.values()))
    new, wrong = {}, []
    for key, name in names.items():
        if name not in given:
            continue
        tensor = given[name]
        if name.startswith("pos_embed") and tensor.ndim == 2:
            tensor = tensor[None]
        if name.startswith("pos_embed") and source_grid is not None:
            tensor = _resampled(tensor, conversion, source_grid)
        if tensor.shape != own[key].shape:
            wrong.append(f"{name} is {_shape(tensor)}, the model's {_shape(own[key])}")
        new[key] = tensor
    problems = [
        text
        for title, items in (("missing", missing), ("unexpected", unexpected), ("shapes differ:", wrong))
        if (text := _listed(title, items))
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model (join={conversion.join}, pe={conversion.pe}): "
            f"{'; '.join(problems)}. Check model name, join, PE kind, input size and number of classes"
        )
    conversion.anatomy.root.load_state_dict(new, strict=True)
    return model


def _resampled(pos_embed_1RD: Tensor, conversion: Conversion, source_grid: Grid) -> Tensor:
    source = conversion.layout.__class__(source_grid, conversion.layout.prefix_rows)
    if pos_embed_1RD.shape[1] != source.num_rows:
        raise CheckpointError(
            f"pos_embed has {pos_embed_1RD.shape[1]} rows, a grid of {source_grid[0]} x {source_grid[1]} with "
            f"{source.prefix_rows} prefix rows needs {source.num_rows}: give the grid that the file was trained at"
        )
    return resample(pos_embed_1RD, source, conversion.layout.grid)


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"


def _listed(title: str, items: list[str], most: int = 4) -> str:
    if not items:
        return ""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{title} {', '.join(items[:most])}{more}"


# ------------------------------------------------------------------------------------------------ read


@dataclass(frozen=True)
class Checkpoint:
    """What a file says. `model` holds the authors' names; `args` the flags of the run that wrote it."""

    path: Path
    kind: Literal["pth", "folder"]
    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)  # every other entry: epoch, optimizer, ...

    @property
    def num_classes(self) -> int | None:
        """Outputs of the classifier, None without one."""
        head = self.model.get("head.weight")
        return None if head is None else head.shape[0]

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
    """Reads a checkpoint of this project, of DeiT or of the LaPE authors, or a folder written by `save`.

    Nothing in the file is executed: `torch.load(weights_only=True)` with `argparse.Namespace`, a plain record that
    DeiT-style files hold, as the only addition. An https address is downloaded first (asked for by its user).

    Raises CheckpointError: no such file, not a checkpoint, torn, or a pickle that wants to run code.
    """
    if str(path).startswith("https://"):
        return _from_contents(
            Path(str(path)),
            torch.hub.load_state_dict_from_url(str(path), map_location="cpu", check_hash=True, weights_only=True),
        )
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
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
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely: {_first_line(error)}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error


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
    if checkpoint.num_classes is not None:
        kwargs.setdefault("num_classes", checkpoint.num_classes)
    if (in_chans := checkpoint.args.get("in_chans")) is not None:
        kwargs.setdefault("in_chans", in_chans)
    made = create_model(
        checkpoint.setting("model", model),
        checkpoint.setting("join_type", None if join is None else join_named(join).name),
        checkpoint.setting("pe", None if pe is None else kind_named(pe).name),
        **kwargs,
    )
    return load_reference_state_dict(made, state).eval()


# ------------------------------------------------------------------------------------------------ write


def write_atomically(
    path: str | Path, write: Callable[[BinaryIO], None], *, previous: str | Path | None = None
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
    class names, evaluation transform). `lape.load` reads it, without running any code from it.

    Args:
        name, timm_kwargs: the timm model and its arguments; needed when the model was not made by `lape.create_model`.
        classes: class names in the order of the outputs.
        transform: the evaluation transform (`EvalTransform.to_dict()`).

    Raises LapeError when the model's name is not known, it is folded, or the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    conversion = conversion_of(model)
    factory = {"name": name, "kwargs": timm_kwargs} if name else conversion.factory
    if not factory:
        raise LapeError(
            "the model was not made by lape.create_model: give its timm name, lape.save(model, path, name=...)"
        )
    state = {key: tensor.contiguous() for key, tensor in to_reference_state_dict(model).items()}
    config = {
        "format": FORMAT,
        "model": factory["name"],
        "model_kwargs": factory["kwargs"],
        "join": conversion.join,
        "pe": conversion.pe,
        "grid": conversion.layout.grid,
        "classes": classes,
        "transform": transform,
    }
    try:
        text = json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise LapeError(f"config.json takes plain values only: {error} in {factory['kwargs']} or {transform}") from None
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LapeError(f"cannot create the folder {path}: {error.strerror}") from error
    write_atomically(path / WEIGHTS, lambda file: _write(file, to_bytes(state)))
    write_atomically(path / CONFIG, lambda file: _write(file, text.encode()))
    return path


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _read_folder(path: Path) -> Checkpoint:
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no saved model: {CONFIG} cannot be read ({_first_line(error)})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path / CONFIG} is not of format {FORMAT!r}")
    state = _unpickle_safely(path / WEIGHTS)
    kwargs = dict(config["model_kwargs"])
    args = {"model": config["model"], "join_type": config["join"], "pe": config["pe"], "model_kwargs": kwargs}
    raw = {key: config.get(key) for key in ("classes", "transform", "grid")}
    return Checkpoint(path=path, kind="folder", model=state, args=args, raw=raw)


def load(path: str | Path, **timm_kwargs: Any) -> nn.Module:
    """The model of a folder written by `save`, or of a `.pth` of a training run, in eval mode.

    `timm_kwargs` go to the model on top of what the file says. Nothing in the file is executed. Raises CheckpointError.
    """
    return model_from_checkpoint(read_checkpoint(path), **timm_kwargs)
