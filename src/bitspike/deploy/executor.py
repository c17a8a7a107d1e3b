"""Executes a checked program on the kernels in use: integers in, integers out."""
from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy import kernels, ops
from bitspike.deploy.compiled import Compiled, LayerTime
from bitspike.deploy.errors import KernelError
from bitspike.deploy.ops import Array
from bitspike.deploy.program import Op, Program

CHUNK_BYTES = 4 << 20  # values alive at once where numpy computes, per thread

#: one op bound to its kernels: (inputs, threads) -> output
BoundOp = Callable[[list[Array], int], Array]


def bind(op: Op, signed: bool, kernel_set: kernels.KernelSet) -> BoundOp:
    """The op on these kernels, or by its definition where they have none."""
    a: dict[str, Any] = dict(op.attributes)
    if op.name == "conv":
        conv = kernel_set.prepare_conv(**a, signed=signed)
        return lambda inputs, threads: conv(inputs[0], threads)
    function = getattr(kernel_set, op.name, None)
    if function is None or "amount" in a:  # this set has no kernel for it: the definition is always there
        definition = getattr(ops, op.name)
        return lambda inputs, threads: definition(*inputs, **a)
    return lambda inputs, threads: function(*inputs, **a, threads=threads)


def thread_count(threads: Any) -> int:
    """How many threads; all cores if None. Errors: TypeError, ValueError: no such number."""
    if threads is None:
        return os.cpu_count() or 1
    number: Any = None if isinstance(threads, bool) else threads
    try:
        count = operator.index(number)
    except TypeError:
        raise TypeError(f"threads: found {threads!r}; an integer from 1, or None for all cores, is needed") from None
    if not 1 <= count <= 1024:
        raise ValueError(f"threads: found {count}; 1..1024 are allowed")
    return count


class Executor:
    """A program ready to run. Safe to call from several threads. Inputs are uint8 `[S, B, H, W, C]` that fit the program.

    What a call gives does not depend on the batch a picture is in, on `threads`, or on the kernels in use.
    """

    def __init__(self, program: Program, fraction_bits: int) -> None:
        self.program, self.fraction_bits = program, fraction_bits
        self._bound: dict[str, list[BoundOp]] = {}
        self._compiled: dict[str, Compiled] = {}

    def logits(self, images: NDArray[np.uint8], threads: int) -> NDArray[np.float32]:
        """Of a program whose output is one pixel: float32 `[B, C]`."""
        extension = kernels.extension(kernels.active())
        if extension is not None:
            y = self.program.values[self.program.output]
            logits = np.empty((images.shape[1], y.channels), np.float32)
            self._compile(extension).run(images, logits, threads)
            return logits
        return self.real(self._by_op(images, threads)[0][0, :, 0, 0])

    def outputs(self, images: NDArray[np.uint8], threads: int) -> list[Array]:
        """Every output of the program, integers `[S, B, H, W, C]`."""
        extension = kernels.extension(kernels.active())
        if extension is not None:
            return self._compile(extension).outputs(images, threads)
        return self._by_op(images, threads)

    def real(self, potentials: Array) -> NDArray[np.float32]:
        """Potentials as float32."""
        scale = np.float32(2.0**-self.fraction_bits)  # a power of two: the product is exact
        return potentials.astype(np.float32) * scale

    def trace(self, images: NDArray[np.uint8], threads: int) -> dict[str, Array]:
        """Every value of the program by its id; nothing is freed."""
        values: dict[str, Array] = {"pixels": images}
        for op, step in zip(self.program.ops, self.bound_ops(), strict=True):
            values[op.output] = step([values[name] for name in op.inputs], threads)
        return values

    def explain(self, images: NDArray[np.uint8], threads: int, repeats: int) -> list[LayerTime]:
        """See `Net.explain`. Errors: KernelError: the kernels in use are numpy's."""
        extension = kernels.extension(kernels.active())
        if extension is None:
            raise KernelError(f"explain: the kernels in use are 'numpy', which run op by op; choose one of "
                              f"{', '.join(kernels.available()[1:]) or 'the compiled ones (none is installed)'}")
        return self._compile(extension).explain(images, threads, max(1, repeats))

    def bound_ops(self) -> list[BoundOp]:
        """The ops bound to the kernels in use; weights are laid out for a set of kernels when it is first used."""
        kernel_set = kernels.get(kernels.active())
        bound = self._bound.get(kernel_set.name)
        if bound is None:
            values = self.program.values
            bound = [bind(op, values[op.inputs[0]].kind == "s8", kernel_set) for op in self.program.ops]
            self._bound[kernel_set.name] = bound
        return bound

    def _by_op(self, images: NDArray[np.uint8], threads: int) -> list[Array]:
        program, steps = self.program, self.bound_ops()
        chunk = max(1, CHUNK_BYTES * threads // program.live_bytes)
        parts: list[list[Array]] = []
        for first in range(0, max(1, images.shape[1]), chunk):
            values: dict[str, Array] = {"pixels": np.ascontiguousarray(images[:, first : first + chunk])}
            for index, (op, step) in enumerate(zip(program.ops, steps, strict=True)):
                values[op.output] = step([values[name] for name in op.inputs], threads)
                for name in {*op.inputs, op.output}:
                    if program.last_use[name] <= index:
                        del values[name]
            parts.append([values[name] for name in program.outputs])
        return [np.concatenate(pieces, 1) for pieces in zip(*parts, strict=True)]

    def _compile(self, extension: Any) -> Compiled:
        """The program laid out for the kernels in use."""
        name = kernels.active()
        if name not in self._compiled:
            kernel_set, values = kernels.get(name), self.program.values
            self._compiled[name] = Compiled(
                self.program, extension, name, self.fraction_bits,
                lambda op: bind(op, values[op.inputs[0]].kind == "s8", kernel_set),
            )
        return self._compiled[name]
