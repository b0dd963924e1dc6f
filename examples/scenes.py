"""Real images with true boxes and masks, without a network: handwritten digits on a larger canvas.

The packaged digits (real handwriting, UCI) are enlarged and pasted where they do not overlap, so ink tells the mask and
its extent the box. Digits of a validation scene are none of the training digits. It is a small, clean task: good for
seeing that a dense model learns, no measure of how it would do on photographs.

Shape suffixes: H, W pixels, k objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lape.data.sets import digits

CLASSES = ("background", *map(str, range(10)))
INK = 0.3  # of the darkest: what counts as the digit


@dataclass(frozen=True)
class Scene:
    """One image and what is in it."""

    pixels_3HW: Tensor  # float32 in 0..1, grey in three channels
    mask_HW: Tensor  # int64, the class of each pixel, 0 is background
    boxes_k4: Tensor  # float32, left, top, right, bottom in pixels
    labels_k: Tensor  # int64, 1..10: digit + 1


def scenes(split: str, count: int, size: tuple[int, int], *, seed: int = 0, most: int = 4) -> list[Scene]:
    """`count` scenes of `size` (height, width) pixels with one to `most` digits; the same ones for the same seed."""
    images, labels = digits(split)
    random = np.random.default_rng((seed, split == "val"))
    return [_scene(images, labels, size, most, random) for _ in range(count)]


def _scene(
    images: np.ndarray, labels: np.ndarray, size: tuple[int, int], most: int, random: np.random.Generator
) -> Scene:
    canvas, mask = np.zeros(size, np.float32), np.zeros(size, np.int64)
    boxes: list[tuple[int, int, int, int]] = []
    found: list[int] = []
    wanted = int(random.integers(1, most + 1))
    for _ in range(50):
        if len(found) == wanted:
            break
        chosen = int(random.integers(len(labels)))
        side = int(random.integers(min(size) // 4, min(size) // 2 + 1))
        digit = Image.fromarray(images[chosen] * 15).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(digit, np.float32) / 255
        top, left = (int(random.integers(whole - side + 1)) for whole in size)
        rows, columns = np.nonzero(ink > INK)
        box = (left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
            continue
        place = np.s_[top : top + side, left : left + side]
        canvas[place] = np.maximum(canvas[place], ink)
        mask[place][ink > INK] = labels[chosen] + 1
        boxes.append(box)
        found.append(int(labels[chosen]) + 1)
    return Scene(
        pixels_3HW=torch.from_numpy(canvas).expand(3, -1, -1).contiguous(),
        mask_HW=torch.from_numpy(mask),
        boxes_k4=torch.tensor(boxes, dtype=torch.float32),
        labels_k=torch.tensor(found),
    )
