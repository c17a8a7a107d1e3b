"""AEDAT 2.0 (jAER): text header, then big-endian (address, timestamp) pairs of 8 bytes.

Source: iniVation, "AEDAT 2.0"; what the bits of an address mean is decided by the chip class of jAER named in the header.
jAER draws from the lower left and mirrors x; here y runs downwards, so the picture is the one jAER shows. Bit 0 of a
DVS128 address is 0 for ON in jAER (and in the scripts published with the data sets), against iniVation's table.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from bitspike.data.events import native
from bitspike.data.events.core import (
    EventError,
    Part,
    Source,
    Stream,
    check_writable,
    count,
    events,
    text_header,
    unwrap,
)

#: How an address is read. "dvs128": 128 x 128. "cifar10-dvs": the same bits with the axes exchanged, as the published
#: frames of that data set have them (its camera lay on its side). "dvs128-raw": the bits as they are. "davis": 240, 346, 640.
LAYOUTS = ("dvs128", "cifar10-dvs", "dvs128-raw", "davis")
_DAVIS = {"davis240": (180, 240), "davis346": (260, 346), "davis640": (480, 640)}
_PAIR = np.dtype([("address", ">u4"), ("time", ">u4")])


def open_stream(source: Source, layout: str | None) -> Stream:
    """Errors: EventError for an unknown layout or a chip that is not known."""
    lines, start = text_header(source, "#", "#End Of ASCII Header")
    if not lines:
        raise source.error(0, "the header ends in its first line: the recording is truncated. Copy it again.")
    chip = next((line.partition(":")[2].strip() for line in lines if line.lower().startswith("# aechip")), "")
    davis = next((size for name, size in _DAVIS.items() if name in chip.lower()), None)
    if layout is None:
        layout = "davis" if "davis" in chip.lower() else "dvs128"
        if chip and "davis" not in chip.lower() and "dvs128" not in chip.lower():
            raise source.error(0, f"recorded by the chip class {chip}, which is not known here; say how its addresses are "
                               f"read with layout=, one of {', '.join(LAYOUTS)}.")
    if layout not in LAYOUTS:
        raise EventError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}.", source.path)
    size = davis if layout == "davis" else (128, 128)
    if size is None:
        raise source.error(0, f"recorded by {chip or 'an unnamed chip'}: a DAVIS of unknown size (known: {', '.join(_DAVIS)}).")
    skipped: dict[str, int] = {}
    return Stream("aedat2", size, _parts(source, start, layout, size, skipped), skipped)


def _parts(source: Source, start: int, layout: str, size: tuple[int, int], skipped: dict[str, int]) -> Iterator[Part]:
    if native.module is not None and layout != "davis":
        state = np.zeros(2, np.int64)
        source.expect(_PAIR.itemsize)
        for offset, block in source.records(start, _PAIR, "an event"):
            if not state[0] and int(block["time"][0]) >= 1 << 31:
                state[:] = 1, int(block["time"][0]) - (1 << 32)
            out = source.rows(len(block))
            number, used, _ = native.module.aedat2(block.view(np.uint8), out, state, LAYOUTS.index(layout))
            count(skipped, "special", used - number)
            yield Part(source.kept(out, number), offset, _PAIR.itemsize if number == used else 0, inside=True)
        return
    last: int | None = None
    height, width = size
    for offset, block in source.records(start, _PAIR, "an event"):
        address = block["address"].astype(np.uint32)
        raw = block["time"].astype(np.int64)
        if last is None and raw[0] >= 1 << 31:  # timestamps are signed: the recording begins before its zero
            last = int(raw[0]) - (1 << 32)
        time = unwrap(raw, 32, last)
        last = int(time[-1])
        if layout == "davis":
            samples, special = address >> 31 != 0, address >> 10 & 1 != 0
            count(skipped, "frame or inertial samples", int(samples.sum()))
            count(skipped, "special", int((special & ~samples).sum()))
            other = samples | special
            x, y, p = address >> 12 & 0x3FF, address >> 22 & 0x1FF, address >> 11 & 1
        else:
            other = address > 0x7FFF
            count(skipped, "special", int(other.sum()))
            x, y, p = address >> 1 & 0x7F, address >> 8 & 0x7F, address & 1
        stride = _PAIR.itemsize
        if other.any():
            keep = ~other
            time, x, y, p, stride = time[keep], x[keep], y[keep], p[keep], 0
        if layout == "davis":
            outside = (x >= width) | (y >= height)
            if outside.any():
                first = int(np.argmax(outside))
                yield Part(events(time[:first], width - 1 - x[:first], height - 1 - y[:first], p[:first]), offset, stride)
                byte = offset + int(np.flatnonzero(~other)[first]) * _PAIR.itemsize
                raise source.error(byte, f"an event at x={x[first]}, y={y[first]} on a sensor of {width} x {height}: the file "
                                   "is corrupt, or its header names another chip.")
            x, y = width - 1 - x, height - 1 - y
        elif layout == "dvs128":
            x, y, p = 127 - x, 127 - y, 1 - p
        elif layout == "cifar10-dvs":
            x, y, p = 127 - y, 127 - x, 1 - p
        yield Part(events(time, x, y, p), offset, stride)


def write(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """A DVS128 recording. Errors: EventError for what 128 x 128 pixels or 32-bit timestamps cannot hold."""
    check_writable(data, "AEDAT 2.0 of a DVS128", {"x": (0, 127), "y": (0, 127)})
    times = data["t"]
    if len(times) and (abs(int(times[0])) >= 1 << 31 or np.abs(np.diff(times)).max(initial=0) >= 1 << 31):
        raise EventError("AEDAT 2.0 has 32-bit timestamps: it can neither begin after nor pause for 2^31 us (36 minutes).")
    file.write(b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Data format is int32 address, int32 timestamp "
               b"(8 bytes total), repeated for each event\r\n# Timestamps tick is 1 us\r\n"
               b"# AEChip: ch.unizh.ini.jaer.chip.retina.DVS128\r\n#End Of ASCII Header\r\n")
    out = np.empty(len(data), _PAIR)
    x, y = (127 - data[name].astype(np.uint32) for name in ("x", "y"))
    out["address"] = y << 8 | x << 1 | (1 - data["p"])
    out["time"] = times & 0xFFFFFFFF
    file.write(out.tobytes())
