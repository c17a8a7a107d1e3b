# ruff: noqa: D102 - the methods of a kernel set are the functions of `ops`, described there
"""The sets of kernels on this machine, and which one runs.

`available()` lists them, slowest first: "numpy" (the definition, always there), then what the extension has for this CPU:
"scalar", "avx2", "avx512", "amx" (AVX-512 and a matrix unit). All give the same integers; the last is used unless
`use(name)` says otherwise.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from bitspike.deploy import ops
from bitspike.deploy.errors import KernelError
from bitspike.deploy.ops import Array

try:
    from bitspike.deploy import _kernels  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # no extension was built for this machine: numpy alone is complete, only slower
    _kernels = None

Pair = tuple[int, int]
#: a convolution with its weights laid out for one set of kernels: (x, threads) -> y
PreparedConv = Callable[[Array, int], Array]


class KernelSet(Protocol):
    """The operations of `bitspike.deploy.ops`, same arguments, and how many threads may work on them."""

    name: str

    def prepare_conv(
        self, weight: Array, stride: Pair, padding: Pair, groups: int, pad_value: Array, m: Array, s: int, b: Array,
        signed: bool,
    ) -> PreparedConv: ...
    def lookup(self, x: Array, table: Array, threads: int) -> Array: ...
    def quantize(self, x: Array, m: int | Array, s: int, lo: int, hi: int, dtype: str, threads: int) -> Array: ...
    def affine(self, x: Array, m: int | Array, s: int, b: int | Array, threads: int) -> Array: ...
    def add(self, a: Array, b: Array, threads: int) -> Array: ...
    def attention(self, q: Array, k: Array, v: Array, heads: int, m: int, s: int, threads: int) -> Array: ...
    def maxpool(self, x: Array, kernel: Pair, stride: Pair, padding: Pair, threads: int) -> Array: ...
    def mean(self, x: Array, over: str, m: int, threads: int) -> Array: ...
    def lif(
        self, x: Array, decay: Pair, gain: Pair, threshold: int, reset: str, steps: int, strict: bool, threads: int
    ) -> Array: ...
    def ielif(self, x: Array, levels: int, decay: Pair, steps: int, fraction_bits: int, threads: int) -> Array: ...


class _Numpy:
    name = "numpy"

    def prepare_conv(
        self, weight: Array, stride: Pair, padding: Pair, groups: int, pad_value: Array, m: Array, s: int, b: Array,
        signed: bool,
    ) -> PreparedConv:
        return lambda x, threads: ops.conv(x, weight, stride, padding, groups, pad_value, m, s, b)

    def lookup(self, x: Array, table: Array, threads: int) -> Array:
        return ops.lookup(x, table)

    def quantize(self, x: Array, m: int | Array, s: int, lo: int, hi: int, dtype: str, threads: int) -> Array:
        return ops.quantize(x, m, s, lo, hi, dtype)

    def affine(self, x: Array, m: int | Array, s: int, b: int | Array, threads: int) -> Array:
        return ops.affine(x, m, s, b)

    def add(self, a: Array, b: Array, threads: int) -> Array:
        return ops.add(a, b)

    def attention(self, q: Array, k: Array, v: Array, heads: int, m: int, s: int, threads: int) -> Array:
        return ops.attention(q, k, v, heads, m, s)

    def maxpool(self, x: Array, kernel: Pair, stride: Pair, padding: Pair, threads: int) -> Array:
        return ops.maxpool(x, kernel, stride, padding)

    def mean(self, x: Array, over: str, m: int, threads: int) -> Array:
        return ops.mean(x, over, m)

    def lif(
        self, x: Array, decay: Pair, gain: Pair, threshold: int, reset: str, steps: int, strict: bool, threads: int
    ) -> Array:
        return ops.lif(x, decay, gain, threshold, reset, steps, strict)

    def ielif(self, x: Array, levels: int, decay: Pair, steps: int, fraction_bits: int, threads: int) -> Array:
        return ops.ielif(x, levels, decay, steps, fraction_bits)


def _numbers(*values: int | Array) -> tuple[Array, ...]:
    """Numbers or per-channel arrays as int32 vectors of one common length."""
    vectors = (np.atleast_1d(np.asarray(v, np.int32)) for v in values)
    return tuple(np.ascontiguousarray(v) for v in np.broadcast_arrays(*vectors))


def _window_shape(x: Array, kernel: Pair, stride: Pair, padding: Pair, channels: int) -> tuple[int, ...]:
    height, width = (max(0, ops.windows(x.shape[2 + i], kernel[i], stride[i], padding[i])) for i in (0, 1))
    return (*x.shape[:2], height, width, channels)


class _Compiled:
    """One instruction set of the extension: allocates the output, the extension checks and fills it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare_conv(
        self, weight: Array, stride: Pair, padding: Pair, groups: int, pad_value: Array, m: Array, s: int, b: Array,
        signed: bool,
    ) -> PreparedConv:
        run = _kernels.Conv(
            self.name, np.ascontiguousarray(weight), stride, padding, groups, np.ascontiguousarray(pad_value, np.int16),
            *_numbers(m), s, *_numbers(b), signed,
        )
        outputs, kh, kw, _ = weight.shape

        def conv(x: Array, threads: int) -> Array:
            y = np.empty(_window_shape(x, (kh, kw), stride, padding, outputs), np.int32)
            run(x, y, threads)
            return y

        return conv

    def lookup(self, x: Array, table: Array, threads: int) -> Array:
        y = np.empty(x.shape, np.int8)
        _kernels.lookup(self.name, x, table, y, threads)
        return y

    def quantize(self, x: Array, m: int | Array, s: int, lo: int, hi: int, dtype: str, threads: int) -> Array:
        y = np.empty(x.shape, np.uint8 if dtype == "u8" else np.int8)
        _kernels.quantize(self.name, x, *_numbers(m), s, lo, hi, y, threads)
        return y

    def affine(self, x: Array, m: int | Array, s: int, b: int | Array, threads: int) -> Array:
        y = np.empty(x.shape, np.int32)
        multiplier, bias = _numbers(m, b)
        _kernels.affine(self.name, x, multiplier, s, bias, y, threads)
        return y

    def add(self, a: Array, b: Array, threads: int) -> Array:
        y = np.empty(np.broadcast_shapes(a.shape, b.shape), np.int32)
        _kernels.add(self.name, a, b, y, threads)
        return y

    def attention(self, q: Array, k: Array, v: Array, heads: int, m: int, s: int, threads: int) -> Array:
        y = np.empty(np.broadcast_shapes(q.shape, k.shape, v.shape), np.int32)
        _kernels.attention(self.name, q, k, v, heads, m, s, y, threads)
        return y

    def maxpool(self, x: Array, kernel: Pair, stride: Pair, padding: Pair, threads: int) -> Array:
        y = np.empty(_window_shape(x, kernel, stride, padding, x.shape[4]), x.dtype)
        _kernels.maxpool(self.name, x, kernel, stride, padding, y, threads)
        return y

    def mean(self, x: Array, over: str, m: int, threads: int) -> Array:
        steps, batch, height, width, channels = x.shape
        shape = (steps, batch, 1, 1, channels) if over == "space" else (1, batch, height, width, channels)
        y = np.empty(shape, np.int32)
        _kernels.mean(self.name, x, over == "time", m, y, threads)
        return y

    def lif(
        self, x: Array, decay: Pair, gain: Pair, threshold: int, reset: str, steps: int, strict: bool, threads: int
    ) -> Array:
        y = np.empty((steps, *x.shape[1:]), np.uint8)
        _kernels.lif(self.name, x, decay, gain, threshold, reset, strict, y, threads)
        return y

    def ielif(self, x: Array, levels: int, decay: Pair, steps: int, fraction_bits: int, threads: int) -> Array:
        y = np.empty((steps, *x.shape[1:]), np.uint8)
        _kernels.ielif(self.name, x, levels, decay, fraction_bits, y, threads)
        return y


_SETS: dict[str, KernelSet] = {"numpy": _Numpy()}
if _kernels is not None:
    _SETS.update({name: _Compiled(name) for name in _kernels.available()})
_active: KernelSet = list(_SETS.values())[-1]


def available() -> list[str]:
    """Names of the kernel sets that run here, slowest first.

    >>> available()[0]
    'numpy'
    """
    return list(_SETS)


def active() -> str:
    """Name of the kernel set that networks run on now."""
    return _active.name


def get(name: str) -> KernelSet:
    """The kernel set of that name.

    Raises:
        KernelError: this build or this CPU has none of that name.

    >>> get("abacus")
    Traceback (most recent call last):
    bitspike.deploy.errors.KernelError: kernels: there is no set 'abacus' here. Available: ...
    """
    if not isinstance(name, str) or name not in _SETS:
        hint = "" if _kernels is not None else " (the compiled extension is not installed)"
        raise KernelError(f"kernels: there is no set {name!r} here. Available: {', '.join(_SETS)}{hint}")
    return _SETS[name]


def extension(name: str | None = None) -> Any:
    """The compiled module, if the kernel set `name` is in it; None as a name: if there is one."""
    return None if name == "numpy" else _kernels


def use(name: str) -> None:
    """Run every network of this process on the kernel set `name`, from its next call on.

    Raises:
        KernelError: this build or this CPU has none of that name.
    """
    global _active
    _active = get(name)
