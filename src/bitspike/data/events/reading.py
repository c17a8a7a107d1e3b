"""`read`, `iterate` and `write`: any recording to events and back; the format is recognised by its content."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bitspike.data.events import aedat2, aedat3, aedat4, arrays, evt3, native, nmnist, prophesee
from bitspike.data.events.core import ANY_SIZE, EventError, Events, Source, Stream, first_outside, join
from bitspike.writing import whole_file

_Writer = Callable[[BinaryIO, np.ndarray, "tuple[int, int] | None"], None]
_WRITERS: dict[str, _Writer] = {
    "aedat2": aedat2.write, "aedat3": aedat3.write, "aedat4": aedat4.write, "nmnist": nmnist.write,
    "dat": prophesee.write_dat, "evt2": prophesee.write_evt2, "evt3": evt3.write,
    "npy": arrays.write_npy, "npz": arrays.write_npz, "hdf5": arrays.write_hdf5}

#: the names `write` takes and `Events.format` has
FORMATS = tuple(_WRITERS)


def _open(source: Source, layout: str | None) -> Stream:
    head = source.head
    if not head:
        raise source.error(0, "the file is empty. Copy it again.")
    if layout is not None and not head.startswith(b"#!AER-DAT2"):
        raise source.error(0, "layout= says how addresses of AEDAT 2.0 are read; this is another format. Leave it out.")
    if head.startswith(b"#!AER-DAT2"):
        return aedat2.open_stream(source, layout)
    if head.startswith(b"#!AER-DAT3"):
        return aedat3.open_stream(source)
    if head.startswith(aedat4.MAGIC):
        return aedat4.open_stream(source)
    if head.startswith(b"#!AER-DAT"):
        raise source.error(0, f"{head[:14]!r}: AEDAT 2.0, 3.1 and 4.0 are read. Convert it with jAER or dv.")
    if head.startswith(b"\x93NUMPY"):
        return arrays.open_npy(source)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")) and source.path.suffix.lower() != ".bin":
        return arrays.open_npz(source)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return arrays.open_hdf5(source)
    first = head.partition(b"\n")[0]
    if first.startswith(b"% ") and len(first) < 1024 and all(31 < b < 127 or b in b"\r\t" for b in first):
        return prophesee.open_stream(source)
    if nmnist.looks_like(source):
        return nmnist.open_stream(source)
    raise source.error(0, f"begins with {head[:16].hex(' ')}, which no format that is read here does. Read: AEDAT 2.0, 3.1, "
                       "4, N-MNIST .bin, Prophesee .dat and .raw (EVT 2.0, 3.0), .npy, .npz, HDF5.")


def _pieces(source: Source, stream: Stream) -> Iterator[np.ndarray]:
    """The decoded arrays, up to the first event outside the sensor. Errors: EventError."""
    height, width = stream.size or ANY_SIZE
    for part in stream.parts:
        data = part.data
        first = len(data) if stream.size is None or part.inside else first_outside(data, height, width)
        if first < len(data):
            yield data[:first]
            raise source.error(part.offset + first * part.stride, f"an event at x={data['x'][first]}, y={data['y'][first]}"
                               f"{'' if part.stride else ', in the block that begins there'}, on a sensor of {width} x "
                               f"{height}: the file is corrupt, or its header names another sensor.")
        yield data


def iterate(path: Path | str, chunk_events: int = 1 << 20, *, on_error: str = "raise",
            layout: str | None = None) -> Iterator[Events]:
    """Pieces of a recording, `chunk_events` events each but the last: memory does not grow with the file.

    on_error: "raise", or "prefix": what is whole before the damage, and a last piece (it may be empty) whose `problem`
    is the error. layout: see `read`.

    Errors: EventError for damaged or unknown files; OSError where there is none; MissingExtra for a missing package.
    """
    if on_error not in ("raise", "prefix") or chunk_events < 1:
        raise EventError(f"on_error={on_error!r}, chunk_events={chunk_events}; allowed: 'raise' or 'prefix', and at least 1.")
    path = Path(path)
    with path.open("rb") as file:
        source = Source(path, file)
        stream: Stream | None = None
        held: list[np.ndarray] = []
        number = 0
        problem: EventError | None = None

        def piece(data: np.ndarray, problem: EventError | None = None) -> Events:
            size, name, skipped = (stream.size, stream.format, dict(stream.skipped)) if stream else (None, "unknown", {})
            return Events(data, size, name, skipped, problem)

        try:
            stream = _open(source, layout)
            for data in _pieces(source, stream):
                held.append(data)
                number += len(data)
                if number < chunk_events:
                    continue
                joined = join(held) if len(held) > 1 else data
                whole = number - number % chunk_events
                for start in range(0, whole, chunk_events):
                    yield piece(joined[start:start + chunk_events])
                held, number = [joined[whole:].copy()], number - whole
        except EventError as error:
            if on_error == "raise":
                raise
            problem = error
        if number or problem is not None:
            yield piece(join(held), problem)


def read(path: Path | str, *, on_error: str = "raise", layout: str | None = None) -> Events:
    """The whole recording in memory, 16 bytes an event; in the order of the file, times are not sorted.

    on_error: "raise", or "prefix": the events before the damage, with the error as `Events.problem`.
    layout: only for AEDAT 2.0, one of `aedat2.LAYOUTS` (default: by the chip the header names); CIFAR10-DVS, whose header
    does not tell it from another DVS128, is read with "cifar10-dvs".

    Errors: as `iterate`.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "two.raw"
    >>> from bitspike.data.events import events
    >>> write(path, events([3, 4], [1, 639], [0, 2], [1, 0]), "evt2", size=(480, 640))
    >>> found = read(path); found.format, found.size, found.data[1].item()
    ('evt2', (480, 640), (4, 639, 2, 0))
    """
    path = Path(path)
    with path.open("rb") as file:
        return read_from(file, path, on_error=on_error, layout=layout)


def read_from(file: BinaryIO, name: Path | str, *, on_error: str = "raise", layout: str | None = None) -> Events:
    """As `read`, of an open file that can be sought, such as a member of an archive; name: for messages."""
    source = Source(name if isinstance(name, Path) else Path(name), file)  # to parse it again takes time, for small files
    held: list[np.ndarray] = []
    stream = Stream("unknown", None, iter(()), {})
    source.whole = native.module is not None and source.length < 1 << 30
    problem = None
    if on_error not in ("raise", "prefix"):
        raise EventError(f"on_error={on_error!r}; allowed: 'raise', 'prefix'.")
    try:
        stream = _open(source, layout)
        for data in _pieces(source, stream):
            held.append(data)
    except EventError as error:
        if on_error == "raise":
            raise
        problem = error
    data = held[0] if len(held) == 1 and held[0].flags.writeable else source.joined(held)
    return Events(data, stream.size, stream.format, dict(stream.skipped), problem)


def write(path: Path | str, data: np.ndarray, format: str, *, size: tuple[int, int] | None = None) -> None:
    """Write events (`DTYPE` [N]) as one of `FORMATS`; size: (height, width), for the formats that can say it.

    The file appears under its name only when it is complete.

    Errors: EventError for an unknown format, or events that it cannot hold; MissingExtra for hdf5 without h5py.
    """
    if format not in _WRITERS:
        raise EventError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}.")
    if size is not None and len(data) and (int(data["y"].max()) >= size[0] or int(data["x"].max()) >= size[1]):
        raise EventError(f"events reach x={data['x'].max()}, y={data['y'].max()}, outside the sensor of {size[1]} x {size[0]}.")
    path = Path(path)
    with whole_file(path) as file:
        _WRITERS[format](file, data, size)
