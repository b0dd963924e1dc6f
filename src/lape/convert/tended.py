"""Methods of a host that must know of what a conversion adds: decay, groups of layers, input size, saving."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lape.convert.converted import conversion_of
from lape.convert.ways import way_of
from lape.core.anatomy import owner_and_name
from lape.core.forward import Link
from lape.core.joined import LINK, Joined
from lape.core.position import resized
from lape.errors import LapeError
from lape.host import host_named

TENDED = ("no_weight_decay", "group_matcher", "set_input_size")


class Tended(Joined):
    """The root of a converted model: its host's methods, with what is new in mind."""

    @classmethod
    def takes_over(cls, host: type, name: str) -> Any:
        tend = globals()[f"_{name}"]

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return tend(self, getattr(host, name, None), *args, **kwargs)

        return functools.wraps(getattr(host, name))(method) if hasattr(host, name) else method

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied root is the root of all that was copied with it, also of what was copied before it."""
        super().__setstate__(state)  # type: ignore[misc]
        link, stack = self.__dict__[LINK], [self]
        while stack and vars(link).get("root") is self:  # while unpickling it may not be there yet
            part: Any = stack.pop()
            if LINK in part.__dict__:
                part.__dict__[LINK] = link
            stack += [child for child in part.__dict__.get("_modules", {}).values() if child is not None]


def tended_methods(root: nn.Module) -> list[str]:
    """The names of the host's methods that are tended; `no_weight_decay` is added where the host has none."""
    return ["no_weight_decay", *(name for name in TENDED[1:] if hasattr(type(root), name))]


def position_names(link: Link) -> set[str]:
    """The names, in the root, of all parameters of position: what is new, the table, and a bias that is joined."""
    root, anatomy = link.root, link.anatomy
    way = way_of(link)
    names = {f"lape.{name}" for name, _ in way.named_parameters()}
    if way.uses_table:
        names |= set(anatomy.tables)
    if way.joins_host_bias:
        for block_bias in anatomy.own_bias:
            path = block_bias.method.rpartition(".")[0]
            parameters = root.get_submodule(path).named_parameters(recurse=False)
            names |= {f"{path}.{name}" for name, _ in parameters if "relative_position" in name}
    return names


def _no_weight_decay(root: Any, host_method: Callable[..., Any] | None) -> set[str]:
    return position_names(getattr(root, LINK)) | set(host_method(root) if host_method else ())


def _group_matcher(root: Any, host_method: Callable[..., Any], coarse: bool = False) -> Any:
    """For layer-wise learning rates: tables belong to the stem, what belongs to a block to the layer of that block."""
    groups, link = host_method(root, coarse), getattr(root, LINK)
    homes = {key: home for key, home in way_of(link).file_names(link.anatomy).items() if key.startswith("lape.")}
    if callable(groups):  # a function of the name, with the stem as group 0
        return lambda name: groups(homes.get(".".join(name.split(".")[:3]), name))
    blocks = groups["blocks"] if isinstance(groups["blocks"], list) else [(groups["blocks"], None)]
    new_patterns = []
    for key, home in homes.items():
        if (match := next((m for pattern, _ in blocks if (m := re.match(pattern, home))), None)) is not None:
            suffix = next(suffix for pattern, suffix in blocks if re.match(pattern, home))
            new_patterns.append((rf"^{re.escape(key)}(?:\.|$)", (*map(int, match.groups()), *(suffix or ()))))
    return {**groups, "stem": rf"{groups['stem']}|^lape\.table_", "blocks": [*blocks, *new_patterns]}


def _set_input_size(root: Any, host_method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """timm's own method resamples the table in its slot; what is new follows, and so does what lies idle."""
    link: Link = getattr(root, LINK)
    old, way = link.anatomy, way_of(link)
    if old.stages:
        raise LapeError("a converted model of stages has one size: set the input size before lape.apply_")
    way.check_resize()
    idle = link.idle_paths()
    host_method(root, *args, **kwargs)
    measure = host_named(link.host).measure
    assert measure is not None
    grid, patch_size = measure(root)
    link.anatomy = replace(old, layout=replace(old.layout, grid=grid), patch_size=patch_size)
    way.resize(old.layout, link.anatomy.layout)
    slot = old.table_slot
    if slot is None or slot not in link.replaced:
        return
    if slot in idle:  # the host has made a parameter of what lay idle
        owner, name = owner_and_name(root, slot)
        owner.register_buffer(name, owner._parameters.pop(name).detach())  # type: ignore[union-attr]
    else:
        link.replaced[slot].data = resized(link.replaced[slot].data, old.layout, link.anatomy.layout)


class Saved(Joined):
    """A transformers model whose config.json says how it was converted; `lape.load` reads it.

    Weights keep the names that they have in memory, whatever earlier names the library would write, so that its own
    Trainer finds all of them when it goes on from a checkpoint.
    """

    def _around(self, host_method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        if "save_original_format" in inspect.signature(host_method).parameters:  # transformers 5
            kwargs["save_original_format"] = False
        writes = kwargs.get("is_main_process", True) and not kwargs.get("push_to_hub")
        model.config.lape = conversion_of(model).record() | ({DIGESTS: UNFINISHED} if writes else {})
        try:
            result = host_method(model, *args, **kwargs)
        finally:
            del model.config.lape
        if writes:
            _finish(Path(args[0] if args else kwargs["save_directory"]))
        return result


DIGESTS = "sha256"  # in config.json: file of weights -> its SHA-256, and its own
UNFINISHED = "until all files are written"
CONFIG = "config.json"


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(config: dict[str, Any]) -> Any:
    """What a config.json says of a conversion: an entry of a configuration of transformers, else all of it."""
    return config.get("lape") if "transformers_version" in config else config


def digest_of_config(config: dict[str, Any]) -> str:
    """The SHA-256 of all that a config.json says but this digest, whatever the order and the spaces."""
    plain = json.loads(json.dumps(config))
    record_of(plain)[DIGESTS].pop(CONFIG, None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(config: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """A config.json with the digests of its files of weights and of itself. Raises TypeError: no plain values."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    record_of(plain)[DIGESTS] = digests
    record_of(plain)[DIGESTS] = {**digests, CONFIG: digest_of_config(plain)}
    return plain


def _finish(folder: Path) -> None:
    """The library writes config.json first: it gets the digests of the weights when they are there, in one step."""
    path, fresh = folder / CONFIG, folder / f".{CONFIG}.tmp"
    config = json.loads(path.read_text(encoding="utf-8"))
    digests = {file.name: digest_of(file) for file in sorted(folder.glob("model*.safetensors"))}
    fresh.write_text(json.dumps(sealed(config, digests), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(fresh, path)
