"""From what a file says to a model: its settings, its transform, its class names, its size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lape.convert import build, fold_
from lape.data.augment import EvalTransform, eval_transform
from lape.errors import CheckpointError, DataError
from lape.files.read import Checkpoint, read_checkpoint
from lape.joins import join_named
from lape.layers import Size, describe
from lape.position import kind_named
from lape.recipe import Recipe
from lape.record import conversion_of
from lape.reference import load_reference_state_dict


def model_from_checkpoint(
    checkpoint: Checkpoint,
    *,
    model: str | None = None,
    join: str | None = None,
    pe: str | None = None,
    input_size: int | tuple[int, int] | None = None,
    ema: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """The converted model of a checkpoint, in eval mode. What is None is taken from the file.

    Raises CheckpointError when the file does not say something that is needed, contradicts what was given, or does
    not fit the model; LapeError for unknown names.
    """
    state = checkpoint.model_ema if ema else checkpoint.model
    if state is None:
        raise CheckpointError(f"{checkpoint.path} holds no averaged (EMA) weights")
    kwargs = {**(checkpoint.args.get("model_kwargs") or {}), **timm_kwargs}
    if "img_size" not in kwargs and (checkpoint.kind == "pth" or input_size is not None):
        kwargs["img_size"] = checkpoint.setting("input_size", input_size)
    if checkpoint.package == "timm" and checkpoint.num_classes is not None:
        kwargs.setdefault("num_classes", checkpoint.num_classes)
    if (in_chans := checkpoint.args.get("in_chans")) is not None:
        kwargs.setdefault("in_chans", in_chans)
    warm_start = bool(checkpoint.args.get("warm_start"))
    made = build(
        checkpoint.package,
        checkpoint.setting("model", model),
        kwargs,
        checkpoint.setting("join_type", None if join is None else join_named(join).name),
        None if warm_start else checkpoint.setting("pe", None if pe is None else kind_named(pe).name),
        warm_start=warm_start,
    )
    if checkpoint.raw.get("folded"):
        fold_(made)
    return load_reference_state_dict(made, state).eval()


# What a checkpoint knows about itself. The first must not be contradicted by a flag.
IDENTITY = ("model", "join_type", "pe", "in_chans", "warm_start")
STORED = ("model", "join_type", "pe", "in_chans", "model_kwargs", "input_size", "eval_crop_ratio", "mean", "std")


def transform_of(checkpoint: Checkpoint) -> EvalTransform:
    """The stored evaluation transform; else a recipe's, at the model's own size, (height, width) where not square."""
    if checkpoint.transform:
        return EvalTransform.from_dict(checkpoint.transform)
    transform = eval_transform(settings_of(checkpoint, Recipe()))
    size = stored_size(checkpoint)
    return transform if size is None or size[0] == size[1] else replace(transform, input_size=size)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor (timm, torchvision), or `.logits` (transformers)."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def check_classifier(checkpoint: Checkpoint, model: nn.Module, input_size: int | tuple[int, int], in_chans: int) -> int:
    """The number of classes that a model tells apart, found by classifying an empty image.

    Raises:
        CheckpointError: it has no classifier, or gives no (1, K) logits for an image of this size.
    """
    height, width = _sides(input_size)
    parameter = next(model.parameters())
    with torch.no_grad():
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

    Raises:
        CheckpointError: a flag that was given names another model, join, position embedding or channel count.
    """
    size = stored_size(checkpoint)
    said = _renamed(checkpoint.args.get("model_kwargs") or {}) | _renamed(checkpoint.transform or {}) | checkpoint.args
    stored = {name: said[name] for name in STORED if said.get(name) is not None}
    stored["warm_start"] = bool(said.get("warm_start"))  # no flag of an evaluation: the file alone knows
    stored.pop("input_size", None)
    if size is not None and size[0] == size[1]:  # not square: only the transform can say it
        stored["input_size"] = size[0]
    if checkpoint.kind == "folder":
        stored.setdefault("in_chans", 3)
    given = recipe.model_fields_set
    asked = recipe.replace(**{name: value for name, value in stored.items() if name not in given})
    known = Recipe(**{name: stored[name] for name in IDENTITY if name in stored})  # the same spelling as the flags
    for name in IDENTITY:
        if name in stored and getattr(asked, name) != getattr(known, name):
            raise CheckpointError(
                f"{name}={getattr(asked, name)!r} contradicts {checkpoint.path}, which was trained with "
                f"{name}={getattr(known, name)!r}: leave the flag out"
            )
    return asked


def _renamed(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a transform or a model of a library calls by another name than the flags do."""
    flags = {"crop_ratio": "eval_crop_ratio", "num_channels": "in_chans"}
    flags |= dict.fromkeys(_SIZE_NAMES, "input_size")
    inner = said.get("vision_config")  # of a model for images and texts
    said = {**(inner if isinstance(inner, Mapping) else {}), **said}
    return {flags.get(name, name): value for name, value in said.items()}


def stored_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that a checkpoint says it is for, None where it does not say."""
    kwargs, transform = (_renamed(said or {}) for said in (checkpoint.args.get("model_kwargs"), checkpoint.transform))
    said = (checkpoint.args, transform, kwargs, checkpoint.raw)
    size = next((one["input_size"] for one in said if one.get("input_size") is not None), None)
    return None if size is None else _sides(size)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def restore_model(checkpoint: Checkpoint, recipe: Recipe, input_size: int | tuple[int, int]) -> nn.Module:
    """The checkpoint's model in eval mode, for images of `input_size` pixels: its position table is resampled.

    A folder of `lape.save` builds its model of any library by its own arguments, folded where it was folded.

    Raises:
        CheckpointError: a folder whose model has one size only and is asked for another, or arguments of a timm model
            for one of another library.
    """
    kwargs = dict(recipe.model_kwargs)
    if checkpoint.kind == "pth":
        kwargs |= {"img_size": input_size, "in_chans": recipe.in_chans}
    elif _sides(input_size) != _own_size(checkpoint):
        kwargs |= _resizing(checkpoint, input_size)
    if checkpoint.package == "timm" and checkpoint.num_classes is not None:
        kwargs["num_classes"] = checkpoint.num_classes
    if checkpoint.package != "timm" and recipe.model_kwargs != checkpoint.args.get("model_kwargs"):
        raise CheckpointError(
            f"{checkpoint.path} holds a model of {checkpoint.package} and says how it is built: leave model_kwargs out"
        )
    warm_start = bool(checkpoint.args.get("warm_start"))
    pe = None if warm_start else recipe.pe
    model = build(checkpoint.package, recipe.model, kwargs, recipe.join_type, pe, warm_start=warm_start)
    if checkpoint.raw.get("folded"):
        return load_reference_state_dict(fold_(model), checkpoint.model).eval()
    return load_reference_state_dict(model, checkpoint.model, source_grid=source_grid(checkpoint, model)).eval()


_SIZE_NAMES = ("img_size", "image_size")  # of timm; of torchvision and transformers


def _own_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(height, width) of the model in a folder, whatever its transform says."""
    return stored_size(replace(checkpoint, raw={**checkpoint.raw, "transform": None}))


def _resizing(checkpoint: Checkpoint, input_size: int | tuple[int, int]) -> dict[str, Any]:
    """The argument that makes the model of a folder for images of another size. Raises CheckpointError."""
    own, asked = _own_size(checkpoint), _sides(input_size)
    fix = f"it is for {own[0]} x {own[1]} pixels; leave --input-size out" if own else "leave --input-size out"
    if checkpoint.raw.get("folded"):
        raise CheckpointError(f"{checkpoint.path} is folded, images of {asked[0]} x {asked[1]} do not fit: {fix}")
    if checkpoint.package == "timm":
        return {"img_size": asked}
    if "image_size" not in (checkpoint.args.get("model_kwargs") or {}):
        raise CheckpointError(f"{checkpoint.path} cannot be resized to {asked[0]} x {asked[1]} pixels: {fix}")
    return {"image_size": input_size}


def averaged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its moving average as the weights. Raises CheckpointError where it holds none."""
    if checkpoint.model_ema is None:
        raise CheckpointError(f"{checkpoint.path} holds no averaged (EMA) weights: leave --ema out")
    return replace(checkpoint, model=checkpoint.model_ema)


def source_grid(checkpoint: Checkpoint, model: nn.Module) -> tuple[int, int] | None:
    """The (rows, columns) that a file's position table is for.

    Its patch size is that of its patch embedding, the model's where that has another name. A file that does not say
    its image size (DeiT's releases) has a square grid. None when it has no table.
    """
    size = checkpoint.args.get("input_size") or (checkpoint.args.get("model_kwargs") or {}).get("img_size")
    patches = checkpoint.model.get("patch_embed.proj.weight")
    anatomy = conversion_of(model).anatomy
    if not anatomy.blocks:  # left as it is, nothing is known of its grid
        return None
    patch = anatomy.patch_size
    if patches is not None:  # a stem may stand before them: compare kernels, not kernel and pixels
        own = getattr(getattr(anatomy.root, "patch_embed", None), "proj", None)
        kernel = patch if own is None else tuple(own.weight.shape[-2:])
        patch = tuple(pixels * new // old for pixels, new, old in zip(patch, patches.shape[-2:], kernel, strict=True))
    if checkpoint.raw.get("grid"):
        return tuple(checkpoint.raw["grid"])
    if size:
        height, width = (size, size) if isinstance(size, int) else size
        return height // patch[0], width // patch[1]
    table = checkpoint.model.get("pos_embed")
    if table is None:
        return None
    prefix = conversion_of(model).layout.prefix_rows
    if "dist_token" in checkpoint.model and prefix == 1:  # the file has a row more for it
        prefix = 2
    side = math.isqrt(table.shape[-2] - prefix)
    return side, side


def check_classes(checkpoint: Checkpoint, classes: list[str]) -> None:
    if checkpoint.classes is not None and checkpoint.classes != classes:
        odd = sorted(set(checkpoint.classes) ^ set(classes))[:3] or classes[:3]
        raise DataError(
            f"the data has {len(classes)} classes, {checkpoint.path} was trained on {len(checkpoint.classes)} others "
            f"(they differ in {', '.join(odd)}): their numbers would not match; give the data it was trained on"
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


def load(
    path: str | PathLike[str], model_name: str | None, join: str | None, pe: str | None, size: Size | None, ema: bool
) -> tuple[nn.Module, str]:
    """The model in a checkpoint, and the name of its folder: `model_name`, or the model's and the join's."""
    checkpoint = read_checkpoint(Path(path))
    said = checkpoint.args
    kwargs = {} if "model_kwargs" in said else dimensions(checkpoint.model)
    model = model_from_checkpoint(
        checkpoint,
        model=None if "model" in said else deit_named(model_name),
        join=join,
        pe=pe,
        input_size=None
        if "input_size" in said or checkpoint.kind == "folder"
        else trained_size(checkpoint.model) or size,
        ema=ema,
        **kwargs,
    )
    name = re.sub(r"[/\\]", "_", str(said.get("model", type(model).__name__)))
    return model, model_name or f"{name}_{describe(model).join}"


def dimensions(state: dict[str, Tensor]) -> dict[str, int | float]:
    """The arguments of a timm model that the shapes in a DeiT-style state dict tell.

    The number of heads shows in no shape but that of a relative bias; elsewhere it does not touch positions: 1.
    """
    try:
        patch, hidden = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"]
    except KeyError:
        return {}
    bias = state.get("blocks.0.attn.relative_position_bias_table")
    return {
        "embed_dim": patch.shape[0],
        "patch_size": patch.shape[-1],
        "in_chans": patch.shape[1],
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "mlp_ratio": hidden.shape[0] / hidden.shape[1],
        "num_heads": 1 if bias is None else bias.shape[1],
    }


def trained_size(state: dict[str, Tensor]) -> int | None:
    """The side in pixels of the square image that a DeiT-style state dict is for, where its position table tells."""
    table, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if table is None or patch is None:
        return None
    patches = table.shape[-2] - sum(key in state for key in ("cls_token", "dist_token"))
    side = math.isqrt(max(patches, 0))
    return side * patch.shape[-1] if side * side == patches else None


def deit_named(model_name: str | None) -> str | None:
    """The timm model that the authors' --model_name stands for: deit_t_LaPE, deit_s_distill_basic, ...; else None."""
    found = re.match(r"deit_([tsb])_(distill_)?", model_name or "")
    if not found:
        return None
    width = {"t": "tiny", "s": "small", "b": "base"}[found[1]]
    return f"deit_{width}_{'distilled_' if found[2] else ''}patch16_224"
