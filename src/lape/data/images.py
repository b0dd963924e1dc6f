"""One image file: read, checked, and made 8-bit grey or RGB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lape.errors import DataError, check_file

MODES = {1: "L", 3: "RGB"}


def to_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """Return the image as 8-bit grey (`in_chans` 1) or RGB (3); 16-bit grey is scaled, where PIL would clip it.

    Raises:
        DataError: pixels whose range is unknown (32-bit integers above 65535, floating point).
    """
    if image.mode == "F":
        raise DataError("floating-point pixels have no known range: save the image with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)  # "I" also is how PIL opens a 16-bit PGM
        if values.min() < 0 or values.max() > 65535:
            raise DataError("32-bit pixels outside 0..65535 have no known range: save the image with 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image if image.mode == MODES[in_chans] else image.convert(MODES[in_chans])


@dataclass(frozen=True)
class ToMode:
    in_chans: int

    def __call__(self, image: Image.Image) -> Image.Image:
        return to_mode(image, self.in_chans)


def reason_of(error: Exception) -> str:
    """What a decoder says of a file, in one line; they raise what they like."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong is a `DataError` that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on EXIF, palettes and size change nothing in the pixels
            yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image that can be read: replace or remove the file") from None
    except Exception as error:
        raise DataError(f"cannot read image {path} ({reason_of(error)}): replace or remove the file") from error


def load_image(path: str | os.PathLike[str], in_chans: int = 3) -> Image.Image:
    """Decode a whole image file to 8-bit grey (`in_chans` 1) or RGB (3).

    Raises:
        DataError: not an image, corrupt, truncated, or pixels of unknown range; names the file.
    """
    check_file(path, DataError)
    with _reading(path), open(path, "rb") as file:
        image = Image.open(file)
        image.load()
        return to_mode(image, in_chans)


def check_header(path: str | os.PathLike[str]) -> None:
    """Read the header of an image file, not its pixels. Raises DataError where it is missing or no image."""
    check_file(path, DataError)
    with _reading(path), Image.open(path):
        pass


def is_image(path: str) -> bool:
    """Whether the name is an image's; macOS leaves `._x.jpg` beside x.jpg, which is none."""
    return has_file_allowed_extension(path, IMG_EXTENSIONS) and not os.path.basename(path).startswith("._")
