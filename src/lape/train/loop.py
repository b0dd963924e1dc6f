"""Training: one loop that can be read from top to bottom, for the whole recipe of DeiT.

A plain loop rather than `timm.task`: the loss is DeiT's to the last digit (`timm.task` scales soft distillation by the
number of classes), and the reader sees every step. Optimizer, schedule, Mixup and EMA are timm's.

**Exact resume.** Nothing random is saved. Before each step the generators are seeded from (seed, epoch, step, rank),
the data set does the same for each image, and the schedule is a function of the epoch. So a run that was stopped, at
any moment, and resumed from its `checkpoint.pth` ends with the same bits as one that was not.

**Files** in `output_dir`, each replaced as a whole: `checkpoint.pth` (after every epoch, on SIGTERM, within an epoch
as `save_steps` and `save_minutes` say), the one before it as `previous_checkpoint.pth`, `best_checkpoint.pth` (best
top-1 so far, of the raw weights unless `best_by` says otherwise), `log.txt` (one JSON line an epoch: DeiT's keys with
DeiT's meaning, and ours), the same as `log.csv`, `run.json` (what ran, with what, on what), and TensorBoard's curves.
"""

from __future__ import annotations

import copy
import datetime
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lape.data.augment import eval_transform
from lape.data.loaders import BatchPlan, batch_plan, eval_loader, steps_per_epoch, train_loader
from lape.data.open import Data, load_data
from lape.errors import DataError, LapeError
from lape.files.read import read_checkpoint
from lape.files.restore import check_classes, settings_of
from lape.layers import describe
from lape.recipe import Recipe
from lape.reference import load_reference_state_dict
from lape.train.distributed import World, expect_answers, join_world, on_main, sum_over_ranks
from lape.train.evaluate import Metrics, autocast, evaluate
from lape.train.faults import explained, make_deterministic, sigterm
from lape.train.logs import Curves, check_services, record_run
from lape.train.losses import classification_loss, distillation_loss
from lape.train.progress import Progress
from lape.train.start import build_model, check_warm_start, load_teacher, trainable
from lape.train.state import (
    BEST,
    CHECKPOINT,
    State,
    agree,
    check_output,
    find_resumed,
    has_finished,
    peak_lr,
    resume,
    save,
    start,
    write_log,
)

Say = Callable[[str], None]


@dataclass
class TrainResult:
    """What a run produced. Accuracies are top-1 in percent, losses the mean cross entropy, of the validation images."""

    model: nn.Module  # the raw weights after the last epoch
    ema_model: nn.Module | None
    best_accuracy: float  # over all epochs, of the weights that `best_by` names
    accuracy: float
    loss: float
    ema_accuracy: float | None
    ema_loss: float | None
    history: list[dict[str, Any]]  # the lines of log.txt, those before a resume included
    seconds: float  # of this call
    data_name: str


def train(recipe: Recipe, *, on_epoch: Callable[[dict[str, Any]], None] | None = None, say: Say = print) -> TrainResult:
    """Train as the recipe says, evaluate after every epoch, and leave the files named above.

    Under `torchrun` every process calls this; files and output are those of the first.

    Args:
        on_epoch: called in every process with the epoch's log line, after the files are written.
        say: where lines of output go.

    Raises:
        LapeError: the recipe, the data, the device or a file is wrong (before anything is written), a file cannot be
            written, memory does not suffice, another process is gone, or too many steps in a row have no finite loss
            and gradient. The last checkpoint stands.
        SystemExit: SIGTERM came; the run was saved after the step and can be resumed within its epoch.
    """
    with ExitStack() as at_end:
        world = at_end.enter_context(join_world(recipe.device, recipe.dist_timeout))
        stop = at_end.enter_context(sigterm())
        at_end.enter_context(explained(recipe))
        say = say if world.is_main else _silence
        began = time.perf_counter()

        # Everything that can be wrong is found here, before a file is touched.
        _check(recipe, world.device)
        _set_up_torch(recipe)
        resumed = find_resumed(recipe, say)
        agree(resumed, world)
        if resumed is not None:
            recipe = settings_of(resumed, recipe)
        check_warm_start(recipe, resumed)
        data = load_data(recipe, world_size=world.size, device=world.device)
        plan = batch_plan(recipe, world.size)
        steps = steps_per_epoch(len(data.train), recipe, world.size)
        num_classes = len(data.classes)
        if resumed is not None:
            check_classes(resumed, data.classes)
            num_classes = resumed.num_classes or num_classes  # the authors' files have 1000 outputs for any data
        state = start(recipe, build_model(recipe, num_classes, say).to(world.device), world)
        teacher = load_teacher(recipe, num_classes, world.device, say)
        if resumed is not None:
            resume(state, resumed, recipe, plan, say)
            if "max_accuracy" not in resumed.raw:
                state.best_accuracy = _accuracy_of_best(state, data, recipe, world)
        on_main(lambda: check_output(recipe, resumed, at_end))
        if resumed is not None and has_finished(resumed, recipe):
            on_main(lambda: _complete_files(state, data, recipe, plan, resumed.path.name))
            say(f"The run has finished its {recipe.epochs} epochs already: nothing is left to train")
            return _result(state, data, time.perf_counter() - began)
        curves = _open_curves(state, recipe, world)
        if curves is not None:
            at_end.callback(curves.close)
        _introduce(recipe, data, state, world, plan, steps, say)
        net = _parallel(state.model, recipe, world, plan)
        mixup = _mixup(recipe, num_classes)
        parameters = list(state.model.parameters())  # once: to walk through the model takes time
        expect_answers(recipe.dist_timeout)
        saved = time.monotonic()

        for epoch in range(state.next_epoch, recipe.epochs):
            lr = state.optimizer.param_groups[0]["lr"]
            progress = Progress(f"Epoch: [{epoch}]", state.next_step, steps, plan, world, recipe.log_every, say)
            loader = train_loader(
                data.train,
                recipe,
                epoch=epoch,
                rank=world.rank,
                world_size=world.size,
                skip_batches=state.next_step,
                device=world.device,
            )
            net.train(recipe.train_mode)
            loss_of_step = torch.zeros((), device=world.device)
            batches = at_end.enter_context(closing(progress.over(loader)))  # an error must not leave its processes
            for number, (images, targets) in enumerate(batches, start=state.next_step * plan.parts):
                step, part = divmod(number, plan.parts)
                last = part == plan.parts - 1  # of the batches whose gradients make this step
                seed_step(recipe.seed, epoch, step, world.rank, part)
                images = images.to(world.device, non_blocking=True)
                targets = targets.to(world.device, non_blocking=True)
                if mixup is not None:
                    mixup.mixup_enabled = epoch < (recipe.mixup_off_epoch or recipe.epochs)
                    images, targets = mixup(images, targets)
                with _exchanging(net, last):
                    with autocast(recipe.amp, world.device):
                        loss = training_loss(net(images), images, targets, recipe, teacher) / plan.parts
                    state.scaler.scale(loss).backward()
                loss_of_step += loss.detach()
                if not last:
                    continue

                grad_norm = _gradient_norm(state, parameters, recipe.clip_grad)
                corrupt = len(loader.skipped)
                _name_skipped(loader.skipped)
                due = world.is_main and _save_is_due(recipe, step, time.monotonic() - saved)
                # Every process learns it of any process, so that all decide the same.
                news = [*torch.stack([loss_of_step, grad_norm]).tolist(), stop.is_set(), corrupt, due]
                shared = sum_over_ranks(torch.tensor(news, dtype=torch.float64)) / world.size
                value, norm, stopped, lost, due = shared.tolist()
                good = math.isfinite(value) and math.isfinite(norm)
                if good:
                    state.scaler.step(state.optimizer)
                    if state.ema is not None:
                        state.ema.update(state.model, epoch * steps + step + 1 if recipe.model_ema_warmup else None)
                    state.loss_sum += value
                    state.bad_in_row = 0
                state.scaler.update()
                state.optimizer.zero_grad()
                loss_of_step.zero_()
                state.skipped_images += round(lost * world.size)
                state.next_step = step + 1
                progress.report(loss=value, lr=lr, grad_norm=norm)
                if not good:
                    _count_bad_step(state, recipe, f"{value:.4g}", f"{norm:.4g}", epoch, step, lr, say)
                if stopped:
                    _save_and_exit(state, data, recipe, plan, say)
                if due and good and state.next_step < steps and recipe.output_dir:
                    on_main(lambda: save(state, data, recipe, plan))
                    saved = time.monotonic()
            if state.scheduler is not None:
                state.scheduler.step(epoch + 1)

            line = _epoch_line(state, epoch, lr, steps, progress)
            say(f"Averaged stats: lr: {lr:.6f}  loss: {line['train_loss']}")
            try:
                raw = _measure(state.model, data, recipe, world)
                ema = _measure(state.ema.module, data, recipe, world) if state.ema is not None else None
            except DataError:  # a bad validation image must not cost the epoch that was just trained
                if recipe.output_dir:  # all processes are here
                    on_main(lambda: save(state, data, recipe, plan))
                raise
            if not math.isfinite(raw.loss):
                raise LapeError(_weights_are_broken(raw.loss, epoch, lr))
            line = {**line, **raw.log("test"), **(ema.log("test_ema") if ema is not None else {})}
            found = ema.acc1 if ema is not None and recipe.best_by == "ema" else raw.acc1
            better = found > state.best_accuracy
            if better:
                state.best_accuracy, state.best_epoch = found, epoch
            state.begin_epoch(epoch + 1)
            state.history.append(line)
            _say_results(state, recipe, raw, ema, say)
            if recipe.output_dir:
                on_main(lambda better=better: save(state, data, recipe, plan, better=better))  # type: ignore[misc]
                saved = time.monotonic()
            if curves is not None:
                curves.add(line)
            if on_epoch is not None:
                on_epoch(line)
            if epoch + 1 < recipe.epochs:
                each = (time.perf_counter() - began) / (epoch + 1 - (resumed.raw["epoch"] + 1 if resumed else 0))
                say(f"About {datetime.timedelta(seconds=int(each * (recipe.epochs - epoch - 1)))} to go")
                if sum_over_ranks(torch.tensor([float(stop.is_set())])).item():
                    _exit_saved(state, recipe, say)

        seconds = time.perf_counter() - began
        say(f"Training time {datetime.timedelta(seconds=int(seconds))}")
        return _result(state, data, seconds)


# ------------------------------------------------------------------------------------------------ one step


def seed_step(seed: int, epoch: int, step: int, rank: int, part: int = 0) -> None:
    """Make dropout, stochastic depth and Mixup of a batch a function of these numbers."""
    entropy = (seed, epoch, step, rank, part) if part else (seed, epoch, step, rank)
    for_torch, for_numpy = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
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


def _exchanging(net: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients in the last batch of a step only."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not last else nullcontext()


def _gradient_norm(state: State, parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of the step's gradient, which is clipped to `limit` if there is one."""
    state.scaler.unscale_(state.optimizer)
    if limit is not None:
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])


def _count_bad_step(
    state: State, recipe: Recipe, loss: str, norm: str, epoch: int, step: int, lr: float, say: Say
) -> None:
    """A step that was skipped; too many in a row end the run. Raises LapeError."""
    state.skipped_steps += 1
    state.bad_in_row += 1
    what = f"loss {loss}, gradient norm {norm}, learning rate {lr:.3g} in epoch {epoch}, step {step}"
    if state.bad_in_row >= recipe.max_skipped:
        raise LapeError(
            f"{state.bad_in_row} steps in a row had no finite loss and gradient (--max-skipped), the last: {what}; "
            "training stops, the last checkpoint stands; lower --lr, add --clip-grad 1, or use --amp off or bf16"
        )
    say(f"Step skipped, it is not finite: {what} ({state.bad_in_row} in a row)")


def _weights_are_broken(loss: float, epoch: int, lr: float) -> str:
    return (
        f"the validation loss is {loss} after epoch {epoch} at learning rate {lr:.3g}: training stops, the last "
        "checkpoint stands; lower --lr, add --clip-grad 1, or use --amp off or bf16"
    )


def _name_skipped(skipped: list[str]) -> None:
    """Every process names its own, on stderr."""
    for text in skipped:
        print(f"left out: {text}", file=sys.stderr, flush=True)
    skipped.clear()


def _save_is_due(recipe: Recipe, step: int, seconds: float) -> bool:
    by_steps = recipe.save_steps and (step + 1) % recipe.save_steps == 0
    return bool(by_steps or (recipe.save_minutes and seconds >= 60 * recipe.save_minutes))


def _save_and_exit(state: State, data: Data, recipe: Recipe, plan: BatchPlan, say: Say) -> NoReturn:
    if recipe.output_dir and not state.bad_in_row:
        on_main(lambda: save(state, data, recipe, plan))
    _exit_saved(state, recipe, say)


def _exit_saved(state: State, recipe: Recipe, say: Say) -> NoReturn:
    where = f"step {state.next_step} of epoch {state.next_epoch}"
    if recipe.output_dir and not state.bad_in_row:
        say(f"SIGTERM: saved after {where}; go on with --resume")
    elif recipe.output_dir:
        say(f"SIGTERM after {where}: not saved, its loss was not finite; go on with --resume from the last checkpoint")
    raise SystemExit(128 + signal.SIGTERM)


# ------------------------------------------------------------------------------------------------ around the loop


def _check(recipe: Recipe, device: torch.device) -> None:
    """Refuse what cannot be trained. Raises LapeError."""
    autocast(recipe.amp, device)
    check_services(recipe)
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


def _set_up_torch(recipe: Recipe) -> None:
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if recipe.deterministic:
        make_deterministic()


def _parallel(model: nn.Module, recipe: Recipe, world: World, plan: BatchPlan) -> nn.Module:
    """What the loop calls. Its parameters are the model's own: evaluation and files use the model.

    DistributedDataParallel adds up gradients in another order from its second step on, when it has seen in which order
    they come. A run that goes on would take its first step as no other run did, and with three processes or more end
    with other bits. So a step on nothing comes first, of which nothing stays.
    """
    net: Any = torch.compile(model) if recipe.compile else model
    if world.size == 1:
        return net
    net = DistributedDataParallel(net, device_ids=[world.device] if world.device.type == "cuda" else None)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    nothing = torch.zeros(plan.size, recipe.in_chans, recipe.input_size, recipe.input_size, device=world.device)
    with autocast(recipe.amp, world.device):
        output = net.train(recipe.train_mode)(nothing)
    sum(one.float().sum() for one in (output if isinstance(output, tuple) else (output,))).backward()
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return net


def _open_curves(state: State, recipe: Recipe, world: World) -> Curves | None:
    """Write run.json and begin the curves, in the first process of a run with files."""
    opened: list[Curves] = []

    def act() -> None:
        if recipe.output_dir:
            run_id = record_run(recipe, world, (state.next_epoch, state.next_step))
            opened.append(Curves(recipe, state.history, run_id))

    on_main(act)
    return opened[0] if opened else None


def _complete_files(state: State, data: Data, recipe: Recipe, plan: BatchPlan, newest: str) -> None:
    """A run that was killed while it wrote its very last files gets the rest of them."""
    if newest != CHECKPOINT:
        save(state, data, recipe, plan)
    else:
        write_log(state.history, Path(recipe.output_dir))


def _measure(model: nn.Module, data: Data, recipe: Recipe, world: World) -> Metrics:
    """Evaluate on the validation images; with `dist_eval` the processes share them."""
    rank, size = (world.rank, world.size) if recipe.dist_eval else (0, 1)
    loader = eval_loader(data.val, recipe, rank=rank, world_size=size, device=world.device)
    if next(model.parameters()).device != world.device:  # an EMA in host memory
        model = copy.deepcopy(model).to(world.device)
    return evaluate(model, loader, world.device, amp=recipe.amp, shared=recipe.dist_eval)


def _epoch_line(state: State, epoch: int, lr: float, steps: int, progress: Progress) -> dict[str, Any]:
    """What log.txt says of an epoch's training. The loss is the mean over the steps that were not skipped."""
    counted = steps - state.skipped_steps
    return {
        "train_lr": lr,
        "train_loss": state.loss_sum / counted if counted else None,
        "epoch": epoch,
        "n_parameters": trainable(state.model),
        "skipped_steps": state.skipped_steps,
        "skipped_images": state.skipped_images,
        **progress.timing(),
    }


def _say_results(state: State, recipe: Recipe, raw: Metrics, ema: Metrics | None, say: Say) -> None:
    line = state.history[-1]
    say(f"{raw}\nAccuracy of the network on the {raw.count} test images: {raw.acc1:.1f}%")
    if ema is not None:
        say(f"EMA: {ema}".replace("* ", ""))
    for name, what in (("skipped_steps", "step(s) without a finite loss"), ("skipped_images", "unreadable image(s)")):
        if line[name]:
            say(f"Left out in this epoch: {line[name]} {what}")
    say(f"Max accuracy: {state.best_accuracy:.2f}%")
    if ema is not None:
        best = {name: max(past.get(key, -1.0) for past in state.history) for name, key in _ACCURACIES.items()}
        first = max(best, key=lambda name: best[name])
        say(
            f"best_checkpoint.pth is by {_WEIGHTS[recipe.best_by]}; the best so far is of {_WEIGHTS[first]}: "
            f"raw {best['raw']:.2f}%, EMA {best['ema']:.2f}%"
        )


_ACCURACIES = {"raw": "test_acc1", "ema": "test_ema_acc1"}
_WEIGHTS = {"raw": "the raw weights", "ema": "the averaged (EMA) weights"}


def _silence(_text: str) -> None:
    pass


def _introduce(recipe: Recipe, data: Data, state: State, world: World, plan: BatchPlan, steps: int, say: Say) -> None:
    """Say what is trained on what, and how."""
    say(f"Data: {data.name}")
    say(f"Evaluation transform: {eval_transform(recipe)}")
    if recipe.data_on_device:
        held = data.train.images.nbytes + data.val.images.nbytes
        say(f"Images are held on {world.device} as bytes ({held / 2**20:.1f} MiB) and augmented there")
    say(f"Model: {recipe.model}\n{describe(state.model)}")
    say(f"number of params: {trainable(state.model)}")
    parts = f" x {plan.parts} parts" if plan.parts > 1 else ""
    say(
        f"Batch: {plan.size} x {world.size} process(es){parts} = {plan.total}, {steps} steps an epoch; "
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
    return _measure(model, data, recipe, world).acc1


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
