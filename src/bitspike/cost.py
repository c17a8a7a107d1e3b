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

Accounts 2 and 3 take a `Technology`: `CMOS_45NM` (the default), `BIT_PROPORTIONAL`, or one read from a JSON file.

Standard library only, so that a search and a report on a device use the same numbers.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


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
    "shift stage": Constant(0.25, "additions of the same width",
                            "assumption: a stage of a barrel shifter is a row of 2:1 multiplexers, of 6 transistors a bit "
                            "where a full adder has 24 to 28; no measurement at 45 nm was consulted"),
}
E_MAC_PJ = CONSTANTS["float32 multiply"].value + CONSTANTS["float32 add"].value
E_AC_PJ = CONSTANTS["float32 add"].value

#: largest number of bytes -> the memory that holds them
MEMORY_LEVELS: tuple[tuple[float, str], ...] = (
    (8 << 10, "SRAM 8 kB"), (32 << 10, "SRAM 32 kB"), (1 << 20, "SRAM 1 MB"), (math.inf, "DRAM"))


class CostError(ValueError):
    """A technology that cannot be used: unknown name, or a file with unknown or impossible constants."""


@dataclass(frozen=True)
class Technology:
    """What the operations of one device cost: its constants, and the rule that turns them into the energy of a layer.

    rule "gates": accounts 2 and 3 as this module describes them. rule "bits": account 1 times weight bits / 32, memory free;
    then compression and energy factors are one, as in SpikeHQ's rows for DVS-Gesture (8.72x = 32 / 3.67 bits) and
    CIFAR10-DVS (10.2x = 32 / 3.14), whose constants were not published.
    """

    name: str
    constants: Mapping[str, Constant] = field(default_factory=lambda: CONSTANTS)
    rule: str = "gates"

    def __getitem__(self, constant: str) -> float:
        return self.constants[constant].value

    def describe(self) -> list[str]:
        """The constants as lines of text."""
        return [f"{name}: {c.value:g} {c.unit} ({c.source})" for name, c in self.constants.items()]


CMOS_45NM = Technology("45nm")
BIT_PROPORTIONAL = Technology("bit_proportional", rule="bits")
TECHNOLOGIES = {t.name: t for t in (CMOS_45NM, BIT_PROPORTIONAL)}


def technology(name: str | os.PathLike[str]) -> Technology:
    """A preset by name, or a device's own constants from a JSON file.

    The file: `{"name": "my chip", "constants": {"SRAM 1 MB": {"value": 60, "source": "data sheet, table 4"}}}`; units are
    those of `CONSTANTS`, what is not named stays as in "45nm"; "rule" may be "bits". Errors: CostError.

    >>> technology("bit_proportional").rule
    'bits'
    """
    if str(name) in TECHNOLOGIES:
        return TECHNOLOGIES[str(name)]
    path = Path(name)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise CostError(f"technology {str(name)!r}: no preset ({', '.join(TECHNOLOGIES)}) and no file that can be read "
                        f"({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise CostError(f"{path}: not JSON ({error}).") from None
    given = data.get("constants") if isinstance(data, dict) else None
    if not isinstance(given, dict) or set(data) - {"name", "constants", "rule"}:
        raise CostError(f"{path}: expected an object with 'constants' and, if you like, 'name' and 'rule'.")
    if data.get("rule", "gates") not in ("gates", "bits"):
        raise CostError(f"{path}: rule={data['rule']!r}; allowed: 'gates', 'bits'.")
    constants = dict(CONSTANTS)
    for key, entry in given.items():
        if key not in constants:
            raise CostError(f"{path}: unknown constant {key!r}; allowed: {', '.join(constants)}.")
        value = entry.get("value") if isinstance(entry, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf \
                or not isinstance(entry.get("source"), str):
            raise CostError(f"{path}: constant {key!r} is {entry!r}; expected {{\"value\": a number of at least 0 in "
                            f"{constants[key].unit}, \"source\": a text}}.")
        constants[key] = Constant(float(value), constants[key].unit, entry["source"])
    return Technology(str(data.get("name", path.stem)), constants, str(data.get("rule", "gates")))


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
    weight_kind: the artifact's scheme, "uniform", "pow2" or "binary".
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
    weight_kind: str = "uniform"

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
    def shifts(self) -> int:
        """Largest exponent of a power-of-two weight, 0 for other schemes: how far an input may be shifted."""
        return 2 ** (self.weight_bits - 1) - 2 if self.weight_kind == "pow2" else 0

    @property
    def code_width(self) -> int:
        """Bits of a weight as a two's complement number: its own width, or what the largest power of two needs.

        >>> [Operation("a", SPIKE, (), 1, 1, k, 1, 1, weight_kind="pow2").code_width for k in (2, 3, 4)]
        [2, 4, 8]
        """
        return self.shifts + 2 if self.weight_kind == "pow2" else self.weight_bits

    @property
    def accumulator_bits(self) -> int:
        """Width that no sum of this layer can exceed (at most 32: that is what the runtime proves)."""
        if self.weight_bits == FLOAT_BITS or not self.outputs:
            return 32
        fan_in = max(1, self.macs // self.outputs)
        top = 255 if self.kind in (FIRST, DENSE) else self.levels
        return min(32, self.code_width + math.ceil(math.log2(fan_in * top + 1)))


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


def layer_bytes(weights: int, bits: int, channels: int) -> int:
    """Bytes of one layer in a `.bitspike` file: packed codes, and an int32 multiplier and offset per output.

    Full-precision layers (32 bits) are deployed with 8. Exact unless two layers have the very same table (stored once).

    >>> layer_bytes(9, 1, 3)
    26
    """
    return packed_bytes(weights, 8 if bits == FLOAT_BITS else bits) + 8 * channels


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


# ------------------------------------------------------------------------------------ arithmetic by width
def s_ace(op: Operation) -> float:
    """Synaptic arithmetic computation effort of a layer: T * MACs * weight bits * input bits, zeros included.

    A count 0..D is D binary steps of one bit, pixels and real-valued inputs have 8. In attention the other side's code
    takes the place of the weight. Source: Shen et al., "Are conventional SNNs really efficient?", CVPR 2024; how it counts
    the first layer could not be consulted.

    >>> s_ace(Operation("conv", SPIKE, (), 1000, 10, 1, 1, 1, steps=4, mean_count=0.1))
    4000
    """
    width = op.code_bits if op.kind in (FIRST, DENSE) else op.levels
    return op.steps * op.macs * op.weight_bits * width


def ns_ace(op: Operation) -> float:
    """Its neuromorphic form: only where there is a spike, so S-ACE times the firing rate.

    >>> ns_ace(Operation("conv", SPIKE, (), 1000, 10, 1, 1, 1, steps=4, mean_count=0.1))
    400.0
    """
    return s_ace(op) if op.kind in (FIRST, DENSE) else op.synaptic_ops * op.weight_bits


def bit_budget(ops: Iterable[Operation]) -> float:
    """T * weight bits * spike bits of a network, the mean over its spike-driven MACs; 0 where there are none.

    >>> bit_budget([Operation("a", SPIKE, (), 9, 9, 1, 1, 1, steps=4), Operation("b", FIRST, (), 9, 9, 32, 1, 1)])
    4.0
    """
    driven = [op for op in ops if op.kind in (SPIKE, COUNT)]
    return sum(map(s_ace, driven)) / max(1, sum(op.macs for op in driven))


# ------------------------------------------------------------------------------------------- arithmetic
def add_pj(bits: int, on: Technology = CMOS_45NM) -> float:
    """Integer addition: through Horowitz' points at 8 and 32 bits, proportional to the width below 8.

    >>> [round(add_pj(bits), 4) for bits in (4, 8, 16, 32)]
    [0.015, 0.03, 0.0533, 0.1]
    """
    low, high = on["int8 add"], on["int32 add"]
    return low * bits / 8 if bits <= 8 else low + (high - low) * (bits - 8) / 24


def multiply_pj(a_bits: int, b_bits: int, on: Technology = CMOS_45NM) -> float:
    """Integer product: proportional to the cells of an array multiplier, a * b, from Horowitz' 8 x 8 bits.

    At 32 x 32 bits this gives 3.2 pJ, where Horowitz has 3.1. A factor of one bit is an AND: taken as free.

    >>> multiply_pj(8, 8), round(multiply_pj(3, 4), 4), round(multiply_pj(32, 32), 2), multiply_pj(1, 4)
    (0.2, 0.0375, 3.2, 0.0)
    """
    return 0.0 if min(a_bits, b_bits) <= 1 else on["int8 multiply"] * a_bits * b_bits / 64


def shift_pj(bits: int, positions: int, on: Technology = CMOS_45NM) -> float:
    """Barrel shift of a number within `bits` bits by 0..positions-1: one row of multiplexers per stage, log2(positions) stages.

    >>> round(shift_pj(8, 8), 4), round(shift_pj(32, 32), 4), shift_pj(2, 1)
    (0.0225, 0.125, 0.0)
    """
    return math.ceil(math.log2(positions)) * on["shift stage"] * add_pj(bits, on)


def memory_level(held_bytes: float) -> str:
    """The smallest memory that holds so many bytes.

    >>> memory_level(5_000), memory_level(5_000_000)
    ('SRAM 8 kB', 'DRAM')
    """
    return next(name for limit, name in MEMORY_LEVELS if held_bytes <= limit)


def traffic_pj(moved_bytes: float, held_bytes: float, on: Technology = CMOS_45NM) -> float:
    """Energy to move bytes in or out of the memory that holds `held_bytes`.

    >>> traffic_pj(8, held_bytes=8_000)
    10.0
    """
    return on[memory_level(held_bytes)] * moved_bytes / 8


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


def _float_mac_pj(on: Technology) -> float:
    return on["float32 multiply"] + on["float32 add"]


def _product_pj(op: Operation, input_bits: int, on: Technology) -> float:
    """One multiply-accumulate of an input code with a weight (or, in attention, with the other side's code).

    A power of two shifts the code instead of multiplying it.
    """
    if op.weight_bits == FLOAT_BITS:
        return _float_mac_pj(on)
    product = (shift_pj(input_bits + op.shifts, op.shifts + 1, on) if op.weight_kind == "pow2"
               else multiply_pj(input_bits, op.weight_bits, on))
    return product + add_pj(op.accumulator_bits, on)


def _addition_pj(op: Operation, on: Technology) -> float:
    """What one spike costs: the weight added at the accumulator's width; a power of two is first made from its exponent."""
    if op.weight_bits == FLOAT_BITS:
        return on["float32 add"]
    return add_pj(op.accumulator_bits, on) + (shift_pj(op.code_width, op.shifts + 1, on) if op.weight_kind == "pow2" else 0.0)


def _rescale_pj(op: Operation, on: Technology) -> float:
    """Batch norm of one output: a fixed-point multiplier and a bias on 32 bits, or their float counterparts."""
    return _float_mac_pj(on) if op.weight_bits == FLOAT_BITS else multiply_pj(32, 32, on) + add_pj(32, on)


def _by_bits(op: Operation, synaptic_ops: float, on: Technology) -> Energy:
    one = _float_mac_pj(on) if op.kind in (FIRST, DENSE) else on["float32 add"]
    return Energy(one * synaptic_ops * (op.weight_bits if op.weights else FLOAT_BITS) / FLOAT_BITS)


def bit_aware(op: Operation, model_bytes: float, on: Technology = CMOS_45NM) -> Energy:
    """Account 2 for one layer.

    Arithmetic: spikes: an addition at the accumulator's width per spike. Counts: the cheaper of n additions and one
    narrow product per nonzero count, as the runtime picks. Other inputs: a product everywhere. Each output is rescaled. A
    power-of-two weight saves the product and pays a shift, and a wider accumulator.
    Memory: each weight byte comes once per image from the memory that holds the whole model; each input code is written
    once by its neuron and read once, in the memory that holds the layer's input.

    model_bytes: packed bytes of all weights.
    """
    if on.rule == "bits":
        return _by_bits(op, op.synaptic_ops, on)
    executed = op.steps * op.macs
    if op.kind in (FIRST, DENSE):
        arithmetic = executed * _product_pj(op, op.code_bits, on)
    else:
        arithmetic = executed * min(op.mean_count * _addition_pj(op, on), op.density * _product_pj(op, op.code_bits, on))
    arithmetic += op.steps * op.outputs * _rescale_pj(op, on)
    step_bytes = op.inputs * op.code_bits / 8
    return Energy(arithmetic, traffic_pj(op.packed_bytes, model_bytes, on),
                  traffic_pj(2 * op.steps * step_bytes, step_bytes, on))


def quantized_ann(op: Operation, model_bytes: float, on: Technology = CMOS_45NM) -> Energy:
    """Account 3 for one layer: one dense pass on codes of log2(T * D + 1) bits with the same weights."""
    if on.rule == "bits":
        return _by_bits(op, op.macs, on)
    spiking = op.kind in (SPIKE, COUNT, ATTENTION)
    bits = code_bits(op.levels * op.steps) if spiking else op.code_bits
    arithmetic = op.macs * _product_pj(op, bits, on) + op.outputs * _rescale_pj(op, on)
    moved = op.inputs * bits / 8
    return Energy(arithmetic, traffic_pj(op.packed_bytes, model_bytes, on), traffic_pj(2 * moved, moved, on))


def potentials(traffic: Iterable[tuple[int, int]], on: Technology = CMOS_45NM) -> Energy:
    """The 32-bit potentials that are kept between operations, as (bytes moved, bytes held) pairs.

    They are the residual stream and, in a spiking network of several steps, the state of its neurons.

    >>> potentials([(8, 8_000), (8, 500_000)]).total_pj
    110.0
    """
    if on.rule == "bits":
        return Energy(0.0)
    return Energy(0.0, potentials_pj=sum(traffic_pj(moved, held, on) for moved, held in traffic))
