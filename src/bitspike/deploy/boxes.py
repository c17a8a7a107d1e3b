"""Boxes in numpy, as torchvision computes them: anchors, decoding, clipping, non-maximum suppression.

A box is float32 (x1, y1, x2, y2) in pixels.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]

_MOST_GROWTH = math.log(1000 / 16)  # of a side, in decoding


def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / (1 + e^-x), without overflow.

    >>> sigmoid(np.array([0, 1000, -1000], np.float32)).tolist()
    [0.5, 1.0, 0.0]
    """
    e = np.exp(-np.abs(x))
    return (np.where(x >= 0, 1, e) / (1 + e)).astype(np.float32)


def softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def grid(anchors: Boxes, height: int, width: int, stride: int) -> Boxes:
    """Anchors `[A, 4]` of one cell at every cell of a map: `[height * width * A, 4]`, row by row, those of a cell together.

    >>> grid(np.array([[-1, -1, 1, 1]], np.float32), 1, 2, 8).tolist()
    [[-1.0, -1.0, 1.0, 1.0], [7.0, -1.0, 9.0, 1.0]]
    """
    y, x = np.meshgrid(np.arange(height) * stride, np.arange(width) * stride, indexing="ij")
    corner = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (corner + anchors[None]).reshape(-1, 4).astype(np.float32)


def decode(deltas: NDArray[np.float32], boxes: Boxes, coder: Sequence[float]) -> Boxes:
    """Boxes moved and stretched by deltas `[N, 4]` (dx, dy, dw, dh), each divided by its number in `coder`.

    Centres move by dx, dy times the side, sides grow by e^dw, e^dh (62.5 times at most).
    """
    d = deltas.astype(np.float32) / np.array(coder, np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + np.float32(0.5) * sides + d[:, :2] * sides
    half = np.float32(0.5) * np.exp(np.minimum(d[:, 2:], np.float32(_MOST_GROWTH))) * sides
    return np.concatenate([centres - half, centres + half], 1).astype(np.float32)


def clip(boxes: Boxes, height: float, width: float) -> Boxes:
    """Boxes kept within a picture."""
    most = np.array([width, height, width, height], np.float32)
    return np.clip(boxes, np.float32(0), most)


def large(boxes: Boxes, least: float) -> NDArray[np.intp]:
    """Indices of the boxes both of whose sides are at least `least`."""
    return np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= np.float32(least)).all(1))


def suppress(boxes: Boxes, scores: NDArray[np.float32], groups: NDArray[Any], overlap: float, most: int) -> NDArray[np.intp]:
    """Non-maximum suppression within groups: indices of the boxes that stay, best first, at most `most`.

    A box goes if it overlaps a better one of its group by more than `overlap` (intersection over union). Equal scores: the
    first one is better. The same indices as torchvision's `batched_nms`, without its trick of moving groups apart, which costs
    digits of the coordinates.

    >>> boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3], [9, 9, 10, 10]], np.float32)
    >>> suppress(boxes, np.array([0.5, 0.9, 0.1], np.float32), np.zeros(3), 0.5, 10).tolist()
    [1, 2]
    """
    order = np.argsort(-scores, kind="stable")
    x1, y1, x2, y2 = np.ascontiguousarray(boxes[order].T)
    areas, group = (x2 - x1) * (y2 - y1), groups[order]
    alive = np.ones(len(order), bool)
    kept: list[int] = []
    at = 0
    while at < len(order) and len(kept) < most:
        kept.append(at)
        rest = slice(at + 1, None)
        width = np.minimum(x2[at], x2[rest]) - np.maximum(x1[at], x1[rest])
        height = np.minimum(y2[at], y2[rest]) - np.maximum(y1[at], y1[rest])
        both = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(invalid="ignore"):  # two boxes without area overlap by 0 / 0, which is no overlap
            alive[rest] &= ~((both / (areas[at] + areas[rest] - both) > np.float32(overlap)) & (group[rest] == group[at]))
        following = np.flatnonzero(alive[rest])
        at = at + 1 + int(following[0]) if following.size else len(order)
    return order[kept]


def best(scores: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest, best first; of equal ones the first."""
    if count < len(scores):
        worst = np.partition(scores, len(scores) - count)[len(scores) - count]
        above = np.flatnonzero(scores > worst)
        chosen = np.concatenate([above, np.flatnonzero(scores == worst)[: count - len(above)]])
        chosen.sort()
    else:
        chosen = np.arange(len(scores))
    return chosen[np.argsort(-scores[chosen], kind="stable")]
