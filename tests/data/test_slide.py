"""Shears and translations against the operations of timm, that is Pillow's, which they stand for."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_augment import photo
from timm.data.auto_augment import NAME_TO_OP

from lape.data.fast import SLIDES, slide

NUMBERS = {"Shear": (-0.3, 0.011, 0.3, 1.2), "Translate": (-0.45, -0.1, 0.017, 0.3, 1.5)}


def numbers(name: str, side: int) -> list[float]:
    drawn = [random.Random(name).uniform(-0.5, 0.5) for _ in range(5)]
    some = [0.0, *drawn, *NUMBERS["Shear" if name.startswith("Shear") else "Translate"]]
    return [value * side for value in some] + [1.0, -3.0] if name in ("TranslateX", "TranslateY") else some


@pytest.mark.parametrize("name", sorted(SLIDES))
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(64, 64), (71, 40), (30, 90)])
def test_slides_are_pillows_within_one_level(name, mode, size):
    image = photo(*size, mode=mode)
    fill = (124, 116, 104) if mode == "RGB" else 124
    function, dim = SLIDES[name]
    levels = torch.from_numpy(np.array(image)).reshape(size[1], size[0], -1)
    for number in numbers(name, size[1 - dim]):
        wanted = NAME_TO_OP[name](image, number, fillcolor=fill, resample=Image.Resampling.BICUBIC)
        apart = np.abs(np.asarray(wanted).astype(int) - function(levels, number, dim, fill).squeeze(-1).numpy())
        assert apart.max() <= 1, number
        assert (apart > 0).mean() < 0.02


def test_nothing_moves_without_a_shift():
    levels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    for dim in (0, 1):
        assert torch.equal(slide(levels, torch.tensor(0.0, dtype=torch.float64), dim, 0), levels)
        assert torch.equal(slide(levels, torch.zeros(levels.shape[1 - dim], dtype=torch.float64), dim, 0), levels)


def test_whole_pixels_move_and_the_rest_is_filled():
    levels = torch.arange(12, dtype=torch.uint8).reshape(3, 4, 1)
    moved = slide(levels, torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64), 1, 99)
    assert moved[:, :, 0].tolist() == [[0, 1, 2, 3], [5, 6, 7, 99], [99, 99, 8, 9]]
