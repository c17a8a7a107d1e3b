"""N-MNIST and N-Caltech101 `.bin`: 5 bytes an event, no header.

Source: Orchard et al. 2015 ("Converting static image datasets to spiking neuromorphic datasets using saccades") and the
reading script published with the data. x, y, then 24 bits, highest byte first: polarity and 23 bits of microseconds. A
record with y = 240 is no event: from it on, 2^13 us are added to every timestamp.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from bitspike.data.events import native
from bitspike.data.events.core import EventError, Part, Source, Stream, check_writable, events

_RECORD = np.dtype([("x", "u1"), ("y", "u1"), ("high", "u1"), ("low", ">u2")])
_OVERFLOW_Y, _OVERFLOW = 240, 1 << 13
_LOOK = 1280  # bytes by which the format is recognised


def looks_like(source: Source) -> bool:
    """True if the first records have times that grow and places on the largest sensor; under 16 records the name decides.

    Constant bytes, such as the zeros that a crash leaves, are none: their time does not move.
    """
    block = np.frombuffer(source.head[: min(_LOOK, len(source.head)) // 5 * 5], _RECORD)
    if len(block) > 1 and source.head.count(source.head[:1]) == len(source.head):
        return False
    if len(block) < 16:
        return source.path.suffix.lower() == ".bin"
    time, is_event = _times(block, 0)
    time = time[is_event]
    number, count = len(time), np.count_nonzero  # which is fast, as this is done for each of tens of thousands of small files
    fits = is_event & (block["x"] < 240) & (block["y"] < 180)  # of N-Caltech101's sensor
    return bool(number > 8 and count(time[1:] >= time[:-1]) > 0.98 * (number - 1) and count(time[1:] > time[:-1])
                and count(fits) > 0.5 * number)


def _times(block: np.ndarray, turns: int) -> tuple[np.ndarray, np.ndarray]:
    is_event = block["y"] != _OVERFLOW_Y
    time = (block["high"] & 0x7F).astype(np.int64) << 16 | block["low"]
    return time + (np.cumsum(~is_event) + turns) * _OVERFLOW, is_event


def open_stream(source: Source) -> Stream:
    """The size is not in the file: 34 x 34 for N-MNIST, up to 180 x 240 for N-Caltech101."""
    return Stream("nmnist", None, _parts(source), {})


def _parts(source: Source) -> Iterator[Part]:
    if native.module is not None:
        state = np.zeros(1, np.int64)
        source.expect(_RECORD.itemsize)
        for offset, block in source.records(0, _RECORD, "an event"):
            out = source.rows(len(block))
            number, used, _ = native.module.nmnist(block.view(np.uint8), out, state)
            yield Part(source.kept(out, number), offset, 5 if number == used else 0)
        return
    turns = 0
    for offset, block in source.records(0, _RECORD, "an event"):
        time, is_event = _times(block, turns)
        if is_event.all():
            yield Part(events(time, block["x"], block["y"], block["high"] >> 7), offset, 5)
        else:
            turns += int((~is_event).sum())
            block, time = block[is_event], time[is_event]
            yield Part(events(time, block["x"], block["y"], block["high"] >> 7), offset, 0)


def write(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """Errors: EventError for x over 255, y over 239, times below 0 or steps back that 23 bits cannot hold."""
    check_writable(data, "N-MNIST", {"x": (0, 255), "y": (0, 239), "t": (0, (1 << 40) - 1)})
    turns = np.maximum.accumulate(np.maximum(data["t"] - ((1 << 23) - 1) + _OVERFLOW - 1, 0) // _OVERFLOW)
    time = data["t"] - turns * _OVERFLOW
    if len(time) and time.min() < 0:
        raise EventError("the timestamps fall by more than 2^23 us, which N-MNIST cannot hold; sort the events by t.")
    if len(turns) and turns[-1] > 1 << 20:
        raise EventError("the timestamps reach beyond two hours; start them near 0.")
    out = np.empty(len(data), _RECORD)
    out["x"], out["y"] = data["x"], data["y"]
    out["high"], out["low"] = data["p"] << 7 | (time >> 16).astype(np.uint8), time & 0xFFFF
    more = np.diff(turns, prepend=0)
    mark = np.zeros(1, _RECORD)
    mark["y"] = _OVERFLOW_Y
    file.write(np.insert(out, np.repeat(np.arange(len(data)), more), mark[0]).tobytes())
