"""snnTorch's networks: `convert(model, example)`.

| snnTorch | here |
|---|---|
| `Leaky`, reset_mechanism "subtract" | `LIF(beta, reset="late", scale_input=False, strict=True)` |
| `Leaky`, "zero" | the same with reset "hard"; with "none", reset "none" |
| `Lapicque`, "subtract" or "none" | the same, with its R, C and time step in decay and threshold |
| a forward that loops over time | the same layers, each called once on the whole sequence |
| a network of one step (`nn.Sequential` with `init_hidden=True`) | a network over `steps` steps |

snnTorch's neurons fire above the threshold, and subtract it one step later, after the leak.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from bitspike.extras import explain
from bitspike.interop.concrete import ConcreteTracer
from bitspike.interop.rolling import Roller, over_sequences
from bitspike.interop.translate import Borrowed, InteropError, fires_above, number, stateless_copy
from bitspike.neurons import LIF

_RESETS = {"_base_sub": "late", "_base_zero": "hard", "_base_int": "none"}


def _library() -> ModuleType:
    try:
        import snntorch
    except ModuleNotFoundError as error:
        raise explain(error) or error from None
    return snntorch


def convert(model: nn.Module, example: Tensor, *, steps: int | None = None, output: int = 0) -> torch.fx.GraphModule:
    """A copy of a snnTorch network that takes whole sequences and whose neurons are bitspike's.

    The forward is traced on the example, and its loop over time is rolled up: each layer is called once on [T, B, ...]. The
    copy keeps the names of layers and neurons (a convolution, norm or pool "conv1" becomes "conv1.0"), has its own weights
    and holds no state. Weights, `beta` and `threshold` are taken as they are; the latter two stay fixed from then on.

    Args:
        model: its forward makes all steps; or one step, with `init_hidden=True` in all neurons, then say how many `steps`.
        example: an input as the model takes it. The copy takes other batch sizes.
        steps: T, for a network of one step. The copy takes the input of one step [B, ...], repeated, or sequences [T, B, ...].
        output: which of several results the copy returns; the default is the first, by custom the spikes [T, B, ...].
    Errors: InteropError: a neuron or a forward without an integer form, with its place. bitspike.extras.MissingExtra: snnTorch
        is not installed.
    """
    snntorch = _library()
    root = stateless_copy(model).eval()
    rules = _Rules(snntorch)
    neurons = {name: rules.neuron(module, name) for name, module in root.named_modules() if rules.is_neuron(module, name)}
    if not neurons:
        raise InteropError(f"{type(model).__name__} has no neurons of snnTorch.")
    tracer = ConcreteTracer(example, lambda m, name: name in neurons or (
        m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)))
    try:
        graph = tracer.trace(root)
    except torch.fx.proxy.TraceError as error:
        raise InteropError(f"{type(model).__name__}.forward cannot be followed: {error}. Its loop and its branches may "
                           "depend on shapes and settings, not on what tensors hold; it takes one tensor.") from error
    calls: dict[str, list[torch.fx.Node]] = {name: [] for name in neurons}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in calls:
            calls[node.target].append(node)
    T = _steps({name: len(made) for name, made in calls.items()}, steps)
    roller = Roller(root, graph, tracer.values, calls, T)
    rolled = roller.run(output)
    over_sequences(root, roller.sequences)
    for name, neuron in neurons.items():
        root.set_submodule(name, neuron)
    new = torch.fx.GraphModule(root, rolled, type(model).__name__)
    new.meta["bitspike"] = {"time_steps": T, "one_step": roller.count == 1, "dims": example.dim()}  # survives a deep copy
    return new.train(model.training)


def _steps(counts: dict[str, int], steps: int | None) -> int:
    """T, from how often each neuron is called."""
    numbers = sorted(set(counts.values()))
    if len(numbers) > 1 or numbers[0] == 0:
        low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise InteropError(f"neuron {low!r} is run {counts[low]} times and {high!r} {counts[high]} times; all must be "
                           "run once per step. Give each place a neuron of its own, and leave out neurons that are not used.")
    if numbers[0] == 1 and steps is None:
        raise InteropError("the forward makes one step; say how many the network is run for, for example "
                           "convert(model, example, steps=25).")
    if numbers[0] > 1 and steps not in (None, numbers[0]):
        raise InteropError(f"the forward makes {numbers[0]} steps, steps={steps} was given; leave it out.")
    if steps is not None and steps < 1:
        raise InteropError(f"steps={steps}; at least 1 is needed.")
    return steps if numbers[0] == 1 and steps is not None else numbers[0]


class _Rules:
    """Which of snnTorch's neurons becomes what."""

    def __init__(self, snntorch: ModuleType) -> None:
        self.base, self.leaky, self.lapicque = snntorch.SpikingNeuron, snntorch.Leaky, snntorch.Lapicque

    def is_neuron(self, module: nn.Module, name: str) -> bool:
        """Is this one of snnTorch's neurons? Errors: InteropError for one without an integer form."""
        if type(module) in (self.leaky, self.lapicque):
            return True
        if isinstance(module, self.base) or type(module).__module__.startswith("snntorch."):
            raise InteropError(f"{name or 'the model'} ({type(module).__name__}): this module of snnTorch has no integer form "
                               "here. Neurons that have one: Leaky, and Lapicque with reset_mechanism='subtract' or 'none'. "
                               "A second state (Synaptic, Alpha) or a recurrent connection (RLeaky, SLSTM) has none.")
        return False

    def neuron(self, node: Any, where: str) -> LIF:
        """Our neuron in place of `Leaky` or `Lapicque`."""
        where = f"{where} ({type(node).__name__})"
        reset = _RESETS[node.state_function.__func__.__name__]
        decay, gain = self._decay_and_gain(node, where, reset)
        threshold = number(node.threshold, where, "threshold") / gain
        if node.inhibition:
            raise InteropError(f"{where}: inhibition=True lets only the strongest neuron fire, which has no integer form.")
        if node.state_quant:
            raise InteropError(f"{where}: state_quant rounds the potential in its own way; leave it out and give the "
                               "neuron a 'membrane' rule in the spec of quantize_.")
        if number(node.graded_spikes_factor, where, "graded_spikes_factor") != 1:
            raise InteropError(f"{where}: graded_spikes_factor={float(node.graded_spikes_factor):g}; an integer neuron "
                               "gives 0 or 1. Multiply the weights of the next layer by it instead.")
        delayed = bool(getattr(node, "reset_delay", True))
        if reset == "late" and not delayed:
            raise InteropError(f"{where}: reset_delay=False with reset_mechanism='subtract' takes off the threshold at once, "
                               "but only once while the potential stays above it, which has no integer form. Use "
                               "reset_delay=True, or reset_mechanism='zero'.")
        if not threshold > 0:
            raise InteropError(f"{where}: threshold={threshold:g}; it must be positive.")
        strict = fires_above(node.spike_grad, where)
        if reset == "late" and decay == 0:
            raise InteropError(f"{where}: beta=0 with reset_mechanism='subtract' remembers nothing but its last spike; "
                               "use reset_mechanism='none', where there is nothing to reset.")
        name = getattr(node.spike_grad, "__qualname__", type(node.spike_grad).__name__).partition(".")[0]
        return LIF(decay, threshold, reset, scale_input=False, detach_reset=delayed, surrogate=Borrowed(node.spike_grad, name),
                   strict=strict).train(node.training)

    def _decay_and_gain(self, node: Any, where: str, reset: str) -> tuple[float, float]:
        if type(node) is self.leaky:
            return min(max(number(node.beta, where, "beta"), 0.0), 1.0), 1.0
        step, R, C = (number(getattr(node, name), where, name) for name in ("time_step", "R", "C"))
        if reset == "hard":
            raise InteropError(f"{where}: with reset_mechanism='zero', Lapicque forgets the input of the step after a "
                               "spike, which has no integer form. Use 'subtract', or Leaky.")
        decay = 1 - step / (R * C)
        if not 0 <= decay <= 1 or C <= 0:
            raise InteropError(f"{where}: R={R:g}, C={C:g}, time_step={step:g} multiply the potential by {decay:g} "
                               "each step; 0 to 1 is allowed. Take a shorter time_step.")
        return decay, step / C
