"""A folder of images, `D/train/<class>/*` and `D/val/<class>/*`: what is in it, and what forbids training on it.

Training and `lape check-data` ask the same function, `survey`; the first raises its first error, the other lists all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS

from lape.data.images import is_hidden, is_image
from lape.errors import DataError
from lape.names import few

SPLITS = ("train", "val")
LAYOUT = (
    "--data-path must name a folder with train/<class>/* and val/<class>/*, or train and validation files of parquet, "
    "arrow or tar"
)


@dataclass
class Survey:
    """What lies in a folder. Classes and images are in the order of torchvision's `ImageFolder`."""

    images: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # split -> class -> paths
    classes: list[str] = field(default_factory=list)  # in the order of their numbers
    other_files: list[str] = field(default_factory=list)  # paths of files that are not read
    hidden_folders: list[str] = field(default_factory=list)  # paths of folders that are not read
    circles: list[str] = field(default_factory=list)  # paths of folders that are another one that is read, or around it
    errors: list[str] = field(default_factory=list)  # what forbids training, a line each with its fix


def check_root(root: Path) -> None:
    """Raises DataError where there is no folder of this name, or nothing in it."""
    if not root.exists():
        raise DataError(f"data folder {root} does not exist: {LAYOUT}, or be left out for the packaged digits")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a data folder: unpack it; {LAYOUT}")
    if not names_in(root):
        raise DataError(f"data folder {root} is empty: {LAYOUT}")


def survey(root: Path, splits: Sequence[str] = SPLITS) -> Survey:
    """Look through some splits of a folder; of another one that exists, only the names of its classes are compared.

    Where val/ alone is looked through, for an evaluation, it may lack classes and images of classes. Raises DataError
    for a folder that cannot be read.
    """
    result, classes = Survey(), dict[str, list[str]]()
    for split in splits:
        if (root / split).is_dir():
            classes[split] = _look_into(root / split, split, result)
        else:
            result.errors.append(f"{root} has no folder {split}/ (it holds {few(names_in(root))}): {LAYOUT}")
    for split in set(SPLITS) - set(splits):
        if (root / split).is_dir():
            classes[split] = _subfolders(root / split)
    train, val = (set(classes.get(split, [])) for split in SPLITS)
    if train and val and train != val and ("train" in splits or val - train):
        extra = {"train": sorted(train - val), "val": sorted(val - train)}
        text = ", ".join(f"only in {split}: {few(names)}" for split, names in extra.items() if names)
        result.errors.append(f"classes of {root}/train and {root}/val differ: {text}; make both the same")
    empty = [
        root / split / name
        for split, by_class in result.images.items()
        for name, paths in by_class.items()
        if not paths
    ]
    images = any(paths for by_class in result.images.values() for paths in by_class.values())
    if empty and ("train" in splits or not images):
        kinds = " ".join(IMG_EXTENSIONS)
        result.errors.append(
            f"no image in class folder {few(empty)}: put images there ({kinds}) or remove it from train and val"
        )
    if "train" in splits and len(train) == 1:
        result.errors.append(one_class(root, classes["train"]))
    result.classes = classes.get("train") or classes.get("val", [])
    return result


def one_class(root: Path, classes: Sequence[str]) -> str:
    return f"{root} has one class, {classes[0]!r}: nothing can be learned; is it the right folder level?"


def image_files(paths: Iterable[str | Path]) -> list[str | Path]:
    """The files that are named, and in the place of a folder all images in it and below, sorted, without hidden ones.

    Raises DataError for a folder without an image, or one that cannot be read.
    """
    files: list[str | Path] = []
    for path in paths:
        if not Path(path).is_dir():
            files.append(path)
            continue
        top = os.path.abspath(path)
        places = [(os.path.relpath(place, top), names) for place, names in _walk(Path(top), Survey())]
        images = [
            os.path.normpath(os.path.join(path, place, name))
            for place, names in places
            for name in sorted(names)
            if is_image(name)
        ]
        if not images:
            raise DataError(f"no image in folder {path}: give images ({' '.join(IMG_EXTENSIONS)}) or their folder")
        files += images
    return files


def _look_into(folder: Path, split: str, result: Survey) -> list[str]:
    """Enter the images of a split, and what is wrong with its layout; returns its classes."""
    classes = _subfolders(folder, result)
    result.images[split] = {name: [] for name in classes}
    for name, images in result.images[split].items():
        for place, files in _walk(folder / name, result):
            for file in sorted(files):
                (images if is_image(file) else result.other_files).append(os.path.join(place, file))
    files = [name for name in names_in(folder) if not (folder / name).is_dir()]
    flat = [name for name in files if is_image(name)]
    result.other_files += [str(folder / name) for name in files if name not in flat]
    if flat:
        fix = f"move every image to {folder}/<class>/"
        result.errors.append(f"{folder} holds {len(flat)} image(s) outside class folders ({few(flat)}): {fix}")
    elif not classes:
        result.errors.append(f"{folder} has no class folders: {LAYOUT}")
    return classes


def _subfolders(folder: Path, result: Survey | None = None) -> list[str]:
    """The names of the classes; folders that are none are entered into the result."""
    ancestors, classes, result = _ancestors(folder), list[str](), result or Survey()
    for name in names_in(folder):
        if not (folder / name).is_dir():
            continue
        place = str(folder / name)
        if is_hidden(name):
            result.hidden_folders.append(place)
        elif _identity(place) in ancestors:
            result.circles.append(place)
        else:
            classes.append(name)
    return classes


def _walk(top: Path, result: Survey) -> list[tuple[str, list[str]]]:
    """Each folder of a class, and its files. Links are followed, as by torchvision, but into no folder twice."""
    places, identities = [], _ancestors(top.parent)
    for place, folders, files in os.walk(top, onerror=_unreadable, followlinks=True):
        if _identity(place) in identities:
            result.circles.append(place)
            folders.clear()
            continue
        identities.add(_identity(place))
        result.hidden_folders += [os.path.join(place, name) for name in folders if is_hidden(name)]
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        places.append((place, files))
    return sorted(places)


def _ancestors(folder: Path) -> set[tuple[int, int]]:
    """The folder and all those that it lies in, as it is named and as it is."""
    ways = (folder.absolute(), folder.resolve())
    return {_identity(place) for way in ways for place in (way, *way.parents)}


def _identity(place: str | Path) -> tuple[int, int]:
    status = os.stat(place)
    return status.st_dev, status.st_ino


def names_in(folder: Path) -> list[str]:
    """List a folder in lexical order, torchvision's."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"cannot read folder {error.filename} ({error.strerror}): make it readable for this user") from None
