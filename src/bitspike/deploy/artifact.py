"""The artifact file `*.bitspike`: read, write, check. docs/format.md is the contract.

Nothing in a file is believed: sizes, offsets, checksums, every op and every bound are checked before the first use, and
whatever is wrong is an `ArtifactError`. Memory is proportional to the file; time is, too, except that weights are looked at
once for every convolution that names them (2^29 in all at most).
"""
from __future__ import annotations

import json
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.errors import ArtifactError
from bitspike.deploy.fields import Fields, shown
from bitspike.deploy.packing import pack_codes, unpack_codes
from bitspike.deploy.program import MAX_SIDE, MAX_STEPS, Program, Value, check_program
from bitspike.deploy.tasks import (
    TASKS,
    Detection,
    Letterbox,
    Windows,
    check_letterbox,
    check_maps,
    check_parts,
    check_segmentation,
    check_windows,
    read_detection,
)

__all__ = ["Artifact", "ArtifactError", "pack_codes", "read", "unpack_codes", "write"]

FORMAT_VERSION = 1
MAX_FILE_BYTES = 1 << 31
MAX_JSON_BYTES = 1 << 22
MAX_JSON_DEPTH = 32
MAX_CLASSES = 100_000
MAX_DIMENSIONS = 8
MAX_INPUT_CHANNELS = 16
DTYPES: dict[str, type[np.generic]] = {"U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Artifact:
    """A checked artifact: the header as in the file, its tensors (read-only), and the program with tensors resolved.

    task: "classification", "segmentation" or "detection". detection: how a detector's maps become boxes, with its other
    programs. letterbox: how a picture of any size meets the program, if it does. windows: of a segmenter that sees a picture in
    parts; the program is then checked at the size of a window.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]]
    program: Program
    detection: Detection | None = None
    letterbox: Letterbox | None = None
    windows: Windows | None = None

    @property
    def task(self) -> str:
        """What the network is asked."""
        return str(self.header.get("task", "classification"))

    def at(self, height: int, width: int) -> Program:
        """The same program for pictures of another size, checked again.

        Errors: ArtifactError: it does not fit that size, or is too large there.
        """
        source = self.header["input"]
        if (height, width) == _shown_at(source, self.windows):
            return self.program
        if max(height, width) > MAX_SIDE:
            raise ArtifactError(f"an input of {height} x {width}; at most {MAX_SIDE} a side are allowed")
        pixels = Value("u8", source.get("steps", 1), height, width, source["channels"], 0, 255)
        program = check_program(self.header["program"], self.program.outputs, pixels, self.header["time_steps"],
                                self.header["fraction_bits"], self.tensors, self.program.codes)
        _check_task(self.header, program, self.detection, height, width)
        return program


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [x for item in level if isinstance(item, (dict, list))
                 for x in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise ArtifactError(f"{where} is nested deeper than {MAX_JSON_DEPTH} levels")


def _parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ArtifactError(f"{where} is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:  # includes bad UTF-8 and numbers of absurd length
        reason = shown(str(error))
        raise ArtifactError(f"{where} is not valid JSON ({reason}); the file is damaged or not an artifact") from None
    _check_depth(value, where)
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} is {shown(value)}; it must be an object")
    return value


def _header_crc(header: str, table: Mapping[str, Any]) -> str:
    compact = json.dumps(table, sort_keys=True, separators=(",", ":"))
    return str(zlib.crc32((header + compact).encode("utf-8", "surrogatepass")))


def _tensor(name: str, entry: Any, size: int) -> tuple[int, int, type[np.generic], tuple[int, ...]]:
    where = f"tensor {shown(name)}"
    fields = Fields(entry, where)
    dtype = DTYPES[fields.choice("dtype", tuple(DTYPES))]
    shape = fields.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= size for n in shape):
        raise fields.fail("shape", f"a list of at most {MAX_DIMENSIONS} integers 0..{size}, the bytes of all tensors")
    start, end = fields.integers("data_offsets", 2, 0, size)
    fields.done()
    need = np.dtype(dtype).itemsize
    for n in shape:
        need *= n
    if end - start != need:
        raise fields.fail("data_offsets", f"{need} bytes apart, as {list(shape)} {np.dtype(dtype)} take")
    return start, end, dtype, tuple(shape)


def _array(raw: memoryview, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    # Packed weights stay where they are, in the mapped file: they are unpacked once, when the program is checked. All else
    # is copied, so that nothing that is read later depends on what becomes of the file.
    array = array.astype(dtype, copy=dtype is not np.uint8)
    array.flags.writeable = False
    return array


def _tensors(table: Mapping[str, Any], body: memoryview) -> dict[str, NDArray[Any]]:
    places = {name: _tensor(name, entry, len(body)) for name, entry in table.items()}
    reached = 0
    for name, (start, end, _, _) in sorted(places.items(), key=lambda item: item[1][:2]):
        if start != reached:
            raise ArtifactError(f"tensor {shown(name)} starts at byte {start}; the one before it ends at {reached}")
        reached = end
    if reached != len(body):
        raise ArtifactError(f"tensors take {reached} bytes, the file has {len(body)} for them; it is damaged")
    return {name: _array(body[start:end], dtype, shape) for name, (start, end, dtype, shape) in places.items()}


def _shown_at(source: Mapping[str, Any], windows: Windows | None) -> tuple[int, int]:
    """The size at which the program of a file is checked: its input's, or that of a window of it."""
    size = source["height"], source["width"]
    return windows.shape(*size) if windows is not None else size


def _check_task(header: Mapping[str, Any], program: Program, detection: Detection | None, height: int, width: int) -> int:
    """What the program writes is what the task needs; returns the channels of a detector's maps."""
    classes = len(header["classes"])
    if detection is not None:
        return check_maps(detection, program, height, width, classes)
    if header.get("task") == "segmentation":
        check_segmentation(program, header["stride"], height, width, classes)
        return 0
    y = program.values[program.output]
    if (y.kind, y.steps, y.height, y.width, y.channels) != ("i32", 1, 1, 1, classes):
        raise ArtifactError(
            f"header 'output' {shown(program.output)} is {y.kind} {[y.steps, 'B', y.height, y.width, y.channels]}; "
            f"logits of {classes} classes are i32 [1, 'B', 1, 1, {classes}]"
        )
    return 0


def _check_header(header: dict[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Artifact:
    fields = Fields(header, "header", tensors)
    fields.text("name")
    fields.get("crc32")
    if not isinstance(fields.get("provenance", {}), dict):
        raise fields.fail("provenance", "an object")
    source = Fields(fields.get("input"), "header 'input'")
    height, width = source.integer("height", 1, MAX_SIDE), source.integer("width", 1, MAX_SIDE)
    channels = source.integer("channels", 1, MAX_INPUT_CHANNELS)
    if source.get("resize") is not None:
        source.integer("resize", max(height, width), MAX_SIDE)
    frames = source.integer("steps", 1, MAX_STEPS) if source.has("steps") else 1
    task = fields.choice("task", TASKS) if fields.has("task") else "classification"
    letterbox = None
    if task != "classification":
        letterbox = check_letterbox(source.get("letterbox"), "header 'input.letterbox'", channels)
        if source.get("resize") is not None:
            raise source.fail("resize", "null where there is a letterbox")
        if frames > 1 or height % letterbox.multiple or width % letterbox.multiple:
            raise source.fail("letterbox", "for pictures, not sequences, and its 'multiple' must divide height and width")
    source.done()
    classes = fields.texts("classes", 1, MAX_CLASSES)
    steps = fields.integer("time_steps", 1, MAX_STEPS)
    if frames not in (1, steps):
        raise source.fail("steps", f"1 (a picture) or 'time_steps', which is {steps}")
    fraction_bits = fields.integer("fraction_bits", 0, 30)
    detection = read_detection(fields.get("detection")) if task == "detection" else None
    outputs = [fields.text("output")] if detection is None else detection.outputs
    windows = None
    if task == "segmentation":
        fields.integer("stride", 1, MAX_SIDE)
        if fields.has("windows"):
            assert letterbox is not None
            windows = check_windows(fields.get("windows"), "header 'windows'", letterbox.multiple)
            height, width = windows.shape(height, width)
    listing = fields.get("program")
    fields.get("format_version")
    fields.done()
    pixels = Value("u8", frames, height, width, channels, 0, 255)
    program = check_program(listing, outputs, pixels, steps, fraction_bits, tensors)
    found = _check_task(header, program, detection, height, width)
    used = set(program.tensors)
    if detection is not None:
        detection = check_parts(header["detection"], detection, found, len(classes), tensors, program)
        used = used.union(*(part.program.tensors for part in detection.parts))
    idle = sorted(set(tensors) - used)
    if idle:
        raise ArtifactError(f"tensor {shown(idle[0])} is used by no op; every tensor of a file must be")
    return Artifact(header, tensors, program, detection, letterbox, windows)


def parse(data: bytes | mmap.mmap) -> Artifact:
    """Check the bytes of a whole file, or its mapping, and make sense of them.

    Raises:
        ArtifactError: anything at all is wrong.
    """
    if len(data) < 8:
        raise ArtifactError(f"the file has {len(data)} bytes; an artifact has at least 8: it is cut short or not an artifact")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_JSON_BYTES, len(data) - 8):
        raise ArtifactError(
            f"the JSON text is said to have {length} bytes, of {len(data) - 8} in the file (at most {MAX_JSON_BYTES} are "
            "allowed): the file is cut short or not an artifact"
        )
    table = _parse_json(data[8 : 8 + length], "the JSON text")
    metadata = table.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {"bitspike", "header_crc32"}:
        raise ArtifactError("'__metadata__' must hold exactly 'bitspike' and 'header_crc32'; this is no bitspike artifact")
    text, crc = metadata["bitspike"], metadata["header_crc32"]
    if not isinstance(text, str) or not isinstance(crc, str):
        raise ArtifactError("'bitspike' and 'header_crc32' in '__metadata__' must be texts")
    if crc != _header_crc(text, table):
        raise ArtifactError("the checksum of the header is wrong: the file is damaged; fetch or export it again")
    header = _parse_json(text, "the header")
    version = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"format_version is {shown(version)}; this bitspike reads {FORMAT_VERSION}. Export the file again, or install "
            "the version of bitspike that wrote it"
        )
    body = memoryview(data)[8 + length :]
    if type(header.get("crc32")) is not int or header["crc32"] != zlib.crc32(body):
        raise ArtifactError("the checksum of the tensors is wrong: the file is damaged; fetch or export it again")
    return _check_header(header, _tensors(table, body))


def read(path: str | os.PathLike[str]) -> Artifact:
    """Read and check an artifact.

    Raises:
        ArtifactError: there is no such file, or anything at all is wrong with it.

    >>> read("no/such.bitspike")
    Traceback (most recent call last):
    bitspike.deploy.errors.ArtifactError: no/such.bitspike: there is no such file. ...
    """
    try:
        status = Path(path).stat()
        if (Path(path) / "config.json").is_file():
            raise ArtifactError(f"this is the RUN folder of a training; export it first: 'bitspike export {os.fspath(path)} -o "
                                "FILE.bitspike'")
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError("this is not a file. Give the path of a *.bitspike file")
        if status.st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"the file has {status.st_size} bytes; at most {MAX_FILE_BYTES} are allowed")
        with Path(path).open("rb") as file:
            if not status.st_size:
                return parse(b"")
            return parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (FileNotFoundError, NotADirectoryError):
        message = "there is no such file. Give the path of a *.bitspike file; 'bitspike export' writes them"
    except (OSError, ValueError) as error:  # a path with a NUL byte is a ValueError
        message = str(error)
    raise ArtifactError(f"{os.fspath(path)}: {message}")


def encode(header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of an artifact; `format_version` and `crc32` are filled in, nothing else is checked."""
    table: dict[str, Any] = {}
    chunks: list[bytes] = []
    offset = 0
    # Widest elements first: then every tensor lies at a multiple of its element size.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if tensor.dtype not in _DTYPE_NAMES:
            raise ArtifactError(f"tensor {shown(name)} is {tensor.dtype}; allowed: {', '.join(map(str, _DTYPE_NAMES))}")
        raw = np.ascontiguousarray(tensor).astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()
        table[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                       "data_offsets": [offset, offset + len(raw)]}
        chunks.append(raw)
        offset += len(raw)
    body = b"".join(chunks)
    try:
        text = json.dumps({**header, "format_version": FORMAT_VERSION, "crc32": zlib.crc32(body)}, allow_nan=False,
                          separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"the header cannot be written as JSON: {error}") from None
    metadata = {"bitspike": text, "header_crc32": _header_crc(text, table)}
    front = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    front += b" " * (-len(front) % 8)
    return struct.pack("<Q", len(front)) + front + body


def write(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write an artifact: it is checked as `read` would, and appears whole or not at all.

    Args:
        path: where; replaced if it exists.
        header: as in docs/format.md; `format_version` and `crc32` are filled in.
        tensors: uint8, int8, int16 or int32 arrays; packed weights come from `pack_codes`.

    Raises:
        ArtifactError: the artifact would not be readable; nothing is written.
        OSError: the disk refuses.
    """
    version = header.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{os.fspath(path)}: format_version is {shown(version)}; this bitspike writes {FORMAT_VERSION}")
    try:
        data = encode(header, tensors)
        parse(data)
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from None
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
