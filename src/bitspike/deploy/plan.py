"""How a program is executed: which ops are fused into one stage, and where every value lies.

A *stage* is a producer (`conv`, `maxpool`, `attention`, `mean` over space) and the elementwise ops that can follow it while
its output is still in the cache. It is computed tile by tile; a value that only its own stage reads exists for one tile at
a time. Every other value has a place in an arena that is planned here, by lifetime, for one image. Within a stage, sums and
quantizers become the *epilogue* of the convolution before them, which is applied in registers (csrc/kernels.h).

Nothing here changes a number: `Net.trace` runs the same program op by op, and tests compare the two.
"""
from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np

from bitspike.deploy.program import Op, Program, Value

ALIGN = 64  # bytes; every place in the arena begins at a multiple of it
_GAPS = 256  # gaps looked at for a place; a program that leaves more of them wastes some memory, not time

#: ops with a compiled step, and exactly the attributes it knows; an op with others is left to its definition
_COMPILED: dict[str, frozenset[str]] = {
    "lookup": frozenset({"table"}),
    "conv": frozenset({"weight", "stride", "padding", "groups", "pad_value", "m", "s", "b"}),
    "quantize": frozenset({"m", "s", "lo", "hi", "dtype"}),
    "affine": frozenset({"m", "s", "b"}),
    "add": frozenset(),
    "add_scaled": frozenset({"m", "s", "b"}),  # no op of a file: see `scaled_residuals`
    "attention": frozenset({"heads", "m", "s"}),
    "attention_map": frozenset({"over", "heads", "m", "s"}),
    "attention_read": frozenset({"over", "heads", "m", "s"}),
    "coincidences": frozenset({"m", "s"}),
    "sum": frozenset(),
    "mask": frozenset(),
    "maxpool": frozenset({"kernel", "stride", "padding"}),
    "upsample": frozenset({"mode", "factor"}),
    "mean": frozenset({"over", "m"}),
    "lif": frozenset({"decay", "gain", "threshold", "reset", "steps", "strict", "amount"}),
    "lif_packed": frozenset({"decay", "gain", "threshold", "reset", "steps", "strict", "bits", "table", "amount"}),
    "ielif": frozenset({"levels", "decay", "steps", "fraction_bits"}),
}
_OPTIONAL = {"amount"}
# and the mean over time
_ELEMENTWISE = frozenset({"lookup", "quantize", "affine", "add", "add_scaled", "sum", "lif", "lif_packed", "ielif"})


def compiled(op: Op) -> bool:
    """Whether the extension has a step for this op, with these attributes."""
    known = _COMPILED.get(op.name)
    if known is None or known - _OPTIONAL != set(op.attributes) - _OPTIONAL or not set(op.attributes) <= known:
        return False
    return op.name == "attention_read" or all(np.ndim(op.attributes[key]) <= 1 for key in ("m", "b") if key in op.attributes)


def _elementwise(op: Op) -> bool:
    return op.name in _ELEMENTWISE or (op.name == "mean" and op.attributes["over"] == "time")


@dataclass
class Stage:
    """Some ops done together; all outputs have the same height and width. Not compiled: one op, left to its definition."""

    ops: list[Op]
    compiled: bool = True

    @property
    def flat(self) -> bool:
        """No op looks at a pixel's neighbours, so that positions of all images are alike."""
        first = self.ops[0]
        if first.name == "conv":
            a = first.attributes
            return a["weight"].shape[1:3] == (1, 1) and a["stride"] == (1, 1) and a["padding"] == (0, 0)
        return first.name in ("mean", "coincidences") or _elementwise(first)


@dataclass(frozen=True)
class Place:
    """Where a value lies: in the arena (bytes per image), or in the scratch of a tile (bytes per position)."""

    where: str
    offset: int


@dataclass(frozen=True)
class Layout:
    """Stages in order, a place for every value they make, and the arena's bytes per image."""

    stages: tuple[Stage, ...]
    values: Mapping[str, Value]
    places: Mapping[str, Place]
    outputs: tuple[str, ...]
    arena_bytes: int


def _consumers(ops: Sequence[Op]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, op in enumerate(ops):
        for name in set(op.inputs):
            found.setdefault(name, []).append(index)
    return found


def needed(ops: Sequence[Op], outputs: Sequence[str]) -> list[Op]:
    """The ops that the outputs depend on."""
    wanted, kept = set(outputs), []
    for op in reversed(ops):
        if op.output in wanted:
            wanted.update(op.inputs)
            kept.append(op)
    return kept[::-1]


def pool_codes(ops: Sequence[Op], values: Mapping[str, Value], outputs: Sequence[str]) -> tuple[list[Op], dict[str, Value]]:
    """Quantize before pooling where only the codes of a pooled potential are needed.

    A quantizer with m >= 0 never falls, so the code of the largest potential is the largest code: exact, and a quarter of
    the bytes to pool.
    """
    ops, values = list(ops), dict(values)
    readers = _consumers(ops)
    for index, pool in enumerate(ops):
        after = readers.get(pool.output, [])
        if pool.name != "maxpool" or values[pool.output].kind != "i32" or len(after) != 1 or pool.output in outputs:
            continue
        code = ops[after[0]]
        if code.name != "quantize" or np.min(code.attributes["m"]) < 0:
            continue
        x, y = values[pool.inputs[0]], values[code.output]
        before = pool.output  # the name is free: nobody else reads the pooled potential
        values[before] = replace(x, kind=y.kind, lo=y.lo, hi=y.hi)
        ops[index] = replace(code, inputs=pool.inputs, output=before)
        ops[after[0]] = replace(pool, inputs=(before,), output=code.output)
    return ops, values


def scaled_residuals(ops: Sequence[Op], values: Mapping[str, Value], outputs: Sequence[str]) -> list[Op]:
    """Make one op of a residual that is codes times a number, and its sum with the potentials of a convolution.

    The codes are kept in its place, a byte for four. `add_scaled` is x + affine(codes): the convolution's epilogue.
    """
    readers, made = _consumers(ops), {op.output: index for index, op in enumerate(ops)}

    def alone(name: str) -> bool:
        return name not in outputs and len(readers[name]) == 1

    kept = list(ops)
    dropped: set[int] = set()
    for index, op in enumerate(ops):
        if op.name != "add" or len(set(op.inputs)) != 2 or not all(alone(name) for name in op.inputs):
            continue
        for x, other in (op.inputs, op.inputs[::-1]):
            conv, affine = made.get(x, -1), made.get(other, -1)
            if conv < 0 or affine < 0 or ops[conv].name != "conv" or ops[affine].name != "affine" or not compiled(ops[conv]):
                continue
            codes, a = ops[affine].inputs[0], ops[affine].attributes
            if (values[codes].kind == "u8" and compiled(ops[affine]) and np.size(a["m"]) == np.size(a["b"]) == 1
                    and values[x].steps == values[codes].steps == values[op.output].steps and made.get(codes, -1) < conv):
                kept[index] = replace(op, name="add_scaled", inputs=(x, codes), attributes=dict(a))
                dropped.add(affine)
                break
    return [op for index, op in enumerate(kept) if index not in dropped]


def _summed(ops: Sequence[Op], outputs: Sequence[str]) -> dict[str, str]:
    """Convolutions that follow one another and that nobody reads but one sum of the two: second output -> first output."""
    readers, found = _consumers(ops), {}
    for one, two in pairwise(ops):
        after = readers.get(one.output, [])
        alone = len(after) == 1 and after == readers.get(two.output) and not {one.output, two.output} & set(outputs)
        if alone and one.name == two.name == "conv" and ops[after[0]].name == "add" and one.output not in two.inputs:
            found[two.output] = one.output
    return found


def fuse(ops: Sequence[Op], values: Mapping[str, Value], outputs: Sequence[str] = ()) -> list[Stage]:
    """Ops in stages: an elementwise op joins the last stage that makes one of its inputs, if its output has that size.

    So does a convolution whose output is only added to that of the one before: then neither leaves the cache.
    """
    stages: list[Stage] = []
    made_in: dict[str, int] = {}
    summed = _summed(ops, outputs)
    for op in ops:
        y = values[op.output]
        last = max((made_in.get(name, -1) for name in op.inputs), default=-1)
        can = compiled(op)
        if can and _elementwise(op) and last >= 0:
            stage = stages[last]
            first = values[stage.ops[0].output]
            if stage.compiled and stage.ops[0].name != "attention" and (first.height, first.width) == (y.height, y.width):
                stage.ops.append(op)
                made_in[op.output] = last
                continue
        alike = bool(stages) and stages[-1].compiled and stages[-1].flat == Stage([op]).flat
        if can and alike and stages[-1].ops[-1].output == summed.get(op.output):
            stages[-1].ops.append(op)
            made_in[op.output] = len(stages) - 1
            continue
        made_in[op.output] = len(stages)
        stages.append(Stage([op], can))
    return stages


class _Space:
    """First fit: the lowest gap between places that live at the same time."""

    def __init__(self) -> None:
        self.top = 0
        self._gaps: list[tuple[int, int]] = []  # (start, end) below the top, in order, never two that touch
        self._ends: list[tuple[int, int, int]] = []  # a heap of (last stage, start, end)

    def take(self, size: int, stage: int, last: int) -> int:
        while self._ends and self._ends[0][0] < stage:
            _, start, end = heappop(self._ends)
            self._free(start, end)
        offset = self._find(size)
        heappush(self._ends, (last, offset, offset + size))
        return offset

    def _find(self, size: int) -> int:
        for index, (start, end) in enumerate(self._gaps[:_GAPS]):
            if end - start >= size:
                self._gaps[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        start = self._gaps.pop()[0] if self._gaps and self._gaps[-1][1] == self.top else self.top
        self.top = start + size
        return start

    def _free(self, start: int, end: int) -> None:
        index = bisect(self._gaps, (start, end))
        if index < len(self._gaps) and self._gaps[index][0] == end:
            end = self._gaps.pop(index)[1]
        if index and self._gaps[index - 1][1] == start:
            index -= 1
            start = self._gaps.pop(index)[0]
        self._gaps.insert(index, (start, end))


def _round(n: int) -> int:
    return (n + ALIGN - 1) // ALIGN * ALIGN


def _in_place(
    stages: Sequence[Stage], values: Mapping[str, Value], last: Mapping[str, int], outside: set[str]
) -> dict[str, str]:
    """Sums that take the place of the residual that is added, which nobody else reads then or later: sum -> residual."""
    found: dict[str, str] = {}
    for index, stage in enumerate(stages):
        inside = {op.output for op in stage.ops}
        for op in stage.ops:
            residuals = [name for name in op.inputs if name not in inside]
            if op.name != "add" or op.output not in outside or len(residuals) != 1 or len(set(op.inputs)) != 2:
                continue
            (residual,) = residuals
            same = values[residual].kind == "i32" and values[residual].image_bytes == values[op.output].image_bytes
            if same and last[residual] == index and sum(residual in other.inputs for other in stage.ops) == 1:
                found[op.output] = residual
    return found


def arrange(stages: Sequence[Stage], values: Mapping[str, Value], outputs: Sequence[str]) -> tuple[dict[str, Place], int]:
    """A place for every value: scratch for what one stage makes and alone reads, else the arena. Returns its size too."""
    last = dict.fromkeys(outputs, len(stages))
    outside = set(outputs)
    for index, stage in enumerate(stages):
        inside: set[str] = set()
        for op in stage.ops:
            for name in op.inputs:
                last[name] = max(last.get(name, -1), index)
                if name not in inside:
                    outside.add(name)
            inside.add(op.output)
        if not stage.compiled or stage.ops[0].name == "attention":  # these write whole images
            outside.add(stage.ops[0].output)
    made_anywhere = {op.output for stage in stages for op in stage.ops}
    in_place = {y: x for y, x in _in_place(stages, values, last, outside).items() if x in made_anywhere}
    for y, x in reversed(in_place.items()):  # the last of a chain first: a place is taken for as long as any of them lives
        last[x] = max(last[x], last.get(y, 0))
    places: dict[str, Place] = {}
    arena = _Space()
    for index, stage in enumerate(stages):
        scratch = 0
        made = sorted((op.output for op in stage.ops), key=lambda name: -values[name].image_bytes)
        for name in made:
            value = values[name]
            if name in in_place:
                places[name] = places[in_place[name]]
            elif name in outside:
                offset = arena.take(_round(value.image_bytes), index, last.get(name, index))
                places[name] = Place("arena", offset)
            else:
                places[name] = Place("tile", scratch)
                scratch += _round(value.image_bytes // (value.height * value.width))
    return places, arena.top


def lay_out(program: Program) -> Layout:
    """Stages and places of a checked program."""
    ops, values = pool_codes(needed(program.ops, program.outputs), program.values, program.outputs)
    stages = fuse(scaled_residuals(ops, values, program.outputs), values, program.outputs)
    places, size = arrange(stages, values, program.outputs)
    return Layout(tuple(stages), values, places, program.outputs, size)


# ------------------------------------------------------------------------------------------------- epilogues
@dataclass
class Step:
    """One call per tile: an op alone, or (`op` None: only the epilogue, on `x`) with what follows it in registers."""

    op: Op | None
    x: str
    residual: str | None = None
    out: str | None = None
    codes: list[Op] = field(default_factory=list)
    scaled: Op | None = None  # the `add_scaled` whose codes the residual is

    @property
    def ops(self) -> list[str]:
        """Ids of the values this step makes or passes through."""
        return [name for name in (self.out, *(op.output for op in self.codes)) if name is not None]


def steps(stage: Stage, layout: Layout) -> list[Step]:
    """The steps of a compiled stage: every sum and quantizer is in some epilogue."""
    ops = stage.ops
    inside = {op.output for op in ops}
    outside = {op.output for op in ops if layout.places[op.output].where == "arena"}
    readers = _consumers(ops)
    done: set[int] = set()
    made: set[str] = set()  # by earlier steps
    found: list[Step] = []

    def epilogue(step: Step, x: str, start: int) -> None:
        """Takes what reads x into the step: a sum nobody else competes with, then up to two quantizers."""
        after = [i for i in readers.get(x, []) if i not in done]
        add = ops[after[0]] if len(after) == 1 == len(readers[x]) else None
        if step.residual is None and add is not None and x not in outside and add.name in ("add", "add_scaled"):
            other = add.inputs[1] if add.inputs[0] == x else add.inputs[0]
            same_steps = layout.values[add.output].steps == layout.values[x].steps
            if other != x and same_steps and (other not in inside or other in made):
                done.add(after[0])
                step.residual = other
                step.scaled = add if add.name == "add_scaled" else None
                return epilogue(step, add.output, after[0])
        for i in after:
            if ops[i].name == "quantize" and len(step.codes) < 2:
                done.add(i)
                step.codes.append(ops[i])
        left = [i for i in readers.get(x, []) if i not in done]
        if left or x in outside or not step.codes:
            step.out = x
        return None

    for index, op in enumerate(ops):
        if index in done:
            continue
        done.add(index)
        step = Step(op, op.inputs[0])
        if op.name == "conv":
            epilogue(step, op.output, index)
        elif op.name == "quantize":
            step = Step(None, op.inputs[0], codes=[op])
            for i in readers[op.inputs[0]]:  # a second quantizer of the same potentials, in the same pass
                if i not in done and ops[i].name == "quantize" and len(step.codes) < 2:
                    done.add(i)
                    step.codes.append(ops[i])
        elif op.name == "add":
            step = Step(None, op.inputs[0], residual=op.inputs[1])
            epilogue(step, op.output, index)
        found.append(step)
        made.update(step.ops)
    return found
