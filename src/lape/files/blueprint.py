"""How to build a model again: its library, name and arguments, checked against the model as it is now."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from lape.convert.apply import build, fold_
from lape.convert.converted import Conversion, conversion_of
from lape.core.joined import Joined
from lape.errors import LapeError
from lape.host import class_name, host_named
from lape.host.base import without_values
from lape.host.timm import NOT_THE_MODEL

COMPILED = "_orig_mod"
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel")
# Attributes of modules that do not decide what they compute in evaluation, or that the shapes of parameters tell.
_NO_MATTER = {
    "training",
    "num_classes",
    "out_features",
    "p",
    "drop_prob",
    "grad_checkpointing",
    "fused_attn",
    "gradient_checkpointing",
    "name_or_path",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what compiles or replicates it as a whole."""
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, COMPILED, None) or model.module  # type: ignore[assignment]
    return model


def blueprint_of(model: nn.Module, name: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Library, name and arguments that make this model again, as plain values.

    They are those given, those that `create_model` was called with, or those that the model's library tells, brought to
    what the model is now where that is known (size, patch, classes, pooling, blocks). Raises LapeError when the model
    that they make is another one, naming the first difference.
    """
    conversion = conversion_of(model)
    factory = _factory(model, conversion, name, arguments)
    difference = _difference(model, twin := _twin(conversion, factory))
    for _ in range(0 if name or not conversion.anatomy.blocks else 2):  # an argument may decide what another one means
        current = host_named(conversion.host).current
        if difference is None or current is None:
            break
        arguments_here, arguments_there = current(conversion.root), current(conversion_of(twin).root)
        changes = {key: value for key, value in arguments_here.items() if value != arguments_there.get(key)}
        factory = {**factory, "kwargs": {**factory["kwargs"], **changes}}
        try:
            difference = _difference(model, twin := _twin(conversion, factory))
        except (LapeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            difference = f"{difference} ({error})"
    if difference:
        raise LapeError(
            f"a {factory['name']} with {factory['kwargs']} is another model: {difference}. Save the state_dict "
            "yourself, or give the timm name and arguments that make this model: lape.save(model, path, name=..., ...)"
        )
    return factory


def _factory(model: nn.Module, conversion: Conversion, name: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    if name:
        kwargs = {key: value for key, value in arguments.items() if key not in NOT_THE_MODEL}
        return {"library": "timm", "name": name, "kwargs": kwargs}
    if conversion.path and class_name(type(model)).startswith("torch."):
        inner = conversion.path.rstrip(".")
        raise LapeError(
            f"a {type(model).__name__} around a model cannot be built again: save the model in it, .{inner}"
        )
    if conversion.factory:
        return conversion.factory
    host = host_named(conversion.host) if conversion.anatomy.blocks else None  # else it has no host
    blueprint = host.blueprint(model) if host is not None and host.blueprint is not None else None
    if host is None or blueprint is None:
        raise LapeError(
            "how to build this model again is not known: give its timm name and arguments, "
            "lape.save(model, path, name=..., ...), or save the state_dict yourself"
        )
    return {"library": host.package, "name": blueprint[0], "kwargs": blueprint[1]}


def _twin(conversion: Conversion, factory: dict[str, Any]) -> nn.Module:
    """The model that the arguments make, without values."""
    keeps = conversion.warm_start or not (conversion.way.new or conversion.pe == "own")
    pe = None if keeps else conversion.pe
    arguments = (factory["library"], factory["name"], factory["kwargs"], conversion.join, pe)
    part: dict[str, Any] = {"at": conversion.path.rstrip("."), "grid": conversion.layout.grid}
    make = partial(build, *arguments, **part)
    try:
        with without_values():
            twin = make(**conversion.choices)
    except (RuntimeError, NotImplementedError):  # constructors that compute with values
        twin = make(**conversion.choices)
    return fold_(twin) if conversion.folded else twin


def _difference(model: nn.Module, twin: nn.Module) -> str | None:
    """The first thing in which two models differ: shapes, classes of modules, or their plain attributes."""
    shapes = [
        {key.replace(f"{COMPILED}.", ""): tuple(t.shape) for key, t in m.state_dict().items()} for m in (model, twin)
    ]
    parts = [dict(_parts(m)) for m in (model, twin)]
    for model_values, twin_values in (shapes, parts):
        for key in {**model_values, **twin_values}:
            if model_values.get(key) != twin_values.get(key):
                return f"{key} is {twin_values.get(key, 'missing')} there and {model_values.get(key, 'missing')} here"
    return None


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, class) of each module and (path.attribute, value) of its plain attributes."""
    for path, module in model.named_modules():
        if path.endswith(COMPILED) or path == COMPILED:
            continue
        path = path.replace(f"{COMPILED}.", "")
        module = unwrapped(module)
        yield path, class_name(module._host if isinstance(module, Joined) else type(module))
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in _NO_MATTER and _is_plain(value):
                yield f"{path}.{name}".lstrip("."), value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(part) for part in value)
    return isinstance(value, int | float | str | bool) or value is None
