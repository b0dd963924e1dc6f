"""What is trained: the model of a recipe, the weights it starts from, and the teacher beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import resample_patch_embed
from torch import Tensor, nn

import lape.models  # noqa: F401  a teacher may be one of them
from lape.convert.apply import create_model
from lape.convert.converted import conversion_of
from lape.core.position import Grid, Layout, resample, rows_of
from lape.data.augment import eval_transform
from lape.errors import CheckpointError, LapeError, check_finite, reason_of
from lape.files.names import load_reference_state_dict, reference_names, to_reference_state_dict
from lape.files.read import Checkpoint, read_checkpoint
from lape.files.restore import source_grid
from lape.files.vet import of_file
from lape.names import few, nearest
from lape.recipe import Recipe
from lape.train.progress import Say

PATCHES = "patch_embed.proj.weight"
OTHER_THERE = {
    "vit_small_patch16_224": "width 768, depth 8, 48.8 M parameters: --model-kwargs embed_dim=768 depth=8 num_heads=8 "
    "mlp_ratio=3 qkv_bias=False"
}
"""Names that mean another model in the LaPE authors' code, and how to get it."""


def check_warm_start(recipe: Recipe, checkpoint: Checkpoint | None) -> None:
    """Raises LapeError where a warm start means nothing. `checkpoint`: that a run goes on from."""
    if not recipe.warm_start:
        return
    if checkpoint is None and not (recipe.finetune or recipe.model_kwargs.get("pretrained")):
        raise LapeError(
            "warm_start=True keeps what a pretrained model computes, and none is named: add --finetune CHECKPOINT or "
            "--model-kwargs pretrained=True, or leave --warm-start out"
        )
    if recipe.pe != "learnable":
        raise LapeError(
            f"warm_start=True with pe={recipe.pe!r}: it keeps the pretrained model's own table; leave --pe out"
        )
    if recipe.attn_only:
        raise LapeError(
            "warm_start=True with attn_only=True: the gates would stay closed, they do not learn there; leave one out"
        )


def build_model(recipe: Recipe, num_classes: int, say: Say = print, classes: Sequence[str] | None = None) -> nn.Module:
    """The model of a recipe, the same in every process; with the weights of `finetune` where it names a file.

    `classes`: the data's, in the order of the outputs.
    """
    flags = {"num_classes": "the data says it", "img_size": "--input-size", "in_chans": "--in-chans"}
    flags |= {"drop_rate": "--drop", "drop_path_rate": "--drop-path"}
    for name in recipe.model_kwargs.keys() & flags.keys():
        raise LapeError(f"model_kwargs {name}={recipe.model_kwargs[name]!r} has a place of its own: {flags[name]}")
    if recipe.model in OTHER_THERE and not recipe.model_kwargs:
        say(f"This is timm's {recipe.model}; the LaPE authors' has {OTHER_THERE[recipe.model]}")
    drop = {"drop_rate": recipe.drop}
    if recipe.drop and "drop" in recipe.as_original and recipe.model.startswith(("deit_", "vit_")):
        drop = {"pos_drop_rate": recipe.drop, "proj_drop_rate": recipe.drop}  # timm's drop_rate is the head's
    torch.manual_seed(recipe.seed)
    model = create_model(
        recipe.model,
        join=recipe.join_type,
        pe=None if recipe.warm_start else recipe.pe,
        warm_start=recipe.warm_start,
        std=recipe.pe_std,
        pe_norm=recipe.pe_norm,
        num_classes=num_classes,
        img_size=recipe.input_size,
        in_chans=recipe.in_chans,
        drop_path_rate=recipe.drop_path,
        **{**drop, **recipe.model_kwargs},
    )
    if recipe.rope_jitter is not None:
        way: Any = model.lape
        if not hasattr(way, "jitter"):
            raise LapeError(
                f"rope_jitter={list(recipe.rope_jitter)} with pe={recipe.pe!r}: it moves the places of rotary "
                "position; use pe='RoPE' or 'RoPE-mixed', or leave it out"
            )
        way.jitter = recipe.rope_jitter
    if "init" in recipe.as_original and not recipe.model_kwargs.keys() & {"pretrained", "checkpoint_path"}:
        _start_as_original(model)
    if recipe.finetune:
        antialias = "resize" not in recipe.as_original
        load_weights(model, read_checkpoint(recipe.finetune), say, classes, antialias=antialias)
    if recipe.attn_only:
        _train_attention_only(model)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    distills, has_head = recipe.distillation_type != "none", hasattr(model, "set_distilled_training")
    if distills and not has_head:
        raise LapeError(
            f"model {recipe.model!r} has no distillation head: use a distilled one, such as "
            "deit_tiny_distilled_patch16_224, or --distillation-type none"
        )
    if has_head and (distills or "heads" in recipe.as_original):
        model.set_distilled_training(True)  # type: ignore[operator]
    return model


def _start_as_original(model: nn.Module) -> None:
    """The class token from std 0.02 (timm's 1e-6 leaves it nothing under LaPE), new biases on logits from 0."""
    for name, parameter in model.named_parameters():
        if name == "cls_token":
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.startswith("lape.") and name.endswith(".relative_position_bias_table"):
            nn.init.zeros_(parameter)


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    say: Say = print,
    classes: Sequence[str] | None = None,
    *,
    antialias: bool = True,
) -> None:
    """Start a model from another's weights, as far as they can be carried over.

    A position table is resampled to the model's grid, a patch embedding to its patch size (pseudo-inverse resize,
    FlexiViT: Beyer et al. 2023). The distillation token of the file, with its row of the table and its head, is left
    out where the model has none. A head for another number of classes starts anew, and so do PE norms, gates and a
    head that the file lacks. The outputs of a head for the same `classes` in another order are put into theirs; that
    of as many others is kept, as in DeiT. What is left out, resized, moved or anew is said in one line, by reason.

    Raises:
        CheckpointError: any other difference between file and model; weights of another join for a warm start, whose
            function it could not keep.
        NotFiniteError: weights that are NaN or infinite.
    """
    if checkpoint.package != "timm":
        raise CheckpointError(
            f"{checkpoint.path} holds a model of {checkpoint.package}, training builds those of timm: give weights of "
            "a timm model, or train it in Python (lape.load, then its own trainer)"
        )
    if checkpoint.raw.get("folded"):
        raise CheckpointError(
            f"{checkpoint.path} is folded, its positions are constants that cannot learn: give the unfolded weights"
        )
    _check_kept_function(model, checkpoint)
    ours, theirs = to_reference_state_dict(model), dict(checkpoint.model)
    for name, tensor in theirs.items():
        check_finite(tensor, f"the weights {name} of {checkpoint.path}")
    head_note = _order_head(theirs, checkpoint.classes, classes)
    grid = source_grid(checkpoint, model)
    foreign = _leave_distillation(ours, theirs)
    patch_note = _resize_patches(ours, theirs)
    reasons = {name: _why_anew(name, tensor, theirs.get(name)) for name, tensor in ours.items()}
    initial = {name: tensor for name, tensor in ours.items() if reasons[name]}
    rest = {name: tensor for name, tensor in theirs.items() if name not in initial}
    model_grid = conversion_of(model).layout.grid
    plain = {} if antialias else _resize_plainly(conversion_of(model).layout, rest, grid)
    rest |= plain
    try:
        load_reference_state_dict(model, initial | rest, source_grid=None if plain else grid)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_advice(ours, theirs)}") from None
    by_reason = {reason: [name for name in initial if reasons[name] == reason] for reason in reasons.values() if reason}
    notes = [
        *(f"{reason} (start anew): {few(names, 4)}" for reason, names in by_reason.items()),
        f"left out: {few(foreign, 4)}" if foreign else "",
        patch_note,
        head_note,
        f"position table resampled from a grid of {grid[0]} x {grid[1]}"
        if grid not in (None, model_grid) and "pos_embed" in theirs
        else "",
    ]
    say(f"Fine-tuning from {checkpoint.path}. {'; '.join(note for note in notes if note)}".rstrip(". ") + ".")


def _resize_plainly(layout: Layout, tensors: Mapping[str, Tensor], grid: Grid | None) -> dict[str, Tensor]:
    """The tables of a file for `grid` at the model's, as DeiT resizes them: bicubic without antialiasing."""
    if grid is None or grid == layout.grid:
        return {}
    source = replace(layout, grid=grid)
    tables = {name: rows_of(table) for name, table in tensors.items() if re.fullmatch(r"pos_embed\d*", name)}
    return {
        name: resample(rows_1RD, source, layout.grid, antialias=False)
        for name, rows_1RD in tables.items()
        if rows_1RD.shape[1] == source.num_rows
    }


def _order_head(theirs: dict[str, Tensor], file_classes: Sequence[str] | None, classes: Sequence[str] | None) -> str:
    """Put a head's outputs into the order of the data's classes, where both have the same; what there is to say."""
    if not file_classes or not classes or list(file_classes) == list(classes) or len(file_classes) != len(classes):
        return ""
    if set(file_classes) != set(classes):
        odd = [name for name in classes if name not in file_classes]
        return f"the head is that of other classes ({few(odd, 4)} were not among them), as many, and is kept"
    order = torch.tensor([list(file_classes).index(name) for name in classes])
    for name, tensor in theirs.items():
        if name.startswith(("head.", "head_dist.")) and len(tensor) == len(order):
            theirs[name] = tensor[order]
    return "the outputs of the head put into the order of the data's classes"


def _why_anew(name: str, ours: Tensor, theirs: Tensor | None) -> str:
    """Why a weight keeps its start, "" when it comes from the file or must."""
    if name.startswith(("head.", "head_dist.")):
        if theirs is None:
            return "a head that the file lacks"
        return "" if theirs.shape == ours.shape else "a head for another number of classes"
    reasons = {
        ".pe_norm.": "the norms of position, which the file's join lacks",
        ".pe_gate": "the gates of the warm start, at zero",
        ".peg.": "the generator of position, which the file's model lacks",
    }
    return next((reason for mark, reason in reasons.items() if theirs is None and mark in name), "")


def _check_kept_function(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where a warm start would not begin with what the checkpoint computes."""
    conversion = conversion_of(model)
    join = checkpoint.args.get("join_type") or "basic"
    if any(".pe_norm." in name for name in checkpoint.model) and join == "basic":
        join = "LaPE"  # a file without flags
    goes_on = bool(checkpoint.args.get("warm_start")) and join == conversion.join
    if conversion.warm_start and join != "basic" and not goes_on:
        raise CheckpointError(
            f"warm_start=True starts from a model that adds its position to the input (join basic), {checkpoint.path} "
            f"has join {join}: leave --warm-start out"
        )


def _advice(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """What to do where the file's join shows in its names and is not the model's."""
    for mark, fix in (
        (".pe_gate", "it comes from a warm start: add --warm-start"),
        (".pe_norm.", "it has norms of position: add --join-type LaPE"),
    ):
        if any(mark in name for name in theirs) and not any(mark in name for name in ours):
            return f"; {fix}"
    return ""


def _leave_distillation(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Take a distilled model's second token out of `theirs` where ours has none: its row is the second of a table."""
    foreign = [name for name in theirs if name.startswith(("head_dist.", "dist_token")) and name not in ours]
    if "dist_token" in foreign:
        for name, table in theirs.items():
            if name.startswith("pos_embed"):
                theirs[name] = torch.cat([table[..., :1, :], table[..., 2:, :]], dim=-2)
                foreign.append(f"row 1 of {name}")
    for name in foreign:
        theirs.pop(name, None)
    return foreign


def _resize_patches(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    if PATCHES not in ours or PATCHES not in theirs:
        return ""
    new, old = ours[PATCHES].shape[-2:], theirs[PATCHES].shape[-2:]
    if new == old:
        return ""
    theirs[PATCHES] = resample_patch_embed(theirs[PATCHES], list(new))
    return f"patch embedding resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} pixels"


def trainable(model: nn.Module) -> int:
    """How many parameters learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _train_attention_only(model: nn.Module) -> None:
    """As DeiT does: attention, the position table and the heads learn, all else is frozen."""
    heads = model.get_classifier()  # type: ignore[operator]
    heads = heads if isinstance(heads, tuple) else (heads,)
    head_ids = {id(parameter) for head in heads for parameter in head.parameters()}
    names = reference_names(model)
    for name, parameter in model.named_parameters():
        learns = ".attn." in names.get(name, name) or name.endswith("pos_embed") or id(parameter) in head_ids
        parameter.requires_grad_(parameter.requires_grad and learns)


class Teacher(nn.Module):
    """A frozen classifier that sees the student's images in its own normalisation: (B, C, H, W) -> logits (B, K)."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, student: tuple[Any, Any], normalisation: tuple[Any, Any], order: list[int] | None = None
    ) -> None:
        """`student`, `normalisation`: mean and deviation of each; `order`: the outputs of the student's classes."""
        super().__init__()
        self.model = model
        self.order = order
        self.same_normalisation = student == normalisation
        (mean, std), (teacher_mean, teacher_std) = (
            (torch.tensor(m).view(1, -1, 1, 1), torch.tensor(s).view(1, -1, 1, 1)) for m, s in (student, normalisation)
        )
        self.register_buffer("scale", std / teacher_std)
        self.register_buffer("shift", (mean - teacher_mean) / teacher_std)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images if self.same_normalisation else images * self.scale + self.shift)
        return logits if self.order is None else logits[:, self.order]


def load_teacher(
    recipe: Recipe, num_classes: int, device: torch.device, say: Say = print, classes: Sequence[str] | None = None
) -> Teacher | None:
    """The teacher of a recipe. Its normalisation is that of its checkpoint, else that of timm's configuration.

    Its outputs are those of the data's `classes`, by the names that its file stores; it may know more classes. Raises
    LapeError for an unknown name, a file that is not of that model and these classes, images that it cannot see, and
    outputs that are not finite.
    """
    if recipe.distillation_type == "none":
        return None
    import timm

    name = recipe.teacher_model
    if not timm.is_model(name.split(".")[0]) or ("." in name and name not in timm.list_pretrained()):
        guess = nearest(name, timm.list_pretrained() if "." in name else timm.list_models())
        raise LapeError(f"unknown teacher_model {name!r}{f'; did you mean {guess!r}?' if guess else ''}")
    checkpoint = read_checkpoint(recipe.teacher_path)
    order = _outputs_of(checkpoint, classes)
    num_classes = len(checkpoint.classes or []) if order else num_classes
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=recipe.in_chans)
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        raise CheckpointError(
            f"{recipe.teacher_path} is not a {name} with {num_classes} classes ({reason_of(error)[:300]}): "
            "give the teacher's --teacher-model, trained on the same classes"
        ) from None
    transform = eval_transform(recipe)
    student = (tuple(transform.mean), tuple(transform.std))
    source, config = (
        ("its checkpoint", checkpoint.transform) if checkpoint.transform else ("timm", model.pretrained_cfg)
    )
    assert isinstance(config, dict)
    with of_file(checkpoint.path):
        normalisation = (tuple(config["mean"]), tuple(config["std"]))
    if len(normalisation[0]) != recipe.in_chans:
        source, normalisation = "the student: its own has other channels", student
    teacher = Teacher(model, student, normalisation, None if order == [*range(num_classes)] else order).to(device)
    try:
        logits = teacher(torch.zeros(1, recipe.in_chans, recipe.input_size, recipe.input_size, device=device))
    except (AssertionError, RuntimeError) as error:
        raise LapeError(f"teacher_model {name!r} cannot see images of {recipe.input_size} pixels: {error}") from None
    check_finite(logits, f"the outputs of the teacher {recipe.teacher_path}")
    mean, std = normalisation
    say(
        f"Teacher: {name} from {recipe.teacher_path}; normalisation of {source}: mean {mean}, std {std}"
        + ("" if order else "; no class names are stored, its outputs are taken for the data's classes in their order")
    )
    return teacher


def _outputs_of(checkpoint: Checkpoint, classes: Sequence[str] | None) -> list[int] | None:
    """The outputs of a teacher for the data's classes, None where its file names none. Raises CheckpointError."""
    file_classes = checkpoint.classes
    if not file_classes or not classes:
        return None
    missing = [name for name in classes if name not in file_classes]
    if missing:
        raise CheckpointError(
            f"the teacher {checkpoint.path} was trained on other classes, it lacks {few(missing, 4)}: give one that "
            "knows the classes of the data"
        )
    return [file_classes.index(name) for name in classes]
