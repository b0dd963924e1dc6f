"""Images inside larger files: which files of a folder are which split, and which number is which class.

A file belongs to the split that its name says last (`train-00000-of-00002.parquet`, `imagenet-train-17.tar`), else to
that of the folder it lies in (`validation/data-00000-of-00001.arrow`). Files are looked for in the folder, in its
`data/`, and in folders there that are called as a split. The validation images are those of that name, else the test
images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lape.data.folders import LAYOUT, SPLITS, names_in
from lape.data.images import is_hidden
from lape.errors import DataError, LapeError
from lape.names import few

KINDS = (".parquet", ".arrow", ".tar")
WORDS = {"train": ("train", "training"), "val": ("validation", "valid", "val", "dev", "test", "testing")}
NAMES = "classnames.txt"  # of the classes by their numbers, one a line; they count more than those in files
OF = re.compile(r"-(\d+)-of-(\d+)$")
MOST_CLASSES = 2**20

Labels = Sequence[int | str]


class Contents(NamedTuple):
    """A data set inside larger files."""

    images: dict[str, tuple[Any, list[int]]]  # split -> what `load_image` takes, and class numbers
    classes: list[str]
    note: str  # what the output says behind the numbers of images


def stored_files(root: Path) -> dict[str, list[Path]]:
    """The files by the split that they say; none where train/ or val/ hold class folders. Raises DataError."""
    folders = [root / split for split in SPLITS if (root / split).is_dir()]
    if any(not is_hidden(name) and (folder / name).is_dir() for folder in folders for name in names_in(folder)):
        return {}
    files: dict[str, list[Path]] = {}
    words = [word for synonyms in WORDS.values() for word in synonyms]
    for folder in (root, root / "data"):
        for place in (folder, *(folder / word for word in words)):
            for path in map(place.joinpath, names_in(place) if place.is_dir() else ()):
                parts = [place.name, *re.split(r"[-._ 0-9]+", path.stem.lower())]
                word = next((part for part in reversed(parts) if part in words), None)
                if word is not None and path.suffix in KINDS and path.is_file() and not is_hidden(path.name):
                    files.setdefault(word, []).append(path)
    return files


def look(root: Path, files: dict[str, list[Path]], splits: Sequence[str], columns: Sequence[str]) -> Contents:
    """Open the files of some splits; every label is read, no image.

    Raises DataError: a split without files or images, a file that is missing or cannot be read, labels that are none.
    """
    sources: dict[str, Any] = {}
    labels: dict[str, Labels] = {}
    names: dict[str, list[str] | None] = {}
    note = ""
    for split in splits:
        word = next((word for word in WORDS[split] if word in files), None)
        if word is None:
            raise DataError(f"{root} has no {WORDS[split][0]} files (it has {', '.join(sorted(files))}): {LAYOUT}")
        kind = _kind_of(root, word, files[word])
        sources[split], labels[split], names[split], more = _read(root, kind, files[word], columns)
        note += f", {word}: {len(files[word])} {kind[1:]} file(s)" + more
        if not sources[split]:
            raise DataError(f"the {word} files in {root} hold no image: give others")
    all_labels = [label for of_split in labels.values() for label in of_split]
    classes, number = _numbering(root, all_labels, _names_of(root, names.values()))
    images = {split: (sources[split], _numbers_of(sources[split], labels[split], number, classes)) for split in splits}
    if len(splits) == len(SPLITS) and (val_only := set(images["val"][1]) - set(images["train"][1])):
        odd = few([classes[place] for place in sorted(val_only)])
        raise DataError(f"{root} has validation images of {len(val_only)} class(es) without a training image: {odd}")
    return Contents(images, classes, note)


def _kind_of(root: Path, word: str, paths: Sequence[Path]) -> str:
    """The kind of the files of a split. Raises DataError where they are of several, or one is missing."""
    if len({path.parent for path in paths}) > 1 or len({path.suffix for path in paths}) > 1:
        raise DataError(f"{root} has {word} files in several folders or of several kinds: {few(paths)}")
    numbers = [tuple(map(int, match.groups())) for path in paths if (match := OF.search(path.stem))]
    if numbers and numbers != [(place, len(paths)) for place in range(len(paths))]:
        raise DataError(f"{root} does not have all {word} files and no others: {len(paths)} are there ({few(paths)})")
    return paths[0].suffix


def _read(
    root: Path, kind: str, paths: Sequence[Path], columns: Sequence[str]
) -> tuple[Any, Labels, list[str] | None, str]:
    """Images, labels, names of classes where they are known, a note. Raises DataError."""
    if kind != ".tar":
        from lape.data.tables import read_tables

        return read_tables(paths, columns)
    from lape.data.shards import read_shards

    refuse_columns(columns, root)
    images, labels = read_shards(paths, [word for synonyms in WORDS.values() for word in synonyms])
    return images, labels, None, ""


def refuse_columns(columns: Sequence[str], what: object) -> None:
    """Raises LapeError where columns are named of what has none."""
    if columns:
        raise LapeError(f"columns={list(columns)} are of parquet and arrow files, not of {what}: leave it out")


def _names_of(root: Path, files: Iterable[list[str] | None]) -> list[str] | None:
    """The names of the classes: those that the user gives, else those of the files. Raises DataError."""
    first, *rest = files
    if any(one != first for one in rest):
        raise DataError(f"{root}: its training files name other classes than its validation files")
    if not (root / NAMES).is_file():
        return first
    try:
        names = [line.strip() for line in (root / NAMES).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {root / NAMES} ({error}): it holds a name of a class a line, in UTF-8") from None
    if len(set(names)) < len(names) or (first is not None and len(names) != len(first)):
        count = f" of the {len(first)} classes" if first is not None else ""
        raise DataError(
            f"{root / NAMES} has {len(names)} names, {len(set(names))} different ones: give one{count} a line"
        )
    return names


def _numbering(root: Path, labels: Labels, names: list[str] | None) -> tuple[list[str], dict[Any, int]]:
    """The classes, and which number a label means; names that files do not give are sorted. Raises DataError."""
    if len({type(label) for label in labels}) > 1:
        raise DataError(f"{root} has numbers and names as classes: label all images in one way")
    if isinstance(labels[0], str):
        names = names or sorted({str(label) for label in labels})
        return names, {name: place for place, name in enumerate(names)}
    largest = max(int(label) for label in labels)
    if names is None and largest >= MOST_CLASSES:
        raise DataError(f"{root} has class number {largest}: more than {MOST_CLASSES} are not counted")
    names = names or [str(number) for number in range(largest + 1)]
    return names, {number: number for number in range(len(names))}


def _numbers_of(sources: Any, labels: Labels, number: dict[Any, int], classes: list[str]) -> list[int]:
    odd = [place for place, label in enumerate(labels) if label not in number]
    if odd:
        raise DataError(
            f"{len(odd)} image(s) have a class that is none of the {len(classes)}, such as {labels[odd[0]]!r} of "
            f"{sources[odd[0]]} (-1 mostly means: not labelled): leave them out"
        )
    return [number[label] for label in labels]
