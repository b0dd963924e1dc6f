"""Where the parts of a model are, checked: what the hosts of all libraries share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lape.core.anatomy import Anatomy, owner_and_name
from lape.core.position import Layout
from lape.errors import UnsupportedModelError
from lape.host.base import ANOTHER, class_name

RELATIVE = "relative position bias in attention"
ROTARY = "rotary position embedding in attention"
SHARED = "relative position bias in attention (one for all blocks)"
POST_NORM = "its norm stands behind attention (post-norm), so no norm feeds attention"

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: args and kwargs."""


def children(root: nn.Module, path: str) -> list[str]:
    """Paths of the children of a block list, in the order of the forward."""
    return [f"{path}.{name}" for name in root.get_submodule(path)._modules]


def instances(root: nn.Module, name: str) -> list[str]:
    """Paths of the modules of this class, "module.Class", in the order of registration."""
    return [path for path, module in root.named_modules() if class_name(type(module)) == name]


def checked_anatomy(
    root: nn.Module, blocks: list[str], layout: Layout, *, slot: str | None, reason: str = "", **more: Any
) -> Anatomy:
    """The anatomy of a model whose table, if it has one, is in `slot`; `more` are further fields.

    Raises UnsupportedModelError when the table is not one of this layout, with `reason` in place of the grid.
    """
    table = None if slot is None else table_in(root, slot)
    rows, plain = layout.num_rows, "form" not in more
    if plain and table is not None and tuple(table.shape[:-1]) not in ((rows,), (1, rows), (1, *layout.grid)):
        grid = f"grid {' x '.join(map(str, layout.grid))} and {layout.prefix_rows} prefix rows"
        raise UnsupportedModelError(f"{slot} has shape {tuple(table.shape)}, expected {rows} rows: {reason or grid}")
    path = None if table is None else slot
    return Anatomy(root=root, blocks=tuple(blocks), table=path, table_slot=slot, layout=layout, **more)


def table_in(root: nn.Module, slot: str) -> Tensor | None:
    """The position table in a slot, (1, R, D), (R, D) or a map (1, rows, columns, D); None when the model has none."""
    owner, name = owner_and_name(root, slot)
    table: Tensor | None = getattr(owner, name, None)
    return table


def is_norm(module: object) -> bool:
    """Whether this is a norm over each token's width: LN' is a LayerNorm beside any of them, with its eps (Eq. 11)."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.LayerNorm) or name.removesuffix("fp32").endswith(
        ("rmsnorm", "layernorm", "simplenorm")
    )


def check_norms(root: nn.Module, paths: Iterable[str]) -> None:
    """Raises UnsupportedModelError unless a LayerNorm or its like lies under each path."""
    for path in paths:
        if not is_norm(norm := getattr(*owner_and_name(root, path))):
            reason = "the norm before attention must be a LayerNorm or an RMSNorm"
            raise UnsupportedModelError(f"{path} is a {class_name(type(norm))}: {reason}")


def check_blocks(
    library: str, root: nn.Module, paths: list[str], classes: tuple[str, ...], reasons: dict[str, str] | None = None
) -> None:
    """Raises UnsupportedModelError, naming class and reason, unless every block is of an allowed class."""
    if not paths:
        raise UnsupportedModelError(f"{class_name(type(root))} has no blocks: nothing to convert")
    for path in paths:
        name = class_name(type(root.get_submodule(path)))
        if name not in classes:
            reason = (reasons or {}).get(name, "the place of its attention norm is not known")
            convertible = f"{library} blocks that can be converted: {', '.join(classes)}"
            raise UnsupportedModelError(f"{path} is a {name}: {reason}; {convertible}; {ANOTHER}")
