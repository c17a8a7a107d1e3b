"""Plain containers: `.npy`, `.npz` (also the folders of SpikingJelly: arrays t, x, y, p) and HDF5.

The columns may be called t, ts or timestamp(s), x, y, p, pol or polarity; one structured array, one array each, or one
[N, 4] array with the columns t, x, y, p. t is in whole microseconds, p is 0/1, bool or -1/1. Nothing is unpickled.
"""
from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from bitspike.data.events.core import BLOCK, DTYPE, EventError, Part, Source, Stream, check_writable
from bitspike.extras import MissingExtra

try:
    from lzma import LZMAError
except ModuleNotFoundError:  # a Python that was built without it, and whose zipfile then refuses such members
    LZMAError = zipfile.BadZipFile  # type: ignore[assignment,misc]

_NAMES = {"t": ("t", "ts", "timestamp", "timestamps", "time"), "x": ("x", "xs"), "y": ("y", "ys"),
          "p": ("p", "pol", "polarity", "polarities", "ps", "on")}
#: What zipfile and its decompressors raise for damage: NotImplementedError for a version or method they do not know,
#: RuntimeError for a member that claims to be encrypted, IndexError for one without a name, ValueError for a name that is
#: not UTF-8 or an offset before the beginning.
DAMAGED = (zipfile.BadZipFile, NotImplementedError, RuntimeError, IndexError, ValueError, OSError, EOFError, struct.error,
           zlib.error, LZMAError)


def _columns(found: Any, where: str) -> dict[str, str]:
    """t, x, y, p -> the name of that column. Errors: EventError listing what was found."""
    names = {ours: next((name for name in theirs if name in found), "") for ours, theirs in _NAMES.items()}
    if not all(names.values()):
        raise EventError(f"{where} has {', '.join(map(str, found)) or 'nothing'}; expected columns t, x, y and p.")
    return names


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, bytes of the header). Errors: ValueError of any kind of damage, objects included."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is an expression: it can fail in any way
        raise ValueError(re.sub(r" at 0x[0-9a-f]+", "", str(error))[:200]) from None
    if dtype.hasobject:
        raise ValueError("Python objects, which are not read")
    if fortran and len(shape) > 1:
        raise ValueError("columns stored one after the other (Fortran order); save np.ascontiguousarray(events)")
    return shape, dtype, int(file.tell())


def _check_shape(shape: tuple[int, ...], dtype: np.dtype, wide: bool) -> None:
    if min(shape, default=0) < 0 or len(shape) not in (1, 2) or (len(shape) == 2) != wide or (wide and shape[1] != 4):
        raise ValueError(f"an array {dtype} {shape}; expected structured [N], or numbers [N, 4] as t, x, y, p")


def _split(rows: np.ndarray) -> dict[str, np.ndarray]:
    if rows.dtype.names is None:
        return {name: rows[:, i] for i, name in enumerate("txyp")}
    return {ours: rows[theirs] for ours, theirs in _columns(rows.dtype.names, "the array").items()}


_LIMITS = {"t": (-(1 << 62), 1 << 62), "x": (0, 65535), "y": (0, 65535), "p": (-1, 1)}


def _first_bad(values: np.ndarray, least: int, greatest: int) -> int:
    """The first that is no whole number of least..greatest; their number, if all are."""
    kind = values.dtype.kind
    if kind == "b" or not len(values):
        return len(values)
    if kind in "iu":  # a whole type may be inside already, and two numbers tell of all of them
        info = np.iinfo(values.dtype)
        if (info.min >= least or int(values.min()) >= least) and (info.max <= greatest or int(values.max()) <= greatest):
            return len(values)
    with np.errstate(invalid="ignore"):
        bad = ~((values >= least) & (values <= greatest))
        if kind == "f":
            bad |= values != np.floor(values)
    return int(np.argmax(bad)) if bad.any() else len(values)


def _convert(column: dict[str, np.ndarray], room: Callable[[int], np.ndarray]) -> tuple[np.ndarray, int, str]:
    """(events in what `room` gave, uint8 [16 N], number of usable rows, what is wrong with the next one)."""
    column = {name: np.ascontiguousarray(values) for name, values in column.items()}  # of packed records they are not aligned
    usable, fault = min(map(len, column.values())), ""
    for name, (least, greatest) in _LIMITS.items():
        values = column[name][:usable]
        if values.dtype.kind not in "biuf":
            return room(0), 0, f"{name} is of type {values.dtype}, expected whole numbers"
        first = _first_bad(values, least, greatest)
        if first < usable:
            usable = first
            fault = f"{name} = {values[usable]}, expected a whole number {least}..{greatest}" + (
                " of microseconds (multiply seconds by 1e6)" if name == "t" else "")
    rows = room(usable)
    rows[:] = 0  # the bytes of padding
    data = rows.view(DTYPE)
    for name in "txy":
        data[name] = column[name][:usable]
    p = column["p"][:usable]
    data["p"] = p if p.dtype.kind in "bu" else p > 0
    return rows, usable, fault


def _parts(source: Source, number: int, fetch: Callable[[int, int], dict[str, np.ndarray]], offset: int,
           stride: int) -> Iterator[Part]:
    if 0 < number < 1 << 28:
        source.expect(source.length / number)
    for first in range(0, number, BLOCK):
        try:
            column = fetch(first, min(BLOCK, number - first))
        except DAMAGED as error:
            raise source.error(offset + first * stride, f"cannot be read on from event {first} ({error}): truncated or "
                               "corrupt. Copy it again, or read what is whole with on_error=\"prefix\".") from None
        rows, usable, fault = _convert(column, source.rows)
        yield Part(source.kept(rows, usable), offset + first * stride, stride)
        if fault:
            raise source.error(offset + (first + usable) * stride, f"event {first + usable} has {fault}.")
        if usable < min(BLOCK, number - first):
            raise source.error(offset + (first + usable) * stride, f"{first + usable} of {number} events are there: truncated. "
                               "Copy it again, or read what is whole with on_error=\"prefix\".")


def open_npy(source: Source) -> Stream:
    """Errors: EventError for any other array."""
    source.file.seek(0)
    try:
        shape, dtype, start = _npy_header(source.file)
        _check_shape(shape, dtype, dtype.names is None)
        if dtype.names is not None:
            _columns(dtype.names, "the array")
    except ValueError as error:
        raise source.error(0, f"{error}.") from None
    stride = dtype.itemsize * (4 if dtype.names is None else 1)

    def fetch(first: int, number: int) -> dict[str, np.ndarray]:
        raw = source.at(start + first * stride, number * stride)
        rows = np.frombuffer(raw[: len(raw) // stride * stride], dtype)
        return _split(rows.reshape(-1, 4) if dtype.names is None else rows)

    return Stream("npy", None, _parts(source, shape[0], fetch, start, stride), {})


class _Member:
    """One array of a zip archive, read forwards in pieces. Errors: ValueError for any damage."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        try:
            self.file = archive.open(name)
            self.shape, self.dtype, used = _npy_header(self.file)
        except DAMAGED as error:
            raise ValueError(str(error)) from None
        self.width = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        stored = archive.getinfo(name).file_size - used
        if not self.shape or min(self.shape) < 0 or self.width <= 0 or self.shape[0] * self.width > stored:
            raise ValueError(f"{name} claims {self.dtype} {self.shape} in {stored} bytes")

    def rows(self, number: int) -> np.ndarray:
        raw = self.file.read(number * self.width)
        return np.frombuffer(raw[: len(raw) // self.width * self.width], self.dtype).reshape(-1, *self.shape[1:])


def open_npz(source: Source) -> Stream:
    """Errors: EventError for archives without events. A damaged member is met when it is reached."""
    try:
        archive = zipfile.ZipFile(source.file)
        names = {Path(name).stem: name for name in archive.namelist()[:64] if name.endswith(".npy")}
        size = None
        if "size" in names:
            member = _Member(archive, names["size"])
            if member.shape == (2,) and member.dtype.kind in "iu":
                size = cast(tuple[int, int], tuple(int(n) for n in member.rows(2)))
        if whole := next((names[name] for name in ("events", "data", "arr_0") if name in names), None):
            one = _Member(archive, whole)
            _check_shape(one.shape, one.dtype, one.dtype.names is None)
            if one.dtype.names is not None:
                _columns(one.dtype.names, whole)
            number, offset = one.shape[0], archive.getinfo(whole).header_offset

            def fetch(first: int, number: int) -> dict[str, np.ndarray]:
                return _split(one.rows(number))
        else:
            members = {ours: _Member(archive, names[theirs]) for ours, theirs in _columns(names, "the archive").items()}
            lengths = {ours: member.shape for ours, member in members.items()}
            if len(set(lengths.values())) > 1 or len(members["t"].shape) != 1:
                raise ValueError(f"columns of different shapes: {lengths}")
            number, offset = members["t"].shape[0], archive.getinfo(names[_columns(names, '')["t"]]).header_offset

            def fetch(first: int, number: int) -> dict[str, np.ndarray]:
                return {name: member.rows(number) for name, member in members.items()}
    except DAMAGED as error:
        raise source.error(0, f"not a readable archive of events ({error}); copy or save it again.") from None
    return Stream("npz", size, _parts(source, number, fetch, offset, 0), {})


def open_hdf5(source: Source) -> Stream:
    """The group `events`, `CD/events` or the root. Errors: EventError; MissingExtra without h5py."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise MissingExtra("this recording is HDF5: pip install h5py", name="h5py") from None
    try:
        file = h5py.File(source.file, "r")
        found = next((file[name] for name in ("CD/events", "events") if name in file), file)
        if isinstance(found, h5py.Dataset):
            names = _columns(found.dtype.names or (), found.name)
            column: dict[str, tuple[Any, str]] = {ours: (found, theirs) for ours, theirs in names.items()}
        else:
            column = {ours: (found[theirs], "") for ours, theirs in _columns(list(found), found.name).items()}
        shapes = {ours: data.shape for ours, (data, _) in column.items()}
        if len(set(shapes.values())) > 1 or len(shapes["t"]) != 1:
            raise ValueError(f"columns of different shapes: {shapes}")
        side = [int(file.attrs[name]) for name in ("height", "width") if name in file.attrs]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise source.error(0, f"not a readable HDF5 file of events ({error}).") from None

    def fetch(first: int, number: int) -> dict[str, np.ndarray]:
        return {name: data[field][first:first + number] if field else data[first:first + number]
                for name, (data, field) in column.items()}

    return Stream("hdf5", (side[0], side[1]) if len(side) == 2 else None, _parts(source, shapes["t"][0], fetch, 0, 0), {})


def write_npy(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """One structured array; it has no place for the size."""
    check_writable(data, "npy", {})
    plain = np.dtype([(name, DTYPE[name]) for name in "txyp"])
    np.save(file, data.astype(plain), allow_pickle=False)


def write_npz(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """Arrays t, x, y, p, as in SpikingJelly's folders, and `size` where known."""
    check_writable(data, "npz", {})
    extra = {} if size is None else {"size": np.array(size, np.int64)}
    np.savez(file, **{name: np.ascontiguousarray(data[name]) for name in "txyp"}, **extra)  # type: ignore[arg-type]


def write_hdf5(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None) -> None:
    """Datasets events/t, x, y, p; attributes height and width. Errors: MissingExtra without h5py."""
    check_writable(data, "HDF5", {})
    try:
        import h5py
    except ModuleNotFoundError:
        raise MissingExtra("writing HDF5 needs h5py: pip install h5py", name="h5py") from None
    with h5py.File(file, "w") as out:
        for name in "txyp":
            out.create_dataset(f"events/{name}", data=np.ascontiguousarray(data[name]))
        if size is not None:
            out.attrs["height"], out.attrs["width"] = size
