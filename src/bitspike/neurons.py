"""Spiking neurons: a whole sequence in, a whole sequence out, no state between calls.

Every neuron is a pure function of its input `x_TBCHW` (any trailing axes; T first). The pure step functions
`lif_step` and `ielif_step` are the same equations for one time step, for streaming.
Potentials are in units of the threshold unless `threshold` says otherwise.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitspike import _train_kernels


# --------------------------------------------------------------------------------------------- time axis
def timewise(module: Any, x_TBX: Tensor) -> Tensor:
    """Apply a module that knows no time (conv, norm, pool) to every step: [T, B, ...] -> [T, B, ...]."""
    if isinstance(x_TBX, torch.fx.Proxy):  # the exported program is written for a whole sequence
        return module(x_TBX)
    T, B = x_TBX.shape[:2]
    return module(x_TBX.flatten(0, 1)).unflatten(0, (T, B))


def _check_time(neuron: nn.Module, x_TBX: Tensor) -> None:
    if x_TBX.shape[0] == 0:
        raise ValueError(f"{type(neuron).__name__}: input of shape {tuple(x_TBX.shape)} has no time step; T, the first axis, "
                         "must be at least 1.")


# ------------------------------------------------------------------------------------------ packed masks
def pack_mask(mask: Tensor) -> Tensor:
    """Boolean mask of n elements -> uint8 of ceil(n / 8): one bit each, for the backward pass.

    >>> bool((unpack_mask(pack_mask(torch.tensor([True, False, True])), (3,)) == torch.tensor([True, False, True])).all())
    True
    """
    flat = mask.reshape(-1)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - flat.numel() % 8))
    # eight bytes of 0/1 read as one int64; the product moves byte i's bit to bit 56 + i
    return ((flat.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_mask`: uint8 -> bool of `shape`."""
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    flat = (packed[:, None] >> bits) & 1
    return flat.view(torch.bool).view(-1)[: math.prod(shape)].view(shape)


# --------------------------------------------------------------------------------------------- surrogates
class _Spike(torch.autograd.Function):
    """Heaviside step with the derivative of a smooth curve in the backward pass."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, surrogate: Surrogate, strict: bool) -> Tensor:
        ctx.surrogate = surrogate
        ctx.save_for_backward(distance)
        return ((distance > 0) if strict else (distance >= 0)).to(distance.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (distance,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(distance), None, None


class Surrogate:
    """The derivative used for the step function; `distance` = potential - threshold."""

    def derivative(self, distance: Tensor) -> Tensor:
        """d spike / d potential at `distance`."""
        raise TypeError(f"{type(self).__name__} defines no derivative; use Sigmoid, Triangle, ArcTan or Rectangle.")

    def __call__(self, distance: Tensor, strict: bool = False) -> Tensor:
        """Spikes (0 or 1, dtype of the input) with this derivative; strict: fire above the threshold only."""
        return _Spike.apply(distance, self, strict)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(vars(self).items())))


class Sigmoid(Surrogate):
    """slope * sig(slope d) (1 - sig(slope d)). Slope 4: SpikingJelly's and the spiking transformers' default."""

    def __init__(self, slope: float = 4.0) -> None:
        self.slope = slope

    def derivative(self, distance: Tensor) -> Tensor:
        sig = torch.sigmoid(self.slope * distance)
        return self.slope * sig * (1 - sig)


class Triangle(Surrogate):
    """max(0, 1 - |d| / width) / width. Width 1: TET and Q-SNN."""

    def __init__(self, width: float = 1.0) -> None:
        self.width = width

    def derivative(self, distance: Tensor) -> Tensor:
        return (1 - distance.abs() / self.width).clamp_min(0) / self.width


class ArcTan(Surrogate):
    """slope / 2 / (1 + (pi/2 slope d)^2) (Fang et al. 2021)."""

    def __init__(self, slope: float = 2.0) -> None:
        self.slope = slope

    def derivative(self, distance: Tensor) -> Tensor:
        return self.slope / 2 / (1 + (math.pi / 2 * self.slope * distance) ** 2)


class Rectangle(Surrogate):
    """1 / width where |d| < width / 2 (Wu et al. 2018)."""

    def __init__(self, width: float = 1.0) -> None:
        self.width = width

    def derivative(self, distance: Tensor) -> Tensor:
        return (distance.abs() < self.width / 2).to(distance.dtype) / self.width


# ---------------------------------------------------------------------------------------------------- LIF
#: what becomes of the potential of a `LIF` that fired
RESETS = ("hard", "soft", "late", "none")


def lif_step(v: Tensor, x: Tensor, *, decay: float, gain: float, threshold: float, reset: str, surrogate: Surrogate,
             detach_reset: bool, strict: bool) -> tuple[Tensor, Tensor]:
    """One step of `LIF`: (potential, input) -> (spike, next potential)."""
    h = decay * v + gain * x
    if reset == "late":
        before = surrogate(v - threshold, strict)
        h = h - threshold * (before.detach() if detach_reset else before)
        return surrogate(h - threshold, strict), h
    s = surrogate(h - threshold, strict)
    r = s.detach() if detach_reset else s
    if reset == "hard":
        v = (1 - r) * h
    elif reset == "soft":
        v = h - threshold * r
    else:
        v = h
    return s, v


_SURROGATES = (Sigmoid, Triangle, ArcTan, Rectangle)  # in the order of the kernels' numbers


class _Sequence(torch.autograd.Function):
    """A LIF neuron over all steps by the one-pass kernels; saves x and runs the recursion again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, neuron: LIF, shape: Any) -> Tensor:
        membrane: Any = neuron.membrane  # a quantizers.Membrane
        bounds, next_bound = None, None
        if membrane is not None and x.shape[0] > 1:
            if membrane.moves:
                next_bound = membrane.next_bound
            else:
                bounds = membrane.known_bound(x.dtype).expand(x.shape[0]).contiguous()
        s, bounds = _train_kernels.lif_forward(x, shape, next_bound, bounds)
        ctx.neuron, ctx.lif_shape = neuron, shape
        ctx.save_for_backward(x, bounds)
        return s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, bounds = ctx.saved_tensors
        if grads[0].requires_grad:  # a gradient of the gradient is wanted: stay where torch can follow
            if bounds is not None:
                raise NotImplementedError("LIF with a membrane quantizer: a gradient of its gradient is not built.")
            with torch.enable_grad():
                s = ctx.neuron.eagerly(x)
            return torch.autograd.grad(s, x, grads[0], create_graph=True)[0], None, None
        return _train_kernels.lif_backward(x, grads[0], ctx.lif_shape, bounds), None, None


class LIF(nn.Module):
    """Leaky integrate-and-fire neuron over the whole sequence.

        h[t] = decay * v[t-1] + gain * x[t]
        s[t] = 1 if h[t] >= threshold (strict: >) else 0
        v[t] = (1 - s[t]) h[t]  (hard)  |  h[t] - threshold s[t]  (soft)  |  h[t]  (none);  v[0] = 0
        gain = 1 - decay if scale_input else 1
    "late" is the soft reset that comes one step later, so that the leak does not shrink it (snnTorch's "subtract"):
        h[t] = decay * v[t-1] + gain * x[t] - threshold s[t-1],   v[t] = h[t]

    Args: decay (0..1; SpikingJelly's tau = 2 is decay 0.5), threshold, reset "hard" | "soft" | "late" | "none", scale_input
    (divide the input by tau, SpikingJelly's `decay_input`), detach_reset (no gradient through the reset), surrogate,
    strict (Q-SNN fires above, not at, the threshold), membrane (a `quantizers.Membrane`: the potential is quantized
    after the reset, before it is stored).
    Shapes: `x_TBCHW` -> spikes of the same shape and dtype, values 0 and 1.
    Deploys as: op `lif` on integers. Source: SpikingJelly 0.0.0.0.12 `MultiStepLIFNode`; Q-SNN section 3.

    >>> LIF(decay=0.5)(torch.tensor([[1.2], [1.2], [2.0]])).flatten().tolist()   # 0.6, 0.9, 1.45
    [0.0, 0.0, 1.0]
    """

    def __init__(self, decay: float = 0.5, threshold: float = 1.0, reset: str = "hard", scale_input: bool = True,
                 detach_reset: bool = True, surrogate: Surrogate | None = None, strict: bool = False,
                 membrane: nn.Module | None = None) -> None:
        super().__init__()
        if reset not in RESETS:
            raise ValueError(f"LIF: reset={reset!r}; allowed: {', '.join(map(repr, RESETS))}.")
        if not 0 <= decay <= 1:
            raise ValueError(f"LIF: decay={decay}; it multiplies the potential each step and must be in 0..1 (tau=2 is 0.5).")
        if not threshold > 0:
            raise ValueError(f"LIF: threshold={threshold}; it must be positive.")
        self.decay, self.threshold, self.reset = decay, threshold, reset
        self.scale_input, self.detach_reset, self.strict = scale_input, detach_reset, strict
        self.surrogate = surrogate or Sigmoid()
        self.membrane = membrane

    @property
    def levels(self) -> int:
        """Largest output value: 1."""
        return 1

    @property
    def scale(self) -> float:
        """Output value of one spike: 1."""
        return 1.0

    @property
    def _gain(self) -> float:
        return 1 - self.decay if self.scale_input else 1.0

    def step(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: (potential, input) -> (spikes, next potential). Start from `torch.zeros_like(x)`."""
        s, v = self._fire(v, x)
        return s, v if self.membrane is None else self.membrane(v)

    def _fire(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return lif_step(v, x, decay=self.decay, gain=self._gain, threshold=self.threshold, reset=self.reset,
                        surrogate=self.surrogate, detach_reset=self.detach_reset, strict=self.strict)

    def forward(self, x_TBX: Tensor) -> Tensor:
        _check_time(self, x_TBX)
        shape = self._kernel_shape(x_TBX)
        return self.eagerly(x_TBX) if shape is None else _Sequence.apply(x_TBX, self, shape)  # type: ignore[no-any-return]

    def eagerly(self, x_TBX: Tensor) -> Tensor:
        """The same by plain torch, step by step: what the one-pass kernels are tested against."""
        v = torch.zeros_like(x_TBX[0])
        spikes = []
        for t, x in enumerate(x_TBX):
            if t:  # what is kept for the next step; the last potential is kept for nobody
                v = v if self.membrane is None else self.membrane(v)
            s, v = self._fire(v, x)
            spikes.append(s)
        return torch.stack(spikes)

    def _kernel_shape(self, x_TBX: Tensor) -> Any:
        surrogate = self.surrogate
        if type(surrogate) not in _SURROGATES or not isinstance(x_TBX, Tensor):
            return None
        membrane: Any = self.membrane
        high, tanh = (0, False) if membrane is None else (membrane.high, membrane.tanh)
        return _train_kernels.lif_shape(
            x_TBX, decay=self.decay, gain=self._gain, threshold=self.threshold, reset=self.reset, strict=self.strict,
            detach=self.detach_reset, surrogate=_SURROGATES.index(type(surrogate)),
            parameter=next(iter(vars(surrogate).values())), high=high, tanh=tanh)

    def extra_repr(self) -> str:
        return (f"decay={self.decay}, threshold={self.threshold}, reset={self.reset!r}, scale_input={self.scale_input}, "
                f"surrogate={self.surrogate}")


# ------------------------------------------------------------------------------------------------- IE-LIF
class _Count(torch.autograd.Function):
    """y = floor(clip(gain x, 0, D) + 0.5) * scale; saves one bit per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, gain: float, scale: float) -> Tensor:
        ctx.shape, ctx.slope, ctx.strides = x.shape, gain * scale, None
        done = _train_kernels.count_forward(x, levels, gain, scale)
        if done is not None:
            y, mask = done
            ctx.strides = x.stride()  # the mask's bits are in the order of memory
            ctx.save_for_backward(mask)
            return y
        u = x * gain
        ctx.save_for_backward(pack_mask((u > 0) & (u < levels)))
        return u.clamp_(0, levels).add_(0.5).floor_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        if ctx.strides is None:
            inside = unpack_mask(mask, ctx.shape)
        elif grads[0].requires_grad:  # a gradient of the gradient is wanted: stay where torch can follow
            inside = unpack_mask(mask, (ctx.shape.numel(),)).as_strided(ctx.shape, ctx.strides)
        else:
            return _train_kernels.count_backward(grads[0], mask, ctx.strides, ctx.slope), None, None, None
        grad = grads[0] * inside
        return grad if ctx.slope == 1 else grad * ctx.slope, None, None, None


def ielif_step(v: Tensor, x: Tensor, *, levels: int, gain: float, scale: float, decay: float) -> tuple[Tensor, Tensor]:
    """One step of `IELIF` with carry-over: (potential, input) -> (output, next potential)."""
    u = v + x
    y = _Count.apply(u, levels, gain, scale)
    return y, decay * (u - y / (scale * gain))


class IELIF(nn.Module):
    """Information-enhanced LIF: integer spike counts in training, D binary steps (or the count) on the device.

        n = floor( clip(gain x, 0, D) + 0.5 ),   y = n * scale          counts 0..D
        dL/dx = gain * scale * dL/dy  where 0 < gain x < D, else 0
    With `decay` (carry-over for T > 1):  u[t] = v[t-1] + x[t];  y[t] as above of u[t];  v[t] = decay (u[t] - n[t]/gain).

    Args: levels D; gain, the counts that a potential of 1 gives (default D, as published: the potential saturates at
    1; a gain of D/2 lets it use the range 0..2); scale, the value of one count (default 1/gain; the published
    attention neuron has D = gain = 4, scale = 1/2); decay, None for the stateless published form.
    Shapes: `x_TBCHW` -> same shape, values {0, .., D} * scale. Errors: ValueError for levels outside 1..255, a gain or
    scale that is not positive, a decay outside 0..1, an input without time steps.
    Deploys as: op `quantize` (multiply by gain, clip to 0..D) or, with carry-over, op `ielif`; `binary_steps` gives the D
    binary steps whose sum is the count. Source: QSD-Transformer (ICLR 2025) section 4.2 and its released code, which
    fixes D = gain = 4 and has no carry-over; the carry-over is that of Spike-driven Transformer v3.

    >>> IELIF(4)(torch.tensor([[0.124, 0.125, 0.374, 0.375, 1.2]])).flatten().tolist()
    [0.0, 0.25, 0.25, 0.5, 1.0]
    """

    def __init__(self, levels: int = 4, gain: float | None = None, scale: float | None = None,
                 decay: float | None = None) -> None:
        super().__init__()
        if not isinstance(levels, int) or not 1 <= levels <= 255:
            raise ValueError(f"IELIF: levels={levels}; allowed: integers 1..255 (a count must fit one byte).")
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"IELIF: decay={decay}; allowed: None (no carry-over) or 0..1.")
        self.levels = levels
        self.gain = float(levels) if gain is None else gain
        if not self.gain > 0:
            raise ValueError(f"IELIF: gain={gain}; it must be positive.")
        self.scale = 1.0 / self.gain if scale is None else scale
        if not self.scale > 0:
            raise ValueError(f"IELIF: scale={scale}; it must be positive.")
        self.decay = decay

    def step(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: (potential, input) -> (output, next potential); without carry-over the potential stays 0."""
        if self.decay is None:
            return _Count.apply(x, self.levels, self.gain, self.scale), v
        return ielif_step(v, x, levels=self.levels, gain=self.gain, scale=self.scale, decay=self.decay)

    def forward(self, x_TBX: Tensor) -> Tensor:
        _check_time(self, x_TBX)
        if self.decay is None or x_TBX.shape[0] == 1:  # from rest the first step is the stateless one
            return _Count.apply(x_TBX, self.levels, self.gain, self.scale)  # type: ignore[no-any-return]
        v = torch.zeros_like(x_TBX[0])
        outputs = []
        for x in x_TBX:
            y, v = self.step(v, x)
            outputs.append(y)
        return torch.stack(outputs)

    def binary_steps(self, y_TBX: Tensor) -> Tensor:
        """Outputs -> [D, *y.shape] binary spikes with `sum over D * scale == y`: what a spike-driven device sees."""
        counts = torch.round(y_TBX / self.scale)
        steps = torch.arange(1, self.levels + 1, device=y_TBX.device, dtype=y_TBX.dtype)
        return (counts[None] >= steps.view(-1, *[1] * y_TBX.dim())).to(y_TBX.dtype)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, gain={self.gain:g}, scale={self.scale:g}, decay={self.decay}"


Neuron = LIF | IELIF
