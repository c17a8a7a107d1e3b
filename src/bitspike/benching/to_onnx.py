"""The float network of a program as an ONNX model; in int8 with QuantizeLinear/DequantizeLinear pairs around what is codes."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitspike.benching.lower import Array, Codes, Pair, lower
from bitspike.deploy import Net

_OPSET = 18


class OnnxBuilder:
    """Writes nodes. A ref is a value's name.

    `form`: "float"; "counts" (spikes, counts and inner codes are int8, exactly; potentials stay float: OpenVINO runs such
    convolutions on int8); "all" (also the outputs of convolutions are int8, with `ranges`, as ONNX Runtime needs it).
    `ranges`: name of a convolution -> largest absolute output, measured.
    """

    def __init__(self, form: str, ranges: Mapping[str, float] | None = None) -> None:
        self.form, self.ranges = form, ranges or {}
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.outputs_of_convs: dict[str, str] = {}  # value -> layer
        self._known: dict[tuple[Any, ...], str] = {}

    # ------------------------------------------------------------------------------------------------ writing
    def constant(self, x: Array, dtype: Any = np.float32) -> str:
        """A constant; small ones are shared."""
        array = np.ascontiguousarray(x, dtype)
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size < 64 else (len(self.constants),)
        if key not in self._known:
            self._known[key] = f"k{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        """One node with one output."""
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def _channels(self, x: Array) -> str:
        x = np.atleast_1d(np.asarray(x))
        return self.constant(x.reshape(1, -1, 1, 1) if x.size > 1 else x.reshape(()))

    @property
    def _int8(self) -> bool:
        return self.form != "float"

    def _quantized(self, x: str, codes: Codes, most: str | None = None) -> str:
        """x as 8-bit codes and back; signed codes go as u8 with zero point 128, which is every engine's fast way."""
        signed = codes.lo < 0
        scale = self.constant(np.array(codes.step))
        zero = self.constant(np.array(128 if signed else 0), np.uint8)
        y = self.emit("QuantizeLinear", x, scale, zero)
        if most is not None:
            y = self.emit("Min", y, most)
        return self.emit("DequantizeLinear", y, scale, zero)

    # ---------------------------------------------------------------------------------------------- the builder
    def pixels(self, scale_C: Array, shift_C: Array, codes: Codes) -> str:
        x = "pixels"
        if not (np.all(scale_C == 1) and not np.any(shift_C)):
            x = self.emit("Add", self.emit("Mul", x, self._channels(scale_C)), self._channels(shift_C))
        return self._quantized(x, codes) if self._int8 else x

    def conv(self, x: str, codes: Codes, weight: Array, scale_O: Array, bias_O: Array, stride: Pair, padding: Pair,
             groups: int, feeds_neuron: bool, name: str) -> str:
        attributes = {"strides": list(stride), "pads": [*padding, *padding], "group": groups,
                      "kernel_shape": list(weight.shape[2:])}
        if not self._int8:
            w = self.constant(weight * scale_O[:, None, None, None])
            y = self.emit("Conv", x, w, self.constant(bias_O), **attributes)
        else:
            flipped = weight.astype(np.int16) * np.where(scale_O < 0, -1, 1)[:, None, None, None]
            scale = np.maximum(np.abs(scale_O), 1e-30)
            flipped = np.where((scale_O == 0)[:, None, None, None], 0, flipped).clip(-127, 127)
            zero = self.constant(np.zeros(len(scale)), np.int8)
            w = self.emit("DequantizeLinear", self.constant(flipped, np.int8), self.constant(scale), zero, axis=0)
            if self.form == "all":  # ONNX Runtime wants the bias in the accumulator's units
                step = np.float32(codes.step) * scale.astype(np.float32)
                limit = 2.0**31 - 1
                code = np.round(bias_O / step).clip(-limit, limit)
                bias = self.emit("DequantizeLinear", self.constant(code, np.int32), self.constant(step),
                                 self.constant(np.zeros(len(scale)), np.int32), axis=0)
            else:
                bias = self.constant(bias_O)
            y = self.emit("Conv", x, w, bias, **attributes)
        self.outputs_of_convs[y] = name
        if self.form == "all" and not feeds_neuron and name in self.ranges:
            y = self._quantized(y, Codes(-127, 127, max(self.ranges[name], 1e-6) / 127))
        return y

    def neuron(self, x: str, gain: Array | None, codes: Codes) -> str:
        if self._int8 and (gain is None or (np.ndim(gain) == 0 and codes.step != 1)):
            if self.form == "all" and codes.lo == 0:  # the clip on codes: a convolution before stays fused
                return self._quantized(x, codes, self.constant(np.array(codes.hi), np.uint8) if codes.hi < 255 else None)
            if codes.lo == 0:
                x = self.emit("Clip", x, self.constant(np.array(0.0)), self.constant(np.array(float(codes.hi) * codes.step)))
            return self._quantized(x, codes)
        if not self._int8 and codes.step != 1.0:
            return x  # signed codes stand for real values: a float engine has no use for rounding them
        if gain is not None:
            x = self.emit("Mul", x, self._channels(gain))
        if self._int8:
            low, high = (self.constant(np.array(float(n))) for n in (codes.lo, codes.hi))
            return self._quantized(self.emit("Clip", x, low, high), codes)
        return self._round(x, codes.lo, codes.hi)

    def _round(self, x: str, lo: int, hi: int) -> str:
        low, high = (self.constant(np.array(float(n))) for n in (lo, hi))
        return self.emit("Round", self.emit("Clip", x, low, high))

    def affine(self, x: str, scale_C: Array, shift_C: Array | None) -> str:
        if not np.all(np.asarray(scale_C) == 1):
            x = self.emit("Mul", x, self._channels(scale_C))
        return x if shift_C is None else self.emit("Add", x, self._channels(shift_C))

    def add(self, a: str, b: str) -> str:
        return self.emit("Add", a, b)

    def add_constant(self, x: str, map_CHW: Array) -> str:
        return self.emit("Add", x, self.constant(map_CHW[None]))

    def attention(self, q: str, k: str, v: str, heads: int, shape_CHW: tuple[int, int, int], scale: float) -> str:
        channels, tokens = shape_CHW[0] // heads, shape_CHW[1] * shape_CHW[2]
        shape = self.constant(np.array([-1, heads, channels, tokens]), np.int64)
        q, k, v = (self.emit("Reshape", x, shape) for x in (q, k, v))
        factor = self.constant(np.array(scale))
        k = self.emit("Transpose", k, perm=[0, 1, 3, 2])
        if tokens < channels:
            y = self.emit("MatMul", v, self.emit("Mul", self.emit("MatMul", k, q), factor))
        else:
            y = self.emit("MatMul", self.emit("Mul", self.emit("MatMul", v, k), factor), q)
        return self.emit("Reshape", y, self.constant(np.array([-1, *shape_CHW]), np.int64))

    def attention_map(self, a: str, b: str, over: str, heads: int, scale: float) -> str:
        a, b = self._by_head(a, heads), self._by_head(b, heads)
        if over == "channels":
            a = self.emit("Transpose", a, perm=[0, 1, 3, 2])
        else:
            b = self.emit("Transpose", b, perm=[0, 1, 3, 2])
        return self.emit("Mul", self.emit("MatMul", a, b), self.constant(np.array(scale)))

    def attention_read(self, chosen: str, x: str, over: str, shape_CHW: tuple[int, int, int], scale_Th: Array) -> str:
        x = self._by_head(x, scale_Th.shape[1])
        if over == "tokens":
            y = self.emit("MatMul", x, self.emit("Transpose", chosen, perm=[0, 1, 3, 2]))
        else:
            y = self.emit("MatMul", chosen, x)
        if len(scale_Th) > 1:  # a number per step
            steps, heads = scale_Th.shape
            channels, tokens = shape_CHW[0] // heads, shape_CHW[1] * shape_CHW[2]
            y = self.emit("Reshape", y, self.constant(np.array([steps, -1, heads, channels, tokens]), np.int64))
            y = self.emit("Mul", y, self.constant(scale_Th.reshape(steps, 1, heads, 1, 1)))
        else:
            y = self.emit("Mul", y, self.constant(scale_Th.reshape(1, -1, 1, 1)))
        return self.emit("Reshape", y, self.constant(np.array([-1, *shape_CHW]), np.int64))

    def _by_head(self, x: str, heads: int) -> str:
        flat = self.emit("Reshape", x, self.constant(np.array([0, 0, -1]), np.int64))  # [N, C, H W]
        split = self.emit("Reshape", self.emit("Transpose", flat, perm=[0, 2, 1]),
                          self.constant(np.array([0, 0, heads, -1]), np.int64))        # [N, H W, heads, C / heads]
        return self.emit("Transpose", split, perm=[0, 2, 3, 1])

    def coincidences(self, k: str, v: str, scale: float) -> str:
        axes = self.constant(np.array([2, 3]), np.int64)
        return self.emit("Mul", self.emit("ReduceSum", self.emit("Mul", k, v), axes), self.constant(np.array(scale)))

    def product(self, x: str, factor: str, codes: Codes) -> str:
        y = self.emit("Mul", x, factor)
        return self._quantized(y, codes) if self._int8 else y

    def total(self, a: str, b: str, codes: Codes) -> str:
        y = self.emit("Add", a, b)
        return self._quantized(y, codes) if self._int8 else y

    def maxpool(self, x: str, kernel: Pair, stride: Pair, padding: Pair) -> str:
        return self.emit("MaxPool", x, kernel_shape=list(kernel), strides=list(stride), pads=[*padding, *padding])

    def mean_space(self, x: str) -> str:
        return self.emit("GlobalAveragePool", x)

    def split(self, x: str, steps: int) -> list[str]:
        names = [f"s{len(self.nodes)}_{t}" for t in range(steps)]
        self.nodes.append(helper.make_node("Split", [x], names, name=names[0], axis=0, num_outputs=steps))
        return names

    def join(self, parts: list[str], codes: Codes | None) -> str:
        x = parts[0] if len(parts) == 1 else self.emit("Concat", *parts, axis=0)
        return self._quantized(x, codes) if codes is not None and self._int8 else x

    def lif_step(self, v: str | None, x: str, decay: float, threshold: float, strict: bool, reset: str,
                 amount: float) -> tuple[str, str]:
        h = x if v is None else self.emit("Add", v if decay == 1 else self.emit("Mul", v, self.constant(np.array(decay))), x)
        level = self.constant(np.array(threshold))
        fired = self.emit("Greater" if strict else "GreaterOrEqual", h, level)
        spikes = self.emit("Cast", fired, to=TensorProto.FLOAT)
        if reset == "none":
            return spikes, h
        if reset == "hard":
            return spikes, self.emit("Where", fired, self.constant(np.array(0.0)), h)
        return spikes, self.emit("Sub", h, spikes if amount == 1 else self.emit("Mul", spikes, self.constant(np.array(amount))))

    def tanh(self, x: str, scale: float) -> str:
        return self.emit("Tanh", x if scale == 1 else self.emit("Mul", x, self.constant(np.array(scale))))

    def ielif_step(self, v: str | None, x: str, decay: float, one: float, levels: int) -> tuple[str, str]:
        u = x if v is None else self.emit("Add", v, x)
        n = self._round(u if one == 1 else self.emit("Mul", u, self.constant(np.array(1 / one))), 0, levels)
        left = self.emit("Sub", u, n if one == 1 else self.emit("Mul", n, self.constant(np.array(one))))
        return n, left if decay == 1 else self.emit("Mul", left, self.constant(np.array(decay)))


def to_onnx(net: Net, batch: int, form: str = "float", ranges: Mapping[str, float] | None = None,
            show_convs: bool = False) -> onnx.ModelProto:
    """The network for pictures float32 [batch, C, H, W], 0..255; output "logits" [batch, classes].

    form, ranges: see OnnxBuilder. show_convs: every convolution's output is an output too, named after its layer.
    Errors: PeerError.
    """
    builder = OnnxBuilder(form, ranges)
    last = lower(net.program, int(net.header["fraction_bits"]), builder)
    builder.nodes.append(helper.make_node("Flatten", [last], ["logits"], axis=1))
    height, width, channels = net.input_shape
    source = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, channels, height, width])
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(net.classes)])]
    if show_convs:
        for value, layer in builder.outputs_of_convs.items():
            builder.nodes.append(helper.make_node("Identity", [value], [f"conv:{layer}"]))
            outputs.append(helper.make_tensor_value_info(f"conv:{layer}", TensorProto.FLOAT, ["N", "C", "H", "W"]))
    graph = helper.make_graph(builder.nodes, "bitspike", [source], outputs, builder.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model
