"""The report: one row per layer, three accounts of energy, sizes in both conventions; as text and as JSON."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bitspike import cost
from bitspike.cost import Energy, Operation
from bitspike.deploy.fields import printable


@dataclass(frozen=True)
class Report:
    """What one image costs, layer by layer. Sizes in bytes, energy in pJ, time in ms.

    name; source "torch model" | "artifact"; layers, in execution order; images: how many the statistics are over;
    spikes_per_neuron: mean count of all neurons over the whole sequence; residuals, states: (bytes moved, bytes
    held) of each potential that is written and read again for one image: the residual stream, which a conventional network has
    too, and the state of neurons between time steps; file_bytes: on disk (artifact); ms_per_image: measured, with
    `instructions` and `threads`. Layers whose input is no spikes (pictures, real values) have no mean count and no density:
    torch sees normalised numbers there, a file 8-bit codes.
    """

    name: str
    source: str
    layers: tuple[Operation, ...]
    images: int
    spikes_per_neuron: float
    residuals: tuple[tuple[int, int], ...] = ()
    states: tuple[tuple[int, int], ...] = ()
    file_bytes: int | None = None
    ms_per_image: float | None = None
    instructions: str | None = None
    threads: int | None = None

    # ------------------------------------------------------------------------------------------ totals
    @cached_property
    def weight_bytes(self) -> int:
        """Packed bytes of all weights."""
        return sum(op.packed_bytes for op in self.layers)

    @property
    def weights(self) -> int:
        """Number of weights of convolutions and linear layers."""
        return sum(op.weights for op in self.layers)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(number of weights, bits) per layer."""
        return [(op.weights, op.weight_bits) for op in self.layers if op.weights]

    @property
    def macs(self) -> int:
        """Dense products of one time step."""
        return sum(op.macs for op in self.layers)

    @property
    def products(self) -> float:
        """Multiplications the spiking network still does: first layer and real-valued inputs."""
        return sum(op.synaptic_ops for op in self.layers if op.kind in (cost.FIRST, cost.DENSE))

    @property
    def synaptic_ops(self) -> float:
        """Additions driven by spikes, over all time steps."""
        return sum(op.synaptic_ops for op in self.layers if op.kind not in (cost.FIRST, cost.DENSE))

    @property
    def s_ace(self) -> float:
        """Bit operations of all layers, zeros included (`cost.s_ace`)."""
        return sum(map(cost.s_ace, self.layers))

    @property
    def ns_ace(self) -> float:
        """Bit operations where there is a spike (`cost.ns_ace`)."""
        return sum(map(cost.ns_ace, self.layers))

    @property
    def literature_pj(self) -> float:
        """Account 1 with every product counted as one."""
        return sum(cost.literature_pj(op) for op in self.layers)

    @property
    def published_pj(self) -> float:
        """Account 1 as the papers count it."""
        return sum(cost.published_pj(op) for op in self.layers)

    @property
    def bit_aware(self) -> Energy:
        """Account 2."""
        kept = cost.potentials([*self.residuals, *self.states])
        return sum((cost.bit_aware(op, self.weight_bytes) for op in self.layers), kept)

    @property
    def quantized_ann(self) -> Energy:
        """Account 3."""
        kept = cost.potentials(self.residuals)
        return sum((cost.quantized_ann(op, self.weight_bytes) for op in self.layers), kept)

    # ------------------------------------------------------------------------------------------- forms
    def row(self, op: Operation) -> dict[str, Any]:
        """One layer as plain data."""
        spikes = op.kind not in (cost.FIRST, cost.DENSE)
        return {"layer": op.name, "kind": op.kind, "shape": list(op.shape), "weight_bits": op.weight_bits,
                "weights": op.weights, "packed_bytes": op.packed_bytes, "macs": op.macs, "steps": op.steps,
                "input_levels": op.levels, "mean_count": op.mean_count if spikes else None,
                "density": op.density if spikes else None,
                "synaptic_ops": op.synaptic_ops, "s_ace": cost.s_ace(op), "ns_ace": cost.ns_ace(op),
                "literature_pj": cost.literature_pj(op),
                "bit_aware_pj": cost.bit_aware(op, self.weight_bytes).total_pj,
                "quantized_ann_pj": cost.quantized_ann(op, self.weight_bytes).total_pj}

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain JSON data."""
        totals = {"weights": self.weights, "packed_bytes": self.weight_bytes, "file_bytes": self.file_bytes,
                  "published_params_m": cost.published_params_m(self.sizes),
                  "published_bytes": cost.published_bytes(self.sizes), "macs": self.macs, "products": self.products,
                  "synaptic_ops": self.synaptic_ops, "spikes_per_neuron": self.spikes_per_neuron,
                  "s_ace": self.s_ace, "ns_ace": self.ns_ace,
                  "bit_budget": cost.bit_budget(self.layers),
                  "literature_pj": self.literature_pj, "published_pj": self.published_pj,
                  "bit_aware": _parts(self.bit_aware), "quantized_ann": _parts(self.quantized_ann),
                  "ms_per_image": self.ms_per_image, "instructions": self.instructions, "threads": self.threads}
        return {"name": self.name, "source": self.source, "images": self.images,
                "layers": [self.row(op) for op in self.layers], "totals": totals,
                "constants": {n: {"value": c.value, "unit": c.unit, "source": c.source} for n, c in cost.CONSTANTS.items()}}

    #: narrower than this, the table of layers loses its columns
    WIDTH: ClassVar[int] = 170

    def __rich__(self) -> RenderableType:
        return Group(self._table(), self._summary(), Text("\n".join(_constants()), style="dim"))

    def _table(self) -> Table:
        title = printable(f"{self.name} ({self.source}, per image, mean of {self.images})")
        table = Table(title=Text(title), title_justify="left")
        for heading in ("layer", "kind", "weight"):
            table.add_column(heading, no_wrap=True)
        for heading in ("bits", "bytes", "MACs", "T", "count", "density", "syn. ops", "lit. nJ", "bit-aware nJ", "ANN nJ"):
            table.add_column(heading, justify="right", no_wrap=True)
        for op in self.layers:
            row = self.row(op)
            table.add_row(Text(printable(op.name)), op.kind, "x".join(map(str, op.shape)), str(op.weight_bits),
                          f"{op.packed_bytes:,}", quantity(op.macs), str(op.steps), _or_none(row["mean_count"], ".3f"),
                          _or_none(row["density"], ".1%"), quantity(op.synaptic_ops), *(f"{row[k] / 1e3:,.1f}" for k in (
                              "literature_pj", "bit_aware_pj", "quantized_ann_pj")))
        return table

    def _budgets(self) -> str:
        """Why the bit budget of the network is not that of most layers, where it is not."""
        own = [cost.bit_budget([op]) for op in self.layers if op.kind in (cost.SPIKE, cost.COUNT)]
        return f": the mean over MACs of layers from {min(own):g} to {max(own):g}" if own and min(own) < max(own) else ""

    def _summary(self) -> Table:
        table = Table(show_header=False, box=None)
        table.add_column(style="bold")
        table.add_column()
        on_disk = "" if self.file_bytes is None else f"; the file on disk {self.file_bytes:,} bytes"
        two, three = self.bit_aware, self.quantized_ann
        rows = [
            ("size", f"{self.weights:,} weights in {self.weight_bytes:,} bytes{on_disk}"),
            ("published convention", f"{cost.published_params_m(self.sizes):.3f} M 32-bit parameters, "
                                     f"{cost.published_bytes(self.sizes) / 1e6:.3f} MB (weights * bits / 8)"),
            ("operations", f"{quantity(self.synaptic_ops)} additions on spikes and {quantity(self.products)} products; "
                           f"dense: {quantity(self.macs)} MACs a step"),
            ("arithmetic by width", f"NS-ACE {quantity(self.ns_ace)}, S-ACE "
                                    f"{quantity(self.s_ace)} bit operations; bit budget "
                                    f"{cost.bit_budget(self.layers):.3g} (T x weight bits x spike bits{self._budgets()})"),
            ("spikes per neuron", f"{self.spikes_per_neuron:.3f}"),
            ("energy 1, literature", f"{energy(self.literature_pj)} (as the papers count: {energy(self.published_pj)})"),
            ("energy 2, bit-aware", _told(two)),
            ("energy 3, quantized ANN", f"{_told(three)}: {three.total_pj / max(two.total_pj, 1e-9):.2f} x account 2"),
        ]
        if self.ms_per_image is not None:
            rows.append(("time", f"{self.ms_per_image:.3f} ms per image, measured ({self.instructions}, "
                                 f"{self.threads} thread{'s' if self.threads != 1 else ''})"))
        for left, right in rows:
            table.add_row(left, right)
        return table


def _or_none(number: float | None, form: str) -> str:
    return "n/a" if number is None else format(number, form)


def quantity(number: float) -> str:
    """A count with a decimal prefix.

    >>> quantity(950), quantity(57_600_000), quantity(6.4e9)
    ('950', '57.6 M', '6.40 G')
    """
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}" if number / limit >= 10 else f"{number / limit:.2f} {letter}"
    return f"{number:.0f}"


def energy(picojoules: float) -> str:
    """An energy with its unit.

    >>> energy(2.5e9), energy(31_000), energy(12)
    ('2.500 mJ', '31.000 nJ', '12.000 pJ')
    """
    for limit, unit in ((1e9, "mJ"), (1e6, "uJ"), (1e3, "nJ")):
        if picojoules >= limit:
            return f"{picojoules / limit:.3f} {unit}"
    return f"{picojoules:.3f} pJ"


def _parts(e: Energy) -> dict[str, float]:
    return {"arithmetic_pj": e.arithmetic_pj, "weights_pj": e.weights_pj, "activations_pj": e.activations_pj,
            "potentials_pj": e.potentials_pj, "total_pj": e.total_pj}


def _told(e: Energy) -> str:
    return (f"{energy(e.total_pj)} (arithmetic {energy(e.arithmetic_pj)}, weights {energy(e.weights_pj)}, activations "
            f"{energy(e.activations_pj)}, potentials {energy(e.potentials_pj)})")


def _constants() -> list[str]:
    return ["Constants: " + ", ".join(f"{n} {c.value:g} {c.unit}" for n, c in cost.CONSTANTS.items()) + ".",
            "Source: " + next(iter(cost.CONSTANTS.values())).source + "; DRAM: lower end of 1300-2600."]
