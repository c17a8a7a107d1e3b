"""Profile a `.bitspike` file: statistics from a trace of its integers, and measured time. Needs no torch."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike import cost
from bitspike.cost import Operation
from bitspike.deploy import Detector, Net, Segmenter, kernels
from bitspike.deploy.executor import thread_count
from bitspike.deploy.preprocess import Scene, on_canvas
from bitspike.deploy.program import Op, Program, Value
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


def _from_pixels(net: Graph) -> set[str]:
    """Ids of values that are still the picture: pixels, looked up or pooled. What regions are made of are counts."""
    ids = {"pixels"} if net.program.values["pixels"].hi == 255 else set()
    for op in net.program.ops:
        if op.name in ("lookup", "maxpool") and op.inputs[0] in ids:
            ids.add(op.output)
    return ids


def _is_count(value: Value) -> bool:
    return value.kind == "u8"


def _elements(value: Value) -> int:
    """Per image and step."""
    return value.height * value.width * value.channels


def _conv(op: Op, listed: Mapping[str, Any], net: Graph, counts: _Counts, pixels: set[str]) -> Operation:
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


def _is_pool(op: Op, listed: Mapping[str, Any]) -> bool:
    """An average over windows is a convolution with ones: no layer of the model, and no weights of its own."""
    weight = op.attributes["weight"]
    return bool(listed["scheme"]["kind"] == "binary" and weight.shape[3] == 1 and (weight == 1).all())


def _attention(op: Op, net: Graph, counts: _Counts) -> list[Operation]:
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


def _product(op: Op, net: Graph, counts: _Counts, index: int) -> Operation:
    """One product of spikes with spikes, driven by the sparser side."""
    values, (a, b), y = net.program.values, op.inputs, net.program.values[op.output]
    driver, other = (a, b) if counts.mean(a) <= counts.mean(b) else (b, a)
    return Operation(f"{op.layer or op.output}.product{index}", cost.ATTENTION, (), op.macs // y.steps, 0,
                     cost.code_bits(values[other].hi), _elements(values[driver]), _elements(y), y.steps, values[driver].hi,
                     counts.mean(driver), counts.density(driver))


def _potentials(net: Graph) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
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


class Graph:
    """One program, and what was counted while it ran.

    seen: inputs so far. spikes, neurons: of the neurons, over all inputs and, for neurons, one step of each.
    """

    def __init__(self, program: Program, listing: Sequence[Mapping[str, Any]]) -> None:
        self.program, self.listing = program, listing
        self.counts, self.seen, self.spikes, self.neurons = _Counts(), 0, 0.0, 0.0
        ops = program.ops
        self._read = {name for op in ops if op.name in ("conv", *_ATTENTION) for name in op.inputs}
        convs = {op.layer for op in ops if op.name == "conv"}  # a code made for a convolution bears its name, and is no neuron
        self._made = {op.output for op in ops if op.name in _NEURONS and _is_count(program.values[op.output])
                      and not (op.layer and op.layer in convs)}

    def watch(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Count in every value of some inputs [S, B, H, W, C], as a trace gives them."""
        self.seen += values["pixels"].shape[1]
        for name in self._read | self._made:
            self.counts.add(name, values[name])
        for name in self._made:
            self.spikes += float(values[name].sum(dtype=np.int64))
            self.neurons += values[name].size / values[name].shape[0]

    def layers(self) -> list[Operation]:
        """One row per matrix product, for one input. A program that never ran has none."""
        if not self.seen:
            return []
        pixels, found = _from_pixels(self), list[Operation]()
        stored: set[str] = set()
        products: dict[str, int] = {}
        for op, listed in zip(self.program.ops, self.listing, strict=True):
            if op.name == "conv" and not _is_pool(op, listed):
                layer = _conv(op, listed, self, self.counts, pixels)
                if listed["weight"] in stored:  # two planes or maps read one weight
                    layer = replace(layer, weights=0)
                stored.add(listed["weight"])
                found.append(layer)
            elif op.name == "attention":
                found += _attention(op, self, self.counts)
            elif op.name in _ATTENTION:
                index = products[op.layer or ""] = products.get(op.layer or "", 0) + 1
                found.append(_product(op, self, self.counts, index))
        return found


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
    graph = Graph(net.program, net.header["program"])
    for first in range(0, count, batch):
        graph.watch(net.trace(np.ascontiguousarray(images[..., first:first + batch, :, :, :]), threads))
    used = thread_count(threads)
    return report_of(net.header["name"], [graph], count, file_bytes, milliseconds(lambda: net(images, used), count), used)


def profile_dense(net: Segmenter | Detector, pictures: Sequence[NDArray[np.uint8]], *, file_bytes: int | None = None,
                  threads: int | None = None) -> Report:
    """As `profile_artifact`, on pictures uint8 [H, W, C] of any size, each shown whole on the canvas of the header.

    The heads of a region are counted as often as a picture has regions, on average; their weights once. The time is that of a
    whole call, boxes and masks included.
    """
    if not len(pictures):
        raise ValueError("profile: no pictures; give at least one, uint8 [H, W, C].")
    used, canvas = thread_count(threads), net.input_shape[:2]
    scenes = [on_canvas(picture, *canvas, net.letterbox.border) for picture in pictures]
    graphs = {"": Graph(net.program, net.header["program"])}  # a window is an input, too: `report_of` counts them
    if isinstance(net, Detector):
        graphs |= {part.name: Graph(part.program, part.listing) for part in net.detection.parts}
        for scene in scenes:
            for name, values in net.trace(scene, used).items():
                graphs[name].watch(values)
    else:
        for scene in scenes:
            for part in net.in_windows(scene):
                graphs[""].watch(net.executor(*part.shape[:2]).trace(part[None, None], used))

    def answer(scene: Scene) -> object:
        return net.in_picture(net.detect(scene, used), scene) if isinstance(net, Detector) else net.labels(scene, used)

    ms = milliseconds(lambda: [answer(scene) for scene in scenes], len(scenes))
    return report_of(net.header["name"], list(graphs.values()), len(scenes), file_bytes, ms, used)


def report_of(name: str, graphs: Sequence[Graph], count: int, file_bytes: int | None, ms: float, threads: int) -> Report:
    """The report of programs that together answer for `count` pictures; ms: per picture."""
    layers: list[Operation] = []
    residuals: list[tuple[int, int]] = []
    states: list[tuple[int, int]] = []
    for graph in graphs:
        times = graph.seen / count  # inputs of this program a picture: 1, or its regions
        layers += [_often(layer, times) for layer in graph.layers()]
        moved, held = _potentials(graph)
        residuals += [(round(times * m), h) for m, h in moved]
        states += [(round(times * m), h) for m, h in held]
    spikes, neurons = (sum(getattr(graph, what) for graph in graphs) for what in ("spikes", "neurons"))
    return Report(name, "artifact", tuple(layers), count, spikes / max(1.0, neurons), tuple(residuals), tuple(states),
                  file_bytes, ms, kernels.active(), threads)


def _often(layer: Operation, times: float) -> Operation:
    """A layer that runs on so many inputs for one picture; its weights are the same."""
    if times == 1:
        return layer
    return replace(layer, macs=round(times * layer.macs), inputs=round(times * layer.inputs),
                   outputs=round(times * layer.outputs))
