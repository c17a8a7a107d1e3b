"""Bilinear resizing of maps, corners not aligned, as `F.interpolate` does it: what turns maps into answers for pixels."""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def between(size: int, wanted: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For every pixel of a side of `wanted`: the two pixels of a side of `size` around its centre, the weight of the second."""
    place = np.maximum((np.arange(wanted, dtype=np.float32) + np.float32(0.5)) * np.float32(size / wanted) - np.float32(0.5), 0)
    first = np.minimum(place.astype(np.intp), size - 1)
    return first, np.minimum(first + 1, size - 1), np.minimum(place - first.astype(np.float32), 1).astype(np.float32)


def rows(x: NDArray[Any], wanted: int) -> NDArray[np.float32]:
    """A map `[H, ...]` with `wanted` rows: float32."""
    first, second, weight = between(len(x), wanted)
    weight = weight.reshape(-1, *[1] * (x.ndim - 1))
    x = x.astype(np.float32, copy=False)
    below = x[second]
    below *= weight
    above = x[first]
    above *= 1 - weight
    above += below
    return above


def bilinear(x: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """A map `[H, W, ...]` at another size, float32.

    >>> bilinear(np.array([[0.0, 4.0]]), 1, 4).tolist()
    [[0.0, 1.0, 3.0, 4.0]]
    """
    across = np.swapaxes(rows(np.swapaxes(x, 0, 1), width), 0, 1)
    return rows(across, height)


def _side(cells: int, canvas: int, size: int, wanted: int) -> NDArray[np.float32]:
    """One side of `labels` as a matrix `[wanted, cells]`: to the canvas, cut, to the picture."""
    enlarged = rows(np.eye(cells, dtype=np.float32), canvas)[:size]
    return enlarged if size == wanted else rows(enlarged, wanted)


def labels(logits: NDArray[np.float32], canvas: tuple[int, int], size: tuple[int, int],
           wanted: tuple[int, int]) -> NDArray[np.integer[Any]]:
    """Logits `[h, w, K]` of a canvas -> the class of every pixel of the picture on it, uint8 `[*wanted]` (uint16 for K > 256).

    canvas: height and width of what the program saw; size: of the part that is the picture; wanted: of the picture itself.
    Logits are resized to the canvas, cut, and resized to the picture, as in evaluation; the best class counts, the first of
    equal ones. Memory does not grow with K times the picture.
    """
    height, width, classes = logits.shape
    down = _side(height, canvas[0], size[0], wanted[0])
    across = np.ascontiguousarray(_side(width, canvas[1], size[1], wanted[1]).T)
    found = np.zeros(wanted, np.uint8 if classes <= 256 else np.uint16)
    best: NDArray[np.float32] | None = None
    for k in range(classes):
        y = down @ (np.ascontiguousarray(logits[:, :, k]) @ across)
        if best is None:
            best = y
            continue
        np.copyto(found, found.dtype.type(k), where=y > best)
        np.maximum(best, y, out=best)
    return found
