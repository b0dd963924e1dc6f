"""Data sets, checked before anything runs.

**Layouts.** `D/train/<class>/*` and `D/val/<class>/*` (torchvision's `ImageFolder`, classes in its lexical order), the
same in parquet, arrow and tar files (`lape.data.stored`), CIFAR-10 and CIFAR-100 in the original's Python files,
iNaturalist 2018 and 2019 as DeiT lays them out, and the digits inside the package. A layout that cannot be trusted is a
`DataError` of one line; a corrupt image is one that names the file, when it is read. It is never replaced by another,
unless `skip_corrupt` asks for that in training, where each is named and counted.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from lape.data.augment import Transform, is_augmented
from lape.data.device import OnDevice
from lape.data.folders import check_root, survey
from lape.data.images import assumption, load_image, to_mode
from lape.data.stored import look, refuse_columns, stored_files
from lape.errors import DataError, LapeError, check_file
from lape.names import few

if TYPE_CHECKING:
    from lape.recipe import Recipe

CACHE_BYTES = 2**28  # tensors of an unaugmented in-memory data set are kept up to this size
OF_STILL = ("in_chans", "input_size", "eval_crop_ratio", "mean", "std", "train_interpolation")  # what decides on them
MOST_STILL = 4  # such tensors in a process
_STILL: dict[str, torch.Tensor] = {}


class Listing(NamedTuple):
    """A data set before its images are transformed."""

    images: dict[str, tuple[Any, list[int]]]  # split -> what `read` takes, and class numbers
    read: Callable[[Any], Image.Image]
    classes: list[str]
    name: str  # what the output calls it


Reader = Callable[["Recipe", Path, Sequence[str]], Listing]


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory or in files, read by `read(source)`: (image, target) items."""

    def __init__(
        self, sources: Any, targets: Sequence[int], read: Callable[[Any], Image.Image], transform: Transform
    ) -> None:
        self.sources, self.targets, self.read, self.transform = sources, targets, read, transform

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.read(self.sources[index])), self.targets[index]


def reader_of(recipe: Recipe) -> tuple[Reader, Path]:
    """Who lists the data of a recipe, and its folder. Raises DataError where there is none."""
    root = Path(recipe.data_path).expanduser()
    if not recipe.data_path:
        if recipe.data_set != "IMNET":
            raise DataError(f"--data-set {recipe.data_set} needs --data-path: nothing is downloaded, name its folder")
        refuse_columns(recipe.columns, "the digits")
        return list_digits, root
    check_root(root)
    reader = READERS[recipe.data_set]
    if reader is _folders and (files := stored_files(root)):
        return partial(_list_packed, files), root
    refuse_columns(recipe.columns, root)
    return reader, root


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
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    turn = np.zeros(len(labels), dtype=int)  # how many of its class come before each image
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    in_split = (turn % 5 == 2) == (split == "val")
    return images[in_split], labels[in_split]


def list_digits(recipe: Recipe, root: Path, splits: Sequence[str]) -> Listing:
    images = {}
    for split in splits:
        ink, labels = digits(split)
        images[split] = np.round(ink * (255 / 16)).astype(np.uint8), labels.tolist()
    read = partial(_from_array, in_chans=recipe.in_chans)
    return Listing(images, read, [str(label) for label in range(10)], "packaged digits (8x8, UCI)")


def keep_if_still(dataset: Images, recipe: Recipe, split: str) -> Images | OnDevice:
    """Images without augmentation become tensors in memory at once, where they fit."""
    fits = len(dataset) * recipe.in_chans * recipe.input_size**2 * 4 <= CACHE_BYTES
    if not fits or (split == "train" and is_augmented(recipe)):
        return dataset
    key = repr((split, [getattr(recipe, name) for name in OF_STILL]))
    if key not in _STILL:  # the digits alone come here: of trainings in one process, the first transforms them
        if len(_STILL) == MOST_STILL:
            del _STILL[next(iter(_STILL))]
        _STILL[key] = torch.stack([dataset[index][0] for index in range(len(dataset))])
    return OnDevice(_STILL[key], torch.tensor(dataset.targets), [])


def _from_array(pixels: np.ndarray[Any, Any], in_chans: int) -> Image.Image:
    return to_mode(Image.fromarray(pixels), in_chans)


def _folders(recipe: Recipe, root: Path, splits: Sequence[str]) -> Listing:
    """`root/<split>/<class>/*`."""
    folder = survey(root, splits)
    if folder.errors:
        raise DataError(folder.errors[0])
    images, number = {}, {name: place for place, name in enumerate(folder.classes)}
    for split, by_class in folder.images.items():
        targets = [number[name] for name, paths in by_class.items() for _ in paths]
        images[split] = [path for paths in by_class.values() for path in paths], targets
    return _files(recipe, images, folder.classes, str(root))


def _list_packed(files: dict[str, list[Path]], recipe: Recipe, root: Path, splits: Sequence[str]) -> Listing:
    """Images in parquet, arrow and tar files."""
    images, classes, note = look(root, files, splits, recipe.columns)
    return _files(recipe, images, classes, f"{root}{note}")


def _files(recipe: Recipe, images: dict[str, tuple[Any, list[int]]], classes: list[str], what: str) -> Listing:
    read = partial(load_image, in_chans=recipe.in_chans)
    paths = next(iter(images.values()))[0]
    note = assumption(paths[0]) if paths else ""
    name = _with_counts(what, images, classes) + (
        f"; the first image is {note} (lape check-data looks at all)" if note else ""
    )
    return Listing(images, read, classes, name)


def _with_counts(what: str, images: dict[str, tuple[Any, list[int]]], classes: list[str]) -> str:
    words = {"train": "training", "val": "validation"}
    counts = ", ".join(f"{len(targets)} {words[split]} images" for split, (_, targets) in images.items())
    return f"{what} ({len(classes)} classes, {counts})"


def list_cifar(recipe: Recipe, root: Path, splits: Sequence[str]) -> Listing:
    """CIFAR-100 as in DeiT, or CIFAR-10 where the folder holds that; the official Python files, never downloaded."""
    kinds = {"CIFAR-100": CIFAR100, "CIFAR-10": CIFAR10}
    name = next((name for name, kind in kinds.items() if (root / kind.base_folder).is_dir()), None)
    if name is None:
        folders = " or ".join(f"{root / kind.base_folder}" for kind in kinds.values())
        raise DataError(f"no CIFAR in {root}: unpack the Python version of the official archive, to get {folders}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy on how the official files were pickled, long ago
            sets = {split: kinds[name](str(root), train=split == "train", download=False) for split in splits}
    except (RuntimeError, OSError) as error:
        folder = root / kinds[name].base_folder
        raise DataError(
            f"{folder} is incomplete or altered ({type(error).__name__}): unpack the archive again"
        ) from error
    images = {split: (one.data, one.targets) for split, one in sets.items()}
    classes = list(sets[splits[0]].classes)
    read = partial(_from_array, in_chans=recipe.in_chans)
    return Listing(images, read, classes, _with_counts(f"{name} in {root}", images, classes))


def _inat(recipe: Recipe, root: Path, splits: Sequence[str]) -> Listing:
    """iNaturalist: `train<year>.json`, `val<year>.json`, `categories.json`; labels in DeiT's order.

    A label is numbered when the training annotations first mention it. `file_name` is <set>/<group>/<category>/<file>;
    the images lie there, or without <group> as DeiT has them.
    """
    year = {"INAT": 2018, "INAT19": 2019}[recipe.data_set]
    annotations = _json(root / f"train{year}.json")
    categories = _json(root / "categories.json")
    try:
        label_of = {
            int(entry.get("id", place)): str(entry[recipe.inat_category]) for place, entry in enumerate(categories)
        }
        labels = dict.fromkeys(label_of[int(entry["category_id"])] for entry in annotations["annotations"])
        number = {label: place for place, label in enumerate(labels)}
        images = {}
        for split in splits:
            entries = annotations["images"] if split == "train" else _json(root / f"{split}{year}.json")["images"]
            parts = [entry["file_name"].split("/") for entry in entries]
            images[split] = _inat_paths(root, parts), [number[label_of[int(part[2])]] for part in parts]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LapeError):
            raise
        raise DataError(
            f"the json files in {root} are not iNaturalist {year} ({type(error).__name__}: {error}) or have no "
            f"inat_category {recipe.inat_category!r}: check the files, or use --inat-category name"
        ) from error
    return _files(recipe, images, list(number), f"iNaturalist {year} in {root}")


def _inat_paths(root: Path, parts: list[list[str]]) -> list[str]:
    full = ["/".join([str(root), *part]) for part in parts]
    short = ["/".join([str(root), part[0], *part[2:]]) for part in parts]
    for paths in (full, short):
        if paths and os.path.exists(paths[0]):
            return paths
    raise DataError(f"no image at {few(full[:1] + short[:1]) or root}: unpack the images beside the json files")


def _json(path: Path) -> Any:
    check_file(path, DataError)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): an iNaturalist folder holds it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): get the file again") from None


READERS: dict[str, Reader] = {"IMNET": _folders, "CIFAR": list_cifar, "INAT": _inat, "INAT19": _inat}
