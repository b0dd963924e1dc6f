"""Methods of a host that know of the position once a model is converted: decay, groups, input size, saving."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lape.bias import PositionalAttention, PositionBias
from lape.conditional import PositionGenerator
from lape.errors import LapeError
from lape.grids import GridWatch
from lape.hosts import host_named
from lape.joined import PositionalBlock
from lape.joins import JOINS
from lape.norm import PositionalNorm
from lape.position import PositionTable
from lape.record import NORMS, RECORD, TABLES, Conversion, record_of, slot_of


class NoWeightDecay:
    """The host's `no_weight_decay()` with the position's parameters added: P, biases and PE norms are not decayed."""

    def __init__(self, root: nn.Module, names: frozenset[str]):
        self.root = root
        self.names = names

    def __call__(self) -> set[str]:
        host = getattr(type(self.root), "no_weight_decay", None)
        return set(self.names) | (set(host(self.root)) if host else set())


class SavePretrained:
    """transformers' `save_pretrained()`, whose config.json then says how the model was converted; `lape.load` reads it.

    Weights keep the names that they have in memory, whatever earlier names the library would write, so that its own
    Trainer finds all of them when it goes on from a checkpoint.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        save = type(model).save_pretrained
        conversion = record_of(model)
        if conversion is None:
            return save(model, save_directory, *args, **kwargs)
        parameters = inspect.signature(save).parameters
        given = inspect.signature(save).bind(model, save_directory, *args, **kwargs).arguments
        state = dict(given.get("state_dict") or model.state_dict())
        seen: set[int] = set()  # a table that two modules read, as in a warm start, is written under both names
        for key, tensor in state.items():
            shared = tensor.numel() > 0 and tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            state[key] = tensor.clone() if shared else tensor
        given["state_dict"] = state
        if "save_original_format" in parameters:  # transformers 5
            given["save_original_format"] = False
        given |= given.pop("kwargs", {})
        model.config.lape = conversion.record()
        try:
            return save(**given)
        finally:
            del model.config.lape


class GroupMatcher:
    """timm's `group_matcher()` for layer-wise learning rates: tables belong to the stem, LN'_l to block l."""

    def __init__(self, root: nn.Module):
        self.root = root

    def __call__(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], float]:
        host: Any = type(self.root)
        groups = host.group_matcher(self.root, coarse)
        if callable(groups):  # a function of the name, with the stem as group 0
            return lambda name: 0 if name.startswith(TABLES) else groups(name.removeprefix(f"{NORMS}."))
        blocks = groups["blocks"] if isinstance(groups["blocks"], list) else [(groups["blocks"], None)]
        mirrored = [(rf"^{NORMS}\.{pattern.removeprefix('^')}", order) for pattern, order in blocks]
        return {**groups, "stem": f"{groups['stem']}|{TABLES}", "blocks": [*blocks, *mirrored]}


class SetInputSize:
    """timm's `set_input_size()` with the position resampled along: tables, biases and every wrapper's layout."""

    def __init__(self, root: nn.Module):
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        conversion: Conversion = getattr(self.root, RECORD)
        if conversion.folded:
            raise LapeError("a folded model has one size: set the input size before lape.fold_")
        if conversion.joins_own_bias and JOINS[conversion.join].normalised:
            raise LapeError("LN' over the rows of the host's bias has one size: set the input size before lape.apply_")
        if conversion.anatomy.stages:
            raise LapeError("a converted model of stages has one size: set the input size before lape.apply_")
        host: Any = type(self.root)
        host.set_input_size(self.root, *args, **kwargs)
        _resize(conversion)


def _resize(conversion: Conversion) -> None:
    """Brings a conversion to the size that its host has now."""
    anatomy = conversion.anatomy
    root, old = anatomy.root, conversion.layout
    measure = host_named(conversion.host).measure
    assert measure is not None
    grid, patch_size = measure(root)
    layout = replace(old, grid=grid)
    conversion.anatomy = replace(anatomy, layout=layout, patch_size=patch_size)
    for module in list(root.modules()):
        if isinstance(module, PositionTable | PositionBias):
            module.resize_(layout)
        elif isinstance(module, GridWatch):
            module.patch_size = patch_size
        elif isinstance(module, PositionalNorm | PositionalBlock | PositionalAttention | PositionGenerator):
            module.layout = layout
    if conversion.replaced_table is not None:
        spare = PositionTable(conversion.replaced_table, old)
        spare.resize_(layout)
        conversion.replaced_table = spare.pos_embed
    owner, name = slot_of(anatomy)
    slot = owner._parameters.get(name)
    adds = conversion.adds_at_input
    if adds and TABLES in root._modules:  # host and chain read one table
        assert slot is not None
        root.get_submodule(f"{TABLES}.0").pos_embed = slot
    elif anatomy.table is not None and slot is not None and not adds:
        delattr(owner, name)  # the host has made a parameter of the zeros in its slot
        owner.register_buffer(name, torch.zeros_like(slot, requires_grad=False), persistent=False)
