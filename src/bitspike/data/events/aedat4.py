"""AEDAT 4 (dv): a FlatBuffers header, then compressed packets of one stream each.

Source: iniVation, "AEDAT 4.0", and the FlatBuffers "Internals" page. After the line `#!AER-DAT4.0` comes the header
(compression, position of the packet table at the end of the file, an XML text naming the streams); each packet is
(int32 stream, int32 bytes) and that many bytes of LZ4 frame, Zstandard frame, or nothing compressed.
"""
from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import BinaryIO
from xml.etree import ElementTree

import numpy as np

from bitspike.data.events.core import DTYPE, EventError, Part, Source, Stream, check_writable, count, first_outside
from bitspike.data.events.flatbuffer import Damaged, Table, header, packet
from bitspike.extras import MissingExtra

MAGIC = b"#!AER-DAT4.0\r\n"
COMPRESSIONS = ("none", "lz4", "lz4-high", "zstd", "zstd-high")
_KINDS = {"FRME": "frame packets", "IMUS": "inertial packets", "TRIG": "trigger packets"}
_LIMIT = 1 << 28  # bytes of one packet when unpacked: 16 million events; dv writes packets of about 10 ms


def open_stream(source: Source) -> Stream:
    """Errors: EventError for a header that is damaged or names no event stream; MissingExtra without lz4 or zstandard."""
    at = len(MAGIC)
    prefix = source.at(at, 4)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 4 or length > min(source.length - at - 4, 1 << 24):
        raise source.error(at, f"a header of {length} bytes in a file of {source.length}: truncated or corrupt. Copy it again.")
    start = at + 4 + length
    try:
        table = Table(memoryview(source.at(at + 4, length)))
        compression, end = table.number(0, "<i", 0), table.number(1, "<q", -1)
        streams = _streams(bytes(table.vector(2, 1)))
    except (Damaged, ElementTree.ParseError, ValueError) as error:
        raise source.error(at, f"the header cannot be read ({error}): the file is corrupt. Copy it again.") from None
    if not 0 <= compression < len(COMPRESSIONS):
        raise source.error(at, f"unknown compression {compression}; known: {', '.join(COMPRESSIONS)}.")
    if end != -1 and not start <= end <= source.length:
        end = -1  # the table of packets is lost, or the recording was cut off: the packets say themselves where they end
    sizes = [size for kind, size in streams.values() if kind == "EVTS"]
    if streams and not sizes:
        raise source.error(at, f"no event stream; it holds {', '.join(kind for kind, _ in streams.values())}.")
    _decompress(b"", COMPRESSIONS[compression], probe=True)
    skipped: dict[str, int] = {}
    kinds = {stream: kind for stream, (kind, _) in streams.items()}
    size = sizes[0] if sizes else None
    return Stream("aedat4", size, _parts(source, start, end if end != -1 else source.length, COMPRESSIONS[compression],
                                         kinds, size is None, skipped), skipped)


def _streams(text: bytes) -> dict[int, tuple[str, tuple[int, int] | None]]:
    """stream number -> (type, (height, width) or None), from the XML of the header."""
    if not text:
        return {}
    if b"<!" in text:
        raise ValueError("its XML declares entities")
    streams = {}
    for node in ElementTree.fromstring(text.rstrip(b"\0")).iter("node"):
        if not re.fullmatch(r".*outInfo/\d{1,6}/?", node.get("path", "")):
            continue
        attributes = {a.get("key"): a.text or "" for a in node.iter("attr")}
        kind = attributes.get("typeIdentifier", "")
        try:
            size = int(attributes["sizeY"]), int(attributes["sizeX"])
        except (KeyError, ValueError):
            size = None
        if size is not None and not all(0 < side <= 1 << 15 for side in size):
            raise ValueError(f"a sensor of {size[1]} x {size[0]}")
        streams[int(node.get("name", "0"))] = kind, size
    return streams


def _decompress(body: bytes, how: str, probe: bool = False) -> bytes:
    """At most `_LIMIT` + 1 bytes. Errors: ValueError for damage; MissingExtra. probe: only look for the package."""
    package = {"lz4": "lz4", "zstd": "zstandard"}.get(how.partition("-")[0])
    try:
        if package == "lz4":
            import lz4.frame
        elif package == "zstandard":
            import zstandard
    except ModuleNotFoundError:
        raise MissingExtra(f"this AEDAT 4 recording is compressed with {how}: pip install {package}", name=package) from None
    if package is None or probe:
        return body
    try:
        if package == "lz4":
            decoder = lz4.frame.LZ4FrameDecompressor()
            plain = decoder.decompress(body, max_length=max(1 << 16, 8 * len(body)))  # it makes room for as much, at once
            if not decoder.eof and not decoder.needs_input:
                plain += decoder.decompress(b"", max_length=_LIMIT + 1 - len(plain))
            return bytes(plain)
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body) as reader:
            return bytes(reader.read(_LIMIT + 1))
    except Exception as error:  # RuntimeError of lz4, ZstdError: both say what is wrong
        raise ValueError(str(error)) from None


def _parts(source: Source, start: int, end: int, how: str, kinds: dict[int, str], unsure: bool,
           skipped: dict[str, int]) -> Iterator[Part]:
    offset = start
    while offset < end:
        head = source.at(offset, 8)
        stream, size = struct.unpack("<ii", head) if len(head) == 8 else (-1, -1)
        if size < 0 or offset + 8 + size > end:
            raise source.error(offset, f"no whole packet begins here ({end - offset} bytes are left): the recording is "
                               "truncated or corrupt. Copy it again, or read what is whole with on_error=\"prefix\".")
        at, offset = offset, offset + 8 + size
        kind = kinds.get(stream, "")
        if kinds and kind != "EVTS":
            if not kind:
                raise source.error(at, f"a packet of stream {stream}; the header names {sorted(kinds)}: the file is corrupt.")
            count(skipped, _KINDS.get(kind, f"{kind} packets"), 1)
            continue
        try:
            plain = memoryview(_decompress(source.at(at + 8, size), how))
            if len(plain) > _LIMIT:
                raise ValueError(f"it unpacks to more than {_LIMIT} bytes")
            if len(plain) < 12 or int.from_bytes(plain[:4], "little") > len(plain) - 4:
                raise ValueError(f"it unpacks to {len(plain)} bytes, too few")
            if not kinds and bytes(plain[8:12]) != b"EVTS":
                count(skipped, "packets of other kinds", 1)
                continue
            data = np.frombuffer(Table(plain[4:]).vector(0, DTYPE.itemsize), DTYPE)
        except ValueError as error:
            raise source.error(at, f"the packet is damaged ({error}). Copy the file again, or use on_error=\"prefix\"."
                               ) from None
        if first_outside(data, 1 << 15, 1 << 15) < len(data) or (data["p"] > 1).any():
            first = int(np.argmax((data["p"] > 1) | (data["x"] >= 1 << 15) | (data["y"] >= 1 << 15)))
            yield Part(data[:first], at, 0)
            raise source.error(at, f"event {first} of this packet is {data[first].item()}: the packet is damaged.")
        yield Part(data, at, 0)


def write(file: BinaryIO, data: np.ndarray, size: tuple[int, int] | None, compression: str = "none") -> None:
    """One event stream, in packets of 8,192 events; compression "none", "lz4" or "zstd".

    Errors: EventError for values that 15 bits cannot hold; MissingExtra without lz4 or zstandard.
    """
    check_writable(data, "AEDAT 4", {"x": (0, 32767), "y": (0, 32767)})
    if compression not in ("none", "lz4", "zstd"):
        raise EventError(f"unknown compression {compression!r}; allowed: none, lz4, zstd.")
    _decompress(b"", compression, probe=True)
    info = "" if size is None else (
        f'<node name="info" path="/mainloop/Recorder/outInfo/0/info/"><attr key="sizeX" type="int">{size[1]}</attr>'
        f'<attr key="sizeY" type="int">{size[0]}</attr></node>')
    xml = ('<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">'
           f'<node name="0" path="/mainloop/Recorder/outInfo/0/"><attr key="compression" type="string">{compression.upper()}'
           f'</attr><attr key="typeIdentifier" type="string">EVTS</attr>{info}</node></node></dv>')
    file.write(MAGIC + header(b"IOHE", COMPRESSIONS.index(compression), -1, xml.encode()))
    clean = np.zeros(len(data), DTYPE)  # the bytes of padding are whatever they are
    for name in DTYPE.names or ():
        clean[name] = data[name]
    for start in range(0, len(clean), 8192):
        part = clean[start:start + 8192]
        body = packet(b"EVTS", part.tobytes(), len(part))
        if compression == "lz4":
            import lz4.frame

            body = lz4.frame.compress(body)
        elif compression == "zstd":
            import zstandard

            body = zstandard.ZstdCompressor().compress(body)
        file.write(struct.pack("<ii", 0, len(body)) + body)
