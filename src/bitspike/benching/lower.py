"""A checked integer program as a float network: one walk over the ops, any engine behind it.

The float network computes the function of the program up to rounding: potentials are not rounded to 2^-F, and a tie at a
threshold may fall the other way. What an engine of floats would not do is left out: no saturation, multipliers and biases are
folded into the weights, the two 8-bit planes of normalised pixels become one convolution again.

Potentials are carried in units of `unit` (the gain that most neurons of the program have), so that a neuron is
`clip(round(x), lo, hi)` with no product in front; a neuron with another gain has it folded into the convolution before it.
Values are [steps * B, C, H, W].
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.ops import conv as integer_conv
from bitspike.deploy.program import Op, Program

Array = NDArray[Any]
Pair = tuple[int, int]


class PeerError(ValueError):
    """The network cannot be built for another engine."""


@dataclass(frozen=True)
class Codes:
    """Integer codes of a value in the float network: value = code * step, code in lo..hi."""

    lo: int
    hi: int
    step: float = 1.0


class Builder(Protocol):
    """What an engine must be able to do. A `ref` is whatever it calls a value of the graph."""

    def pixels(self, scale_C: Array, shift_C: Array, codes: Codes) -> Any:
        """The picture, `x * scale + shift`; `codes`: how an int8 engine may quantize it."""

    def conv(
        self, x: Any, codes: Codes, weight: Array, scale_O: Array, bias_O: Array, stride: Pair, padding: Pair, groups: int,
        feeds_neuron: bool, name: str,
    ) -> Any:
        """Convolution of `x` with int8 `weight` [O, I / groups, kh, kw] times `scale_O`, plus bias."""

    def neuron(self, x: Any, gain: Array | None, codes: Codes) -> Any:
        """`clip(round(x * gain), lo, hi) * step`."""

    def affine(self, x: Any, scale_C: Array, shift_C: Array | None) -> Any:
        """`x * scale + shift`."""

    def add(self, a: Any, b: Any) -> Any:
        """Sum."""

    def add_constant(self, x: Any, map_CHW: Array) -> Any:
        """Sum with a constant picture."""

    def attention(self, q: Any, k: Any, v: Any, heads: int, shape_CHW: tuple[int, int, int], scale: float) -> Any:
        """`q (k^T v) * scale` per head."""

    def attention_map(self, a: Any, b: Any, over: str, heads: int, scale: float) -> Any:
        """Per head `a^T b` over channels or `a b^T` over tokens, [steps * B, heads, rows, columns]."""

    def attention_read(self, chosen: Any, x: Any, over: str, shape_CHW: tuple[int, int, int], scale_Th: Array) -> Any:
        """`x M^T` over tokens or `M x` over channels, times a number per step (or one) and head."""

    def coincidences(self, k: Any, v: Any, scale: float) -> Any:
        """Sum of `k v` over H and W."""

    def product(self, x: Any, factor: Any, codes: Codes) -> Any:
        """Codes times codes [.., C, 1, 1]."""

    def total(self, a: Any, b: Any, codes: Codes) -> Any:
        """Sum of codes."""

    def maxpool(self, x: Any, kernel: Pair, stride: Pair, padding: Pair) -> Any:
        """Window maximum."""

    def mean_space(self, x: Any) -> Any:
        """Mean over H and W, which become 1."""

    def split(self, x: Any, steps: int) -> list[Any]:
        """[steps * B, ...] into its steps."""

    def join(self, parts: list[Any], codes: Codes | None) -> Any:
        """Back again; `codes` if these are spikes or counts."""

    def lif_step(self, v: Any | None, x: Any, decay: float, threshold: float, strict: bool, reset: str,
                 amount: float) -> tuple[Any, Any]:
        """(spikes, potential after the reset, a soft one of `amount`); v None is 0."""

    def tanh(self, x: Any, scale: float) -> Any:
        """tanh(x * scale)."""

    def ielif_step(self, v: Any | None, x: Any, decay: float, one: float, levels: int) -> tuple[Any, Any]:
        """(count, what is left of the potential)."""


@dataclass(frozen=True)
class _Value:
    ref: Any
    steps: int
    codes: Codes | None = None  # None: a potential
    is_map: bool = False        # of attention: [steps * B, heads, rows, columns]
    gain: float = 1.0           # of the neuron that reads a potential: already in it


def _gains(op: Op, fraction: float) -> list[float]:
    if op.name == "quantize" and np.ndim(op.attributes["m"]) == 0:
        return [float(op.attributes["m"]) * 2.0 ** -op.attributes["s"] * fraction]
    return [1.0] if op.name == "ielif" else []


def unit_of(program: Program, fraction_bits: int) -> float:
    """The gain that most neurons have: potentials are carried in its units."""
    fraction = 2.0**fraction_bits
    counted = Counter(g for op in program.ops if op.name != "quantize" or op.attributes["dtype"] == "u8"
                      for g in _gains(op, fraction) if g > 0)
    return counted.most_common(1)[0][0] if counted else 1.0


def _line(table: Array) -> tuple[Array, Array, float]:
    """Slope and offset per channel of tables [C, 256], and the largest distance from the line."""
    x = np.arange(256.0)
    fit = np.stack([np.polyfit(x, row, 1) for row in table])
    distance = float(np.abs(table - fit[:, :1] * x - fit[:, 1:]).max())
    return fit[:, 0], fit[:, 1], distance


@dataclass(frozen=True)
class _Kept:
    """A potential between steps: `clip(round(x * gain))`, of its tanh or of itself."""

    tanh: bool
    gain: float
    codes: Codes


@dataclass(frozen=True)
class _Picture:
    """A table of the pixels, possibly of two planes: code = main + ratio * rest."""

    table: Array  # float64 [C, 256]


class _Lowering:
    def __init__(self, program: Program, fraction_bits: int, builder: Builder) -> None:
        self.program, self.builder = program, builder
        self.fraction = 2.0**fraction_bits
        self.unit = unit_of(program, fraction_bits)
        self.to_unit = self.unit / self.fraction  # integer potential -> float potential
        self.values: dict[str, _Value] = {}
        self.writer = {op.output: op for op in program.ops}
        self.readers: dict[str, list[Op]] = {}
        for op in program.ops:
            for name in op.inputs:
                self.readers.setdefault(name, []).append(op)
        self.planes: dict[str, float] = {}     # output of a rest's convolution -> its ratio to the main one
        self.joined: dict[str, str] = {}       # add -> the main convolution, for two planes
        self._find_planes()

    # ------------------------------------------------------------------------------------ pixels in two planes
    def _from_table(self, name: str) -> Op | None:
        op = self.writer.get(name)
        if op is None or op.name != "conv" or len(self.readers[name]) != 1:
            return None
        source = self.writer.get(op.inputs[0])
        return op if source is not None and source.name == "lookup" else None

    def _find_planes(self) -> None:
        for op in self.program.ops:
            if op.name != "add":
                continue
            pair = [self._from_table(name) for name in op.inputs]
            if None in pair:
                continue
            main, rest = sorted(pair, key=lambda c: -float(np.abs(self._conv_scale(c)).max()))  # type: ignore[arg-type]
            assert main is not None and rest is not None
            a, b = self._conv_scale(main), self._conv_scale(rest)
            same = main.attributes["weight"].shape == rest.attributes["weight"].shape and np.array_equal(
                main.attributes["weight"], rest.attributes["weight"])
            ratio = float(np.median(b / np.where(a == 0, 1, a)))
            if same and np.allclose(a * ratio, b, rtol=1e-3, atol=1e-30):
                self.planes[rest.output] = ratio
                self.joined[op.output] = main.output

    @staticmethod
    def _conv_scale(op: Op) -> Array:
        return np.asarray(op.attributes["m"], np.float64) * 2.0 ** -op.attributes["s"]

    def _picture_codes(self, main: Op, rest: Op | None) -> tuple[_Value, Array, Array]:
        """(the picture as the convolution wants it, its pad value, the bias of both planes)."""
        table = self.writer[main.inputs[0]].attributes["table"].astype(np.float64)
        pad = main.attributes["pad_value"].astype(np.float64)
        bias = main.attributes["b"].astype(np.float64)
        if rest is not None:
            ratio = self.planes[rest.output]
            table = table + ratio * self.writer[rest.inputs[0]].attributes["table"]
            pad = pad + ratio * rest.attributes["pad_value"]
            bias = bias + rest.attributes["b"]
        slope, offset, distance = _line(table)
        if distance > 0.02 * np.ptp(table):
            raise PeerError(f"{main.layer or main.output}: the table of its pixels is no straight line, which another engine "
                            "could not compute fast; bench without --peers.")
        codes = Codes(-127, 127)
        return _Value(self.builder.pixels(slope, offset, codes), 1, codes), pad, bias

    # -------------------------------------------------------------------------------------------------- the ops
    def run(self) -> Any:
        skipped = {name for name, _ in self.planes.items()}
        for op in self.program.ops:
            if op.output in skipped or (op.name == "lookup" and all(
                    r.name == "conv" for r in self.readers.get(op.output, []))):
                continue
            if op.output in self.joined:
                self.values[op.output] = self.values[self.joined[op.output]]
                continue
            handle = getattr(self, f"_{op.name}", None)
            if handle is None or self._misreads_a_map(op):
                raise PeerError(f"{op.layer or op.output}: no other engine is given the op {op.name!r} yet; bench without "
                                "--peers.")
            self.values[op.output] = handle(op)
        result = self.values[self.program.output]
        return self.builder.affine(result.ref, np.array([1 / self.unit]), None) if self.unit != 1 else result.ref

    def _misreads_a_map(self, op: Op) -> bool:
        """Only a neuron of one threshold and `attention_read` know what to do with a map of attention."""
        if not any(name in self.values and self.values[name].is_map for name in op.inputs):
            return False
        single = op.name != "quantize" or np.ndim(op.attributes["m"]) == 0
        in_place = op.name == "attention_read" and not self._in(op, 1).is_map
        return not (in_place or (op.name in ("quantize", "lif", "lif_packed", "ielif") and single))

    def _in(self, op: Op, index: int = 0) -> _Value:
        name = op.inputs[index]
        if name == "pixels" and name not in self.values:
            channels = self.program.values[name].channels
            codes = Codes(0, 255)
            self.values[name] = _Value(self.builder.pixels(np.ones(channels), np.zeros(channels), codes), 1, codes)
        return self.values[name]

    def _conv(self, op: Op) -> _Value:
        a: Mapping[str, Any] = op.attributes
        source = self.writer.get(op.inputs[0])
        scale = self._conv_scale(op)
        pad, bias = a["pad_value"].astype(np.float64), a["b"].astype(np.float64)
        if source is not None and source.name == "lookup":
            adds = [r for r in self.readers.get(op.output, []) if self.joined.get(r.output) == op.output]
            other = [n for n in adds[0].inputs if n != op.output] if adds else []
            x, pad, bias = self._picture_codes(op, self.writer[other[0]] if other else None)
        else:
            x = self._in(op)
        codes = x.codes
        assert codes is not None
        weight = np.ascontiguousarray(np.moveaxis(a["weight"], 3, 1))
        readers = self.readers.get(op.output, [])
        border = any(a["padding"]) and bool(pad.any())
        to_neuron = bool(readers) and all(r.name == "quantize" for r in readers) and not border
        gain = self._folded(op, readers) if to_neuron else 1.0
        unit = self.to_unit * gain
        ref = self.builder.conv(x.ref, codes, weight, scale * unit / codes.step, bias * unit, a["stride"], a["padding"],
                                a["groups"], to_neuron, op.output)
        if border:
            ref = self.builder.add_constant(ref, self._border(op, pad, scale))
        return _Value(ref, x.steps, gain=gain)

    def _gain(self, op: Op) -> Array:
        """What a neuron multiplies the potential by: one number, or one per channel."""
        return np.asarray(op.attributes["m"], np.float64) * 2.0 ** -op.attributes["s"] / self.to_unit

    def _folded(self, conv: Op, readers: list[Op]) -> float:
        """The gain of the one neuron of spikes or counts that reads a convolution nothing else reads; or 1."""
        gain = self._gain(readers[0])
        alone = len(readers) == 1 and conv.output != self.program.output
        # A gain of 0 stays where it is: nothing could be divided by it again.
        return float(gain) if alone and readers[0].attributes["dtype"] == "u8" and gain.ndim == 0 and gain != 0 else 1.0

    def _border(self, op: Op, pad: Array, scale: Array) -> Array:
        """What pixels outside the picture contribute, [O, H, W]: the same for every picture."""
        a, x = op.attributes, self.program.values[op.inputs[0]]
        outside = np.round(pad * 2.0**16).astype(np.int64)  # planes have fractions of a code
        acc = np.zeros(())
        one, zero = np.ones(len(scale), np.int64), np.zeros(len(scale), np.int64)
        for part, weight in (((outside >> 16).astype(np.int64), 1.0), ((outside & 0xFFFF), 2.0**-16)):
            empty = np.zeros((1, 1, x.height, x.width, x.channels), np.int64)
            acc = acc + weight * integer_conv(empty, a["weight"], a["stride"], a["padding"], a["groups"], part, m=one, s=0,
                                              b=zero)
        return np.moveaxis(acc[0, 0] * (scale * self.to_unit), 2, 0)

    def _quantize(self, op: Op) -> _Value:
        a, x = op.attributes, self._in(op)
        gain = self._gain(op) / x.gain
        if gain.ndim:
            codes = Codes(a["lo"], a["hi"])
            return _Value(self.builder.neuron(x.ref, gain, codes), x.steps, codes, x.is_map)
        if abs(float(gain) - 1) < 1e-9 or a["dtype"] == "u8":
            codes = Codes(a["lo"], a["hi"])
        else:  # signed codes stay in units of the potential: an int8 engine quantizes with this step
            codes = Codes(a["lo"], a["hi"], 1 / float(gain))
        return _Value(self.builder.neuron(x.ref, None if abs(float(gain) - 1) < 1e-9 else gain, codes), x.steps, codes,
                      x.is_map)

    def _potential_scale(self, x: _Value) -> float:
        """Float value -> the integer it stands for, times to_unit."""
        return 1.0 if x.codes is None else self.to_unit / x.codes.step

    def _affine(self, op: Op) -> _Value:
        a, x = op.attributes, self._in(op)
        scale = np.atleast_1d(np.asarray(a["m"], np.float64)) * 2.0 ** -a["s"] * self._potential_scale(x)
        shift = np.atleast_1d(np.asarray(a["b"], np.float64)) * self.to_unit
        return _Value(self.builder.affine(x.ref, scale, shift if shift.any() else None), x.steps)

    def _spread(self, x: _Value, steps: int) -> Any:
        return x.ref if x.steps == steps else self.builder.join([x.ref] * steps, x.codes)

    def _add(self, op: Op) -> _Value:
        a, b = self._in(op, 0), self._in(op, 1)
        steps = max(a.steps, b.steps)
        return _Value(self.builder.add(self._spread(a, steps), self._spread(b, steps)), steps)

    def _attention(self, op: Op) -> _Value:
        parts = [self._in(op, i) for i in range(3)]
        steps = max(p.steps for p in parts)
        y = self.program.values[op.output]
        scale = op.attributes["m"] * 2.0 ** -op.attributes["s"] * self.to_unit
        for p in parts:
            assert p.codes is not None
            scale /= p.codes.step
        q, k, v = (self._spread(p, steps) for p in parts)
        return _Value(self.builder.attention(q, k, v, op.attributes["heads"], (y.channels, y.height, y.width), scale), steps)

    def _products(self, op: Op) -> tuple[list[Any], int, float]:
        """Inputs in equal steps, how many, and what one product of their values is worth in steps of the potential."""
        parts = [self._in(op, i) for i in range(len(op.inputs))]
        steps, worth = max(p.steps for p in parts), self.to_unit
        for p in parts:
            assert p.codes is not None
            worth /= p.codes.step
        return [self._spread(p, steps) for p in parts], steps, worth

    def _attention_map(self, op: Op) -> _Value:
        (a, b), steps, worth = self._products(op)
        at = op.attributes
        scale = at["m"] * 2.0 ** -at["s"] * worth
        return _Value(self.builder.attention_map(a, b, at["over"], at["heads"], scale), steps, None, True)

    def _attention_read(self, op: Op) -> _Value:
        (chosen, x), steps, worth = self._products(op)
        at, y = op.attributes, self.program.values[op.output]
        scale = np.broadcast_to(np.asarray(at["m"], np.float64) * 2.0 ** -at["s"] * worth,
                                np.shape(at["m"]) if np.ndim(at["m"]) else (1, at["heads"]))
        ref = self.builder.attention_read(chosen, x, at["over"], (y.channels, y.height, y.width), scale)
        return _Value(ref, steps)

    def _coincidences(self, op: Op) -> _Value:
        (k, v), steps, worth = self._products(op)
        return _Value(self.builder.coincidences(k, v, op.attributes["m"] * 2.0 ** -op.attributes["s"] * worth), steps)

    def _codes_of(self, op: Op) -> Codes:
        value = self.program.values[op.output]
        return Codes(value.lo, value.hi)

    def _mask(self, op: Op) -> _Value:
        (x, factor), steps, _ = self._products(op)
        return _Value(self.builder.product(x, factor, self._codes_of(op)), steps, self._codes_of(op))

    def _sum(self, op: Op) -> _Value:
        (a, b), steps, _ = self._products(op)
        return _Value(self.builder.total(a, b, self._codes_of(op)), steps, self._codes_of(op))

    def _maxpool(self, op: Op) -> _Value:
        a, x = op.attributes, self._in(op)
        return _Value(self.builder.maxpool(x.ref, a["kernel"], a["stride"], a["padding"]), x.steps, x.codes)

    def _mean(self, op: Op) -> _Value:
        a, x = op.attributes, self._in(op)
        if a["over"] == "space":
            ref, steps = self.builder.mean_space(x.ref), x.steps
            factor = 1.0
        else:
            parts = self.builder.split(x.ref, x.steps) if x.steps > 1 else [x.ref]
            ref = parts[0]
            for part in parts[1:]:
                ref = self.builder.add(ref, part)
            steps, factor = 1, 1 / x.steps
        scale = a["m"] * factor * self._potential_scale(x)
        return _Value(ref if scale == 1 else self.builder.affine(ref, np.array([scale]), None), steps)

    def _drive(self, x: _Value, steps: int) -> list[Any]:
        return self.builder.split(x.ref, x.steps) if x.steps > 1 else [x.ref] * steps

    def _lif(self, op: Op) -> _Value:
        a, x = op.attributes, self._in(op)
        gain = a["gain"][0] * 2.0 ** -a["gain"][1]
        decay = a["decay"][0] * 2.0 ** -a["decay"][1]
        threshold = a["threshold"] * self.to_unit
        amount = threshold if a.get("amount") is None else a["amount"] * self.to_unit
        kept = self._kept(op) if op.name == "lif_packed" else None
        decay *= self.to_unit if kept is not None else 1  # from a code to the potential
        spikes, v = [], None
        for step, drive in enumerate(self._drive(x, a["steps"])):
            if gain != 1:
                drive = self.builder.affine(drive, np.array([gain]), None)
            last = step + 1 == a["steps"]  # nobody asks for the last potential
            s, v = self.builder.lif_step(v, drive, decay, threshold, a["strict"], "none" if last else a["reset"], amount)
            if kept is not None and not last:
                if kept.tanh:
                    v = self.builder.tanh(v, 1 / self.unit)
                v = self.builder.neuron(v, np.array(kept.gain), kept.codes)
            spikes.append(s)
        codes = Codes(0, 1)
        return _Value(self.builder.join(spikes, codes), a["steps"], codes, x.is_map)

    def _kept(self, op: Op) -> _Kept:
        """How a potential of few bits is stored: in equal steps, or in equal steps of its tanh."""
        table = np.asarray(op.attributes["table"], np.float64)
        highest = len(table) // 2
        known = np.abs(table) < 2.0**31 - 1  # others are infinite: the codes behind them are never reached
        number = np.arange(len(table)) - highest + 0.5
        for tanh in (False, True):
            edges = np.tanh(table / self.fraction) if tanh else table
            gap = float(np.median(np.diff(edges)[known[1:] & known[:-1]])) if known.sum() > 1 else float(edges.max() * 2)
            slack = 2 / self.fraction if tanh else 1  # of rounding to whole potentials
            if gap > 0 and np.abs(edges - number * gap)[known].max() <= 0.02 * gap + slack:
                return _Kept(tanh, 1 / gap if tanh else 1 / (gap * self.to_unit), Codes(-highest, highest))
        raise PeerError(f"{op.layer or op.output}: its potential is stored in steps equal neither by themselves nor as "
                        "tanh, which other engines are not given; bench without --peers.")

    _lif_packed = _lif

    def _ielif(self, op: Op) -> _Value:
        a, x = op.attributes, self._in(op)
        decay = a["decay"][0] * 2.0 ** -a["decay"][1]
        counts, v = [], None
        for drive in self._drive(x, a["steps"]):
            n, v = self.builder.ielif_step(v, drive, decay, self.unit, a["levels"])
            counts.append(n)
        codes = Codes(0, a["levels"])
        return _Value(self.builder.join(counts, codes), a["steps"], codes, x.is_map)


def lower(program: Program, fraction_bits: int, builder: Builder) -> Any:
    """Give the program to a builder; returns its ref of the logits, [B, classes, 1, 1].

    Errors: PeerError for an op or a table of pixels that no other engine is given.
    """
    return _Lowering(program, fraction_bits, builder).run()


@dataclass(frozen=True)
class Lowered:
    """Where a builder put the values: integer id -> (ref, integer value times this is the float value)."""

    output: Any
    values: Mapping[str, tuple[Any, float, bool]]  # the last: a map of attention


def lower_with_values(program: Program, fraction_bits: int, builder: Builder) -> Lowered:
    """As `lower`, with the place of every value that exists on both sides."""
    lowering = _Lowering(program, fraction_bits, builder)
    output = lowering.run()
    first = {lowering.joined[name] for name in lowering.joined}  # one plane of two: no value of the float network
    places = {name: (v.ref, lowering.to_unit * v.gain if v.codes is None else v.codes.step, v.is_map)
              for name, v in lowering.values.items() if name not in first and name != "pixels"}
    return Lowered(output, places)
