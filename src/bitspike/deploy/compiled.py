"""A program laid out for one set of compiled kernels, and run: in one call, or in parts around ops without a kernel."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.ops import Array
from bitspike.deploy.plan import Stage, Step, lay_out, steps
from bitspike.deploy.program import Op, Program

CHUNK_BYTES = 8 << 20  # arena of the images taken at once where ops are left to numpy; elsewhere the extension decides
_DTYPES: dict[str, type[np.generic]] = {"u8": np.uint8, "s8": np.int8, "i32": np.int32}
_NO_TIMES = np.empty(0)


@dataclass(frozen=True)
class LayerTime:
    """One stage of a network as it ran.

    Attributes:
        layer: the torch module of its first op, or the id of its output.
        ops: what is done in it, in order.
        variant: how its convolution is computed ("dense", "events", ...); None if it has none.
        able: all the variants that could.
        density: share of the convolution's input codes that are not 0, counted in the first eight calls and in every eighth
            then; sampled where they are spikes of neurons over time, None where nobody counts (pixels).
        ms: milliseconds for all images.
        macs: multiply-accumulates of one image, whether done or skipped.
    """

    layer: str
    ops: tuple[str, ...]
    variant: str | None
    able: tuple[str, ...]
    density: float | None
    ms: float
    macs: int


def _numbers(*values: int | Array) -> list[Array]:
    vectors = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, np.int32)) for v in values))
    return [np.ascontiguousarray(v) for v in vectors]


class Compiled:
    """A program in the extension. `bind` gives the definition of an op that has no compiled step: (inputs, threads) -> y.

    Safe to run from several threads.
    """

    def __init__(
        self, program: Program, extension: Any, isa: str, fraction_bits: int,
        bind: Callable[[Op], Callable[[list[Array], int], Array]],
    ) -> None:
        layout = self.layout = lay_out(program)
        self.plan = extension.Plan(isa)
        self._scale = np.float32(2.0**-fraction_bits)  # a power of two: the product is exact
        self._ids: dict[str, int] = {}
        pixels = layout.values["pixels"]
        self._ids["pixels"] = self.plan.value("u8", "pixels", (pixels.steps, pixels.channels), (pixels.height, pixels.width), 0)
        for name, place in layout.places.items():
            v = layout.values[name]
            self._ids[name] = self.plan.value(v.kind, place.where, (v.steps, v.channels), (v.height, v.width), place.offset)
        #: first and last stage of the extension, or an op of numpy's and its definition
        self._parts: list[tuple[Any, Any]] = []
        #: number in the extension of every compiled stage
        self._numbers: dict[int, int] = {}
        for index, stage in enumerate(layout.stages):
            if not stage.compiled:
                self._parts.append((stage.ops[0], bind(stage.ops[0])))
                continue
            number = self._numbers[index] = self._stage(stage)
            if self._parts and isinstance(self._parts[-1][0], int):
                self._parts[-1] = (self._parts[-1][0], number + 1)
            else:
                self._parts.append((number, number + 1))
        self.plan.done(self._ids[layout.outputs[0]], float(self._scale), layout.arena_bytes)

    @property
    def whole(self) -> bool:
        """Every op has a compiled step."""
        return len(self._parts) == 1 and isinstance(self._parts[0][0], int)

    def _stage(self, stage: Stage) -> int:
        first = stage.ops[0]
        y = self.layout.values[first.output]
        parts = 0 if stage.flat else first.attributes["heads"] if first.name == "attention" else y.height
        number: int = self.plan.stage((y.height, y.width), parts)
        for step in steps(stage, self.layout):
            self._step(step)
        return number

    def _id(self, name: str | None) -> int:
        return -1 if name is None else self._ids[name]

    def _step(self, step: Step) -> None:
        codes = [(self._ids[q.output], *_numbers(q.attributes["m"]), q.attributes["s"], q.attributes["lo"], q.attributes["hi"])
                 for q in step.codes]
        x = self._ids[step.x]
        if step.op is None:
            self.plan.finish(x, self._id(step.residual), self._id(step.out), codes)
            return
        op, a = step.op, step.op.attributes
        y = self._id(op.output)
        if op.name == "conv":
            source = self.layout.values[step.x]
            pad = np.ascontiguousarray(a["pad_value"], np.int16)
            span = (min(source.lo, int(pad.min())), max(source.hi, int(pad.max())))
            scaled = (0, 0, 0, -1)
            if step.scaled is not None:
                r = step.scaled.attributes
                (m,), (b,) = _numbers(r["m"], r["b"])
                scaled = (int(m), r["s"], int(b), self.layout.values[step.scaled.inputs[1]].hi)
            self.plan.conv(
                x, np.ascontiguousarray(a["weight"]), a["stride"], a["padding"], a["groups"], pad, *_numbers(a["m"]), a["s"],
                *_numbers(a["b"]), span, self._id(step.residual), self._id(step.out), codes, scaled,
            )
        elif op.name == "affine":
            m, b = _numbers(a["m"], a["b"])
            self.plan.affine(x, m, b, a["s"], y)
        elif op.name == "lookup":
            self.plan.lookup(x, np.ascontiguousarray(a["table"]), y)
        elif op.name == "lif_packed" or "amount" in a:
            amount, table = a.get("amount", a["threshold"]), np.ascontiguousarray(a.get("table", np.empty(0)), np.int32)
            self.plan.lif_packed(x, a["decay"], a["gain"], a["threshold"], a["reset"], a["strict"], amount, table, y)
        elif op.name == "lif":
            self.plan.lif(x, a["decay"], a["gain"], a["threshold"], a["reset"], a["strict"], y)
        elif op.name == "ielif":
            self.plan.ielif(x, a["levels"], a["decay"], a["fraction_bits"], y)
        elif op.name == "mean":
            (self.plan.mean_time if a["over"] == "time" else self.plan.mean_space)(x, a["m"], y)
        elif op.name == "maxpool":
            self.plan.maxpool(x, a["kernel"], a["stride"], a["padding"], y)
        elif op.name == "upsample":
            self.plan.upsample(x, a["mode"] == "bilinear", a["factor"], y)
        elif op.name == "sum":
            self.plan.add_codes(x, self._ids[op.inputs[1]], y)
        elif op.name == "mask":
            self.plan.mask_codes(x, self._ids[op.inputs[1]], y)
        elif op.name == "coincidences":
            self.plan.coincidences(x, self._ids[op.inputs[1]], a["m"], a["s"], y)
        elif op.name == "attention_map":
            self.plan.attention_map(x, self._ids[op.inputs[1]], a["over"] == "channels", a["heads"], a["m"], a["s"], y)
        elif op.name == "attention_read":
            m = np.ascontiguousarray(np.broadcast_to(a["m"], np.broadcast_shapes(np.shape(a["m"]), (1, a["heads"]))), np.int32)
            read = self._ids[op.inputs[1]]
            self.plan.attention_read(x, read, a["over"] == "tokens", a["heads"], m.reshape(-1), a["s"], y)
        else:
            q, k, v = (self._ids[name] for name in op.inputs)
            self.plan.attention(q, k, v, a["heads"], a["m"], a["s"], y)

    def outputs(self, images: NDArray[np.uint8], threads: int) -> list[Array]:
        """Every output `[S, B, H, W, C]` for pixels `[S, B, H, W, C]`."""
        values, count = [self.layout.values[name] for name in self.layout.outputs], images.shape[1]
        found: list[Array] = [np.empty((v.steps, count, v.height, v.width, v.channels), _DTYPES[v.kind]) for v in values]
        chunk = max(1, CHUNK_BYTES // max(1, self.layout.arena_bytes))
        for first in range(0, count, chunk):
            some = np.ascontiguousarray(images[:, first : first + chunk])
            value = self._run_parts(some, threads, _NO_TIMES, {})
            for name, whole in zip(self.layout.outputs, found, strict=True):
                whole[:, first : first + chunk] = value(name)
        return found

    def run(self, images: NDArray[np.uint8], logits: NDArray[np.float32], threads: int) -> None:
        """Fill logits `[B, classes]` for pixels `[S, B, H, W, C]`."""
        if self.whole:
            self.plan.run(images, logits, threads, _NO_TIMES)
            return
        chunk = max(1, CHUNK_BYTES // max(1, self.layout.arena_bytes))
        for first in range(0, images.shape[1], chunk):
            some = np.ascontiguousarray(images[:, first : first + chunk])
            value = self._run_parts(some, threads, _NO_TIMES, {})
            potential = value(self.layout.outputs[0])[0, :, 0, 0, :]
            logits[first : first + chunk] = potential.astype(np.float32) * self._scale

    def _run_parts(
        self, images: NDArray[np.uint8], threads: int, seconds: NDArray[np.float64], elsewhere: dict[int | str, float],
    ) -> Callable[[str], Array]:
        """Run everything; what it returns gives the arrays of values that are still there at the end."""
        count = images.shape[1]
        arena = np.empty(self.layout.arena_bytes * count, np.uint8)

        def value(name: str) -> Array:
            if name == "pixels":
                return images
            v, start = self.layout.values[name], self.layout.places[name].offset * count
            raw = arena[start : start + v.image_bytes * count].view(_DTYPES[v.kind])
            return raw.reshape(v.steps, count, v.height, v.width, v.channels)

        for what, then in self._parts:
            if isinstance(what, Op):
                start = time.perf_counter()
                assert callable(then)
                value(what.output)[:] = then([value(name) for name in what.inputs], threads)
                elsewhere[what.output] = elsewhere.get(what.output, 0.0) + time.perf_counter() - start
            else:
                self.plan.run_part(images, arena, what, then, threads, seconds)
        return value

    def explain(self, images: NDArray[np.uint8], threads: int, repeats: int) -> list[LayerTime]:
        """Every stage with its time, the shortest of `repeats` passes over pixels `[S, B, H, W, C]`."""
        output = self.layout.values[self.layout.outputs[0]]
        logits = np.empty((images.shape[1], output.channels), np.float32)
        best: dict[int | str, float] = {}
        for _ in range(repeats):
            seconds, elsewhere = np.zeros(len(self._numbers)), dict[int | str, float]()
            if self.whole and output.height == output.width == 1:
                self.plan.run(images, logits, threads, seconds)
            else:
                self._run_parts(images, threads, seconds, elsewhere)
            found: dict[int | str, float] = {**dict(enumerate(seconds.tolist())), **elsewhere}
            for key, spent in found.items():
                best[key] = min(best.get(key, spent), spent)
        convolutions: Mapping[int, dict[str, Any]] = {found["stage"]: found for found in self.plan.layers()}
        rows = []
        for index, stage in enumerate(self.layout.stages):
            first, number = stage.ops[0], self._numbers.get(index)
            conv = {} if number is None else convolutions.get(number, {})
            spent = best[first.output if number is None else number]
            rows.append(LayerTime(
                first.layer or first.output, tuple(op.name for op in stage.ops), conv.get("variant"),
                tuple(conv.get("able", ())), conv.get("density"), 1e3 * spent, sum(op.macs for op in stage.ops),
            ))
        return rows
