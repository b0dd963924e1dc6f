"""What a file may say: plain values of bounded size. A file from a stranger is data.

All that is read is held against the tables below before anything is built of it; what is not in them is refused by
name. The arguments of a model are those that its library's host allows, while it is built no connection is
opened, and one far larger than the file's weights is refused (twice their values and 2^26 more).
"""

from __future__ import annotations

import json
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from lape.errors import CheckpointError, LapeError
from lape.host import host_of_library
from lape.names import printable

LARGEST, SIDE, DEPTH = 2**24, 2**14, 8  # of an integer; of an image, in pixels; of values in values
_JSON_BYTES, _NESTING, _VALUES = 2**26, 64, 10**5
_WORDS = re.compile(r"[\w .,;+=()<>|\[\]-]{0,256}")  # nothing that a path, an address or a terminal is made of
_SIZES = ("img_size", "image_size", "input_size")
_LABELS = ("id2label", "label2id")

# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The values of a JSON file. Raises CheckpointError: no regular file, too large, not JSON, NaN, a key twice."""
    try:
        if not path.is_file():
            raise ValueError("no such file" if not path.exists() else "not a regular file")
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"larger than {_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant, object_pairs_hook=_once)
        level = [value]
        for _ in range(_NESTING):
            level = [part for item in level for part in _parts(item)]
        if level:
            raise RecursionError
        return value
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise CheckpointError(f"{path.parent} is no saved model: {path.name} cannot be read ({reason})") from None


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it says a key twice")
    return values


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- entries ----------------------------------------------------------------------------------------------------------


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return abs(value) <= LARGEST if type(value) is int else type(value) is float and math.isfinite(value)


def _list_of(part: Callable[[Any], bool], least: int = 0, most: int = LARGEST) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and least <= len(value) <= most and all(map(part, value))


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _spelled(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _between(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: _number(value) and least <= value <= most


def _yes_no(value: Any) -> bool:
    return isinstance(value, bool)


def _size(value: Any) -> bool:
    return _whole(0, SIDE)(value) or _list_of(_whole(0, SIDE), 2, 3)(value)  # of a video frames first


_name, _path = _spelled(r"[\w.+-]{1,128}"), _spelled(r"[\w.]{0,256}")
_ratio, _deviation = _between(0.01, 1), _between(1e-6, 1e6)
_MEAN, _STD = _list_of(_between(-1e6, 1e6), 1, 4096), _list_of(_deviation, 1, 4096)
_TRANSFORM = {
    "input_size": lambda value: _size(value) and value not in (0, [0, 0], (0, 0)),
    "crop_ratio": _ratio,
    "interpolation": _name,
    "mean": _MEAN,
    "std": _STD,
    "in_chans": _whole(1, 4096),
}


def _transform(value: Any) -> bool:
    return isinstance(value, Mapping) and all(fits(value[name]) for name, fits in _TRANSFORM.items() if name in value)


def _line(value: Any) -> bool:
    plain = (int, float, str, type(None))
    return isinstance(value, dict) and all(_text(k) and isinstance(v, plain) for k, v in value.items())


def _group(value: Any) -> bool:
    return isinstance(value, dict) and _list_of(_whole(0, LARGEST))(value.get("params"))


def _optimizer(value: Any) -> bool:
    state, groups = (value.get("state"), value.get("param_groups")) if isinstance(value, dict) else (None, None)
    return isinstance(state, dict) and all(isinstance(v, dict) for v in state.values()) and _list_of(_group)(groups)


_COUNT = _whole(0, 2**40)
_ARGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_name, "the name of a model"),
    "join_type": (_name, "the name of a join"),
    "pe": (_name, "the name of a position embedding"),
    "input_size": (_size, f"pixels, at most {SIDE}"),
    "in_chans": (_whole(1, 4096), "a number of channels"),
    "warm_start": (_yes_no, "true or false"),
    "pe_std": (_deviation, "a number above 0"),
    "pe_norm": (_name, "the name of a norm of position"),
    "as_original": (_list_of(_name), "names of habits"),
    "eval_crop_ratio": (_ratio, "a number in 0.01..1"),
    "mean": (_MEAN, "numbers"),
    "std": (_STD, "numbers above 0"),
    "model_kwargs": (lambda value: isinstance(value, Mapping), "arguments by name"),
    "epochs": (_COUNT, "a number of epochs"),
    "seed": (lambda value: type(value) is int, "a whole number"),
    "data_path": (_text, "a text"),
}
_RAW: dict[str, tuple[Callable[[Any], bool], str]] = {
    "library": (_name, "the name of a library"),
    "folded": (_yes_no, "true or false"),
    "classes": (_list_of(_text), "a list of names"),
    "transform": (_transform, f"a transform: {', '.join(_TRANSFORM)}, within their limits"),
    "grid": (_list_of(_whole(0, SIDE), 2, 3), "rows and columns, frames before them"),
    "own_table": (_yes_no, "true or false"),
    "at": (_path, "the path of a module"),
    "input_size": (_size, f"pixels, at most {SIDE}"),
    "optimizer": (_optimizer, "the state of an optimizer"),
    "optimizer_names": (_list_of(_text), "names of parameters"),
    "epoch": (_whole(-1, LARGEST), "the number of an epoch"),
    "step": (_COUNT, "the number of a step"),
    "skipped_steps": (_COUNT, "a count"),
    "skipped_images": (_COUNT, "a count"),
    "bad_in_row": (_COUNT, "a count"),
    "images_per_step": (_COUNT, "a count"),
    "loss_sum": (lambda value: type(value) in (int, float), "a number"),
    "max_accuracy": (_number, "a number"),
    "scaler": (lambda value: isinstance(value, dict), "the state of a scaler"),
    "best": (lambda value: _line(value) and (value.get("epoch") is None or _COUNT(value["epoch"])), "a record"),
    "history": (_list_of(lambda value: _line(value) and _COUNT(value.get("epoch"))), "lines of a log"),
}


def is_flag(value: Any) -> bool:
    """Whether it is a value, or a list of values, as a command line has them. Lists of lists of shared lists may stand
    for more values than there is memory."""
    plain = (bool, int, float, str, type(None))
    return isinstance(value, plain) or _list_of(lambda part: isinstance(part, plain))(value)


def check_entries(path: Path, args: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the first entry that is not what its name stands for; None says nothing."""
    for entries, table in ((args, _ARGS), (raw, _RAW)):
        for name, (fits, meaning) in table.items():
            if entries.get(name) is not None and not fits(entries[name]):
                raise CheckpointError(f"{path} says {name}={_short(entries[name])}, which is not {meaning}: refused")
    library, kwargs = raw.get("library") or "timm", args.get("model_kwargs")
    if kwargs:
        try:
            check_arguments(library, str(args.get("model")), kwargs)
        except LapeError as error:
            raise CheckpointError(
                f"{path}: {error}. Refused, nothing was built or fetched: a file may give sizes, numbers and names of "
                "layers, all else is yours to give"
            ) from None


def check_arguments(library: str, name: str, kwargs: Mapping[str, Any]) -> None:
    """Raises LapeError for an argument of a model that no file may give, by name, and for values that are not plain."""
    budget = [_VALUES]
    for key, value in kwargs.items():
        _check_plain(str(key), value, DEPTH, budget)
    host = host_of_library(library)
    if host.check_arguments is not None:
        host.check_arguments(name, kwargs)


def _check_plain(name: str, value: Any, depth: int, budget: list[int]) -> None:
    budget[0] -= 1
    if budget[0] < 0:
        raise LapeError(f"model_kwargs has more than {_VALUES} values")
    leaf = name.rpartition(".")[2]
    if leaf in _LABELS and value is not None:
        fits = isinstance(value, dict) and all(isinstance(part, str | int) for pair in value.items() for part in pair)
    elif leaf in _SIZES and isinstance(value, list | tuple | str | float):
        fits = _size(value)
    elif isinstance(value, Mapping) and depth:
        fits = len(value) <= 4096 and all(isinstance(key, str | int) and _WORDS.fullmatch(str(key)) for key in value)
        for key, inner in value.items():
            _check_plain(f"{name}.{key}", inner, depth - 1, budget)
    elif isinstance(value, list | tuple) and depth:
        fits = len(value) <= 4096
        for inner in value[:4096]:
            _check_plain(name, inner, depth - 1, budget)
    elif isinstance(value, str):
        fits = _WORDS.fullmatch(value) is not None
    else:
        fits = value is None or _number(value) or _yes_no(value)
    if not fits:
        raise LapeError(f"model_kwargs {printable(name)}={_short(value)} is no size, number or name of a layer")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else f"a {type(value).__name__}"
    if type(value) in (int, float) and not (isinstance(value, int) and value.bit_length() > 99):
        return str(value)
    return repr(printable(text[:60])) if isinstance(value, str) else text


# --- tensors ----------------------------------------------------------------------------------------------------------


def check_state(path: Path, state: Any) -> None:
    """Raises CheckpointError unless this is a state dict of plain tensors with values of their own."""
    holds_tensors = isinstance(state, Mapping) and all(isinstance(part, Tensor) for part in state.values())
    if not holds_tensors or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path}: 'model' is not a state dict of named tensors")
    for key, tensor in state.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
        if not (plain and tensor.device.type == "cpu" and not tensor.is_complex()):
            raise CheckpointError(f"{path}: {key} is no plain tensor of numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {key} has {tuple(tensor.shape)} values and holds fewer")


# --- building ---------------------------------------------------------------------------------------------------------


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Whatever is raised in here, by a library, comes of what the file says: a CheckpointError of one line."""
    try:
        yield
    except LapeError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {printable(first_line(error))}"
        raise CheckpointError(f"{path}: what it says does not fit together ({reason})") from error


@contextmanager
def bounded(path: Path, elements: int, modules: int) -> Iterator[None]:
    """In here this thread opens no connection, and makes modules of at most so many elements.

    Raises CheckpointError as soon as there are more: before memory that was asked for is written to.
    """
    thread, budget = threading.get_ident(), [elements, modules]

    def count(_module: Any, _name: str, part: Any) -> None:
        if threading.get_ident() == thread:
            budget[0] -= part.numel() if isinstance(part, Tensor) else 0
            budget[1] -= 1
            if min(budget) < 0:
                raise CheckpointError(f"{path} asks for a far larger model than its weights are for: refused")

    def refuse(call: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                raise OSError("a model of a file asks nothing of the network")
            return call(*args, **kwargs)

        return guard

    calls: list[tuple[Any, str]] = [(socket.socket, "connect"), (socket, "getaddrinfo"), (socket, "gethostbyname")]
    originals = [getattr(owner, name) for owner, name in calls]
    handles = [
        registry.register_module_parameter_registration_hook(count),
        registry.register_module_buffer_registration_hook(count),
        registry.register_module_module_registration_hook(count),
    ]
    try:
        for (owner, name), call in zip(calls, originals, strict=True):
            setattr(owner, name, refuse(call))
        yield
    finally:
        for (owner, name), call in zip(calls, originals, strict=True):
            setattr(owner, name, call)
        for handle in handles:
            handle.remove()
