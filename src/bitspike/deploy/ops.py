"""Every operation of docs/format.md in numpy: the definition that all compiled kernels must equal, bit for bit.

Values are `[S, B, H, W, C]`; potentials are int32. Written as short as the equations, not for speed.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
INT32 = np.iinfo(np.int32)


def rshift(x: Array, s: int) -> Array:
    """`(x + 2^(s-1)) >> s` on int64, rounding half up; `x` for s = 0.

    >>> rshift(np.array([-3, -2, -1, 0, 1, 2, 3]), 1).tolist()
    [-1, -1, 0, 0, 1, 1, 2]
    """
    x = x.astype(np.int64)
    return (x + (1 << (s - 1))) >> s if s > 0 else x


def sat32(x: Array) -> Array:
    """Clip int64 to int32."""
    return np.clip(x, INT32.min, INT32.max).astype(np.int32)


def _times(x: Array, m: int | Array) -> Array:
    return x.astype(np.int64) * np.asarray(m, np.int64)


def windows(size: int, kernel: int, stride: int, padding: int) -> int:
    """Number of windows along one side of an image; 0 or less if none fits."""
    return (size + 2 * padding - kernel) // stride + 1


def _tap(x: Array, offset: tuple[int, int], stride: tuple[int, int], out: tuple[int, int]) -> Array:
    """The pixels that one tap of the kernel meets: `[S, B, *out, C]`."""
    (y, x0), (sh, sw), (oh, ow) = offset, stride, out
    return x[:, :, y : y + sh * (oh - 1) + 1 : sh, x0 : x0 + sw * (ow - 1) + 1 : sw]


def _pad(x: Array, padding: tuple[int, int], value: Array) -> Array:
    (ph, pw), (s, b, h, w, c) = padding, x.shape
    padded = np.broadcast_to(value.astype(x.dtype), (s, b, h + 2 * ph, w + 2 * pw, c)).copy()
    padded[:, :, ph : ph + h, pw : pw + w] = x
    return padded


def lookup(x: Array, table: Array) -> Array:
    """`y = table[c, x]`; table int8 `[C, 256]`."""
    return table[np.arange(table.shape[0]), x]


def conv(
    x: Array, weight: Array, stride: tuple[int, int], padding: tuple[int, int], groups: int, pad_value: Array, m: Array,
    s: int, b: Array,
) -> Array:
    """`sat32(rshift(acc * m[o], s) + b[o])`; weight: int8 codes `[O, kh, kw, I / groups]`, pad_value: `[I]`.

    The sum runs in float64, where it is exact: every partial sum is an integer far below 2^53.
    """
    outputs, kh, kw, inputs = weight.shape
    out = (windows(x.shape[2], kh, stride[0], padding[0]), windows(x.shape[3], kw, stride[1], padding[1]))
    x = _pad(x, padding, pad_value)
    w = weight.astype(np.float64).reshape(groups, outputs // groups, kh, kw, inputs)
    acc = np.zeros((*x.shape[:2], *out, groups, outputs // groups))
    for i in range(kh):
        for j in range(kw):
            codes = _tap(x, (i, j), stride, out).astype(np.float64)
            if groups == 1:
                acc[..., 0, :] += codes @ w[0, :, i, j].T
            else:
                acc += np.einsum("...gi,goi->...go", codes.reshape(*codes.shape[:4], groups, inputs), w[:, :, i, j])
    return sat32(rshift(_times(acc.reshape(*acc.shape[:4], outputs), m), s) + b.astype(np.int64))


def quantize(x: Array, m: int | Array, s: int, lo: int, hi: int, dtype: str) -> Array:
    """`clip(rshift(x * m[c], s), lo, hi)` as dtype "u8" or "s8"."""
    return np.clip(rshift(_times(x, m), s), lo, hi).astype(np.uint8 if dtype == "u8" else np.int8)


def affine(x: Array, m: int | Array, s: int, b: int | Array) -> Array:
    """`sat32(rshift(x * m[c], s) + b[c])`."""
    return sat32(rshift(_times(x, m), s) + np.asarray(b, np.int64))


def add(a: Array, b: Array) -> Array:
    """`sat32(a + b)`; S = 1 is broadcast."""
    return sat32(a.astype(np.int64) + b)


def sum(a: Array, b: Array) -> Array:
    """`a + b` of counts: u8, of which the reader has proved that no sum passes 255; S = 1 is broadcast."""
    return a + b


# ---------------------------------------------------------------------------------------------- attention
def _tokens(x: Array, heads: int) -> Array:
    """`[S, B, H, W, C]` -> float64 `[S, B, heads, N, C / heads]`; products of codes are exact in it, as in `conv`."""
    return np.swapaxes(x.reshape(*x.shape[:2], -1, heads, x.shape[4] // heads), 2, 3).astype(np.float64)


def attention(q: Array, k: Array, v: Array, heads: int, m: int, s: int) -> Array:
    """Per head over the N = H W tokens: `sat32(rshift(q (k^T v) * m, s))`."""
    acc = _tokens(q, heads) @ (np.swapaxes(_tokens(k, heads), 3, 4) @ _tokens(v, heads))
    y = sat32(rshift(_times(acc, m), s))
    return np.ascontiguousarray(np.swapaxes(y, 2, 3)).reshape(y.shape[0], *q.shape[1:])


def attention_map(a: Array, b: Array, over: str, heads: int, m: int, s: int) -> Array:
    """Per head `sat32(rshift(acc * m, s))`, with d = C / heads channels a head, N = H W tokens:

    over "channels" (a = q, b = k): `acc[n, h, l] = sum_i a[n, h, i] b[l, h, i]`, the value is `[S, B, N, heads, N]`;
    over "tokens" (a = v, b = k): `acc[j, h, i] = sum_n a[n, h, j] b[n, h, i]`, the value is `[S, B, d, heads, d]`.
    In both, what `attention_read` sums over is the last axis.
    """
    left, right = _tokens(a, heads), _tokens(b, heads)
    acc = left @ np.swapaxes(right, 3, 4) if over == "channels" else np.swapaxes(left, 3, 4) @ right
    return np.ascontiguousarray(np.swapaxes(sat32(rshift(_times(acc, m), s)), 2, 3))


def attention_read(chosen: Array, x: Array, over: str, heads: int, m: int | Array, s: int) -> Array:
    """`sat32(rshift(acc * m[t, h], s))` `[S, B, H, W, C]` of a map `chosen` and x, with m a number or `[1 or T, heads]`:

    over "tokens" (map of q and k, x = v): `acc[n, h, j] = sum_l chosen[n, h, l] x[l, h, j]`;
    over "channels" (map of v and k, x = q): `acc[n, h, j] = sum_i chosen[j, h, i] x[n, h, i]`.
    """
    rows, values = np.swapaxes(chosen, 2, 3).astype(np.float64), _tokens(x, heads)
    acc = rows @ values if over == "tokens" else values @ np.swapaxes(rows, 3, 4)
    factor = np.asarray(m, np.int64)
    y = sat32(rshift(acc.astype(np.int64) * (factor[:, None, :, None, None] if factor.ndim else factor), s))
    return np.ascontiguousarray(np.swapaxes(y, 2, 3)).reshape(y.shape[0], *x.shape[1:])


def coincidences(k: Array, v: Array, m: int, s: int) -> Array:
    """`sat32(rshift(m * sum over pixels of k v, s))` `[S, B, 1, 1, C]`."""
    acc = (k.astype(np.int64) * v).sum((2, 3), keepdims=True)
    return sat32(rshift(_times(acc, m), s))


def mask(q: Array, chosen: Array) -> Array:
    """`q * chosen` of codes u8, chosen `[S, B, 1, 1, C]`: the channels of q that it lets pass."""
    return q * chosen


# --------------------------------------------------------------------------------------- pools and neurons


def maxpool(x: Array, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Array:
    """Maximum over the pixels that exist; padding < kernel."""
    out = (windows(x.shape[2], kernel[0], stride[0], padding[0]), windows(x.shape[3], kernel[1], stride[1], padding[1]))
    x = _pad(x, padding, np.full(x.shape[4], np.iinfo(x.dtype).min))
    taps = [_tap(x, (i, j), stride, out) for i in range(kernel[0]) for j in range(kernel[1])]
    return np.maximum.reduce(taps)


def rounded_mean(total: Array, n: int, m: int) -> Array:
    """`sat32(floor((2 m total + n) / (2 n)))` of a sum of n numbers, int64: m times their mean, rounded half up."""
    return sat32((2 * m * total + n) // (2 * n))


def mean(x: Array, over: str, m: int) -> Array:
    """`rounded_mean` over "space" (H and W become 1) or "time" (S becomes 1)."""
    axes = (2, 3) if over == "space" else (0,)
    n = int(np.prod([x.shape[axis] for axis in axes]))
    return rounded_mean(x.sum(axes, dtype=np.int64, keepdims=True), n, m)


def neighbours(size: int, factor: int) -> tuple[Array, Array, Array]:
    """What every pixel of a side enlarged by `factor` is a mean of: the two pixels before and behind its centre (the border
    is repeated), and the weight of the second in units of 1 / (2 factor).

    >>> [part.tolist() for part in neighbours(2, 2)]
    [[0, 0, 0, 1], [0, 1, 1, 1], [3, 1, 3, 1]]
    """
    centre = 2 * np.arange(size * factor) + 1 - factor  # in units of 1 / (2 factor)
    first, weight = centre // (2 * factor), centre % (2 * factor)
    return np.clip(first, 0, size - 1), np.clip(first + 1, 0, size - 1), weight


def upsample(x: Array, mode: str, factor: int) -> Array:
    """`factor` times as high and wide. "nearest": every pixel repeated. "bilinear", of potentials, factor a power of two:

    the mean of the four neighbours, corners not aligned, with whole weights whose sum is (2 factor)^2, rounded half up; for
    factor 2 these are 9, 3, 3, 1.
    """
    if mode == "nearest":
        return x.repeat(factor, axis=2).repeat(factor, axis=3)
    y = x.astype(np.int64)
    for axis in (2, 3):
        first, second, weight = neighbours(x.shape[axis], factor)
        weight = weight.reshape([-1 if i == axis else 1 for i in range(5)])
        y = y.take(first, axis) * (2 * factor - weight) + y.take(second, axis) * weight
    return rshift(y, 2 * factor.bit_length()).astype(np.int32)


def lif_step(
    v: Array, x: Array, decay: tuple[int, int], gain: tuple[int, int], threshold: int, reset: str, strict: bool,
    amount: int | None = None,
) -> tuple[Array, Array]:
    """One step of `lif`: (potential, input) -> (spikes u8, next potential)."""
    h = sat32(rshift(_times(v, decay[0]), decay[1]) + rshift(_times(x, gain[0]), gain[1]))
    s = h > threshold if strict else h >= threshold
    if reset == "hard":
        v = np.where(s, 0, h).astype(np.int32)
    elif reset == "soft":
        v = sat32(h.astype(np.int64) - s * np.int64(threshold if amount is None else amount))
    else:
        v = h
    return s.astype(np.uint8), v


def lif(
    x: Array, decay: tuple[int, int], gain: tuple[int, int], threshold: int, reset: str, steps: int, strict: bool,
    amount: int | None = None,
) -> Array:
    """`h = sat32(rshift(v decay) + rshift(x gain))`, spike where `h >= threshold` (`>` if strict), then the reset:

    hard `v = 0`, soft `v = sat32(h - amount)` (the threshold if None) where it fired, none; else `v = h`.
    """
    v = np.zeros(x.shape[1:], np.int32)
    spikes = np.empty((steps, *x.shape[1:]), np.uint8)
    for t in range(steps):
        spikes[t], v = lif_step(v, x[t if x.shape[0] > 1 else 0], decay, gain, threshold, reset, strict, amount)
    return spikes


def store(v: Array, table: Array) -> Array:
    """Potential -> code int8: the number of entries of the sorted table that are at most v, less half of them."""
    return (np.searchsorted(table, v, side="right") - len(table) // 2).astype(np.int8)


def lif_packed_step(
    c: Array, x: Array, decay: tuple[int, int], gain: tuple[int, int], threshold: int, reset: str, strict: bool,
    bits: int, table: Array, amount: int | None = None,
) -> tuple[Array, Array]:
    """One step of `lif_packed`: (code of the potential, input) -> (spikes u8, next code)."""
    spikes, v = lif_step(c, x, decay, gain, threshold, reset, strict, amount)
    return spikes, store(v, table)


def lif_packed(
    x: Array, decay: tuple[int, int], gain: tuple[int, int], threshold: int, reset: str, steps: int, strict: bool,
    bits: int, table: Array, amount: int | None = None,
) -> Array:
    """`lif` whose potential is kept as a signed code of `bits` bits: `decay` leads from the code to the potential, and
    after the reset `store` leads back. table: int32 `[2^bits - 2]`, sorted.
    """
    c = np.zeros(x.shape[1:], np.int8)
    spikes = np.empty((steps, *x.shape[1:]), np.uint8)
    for t in range(steps):
        now = x[t if x.shape[0] > 1 else 0]
        spikes[t], c = lif_packed_step(c, now, decay, gain, threshold, reset, strict, bits, table, amount)
    return spikes


def ielif_step(v: Array, x: Array, levels: int, decay: tuple[int, int], fraction_bits: int) -> tuple[Array, Array]:
    """One step of `ielif`: (potential, input) -> (counts u8, next potential)."""
    u = sat32(v.astype(np.int64) + x)
    n = np.clip(rshift(u, fraction_bits), 0, levels)
    return n.astype(np.uint8), sat32(rshift(_times(u - (n << fraction_bits), decay[0]), decay[1]))


def ielif(x: Array, levels: int, decay: tuple[int, int], steps: int, fraction_bits: int) -> Array:
    """`u = sat32(v + x)`, `n = clip(rshift(u, F), 0, D)`, `v = sat32(rshift((u - (n << F)) decay))`; y = n."""
    v = np.zeros(x.shape[1:], np.int32)
    counts = np.empty((steps, *x.shape[1:]), np.uint8)
    for t in range(steps):
        counts[t], v = ielif_step(v, x[t if x.shape[0] > 1 else 0], levels, decay, fraction_bits)
    return counts
