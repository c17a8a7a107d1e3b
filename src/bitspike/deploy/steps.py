"""Step by step: the same integers as for a whole sequence, one time step at a time, in memory that does not grow with T.

What is kept between steps is the potentials of the neurons, those of `lif_packed` packed at their bits, and the sums behind
the means over time. What depends on a picture but not on time is computed when the picture changes.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy import kernels, ops
from bitspike.deploy.errors import StepError
from bitspike.deploy.ops import Array
from bitspike.deploy.packing import pack_codes, packed_bytes, unpack_codes
from bitspike.deploy.program import Op
from bitspike.deploy.runtime import Net

_STATEFUL = ("lif", "lif_packed", "ielif")
_SHIFT = {2: (0, 2, 4, 6), 4: (0, 4)}


def pack_state(codes: Array, bits: int) -> NDArray[np.uint8]:
    """Signed codes int8 of any shape -> their `bits` bits each, low bits first, in whole bytes.

    >>> pack_state(np.array([1, -1, 0, 1, 1], np.int8), 2).tolist()
    [77, 1]
    """
    if bits == 8:
        return codes.reshape(-1).view(np.uint8).copy()
    if bits not in _SHIFT:
        return pack_codes(codes, {"kind": "uniform", "bits": bits})
    shifts = _SHIFT[bits]
    fields = np.zeros(-(-codes.size // len(shifts)) * len(shifts), np.uint8)
    fields[: codes.size] = codes.reshape(-1).view(np.uint8) & (2**bits - 1)
    packed = fields[:: len(shifts)].copy()
    for i, shift in enumerate(shifts[1:], 1):
        packed |= fields[i :: len(shifts)] << np.uint8(shift)
    return packed


def unpack_state(packed: NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The codes of `pack_state`, in `shape`."""
    if bits == 8:
        return packed.view(np.int8).reshape(shape)
    if bits not in _SHIFT:
        return unpack_codes(packed, shape, {"kind": "uniform", "bits": bits})
    codes = np.empty((packed.size, len(_SHIFT[bits])), np.int8)
    for i, shift in enumerate(_SHIFT[bits]):  # to the top of the byte, and back with the sign
        codes[:, i] = (packed << np.uint8(8 - bits - shift)).view(np.int8) >> np.int8(8 - bits)
    return codes.reshape(-1)[: int(np.prod(shape))].reshape(shape)


class Steps:
    """A network that takes one time step after the other. Not for use by several threads at once.

    Args:
        net: a network of any T. batch: pictures or frames in one step. threads: all cores if None.
    Raises:
        StepError: the network looks at the whole sequence before it is over.

    After t pushes the logits are those of the first t steps (the mean so far); after T they equal `net(sequence)` bit for
    bit. `t`: steps since the last reset. `state_bytes`: of the potentials as they are stored between steps. `endless`: may
    more than T steps be pushed? (Not where a factor was learned for each of T steps, nor where T is 1.)

    >>> from bitspike.deploy import load
    >>> steps = Steps(load("cifar10"))                               # doctest: +SKIP
    >>> for frame in frames:                                         # doctest: +SKIP
    ...     logits = steps.push(frame)
    """

    def __init__(self, net: Net, batch: int = 1, threads: int | None = None) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: found {batch!r}; an integer from 1 is needed")
        self.net, self.batch, self.threads = net, batch, threads
        self._moving, self._most = _roles(net)
        self._stateful = {op.output for op in net.program.ops
                          if op.name in _STATEFUL and op.attributes["steps"] == net.time_steps > 1}
        self._of_one_step = {op.output: {key: value for key, value in op.attributes.items() if key != "steps"}
                             for op in net.program.ops if op.output in self._stateful}
        self._still: dict[str, Array] = {}
        self._picture: Array | None = None
        kept = {name for op in net.program.ops if op.output in self._moving for name in op.inputs} | {net.program.output}
        self._kept = kept - self._moving - {"pixels"}
        self.reset()

    @property
    def endless(self) -> bool:
        """May more than T steps be pushed?"""
        return self._most > self.net.time_steps

    def reset(self) -> None:
        """Back to rest: potentials and sums are zero, t is 0. A picture may stay the same without new work."""
        self.t = 0
        self._states: dict[str, Array] = {}
        self._sums: dict[str, Array] = {}
        for op in self.net.program.ops:
            if op.output in self._stateful:
                y = self.net.program.values[op.output]
                shape = (self.batch, y.height, y.width, y.channels)
                if op.name == "lif_packed":
                    scheme = {"kind": "uniform", "bits": op.attributes["bits"]}
                    self._states[op.output] = np.zeros(packed_bytes(int(np.prod(shape)), scheme), np.uint8)
                else:
                    self._states[op.output] = np.zeros(shape, np.int32)

    @property
    def state_bytes(self) -> int:
        """Bytes of the potentials of all neurons, as stored between steps, for the whole batch."""
        return sum(state.nbytes for state in self._states.values())

    def push(self, x: NDArray[np.uint8] | None = None) -> NDArray[np.float32]:
        """One step: a frame or picture uint8 `[B, H, W, C]` (batch 1: `[H, W, C]` too) -> logits so far `[B, classes]`.

        None: the same picture once more.

        Raises:
            TypeError, ValueError: as for a call of the network, and for a batch of another size.
            StepError: the network cannot go on, see `endless`; or None at the first step, or to a network of frames.
        """
        net = self.net
        if self.t >= self._most:
            raise StepError(f"{net!r}: {self.t} steps were pushed, and it can only take {self._most}. Begin again with reset()")
        pixels, threads = self._input(x)
        bound, program = net.executor.bound_ops(), net.program
        if self._picture is not pixels:
            self._picture, self._still = pixels, {}
        values: dict[str, Array] = {"pixels": pixels, **self._still}
        for index, (op, run) in enumerate(zip(program.ops, bound, strict=True)):
            if op.output in values:
                continue
            if op.output not in self._moving and self._still:
                continue  # needed only by what is kept
            inputs = [values[name] for name in op.inputs]
            values[op.output] = self._run(op, run, inputs, threads)
            for name in {*op.inputs, op.output}:
                if program.last_use[name] <= index and name not in self._kept:
                    values.pop(name, None)
        self._still = {name: values[name] for name in self._kept}
        self.t += 1
        return net.executor.real(values[program.output][0, :, 0, 0])

    def _run(self, op: Op, run: Callable[[list[Array], int], Array], inputs: list[Array], threads: int) -> Array:
        attributes = op.attributes
        if op.output in self._stateful:
            return self._neuron(op, inputs[0][0])
        steps = self.net.program.values[op.inputs[0]].steps  # 1 after a mean over time: the mean of that is itself
        if op.name == "mean" and attributes["over"] == "time" and op.inputs[0] in self._moving and steps > 1:
            total = self._sums.get(op.output, 0) + inputs[0].astype(np.int64)
            self._sums[op.output] = total
            return ops.rounded_mean(total, self.t + 1, attributes["m"])
        rows = attributes.get("m") if op.name == "attention_read" else None
        if isinstance(rows, np.ndarray) and len(rows) > 1:
            attributes = {**attributes, "m": rows[self.t : self.t + 1]}
            own = getattr(kernels.get(kernels.active()), op.name, None)
            chosen, x = inputs
            return ops.attention_read(chosen, x, **attributes) if own is None else own(chosen, x, **attributes, threads=threads)
        return run(inputs, threads)

    def _neuron(self, op: Op, x: Array) -> Array:
        attributes = self._of_one_step[op.output]
        state = self._states[op.output]
        if op.name == "lif_packed":
            codes = unpack_state(state, attributes["bits"], x.shape)
            y, codes = ops.lif_packed_step(codes, x, **attributes)
            self._states[op.output] = pack_state(codes, attributes["bits"])
        else:
            step = ops.lif_step if op.name == "lif" else ops.ielif_step
            y, self._states[op.output] = step(state, x, **attributes)
        return y[None]

    def _input(self, x: Any) -> tuple[Array, int]:
        net, frames = self.net, self.net.input_steps > 1
        if x is None:
            if frames or self._picture is None:
                raise StepError("push() without a picture repeats the one before; " + (
                    "a network of frames needs one at every step" if frames else "the first push needs one"))
            return self._picture, net.checked(self._picture[0], self.threads)[1]
        if isinstance(x, np.ndarray) and x.ndim == 3 and self.batch == 1:
            x = x[None]
        if isinstance(x, np.ndarray) and frames:
            # as a sequence it must fit; only the first of its steps is read
            _, threads = net.checked(np.broadcast_to(x, (net.input_steps, *x.shape)), self.threads)
            pixels = np.ascontiguousarray(x[None])
        else:
            pixels, threads = net.checked(x, self.threads)
        if pixels.shape[1] != self.batch:
            raise ValueError(f"found a batch of {pixels.shape[1]}; these steps were made for {self.batch}")
        if not frames:
            if self._picture is not None and np.array_equal(self._picture, pixels):
                return self._picture, threads
            pixels = pixels.copy()  # it is compared with the next one, and the caller may write over it
        return pixels, threads


def _roles(net: Net) -> tuple[set[str], int]:
    """The values that differ from step to step, and how many steps can be pushed.

    Errors: StepError where something computed at every step reads a mean over time, which is known at the end only.
    """
    T, endless = net.time_steps, 2**63
    role: dict[str, str] = {"pixels": "step" if net.input_steps > 1 else "still"}
    for op in net.program.ops:
        found = {role[name] for name in op.inputs}
        rows = op.attributes.get("m") if op.name == "attention_read" else None
        if isinstance(rows, np.ndarray) and len(rows) > 1:
            found.add("step")
            endless = T
        if op.name in _STATEFUL and op.attributes["steps"] == T > 1:
            found.add("step")
        if {"step", "mean"} <= found:
            raise StepError(f"{net!r}: op {op.name!r} ({op.layer or op.output}) reads a mean over all T steps at each of them; "
                            "this network can only be run on whole sequences")
        if op.name == "mean" and op.attributes["over"] == "time" and "step" in found:
            found = {"mean"}
            x = net.program.values[op.inputs[0]]
            endless = min(endless, (2**63 - 1) // (2 * abs(op.attributes["m"]) * x.largest + 2))
        role[op.output] = next((r for r in ("step", "mean") if r in found), "still")
    if role[net.program.output] == "step":
        raise StepError(f"{net!r}: its logits have {T} steps")
    return {name for name, r in role.items() if r != "still"}, endless if T > 1 else 1
