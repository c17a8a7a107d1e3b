"""The float network of a program as a torch module."""
from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitspike.benching.lower import Array, Codes, Pair, lower_with_values
from bitspike.deploy import Net


def _tensor(x: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))


class _Recorder:
    """Writes down a straight list of steps, so that running them costs no decisions."""

    def __init__(self, module: PeerModule) -> None:
        self.module = module

    def _constant(self, x: Array, shape: tuple[int, ...]) -> str:
        name = f"c{len(self.module.constants)}"
        self.module.constants[name] = nn.Parameter(_tensor(x).reshape(shape).clone(), requires_grad=False)
        return name

    def _emit(self, kind: str, inputs: list[int], *more: Any) -> int:
        self.module.steps.append((kind, tuple(inputs), more))
        return len(self.module.steps)  # slot 0 is the picture

    def _channels(self, x: Array) -> str:
        return self._constant(np.atleast_1d(x), (1, -1, 1, 1))

    def pixels(self, scale_C: Array, shift_C: Array, codes: Codes) -> int:
        if np.all(scale_C == 1) and not np.any(shift_C):
            return 0
        return self._emit("affine", [0], self._channels(scale_C), self._channels(shift_C))

    def conv(self, x: int, codes: Codes, weight: Array, scale_O: Array, bias_O: Array, stride: Pair, padding: Pair,
             groups: int, feeds_neuron: bool, name: str) -> int:
        w = self._constant(weight * scale_O[:, None, None, None], weight.shape)
        return self._emit("conv", [x], w, self._constant(bias_O, (-1,)), stride, padding, groups)

    def neuron(self, x: int, gain: Array | None, codes: Codes) -> int:
        if gain is not None:
            x = self._emit("scale", [x], self._channels(gain))
        x = self._emit("neuron", [x], codes.lo, codes.hi)
        return x if codes.step == 1 else self._emit("scale", [x], self._channels(np.array(codes.step)))

    def affine(self, x: int, scale_C: Array, shift_C: Array | None) -> int:
        if shift_C is None:
            return self._emit("scale", [x], self._channels(scale_C))
        return self._emit("affine", [x], self._channels(scale_C), self._channels(shift_C))

    def add(self, a: int, b: int) -> int:
        return self._emit("add", [a, b])

    def add_constant(self, x: int, map_CHW: Array) -> int:
        return self._emit("plus", [x], self._constant(map_CHW, (1, *map_CHW.shape)))

    def attention(self, q: int, k: int, v: int, heads: int, shape_CHW: tuple[int, int, int], scale: float) -> int:
        return self._emit("attention", [q, k, v], heads, shape_CHW, scale)

    def attention_map(self, a: int, b: int, over: str, heads: int, scale: float) -> int:
        return self._emit("map", [a, b], over, heads, scale)

    def attention_read(self, chosen: int, x: int, over: str, shape_CHW: tuple[int, int, int], scale_Th: Array) -> int:
        scale = self._constant(scale_Th, scale_Th.shape)  # not five axes: modules in channels_last may not hold any
        return self._emit("read", [chosen, x], over, shape_CHW, scale)

    def coincidences(self, k: int, v: int, scale: float) -> int:
        return self._emit("coincidences", [k, v], scale)

    def product(self, x: int, factor: int, codes: Codes) -> int:
        return self._emit("times", [x, factor])

    def total(self, a: int, b: int, codes: Codes) -> int:
        return self._emit("add", [a, b])

    def maxpool(self, x: int, kernel: Pair, stride: Pair, padding: Pair) -> int:
        return self._emit("maxpool", [x], kernel, stride, padding)

    def mean_space(self, x: int) -> int:
        return self._emit("mean", [x])

    def split(self, x: int, steps: int) -> list[int]:
        return [self._emit("part", [x], steps, t) for t in range(steps)]

    def join(self, parts: list[int], codes: Codes | None) -> int:
        return parts[0] if len(parts) == 1 else self._emit("join", parts)

    def lif_step(self, v: int | None, x: int, decay: float, threshold: float, strict: bool, reset: str,
                 amount: float) -> tuple[int, int]:
        h = x if v is None else self._emit("leak", [v, x], decay)
        s = self._emit("fire", [h], threshold, strict)
        return s, (h if reset == "none" else self._emit("reset", [h, s], amount, reset))

    def tanh(self, x: int, scale: float) -> int:
        return self._emit("tanh", [x], scale)

    def ielif_step(self, v: int | None, x: int, decay: float, one: float, levels: int) -> tuple[int, int]:
        u = x if v is None else self._emit("add", [v, x])
        n = self._emit("count", [u], one, levels)
        return n, self._emit("left", [u, n], one, decay)


def _step(kind: str, x: list[Tensor], more: tuple[Any, ...], constants: Any) -> Tensor:
    if kind == "conv":
        w, b, stride, padding, groups = more
        return F.conv2d(x[0], constants[w], constants[b], stride, padding, 1, groups)
    if kind == "neuron":
        return x[0].round().clamp_(*more)
    if kind == "scale":
        return x[0] * constants[more[0]]
    if kind == "affine":
        return x[0] * constants[more[0]] + constants[more[1]]
    if kind == "add":
        return x[0] + x[1]
    if kind == "plus":
        return x[0] + constants[more[0]]
    if kind == "attention":
        heads, shape, scale = more
        q, k, v = (part.reshape(len(part), heads, shape[0] // heads, -1) for part in x)
        if shape[1] * shape[2] < shape[0] // heads:  # fewer tokens than channels: the tokens' products first
            y = (v * scale) @ (k.transpose(2, 3) @ q)
        else:
            y = ((v * scale) @ k.transpose(2, 3)) @ q
        return y.reshape(len(y), *shape)
    if kind == "map":
        over, heads, scale = more
        a, b = (part.reshape(len(part), heads, part.shape[1] // heads, -1) for part in x)
        return ((a * scale).transpose(2, 3) @ b) if over == "channels" else (a * scale) @ b.transpose(2, 3)
    if kind == "read":
        over, shape, scale = more
        chosen, tokens = x[0], x[1].reshape(len(x[1]), x[0].shape[1], -1, shape[1] * shape[2])
        y = tokens @ chosen.transpose(2, 3) if over == "tokens" else chosen @ tokens
        factor = constants[scale][:, None, :, None, None]
        return (y.unflatten(0, (len(factor), -1)) * factor).reshape(len(y), *shape)
    if kind == "coincidences":
        return (x[0] * x[1]).sum((2, 3), keepdim=True) * more[0]
    if kind == "times":
        return x[0] * x[1]
    if kind == "maxpool":
        kernel, stride, (ph, pw) = more
        if 2 * ph > kernel[0] or 2 * pw > kernel[1]:  # more than torch's own padding allows
            return F.max_pool2d(F.pad(x[0], (pw, pw, ph, ph), value=float("-inf")), kernel, stride)
        return F.max_pool2d(x[0], kernel, stride, (ph, pw))
    if kind == "mean":
        return x[0].mean((2, 3), keepdim=True)
    if kind == "part":
        steps, t = more
        return x[0].unflatten(0, (steps, -1))[t]
    if kind == "join":
        return torch.cat(x)
    if kind == "leak":
        return x[0] * more[0] + x[1]
    if kind == "tanh":
        return torch.tanh(x[0] if more[0] == 1 else x[0] * more[0])
    if kind == "fire":
        return (x[0] > more[0] if more[1] else x[0] >= more[0]).to(x[0].dtype)
    if kind == "reset":
        threshold, way = more
        return x[0] * (1 - x[1]) if way == "hard" else x[0] - threshold * x[1]
    if kind == "count":
        return (x[0] / more[0]).round().clamp_(0, more[1])
    assert kind == "left"
    return (x[0] - x[1] * more[0]) * more[1]


class PeerModule(nn.Module):
    """A program in float: pixels float32 [B, C, H, W], 0..255 -> logits [B, classes]."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.steps: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.constants = nn.ParameterDict()
        lowered = lower_with_values(net.program, int(net.header["fraction_bits"]), _Recorder(self))
        self.output: int = lowered.output
        self.places = dict(lowered.values)
        self.last = {slot: i for i, (_, inputs, _) in enumerate(self.steps) for slot in inputs}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Run the steps; values are freed after their last use."""
        values: dict[int, Tensor] = {0: images_BCHW}
        for i, (kind, inputs, more) in enumerate(self.steps):
            values[i + 1] = _step(kind, [values[slot] for slot in inputs], more, self.constants)
            for slot in set(inputs):
                if self.last[slot] == i and slot != self.output:
                    del values[slot]
        return values[self.output].flatten(1)


@dataclass(frozen=True)
class Comparison:
    """Float network against integers, one op at a time, each on the integers' own inputs: nothing adds up over the layers.

    largest_potential: largest difference of a potential, in units in which the neuron behind a convolution, or most neurons,
        fire a spike more per 1.
    codes: how many codes were compared; different: how many differ (ties at a threshold, which float rounds the other way).
    """

    largest_potential: float
    codes: int
    different: int


def compare(module: PeerModule, net: Net, images: np.ndarray) -> Comparison:
    """Compare a module with the program it was made of, on pictures uint8 [B, H, W, C]."""
    traced = net.trace(images, 1)
    places = {slot: (name, scale, is_map) for name, (slot, scale, is_map) in module.places.items()}
    values: dict[int, Tensor] = {0: torch.from_numpy(np.moveaxis(images, 3, 1).astype(np.float32))}
    largest, codes, different = 0.0, 0, 0
    with torch.inference_mode():
        for i, (kind, inputs, more) in enumerate(module.steps):
            y = _step(kind, [values[slot] for slot in inputs], more, module.constants)
            if i + 1 in places:
                name, scale, is_map = places[i + 1]
                x = traced[name]
                expected = torch.from_numpy(np.moveaxis(x.reshape(-1, *x.shape[2:]), 3, 1).astype(np.float64) * scale).float()
                if is_map:  # [columns, rows, heads] as the integers have it
                    expected = expected.permute(0, 3, 2, 1)
                distance = (y - expected).abs().nan_to_num(nan=math.inf)
                if x.dtype == np.int32:
                    largest = max(largest, float(distance.max()))
                else:
                    codes += x.size
                    different += int((distance > 0.5 * scale).sum())
                y = expected
            values[i + 1] = y
            for slot in set(inputs):
                if module.last[slot] == i and slot != module.output:
                    del values[slot]
    return Comparison(largest, codes, different)


class PlainModel(nn.Module):
    """A recipe's own model as torch users run it: quantized weights baked in, pixels float32 [B, C, H, W], 0..255, in."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        for module in self.model.modules():
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):  # type: ignore[arg-type, union-attr]
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        scale = 1 / (255 * np.broadcast_to(np.asarray(std, float), len(mean)))
        self.scale = nn.Parameter(_tensor(scale).view(1, -1, 1, 1), requires_grad=False)
        self.shift = nn.Parameter(_tensor(-255 * np.asarray(mean, float) * scale).view(1, -1, 1, 1), requires_grad=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, classes], averaged over the time steps."""
        y: Tensor = self.model(images_BCHW * self.scale + self.shift)
        return y.mean(0) if y.dim() == 3 else y
