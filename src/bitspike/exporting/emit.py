"""The integer program under construction: fixed-point numbers, operations, packed tensors."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.exporting.trace import ExportError

Array = NDArray[Any]
_LIMIT = 2**31
_LARGEST_FACTOR = 2.0**30


def fixed_point(values: Array) -> tuple[Array, int]:
    """Real factors -> (int32 multipliers m, shift s) with values ~ m / 2^s and the largest m in [2^29, 2^30].

    Powers of two are exact; the error is at most 2^-30 of the largest factor. Errors: ExportError for factors of 2^30
    and more, which no network needs.

    >>> m, s = fixed_point(np.array([0.25, -3.0])); m.tolist(), s
    ([67108864, -805306368], 28)
    """
    top = float(np.max(np.abs(values), initial=0.0))
    if top == 0:
        return np.zeros(values.shape, np.int32), 0
    if not math.isfinite(top) or top >= _LARGEST_FACTOR:
        raise ExportError(f"a factor of {top:.3g} does not fit the fixed-point multipliers (at most 2^30).")
    shift = min(max(30 - math.frexp(top)[1], 0), 62)
    return np.rint(np.ldexp(values, shift)).astype(np.int32), shift


def fixed_pair(value: float) -> tuple[int, int]:
    """A real factor -> (m, s), value ~ m / 2^s, reduced: an exact fraction has its smallest m.

    >>> fixed_pair(0.5), fixed_pair(4.0), fixed_pair(0.0)
    ((1, 1), (4, 0), (0, 0))
    """
    multipliers, shift = fixed_point(np.array([value]))
    m = int(multipliers[0])
    while shift > 0 and m % 2 == 0:
        m, shift = m // 2, shift - 1
    return m, shift


@dataclass(frozen=True)
class Fine:
    """A second plane of codes: what the first one rounded off. source: its id; scale: of its codes, in units of the first's."""

    source: str
    scale: float
    pad_value: Array | None = None  # int [I]; None: zeros


@dataclass
class Conv:
    """A convolution that is not written yet, so that per-channel factors can still fold into it."""

    source: str  # id of the codes it reads
    codes: Array  # int [O, I/groups, kh, kw]
    scheme: dict[str, Any]  # {"kind", "bits"} of the artifact
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    pad_value: Array | None  # int [I]; None: zeros
    range: tuple[int, int]
    layer: str
    fine: Fine | None = None
    pools: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = field(default_factory=list)

    def largest(self) -> int:
        """Bound of |accumulator|, from the codes and the range of the input."""
        reach = max(abs(self.range[0]), abs(self.range[1]))
        if self.pad_value is not None and any(self.padding):
            reach = max(reach, int(np.abs(self.pad_value).max()))
        return int(np.abs(self.codes.astype(np.int64)).sum((1, 2, 3)).max()) * reach


class Program:
    """Operations in order and their tensors; `fraction_bits` F: a potential is value * 2^F; `prefix`: of tensors' names."""

    def __init__(self, fraction_bits: int, time_steps: int, prefix: str = "") -> None:
        self.fraction_bits, self.time_steps, self.prefix = fraction_bits, time_steps, prefix
        self.ops: list[dict[str, Any]] = []
        self.tensors: dict[str, Array] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.packed: dict[str, tuple[Array, dict[str, Any]]] = {}  # codes [O, kh, kw, I/groups] and their scheme
        self._weights: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.overflow = ""  # where a number did not fit; such a program must not be written

    @property
    def one(self) -> float:
        """The potential 1.0 as an integer."""
        return float(2**self.fraction_bits)

    def write(self, op: str, inputs: list[str], layer: str, **attributes: Any) -> str:
        """Append an operation; arrays among the attributes become tensors. Returns the id it writes."""
        out = f"v{len(self.ops) + 1}"
        entry: dict[str, Any] = {"op": op, "in": inputs, "out": out}
        for name, value in attributes.items():
            if isinstance(value, np.ndarray):
                # equal tensors are stored once: offsets of convolutions without bias and norm are all zeros
                value = self._names.setdefault((value.dtype.str, value.shape, value.tobytes()), f"{self.prefix}{out}.{name}")
                self.tensors.setdefault(value, attributes[name])
            entry[name] = value
        if layer:
            entry["layer"] = layer
        self.ops.append(entry)
        return out

    def _factors(self, a: Array, layer: str) -> tuple[Array, int]:
        top = float(np.abs(a).max(initial=0))
        if top >= _LARGEST_FACTOR:
            self.overflow = f"{layer}: a factor of {top / self.one:.3g}"  # fewer fraction bits may still hold it
            a = np.clip(np.nan_to_num(a), -_LARGEST_FACTOR / 2, _LARGEST_FACTOR / 2)
        try:
            return fixed_point(a)
        except ExportError as error:
            raise ExportError(f"{layer}: {error}") from error

    def pair(self, value: float) -> list[int]:
        """A real factor between potentials as [m, s]."""
        return list(fixed_pair(value))

    def factor(self, value: float, layer: str) -> tuple[int, int]:
        """A real factor from an accumulator to a potential as (m, s)."""
        m, s = self._factors(np.array([value * self.one]), layer)
        return int(m[0]), s

    def factors(self, values: Array, layer: str) -> tuple[Array | int, int]:
        """Real factors from accumulators to potentials: (m, s), m one number where all are equal."""
        m, s = self._factors(values * self.one, layer)
        return (int(m.flat[0]) if (m == m.flat[0]).all() else m), s

    def _offsets(self, b: Array, layer: str) -> Array:
        offsets = np.rint(b * self.one)
        if np.abs(offsets).max(initial=0) >= _LIMIT:
            self.overflow = f"{layer}: an offset of {np.abs(b).max():.3g}"  # fewer fraction bits may still hold it
            offsets = np.clip(offsets, 1 - _LIMIT, _LIMIT - 1)
        return offsets.astype(np.int32)

    def conv(self, conv: Conv, a: Array, b: Array) -> str:
        """Write a convolution: potential = a[o] * accumulator + b[o]."""
        largest = conv.largest()
        if largest >= _LIMIT:
            raise ExportError(f"{conv.layer}: an accumulator may reach {largest}, past 2^31. Use fewer weight bits or fewer "
                              "input channels.")
        weight = self._weight(np.ascontiguousarray(conv.codes.transpose(0, 2, 3, 1)), conv.scheme)
        result = self._one_conv(conv, conv.source, weight, a, b, conv.pad_value)
        if conv.fine is not None:
            second = self._one_conv(conv, conv.fine.source, weight, a * conv.fine.scale, np.zeros_like(b), conv.fine.pad_value)
            result = self.write("add", [result, second], conv.layer)
        for kernel, stride, padding in conv.pools:
            result = self.maxpool(result, kernel, stride, padding, conv.layer)
        return result

    def _weight(self, codes: Array, scheme: dict[str, Any]) -> str:
        """The tensor of these codes; a convolution that runs on several maps is stored once."""
        key = (str(scheme), codes.shape, codes.tobytes())
        name = self._weights.setdefault(key, f"{self.prefix}v{len(self.ops) + 1}.weight")
        self.packed[name] = (codes, scheme)
        return name

    def _one_conv(self, conv: Conv, source: str, weight: str, a: Array, b: Array, pad_value: Array | None) -> str:
        m, s = self._factors(a * self.one, conv.layer)
        extra: dict[str, Any] = {}
        if pad_value is not None and pad_value.any() and any(conv.padding):
            extra["pad_value"] = pad_value.astype(np.int16)
        return self.write("conv", [source], conv.layer, weight=weight, scheme=conv.scheme, shape=list(conv.codes.shape),
                          stride=list(conv.stride), padding=list(conv.padding), groups=conv.groups, m=m, s=s,
                          b=self._offsets(b, conv.layer), range=list(conv.range), **extra)

    def affine(self, source: str, a: Array, b: Array, from_potential: bool, layer: str) -> str:
        """potential = a[c] * (potential or code) + b[c]."""
        m, s = self._factors(a if from_potential else a * self.one, layer)
        offsets = self._offsets(b, layer)
        uniform = bool((m == m[0]).all() and (offsets == offsets[0]).all())
        return self.write("affine", [source], layer, m=int(m[0]) if uniform else m, s=s,
                          b=int(offsets[0]) if uniform else offsets)

    def quantize(self, source: str, factor: Array, low: int, high: int, dtype: str, layer: str) -> str:
        """codes = clip(round(factor[c] * x), low, high) of a real x given as a potential."""
        if (factor == factor[0]).all():
            m, s = fixed_pair(float(factor[0]))
            if s + self.fraction_bits > 62:
                m, s = fixed_pair(float(factor[0]) / self.one)
                return self.write("quantize", [source], layer, m=m, s=s, lo=low, hi=high, dtype=dtype)
            return self.write("quantize", [source], layer, m=m, s=s + self.fraction_bits, lo=low, hi=high, dtype=dtype)
        multipliers, shift = self._factors(factor / self.one, layer)
        return self.write("quantize", [source], layer, m=multipliers, s=shift, lo=low, hi=high, dtype=dtype)

    def maxpool(self, source: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
                layer: str) -> str:
        """Maximum over windows, of any kind of value."""
        return self.write("maxpool", [source], layer, kernel=list(kernel), stride=list(stride), padding=list(padding))
