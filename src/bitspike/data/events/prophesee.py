"""Prophesee: decoded events in `.dat`, and the header and EVT 2.0 of `.raw` (EVT 3.0 is in `evt3`).

Source: Prophesee documentation, "DAT File Format", "RAW File Format", "EVT 2.0 Format". A DAT event: 32 bits of
microseconds, then x (bits 0..13), y (14..27), polarity (28..31). An EVT 2.0 word: type (bits 28..31); for an event the
low 6 bits of the time (22..27), x (11..21), y (0..10); the high 28 bits of the time come in words of their own.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from bitspike.data.events import evt3, native
from bitspike.data.events.core import (
    ANY_SIZE,
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
from bitspike.data.events.raw_words import raw_header, time_words

_DAT = np.dtype([("t", "<u4"), ("bits", "<u4")])
#: sensor generations by the name of the plugin that recorded them, for headers without a geometry
_PLUGINS = (("gen41", (720, 1280)), ("gen4", (720, 1280)), ("imx636", (720, 1280)), ("genx320", (320, 320)),
            ("gen31", (480, 640)), ("gen3", (480, 640)))
OFF, ON, HIGH, TRIGGER, OTHER, CONTINUED = 0x0, 0x1, 0x8, 0xA, 0xE, 0xF


def open_stream(source: Source) -> Stream:
    """A `.dat` or `.raw` recording, told apart by its header. Errors: EventError for encodings that are not read."""
    lines, start = text_header(source, "%", "% end")
    fields = {key: value for key, _, value in (line[1:].strip().partition(" ") for line in lines)}
    text = "\n".join(lines).lower()
    size = _size(source, fields, text)
    skipped: dict[str, int] = {}
    encoding = re.search(r"^%\s*(?:evt\s+|format\s+evt)(\d(?:\.\d)?)\b", text, re.MULTILINE)
    if encoding is None:
        if "data file containing" not in text and "version" not in text:
            raise source.error(0, "a Prophesee header that names neither an encoding (evt, format) nor a DAT version.")
        if fields.get("Version", "2") != "2":
            raise source.error(0, f"DAT version {fields['Version']}; only version 2 is read. Convert it with metavision.")
        return Stream("dat", size, _dat(source, start, size), skipped)
    order = ">" if re.search(r"^%\s*endianness\s+big", text, re.MULTILINE) else "<"
    if encoding[1] in ("2", "2.0"):
        return Stream("evt2", size, _evt2(source, start, order, size, skipped), skipped)
    if encoding[1] in ("3", "3.0"):
        return Stream("evt3", size, evt3.parts(source, start, order, skipped), skipped)
    raise source.error(0, f"encoded as EVT {encoding[1]}; EVT 2.0 and 3.0 are read. Convert it with metavision_file_to_raw.")


def _size(source: Source, fields: dict[str, str], text: str) -> tuple[int, int] | None:
    found = re.search(r"geometry\s+(\d{1,6})x(\d{1,6})", text)
    pair = (found[2], found[1]) if found else tuple(
        m[1] if (m := re.search(rf"\b{side}[= ]\s*(\d{{1,6}})\b", text)) else "" for side in ("height", "width"))
    if all(pair):
        size = int(pair[0]), int(pair[1])
        if not all(0 < side <= 1 << 14 for side in size):
            raise source.error(0, f"the header claims a sensor of {pair[1]} x {pair[0]}; allowed: 1..16384 a side.")
        return size
    return next((size for name, size in _PLUGINS if name in fields.get("plugin_name", "").lower()), None)


def _dat(source: Source, start: int, size: tuple[int, int] | None) -> Iterator[Part]:
    kind = source.at(start, 2)
    if len(kind) < 2 or kind[0] not in (0x00, 0x0C) or kind[1] != 8:
        raise source.error(start, f"event type and size are {kind.hex(' ') or 'missing'}, expected 00 08 or 0c 08: corrupt, or "
                           "not a file of change events.")
    if native.module is not None:
        state = np.zeros(3, np.int64)
        source.expect(8)
        for offset, block in source.records(start + 2, _DAT, "an event"):
            out = source.rows(len(block))
            number, _, fault = native.module.dat(block.view(np.uint8), out, state, *(size or ANY_SIZE))
            yield Part(source.kept(out, number), offset, 8, inside=not state[2])
            if fault:
                raise _bad_polarity(source, offset + 8 * number, int(block["bits"][number]) >> 28)
        return
    last: int | None = None
    for offset, block in source.records(start + 2, _DAT, "an event"):
        time = unwrap(block["t"].astype(np.int64), 32, last)
        last = int(time[-1])
        bits = block["bits"]
        p = bits >> 28
        good = int(np.argmax(p > 1)) if (p > 1).any() else len(p)
        yield Part(events(time[:good], bits[:good] & 0x3FFF, bits[:good] >> 14 & 0x3FFF, p[:good]), offset, 8)
        if good < len(p):
            raise _bad_polarity(source, offset + 8 * good, int(p[good]))


def _bad_polarity(source: Source, offset: int, found: int) -> EventError:
    return source.error(offset, f"polarity {found}, expected 0 or 1: the file is corrupt. Copy it again, or use "
                        "on_error=\"prefix\".")


def _reserved(source: Source, offset: int, word: int) -> EventError:
    return source.error(offset, f"a word of the reserved type {word >> 28:#x}: the file is corrupt. Copy it again, or use "
                        "on_error=\"prefix\".")


def _evt2(source: Source, start: int, order: str, size: tuple[int, int] | None, skipped: dict[str, int]) -> Iterator[Part]:
    if native.module is not None:
        state = np.zeros(6, np.int64)
        source.expect(4)
        for offset, block in source.records(start, order + "u4", "a word"):
            out = source.rows(len(block))
            number, used, fault = native.module.evt2(np.ascontiguousarray(block, "<u4").view(np.uint8), out, state,
                                                       *(size or ANY_SIZE))
            for what, counted in zip(("triggers", "vendor words", "events before the first time"), state[2:5], strict=True):
                count(skipped, what, int(counted))
            state[2:5] = 0
            yield Part(source.kept(out, number), offset, 0, inside=not state[5])
            if fault:
                raise _reserved(source, offset + 4 * used, int(block[used]))
        return
    last: int | None = None
    for offset, block in source.records(start, order + "u4", "a word"):
        words = block.astype(np.uint32)
        kind = words >> 28
        known = (kind <= ON) | (kind == HIGH) | (kind == TRIGGER) | (kind >= OTHER)
        good = len(words) if known.all() else int(np.argmin(known))
        words, kind = words[:good], kind[:good]
        highs = kind == HIGH
        high = unwrap((words[highs] & 0xFFFFFFF).astype(np.int64), 28, last)
        count(skipped, "triggers", int((kind == TRIGGER).sum()))
        count(skipped, "vendor words", int((kind >= OTHER).sum()))
        is_event = kind <= ON
        age = np.cumsum(highs)[is_event]  # how many high words came before each event
        word, p = words[is_event], kind[is_event]
        if last is None:
            timed = age > 0
            count(skipped, "events before the first time", int((~timed).sum()))
            word, p, age = word[timed], p[timed], age[timed]
        base = np.concatenate([[0 if last is None else last], high])
        yield Part(events(base[age] << 6 | (word >> 22 & 0x3F), word >> 11 & 0x7FF, word & 0x7FF, p), offset, 0)
        last = int(high[-1]) if len(high) else last
        if good < len(block):
            raise _reserved(source, offset + 4 * good, int(block[good]))


def write_dat(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """DAT version 2. Errors: EventError for what 14-bit addresses or 32-bit times (with overflows) cannot hold."""
    check_writable(data, "DAT", {"x": (0, 0x3FFF), "y": (0, 0x3FFF)})
    if len(data) and (not 0 <= int(data["t"][0]) < 1 << 32 or np.abs(np.diff(data["t"])).max(initial=0) >= 1 << 31):
        raise EventError("DAT has 32-bit timestamps: it can neither begin outside 0..2^32-1 us nor pause for 2^31 us.")
    geometry = "" if size is None else f"% Width {size[1]}\n% Height {size[0]}\n"
    file.write(f"% Data file containing CD events.\n% Version 2\n{geometry}".encode() + b"\x0c\x08")
    out = np.empty(len(data), _DAT)
    out["t"] = data["t"] & 0xFFFFFFFF
    out["bits"] = data["x"].astype(np.uint32) | data["y"].astype(np.uint32) << 14 | data["p"].astype(np.uint32) << 28
    file.write(out.tobytes())


def write_evt2(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """EVT 2.0, little-endian. Errors: EventError for what 11-bit addresses or its clock cannot hold."""
    check_writable(data, "EVT 2.0", {"x": (0, 2047), "y": (0, 2047), "t": (0, (1 << 62) - 1)})
    marks, at = time_words(data["t"] >> 6, 28, HIGH)
    t, x, y, p = (data[name].astype(np.int64) for name in ("t", "x", "y", "p"))
    words = np.insert(p << 28 | (t & 0x3F) << 22 | x << 11 | y, at, marks)
    file.write(raw_header("2.0", size) + words.astype("<u4").tobytes())
