"""What to pass to `lape.register_host` for a model, or why it would not work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lape.errors import LapeError
from lape.host.base import class_name, evaluating, watching
from lape.host.parts import POST_NORM, is_norm
from lape.host.paths import Paths, examine


@dataclass(frozen=True)
class Suggestion:
    """`str()` has the line that registers the model's class, or what stands in the way.

    Fields:
        root: the class to register
        where: arguments of `lape.register_host`
        problems: what stands in the way, a sentence each
        notes: what was not looked at
    """

    root: type[nn.Module]
    where: dict[str, Any]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in self.where.items())
        line = f"lape.register_host({self.root.__name__}{arguments})"
        head = [f"{self.root.__name__} cannot be registered by paths:", *self.problems] if self.problems else [line]
        return "\n".join([*head, *self.notes])


def suggest_host(model: nn.Module, example: Tensor | None = None) -> Suggestion:
    """What to register for a model's class, read off its modules: its blocks, norms, attention, table and sizes.

    Args:
        model: a Vision Transformer that lape does not know; it is not changed.
        example: an image (1, C, height, width). With it, the model is run once: what attention gets must be what the
            norm before it returned, that norm must read what enters its block, and the grid is that of the image.
    Raises LapeError for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise LapeError(f"{model!r:.80} is no model: give a torch.nn.Module")
    blocks, problems = _block_list(model), []
    if blocks is None:
        problem = "no list of two or more blocks of one class, each with a norm and an attention, was found"
        return Suggestion(type(model), {}, (problem,))
    first = model.get_submodule(blocks)[0]  # type: ignore[index]
    parts = dict(first.named_children())
    norm = next(name for name, part in parts.items() if is_norm(part))
    attention = next(name for name, part in parts.items() if _attends(name, part))
    where: dict[str, Any] = {"blocks": blocks, "norm": norm, "attention": attention}
    width = next(parts[norm].parameters()).shape[-1]
    tables = [name for name, p in model.named_parameters() if _may_be_table(name, p, width)]
    where["table"] = min(tables, key=lambda name: ("pos" not in name.lower(), len(name))) if tables else None
    patch = next((m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride[0] > 1), None)
    if patch is not None:
        where["patch_size"] = tuple(patch.stride)
    if example is not None:
        more, where["norm"] = _run(model, first, where, example)
        problems += more
        if patch is not None:
            where["grid"] = tuple(side // step for side, step in zip(example.shape[-2:], patch.stride, strict=True))
    if not problems:
        try:
            examine(model, Paths(**where))
        except LapeError as error:
            problems.append(str(error))
    notes = () if example is not None else ("not checked in a forward: give an image, lape.suggest_host(model, image)",)
    arguments = {name: value for name, value in where.items() if value != getattr(Paths(), name)}
    return Suggestion(type(model), arguments, tuple(problems), notes)


def _may_be_table(name: str, parameter: Tensor, width: int) -> bool:
    """By its name, or as a parameter (1, R, D) of the model itself that is no token."""
    fits = parameter.ndim in (2, 3, 4) and parameter.shape[-1] == width and parameter.numel() > width
    of_model = parameter.ndim == 3 and "." not in name and "token" not in name
    return fits and ("pos" in name.lower() or of_model)


def _attends(name: str, part: nn.Module) -> bool:
    return "att" in f"{name} {type(part).__name__}".lower() and not is_norm(part)


def _block_list(model: nn.Module) -> str | None:
    """The path of the longest list of blocks."""
    lists = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            kinds = Counter(class_name(type(block)) for block in module)
            parts = list(module[0].named_children())
            if len(kinds) == 1 and any(is_norm(p) for _, p in parts) and any(_attends(n, p) for n, p in parts):
                lists.append((len(module), path))
    return max(lists, key=lambda item: item[0])[1] if lists else None


def _run(model: nn.Module, block: nn.Module, where: dict[str, Any], example: Tensor) -> tuple[list[str], str]:
    """What stands in the way in a forward, and the norm whose output attention gets."""
    block_inputs: list[Tensor] = []
    attention_inputs: list[Tensor] = []
    norm_inputs: dict[str, Tensor] = {}
    norm_outputs: dict[str, Tensor] = {}

    def enter(tensors: list[Tensor], _module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors += [value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]

    def keep(name: str, _norm: nn.Module, args: Any, y: Tensor) -> None:
        norm_inputs.setdefault(name, args[0].clone())
        norm_outputs.setdefault(name, y.clone())

    calls = ((block, block_inputs), (getattr(block, where["attention"]), attention_inputs))
    hooks = [part.register_forward_pre_hook(partial(enter, into), with_kwargs=True) for part, into in calls]
    norms = [(name, part) for name, part in block.named_children() if is_norm(part)]
    hooks += [norm.register_forward_hook(partial(keep, name)) for name, norm in norms]
    try:
        with torch.no_grad(), watching(hooks), evaluating(model):
            model(example)
    except Exception as error:  # of the model
        return [f"the model does not take this image: {type(error).__name__}: {error}"], where["norm"]
    if not block_inputs or not attention_inputs:
        return ["blocks or attention were not called as modules in a forward"], where["norm"]
    feeding = [name for name, y in norm_outputs.items() if _same(y, attention_inputs[0])]
    if not feeding:
        problem = f"no norm's output is what {where['attention']} gets: {POST_NORM}, or it is changed in between"
        return [problem], where["norm"]
    problems = [f"{feeding[0]} does not read what enters its block"]
    return ([] if _same(norm_inputs[feeding[0]], block_inputs[0]) else problems), feeding[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
