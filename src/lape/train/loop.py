"""Training: one loop that can be read from top to bottom, for the whole recipe of DeiT.

A plain loop rather than `timm.task`: the loss is DeiT's to the last digit (`timm.task` scales soft distillation by the
number of classes), and the reader sees every step. Optimizer, schedule, Mixup and EMA are timm's.

**Exact resume.** Nothing random is saved. Before each step the generators are seeded from (seed, epoch, step, rank),
the data set does the same for each image, and the schedule is a function of the epoch. So a run that was stopped, at
any moment, and resumed from its `checkpoint.pth` ends with the same bits as one that was not. (On a CPU; the kernels of
a GPU promise that with `deterministic` only.)

**A step does not wait for its device** where that can itself leave out a step whose loss or gradient is not finite
(`decides` in `lape.train.state`): what a step reports is read when the next one is launched, and all of it before
something is saved. Elsewhere a report is read at once.

**Files** in `output_dir`, each replaced as a whole: `checkpoint.pth` (after every epoch, on SIGTERM, within an epoch
as `save_steps` and `save_minutes` say), the one before it as `previous_checkpoint.pth`, `best_checkpoint.pth` (best
top-1 so far, of the raw weights unless `best_by` says otherwise), `log.txt` (one JSON line an epoch: DeiT's keys with
DeiT's meaning, and ours), the same as `log.csv`, `run.json` (what ran, with what, on what), and TensorBoard's curves.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lape.convert.positions import describe
from lape.data.augment import eval_transform
from lape.data.loaders import BatchPlan, batch_plan, mixes_images, steps_per_epoch, train_loader
from lape.data.open import Data, load_data
from lape.errors import DataError, LapeError, NotFiniteError
from lape.files.names import load_reference_state_dict
from lape.files.read import Checkpoint, read_checkpoint
from lape.files.restore import check_classes, settings_of
from lape.files.vet import of_file
from lape.names import tell
from lape.recipe import Recipe
from lape.train.distributed import (
    Reading,
    World,
    expect_answers,
    join_world,
    mean_over_ranks,
    on_main,
    sum_over_ranks,
    wait_for_others,
)
from lape.train.evaluate import Metrics, autocast, evaluate_data
from lape.train.faults import Stop, Stopped, explain_faults, make_deterministic
from lape.train.logs import check_services, open_curves, write_log
from lape.train.losses import classification_loss, distillation_loss
from lape.train.progress import Progress, Say, duration, silence
from lape.train.schedule import fit_warm_up, remarks
from lape.train.speed import advice_on_precision, attention_for
from lape.train.start import build_model, check_warm_start, load_teacher, trainable
from lape.train.state import (
    BEST,
    CHECKPOINT,
    State,
    agree,
    check_optimizer,
    check_output,
    checkpoint_to_resume,
    initial_state,
    peak_lr,
    resume,
    set_rate,
    write_checkpoint,
)


@dataclass
class TrainResult:
    """What a run produced. Accuracies are top-1 in percent, losses the mean cross entropy, of the validation images.

    Fields:
        model: the raw weights after the last epoch
        ema_model: the average, None without one
        best_accuracy: over all epochs, of the weights that `best_by` names
        accuracy: of the raw weights after the last epoch
        loss: likewise
        ema_accuracy: of the average after the last epoch
        ema_loss: likewise
        history: the lines of log.txt, those before a resume included
        seconds: of this call
        data_name: what was trained on, in words
    """

    model: nn.Module
    ema_model: nn.Module | None
    best_accuracy: float
    accuracy: float
    loss: float
    ema_accuracy: float | None
    ema_loss: float | None
    history: list[dict[str, Any]]
    seconds: float
    data_name: str


@dataclass
class Training:
    """A run under way: what its steps need. `state`, `mixup`, `stop` and `last_save` change."""

    recipe: Recipe  # with what the checkpoint says where the user gave no flag
    world: World
    stop: Stop
    say: Say
    data: Data
    plan: BatchPlan
    steps: int  # of an epoch
    state: State
    net: nn.Module  # the state's model, compiled and distributed as the recipe says
    mixup: Mixup | None
    teacher: nn.Module | None
    checkpoint: Checkpoint | None  # that it goes on from
    last_save: float = 0.0  # seconds of the monotonic clock
    parameters: list[nn.Parameter] = field(init=False)  # once: to walk through the model takes time

    def __post_init__(self) -> None:
        self.parameters = list(self.state.model.parameters())

    def save(self, *, better: bool = False) -> None:
        """Write the checkpoint and the log, if the run has a folder. All processes call it."""
        if self.recipe.output_dir:
            on_main(lambda: write_checkpoint(self.state, self.data, self.recipe, self.plan, better=better))
            self.last_save = time.monotonic()


class StepReport(NamedTuple):
    """What the processes tell each other after a step, as means over them: so all decide the same."""

    loss: float
    grad_norm: float
    stop: float  # more than 0: a signal came to one of them
    corrupt: float  # images that could not be read, mean over processes
    save_due: float  # more than 0: a checkpoint is due

    @property
    def good(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train(recipe: Recipe, *, on_epoch: Callable[[dict[str, Any]], None] | None = None, say: Say = tell) -> TrainResult:
    """Train as the recipe says, evaluate after every epoch, and leave the files named above.

    Under `torchrun` every process calls this; files and output are those of the first.

    Args:
        on_epoch: called in every process with the epoch's log line, after the files are written.
        say: where lines of output go.

    Raises:
        LapeError: the recipe, the data, the device or a file is wrong (before anything is written), a file cannot be
            written, memory does not suffice, another process is gone, or too many steps in a row have no finite loss
            and gradient. The last checkpoint stands.
        SystemExit, KeyboardInterrupt: SIGTERM or SIGHUP came, or Ctrl-C; the run was saved after the step and can be
            resumed within its epoch. Ctrl-C twice does not wait for that.
    """
    clock = time.perf_counter()
    with ExitStack() as at_end:
        world = at_end.enter_context(join_world(recipe.device, recipe.dist_timeout))
        at_end.enter_context(explain_faults(recipe))
        say = say if world.is_main else silence
        run = _prepare(recipe, world, say)  # all that can be wrong is seen here, before a file is touched
        recipe, state = run.recipe, run.state
        for net in [state.model] if state.ema is None else [state.model, state.ema.module]:
            at_end.enter_context(attention_for(net, recipe, world.device))
        on_main(lambda: check_output(recipe, run.checkpoint, at_end))
        if state.next_epoch >= recipe.epochs:
            on_main(lambda: _complete_files(run))
            say(f"The run has finished its {recipe.epochs} epochs already: nothing is left to train")
            return _result(run, time.perf_counter() - clock)
        curves = on_main(lambda: open_curves(recipe, state.history, world, (state.next_epoch, state.next_step)))
        if curves is not None:
            at_end.callback(curves.close)
        _introduce(run)
        expect_answers(recipe.dist_timeout)
        at_end.enter_context(run.stop.on_signals())  # before, there is nothing to save: they end the process at once
        run.last_save = time.monotonic()

        first = state.next_epoch
        for epoch in range(first, recipe.epochs):
            line = _train_epoch(run, epoch)
            raw, ema = _evaluate_epoch(run, epoch, line["train_lr"])
            line |= raw.log("test") | (ema.log("test_ema") if ema is not None else {})
            better = state.better(ema.acc1 if ema is not None and recipe.best_by == "ema" else raw.acc1, epoch)
            state.begin_epoch(epoch + 1)
            state.history.append(line)
            _say_results(run, raw, ema)
            run.save(better=better)
            if curves is not None:
                curves.add(line)
            if on_epoch is not None:
                on_epoch(line)
            if epoch + 1 < recipe.epochs:
                pace = (time.perf_counter() - clock) / (epoch + 1 - first)
                say(f"About {duration(pace * (recipe.epochs - epoch - 1))} to go")

        seconds = time.perf_counter() - clock
        say(f"Training time {duration(seconds)}")
        return _result(run, seconds)


def _train_epoch(run: Training, epoch: int) -> dict[str, Any]:
    """Take the remaining steps of an epoch; returns what log.txt says of them."""
    recipe, world, state, parts = run.recipe, run.world, run.state, run.plan.parts
    lr = state.optimizer.param_groups[0]["lr"]
    context = f"learning rate {lr:.3g} in epoch {epoch}"
    progress = Progress(f"Epoch: [{epoch}]", state.next_step, run.steps, run.plan, world, recipe.log_every, run.say)
    first = state.next_step
    loader = train_loader(
        run.data.train,
        recipe,
        epoch=epoch,
        rank=world.rank,
        world_size=world.size,
        skip_batches=first,
        device=world.device,
    )
    run.net.train(recipe.train_mode)
    if run.mixup is not None:
        run.mixup.mixup_enabled = epoch < (recipe.mixup_off_epoch or recipe.epochs)
    step_loss = torch.zeros((), device=world.device)
    readings: deque[Reading] = deque()  # the reports of steps that nobody has read yet
    with closing(progress.over(loader)) as batches:  # an error must not leave the loader's processes
        for number, (images, targets) in enumerate(batches, start=first * parts):
            step, part = divmod(number, parts)
            last = part == parts - 1  # the last batch of this step
            seed_step(recipe.seed, epoch, step, world.rank, part)
            step_loss += _add_gradients(run, images, targets, last)
            if not last:
                continue
            readings.append(_launch_update(run, step_loss, loader.omissions, epoch, step))
            step_loss.zero_()
            at_once = not state.on_device or step + 1 == run.steps or _saves_after(recipe, step)
            must_stop, save_due = _count_steps(run, readings, at_once, progress, context)
            if must_stop:
                _save_and_leave(run)
            if save_due and not state.bad_in_row and state.next_step < run.steps:
                run.save()
    set_rate(state, recipe, epoch + 1)
    line = _epoch_line(run, epoch, lr, progress)
    epoch_loss = line["train_loss"]
    run.say(f"Averaged stats: lr: {lr:.6f}  loss: {epoch_loss if epoch_loss is None else round(epoch_loss, 4)}")
    return line


# ------------------------------------------------------------------------------------------------ one step


def seed_step(seed: int, epoch: int, step: int, rank: int, part: int = 0) -> None:
    """Make dropout, stochastic depth and Mixup of a batch a function of these numbers."""
    entropy = (seed, epoch, step, rank, part) if part else (seed, epoch, step, rank)
    for_torch, for_numpy = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    torch.manual_seed(int(for_torch))
    np.random.seed(int(for_numpy))


def _add_gradients(run: Training, images: Any, targets: Tensor, last: bool) -> Tensor:
    """Forward and backward of one batch of a step; returns its part of the loss."""
    device = run.world.device
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    if run.mixup is not None:
        images, targets = run.mixup(images, targets)
    # processes exchange gradients in the last batch of a step only
    with nullcontext() if last or not isinstance(run.net, DistributedDataParallel) else run.net.no_sync():
        with autocast(run.recipe.amp, device):
            loss = training_loss(run.net(images), images, targets, run.recipe, run.teacher) / run.plan.parts
        run.state.scaler.scale(loss).backward()
    return loss.detach()


def _launch_update(run: Training, loss: Tensor, omissions: list[str], epoch: int, step: int) -> Reading:
    """One step of the optimizer and of the average, unless loss or gradient is not finite; returns its report."""
    state, recipe = run.state, run.recipe
    grad_norm = _gradient_norm(state, run.parameters, recipe.clip_grad)
    numbers = [run.stop.is_set(), len(omissions), run.world.is_main and _save_is_due(run, step)]
    _print_omissions(omissions)
    report = mean_over_ranks(torch.stack([loss, grad_norm]), numbers)
    reading = Reading(report)
    state.update(report[:2].isfinite().all(), epoch * run.steps + step + 1 if recipe.model_ema_warmup else None)
    return reading


def _print_omissions(omissions: list[str]) -> None:
    """Name the images that were left out, each once: every process its own."""
    for text in omissions:
        print(f"left out: {text}", file=sys.stderr, flush=True)
    omissions.clear()


def _count_steps(
    run: Training, readings: deque[Reading], at_once: bool, progress: Progress, context: str
) -> tuple[bool, bool]:
    """Read and count the reports of steps. The last stays unread, so that nobody waits for the device.

    With `at_once`, or where a step stops or saves the run, all are read: the state is that of the last step then.
    Returns whether the run stops, and whether a checkpoint is due.
    """
    state, must_stop, save_due = run.state, False, False
    while len(readings) > (0 if at_once or must_stop or save_due else 1):
        report = StepReport(*readings.popleft().read())
        progress.report(loss=report.loss, lr=state.optimizer.param_groups[0]["lr"], grad_norm=report.grad_norm)
        state.skipped_images += round(report.corrupt * run.world.size)
        state.next_step += 1
        if report.good:
            state.loss_sum += report.loss
            state.bad_in_row = 0
        else:
            _count_bad_step(run, report, f"{context}, step {state.next_step - 1}")
        must_stop, save_due = must_stop or report.stop > 0, save_due or report.save_due > 0
    return must_stop, save_due


def training_loss(
    output: Tensor | tuple[Tensor, Tensor], images: Tensor, targets: Tensor, recipe: Recipe, teacher: nn.Module | None
) -> Tensor:
    """(1 - alpha) classification + alpha distillation; without a teacher the first alone.

    With a teacher the output is (class logits, distillation logits). The teacher sees the student's own, mixed images.
    """
    logits, distillation_logits = output if isinstance(output, tuple) else (output, None)
    loss = classification_loss(logits, targets, smoothing=recipe.smoothing, bce=recipe.bce_loss)
    if teacher is None:
        return loss
    assert distillation_logits is not None
    with torch.no_grad():
        teacher_logits = teacher(images)
    alpha = recipe.distillation_alpha
    kind, tau = recipe.distillation_type, recipe.distillation_tau
    return (1 - alpha) * loss + alpha * distillation_loss(distillation_logits, teacher_logits, kind=kind, tau=tau)


def _mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    if not mixes_images(recipe):
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


def _gradient_norm(state: State, parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of the step's gradient, which is clipped to `limit` if there is one."""
    state.scaler.unscale_(state.optimizer)
    if limit is not None:
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])


def _count_bad_step(run: Training, report: StepReport, where: str) -> None:
    """A step that was skipped; too many in a row end the run. Raises LapeError."""
    state = run.state
    state.skipped_steps += 1
    state.bad_in_row += 1
    what = f"loss {report.loss:.4g}, gradient norm {report.grad_norm:.4g}, {where}"
    if state.bad_in_row >= run.recipe.max_skipped:
        raise LapeError(
            f"{state.bad_in_row} steps in a row had no finite loss and gradient (--max-skipped), the last: {what}; "
            "training stops, the last checkpoint stands; lower --lr, add --clip-grad 1, or use --amp off or bf16"
        )
    run.say(f"Step skipped, it is not finite: {what} ({state.bad_in_row} in a row)")


def _saves_after(recipe: Recipe, step: int) -> bool:
    """Whether a checkpoint is due after a step by its number."""
    return bool(recipe.save_steps and (step + 1) % recipe.save_steps == 0)


def _save_is_due(run: Training, step: int) -> bool:
    """By the step's number, or by this process's clock."""
    minutes = run.recipe.save_minutes
    return _saves_after(run.recipe, step) or bool(minutes and time.monotonic() - run.last_save >= 60 * minutes)


def _save_and_leave(run: Training) -> NoReturn:
    """Save the run unless its last loss was not finite, say how it goes on, and end. All processes call it."""
    state, folder = run.state, Path(run.recipe.output_dir)
    if not state.bad_in_row:
        run.save()
    where = f"step {state.next_step} of epoch {state.next_epoch}"
    if not run.recipe.output_dir:
        what = f"{run.stop.name} after {where}: nothing is saved without --output-dir"
    elif state.bad_in_row:
        what = f"{run.stop.name} after {where}: not saved, its loss was not finite; the last checkpoint stands"
    else:
        what = f"{run.stop.name}: saved after {where} in {folder / CHECKPOINT}"
    run.say(what + ("; to go on: the same command with --resume auto" if run.recipe.output_dir else ""))
    run.stop.leave()


# ------------------------------------------------------------------------------------------------ around the loop


def _prepare(recipe: Recipe, world: World, say: Say) -> Training:
    """Build all that a run needs, from its start or from a checkpoint. Nothing is written."""
    _check_recipe(recipe, world.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if recipe.deterministic:
        make_deterministic()
    checkpoint = checkpoint_to_resume(recipe, say)
    agree(checkpoint, world)
    if checkpoint is not None:
        recipe = settings_of(checkpoint, recipe)
        if "as_original" not in recipe.model_fields_set:  # it goes on with the habits it began with; 0.1.0 had none
            recipe = recipe.replace(as_original=checkpoint.args.get("as_original", ()))
    recipe = fit_warm_up(recipe, say)
    check_warm_start(recipe, checkpoint)
    data = load_data(recipe, world_size=world.size, device=world.device)
    plan = batch_plan(recipe, world.size)
    steps = steps_per_epoch(len(data.train), recipe, world.size)
    num_classes = len(data.classes)
    if checkpoint is not None:
        check_classes(checkpoint, data.classes)
        num_classes = checkpoint.num_classes or num_classes  # the authors' files have 1000 outputs for any data
    state = initial_state(recipe, build_model(recipe, num_classes, say, data.classes).to(world.device), world)
    teacher = load_teacher(recipe, num_classes, world.device, say, data.classes)
    if checkpoint is not None:
        with of_file(checkpoint.path):
            resume(state, checkpoint, recipe, plan, say)
        if "max_accuracy" not in checkpoint.raw:
            state.best_accuracy = _accuracy_of_best(state, data, recipe, world)
    for line in [*remarks(recipe, peak_lr(recipe, world.size), state), advice_on_precision(recipe, world.device)]:
        if line:
            say(line)
    net = _parallel(state.model, recipe, world, plan)
    mixup = _mixup(recipe, num_classes)
    return Training(recipe, world, Stop(), say, data, plan, steps, state, net, mixup, teacher, checkpoint)


def _check_recipe(recipe: Recipe, device: torch.device) -> None:
    """Refuse what cannot be trained. Raises LapeError."""
    autocast(recipe.amp, device)
    check_services(recipe)
    check_optimizer(recipe, device)
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


def _parallel(model: nn.Module, recipe: Recipe, world: World, plan: BatchPlan) -> nn.Module:
    """What the loop calls. Its parameters are the model's own: evaluation and files use the model.

    DistributedDataParallel adds up gradients in another order from its second step on, when it has seen in which order
    they come. A run that goes on would take its first step as no other run did, and with three processes or more end
    with other bits. So one backward on blank images runs first, and is undone.
    """
    callable_model: Any = torch.compile(model) if recipe.compile else model
    net: nn.Module = callable_model
    if world.size == 1:
        return net
    # the second head of a distilled model does not learn without a teacher
    idle = getattr(model, "distilled_training", False) and recipe.distillation_type == "none"
    net = DistributedDataParallel(
        net, device_ids=[world.device] if world.device.type == "cuda" else None, find_unused_parameters=idle
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    blank = torch.zeros(plan.size, recipe.in_chans, recipe.input_size, recipe.input_size, device=world.device)
    with autocast(recipe.amp, world.device):
        output = net.train(recipe.train_mode)(blank)
    outputs = output if isinstance(output, tuple) else (output,)
    sum(one.float().sum() for one in (outputs[:1] if idle else outputs)).backward()
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return net


def _complete_files(run: Training) -> None:
    """A run that was killed while it wrote its very last files gets the rest of them."""
    if run.checkpoint is not None and run.checkpoint.path.name != CHECKPOINT:
        write_checkpoint(run.state, run.data, run.recipe, run.plan)
    else:
        write_log(run.state.history, Path(run.recipe.output_dir))


def _evaluate_epoch(run: Training, epoch: int, lr: float) -> tuple[Metrics, Metrics | None]:
    """Evaluate the raw weights and their average.

    Raises:
        DataError: a validation image cannot be read; the epoch that was just trained is saved.
        LapeError: the weights are lost.
        SystemExit, KeyboardInterrupt: a signal; that epoch is saved, and evaluated when the run goes on.
    """
    state, ema = run.state, None
    try:
        raw = evaluate_data(state.model, run.data, run.recipe, run.world, run.stop)
        if state.ema is not None:
            ema = evaluate_data(state.ema.module, run.data, run.recipe, run.world, run.stop)
    except DataError:  # in all processes
        run.save()
        raise
    except NotFiniteError as error:
        raise NotFiniteError(
            f"{error} (validation after epoch {epoch} at learning rate {lr:.3g}); training stops, the last checkpoint "
            "stands; lower --lr, add --clip-grad 1, or use --amp off or bf16"
        ) from None
    except Stopped:
        wait_for_others()
    if sum_over_ranks(torch.tensor([float(run.stop.is_set())])).item():
        _save_and_leave(run)
    return raw, ema


def _epoch_line(run: Training, epoch: int, lr: float, progress: Progress) -> dict[str, Any]:
    """What log.txt says of an epoch's training. The loss is the mean over the steps that were not skipped."""
    state = run.state
    good_steps = run.steps - state.skipped_steps
    return {
        "train_lr": lr,
        "train_loss": state.loss_sum / good_steps if good_steps else None,
        "epoch": epoch,
        "n_parameters": trainable(state.model),
        "skipped_steps": state.skipped_steps,
        "skipped_images": state.skipped_images,
        **progress.timing(),
    }


def _say_results(run: Training, raw: Metrics, ema: Metrics | None) -> None:
    history, say = run.state.history, run.say
    line = history[-1]
    say(f"{raw}\nAccuracy of the network on the {raw.count} test images: {raw.acc1:.1f}%")
    if ema is not None:
        say(f"EMA: {ema}".replace("* ", ""))
    for name, what in (("skipped_steps", "step(s) without a finite loss"), ("skipped_images", "unreadable image(s)")):
        if line[name]:
            say(f"Left out in this epoch: {line[name]} {what}")
    say(f"Max accuracy: {run.state.best_accuracy:.2f}%")
    if ema is not None:
        best = {name: max(entry.get(key, -1.0) for entry in history) for name, key in _ACCURACIES.items()}
        leader = max(best, key=lambda name: best[name])
        say(
            f"best_checkpoint.pth is by {_WEIGHTS[run.recipe.best_by]}; the best so far is of {_WEIGHTS[leader]}: "
            f"raw {best['raw']:.2f}%, EMA {best['ema']:.2f}%"
        )


_ACCURACIES = {"raw": "test_acc1", "ema": "test_ema_acc1"}
_WEIGHTS = {"raw": "the raw weights", "ema": "the averaged (EMA) weights"}


def _introduce(run: Training) -> None:
    """Say what is trained on what, and how."""
    recipe, data, state, world, plan, say = run.recipe, run.data, run.state, run.world, run.plan, run.say
    say(f"Data: {data.name}")
    say(f"Evaluation transform: {eval_transform(recipe)}")
    if recipe.data_on_device:
        size = data.train.images.nbytes + data.val.images.nbytes
        kind = "bytes" if data.train.images.dtype == torch.uint8 else "floats"
        say(f"Images are held on {world.device} as {kind} ({size / 2**20:.1f} MiB) and augmented there")
    say(f"Model: {recipe.model}\n{describe(state.model)}")
    say(f"number of params: {trainable(state.model)}")
    parts = f" x {plan.parts} parts" if plan.parts > 1 else ""
    say(
        f"Batch: {plan.size} x {world.size} process(es){parts} = {plan.total}, {run.steps} steps an epoch; "
        f"learning rate after warm-up: {peak_lr(recipe, world.size):.4g}; device: {world.device}"
    )
    if recipe.repeated_aug:
        say("Repeated augmentation: an epoch shows about a third of the images, each three times (--no-repeated-aug)")
    images = f"on {len(data.train)} images, evaluated on {len(data.val)}"
    say(
        f"Start training for {recipe.epochs} epochs {images}"
        + (f", from {state.next_epoch}" if state.next_epoch else "")
    )


def _accuracy_of_best(state: State, data: Data, recipe: Recipe, world: World) -> float:
    """What a new best has to beat, when the resumed file does not say: measured."""
    path = Path(recipe.output_dir) / BEST
    model = state.model
    if recipe.output_dir and path.is_file():
        model = copy.deepcopy(model)
        load_reference_state_dict(model, read_checkpoint(path).model)
    return evaluate_data(model, data, recipe, world).acc1


def _result(run: Training, seconds: float) -> TrainResult:
    state = run.state
    line = state.history[-1]
    return TrainResult(
        model=state.model.eval(),
        ema_model=state.ema.module if state.ema is not None else None,
        best_accuracy=state.best_accuracy,
        accuracy=line["test_acc1"],
        loss=line["test_exact_loss"],
        ema_accuracy=line.get("test_ema_acc1"),
        ema_loss=line.get("test_ema_exact_loss"),
        history=state.history,
        seconds=seconds,
        data_name=run.data.name,
    )
