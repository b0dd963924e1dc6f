"""What a file may say in a configuration of transformers: what its class declares, nothing that fetches or imports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from lape.errors import LapeError
from lape.host.base import of_constructors
from lape.names import printable

# Where a configuration came from, and that its attention was chosen (transformers 4); nothing is read from it.
ORIGIN = ("_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation_autoset")
# What has the library fetch weights or import code, in classes that declare it as well.
_ELSEWHERE = frozenset(
    "backbone use_timm_backbone use_pretrained_backbone backbone_kwargs model_args architecture pretrained_cfg "
    "quantization_config adapter_kwargs dataset index_path passages_path".split()
)
_ATTENTION, _DTYPES = ("eager", "sdpa"), ("float32", "float64", "float16", "bfloat16")
_WORDS = (
    "architectures problem_type layer_types mlp_layer_types out_features stage_names position_embedding_type".split()
)
_OF_OTHERS = (  # of every configuration of transformers 4 or 5, and of some
    "num_labels dtype torch_dtype tie_word_embeddings use_cache qkv_bias output_attentions pruned_heads pad_token_id "
    "bos_token_id eos_token_id decoder_start_token_id max_length num_beams num_beam_groups temperature top_k top_p "
    "typical_p repetition_penalty length_penalty num_return_sequences rope_theta partial_rotary_factor"
).split()
_ANY = {"number", "yes or no", "several of yes or no"}  # where a class says no more than None
_ROTARY = ("rope_scaling", "rope_parameters")
Kinds = dict[str, set[str]]
"""For each entry that a configuration class declares: whether it holds numbers, yes or no, text."""


def check_entries(cls: Any, entries: Mapping[str, Any], within: Kinds | None = None) -> None:
    """Raises LapeError for an entry, at any depth, that its class does not declare, or of another kind than declared;
    and for what has the library fetch weights, a kernel or code. Empty and false values pass, and so does any number.

    Args:
        within: what the class around this one declares in it.
    """
    declarations = _declarations(cls) | (within or {})
    for key, value in entries.items():
        empty = value in (None, False, "", {}, [])
        number = isinstance(value, int | float) and not isinstance(value, bool)  # fetches nothing, whatever its name
        if key in _ELSEWHERE and not empty:
            raise LapeError(f"{key!r} names weights or code of somewhere else")
        if "attn_implementation" in key:
            if not (empty or value in _ATTENTION or (value is True and key in ORIGIN)):
                raise LapeError(f"{key!r} may be {' or '.join(_ATTENTION)}, not {value!r}")
        elif key == "model_type" and value not in (None, cls.model_type):
            raise LapeError(f"{key!r} of a {cls.__name__} is {cls.model_type!r}, not {printable(repr(value))[:60]}")
        elif key.startswith("__") or callable(getattr(cls, key, None)) or not (empty or number or key in declarations):
            raise LapeError(f"{key!r} is no entry of a {cls.__name__}")
        elif isinstance(value, Mapping) and (inner := _inner_class(cls, key, value)):
            check_entries(inner, value, _kinds_of(_default(cls).get(key)))
        elif not (empty or key in ("id2label", "label2id") or _fits(key, value, declarations.get(key, {"number"}))):
            words = " or ".join(sorted(declarations[key])) or "a number"
            raise LapeError(f"{key!r} of a {cls.__name__} is {words}, not {printable(repr(value))[:60]}")


def _fits(key: str, value: Any, kinds: set[str]) -> bool:
    if key in ("dtype", "torch_dtype"):
        return value in _DTYPES
    texts, leaf_kinds = _leaves(value)
    words = texts if key not in ("model_type", "transformers_version") else []
    return leaf_kinds <= (kinds or _ANY) and all(re.fullmatch(r"[\w-]{1,64}", word) for word in words)


def _leaves(value: Any, within: str = "") -> tuple[list[str], set[str]]:
    """The texts in a value, and of which kinds its parts are. A number, or a text, may stand for several."""
    if isinstance(value, Mapping | list | tuple):
        parts = [_leaves(part, "several of ") for part in (value.values() if isinstance(value, Mapping) else value)]
        return [text for texts, _ in parts for text in texts], set().union(*(kinds for _, kinds in parts))
    if isinstance(value, str):
        return [value], {"text"}
    if value is None:
        return [], {f"{within}nothing"} if within else set()
    return [], {f"{within}yes or no" if isinstance(value, bool) else "number"}


@lru_cache(maxsize=64)
def _default(cls: Any) -> dict[str, Any]:
    """The configuration that a class makes of nothing, empty for a class that needs something."""
    with suppress(Exception):
        config: dict[str, Any] = cls().to_dict()
        return config
    return {}


@lru_cache(maxsize=64)
def _declarations(cls: Any) -> Kinds:
    kinds: Kinds = {name: {"text"} for name in _WORDS} | {name: {"text", "number"} for name in _ROTARY}
    kinds |= {name: set() for name in (*_OF_OTHERS, *cls.attribute_map, *cls.sub_configs)}
    parameters = [p for p in of_constructors(cls.__mro__) if p.kind is not p.VAR_KEYWORD]
    arguments = {p.name: None if p.default is p.empty else p.default for p in parameters}
    for more in (_kinds_of(arguments), _kinds_of(_default(cls))):
        kinds |= {name: kinds.get(name, set()) | new_kinds for name, new_kinds in more.items()}
    return kinds


def _kinds_of(config: Any) -> Kinds:
    return {name: _leaves(value)[1] for name, value in config.items()} if isinstance(config, Mapping) else {}


def _inner_class(cls: Any, key: str, value: Mapping[str, Any]) -> Any:
    """The class of a configuration within one, None for a plain mapping."""
    from transformers import CONFIG_MAPPING, AutoConfig

    inner_class, model_type = cls.sub_configs.get(key), value.get("model_type")
    if inner_class not in (None, AutoConfig) and model_type in (None, inner_class.model_type):
        return inner_class
    if model_type is not None and not (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        raise LapeError(f"{key!r} is of no model type that transformers has: {printable(str(model_type))[:60]!r}")
    return None if model_type is None else CONFIG_MAPPING[model_type]


def declared_in(cls: Any, entries: Mapping[str, Any], within: Kinds | None = None) -> dict[str, Any]:
    """A configuration without what its user noted in it, and without where it came from."""
    declarations = _declarations(cls) | (within or {})
    classes = {key: _inner_class(cls, key, value) for key, value in entries.items() if isinstance(value, Mapping)}
    return {
        key: declared_in(classes[key], value, _kinds_of(_default(cls).get(key))) if classes.get(key) else value
        for key, value in entries.items()
        if key in declarations and key not in ORIGIN
    }


def check_origin(value: Any) -> None:
    """Raises LapeError where a configuration has weights fetched or code imported, be it by default."""
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        if key in _ELSEWHERE and inner:
            raise LapeError(f"{key!r} names weights or code of somewhere else")
        check_origin(inner)
