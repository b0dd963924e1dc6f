"""Training: one loop that can be read from top to bottom, for the whole recipe of DeiT.

A plain loop rather than `timm.task`: the loss is DeiT's to the last digit (`timm.task` scales soft distillation by the
number of classes), and the reader sees every step. Optimizer, schedule, Mixup and EMA are timm's.

**Exact resume.** Nothing random is saved. Before each step the generators are seeded from (seed, epoch, step, rank),
the data set does the same for each image, and the schedule is a function of the epoch. So a run that was stopped, at
any moment, and resumed from its `checkpoint.pth` ends with the same bits as one that was not.

**Files** in `output_dir`, each replaced as a whole: `checkpoint.pth` (after every epoch, and on SIGTERM),
`best_checkpoint.pth` (the best top-1 so far, of the raw weights), `log.txt` (one JSON line an epoch: DeiT's keys with
DeiT's meaning, and ours).
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lape.checkpoint import Checkpoint, read_checkpoint, write_atomically
from lape.convert import create_model, describe
from lape.data import Data, eval_loader, eval_transform, load_data, steps_per_epoch, train_loader
from lape.distributed import World, join_world, on_main, sum_over_ranks
from lape.errors import CheckpointError, LapeError
from lape.evaluate import Metrics, autocast, check_classes, evaluate, settings_of, source_grid
from lape.losses import classification_loss, distillation_loss
from lape.names import nearest
from lape.progress import Progress
from lape.recipe import Recipe
from lape.reference import load_reference_state_dict, reference_names, to_reference_state_dict

CHECKPOINT, BEST, LOG = "checkpoint.pth", "best_checkpoint.pth", "log.txt"
Say = Callable[[str], None]


@dataclass
class TrainResult:
    """What a run produced. Accuracies are top-1 in percent, losses the mean cross entropy, of the validation images."""

    model: nn.Module  # the raw weights after the last epoch
    ema_model: nn.Module | None
    best_accuracy: float  # of the raw weights, over all epochs
    accuracy: float
    loss: float
    ema_accuracy: float | None
    ema_loss: float | None
    history: list[dict[str, Any]]  # the lines of log.txt, those before a resume included
    seconds: float  # of this call
    data_name: str


@dataclass
class State:
    """What a run carries from epoch to epoch; all of it is in `checkpoint.pth`."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's, a function of the epoch; None keeps the learning rate
    scaler: torch.amp.GradScaler
    next_epoch: int
    next_step: int = 0  # of that epoch; not 0 only when a run was stopped within it
    loss_sum: float = 0.0  # over the steps of that epoch so far
    best_accuracy: float = -1.0  # so that the first epoch is the best until a better one comes
    history: list[dict[str, Any]] = field(default_factory=list)


def train(recipe: Recipe, *, on_epoch: Callable[[dict[str, Any]], None] | None = None, say: Say = print) -> TrainResult:
    """Train as the recipe says, evaluate after every epoch, and leave the files named above.

    Under `torchrun` every process calls this; files and output are those of the first.

    Args:
        on_epoch: called in every process with the epoch's log line, after the files are written.
        say: where lines of output go.

    Raises:
        LapeError: the recipe, the data, the device or a file is wrong (before anything is written), a file cannot be
            written, or the loss is not finite (the last checkpoint stands).
        SystemExit: SIGTERM came; the run was saved after the step and can be resumed within its epoch.
    """
    with join_world(recipe.device) as world, _sigterm() as stop:
        say = say if world.is_main else _silence
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        began = time.perf_counter()

        # Everything that can be wrong is found here, before a file is touched.
        _check(recipe, world.device)
        resumed = _find_resumed(recipe, say)
        if resumed is not None:
            recipe = settings_of(resumed, recipe)
        data = load_data(recipe, world_size=world.size)
        steps = steps_per_epoch(len(data.train), recipe, world.size)
        num_classes = len(data.classes)
        if resumed is not None:
            check_classes(resumed, data.classes)
            num_classes = resumed.num_classes or num_classes  # the authors' files have 1000 outputs for any data
        state = start(recipe, build_model(recipe, num_classes, say).to(world.device), world)
        teacher = _load_teacher(recipe, num_classes, world.device)
        if resumed is not None:
            resume(state, resumed, recipe, say)
            if "max_accuracy" not in resumed.raw:
                state.best_accuracy = _accuracy_of_best(state, data, recipe, world)
        on_main(lambda: _check_output(recipe, resumed))
        _introduce(recipe, data, state, world, steps, say)
        net = _parallel(state.model, world)
        mixup = _mixup(recipe, num_classes)

        for epoch in range(state.next_epoch, recipe.epochs):
            lr = state.optimizer.param_groups[0]["lr"]
            progress = Progress(f"Epoch: [{epoch}]", state.next_step, steps, recipe.log_every, say)
            loader = train_loader(
                data.train, recipe, epoch=epoch, rank=world.rank, world_size=world.size, skip_batches=state.next_step
            )
            net.train(recipe.train_mode)
            for step, (images, targets) in enumerate(progress.over(loader), start=state.next_step):
                seed_step(recipe.seed, epoch, step, world.rank)
                images = images.to(world.device, non_blocking=True)
                targets = targets.to(world.device, non_blocking=True)
                if mixup is not None:
                    images, targets = mixup(images, targets)
                with autocast(recipe.amp, world.device):
                    loss = training_loss(net(images), images, targets, recipe, teacher)
                news = torch.tensor([loss.item(), float(stop.is_set())], dtype=torch.float64)
                value, stopped = (sum_over_ranks(news) / world.size).tolist()  # every rank learns it of any rank
                if not math.isfinite(value):
                    raise LapeError(_not_finite(value, epoch, step, lr))
                state.optimizer.zero_grad()
                state.scaler.scale(loss).backward()
                if recipe.clip_grad is not None:
                    state.scaler.unscale_(state.optimizer)
                    nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_grad)
                state.scaler.step(state.optimizer)
                state.scaler.update()
                if state.ema is not None:
                    state.ema.update(state.model)
                state.loss_sum += value
                state.next_step = step + 1
                progress.report(loss=value, lr=lr)
                if stopped:
                    _save_and_exit(state, data, recipe, say)
            if state.scheduler is not None:
                state.scheduler.step(epoch + 1)

            train_loss = state.loss_sum / steps
            say(f"Averaged stats: lr: {lr:.6f}  loss: {train_loss:.4f}")
            raw = _measure(state.model, data, recipe, world)
            ema = _measure(state.ema.module, data, recipe, world) if state.ema is not None else None
            say(f"{raw}\nAccuracy of the network on the {raw.count} test images: {raw.acc1:.1f}%")
            if ema is not None:
                say(f"EMA: {ema}".replace("* ", ""))
            better = raw.acc1 > state.best_accuracy
            state.best_accuracy = max(state.best_accuracy, raw.acc1)
            state.next_epoch, state.next_step, state.loss_sum = epoch + 1, 0, 0.0
            line = {"train_lr": lr, "train_loss": train_loss, **raw.log("test")}
            line |= {"epoch": epoch, "n_parameters": _trainable(state.model)}
            line |= ema.log("test_ema") if ema is not None else {}
            line |= progress.timing(recipe.batch_size * world.size)
            state.history.append(line)
            say(f"Max accuracy: {state.best_accuracy:.2f}%")
            if recipe.output_dir:
                on_main(lambda better=better: _write(state, data, recipe, better))  # type: ignore[misc]
            if on_epoch is not None:
                on_epoch(line)

        seconds = time.perf_counter() - began
        say(f"Training time {datetime.timedelta(seconds=int(seconds))}")
        return _result(state, data, seconds)


# ------------------------------------------------------------------------------------------------ one step


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Make dropout, stochastic depth and Mixup of a step a function of these four numbers."""
    for_torch, for_numpy = np.random.SeedSequence((seed, epoch, step, rank)).generate_state(2, np.uint32)
    torch.manual_seed(int(for_torch))
    np.random.seed(int(for_numpy))


def training_loss(
    output: Tensor | tuple[Tensor, Tensor], images: Tensor, targets: Tensor, recipe: Recipe, teacher: nn.Module | None
) -> Tensor:
    """(1 - alpha) classification + alpha distillation; without a teacher the first alone.

    With a teacher the output is (class logits, distillation logits). The teacher sees the student's own, mixed images.
    """
    logits, distilled = output if isinstance(output, tuple) else (output, None)
    loss = classification_loss(logits, targets, smoothing=recipe.smoothing, bce=recipe.bce_loss)
    if teacher is None:
        return loss
    assert distilled is not None
    with torch.no_grad():
        expected = teacher(images)
    alpha = recipe.distillation_alpha
    apart = distillation_loss(distilled, expected, kind=recipe.distillation_type, tau=recipe.distillation_tau)
    return (1 - alpha) * loss + alpha * apart


def _mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    if recipe.mixup == 0 and recipe.cutmix == 0 and recipe.cutmix_minmax is None:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        cutmix_minmax=recipe.cutmix_minmax,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as schedulers of shared machines send it; the loop looks at it after each step."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _save_and_exit(state: State, data: Data, recipe: Recipe, say: Say) -> NoReturn:
    if recipe.output_dir:
        on_main(lambda: _write(state, data, recipe, better=False))
        say(f"SIGTERM: saved after step {state.next_step} of epoch {state.next_epoch}; go on with --resume")
    raise SystemExit(128 + signal.SIGTERM)


def _not_finite(value: float, epoch: int, step: int, lr: float) -> str:
    return (
        f"the loss is {value} in epoch {epoch}, step {step}, at learning rate {lr:.3g}: training stops, the last "
        "checkpoint stands; lower --lr, add --clip-grad 1, or use --amp off"
    )


# ------------------------------------------------------------------------------------------------ what is trained


def build_model(recipe: Recipe, num_classes: int, say: Say = print) -> nn.Module:
    """The model of a recipe, the same in every process; with the weights of `finetune` where it names a file."""
    torch.manual_seed(recipe.seed)
    model = create_model(
        recipe.model,
        join=recipe.join_type,
        pe=recipe.pe,
        num_classes=num_classes,
        img_size=recipe.input_size,
        in_chans=recipe.in_chans,
        drop_rate=recipe.drop,
        drop_path_rate=recipe.drop_path,
        **recipe.model_kwargs,
    )
    if recipe.finetune:
        load_weights(model, read_checkpoint(recipe.finetune), recipe, say)
    if recipe.attn_only:
        _train_attention_only(model)
    if recipe.distillation_type != "none":
        if not hasattr(model, "set_distilled_training"):
            raise LapeError(
                f"model {recipe.model!r} has no distillation head: use a distilled one, such as "
                "deit_tiny_distilled_patch16_224, or --distillation-type none"
            )
        model.set_distilled_training(True)  # type: ignore[operator]
    return model


def load_weights(model: nn.Module, checkpoint: Checkpoint, recipe: Recipe, say: Say = print) -> None:
    """Start a model from another's weights: its grid is resampled, a head for another number of classes starts anew.

    PE norms that the file lacks (a model without LaPE) start anew as well; what does so is said in one line.

    Raises:
        CheckpointError: any other difference between file and model.
    """
    ours, theirs = to_reference_state_dict(model), checkpoint.model
    fresh = {name: tensor for name, tensor in ours.items() if _starts_anew(name, tensor, theirs.get(name))}
    left = [name for name in theirs if name.startswith("head_dist.") and name not in ours]
    kept = {name: tensor for name, tensor in theirs.items() if name not in fresh and name not in left}
    load_reference_state_dict(model, fresh | kept, source_grid=source_grid(checkpoint, model))
    if fresh:
        say(
            f"Fine-tuning from {checkpoint.path}, which does not have or fit these, so they start anew: {_short(fresh)}"
        )
    if left:
        say(f"Fine-tuning from {checkpoint.path} without its {_short(left)}")


def _starts_anew(name: str, ours: Tensor, theirs: Tensor | None) -> bool:
    if name.startswith(("head.", "head_dist.")):
        return theirs is None or theirs.shape != ours.shape
    return theirs is None and ".pe_norm." in name


def _short(names: Collection[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def _train_attention_only(model: nn.Module) -> None:
    """As DeiT does: attention, the position table and the heads learn, all else is frozen."""
    heads = model.get_classifier()  # type: ignore[operator]
    heads = heads if isinstance(heads, tuple) else (heads,)
    head_ids = {id(parameter) for head in heads for parameter in head.parameters()}
    for name, parameter in model.named_parameters():
        wanted = ".attn." in name or name.endswith("pos_embed") or id(parameter) in head_ids
        parameter.requires_grad_(parameter.requires_grad and wanted)


def _load_teacher(recipe: Recipe, num_classes: int, device: torch.device) -> nn.Module | None:
    if recipe.distillation_type == "none":
        return None
    import timm

    name = recipe.teacher_model
    if not timm.is_model(name.split(".")[0]):
        guess = nearest(name, timm.list_models())
        raise LapeError(f"unknown teacher_model {name!r}{f'; did you mean {guess!r}?' if guess else ''}")
    teacher = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=recipe.in_chans)
    try:
        teacher.load_state_dict(read_checkpoint(recipe.teacher_path).model)
    except RuntimeError as error:
        raise CheckpointError(
            f"{recipe.teacher_path} is not a {name} with {num_classes} classes ({' '.join(str(error).split())[:300]}): "
            "give the teacher's --teacher-model, trained on the same classes"
        ) from None
    teacher.to(device).eval().requires_grad_(False)
    try:
        teacher(torch.zeros(1, recipe.in_chans, recipe.input_size, recipe.input_size, device=device))
    except (AssertionError, RuntimeError) as error:
        raise LapeError(f"teacher_model {name!r} cannot see images of {recipe.input_size} pixels: {error}") from None
    return teacher


# ------------------------------------------------------------------------------------------------ how it is trained


def peak_lr(recipe: Recipe, world_size: int) -> float:
    """The learning rate after warm-up: `lr` for 512 images a step, scaled linearly by the total batch (DeiT)."""
    return recipe.lr if recipe.unscale_lr else recipe.lr * recipe.batch_size * world_size / 512


def start(recipe: Recipe, model: nn.Module, world: World) -> State:
    """Optimizer, schedule, EMA and gradient scaler for a model, at the first epoch."""
    known = [str(name) for name in list_optimizers()]
    if recipe.opt.lower().split("_")[-1] not in known:
        guess = nearest(recipe.opt, known)
        raise LapeError(f"unknown opt {recipe.opt!r}{f'; did you mean {guess!r}?' if guess else ''}: a name of timm")
    optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(recipe), "lr": peak_lr(recipe, world.size)})
    scheduler, _ = create_scheduler(recipe, optimizer)
    if scheduler is not None:
        scheduler.step(recipe.start_epoch)
    ema_device = torch.device("cpu") if recipe.model_ema_force_cpu else None
    ema = ModelEmaV3(model, decay=recipe.model_ema_decay, device=ema_device) if recipe.model_ema else None
    half = recipe.amp in ("fp16", "auto") and world.device.type == "cuda"
    return State(model, ema, optimizer, scheduler, torch.amp.GradScaler("cuda", enabled=half), recipe.start_epoch)


def _parallel(model: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def _measure(model: nn.Module, data: Data, recipe: Recipe, world: World) -> Metrics:
    """Evaluate on the validation images; with `dist_eval` the processes share them."""
    rank, size = (world.rank, world.size) if recipe.dist_eval else (0, 1)
    loader = eval_loader(data.val, recipe, rank=rank, world_size=size)
    if next(model.parameters()).device != world.device:  # an EMA in host memory
        model = copy.deepcopy(model).to(world.device)
    return evaluate(model, loader, world.device, amp=recipe.amp, shared=recipe.dist_eval)


def _silence(_text: str) -> None:
    pass


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ------------------------------------------------------------------------------------------------ before the first step


def _check(recipe: Recipe, device: torch.device) -> None:
    """Refuse what cannot be trained. Raises LapeError."""
    autocast(recipe.amp, device)
    if recipe.bce_loss and recipe.smoothing:
        raise LapeError(
            f"bce_loss with smoothing={recipe.smoothing} would make every class of every image a target: "
            "add --smoothing 0"
        )
    if recipe.sched == "plateau":
        raise LapeError("sched='plateau' depends on results and could not be resumed exactly: use cosine or step")
    if recipe.distillation_type != "none" and not recipe.train_mode:
        raise LapeError("distillation needs the training output of the model: leave --no-train-mode out")
    if recipe.start_epoch >= recipe.epochs:
        raise LapeError(f"start_epoch={recipe.start_epoch} leaves nothing of {recipe.epochs} epochs: raise --epochs")


def _check_output(recipe: Recipe, resumed: Checkpoint | None) -> None:
    """Make the output folder. Refuse one that cannot be written or that holds another run. Raises LapeError."""
    if not recipe.output_dir:
        return
    folder = Path(recipe.output_dir)
    found = [name for name in (CHECKPOINT, BEST) if (folder / name).exists()]
    if found and (resumed is None or resumed.path.resolve().parent != folder.resolve()):
        raise LapeError(
            f"output_dir {folder} holds a run already ({', '.join(found)}): go on with --resume {folder / found[0]}, "
            "or choose another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise LapeError(f"output_dir {folder} cannot be written ({error.strerror}): choose another folder") from None
    for stale in folder.glob(".*.tmp"):  # what a run that was killed while writing has left
        if stale.name.startswith((f".{CHECKPOINT}.", f".{BEST}.", f".{LOG}.")):
            stale.unlink(missing_ok=True)


def _introduce(recipe: Recipe, data: Data, state: State, world: World, steps: int, say: Say) -> None:
    """Say what is trained on what, and how."""
    batch = recipe.batch_size * world.size
    say(f"Data: {data.name}")
    say(f"Evaluation transform: {eval_transform(recipe)}")
    say(f"Model: {recipe.model}\n{describe(state.model)}")
    say(f"number of params: {_trainable(state.model)}")
    say(
        f"Batch: {recipe.batch_size} x {world.size} process(es) = {batch}, {steps} steps an epoch; "
        f"learning rate after warm-up: {peak_lr(recipe, world.size):.4g}; device: {world.device}"
    )
    if recipe.repeated_aug:
        say("Repeated augmentation: an epoch shows about a third of the images, each three times (--no-repeated-aug)")
    images = f"on {len(data.train)} images, evaluated on {len(data.val)}"
    say(
        f"Start training for {recipe.epochs} epochs {images}"
        + (f", from {state.next_epoch}" if state.next_epoch else "")
    )


# ------------------------------------------------------------------------------------------------ files


def _write(state: State, data: Data, recipe: Recipe, better: bool) -> None:
    """Write the files of an epoch. The log comes last: `checkpoint.pth` holds its lines, so none can be lost."""
    folder = Path(recipe.output_dir)
    content = {
        "model": to_reference_state_dict(state.model),
        "optimizer": state.optimizer.state_dict(),
        "optimizer_names": _optimizer_names(state),
        "lr_scheduler": state.scheduler.state_dict() if state.scheduler is not None else {},
        "epoch": state.next_epoch - 1,  # the last whole one
        "step": state.next_step,
        "loss_sum": state.loss_sum,
        "model_ema": to_reference_state_dict(state.ema.module) if state.ema is not None else None,
        "scaler": state.scaler.state_dict(),
        "args": recipe.model_dump(mode="json"),
        "classes": data.classes,
        "transform": eval_transform(recipe).to_dict(),
        "model_kwargs": recipe.model_kwargs,
        "max_accuracy": state.best_accuracy,
        "history": state.history,
    }
    for name in (BEST, CHECKPOINT) if better else (CHECKPOINT,):
        write_atomically(folder / name, lambda file: torch.save(content, file))
    lines = "".join(json.dumps(line) + "\n" for line in state.history)
    write_atomically(folder / LOG, lambda file: _put(file, lines))


def _put(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def _find_resumed(recipe: Recipe, say: Say) -> Checkpoint | None:
    """The checkpoint to go on from; `auto` is the newest whole one in `output_dir`, or none."""
    if recipe.resume != "auto":
        return read_checkpoint(recipe.resume) if recipe.resume else None
    if not recipe.output_dir:
        raise LapeError("--resume auto looks into the output folder: add --output-dir")
    whole = []
    for path in (Path(recipe.output_dir) / name for name in (CHECKPOINT, BEST)):
        try:
            whole += [read_checkpoint(path)] if path.exists() else []
        except CheckpointError as error:
            say(f"{error}; skipped")
    return max(whole, key=lambda checkpoint: checkpoint.raw.get("epoch", -1), default=None)


def resume(state: State, checkpoint: Checkpoint, recipe: Recipe, say: Say = print) -> None:
    """Put a run back to where a checkpoint was written: by this project, by DeiT or by the LaPE authors.

    State comes from the file. Settings (learning rate, schedule, weight decay, ...) are those of `recipe`; when they
    differ from the file's, one line says so.

    Raises:
        CheckpointError: the file holds weights only, or does not fit the model.
        LapeError: its run has finished.
    """
    raw = checkpoint.raw
    missing = [key for key in ("optimizer", "epoch") if key not in raw]
    if missing:
        raise CheckpointError(f"{checkpoint.path} has no {' and no '.join(missing)}: start from it with --finetune")
    if raw["epoch"] + 1 >= recipe.epochs:
        raise LapeError(
            f"{checkpoint.path} has finished epoch {raw['epoch'] + 1} of {recipe.epochs}: raise --epochs, or use --eval"
        )
    load_reference_state_dict(state.model, checkpoint.model)
    if state.ema is not None:
        load_reference_state_dict(state.ema.module, checkpoint.model_ema or checkpoint.model)
    _resume_optimizer(state, checkpoint)
    if state.scaler.is_enabled() and raw.get("scaler"):
        state.scaler.load_state_dict(raw["scaler"])
    state.next_epoch = raw["epoch"] + 1
    state.next_step, state.loss_sum = raw.get("step", 0), raw.get("loss_sum", 0.0)
    if state.scheduler is not None:
        state.scheduler.step(state.next_epoch)
    state.best_accuracy = raw.get("max_accuracy", state.best_accuracy)
    state.history = raw["history"] if "history" in raw else _earlier_log(recipe, state.next_epoch)
    within = f" and step {state.next_step} of the next" if state.next_step else ""
    say(f"Resuming from {checkpoint.path}, after epoch {raw['epoch']}{within}")
    changed = _changed_settings(checkpoint, recipe) if "history" in raw else ""
    if changed:
        say(f"Other settings than that run had, from now on: {changed}")


# Where and how fast a run goes on changes no number.
_INDIFFERENT = {
    *("resume", "output_dir", "data_path", "start_epoch", "eval", "dist_eval", "num_workers", "pin_mem", "threads"),
    *("device", "log_every", "world_size", "dist_url", "model_ema_force_cpu"),
}


def _changed_settings(checkpoint: Checkpoint, recipe: Recipe) -> str:
    now = recipe.model_dump(mode="json")
    changes = {name: (was, now[name]) for name, was in checkpoint.args.items() if name in now and was != now[name]}
    return ", ".join(f"{name} {was} -> {new}" for name, (was, new) in changes.items() if name not in _INDIFFERENT)


def _earlier_log(recipe: Recipe, next_epoch: int) -> list[dict[str, Any]]:
    """The lines of an existing log.txt, when the checkpoint (the authors') does not hold them."""
    path = Path(recipe.output_dir) / LOG
    if not recipe.output_dir or not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError:
        raise LapeError(f"{path} is not a log of JSON lines: move it away, it would be overwritten") from None
    return [line for line in lines if line.get("epoch", -1) < next_epoch]


def _accuracy_of_best(state: State, data: Data, recipe: Recipe, world: World) -> float:
    """What a new best has to beat, when the resumed file does not say: measured."""
    path = Path(recipe.output_dir) / BEST
    model = state.model
    if recipe.output_dir and path.is_file():
        model = copy.deepcopy(model)
        load_reference_state_dict(model, read_checkpoint(path).model)
    return _measure(model, data, recipe, world).acc1


def _optimizer_names(state: State) -> list[str]:
    """The authors' names of the optimizer's parameters, in its order."""
    names = reference_names(state.model)
    known = {id(parameter): names[name] for name, parameter in state.model.named_parameters()}
    return [known[id(parameter)] for group in state.optimizer.param_groups for parameter in group["params"]]


def _resume_optimizer(state: State, checkpoint: Checkpoint) -> None:
    """Give each parameter its state by name: DeiT and this project order and group parameters differently."""
    theirs, ours = checkpoint.raw["optimizer"], state.optimizer.state_dict()
    their_names = checkpoint.raw.get("optimizer_names") or _deit_order(checkpoint)
    their_numbers = [number for group in theirs["param_groups"] for number in group["params"]]
    our_names = _optimizer_names(state)
    our_numbers = [number for group in ours["param_groups"] for number in group["params"]]
    if len(their_names) != len(their_numbers) or set(their_names) != set(our_names):
        odd = sorted(set(their_names) ^ set(our_names))
        raise CheckpointError(
            f"the optimizer of {checkpoint.path} has {len(their_numbers)} parameters, this run trains {len(our_names)}"
            f"{f' (differing: {_short(odd)})' if odd else ''}: use its flags, or start from it with --finetune"
        )
    number_of = dict(zip(their_names, their_numbers, strict=True))
    moved = {
        our_number: theirs["state"][number_of[name]]
        for our_number, name in zip(our_numbers, our_names, strict=True)
        if number_of[name] in theirs["state"]
    }
    groups = ours["param_groups"]
    if len(groups) == len(theirs["param_groups"]):  # some optimizers keep state in the group
        groups = [
            {**new, **was, **{name: new[name] for name in _GROUP_SETTINGS if name in new}}
            for was, new in zip(theirs["param_groups"], groups, strict=True)
        ]
    shapes = {name: tensor.shape for name, tensor in checkpoint.model.items()}
    for name in our_names:
        average = theirs["state"].get(number_of[name], {}).get("exp_avg")
        if average is not None and average.shape != shapes[name]:
            raise CheckpointError(f"the optimizer of {checkpoint.path} does not fit its model at {name}")
    state.optimizer.load_state_dict({**ours, "state": moved, "param_groups": groups})


def _deit_order(checkpoint: Checkpoint) -> list[str]:
    """The order in which DeiT's optimizer numbers the parameters: those without weight decay, then the others."""
    frozen = checkpoint.args.get("pe") in ("1D_sin", "2D_sin")
    names = [
        name
        for name, tensor in checkpoint.model.items()
        if tensor.is_floating_point() and not (frozen and name == "pos_embed")
    ]
    if not checkpoint.args.get("weight_decay", 0.05):
        return names
    decayed = [
        name
        for name in names
        if checkpoint.model[name].ndim > 1 and not name.endswith(".bias") and name not in _UNDECAYED
    ]
    return [name for name in names if name not in set(decayed)] + decayed


_UNDECAYED = {"pos_embed", "cls_token", "dist_token"}
_GROUP_SETTINGS = ("params", "lr", "initial_lr", "weight_decay", "betas", "eps", "momentum")


def _result(state: State, data: Data, seconds: float) -> TrainResult:
    last = state.history[-1]
    return TrainResult(
        model=state.model.eval(),
        ema_model=state.ema.module if state.ema is not None else None,
        best_accuracy=state.best_accuracy,
        accuracy=last["test_acc1"],
        loss=last["test_exact_loss"],
        ema_accuracy=last.get("test_ema_acc1"),
        ema_loss=last.get("test_ema_exact_loss"),
        history=state.history,
        seconds=seconds,
        data_name=data.name,
    )
