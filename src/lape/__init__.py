"""LaPE: position gets a LayerNorm of its own in each layer of a Vision Transformer, and is handed on.

    model = timm.create_model("vit_small_patch16_224", pretrained=True)
    lape.apply_(model, join="LaPE")      # in place; lape.remove_(model) undoes it
    print(lape.describe(model))

Importing this package loads nothing; the first name that is used loads torch and nothing heavier. So the command line
can answer `--help` before torch would be there.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lape.convert import apply_, create_model, fold_, remove_
    from lape.errors import CheckpointError, DataError, LapeError, UnsupportedModelError
    from lape.files.folder import load, push_to_hub, save
    from lape.files.read import read_checkpoint
    from lape.hosts import Anatomy, Host, hosts, register_host
    from lape.layers import Description, describe, grid, last_position, num_prefix_tokens, position_bias, positions
    from lape.look.explorer.explorer import explore
    from lape.look.similarity import correlation
    from lape.position import Layout
    from lape.reference import load_reference_state_dict, to_reference_state_dict

__version__ = "0.1.0"

_HOME = {
    "convert": ("apply_", "create_model", "fold_", "remove_"),
    "errors": ("CheckpointError", "DataError", "LapeError", "UnsupportedModelError"),
    "hosts": ("Anatomy", "Host", "hosts", "register_host"),
    "layers": ("Description", "describe", "grid", "last_position", "num_prefix_tokens", "position_bias", "positions"),
    "files.folder": ("load", "push_to_hub", "save"),
    "files.read": ("read_checkpoint",),
    "look.explorer.explorer": ("explore",),
    "look.similarity": ("correlation",),
    "position": ("Layout",),
    "reference": ("load_reference_state_dict", "to_reference_state_dict"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


class _Package(ModuleType):
    """Functions that share their name with a submodule (hosts) stay functions when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lape' has no attribute {name!r}")
    value = getattr(import_module(f"lape.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


sys.modules[__name__].__class__ = _Package
