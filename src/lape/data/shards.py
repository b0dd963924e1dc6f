"""Images in tar files, each by its number: an index is made in memory, nothing is unpacked and nothing written.

Two layouts. **Class folders**, as a folder of images was packed: `[...train/]<class>/*.jpg`, in the folder's order.
**Samples** of webdataset: the files of one sample share the name before the first dot (`a/0017.jpg`, `a/0017.cls` or
`a/0017.json` with "label"), in the order of the shards. A name in a tar is only a name: no file is opened by it.
"""

from __future__ import annotations

import json
import mmap
import re
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lape.data.images import PackedImage, is_hidden, is_image
from lape.data.processes import processors, spread
from lape.errors import DataError, check_file, reason_of

LABELS = ("cls", "json")  # endings of the file that says a sample's class
TEXT = 2**16  # bytes of such a file, the most
NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)
LARGE = 2**30  # bytes of all shards; these are indexed by all processors
REST = 2**20  # bytes at the end of a shard that must be zeros


class Shard:
    """A tar file, mapped into memory where it is read. A copy in another process maps it anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def bytes_at(self, offset: int, size: int) -> bytes:
        content: bytes = _memory_map(self)[offset : offset + size]
        if len(content) < size:
            raise ValueError("the tar file is cut off")
        return content


@lru_cache(maxsize=256)  # an open file each
def _memory_map(shard: Shard) -> mmap.mmap:
    with open(shard.path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Entry(NamedTuple):
    """Where a file is in a shard."""

    shard: Shard
    name: str
    offset: int
    size: int


class Member(PackedImage):
    """An image in a tar file."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def __str__(self) -> str:
        return f"{self.entry.shard.path}, {self.entry.name}"

    def read(self) -> bytes:
        return self.entry.shard.bytes_at(self.entry.offset, self.entry.size)


class Members:
    """The images of several shards."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.shards = list(dict.fromkeys(entry.shard for entry in entries))
        number = {shard: place for place, shard in enumerate(self.shards)}
        self.names = [entry.name for entry in entries]
        self.places = np.array([(number[e.shard], e.offset, e.size) for e in entries], dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Member:
        shard, offset, size = self.places[index].tolist()
        return Member(Entry(self.shards[shard], self.names[index], offset, size))


def read_shards(paths: Sequence[Path], words: Sequence[str]) -> tuple[Members, list[Any]]:
    """The images of a split and their labels: numbers or names.

    `words`: that a folder of a split may be called; what comes before it in a name is left out. Raises DataError for a
    file that is damaged, or compressed, links, an image without a class.
    """
    large = sum(path.stat().st_size for path in paths) >= LARGE
    workers = min(processors(), len(paths)) if large else 1
    parts = spread(_index, [Shard(path) for path in paths], workers, 1, "there is one for each processor")
    entries = [entry for part in parts for entry in part]
    images = [entry for entry in entries if is_image(entry.name)]
    labels = {(*_key(entry), ending): entry for entry in entries if (ending := _ending(entry)) in LABELS}
    if any((*_key(entry), ending) in labels for entry in images for ending in LABELS):
        return Members(images), [_label_of(entry, labels) for entry in images]
    places = sorted((*_class_and_place(entry, words), number) for number, entry in enumerate(images))
    return Members([images[place[-1]] for place in places]), [place[0] for place in places]


def _index(shard: Shard) -> list[Entry]:
    """The files in a shard, without those of a system. Raises DataError."""
    entries: list[Entry] = []
    check_file(shard.path, DataError)
    try:
        with open(shard.path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
                if any(map(is_hidden, parts)) or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{shard.path}, {member.name} is a link or has holes, its bytes are not there: pack it with "
                        "tar --dereference --hard-dereference"
                    )
                entries.append(Entry(shard, "/".join(parts), member.offset_data, member.size))
            file.seek(tar.offset)
            rest = file.read(REST)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):  # where tarfile sees an end
                raise tarfile.ReadError(f"no end of the archive at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        reason = reason_of(error)[:200]
        raise DataError(f"{shard.path} is not a whole, uncompressed tar file ({reason}): pack it again") from None
    return entries


def _key(entry: Entry) -> tuple[Shard, str]:
    """What the files of a sample share: the shard, and the name before the first dot."""
    folder, _, name = entry.name.rpartition("/")
    return entry.shard, f"{folder}/{name.partition('.')[0]}"


def _ending(entry: Entry) -> str:
    return entry.name.rpartition("/")[2].partition(".")[2].lower()


def _label_of(image: Entry, labels: dict[tuple[Shard, str, str], Entry]) -> int | str:
    """What the file beside an image says of its class."""
    entry = next((labels[(*_key(image), e)] for e in LABELS if (*_key(image), e) in labels), None)
    if entry is None:
        raise DataError(f"{image.shard.path}, {image.name} has no .cls or .json beside it that says its class: add it")
    try:
        if entry.size > TEXT:
            raise ValueError("it is too large")
        text = entry.shard.bytes_at(entry.offset, entry.size).decode().strip()
        label = text if entry.name.lower().endswith(LABELS[0]) else json.loads(text)["label"]
        if label == "" or isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError("neither a number nor a name")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{entry.shard.path}, {entry.name} says no class ({reason_of(error)[:100]}): a .cls file is a number or a "
            'name, a .json file has it as "label"'
        ) from None
    return int(label) if isinstance(label, str) and NUMBER.fullmatch(label) else label


def _class_and_place(entry: Entry, words: Sequence[str]) -> tuple[str, str, str]:
    """The class by its folder, and what sorts images as a folder of them is sorted."""
    *folders, name = entry.name.split("/")
    start = max((place + 1 for place, part in enumerate(folders[:-1]) if part in words), default=0)
    if not folders:
        raise DataError(f"{entry.shard.path}, {name} lies in no class folder: pack <class>/<image>")
    return folders[start], "/".join(folders[start:]), name
