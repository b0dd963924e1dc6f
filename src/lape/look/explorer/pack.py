"""Maps as bytes in a page: quantised, compressed, as text. Shape suffixes: L layers, H heads, n tokens."""

import base64
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from lape.core.position import Grid


def finite(values: Tensor) -> list[float | None]:
    """Plain numbers of five digits; None for what is not finite."""
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]


def blob(values: np.ndarray) -> str:
    """Bytes, compressed, as text."""
    return base64.b64encode(zlib.compress(values.tobytes(), 6)).decode()


def triangle(maps_Lnn: np.ndarray) -> dict[str, Any]:
    """Symmetric maps in [-1, 1]: the upper triangle, row by row, as round(127 s); off by at most 1/254."""
    i, j = np.triu_indices(maps_Lnn.shape[-1])
    return {"form": "triangle", "data": blob(np.rint(maps_Lnn[:, i, j] * 127).astype(np.int8)), "limit": 1.0}


def by_frame(maps_TLnn: Iterable[np.ndarray]) -> dict[str, Any]:
    """`triangle` of each frame, a blank between their data; an image is one frame."""
    triangles = [triangle(maps_Lnn) for maps_Lnn in maps_TLnn]
    return {**triangles[0], "frames": list(range(len(triangles))), "data": " ".join(one["data"] for one in triangles)}


def halve_frames(pack: dict[str, Any]) -> None:
    """Leaves every second frame out."""
    pack |= {"frames": pack["frames"][::2], "data": " ".join(pack["data"].split()[::2])}


def rows(maps_LHnn: np.ndarray, grid: Grid, budget: int, *, signed: bool) -> dict[str, Any]:
    """Maps head by head: all tokens as keys, queries every `stride` rows and columns, the least that fits `budget`.

    n: patches of the grid, and before them the prefix tokens, which are always kept as queries.

    Signed: round(127 b / limit). Unsigned (attention): round(255 a / peak), a peak for each layer, head and query,
    rows of attention being peaked and unlike in height. Queries that are left out look the same as the nearest kept.
    """
    pack: dict[str, Any] = {}
    prefix = maps_LHnn.shape[-1] - grid[0] * grid[1]
    for stride in range(1, max(grid) + 1):
        coordinates = [np.arange((side - 1) % stride // 2, side, stride) for side in grid]
        queries = np.r_[:prefix, prefix + (coordinates[0][:, None] * grid[1] + coordinates[1]).ravel()]
        maps_LHqn = maps_LHnn[:, :, queries]
        pack = {"form": "rows", "heads": maps_LHqn.shape[1], "queries": [k.tolist() for k in coordinates]}
        pack |= {"prefix": prefix, "tokens": maps_LHnn.shape[-1]}
        if signed:
            limit = float(np.abs(maps_LHnn).max()) or 1.0
            pack |= {"limit": limit, "data": blob(np.rint(maps_LHqn * (127 / limit)).astype(np.int8))}
        else:
            peaks = np.maximum(maps_LHqn.max(-1), 1e-12).astype("<f4")
            levels = np.rint(maps_LHqn / peaks[..., None] * 255).astype(np.uint8)
            pack |= {"limit": 0.0, "peaks": blob(peaks), "data": blob(levels)}
        if len(pack["data"]) <= budget:
            break
    return pack
