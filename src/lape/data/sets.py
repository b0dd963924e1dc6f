"""Data sets, checked before anything runs.

**Layouts.** `D/train/<class>/*` and `D/val/<class>/*` (torchvision's `ImageFolder`, classes in its lexical order),
CIFAR-10 and CIFAR-100 in the original's Python files, iNaturalist 2018 and 2019 as DeiT lays them out, and the digits
inside the package. A layout that cannot be trusted is a `DataError` of one line; a corrupt image is one that names the
file, when it is read. It is never replaced by another, unless `skip_corrupt` asks for that in training, where each is
named and counted.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from lape.data.augment import Transform, is_augmented
from lape.data.images import is_image, load_image, to_mode
from lape.errors import DataError, LapeError

if TYPE_CHECKING:
    from lape.recipe import Recipe

CACHE_BYTES = 2**28  # tensors of an unaugmented in-memory data set are kept up to this size
LAYOUT = "--data-path must name a folder with train/<class>/* and val/<class>/*"

Opened = tuple[dict[str, Dataset], list[str], str]  # the sets by split, the classes, the name


class Images(Dataset):
    """Images in memory or in files, read by `read(source)`: (image, target) items."""

    def __init__(self, sources: Any, targets: Sequence[int], read: Callable, transform: Transform) -> None:
        self.sources, self.targets, self.read, self.transform = sources, targets, read, transform

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.read(self.sources[index])), self.targets[index]


class InMemory(Dataset):
    """A data set without randomness, transformed once: `images` (n, in_chans, H, W) float32, `targets` (n,) int64."""

    def __init__(self, dataset: Images) -> None:
        self.images = torch.stack([dataset[index][0] for index in range(len(dataset))])
        self.targets = torch.tensor(dataset.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.targets[index])

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images and targets of some indices, in one indexing operation."""
        chosen = torch.tensor(indices, dtype=torch.long)
        return self.images[chosen], self.targets[chosen]


def _reader(recipe: Recipe) -> tuple[Callable[..., Opened], Path]:
    root = Path(recipe.data_path).expanduser()
    if recipe.data_path:
        _check_root(root)
        return READERS[recipe.data_set], root
    if recipe.data_set != "IMNET":
        raise DataError(f"--data-set {recipe.data_set} needs --data-path: nothing is downloaded, name its folder")
    return _digits, root


def _check_root(root: Path) -> None:
    if not root.exists():
        raise DataError(f"data folder {root} does not exist: {LAYOUT}, or be left out for the packaged digits")
    if not root.is_dir():
        raise DataError(f"{root} is a file, not a data folder: unpack it; {LAYOUT}")
    if not _names(root):
        raise DataError(f"data folder {root} is empty: {LAYOUT}")


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the packaged digits: images (n, 8, 8) uint8 with values 0..16, labels (n,) uint8; "train" or "val".

    1,797 handwritten digits by 13 people, 8 x 8 pixels that count the ink of 4 x 4 cells: the test part of the UCI
    repository's "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
    https://doi.org/10.24432/C50P49), licence CC BY 4.0. Of each class the images number 2, 7, 12, ... (counted from 0
    in the file's order) are the validation set: 359 images, 1,438 remain for training, each class in proportion.

    The file was made from `sklearn/datasets/data/digits.csv.gz` of the scikit-learn 1.9.1 wheel, nothing else changed:

        table = np.loadtxt("digits.csv.gz", delimiter=",").astype(np.uint8)
        np.savez_compressed("digits.npz", images=table[:, :64].reshape(-1, 8, 8), labels=table[:, 64])
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    turn = np.zeros(len(labels), dtype=int)  # how many of its class come before each image
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    chosen = (turn % 5 == 2) == (split == "val")
    return images[chosen], labels[chosen]


def _digits(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """Digits are neither cropped nor mirrored in training; with no other augmentation they become tensors at once."""
    sets: dict[str, Dataset] = {}
    for split, transform in transforms.items():
        images, labels = digits(split)
        grey = np.round(images * (255 / 16)).astype(np.uint8)
        found = Images(grey, labels.tolist(), partial(_from_array, in_chans=recipe.in_chans), transform)
        fits = len(grey) * recipe.in_chans * recipe.input_size**2 * 4 <= CACHE_BYTES
        still = split == "val" or not is_augmented(recipe)
        sets[split] = InMemory(found) if fits and still else found
    return sets, [str(label) for label in range(10)], "packaged digits (8x8, UCI)"


def _from_array(pixels: np.ndarray, in_chans: int) -> Image.Image:
    return to_mode(Image.fromarray(pixels), in_chans)


def _folders(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """`root/<split>/<class>/*`; the other split's classes are compared where it exists, even if it is not used."""
    classes = {split: _classes(root, split) for split in transforms}
    for split in {"train", "val"} - set(classes):
        present = _subfolders(root / split) if (root / split).is_dir() else []
        if present:
            classes[split] = present
    if len(classes) == 2 and classes["train"] != classes["val"]:
        raise DataError(f"classes of {root}/train and {root}/val differ: {_difference(classes)}; make both the same")
    sets: dict[str, Dataset] = {
        split: _folder(root / split, recipe, transform) for split, transform in transforms.items()
    }
    return sets, next(iter(classes.values())), _counted(str(root), sets, next(iter(classes.values())))


def _folder(folder: Path, recipe: Recipe, transform: Transform) -> ImageFolder:
    found = ImageFolder(
        str(folder),
        transform=transform,
        loader=partial(load_image, in_chans=recipe.in_chans),
        is_valid_file=is_image,
        allow_empty=True,  # reported here, with the folder and the fix
    )
    counts = np.bincount(found.targets, minlength=len(found.classes))
    empty = [folder / name for name, count in zip(found.classes, counts, strict=True) if not count]
    for path in empty:
        _names(path)  # an unreadable folder looks empty to torchvision
    if empty:
        kinds = " ".join(IMG_EXTENSIONS)
        raise DataError(
            f"no image in class folder {_first(empty)}: put images there ({kinds}) or remove it from train and val"
        )
    return found


def _classes(root: Path, split: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"{root} has no folder {split}/ (it holds {_first(_names(root))}): {LAYOUT}")
    classes = _subfolders(folder)
    flat = [name for name in _names(folder) if is_image(name) and name not in classes]
    if flat:
        fix = f"move every image to {folder}/<class>/"
        raise DataError(f"{folder} holds {len(flat)} image(s) outside class folders ({_first(flat)}): {fix}")
    if not classes:
        raise DataError(f"{folder} has no class folders: {LAYOUT}")
    return classes


def _subfolders(folder: Path) -> list[str]:
    return [name for name in _names(folder) if (folder / name).is_dir()]


def _names(folder: Path) -> list[str]:
    """List a folder in lexical order, torchvision's."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"cannot read folder {folder} ({error.strerror}): make it readable for this user") from None


def _difference(classes: dict[str, list[str]]) -> str:
    train, val = set(classes["train"]), set(classes["val"])
    parts = {"train": sorted(train - val), "val": sorted(val - train)}
    return ", ".join(f"only in {split}: {_first(names)}" for split, names in parts.items() if names)


def _first(names: Sequence[Any], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return " ".join(str(name) for name in names[:most]) + rest


def _counted(what: str, sets: dict[str, Dataset], classes: list[str]) -> str:
    words = {"train": "training", "val": "validation"}
    counts = ", ".join(f"{len(_sized(found))} {words[split]} images" for split, found in sets.items())
    return f"{what} ({len(classes)} classes, {counts})"


def _cifar(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """CIFAR-100 as in DeiT, or CIFAR-10 where the folder holds that; the official Python files, never downloaded."""
    known = {"CIFAR-100": CIFAR100, "CIFAR-10": CIFAR10}
    name = next((name for name, kind in known.items() if (root / kind.base_folder).is_dir()), None)
    if name is None:
        wanted = " or ".join(f"{root / kind.base_folder}" for kind in known.values())
        raise DataError(f"no CIFAR in {root}: unpack the Python version of the official archive, to get {wanted}")
    sets: dict[str, Dataset] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy on how the official files were pickled, long ago
            for split in transforms:
                found = known[name](str(root), train=split == "train", download=False)
                read = partial(_from_array, in_chans=recipe.in_chans)
                sets[split] = Images(found.data, found.targets, read, transforms[split])
    except (RuntimeError, OSError) as error:
        folder = root / known[name].base_folder
        raise DataError(
            f"{folder} is incomplete or altered ({type(error).__name__}): unpack the archive again"
        ) from error
    return sets, list(found.classes), _counted(f"{name} in {root}", sets, found.classes)


def _inat(recipe: Recipe, root: Path, transforms: dict[str, Transform]) -> Opened:
    """iNaturalist: `train<year>.json`, `val<year>.json`, `categories.json`; labels in DeiT's order.

    A label is numbered when the training annotations first mention it. `file_name` is <set>/<group>/<category>/<file>;
    the images lie there, or without <group> as DeiT has them.
    """
    year = {"INAT": 2018, "INAT19": 2019}[recipe.data_set]
    listing = _json(root / f"train{year}.json")
    table = _json(root / "categories.json")
    try:
        label_of = {int(entry.get("id", place)): str(entry[recipe.inat_category]) for place, entry in enumerate(table)}
        seen = dict.fromkeys(label_of[int(entry["category_id"])] for entry in listing["annotations"])
        number = {label: place for place, label in enumerate(seen)}
        sets: dict[str, Dataset] = {}
        for split, transform in transforms.items():
            images = listing["images"] if split == "train" else _json(root / f"{split}{year}.json")["images"]
            parts = [entry["file_name"].split("/") for entry in images]
            targets = [number[label_of[int(part[2])]] for part in parts]
            paths = _inat_paths(root, parts)
            sets[split] = Images(paths, targets, partial(load_image, in_chans=recipe.in_chans), transform)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LapeError):
            raise
        raise DataError(
            f"the json files in {root} are not iNaturalist {year} ({type(error).__name__}: {error}) or have no "
            f"inat_category {recipe.inat_category!r}: check the files, or use --inat-category name"
        ) from error
    return sets, list(number), _counted(f"iNaturalist {year} in {root}", sets, list(number))


def _inat_paths(root: Path, parts: list[list[str]]) -> list[str]:
    whole = ["/".join([str(root), *part]) for part in parts]
    short = ["/".join([str(root), part[0], *part[2:]]) for part in parts]
    for paths in (whole, short):
        if paths and os.path.exists(paths[0]):
            return paths
    raise DataError(f"no image at {_first(whole[:1] + short[:1]) or root}: unpack the images beside the json files")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): an iNaturalist folder holds it") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): get the file again") from None


def _sized(dataset: Dataset) -> Sized:
    assert isinstance(dataset, Sized)
    return dataset


READERS: dict[str, Callable[..., Opened]] = {"IMNET": _folders, "CIFAR": _cifar, "INAT": _inat, "INAT19": _inat}
