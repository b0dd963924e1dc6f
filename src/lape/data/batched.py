"""Pillow's image operations for a whole batch on any device, each image with its own strength.

All take and return 8-bit images (n, C, H, W) with C = 1 or 3, and compute what Pillow computes on one image: its
integer luma, its truncation after a blend, its histogram rules, its cubic kernels and its borders. Operations of one
pixel value (brightness, contrast, equalize, ...) are tables of 256 entries an image and channel, looked up in one
gather. The result is Pillow's to the last bit, but for `warp` and `resized_crop`: they add up in float32 where Pillow
has float64 and fixed point, which moves a few pixels by one grey level. Facts: the numbers that Pillow computes.
Strengths (n,) may lie on the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEVELS = 256
BOXES = 3  # box blurs in place of a Gaussian
ROUNDING = 1e-3  # more than float32 loses in a sum of 16 products, or a flat area would be cut to one level less
LUMA, LUMA_BITS = (19595, 38470, 7471), 16  # ITU-R 601-2: 0.299, 0.587, 0.114 in 16 bits


def look_up(images_nCHW: Tensor, table_nCV: Tensor) -> Tensor:
    """Return `table[image, channel][value]`; the table (n, C or 1, 256) holds 8-bit values of any type."""
    n, channels = images_nCHW.shape[:2]
    table = table_nCV.to(torch.uint8).expand(n, channels, LEVELS)
    return table.gather(2, images_nCHW.flatten(2).long()).view_as(images_nCHW)


def brightness(images_nCHW: Tensor, factor_n: Tensor) -> Tensor:
    """Blend with black: 0 is black, 1 the image."""
    values = _values(images_nCHW)
    return look_up(images_nCHW, _blend(torch.zeros_like(values), values, factor_n))


def contrast(images_nCHW: Tensor, factor_n: Tensor) -> Tensor:
    """Blend with the mean of the grey image: 0 is flat, 1 the image."""
    grey_nHW = _grey(images_nCHW).flatten(1)
    count = grey_nHW.shape[1]
    mean_n = (2 * grey_nHW.sum(1) + count) // (2 * count)
    return look_up(images_nCHW, _blend(mean_n.view(-1, 1, 1), _values(images_nCHW), factor_n))


def posterize(images_nCHW: Tensor, bits_n: Tensor) -> Tensor:
    """Keep the highest bits, at least one."""
    low = 8 - _each(bits_n, images_nCHW).long().clamp(1, 8)
    return look_up(images_nCHW, _values(images_nCHW) >> low << low)


def solarize(images_nCHW: Tensor, threshold_n: Tensor) -> Tensor:
    """Invert what reaches the threshold, 256 leaves the image as it is."""
    values = _values(images_nCHW)
    return look_up(images_nCHW, torch.where(values < _each(threshold_n, images_nCHW), values, 255 - values))


def solarize_add(images_nCHW: Tensor, amount_n: Tensor) -> Tensor:
    """Add to what lies below 128."""
    values = _values(images_nCHW)
    more = (values + _each(amount_n, images_nCHW).long()).clamp(max=255)
    return look_up(images_nCHW, torch.where(values < 128, more, values))


def autocontrast(images_nCHW: Tensor) -> Tensor:
    """Stretch each channel to 0..255."""
    flat = images_nCHW.flatten(2).long()
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    values = _values(images_nCHW)
    # float64 and a true division (torch's number / tensor is none) as in Pillow: a value may lie just below a whole
    scale = torch.full_like(low, 255, dtype=torch.float64) / (high - low).clamp(min=1)
    result = (values * scale - low * scale).long().clamp(0, 255)
    return look_up(images_nCHW, torch.where(high > low, result, values))


def equalize(images_nCHW: Tensor) -> Tensor:
    """Make the histogram of each channel flat; torchvision's has Pillow's bits."""
    from torchvision.transforms.v2.functional import equalize_image  # takes its time to load

    flat: Tensor = equalize_image(images_nCHW)
    return flat


def color(images_nCHW: Tensor, factor_n: Tensor) -> Tensor:
    """Blend with the grey image: 0 is grey, 1 the image."""
    return _blend(_grey(images_nCHW).unsqueeze(1), images_nCHW, factor_n).to(torch.uint8)


def sharpness(images_nCHW: Tensor, factor_n: Tensor) -> Tensor:
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, whose border stays."""
    image = images_nCHW.int()
    height, width = image.shape[2:]
    smooth = image.clone()
    if height > 2 and width > 2:
        total = 4 * image[:, :, 1:-1, 1:-1]
        for top in range(3):
            for left in range(3):
                total = total + image[:, :, top : top + height - 2, left : left + width - 2]
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(smooth, image, factor_n).to(torch.uint8)


def gaussian_blur(images_nCHW: Tensor, radius_n: Tensor) -> Tensor:
    """Pillow's blur: three box blurs along the rows, three along the columns, rounded to 8 bits after each.

    A box reaches `whole` pixels to both sides and counts a part of the next, in 24-bit fixed point. Three of them have
    the variance radius^2 (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering",
    SSVM 2011).
    """
    variance = radius_n.double().cpu() ** 2 / BOXES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = ((1 << 24) / (2 * (whole + part) + 1)).long()
    outer = ((1 << 24) - (2 * whole.long() + 1) * inner) // 2
    reach = 1 + int(whole.max()) if len(whole) else 0
    result = images_nCHW.long()
    for _ in range(2):
        result = result.mT
        for _ in range(BOXES):
            side = result.shape[2]
            total = torch.zeros_like(result)
            for offset in range(-reach, reach + 1):
                weight = torch.where(whole >= abs(offset), inner, torch.where(whole + 1 == abs(offset), outer, 0))
                places = (torch.arange(side, device=result.device) + offset).clamp(0, side - 1)
                total += _each(weight, result).unsqueeze(1) * result[:, :, places]
            result = (total + (1 << 23)) >> 24
    return result.to(torch.uint8)


def warp(images_nCHW: Tensor, matrix_n6: Tensor, fill_C: Tensor, cubic_n: Tensor) -> Tensor:
    """Return the images under affine maps, as Pillow's `transform(AFFINE)`.

    Args:
        matrix_n6: a, b, c, d, e, f: the centre (x, y) of a pixel of the result shows (ax + by + c, dx + ey + f).
        fill_C: 8-bit colour of what lies outside.
        cubic_n: bool, bicubic (Pillow's kernel here has a = -1) or bilinear.
    """
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64, device=matrix_n6.device)
    level, upright = (matrix_n6[:, 3:] == identity[3:]).all(1), (matrix_n6[:, :3] == identity[:3]).all(1)
    transpose_n6 = matrix_n6[:, [4, 3, 5, 1, 0, 2]]  # rows and columns exchanged
    result = torch.empty_like(images_nCHW)
    rest = ~(level | upright)
    for along, mask, maps in (("x", level, matrix_n6), ("y", upright & ~level, transpose_n6), ("", rest, matrix_n6)):
        places = mask.nonzero()[:, 0]
        if len(places):
            at = places.to(images_nCHW.device, non_blocking=True)
            images = images_nCHW[at].mT if along == "y" else images_nCHW[at]
            part = _warp_alike(images, maps[places], fill_C, cubic_n[places], level=along != "")
            result[at] = part.mT if along == "y" else part
    return result


def _warp_alike(images_nCHW: Tensor, matrix_n6: Tensor, fill_C: Tensor, cubic_n: Tensor, *, level: bool) -> Tensor:
    """`warp` of maps that are alike; `level`: rows move along themselves, so that 4 of the 16 neighbours count."""
    n, channels, height, width = images_nCHW.shape
    device = images_nCHW.device
    a, b, c, d, e, f = matrix_n6.to(device, torch.float64, non_blocking=True).view(n, 6, 1, 1).unbind(1)
    x = torch.arange(width, dtype=torch.float64, device=device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=device).view(-1, 1) + 0.5
    x_nHW, y_nHW = a * x + b * y + c, d * x + e * y + f
    inside = (x_nHW >= 0) & (x_nHW < width) & (y_nHW >= 0) & (y_nHW < height)
    columns, across = _taps(x_nHW - 0.5, width, cubic_n)
    result = torch.zeros(n, channels, height, width, device=device)
    if level:
        for column, part in zip(columns, across, strict=True):
            places = column.unsqueeze(1).expand(n, channels, height, width)
            result.addcmul_(images_nCHW.gather(3, places).float(), part.unsqueeze(1))
    else:
        rows, down = _taps(y_nHW - 0.5, height, cubic_n)
        flat = images_nCHW.flatten(2)
        for row, weight in zip(rows, down, strict=True):
            line = torch.zeros_like(result)
            for column, part in zip(columns, across, strict=True):
                places = (row * width + column).view(n, 1, -1).expand(n, channels, -1)
                line.addcmul_(flat.gather(2, places).view_as(line).float(), part.unsqueeze(1))
            result.addcmul_(line, weight.unsqueeze(1))
    pixels = (result + ROUNDING).clamp(0, 255).to(torch.uint8)
    return torch.where(inside.unsqueeze(1), pixels, fill_C.view(1, -1, 1, 1))


def rotation(degrees_n: Tensor, height: int, width: int) -> Tensor:
    """Matrices (n, 6) that turn counter-clockwise about the centre."""
    angle = -torch.deg2rad(degrees_n.double())
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return torch.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], dim=1)


def shear_or_shift(place: int) -> Callable[[Tensor, int, int], Tensor]:
    """The function of (values (n,), height, width) to identity maps (n, 6) with one entry replaced: 1 and 3 shear along
    x and y, 2 and 5 shift."""

    def maps(values_n: Tensor, height: int, width: int) -> Tensor:
        matrix = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64).repeat(len(values_n), 1)
        matrix[:, place] = values_n.double().cpu()
        return matrix

    return maps


def resized_crop(images_nCHW: Tensor, box_n4: Tensor, size: tuple[int, int], cubic_n: Tensor) -> Tensor:
    """Return each image's box (top, left, height, width) resized with antialiasing, as `crop` and `resize` of Pillow.

    The two passes are products with a matrix an image; the kernel is bilinear, or bicubic with a = -0.5 here.
    """
    n, channels, height, width = images_nCHW.shape
    top, left, high, wide = box_n4.to(images_nCHW.device).double().unbind(1)
    across = _resampling(left, wide, width, size[1], cubic_n)
    down = _resampling(top, high, height, size[0], cubic_n)
    lines = images_nCHW.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    lines = lines.view(n, height * channels, width)  # a row's channels are neighbours
    narrow = lines.bmm(across.mT).add_(0.5).floor_().clamp_(0, 255).view(n, height, channels * size[1])
    pixels = down.bmm(narrow).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return pixels.view(n, size[0], channels, size[1]).permute(0, 2, 1, 3).contiguous()


def shifted_crop(images_nCHW: Tensor, corner_n2: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Return the part of `size` whose first pixel is row, column `corner` of each image, beyond its border if negative.

    Beyond the border is black (`mode` constant) or the mirrored image (reflect).
    """
    n, _, height, width = images_nCHW.shape
    device = images_nCHW.device
    top, left = corner_n2.to(device).unbind(1)
    rows = top[:, None] + torch.arange(size[0], device=device)
    columns = left[:, None] + torch.arange(size[1], device=device)
    if mode == "reflect":
        rows = height - 1 - (height - 1 - rows.abs()).abs()
        columns = width - 1 - (width - 1 - columns.abs()).abs()
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    pixels = images_nCHW.permute(0, 2, 3, 1)[torch.arange(n, device=device)[:, None, None], rows, columns]
    return (pixels * inside.unsqueeze(-1)).permute(0, 3, 1, 2).contiguous()


def _each(strength_n: Tensor, images: Tensor) -> Tensor:
    return strength_n.to(images.device, non_blocking=True).view(-1, 1, 1)


def _values(images: Tensor) -> Tensor:
    return torch.arange(LEVELS, device=images.device).view(1, 1, -1)


def _blend(base: Tensor, images: Tensor, factor_n: Tensor) -> Tensor:
    """Pillow's blend: float32, cut to 0..255 and truncated."""
    factor = factor_n.float().to(images.device, non_blocking=True).view(-1, *[1] * (images.ndim - 1))
    base = base.float()
    return (base + factor * (images.float() - base)).clamp(0, 255).trunc()


def _grey(images_nCHW: Tensor) -> Tensor:
    """(n, H, W) int64."""
    if images_nCHW.shape[1] == 1:
        return images_nCHW[:, 0].long()
    red, green, blue = images_nCHW.long().unbind(1)
    r, g, b = LUMA
    return (r * red + g * green + b * blue + (1 << LUMA_BITS - 1)) >> LUMA_BITS


def _taps(at_nHW: Tensor, size: int, cubic_n: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The four neighbours of each coordinate along one axis, the border repeated, and their weights."""
    first = at_nHW.floor()
    d = (at_nHW - first).float()
    places = [(first.long() + offset).clamp(0, size - 1) for offset in (-1, 0, 1, 2)]

    def bilinear() -> list[Tensor]:
        zero = torch.zeros_like(d)
        return [zero, 1 - d, d, zero]

    def bicubic() -> list[Tensor]:
        return [d * (-1 + d * (2 - d)), 1 + d * d * (d - 2), d * (1 + d * (1 - d)), d * d * (d - 1)]

    return places, _select(cubic_n, bicubic, bilinear, at_nHW.device)


def _select(
    cubic_n: Tensor, bicubic: Callable[[], list[Tensor]], bilinear: Callable[[], list[Tensor]], device: torch.device
) -> list[Tensor]:
    """The bicubic weights or the bilinear ones; only those that are needed where the choice lies on the host."""
    if cubic_n.device.type == "cpu" and bool(cubic_n.all()):
        return bicubic()
    if cubic_n.device.type == "cpu" and not bool(cubic_n.any()):
        return bilinear()
    cubic = cubic_n.to(device).view(-1, 1, 1)
    return [torch.where(cubic, one, other) for one, other in zip(bicubic(), bilinear(), strict=True)]


def _resampling(start_n: Tensor, length_n: Tensor, n_in: int, n_out: int, cubic_n: Tensor) -> Tensor:
    """Weights (n, n_out, n_in) of one pass; a row reads the pixels of its box only and adds up to 1."""
    start, length = (values.view(-1, 1, 1) for values in (start_n, length_n))
    cubic = cubic_n.to(start.device).view(-1, 1, 1)
    scale = length / n_out
    stretch = scale.clamp(min=1)
    centre = (torch.arange(n_out, device=start.device, dtype=torch.float64).view(1, -1, 1) + 0.5) * scale
    support = torch.where(cubic, 2.0, 1.0) * stretch
    first, last = (centre - support + 0.5).trunc().clamp(min=0), (centre + support + 0.5).trunc().minimum(length)
    place = torch.arange(n_in, device=start.device, dtype=torch.float64).view(1, 1, -1) - start
    t = ((place + 0.5) / stretch - centre / stretch).float().abs_()

    def bicubic() -> list[Tensor]:
        near, far = 1 + t * t * (1.5 * t - 2.5), 2 - t * (4 - t * (2.5 - 0.5 * t))
        return [torch.where(t < 1, near, torch.where(t < 2, far, 0.0))]

    (weights,) = _select(cubic_n, bicubic, lambda: [(1 - t).clamp(min=0)], start.device)
    first, last, place = first.float(), last.float(), place.float()  # whole numbers
    weights = weights * ((place >= first) & (place < last))
    return weights / weights.sum(2, keepdim=True)
