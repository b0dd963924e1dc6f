"""LaPE: position gets a LayerNorm of its own in each layer of a Vision Transformer, and is handed on.

    model = timm.create_model("vit_small_patch16_224", pretrained=True)
    lape.apply_(model, join="LaPE")      # in place; lape.remove_(model) undoes it
    print(lape.describe(model))

Importing this package loads torch and nothing heavier.
"""

from lape.checkpoint import load, load_reference_state_dict, read_checkpoint, save, to_reference_state_dict
from lape.convert import (
    Description,
    apply_,
    create_model,
    describe,
    fold_,
    grid,
    num_prefix_tokens,
    position_bias,
    positions,
    remove_,
)
from lape.correlation import correlation
from lape.errors import CheckpointError, DataError, LapeError, UnsupportedModelError
from lape.hosts import Anatomy, Host, hosts, register_host
from lape.position import Layout

__version__ = "0.1.0"

__all__ = [
    "Anatomy",
    "CheckpointError",
    "DataError",
    "Description",
    "Host",
    "LapeError",
    "Layout",
    "UnsupportedModelError",
    "apply_",
    "correlation",
    "create_model",
    "describe",
    "fold_",
    "grid",
    "hosts",
    "load",
    "load_reference_state_dict",
    "num_prefix_tokens",
    "position_bias",
    "positions",
    "read_checkpoint",
    "register_host",
    "remove_",
    "save",
    "to_reference_state_dict",
]
