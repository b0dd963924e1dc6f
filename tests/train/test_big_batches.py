"""The same step by other means: accumulated, on more processes, recomputed, compiled; and what a run starts from."""

import json
import os

import pytest
import timm
import torch
from processes import launch, main_py
from training import ALONE, KWARGS, quiet, read, tiny

import lape
from lape.data.augment import EvalTransform
from lape.data.loaders import BatchPlan, batch_plan, train_loader
from lape.data.open import load_data
from lape.errors import CheckpointError, LapeError
from lape.train.evaluate import evaluate_checkpoint
from lape.train.loop import seed_step, train
from lape.train.start import build_model, load_teacher
from lape.train.state import BEST, CHECKPOINT, State, _average, initial_state, peak_lr

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "smoothing": 0.0, "repeated_aug": False, "model_ema": False}


# ------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize(
    ("settings", "processes", "plan"),
    [
        ({"batch_size": 64}, 3, BatchPlan(64, 1, 192)),
        ({"batch_size": 64, "global_batch": 512}, 1, BatchPlan(64, 8, 512)),
        ({"batch_size": 64, "global_batch": 512}, 4, BatchPlan(64, 2, 512)),
        ({"batch_size": 64, "global_batch": 512}, 16, BatchPlan(32, 1, 512)),
        ({"batch_size": 64, "global_batch": 384}, 3, BatchPlan(64, 2, 384)),
        ({"batch_size": 60, "global_batch": 512}, 1, BatchPlan(32, 16, 512)),
        ({"batch_size": 5, "global_batch": 10, "mixup": 0.0, "cutmix": 0.0}, 1, BatchPlan(5, 2, 10)),
        ({"batch_size": 5, "global_batch": 10}, 1, BatchPlan(2, 5, 10)),
    ],
)
def test_a_step_keeps_its_images_on_every_number_of_processes(settings, processes, plan):
    recipe = tiny(**settings)
    assert batch_plan(recipe, processes) == plan
    assert peak_lr(recipe.replace(unscale_lr=False, lr=1e-3), processes) == pytest.approx(1e-3 * plan.total / 512)


@pytest.mark.parametrize(("settings", "processes"), [({"global_batch": 512}, 3), ({"global_batch": 6}, 2)])
def test_a_global_batch_that_cannot_be_shared_names_one_that_can(settings, processes):
    with pytest.raises(LapeError, match=r"use --global-batch \d+") as caught:
        batch_plan(tiny(batch_size=64, **settings), processes)
    near = int(str(caught.value).split("--global-batch ")[1].split()[0])
    assert batch_plan(tiny(batch_size=64, global_batch=near), processes).total == near


def test_a_step_sees_the_same_images_in_any_number_of_parts_and_processes():
    def step(number: int, processes: int, **settings) -> list[float]:
        recipe = tiny(**PLAIN, global_batch=48, **settings)
        data = load_data(recipe, world_size=processes)
        parts, seen = batch_plan(recipe, processes).parts, []
        for rank in range(processes):
            loader = train_loader(data.train, recipe, epoch=1, rank=rank, world_size=processes, skip_batches=number)
            batches = [images for (images, _), _ in zip(loader, range(parts), strict=False)]
            seen += torch.cat(batches).flatten(1).double().sum(1).tolist()
        return sorted(seen)

    wanted = step(2, 1, batch_size=48)
    assert step(2, 1, batch_size=16) == wanted
    assert step(2, 2, batch_size=12) == wanted
    assert step(2, 3, batch_size=48) == wanted


def gradient(monkeypatch, **settings) -> dict[str, torch.Tensor]:
    """The gradient of the first step of a training."""
    found: dict[str, torch.Tensor] = {}

    class Enough(Exception):
        pass

    def look(state, *_others):
        found.update({name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None})
        raise Enough

    with monkeypatch.context() as patch:
        patch.setattr("lape.train.loop._gradient_norm", look)
        with pytest.raises(Enough):
            train(tiny(**{**PLAIN, **settings}), say=quiet)
    return found


def test_an_accumulated_gradient_is_that_of_the_big_batch(monkeypatch):
    whole = gradient(monkeypatch, batch_size=96)
    parts = gradient(monkeypatch, batch_size=16, global_batch=96)
    assert whole.keys() == parts.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=1e-6)


def test_recomputed_activations_give_the_same_gradient(monkeypatch):
    kept = gradient(monkeypatch, batch_size=64, drop=0.2, drop_path=0.2)
    again = gradient(monkeypatch, batch_size=64, drop=0.2, drop_path=0.2, grad_checkpointing=True)
    for name, expected in kept.items():
        torch.testing.assert_close(again[name], expected, rtol=0, atol=1e-6)


@pytest.mark.distributed
def test_two_processes_train_as_one_does(tmp_path):
    """DistributedDataParallel with parts, of which only the last exchanges gradients, against one process."""
    flags = "--model vit_tiny_patch16_224 --join-type LaPE --input-size 16 --epochs 1 --lr 0.01 --unscale-lr --opt sgd"
    flags += " --warmup-epochs 0 --aa none --reprob 0 --mixup 0 --cutmix 0 --no-repeated-aug --device cpu --drop-path 0"
    flags += " --color-jitter 0 --smoothing 0 --no-model-ema --global-batch 256 --batch-size 64"
    kwargs = ["--model-kwargs", json.dumps(KWARGS)]
    settings = {**PLAIN, "warmup_epochs": 0, "opt": "sgd", "lr": 0.01, "batch_size": 256}
    train(tiny(**settings, output_dir=str(tmp_path / "one")), say=quiet)
    both = launch(2, main_py, *flags.split(), *kwargs, "--batch-size", "64", "--output-dir", str(tmp_path / "two"))
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert "Batch: 64 x 2 process(es) x 2 parts = 256" in both[0].output
    one, two = (read(tmp_path / name / CHECKPOINT)["model"] for name in ("one", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ compile, determinism


@pytest.mark.slow
def test_the_compiled_step_is_what_trains(monkeypatch):
    compiled = []

    def compile_eagerly(model):
        compiled.append(model)
        return torch._dynamo.optimize("eager", nopython=True)(model)

    monkeypatch.setattr("lape.train.loop.torch.compile", compile_eagerly)
    found = train(tiny(**PLAIN, compile=True), say=quiet)
    monkeypatch.undo()
    wanted = train(tiny(**PLAIN), say=quiet)
    assert compiled == [found.model]
    assert found.history[0]["train_loss"] == pytest.approx(wanted.history[0]["train_loss"], abs=1e-6)
    assert all(not name.startswith("_orig_mod") for name in found.model.state_dict())


def test_deterministic_asks_torch_for_it():
    try:
        train(tiny(deterministic=True), say=quiet)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------ moving average


@pytest.mark.parametrize("device_decides", [False, True])
def test_the_average_of_a_short_run_warms_up_by_the_formula(device_decides):
    recipe = tiny(model_ema_warmup=True, model_ema_decay=0.99)
    state = initial_state(recipe, build_model(recipe, 10), ALONE)
    assert state.ema is not None
    expected = next(state.ema.module.parameters()).detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            next(state.model.parameters()).add_(step)
        if device_decides:
            _average(state.ema, state.model, torch.tensor(True), step)
            _average(state.ema, state.model, torch.tensor(False), step)  # a step that does not count
        else:
            state.ema.update(state.model, step)
        decay = 0.0 if step == 1 else min(1 - step ** (-2 / 3), 0.99)  # step - 1 updates before: (1 + step - 1)
        expected = decay * expected + (1 - decay) * next(state.model.parameters()).detach()
        torch.testing.assert_close(next(state.ema.module.parameters()).detach(), expected)


def test_the_steps_of_all_epochs_warm_an_average_up(monkeypatch):
    numbers, update = [], State.update
    monkeypatch.setattr(State, "update", lambda state, good, n: (numbers.append(n), update(state, good, n)))
    train(tiny(epochs=2, batch_size=512, model_ema_warmup=True), say=quiet)
    assert numbers == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_short_runs_warmed_up_average_is_near_its_weights():
    cold = train(tiny(epochs=2), say=quiet)
    warm = train(tiny(epochs=2, model_ema_warmup=True), say=quiet)
    assert cold.ema_model is not None
    assert warm.ema_model is not None

    def distance(result) -> float:
        pairs = zip(result.ema_model.parameters(), result.model.parameters(), strict=True)
        return sum((a - b).abs().sum().item() for a, b in pairs)

    assert distance(warm) < 0.7 * distance(cold)


@pytest.mark.parametrize("by", [pytest.param("raw", marks=pytest.mark.slow), "ema"])
def test_best_says_whose_it_is(tmp_path, by):
    recipe = tiny(epochs=3, model_ema_decay=0.5, output_dir=str(tmp_path), best_by=by)
    said: list[str] = []
    result = train(recipe, say=said.append)
    key = "test_acc1" if by == "raw" else "test_ema_acc1"
    accuracies = [line[key] for line in result.history]
    best = read(tmp_path / BEST)["best"]
    assert best == {"weights": by, "epoch": accuracies.index(max(accuracies)), "acc1": max(accuracies)}
    assert result.best_accuracy == max(accuracies)
    assert any("best_checkpoint.pth is by the" in text and "raw" in text and "EMA" in text for text in said)
    again = evaluate_checkpoint(tiny(resume=str(tmp_path / BEST), eval=True, ema=by == "ema"), say=quiet)
    assert again.acc1 == max(accuracies)


def test_an_average_that_is_not_there_is_refused(tmp_path):
    train(tiny(model_ema=False, output_dir=str(tmp_path)), say=quiet)
    with pytest.raises(CheckpointError, match="leave --ema out"):
        evaluate_checkpoint(tiny(resume=str(tmp_path / CHECKPOINT), eval=True, ema=True), say=quiet)
    with pytest.raises(LapeError, match="add --eval"):
        tiny(ema=True)
    with pytest.raises(LapeError, match="--best-by raw"):
        tiny(best_by="ema", model_ema=False)


# ------------------------------------------------------------------------------------------------ other weights


def test_finetuning_at_another_patch_size_resizes_the_patch_embedding(tmp_path):
    train(tiny(output_dir=str(tmp_path)), say=quiet)
    old = read(tmp_path / CHECKPOINT)["model"]
    said: list[str] = []
    recipe = tiny(finetune=str(tmp_path / CHECKPOINT), model_kwargs={**KWARGS, "patch_size": 8}, input_size=32)
    state = lape.to_reference_state_dict(build_model(recipe, 10, said.append))
    from timm.layers import resample_patch_embed

    expected = resample_patch_embed(old["patch_embed.proj.weight"], [8, 8])
    torch.testing.assert_close(state["patch_embed.proj.weight"], expected)
    assert torch.equal(state["pos_embed"], old["pos_embed"]), "both grids are 4 x 4"
    assert "patch embedding resized from 4 x 4 to 8 x 8 pixels" in said[0]
    # twice as large patches of a constant image give the same token
    torch.testing.assert_close(expected.sum((2, 3)), old["patch_embed.proj.weight"].sum((2, 3)), rtol=0.05, atol=0.05)


def test_finetuning_at_another_patch_and_grid(tmp_path):
    train(tiny(output_dir=str(tmp_path)), say=quiet)
    said: list[str] = []
    recipe = tiny(finetune=str(tmp_path / CHECKPOINT), model_kwargs={**KWARGS, "patch_size": 2})
    model = build_model(recipe, 10, said.append)
    assert lape.grid(model) == (8, 8)
    assert "position table resampled from a grid of 4 x 4" in said[0]


def test_from_distilled_to_plain_the_second_token_is_left_out_by_name(tmp_path):
    distilled = tiny(model="deit_tiny_distilled_patch16_224")
    model = build_model(distilled, 10)
    old = lape.to_reference_state_dict(model)
    torch.save({"model": old, "args": distilled.model_dump(mode="json")}, tmp_path / "d.pth")
    said: list[str] = []
    plain = build_model(tiny(model="deit_tiny_patch16_224", finetune=str(tmp_path / "d.pth")), 10, said.append)
    new = lape.to_reference_state_dict(plain)
    rows = [0, *range(2, old["pos_embed"].shape[1])]
    assert torch.equal(new["pos_embed"], old["pos_embed"][:, rows])
    assert all(torch.equal(new[name], old[name]) for name in new if name != "pos_embed")
    for name in ("dist_token", "head_dist.weight", "head_dist.bias", "row 1 of pos_embed"):
        assert name in said[0]


# ------------------------------------------------------------------------------------------------ teacher


@pytest.mark.parametrize("source", ["timm", "checkpoint"])
def test_the_teacher_sees_its_own_normalisation(tmp_path, source):
    teacher = timm.create_model("test_resnet", num_classes=10).eval()
    own = {"mean": teacher.pretrained_cfg["mean"], "std": teacher.pretrained_cfg["std"]}
    content: dict = {"model": teacher.state_dict()}
    if source == "checkpoint":
        own = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
        content["transform"] = EvalTransform(32, **own).to_dict()
    torch.save(content, tmp_path / "t.pth")
    settings = {"mean": (0.4, 0.3, 0.2), "std": (0.2, 0.3, 0.4), "input_size": 32}
    recipe = tiny(
        distillation_type="soft", teacher_model="test_resnet", teacher_path=str(tmp_path / "t.pth"), **settings
    )
    found = load_teacher(recipe, 10, torch.device("cpu"), quiet)
    assert found is not None
    pixels = torch.rand(2, 3, 32, 32)

    def normal(mean, std) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    with torch.no_grad():
        expected = teacher(normal(own["mean"], own["std"]))
        torch.testing.assert_close(found(normal(recipe.mean, recipe.std)), expected, rtol=1e-4, atol=1e-5)


def test_parts_of_a_step_draw_from_seeds_of_their_own(monkeypatch):
    """Dropout and Mixup of two parts are not the same."""
    seeds = []

    def keep(*numbers: int) -> None:
        seed_step(*numbers)
        seeds.append(torch.initial_seed())

    monkeypatch.setattr("lape.train.loop.seed_step", keep)
    train(tiny(batch_size=256, global_batch=512), say=quiet)
    assert len(seeds) == len(set(seeds)) == 4  # two steps of two parts
