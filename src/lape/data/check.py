"""Are images fit to be trained on for days? Every one is opened, counted and compared before a long run.

`D/train/<class>/*` and `D/val/<class>/*`, or parquet, arrow or tar files, are read by all processors. **Errors** forbid
training: classes that differ, a class without an image, images outside class folders, files that cannot be decoded.
**Warnings** are for the user to judge: images that are in both splits or twice in one, kinds of pixels that are
converted and what is assumed of them, rotations in EXIF, folders whose names are numbers (their order is that of their
spelling: 10 before 2), names that mix WordNet ids with others, files that are no images, and folders that are not
entered.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from lape.data.folders import SPLITS, Survey, check_root, survey
from lape.data.images import PackedImage, Source, check_shape, decode, open_source
from lape.data.processes import processors, spread
from lape.data.stored import look, stored_files
from lape.errors import DataError, LapeError, check_file, reason_of
from lape.names import few

MACOS = ("._", ".DS_Store")
WNID = re.compile(r"n\d{8}")
CHUNK = 64  # files a process takes at once
USUAL = ("RGB",)
EXIF = (b"Exif", b"eXIf", b"EXIF", b"exif")  # of JPEG, PNG, WebP, and of older PNG
ORIENTATION = 274  # the number of EXIF's tag
TURNED = "a rotation or mirror image in EXIF, which is ignored, as by the original"
# What PIL calls the pixels of a file, and what becomes of them.
ODD = {
    "CMYK": "CMYK, converted to RGB",
    "L": "grayscale, repeated in three channels",
    "1": "black and white, repeated in three channels",
    "P": "a palette, converted to RGB",
    "RGBA": "transparency, dropped",
    "LA": "transparency, dropped",
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
    copies: list[list[str]] = field(default_factory=list)  # the same bytes in one split: its files
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


Images = dict[str, tuple[str, str, Source]]  # name -> split, class, what is read


def check_data(
    root: str | Path, *, columns: Sequence[str] = (), workers: int | None = None, progress: bool | None = None
) -> Report:
    """Check the images in a folder; nothing in it is changed. Raises DataError where `root` is none.

    Args:
        root: the folder with train/ and val/, or with parquet, arrow or tar files.
        columns: of parquet and arrow files, those of the image and of the class, where the files leave it open.
        workers: processes, default: one a processor.
        progress: draw a bar; default: where stderr is a terminal.
    """
    began, root = time.perf_counter(), Path(root).expanduser()
    check_root(root)
    report = Report(str(root))
    images = _in_files(root, files, columns, report) if (files := stored_files(root)) else _in_folders(root, report)
    _judge_classes(report)
    hashes: dict[str, dict[bytes, list[str]]] = {split: {} for split in SPLITS}
    sides: set[int] = set()
    sources = [source for *_, source in images.values()]
    workers = 1 if len(sources) <= CHUNK else workers or processors()
    findings = _with_bar(spread(_inspect, sources, workers, CHUNK, "use --workers 1"), len(images), progress)
    for path, finding in sorted(zip(images, findings, strict=True)):
        if finding.reason:
            report.corrupt[path] = finding.reason
            continue
        for kind in finding.kinds:
            report.odd.setdefault(kind, []).append(path)
        sides |= {finding.width, finding.height}
        hashes[images[path][0]].setdefault(finding.digest, []).append(path)
    report.odd = dict(sorted(report.odd.items()))
    common = hashes["train"].keys() & hashes["val"].keys()
    report.duplicates = sorted([hashes["train"][digest][0], hashes["val"][digest][0]] for digest in common)
    report.copies = sorted(paths for by_digest in hashes.values() for paths in by_digest.values() if len(paths) > 1)
    if sides:
        report.sizes = {"smallest": min(sides), "largest": max(sides)}
    _judge_files(report, {path: name for path, (_, name, _) in images.items()})
    report.seconds = round(time.perf_counter() - began, 2)
    return report


def _in_folders(root: Path, report: Report) -> Images:
    """The images in class folders, counted."""
    folder = survey(root)
    for split, classes in folder.images.items():
        report.counts[split] = {name: len(paths) for name, paths in classes.items()}
    report.errors = folder.errors
    _judge_layout(folder, root, report)
    return {
        os.path.relpath(path, root): (split, name, path)
        for split, classes in folder.images.items()
        for name, paths in classes.items()
        for path in paths
    }


def _in_files(root: Path, files: dict[str, list[Path]], columns: Sequence[str], report: Report) -> Images:
    """The images in parquet, arrow and tar files, counted."""
    try:
        contents = look(root, files, SPLITS, columns)
    except DataError as error:
        report.errors.append(str(error))
        return {}
    images: Images = {}
    for split, (sources, targets) in contents.images.items():
        count = Counter(targets)
        report.counts[split] = {name: count[number] for number, name in enumerate(contents.classes)}
        for source, number in zip(sources, targets, strict=True):
            images[os.path.relpath(str(source), root)] = split, contents.classes[number], source
    if empty := [name for name, number in report.counts["train"].items() if not number]:
        report.warnings.append(f"{len(empty)} of {len(contents.classes)} classes have no training image: {few(empty)}")
    return images


def _judge_layout(folder: Survey, root: Path, report: Report) -> None:
    groups = (folder.other_files, folder.hidden_folders, folder.circles)
    files, folders, circles = ([os.path.relpath(path, root) for path in paths] for paths in groups)
    kinds = {
        "folder(s) of the system or of a program, not read": folders,
        "folder(s) not read, links to one that holds them or is read already": circles,
        "file(s) of macOS, which are not read": [p for p in files if os.path.basename(p).startswith(MACOS)],
        "file(s) that are no images by their names, not read": [
            p for p in files if not os.path.basename(p).startswith(MACOS)
        ],
    }
    report.warnings += [f"{len(paths)} {what}: {few(paths)}" for what, paths in kinds.items() if paths]


def _judge_classes(report: Report) -> None:
    """Warn of names whose order or meaning may be another than it seems."""
    order = list(dict.fromkeys(name for classes in report.counts.values() for name in classes))
    names = sorted(order)
    wnids = [name for name in names if WNID.fullmatch(name)]
    if wnids and len(wnids) != len(names):
        rest = [name for name in names if not WNID.fullmatch(name)]
        report.warnings.append(
            f"{len(wnids)} classes are WordNet ids and {len(rest)} are not ({few(rest)}): numbers of classes will "
            "not be those of ImageNet"
        )
    elif len(wnids) == 1000:
        from timm.data import ImageNetInfo  # seconds

        if (imagenet := ImageNetInfo("imagenet-1k").label_names()) != wnids:
            strange = sorted(set(wnids) - set(imagenet))
            report.warnings.append(f"1000 WordNet ids, but not those of ImageNet-1k: {few(strange)} are others")
    numeric = [name for name in order if name.isdigit()]
    if sorted(numeric, key=int) != numeric:
        report.warnings.append(
            f"class folders are numbers, ordered by spelling: classes 0, 1, 2 are {', '.join(sorted(numeric)[:3])}; "
            "write them with leading zeros if the order matters"
        )


class Finding(NamedTuple):
    """What became of a file: why it is corrupt, or what is odd, its size in pixels and the hash of its bytes."""

    reason: str = ""
    kinds: tuple[str, ...] = ()
    width: int = 0
    height: int = 0
    digest: bytes = b""


def _inspect(source: Source) -> Finding:
    """Decode an image. JPEG is decoded at an eighth of its size: all of its bytes are read, few pixels are computed."""
    try:
        if not isinstance(source, PackedImage):
            check_file(source)
        with open_source(source) as file:
            data = file.read()
    except LapeError:
        return Finding("a pipe or a device")
    except OSError as error:
        return Finding(error.strerror or "cannot be read")
    except Exception as error:
        return Finding(reason_of(error))
    if not data:
        return Finding("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            size = image.size
            has_exif = image.format == "TIFF" or any(name in data for name in EXIF)  # to ask Pillow may decode a PNG
            turned = has_exif and image.getexif().get(ORIENTATION, 1) not in (0, 1)
            kind = "" if image.mode in USUAL else ODD.get(image.mode, image.mode)
            if image.format == "JPEG":
                check_shape(*size)
                image.draft("L", (1, 1))
                image.load()
            else:
                kind = decode(io.BytesIO(data), 3)[1] or kind
    except UnidentifiedImageError:
        return Finding("not an image")
    except Exception as error:
        return Finding(reason_of(error))
    kinds = tuple(text for text in (kind, TURNED if turned else "") if text)
    return Finding("", kinds, *size, blake2b(data, digest_size=16).digest())


def _judge_files(report: Report, class_of: Mapping[str, str]) -> None:
    if report.corrupt:
        lines = [f"{path} ({reason})" for path, reason in report.corrupt.items()]
        report.errors.append(
            f"{len(lines)} file(s) that cannot be decoded: {few(lines)}; replace or remove them, or train with "
            "--skip-corrupt (those of val/ must go)"
        )
    for kind, paths in report.odd.items():
        report.warnings.append(f"{len(paths)} image(s) with {kind}: {few(paths)}")
    if report.duplicates:
        pairs = [f"{val} = {train}" for train, val in report.duplicates]
        report.warnings.append(f"{len(pairs)} validation image(s) are training images, too: {few(pairs)}")
        class_differs = Counter(class_of[train] != class_of[val] for train, val in report.duplicates)
        if class_differs[True]:
            report.warnings.append(f"{class_differs[True]} of them under another class")
    for across, where in ((True, "under two classes"), (False, "in one class")):
        groups = [paths for paths in report.copies if (len({class_of[path] for path in paths}) > 1) == across]
        if groups:
            names = [" = ".join(paths) for paths in groups]
            report.warnings.append(f"{len(groups)} image(s) are there more than once {where}: {few(names)}")


def _with_bar(findings: Iterable[Finding], total: int, progress: bool | None) -> Iterable[Finding]:
    """The findings, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    hidden = not (sys.stderr.isatty() if progress is None else progress)
    return track(findings, "Images", total, console=Console(stderr=True), transient=True, disable=hidden)
