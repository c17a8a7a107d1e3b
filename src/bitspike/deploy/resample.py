"""Bilinear resizing of maps, corners not aligned, as `F.interpolate` does it: what turns maps into answers for pixels."""
from __future__ import annotations

from collections.abc import Sequence
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


def joined(cells: int, canvas: int, starts: Sequence[int] = (0,)) -> NDArray[np.float32]:
    """One side of maps of logits as a matrix `[canvas, cells]`: what each cell adds to each pixel.

    starts: where windows of the canvas begin, all as long as what is left for the last one. Their cells lie one after the
    other; each is enlarged to its window, and where windows overlap their mean counts.

    >>> joined(2, 3, (0, 1)).tolist()    # two windows of two pixels, one cell each
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    each, length = cells // len(starts), canvas - starts[-1]
    one = rows(np.eye(each, dtype=np.float32), length)
    if len(starts) == 1:
        return one
    found, count = np.zeros((canvas, cells), np.float32), np.zeros((canvas, 1), np.float32)
    for i, start in enumerate(starts):
        found[start : start + length, i * each : (i + 1) * each] = one
        count[start : start + length] += 1
    return found / count


def _side(cells: int, canvas: int, size: int, wanted: int, starts: Sequence[int]) -> NDArray[np.float32]:
    """One side of `labels` as a matrix `[wanted, cells]`: to the canvas, cut, to the picture."""
    enlarged = joined(cells, canvas, starts)[:size]
    return enlarged if size == wanted else rows(enlarged, wanted)


def labels(logits: NDArray[np.float32], canvas: tuple[int, int], size: tuple[int, int], wanted: tuple[int, int],
           starts: tuple[Sequence[int], Sequence[int]] = ((0,), (0,))) -> NDArray[np.integer[Any]]:
    """Logits `[h, w, K]` of a canvas -> the class of every pixel of the picture on it, uint8 `[*wanted]` (uint16 for K > 256).

    canvas: height and width of what the program saw; size: of the part that is the picture; wanted: of the picture itself;
    starts: rows and columns where its windows begin, if it saw windows (see `joined`).
    Logits are resized to the canvas, cut, and resized to the picture, as in evaluation; the best class counts, the first of
    equal ones. Memory does not grow with K times the picture.
    """
    height, width, classes = logits.shape
    down = _side(height, canvas[0], size[0], wanted[0], starts[0])
    across = np.ascontiguousarray(_side(width, canvas[1], size[1], wanted[1], starts[1]).T)
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
