"""The fast way to pixels: how far it is from the plain one, that its random numbers are the same, what it refuses."""

import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import damage
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from training import quiet, read, run_until, same, tiny

from lape.data import fast as pixels
from lape.data.augment import EvalTransform, eval_transform, train_transform
from lape.data.fast import LEVELS, FastEval, fast_train, read_levels
from lape.data.images import load_image
from lape.data.loaders import Samples, eval_loader, train_loader
from lape.data.open import load_data
from lape.errors import DataError, LapeError
from lape.recipe import Recipe
from lape.train.loop import train
from lape.train.state import CHECKPOINT

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
STILL = {"aa": "none", "color_jitter": 0, "reprob": 0}


def write_photo(path: Path, number: int = 0, size: tuple[int, int] = (90, 70), mode: str = "RGB", **options) -> Path:
    """A smooth picture with edges and some noise."""
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin((rows * (1 + number % 3) + columns * k) / (9 + number)) for k in (1, 2, 3)]
    noise = np.random.default_rng(number).integers(-20, 20, (height, width, 3))
    pixels = np.stack(waves, axis=-1) + noise
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 128)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(path, **options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 6), ("val", 3)):
        for place, name in enumerate(("cat", "dog")):
            for number in range(count):
                write_photo(root / split / name / f"{number}.jpg", 10 * place + number, (90 + number, 70))
    write_photo(root / "train" / "cat" / "9.png")
    write_photo(root / "val" / "cat" / "9.jpg", 9, mode="L")
    return root


def recipe(root: Path, **fields) -> Recipe:
    settings = {"data_path": str(root), "input_size": 48, "batch_size": 4, "num_workers": 0, "device": "cpu"}
    return Recipe(**{**settings, **fields})


def both(root: Path, *, train: bool, **fields):
    """The same set, read exactly and fast."""
    found = []
    for decode in ("exact", "fast"):
        data = load_data(recipe(root, decode=decode, **fields), train=train)
        found.append(data.train if train else data.val)
    return found


def levels_apart(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (some - others).abs() * 255


# -- how far it is from the plain path ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"eval_crop_ratio": 0.875}, {"in_chans": 1, "mean": (0.0,), "std": (1.0,)}])
def test_evaluation_is_within_two_levels(folder, fields):
    exact, fast = both(folder, train=False, **{**RAW, **fields})
    for (image, target), (quick, label) in zip(exact, fast, strict=True):
        assert quick.shape == image.shape
        assert quick.dtype == image.dtype == torch.float32
        assert label == target
        assert levels_apart(image, quick).max() <= LEVELS + 1e-3


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("fields", [{}, {"color_jitter": 0, "three_augment": False, "reprob": 1.0, "recount": 3}])
def test_training_crops_flips_and_erases_alike(folder, interpolation, fields):
    """With one seed both paths draw the same numbers: crop, flip, areas, and the noise in them."""
    settings = {**RAW, **STILL, "train_interpolation": interpolation, **fields, "aa": "none"}
    exact, fast = (Samples(found, (0, 0)) for found in both(folder, train=True, **settings))
    for key in [(index, copy) for index in range(13) for copy in range(3)]:
        apart = levels_apart(exact[key][0], fast[key][0])
        assert apart.max() <= LEVELS + 1e-3
    if fields:
        assert exact[0, 0][0].min() < -0.5  # noise, which no picture has


@pytest.mark.parametrize("remode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("chans", [1, 3])
def test_what_erasing_writes_is_the_same(folder, remode, chans):
    normal = {"in_chans": chans, "mean": (0.4,) * chans, "std": (0.2,) * chans}
    settings = {**STILL, **normal, "reprob": 1.0, "remode": remode, "recount": 2}
    exact, fast = (Samples(found, (0, 0)) for found in both(folder, train=True, **settings))
    plain = Samples(both(folder, train=True, **{**settings, "reprob": 0.0})[0], (0, 0))
    for index in range(6):
        erased = exact[index, 0][0] != plain[index, 0][0]
        assert erased.float().mean() > 0.01
        assert torch.equal(exact[index, 0][0][erased], fast[index, 0][0][erased])


@pytest.mark.parametrize("fields", [{}, {"three_augment": True}, {"aa": "v0"}, {"aa": "none", "color_jitter": 0.4}])
def test_policies_get_the_same_draws(folder, fields):
    """A policy may amplify two levels (a threshold, a histogram), so most pixels are compared, not all."""
    exact, fast = (Samples(found, (0, 0)) for found in both(folder, train=True, **{**RAW, **fields}))
    apart = torch.stack([levels_apart(exact[i, c][0], fast[i, c][0]) for i in range(13) for c in range(3)])
    assert apart.mean() < 0.5
    assert (apart <= 3 * LEVELS).float().mean() > 0.99


def test_between_resizing_and_normalising_little_differs(folder):
    """An image that is cropped whole and has its size already is not resampled: what differs is the policy."""
    write_photo(folder.parent / "exact.png", size=(48, 48))
    image = load_image(folder.parent / "exact.png")
    fields = Recipe(input_size=48)
    plain = train_transform(fields)
    plain.transforms[0].scale = plain.transforms[0].ratio = (1.0, 1.0)
    fast = fast_train(fields, plain)
    mean, std = (
        torch.tensor(value)[:, None, None] for value in (eval_transform(fields).mean, eval_transform(fields).std)
    )
    for seed in range(60):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        wanted = plain(image)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        levels, patches = fast(pil_to_tensor(image))
        found = levels.permute(2, 0, 1).float().div(255).sub(mean).div(std)
        if not patches:  # shears and translations may round otherwise, once each, and a histogram amplify that
            assert (levels_apart(found * std, wanted * std) <= 2.001).float().mean() > 0.98


def test_decoded_bytes_are_pillows(tmp_path):
    kinds = [{"subsampling": s, "quality": q} for s in (0, 1, 2) for q in (30, 75, 95)]
    kinds += [{"progressive": True}, {"mode": "L"}, {"keep_rgb": True}]
    for number, options in enumerate(kinds):
        path = write_photo(tmp_path / f"{number}.jpg", number, (93, 71), **options)
        levels = read_levels(str(path), 3, load_image).expand(3, -1, -1).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(levels, np.asarray(load_image(path)))


def test_without_torchvisions_decoder_pillow_reads_the_same(folder, monkeypatch):
    paths = sorted(str(path) for path in folder.rglob("*.*g"))
    expected = [read_levels(path, 3, load_image).expand(3, -1, -1) for path in paths]
    monkeypatch.setattr(pixels, "decode_jpeg", None)
    assert all(torch.equal(read_levels(path, 3, load_image), one) for path, one in zip(paths, expected, strict=True))


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared / "data" / "imagenet-sample-200.tar") as archive:
        archive.extractall(root, filter="data")
    return sorted(str(path) for path in root.rglob("*.JPEG"))


def test_policies_on_photographs(photographs):
    """The default policy on whole photographs: what a training sees differs by a fraction of a level."""
    fields = Recipe(reprob=0.0, **RAW)
    plain = train_transform(fields)
    fast = fast_train(fields, plain)
    means, far = [], []
    for number, path in enumerate(photographs[::4]):
        results = []
        for run in (lambda p=path: plain(load_image(p)), lambda p=path: fast(read_levels(p, 3, load_image))[0]):
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            results.append(run())
        apart = levels_apart(results[0], results[1].permute(2, 0, 1) / 255)
        means.append(apart.mean().item())
        far.append((apart > LEVELS + 1e-3).float().mean().item())
    assert np.mean(means) < 0.1
    assert max(means) < 1
    assert np.mean(far) < 0.005


@pytest.mark.parametrize("ratio", [1.0, 0.875])
@pytest.mark.slow
def test_photographs_are_within_two_levels(photographs, ratio):
    """What is stated in the documentation, on 200 photographs of full size."""
    shown = eval_transform(Recipe(eval_crop_ratio=ratio, **RAW))
    plain, fast = shown.build(), FastEval(shown)
    worst, total, differ = 0.0, 0.0, 0.0
    for path in photographs:
        levels = read_levels(path, 3, load_image)
        image = load_image(path)
        np.testing.assert_array_equal(levels.expand(3, -1, -1).permute(1, 2, 0).numpy(), np.asarray(image))
        apart = levels_apart(plain(image), fast(levels)[0].permute(2, 0, 1) / 255).round()
        worst, total, differ = (
            max(worst, apart.max().item()),
            total + apart.mean().item(),
            differ + (apart > 0).float().mean().item(),
        )
    assert worst <= LEVELS
    assert total / len(photographs) < 0.02
    assert differ / len(photographs) < 0.02


# -- what stays --------------------------------------------------------------------------------------------------------


def test_training_is_measured_on_exact_images(folder):
    exact, fast = (load_data(recipe(folder, decode=decode)).val for decode in ("exact", "fast"))
    assert type(fast) is type(exact)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(exact, fast, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_items(folder, workers):
    fields = recipe(folder, decode="fast", num_workers=workers, reprob=0.7)
    found = load_data(fields)
    samples = Samples(found.train, (0, 0))
    loader = train_loader(found.train, fields, epoch=0)
    for keys, (images, targets) in zip(loader.batch_sampler, loader, strict=True):
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        for key, image, target in zip(keys, images, targets, strict=True):
            assert torch.equal(image, samples[key][0])
            assert target == samples[key][1]
    val = load_data(fields, train=False).val
    images = torch.cat([images for images, _ in eval_loader(val, fields)])
    assert torch.equal(images, torch.stack([image for image, _ in val]))


def test_batches_travel_as_bytes_and_are_finished_on_the_device(folder):
    fields = recipe(folder, decode="fast", reprob=1.0)
    found = load_data(fields).train
    loader = train_loader(found, fields, epoch=0, device=torch.device("meta"))
    batch = loader.dataset.__getitems__(next(iter(loader.batch_sampler)))
    levels, patches = batch.images, batch.patches
    assert levels.dtype == torch.uint8
    assert levels.shape == (4, 48, 48, 3)
    assert len(patches) == 4
    assert found.finish(levels, [[]] * 4, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
def test_damaged_images_get_pillows_verdict(folder, tmp_path, how):
    path = tmp_path / "photo.jpg"
    path.write_bytes((folder / "train" / "cat" / "0.jpg").read_bytes())
    damage(path, how)
    with pytest.raises(DataError) as plain:
        load_image(path)
    with pytest.raises(DataError) as fast:
        read_levels(str(path), 3, load_image)
    assert str(fast.value) == str(plain.value)


def test_unreadable_image_is_left_out_when_asked(folder, tmp_path):
    for name in ("cat", "dog"):
        for number in range(3):
            write_photo(tmp_path / "train" / name / f"{number}.jpg", number)
            write_photo(tmp_path / "val" / name / f"{number}.jpg", number)
    damage(tmp_path / "train" / "dog" / "1.jpg", "truncated")
    fields = recipe(tmp_path, decode="fast", batch_size=6, repeated_aug=False, skip_corrupt=True)
    loader = train_loader(load_data(fields).train, fields, epoch=0)
    ((images, _),) = loader
    assert images.shape == (6, 3, 48, 48)
    assert len(loader.omissions) == 1
    with pytest.raises(DataError, match=r"dog/1.jpg .*--skip-corrupt"):
        list(train_loader(load_data(fields).train, fields.replace(skip_corrupt=False), epoch=0))


def test_other_kinds_of_files_are_read_by_pillow(tmp_path):
    for name, mode in (("a.png", "RGB"), ("b.jpg", "CMYK"), ("c.png", "LA"), ("d.jpg", "RGB")):
        path = write_photo(tmp_path / name, mode=mode)
        for chans in (1, 3):
            levels = read_levels(str(path), chans, lambda p, c=chans: load_image(p, c))
            wanted = np.asarray(load_image(path, chans))
            np.testing.assert_array_equal(levels.squeeze(0).numpy() if chans == 1 else levels.permute(1, 2, 0), wanted)


@pytest.mark.slow
def test_killed_and_resumed_training_ends_with_the_same_bits(folder, tmp_path):
    fields = {"data_path": str(folder), "decode": "fast", "input_size": 36, "batch_size": 4, "epochs": 2}
    fields |= {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "resume": "auto", "mixup": 0.0, "cutmix": 0.0}
    whole, parts = (tiny(**fields, output_dir=str(tmp_path / name), num_workers=n) for name, n in (("a", 0), ("b", 2)))
    train(whole, say=quiet)
    run_until(1, parts)
    train(parts, say=quiet)
    ours, theirs = (read(tmp_path / name / CHECKPOINT) for name in ("b", "a"))
    for key in ("model", "model_ema", "optimizer", "epoch", "max_accuracy"):
        assert same(ours[key], theirs[key]), key


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": 32}, "which input_size=32 has none of: use --decode exact"),
        ({"three_augment": True, "src": True}, "which src=True has none of"),
        ({"aa": "none", "train_interpolation": "lanczos"}, "no train_interpolation='lanczos': use random, bilinear"),
        ({"data_path": ""}, "these images are in memory already: use --decode exact"),
    ],
)
def test_what_cannot_be_fast_is_refused(folder, fields, message):
    with pytest.raises(LapeError, match=message) as caught:
        load_data(recipe(folder, **{"decode": "fast", **fields}))
    assert "\n" not in str(caught.value)


def test_a_filter_of_evaluation_that_is_not_fast_is_refused():
    with pytest.raises(LapeError, match="no interpolation='box': use bilinear, bicubic, or --decode exact"):
        FastEval(EvalTransform(64, interpolation="box"))
    with pytest.raises(LapeError, match="needs a square image"):
        FastEval(EvalTransform((64, 32)))
