"""The program of an artifact, checked before anything runs.

`check_program` walks the ops once: names, attributes, tensors, kinds and shapes of every value, the interval every code
lies in, and from these the proof that no sum leaves int32. What it returns can be executed without further checks.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy import kernels
from bitspike.deploy.errors import ArtifactError
from bitspike.deploy.fields import INT32_MAX, INT32_MIN, Fields, shown
from bitspike.deploy.ops import windows
from bitspike.deploy.packing import check_scheme, packed_bytes, unpack_codes

MAX_OPS = 10_000
MAX_SIDE = 1 << 14            # pixels, kernel taps, channels / 64
MAX_CHANNELS = 1 << 20
MAX_STEPS = 256
MAX_FACTOR = 32               # of an enlarged image
MAX_WEIGHTS = 1 << 29         # codes of all convolutions together
MAX_LIVE_BYTES = 1 << 30      # values that exist at the same time, per image
MAX_MACS = 1 << 42            # per image

#: interval of the codes each kind can hold; s8 leaves out -128, so that every code has its negative
LIMITS = {"u8": (0, 255), "s8": (-127, 127), "i32": (INT32_MIN, INT32_MAX)}


@dataclass(frozen=True)
class Value:
    """One value of a program: kind "u8", "s8" or "i32", shape `[steps, B, height, width, channels]`, codes lo..hi."""

    kind: str
    steps: int
    height: int
    width: int
    channels: int
    lo: int
    hi: int

    @property
    def image_bytes(self) -> int:
        """Bytes per image."""
        return self.steps * self.height * self.width * self.channels * (4 if self.kind == "i32" else 1)

    @property
    def largest(self) -> int:
        """Largest absolute code."""
        return max(abs(self.lo), abs(self.hi))


@dataclass(frozen=True)
class Op:
    """One checked op; `attributes` are the arguments of the function of that name in `ops`, tensors in place of names."""

    name: str
    layer: str | None
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]
    macs: int


@dataclass(frozen=True)
class Program:
    """Checked ops in execution order, the values they make, and the bytes that live at the worst moment, per image.

    outputs: ids of what it computes. tensors: names of those it uses. codes: of its weights, see `_Context.unpacked`.
    """

    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    outputs: tuple[str, ...]
    last_use: Mapping[str, int]
    live_bytes: int
    tensors: frozenset[str]
    codes: dict[tuple[str, str, int, int], NDArray[np.int8]] = field(repr=False)

    @property
    def output(self) -> str:
        """The first output, which most programs have alone."""
        return self.outputs[0]


@dataclass
class _Context:
    tensors: Mapping[str, NDArray[Any]]
    time_steps: int
    fraction_bits: int
    weights_left: int = MAX_WEIGHTS
    #: codes by tensor, scheme and number, so that ops that share a tensor share its codes
    unpacked: dict[tuple[str, str, int, int], NDArray[np.int8]] = field(default_factory=dict)


def _potential(like: Value, **changes: int) -> Value:
    shape = {"steps": like.steps, "height": like.height, "width": like.width, "channels": like.channels} | changes
    return Value("i32", lo=INT32_MIN, hi=INT32_MAX, **shape)


def _kind(fields: Fields, value: Value, *allowed: str) -> None:
    if value.kind not in allowed:
        raise fields.fail("in", f"of kind {' or '.join(allowed)}, not {value.kind}")


def _window(
    fields: Fields, x: Value, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> dict[str, int]:
    height = windows(x.height, kernel[0], stride[0], padding[0])
    width = windows(x.width, kernel[1], stride[1], padding[1])
    if height < 1 or width < 1:
        raise fields.fail("in", f"an image at least as large as the kernel {list(kernel)}; it is {x.height} x {x.width}")
    return {"height": height, "width": width}


def _lookup(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    _kind(fields, x, "u8")
    table = fields.tensor("table", np.int8, (x.channels, 256))
    if table.min() < -127:
        raise fields.fail("table", "a table of codes -127..127; it holds -128")
    return {"table": table}, Value("s8", x.steps, x.height, x.width, x.channels, int(table.min()), int(table.max())), 0


def _weight(fields: Fields, shape: tuple[int, ...], context: _Context) -> NDArray[np.int8]:
    outputs, inputs, kh, kw = shape
    count = outputs * inputs * kh * kw
    context.weights_left -= count
    if context.weights_left < 0:
        raise fields.fail("shape", f"smaller: a file may hold {MAX_WEIGHTS} weights in all")
    scheme = fields.get("scheme")
    try:
        size = packed_bytes(count, scheme)
        kind, bits = check_scheme(scheme)
    except ArtifactError as error:
        raise ArtifactError(f"{fields.where}: {error}") from None
    packed = fields.tensor("weight", np.uint8, (size,))
    key = (fields.get("weight"), kind, bits, count)
    if key not in context.unpacked:
        try:
            context.unpacked[key] = unpack_codes(packed, (count,), scheme)
        except ArtifactError as error:
            raise ArtifactError(f"{fields.where}: {error}") from None
    return context.unpacked[key].reshape(outputs, kh, kw, inputs)


def _accumulator_bound(weight: NDArray[np.int8], largest: NDArray[np.int64], groups: int) -> int:
    """Largest sum over taps and channels of |weight| * largest |code| of the input channel, over all outputs."""
    extension = kernels.extension()
    if extension is not None:
        return int(extension.bound(np.ascontiguousarray(weight), np.ascontiguousarray(largest, np.int64), groups))
    outputs, inputs = weight.shape[0], weight.shape[3]
    group_outputs = outputs // groups
    block = max(1, (1 << 20) // max(1, weight[0].size))
    worst = 0
    for first in range(0, outputs, block):
        w = weight[first : first + block]
        taps = np.abs(w.astype(np.int32)).sum((1, 2), dtype=np.int64)
        group = np.arange(first, first + len(w)) // group_outputs
        worst = max(worst, int((taps * largest.reshape(groups, inputs)[group]).sum(1).max()))
    return worst


def _conv(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    _kind(fields, x, "u8", "s8")
    shape = fields.integers("shape", 4, 1, MAX_CHANNELS)
    outputs, group_inputs, kh, kw = shape
    groups = fields.integer("groups", 1, MAX_CHANNELS)
    if group_inputs * groups != x.channels or outputs % groups:
        raise fields.fail("shape", f"[O, {x.channels} / groups, kh, kw] with groups dividing O; groups is {groups}")
    if kh > MAX_SIDE or kw > MAX_SIDE:
        raise fields.fail("shape", f"a kernel of at most {MAX_SIDE} x {MAX_SIDE}")
    stride, padding = fields.integers("stride", 2, 1, MAX_SIDE), fields.integers("padding", 2, 0, MAX_SIDE)
    size = _window(fields, x, (kh, kw), stride, padding)
    lo, hi = LIMITS[x.kind]
    span = fields.integers("range", 2, lo, hi)
    if not span[0] <= x.lo <= x.hi <= span[1]:
        raise fields.fail("range", f"[lo, hi] around the input's codes, which are {x.lo}..{x.hi}")
    pad_value = np.zeros(x.channels, np.int16)
    if fields.has("pad_value"):
        pad_value = fields.tensor("pad_value", np.int16, (x.channels,))
        if pad_value.min() < lo or pad_value.max() > hi:
            raise fields.fail("pad_value", f"codes {lo}..{hi}; found {pad_value.min()}..{pad_value.max()}")
    weight = _weight(fields, shape, context)
    largest = np.maximum(np.abs(pad_value.astype(np.int64)), max(-span[0], span[1]))
    bound = _accumulator_bound(weight, largest, groups)
    if bound > INT32_MAX:
        raise fields.fail("weight", f"small enough that a sum stays below 2^31; it can reach {bound}")
    m = fields.tensor("m", np.int32, (outputs,))
    if m.min() < -INT32_MAX:
        raise fields.fail("m", "numbers with |m| < 2^31; it holds -2^31")
    attributes = {
        "weight": weight, "stride": stride, "padding": padding, "groups": groups, "pad_value": pad_value, "m": m,
        "s": fields.integer("s", 0, 62), "b": fields.tensor("b", np.int32, (outputs,)),
    }
    y = _potential(x, channels=outputs, **size)
    return attributes, y, y.steps * y.height * y.width * weight.size


def _quantize(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    _kind(fields, x, "i32")
    dtype = fields.choice("dtype", ("u8", "s8"))
    lo, hi = (fields.integer(key, *LIMITS[dtype]) for key in ("lo", "hi"))
    if lo > hi:
        raise fields.fail("lo", f"at most 'hi', which is {hi}")
    attributes = {
        "m": fields.per_channel("m", x.channels, -INT32_MAX), "s": fields.integer("s", 0, 62), "lo": lo, "hi": hi,
        "dtype": dtype,
    }
    return attributes, Value(dtype, x.steps, x.height, x.width, x.channels, lo, hi), 0


def _affine(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    attributes = {
        "m": fields.per_channel("m", x.channels, -INT32_MAX), "s": fields.integer("s", 0, 62),
        "b": fields.per_channel("b", x.channels, INT32_MIN),
    }
    return attributes, _potential(x), 0


def _together(fields: Fields, inputs: list[Value]) -> int:
    """Number of steps of values that meet: same image, and S equal or 1."""
    steps = max(x.steps for x in inputs)
    first = inputs[0]
    for x in inputs:
        if (x.height, x.width, x.channels) != (first.height, first.width, first.channels) or x.steps not in (1, steps):
            shapes = ", ".join(str([x.steps, "B", x.height, x.width, x.channels]) for x in inputs)
            raise fields.fail("in", f"values of the same shape, S equal or 1; found {shapes}")
    return steps


def _add(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    for x in inputs:
        _kind(fields, x, "i32")
    return {}, _potential(inputs[0], steps=_together(fields, inputs)), 0


def _sum(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    for x in inputs:
        _kind(fields, x, "u8")
    a, b = inputs
    if a.hi + b.hi > LIMITS["u8"][1]:
        raise fields.fail("in", f"counts whose sum is at most 255; it can reach {a.hi + b.hi}")
    y = Value("u8", _together(fields, inputs), a.height, a.width, a.channels, a.lo + b.lo, a.hi + b.hi)
    return {}, y, 0


def _heads(fields: Fields, channels: int) -> int:
    heads = fields.integer("heads", 1, MAX_CHANNELS)
    if channels % heads:
        raise fields.fail("heads", f"a divisor of the {channels} channels")
    return heads


def _bounded(fields: Fields, what: str, bound: int) -> None:
    if bound > INT32_MAX:
        raise fields.fail("in", f"codes small enough that {what} stays below 2^31; it can reach {bound}")


def _factor(fields: Fields) -> dict[str, Any]:
    return {"m": fields.integer("m", -INT32_MAX, INT32_MAX), "s": fields.integer("s", 0, 62)}


def _attention(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    for x in inputs:
        _kind(fields, x, "u8")
    steps = _together(fields, inputs)
    q, k, v = inputs
    heads = _heads(fields, q.channels)
    tokens, width = q.height * q.width, q.channels // heads
    _bounded(fields, "q (k^T v)", tokens * k.hi * v.hi * max(1, width * q.hi))
    return {"heads": heads, **_factor(fields)}, _potential(q, steps=steps), 2 * steps * tokens * q.channels * width


def _attention_map(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    for x in inputs:
        _kind(fields, x, "u8")
    steps = _together(fields, inputs)
    a, b = inputs
    over, heads = fields.choice("over", ("channels", "tokens")), _heads(fields, a.channels)
    tokens, width = a.height * a.width, a.channels // heads
    side, terms = (tokens, width) if over == "channels" else (width, tokens)
    if side > MAX_CHANNELS:
        raise fields.fail("in", f"values of at most {MAX_CHANNELS} tokens; they have {side}")
    _bounded(fields, "a product", terms * a.hi * b.hi)
    y = Value("i32", steps, side, heads, side, INT32_MIN, INT32_MAX)
    return {"over": over, "heads": heads, **_factor(fields)}, y, steps * side * side * heads * terms


def _attention_read(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    for x in inputs:
        _kind(fields, x, "u8")
    chosen, x = inputs
    over, heads = fields.choice("over", ("channels", "tokens")), _heads(fields, x.channels)
    tokens, width = x.height * x.width, x.channels // heads
    side = tokens if over == "tokens" else width
    if (chosen.height, chosen.width, chosen.channels) != (side, heads, side):
        raise fields.fail("in", f"a map [S, B, {side}, {heads}, {side}] first; its shape is "
                          f"{[chosen.steps, 'B', chosen.height, chosen.width, chosen.channels]}")
    _bounded(fields, "a product", side * chosen.hi * x.hi)
    m: Any = fields.get("m")
    rows = 1
    if isinstance(m, str):
        m, rows = fields.rows("m", (1, context.time_steps), heads, -INT32_MAX)
    else:
        m = fields.integer("m", -INT32_MAX, INT32_MAX)
    steps = max(chosen.steps, x.steps, rows)
    if chosen.steps not in (1, steps) or x.steps not in (1, steps):
        raise fields.fail("in", f"values with S equal or 1; found {chosen.steps}, {x.steps} and {rows} rows of 'm'")
    attributes = {"over": over, "heads": heads, "m": m, "s": fields.integer("s", 0, 62)}
    return attributes, _potential(x, steps=steps), steps * tokens * x.channels * side


def _coincidences(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    for x in inputs:
        _kind(fields, x, "u8")
    steps = _together(fields, inputs)
    k, v = inputs
    _bounded(fields, "a sum of products", k.height * k.width * k.hi * v.hi)
    return _factor(fields), _potential(k, steps=steps, height=1, width=1), steps * k.height * k.width * k.channels


def _mask(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    for x in inputs:
        _kind(fields, x, "u8")
    q, chosen = inputs
    steps = max(q.steps, chosen.steps)
    if (chosen.height, chosen.width, chosen.channels) != (1, 1, q.channels) or not {q.steps, chosen.steps} <= {1, steps}:
        raise fields.fail("in", f"a value and a mask [S, B, 1, 1, {q.channels}], S equal or 1; the mask's shape is "
                          f"{[chosen.steps, 'B', chosen.height, chosen.width, chosen.channels]}")
    if q.hi * chosen.hi > LIMITS["u8"][1]:
        raise fields.fail("in", f"codes whose product is at most 255; it can reach {q.hi * chosen.hi}")
    return {}, Value("u8", steps, q.height, q.width, q.channels, 0, q.hi * chosen.hi), 0


def _maxpool(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    kernel, stride = fields.integers("kernel", 2, 1, MAX_SIDE), fields.integers("stride", 2, 1, MAX_SIDE)
    padding = fields.integers("padding", 2, 0, MAX_SIDE)
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        raise fields.fail("padding", f"less than the kernel {list(kernel)}, so that every window holds a pixel")
    size = _window(fields, x, kernel, stride, padding)
    attributes = {"kernel": kernel, "stride": stride, "padding": padding}
    return attributes, Value(x.kind, x.steps, size["height"], size["width"], x.channels, x.lo, x.hi), 0


def _upsample(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    mode = fields.choice("mode", ("nearest", "bilinear"))
    factor = fields.integer("factor", 2, MAX_FACTOR)
    if mode == "bilinear":
        _kind(fields, x, "i32")
        if factor & (factor - 1):
            raise fields.fail("factor", "a power of two where the mode is 'bilinear'")
    height, width = factor * x.height, factor * x.width
    if height > MAX_SIDE or width > MAX_SIDE:
        raise fields.fail("factor", f"small enough for an image of at most {MAX_SIDE} x {MAX_SIDE}, not {height} x {width}")
    return {"mode": mode, "factor": factor}, Value(x.kind, x.steps, height, width, x.channels, x.lo, x.hi), 0


def _mean(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    over = fields.choice("over", ("space", "time"))
    m = fields.integer("m", -INT32_MAX, INT32_MAX)
    n = x.height * x.width if over == "space" else x.steps
    bound = 2 * abs(m) * n * x.largest + n
    if bound >= 2**63:
        raise fields.fail("m", f"small enough that 2 m sum + n stays below 2^63; it can reach {bound}")
    y = _potential(x, height=1, width=1) if over == "space" else _potential(x, steps=1)
    return {"over": over, "m": m}, y, 0


def _steps(fields: Fields, x: Value, context: _Context) -> int:
    steps = fields.integer("steps", 1, MAX_STEPS)
    if steps not in (1, context.time_steps) or x.steps not in (1, steps):
        raise fields.fail("steps", f"1 or {context.time_steps}, and at least the {x.steps} of the input")
    return steps


def _spikes(x: Value, steps: int, most: int) -> Value:
    return Value("u8", steps, x.height, x.width, x.channels, 0, most)


def _lif(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    _kind(fields, x, "i32")
    steps = _steps(fields, x, context)
    attributes = {
        "decay": fields.factor("decay"), "gain": fields.factor("gain"),
        "threshold": fields.integer("threshold", INT32_MIN, INT32_MAX),
        "reset": fields.choice("reset", ("hard", "soft", "none")), "steps": steps,
        "strict": fields.boolean("strict"),
    }
    if fields.has("amount"):
        if attributes["reset"] != "soft":
            raise fields.fail("amount", f"absent: it belongs to a soft reset, and this one is {attributes['reset']}")
        attributes["amount"] = fields.integer("amount", INT32_MIN, INT32_MAX)
    return attributes, _spikes(x, steps, 1), 0


def _lif_packed(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    attributes, y, macs = _lif(fields, inputs, context)
    bits = fields.integer("bits", 2, 8)
    table = fields.tensor("table", np.int32, (2**bits - 2,))
    if (np.diff(table.astype(np.int64)) < 0).any():
        raise fields.fail("table", "numbers in growing order; they fall")
    return {**attributes, "bits": bits, "table": table}, y, macs


def _ielif(fields: Fields, inputs: list[Value], context: _Context) -> tuple[dict[str, Any], Value, int]:
    (x,) = inputs
    _kind(fields, x, "i32")
    steps, levels = _steps(fields, x, context), fields.integer("levels", 1, 255)
    attributes = {
        "levels": levels, "decay": fields.factor("decay"), "steps": steps, "fraction_bits": context.fraction_bits,
    }
    return attributes, _spikes(x, steps, levels), 0


_Check = Callable[[Fields, list[Value], _Context], tuple[dict[str, Any], Value, int]]
#: number of inputs and the check of every op that exists
OPS: dict[str, tuple[int, _Check]] = {
    "lookup": (1, _lookup), "conv": (1, _conv), "quantize": (1, _quantize), "affine": (1, _affine), "add": (2, _add),
    "sum": (2, _sum), "attention": (3, _attention), "attention_map": (2, _attention_map),
    "attention_read": (2, _attention_read), "coincidences": (2, _coincidences), "mask": (2, _mask), "maxpool": (1, _maxpool),
    "upsample": (1, _upsample), "mean": (1, _mean), "lif": (1, _lif), "lif_packed": (1, _lif_packed), "ielif": (1, _ielif),
}


def _live_bytes(ops: list[Op], values: Mapping[str, Value], last_use: Mapping[str, int]) -> int:
    live = worst = values["pixels"].image_bytes
    for index, op in enumerate(ops):
        live += values[op.output].image_bytes
        worst = max(worst, live)
        live -= sum(values[name].image_bytes for name in {*op.inputs, op.output} if last_use[name] <= index)
    return worst


def check_program(
    listing: Any, outputs: Sequence[str], pixels: Value, time_steps: int, fraction_bits: int,
    tensors: Mapping[str, NDArray[Any]], codes: dict[tuple[str, str, int, int], NDArray[np.int8]] | None = None,
    where: str = "program",
) -> Program:
    """Check a program and resolve its tensors.

    Args:
        listing: as in the header. outputs: ids it must write. pixels: what it reads. codes: `Program.codes` of a program of
            the same file, whose weights need not be unpacked again. where: for messages.

    Raises:
        ArtifactError: naming the op and the attribute.
    """
    if not isinstance(listing, list) or not 1 <= len(listing) <= MAX_OPS:
        raise ArtifactError(f"'{where}' is {shown(listing)}; it must be a list of 1..{MAX_OPS} ops")
    context = _Context(tensors, time_steps, fraction_bits, unpacked={} if codes is None else codes)
    title = where
    values: dict[str, Value] = {"pixels": pixels}
    last_use: dict[str, int] = {"pixels": -1}
    ops: list[Op] = []
    used: set[str] = set()
    macs = 0
    for index, found in enumerate(listing):
        fields = Fields(found, f"{title}[{index}]", tensors)
        name = fields.choice("op", tuple(OPS))
        count, check = OPS[name]
        where = f"{title}[{index}] ({name})"
        fields = Fields(found, where, tensors)
        fields.get("op")
        inputs = fields.texts("in", count, count)
        unknown = [i for i in inputs if i not in values]
        if unknown:
            raise ArtifactError(f"{where}: reads {shown(unknown[0])}, which no earlier op writes")
        target = fields.text("out")
        if target in values:
            raise ArtifactError(f"{where}: writes {shown(target)} a second time; every op writes a new id")
        layer = fields.text("layer") if fields.has("layer") else None
        attributes, value, op_macs = check(fields, [values[i] for i in inputs], context)
        fields.done()
        macs += op_macs
        if value.image_bytes > MAX_LIVE_BYTES or macs > MAX_MACS:
            raise ArtifactError(
                f"{where}: too large: its output takes {value.image_bytes} bytes per image (at most {MAX_LIVE_BYTES}), "
                f"the program {macs} multiplications (at most {MAX_MACS})"
            )
        used |= fields.used
        values[target] = value
        last_use.update(dict.fromkeys(inputs, index))
        last_use[target] = index
        ops.append(Op(name, layer, tuple(inputs), target, attributes, op_macs))
    for output in outputs:
        if output not in values:
            raise ArtifactError(f"'output' is {shown(output)}, which no op writes")
        last_use[output] = len(ops)
    live = _live_bytes(ops, values, last_use)
    if live > MAX_LIVE_BYTES:
        raise ArtifactError(f"'{title}' needs {live} bytes per image at once; at most {MAX_LIVE_BYTES} are allowed")
    return Program(tuple(ops), values, tuple(outputs), last_use, live, frozenset(used), context.unpacked)
