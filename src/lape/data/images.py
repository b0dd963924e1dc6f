"""One image file: read, checked, and made 8-bit grey or RGB.

**More than 8 bits.** Neither PNG nor TIFF says how many of its 16 bits are used, and a camera's 12 bits would be nearly
black if they were taken for 16. So the values decide: they are taken for those of 8, 12 or 16 bits, the fewest that
hold the largest of the image. Colour with 16 bits is what Pillow makes of it, the upper byte, unless 12 bits hold it.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lape.errors import DataError, check_file, reason_of

MODES = {1: "L", 3: "RGB"}
BITS = (8, 12, 16)  # that values in 16 or 32 bits are taken for
OF_SYSTEMS = ("@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found")
STRETCH = 1000  # times the other side, the most; a longer strip that covers a square takes gigabytes


class PackedImage:
    """An image inside a larger file; `str()` says where, for messages."""

    def read(self) -> bytes:
        """Its encoded bytes. Raises what reading raises, and ValueError where there are none."""
        raise NotImplementedError


Source = str | os.PathLike[str] | PackedImage


def open_source(source: Source) -> BinaryIO:
    """The encoded bytes of an image. Raises OSError, and what `PackedImage.read` raises."""
    return io.BytesIO(source.read()) if isinstance(source, PackedImage) else open(source, "rb")


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """Return the image as 8-bit grey (`in_chans` 1) or RGB (3); deeper grey is scaled, where PIL would clip it.

    Raises DataError for pixels whose range is unknown (32-bit integers above 65535, floating point).
    """
    if image.mode == "F":
        raise DataError("floating-point pixels have no known range: save the image with 8 or 16 bits")
    if _is_deep_grey(image):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError("32-bit pixels outside 0..65535 have no known range: save the image with 8 or 16 bits")
        image = _to_bytes(values, _bits_of(values, image))
    return image if image.mode == MODES[in_chans] else image.convert(MODES[in_chans])


def decode(file: BinaryIO, in_chans: int) -> tuple[Image.Image, str]:
    """Decode an image to 8-bit grey (`in_chans` 1) or RGB (3).

    Returns also what was taken for granted of an image with more than 8 bits, in words, "" for others. Raises what
    decoders raise, and DataError as `to_mode`, and for a strip.
    """
    image: Image.Image = Image.open(file)
    check_shape(*image.size)
    low = _low_bytes(image)
    image.load()
    note = ""
    if _is_deep_grey(image):
        note = f"16-bit grayscale, taken for values of {_bits_of(np.asarray(image), image)} bits"
    elif low:
        note = "16-bit colour, the upper 8 bits kept"
        high = np.asarray(image)[..., :3].astype(np.int64)
        if high.max() < 2**4:
            values = high * 256 + _decode_as(low, file)
            bits = _bits_of(values)
            image, note = _to_bytes(values, bits), f"16-bit colour, taken for values of {bits} bits"
    return to_mode(image, in_chans), note


def check_shape(width: int, height: int) -> None:
    """Raises DataError where one side is more than `STRETCH` times the other."""
    if max(width, height) > STRETCH * min(width, height):
        raise DataError(
            f"{width} x {height} pixels: no side may be more than {STRETCH} times the other, memory would not hold "
            "it resized"
        )


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")  # "I" also is how PIL opens a 16-bit PGM


def _bits_of(values: np.ndarray[Any, Any], image: Image.Image | None = None) -> int:
    scaled = image is not None and image.format == "PPM"  # PIL has scaled it to 16 bits by the range in the header
    return 16 if scaled else next((bits for bits in BITS if int(values.max()) < 2**bits), 16)


def _to_bytes(values: np.ndarray[Any, Any], bits: int) -> Image.Image:
    maximum = 2**bits - 1
    return Image.fromarray(((values * 255 + maximum // 2) // maximum).astype(np.uint8))


def _low_bytes(image: Image.Image) -> str:
    """PIL's raw mode for the low bytes of colour with 16 bits, of which it keeps the high ones; "" for other images."""
    tile = next(iter(getattr(image, "tile", [])), None)
    raw = "" if tile is None else tile[3][0] if isinstance(tile[3], tuple) else tile[3]
    if not isinstance(raw, str) or ";16" not in raw or image.mode not in ("RGB", "RGBA"):
        return ""
    if raw == "LA;16B":
        return "RGBA"  # its four bytes: high and low one of grey, then of alpha
    order = raw[-1].replace("N", sys.byteorder[0].upper())
    return raw[:-1] + {"L": "B", "B": "L"}[order]


def _decode_as(raw: str, file: BinaryIO) -> np.ndarray[Any, Any]:
    """(H, W, 3 or 1) the bytes that PIL finds in an image when it is told another raw mode."""
    file.seek(0)
    image: Any = Image.open(file)
    for number, tile in enumerate(image.tile):
        args = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
        image.tile[number] = tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)
    image.load()
    values = np.asarray(image)
    return values[..., 1:2] if raw == "RGBA" else values[..., :3]


@dataclass(frozen=True)
class ToMode:
    in_chans: int

    def __call__(self, image: Image.Image) -> Image.Image:
        return to_mode(image, self.in_chans)


@contextmanager
def reading(path: Source) -> Iterator[None]:
    """What goes wrong is a `DataError` that names the file, a pipe and a device, too."""
    if not isinstance(path, PackedImage):
        check_file(path, DataError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on EXIF, palettes and size change nothing in the pixels
            yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image that can be read: replace or remove it") from None
    except Exception as error:
        raise DataError(f"cannot read image {path} ({reason_of(error)}): replace or remove it") from error


def load_image(path: Source, in_chans: int = 3) -> Image.Image:
    """Decode a whole image to 8-bit grey (`in_chans` 1) or RGB (3).

    Raises DataError, which names the file: not an image, corrupt, truncated, a strip, or pixels of unknown range.
    """
    with reading(path), open_source(path) as file:
        return decode(file, in_chans)[0]


def check_header(path: str | os.PathLike[str]) -> None:
    """Read the header of an image file, not its pixels. Raises DataError where it is missing or no image."""
    with reading(path), Image.open(path) as image:
        check_shape(*image.size)


def assumption(path: Source) -> str:
    """What `decode` takes for granted of a file, "" for nothing or where it cannot be read."""
    try:
        with reading(path), open_source(path) as file:
            image = Image.open(file)
            return decode(file, 3)[1] if _is_deep_grey(image) or _low_bytes(image) else ""
    except DataError:
        return ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's own by its name: `._x.jpg`, `.ipynb_checkpoints`, `@eaDir`."""
    return name.startswith(".") or name in OF_SYSTEMS


def is_image(path: str) -> bool:
    """Whether the name is that of an image, and not hidden."""
    return has_file_allowed_extension(path, IMG_EXTENSIONS) and not is_hidden(os.path.basename(path))
