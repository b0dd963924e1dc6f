"""`lape check-data`: every kind of damage is found, named and judged; nothing is changed; the exit code says it."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lape.cli.app import USER_ERROR, app, run
from lape.data.check import check_data
from lape.data.open import load_data
from lape.errors import DataError, LapeError
from lape.recipe import Recipe


def write(path: Path, seed: int, mode: str = "RGB", size: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    (image if mode == "I;16" else image.convert(mode)).save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "data"
    seed = 0
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                write(root / split / name / f"{number}.{'jpg' if number else 'png'}", seed := seed + 1)
    return root


def names_below(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_clean_folder_is_fit(folder, capsys, tmp_path):
    before = names_below(folder)
    assert run(app, ["check-data", str(folder), "--json", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr()
    assert "train: 2 classes, 6 images (a class: 3 to 3, median 3)" in shown.out
    assert "Training may start (10 images in" in shown.out
    assert shown.err == ""
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fit"] is True
    assert report["counts"] == {"train": {"cat": 3, "dog": 3}, "val": {"cat": 2, "dog": 2}}
    assert report["sizes"] == {"smallest": 24, "largest": 24}
    assert names_below(folder) == before


def truncate(root: Path) -> None:
    path = root / "train" / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def read_all(root: Path) -> None:
    data = load_data(Recipe(data_path=str(root), batch_size=2, input_size=16, aa="none"))
    for dataset in (data.train, data.val):
        for index in range(len(dataset)):
            dataset[index]


FORBIDDEN = {
    "truncated": (truncate, ["1 file(s) that cannot be decoded: train/dog/1.jpg", "truncated", "--skip-corrupt"]),
    "text": (lambda d: (d / "val/cat/1.jpg").write_text("no"), ["val/cat/1.jpg (not an image)"]),
    "no bytes": (lambda d: (d / "val/cat/1.jpg").write_bytes(b""), ["val/cat/1.jpg (empty file)"]),
    "float": (
        lambda d: Image.fromarray(np.zeros((4, 4), np.float32)).save(d / "train/cat/f.tiff"),
        ["train/cat/f.tiff", "no known range"],
    ),
    "empty class": (
        lambda d: [p.unlink() for p in (d / "val/cat").iterdir()],
        ["no image in class folder ", "/val/cat: put images there"],
    ),
    "class only in train": (lambda d: shutil.rmtree(d / "val/dog"), ["differ: only in train: dog"]),
    "class only in val": (lambda d: shutil.rmtree(d / "train/cat"), ["differ: only in val: cat"]),
    "flat val": (
        lambda d: [shutil.move(d / "val/cat/1.jpg", d / "val/x.jpg"), shutil.rmtree(d / "val/cat")],
        ["/val holds 1 image(s) outside class folders (x.jpg)"],
    ),
    "no val": (lambda d: shutil.rmtree(d / "val"), ["has no folder val/"]),
    "one class": (
        lambda d: [shutil.rmtree(d / split / "cat") for split in ("train", "val")],
        ["has one class, 'dog'"],
    ),
    "no classes": (lambda d: [shutil.rmtree(d / "val" / c) for c in ("cat", "dog")], ["/val has no class folders"]),
}


@pytest.mark.parametrize("how", FORBIDDEN)
def test_what_forbids_training_is_an_error_and_the_trainer_agrees(folder, capsys, how):
    damage, words = FORBIDDEN[how]
    damage(folder)
    before = names_below(folder)
    assert run(app, ["check-data", str(folder)]) == USER_ERROR
    shown = capsys.readouterr()
    errors = [line for line in shown.out.splitlines() if line.startswith("error: ")]
    assert errors
    assert all(any(word in line for line in errors) for word in words), shown.out
    assert shown.err.count("\n") == 1
    assert "not fit for training" in shown.err
    assert names_below(folder) == before
    with pytest.raises(LapeError):
        read_all(folder)


REMARKABLE = {
    "cmyk": (
        lambda d: write(d / "train/cat/c.jpg", 91, "CMYK"),
        "1 image(s) with CMYK, converted to RGB: train/cat/c.jpg",
    ),
    "grayscale": (lambda d: write(d / "train/cat/g.jpg", 92, "L"), "1 image(s) with grayscale"),
    "16 bit": (lambda d: write(d / "train/cat/s.png", 93, "I;16"), "1 image(s) with 16-bit grayscale"),
    "alpha": (lambda d: write(d / "val/cat/a.png", 94, "RGBA"), "1 image(s) with transparency, dropped: val/cat/a.png"),
    "macOS": (lambda d: (d / "train/cat/._1.jpg").write_bytes(b"x"), "1 file(s) of macOS, which are not read"),
    "notes": (lambda d: (d / "train/cat/notes.txt").write_text("x"), "1 file(s) that are no images by their names"),
    "duplicate": (
        lambda d: shutil.copy(d / "train/cat/1.jpg", d / "val/cat/9.jpg"),
        "1 validation image(s) are training images, too: val/cat/9.jpg = train/cat/1.jpg",
    ),
    "duplicate elsewhere": (
        lambda d: shutil.copy(d / "train/cat/1.jpg", d / "val/dog/9.jpg"),
        "1 of them under another class",
    ),
    "numbers": (
        lambda d: [write(d / s / n / "x.png", 10 * int(n) + len(s)) for s in ("train", "val") for n in ("2", "10")],
        "classes 0, 1, 2 are 10, 2",
    ),
    "half wnids": (
        lambda d: [(d / s / "cat").rename(d / s / "n01440764") for s in ("train", "val")],
        "1 classes are WordNet ids and 1 are not (dog)",
    ),
}


@pytest.mark.parametrize("how", REMARKABLE)
def test_what_the_user_should_know_is_a_warning(folder, capsys, how):
    change, words = REMARKABLE[how]
    change(folder)
    assert run(app, ["check-data", str(folder)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert any(words in line for line in warnings), warnings


def test_a_thousand_ids_are_compared_with_imagenets(tmp_path):
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-1k").label_names()
    source = write(tmp_path / "one.png", 1, size=4)
    for split in ("train", "val"):
        for name in [*known[1:], "n99999999"]:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            os.link(source, tmp_path / "data" / split / name / "x.png")
    report = check_data(tmp_path / "data", workers=1)
    assert report.fit
    assert any("not those of ImageNet-1k: n99999999 are others" in text for text in report.warnings)


def test_processes_find_what_one_finds(folder):
    for number in range(80):
        write(folder / "train" / "dog" / f"more{number}.jpg", 1000 + number, size=8)
    truncate(folder)
    alone, many = (check_data(folder, workers=workers, progress=False).to_dict() for workers in (1, 2))
    for report in (alone, many):
        del report["seconds"]
    assert alone == many
    assert alone["corrupt"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        check_data(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {"columns": (), "workers": None}),
        (["--columns", "img", "cls", "--workers", "3"], {"columns": ("img", "cls"), "workers": 3}),
    ],
)
def test_the_command_hands_its_options_on(monkeypatch, words, options):
    calls = []
    report = SimpleNamespace(fit=True, lines=list)
    monkeypatch.setattr("lape.data.check.check_data", lambda path, **how: calls.append((path, how)) or report)
    assert run(app, ["check-data", "here", *words]) == 0
    assert calls == [("here", options)]
