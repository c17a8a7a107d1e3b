"""What a network sees of events: frames, voxel grids, time surfaces. Events [N] of `DTYPE`, sizes as (height, width).

Everything is one `bincount` or one assignment over flat indices, a block of events at a time so that the indices stay in
the cache. Times need not be sorted, except where it is said.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitspike.data.events import native
from bitspike.data.events.core import EventError, as_bytes, first_outside, is_sorted

_BLOCK = 1 << 16


def _check(data: np.ndarray, size: tuple[int, int]) -> None:
    height, width = size
    if height < 1 or width < 1:
        raise EventError(f"a sensor of {width} x {height}; give size=(height, width).")
    if first_outside(data, height, width) < len(data):
        raise EventError(f"events reach x={data['x'].max()}, y={data['y'].max()}, outside the sensor of {width} x {height}; "
                         "give its size=(height, width).")


def _check_room(number: int, what: str, cells: int) -> None:
    if number * cells > 1 << 31:
        raise EventError(f"{number} {what} of {cells} counters; 2^31 counters in all are allowed: take fewer or longer "
                         "ones, or cut the events first.")


def _first_and_last(data: np.ndarray) -> tuple[int, int]:
    first, last = (int(data["t"].min()), int(data["t"].max())) if len(data) else (0, 0)
    if last - first >= 1 << 62:
        raise EventError(f"the times reach from {first} to {last}: these are no microseconds of a recording.")
    return first, last


def _pixels(data: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Flat index int64 [N] into [2, H, W]."""
    at = data["y"].astype(np.int64)
    at += data["p"] * np.uint16(size[0]) if size[0] * 2 < 1 << 16 else data["p"].astype(np.int64) * size[0]
    at *= size[1]
    at += data["x"]
    return at


def _blocks(data: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(data), _BLOCK):
        yield data[start:start + _BLOCK]


def pool(data: np.ndarray, size: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """The same events on a sensor of `to` pixels: (y, x) -> (y * h // H, x * w // W)."""
    out = data.copy()
    for name, old, new in (("y", size[0], to[0]), ("x", size[1], to[1])):
        out[name] = (np.arange(old) * new // old).astype(np.uint16)[data[name]]
    return out


def edges(data: np.ndarray, steps: int, by: str, span: tuple[int, int] | None = None) -> np.ndarray:
    """Where the `steps` parts of sorted events begin and end, int64 [steps + 1]; by "count" or "time".

    count: N // steps events each, the rest goes to the last part. time: (t_last - t_first) // steps microseconds each,
    the last one up to and with the last event. Both are the conventions of the papers on DVS classification, which use
    SpikingJelly's (its `split_by="number"` and `"time"`). span: [start, stop) in microseconds to be cut into equal times
    in place of the events' own first to last; events outside it belong to no part.

    >>> from bitspike.data.events import events
    >>> edges(events([0, 1, 2, 9, 10], [0] * 5, [0] * 5, [0] * 5), 2, "count").tolist()
    [0, 2, 5]
    >>> edges(events([0, 1, 2, 9, 10], [0] * 5, [0] * 5, [0] * 5), 2, "time").tolist()
    [0, 3, 5]
    """
    if steps < 1 or by not in ("count", "time"):
        raise EventError(f"steps={steps}, by={by!r}; allowed: at least 1, and 'count' or 'time'.")
    number = len(data)
    if by == "time" and span is not None:
        start, stop = span
        if stop <= start:
            raise EventError(f"span={span}; its end must be after its beginning.")
        return np.searchsorted(data["t"], start + np.arange(steps + 1) * (stop - start) // steps, "left").astype(np.int64)
    if by == "count" or not number:
        inner = np.arange(steps) * (number // steps)
    else:
        first, last = int(data["t"][0]), int(data["t"][-1])
        inner = np.searchsorted(data["t"], first + np.arange(steps) * ((last - first) // steps), "left")
        inner[0] = 0
    return np.append(inner, number).astype(np.int64)


def frames(data: np.ndarray, size: tuple[int, int], steps: int, by: str = "count",
           pooled: tuple[int, int] | None = None, span: tuple[int, int] | None = None) -> np.ndarray:
    """Counts of events per step, polarity (0 OFF, 1 ON) and pixel: int32 [steps, 2, H, W].

    by "count": as many events in every step; by "time": as many microseconds (see `edges`). Events that are not in the
    order of time are cut by count as they come, and sorted first when cut by time. pooled: (h, w) of the frames; pixel
    (y, x) of the sensor counts into (y * h // H, x * w // W), so no event is lost. span: see `edges`.

    Errors: EventError for events outside the sensor, or more than 2^31 counters.

    >>> from bitspike.data.events import events
    >>> frames(events([0, 1, 2, 3], [0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 1]), (2, 2), 2)[1].tolist()
    [[[0, 1], [0, 0]], [[0, 0], [1, 0]]]
    """
    _check(data, size)
    if by == "time" and not is_sorted(data):
        data = data[np.argsort(data["t"], kind="stable")]
    pooled = pooled or size
    if min(pooled) < 1:
        raise EventError(f"pooled={pooled}; allowed: (height, width) of at least 1 x 1.")
    cells = 2 * pooled[0] * pooled[1]
    _check_room(steps, "frames", cells)
    return _counted(data, size, edges(data, steps, by, span), pooled)


def _counted(data: np.ndarray, size: tuple[int, int], at: np.ndarray, pooled: tuple[int, int]) -> np.ndarray:
    """Counts int32 [N, 2, h, w] of the parts of events that begin and end at `at`, int64 [N + 1]."""
    steps, cells = len(at) - 1, 2 * pooled[0] * pooled[1]
    out = np.zeros((steps, cells), np.int32)
    raw = as_bytes(data)
    if raw is not None:
        row, column = (np.arange(old) * new // old for old, new in zip(size, pooled, strict=True))
        for step in range(steps):
            part = raw[16 * at[step]:16 * at[step + 1]]
            native.module.accumulate(part, row * pooled[1], column, cells // 2, out[step])
        return out.reshape(steps, 2, *pooled)
    if pooled != size:
        data, size = pool(data, size, pooled), pooled
    for step in range(steps):
        part = data[at[step]:at[step + 1]]
        block_size = max(_BLOCK, cells)  # a bincount costs a pass over the frame: not one for a few events
        for start in range(0, len(part), block_size):
            out[step] += np.bincount(_pixels(part[start:start + block_size], size), minlength=cells).astype(np.int32)
    return out.reshape(steps, 2, *size)


def windows(data: np.ndarray, size: tuple[int, int], *, microseconds: int | None = None,
            count: int | None = None) -> np.ndarray:
    """Frames of a fixed length, as many as there are: int32 [T, 2, H, W]. By time, events are sorted first if they are not.

    microseconds: every window lasts that long, from the first event on, empty ones included; or count: every window has
    that many events, the last fewer.

    Errors: EventError if not exactly one is given, it is under 1, or more than 2^31 counters would be needed.
    """
    if (microseconds is None) == (count is None) or (microseconds or count or 0) < 1:
        raise EventError("give one of microseconds= and count=, at least 1.")
    _check(data, size)
    if not len(data):
        return np.zeros((0, 2, *size), np.int32)
    if microseconds is not None:
        first, last = _first_and_last(data)
        steps = (last - first) // microseconds + 1
    else:
        steps = -(-len(data) // (count or 1))
    _check_room(steps, "windows", 2 * size[0] * size[1])
    inner = np.arange(steps) * (microseconds or count or 1)
    if microseconds is not None:
        if not is_sorted(data):
            data = data[np.argsort(data["t"], kind="stable")]
        inner = np.searchsorted(data["t"], first + inner, "left")
    return _counted(data, size, np.append(inner, len(data)).astype(np.int64), size)


def voxel_grid(data: np.ndarray, size: tuple[int, int], bins: int) -> np.ndarray:
    """Signed events shared between the two nearest of `bins` moments: float32 [bins, H, W].

        V[b, y, x] = sum_i (2 p_i - 1) max(0, 1 - |b - (bins - 1) (t_i - t_first) / (t_last - t_first)|)

    Source: Zhu et al. 2019 (CVPR, "Unsupervised event-based learning of optical flow, depth, and egomotion"), eq. 1-3.

    Errors: EventError for events outside the sensor, no bins, or more than 2^31 counters.

    >>> from bitspike.data.events import events
    >>> voxel_grid(events([0, 25, 100], [0, 0, 0], [0, 0, 0], [1, 0, 1]), (1, 1), 3).ravel().tolist()
    [0.5, -0.5, 1.0]
    """
    _check(data, size)
    if bins < 1:
        raise EventError(f"bins={bins}; allowed: at least 1.")
    cells = size[0] * size[1]
    _check_room(bins, "bins", cells)
    out = np.zeros(bins * cells, np.float64)
    first, last = _first_and_last(data)
    scale = (bins - 1) / max(1, last - first)
    for block in _blocks(data):
        when = (block["t"] - first) * scale
        lower = np.minimum(when.astype(np.int64), max(0, bins - 2))
        share = when - lower
        sign = block["p"] * 2.0 - 1.0
        at = lower * cells + block["y"].astype(np.int64) * size[1] + block["x"]
        low = int(lower.min()) * cells
        high = (int(lower.max()) + 1) * cells
        out[low:high] += np.bincount(at - low, sign * (1 - share), minlength=high - low)
        if bins > 1:
            out[low + cells:high + cells] += np.bincount(at - low, sign * share, minlength=high - low)
    return out.astype(np.float32).reshape(bins, *size)


def time_surface(data: np.ndarray, size: tuple[int, int], tau: float, at: np.ndarray | None = None) -> np.ndarray:
    """How lately each pixel fired: float32 [T, 2, H, W] at the moments `at` (us, int64 [T], growing; default: the last event).

        S[k, p, y, x] = exp(-(at_k - t_last(p, y, x)) / tau),   0 where nothing fired up to at_k

    tau: microseconds. Source: Lagorce et al. 2017 (TPAMI, "HOTS"), eq. 3, for whole pictures.

    Errors: EventError for events outside the sensor, tau <= 0, or moments that do not grow.

    >>> from bitspike.data.events import events
    >>> time_surface(events([0, 10], [0, 1], [0, 0], [1, 1]), (1, 2), 10.0)[0, 1].astype(float).round(3).tolist()
    [[0.368, 1.0]]
    """
    _check(data, size)
    if not tau > 0:
        raise EventError(f"tau={tau}; allowed: more than 0 microseconds.")
    _first_and_last(data)
    if not is_sorted(data):
        data = data[np.argsort(data["t"], kind="stable")]
    moments = np.asarray(data["t"][-1:] if at is None else at, np.int64)
    if (moments[1:] < moments[:-1]).any():
        raise EventError("the moments `at` must grow.")
    cells = 2 * size[0] * size[1]
    _check_room(len(moments), "moments", cells)
    last = np.zeros(cells, np.int64)
    fired = np.zeros(cells, bool)
    out = np.zeros((len(moments), cells), np.float32)
    stops = np.searchsorted(data["t"], moments, "right").tolist()
    start = 0
    for k, stop in enumerate(stops):
        for block in _blocks(data[start:stop]):
            pixel = _pixels(block, size)
            last[pixel] = block["t"]  # sorted, and the last assignment to an index holds
            fired[pixel] = True
        start = stop
        out[k, fired] = np.exp(-(int(moments[k]) - last[fired]) / tau)
    return out.reshape(len(moments), 2, *size)
