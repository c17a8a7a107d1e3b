"""Does a converted network fire as the original? Measured neuron by neuron, in double precision."""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitspike.interop.translate import InteropError, stateless_copy
from bitspike.neurons import IELIF, LIF

#: how to run the original on the input: (model, input) -> anything
Run = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True)
class SameSpikes:
    """What `check_same_spikes` found.

    neurons: name -> (outputs compared, outputs that differ), in the order of the converted network.
    silent: neurons of which no output is above 0; the comparison says nothing about what they do when they fire.
    spikes: sum of all outputs. largest_difference: of the result, None where the two have no result in common.
    """

    neurons: Mapping[str, tuple[int, int]]
    silent: tuple[str, ...]
    spikes: float
    largest_difference: float | None

    @property
    def compared(self) -> int:
        """Number of neuron outputs compared, over all steps and samples."""
        return sum(n for n, _ in self.neurons.values())

    @property
    def different(self) -> int:
        """Number of those that differ."""
        return sum(n for _, n in self.neurons.values())

    def __str__(self) -> str:
        silent = f"; {len(self.silent)} layers never fire, for example {self.silent[0]}" if self.silent else ""
        return (f"{self.different} of {self.compared:,} outputs of {len(self.neurons)} neuron layers differ "
                f"({self.spikes / max(1, self.compared):.3f} spikes each{silent})")


@torch.no_grad()
def check_same_spikes(original: nn.Module, converted: nn.Module, x: Tensor, *, run: Run | None = None,
                      dtype: torch.dtype = torch.float64) -> SameSpikes:
    """Prove that a converted network fires the same spikes as the original on the input x, and return the count.

    Both are copied, set to evaluation mode and to `dtype`, and start from rest. In double precision every single output of
    every neuron must be the same: the two write the same equation in different ways, and a potential that lies within one
    rounding of the threshold may fall on either side. float32 shows how often that happens.

    Args: x: input as both take it. run(original, x): how the original is run, where that is not `original(x)`; a single-step
        network of snnTorch is run as often as it was converted for.
    Errors: InteropError: outputs differ (with the first neuron and step), or a neuron of the converted network has none of the
        same name in the original. Quantize after the check: quantized weights fire other spikes.

    >>> from bitspike.neurons import LIF
    >>> net = nn.Sequential(nn.Linear(4, 8), LIF())
    >>> check_same_spikes(net, copy.deepcopy(net), torch.randn(3, 2, 4)).different
    0
    """
    first = stateless_copy(original).to(dtype).eval()
    second = copy.deepcopy(converted).to(dtype).eval()
    groups = _neurons(second)
    missing = [name for name in groups if name not in dict(first.named_modules())]
    if missing or not groups:
        what = f"its neuron {missing[0]!r} has none of that name in the original" if missing else "it has no neurons"
        raise InteropError(f"the converted network cannot be compared: {what}.")
    x = x.to(dtype) if x.is_floating_point() else x
    wanted = _record(first, list(groups), lambda: (run or _once(converted))(first, x), cast=dtype)
    parts = _record(second, [part for names in groups.values() for part in names], lambda: second(x))
    rows: dict[str, tuple[int, int]] = {}
    silent, spikes, broken = [], 0.0, ""
    for name, names in groups.items():
        found = torch.cat([_sequence(parts[part]) for part in names], 2 if len(names) > 1 else 0)
        expected = _sequence(wanted[name])
        if expected.shape != found.shape and expected.numel() == found.numel():
            expected = expected.reshape(found.shape)  # the original merges time and batch here
        if expected.shape != found.shape:
            raise InteropError(f"neuron {name!r} gives {list(found.shape)} in the converted network and {list(expected.shape)} "
                               "in the original. Is it used more than once, or run for another number of steps?")
        differs = (expected != found).flatten(1).sum(1)
        rows[name] = (found.numel(), int(differs.sum()))
        total = float(found.sum(dtype=torch.float64))
        spikes += total
        silent += [] if total else [name]
        if not broken and int(differs.sum()):
            broken = (f"first at step {int(differs.nonzero()[0])} of neuron {name!r}, {int(differs.sum())} of {found.numel()} "
                      "outputs")
    report = SameSpikes(rows, tuple(silent), spikes, _difference(wanted[""], parts[""]))
    if broken and dtype == torch.float64:
        raise InteropError(f"the converted network does not fire as the original: {report}; {broken}.")
    return report


def _neurons(model: nn.Module) -> dict[str, list[str]]:
    """Name in the original -> names in the converted network: a `ModuleList` of neurons stands for one."""
    modules = dict(model.named_modules())
    out: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, LIF | IELIF):
            parent = name.rpartition(".")[0]
            out.setdefault(parent if isinstance(modules[parent], nn.ModuleList) and
                           all(isinstance(m, LIF | IELIF) for m in modules[parent]) else name, []).append(name)
    return out


def _once(converted: nn.Module) -> Run:
    """How the original of this network is run."""
    facts = getattr(converted, "meta", {}).get("bitspike", {})
    if not facts.get("one_step"):
        return lambda model, x: model(x)
    return lambda model, x: [model(x[t] if x.dim() > facts["dims"] else x) for t in range(facts["time_steps"])]


def _record(model: nn.Module, names: list[str], run: Callable[[], Any], cast: torch.dtype | None = None) \
        -> dict[str, Any]:
    """Outputs of the named modules, one entry per call, and the model's result under ""."""
    seen: dict[str, Any] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if cast is not None:  # some spike functions give float32 whatever they are given
                output = tuple(y.to(cast) for y in output) if isinstance(output, tuple) else output.to(cast)
            seen[name].append(output[0] if isinstance(output, tuple) else output)
            return output
        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        seen[""] = run()
    finally:
        for handle in handles:
            handle.remove()
    unused = [name for name in names if not seen[name]]
    if unused:
        raise InteropError(f"neuron {unused[0]!r} was not used in this forward.")
    return seen


def _sequence(calls: list[Tensor]) -> Tensor:
    """One whole sequence: of one call, or of one call per step."""
    return calls[0] if len(calls) == 1 else torch.stack(calls)


def _difference(a: Any, b: Any) -> float | None:
    a = a[0] if isinstance(a, tuple) and a else a
    a = torch.stack([y[0] if isinstance(y, tuple) else y for y in a]) if isinstance(a, list) and a else a
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return float((a.double() - b.double()).abs().max())
    return None
