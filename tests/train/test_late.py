"""A step that does not wait for its device: nothing is read while it is launched, and no result is another one.

No GPU is needed: fused AdamW leaves out a step on a CPU as well.
"""

import os
import signal
from contextlib import ExitStack

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import STATE, Killed, log_without_times, quiet, read, same, tiny

import lape.train.loop as loop
from lape.errors import LapeError
from lape.train.distributed import Reading
from lape.train.state import CHECKPOINT, State, initial_state

OF_EMA = ("test_ema_loss", "test_ema_exact_loss")


@pytest.fixture(autouse=True)
def _on_device(monkeypatch):
    monkeypatch.setattr("lape.train.state.decides", lambda _device, recipe: recipe.opt == "adamw")


@pytest.fixture
def not_finite(monkeypatch):
    """The gradient of the second step and the loss alone of the fourth, of each epoch, are not finite."""
    calls = []
    training_loss = loop.training_loss

    def broken(*args):
        calls.append(training_loss(*args))
        number = len(calls) % 5
        return calls[-1] * float("nan") if number == 2 else calls[-1] + float("inf") if number == 4 else calls[-1]

    monkeypatch.setattr(loop, "training_loss", broken)


class Functions(TorchFunctionMode):
    """Names what reads a tensor from Python."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Names operations whose result must be known before the next can be launched."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masked or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def watched(function, seen):
    def call(*args):
        with ExitStack() as modes:
            modes.enter_context(Functions(seen))
            modes.enter_context(Operations(seen))
            return function(*args)

    return call


@pytest.mark.parametrize("changes", [{}, {"data_on_device": True, "clip_grad": 1.0, "model_ema_warmup": True}])
def test_nothing_is_read_while_a_step_is_launched(monkeypatch, changes):
    seen: list[str] = []
    order: list[str] = []
    for name in ("_add_gradients", "_launch_update"):
        monkeypatch.setattr(loop, name, watched(getattr(loop, name), seen))
    update, of_device = State.update, Reading.read
    monkeypatch.setattr(State, "update", lambda *args: (order.append("step"), update(*args)))
    monkeypatch.setattr(Reading, "read", lambda self: (order.append("read"), of_device(self))[1])
    loop.train(tiny(mixup=0.8, cutmix=1.0, drop_path=0.1, **changes), say=quiet)
    assert seen == []
    assert order == ["step", *["step", "read"] * 4, "read"]
    monkeypatch.undo()  # and what does wait is seen
    monkeypatch.setattr(loop, "_launch_update", watched(loop._launch_update, seen))
    loop.train(tiny(**changes), say=quiet)
    assert seen.count("__bool__") == 5


@pytest.mark.slow
@pytest.mark.usefixtures("not_finite")
def test_reports_that_are_read_late_give_the_same_run(tmp_path, monkeypatch):
    lines: dict[str, list[str]] = {}
    for name, changes in (("late", {}), ("at once", {"save_steps": 1}), ("decided here", {})):
        if name == "decided here":

            def waiting(*args):
                state = initial_state(*args)
                state.on_device = False
                return state

            monkeypatch.setattr(loop, "initial_state", waiting)
        lines[name] = []
        recipe = tiny(epochs=2, mixup=0.8, log_every=1, output_dir=str(tmp_path / name), **changes)
        loop.train(recipe, say=lines[name].append)
    late, at_once, here = (read(tmp_path / name / CHECKPOINT) for name in lines)
    assert late["history"][0]["skipped_steps"] == 2
    assert all(same(late[key], at_once[key]) for key in STATE)
    assert all(same(late[key], here[key]) for key in ("model", "optimizer", "epoch", "max_accuracy"))
    for key, average in here["model_ema"].items():
        torch.testing.assert_close(late["model_ema"][key], average, rtol=1e-5, atol=1e-7)
    histories = [log_without_times(tmp_path / name) for name in lines]
    assert histories[0] == histories[1]
    for ours, theirs in zip(histories[0], histories[2], strict=True):
        assert ours == theirs | {key: pytest.approx(theirs[key], rel=1e-5) for key in OF_EMA}
    shown = [[one.split("  time:")[0] for one in lines[name] if one.startswith(("Epoch", "Step"))] for name in lines]
    assert [one.partition("eta")[0] for one in shown[0]] == [one.partition("eta")[0] for one in shown[2]]
    assert len(shown[0]) == 2 * (5 + 2)


@pytest.mark.usefixtures("not_finite")
def test_too_many_in_a_row_end_the_run():
    with pytest.raises(LapeError, match=r"1 steps in a row .*loss nan, gradient norm nan, .* in epoch 0, step 1;"):
        loop.train(tiny(max_skipped=1), say=quiet)


@pytest.mark.parametrize("end", [pytest.param("killed", marks=pytest.mark.slow), signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path, end):
    settings = {"epochs": 2, "drop": 0.1, "mixup": 0.8, "warmup_epochs": 1, "log_every": 1}
    loop.train(tiny(**settings, output_dir=str(tmp_path / "whole")), say=quiet)
    recipe = tiny(**settings, output_dir=str(tmp_path / "out"), resume="auto", save_steps=2)

    def press(text):
        if text.startswith("Epoch: [1]  [2/5]" if end == "killed" else "Epoch: [1]  [1/5]"):
            if end == "killed":
                raise Killed
            os.kill(os.getpid(), end)

    with pytest.raises(Killed if end == "killed" else SystemExit):
        loop.train(recipe, say=press)
    stopped = read(tmp_path / "out" / CHECKPOINT)
    # the signal is told with the third step, which is read when the fourth is launched, behind which all is saved
    assert (stopped["epoch"], stopped["step"]) == (0, 2 if end == "killed" else 4)
    loop.train(recipe, say=quiet)
    whole, out = (read(tmp_path / name / CHECKPOINT) for name in ("whole", "out"))
    assert all(same(out[key], whole[key]) for key in STATE)
    assert log_without_times(tmp_path / "out") == log_without_times(tmp_path / "whole")


def test_a_file_of_another_device_goes_on_with_the_kernels_of_this_one(tmp_path, monkeypatch):
    recipe = tiny(output_dir=str(tmp_path), resume="auto")
    loop.train(recipe, say=quiet)
    assert all(group["fused"] for group in read(tmp_path / CHECKPOINT)["optimizer"]["param_groups"])
    monkeypatch.undo()
    loop.train(recipe.replace(epochs=2), say=quiet)
    assert not any(group["fused"] for group in read(tmp_path / CHECKPOINT)["optimizer"]["param_groups"])
