"""Is a folder of images fit to be trained on for days? Every file is opened, counted and compared before a long run.

`D/train/<class>/*` and `D/val/<class>/*` are read by all processors. **Errors** forbid training: classes that differ,
a class without an image, images outside class folders, files that cannot be decoded. **Warnings** are for the user to
judge: images that are in both splits, kinds of pixels that are converted, folders whose names are numbers (their order
is that of their spelling: 10 before 2), names that mix WordNet ids with others, and files that are no images.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lape.data.images import is_image, to_mode
from lape.data.loaders import processors
from lape.data.sets import LAYOUT
from lape.errors import DataError

SPLITS = ("train", "val")
WNID = re.compile(r"n\d{8}")
TOGETHER = 64  # files a process takes at once
EXAMPLES = 5  # files that a line of the report names
USUAL, PLAIN = ("RGB",), ("RGB", "L")
# What PIL calls the pixels of a file, and what becomes of them.
ODD = {
    "CMYK": "CMYK, converted to RGB",
    "L": "grayscale, repeated in three channels",
    "1": "black and white, repeated in three channels",
    "P": "a palette, converted to RGB",
    "RGBA": "transparency, dropped",
    "LA": "transparency, dropped",
    "I;16": "16-bit grayscale, scaled to 8 bits",
    "I": "32-bit integers, scaled to 8 bits",
    "YCbCr": "YCbCr, converted to RGB",
    "LAB": "LAB, converted to RGB",
}


@dataclass
class Report:
    """What was found. `errors` and `warnings` are lines; `fit` says whether training may start."""

    root: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> class -> images
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    corrupt: dict[str, str] = field(default_factory=dict)  # file -> reason
    odd: dict[str, list[str]] = field(default_factory=dict)  # kind -> files
    duplicates: list[list[str]] = field(default_factory=list)  # the same bytes: [training file, validation file]
    sizes: dict[str, int] = field(default_factory=dict)  # smallest and largest side, pixels
    seconds: float = 0.0

    @property
    def fit(self) -> bool:
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        return {"fit": self.fit, **asdict(self)}

    def lines(self) -> Iterator[str]:
        """The report for people: a summary, then one line a problem."""
        yield f"{self.root}:"
        for split, counts in self.counts.items():
            numbers = sorted(counts.values()) or [0]
            middle = numbers[len(numbers) // 2]
            yield (
                f"  {split}: {len(counts)} classes, {sum(numbers)} images "
                f"(a class: {numbers[0]} to {numbers[-1]}, median {middle})"
            )
        if self.sizes:
            yield f"  sides of {self.sizes['smallest']} to {self.sizes['largest']} pixels"
        yield from (f"error: {text}" for text in self.errors)
        yield from (f"warning: {text}" for text in self.warnings)
        files = sum(sum(counts.values()) for counts in self.counts.values())
        speed = f"{files} images in {self.seconds:.1f} s"
        yield f"{'Training may start' if self.fit else 'Training must not start'} ({speed})"


def check_data(root: str | Path, *, workers: int | None = None, progress: bool | None = None) -> Report:
    """Check an image folder; nothing in it is changed.

    Args:
        root: the folder with train/ and val/.
        workers: processes, default: one a processor.
        progress: draw a bar; default: where stderr is a terminal.

    Raises:
        DataError: `root` is no folder.
    """
    began, root = time.perf_counter(), Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist or is no folder: {LAYOUT}")
    report = Report(str(root))
    files = _look_around(root, report)
    hashes: dict[str, dict[bytes, str]] = {split: {} for split in SPLITS}
    smallest, largest = sys.maxsize, 0
    odd: dict[str, list[str]] = {}
    found = _inspect_all(root, files, workers or processors())
    for (split, _, path), (reason, kind, width, height, digest) in _shown(found, len(files), progress):
        if reason:
            report.corrupt[path] = reason
            continue
        if kind not in USUAL:
            odd.setdefault(ODD.get(kind, kind), []).append(path)
        smallest, largest = min(smallest, width, height), max(largest, width, height)
        hashes[split].setdefault(digest, path)
    report.odd = {kind: sorted(paths) for kind, paths in sorted(odd.items())}
    report.corrupt = dict(sorted(report.corrupt.items()))
    report.duplicates = sorted(
        [hashes["train"][digest], path] for digest, path in hashes["val"].items() if digest in hashes["train"]
    )
    if largest:
        report.sizes = {"smallest": smallest, "largest": largest}
    _judge_files(report)
    report.seconds = round(time.perf_counter() - began, 2)
    return report


# ------------------------------------------------------------------------------------------------ folders


Place = tuple[str, str, str]  # split, class, path below the root


def _look_around(root: Path, report: Report) -> list[Place]:
    """Classes, counts and what lies where it should not; the images to open."""
    files: list[Place] = []
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            report.errors.append(f"no folder {split}/: {LAYOUT}")
            continue
        report.counts[split] = {}
        flat, strange = [], []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                images, others = _images_below(Path(entry.path), root)
                report.counts[split][entry.name] = len(images)
                files += [(split, entry.name, path) for path in images]
                strange += others
            elif is_image(entry.name):
                flat.append(f"{split}/{entry.name}")
            else:
                strange.append(f"{split}/{entry.name}")
        if flat:
            report.errors.append(f"{len(flat)} image(s) outside class folders: {_few(flat)}; move each to its class")
        elif not report.counts[split]:
            report.errors.append(f"{split}/ has no class folders: {LAYOUT}")
        _judge_others(strange, report)
        empty = [f"{split}/{name}" for name, count in report.counts[split].items() if not count]
        if empty:
            report.errors.append(f"{len(empty)} class(es) without an image: {_few(empty)}; fill or remove them")
    _judge_classes(report)
    return files


def _images_below(folder: Path, root: Path) -> tuple[list[str], list[str]]:
    """The images that torchvision's ImageFolder would find, and the other files."""
    images: list[str] = []
    others: list[str] = []
    for place, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(place, root)
        for name in sorted(names):
            (images if is_image(name) else others).append(f"{below}/{name}")
    return images, others


def _judge_others(others: list[str], report: Report) -> None:
    mac = [path for path in others if os.path.basename(path).startswith(("._", ".DS_Store"))]
    rest = [path for path in others if path not in set(mac)]
    if mac:
        report.warnings.append(f"{len(mac)} file(s) of macOS, which are not read: {_few(mac)}")
    if rest:
        report.warnings.append(f"{len(rest)} file(s) that are no images by their names, not read: {_few(rest)}")


def _judge_classes(report: Report) -> None:
    train, val = (set(report.counts.get(split, {})) for split in SPLITS)
    if train and val and train != val:
        for split, alone in (("train", train - val), ("val", val - train)):
            if alone:
                report.errors.append(f"{len(alone)} class(es) only in {split}: {_few(sorted(alone))}")
    names = sorted(train | val)
    wnids = [name for name in names if WNID.fullmatch(name)]
    if wnids and len(wnids) != len(names):
        others = [name for name in names if not WNID.fullmatch(name)]
        report.warnings.append(
            f"{len(wnids)} classes are WordNet ids and {len(others)} are not ({_few(others)}): numbers of classes will "
            "not be those of ImageNet"
        )
    elif len(wnids) == 1000:
        from timm.data import ImageNetInfo  # seconds

        if (known := ImageNetInfo("imagenet-1k").label_names()) != wnids:
            strange = sorted(set(wnids) - set(known))
            report.warnings.append(f"1000 WordNet ids, but not those of ImageNet-1k: {_few(strange)} are others")
    numeric = [name for name in names if name.isdigit()]
    if numeric and sorted(numeric, key=int) != sorted(numeric):
        report.warnings.append(
            f"class folders are numbers, ordered by spelling: classes 0, 1, 2 are {', '.join(sorted(numeric)[:3])}; "
            "write them with leading zeros if the order matters"
        )


# ------------------------------------------------------------------------------------------------ files

Finding = tuple[str, str, int, int, bytes]  # reason why it is corrupt, mode, width, height, hash of the bytes


def _inspect_all(root: Path, files: list[Place], workers: int) -> Iterator[tuple[Place, Finding]]:
    if workers == 1 or len(files) <= TOGETHER:
        for place in files:
            yield place, _inspect(str(root / place[2]))
        return
    with ProcessPoolExecutor(workers) as pool:
        paths = (str(root / place[2]) for place in files)
        yield from zip(files, pool.map(_inspect, paths, chunksize=TOGETHER), strict=True)


def _inspect(path: str) -> Finding:
    """Decode a file. JPEG is decoded at an eighth of its size: all of its bytes are read, few pixels are computed."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        return error.strerror or "cannot be read", "", 0, 0, b""
    if not data:
        return "empty file", "", 0, 0, b""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            mode, (width, height) = image.mode, image.size
            image.draft("L", (1, 1))
            image.load()
            if image.mode not in PLAIN:
                to_mode(image, 3)  # refuses pixels of unknown range
    except UnidentifiedImageError:
        return "not an image", "", 0, 0, b""
    except Exception as error:  # decoders raise what they like on a corrupt file
        return " ".join(str(error).split()) or type(error).__name__, "", 0, 0, b""
    return "", mode, width, height, blake2b(data, digest_size=16).digest()


def _judge_files(report: Report) -> None:
    if report.corrupt:
        some = [f"{path} ({reason})" for path, reason in report.corrupt.items()]
        report.errors.append(
            f"{len(some)} file(s) that cannot be decoded: {_few(some)}; replace or remove them, or train with "
            "--skip-corrupt (those of val/ must go)"
        )
    for kind, paths in report.odd.items():
        report.warnings.append(f"{len(paths)} image(s) with {kind}: {_few(paths)}")
    if report.duplicates:
        pairs = [f"{val} = {train}" for train, val in report.duplicates]
        report.warnings.append(f"{len(pairs)} validation image(s) are training images, too: {_few(pairs)}")
        inside = Counter(train.split("/")[1] != val.split("/")[1] for train, val in report.duplicates)
        if inside[True]:
            report.warnings.append(f"{inside[True]} of them under another class")


def _shown(found: Iterable[Any], total: int, progress: bool | None) -> Iterator[Any]:
    """The findings, with a bar on a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from found
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(found, "Images", total=total, console=Console(stderr=True), transient=True)


def _few(items: list[str]) -> str:
    more = f" and {len(items) - EXAMPLES} more" if len(items) > EXAMPLES else ""
    return ", ".join(items[:EXAMPLES]) + more
