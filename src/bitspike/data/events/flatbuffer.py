"""The little of FlatBuffers that AEDAT 4 needs: read a table with every access checked, write a table of a few fields.

Source: the FlatBuffers "Internals" page. Little-endian. A buffer begins with the offset of its root table. A table begins
with a signed distance back to its vtable: (bytes of the vtable, bytes of the table, offset of field 0, of field 1, ...),
16 bits each, 0 for a field that is absent. Strings and vectors are an offset to a 32-bit length and the elements.
"""
from __future__ import annotations

import struct


class Damaged(ValueError):
    """An offset that leaves the buffer."""


class Table:
    """The root table of `data`, a buffer without size prefix. Errors: Damaged, here and in every method."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = self._number("<I", 0)
        self.vtable = self.at - self._number("<i", self.at)
        self.fields = (self._number("<H", self.vtable) - 4) // 2

    def _number(self, code: str, at: int) -> int:
        if not 0 <= at <= len(self.data) - struct.calcsize(code):
            raise Damaged(f"an offset to byte {at} of {len(self.data)}")
        return int(struct.unpack_from(code, self.data, at)[0])

    def _field(self, index: int) -> int | None:
        offset = self._number("<H", self.vtable + 4 + 2 * index) if index < self.fields else 0
        return self.at + offset if offset else None

    def number(self, index: int, code: str, default: int) -> int:
        """The scalar field of that index; `code` as in `struct`."""
        at = self._field(index)
        return default if at is None else self._number(code, at)

    def vector(self, index: int, width: int) -> memoryview:
        """The elements of a vector or string field, `width` bytes each; empty where absent."""
        at = self._field(index)
        if at is None:
            return self.data[:0]
        at += self._number("<I", at)
        size = self._number("<I", at) * width
        if size > len(self.data) - at - 4:
            raise Damaged(f"a vector of {size} bytes at byte {at} of {len(self.data)}")
        return self.data[at + 4:at + 4 + size]


def header(identifier: bytes, compression: int, table_position: int, text: bytes) -> bytes:
    """The header table of AEDAT 4 with size prefix: (int32, int64, string)."""
    # 0 root, 4 identifier, 8 vtable (10 bytes, 2 of padding), 20 table: distance, int32, int64 at 28 (of 8), string
    head = struct.pack("<I4sHHHHHxx", 20, identifier, 10, 20, 4, 8, 16)
    table = struct.pack("<iiqI", 12, compression, table_position, 4)
    body = head + table + struct.pack("<I", len(text)) + text + b"\0"
    body += bytes(-len(body) % 8)
    return struct.pack("<I", len(body)) + body


def packet(identifier: bytes, elements: bytes, number: int) -> bytes:
    """A table whose only field is a vector of `number` structs, with size prefix; the elements are aligned to 8 bytes."""
    # 0 root, 4 identifier, 8 vtable (6 bytes, 2 of padding), 16 table: distance, offset to the vector at 24; elements at
    # 28, which is 32 from the size prefix
    body = struct.pack("<I4sHHHxxiII", 16, identifier, 6, 8, 4, 8, 4, number) + elements
    return struct.pack("<I", len(body)) + body
