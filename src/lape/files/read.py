"""Read any checkpoint, without running its code."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lape.core.joins import join_named
from lape.core.position import kind_named
from lape.errors import CheckpointError, check_file, needs

HEADS = ("head.weight", "head.fc.weight")  # of a classifier: in most models of timm, in those of stages
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FORMAT = "lape-1"
PROCESSOR = "preprocessor_config.json"  # of transformers
PATIENCE = 10.0  # seconds in which a server has to answer
HUB = "hf-hub:"  # in front of OWNER/NAME, as timm spells it

_JOIN_ALIASES = {"ln": "LaPE"}  # the reference's name for LaPE on relative position bias


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


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint of this project, of DeiT or of the LaPE authors, or a folder written by `save`, or by
    `save_pretrained` of a converted model of transformers.

    "hf-hub:OWNER/NAME" and https addresses are downloaded first (asked for by their user). Nothing in the file is
    executed: `torch.load(weights_only=True)` with `argparse.Namespace`, a plain record that DeiT-style files hold, as
    the only addition.

    Raises CheckpointError: no such file, not a checkpoint, torn, or a pickle that wants to run code.
    """
    if str(path).startswith("https://"):
        return _from_contents(Path(str(path)), _fetch(str(path)))
    if str(path).startswith(HUB):
        return _read_folder(_download(str(path).removeprefix(HUB)))
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"{path!r} is no path: give a .pth file or a folder written by lape.save")
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}; give a .pth file or a folder written by lape.save")
    check_file(path, CheckpointError)
    return _from_contents(path, _unpickle_safely(path))


def _fetch(address: str) -> Any:
    """What torch's cache or the network has at an address. Raises CheckpointError."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        return torch.hub.load_state_dict_from_url(address, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, HTTPException, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{address} cannot be downloaded: {_first_line(error)}; give a file") from error
    finally:
        socket.setdefaulttimeout(before)


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
        culprit = _refused_global(str(error))
        if culprit:
            raise CheckpointError(
                f"{path} wants to run {culprit} while loading: refused, nothing was executed. Only tensors, plain "
                "values and argparse.Namespace are read"
            ) from None
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read without running code from it: refused, nothing was executed"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint, the file is cut off or damaged: copy or save it again"
        ) from error


def _refused_global(message: str) -> str | None:
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
        config = json.loads(file.read_text())
        size, crop = config["size"], config.get("crop_size") if config.get("do_center_crop") else None
        area = crop or size
        height, width = (area["height"], area["width"]) if "height" in area else [area["shortest_edge"]] * 2
        resized = size.get("shortest_edge") or size["height"]
        normal = config.get("do_normalize", True)
        return {
            "input_size": height if height == width else [height, width],
            "crop_ratio": min(1.0, height / resized),
            "interpolation": _FILTERS[config.get("resample", 2)],
            "mean": config["image_mean"] if normal else [0.0] * len(config["image_mean"]),
            "std": config["image_std"] if normal else [1.0] * len(config["image_std"]),
            "in_chans": len(config["image_mean"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{file} is no image processor with size, image_mean and image_std: remove it, or save with lape.save"
        ) from None


_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # numbers of PIL


_FETCHED = (CONFIG, WEIGHTS, "model-*-of-*.safetensors", f"{WEIGHTS}.index.json", PROCESSOR)


def _download(repo_id: str) -> Path:
    """The files of `save` or `save_pretrained` from the Hugging Face Hub; nothing else is fetched."""
    try:
        return Path(_hub().snapshot_download(repo_id, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{HUB}{repo_id} cannot be downloaded: {_first_line(error)}") from error


def _hub() -> Any:
    with needs("huggingface"):
        import huggingface_hub
    return huggingface_hub
