"""LaPE: position gets a LayerNorm of its own in each layer of a Vision Transformer, and is handed on.

    model = timm.create_model("vit_small_patch16_224", pretrained=True)
    lape.apply_(model, join="LaPE")      # in place; lape.remove_(model) undoes it
    print(lape.describe(model))

Importing this package loads nothing; the first name that is used loads torch and nothing heavier. So the command line
can answer `--help` before torch would be there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lape.names import VERSION

if TYPE_CHECKING:
    from lape.convert.apply import apply_, create_model, fold_, remove_
    from lape.convert.positions import (
        Description,
        describe,
        grid,
        last_position,
        num_prefix_tokens,
        position_bias,
        positions,
    )
    from lape.core.anatomy import Anatomy
    from lape.core.position import Layout
    from lape.errors import CheckpointError, DataError, LapeError, UnsupportedModelError
    from lape.files.folder import load, push_to_hub, save
    from lape.files.names import load_reference_state_dict, to_reference_state_dict
    from lape.files.read import Checkpoint, read_checkpoint
    from lape.host import Host, Suggestion, hosts, register_host, suggest_host
    from lape.look.explorer import explore
    from lape.look.features import Features, debias_, probe
    from lape.look.similarity import correlation

__version__ = VERSION

_HOME = {
    "convert.apply": ("apply_", "create_model", "fold_", "remove_"),
    "convert.positions": (
        *("Description", "describe", "grid", "last_position", "num_prefix_tokens", "position_bias", "positions"),
    ),
    "core.anatomy": ("Anatomy",),
    "core.position": ("Layout",),
    "errors": ("CheckpointError", "DataError", "LapeError", "UnsupportedModelError"),
    "files.folder": ("load", "push_to_hub", "save"),
    "files.names": ("load_reference_state_dict", "to_reference_state_dict"),
    "files.read": ("Checkpoint", "read_checkpoint"),
    "host": ("Host", "Suggestion", "hosts", "register_host", "suggest_host"),
    "look.explorer": ("explore",),
    "look.features": ("Features", "debias_", "probe"),
    "look.similarity": ("correlation",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lape' has no attribute {name!r}")
    value = getattr(import_module(f"lape.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
