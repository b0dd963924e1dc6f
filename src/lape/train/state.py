"""What a run carries from step to step, how it is written, and how a run goes on from a file.

**Never without a whole file.** A checkpoint is written beside the old one, synced and renamed; the one before it stays
as `previous_checkpoint.pth`. `--resume auto` takes the newest whole one of them and names those that are torn.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lape.convert.converted import conversion_of
from lape.convert.positions import tables_of
from lape.data.augment import eval_transform
from lape.data.loaders import BatchPlan, batch_plan
from lape.data.open import Data
from lape.errors import CheckpointError, LapeError, reason_of
from lape.files.atomic import remove_leftovers, write_atomically
from lape.files.names import load_reference_state_dict, reference_names, to_reference_state_dict
from lape.files.read import Checkpoint, read_checkpoint
from lape.host.timm import NOT_THE_MODEL
from lape.names import few, nearest, printable
from lape.recipe import Recipe
from lape.train.distributed import World, all_of
from lape.train.logs import LOG, RUN, TABLE, write_log
from lape.train.progress import Say

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pth", "previous_checkpoint.pth", "best_checkpoint.pth"
LOCK = ".lock"
_COUNTS = ("loss_sum", "skipped_steps", "skipped_images", "bad_in_row")  # of the epoch under way


@dataclass
class State:
    """What a run carries from step to step; all of it is in `checkpoint.pth`."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's, a function of the epoch; None keeps the learning rate
    scaler: torch.amp.GradScaler
    next_epoch: int
    next_step: int = 0  # of that epoch; not 0 only when a run was stopped within it
    loss_sum: float = 0.0  # over the steps of that epoch so far that were not skipped
    skipped_steps: int = 0  # of that epoch: their loss or gradient was not finite
    skipped_images: int = 0  # of that epoch: they could not be read
    bad_in_row: int = 0  # skipped steps since the last good one
    best_accuracy: float = -1.0  # so that the first epoch is the best until a better one comes
    best_epoch: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    on_device: bool = False  # whether the device decides if a step counts; else this process, which waits for it

    def update(self, good: Tensor, number: int | None) -> None:
        """One step of the optimizer and of the average where `good` (bool, on the device that decides) is true.

        `number`: of the step, for an average that warms up.
        """
        if self.on_device:
            optimizer: Any = self.optimizer
            optimizer.grad_scale, optimizer.found_inf = None, (~good).float()  # as torch's gradient scaler tells it
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            if self.ema is not None:
                _average(self.ema, self.model, good, number)
        elif good:
            self.scaler.step(self.optimizer)
            if self.ema is not None:
                self.ema.update(self.model, number)
        self.scaler.update()
        self.optimizer.zero_grad()

    def better(self, accuracy: float, epoch: int) -> bool:
        """Note what an epoch has reached; whether it is the best so far."""
        if accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_epoch = accuracy, epoch
        return True

    def begin_epoch(self, epoch: int) -> None:
        """Forget what was counted for the epoch that has ended."""
        self.next_epoch, self.next_step = epoch, 0
        self.loss_sum, self.skipped_steps, self.skipped_images = 0.0, 0, 0


# ------------------------------------------------------------------------------------------------ start


def peak_lr(recipe: Recipe, world_size: int) -> float:
    """The learning rate after warm-up: `lr` for 512 images a step, scaled linearly by the total batch (DeiT)."""
    return recipe.lr if recipe.unscale_lr else recipe.lr * batch_plan(recipe, world_size).total / 512


def check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Take a step of the optimizer on a few numbers, before any data is read.

    Raises LapeError where timm has none of this name, or it cannot run here: a package or CUDA is missing, it takes no
    such arguments, or needs second derivatives (which attention does not give).
    """
    names = [str(name) for name in list_optimizers()]
    if recipe.opt.lower().split("_")[-1] not in names:
        guess = nearest(recipe.opt, names)
        raise LapeError(f"unknown opt {recipe.opt!r}{f'; did you mean {guess!r}?' if guess else ''}: a name of timm")
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Linear(2, 2)).to(device)
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(recipe), **_fused(recipe, device))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    except Exception as error:  # they raise what they like, from what they are made of
        reason = reason_of(error)[:160]
        raise LapeError(
            f"opt={recipe.opt!r} cannot run here ({reason}): choose another, such as --opt adamw"
        ) from error


def initial_state(recipe: Recipe, model: nn.Module, world: World) -> State:
    """Optimizer, schedule, EMA and gradient scaler for a model, at the first epoch."""
    with _decay_of(model, recipe):
        settings = {**optimizer_kwargs(recipe), **_fused(recipe, world.device), "lr": peak_lr(recipe, world.size)}
        optimizer = create_optimizer_v2(model, **settings)
    _scale_lr_of_position(optimizer, model, recipe.pe_lr_scale)
    # timm's function of the epoch stays at min_lr behind the end of its own epochs.
    scheduler, _ = create_scheduler(recipe.replace(epochs=recipe.schedule_epochs or recipe.epochs), optimizer)
    ema = None
    if recipe.model_ema:
        device = torch.device("cpu") if recipe.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup, device=device)
    half = recipe.amp in ("fp16", "auto") and world.device.type == "cuda"
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    state = State(model, ema, optimizer, scheduler, scaler, recipe.start_epoch)
    state.on_device = decides(world.device, recipe)
    set_rate(state, recipe, recipe.start_epoch)
    return state


def decides(device: torch.device, recipe: Recipe) -> bool:
    """Whether the device can leave out a step that is not finite: CUDA, with torch's fused Adam or AdamW.

    SGD has a fused kernel as well, which leaves its first momentum undefined where it skips the first step.
    """
    average_there = not (recipe.model_ema and recipe.model_ema_force_cpu)
    return device.type == "cuda" and recipe.opt.lower() in ("adam", "adamw") and average_there


def _fused(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    return {"fused": True} if decides(device, recipe) else {}


@torch.no_grad()
def _average(ema: ModelEmaV3, model: nn.Module, good: Tensor, number: int | None) -> None:
    """What timm's average does in a step, with a weight that the device knows: zero where the step does not count."""
    weight = (1 - ema.get_decay(number)) * good
    averages, values = [], []
    for average, value in zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True):
        if average.is_floating_point():
            averages.append(average)
            values.append(value)
        else:
            average.copy_(torch.where(good, value, average))
    difference = torch._foreach_sub(values, averages)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(averages, difference)


def set_rate(state: State, recipe: Recipe, epoch: int) -> None:
    """Give the optimizer the learning rate of an epoch, a function of its number alone.

    With the original's schedule, epoch e > 0 has the rate that the formula gives for e - 1: it is stepped with `epoch`
    when that epoch has ended, so that the epochs 0 and 1 both have the first rate.
    """
    late = "schedule" in recipe.as_original
    if state.scheduler is not None and not (late and epoch == 0):
        state.scheduler.step(epoch - late)


@contextmanager
def _decay_of(model: Any, recipe: Recipe) -> Iterator[None]:
    """Let weight decay spare what the original spares: class token, the one table, and all of one dimension.

    timm spares the distillation token, too; `lape` all of position: the tables of unshare, new biases on logits.
    """
    names = reference_names(model)
    extra = {
        name
        for name, in_files in names.items()
        if re.fullmatch(r"dist_token|pos_embed\d+", in_files)
        or (name.startswith("lape.") and name.endswith(".relative_position_bias_table"))
    }
    if not extra or "decay" not in recipe.as_original:
        yield
        return
    exceptions = model.no_weight_decay() - extra
    model.no_weight_decay = lambda: exceptions
    try:
        yield
    finally:
        del model.no_weight_decay


def _scale_lr_of_position(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Position tables get groups of their own, behind the others; timm's schedules multiply theirs by `lr_scale`."""
    if scale == 1:
        return
    tables = {id(table) for table in tables_of(conversion_of(model))}
    if not tables:
        raise LapeError(f"pe_lr_scale={scale:g}: the model has no position table that learns; leave it out")
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in tables]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in tables]
            optimizer.add_param_group({**group, "params": mine, "lr_scale": scale})


# ------------------------------------------------------------------------------------------------ write


def check_output(recipe: Recipe, checkpoint: Checkpoint | None, at_end: ExitStack) -> None:
    """Make the output folder and hold it until `at_end`.

    Raises LapeError where it cannot be written, holds another run, or another process is training there.
    """
    if not recipe.output_dir:
        return
    folder = Path(recipe.output_dir)
    files = [name for name in (CHECKPOINT, PREVIOUS, BEST) if (folder / name).exists()]
    if files and (checkpoint is None or checkpoint.path.resolve().parent != folder.resolve()):
        raise LapeError(
            f"output_dir {folder} holds a run already ({', '.join(files)}): go on with --resume {folder / files[0]}, "
            "or choose another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise LapeError(f"output_dir {folder} cannot be written ({error.strerror}): choose another folder") from None
    _hold(folder, at_end)
    for name in (CHECKPOINT, BEST, LOG, TABLE, RUN):  # what a run that was killed while writing has left
        remove_leftovers(folder, f".{name}.*.tmp")


def _hold(folder: Path, at_end: ExitStack) -> None:
    """Let no two processes write there, such as one whose launcher was killed and the one that goes on for it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    # A link is not followed, and nothing is written: whatever lies there keeps its content.
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = at_end.enter_context(os.fdopen(descriptor, "rb+"))
    except OSError as error:
        raise LapeError(f"{folder / LOCK} cannot be opened ({error.strerror}): remove it") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not handed on to the loader's processes
    except (BlockingIOError, PermissionError):
        raise LapeError(
            f"another process is training in output_dir {folder}: wait, end it, or choose another"
        ) from None
    except OSError:  # a file system without locks
        pass


def write_checkpoint(state: State, data: Data, recipe: Recipe, plan: BatchPlan, *, better: bool = False) -> None:
    """Write the checkpoint (and the best one), then the log, whose lines the checkpoint holds, so none can be lost."""
    folder = Path(recipe.output_dir)
    content = {
        "model": to_reference_state_dict(state.model),
        "optimizer": state.optimizer.state_dict(),
        "optimizer_names": _optimizer_names(state),
        "lr_scheduler": state.scheduler.state_dict() if state.scheduler is not None else {},
        "epoch": state.next_epoch - 1,  # the last whole one
        "step": state.next_step,
        **{name: getattr(state, name) for name in _COUNTS},
        "images_per_step": plan.total,
        "model_ema": to_reference_state_dict(state.ema.module) if state.ema is not None else None,
        "scaler": state.scaler.state_dict(),
        "args": _flags(recipe),
        "classes": data.classes,
        "transform": eval_transform(recipe).to_dict(),
        "model_kwargs": _flags(recipe)["model_kwargs"],
        "max_accuracy": state.best_accuracy,
        "best": {"weights": recipe.best_by, "epoch": state.best_epoch, "acc1": state.best_accuracy},
        "history": state.history,
    }
    if better:
        write_atomically(folder / BEST, lambda file: torch.save(content, file))
    write_atomically(folder / CHECKPOINT, lambda file: torch.save(content, file), previous=folder / PREVIOUS)
    write_log(state.history, folder)


# ------------------------------------------------------------------------------------------------ go on


def checkpoint_to_resume(recipe: Recipe, say: Say = print) -> Checkpoint | None:
    """The checkpoint to go on from; `auto` is the newest whole one in `output_dir`, or none in a new folder.

    Raises CheckpointError where the file is not whole; with `auto`, where none of those that are there is.
    """
    if recipe.resume != "auto":
        if not recipe.resume:
            return None
        checkpoint = read_checkpoint(recipe.resume)
        _check_resumable(checkpoint, recipe)  # before a model is built from what the file says
        return checkpoint
    if not recipe.output_dir:
        raise LapeError("--resume auto looks into the output folder: add --output-dir")
    newest, problems = None, []
    paths = [Path(recipe.output_dir) / name for name in (CHECKPOINT, PREVIOUS, BEST)]
    for path in filter(Path.exists, paths):
        try:
            candidate = read_checkpoint(path)
            _check_resumable(candidate, recipe)
        except CheckpointError as error:
            problems.append(str(error))
            say(f"{error}; skipped")
            continue
        if newest is None or _progress_of(candidate) > _progress_of(newest):
            newest = candidate
    if problems and newest is None:
        raise CheckpointError(
            f"--resume auto found no whole checkpoint in {recipe.output_dir} ({'; '.join(problems)}): nothing was "
            "touched; move the files away to start anew"
        )
    return newest


def _progress_of(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.raw.get("epoch", -1), checkpoint.raw.get("step", 0)


def _check_resumable(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises CheckpointError for a file that no run can go on from, LapeError for one that this run cannot."""
    missing = [key for key in ("optimizer", "epoch") if key not in checkpoint.raw]
    if missing:
        raise CheckpointError(f"{checkpoint.path} has no {' and no '.join(missing)}: start from it with --finetune")
    if "optimizer_names" not in checkpoint.raw:
        raise CheckpointError(
            f"{checkpoint.path} was not written by this project (DeiT's and the authors' files do not name the "
            "parameters of their optimizer): start from it with --finetune"
        )
    opt = printable(str(checkpoint.args.get("opt", recipe.opt)))
    if opt.lower() != recipe.opt.lower():
        raise LapeError(
            f"{checkpoint.path} was trained with opt={opt!r}, whose state opt={recipe.opt!r} cannot take over: add "
            f"--opt {opt}, or start from its weights with --finetune"
        )


def agree(checkpoint: Checkpoint | None, world: World) -> None:
    """Make sure that every process goes on from the same place. Raises LapeError in all of them."""
    place = "nothing" if checkpoint is None else "epoch {}, step {}".format(*_progress_of(checkpoint))
    places = all_of(place)
    if len(set(places)) > 1:
        differences = ", ".join(f"process {places.index(text)} from {text}" for text in dict.fromkeys(places))
        raise LapeError(
            f"the processes would go on from different places ({differences}; this one, {world.rank}: "
            f"{checkpoint.path if checkpoint else 'no checkpoint'}): --output-dir and --resume must name a folder that "
            "all machines share"
        )


def resume(state: State, checkpoint: Checkpoint, recipe: Recipe, plan: BatchPlan, say: Say) -> None:
    """Put a run back to where a checkpoint of this project (`checkpoint_to_resume`) was written.

    State comes from the file. Settings (learning rate, schedule, weight decay, ...) are those of `recipe`; when they
    differ from the file's, one line says so.

    Raises:
        CheckpointError: the file does not fit the model.
        LapeError: its run has finished, or was stopped within an epoch of steps of another size.
    """
    raw = checkpoint.raw
    if raw["epoch"] + 1 >= recipe.epochs and recipe.resume != "auto":
        raise LapeError(
            f"{checkpoint.path} has finished epoch {raw['epoch'] + 1} of {recipe.epochs}: raise --epochs, or use --eval"
        )
    step, total = raw.get("step", 0), raw.get("images_per_step", plan.total)
    if step and total != plan.total:
        raise LapeError(
            f"{checkpoint.path} was stopped at step {step} of an epoch of {total} images a step, this run has "
            f"{plan.total}: add --global-batch {total}"
        )
    load_reference_state_dict(state.model, checkpoint.model)
    if state.ema is not None:
        load_reference_state_dict(state.ema.module, checkpoint.model_ema or checkpoint.model)
    _resume_optimizer(state, checkpoint)
    if state.scaler.is_enabled() and raw.get("scaler"):
        state.scaler.load_state_dict(raw["scaler"])
    state.begin_epoch(raw["epoch"] + 1)
    state.next_step = step
    for name in _COUNTS:
        setattr(state, name, raw.get(name, 0))
    set_rate(state, recipe, state.next_epoch)
    state.best_accuracy = raw.get("max_accuracy", state.best_accuracy)
    state.best_epoch = (raw.get("best") or {}).get("epoch")
    state.history = raw["history"] if "history" in raw else _earlier_log(recipe, state.next_epoch)
    within = f" and step {step} of the next" if step else ""
    say(f"Resuming from {checkpoint.path}, after epoch {raw['epoch']}{within}")
    changes = _changed_settings(checkpoint, recipe) if "history" in raw else ""
    if changes:
        say(f"Other settings than that run had, from now on: {changes}")


# Where and how fast a run goes on changes no number.
_INDIFFERENT = {
    *("resume", "output_dir", "data_path", "start_epoch", "eval", "dist_eval", "num_workers", "pin_mem", "threads"),
    *("device", "log_every", "dist_timeout", "model_ema_force_cpu", "save_steps"),
    *("save_minutes", "log_to", "max_skipped"),
}


def _flags(recipe: Recipe) -> dict[str, Any]:
    """The flags that a checkpoint holds: where the first weights came from is no part of the model."""
    flags = recipe.model_dump(mode="json")
    kwargs = {name: value for name, value in flags["model_kwargs"].items() if name not in NOT_THE_MODEL}
    return {**flags, "model_kwargs": kwargs}


def _changed_settings(checkpoint: Checkpoint, recipe: Recipe) -> str:
    flags = _flags(recipe)
    changes = {
        name: (old, flags[name]) for name, old in checkpoint.args.items() if name in flags and old != flags[name]
    }
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items() if name not in _INDIFFERENT)


def _earlier_log(recipe: Recipe, next_epoch: int) -> list[dict[str, Any]]:
    """The lines of an existing log.txt, when the checkpoint (the authors') does not hold them."""
    path = Path(recipe.output_dir) / LOG
    if not recipe.output_dir or not path.is_file():
        return []
    try:
        lines = [dict(json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
        return [line for line in lines if line.get("epoch", -1) < next_epoch]
    except (OSError, ValueError, TypeError, RecursionError):
        raise LapeError(f"{path} is not a log of JSON lines: move it away, it would be overwritten") from None


def _optimizer_names(state: State) -> list[str]:
    """The authors' names of the optimizer's parameters, in its order."""
    names = reference_names(state.model)
    authors_names = {id(parameter): names[name] for name, parameter in state.model.named_parameters()}
    return [authors_names[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def _resume_optimizer(state: State, checkpoint: Checkpoint) -> None:
    """Give each parameter its state by name: another version of timm may order and group parameters differently."""
    theirs, ours = checkpoint.raw["optimizer"], state.optimizer.state_dict()
    their_names = checkpoint.raw["optimizer_names"]
    their_numbers = [number for group in theirs["param_groups"] for number in group["params"]]
    our_names = _optimizer_names(state)
    our_numbers = [number for group in ours["param_groups"] for number in group["params"]]
    if len(their_names) != len(their_numbers) or set(their_names) != set(our_names):
        odd = sorted(set(their_names) ^ set(our_names))
        raise CheckpointError(
            f"the optimizer of {checkpoint.path} has {len(their_numbers)} parameters, this run trains {len(our_names)}"
            f"{f' (differing: {few(odd, 4)})' if odd else ''}: use its flags, or start from it with --finetune"
        )
    number_of = dict(zip(their_names, their_numbers, strict=True))
    states = {
        our_number: theirs["state"][number_of[name]]
        for our_number, name in zip(our_numbers, our_names, strict=True)
        if number_of[name] in theirs["state"]
    }
    groups = ours["param_groups"]
    if len(groups) == len(theirs["param_groups"]):  # some optimizers keep state in the group
        groups = [
            {**new, **old, **{name: new[name] for name in _GROUP_SETTINGS if name in new}}
            for old, new in zip(theirs["param_groups"], groups, strict=True)
        ]
    state_dict = {**ours, **theirs, "state": states, "param_groups": groups}
    examples = zip(our_names, our_numbers, _examples(state.optimizer), strict=True)
    pairs = [(f"{name} of", example, states[number]) for name, number, example in examples if number in states]
    pairs += [("", new, old) for new, old in zip(ours["param_groups"], groups, strict=True)]
    for what, example, values in pairs:
        for entry, expected in _layout(example).items():
            actual = _layout(values.get(entry, "missing"))
            if entry != "params" and actual != expected and None not in (actual, expected):
                raise CheckpointError(
                    f"the optimizer of {checkpoint.path} does not fit this one: {what} {entry} is {actual}, not "
                    f"{expected}; start from its weights with --finetune"
                )
    state.optimizer.load_state_dict(state_dict)


def _examples(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps for each parameter, as a step with others of the same shape leaves it.

    Empty for an optimizer that takes no such step.
    """
    twin: Any = copy.copy(optimizer)
    attributes = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in vars(twin) and not isinstance(value, torch.optim.Optimizer)
    }
    samples = [{p.shape: torch.zeros_like(p, requires_grad=True) for p in g["params"]} for g in optimizer.param_groups]
    places = [(place, p.shape) for place, group in enumerate(optimizer.param_groups) for p in group["params"]]
    try:
        with torch.random.fork_rng():
            vars(twin).update(copy.deepcopy(attributes))
            twin.state = defaultdict(dict)
            twin.param_groups = copy.deepcopy([{**group, "params": []} for group in optimizer.param_groups])
            for group, parameters in zip(twin.param_groups, samples, strict=True):
                group["params"] = list(parameters.values())
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            twin.step()
    except Exception:  # they raise what they like
        return [{} for _ in places]
    return [twin.state[samples[place][shape]] for place, shape in places]


def _layout(value: Any) -> Any:
    """Shapes of tensors and kinds of other values; a number may be a tensor of one."""
    if isinstance(value, torch.Tensor):
        return "a number" if value.numel() == 1 else f"of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return {name: _layout(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_layout(part) for part in value]
    if value is None or value == "missing":
        return value
    return "a number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


_GROUP_SETTINGS = ("params", "lr", "initial_lr", "weight_decay", "betas", "eps", "momentum", "fused", "foreach")
