"""Changes of events for training: pure functions of (events, what, numpy Generator). `DTYPE` [N] -> `DTYPE` [M], new array.

Events that leave the sensor are dropped; the order of time is kept. Sizes are (height, width). The geometric ones are
those of Li et al. 2022 (ECCV, "Neuromorphic data augmentation") on events instead of frames.
"""
from __future__ import annotations

import numpy as np

from bitspike.data.events.core import EventError, join


def _moved(data: np.ndarray, x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    inside = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
    out = data[inside]
    out["x"], out["y"] = x[inside], y[inside]
    return out


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise EventError(f"{name}={value}; allowed: 0..1.")


def _check_pixels(name: str, value: float) -> None:
    if not 0 <= value <= 1 << 16 or value != int(value):
        raise EventError(f"{name}={value}; allowed: whole pixels, 0..65536.")


def flip(data: np.ndarray, size: tuple[int, int], random: np.random.Generator, probability: float = 0.5) -> np.ndarray:
    """Mirror left and right, with that probability.

    >>> from bitspike.data.events import events
    >>> flip(events([0], [1], [2], [1]), (4, 10), np.random.default_rng(0), 1.0)["x"].tolist()
    [8]
    """
    _check_share("probability", probability)
    out = data.copy()
    if random.random() < probability:
        out["x"] = size[1] - 1 - data["x"].astype(np.int64)
        return out[data["x"] < size[1]]
    return out


def roll(data: np.ndarray, size: tuple[int, int], random: np.random.Generator, most: float = 5) -> np.ndarray:
    """Shift by a whole number of pixels, -most..most in either direction; what leaves the sensor is dropped."""
    _check_pixels("most", most)
    dx, dy = random.integers(-int(most), int(most) + 1, 2)
    return _moved(data, data["x"].astype(np.int64) + dx, data["y"].astype(np.int64) + dy, size)


def rotate(data: np.ndarray, size: tuple[int, int], random: np.random.Generator, degrees: float = 15.0) -> np.ndarray:
    """Turn about the centre by an angle from -degrees..degrees, to the nearest pixel."""
    if not abs(degrees) <= 360:
        raise EventError(f"degrees={degrees}; allowed: -360..360.")
    angle = np.deg2rad(random.uniform(-abs(degrees), abs(degrees)))
    cy, cx = (size[0] - 1) / 2, (size[1] - 1) / 2
    x, y = data["x"] - cx, data["y"] - cy
    return _moved(data, np.rint(np.cos(angle) * x - np.sin(angle) * y + cx).astype(np.int64),
                  np.rint(np.sin(angle) * x + np.cos(angle) * y + cy).astype(np.int64), size)


def shear(data: np.ndarray, size: tuple[int, int], random: np.random.Generator, most: float = 0.3) -> np.ndarray:
    """Shift every row in x by a share, from -most..most, of its distance from the middle row, to the nearest pixel."""
    if not 0 <= most <= 16:
        raise EventError(f"most={most}; allowed: 0..16.")
    x = data["x"] + random.uniform(-most, most) * (data["y"] - (size[0] - 1) / 2)
    return _moved(data, np.rint(x).astype(np.int64), data["y"].astype(np.int64), size)


def geometric(data: np.ndarray, size: tuple[int, int], random: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """One of six changes, each as likely, the same for the whole recording; `strength` times

    nothing; `shear` by up to 0.3; a shift by up to 5/128 of the sensor across, or down; a turn of up to 30 degrees; a square of
    0.1 to 11 % of the sensor cut out.

    Source: what Spikformer's release for CIFAR10-DVS does to the frames of 128 x 128 pixels, after TrivialAugment (Mueller and
    Hutter 2021). There the square lies wholly inside; here its centre does.
    """
    if not 0 <= strength <= 8:
        raise EventError(f"strength={strength}; allowed: 0..8.")
    which, height, width = int(random.integers(6)), *size
    if which == 1:
        return shear(data, size, random, 0.3 * strength)
    if which in (2, 3):
        most = round(5 / 128 * strength * (width if which == 2 else height))
        shift = int(random.integers(-most, most + 1))
        x, y = data["x"].astype(np.int64), data["y"].astype(np.int64)
        return _moved(data, x + shift if which == 2 else x, y if which == 2 else y + shift, size)
    if which == 4:
        return rotate(data, size, random, 30.0 * strength)
    if which == 5:
        return cutout(data, size, random, round((random.uniform(0.001, 0.11) * strength * height * width) ** 0.5))
    return data.copy()


def cutout(data: np.ndarray, size: tuple[int, int], random: np.random.Generator, side: float = 16) -> np.ndarray:
    """Remove the events of a square of `side` pixels, centred anywhere on the sensor, for the whole recording."""
    _check_pixels("side", side)
    side = int(side)
    top, left = int(random.integers(size[0])) - side // 2, int(random.integers(size[1])) - side // 2
    x, y = data["x"].astype(np.int64), data["y"].astype(np.int64)
    return data[(x < left) | (x >= left + side) | (y < top) | (y >= top + side)]


def jitter_time(data: np.ndarray, random: np.random.Generator, std: float = 1000.0) -> np.ndarray:
    """Gaussian noise of `std` microseconds on every timestamp; then in order of time again."""
    if not 0 <= std <= 1e12:
        raise EventError(f"std={std}; allowed: 0..1e12 microseconds.")
    out = data.copy()
    out["t"] = data["t"] + np.rint(random.normal(0.0, std, len(data))).astype(np.int64)
    return out[np.argsort(out["t"], kind="stable")]


def drop(data: np.ndarray, random: np.random.Generator, share: float = 0.1) -> np.ndarray:
    """Drop every event with that probability.

    >>> from bitspike.data.events import events
    >>> len(drop(events([0, 1], [0, 0], [0, 0], [0, 0]), np.random.default_rng(0), 1.0))
    0
    """
    _check_share("share", share)
    return data[random.random(len(data)) >= share]


def mix(first: np.ndarray, second: np.ndarray, random: np.random.Generator, share: float = 0.5,
        starts: tuple[int, int] | None = None) -> np.ndarray:
    """Both recordings over each other: a random `share` of the first, the rest's share of the second, as from time 0.

    The target is mixed by the same share: share * target(first) + (1 - share) * target(second).
    starts: the moment of each that becomes time 0; default: of its first event.
    """
    _check_share("share", share)
    kept = [data[random.random(len(data)) < part] for data, part in ((first, share), (second, 1 - share))]
    for index, (out, data) in enumerate(zip(kept, (first, second), strict=True)):
        if len(data):
            out["t"] -= data["t"].min() if starts is None else starts[index]
    both = join(kept)
    return both[np.argsort(both["t"], kind="stable")]
