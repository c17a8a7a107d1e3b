"""What Prophesee's `.raw` encodings share when they are written: the text header and the words that carry the time."""
from __future__ import annotations

import numpy as np

from bitspike.data.events.core import EventError


def raw_header(encoding: str, size: tuple[int, int] | None) -> bytes:
    """The text header of a `.raw` file; encoding "2.0" or "3.0"."""
    geometry = "" if size is None else f"% geometry {size[1]}x{size[0]}\n"
    return f"% evt {encoding}\n{geometry}% end\n".encode()


def time_words(high: np.ndarray, bits: int, marker: int, most: int = 1 << 17) -> tuple[np.ndarray, np.ndarray]:
    """(word values int64, positions int64): the time-high words to put before the events at those positions.

    high: int64 [N], not reduced to `bits` bits. One word where the value changes, and enough of them from 0 and in every
    pause for the overflows to be counted.

    Errors: EventError for a pause that would take more than `most` words, and for steps back of more than half the range.
    """
    steps = np.diff(high, prepend=0)
    if len(high) and steps.min() < -(1 << bits - 1):
        raise EventError("the timestamps fall by more than half the range of the format's clock; sort the events by t.")
    at = np.flatnonzero(steps)
    at = at if len(at) and at[0] == 0 else np.concatenate([[0], at])[: len(high) + 1 if len(high) else 0]
    quarter = 1 << bits - 2
    extra = np.maximum(steps[at], 0) // quarter if len(at) else at
    if extra.sum() > most:
        raise EventError(f"the timestamps leap by {int(steps.max())} x the resolution of a time word; start them near 0.")
    repeats = extra + 1
    positions = np.repeat(at, repeats)
    behind = np.repeat(np.cumsum(repeats), repeats) - 1 - np.arange(len(positions))
    return (np.repeat(high[at], repeats) - behind * quarter) % (1 << bits) | marker << bits, positions
