"""Names: a converted model's state dict under the names of the authors' files and of the host, and back.

In memory what is new lies in `lape.` (`lape.norms.0.weight`); files hold the names of the authors' code
(`blocks.0.pe_norm.weight`, `pos_embed`), which for the host's own parameters are the host's. Each way of joining says
its names; files of version 0.1.0 that hold the names it had in memory are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lape.convert.converted import Conversion, conversion_of
from lape.core.bias import offset_index
from lape.core.position import KINDS, Grid, resample
from lape.errors import CheckpointError
from lape.names import few

_INDEX = "relative_position_index"  # a buffer in the reference's files; derived from the grid here


def reference_names(model: nn.Module) -> dict[str, str]:
    """The state-dict keys of a converted model -> their names in files. What lies idle in the host is in no file."""
    conversion = conversion_of(model)
    names, idle = conversion.way.file_names(conversion.anatomy), conversion.link.idle_paths()

    def reference_name(key: str) -> str:
        for memory_name, file_name in names.items():
            if key == memory_name or key.startswith(f"{memory_name}."):
                return file_name + key.removeprefix(memory_name)
        return key

    prefix, keys = conversion.path, model.state_dict()
    inside = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
    file_names = {prefix + key: prefix + reference_name(key) for key in inside if key not in idle}
    return {key: file_names.get(key, key) for key in keys if key in file_names or not key.startswith(prefix)}


def _table_names(conversion: Conversion) -> set[str]:
    """The names of the position tables in files, inside the converted model: the host's, numbered for `unshare`."""
    names = conversion.way.file_names(conversion.anatomy)
    slot = conversion.anatomy.table_slot
    tables = {file_name for memory_name, file_name in names.items() if memory_name.startswith("lape.table_")}
    return tables | ({names.get(slot, slot)} if slot is not None and conversion.way.uses_table else set())


def to_reference_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a converted model under the names and in the shapes of the authors' files; nothing is left out.

    `1D_sin` tables are (R, D) there, and relative position biases come with their index. The constants of a folded
    model, which the authors' code does not have, are `blocks.N.folded_position` and `blocks.N.attn.folded_bias`.
    """
    conversion = conversion_of(model)
    names, prefix = reference_names(model), conversion.path
    state = {names[key]: tensor for key, tensor in model.state_dict().items() if key in names}
    if conversion.pe == "1D_sin":
        table_names = [prefix + name for name in _table_names(conversion) if prefix + name in state]
        state |= {name: state[name].flatten(0, -2) for name in table_names}
    return state | _indices(conversion, prefix)


def _indices(conversion: Conversion, prefix: str) -> dict[str, Tensor]:
    axes = KINDS[conversion.pe].bias_axes
    if not axes or conversion.folded:
        return {}
    places = conversion.way.places(conversion.anatomy) if not conversion.way.joins_host_bias else []
    return {f"{prefix}{path}.{_INDEX}": offset_index(conversion.layout.grid, axes) for path in places}


def load_reference_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, source_grid: Grid | None = None
) -> nn.Module:
    """Loads a state dict with the authors' names, or with the model's own, strictly into a converted model; returns it.

    Args:
        source_grid: the (rows, columns) that the tables in `state_dict` are for; when given and another than the
            model's, tables are resampled (bicubic, float32, before the chain). None: shapes must agree.

    Raises:
        CheckpointError: keys missing or unexpected, or shapes that differ; the message names them. The model is
            unchanged then.
    """
    conversion = conversion_of(model)
    model_state, names, prefix = model.state_dict(), reference_names(model), conversion.path
    tables = {prefix + name for name in _table_names(conversion)}
    idle = {prefix + key for key in conversion.link.idle_paths()}
    state = {_name_since_0_2(key, conversion): tensor for key, tensor in state_dict.items() if key not in idle}
    state = {names.get(key, key): tensor for key, tensor in state.items()}
    for key, index_nn in _indices(conversion, prefix).items():
        file_index = state.pop(key, None)
        if file_index is not None and not torch.equal(file_index, index_nn):
            raise CheckpointError(f"{key} is not that of a {conversion.layout.grid} grid: the file is for another grid")
    missing = [name for name in names.values() if name not in state]
    unexpected = sorted(state.keys() - set(names.values()))
    new, wrong = {}, []
    for key, name in names.items():
        if name not in state:
            continue
        tensor = state[name]
        if name in tables:
            tensor = _table_like(model_state[key], tensor, conversion, source_grid)
        if tensor.shape != model_state[key].shape:
            wrong.append(f"{name} is {_shape(tensor)}, the model's {_shape(model_state[key])}")
        new[key] = tensor
    kinds = {"missing": missing, "unexpected": unexpected, "shapes differ:": wrong}
    problems = [f"{title} {few(items, 4)}" for title, items in kinds.items() if items]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model (join={conversion.join}, pe={conversion.pe}): "
            f"{'; '.join(problems)}. Check model name, join, PE kind, input size and number of classes"
        )
    idle_state = {key: t for key, t in state_dict.items() if key in idle and t.shape == model_state[key].shape}
    model.load_state_dict({**model_state, **idle_state, **new}, strict=True)
    return model


def _table_like(model_table: Tensor, table: Tensor, conversion: Conversion, source_grid: Grid | None) -> Tensor:
    """A table of a file, (R, D), (1, R, D) or a map (1, rows, columns, D), in the model's shape if its rows agree."""
    if table.ndim == 4 and source_grid is None:
        return table  # a map tells its own grid: it must be the model's
    rows_1RD = table.reshape(1, -1, table.shape[-1])
    if source_grid is not None:
        source = replace(conversion.layout, grid=source_grid)
        if rows_1RD.shape[1] != source.num_rows:
            raise CheckpointError(
                f"pos_embed has {rows_1RD.shape[1]} rows, a grid of {source_grid[0]} x {source_grid[1]} with "
                f"{source.prefix_rows} prefix rows needs {source.num_rows}: give the grid that the file was trained at"
            )
        rows_1RD = resample(rows_1RD, source, conversion.layout.grid)
    return rows_1RD.reshape(model_table.shape) if rows_1RD.shape[1:] == model_table.flatten(0, -2).shape else rows_1RD


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a scalar"


_BEFORE_0_2 = re.compile(r"\b(?:token_norm|host_block|host_attention|host_patch_embed|position_bias)\.")


def _name_since_0_2(key: str, conversion: Conversion) -> str:
    """The name in files of a key that version 0.1.0 had in memory, when its modules stood before the host's."""
    prefix, inner = conversion.path, _BEFORE_0_2.sub("", key.removeprefix(conversion.path))
    if match := re.fullmatch(r"lape_position\.(\d+)\.pos_embed", inner):
        slot = conversion.anatomy.table_slot or "pos_embed"
        return f"{prefix}{slot}{match[1]}" if f"{slot}1" in _table_names(conversion) else prefix + slot
    if inner.startswith("lape_pe_norm."):
        home, _, name = inner.removeprefix("lape_pe_norm.").rpartition(".")
        return f"{prefix}{home}.pe_norm.{name}"
    if match := re.fullmatch(rf"(.+)\.{conversion.anatomy.norm}\.(pe_gate|folded_position)", inner):
        return f"{prefix}{match[1]}.{match[2]}"
    return prefix + inner if key.startswith(prefix) else key
