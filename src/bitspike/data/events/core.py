"""What every event format is read into: one structured array, one error, and the parts a decoder yields."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bitspike.data.events import native

#: One event: t in microseconds, x to the right and y downwards in pixels, p 1 (brighter, ON) or 0 (darker, OFF). 16 bytes,
#: aligned, and byte for byte the event of AEDAT 4.
DTYPE = np.dtype({"names": ["t", "x", "y", "p"], "formats": ["<i8", "<u2", "<u2", "u1"], "offsets": [0, 8, 10, 12],
                  "itemsize": 16})
BLOCK = 1 << 16  # records decoded at once: the bytes of a block stay in the second-level cache, its temporaries near it
ANY_SIZE = (1 << 16, 1 << 16)  # (height, width) that holds every event


class EventError(ValueError):
    """A recording that is not what its format allows: the file, the byte where it stops making sense, what to do.

    path: the file; offset: the first byte that cannot be used (None where no byte is to blame).
    """

    def __init__(self, message: str, path: Path | str | None = None, offset: int | None = None) -> None:
        self.path, self.offset = path, offset
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{path}{at}: {message}" if path is not None else message)


@dataclass(frozen=True)
class Events:
    """A recording or a piece of one.

    data: `DTYPE` [N]; size: (height, width) where the file says so, else None; format: its name;
    skipped: what else was in the file up to here, by kind (triggers, frames, events marked invalid: counts, not bytes);
    problem: the error that ended the recording early, only with `on_error="prefix"`.

    >>> e = Events(events([0, 5], [1, 2], [3, 4], [0, 1]), None, "npy")
    >>> len(e), e.extent
    (2, (5, 3))
    """

    data: np.ndarray
    size: tuple[int, int] | None
    format: str
    skipped: Mapping[str, int] = field(default_factory=dict)
    problem: EventError | None = None

    def __len__(self) -> int:
        return len(self.data)

    @property
    def extent(self) -> tuple[int, int]:
        """`size`, or where the file does not say, the smallest (height, width) that holds these events."""
        if self.size is not None or not len(self.data):
            return self.size or (0, 0)
        return int(self.data["y"].max()) + 1, int(self.data["x"].max()) + 1


def events(t: Any, x: Any, y: Any, p: Any) -> np.ndarray:
    """One `DTYPE` array [N] from four columns [N] (values are not checked).

    >>> events([7], [1], [2], [True])[0].item()
    (7, 1, 2, 1)
    """
    out = np.zeros(len(t), DTYPE)
    out["t"], out["x"], out["y"], out["p"] = t, x, y, p
    return out


def join(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """All pieces behind each other, `DTYPE` [sum of N], as a new array (`np.concatenate` would drop the alignment).

    >>> join([events([1], [0], [0], [0]), events([2], [0], [0], [0])])["t"].tolist()
    [1, 2]
    """
    empty = np.empty(0, "V16")
    return np.concatenate([empty, *(np.ascontiguousarray(piece).view("V16") for piece in pieces)]).view(DTYPE)


class Part(NamedTuple):
    """Some decoded events. offset: the byte where their bytes begin; stride: bytes an event, 0 where it varies.

    inside: the decoder saw that they all lie on the sensor; else the reader looks.
    """

    data: np.ndarray
    offset: int
    stride: int
    inside: bool = False


@dataclass
class Stream:
    """An opened recording: `parts` decodes as it is iterated, and raises EventError after the last usable event."""

    format: str
    size: tuple[int, int] | None
    parts: Iterator[Part]
    skipped: dict[str, int]


class Source:
    """A file being read: its path, length in bytes and first bytes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.length = file.seek(0, 2)
        self.head = self.at(0, 4096)
        self.whole = False  # `read` wants all events behind each other, in one array
        self.together: np.ndarray | None = None  # uint8: that array
        self._filled = 0

    def expect(self, width: float) -> None:
        """An event takes `width` bytes of this file, or more: make room for all of them at once, if that is wanted.

        No larger than it has to be: the C library gives back the same memory to one read after another up to 32 MB, and
        does not have to clear it each time. What is not written into takes no memory.
        """
        if self.whole and self.together is None:
            with contextlib.suppress(MemoryError):  # then the pieces are copied together
                self.together = np.empty(int(self.length / width + 64) * DTYPE.itemsize, np.uint8)

    def rows(self, number: int) -> np.ndarray:
        """Room for that many events, uint8 [16 * number], not cleared; `kept` says how many were written into it."""
        size = number * DTYPE.itemsize
        if self.together is not None and self._filled + size <= len(self.together):
            return self.together[self._filled:self._filled + size]
        return np.empty(size, np.uint8)

    def kept(self, rows: np.ndarray, number: int) -> np.ndarray:
        """The first `number` events of what `rows` gave, `DTYPE` [number]; the next room lies behind them."""
        used = rows[:number * DTYPE.itemsize]
        if self.together is not None and number and np.may_share_memory(used, self.together):
            self._filled += len(used)
        return used.view(DTYPE)

    def joined(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """`join` of pieces that were decoded from here; without a copy if they lie in `together`."""
        total = sum(map(len, pieces)) * DTYPE.itemsize
        if self.together is not None and total and total == self._filled and all(
                np.may_share_memory(piece, self.together) for piece in pieces if len(piece)):
            return self.together[:total].view(DTYPE)
        return join(pieces)

    def at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, fewer at the end of the file."""
        self.file.seek(offset)
        return self.file.read(max(0, min(count, self.length - offset)))

    def error(self, offset: int, message: str) -> EventError:
        """An EventError of this file."""
        return EventError(message, self.path, offset)

    def records(self, start: int, dtype: Any, what: str) -> Iterator[tuple[int, np.ndarray]]:
        """(byte offset, array) of whole records from `start` to the end, in memory that the next array takes over.

        Errors: EventError for a last record cut short.
        """
        dtype = np.dtype(dtype)
        whole = max(0, self.length - start) // dtype.itemsize * dtype.itemsize
        buffer = memoryview(bytearray(min(BLOCK * dtype.itemsize, whole)))
        for offset in range(start, start + whole, BLOCK * dtype.itemsize):
            wanted = min(BLOCK * dtype.itemsize, start + whole - offset)
            self.file.seek(offset)
            got = 0
            while got < wanted and (more := self.file.readinto(buffer[got:wanted])):  # type: ignore[attr-defined]
                got += more
            if got < wanted:
                raise self.error(offset + got, "the file became shorter while it was read; read it again.")
            yield offset, np.frombuffer(buffer[:wanted], dtype)
        if start + whole < self.length:
            raise self.error(start + whole, f"{self.length - start - whole} bytes are left, {what} takes {dtype.itemsize}: the "
                             "recording is truncated. Copy it again, or read what is whole with on_error=\"prefix\".")


def text_header(source: Source, mark: str, end: str, limit: int = 1 << 24) -> tuple[list[str], int]:
    """(lines, offset of the data): the lines that begin with `mark`, up to the line `end` or the first that is not text.

    A data byte may look like the mark; so a line counts only if it is printable and ends in a line feed.

    Errors: EventError where the header is longer than `limit` bytes.
    """
    lines: list[str] = []
    offset = 0
    source.file.seek(0)
    while True:
        line = source.file.readline(1 << 16)
        if not line.startswith(mark.encode()) or not line.endswith(b"\n"):
            break
        body = line.rstrip(b"\r\n")
        if any((b < 32 and b != 9) or b == 127 for b in body):
            break
        offset += len(line)
        if offset > limit:
            raise source.error(offset, f"the text header goes on for more than {limit} bytes; this is not a recording.")
        lines.append(body.decode("latin-1"))
        if lines[-1].strip() == end:
            break
    return lines, offset


def unwrap(raw: np.ndarray, bits: int, last: int | None) -> np.ndarray:
    """Counter values int64 [N] of a counter of that many bits, with its overflows undone; `last` is the one before them.

    A fall by more than half the range is an overflow; a smaller one is time that runs backwards, and stays. A rise by
    more than 15/16 of it is such a step back just after an overflow.

    >>> unwrap(np.array([250, 3, 2, 255, 1]), 8, None).tolist()
    [250, 259, 258, 255, 257]
    """
    if not len(raw):
        return raw
    full = 1 << bits
    before = int(raw[0]) if last is None else last % full
    steps = np.diff(raw, prepend=before)
    falls, rises = steps < -(full // 2), steps > full - full // 16
    base = 0 if last is None else last - before
    if not falls.any() and not rises.any():
        return raw + base
    return raw + (np.cumsum(falls.astype(np.int64) - rises) * full + base)


def as_bytes(data: np.ndarray) -> np.ndarray | None:
    """Events [N] as uint8 [16 N] without a copy; None where the extension cannot look at them."""
    if native.module is None or data.dtype != DTYPE or data.ndim != 1 or not data.flags.c_contiguous:
        return None
    return data.view(np.uint8) if len(data) else np.empty(0, np.uint8)


def first_outside(data: np.ndarray, height: int, width: int) -> int:
    """The first event that is not on the sensor; their number, if all are."""
    raw = as_bytes(data)
    if raw is not None:
        return int(native.module.first_outside(raw, height, width))
    if not len(data) or (int(data["x"].max()) < width and int(data["y"].max()) < height):
        return len(data)
    return int(np.argmax((data["x"] >= width) | (data["y"] >= height)))


def is_sorted(data: np.ndarray) -> bool:
    """Whether the times never fall."""
    raw = as_bytes(data)
    if raw is not None:
        return bool(native.module.is_sorted(raw))
    return bool((data["t"][1:] >= data["t"][:-1]).all())


def count(skipped: dict[str, int], kind: str, number: int) -> None:
    """Note that `number` things of that kind are no events."""
    if number:
        skipped[kind] = skipped.get(kind, 0) + int(number)


def check_writable(data: np.ndarray, what: str, limits: Mapping[str, tuple[int, int]]) -> None:
    """Errors: EventError for an array that is not `DTYPE` or a column outside its (least, greatest) value."""
    if data.dtype != DTYPE or data.ndim != 1:
        raise EventError(f"expected events as a one-dimensional array of bitspike.data.events.DTYPE, found {data.dtype} "
                         f"{data.shape}; build it with events(t, x, y, p).")
    for name, (least, greatest) in {"p": (0, 1), **limits}.items():
        column = data[name]
        if len(column) and not (least <= int(column.min()) and int(column.max()) <= greatest):
            raise EventError(f"{name} lies in {column.min()}..{column.max()}; {what} holds {least}..{greatest}. "
                             "Choose another format, or shift or crop the events.")
