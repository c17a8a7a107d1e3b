"""Weight codes as a bit stream, and back: `docs/format.md`, "Packed weights"."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy import kernels
from bitspike.deploy.errors import ArtifactError

BITS = {"uniform": range(2, 9), "binary": range(1, 2), "pow2": range(2, 5)}
_BLOCK = 1 << 20  # codes at a time, a multiple of 8: every block but the last ends on a whole byte


def check_scheme(scheme: Any) -> tuple[str, int]:
    """`(kind, bits)` of a scheme `{"kind", "bits"}`; ArtifactError if there is no such scheme."""
    if not isinstance(scheme, Mapping) or set(scheme) != {"kind", "bits"}:
        raise ArtifactError(f"scheme is {scheme!r:.200}; it must be an object with exactly 'kind' and 'bits'")
    kind, bits = scheme["kind"], scheme["bits"]
    if not isinstance(kind, str) or kind not in BITS:
        raise ArtifactError(f"scheme kind is {kind!r:.200}; allowed: {', '.join(BITS)}")
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS[kind]:
        raise ArtifactError(f"scheme '{kind}' with bits {bits!r:.200}; allowed: {BITS[kind][0]}..{BITS[kind][-1]}")
    return kind, bits


def code_table(scheme: Mapping[str, Any]) -> NDArray[np.int8]:
    """The integer code of every field 0 .. 2^bits - 1.

    >>> code_table({"kind": "uniform", "bits": 2}).tolist(), code_table({"kind": "binary", "bits": 1}).tolist()
    ([0, 1, -2, -1], [-1, 1])
    >>> code_table({"kind": "pow2", "bits": 3}).tolist()
    [0, 1, 2, 4, 0, -1, -2, -4]
    """
    kind, bits = check_scheme(scheme)
    field = np.arange(1 << bits)
    half = 1 << (bits - 1)
    if kind == "uniform":
        codes = np.where(field < half, field, field - 2 * half)
    elif kind == "binary":
        codes = 2 * field - 1
    else:
        exponent = field % half
        codes = np.where(exponent == 0, 0, (1 << exponent) >> 1) * np.where(field < half, 1, -1)
    return codes.astype(np.int8)


def packed_bytes(count: int, scheme: Mapping[str, Any]) -> int:
    """Bytes that `count` codes take."""
    return (count * check_scheme(scheme)[1] + 7) // 8


def pack_codes(codes: NDArray[Any], scheme: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Integer codes, in the order `[O, kh, kw, I / groups]`, as a bit stream of `bits` each, low bit first.

    Raises:
        ArtifactError: a code that the scheme does not have.

    >>> pack_codes(np.array([1, -1, 1, 1]), {"kind": "binary", "bits": 1}).tolist()
    [13]
    """
    table = code_table(scheme)
    bits = check_scheme(scheme)[1]
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ArtifactError(f"codes have dtype {codes.dtype}; they must be integers")
    flat = codes.reshape(-1)
    fields = np.full(256, -1)  # of code + 128; the first field wins where two have the same code (pow2's two zeros)
    fields[table[::-1].astype(int) + 128] = np.arange(table.size)[::-1]
    packed = np.empty(packed_bytes(flat.size, scheme), np.uint8)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        inside = (block >= -128) & (block <= 127)
        field = np.where(inside, fields[np.where(inside, block, 0).astype(int) + 128], -1)
        if (field < 0).any():
            found = block[field < 0][0]
            allowed = sorted(set(table.tolist()))
            raise ArtifactError(f"code {found} does not exist in scheme {dict(scheme)}; allowed: {allowed}")
        stream = np.unpackbits(field.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
        first = start * bits // 8
        packed[first : first + (block.size * bits + 7) // 8] = np.packbits(stream, bitorder="little")
    return packed


def unpack_codes(packed: bytes | NDArray[np.uint8], shape: Sequence[int], scheme: Mapping[str, Any]) -> NDArray[np.int8]:
    """The codes of a bit stream, int8, in `shape` (as it was packed: `[O, kh, kw, I / groups]`).

    Raises:
        ArtifactError: the stream's length is wrong or its padding is not zero.

    >>> unpack_codes(bytes([13]), (2, 2), {"kind": "binary", "bits": 1}).tolist()
    [[1, -1], [1, 1]]
    """
    table = code_table(scheme)
    bits = check_scheme(scheme)[1]
    stream = np.frombuffer(packed, np.uint8) if isinstance(packed, bytes) else packed.reshape(-1)
    count = math.prod(shape)
    if stream.size != packed_bytes(count, scheme):
        raise ArtifactError(
            f"packed weights have {stream.size} bytes; {count} codes of {bits} bits take {packed_bytes(count, scheme)}"
        )
    spare = stream.size * 8 - count * bits
    if spare and stream[-1] >> (8 - spare):
        raise ArtifactError("packed weights do not end in zero bits; the file was not written by this format")
    codes = np.empty(count, np.int8)
    extension = kernels.extension()
    if extension is not None:
        extension.unpack(np.ascontiguousarray(stream), bits, table, codes)
        return codes.reshape(tuple(shape))
    for start in range(0, count, _BLOCK):
        n = min(_BLOCK, count - start)
        block = stream[start * bits // 8 :]
        field_bits = np.unpackbits(block[: (n * bits + 7) // 8], count=n * bits, bitorder="little").reshape(n, bits)
        codes[start : start + n] = table[np.packbits(field_bits, axis=1, bitorder="little")[:, 0]]
    return codes.reshape(tuple(shape))
