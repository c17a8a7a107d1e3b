"""Regions of maps, and masks back into pictures, in numpy: RoIAlign and mask pasting as in torchvision."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.boxes import Boxes
from bitspike.deploy.resample import bilinear

#: places between two cells are taken in steps of 2^-14, and means rounded to whole potentials: then the last digits of a box,
#: which depend on the machine's exponential function, and the order of sums hardly ever show
PLACE_BITS = 14
_TOGETHER = 64  # regions whose weights exist at the same time


def level_of(boxes: Boxes, strides: Sequence[int], canonical: int) -> NDArray[np.intp]:
    """From which map each region is cut: floor(4 + log2(sqrt(area) / canonical)) is the log2 of its stride, clamped.

    Source: Lin et al., CVPR 2017, eq. 1; torchvision's `LevelMapper`.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    with np.errstate(divide="ignore"):
        wanted = np.floor(np.float32(4) + np.log2(np.sqrt(area) / np.float32(canonical)) + np.float32(1e-6))
    first, last = (int(np.log2(stride)) for stride in (strides[0], strides[-1]))
    return (np.clip(wanted, first, last) - first).astype(np.intp)


def _weights(starts: NDArray[Any], ends: NDArray[Any], side: int, sampling: int, size: int,
             bits: int | None) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """One axis of some regions of one map: the first cell each touches, the last, and the weights of all, `[R, side, size]`.

    Points further out than one cell count as 0, those between there and the border as on the border.
    """
    each = np.maximum(ends - starts, 1.0)[:, None, None] / side
    points = starts[:, None, None] + (np.arange(side)[:, None] + (np.arange(sampling) + 0.5) / sampling) * each
    inside = ((points >= -1) & (points <= size)) / sampling
    points = np.clip(points, 0, size - 1)
    if bits is not None:
        points = np.floor(points * 2**bits + 0.5) / 2**bits
    low = points.astype(np.intp)
    weight, high = points - low, np.minimum(low + 1, size - 1)
    table = np.zeros((len(starts), side, size))
    where = np.arange(len(starts))[:, None, None], np.arange(side)[:, None]
    np.add.at(table, (*where, low), (1 - weight) * inside)
    np.add.at(table, (*where, high), weight * inside)
    return low.min((1, 2)), high.max((1, 2)), table


def roi_align(maps: Sequence[NDArray[Any]], boxes: Boxes, levels: NDArray[np.intp], strides: Sequence[int], side: int,
              sampling: int, bits: int | None = None) -> NDArray[np.float64]:
    """Regions as maps of one size: float64 `[R, side, side, C]`, each cell the mean of sampling x sampling points.

    Args: maps: `[H, W, C]` by level, finest first; boxes: `[R, 4]` in pixels of the picture; levels: of each box; strides: of
    the maps. bits: places in steps of 2^-bits (see PLACE_BITS); None: as they are.
    As `torchvision.ops.roi_align(..., aligned=False)`. Both axes are weighted apart, which is the same sum.
    """
    found = np.zeros((len(boxes), side, side, maps[0].shape[2]))
    for level, x in enumerate(maps):
        height, width, channels = x.shape
        chosen = np.flatnonzero(levels == level)
        for some in (chosen[i : i + _TOGETHER] for i in range(0, len(chosen), _TOGETHER)):
            x1, y1, x2, y2 = (boxes[some].astype(np.float64) / strides[level]).T
            top, bottom, down = _weights(y1, y2, side, sampling, height, bits)
            left, right, across = _weights(x1, x2, side, sampling, width, bits)
            for i, index in enumerate(some):
                rows, columns = slice(top[i], bottom[i] + 1), slice(left[i], right[i] + 1)
                window = x[rows, columns].astype(np.float64)
                lines = down[i][:, rows] @ window.reshape(len(window), -1)
                found[index] = across[i][:, columns] @ lines.reshape(side, -1, channels)
    return found


def codes_of(x: NDArray[np.float64], m: int, s: int, levels: int) -> NDArray[np.uint8]:
    """Means of potentials -> what a program of regions reads: `clip(rshift(rint(x) * m, s), 0, levels)`."""
    from bitspike.deploy.ops import quantize

    return quantize(np.rint(x).astype(np.int64), m, s, 0, levels, "u8")


def paste(mask: NDArray[np.float32], box: Boxes, height: int, width: int) -> NDArray[np.bool_]:
    """A mask `[m, m]` of probabilities in its box -> bool `[height, width]`, true where it is above one half.

    As torchvision's `paste_masks_in_image`: a border of zeros, the box rounded outwards, bilinear.
    """
    side = len(mask)
    padded = np.pad(mask, 1)
    scale = np.float32((side + 2) / side)
    centre, half = (box[2:] + box[:2]) * np.float32(0.5), (box[2:] - box[:2]) * np.float32(0.5) * scale
    x1, y1 = (int(v) for v in centre - half)
    x2, y2 = (int(v) for v in centre + half)
    whole = np.zeros((height, width), bool)
    left, right, top, bottom = max(x1, 0), min(x2 + 1, width), max(y1, 0), min(y2 + 1, height)
    if left < right and top < bottom:
        drawn = bilinear(padded, max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)) > 0.5
        whole[top:bottom, left:right] = drawn[top - y1 : bottom - y1, left - x1 : right - x1]
    return whole
