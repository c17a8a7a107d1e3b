"""A quantized membrane potential as a table: at which potentials the stored code grows by one."""
from __future__ import annotations

from typing import Any

import numpy as np

from bitspike.exporting.emit import Array
from bitspike.exporting.trace import ExportError
from bitspike.quantizers import Membrane


def membrane_table(membrane: Any, one: float, layer: str) -> tuple[int, float, Array]:
    """(bits, value of one code, int32 table `[2^bits - 2]`) of a `Membrane`; one: the potential 1.0 as an integer.

    The code is the number of entries that are at most the potential, less half of them. tanh is monotone, so it only moves the
    entries; and since torch rounds half to even, an even code is reached at its edge, an odd one past it.
    Errors: ExportError naming the layer for a membrane that is none of ours, whose scale depends on the batch, or that is not
    rounded.

    >>> quarter = Membrane(3, tanh=False)
    >>> _ = quarter.bound.fill_(0.75)
    >>> bits, step, table = membrane_table(quarter, 1000.0, "neuron")
    >>> bits, step, table.tolist()                      # codes -3..3; edges at odd eighths
    (3, 0.25, [-625, -374, -125, 126, 375, 626])
    """
    if not isinstance(membrane, Membrane):
        raise ExportError(f"{layer}: a LIF neuron whose membrane is a {type(membrane).__name__} cannot be exported; a "
                          "bitspike.quantizers.Membrane can.")
    if not membrane.quantizes:
        raise ExportError(f"{layer}: a Membrane of 32 bits is a tanh that is not rounded, which integers cannot compute; train "
                          'with Scheme("membrane", bits), 2..8 bits, or without a membrane rule, which is 32-bit integers.')
    if membrane.scale == "batch":
        raise ExportError(f'{layer}: a Membrane with scale="batch" depends on the other pictures of the batch and cannot '
                          'be deployed; train with Scheme("membrane", bits, options={"scale": "running"}), the default.')
    step = float(membrane.bound.double().clamp_min(1e-12)) / membrane.high
    code = np.arange(1 - membrane.high, membrane.high + 1)  # reached half a step below its value
    edge = (code - 0.5) * step
    if membrane.tanh:
        with np.errstate(divide="ignore", invalid="ignore"):
            edge = np.where(np.abs(edge) < 1, np.arctanh(np.clip(edge, -1, 1)), np.copysign(np.inf, edge))
    table = np.where(code % 2 == 0, np.ceil(edge * one), np.floor(edge * one) + 1)
    return membrane.bits, step, np.clip(table, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.int32)
