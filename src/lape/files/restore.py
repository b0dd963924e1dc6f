"""From a file to a model: what it says of itself, its size, its transform, its class names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lape.convert.apply import build, fold_
from lape.convert.converted import CHOICES, conversion_of
from lape.convert.positions import Size, describe
from lape.core.joins import join_named
from lape.core.position import Grid, kind_named
from lape.data.augment import EvalTransform, eval_transform
from lape.errors import CheckpointError, DataError, LapeError, arguments_as, reason_of
from lape.files.names import load_reference_state_dict
from lape.files.read import HUB, Checkpoint, read_checkpoint
from lape.files.vet import bounded, of_file
from lape.host import host_of_library
from lape.host.base import without_values
from lape.names import FILE_SETTINGS

if TYPE_CHECKING:
    from lape.recipe import Recipe

SIZE_NAMES = ("img_size", "image_size")  # of timm; of torchvision and transformers


def restore(
    file: str | PathLike[str] | Checkpoint,
    *,
    size: Size | None = None,
    ema: bool = False,
    model: str | None = None,
    join: str | None = None,
    pe: str | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """The converted model of a file, in eval mode: `lape.load`, whose other arguments and errors it has.

    Args:
        file: a path as for `read_checkpoint`, or what that returned.
        size: `lape.load`'s `input_size`.
    """
    checkpoint = file if isinstance(file, Checkpoint) else read_checkpoint(file)
    state = checkpoint.model_ema if ema else checkpoint.model
    if state is None:
        raise CheckpointError(f"{checkpoint.path} holds no averaged (EMA) weights: leave `ema` out")
    choices = {name: checkpoint.args.get(flag) for name, flag in CHOICES.items()}
    choices["warm_start"] = bool(choices["warm_start"])
    keeps_host_table = choices["warm_start"] or checkpoint.raw.get("own_table")
    with of_file(checkpoint.path):
        make = partial(
            build,
            checkpoint.package,
            _reconcile(checkpoint, "model", model),
            _arguments(checkpoint, size, timm_kwargs),
            _reconcile(checkpoint, "join", None if join is None else join_named(join).name),
            None if keeps_host_table else _reconcile(checkpoint, "pe", None if pe is None else kind_named(pe).name),
            at=checkpoint.raw.get("at"),
            grid=checkpoint.raw.get("grid"),
            **choices,
        )
        result = _build_bounded(checkpoint, make, size)
        if checkpoint.raw.get("unconverted"):
            return _with_weights_of_library(result, state)
        if checkpoint.raw.get("folded"):
            fold_(result)
        resized = size is not None and _sides(size) != size_of(checkpoint)
        grid = source_grid(checkpoint, result) if resized else None
        return load_reference_state_dict(result, state, source_grid=grid).eval()


def _build_bounded(checkpoint: Checkpoint, make: Callable[[], nn.Module], size: Size | None) -> nn.Module:
    """Builds the model twice: without values, to refuse one far larger than the file's weights, then for good."""
    if host_of_library(checkpoint.package).check_arguments is None:  # a host of the user's own
        return make()
    file_size = size_of(checkpoint)
    times = 1 if size is None or file_size is None else max(1, math.prod(_sides(size)) / math.prod(file_size))
    values = sum(tensor.numel() for tensor in checkpoint.model.values())
    limits = (checkpoint.path, int(times * (2 * values + 2**26)), 10_000 + 100 * len(checkpoint.model))
    with suppress(RuntimeError, NotImplementedError), bounded(*limits), without_values():
        make()  # `bounded` raises through the suppress; a constructor that computes with values fails, and says nothing
    with bounded(*limits):
        return make()


def _with_weights_of_library(model: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """The model with weights under transformers' names, which it alone can match to modules."""
    from transformers import utils

    logging: Any = utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        library_model, report = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(state), output_loading_info=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    if wrong := {name: keys for name, keys in report.items() if keys}:
        names = "; ".join(f"{name}: {', '.join(map(str, list(keys)[:4]))}" for name, keys in wrong.items())
        raise CheckpointError(f"the weights do not fit a {type(model).__name__} ({names})")
    model.load_state_dict(library_model.state_dict())
    return cast(nn.Module, model.eval())


def restore_with(checkpoint: Checkpoint, recipe: Recipe, size: Size) -> nn.Module:
    """`restore` by the settings of a run (`settings_of`); errors are in the words of its flags."""
    kwargs = dict(recipe.model_kwargs)
    if checkpoint.package != "timm" and kwargs != checkpoint.args.get("model_kwargs"):
        raise CheckpointError(
            f"{checkpoint.path} holds a model of {checkpoint.package} and says how it is built: leave model_kwargs out"
        )
    if checkpoint.kind == "pth":
        kwargs["in_chans"] = recipe.in_chans
    with arguments_as(model="--model", join="--join-type", pe="--pe", size="--input-size", ema="--ema"):
        return restore(
            checkpoint, size=size, ema=recipe.ema, model=recipe.model, join=recipe.join_type, pe=recipe.pe, **kwargs
        )


def restore_to_draw(
    checkpoint: Checkpoint,
    model_name: str | None = None,
    *,
    size: Size | None = None,
    ema: bool = False,
    join: str | None = None,
    pe: str | None = None,
) -> tuple[nn.Module, str]:
    """The model of a file whose positions are looked at, and the name of its folder of pictures.

    Args:
        model_name: names the folder (None: the model's and the join's name); deit_{t,s,b}[_distill]_... also says the
            model of a file that holds weights only, whose widths and depth are read off the weights.
        size: where neither the file nor its table says one.
    """
    args = checkpoint.args
    dimensions = {} if "model_kwargs" in args else _dimensions(checkpoint.model)
    width = dimensions.get("embed_dim")
    model = restore(
        checkpoint,
        size=None if checkpoint.kind == "folder" or size_of(checkpoint) else size,
        ema=ema,
        model=args.get("model") or deit_named(model_name, width if isinstance(width, int) else None),
        join=join or args.get("join_type") or _guess_join(checkpoint, model_name),
        pe=pe or args.get("pe") or _guess_pe(checkpoint),
        **dimensions,
    )
    name = re.sub(r"[/\\]", "_", str(args.get("model", type(model).__name__)))
    return model, model_name or f"{name}_{describe(model).join}"


def is_checkpoint(name: str) -> bool:
    """Whether a name is that of a file or folder that is there, or an address; a model of timm has neither."""
    return name.startswith((HUB, "https://")) or Path(name).exists()


def published(name: str, pretrained: bool = True) -> nn.Module:
    """A model of timm by its name, not converted, with its published weights or, not `pretrained`, random ones.

    Raises LapeError where the weights are not here, or there is no such model.
    """
    try:
        return host_of_library("timm").build(name, {"pretrained": pretrained})  # type: ignore[misc]
    except (OSError, RuntimeError) as error:  # no network, no weights
        raise LapeError(
            f"the weights of {name} are not here ({reason_of(error)[:120]}): give a checkpoint, or "
            "--no-pretrained for random ones"
        ) from None


def _reconcile(checkpoint: Checkpoint, name: str, value: str | None) -> str:
    """The value of an argument: the given one, else what the file says. Raises CheckpointError where both differ, or
    neither is there."""
    entry = checkpoint.args.get("join_type" if name == "join" else name)
    if value is None and entry is None:
        raise CheckpointError(f"{checkpoint.path} does not say its {name}: give `{name}`")
    if value is not None and entry is not None and value != entry:
        raise CheckpointError(f"`{name}` {value} was given, but {checkpoint.path} holds a model with {name} {entry}")
    return str(entry if value is None else value)


def _arguments(checkpoint: Checkpoint, size: Size | None, user_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model: those of the file, the given ones, the image size. Raises CheckpointError."""
    args, file_size = checkpoint.args, size_of(checkpoint)
    kwargs = {**(args.get("model_kwargs") or {}), **user_kwargs}
    if checkpoint.package == "timm" and checkpoint.num_classes is not None:
        kwargs.setdefault("num_classes", checkpoint.num_classes)
    if args.get("in_chans") is not None:
        kwargs.setdefault("in_chans", args["in_chans"])
    sides = file_size if size is None else _sides(size)
    if checkpoint.kind == "folder" and file_size in (sides, None):  # built by its own arguments
        return kwargs
    if sides is None:
        raise CheckpointError(f"{checkpoint.path} does not say its image size: give `size`")
    argument = _size_argument(checkpoint, sides, file_size) if checkpoint.kind == "folder" else "img_size"
    return {**kwargs, argument: sides[0] if sides[0] == sides[1] else sides}


def _size_argument(checkpoint: Checkpoint, size: Grid, file_size: Grid | None) -> str:
    """The name of the argument that resizes the model of a folder. Raises CheckpointError where there is none."""
    fix = f"it is for {file_size[0]} x {file_size[1]} pixels; leave `size` out" if file_size else "leave `size` out"
    if checkpoint.raw.get("folded"):
        raise CheckpointError(f"{checkpoint.path} is folded, images of {size[0]} x {size[1]} do not fit: {fix}")
    if checkpoint.package == "timm":
        return "img_size"
    if "image_size" not in (checkpoint.args.get("model_kwargs") or {}):
        raise CheckpointError(f"{checkpoint.path} cannot be resized to {size[0]} x {size[1]} pixels: {fix}")
    return "image_size"


def size_of(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """(height, width) in pixels of the images that the model of a file is for: by its flags, its arguments, its folder,
    or the grid of its position table, taken for a square. None where none of them tells."""
    kwargs = _by_flag_names(checkpoint.args.get("model_kwargs") or {})
    for source in (checkpoint.args, kwargs, checkpoint.raw):
        if source.get("input_size") and all(_sides(source["input_size"])):  # zeros: of a model left as it is
            return _sides(source["input_size"])
    patch, side = checkpoint.model.get("patch_embed.proj.weight"), _table_side(checkpoint)
    stem = any(name.startswith("patch_embed.backbone.") for name in checkpoint.model)  # pixels are not patches x kernel
    return None if patch is None or side is None or stem else (side * patch.shape[-2], side * patch.shape[-1])


def _table_side(checkpoint: Checkpoint) -> int | None:
    """The rows of the square grid that a file's position table is for, whose first rows may be those of one or two
    other tokens: n^2 + 1 and n^2 + 2 are no squares, so only one number fits."""
    names = ("pos_embed", "pos_embed0", "blocks.0.attn.relative_position_index")  # (n, n) in the authors' files
    table = next((checkpoint.model[name] for name in names if name in checkpoint.model), None)
    if table is None:
        return None
    counts = [table.shape[-2] - prefix for prefix in (0, 1, 2)]
    return next((math.isqrt(n) for n in counts if n > 0 and math.isqrt(n) ** 2 == n), None)


def source_grid(checkpoint: Checkpoint, model: nn.Module) -> Grid | None:
    """The (rows, columns) that a file's position table is for, None when it has no table or `model` is not known.

    Its patch size is that of its patch embedding, the model's where that has another name.
    """
    with of_file(checkpoint.path):
        anatomy = conversion_of(model).anatomy
        if not anatomy.blocks:  # left as it is, nothing is known of its grid
            return None
        if checkpoint.raw.get("grid"):
            rows, columns = checkpoint.raw["grid"]
            return rows, columns
        size = size_of(checkpoint)
        if size is None:
            side = _table_side(checkpoint)
            return None if side is None else (side, side)
        patch, patches = anatomy.patch_size, checkpoint.model.get("patch_embed.proj.weight")
        if patches is not None:  # a stem may stand before them: compare kernels, not kernel and pixels
            projection = getattr(getattr(anatomy.root, "patch_embed", None), "proj", None)
            kernel = patch if projection is None else projection.weight.shape[-2:]
            patch = (patch[0] * patches.shape[-2] // kernel[0], patch[1] * patches.shape[-1] // kernel[1])
        return size[0] // patch[0], size[1] // patch[1]


# No flag may contradict these; the rest of FILE_SETTINGS yields to flags.
IDENTITY = ("model", "join_type", "pe", "in_chans", *CHOICES.values())


def transform_of(checkpoint: Checkpoint) -> EvalTransform:
    """The stored evaluation transform; else a recipe's, at the model's own size, (height, width) where not square."""
    with of_file(checkpoint.path):
        if checkpoint.transform:
            return EvalTransform.from_dict(checkpoint.transform)
        from lape.recipe import Recipe

        transform = eval_transform(settings_of(checkpoint, Recipe()))
        size = size_of(checkpoint)
        square = size is None or len(set(size)) == 1
        return transform if size is None or square else replace(transform, input_size=(size[-2], size[-1]))


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor (timm, torchvision), or `.logits` (transformers)."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def count_classes(checkpoint: Checkpoint, model: nn.Module, input_size: Size, in_chans: int) -> int:
    """The number of classes that a model tells apart, found by classifying an empty image.

    Raises CheckpointError where it has no classifier, or gives no (1, K) logits for an image of this size.
    """
    height, width = _sides(input_size)
    parameter = next(model.parameters())
    with torch.no_grad(), of_file(checkpoint.path):
        output = model(torch.zeros(1, in_chans, height, width, device=parameter.device, dtype=parameter.dtype))
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if getattr(model, "num_classes", None) == 0 or logits is None or logits.ndim != 2:
        raise CheckpointError(
            f"{checkpoint.path} holds a {type(model).__name__} without a classifier: save one that ends in class "
            "logits (timm with num_classes, ...ForImageClassification), or look at it with lape visualize"
        )
    return logits.shape[1]


def labels_of(model: nn.Module) -> list[str] | None:
    """The class names in the configuration of a transformers model, None where it has none."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return None if not labels else [labels[number] for number in sorted(labels)]


def settings_of(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe, with what the checkpoint says of itself wherever the user gave no flag.

    Raises CheckpointError where a flag names another model, join, position embedding or channel count.
    """
    from lape.recipe import Recipe

    with of_file(checkpoint.path):
        contents = _by_flag_names(checkpoint.args.get("model_kwargs") or {})
        contents |= _by_flag_names(checkpoint.transform or {}) | checkpoint.args
        entries = {name: contents[name] for name in FILE_SETTINGS if contents.get(name) is not None}
        # an evaluation has no flags for these: the file's, even None
        choices = {name: contents.get(name) for name in CHOICES.values()}
        entries |= {**choices, "warm_start": bool(choices["warm_start"])}
        size = entries.pop("input_size", None) or size_of(checkpoint)
        if size is not None and _sides(size)[0] == _sides(size)[1]:  # not square: only the transform can say it
            entries["input_size"] = _sides(size)[0]
        if checkpoint.kind == "folder":
            entries.setdefault("in_chans", 3)
        flags = recipe.model_fields_set
        settings = recipe.replace(**{name: value for name, value in entries.items() if name not in flags})
        # a recipe has them in the same spelling as the flags
        _check_identity(settings, Recipe(**{name: entries[name] for name in IDENTITY if name in entries}), checkpoint)
        return settings


def _check_identity(settings: Recipe, file_recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where settings name another model than the file does."""
    for name in IDENTITY:
        entry, value = getattr(file_recipe, name), getattr(settings, name)
        if name in file_recipe.model_fields_set and value != entry:
            raise CheckpointError(
                f"{name}={value!r} contradicts {checkpoint.path}, which was trained with {name}={entry!r}: leave the "
                "flag out"
            )


def _by_flag_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a transform or a model of a library calls by another name than the flags do."""
    flags = {"crop_ratio": "eval_crop_ratio", "num_channels": "in_chans", **dict.fromkeys(SIZE_NAMES, "input_size")}
    inner = arguments.get("vision_config")  # of a model for images and texts
    arguments = {**(inner if isinstance(inner, Mapping) else {}), **arguments}
    return {flags.get(name, name): value for name, value in arguments.items()}


def _sides(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def check_classes(checkpoint: Checkpoint, classes: list[str]) -> None:
    if checkpoint.classes is not None and checkpoint.classes != classes:
        differences = sorted(set(checkpoint.classes) ^ set(classes))[:3] or classes[:3]
        raise DataError(
            f"the data has {len(classes)} classes, {checkpoint.path} was trained on {len(checkpoint.classes)} others "
            f"(they differ in {', '.join(differences)}): their numbers would not match; give the data it was trained on"
        )
    if checkpoint.num_classes is not None:
        check_outputs(checkpoint, classes, checkpoint.num_classes)


def check_outputs(checkpoint: Checkpoint, classes: list[str], outputs: int) -> None:
    """Raises DataError where the data has more classes than the model has outputs."""
    if outputs < len(classes):
        raise DataError(
            f"the data has {len(classes)} classes, the head of {checkpoint.path} has {outputs} outputs: "
            "give the data it was trained on"
        )


def _dimensions(state: dict[str, Tensor]) -> dict[str, int | float]:
    """The arguments of a timm model that the shapes in a DeiT-style state dict tell.

    The number of heads shows in no shape but that of a relative bias; elsewhere it does not touch positions: 1.
    """
    try:
        patch, mlp = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"]
    except KeyError:
        return {}
    bias = state.get("blocks.0.attn.relative_position_bias_table")
    return {
        "embed_dim": patch.shape[0],
        "patch_size": patch.shape[-1],
        "in_chans": patch.shape[1],
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "mlp_ratio": mlp.shape[0] / mlp.shape[1],
        "num_heads": 1 if bias is None else bias.shape[1],
    }


_DEIT_NAME = re.compile(r"deit_([tsb])_(distill_)?(.*)")


def deit_named(model_name: str | None, width: int | None = None) -> str | None:
    """The timm model that the authors' --model_name stands for: deit_t_LaPE, deit_s_distill_basic, ...; else None.

    `width`: of the weights, which decide where they are those of a DeiT.
    """
    match = _DEIT_NAME.match(model_name or "")
    if not match:
        return None
    size = {192: "tiny", 384: "small", 768: "base"}.get(width or 0, {"t": "tiny", "s": "small", "b": "base"}[match[1]])
    return f"deit_{size}_{'distilled_' if match[2] else ''}patch16_224"


def _guess_join(checkpoint: Checkpoint, model_name: str | None) -> str | None:
    """The join of a file without flags: by norms of position, tables, or the authors' --model_name; else None."""
    names = checkpoint.model
    if any(".pe_norm." in name for name in names):
        return "LaPE"
    if "pos_embed1" in names:
        return "unshare"
    match = _DEIT_NAME.match(model_name or "")
    return match[3] if match and match[3] in ("basic", "share") else None


def _guess_pe(checkpoint: Checkpoint) -> str:
    """The kind of a file without flags, by its table: 1D_sin has two axes there, 2D_sin zeros for the class token."""
    table = checkpoint.model.get("pos_embed")
    if table is None:
        has_bias = any(name.endswith("relative_position_bias_table") for name in checkpoint.model)
        return "2D_RPE" if has_bias else "learnable"
    if table.ndim == 2:
        return "1D_sin"
    return "learnable" if table[0, 0].any() else "2D_sin"
