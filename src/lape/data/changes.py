"""Images changed for a test of robustness: corruptions, shuffled patches, shifts and occlusion.

Each takes an image (C, H, W) with values in [0, 1], after cropping and before normalising, and a generator that decides
whatever is random. Corruptions have five severities, whose numbers are those of ImageNet-C, and up to `SMALL` pixels
those of CIFAR-10-C (Hendrycks and Dietterich, arXiv 1903.12261); above it, blur is scaled with the image's side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as change

Change = Callable[[Tensor, Generator], Tensor]
SMALL = 64  # pixels of the shorter side
OF_SIDE = 224  # for which the width of a blur is given


def _level(image_CHW: Tensor, severity: int, large: Sequence[float], small: Sequence[float]) -> float:
    return (small if min(image_CHW.shape[-2:]) <= SMALL else large)[severity - 1]


def gaussian_noise(image_CHW: Tensor, generator: Generator, severity: int) -> Tensor:
    """Added to each value."""
    sigma = _level(image_CHW, severity, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10))
    return (image_CHW + sigma * torch.randn(image_CHW.shape, generator=generator)).clamp(0, 1)


def shot_noise(image_CHW: Tensor, generator: Generator, severity: int) -> Tensor:
    """Light counted in few photons: Poisson noise."""
    photons = _level(image_CHW, severity, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50))
    return (torch.poisson(image_CHW * photons, generator=generator) / photons).clamp(0, 1)


def impulse_noise(image_CHW: Tensor, generator: Generator, severity: int) -> Tensor:
    """A share of the values is 0 or 1."""
    amount = _level(image_CHW, severity, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07))
    dice = torch.rand(image_CHW.shape, generator=generator)
    return image_CHW.where(dice >= amount, (dice < amount / 2).to(image_CHW.dtype))


def gaussian_blur(image_CHW: Tensor, _generator: Generator, severity: int) -> Tensor:
    """Sharpness lost."""
    side = min(image_CHW.shape[-2:])
    sigmas = [sigma * side / OF_SIDE for sigma in (1, 2, 3, 4, 6)]
    sigma = _level(image_CHW, severity, sigmas, (0.4, 0.6, 0.7, 0.8, 1.0))
    reach = min(max(round(4 * sigma), 1), max(side - 1, 1))
    return change.gaussian_blur(image_CHW, [2 * reach + 1] * 2, [sigma] * 2)


def brightness(image_CHW: Tensor, _generator: Generator, severity: int) -> Tensor:
    """Lighter by a constant (all channels alike, where ImageNet-C adds it to the value of HSV)."""
    return (image_CHW + _level(image_CHW, severity, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3))).clamp(0, 1)


def contrast(image_CHW: Tensor, _generator: Generator, severity: int) -> Tensor:
    """Nearer to the mean of each channel."""
    mean = image_CHW.mean((-2, -1), keepdim=True)
    return (image_CHW - mean) * _level(
        image_CHW, severity, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)
    ) + mean


def pixelate(image_CHW: Tensor, _generator: Generator, severity: int) -> Tensor:
    """Made smaller and large again."""
    share = _level(image_CHW, severity, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65))
    small = [max(int(side * share), 1) for side in image_CHW.shape[-2:]]
    coarse = F.interpolate(image_CHW[None], size=small, mode="area")
    return F.interpolate(coarse, size=image_CHW.shape[-2:], mode="nearest")[0]


def jpeg(image_CHW: Tensor, _generator: Generator, severity: int) -> Tensor:
    """Compressed and decoded."""
    quality = _level(image_CHW, severity, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40))
    file = io.BytesIO()
    change.to_pil_image(image_CHW).save(file, "jpeg", quality=int(quality))
    with Image.open(file) as image:
        return change.to_dtype(change.pil_to_tensor(image), image_CHW.dtype, scale=True)


CORRUPTIONS: dict[str, Callable[..., Tensor]] = {
    corruption.__name__: corruption
    for corruption in (gaussian_noise, shot_noise, impulse_noise, gaussian_blur, brightness, contrast, pixelate, jpeg)
}


# --- changes of place -------------------------------------------------------------------------------------------------


def _patches(image_CHW: Tensor, patch: tuple[int, int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(n, C, height, width) whole patches, and how they are put back; what is left over at the edge stays."""
    rows, columns = (side // length for side, length in zip(image_CHW.shape[-2:], patch, strict=True))
    area = image_CHW[:, : rows * patch[0], : columns * patch[1]]
    tiles = area.unflatten(1, (rows, patch[0])).unflatten(3, (columns, patch[1]))  # C, rows, height, columns, width
    patches_nChw = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def back(patches_nChw: Tensor) -> Tensor:
        out = image_CHW.clone()
        tiles = patches_nChw.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        out[:, : rows * patch[0], : columns * patch[1]] = tiles.flatten(3, 4).flatten(1, 2)
        return out

    return patches_nChw, back


def shuffled(image_CHW: Tensor, generator: Generator, patch: tuple[int, int]) -> Tensor:
    """The model's patches in another order: content stays, place is lost."""
    patches, back = _patches(image_CHW, patch)
    return back(patches[torch.randperm(len(patches), generator=generator)])


def occluded(image_CHW: Tensor, generator: Generator, share: float, patch: tuple[int, int]) -> Tensor:
    """A share of the patches (at least one is left) has the image's mean colour."""
    patches, back = _patches(image_CHW, patch)
    indices = torch.randperm(len(patches), generator=generator)[: min(round(share * len(patches)), len(patches) - 1)]
    patches = patches.clone()
    patches[indices] = image_CHW.mean((-2, -1))[None, :, None, None]
    return back(patches)


def shifted(image_CHW: Tensor, _generator: Generator, pixels: int) -> Tensor:
    """Moved right and down; the first row and column are repeated behind it."""
    wide = F.pad(image_CHW[None], (pixels, 0, pixels, 0), mode="replicate")[0]
    return wide[:, : image_CHW.shape[-2], : image_CHW.shape[-1]]
