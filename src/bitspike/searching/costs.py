"""What a choice costs: bytes, average bits and energy, as a table that an integer programme can add up."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from bitspike import cost
from bitspike.cost import CMOS_45NM, Energy, Operation, Technology
from bitspike.layers import latent_weight, quantizable
from bitspike.profiling.of_torch import profile_model
from bitspike.searching.measure import Forward, call
from bitspike.searching.space import SearchError, Space
from bitspike.spec import Scheme

#: deployed form of a scheme: how its codes are stored
_STORED = {"pow2": "pow2", "binary": "binary"}


@dataclass(frozen=True)
class Totals:
    """What a choice costs. bytes: of the file; weight_bytes: of the packed codes alone; bits: average of a weight;
    energy_pj: per image, account 2 of `bitspike.cost` on the given technology."""

    bytes: int
    weight_bytes: int
    bits: float
    energy_pj: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"bytes": self.bytes, "weight_bytes": self.weight_bytes, "bits": self.bits, "energy_pj": self.energy_pj}


class Costs:
    """The cost of every candidate of every layer of one model, on the spikes of given images.

    model: full precision, any `nn.Module`; images: what it is called with, by `forward`. overhead_bytes: what a file holds
    besides the codes and the two tables of each layer (the program, class names, other tables). Spikes are those of the
    model as it is: another spec fires a little differently, which the report after training shows.
    """

    def __init__(self, model: nn.Module, images: Tensor, space: Space, technology: Technology = CMOS_45NM,
                 overhead_bytes: int = 0, forward: Forward = call) -> None:
        report = profile_model(model, images, forward=forward)
        self.space, self.technology, self.overhead = space, technology, overhead_bytes
        operations = {op.name: op for op in report.layers}
        self.layers: dict[str, Operation] = {}
        for name, layer in quantizable(model).items():
            weight = latent_weight(layer)
            # a layer the images never reach costs its bytes and no energy
            idle = Operation(name, cost.SPIKE, tuple(weight.shape), 0, weight.numel(), 32, 0, 0)
            self.layers[name] = operations.get(name, idle)
        self._other = [op for name, op in operations.items() if name not in self.layers]
        self._traffic = [*report.residuals, *report.states]

    def describe(self) -> list[str]:
        """What they follow from besides the model and the images, as lines of text."""
        return [self.technology.name, self.technology.rule, *self.technology.describe(), f"overhead {self.overhead} bytes"]

    # ------------------------------------------------------------------------------------ one layer
    def operation(self, name: str, scheme: Scheme) -> Operation:
        """The layer as the accounts see it under a scheme."""
        return replace(self.layers[name], weight_bits=scheme.bits, weight_kind=_STORED.get(scheme.kind, "uniform"))

    def layer_bytes(self, name: str, scheme: Scheme) -> int:
        """Bytes in the file: codes and tables."""
        op = self.layers[name]
        return cost.layer_bytes(op.weights, scheme.bits, op.shape[0])

    def weight_bytes(self, name: str, scheme: Scheme) -> int:
        """Bytes of the packed codes."""
        return cost.packed_bytes(self.layers[name].weights, scheme.bits)

    def layer_energy(self, name: str, scheme: Scheme, held_bytes: float) -> float:
        """pJ of one image, if the weights of the model take `held_bytes`."""
        return cost.bit_aware(self.operation(name, scheme), held_bytes, self.technology).total_pj

    # ------------------------------------------------------------------------------------ the whole
    def _outside(self) -> list[str]:
        return [name for name in self.layers if name not in self.space.layers]

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no choice changes: the file's overhead, and layers outside of the space, which are stored with 8 bits."""
        return self.overhead + sum(self.layer_bytes(name, Scheme("full")) for name in self._outside())

    @property
    def fixed_weight_bytes(self) -> int:
        """Weights outside of the space, held at their width."""
        return sum(self.weight_bytes(name, Scheme("full")) for name in self._outside())

    def fixed_energy(self, held_bytes: float) -> float:
        """pJ that no choice changes: attention, potentials, layers outside of the space."""
        outside = sum(self.layer_energy(name, Scheme("full"), held_bytes) for name in self._outside())
        other = sum((cost.bit_aware(op, held_bytes, self.technology) for op in self._other), Energy(0.0))
        return outside + other.total_pj + cost.potentials(self._traffic, self.technology).total_pj

    def of(self, choice: Mapping[str, Scheme]) -> Totals:
        """Totals of a choice for every layer of the space."""
        held = self.fixed_weight_bytes + sum(self.weight_bytes(n, s) for n, s in choice.items())
        total = self.fixed_bytes + sum(self.layer_bytes(n, s) for n, s in choice.items())
        energy = self.fixed_energy(held) + sum(self.layer_energy(n, s, held) for n, s in choice.items())
        return Totals(total, held, self.space.bits(choice), energy)

    def of_float(self) -> Totals:
        """The full-precision network: 4 bytes a weight, float32 arithmetic."""
        full = self.of({name: Scheme("full") for name in self.space.layers})
        return replace(full, bytes=4 * sum(op.weights for op in self.layers.values()), bits=32.0)

    def check(self) -> None:
        """Errors: SearchError if no image reached any layer (then energies mean nothing)."""
        if not any(op.macs for op in self.layers.values()):
            raise SearchError("none of the layers was used by the images; is the model called with the right input?")
