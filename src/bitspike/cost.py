"""What a network costs: bytes, operations, energy. One copy of every formula and of every constant, with its source.

Energy is told in three accounts, per image and in pJ, because one headline number hides what decides it:

1. *literature*: float32 multiply-accumulate 4.6 pJ, float32 accumulate 0.9 pJ, memory free, weight width ignored. This
   is the number that papers on spiking networks print.
2. *bit-aware*: integer arithmetic at the widths really used, plus every byte of weights, activations and potentials
   that moves.
3. *quantized ANN*: account 2 for a conventional network of the same shape and weights, whose activations have as many
   levels as the spiking one can tell apart (T * D + 1) and whose products are all computed, zero or not.

What the accounts leave out, in favour of nobody: control, clock, leakage, routing of events, and the reads of operands
from a local buffer inside a layer (taken as registers in 2 and 3 alike).

Standard library only, so that a search and a report on a device use the same numbers.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """A number, its unit and where it is from; printed with every report."""

    value: float
    unit: str
    source: str


_HOROWITZ = "Horowitz, Computing's energy problem, ISSCC 2014 (45 nm, 0.9 V)"
#: everything the accounts are made of
CONSTANTS: dict[str, Constant] = {
    "float32 multiply": Constant(3.7, "pJ", _HOROWITZ),
    "float32 add": Constant(0.9, "pJ", _HOROWITZ),
    "int8 add": Constant(0.03, "pJ", _HOROWITZ),
    "int32 add": Constant(0.1, "pJ", _HOROWITZ),
    "int8 multiply": Constant(0.2, "pJ", _HOROWITZ),
    "int32 multiply": Constant(3.1, "pJ", _HOROWITZ),
    "SRAM 8 kB": Constant(10.0, "pJ per 64 bits", _HOROWITZ),
    "SRAM 32 kB": Constant(20.0, "pJ per 64 bits", _HOROWITZ),
    "SRAM 1 MB": Constant(100.0, "pJ per 64 bits", _HOROWITZ),
    "DRAM": Constant(1300.0, "pJ per 64 bits", _HOROWITZ + ", lower end of 1300-2600"),
}
E_MAC_PJ = CONSTANTS["float32 multiply"].value + CONSTANTS["float32 add"].value
E_AC_PJ = CONSTANTS["float32 add"].value

#: largest number of bytes -> the memory that holds them
_LEVELS = ((8 << 10, "SRAM 8 kB"), (32 << 10, "SRAM 32 kB"), (1 << 20, "SRAM 1 MB"), (math.inf, "DRAM"))

FLOAT_BITS = 32
POTENTIAL_BITS = 32

FIRST = "first layer"            # 8-bit pixels x weight
SPIKE = "spike x weight"         # input 0 or 1: an addition where it is 1
COUNT = "count x weight"         # input 0..D: so many additions, or one narrow product
DENSE = "8-bit x weight"         # real-valued input, deployed as 8-bit codes: a product everywhere
ATTENTION = "spike x spike"      # both sides made by neurons: no weights
KINDS = (FIRST, SPIKE, COUNT, DENSE, ATTENTION)


@dataclass(frozen=True)
class Operation:
    """One layer as the accounts see it: the shape, and the statistics of its input. All counts are for one image.

    name; kind, one of `KINDS`; shape of the weight (empty for attention); macs: dense products of ONE time step; steps:
    time steps executed (T); weights: their number; weight_bits (32: float; for attention: of the codes on the other
    side); inputs, outputs: elements of one step; levels: largest input code (1 for spikes, D for counts, 255 for
    pixels); mean_count: mean input code of an element and step; density: share of inputs that are not zero.
    published_macs, published_count: what the papers would put for the same layer, where that differs (a RepConv is
    counted as the one 3x3 convolution it can be merged to).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    weights: int
    weight_bits: int
    inputs: int
    outputs: int
    steps: int = 1
    levels: int = 1
    mean_count: float = 1.0
    density: float = 1.0
    published_macs: int | None = None
    published_count: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Operation {self.name!r}: kind={self.kind!r}; allowed: {', '.join(KINDS)}.")

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights, packed to their width."""
        return packed_bytes(self.weights, self.weight_bits) if self.weights else 0

    @property
    def synaptic_ops(self) -> float:
        """Operations of an event-driven device: one addition per spike (a count n is n spikes); products elsewhere."""
        return self.steps * self.macs * (1.0 if self.kind in (FIRST, DENSE) else self.mean_count)

    @property
    def code_bits(self) -> int:
        """Width of one input code."""
        return 8 if self.kind in (FIRST, DENSE) else code_bits(self.levels)

    @property
    def accumulator_bits(self) -> int:
        """Width that no sum of this layer can exceed (at most 32: that is what the runtime proves)."""
        if self.weight_bits == FLOAT_BITS or not self.outputs:
            return 32
        fan_in = max(1, self.macs // self.outputs)
        top = 255 if self.kind in (FIRST, DENSE) else self.levels
        return min(32, self.weight_bits + math.ceil(math.log2(fan_in * top + 1)))


@dataclass(frozen=True)
class Energy:
    """Energy of one image in pJ, by where it goes."""

    arithmetic_pj: float
    weights_pj: float = 0.0
    activations_pj: float = 0.0
    potentials_pj: float = 0.0

    @property
    def total_pj(self) -> float:
        """Sum of the parts."""
        return self.arithmetic_pj + self.weights_pj + self.activations_pj + self.potentials_pj

    def __add__(self, other: Energy) -> Energy:
        return Energy(self.arithmetic_pj + other.arithmetic_pj, self.weights_pj + other.weights_pj,
                      self.activations_pj + other.activations_pj, self.potentials_pj + other.potentials_pj)


# --------------------------------------------------------------------------------------------------- size
def packed_bytes(weights: int, bits: int) -> int:
    """Bytes of `weights` codes of `bits` bits, as one bit stream.

    >>> packed_bytes(15_015_000, 4), packed_bytes(9, 1)
    (7507500, 2)
    """
    return -(-weights * bits // 8)


def published_params_m(sizes: Iterable[tuple[int, int]]) -> float:
    """(number of weights, bits) pairs -> "Param (M)" of QSD-Transformer: sum of weights * bits / 32, in millions.

    >>> round(published_params_m([(55_163_000, 4)]), 3)
    6.895
    """
    return sum(weights * bits for weights, bits in sizes) / 32 / 1e6


def published_bytes(sizes: Iterable[tuple[int, int]]) -> float:
    """Footprint as in Q-SNN and its successors: sum of weights * bits / 8; no norms, scales or header.

    >>> round(published_bytes([(3_456, 8), (12_550_144, 1), (5_120, 8)]) / 1e6, 3)    # ResNet-19 on CIFAR-10
    1.577
    """
    return sum(weights * bits for weights, bits in sizes) / 8


def code_bits(levels: int) -> int:
    """Bits that tell the codes 0..levels apart.

    >>> [code_bits(n) for n in (1, 3, 4, 255)]
    [1, 2, 3, 8]
    """
    return max(1, math.ceil(math.log2(levels + 1)))


# ------------------------------------------------------------------------------------------- arithmetic
def add_pj(bits: int) -> float:
    """Integer addition: through Horowitz' points at 8 and 32 bits, proportional to the width below 8.

    >>> [round(add_pj(bits), 4) for bits in (4, 8, 16, 32)]
    [0.015, 0.03, 0.0533, 0.1]
    """
    low, high = CONSTANTS["int8 add"].value, CONSTANTS["int32 add"].value
    return low * bits / 8 if bits <= 8 else low + (high - low) * (bits - 8) / 24


def multiply_pj(a_bits: int, b_bits: int) -> float:
    """Integer product: proportional to the cells of an array multiplier, a * b, from Horowitz' 8 x 8 bits.

    At 32 x 32 bits this gives 3.2 pJ, where Horowitz has 3.1. A factor of one bit is an AND: taken as free.

    >>> multiply_pj(8, 8), round(multiply_pj(3, 4), 4), round(multiply_pj(32, 32), 2), multiply_pj(1, 4)
    (0.2, 0.0375, 3.2, 0.0)
    """
    return 0.0 if min(a_bits, b_bits) <= 1 else CONSTANTS["int8 multiply"].value * a_bits * b_bits / 64


def memory_level(held_bytes: float) -> str:
    """The smallest memory that holds so many bytes.

    >>> memory_level(5_000), memory_level(5_000_000)
    ('SRAM 8 kB', 'DRAM')
    """
    return next(name for limit, name in _LEVELS if held_bytes <= limit)


def traffic_pj(moved_bytes: float, held_bytes: float) -> float:
    """Energy to move bytes in or out of the memory that holds `held_bytes`.

    >>> traffic_pj(8, held_bytes=8_000)
    10.0
    """
    return CONSTANTS[memory_level(held_bytes)].value * moved_bytes / 8


# ----------------------------------------------------------------------------------------- the accounts
def literature_pj(op: Operation) -> float:
    """Account 1: E = 4.6 pJ * products + 0.9 pJ * T * E[n] * MACs; a product wherever the input is no spike (count).

    The first layer sees pixels and is counted as often as it is executed (some papers: once, some: T times).
    """
    return op.synaptic_ops * (E_MAC_PJ if op.kind in (FIRST, DENSE) else E_AC_PJ)


def published_pj(op: Operation) -> float:
    """Account 1 with the papers' own counting: everything behind the first layer is 0.9 pJ times spikes, RepConv merged.

    Check: QSD-Transformer 15M has 59 M products in the first layer and 9.9 G behind it when merged; with the mean count
    of 0.25 this gives the published 2.5 mJ.

    >>> first = Operation("stem", FIRST, (), 59_000_000, 0, 4, 1, 1)
    >>> rest = Operation("rest", COUNT, (), 9_900_000_000, 0, 4, 1, 1, levels=4, mean_count=0.25)
    >>> round((published_pj(first) + published_pj(rest)) / 1e9, 2)       # mJ
    2.5
    """
    macs = op.macs if op.published_macs is None else op.published_macs
    count = op.mean_count if op.published_count is None else op.published_count
    return op.steps * macs * (E_MAC_PJ if op.kind == FIRST else E_AC_PJ * count)


def _product_pj(op: Operation, input_bits: int) -> float:
    """One multiply-accumulate of an input code with a weight (or, in attention, with the other side's code)."""
    if op.weight_bits == FLOAT_BITS:
        return E_MAC_PJ
    return multiply_pj(input_bits, op.weight_bits) + add_pj(op.accumulator_bits)


def _rescale_pj(op: Operation) -> float:
    """Batch norm of one output: a fixed-point multiplier and a bias on 32 bits, or their float counterparts."""
    return E_MAC_PJ if op.weight_bits == FLOAT_BITS else multiply_pj(32, 32) + add_pj(32)


def bit_aware(op: Operation, model_bytes: float) -> Energy:
    """Account 2 for one layer.

    Arithmetic: spikes: an addition at the accumulator's width per spike. Counts: the cheaper of n additions and one
    narrow product per nonzero count, as the runtime picks. Other inputs: a product everywhere. Each output is rescaled.
    Memory: each weight byte comes once per image from the memory that holds the whole model; each input code is written
    once by its neuron and read once, in the memory that holds the layer's input.

    model_bytes: packed bytes of all weights.
    """
    executed = op.steps * op.macs
    if op.kind in (FIRST, DENSE):
        arithmetic = executed * _product_pj(op, op.code_bits)
    else:
        addition = E_AC_PJ if op.weight_bits == FLOAT_BITS else add_pj(op.accumulator_bits)
        arithmetic = executed * min(op.mean_count * addition, op.density * _product_pj(op, op.code_bits))
    arithmetic += op.steps * op.outputs * _rescale_pj(op)
    step_bytes = op.inputs * op.code_bits / 8
    return Energy(arithmetic, traffic_pj(op.packed_bytes, model_bytes), traffic_pj(2 * op.steps * step_bytes, step_bytes))


def quantized_ann(op: Operation, model_bytes: float) -> Energy:
    """Account 3 for one layer: one dense pass on codes of log2(T * D + 1) bits with the same weights."""
    spiking = op.kind in (SPIKE, COUNT, ATTENTION)
    bits = code_bits(op.levels * op.steps) if spiking else op.code_bits
    arithmetic = op.macs * _product_pj(op, bits) + op.outputs * _rescale_pj(op)
    moved = op.inputs * bits / 8
    return Energy(arithmetic, traffic_pj(op.packed_bytes, model_bytes), traffic_pj(2 * moved, moved))


def potentials(traffic: Iterable[tuple[int, int]]) -> Energy:
    """The 32-bit potentials that are kept between operations, as (bytes moved, bytes held) pairs.

    They are the residual stream and, in a spiking network of several steps, the state of its neurons.

    >>> potentials([(8, 8_000), (8, 500_000)]).total_pj
    110.0
    """
    return Energy(0.0, potentials_pj=sum(traffic_pj(moved, held) for moved, held in traffic))


def describe_constants() -> list[str]:
    """The constants as lines of text."""
    return [f"{name}: {c.value:g} {c.unit} ({c.source})" for name, c in CONSTANTS.items()]
