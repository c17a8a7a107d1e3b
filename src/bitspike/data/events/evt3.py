"""Prophesee EVT 3.0: 16-bit words that only tell what changed, and vectors of up to 12 neighbouring pixels.

Source: Prophesee documentation, "EVT 3.0 Format". The type is in bits 12..15. ADDR_Y (0), ADDR_X with polarity in bit 11
(2), VECT_BASE_X (3), VECT_12 (4), VECT_8 (5), TIME_LOW (6) and TIME_HIGH (8) with 12 bits of microseconds each.

The decoder state (row, base of the vectors, both halves of the time) is carried by looking up, for every word, the last
word that set it: a running count of such words indexes the table of their values.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from bitspike.data.events import native
from bitspike.data.events.core import Part, Source, check_writable, count, events, unwrap
from bitspike.data.events.raw_words import raw_header, time_words

Y, X, BASE, VECTOR12, VECTOR8, LOW, CONTINUED4, HIGH, TRIGGER, OTHER, CONTINUED12 = 0, 2, 3, 4, 5, 6, 7, 8, 10, 14, 15
_KNOWN = np.zeros(16, bool)
_KNOWN[[Y, X, BASE, VECTOR12, VECTOR8, LOW, CONTINUED4, HIGH, TRIGGER, OTHER, CONTINUED12]] = True


def _held(words: np.ndarray, kind: np.ndarray, which: int, before: int, at: np.ndarray) -> np.ndarray:
    """For the words at `at`: the 12 bits of the last word of type `which`, `before` where there was none. int64."""
    sets = kind == which
    table = np.concatenate([[before], words[sets] & 0xFFF]).astype(np.int64)
    return table[np.cumsum(sets)[at]]


def parts(source: Source, start: int, order: str, skipped: dict[str, int]) -> Iterator[Part]:
    """Errors: EventError for reserved words, vectors that leave 2,048 columns, and a last word cut short."""
    if native.module is not None:
        yield from _native(source, start, order, skipped)
        return
    y = low = base = advanced = 0
    high: int | None = None
    for offset, block in source.records(start, order + "u2", "a word"):
        words = block.astype(np.uint16)
        kind = words >> 12
        fault = ""
        good = len(words)
        if not _KNOWN[kind].all():
            good = int(np.argmin(_KNOWN[kind]))
            fault = f"a word of the reserved type {int(kind[good]):#x}"
            words, kind = words[:good], kind[:good]

        # how far the vectors since the last base have moved on
        moves = np.where(kind == VECTOR12, 12, np.where(kind == VECTOR8, 8, 0)).astype(np.int64)
        moved = np.cumsum(moves) - moves
        bases = kind == BASE
        at_base = np.concatenate([[-advanced], moved[bases]])

        at = np.flatnonzero((kind == X) | (moves > 0))
        vector = moves[at] > 0
        held = _held(words, kind, BASE, base, at)
        column = (held & 0x7FF) + moved[at] - at_base[np.cumsum(bases)[at]]
        field = words[at] & 0xFFF
        mask = np.where(vector, np.where(kind[at] == VECTOR8, field & 0xFF, field), 1).astype(np.uint16)
        column = np.where(vector, column, field & 0x7FF)
        polarity = np.where(vector, held, field) >> 11

        wide = (column > 2047 - 11) & vector
        if wide.any():
            top = column + np.where(mask > 0, np.log2(np.maximum(mask, 1)).astype(np.int64), -1)
            if (top > 2047).any():
                bad = int(np.argmax(top > 2047))
                good, fault = int(at[bad]), f"a vector that reaches column {int(top[bad])}, allowed: 0..2047"
                at, column, mask, polarity = at[:bad], column[:bad], mask[:bad], polarity[:bad]
                words, kind = words[:good], kind[:good]

        highs = kind == HIGH
        time_high = unwrap((words[highs] & 0xFFF).astype(np.int64), 12, high)
        starts = np.zeros(len(words), bool)
        starts[highs] = np.diff(time_high, prepend=-1 if high is None else high) != 0
        age = np.cumsum(highs)[at]
        time = np.concatenate([[0 if high is None else high], time_high])[age] << 12 | _low(words, starts, kind, low, at)
        row = _held(words, kind, Y, y, at) & 0x7FF
        if high is None and (age == 0).any():
            timed = age > 0
            count(skipped, "events before the first time", int(np.unpackbits(mask[~timed].view(np.uint8)).sum()))
            time, row, column, mask, polarity = time[timed], row[timed], column[timed], mask[timed], polarity[timed]
        count(skipped, "triggers", int((kind == TRIGGER).sum()))
        count(skipped, "vendor words", int(((kind == OTHER) | (kind == CONTINUED4) | (kind == CONTINUED12)).sum()))

        if vector.any():
            bits = np.unpackbits(mask.astype("<u2").view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")
            which, step = np.nonzero(bits)
            yield Part(events(time[which], column[which] + step, row[which], polarity[which]), offset, 0)
        else:
            yield Part(events(time, column, row, polarity), offset, 0)
        if fault:
            raise source.error(offset + 2 * good, f"{fault}: the file is corrupt. Copy it again, or use on_error=\"prefix\".")

        end = np.array([-1])
        advanced = int(moves.sum() - at_base[np.cumsum(bases)[-1]])
        base, y = (int(_held(words, kind, which, old, end)[0]) for which, old in ((BASE, base), (Y, y)))
        low = int(_low(words, starts, kind, low, end)[0])
        high = int(time_high[-1]) if len(time_high) else high


def _native(source: Source, start: int, order: str, skipped: dict[str, int]) -> Iterator[Part]:
    state = np.zeros(9, np.int64)
    source.expect(2)  # or less, for dense vectors
    for offset, block in source.records(start, order + "u2", "a word"):
        words = np.ascontiguousarray(block, "<u2")
        begin = fault = 0
        while begin < len(words) and not fault:
            out = source.rows(max(12, len(words) - begin) + 12)
            number, used, fault = native.module.evt3(words[begin:].view(np.uint8), out, state)
            for kind, counted in zip(("triggers", "vendor words", "events before the first time"), state[6:], strict=True):
                count(skipped, kind, int(counted))
            state[6:] = 0
            yield Part(source.kept(out, number), offset + 2 * begin, 0)
            begin += used
        if fault:
            what = (f"a word of the reserved type {int(words[begin]) >> 12:#x}" if fault == 1
                    else f"a vector that reaches column {fault}, allowed: 0..2047")
            raise source.error(offset + 2 * begin, f"{what}: the file is corrupt. Copy it again, or use on_error=\"prefix\".")


def _low(words: np.ndarray, starts: np.ndarray, kind: np.ndarray, before: int, at: np.ndarray) -> np.ndarray:
    """The low half of the time at the words `at`: a changed high half starts it from 0, or time would leap for a moment."""
    sets = (kind == LOW) | starts
    table = np.concatenate([[before], np.where(starts[sets], 0, words[sets] & 0xFFF)]).astype(np.int64)
    return table[np.cumsum(sets)[at]]


def write(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """EVT 3.0, little-endian, without vectors. Errors: EventError for what 11-bit addresses or its clock cannot hold."""
    check_writable(data, "EVT 3.0", {"x": (0, 2047), "y": (0, 2047), "t": (0, (1 << 62) - 1)})
    t, x, y, p = (data[name].astype(np.int64) for name in ("t", "x", "y", "p"))
    marks, at = time_words(t >> 12, 12, HIGH)
    words = np.stack([LOW << 12 | (t & 0xFFF), Y << 12 | y, X << 12 | p << 11 | x], axis=1)
    wanted = np.ones(words.shape, bool)
    wanted[1:, :2] = words[1:, :2] != words[:-1, :2]
    wanted[at, 0] = True  # after a new high half
    first = np.concatenate([[0], np.cumsum(wanted.sum(axis=1))])[at]
    file.write(raw_header("3.0", size) + np.insert(words[wanted], first, marks).astype("<u2").tobytes())
