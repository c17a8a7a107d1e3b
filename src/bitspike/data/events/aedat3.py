"""AEDAT 3.1 (cAER): text header, then little-endian packets of events of one type. And the label file of DVS128 Gesture.

Source: iniVation, "AEDAT 3.1". A packet: 28 bytes of header (type, source, bytes an event, offset of the timestamp,
overflow counter, capacity, number, number valid), then the events. A polarity event: 32 bits (bit 0 valid, 1 polarity,
2..16 y, 17..31 x) and a 31-bit timestamp in us.
"""
from __future__ import annotations

import csv
import io
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bitspike.data.events import native
from bitspike.data.events.core import (
    BLOCK,
    EventError,
    Part,
    Source,
    Stream,
    check_writable,
    count,
    events,
    text_header,
)

_TYPES = {0: "special", 2: "frame", 3: "inertial sample", 4: "inertial sample", 5: "sample", 6: "ear", 7: "configuration"}
_POLARITY = np.dtype([("bits", "<u4"), ("time", "<i4")])
_HEADER = struct.Struct("<hh6i")
_SIZES = {"dvs128": (128, 128), "davis128": (128, 128), "davis240": (180, 240), "davis346": (260, 346), "davis640": (480, 640)}


def open_stream(source: Source) -> Stream:
    """Errors: EventError for version 3.0 (another origin), and for a header without an end."""
    lines, start = text_header(source, "#", "#!END-HEADER")
    if not lines:
        raise source.error(0, "the header ends in its first line: the recording is truncated. Copy it again.")
    if not lines[0].startswith("#!AER-DAT3.1"):
        raise source.error(0, f"{lines[0]}: of version 3, only 3.1 is read. Convert it with dv.")
    if lines[-1] != "#!END-HEADER":
        raise source.error(start, "the header does not end in #!END-HEADER: the recording is truncated. Copy it again.")
    name = " ".join(lines).lower()
    size = next((size for chip, size in _SIZES.items() if chip in name), None)
    skipped: dict[str, int] = {}
    return Stream("aedat3", size, _parts(source, start, skipped), skipped)


def _parts(source: Source, start: int, skipped: dict[str, int]) -> Iterator[Part]:
    offset = start
    while offset < source.length:
        head = source.at(offset, _HEADER.size)
        if len(head) < _HEADER.size:
            raise source.error(offset, f"{len(head)} bytes are left, a packet's header takes {_HEADER.size}: the recording is "
                               "truncated. Copy it again, or read what is whole with on_error=\"prefix\".")
        kind, _, width, at, overflow, _, number, _ = _HEADER.unpack(head)
        if width <= 0 or number < 0 or overflow < 0 or not 0 <= kind <= 99 or not 0 <= at <= width - 4:
            raise source.error(offset, f"no packet begins here (type {kind}, {number} events of {width} bytes, timestamp at "
                               f"{at}): the file is corrupt. Copy it again, or use on_error=\"prefix\".")
        body, offset = offset + _HEADER.size, offset + _HEADER.size + width * number
        if kind != 1:
            if offset > source.length:
                raise source.error(body, _short(width * number, source.length - body))
            count(skipped, _TYPES.get(kind, f"type {kind}"), number)
            continue
        if (width, at) != (_POLARITY.itemsize, 4):
            raise source.error(body, f"polarity events of {width} bytes with the timestamp at {at}, expected 8 and 4: corrupt.")
        whole = min(number, (source.length - body) // width)
        for first in range(0, whole, BLOCK):
            raw = np.frombuffer(source.at(body + first * width, min(BLOCK, whole - first) * width), _POLARITY)
            if native.module is not None:
                source.expect(_POLARITY.itemsize)
                out = source.rows(len(raw))
                valid, used, _ = native.module.aedat3(raw.view(np.uint8), out, overflow)
                count(skipped, "marked invalid", used - valid)
                yield Part(source.kept(out, valid), body + first * width, width if valid == used else 0)
                continue
            bits = raw["bits"]
            keep = bits & 1 != 0
            count(skipped, "marked invalid", len(bits) - int(keep.sum()))
            time = raw["time"].astype(np.int64) + (overflow << 31)
            stride = width
            if not keep.all():
                bits, time, stride = bits[keep], time[keep], 0
            yield Part(events(time, bits >> 17, bits >> 2 & 0x7FFF, bits >> 1 & 1), body + first * width, stride)
        if whole < number:
            raise source.error(body + whole * width, _short(width * number, source.length - body))


def _short(announced: int, left: int) -> str:
    return (f"a packet announces {announced} bytes and {left} are left: the recording is truncated. Copy it again, or read "
            "what is whole with on_error=\"prefix\".")


def write(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """Polarity packets of at most 8,192 events. Errors: EventError for what 15-bit addresses or the clock cannot hold."""
    check_writable(data, "AEDAT 3.1", {"x": (0, 32767), "y": (0, 32767), "t": (0, (1 << 62) - 1)})
    chip = next((name for name, known in _SIZES.items() if known == size), "unknown")
    file.write(f"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 0: {chip.upper()}\r\n#!END-HEADER\r\n".encode())
    high = data["t"] >> 31
    cuts = np.union1d(np.flatnonzero(np.diff(high)) + 1, np.arange(0, len(data) + 1, 8192))
    edges = np.union1d(cuts, [0, len(data)]).tolist()
    for start, stop in pairwise(edges):
        part = data[start:stop]
        out = np.empty(len(part), _POLARITY)
        x, y, p = (part[name].astype(np.uint32) for name in "xyp")
        out["bits"] = x << 17 | y << 2 | p << 1 | 1
        out["time"] = part["t"] & 0x7FFFFFFF
        file.write(_HEADER.pack(1, 0, 8, 4, int(high[start]), len(part), len(part), len(part)) + out.tobytes())


class Span(NamedTuple):
    """One labelled stretch of a recording: label 0..10 (the file counts from 1), [start, stop) in microseconds."""

    label: int
    start: int
    stop: int


def gesture_labels(path: Path | str) -> list[Span]:
    """The spans of a DVS128 Gesture label file (`class,startTime_usec,endTime_usec`, classes 1..11).

    Errors: EventError naming the line.
    """
    return parse_gesture_labels(Path(path).read_text("utf-8", "replace"), path)


def parse_gesture_labels(text: str, path: Path | str) -> list[Span]:
    """As `gesture_labels`, of the file's text."""
    spans = []
    with io.StringIO(text, newline="") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
            if [name.strip() for name in header] != ["class", "startTime_usec", "endTime_usec"]:
                raise EventError(f"line 1 is {','.join(header)[:80]!r}, expected 'class,startTime_usec,endTime_usec'.", path)
            for row in rows:
                if not row:
                    continue
                label, start, stop = (int(cell) for cell in row)
                if not 1 <= label <= 11 or start > stop:
                    raise ValueError
                spans.append(Span(label - 1, start, stop))
        except EventError:
            raise
        except (ValueError, csv.Error):
            raise EventError(f"line {rows.line_num} is not a class 1..11, a start and an end in microseconds; unpack the "
                             "archive again.", path) from None
    return spans


def cut(data: np.ndarray, span: Span) -> np.ndarray:
    """The events of the span, `DTYPE` [M].

    >>> cut(events([1, 5, 9], [0] * 3, [0] * 3, [0] * 3), Span(0, 2, 9))["t"].tolist()
    [5]
    """
    return data[(data["t"] >= span.start) & (data["t"] < span.stop)]
