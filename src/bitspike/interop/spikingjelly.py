"""SpikingJelly's networks (activation_based, 0.0.0.0.14 and later): `convert(model)`.

| SpikingJelly | here |
|---|---|
| `LIFNode`, `SimpleLIFNode` | `LIF`: decay 1 - 1 / tau; `decay_input` is `scale_input`; `v_reset=None` is the soft reset |
| `IFNode`, `SimpleIFNode` | `LIF(decay=1, scale_input=False)` |
| `ParametricLIFNode` | `LIF` with the decay it has learned, from then on fixed |
| `ILIFNode` | `IELIF` with carry-over |
| `v_reset` other than 0 | the potential is counted from there: threshold `v_threshold - v_reset` |
| `layer.X` in step mode "m", `SeqToANNContainer` | `OverTime(nn.X)` |
| `MultiStepContainer`, `StepModeContainer` | `nn.Sequential` over whole sequences |
| `layer.Dropout` | the same, one mask for all steps |
| `SpikingSelfAttention` | the same product by `spike_attention`, which the exporter knows; q, k and v are layers of their own |
"""
from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bitspike.extras import explain
from bitspike.interop.translate import (
    Borrowed,
    InteropError,
    OverTime,
    SteadyDropout,
    Walk,
    fires_above,
    number,
    stateless_copy,
    stripped,
    with_hooks_of,
)
from bitspike.models.blocks import spike_attention
from bitspike.neurons import IELIF, LIF, ArcTan, Neuron, Rectangle, Sigmoid, Surrogate, Triangle

torch.fx.wrap("spike_attention")

_ALLOWED = "LIFNode, IFNode, ParametricLIFNode, ILIFNode"
#: attributes of its layers that torch's classes do not have
_STEP = ("_step_mode",)


def _library() -> tuple[ModuleType, ModuleType, ModuleType]:
    """SpikingJelly's `base`, `layer` and `neuron`. Errors: MissingExtra with the command that installs it."""
    try:
        from spikingjelly.activation_based import base, layer, neuron
    except ModuleNotFoundError as error:
        raise explain(error) or error from None
    return base, layer, neuron


def convert(model: nn.Module) -> nn.Module:
    """A copy of a SpikingJelly network whose neurons are bitspike's: whole sequences in, whole sequences out, no state.

    The copy has its own weights and keeps the class of the model, its forward and the names of its neurons; a layer in step
    mode "m" becomes `OverTime(layer)`, so that "conv1" is "conv1.0". Hooks move along and see what they saw. Membrane
    potentials that the model holds are left behind: each call starts from rest, as after `functional.reset_net`.

    Args: model: all neurons in step mode "m" (`functional.set_step_mode(model, "m")`).
    Errors: InteropError: a neuron or layer with memory and no integer form, or a model in single-step mode; with its place.
    bitspike.extras.MissingExtra: SpikingJelly is not installed.
    """
    base, layer, neuron = _library()
    return _Rules(base, layer, neuron).walk(stateless_copy(model))


class _Rules:
    """Which of SpikingJelly's classes becomes what."""

    def __init__(self, base: ModuleType, layer: ModuleType, neuron: ModuleType) -> None:
        self.base = base
        self.lif = _classes(neuron, "LIFNode", "SimpleLIFNode")
        self.integrate = _classes(neuron, "IFNode", "SimpleIFNode")
        self.plif = _classes(neuron, "ParametricLIFNode")
        self.ilif = _classes(neuron, "ILIFNode")
        self.attention = _classes(layer, "SpikingSelfAttention")
        self.voting = _classes(layer, "VotingLayer")
        self.dropout = _classes(layer, "Dropout", "Dropout2d")
        self.each_step = _classes(layer, "SeqToANNContainer")
        self.steps = _classes(layer, "MultiStepContainer")
        self.either = _classes(layer, "StepModeContainer")
        self.norms = _classes(layer, "ThresholdDependentBatchNorm1d", "ThresholdDependentBatchNorm2d")
        # class Conv2d(nn.Conv2d, base.StepModule) and its like: torch's layer and a step mode, nothing else
        self.layers = {kind: kind.__bases__[0] for kind in vars(layer).values()
                       if isinstance(kind, type) and len(kind.__bases__) == 2 and kind.__bases__[1] is base.StepModule
                       and kind.__bases__[0].__module__.startswith("torch.nn.modules.") and kind.__bases__[0] is not nn.Module}
        self.neurons = (*self.lif, *self.integrate, *self.plif, *self.ilif)
        self.walk = Walk(self.rule)

    def rule(self, module: Any, path: str) -> nn.Module | None:
        """The replacement of a module, None to look inside."""
        kind, where = type(module), f"{path or 'the model'} ({type(module).__name__})"
        if kind in self.neurons:
            self._needs_steps(module, where)
            return with_hooks_of(self._neuron(module, where), module)
        if kind in self.attention:
            parts = {name: self._inside(module, path, name) for name in SelfAttention.PARTS}
            return with_hooks_of(SelfAttention(parts, module.num_heads, float(module.scale)).train(module.training), module)
        if kind in self.each_step:
            return with_hooks_of(OverTime(*self._stateless(module, path)), module)
        if kind in self.steps or (kind in self.either and module.step_mode == "m"):
            return with_hooks_of(nn.Sequential(*self._sequence(module, path)), module)
        if kind in self.either:
            raise self._single(where)
        if kind in self.layers:
            return self._layer(module, self.layers[kind])
        if kind in self.norms:
            plain = nn.BatchNorm1d if kind is self.norms[0] else nn.BatchNorm2d
            return _over_time(stripped(module, plain, (*_STEP, "alpha", "v_th")))
        if kind in self.dropout:
            return with_hooks_of(SteadyDropout(module.p, channels=kind is self.dropout[-1]).train(module.training), module)
        if kind in self.voting:
            return None  # a mean over groups of logits, without state
        if isinstance(module, (self.base.MemoryModule, self.base.StepModule)):
            what = "neuron" if hasattr(module, "v_threshold") or hasattr(module, "surrogate_function") else "layer"
            raise InteropError(f"{where}: this {what} of SpikingJelly has no integer form here. Neurons with one: {_ALLOWED}; "
                               "layers: its wrappers of torch's layers, its containers, batch norms, dropouts and "
                               "SpikingSelfAttention. Replace it, or keep it out of the network that is deployed.")
        return None

    # ------------------------------------------------------------------------------------------- step modes
    def _needs_steps(self, module: Any, where: str) -> None:
        if module.step_mode != "m":
            raise self._single(where)

    @staticmethod
    def _single(where: str) -> InteropError:
        return InteropError(f"{where} is in single-step mode, where the time loop is outside of the network. Call "
                            "spikingjelly.activation_based.functional.set_step_mode(model, 'm') and give the network "
                            "whole sequences [T, B, ...].")

    def _stateless(self, container: nn.Module, path: str) -> list[nn.Module]:
        """The layers of a container that merges time and batch, as torch's own."""
        out: list[nn.Module] = []
        child: Any
        for name, child in container.named_children():
            if type(child) in self.dropout:
                out.append((nn.Dropout if type(child) is self.dropout[0] else nn.Dropout2d)(child.p).train(child.training))
                continue
            if isinstance(child, self.base.MemoryModule):
                raise InteropError(f"{path}.{name} ({type(child).__name__}) keeps a state, and {type(container).__name__} "
                                   "merges time and batch before it. Put it behind the container.")
            out.append(self.walk(child, f"{path}.{name}"))
        return out

    def _sequence(self, container: nn.Module, path: str) -> list[nn.Module]:
        """The children of a container that runs step by step, each over the whole sequence."""
        out: list[nn.Module] = []
        for name, child in container.named_children():
            where = f"{path}.{name} ({type(child).__name__})"
            if type(child) in self.neurons:
                out.append(with_hooks_of(self._neuron(child, where), child))
            elif type(child) in self.dropout:
                out.append(self.walk(child, f"{path}.{name}"))
            elif isinstance(child, self.base.MemoryModule):
                raise InteropError(f"{where}: a layer with memory inside {type(container).__name__} that has no "
                                   f"integer form here. Neurons that have one: {_ALLOWED}.")
            else:
                plain = self.walk(child, f"{path}.{name}")
                memory = next((n for n, m in plain.named_modules() if isinstance(m, Neuron)), None)
                if memory is not None:
                    raise InteropError(f"{path}.{name}.{memory} keeps a state inside {type(container).__name__}, which runs "
                                       "step by step; put neurons directly into the container, or set the step mode of its "
                                       "parts to 'm' and use nn.Sequential.")
                out.append(_over_time(plain))
        return out

    @staticmethod
    def _layer(module: Any, plain: type[nn.Module]) -> nn.Module:
        many = module.step_mode == "m"
        new = stripped(module, plain, _STEP)
        if many and isinstance(new, nn.Flatten):
            new.start_dim += 1 if new.start_dim >= 0 else 0
            new.end_dim += 1 if new.end_dim >= 0 else 0
        elif many and not isinstance(new, nn.Linear):
            new = _over_time(new)
        new.step_mode = module.step_mode  # type: ignore[assignment]  # some of its networks ask for it in their forward
        return new

    def _inside(self, module: nn.Module, path: str, name: str) -> nn.Module:
        return self.walk(module.get_submodule(name), f"{path}.{name}")

    # --------------------------------------------------------------------------------------------- neurons
    def _neuron(self, node: Any, where: str) -> nn.Module:
        if type(node) in self.ilif:
            return _ilif(node, where)
        surrogate, strict = _surrogate(node.surrogate_function, where)
        if type(node) in self.lif:
            tau = number(node.tau, where, "tau")
            decay, scale_input = 1 - 1 / tau, bool(node.decay_input)
        elif type(node) in self.plif:
            decay, scale_input = 1 - float(torch.sigmoid(node.w.detach().double())), bool(node.decay_input)
        else:
            decay, scale_input = 1.0, False
        threshold = number(node.v_threshold, where, "v_threshold")
        if node.v_reset is not None:  # counted from there, the neuron rests at 0
            threshold -= number(node.v_reset, where, "v_reset")
        if threshold <= 0:
            raise InteropError(f"{where}: v_threshold={node.v_threshold} is not above v_reset={node.v_reset}; such a "
                               "neuron fires at rest. The threshold must be above the reset.")
        return LIF(decay, threshold, "soft" if node.v_reset is None else "hard", scale_input, bool(node.detach_reset),
                   surrogate, strict).train(node.training)


def _classes(library: ModuleType, *names: str) -> tuple[type[Any], ...]:
    """The classes of these names that this version of the library has."""
    return tuple(getattr(library, name) for name in names if hasattr(library, name))


def _over_time(plain: nn.Module) -> nn.Module:
    return with_hooks_of(OverTime(plain), plain)


def _ilif(node: Any, where: str) -> IELIF:
    """Counts round(clip(h / threshold, 0, D)) with carry-over; at exactly half a count it rounds to even, IELIF rounds up."""
    function = node.surrogate_function
    levels, threshold = int(function.max_spike_count), number(node.v_threshold, where, "v_threshold")
    if (function.grad_min, function.grad_max) != (0.0, float(levels)) or not function.spiking:
        raise InteropError(f"{where}: its count has gradients in {function.grad_min}..{function.grad_max} (spiking="
                           f"{function.spiking}); IELIF has them in 0..{levels}. Use MultiLevelSpikeCount({levels}).")
    return IELIF(levels, 1 / threshold, 1.0, 1 - 1 / number(node.tau, where, "tau")).train(node.training)


def _surrogate(function: Any, where: str) -> tuple[Surrogate, bool]:
    """(our surrogate, fires above the threshold only?)."""
    strict = fires_above(function, where)
    name, alpha = type(function).__name__, getattr(function, "alpha", None)
    if not type(function).__module__.startswith("spikingjelly.") or not isinstance(alpha, (int, float)):
        return Borrowed(function, name), strict
    known = {"Sigmoid": Sigmoid(alpha), "ATan": ArcTan(alpha), "PiecewiseQuadratic": Triangle(1 / alpha),
             "Rect": Rectangle(1 / alpha)}
    return known.get(name, Borrowed(function, name)), strict


class SelfAttention(nn.Module):
    """SpikingJelly's `SpikingSelfAttention` on tokens [T, B, C, N], with q, k and v as layers of their own.

    Their weights are the three thirds of `qkv_conv_bn`; `qkv_conv_bn.0`, `.1`, `.2` and `qkv_lif.0`, `.1`, `.2` are q, k, v.
    """

    PARTS = ("qkv_conv_bn", "qkv_lif", "attn_lif", "proj_conv_bn", "proj_lif")

    def __init__(self, parts: dict[str, nn.Module], heads: int, scale: float) -> None:
        super().__init__()
        conv, norm = parts["qkv_conv_bn"].children()
        self.qkv_conv_bn = nn.ModuleList(OverTime(c, n) for c, n in zip(_thirds(conv), _thirds(norm), strict=True))
        self.qkv_lif = nn.ModuleList(copy.deepcopy(parts["qkv_lif"]) for _ in range(3))
        self.attn_lif, self.proj_conv_bn, self.proj_lif = (parts[name] for name in self.PARTS[2:])
        self.heads, self.scale = heads, scale

    def forward(self, x_TBCN: Tensor) -> Tensor:
        q, k, v = (neuron(layer(x_TBCN)).unsqueeze(-1)
                   for layer, neuron in zip(self.qkv_conv_bn, self.qkv_lif, strict=True))
        y = self.attn_lif(spike_attention(q, k, v, self.heads, self.scale).flatten(3))
        return self.proj_lif(self.proj_conv_bn(y))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:g}"


def _thirds(module: nn.Module) -> list[nn.Module]:
    """A 1x1 convolution or batch norm as three, each with a third of the output channels."""
    out = []
    for part in range(3):
        new = copy.deepcopy(module)
        stores: tuple[dict[str, Any], ...] = (new._parameters, new._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and tensor.dim():
                    third = tensor.detach().chunk(3)[part].clone()
                    store[name] = nn.Parameter(third, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else third
        for attribute in ("out_channels", "num_features"):
            if hasattr(new, attribute):
                setattr(new, attribute, getattr(new, attribute) // 3)
        out.append(new)
    return out
