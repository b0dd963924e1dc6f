"""The training loop: its losses and schedule as written, exact resume, files, refusals, and two real processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from timm.data import Mixup
from training import ALONE, KWARGS, Stop, log_without_times, quiet, read, run_until, same, stop_after, tiny

import lape
from lape.core.position import resample
from lape.data.loaders import steps_per_epoch
from lape.data.open import load_data
from lape.data.processes import SIGNALS
from lape.errors import CheckpointError, LapeError
from lape.recipe import Recipe
from lape.train.evaluate import evaluate_checkpoint
from lape.train.faults import TWICE
from lape.train.logs import BOARD, LOG, RUN, TABLE
from lape.train.loop import train, training_loss
from lape.train.losses import classification_loss, distillation_loss
from lape.train.start import build_model
from lape.train.state import BEST, CHECKPOINT, LOCK, PREVIOUS, initial_state, peak_lr

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------ losses


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[0.3, 1.1, -0.2], [-1.0, 0.4, 0.9]], dtype=torch.float64)
P = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)


def test_cross_entropy_with_label_smoothing():
    expected = 0.0
    for i, label in enumerate((2, 0)):
        target = [0.1 / 3 + 0.9 * (c == label) for c in range(3)]
        expected -= sum(t * math.log(p) for t, p in zip(target, P[i].tolist(), strict=True)) / 2
    assert classification_loss(LOGITS, torch.tensor([2, 0]), smoothing=0.1).item() == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_with_the_soft_targets_of_mixup_is_not_smoothed_again():
    target = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64)
    expected = -(target * P.log()).sum() / 2
    assert classification_loss(LOGITS, target, smoothing=0.1).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("target", [torch.tensor([2, 0]), torch.tensor([[0, 0.4, 0.6], [1.0, 0, 0]])])
def test_binary_cross_entropy_makes_every_mixed_class_a_target(target):
    hot = [[0, 0, 1], [1, 0, 0]] if target.ndim == 1 else [[0, 1, 1], [1, 0, 0]]
    terms = [
        -math.log(s if on else 1 - s)
        for i in range(2)
        for on, s in zip(hot[i], torch.sigmoid(LOGITS[i]).tolist(), strict=True)
    ]
    assert classification_loss(LOGITS, target, bce=True).item() == pytest.approx(sum(terms) / 6, abs=1e-6)


def test_hard_distillation():
    expected = -(math.log(P[0, 1]) + math.log(P[1, 2])) / 2
    assert distillation_loss(LOGITS, TEACHER, kind="hard").item() == pytest.approx(expected, abs=1e-6)


def test_soft_distillation_has_the_scale_of_deit():
    tau = 3.0
    p, q = (torch.softmax(logits / tau, 1) for logits in (LOGITS, TEACHER))
    expected = tau**2 / 6 * (q * (q.log() - p.log())).sum()  # over B = 2 and C = 3
    found = distillation_loss(LOGITS, TEACHER, kind="soft", tau=tau)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_training_loss_weighs_both_heads():
    recipe = tiny(distillation_type="hard", teacher_path="t.pth", distillation_alpha=0.3, smoothing=0.0)
    targets = torch.tensor([2, 0])
    found = training_loss((LOGITS, TEACHER), torch.zeros(2), targets, recipe, lambda _images: LOGITS)
    expected = 0.7 * classification_loss(LOGITS, targets) + 0.3 * distillation_loss(TEACHER, LOGITS, kind="hard")
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)


# ------------------------------------------------------------------------------------------------ optimizer, schedule


def test_learning_rate_is_scaled_by_the_batch_of_all_processes():
    assert peak_lr(tiny(batch_size=256, lr=5e-4, unscale_lr=False), 4) == pytest.approx(1e-3)
    assert peak_lr(tiny(batch_size=256, lr=5e-4, unscale_lr=True), 4) == 5e-4


def test_the_schedule_is_warm_up_and_cosine_by_the_formula():
    recipe = tiny(epochs=10, warmup_epochs=3, warmup_lr=1e-6, min_lr=1e-5, lr=1e-3)
    state = initial_state(recipe, build_model(recipe, 10), ALONE)
    for epoch in range(10):
        state.scheduler.step(epoch)
        cosine = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 10)) / 2
        expected = 1e-6 + epoch * (1e-3 - 1e-6) / 3 if epoch < 3 else cosine
        for group in state.optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-12)


def test_epochs_behind_the_schedule_are_at_the_lowest_rate():
    recipe = tiny(epochs=7, schedule_epochs=5, warmup_epochs=1, lr=1e-3)
    shorter = tiny(epochs=5, warmup_epochs=1, lr=1e-3)
    whole, cut = (initial_state(r, build_model(r, 10), ALONE) for r in (shorter, recipe))
    for epoch in range(7):
        rates = []
        for state in (whole, cut):
            state.scheduler.step(epoch)
            rates.append(state.optimizer.param_groups[0]["lr"])
        assert rates[1] == (rates[0] if epoch < 5 else 1e-5)


@pytest.mark.parametrize("one", [{"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": (0.1, 0.2)}], ids=str)
def test_each_way_of_mixing_does_without_the_others(one, monkeypatch):
    targets: list[torch.Tensor] = []
    monkeypatch.setattr(
        "lape.train.loop.training_loss", lambda *args: (targets.append(args[2]), training_loss(*args))[1]
    )
    train(tiny(batch_size=512, **{"mixup": 0.0, "cutmix": 0.0, **one}), say=quiet)
    assert {target.ndim for target in targets} == {2}


@pytest.mark.parametrize("off", [None, 0, 1])
def test_mixup_goes_off_at_its_epoch(off, monkeypatch):
    mixed: list[bool] = []

    def watched(self, images, targets):
        mixed.append(self.mixup_enabled)
        return original(self, images, targets)

    original = Mixup.__call__
    monkeypatch.setattr(Mixup, "__call__", watched)
    train(tiny(epochs=2, batch_size=512, repeated_aug=False, mixup_off_epoch=off), say=quiet)
    first, second = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
    assert set(first) == {True}
    assert set(second) == {off != 1}


@pytest.mark.parametrize("join", ["basic", "LaPE", "unshare"])
def test_position_prefix_and_norms_have_no_weight_decay(join):
    recipe = tiny(join_type=join, as_original=())
    model = build_model(recipe, 10)
    state = initial_state(recipe, model, ALONE)
    decayed = {id(p) for g in state.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    covered = {id(p) for g in state.optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert id(parameter) in covered
        free = any(part in name for part in ("pos_embed", "lape.", "cls_token", "norm", "bias"))
        assert (id(parameter) in decayed) != free, name


@pytest.mark.parametrize(("decay", "like"), [(0.0, "raw"), (1.0, "first")])
def test_the_moving_average_averages(decay, like):
    recipe = tiny(model_ema_decay=decay)
    result = train(recipe, say=quiet)
    expected = result.model if like == "raw" else build_model(recipe, 10)
    assert result.ema_model is not None
    for found, wanted in zip(result.ema_model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


def test_without_train_mode_there_is_neither_dropout_nor_stochastic_depth():
    free = train(tiny(drop=0.5, drop_path=0.5, train_mode=False), say=quiet)
    plain = train(tiny(drop=0.0, drop_path=0.0), say=quiet)
    dropped = train(tiny(drop=0.5, drop_path=0.5), say=quiet)
    assert free.history[0]["train_loss"] == plain.history[0]["train_loss"]
    assert free.history[0]["train_loss"] != dropped.history[0]["train_loss"]


def test_attention_only_leaves_the_rest_as_it_was():
    recipe = tiny(attn_only=True, clip_grad=1.0, model_ema=False)
    before = dict(build_model(recipe, 10).named_parameters())
    after = dict(train(recipe, say=quiet).model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if ".attn." in name or name.startswith("head.") or name.endswith("pos_embed")}
    assert changed == trained


# ------------------------------------------------------------------------------------------------ resume


FULL = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "drop": 0.1, "epochs": 3, "warmup_epochs": 1, "clip_grad": 1.0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(tiny(**FULL, output_dir=str(folder)), say=quiet)
    return folder


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_with_the_same_bits(uninterrupted, tmp_path, workers):
    recipe = tiny(**FULL, output_dir=str(tmp_path), num_workers=workers)
    run_until(2, recipe)
    assert len(log_without_times(tmp_path)) == 2
    train(recipe.replace(resume=str(tmp_path / CHECKPOINT)), say=quiet)
    found, wanted = read(tmp_path / CHECKPOINT), read(uninterrupted / CHECKPOINT)
    for key in ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "max_accuracy"):
        assert same(found[key], wanted[key]), key
    assert same(read(tmp_path / BEST)["model"], read(uninterrupted / BEST)["model"])
    assert log_without_times(tmp_path) == log_without_times(uninterrupted)


@pytest.fixture
def heeds_signals():
    """A job in the background would inherit deafness to Ctrl-C."""
    usual = {one: signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL for one in SIGNALS}
    before = {one: signal.signal(one, handler) for one, handler in usual.items()}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize(
    ("number", "line", "steps"),
    [
        (signal.SIGTERM, "Epoch: [1]  [2/5]", 4),  # seen at the step after the signal
        (signal.SIGHUP, "Epoch: [1]  [2/5]", 4),
        (signal.SIGINT, "Epoch: [1]  [2/5]", 4),
        (signal.SIGTERM, "Averaged stats", 5),  # all of them, not evaluated
    ],
)
def test_a_signal_saves_within_the_epoch_and_the_run_goes_on_with_the_same_bits(
    uninterrupted, tmp_path, number, line, steps
):
    recipe = tiny(**FULL, output_dir=str(tmp_path), log_every=1)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith(line) and sum(one.startswith("Averaged stats") for one in said) == 1 + (steps == 5):
            os.kill(os.getpid(), number)

    before = {one: signal.getsignal(one) for one in SIGNALS}
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stop:
        train(recipe, say=say)
    assert number == signal.SIGINT or stop.value.code == 128 + number
    assert {one: signal.getsignal(one) for one in SIGNALS} == before
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    where = f"saved after step {steps} of epoch 1 in {tmp_path / CHECKPOINT}"
    assert said[-1] == f"{name}: {where}; to go on: the same command with --resume auto"
    stopped = read(tmp_path / CHECKPOINT)
    assert (stopped["epoch"], stopped["step"]) == (0, steps)
    if number != signal.SIGTERM:
        return  # which signal it was is in no file
    train(recipe.replace(resume=str(tmp_path / CHECKPOINT)), say=quiet)
    found, wanted = read(tmp_path / CHECKPOINT), read(uninterrupted / CHECKPOINT)
    assert all(same(found[key], wanted[key]) for key in ("model", "model_ema", "optimizer", "max_accuracy"))
    assert log_without_times(tmp_path) == log_without_times(uninterrupted)


@pytest.mark.slow
@pytest.mark.usefixtures("heeds_signals")
def test_ctrl_c_twice_does_not_wait_and_what_is_ignored_stays_ignored(tmp_path):
    def press(text: str) -> None:
        if text.startswith("Epoch: [0]  [1/5]"):
            os.kill(os.getpid(), signal.SIGHUP)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1.2 * TWICE)
            raise AssertionError("the second had no effect")

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with pytest.raises(KeyboardInterrupt):
        train(tiny(log_every=1, output_dir=str(tmp_path)), say=press)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.slow
def test_auto_resumes_from_the_newest_whole_file(uninterrupted, tmp_path):
    recipe = tiny(**FULL, output_dir=str(tmp_path), resume="auto")
    run_until(1, recipe)  # there is nothing yet: a new run
    said: list[str] = []
    with pytest.raises(Stop):
        train(recipe, on_epoch=stop_after(2), say=said.append)
    assert any("after epoch 0" in text for text in said)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    said.clear()
    train(recipe, say=said.append)
    assert any(CHECKPOINT in text and "skipped" in text for text in said)
    assert same(read(tmp_path / CHECKPOINT)["model"], read(uninterrupted / CHECKPOINT)["model"])


def test_a_worse_epoch_after_a_resume_leaves_the_best_alone(tmp_path):
    recipe = tiny(epochs=2, output_dir=str(tmp_path))
    run_until(1, recipe)
    content = read(tmp_path / CHECKPOINT)
    torch.save({**content, "max_accuracy": 99.0}, tmp_path / CHECKPOINT)
    before = (tmp_path / BEST).read_bytes()
    result = train(recipe.replace(resume=str(tmp_path / CHECKPOINT)), say=quiet)
    assert result.best_accuracy == 99.0
    assert (tmp_path / BEST).read_bytes() == before
    assert read(tmp_path / CHECKPOINT)["max_accuracy"] == 99.0


def test_an_unknown_best_is_measured(tmp_path):
    recipe = tiny(epochs=2, output_dir=str(tmp_path))
    run_until(1, recipe)
    content = read(tmp_path / CHECKPOINT)
    del content["max_accuracy"], content["history"]
    torch.save(content, tmp_path / CHECKPOINT)
    result = train(recipe.replace(resume=str(tmp_path / CHECKPOINT), lr=0.0), say=quiet)
    first, second = log_without_times(tmp_path)  # the first line is that of the existing log
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert result.best_accuracy == max(first["test_acc1"], second["test_acc1"])


def test_settings_that_changed_are_named(tmp_path):
    recipe = tiny(epochs=3, output_dir=str(tmp_path))
    run_until(1, recipe)
    said: list[str] = []
    train(recipe.replace(resume=str(tmp_path / CHECKPOINT), lr=1e-3, num_workers=1), say=said.append)
    assert "Other settings than that run had, from now on: lr 0.002 -> 0.001" in said


def test_what_cannot_be_resumed_is_refused(tmp_path):
    recipe = tiny(output_dir=str(tmp_path))
    train(recipe, say=quiet)
    with pytest.raises(LapeError, match="finished epoch 1 of 1"):
        train(recipe.replace(resume=str(tmp_path / CHECKPOINT)), say=quiet)
    content = read(tmp_path / CHECKPOINT)
    torch.save({"model": content["model"], "args": content["args"]}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"no optimizer and no epoch.*--finetune"):
        train(recipe.replace(resume=str(tmp_path / "weights.pth"), epochs=2), say=quiet)
    with pytest.raises(CheckpointError, match="contradicts"):
        train(recipe.replace(resume=str(tmp_path / CHECKPOINT), epochs=2, join_type="basic"), say=quiet)


def test_a_file_whose_optimizer_names_no_parameters_is_refused(tmp_path):
    """As those of DeiT and of the LaPE authors: their order is that of other code."""
    recipe = tiny(output_dir=str(tmp_path))
    train(recipe, say=quiet)
    content = read(tmp_path / CHECKPOINT)
    del content["optimizer_names"]
    torch.save(content, tmp_path / "deit.pth")
    with pytest.raises(CheckpointError, match=r"not written by this project .*: start from it with --finetune"):
        train(recipe.replace(resume=str(tmp_path / "deit.pth"), epochs=2), say=quiet)


# ------------------------------------------------------------------------------------------------ files


def test_files_hold_what_is_promised(uninterrupted):
    assert sorted(path.name for path in uninterrupted.iterdir()) == sorted(
        [CHECKPOINT, PREVIOUS, BEST, LOG, TABLE, LOCK, RUN, BOARD]
    )
    content = read(uninterrupted / CHECKPOINT)
    deit = {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"}
    assert deit | {"classes", "transform", "model_kwargs"} <= content.keys()
    assert {"pos_embed", "blocks.0.pe_norm.weight", "blocks.0.norm1.weight"} <= content["model"].keys()
    assert content["classes"] == [str(digit) for digit in range(10)]
    lines = log_without_times(uninterrupted)
    keys = {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters", "test_ema_acc1"}
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(keys <= line.keys() for line in lines)
    best = max(line["test_acc1"] for line in lines)
    assert read(uninterrupted / BEST)["max_accuracy"] == best
    found = evaluate_checkpoint(Recipe(resume=str(uninterrupted / BEST), device="cpu", batch_size=256), say=quiet)
    assert found.acc1 == best
    assert found.loss == pytest.approx(next(x["test_exact_loss"] for x in lines if x["test_acc1"] == best), abs=1e-6)


def test_an_empty_output_dir_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(tiny(output_dir=""), say=quiet)
    assert list(tmp_path.iterdir()) == []
    assert len(result.history) == 1


def test_another_run_is_not_overwritten(tmp_path):
    (tmp_path / BEST).write_bytes(b"of another run")
    with pytest.raises(LapeError, match=f"holds a run already.*--resume .*{BEST}"):
        train(tiny(output_dir=str(tmp_path)), say=quiet)
    assert [path.name for path in tmp_path.iterdir()] == [BEST]
    assert (tmp_path / BEST).read_bytes() == b"of another run"


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (
            3,
            r"3 steps in a row .*loss nan, gradient norm nan, learning rate .*e\+\d+ in epoch 1, step",
        ),
        (10, r"outputs for \d+ of 359 images are NaN or infinite.*validation after epoch 1 at learning rate .*e\+"),
    ],
)
def test_weights_that_are_lost_stop_the_run_and_keep_the_checkpoint(tmp_path, most, message):
    recipe = tiny(epochs=3, opt="sgd", output_dir=str(tmp_path))
    run_until(1, recipe)
    before = {name: (tmp_path / name).read_bytes() for name in (CHECKPOINT, BEST, LOG)}
    broken = recipe.replace(resume=str(tmp_path / CHECKPOINT), lr=1e30, max_skipped=most)
    with pytest.raises(LapeError, match=message) as caught:
        train(broken, say=quiet)
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_step_that_is_not_finite_is_skipped_counted_and_changes_nothing(tmp_path, monkeypatch):
    calls = []

    def broken(*args):
        calls.append(training_loss(*args))
        return calls[-1] * float("nan") if len(calls) == 3 else calls[-1]

    monkeypatch.setattr("lape.train.loop.training_loss", broken)
    said: list[str] = []
    result = train(tiny(save_steps=1, output_dir=str(tmp_path)), say=said.append)
    assert any(re.search(r"Step skipped.*loss nan, gradient norm nan.*epoch 0, step 2 \(1 in a row\)", s) for s in said)
    assert "Left out in this epoch: 1 step(s) without a finite loss" in said
    line = result.history[0]
    assert line["skipped_steps"] == 1
    good = [loss.item() for number, loss in enumerate(calls) if number != 2]
    assert line["train_loss"] == pytest.approx(sum(good) / 4, rel=1e-6)
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_bad_steps_in_a_row_are_counted_across_a_resume(tmp_path, monkeypatch):
    calls = []

    def broken(*args):
        calls.append(training_loss(*args))
        return calls[-1] * float("nan") if len(calls) > 3 else calls[-1]  # of 5 steps

    monkeypatch.setattr("lape.train.loop.training_loss", broken)
    recipe = tiny(epochs=2, max_skipped=3, output_dir=str(tmp_path), resume="auto")
    run_until(1, recipe)
    assert read(tmp_path / CHECKPOINT)["bad_in_row"] == 2
    with pytest.raises(LapeError, match="3 steps in a row"):
        train(recipe, say=quiet)
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bce_loss": True, "smoothing": 0.1}, "--smoothing 0"),
        ({"sched": "plateau"}, "use cosine or step"),
        ({"opt": "adamww"}, "did you mean 'adamw'"),
        ({"model": "deit_tinny_patch16_224"}, "did you mean 'deit_tiny"),
        ({"input_size": 18}, "not divisible by the patch"),
        ({"batch_size": 4096}, "larger than the training set"),
        ({"batch_size": 255}, "odd"),
        ({"data_path": "/no/such/folder"}, "/no/such/folder"),
        ({"amp": "fp16"}, "--amp bf16"),
        ({"start_epoch": 1}, "raise --epochs"),
        ({"resume": "/no/such.pth"}, "/no/such.pth"),
        ({"finetune": "/no/such.pth"}, "/no/such.pth"),
        ({"distillation_type": "hard", "teacher_path": "/no/such.pth"}, "no distillation head"),
        ({"distillation_type": "hard", "teacher_path": "/no/such.pth", "train_mode": False}, "--no-train-mode"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, changes, message):
    output = tmp_path / "out"
    with pytest.raises(LapeError) as caught:
        train(tiny(**{"output_dir": str(output), **changes}), say=quiet)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(LapeError, match="cannot be written"):
        train(tiny(output_dir=str(tmp_path / "out")), say=quiet)
    assert (tmp_path / "out").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ other weights


def test_finetuning_resamples_the_table_and_starts_another_head_anew(tmp_path):
    recipe = tiny(output_dir=str(tmp_path))
    train(recipe, say=quiet)
    old = read(tmp_path / CHECKPOINT)["model"]
    said: list[str] = []
    larger = tiny(finetune=str(tmp_path / CHECKPOINT), input_size=24, as_original=())
    model = build_model(larger, 3, said.append)
    state = lape.to_reference_state_dict(model)
    expected = resample(old["pos_embed"], lape.Layout((4, 4), 1), (6, 6))
    torch.testing.assert_close(state["pos_embed"], expected, rtol=0, atol=0)
    assert state["head.weight"].shape == (3, 16)
    for name, tensor in old.items():
        assert name in ("pos_embed", "head.weight", "head.bias") or torch.equal(state[name], tensor)
    assert len(said) == 1
    assert "head.weight, head.bias" in said[0]


def test_finetuning_puts_lape_into_a_model_without(tmp_path):
    train(tiny(join_type="basic", output_dir=str(tmp_path)), say=quiet)
    said: list[str] = []
    model = build_model(tiny(finetune=str(tmp_path / CHECKPOINT)), 10, said.append)
    state = lape.to_reference_state_dict(model)
    assert all(torch.equal(state[name], t) for name, t in read(tmp_path / CHECKPOINT)["model"].items())
    assert torch.equal(state["blocks.1.pe_norm.weight"], torch.ones(16))
    assert "pe_norm" in said[0]


def test_finetuning_does_not_drop_weights_silently(tmp_path):
    train(tiny(output_dir=str(tmp_path)), say=quiet)
    with pytest.raises(CheckpointError, match=r"unexpected.*pe_norm"):
        build_model(tiny(finetune=str(tmp_path / CHECKPOINT), join_type="basic"), 10)


@pytest.mark.parametrize("kind", [pytest.param("soft", marks=pytest.mark.slow), "hard"])
def test_distillation_trains_both_heads(tmp_path, kind):
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=10)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    settings = {"model": "deit_tiny_distilled_patch16_224", "teacher_model": "test_resnet", "distillation_type": kind}
    recipe = tiny(**settings, teacher_path=str(tmp_path / "teacher.pth"), input_size=32, batch_size=512)
    before = build_model(recipe, 10)
    after = train(recipe, say=quiet).model
    for name in ("head.weight", "head_dist.weight", "dist_token"):
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name)), name


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    torch.save({"model": timm.create_model("test_resnet", num_classes=7).state_dict()}, tmp_path / "teacher.pth")
    settings = {"model": "deit_tiny_distilled_patch16_224", "teacher_model": "test_resnet", "distillation_type": "soft"}
    with pytest.raises(CheckpointError, match="is not a test_resnet with 10 classes") as caught:
        train(tiny(**settings, teacher_path=str(tmp_path / "teacher.pth"), input_size=32), say=quiet)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.distributed
def test_two_processes_train_write_and_evaluate_to_the_number_in_the_log(tmp_path):
    out = tmp_path / "out"
    flags = "--model vit_tiny_patch16_224 --join-type LaPE --input-size 16 --batch-size 64 --epochs 2 --lr 0.01"
    flags += " --warmup-epochs 0 --aa none --reprob 0 --mixup 0 --cutmix 0 --no-repeated-aug --device cpu --dist-eval"
    kwargs = ["--model-kwargs", json.dumps(KWARGS)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "main.py"]
    done = subprocess.run(
        [*command, *flags.split(), *kwargs, "--output_dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Start training for 2 epochs") == 1, "only the first process speaks"
    assert "64 x 2 process(es) = 128" in done.stdout
    assert "Warning" not in done.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [CHECKPOINT, PREVIOUS, BEST, LOG, TABLE, LOCK, RUN, BOARD]
    )
    first, last = log_without_times(out)
    assert last["train_loss"] < first["train_loss"]
    found = evaluate_checkpoint(Recipe(resume=str(out / CHECKPOINT), device="cpu"), say=quiet)
    assert (found.acc1, found.acc5) == (last["test_acc1"], last["test_acc5"])
    assert found.loss == pytest.approx(last["test_exact_loss"], abs=1e-6)
    assert found.batch_loss == pytest.approx(last["test_loss"], abs=1e-6)


def test_an_epoch_has_whole_batches_only():
    recipe = tiny(batch_size=256)
    assert steps_per_epoch(len(load_data(recipe).train), recipe, 1) == 1438 // 256
