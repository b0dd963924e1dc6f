"""Images for the tests, in memory and in folders, and what spoils a file."""

import hashlib
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10


def pictures(height: int, width: int, mode: str, count: int = 12) -> list[Image.Image]:
    """Waves and noise over a part of the range, a flat one, one of two levels, and one of few."""
    rows, columns = np.mgrid[0:height, 0:width]
    found = []
    for i in range(count):
        draw = np.random.default_rng(i)
        waves = np.stack([rows * (2 + i), columns * (2 + 7 * i), (rows + columns) * (1 + i % 3)], axis=-1)
        values = (waves + draw.integers(0, 60, waves.shape)) % 256 * draw.uniform(0.3, 1)
        found.append(values if i > 2 else [values * 0 + 77, (values > 60) * 200, values // 64 * 64][i])
    return [Image.fromarray(values.astype(np.uint8)).convert(mode) for values in found]


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_folder(root: Path, classes=("cat", "dog"), train: int = 3, val: int = 2, suffix: str = "png") -> Path:
    for split, count in (("train", train), ("val", val)):
        for place, name in enumerate(classes):
            for number in range(count):
                write_image(root / split / name / f"{number}.{suffix}", seed=100 * place + number)
    return root


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) * 3 // 4], "text": b"<html>404</html>", "empty": b""}[how])


def deep_file(values: np.ndarray, suffix: str) -> bytes:
    """A file with 16 bits a channel, (H, W) or (H, W, 1 to 4): png, or tif of either byte order, packed (z) or not."""
    values = values.reshape(*values.shape[:2], -1)
    (height, width, channels), order = values.shape, ">" if suffix in ("png", "tif>", "tif>z") else "<"
    data = values.astype(f"{order}u2").tobytes()
    if suffix == "png":
        rows = b"".join(
            b"\0" + data[at : at + 2 * width * channels] for at in range(0, len(data), 2 * width * channels)
        )
        kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
        header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    data = zlib.compress(data) if suffix.endswith("z") else data
    tags = {256: width, 257: height, 258: 16, 259: 8 if suffix.endswith("z") else 1, 262: 2 if channels > 2 else 1}
    tags |= {273: 8, 277: channels, 278: height, 279: len(data)} | ({338: 2} if channels == 4 else {})
    after = 8 + len(data) + 2 + 12 * len(tags) + 4
    content = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data)) + data
    content += struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        count, kind = (channels, 3) if tag == 258 else (1, 4)
        where = after if tag == 258 and channels > 2 else value << 16 if tag == 258 and order == ">" else value
        content += struct.pack(f"{order}HHII", tag, kind, count, where)
    return content + struct.pack(f"{order}I", 0) + struct.pack(f"{order}{channels}H", *[16] * channels)


class OldDtype:
    """A dtype with an integer for a flag, as in the official files; NumPy 2.4.0 warns of it."""

    def __reduce__(self):
        return np.dtype, ("u1", 0)


def write_cifar(root: Path, kind, monkeypatch) -> Path:
    """Four images a file in the official format, and their check sums in place of the official ones."""
    folder = root / kind.base_folder
    folder.mkdir()
    labels = "labels" if kind is CIFAR10 else "fine_labels"

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for field, files in (("train_list", kind.train_list), ("test_list", kind.test_list)):
        sums = []
        for number, (name, _) in enumerate(files):
            pixels = np.full((4, 3072), number, dtype=np.uint8)
            pixels[:, :1024] = 200  # red
            sums.append([name, write(name, {"data": pixels, labels: [0, 1, 2, 1], "dtype": OldDtype()})])
        monkeypatch.setattr(kind, field, sums)
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: ["ant", "bee", "cat"]})
    monkeypatch.setattr(kind, "meta", meta)
    return folder
