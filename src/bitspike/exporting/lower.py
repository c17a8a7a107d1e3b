"""Operations on values: how each piece of a network becomes integer operations of a `Program`."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from bitspike.exporting.emit import Array, Conv, Fine, Program
from bitspike.exporting.membrane import membrane_table
from bitspike.exporting.trace import ExportError
from bitspike.neurons import IELIF, LIF

_PLANE = 254  # codes of the fine plane per step of the coarse one
_MOST = 255  # largest code of kind u8


@dataclass(frozen=True)
class Value:
    """The real tensor `a[c] * raw + b[c]`; raw: codes of `source`, its potential / 2^F, or an accumulator of a `Conv`."""

    source: str | Conv
    kind: str  # "u8", "s8", "i32"; "acc" for a Conv
    a: Array  # float64 [C]
    b: Array
    height: int
    width: int
    steps: int
    range: tuple[int, int] = (0, 0)  # of codes
    top: Array | None = None  # largest |x| seen in calibration, [C] or [1]
    grid: tuple[float, int] | None = None  # x is a whole multiple 0..n of this step: (step, n)
    border: tuple[int, Array] | None = None  # pixels around it that are not stored yet, and their value [C]
    pixels: bool = False

    @property
    def channels(self) -> int:
        """C."""
        return len(self.a)

    @property
    def plain(self) -> bool:
        """Is raw already the potential of the value?"""
        return self.kind == "i32" and bool((self.a == 1).all() and (self.b == 0).all())


@dataclass
class Codes:
    """Weight codes [O, I/groups, kh, kw] with a scale per output channel."""

    codes: Array
    scale: Array  # float64 [O]
    scheme: dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One matrix product of the program, for the report."""

    name: str
    scheme: str
    bits: int
    weights: int
    input: str  # "pixels", "spikes", "counts", "codes"
    from_float: bool  # the model keeps it in full precision


def weight_codes(weight: Tensor, fold: Array | None = None) -> Codes:
    """Full-precision weights [O, ...] -> 8-bit codes per output channel; fold [I/groups]: factors of the input channels."""
    w = weight.detach().double().cpu().numpy()
    if fold is not None:
        w = w * fold[None, :, None, None]
    scale = np.maximum(np.abs(w).reshape(len(w), -1).max(1), 1e-30) / 127
    codes = np.rint(w / scale.reshape(-1, *[1] * (w.ndim - 1))).astype(np.int32)
    return Codes(codes, scale, {"kind": "uniform", "bits": 8})


def vector(x: Any, channels: int) -> Array:
    """A number, or one number per channel, as float64 [C]."""
    return np.broadcast_to(np.asarray(x, np.float64).reshape(-1), (channels,)).copy()


class Lowering:
    """Writes operations on values into a program.

    `layers` lists the matrix products, `notes` what is approximated, `largest` the largest |potential| seen in calibration
    at a place where it must not saturate.
    """

    def __init__(self, program: Program, allow_float: bool, inner_bits: int = 8) -> None:
        self.program, self.allow_float, self.inner_bits = program, allow_float, inner_bits
        self.largest = 0.0
        self.reads: IELIF | None = None  # the neuron that makes the program's input, where that is no picture
        self.rounded = 0  # real-valued inputs of convolutions that were rounded to 8 bits
        self.layers: list[Layer] = []
        self.notes: list[str] = []

    # -------------------------------------------------------------------------------------- affine maps
    def affine(self, x: Value, g: Array, h: Array, layer: str) -> Value:
        """g[c] * x + h[c]."""
        if x.kind == "acc" and isinstance(x.source, Conv) and x.source.pools and not (g > 0).all():
            x = self.potential(x, layer)  # a maximum commutes with growing maps only
        border = None if x.border is None else (x.border[0], x.border[1] * g + h)
        top = None if x.top is None else x.top * np.abs(g) + np.abs(h)
        return replace(x, a=x.a * g, b=x.b * g + h, border=border, top=top, grid=None)

    def potential(self, x: Value, layer: str, saturates: bool = False) -> Value:
        """The value as an int32 potential of the program; saturates: its reader clips it anyway."""
        if x.top is not None and not saturates:
            self.largest = max(self.largest, float(x.top.max()))
        if x.border is not None:
            raise ExportError(f"{layer}: the border of a NormPad must go straight (or through batch norm and a stateless "
                              "IELIF) into a convolution without padding of its own.")
        if x.plain:
            return x
        if isinstance(x.source, Conv):
            source = self.program.conv(x.source, x.a, x.b)
        else:
            source = self.program.affine(x.source, x.a, x.b, x.kind == "i32", layer)
        return replace(x, source=source, kind="i32", a=np.ones(x.channels), b=np.zeros(x.channels), pixels=False)

    def add(self, x: Value, y: Value, layer: str) -> Value:
        """x + y of the same shape."""
        if (x.channels, x.height, x.width) != (y.channels, y.height, y.width):
            raise ExportError(f"{layer}: a sum that broadcasts over space or channels cannot be exported; only "
                              "time may differ.")
        steps = max(x.steps, y.steps)
        if self._counts(x) and self._counts(y) and x.a[0] == y.a[0] and x.range[1] + y.range[1] <= _MOST:
            source = self.program.write("sum", [str(x.source), str(y.source)], layer)
            return replace(x, source=source, steps=steps, range=(x.range[0] + y.range[0], x.range[1] + y.range[1]))
        x, y = self.potential(x, layer), self.potential(y, layer)
        source = self.program.write("add", [str(x.source), str(y.source)], layer)
        return replace(x, source=source, steps=steps, grid=None)

    @staticmethod
    def _counts(x: Value) -> bool:
        """Is it spikes or counts times one scale?"""
        return x.kind == "u8" and not x.b.any() and bool((x.a == x.a[0]).all()) and x.border is None and not x.pixels

    # ------------------------------------------------------------------------------------------- neurons
    def neuron(self, module: LIF | IELIF, x: Value, layer: str) -> Value:
        """Potential -> spikes or counts."""
        T = self.program.time_steps
        if x.kind == "real":
            return self._counted_outside(module, x, layer)
        if isinstance(module, IELIF) and (module.decay is None or T == 1):
            return self._stateless(module, x, layer)
        if isinstance(module, IELIF):
            assert module.decay is not None
            x = self.potential(self.affine(x, np.array(module.gain), np.zeros(1), layer), layer)  # in units of one count
            source = self.program.write("ielif", [str(x.source)], layer, levels=module.levels,
                                        decay=self.program.pair(module.decay), steps=T)
            return self._spikes(x, source, module.levels, module.scale, T)
        return self._lif(module, x, layer)

    def _counted_outside(self, module: LIF | IELIF, x: Value, layer: str) -> Value:
        """The program's input is what this neuron makes of real features: whoever calls it does the counting."""
        if not isinstance(module, IELIF) or module.decay is not None or self.reads is not None:
            raise ExportError(f"{layer}: a head of regions must begin with one IELIF neuron without carry-over.")
        self.reads = module
        return self._spikes(x, "pixels", module.levels, module.scale, 1)

    def _lif(self, module: LIF, x: Value, layer: str) -> Value:
        program, T = self.program, self.program.time_steps
        x = self.potential(x, layer)
        gain = 1 - module.decay if module.scale_input else 1.0
        attributes: dict[str, Any] = {"gain": program.pair(gain), "threshold": round(module.threshold * program.one),
                                      "reset": module.reset, "steps": T, "strict": module.strict}
        if module.reset == "late":  # the same as a soft reset by more, of which the leak leaves the threshold
            if module.decay == 0 or module.membrane is not None:
                raise ExportError(f'{layer}: a LIF neuron with reset="late" and {"decay 0" if module.decay == 0 else "a "}'
                                  f'{"" if module.decay == 0 else "quantized membrane"} has no integer form; use '
                                  'reset="soft".')
            amount = round(module.threshold / module.decay * program.one)
            attributes |= {"reset": "soft", "amount": min(amount, 2**31 - 1)}
        if module.membrane is None:
            source = program.write("lif", [str(x.source)], layer, decay=program.pair(module.decay), **attributes)
        else:
            bits, step, table = membrane_table(module.membrane, program.one, layer)
            decay = list(program.factor(module.decay * step, layer))
            source = program.write("lif_packed", [str(x.source)], layer, decay=decay, bits=bits, table=table, **attributes)
        return self._spikes(x, source, 1, 1.0, T)

    def _stateless(self, module: IELIF, x: Value, layer: str) -> Value:
        border = None
        if x.border is not None:  # a constant border fires a constant count
            count = np.floor(np.clip(x.border[1] * module.gain, 0, module.levels) + 0.5)
            border, x = (x.border[0], count * module.scale), replace(x, border=None)
        x = self.potential(x, layer, saturates=True)
        source = self.program.quantize(str(x.source), np.array([module.gain]), 0, module.levels, "u8", layer)
        return replace(self._spikes(x, source, module.levels, module.scale, x.steps), border=border)

    @staticmethod
    def _spikes(x: Value, source: str, levels: int, scale: float, steps: int) -> Value:
        return replace(x, source=source, kind="u8", a=np.full(x.channels, float(scale)), b=np.zeros(x.channels), steps=steps,
                       range=(0, levels), grid=None)

    # ---------------------------------------------------------------------------------------- attention
    def _spiking(self, layer: str, what: str, *values: Value) -> None:
        if not all(self._counts(x) for x in values):
            raise ExportError(f"{layer}: {what} needs spikes or counts on every input; put a neuron on each.")

    @staticmethod
    def _potential_of(like: Value, source: str, **changes: Any) -> Value:
        channels = changes.pop("channels", like.channels)
        return replace(like, source=source, kind="i32", a=np.ones(channels), b=np.zeros(channels), grid=None, **changes)

    def attention(self, q: Value, k: Value, v: Value, heads: int, scale: float, layer: str) -> Value:
        """scale * q (k^T v) of spikes or counts."""
        self._spiking(layer, "spike_attention", q, k, v)
        m, s = self.program.factor(scale * float(q.a[0] * k.a[0] * v.a[0]), layer)
        source = self.program.write("attention", [str(x.source) for x in (q, k, v)], layer, heads=heads, m=m, s=s)
        return self._potential_of(q, source, steps=max(q.steps, k.steps, v.steps))

    def attention_map(self, a: Value, b: Value, product: str, heads: int, layer: str) -> Value:
        """q k^T over the channels of a head ("qk": a = q, b = k) or v^T k over the tokens ("kv": a = v, b = k)."""
        self._spiking(layer, "spike_attention_map", a, b)
        tokens, width = a.height * a.width, a.channels // heads
        over, side = ("channels", tokens) if product == "qk" else ("tokens", width)
        m, s = self.program.factor(float(a.a[0] * b.a[0]), layer)
        source = self.program.write("attention_map", [str(a.source), str(b.source)], layer, over=over, heads=heads, m=m, s=s)
        return self._potential_of(a, source, steps=max(a.steps, b.steps), channels=side, height=side, width=heads)

    def attention_read(self, chosen: Value, x: Value, factor: Array, product: str, heads: int, layer: str) -> Value:
        """factor[t, head] * (M v) ("qk": x = v) or * (q M) ("kv": x = q) of a map M of spikes."""
        self._spiking(layer, "spike_attention_read", chosen, x)
        if (factor == factor[:1]).all():
            factor = factor[:1]
        m, s = self.program.factors(factor * float(chosen.a[0] * x.a[0]), layer)
        source = self.program.write("attention_read", [str(chosen.source), str(x.source)], layer,
                                    over="tokens" if product == "qk" else "channels", heads=heads, m=m, s=s)
        return self._potential_of(x, source, steps=max(chosen.steps, x.steps, len(factor)))

    def coincidences(self, k: Value, v: Value, layer: str) -> Value:
        """Sum over the pixels of k * v."""
        self._spiking(layer, "spike_coincidences", k, v)
        m, s = self.program.factor(float(k.a[0] * v.a[0]), layer)
        source = self.program.write("coincidences", [str(k.source), str(v.source)], layer, m=m, s=s)
        return self._potential_of(k, source, steps=max(k.steps, v.steps), height=1, width=1)

    def mask(self, q: Value, chosen: Value, layer: str) -> Value:
        """The channels of q that a bit per channel lets pass."""
        self._spiking(layer, "spike_mask", q, chosen)
        if q.range[1] * chosen.range[1] > _MOST:
            raise ExportError(f"{layer}: counts up to {q.range[1]} masked by counts up to {chosen.range[1]} pass 255; use a "
                              "neuron of one level on the mask.")
        source = self.program.write("mask", [str(q.source), str(chosen.source)], layer)
        return replace(q, source=source, a=q.a * chosen.a[0], steps=max(q.steps, chosen.steps),
                       range=(0, q.range[1] * chosen.range[1]))

    # -------------------------------------------------------------------------------------- convolutions
    def conv(self, x: Value, codes: Codes | None, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
             padding: tuple[int, int], groups: int, layer: str) -> Value:
        """A convolution of codes; codes None: a full-precision weight, deployed with 8 bits."""
        from_float = codes is None
        if from_float and not self.allow_float:
            raise ExportError(f"{layer}: full-precision weights, and allow_float is off. Give the layer a scheme in the spec "
                              '(Scheme("lsq", 8) for example).')
        depthwise = groups == x.channels
        x, zero, fold, fine = self._codes(x, depthwise, from_float and groups == 1, padding, layer)
        if codes is None:
            codes = weight_codes(weight, fold)
        O, per, kh, kw = codes.codes.shape
        inputs = (np.arange(O) // (O // groups) * per)[:, None] + np.arange(per)  # [O, I/groups]: channel each code sees
        pad_value = np.rint(zero).astype(np.int64)
        if x.border is not None:
            if padding != (0, 0):
                raise ExportError(f"{layer}: its input already has a border (NormPad); the convolution needs padding=0.")
            padding = (x.border[0], x.border[0])
            pad_value = np.clip(np.rint(x.border[1] / x.a), *x.range).astype(np.int64)
        # y = sum w s_i (code - zero_i) + bias; the scale s_i is one number, or one per group, or already in the weights
        scale = codes.scale * (1.0 if fold is not None else x.a[inputs[:, 0]])
        offset = -scale * np.einsum("oihw,oi->o", codes.codes.astype(np.float64), zero[inputs])
        if bias is not None:
            offset = offset + bias.detach().double().cpu().numpy()
        self.layers.append(Layer(layer, codes.scheme["kind"], codes.scheme["bits"], codes.codes.size, self._input_kind(x),
                                 from_float))
        pending = Conv(str(x.source), codes.codes, codes.scheme, stride, padding, groups,
                       pad_value if pad_value.any() else None, x.range, layer, fine)
        height = (x.height + 2 * padding[0] - kh) // stride[0] + 1
        width = (x.width + 2 * padding[1] - kw) // stride[1] + 1
        return Value(pending, "acc", scale, offset, height, width, x.steps)

    @staticmethod
    def _input_kind(x: Value) -> str:
        if x.pixels:
            return "pixels"
        return "codes" if x.kind == "s8" else "spikes" if x.range == (0, 1) else "counts"

    def _codes(self, x: Value, depthwise: bool, foldable: bool, padding: tuple[int, int], layer: str) \
            -> tuple[Value, Array, Array | None, Fine | None]:
        """The input of a convolution as codes.

        (value of kind u8 or s8, zero point [I], factors [I] for the weights or None, a finer second plane or None)
        """
        if x.kind in ("u8", "s8") and x.a.all():
            zero = -x.b / x.a
            padded = any(padding) or x.border is not None
            uniform = depthwise or bool((x.a == x.a[0]).all())
            if (uniform or foldable) and (not padded or self._zero_is_a_code(x, zero)):
                return x, zero, None if uniform else x.a, None
        if x.pixels and x.border is None:
            x, fine = self._planes(x, layer)
            return x, np.zeros(x.channels), None, fine
        x, rest = self._real(x, depthwise, layer)
        return x, np.zeros(x.channels), None, rest

    @staticmethod
    def _zero_is_a_code(x: Value, zero: Array) -> bool:
        """Can the real 0 around the picture (or the border of a NormPad) be written as a code of this value?"""
        if x.border is not None:
            return not zero.any()
        low, high = (0, 255) if x.kind == "u8" else (-127, 127)
        whole = np.rint(zero)
        return bool((np.abs(zero - whole) < 1e-3).all() and whole.min() >= low and whole.max() <= high)

    def _planes(self, x: Value, layer: str) -> tuple[Value, Fine]:
        """Normalised pixels as a coarse and a fine plane of signed codes, by two tables.

        For channels with scales of their own, and where the padding zero lies between two grey levels: one plane of 8 bits
        would be as coarse as the pixels themselves and flip counts in the first layer; two have 16 bits.
        """
        real = x.a[:, None] * np.arange(256.0) + x.b[:, None]
        step = np.abs(real).max() / (127 + 127 / _PLANE)
        coarse = np.clip(np.rint(real / step), -127, 127)
        fine = np.clip(np.rint((real / step - coarse) * _PLANE), -127, 127)
        self.notes.append(f"{layer}: pixels are normalised through tables of 16 bits, and the convolution runs twice; one std "
                          "for all channels and means of whole grey levels (k / 255) would make it once")
        first, second = (self.program.write("lookup", [str(x.source)], layer, table=table.astype(np.int8))
                         for table in (coarse, fine))
        x = replace(x, source=first, kind="s8", a=np.full(x.channels, step), b=np.zeros(x.channels), range=(-127, 127))
        return x, Fine(second, 1 / _PLANE)

    def _real(self, x: Value, per_channel: bool, layer: str) -> tuple[Value, Fine | None]:
        """A real-valued input as codes.

        Averages of counts are counts again. Otherwise signed codes of 8 bits, calibrated; where there is one pixel, or 16
        bits are asked for everywhere, a second plane holds what the first one rounded off.
        """
        border, top = x.border, np.broadcast_to(np.asarray(x.top), (x.channels,)).copy()
        x = self.potential(replace(x, border=None), layer)
        if x.grid is not None and border is None:
            step, most = x.grid
            source = self.program.quantize(str(x.source), np.array([1 / step]), 0, most, "u8", layer)
            return replace(x, source=source, kind="u8", a=np.full(x.channels, step), range=(0, most)), None
        largest = float(top.max()) or 1.0  # zero: the calibration pictures never reach this input
        reach = 127.0 + (0 if self.inner_bits == 8 and x.height * x.width > 1 else 127 / _PLANE)
        step_C = (np.maximum(top, largest * 2.0**-12) if per_channel else np.full(x.channels, largest)) / reach
        source = self.program.quantize(str(x.source), 1 / step_C, -127, 127, "s8", layer)
        codes = replace(x, source=source, kind="s8", a=step_C, border=border, range=(-127, 127), grid=None)
        if reach == 127:
            self.rounded += 1
            return codes, None
        back = self.program.affine(source, -step_C, np.zeros(x.channels), False, layer)
        rest = self.program.write("add", [str(x.source), back], layer)
        pad = None
        if border is not None:
            real = border[1] / step_C
            pad = np.clip(np.rint((real - np.clip(np.rint(real), -127, 127)) * _PLANE), -127, 127).astype(np.int64)
        fine = self.program.quantize(rest, _PLANE / step_C, -127, 127, "s8", layer)
        return codes, Fine(fine, 1 / _PLANE, pad)

    # ------------------------------------------------------------------------------------ pools and means
    def maxpool(self, x: Value, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
                layer: str) -> Value:
        """Maximum over windows; on the potential of a convolution, growing maps behind it still fold."""
        height = (x.height + 2 * padding[0] - kernel[0]) // stride[0] + 1
        width = (x.width + 2 * padding[1] - kernel[1]) // stride[1] + 1
        if isinstance(x.source, Conv) and x.border is None:
            x.source.pools.append((kernel, stride, padding))
            return replace(x, height=height, width=width)
        if x.border is not None or not (x.a > 0).all():
            x = self.potential(x, layer)
        source = self.program.maxpool(str(x.source), kernel, stride, padding, layer)
        return replace(x, source=source, height=height, width=width)

    def upsample(self, x: Value, mode: str, factor: int, layer: str) -> Value:
        """A larger image: codes are repeated as they are, everything else as potentials."""
        if mode == "bilinear" or x.kind == "acc" or x.border is not None:
            x = self.potential(x, layer)
        source = self.program.write("upsample", [str(x.source)], layer, mode=mode, factor=factor)
        return replace(x, source=source, height=factor * x.height, width=factor * x.width,
                       grid=x.grid if mode == "nearest" else None)

    def avgpool(self, x: Value, kernel: tuple[int, int], stride: tuple[int, int], layer: str) -> Value:
        """Mean over windows: over everything the op `mean`, else a depthwise convolution with ones."""
        if kernel == (x.height, x.width):
            return self.mean(x, "space", layer)
        n = kernel[0] * kernel[1]
        x, zero, _, fine = self._codes(x, True, False, (0, 0), layer)
        if x.border is not None:
            raise ExportError(f"{layer}: average pooling of a NormPad cannot be exported; pool before it.")
        ones, scheme = np.ones((x.channels, 1, *kernel), np.int32), {"kind": "binary", "bits": 1}
        pending = Conv(str(x.source), ones, scheme, stride, (0, 0), x.channels, None, x.range, layer, fine)
        return Value(pending, "acc", x.a / n, -x.a * zero, (x.height - kernel[0]) // stride[0] + 1,
                     (x.width - kernel[1]) // stride[1] + 1, x.steps, grid=self._averaged(x, n))

    def _averaged(self, x: Value, n: int) -> tuple[float, int] | None:
        """The grid on which the mean of n such values lies, if its numbers fit a byte."""
        grid = (float(x.a[0]), x.range[1]) if self._counts(x) else x.grid
        return (grid[0] / n, grid[1] * n) if grid is not None and grid[1] * n <= _MOST else None

    def mean(self, x: Value, over: str, layer: str) -> Value:
        """Mean over space or time; affine maps behind or before it commute."""
        n = x.steps if over == "time" else x.height * x.width
        if n == 1:
            return x
        grid = self._averaged(x, n)
        if x.kind == "acc" or x.border is not None:
            x = self.potential(x, layer)
        m = 1
        if x.kind != "i32":  # the mean of codes in potential units; scales that fit exactly go in at once
            scale = float(x.a[0]) * self.program.one
            exact = bool((x.a == x.a[0]).all()) and scale.is_integer() and 0 < scale < 2**31
            m = int(scale if exact else self.program.one)
            x = replace(x, a=x.a * (self.program.one / m))
        source = self.program.write("mean", [str(x.source)], layer, over=over, m=m)
        size = {"steps": 1} if over == "time" else {"height": 1, "width": 1}
        return replace(x, source=source, kind="i32", pixels=False, grid=grid, **size)  # type: ignore[arg-type]
