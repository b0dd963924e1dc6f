"""Data on the device: draws distributed as torchvision's and timm's, pure functions of their key, exact resume."""

import random

import numpy as np
import pytest
import torch
from pictures import pictures, write_folder
from PIL import Image
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import STATE, Killed, kill_at, log_without_times, quiet, read, same, tiny

from lape.data.augment import train_transform
from lape.data.device import ARGUMENTS, MATRICES, PIXELS, OnDevice, Stream, ToBytes, allocate_images, split_transform
from lape.data.loaders import eval_loader, train_loader
from lape.data.open import load_data
from lape.errors import DataError, LapeError
from lape.recipe import Recipe
from lape.train.evaluate import evaluate_checkpoint
from lape.train.loop import train
from lape.train.state import BEST, CHECKPOINT

CPU = torch.device("cpu")
DRAWS = 4000
ROUNDS = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25}


def stream(count: int = DRAWS, seed: int = 1) -> Stream:
    return Stream.of(seed, torch.arange(count), torch.zeros(count, dtype=torch.long))


def gap(found, expected) -> float:
    """Kolmogorov and Smirnov's largest distance of two distributions, over what it exceeds once in 10^5 by chance."""
    found, expected = np.sort(np.asarray(found, dtype=float)), np.sort(np.asarray(expected, dtype=float))
    places = np.concatenate([found, expected])
    parts = [np.searchsorted(one, places, side="right") / len(one) for one in (found, expected)]
    n, m = len(found), len(expected)
    return float(np.abs(parts[0] - parts[1]).max() / (np.sqrt(np.log(2e5) / 2) * np.sqrt((n + m) / (n * m))))


def too_uneven(counts, parts) -> bool:
    """Pearson's chi-square beyond five standard deviations of what chance gives."""
    counts, parts = np.asarray(counts, dtype=float), np.asarray(parts, dtype=float)
    expected = counts.sum() * parts / parts.sum()
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() > freedom + 5 * np.sqrt(2 * freedom)


def steps_of(**fields) -> dict:
    recipe = Recipe(**fields)
    theirs = train_transform(recipe)
    return {type(step).__name__: step for step in split_transform(theirs)[1]} | {
        f"their {type(step).__name__}": step for step in theirs.transforms
    }


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_uniform_numbers_are_even_and_independent():
    numbers = stream(20000)
    first, second = numbers.uniform(), numbers.uniform()
    grid = np.histogram2d(first, second, bins=10, range=[[0, 1], [0, 1]])[0].ravel()
    assert not too_uneven(grid, np.ones(100))
    assert not too_uneven(
        np.histogram2d(first[:-1], first[1:], bins=10, range=[[0, 1], [0, 1]])[0].ravel(), np.ones(100)
    )
    assert too_uneven(np.histogram(first**1.1, bins=10, range=(0, 1))[0], np.ones(10))  # the test can fail


def test_normal_numbers():
    expected = np.random.default_rng(0).normal(9, 0.5, DRAWS)
    assert gap(stream().normal(9, 0.5), expected) < 1
    assert gap(stream().normal(9.1, 0.5), expected) > 1
    noise = stream(40).noise(torch.arange(10, 40), (3, 20, 20), CPU)
    assert noise.shape == (30, 3, 20, 20)
    assert noise.dtype == torch.float32
    assert gap(noise.flatten(), np.random.default_rng(0).normal(size=36000)) < 1


def test_a_number_depends_on_seed_index_copy_and_turn():
    keys = {}
    for seed in (1, 2):
        for index in (0, 1):
            for copy in (0, 1):
                found = Stream.of(seed, torch.tensor([index]), torch.tensor([copy]))
                keys[seed, index, copy] = (float(found.uniform()), float(found.uniform()))
    assert len({number for pair in keys.values() for number in pair}) == 16


# -- draws, against the objects that draw on the PIL path --------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 48), (40, 100)])
def test_boxes_of_the_resized_crop(size):
    steps = steps_of(input_size=64)
    theirs: RandomResizedCropAndInterpolation = steps["their RandomResizedCropAndInterpolation"]
    random.seed(0)
    image = Image.new("L", (size[1], size[0]))
    expected = np.array([theirs.get_params(image, theirs.scale, theirs.ratio) for _ in range(DRAWS)])
    found = steps["ResizedCrop"].boxes(stream(), *size).numpy()
    for part in range(4):
        assert gap(found[:, part], expected[:, part]) < 1
    assert gap(found[:, 2] / found[:, 3], expected[:, 2] / expected[:, 3]) < 1
    assert gap(found[:, 2], expected[:, 2] + 2) > 1


def test_corners_of_the_crop():
    step = steps_of(input_size=32)["Crop"]
    places = torch.arange(1, 1 + 32 * 32).view(1, 1, 32, 32) % 251
    images = step(places.expand(2000, 1, 32, 32).to(torch.uint8), stream(2000))
    # the padding is black: how much of the first and last row and column is seen tells the corner
    rows = (images[:, 0].amax(2) > 0).int()
    top = rows.argmax(1) - rows.flip(1).argmax(1)
    assert not too_uneven([(top == shift).sum() for shift in range(-4, 5)], np.ones(9))


def test_flips():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(DRAWS, 1, 1, 2)
    flipped = steps_of(input_size=32)["Flip"](images, stream())[:, 0, 0, 0] == 255
    assert not too_uneven([flipped.sum(), (~flipped).sum()], [1, 1])


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.7", "rand-m12-mstd101-mmax15-inc1", "3a", "v0r-mstd0.5"]
)
def test_operations_of_a_policy(policy, monkeypatch):
    steps = steps_of(input_size=64, aa=policy)
    theirs = steps["their RandAugment"] if policy[0] == "r" else steps["their AutoAugment"]
    ops = theirs.ops if policy[0] == "r" else [op for some in theirs.policy for op in some]
    seen: list[list[float]] = [[] for _ in ops]
    for op, found in zip(ops, seen, strict=True):
        monkeypatch.setattr(op, "aug_fn", lambda img, *a, found=found, **_: found.append(a[0] if a else 0))
    random.seed(0), np.random.seed(0)
    turns, step = 20000, steps["Policy"]
    for _ in range(turns):
        theirs(None)

    ours: list[list[float]] = [[] for _ in ops]
    numbers = stream(turns)
    for _ in range(step.draws):
        for which in step.lists[numbers.integer(len(step.lists))].unbind(1):
            used, level, unit = step.draw(which, numbers)
            for number, op in enumerate(step.ops):
                argument = ARGUMENTS[op.name](level, unit, op.hparams)
                ours[number] += argument[used & (which == number)].tolist()
    for number, op in enumerate(ops):
        expected = turns * step.draws / len(step.lists) * op.prob
        for found in (seen, ours):  # both against what they stand for, and by that against each other
            assert abs(len(found[number]) - expected) <= 5 * expected**0.5, op
        if op.name == "GaussianBlurRand":  # timm draws the radius where it blurs, uniformly up to twice its argument
            assert set(seen[number]) == {1.0}
            assert gap(ours[number], np.linspace(0.1, 2, 999)) < 1
        elif op.level_fn is not None and op.name != "Desaturate" and expected > 0:
            assert gap(ours[number], seen[number]) < 1, op


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_arguments_are_timms(name, monkeypatch):
    settings = {"translate_const": 28, "img_mean": (1, 2, 3)}
    op = AugmentOp(name, hparams=settings)
    assert (name in PIXELS) != (name in MATRICES)
    if op.level_fn is None:
        return
    levels = torch.arange(0, 10.01, 0.25, dtype=torch.float64)
    for unit, drawn in ((0.8, 0.1), (0.2, 0.9)):
        monkeypatch.setattr(random, "random", lambda drawn=drawn: drawn)
        expected = [op.level_fn(level, settings)[0] for level in levels.tolist()]
        if name == "Desaturate":  # timm takes it from 1 where it is used
            expected = [1 - value for value in expected]
        if name == "GaussianBlurRand":  # and draws the radius there
            expected = [0.1 + (2 * value - 0.1) * unit for value in expected]
        found = ARGUMENTS[name](levels, torch.tensor(unit, dtype=torch.float64), settings)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_colour_jitter(monkeypatch):
    from lape.data import device as device_data

    seen: list[tuple[str, float]] = []

    def note(name):
        return lambda images, values: (seen.extend((name, float(v)) for v in values), images)[1]

    for name in ("Brightness", "Contrast", "Color"):
        monkeypatch.setitem(device_data.PIXELS, name, note(name))
    step = steps_of(input_size=64, aa="none", color_jitter=0.3)["Jitter"]
    first = []
    for index in range(900):
        seen.clear()
        step(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), Stream.of(0, torch.tensor([index]), torch.tensor([0])))
        assert sorted(name for name, _ in seen) == ["Brightness", "Color", "Contrast"]
        first.append((*(name for name, _ in seen[:2]), *(value for _, value in seen)))
    orders = [one[:2] for one in first]
    assert not too_uneven([orders.count(order) for order in sorted(set(orders))], np.ones(6))
    assert gap([one[2] for one in first], np.linspace(0.7, 1.3, 900)) < 1


@pytest.mark.parametrize(("mode", "count"), [("pixel", 1), ("const", 3), ("rand", 1)])
@pytest.mark.parametrize("side", [8, 32])
def test_erasing(mode, count, side):
    steps = steps_of(input_size=side, reprob=0.25, remode=mode, recount=count)
    theirs: RandomErasing = steps["their RandomErasing"]
    random.seed(0), torch.manual_seed(0)
    full = torch.full((DRAWS, 3, side, side), 9.0)
    expected, found = theirs(full.clone()), steps["Erase"](full.clone(), stream())
    measured = []
    for images in (found, expected):
        gone = images[:, 0] != 9
        erased = gone.flatten(1).any(1)
        rows, columns = gone[erased].any(2).int(), gone[erased].any(1).int()
        sizes = (rows.sum(1), columns.sum(1), gone[erased].flatten(1).sum(1), rows.argmax(1), columns.argmax(1))
        measured.append((erased, sizes, images[:, :2][gone[:, None].expand(-1, 2, -1, -1)]))
    (ours, our_sizes, our_values), (their_erased, their_sizes, their_values) = measured
    assert not too_uneven([ours.sum(), (~ours).sum()], [float(their_erased.sum()), float((~their_erased).sum())])
    for one, other in zip(our_sizes, their_sizes, strict=True):
        assert gap(one, other) < 1
    if count == 1:
        assert max(extent.max() for extent in (*our_sizes[:2], *their_sizes[:2])) < side  # never a whole one
    if mode == "pixel":
        assert gap(our_values[::7], their_values[::7]) < 1
    if mode == "rand":  # one colour an image: as many values as images
        assert len(our_values.unique()) == 2 * int(ours.sum())


# -- the whole recipe --------------------------------------------------------------------------------------------------


def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What tells one augmentation from another, by image."""
    grey = images.mean(1)
    return {
        "mean": images.mean((1, 2, 3)),
        "spread": images.std((1, 2, 3)),
        "colour": (images[:, 0] - images[:, 2]).mean((1, 2)),
        "lowest": images.amin((1, 2, 3)),
        "highest": images.amax((1, 2, 3)),
        "edges across": (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2)),
        "edges down": (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2)),
        "left and right": (grey[..., :8] - grey[..., -8:]).mean((1, 2)),
        "up and down": (grey[:, :8] - grey[:, -8:]).mean((1, 2)),
        "corner": grey[:, 0, 0],
    }


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({**ROUNDS, "input_size": 32}, 32),
        ({**ROUNDS, "input_size": 40, "train_interpolation": "random"}, 33),
        ({"aa": "none", "color_jitter": 0.4, "reprob": 0.0, "input_size": 40}, 48),
        ({"three_augment": True, "src": True, "input_size": 40}, 40),
    ],
)
def test_the_whole_recipe_is_distributed_as_on_the_pil_path(fields, size):
    image = pictures(size, size, "RGB")[5]
    transform = train_transform(Recipe(**fields))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    turns = 1500
    expected = features(torch.stack([transform(image) for _ in range(turns)]))
    once, steps = split_transform(transform)
    pixels = ToBytes(once)(image)
    dataset = OnDevice(pixels[None], torch.zeros(1, dtype=torch.long), steps)
    found = features(dataset.batch([(0, copy) for copy in range(turns)], seed=3)[0])
    for name, values in found.items():
        assert gap(values, expected[name]) < 1, name
    shorter = OnDevice(pixels[None], dataset.targets, steps[2:])
    without = features(shorter.batch([(0, copy) for copy in range(turns)], seed=3)[0])
    assert max(gap(without[name], expected[name]) for name in found) > 1  # a step less is seen


def test_an_image_does_not_depend_on_its_batch():
    found = load_data(tiny(**ROUNDS, in_chans=3, data_on_device=True)).train
    keys = [(index, copy) for index in (5, 700, 31) for copy in range(40)]
    images, targets = found.batch(keys, seed=7)
    for place in (0, 41, 119):
        alone, target = found.batch([keys[place]], seed=7)
        assert torch.equal(alone[0], images[place])
        assert target[0] == targets[place]
    assert len({one.numpy().tobytes() for one in images}) > 60  # copies differ, but where nothing was applied
    assert not torch.equal(found.batch(keys, seed=8)[0], images)


# -- data sets and loaders ---------------------------------------------------------------------------------------------


def test_evaluation_sees_the_same_bits(tmp_path):
    write_folder(tmp_path)
    for fields in ({}, {"data_path": str(tmp_path), "batch_size": 2, "mixup": 0.0, "cutmix": 0.0, "in_chans": 3}):
        plain, held = (load_data(tiny(**fields, data_on_device=on), train=False) for on in (False, True))
        assert held.val.images.dtype == torch.uint8
        assert held.classes == plain.classes
        recipe = tiny(**fields)
        for (one, numbers), (other, same_numbers) in zip(
            eval_loader(held.val, recipe), eval_loader(plain.val, recipe), strict=True
        ):
            assert torch.equal(one, other)
            assert torch.equal(numbers, same_numbers)


def test_workers_and_processes_change_nothing(tmp_path):
    write_folder(tmp_path, train=10)
    fields = {"data_path": str(tmp_path), "in_chans": 3, "batch_size": 4, **ROUNDS, "data_on_device": True}
    recipe = tiny(**fields, global_batch=8, repeated_aug=True)
    held = load_data(recipe).train
    assert torch.equal(held.images, load_data(recipe.replace(num_workers=2)).train.images)
    alone = list(train_loader(held, recipe, epoch=1))
    assert len(alone) == 4  # two steps of two parts
    parts = [list(train_loader(held, recipe, epoch=1, rank=rank, world_size=2)) for rank in range(2)]
    for step in range(2):
        whole = torch.cat([images for images, _ in alone[2 * step : 2 * step + 2]])
        shared = torch.stack([parts[rank][step][0] for rank in range(2)], dim=1).flatten(0, 1)
        assert torch.equal(whole, shared)
    later = list(train_loader(held, recipe, epoch=1, skip_batches=1))
    assert torch.equal(later[0][0], alone[2][0])


def test_plain_digits_train_to_the_same_bits_on_both_paths():
    results = [train(tiny(epochs=2, data_on_device=on), say=quiet) for on in (False, True)]
    assert results[0].history[-1]["train_loss"] == results[1].history[-1]["train_loss"]
    for one, other in zip(*(result.model.state_dict().values() for result in results), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_killed_and_resumed_to_the_same_bits(tmp_path):
    settings = {**ROUNDS, "mixup": 0.8, "cutmix": 1.0, "epochs": 2, "batch_size": 128, "data_on_device": True}
    whole, out = tmp_path / "whole", tmp_path / "out"
    said: list[str] = []
    train(tiny(**settings, output_dir=str(whole)), say=said.append)
    assert any("Images are held on cpu as bytes (1.3 MiB)" in text for text in said)
    recipe = tiny(**settings, output_dir=str(out), save_steps=4, resume="auto", log_every=1)
    for epoch, step in ((0, 6), (1, 2)):
        with pytest.raises(Killed):
            train(recipe, say=kill_at(epoch, step))
    train(recipe, say=quiet)
    for key in STATE:
        assert same(read(out / CHECKPOINT)[key], read(whole / CHECKPOINT)[key]), key
    assert same(read(out / BEST)["model"], read(whole / BEST)["model"])
    assert log_without_times(out) == log_without_times(whole)
    flags = {"eval": True, "resume": str(out / CHECKPOINT), "device": "cpu", "num_workers": 0}
    plain, held = (evaluate_checkpoint(Recipe(**flags, data_on_device=on), say=quiet) for on in (False, True))
    assert plain == held


# -- refused -----------------------------------------------------------------------------------------------------------


WRONG = {"in_chans": 3, "batch_size": 2, "data_on_device": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"skip_corrupt": True}, "skip_corrupt=True leaves images out"),
        ({"aa": "augmix-m5"}, "AugMixAugment is not made for batches on the device: leave --data-on-device out"),
        ({"aa": "rand-m9-tweights"}, "RandAugment by weights is not made"),
        ({"input_size": 64, "aa": "none", "train_interpolation": "lanczos"}, "use bicubic, bilinear or random"),
    ],
)
def test_what_has_no_twin_is_refused(fields, message, tmp_path):
    write_folder(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(LapeError, match=message):
        train(tiny(**WRONG, **fields, data_path=str(tmp_path), output_dir=str(out)), say=quiet)
    assert not out.exists()


def test_other_devices_are_refused():
    with pytest.raises(LapeError, match="was made for cuda and cpu, not meta"):
        load_data(tiny(data_on_device=True), device="meta")


def test_images_of_several_sizes(tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (30, 16)).save(tmp_path / "train" / "dog" / "wide.png")
    fields = {"data_path": str(tmp_path), "in_chans": 3, "batch_size": 2, "data_on_device": True}
    message = r"images of 20x16 and of 30x16 pixels do not fit into one tensor: bring the folder to one size first, or"
    for workers in (0, 2):
        with pytest.raises(DataError, match=message):
            load_data(tiny(**fields, input_size=40, num_workers=workers))
    with pytest.raises(DataError, match="do not fit into one tensor"):  # resized to a short side of 16, not cropped yet
        load_data(tiny(**fields, input_size=16))


def test_an_unreadable_image_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png is not an image that can be read"):
        load_data(tiny(data_path=str(tmp_path), in_chans=3, batch_size=2, data_on_device=True))


def test_too_many_images_are_refused(monkeypatch):
    monkeypatch.setattr("lape.data.device._free_bytes", lambda device: 2**30)
    assert allocate_images(2**19, (1, 32, 32), CPU).numel() == 2**29
    message = (
        r"524289 images of 1x32x32 bytes need 0.50 GiB on cpu, more than half of the 1.00 GiB that are free: leave"
    )
    with pytest.raises(DataError, match=message):
        allocate_images(2**19 + 1, (1, 32, 32), CPU)


# -- accuracy ----------------------------------------------------------------------------------------------------------


LEARN = {**ROUNDS, "input_size": 8, "model_kwargs": {"embed_dim": 64, "depth": 1, "num_heads": 2, "patch_size": 4}}
LEARN |= {"in_chans": 1, "mean": (0.305,), "std": (0.376,), "epochs": 8, "batch_size": 64, "repeated_aug": False}
LEARN |= {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "lr": 4e-3, "model_ema": False, "drop_path": 0.0}


@pytest.mark.parametrize(("policy", "level"), [("rand-m15-mstd0", 10), ("rand-m15-mstd0-mmax12", 12)])
def test_a_magnitude_ends_at_the_most_that_its_policy_allows(policy, level):
    steps = split_transform(train_transform(Recipe(aa=policy, input_size=40)))[1]
    twin = next(step for step in steps if hasattr(step, "draw"))
    _, levels, _ = twin.draw(torch.zeros(9, dtype=torch.long), Stream.of(0, torch.arange(9), torch.zeros(9).long()))
    assert levels.tolist() == [level] * 9


@pytest.mark.slow
def test_digits_become_as_good_on_both_paths():
    """With DeiT's RandAugment and erasing; coarse (a seed moves it by five points), and the longest test here."""
    accuracies = {on: train(tiny(**LEARN, seed=0, data_on_device=on), say=quiet).accuracy for on in (False, True)}
    assert min(accuracies.values()) > 50  # of ten classes
    assert abs(accuracies[True] - accuracies[False]) < 20, accuracies


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices, as CUDA does (copies and single CPU numbers are allowed)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        if "copy" not in func.__name__ and len({one.device.type for one in tensors}) > 1:
            raise RuntimeError(f"{func} of several devices")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [ROUNDS, {"three_augment": True, "src": True}, {"aa": "none", "color_jitter": 0.4}])
def test_no_step_asks_the_device_for_a_value_or_mixes_devices(fields):
    """Meta tensors have no values, reading one raises; on CUDA it would wait."""
    steps = split_transform(train_transform(Recipe(**fields, input_size=40, recount=2)))[1]
    images = torch.empty(400, 3, 48, 48, dtype=torch.uint8, device="meta")
    held = OnDevice(images, torch.zeros(400, dtype=torch.long, device="meta"), steps)
    with OneDevice():
        made, _ = held.batch([(index, 0) for index in range(400)], seed=0)
        assert (made.device.type, made.dtype, made.shape) == ("meta", torch.float32, (400, 3, 40, 40))
        with pytest.raises(RuntimeError, match="several devices"):
            (255 - images) + torch.ones(400, 3, 48, 48)
        with pytest.raises((RuntimeError, NotImplementedError)):
            int(images.max())
