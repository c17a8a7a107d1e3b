"""Profile a `.bitspike` file: statistics from a trace of its integers, and measured time. Needs no torch."""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike import cost
from bitspike.cost import Operation
from bitspike.deploy import Net, kernels
from bitspike.deploy.program import Op, Value
from bitspike.profiling.report import Report

_NEURONS = ("quantize", "lif", "lif_packed", "ielif")
_ATTENTION = ("attention", "attention_map", "attention_read", "coincidences")


class _Counts:
    """Sums over the batches, per value of the program."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, x: NDArray[Any]) -> None:
        total = self.sums.setdefault(name, [0.0, 0.0, 0.0])
        total[0] += float(np.abs(x.astype(np.int32)).sum(dtype=np.int64))
        total[1] += float(np.count_nonzero(x))
        total[2] += x.size

    def mean(self, name: str) -> float:
        total = self.sums[name]
        return total[0] / total[2]

    def density(self, name: str) -> float:
        total = self.sums[name]
        return total[1] / total[2]


def _from_pixels(net: Net) -> set[str]:
    """Ids of values that are still the picture: pixels, looked up or pooled."""
    ids = {"pixels"}
    for op in net.program.ops:
        if op.name in ("lookup", "maxpool") and op.inputs[0] in ids:
            ids.add(op.output)
    return ids


def _is_count(value: Value) -> bool:
    return value.kind == "u8"


def _elements(value: Value) -> int:
    """Per image and step."""
    return value.height * value.width * value.channels


def _conv(op: Op, listed: dict[str, Any], net: Net, counts: _Counts, pixels: set[str]) -> Operation:
    source, target = net.program.values[op.inputs[0]], net.program.values[op.output]
    if op.inputs[0] in pixels:
        kind = cost.FIRST
    elif _is_count(source):
        kind = cost.SPIKE if source.hi == 1 else cost.COUNT
    else:
        kind = cost.DENSE
    weight = op.attributes["weight"]
    return Operation(op.layer or op.output, kind, tuple(listed["shape"]), op.macs // target.steps, weight.size,
                     listed["scheme"]["bits"], _elements(source), _elements(target), target.steps,
                     source.hi if _is_count(source) else 255, counts.mean(op.inputs[0]), counts.density(op.inputs[0]),
                     weight_kind=listed["scheme"]["kind"])


def _is_pool(op: Op, listed: dict[str, Any]) -> bool:
    """An average over windows is a convolution with ones: no layer of the model, and no weights of its own."""
    weight = op.attributes["weight"]
    return bool(listed["scheme"]["kind"] == "binary" and weight.shape[3] == 1 and (weight == 1).all())


def _attention(op: Op, net: Net, counts: _Counts) -> list[Operation]:
    """k^T v, driven by the sparser of the two, and q (k^T v), driven by q."""
    values, (q, k, v) = net.program.values, op.inputs
    target = values[op.output]
    driver, other = (k, v) if counts.mean(k) <= counts.mean(v) else (v, k)
    head = target.channels // op.attributes["heads"]
    macs = op.macs // 2 // target.steps
    name = op.layer or op.output
    inner = min(16, cost.code_bits(values[k].hi * values[v].hi * target.height * target.width))
    return [
        Operation(f"{name}.product1", cost.ATTENTION, (), macs, 0, cost.code_bits(values[other].hi),
                  _elements(values[driver]), target.channels * head, target.steps, values[driver].hi,
                  counts.mean(driver), counts.density(driver)),
        Operation(f"{name}.product2", cost.ATTENTION, (), macs, 0, inner, _elements(values[q]), _elements(target),
                  target.steps, values[q].hi, counts.mean(q), counts.density(q)),
    ]


def _product(op: Op, net: Net, counts: _Counts, index: int) -> Operation:
    """One product of spikes with spikes, driven by the sparser side."""
    values, (a, b), y = net.program.values, op.inputs, net.program.values[op.output]
    driver, other = (a, b) if counts.mean(a) <= counts.mean(b) else (b, a)
    return Operation(f"{op.layer or op.output}.product{index}", cost.ATTENTION, (), op.macs // y.steps, 0,
                     cost.code_bits(values[other].hi), _elements(values[driver]), _elements(y), y.steps, values[driver].hi,
                     counts.mean(driver), counts.density(driver))


def _potentials(net: Net) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(bytes moved, bytes held) of residual sums and of the state of neurons."""
    residuals, states = [], []
    convs = {op.layer for op in net.program.ops if op.name == "conv"}  # what they add up are their own two planes
    for op in net.program.ops:
        y = net.program.values[op.output]
        if op.name in ("add", "sum") and op.layer not in convs:
            residuals.append((2 * y.image_bytes, y.image_bytes // y.steps))
        elif op.name in ("lif", "lif_packed", "ielif") and y.steps > 1:
            held = _elements(y) * op.attributes.get("bits", cost.POTENTIAL_BITS) // 8
            states.append((2 * y.steps * held, held))
    return residuals, states


def milliseconds(run: Callable[[], object], images: int, least_seconds: float = 0.5) -> float:
    """Milliseconds per image: the best of repeated runs, after one that warms up."""
    run()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or (spent < least_seconds and runs < 50):
        began = time.perf_counter()
        run()
        took = time.perf_counter() - began
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best / images * 1e3


def profile_artifact(net: Net, images: NDArray[np.uint8], *, file_bytes: int | None = None, batch: int = 8,
                     threads: int | None = None) -> Report:
    """Trace the network on pictures uint8 [B, H, W, C] or sequences [T, B, H, W, C], then time it. See `bitspike.profile`."""
    count = images.shape[-4] if images.ndim > 3 else 0
    if count == 0:
        raise ValueError("profile: no images; give at least one, uint8 [B, H, W, C] or [T, B, H, W, C].")
    counts = _Counts()
    spikes = neurons = 0.0
    ops = net.program.ops
    read = {name for op in ops if op.name in ("conv", *_ATTENTION) for name in op.inputs}
    convs = {op.layer for op in ops if op.name == "conv"}  # a code made for a convolution bears its name, and is no neuron
    made = {op.output for op in ops if op.name in _NEURONS and _is_count(net.program.values[op.output])
            and not (op.layer and op.layer in convs)}
    for first in range(0, count, batch):
        values = net.trace(np.ascontiguousarray(images[..., first:first + batch, :, :, :]), threads)
        for name in read | made:
            counts.add(name, values[name])
        for name in made:
            spikes += float(values[name].sum(dtype=np.int64))
            neurons += values[name].size / values[name].shape[0]
    pixels = _from_pixels(net)
    layers: list[Operation] = []
    stored: set[str] = set()
    products: dict[str, int] = {}
    for op, listed in zip(ops, net.header["program"], strict=True):
        if op.name == "conv" and not _is_pool(op, listed):
            layer = _conv(op, listed, net, counts, pixels)
            if listed["weight"] in stored:  # two planes of the same input read one weight
                layer = replace(layer, weights=0)
            stored.add(listed["weight"])
            layers.append(layer)
        elif op.name == "attention":
            layers += _attention(op, net, counts)
        elif op.name in _ATTENTION:
            index = products[op.layer or ""] = products.get(op.layer or "", 0) + 1
            layers.append(_product(op, net, counts, index))
    residuals, states = _potentials(net)
    used = int(threads or os.cpu_count() or 1)
    return Report(net.header["name"], "artifact", tuple(layers), count, spikes / max(1.0, neurons), tuple(residuals),
                  tuple(states), file_bytes, milliseconds(lambda: net(images, used), count), kernels.active(), used)
