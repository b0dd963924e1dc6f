"""Data sets and loaders: what is read, what is refused and how, and that nothing random depends on how it is loaded."""

import collections
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import damage, write_cifar, write_folder, write_image
from PIL import Image, ImageFile
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from lape.data import sets as module
from lape.data.device import OnDevice
from lape.data.folders import image_files
from lape.data.images import load_image
from lape.data.loaders import Samples, TrainBatches, check_batch, eval_loader, steps_per_epoch, train_loader
from lape.data.open import load_data
from lape.data.sets import digits
from lape.errors import DataError, LapeError
from lape.recipe import Recipe

STILL = {"aa": "", "color_jitter": 0, "reprob": 0}
EXACT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def recipe(root: Path | str = "", **fields) -> Recipe:
    defaults = {"data_path": str(root), "input_size": 16, "batch_size": 2, "num_workers": 0, "device": "cpu"}
    return Recipe(**{**defaults, **fields})


def keys(n: int, fields: Recipe, *, epoch: int = 0, rank: int = 0, world_size: int = 1, skip: int = 0) -> list:
    return list(TrainBatches(n, fields, epoch, rank, world_size, skip))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "data")


def test_one_class_is_no_task(folder):
    shutil.rmtree(folder / "train" / sorted(p.name for p in (folder / "train").iterdir())[0])
    keep = next((folder / "train").iterdir()).name
    for split in ("train", "val"):
        for other in (folder / split).iterdir():
            if other.name != keep:
                shutil.rmtree(other)
    with pytest.raises(DataError, match=r"has one class, .*right folder level"):
        load_data(recipe(folder))
    assert len(load_data(recipe(folder), train=False).classes) == 1  # evaluation may ask for less


# -- the packaged digits -----------------------------------------------------------------------------------------------


def test_digits_are_split_in_proportion():
    (train, train_labels), (val, val_labels) = digits("train"), digits("val")
    assert (train.shape, val.shape) == ((1438, 8, 8), (359, 8, 8))
    assert np.bincount(np.concatenate([train_labels, val_labels])).tolist() == [
        *(178, 182, 177, 183, 181),
        *(182, 181, 179, 174, 180),
    ]
    assert np.bincount(val_labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert (train.min(), train.max(), train.dtype) == (0, 16, np.uint8)
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in val}


def test_digits_are_small_and_hold_no_pickle():
    path = Path(module.__file__).with_name("digits.npz")
    assert path.stat().st_size < 60_000
    with np.load(path, allow_pickle=False) as stored:
        assert sorted(stored.files) == ["images", "labels"]
    # the first image of the file is the well-known 0
    assert digits("train")[0][0][0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_unaugmented_digits_are_exact_and_cached():
    found = load_data(recipe(input_size=8, in_chans=1, mean=(0.0,), std=(1.0,), **STILL))
    assert found.name == "packaged digits (8x8, UCI)"
    assert found.classes == list("0123456789")
    for split, dataset in (("train", found.train), ("val", found.val)):
        assert isinstance(dataset, OnDevice)
        images, labels = digits(split)
        expected = np.round(images * (255 / 16)).astype(np.uint8) / 255
        np.testing.assert_allclose(dataset.images[:, 0].numpy(), expected, atol=1e-6)
        assert dataset.targets.tolist() == labels.tolist()
        image, target = dataset[5]
        assert torch.equal(image, dataset.images[5])
        assert target == labels[5]


def test_augmented_digits_go_through_the_ordinary_transform():
    found = load_data(recipe(input_size=64, batch_size=4))
    assert not isinstance(found.train, OnDevice)
    images, targets = next(iter(train_loader(found.train, recipe(input_size=64, batch_size=4), epoch=0)))
    assert images.shape == (4, 3, 64, 64)
    assert targets.shape == (4,)


def test_large_digits_are_not_cached():
    found = load_data(recipe(input_size=448), train=False)
    assert not isinstance(found.val, OnDevice)
    assert found.val[0][0].shape == (3, 448, 448)
    assert found.train is None


def test_700_steps_of_small_digits_take_seconds():
    fields = recipe(input_size=8, in_chans=1, batch_size=64, repeated_aug=False, num_workers=10, **STILL)
    found = load_data(fields)
    start, steps = time.process_time(), 0
    for epoch in range(32):
        steps += sum(1 for _ in train_loader(found.train, fields, epoch=epoch))
    assert steps == 32 * 22
    assert time.process_time() - start < 3  # of this process alone; measured: 0.04 s


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folders_are_read_as_torchvision_does(tmp_path):
    write_folder(tmp_path, classes=("b", "10", "2", "A"), train=1, val=2)
    (tmp_path / "val" / "b" / "deep").mkdir()
    shutil.copy(tmp_path / "val" / "b" / "0.png", tmp_path / "val" / "b" / "deep" / "x.PNG")
    found = load_data(recipe(tmp_path, input_size=20, **EXACT))
    theirs = ImageFolder(str(tmp_path / "val"))
    assert found.classes == theirs.classes == ["10", "2", "A", "b"]
    assert list(zip(found.val.sources, found.val.targets, strict=True)) == theirs.samples
    assert found.name == f"{tmp_path} (4 classes, 4 training images, 9 validation images)"
    for (image, target), (picture, label) in zip(found.val, theirs, strict=True):
        assert target == label
        left = torch.from_numpy(np.array(picture.resize((25, 20), Image.Resampling.BICUBIC)))[:, 2:22]
        assert torch.equal(image, left.permute(2, 0, 1) / 255)


def test_files_of_macos_are_not_images(folder):
    for split in ("train", "val"):
        (folder / split / "cat" / "._0.png").write_bytes(b"Mac OS X        ")
        (folder / split / "._cat.png").write_bytes(b"Mac OS X        ")
        (folder / split / ".DS_Store").write_bytes(b"Bud1")
    found = load_data(recipe(folder))
    assert (len(found.train), len(found.val), found.classes) == (6, 4, ["cat", "dog"])


def test_evaluation_needs_no_train_folder(folder):
    shutil.rmtree(folder / "train")
    found = load_data(recipe(folder), train=False)
    assert (found.train, len(found.val), found.classes) == (None, 4, ["cat", "dog"])
    (folder / "train").mkdir()
    assert load_data(recipe(folder), train=False).classes == ["cat", "dog"]


def test_training_alone_needs_no_val_folder(folder):
    shutil.rmtree(folder / "val")
    found = load_data(recipe(folder), val=False)
    assert (len(found.train), found.val) == (6, None)


def test_a_folder_stands_for_the_images_below(tmp_path, monkeypatch):
    names = ["b/2.png", "b/10.png", "a.jpg", "b/deep/c.PNG", "z.jpeg"]
    for name in [*names, ".hidden.png", "b/._2.png", ".thumbs/x.png", "@eaDir/y.png"]:
        write_image(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "b" / "again").symlink_to(tmp_path / "in")
    wanted = ["a.jpg", "z.jpeg", "b/10.png", "b/2.png", "b/deep/c.PNG"]
    assert image_files([tmp_path / "in"]) == [f"{tmp_path}/in/{name}" for name in wanted]
    assert image_files(["x.png", f"{tmp_path}/in/b/"]) == ["x.png", *(f"{tmp_path}/in/{name}" for name in wanted[2:])]
    monkeypatch.chdir(tmp_path / "in")
    assert image_files(["."]) == wanted
    monkeypatch.chdir(tmp_path / "in" / "b")
    assert image_files([".."]) == [f"../{name}" for name in wanted]
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no image in folder .*empty: give images \(\.jpg"):
        image_files([tmp_path / "empty"])


def refused(call) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises(LapeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


LAYOUT = (
    "--data-path must name a folder with train/<class>/* and val/<class>/*, or train and validation files of parquet, "
    "arrow or tar"
)


def test_missing_data_folder(tmp_path):
    message = refused(lambda: load_data(recipe(tmp_path / "no")))
    expected = f"data folder {tmp_path}/no does not exist: {LAYOUT}, or be left out for the packaged digits"
    assert message == expected


def test_data_folder_that_is_a_file(tmp_path):
    (tmp_path / "d.tar").touch()
    message = refused(lambda: load_data(recipe(tmp_path / "d.tar")))
    assert message == f"{tmp_path}/d.tar is a file, not a data folder: unpack it; {LAYOUT}"


def test_empty_data_folder(tmp_path):
    assert refused(lambda: load_data(recipe(tmp_path))) == f"data folder {tmp_path} is empty: {LAYOUT}"


@pytest.mark.parametrize(("missing", "other"), [("train", "val"), ("val", "train")])
def test_missing_split(folder, missing, other):
    shutil.rmtree(folder / missing)
    message = refused(lambda: load_data(recipe(folder)))
    assert message == f"{folder} has no folder {missing}/ (it holds {other}): {LAYOUT}"


def test_split_without_classes(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    assert refused(lambda: load_data(recipe(folder))) == f"{folder}/val has no class folders: {LAYOUT}"


@pytest.mark.parametrize("keep_classes", [False, True])
def test_flat_val(folder, keep_classes):
    if not keep_classes:
        shutil.rmtree(folder / "val")
    for number in range(5):
        write_image(folder / "val" / f"{number}.JPEG")
    message = refused(lambda: load_data(recipe(folder), train=False))
    assert message == (
        f"{folder}/val holds 5 image(s) outside class folders (0.JPEG, 1.JPEG, 2.JPEG, 3.JPEG, 4.JPEG): "
        f"move every image to {folder}/val/<class>/"
    )


@pytest.mark.parametrize("train", [False, True])
def test_classes_that_differ(folder, train):
    for name in ("eel", "fox", "gnu", "hen"):
        write_image(folder / "train" / name / "0.png")
    shutil.rmtree(folder / "train" / "cat")
    message = refused(lambda: load_data(recipe(folder), train=train))
    assert message == (
        f"classes of {folder}/train and {folder}/val differ: only in train: eel, fox, gnu, hen, only in val: cat; "
        "make both the same"
    )


def test_empty_class_folder(folder):
    for split in ("train", "val"):
        (folder / split / "eel").mkdir()
        (folder / split / "eel" / "notes.txt").touch()
        (folder / split / "eel" / "._1.jpg").touch()
    message = refused(lambda: load_data(recipe(folder)))
    assert message.startswith(f"no image in class folder {folder}/train/eel, {folder}/val/eel: put images there (.jpg ")
    assert message.endswith("or remove it from train and val")


@pytest.mark.parametrize("place", [".", "val", "val/cat"])
def test_unreadable_folder(folder, place, monkeypatch):
    blocked, listdir, scandir = str(folder / place), os.listdir, os.scandir

    def guard(call):
        def guarded(path="."):
            if os.path.normpath(path) == os.path.normpath(blocked):  # root may read anything, so it is pretended
                raise PermissionError(13, "Permission denied", blocked)
            return call(path)

        return guarded

    monkeypatch.setattr(os, "listdir", guard(listdir))
    monkeypatch.setattr(os, "scandir", guard(scandir))
    message = refused(lambda: load_data(recipe(folder)))
    expected = f"cannot read folder {folder / place} (Permission denied): make it readable for this user"
    assert message == expected


def test_other_data_sets_need_a_folder():
    message = refused(lambda: load_data(recipe(data_set="CIFAR")))
    assert message == "--data-set CIFAR needs --data-path: nothing is downloaded, name its folder"


def test_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load_data(recipe("~/data")).train) == 6


# -- batches that cannot work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "world_size", "message"),
    [
        (
            8,
            1,
            "batch size 8 x 1 process(es) = 8 is larger than the training set of 6 image(s), an epoch would have no",
        ),
        (
            4,
            2,
            "batch size 4 x 2 process(es) = 8 is larger than the training set of 6 image(s), an epoch would have no",
        ),
        (2, 8, "an epoch would have no step: use at most 6 processes"),
        (4, 2, "step: use --batch-size 3 or less"),
    ],
)
def test_batch_larger_than_the_data(folder, batch_size, world_size, message):
    fields = recipe(folder, batch_size=batch_size)
    assert message in refused(lambda: load_data(fields, world_size=world_size))
    assert message in refused(lambda: steps_per_epoch(6, fields, world_size))
    assert load_data(fields, train=False).train is None


def test_odd_batch_under_mixup(folder):
    fields = recipe(folder, batch_size=3)
    expected = (
        "batch_size=3 is odd and mixup/cutmix pair the images of a batch: use --batch-size 4, or --mixup 0 --cutmix 0"
    )
    assert refused(lambda: check_batch(fields)) == refused(lambda: load_data(fields)) == expected
    alone = {"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": (0.1, 0.2)}
    for one in alone:
        assert "is odd" in refused(
            lambda one=one: check_batch(recipe(batch_size=3, **{"mixup": 0, "cutmix": 0, **one}))
        )
    check_batch(recipe(batch_size=3, mixup=0, cutmix=0))
    check_batch(recipe(batch_size=4))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_named(tmp_path, monkeypatch, how, suffix, workers):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 300.0)  # for workers not told to stop
    write_folder(tmp_path, suffix=suffix)
    fields = recipe(tmp_path, num_workers=workers, repeated_aug=False)
    paths = [tmp_path / split / "dog" / f"1.{suffix}" for split in ("train", "val")]
    for path in paths:
        damage(path, how)
    found = load_data(fields)  # not read before it is needed
    loaders = [train_loader(found.train, fields, epoch=0), eval_loader(found.val, fields)]
    for path, loader in zip(paths, loaders, strict=True):
        start = time.perf_counter()
        with pytest.raises(DataError) as caught:
            list(loader)
        assert time.perf_counter() - start < 200
        assert multiprocessing.active_children() == []
        assert type(caught.value) is DataError
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        wanted = "replace or remove it"
        assert message.endswith(wanted if loader is loaders[1] else wanted + ", or train without it: --skip-corrupt")
        assert ("truncated" in message) == (how == "truncated")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_vanished_image_is_named(folder):
    found = load_data(recipe(folder))
    (folder / "val" / "cat" / "0.png").unlink()
    message = refused(lambda: found.val[0])
    assert message.startswith(f"cannot read image {folder}/val/cat/0.png (")


def test_remarks_of_pil_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)  # 320 pixels: a warning of PIL, not yet an error
    pixels = np.arange(320, dtype=np.uint8).reshape(16, 20) % 4
    palette = Image.fromarray(pixels).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255] + [9] * 756)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255, 255]))
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "palette.png")), colours[pixels])
    image = Image.fromarray(colours[pixels])
    image.save(tmp_path / "exif.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09broken")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "exif.png")), colours[pixels])


def test_far_too_large_image_is_named(tmp_path, monkeypatch):
    path = write_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert str(path) in refused(lambda: load_image(path))


def test_odd_kinds_of_images_are_read(tmp_path):
    values = np.array([[0, 257], [40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "alpha.png")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    assert np.asarray(load_image(tmp_path / "deep.png", 1)).tolist() == [[0, 1], [156, 255]]
    assert load_image(tmp_path / "deep.png").mode == "RGB"
    assert load_image(tmp_path / "cmyk.tif").getpixel((0, 0)) == (255, 0, 0)
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)
    assert load_image(tmp_path / "alpha.png").getpixel((0, 0)) == (1, 2, 3)
    message = refused(lambda: load_image(tmp_path / "float.tif"))
    assert message.startswith(f"cannot read image {tmp_path}/float.tif (floating-point pixels have no known range")


def test_one_channel(folder):
    fields = recipe(folder, in_chans=1, input_size=40)
    found = load_data(fields)
    assert next(iter(train_loader(found.train, fields, epoch=0)))[0].shape == (2, 1, 40, 40)
    assert next(iter(eval_loader(found.val, fields)))[0].shape == (3, 1, 40, 40)


# -- which samples -----------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 90),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    repeated=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_training_batches_of_all_processes(n, batch_size, world_size, repeated, epoch):
    fields = recipe(batch_size=batch_size, repeated_aug=repeated)
    if n < batch_size * world_size:
        with pytest.raises(DataError, match="an epoch would have no step"):
            keys(n, fields, world_size=world_size)
        return
    ranks = [keys(n, fields, epoch=epoch, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = steps_per_epoch(n, fields, world_size)
    assert steps == n // (batch_size * world_size)
    assert [[len(batch) for batch in batches] for batches in ranks] == [[batch_size] * steps] * world_size
    drawn = [key for batches in ranks for batch in batches for key in batch]
    assert len(set(drawn)) == len(drawn)
    assert {index for index, _ in drawn} <= set(range(n))
    copies = collections.Counter(index for index, _ in drawn)
    assert len(copies) == -(-len(drawn) // (3 if repeated else 1))
    assert max(copies.values()) <= (3 if repeated else 1)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_step_is_the_same_for_every_number_of_processes(repeated):
    def steps(world_size):
        fields = recipe(batch_size=12 // world_size, repeated_aug=repeated)
        ranks = [keys(100, fields, rank=rank, world_size=world_size) for rank in range(world_size)]
        return [sorted(key for batch in batches for key in batch) for batches in zip(*ranks, strict=True)]

    assert steps(1) == steps(2) == steps(3)
    assert len(steps(1)) == 8


def test_an_epoch_shows_every_image_once_or_a_third_of_them_three_times():
    once = [key for batch in keys(30, recipe(batch_size=5, repeated_aug=False)) for key in batch]
    assert sorted(once) == [(index, 0) for index in range(30)]
    thrice = [key for batch in keys(30, recipe(batch_size=5)) for key in batch]
    assert collections.Counter(index for index, _ in thrice).most_common() == [(i, 3) for i, _ in thrice[::3]]
    assert {copy for _, copy in thrice} == {0, 1, 2}


def test_copies_go_to_different_processes():
    where = collections.defaultdict(set)
    for rank in range(3):
        for batch in keys(60, recipe(batch_size=4), rank=rank, world_size=3):
            for index, _ in batch:
                where[index].add(rank)
    assert set(map(frozenset, where.values())) == {frozenset({0, 1, 2})}


def test_order_depends_on_seed_and_epoch_only():
    first = keys(50, recipe(seed=1))
    random.seed(5)
    torch.manual_seed(5)
    assert keys(50, recipe(seed=1)) == first
    assert keys(50, recipe(seed=2)) != first
    assert keys(50, recipe(seed=1), epoch=1) != first
    assert keys(50, recipe(seed=0), epoch=1) != first  # not the sum of the two


@pytest.mark.parametrize("skip", [0, 1, 5, 8])
def test_skipped_batches_are_exactly_the_first(skip):
    fields = recipe(batch_size=3)
    for rank in range(4):
        whole = keys(100, fields, rank=rank, world_size=4)
        rest = TrainBatches(100, fields, 0, rank, 4, skip)
        assert list(rest) == whole[skip:]
        assert len(rest) == len(whole) - skip


@pytest.mark.parametrize("skip", [-1, 4])
def test_wrong_number_of_skipped_batches_is_refused(folder, skip):
    fields = recipe(folder)
    message = refused(lambda: train_loader(load_data(fields).train, fields, epoch=0, skip_batches=skip))
    assert message == f"cannot skip {skip} batches of an epoch of 3: give a number between the two"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_evaluation_sees_every_image_once(world_size):
    fields = recipe(input_size=8, in_chans=1, batch_size=2)
    images = torch.arange(7.0).reshape(7, 1, 1, 1)
    dataset = torch.utils.data.TensorDataset(images, torch.arange(7))
    seen = []
    for rank in range(world_size):
        loader = eval_loader(dataset, fields, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        mine = [target for _, targets in batches for target in targets.tolist()]
        assert mine == list(range(rank, 7, world_size))
        assert all(len(targets) <= 3 for _, targets in batches)  # DeiT's 1.5 batches
        seen += mine
    assert sorted(seen) == list(range(7))


# -- randomness --------------------------------------------------------------------------------------------------------


def batches_of(dataset, fields: Recipe, **place) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(train_loader(dataset, fields, **{"epoch": 0, **place}))


def same(some, others) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(some, others, strict=True)
    )


def test_workers_and_resuming_change_nothing(tmp_path):
    write_folder(tmp_path, train=8)
    alone, helped = recipe(tmp_path, batch_size=4), recipe(tmp_path, batch_size=4, num_workers=2)
    train = load_data(alone).train
    whole = batches_of(train, alone)
    assert len(whole) == 4
    assert same(whole, batches_of(train, helped))
    assert same(whole[1:], batches_of(train, helped, skip_batches=1))
    assert same(whole[3:], batches_of(train, alone, skip_batches=3))
    assert batches_of(train, alone, skip_batches=4) == []
    assert not same(whole, batches_of(train, alone, epoch=1))
    assert not same(whole, batches_of(train, alone.replace(seed=1)))


def test_number_of_processes_changes_nothing(tmp_path):
    write_folder(tmp_path, train=8)
    fields = recipe(tmp_path, batch_size=6)
    train = load_data(fields).train
    for world_size in (2, 3):
        less = fields.replace(batch_size=6 // world_size)
        ranks = [batches_of(train, less, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, (images, targets) in enumerate(batches_of(train, fields)):
            for rank in range(world_size):
                assert torch.equal(images[rank::world_size], ranks[rank][step][0])
                assert torch.equal(targets[rank::world_size], ranks[rank][step][1])


def test_a_sample_depends_on_seed_epoch_index_and_copy_only(folder):
    train = load_data(recipe(folder)).train
    image, target = Samples(train, (0, 0))[2, 1]
    random.seed(9)
    torch.manual_seed(9)
    batch = Samples(train, (0, 0)).__getitems__([(0, 0), (2, 1)])
    again, label = batch.images[1], batch.targets[1]
    assert torch.equal(image, again)
    assert target == label == 0
    for stream, key in (((1, 0), (2, 1)), ((0, 1), (2, 1)), ((0, 0), (2, 0))):
        assert not torch.equal(image, Samples(train, stream)[key][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_of_the_caller_do_not_notice(folder, workers):
    fields = recipe(folder, num_workers=workers)
    found = load_data(fields)

    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seeded():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seeded()
    expected = draws()
    seeded()
    list(train_loader(found.train, fields, epoch=0))
    list(eval_loader(found.val, fields))
    Samples(found.train, (0, 0))[0, 0]
    assert draws() == expected


def test_every_generator_is_seeded():
    class Draws(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]), index

    first, second = (batches_of(Draws(), recipe(batch_size=4, seed=7)) for _ in range(2))
    assert same(first, second)
    assert len(first[0][0].unique()) == 12


def test_more_workers_than_processors_are_not_started(folder):
    fields = recipe(folder, num_workers=1000)  # torch warns, and a warning fails the test
    found = load_data(fields)
    loader = train_loader(found.train, fields, epoch=0)
    assert 0 < loader.num_workers <= os.cpu_count()
    assert len(list(loader)) == 3
    assert not loader.persistent_workers
    assert not loader.pin_memory


def test_forking_beside_threads_warns_nobody(folder, monkeypatch):
    import warnings

    fork = os.fork

    def warned():
        warnings.warn("use of fork() may lead to deadlocks in the child", DeprecationWarning, stacklevel=2)
        return fork()

    monkeypatch.setattr(os, "fork", warned)  # what Python 3.12 does in a process with threads
    fields = recipe(folder, num_workers=2)
    assert len(list(train_loader(load_data(fields).train, fields, epoch=0))) == 3


# -- CIFAR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "train"), [(CIFAR100, "CIFAR-100", 4), (CIFAR10, "CIFAR-10", 20)])
def test_cifar(tmp_path, kind, name, train, monkeypatch):
    write_cifar(tmp_path, kind, monkeypatch)
    fields = recipe(tmp_path, data_set="CIFAR", input_size=32, **EXACT)
    found = load_data(fields)
    assert found.name == f"{name} in {tmp_path} (3 classes, {train} training images, 4 validation images)"
    assert found.classes == ["ant", "bee", "cat"]
    image, target = found.val[2]
    assert target == 2
    assert torch.equal(image[:, 5, 5], torch.tensor([200, 0, 0]) / 255)
    assert batches_of(found.train, fields)[0][0].shape == (2, 3, 32, 32)


def test_cifar_that_is_missing(tmp_path):
    (tmp_path / "x").touch()
    message = refused(lambda: load_data(recipe(tmp_path, data_set="CIFAR")))
    assert message == (
        f"no CIFAR in {tmp_path}: unpack the Python version of the official archive, "
        f"to get {tmp_path}/cifar-100-python or {tmp_path}/cifar-10-batches-py"
    )


def test_cifar_that_was_altered(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, CIFAR100, monkeypatch)
    (folder / "test").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = refused(lambda: load_data(recipe(tmp_path, data_set="CIFAR")))
    assert message == f"{folder} is incomplete or altered (RuntimeError): unpack the archive again"


# -- iNaturalist -------------------------------------------------------------------------------------------------------


def write_inat(root: Path, year: int, *, grouped: bool) -> Path:
    names = ["Lynx lynx", "Apus apus", "Felis catus"]
    groups = ["Mammalia", "Aves", "Mammalia"]
    categories = [{"id": i, "name": name, "supercategory": groups[i]} for i, name in enumerate(names)]
    root.mkdir(exist_ok=True)
    (root / "categories.json").write_text(json.dumps(categories))
    for split, order in (("train", [2, 0, 1, 2]), ("val", [0, 1, 2])):
        images = []
        for number, category in enumerate(order):
            parts = [f"train_val{year}", groups[category], str(category), f"{split}{number}.png"]
            images.append({"id": number, "file_name": "/".join(parts)})
            write_image(root.joinpath(*(parts if grouped else parts[:1] + parts[2:])), seed=category)
        annotations = [{"image_id": number, "category_id": category} for number, category in enumerate(order)]
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


@pytest.mark.parametrize(("data_set", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize("grouped", [False, True])
def test_inat(tmp_path, data_set, year, grouped):
    root = write_inat(tmp_path / "inat", year, grouped=grouped)
    found = load_data(recipe(root, data_set=data_set))
    assert found.classes == ["Felis catus", "Lynx lynx", "Apus apus"]  # as the training annotations mention them
    assert [found.val[i][1] for i in range(3)] == [1, 2, 0]
    assert [found.train[i][1] for i in range(4)] == [0, 1, 2, 0]
    assert torch.equal(found.val[2][0], load_data(recipe(root, data_set=data_set)).val[2][0])
    coarse = load_data(recipe(root, data_set=data_set, inat_category="supercategory"))
    assert coarse.classes == ["Mammalia", "Aves"]
    assert [coarse.val[i][1] for i in range(3)] == [0, 1, 0]
    assert coarse.name.startswith(f"iNaturalist {year} in {root} (2 classes, 4 training images, 3 validation")


def test_inat_that_cannot_be_read(tmp_path):
    root = write_inat(tmp_path / "inat", 2018, grouped=True)
    fields = recipe(root, data_set="INAT")
    message = refused(lambda: load_data(fields.replace(data_set="INAT19")))
    assert message == (f"cannot read {root}/train2019.json (No such file or directory): an iNaturalist folder holds it")
    message = refused(lambda: load_data(fields.replace(inat_category="genus")))
    assert (
        "(KeyError: 'genus') or have no inat_category 'genus': check the files, or use --inat-category name" in message
    )
    shutil.rmtree(root / "train_val2018")
    message = refused(lambda: load_data(fields))
    assert message.startswith(f"no image at {root}/train_val2018/Mammalia/2/train0.png, {root}/train_val2018/2/train0")
    (root / "val2018.json").write_text("{")
    (root / "train_val2018" / "Mammalia" / "2").mkdir(parents=True)
    (root / "train_val2018" / "Mammalia" / "2" / "train0.png").touch()
    assert refused(lambda: load_data(fields)).startswith(f"{root}/val2018.json is not JSON (")


def test_digits_are_transformed_once_a_process_and_for_each_transform():
    recipe = Recipe(input_size=16, aa="none", color_jitter=0.0, reprob=0.0, num_workers=0, repeated_aug=False)
    first, again = (load_data(recipe.replace(seed=seed)) for seed in (0, 1))
    assert first.train.images.data_ptr() == again.train.images.data_ptr()
    kept = first.train.images.clone()
    for images, _ in train_loader(again.train, recipe, epoch=0):
        images.zero_()  # as mixing does in place
    again.val.targets = again.val.targets + 1
    assert first.train.images.equal(kept)
    assert first.val.targets.max() == 9
    for change in ({"input_size": 8}, {"in_chans": 1}, {"mean": (0.1, 0.2, 0.3)}, {"train_interpolation": "nearest"}):
        other = load_data(recipe.replace(**change)).train.images
        assert other.shape != kept.shape or not other.equal(kept), change
