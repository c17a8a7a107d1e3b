"""What both libraries' conversions are made of: surrogates, layers over time, errors, one walk over the modules."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitspike.neurons import Surrogate, timewise

#: distances (potential - threshold) at which a spike function is looked at
_PROBES = (-3.0, -1.5, -0.75, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.4, 0.75, 1.5, 3.0, 7.0)


class InteropError(ValueError):
    """A network, or a piece of one, that has no integer form here; says where, what is allowed and what to do."""


class Borrowed(Surrogate):
    """The derivative of another library's spike function, taken by automatic differentiation.

    function: distance -> spikes, elementwise and differentiable; name: for messages.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        self.function, self.name = function, name

    def derivative(self, distance: Tensor) -> Tensor:
        """d spike / d potential at `distance`."""
        with torch.enable_grad():
            leaf = distance.detach().requires_grad_()
            spikes = self.function(leaf)
            if not spikes.requires_grad:
                return torch.zeros_like(distance)
            (grad,) = torch.autograd.grad(spikes.sum(), leaf)
        return grad.to(distance.dtype)

    def __repr__(self) -> str:
        return f"Borrowed({self.name})"


def fires_above(function: Callable[[Tensor], Tensor], where: str) -> bool:
    """True if a spike function is 1 above 0 only, False if it is 1 at 0 too. Errors: InteropError if it is no step."""
    points = torch.tensor(_PROBES)
    try:
        with torch.no_grad():
            found = function(points).float().tolist()
    except Exception as error:  # whatever the other library raises
        raise InteropError(f"{where}: its spike function cannot be called on numbers from {_PROBES[0]} to {_PROBES[-1]}: "
                           f"{error}") from error
    for strict in (True, False):
        if found == [float(p > 0 if strict else p >= 0) for p in _PROBES]:
            return strict
    raise InteropError(f"{where}: its spike function gives {[round(y, 4) for y in found]} at distances {list(_PROBES)} from "
                       "the threshold. An integer neuron fires 0 below and 1 above its threshold; use a spike function "
                       "with a surrogate gradient, in its spiking mode.")


class OverTime(nn.Sequential):
    """Layers that know no time, applied to every step: [T, B, ...] -> [T, B, ...].

    >>> OverTime(nn.Conv2d(1, 2, 3))(torch.zeros(4, 3, 1, 8, 8)).shape
    torch.Size([4, 3, 2, 6, 6])
    """

    def forward(self, x_TBX: Tensor) -> Tensor:  # type: ignore[override]
        return timewise(super().forward, x_TBX)  # type: ignore[no-any-return]


def each_step(name: str, x_TBX: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`OverTime` for the function of this name in torch.nn.functional: [T, B, ...] -> [T, B, ...]."""
    function: Callable[..., Tensor] = getattr(nn.functional, name)
    if isinstance(x_TBX, torch.fx.Proxy):
        return function(x_TBX, *args, **kwargs)
    return timewise(lambda x: function(x, *args, **kwargs), x_TBX)  # type: ignore[no-any-return]


def as_steps(x: Tensor, steps: int, dims: int) -> Tensor:
    """The input of one step, of `dims` axes, at every step: [B, ...] -> [T, B, ...]; a sequence of `steps` stays what it is.

    Errors: ValueError for another number of axes or steps.
    """
    if not isinstance(x, torch.fx.Proxy):
        if x.dim() == dims + 1 and x.shape[0] == steps:
            return x
        if x.dim() != dims:
            raise ValueError(f"this network takes inputs of {dims} axes [B, ...] or sequences [{steps}, B, ...], found "
                             f"{list(x.shape)}.")
    return x.unsqueeze(0).expand(steps, *[-1] * dims)


class SteadyDropout(nn.Dropout):
    """Dropout whose mask is the same at every step: [T, B, ...] -> same. channels: whole channels at once (`Dropout2d`)."""

    def __init__(self, p: float, channels: bool = False) -> None:
        super().__init__(p)
        self.channels = channels

    def forward(self, x_TBX: Tensor) -> Tensor:
        if not self.training:
            return x_TBX
        drop = nn.functional.dropout2d if self.channels else nn.functional.dropout
        return x_TBX * drop(torch.ones_like(x_TBX[0]), self.p)


def number(value: Any, where: str, name: str) -> float:
    """A parameter of a neuron as one number. Errors: InteropError if it has several values."""
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1)
    if tensor.numel() == 0 or bool((tensor != tensor[0]).any()):
        raise InteropError(f"{where}: {name} has {tensor.numel()} values; the integer neuron has one for all. Give the "
                           "layer one value (or a neuron of its own per group of channels).")
    return float(tensor[0])


def is_hook_table(name: str) -> bool:
    """Is this attribute of a module a table of hooks that run with the forward or backward pass?"""
    return name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name


def stripped(module: nn.Module, kind: type[nn.Module], drop: tuple[str, ...] = ()) -> nn.Module:
    """The module as its plain torch class: same parameters, buffers and settings, without the attributes in `drop`."""
    plain = kind.__new__(kind)
    plain.__dict__.update({name: value for name, value in vars(module).items() if name not in drop})
    return plain


def with_hooks_of(outer: nn.Module, inner: nn.Module) -> nn.Module:
    """Move the hooks of `inner` to the module that takes its place, so that they still see whole sequences."""
    for name in [name for name in vars(inner) if is_hook_table(name)]:
        outer.__dict__[name], inner.__dict__[name] = inner.__dict__[name], type(inner.__dict__[name])()
    return outer


class Walk:
    """Replaces modules of a copied model in place: `rule(module, path)` gives the replacement, or None to look inside.

    A module that stands in several places is replaced once, by one module.
    """

    def __init__(self, rule: Callable[[nn.Module, str], nn.Module | None]) -> None:
        self.rule = rule
        self.done: dict[int, tuple[nn.Module, nn.Module]] = {}  # the old module is kept: its id must stay taken

    def __call__(self, module: nn.Module, path: str = "") -> nn.Module:
        """The replacement of `module`, or `module` with its children replaced."""
        if id(module) in self.done:
            return self.done[id(module)][1]
        new = self.rule(module, path)
        if new is None:
            new = module
            self.done[id(module)] = (module, module)
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = self(child, f"{path}.{name}" if path else name)
        self.done[id(module)] = (module, new)
        return new


def stateless_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the model at rest, none of whose tensors belongs to a graph of gradients; the model is left as it is.

    SpikingJelly keeps potentials in `_memories`, snnTorch in buffers named "mem" and attributes beside them.
    """
    held: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        for store in (module.__dict__, module._buffers):
            held += [(store, name, value) for name, value in store.items()
                     if isinstance(value, Tensor) and value.grad_fn is not None]
        memories, rest = vars(module).get("_memories"), vars(module).get("_memories_rv")
        if memories is not None and rest is not None:
            held += [(memories, name, value) for name, value in memories.items()]
    try:
        for store, name, value in held:
            store[name] = value.detach() if isinstance(value, Tensor) else value
        new = copy.deepcopy(model)
    finally:
        for store, name, value in held:
            store[name] = value
    for module in new.modules():
        reset = getattr(module, "reset_mem", None) or (getattr(module, "reset", None) if "_memories" in vars(module) else None)
        if callable(reset):
            reset()
    return new
