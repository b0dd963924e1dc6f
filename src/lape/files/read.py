"""Read any checkpoint, without running its code."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import socket
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lape.convert.converted import CHOICES
from lape.convert.tended import CONFIG, DIGESTS, digest_of, digest_of_config, record_of
from lape.core.joins import join_named
from lape.core.position import kind_named
from lape.errors import CheckpointError, check_file, needs
from lape.files.vet import check_entries, check_state, first_line, is_flag, of_file, read_json
from lape.host.configurations import ORIGIN
from lape.names import printable

HEADS = ("head.weight", "head.fc.weight")  # of a classifier: in most models of timm, in those of stages
WEIGHTS = "model.safetensors"
FORMAT = "lape-1"
PROCESSOR = "preprocessor_config.json"  # of transformers
PATIENCE = 10.0  # seconds in which a server has to answer
HUB = "hf-hub:"  # in front of OWNER/NAME, as timm spells it

_JOIN_ALIASES = {"ln": "LaPE"}  # the reference's name for LaPE on relative position bias


@dataclass(frozen=True)
class Checkpoint:
    """What a file says.

    Fields:
        path: of the file or folder
        kind: a file of a training run, or a folder
        model: weights under the authors' names, those of a converted model in a folder of transformers
        model_ema: the averaged weights, in the same names
        args: the flags of the run that wrote it
        raw: every other entry: epoch, optimizer, ...
    """

    path: Path
    kind: Literal["pth", "folder"]
    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

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


def read_checkpoint(path: str | os.PathLike[str], *, unconverted: bool = False) -> Checkpoint:
    """Reads a checkpoint of this project, of DeiT or of the LaPE authors, or a folder written by `save`, or by
    `save_pretrained` of a converted model of transformers.

    "hf-hub:OWNER/NAME" and https addresses are downloaded first (asked for by their user). Nothing in the file is
    executed: `torch.load(weights_only=True)` with `argparse.Namespace`, a plain record that DeiT-style files hold, as
    the only addition. With `unconverted`, a folder of a transformers model that is not converted is read as well, as
    one that is left as it is (pe="own").

    Raises CheckpointError: no such file, not a checkpoint, torn, or a pickle that wants to run code.
    """
    if str(path).startswith("https://"):
        return _from_contents(Path(str(path)), _fetch(str(path)))
    if str(path).startswith(HUB):
        return _read_folder(_download(str(path).removeprefix(HUB)), unconverted)
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"{path!r} is no path: give a .pth file or a folder written by lape.save")
    path = Path(os.path.expanduser(path))
    try:
        if path.is_dir():
            return _read_folder(path, unconverted)
        if not path.exists():
            raise CheckpointError(f"no such checkpoint: {path}; give a .pth file or a folder written by lape.save")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    check_file(path, CheckpointError)
    return _from_contents(path, _unpickle_safely(path))


def _fetch(address: str) -> Any:
    """What torch's cache or the network has at an address. Raises CheckpointError."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        return torch.hub.load_state_dict_from_url(address, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, HTTPException, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{address} cannot be downloaded: {first_line(error)}; give a file") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _unpickle_safely(path: Path, digest: Any = None) -> Any:
    if path.suffix == ".safetensors":
        _check_digest(path, _digests(path.parent).get(path.name) if digest is None else digest)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {first_line(error)}") from error
    _check_records(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on foreign pickle protocols: what cannot be read raises anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = _refused_global(str(error))
        if culprit:
            raise CheckpointError(
                f"{path} wants to run {culprit} while loading: refused, nothing was executed. Only tensors, plain "
                "values and argparse.Namespace are read"
            ) from None
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read without running code from it: refused, nothing was executed"
        ) from None
    except Exception as error:
        raise CheckpointError(_damaged(path)) from error


def _damaged(path: Path) -> str:
    return f"{path} is not a whole checkpoint, the file is cut off or damaged: copy or save it again"


def _check_records(path: Path) -> None:
    """Raises CheckpointError where a record of a zip is not as it was written (CRC-32), or is compressed: none is."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return  # torch's format from before 1.6, which has no checksums
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            plain = all(r.compress_type == zipfile.ZIP_STORED for r in records)
            fits = sum(r.file_size for r in records) <= path.stat().st_size  # records may be made to overlap
            if not (plain and fits and archive.testzip() is None) or len({r.filename for r in records}) < len(records):
                raise CheckpointError(_damaged(path))
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_damaged(path)) from error


def _digests(folder: Path) -> Mapping[str, Any]:
    """The SHA-256 of the files of weights that a folder's config.json holds, where there is one that does."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return _digests_in(folder, config) if isinstance(config, dict) else {}


def _digests_in(folder: Path, config: dict[str, Any]) -> Mapping[str, Any]:
    record = record_of(config)
    digests = record.get(DIGESTS) if isinstance(record, Mapping) else None
    if digests is not None and not isinstance(digests, Mapping):
        raise CheckpointError(f"{folder / CONFIG} says that it was not written to its end: save the model again")
    with of_file(folder / CONFIG):
        whole = not digests or digests.get(CONFIG) in (None, digest_of_config(config))
    if not whole:
        raise CheckpointError(
            f"{folder / CONFIG} is not as it was written (SHA-256): it is damaged or edited; copy or save the folder "
            f"again, or take {CONFIG!r} out of its {DIGESTS!r} where the change is yours"
        )
    return digests or {}


def _check_digest(path: Path, digest: Any) -> None:
    try:
        if digest is None or digest == digest_of(path):
            return
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    raise CheckpointError(
        f"{path} does not hold the weights that {CONFIG} was written for (SHA-256): it is damaged, or another model's; "
        "copy or save the folder again"
    )


def staging_path(file: Path, digest: Any) -> Path:
    """Where `save` writes weights, until config.json is in place and they replace the earlier ones."""
    fits = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    return file.with_name(f".{digest[:16]}.{file.name}") if fits else file


def _refused_global(message: str) -> str | None:
    for marker in ("Unsupported global: GLOBAL ", "Unsupported class ", "Trying to load unsupported GLOBAL "):
        if marker in message:
            return printable(message.split(marker, 1)[1].split()[0].rstrip(".,"))
    return None


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
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    ema = rest.pop("model_ema", None) or None
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in (*args, *rest)):
        raise CheckpointError(f"{path}: 'args' are not flags by name")
    args = {name: value for name, value in args.items() if name == "model_kwargs" or is_flag(value)}
    if isinstance(args.get("model_kwargs"), dict):  # a run that began with weights of the library holds its own
        args["model_kwargs"] = {key: value for key, value in args["model_kwargs"].items() if key != "pretrained"}
    check_entries(path, args, rest)
    return Checkpoint(
        path=path,
        kind="pth",
        model=_plain_names(path, state),
        model_ema=None if ema is None else _plain_names(path, ema),
        args=_respelled(args),
        raw=rest,
    )


def _plain_names(path: Path, state: Any) -> dict[str, Tensor]:
    """Names without the prefixes of DistributedDataParallel and torch.compile."""
    check_state(path, state)
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def _respelled(args: dict[str, Any]) -> dict[str, Any]:
    """The flags with joins and kinds in today's spelling."""
    if isinstance(args.get("join_type"), str):
        name = args["join_type"]
        args["join_type"] = _JOIN_ALIASES.get(name.casefold()) or join_named(name).name
    if isinstance(args.get("pe"), str):
        args["pe"] = kind_named(args["pe"]).name
    return args


def _read_folder(path: Path, unconverted: bool) -> Checkpoint:
    config = read_json(path / CONFIG)
    if isinstance(config, dict) and "transformers_version" in config:
        return _read_pretrained(path, config, unconverted)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path / CONFIG} is not of format {FORMAT!r}")
    args = {"model": config.get("model"), "model_kwargs": config.get("model_kwargs"), **_choices_of(config)}
    raw = {key: config.get(key) for key in ("library", "classes", "transform", "input_size", *_OF_THE_MODEL)}
    return _folder(path, args, raw, [WEIGHTS], config)


def _folder(
    path: Path, args: dict[str, Any], raw: dict[str, Any], files: list[str], config: dict[str, Any]
) -> Checkpoint:
    """What a folder says, held against the tables, and then its weights."""
    missing = [name for name in ("model", "join_type", "pe", "model_kwargs") if args.get(name) is None]
    if missing:
        raise CheckpointError(f"{path / CONFIG} does not say its {missing[0]}: it is not whole; save the model again")
    check_entries(path / CONFIG, args, raw)
    state: dict[str, Tensor] = {}
    digests = _digests_in(path, config)
    for name in files:
        digest = digests.get(name)
        staging = staging_path(path / name, digest)
        state |= _unpickle_safely(staging if staging.is_file() else path / name, digest)
    check_state(path, state)
    return Checkpoint(path=path, kind="folder", model=state, args=_respelled(args), raw=raw)


LEFT_AS_IT_IS = {"join": "basic", "pe": "own"}


def _read_pretrained(path: Path, config: dict[str, Any], unconverted: bool) -> Checkpoint:
    """A folder that `save_pretrained` of a converted transformers model wrote, by hand or by its Trainer."""
    record = config.pop("lape", LEFT_AS_IT_IS if unconverted else None)
    if not isinstance(record, dict):
        raise CheckpointError(
            f"{path} holds a transformers model that is not converted: load it with its from_pretrained(), then call "
            "lape.apply_; a converted model that was passed to lape.apply_ as a part of another one is written by "
            "lape.save"
        )
    index, shards = path / f"{WEIGHTS}.index.json", [WEIGHTS]
    if index.is_file():
        content = read_json(index)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(str(shard).endswith(".safetensors") for shard in names.values()):
            raise CheckpointError(f"{index} is no list of files of weights: save the model again")
        shards = sorted({Path(str(shard)).name for shard in names.values()})
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    args = {"model": name, "model_kwargs": _without_origin(config), **_choices_of(record)}
    raw = {"library": "transformers", "transform": _processor(path), **{k: record.get(k) for k in _OF_THE_MODEL}}
    raw["unconverted"] = record is LEFT_AS_IT_IS
    return _folder(path, args, raw, shards, {**config, "lape": record})


def _without_origin(value: Any) -> Any:
    """A configuration without the names of where it came from, which nothing is read from."""
    if isinstance(value, dict):
        return {key: _without_origin(inner) for key, inner in value.items() if key not in ORIGIN}
    return value


_OF_THE_MODEL = ("folded", "grid", "own_table", "at")


def _choices_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Join, kind and what was chosen beside them, by the names of flags."""
    names = {"join_type": "join", "pe": "pe", **{name: name for name in CHOICES.values()}}
    return {flag: record.get(name) for flag, name in names.items()}


def _processor(path: Path) -> dict[str, Any] | None:
    """The evaluation transform that an image processor saved beside a model amounts to, None without one.

    Its size, crop, filter, mean and deviation. A processor that squeezes an image into a square is taken for one that
    covers the square and cuts it out of the centre, which is the same for square images.
    """
    file = path / PROCESSOR
    if not file.is_file():
        return None
    try:
        config = read_json(file)
        size, crop = config["size"], config.get("crop_size") if config.get("do_center_crop") else None
        area = crop or size
        height, width = (area["height"], area["width"]) if "height" in area else [area["shortest_edge"]] * 2
        side = size.get("shortest_edge") or size["height"]
        normal = config.get("do_normalize", True)
        return {
            "input_size": height if height == width else [height, width],
            "crop_ratio": min(1.0, height / side),
            "interpolation": _FILTERS[config.get("resample", 2)],
            "mean": config["image_mean"] if normal else [0.0] * len(config["image_mean"]),
            "std": config["image_std"] if normal else [1.0] * len(config["image_std"]),
            "in_chans": len(config["image_mean"]),
        }
    except (CheckpointError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        raise CheckpointError(
            f"{file} is no image processor with size, image_mean and image_std: remove it, or save with lape.save"
        ) from None


_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # numbers of PIL


_PATTERNS = (CONFIG, WEIGHTS, "model-*-of-*.safetensors", f"{WEIGHTS}.index.json", PROCESSOR)


def _download(repo_id: str) -> Path:
    """The files of `save` or `save_pretrained` from the Hugging Face Hub; nothing else is fetched."""
    try:
        return Path(_hub().snapshot_download(repo_id, allow_patterns=list(_PATTERNS)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{HUB}{repo_id} cannot be downloaded: {first_line(error)}") from error


def _hub() -> Any:
    with needs("huggingface"):
        import huggingface_hub
    return huggingface_hub
