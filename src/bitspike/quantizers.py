"""Quantizers: each is an equation, a gradient, a paper, and `codes(w) -> (integers, scale)`.

`forward(w) == integers * scale` exactly, and all three in the dtype of w: rounding gradients are `autograd.Function`s,
never the detach trick, which leaves values off the grid. "Per channel" is along the first axis of the weight.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitspike import _train_kernels

_SMALLEST = 1e-8  # floor of a learned step: below any weight worth coding, above the denormals


def _smallest(dtype: torch.dtype) -> float:
    """That floor in a dtype: float16 would round it to zero."""
    return max(_SMALLEST, torch.finfo(dtype).tiny)


def _over_channels(w: Tensor) -> tuple[int, ...]:
    return tuple(range(1, w.dim()))


def _shaped(scale: Tensor, w: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (w.dim() - 1)) if scale.numel() > 1 else scale.view(*[1] * w.dim())


class Quantizer(nn.Module):
    """Base of the weight quantizers: `forward` is the training view, `codes` the deployed one.

    `deploys_as`: the artifact's scheme kind; `bits`: width of one code.
    """

    deploys_as: str
    bits: int

    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [O, ...] -> (int32 codes of the same shape, scale of shape [O] or [1]), detached."""
        raise TypeError(f"{type(self).__name__} is a base class; use LSQ, PowerOfTwo or Binary.")


# --------------------------------------------------------------------------------------------------- LSQ
class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, low: int, high: int, grad_scale: float) -> Tensor:
        ctx.save_for_backward(w, scale)
        ctx.limits = low, high, grad_scale
        done = _train_kernels.lsq_forward(w, scale, low, high, _SMALLEST)
        if done is not None:
            return done
        step = _shaped(scale, w).to(w.dtype).clamp_min(_smallest(w.dtype))
        return (w / step).round_().clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, scale = ctx.saved_tensors
        low, high, grad_scale = ctx.limits
        done = None
        if not grads[0].requires_grad:  # else a gradient of the gradient is wanted: stay where torch can follow
            done = _train_kernels.lsq_backward(w, scale, grads[0], low, high, _SMALLEST, grad_scale)
        if done is not None:
            return *done, None, None, None
        v = w / _shaped(scale, w).to(w.dtype).clamp_min(_smallest(w.dtype))
        inside = (v >= low) & (v <= high)
        slope = v.round().clamp_(low, high).sub_(v * inside)
        grad = grads[0] * slope
        of = scale.dtype  # summed up in it: half precision would keep three digits
        grad = grad.sum(_over_channels(w), dtype=of) if scale.numel() > 1 else grad.sum(dtype=of).view(scale.shape)
        return grads[0] * inside, grad * grad_scale, None, None, None


class LSQ(Quantizer):
    """Learned step size, signed k bits.

        codes = clip( round(w / alpha), -2^(k-1), 2^(k-1) - 1 )            round half to even
        dL/dw = dL/dw_q inside the clip range, 0 outside
        dL/dalpha = g * sum dL/dw_q * (round(w/alpha) - w/alpha inside; the limit outside),  g = 1/sqrt(numel(w) * Qp)
    alpha = 2 mean|w| / sqrt(Qp) on the first forward (of training, evaluation or `codes`, whichever comes first), unless
    it was loaded: the buffer `initialized` is part of the state. Below 1e-8 the step is held at 1e-8, so it stays positive.

    Args: bits 2..8; channels, the number of steps (out-channels, or 1 for one step per tensor); init "tensor" (published:
    the mean over the whole weight) or "channel". Deploys as: scheme `uniform`, k bits.
    Source: Esser et al., ICLR 2020; as in QSD-Transformer, which follows Q-ViT. The published code has no guard on alpha.

    >>> q = LSQ(4, channels=1); w = torch.tensor([[-1.0, 0.1, 0.55]])
    >>> codes, scale = q.codes(w); bool((codes * scale == q(w)).all()), codes.tolist()
    (True, [[-2, 0, 1]])
    """

    deploys_as = "uniform"
    initialized: Tensor

    def __init__(self, bits: int, channels: int = 1, init: str = "tensor") -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"LSQ: bits={bits}; allowed: 2..8. For one bit use Binary.")
        self.bits, self.init = bits, init
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.scale = nn.Parameter(torch.ones(channels))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def _initialize(self, w: Tensor) -> None:
        mean = w.abs().mean() if self.init == "tensor" or self.scale.numel() == 1 else w.abs().mean(_over_channels(w))
        self.scale.copy_((2 * mean / math.sqrt(self.high)).clamp_min(_SMALLEST).expand_as(self.scale))
        self.initialized.fill_(True)

    def forward(self, w: Tensor) -> Tensor:
        if not self.initialized:
            self._initialize(w)
        return _LSQ.apply(w, self.scale, self.low, self.high, 1 / math.sqrt(w.numel() * self.high))  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if not self.initialized:
            self._initialize(w)
        scale = self.scale.to(w.dtype).clamp_min(_smallest(w.dtype))
        return (w / _shaped(scale, w)).round_().clamp_(self.low, self.high).int(), scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channels={self.scale.numel()}"


# ----------------------------------------------------------------------------------------------- uniform
#: step, in standard deviations, that loses least of normally distributed weights (mean squared error), by numerical
#: minimisation for codes -2^(k-1)..2^(k-1)-1; Max (IRE Trans. 1960) has the table for symmetric levels
_NORMAL_STEP = {2: 1.0484, 3: 0.6018, 4: 0.3386, 5: 0.1888, 6: 0.1042, 7: 0.05689, 8: 0.03076}
#: the same for the largest level of a power-of-two quantizer
_NORMAL_TOP = {2: 1.110, 3: 1.975, 4: 4.176}


def _rms(w: Tensor, per_channel: bool) -> Tensor:
    axes = _over_channels(w) if per_channel else tuple(range(w.dim()))
    return w.detach().square().mean(axes).sqrt().clamp_min(_smallest(w.dtype)).reshape(-1)


class Uniform(Quantizer):
    """Signed k bits whose step follows the weights instead of being learned.

        alpha_o = 2 mean_o|w| / sqrt(Qp),   codes = clip( round(w / alpha), -2^(k-1), 2^(k-1) - 1 )
        dL/dw = dL/dw_q inside the clip range, 0 outside; alpha takes no gradient
    It is LSQ's initial step, kept up with. In front of a norm without scale the size of a weight has no effect, and a
    learned step then drifts: in networks trained from scratch it was seen to shrink until every weight was clipped and
    none had a gradient. Here the clip range stays at the same multiple of the weights' own size.

    step "normal" is for networks that were trained in full precision: alpha = c_k rms(w), with the c_k that loses least of
    normally distributed weights. It is smaller than LSQ's (of 3-bit weights it loses 0.041 of the variance, not 0.071).

    Args: bits 2..8; per_channel; step "lsq" | "normal". Deploys as: scheme `uniform`, k bits. Source: the initial step of LSQ
    (ICLR 2020); Max, Quantizing for minimum distortion (1960).

    >>> Uniform(4, per_channel=False).codes(torch.tensor([[-1.0, 0.1, 0.55]]))[0].tolist()
    [[-2, 0, 1]]
    """

    deploys_as = "uniform"

    def __init__(self, bits: int, per_channel: bool = True, step: str = "lsq") -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"Uniform: bits={bits}; allowed: 2..8. For one bit use Binary.")
        if step not in ("lsq", "normal"):
            raise ValueError(f"Uniform: step={step!r}; allowed: 'lsq', 'normal'.")
        self.bits, self.per_channel, self.step = bits, per_channel, step
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def _step(self, w: Tensor) -> Tensor:
        if self.step == "normal":
            return (_NORMAL_STEP[self.bits] * _rms(w, self.per_channel)).clamp_min(_smallest(w.dtype))
        mean = w.detach().abs().mean(_over_channels(w) if self.per_channel else tuple(range(w.dim()))).reshape(-1)
        return (2 / math.sqrt(self.high) * mean).clamp_min(_smallest(w.dtype))

    def forward(self, w: Tensor) -> Tensor:
        return _LSQ.apply(w, self._step(w), self.low, self.high, 1.0)  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        scale = self._step(w)
        return (w / _shaped(scale, w)).round_().clamp_(self.low, self.high).int(), scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}, step={self.step!r}"


# ---------------------------------------------------------------------------------------- powers of two
class _Straight(torch.autograd.Function):
    """Value of `quantized`, gradient of the identity where `inside`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, quantized: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (grads[0] * ctx.saved_tensors[0] if ctx.saved_tensors else grads[0]), None, None


class PowerOfTwo(Quantizer):
    """Power-of-two quantizer, in both readings of SpikeHQ.

    levels=True (A): the levels are powers of two; k bits = sign and exponent, E = 2^(k-1) - 2:
        w_q = s * sign(w) * 2^clip(round(log2(|w|/s)), -E, 0),   0 where |w| < s * 2^(-E - 1/2);   s = max|w|
        codes = sign * 2^(exponent + E), so the deployed scale is s * 2^-E
        scale "normal": s = c_k rms(w) instead, which loses least of normally distributed weights; the larger ones are cut
    levels=False (B): uniform levels, the step is a power of two (so rescaling is a shift):
        s = 2^round(log2(2 mean|w| / sqrt(Qp))),   codes = clip(round(w/s), -Qp, Qp),   Qp = 2^(k-1) - 1
    Gradient: straight through; zero where reading B clips. The scale follows the weights and takes no gradient.

    Args: bits 2..4 (A) or 2..8 (B); per_channel; scale "max" | "normal" (A only). Deploys as: scheme `pow2` (A) or
    `uniform` (B). Source: SpikeHQ (arXiv 2412.05505); the source does not decide between the readings, A is the default.

    >>> PowerOfTwo(4).codes(torch.tensor([[1.0, -0.5, 0.02, 0.001]]))[0].tolist()
    [[64, -32, 1, 0]]
    """

    def __init__(self, bits: int, levels: bool = True, per_channel: bool = True, scale: str = "max") -> None:
        super().__init__()
        if scale not in ("max", "normal"):
            raise ValueError(f"PowerOfTwo: scale={scale!r}; allowed: 'max', 'normal'.")
        top = 4 if levels else 8
        if not 2 <= bits <= top:
            raise ValueError(f"PowerOfTwo(levels={levels}): bits={bits}; allowed: 2..{top}.")
        self.bits, self.levels, self.per_channel, self.scale = bits, levels, per_channel, scale
        self.deploys_as = "pow2" if levels else "uniform"

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        axes = _over_channels(w) if self.per_channel else tuple(range(w.dim()))
        if not self.levels:
            high = 2 ** (self.bits - 1) - 1
            mean = w.abs().mean(axes).clamp_min(_smallest(w.dtype)).reshape(-1)
            scale = torch.exp2(torch.round(torch.log2(2 * mean / math.sqrt(high))))
            return (w / _shaped(scale, w)).round_().clamp_(-high, high).int(), scale
        lowest = 2 ** (self.bits - 1) - 2
        top = (w.abs().amax(axes).reshape(-1) if self.scale == "max"
               else _NORMAL_TOP[self.bits] * _rms(w, self.per_channel)).clamp_min(_smallest(w.dtype))
        ratio = w.abs() / _shaped(top, w)
        exponent = torch.log2(ratio.clamp_min(1e-30)).round_().clamp_(-lowest, 0) + lowest
        codes = torch.where(ratio < 2.0 ** (-lowest - 0.5), 0, torch.sign(w) * torch.exp2(exponent))
        return codes.int(), top * 2.0**-lowest

    def forward(self, w: Tensor) -> Tensor:
        codes, scale = self.codes(w)
        inside = None if self.levels else (w.detach() / _shaped(scale, w)).abs() <= 2 ** (self.bits - 1) - 1
        return _Straight.apply(w, codes.to(w.dtype) * _shaped(scale.to(w.dtype), w), inside)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"bits={self.bits}, levels={self.levels}, per_channel={self.per_channel}, scale={self.scale!r}"


# ---------------------------------------------------------------------------------- scale from the largest
class MaxScale(Quantizer):
    """Uniform signed k bits; the largest weight is the largest code.

        s = max|w| / Qp,  codes = round(w / s),  w_q = s * codes,  Qp = 2^(k-1) - 1          nothing is ever clipped
        dL/dw = dL/dw_q; the scale follows the weights and takes no gradient
    top="signed" (published) takes max(w) instead of max|w|: codes below -Qp then stand for what is more negative than
    that. They exist only in training: `codes` refuses what k bits cannot hold.

    Args: bits 2..8, per_channel, top "absolute" | "signed". Deploys as: scheme `uniform`, k bits.
    Source: Q-SNN (ACM MM 2024), first and last layer (8 bits, per tensor, signed).

    >>> MaxScale(8, per_channel=False).codes(torch.tensor([[1.0, -0.5, 0.001]]))[0].tolist()
    [[127, -64, 0]]
    """

    deploys_as = "uniform"

    def __init__(self, bits: int = 8, per_channel: bool = True, top: str = "absolute") -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"MaxScale: bits={bits}; allowed: 2..8.")
        if top not in ("absolute", "signed"):
            raise ValueError(f"MaxScale: top={top!r}; allowed: 'absolute', 'signed'.")
        self.bits, self.per_channel, self.top = bits, per_channel, top
        self.high = 2 ** (bits - 1) - 1

    def _codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        axes = _over_channels(w) if self.per_channel else tuple(range(w.dim()))
        top = (w.abs() if self.top == "absolute" else w).amax(axes).clamp_min(_smallest(w.dtype)).reshape(-1)
        scale = top / self.high
        # the quotient of half precision may round past the largest code
        low = -self.high if self.top == "absolute" else None
        return (w / _shaped(scale, w)).round_().clamp_(low, self.high), scale

    def forward(self, w: Tensor) -> Tensor:
        codes, scale = self._codes(w.detach())
        return _Straight.apply(w, codes.mul_(_shaped(scale, w)), None)  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = self._codes(w)
        if codes.min() < -self.high - 1:
            raise ValueError(f'MaxScale(top="signed"): a weight has code {int(codes.min())}, beyond {self.bits} bits. '
                             'Use top="absolute".')
        return codes.int(), scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, per_channel={self.per_channel}, top={self.top!r}"


# ------------------------------------------------------------------------------------------------ binary
class _Sign(torch.autograd.Function):
    """Sign with the straight-through or the IR-Net error-decay gradient k t (1 - tanh^2(t w))."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, t: float | None, zero_is_plus: bool) -> Tensor:
        ctx.t = t
        if t is not None:
            ctx.save_for_backward(w)
        return torch.where(w >= 0, 1.0, -1.0).to(w.dtype) if zero_is_plus else torch.sign(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.t is None:
            return grads[0], None, None
        (w,) = ctx.saved_tensors
        return grads[0] * (max(1 / ctx.t, 1.0) * ctx.t * (1 - torch.tanh(ctx.t * w) ** 2)), None, None


class Binary(Quantizer):
    """One bit: the sign of the weight, by default normalised per output channel.

        w^ = (w - mean_o) / std_o       normalise=True (gradients flow through both; unbiased std)
           = w                          normalise=False
        codes = sign(w^), sign(0) = +1;   w_q = s_o * codes
        s_o = 1 ("none"), 2^round(log2 mean_o|w^|) ("pow2"), mean_o|c| ("mean"); never takes a gradient
              c = w - mean_o normalised, c = w otherwise
        dL/dw^ = dL/dw_q * s_o          gradient "ste"
               = ... * k t (1 - tanh^2(t w^)),  t = 10^(-1 + 2 progress), k = max(1/t, 1)      gradient "ir_net"
    `Binary(scale="mean", normalise=False)` is sign(w) * mean_o|w|, the weights of XNOR-Net: what is left of Q-SNN's weights
    without their regulation.
    `progress` (0..1, training done) is a buffer, so that it is stored in checkpoints; set it with `anneal(progress)`.

    Args: gradient, scale, zero ("plus"; "published": torch.sign, whose third level 0 cannot be deployed), normalise.
    Deploys as: scheme `binary`. Source: IR-Net (CVPR 2020); BESTformer (scale "none", "ste"); Q-SNN ("pow2", "ir_net");
    XNOR-Net (ECCV 2016, section 3.1), whose gradient also goes through the scale and stops where |w| > 1: here neither.
    Differs from the released code: a constant channel, or one of a single weight, has its std floored at 1e-8 instead of
    dividing by zero; all its codes are sign(0).

    >>> Binary().codes(torch.tensor([[3.0, 1.0, 2.0, 2.0]]))[0].tolist()
    [[1, -1, 1, 1]]
    >>> Binary(scale="mean", normalise=False)(torch.tensor([[3.0, 1.0, -2.0, 2.0]])).tolist()
    [[2.0, 2.0, -2.0, 2.0]]
    """

    deploys_as = "binary"
    bits = 1
    progress: Tensor

    def __init__(self, gradient: str = "ste", scale: str = "none", zero: str = "plus",
                 normalise: bool = True) -> None:
        super().__init__()
        for name, value, allowed in (("gradient", gradient, ("ste", "ir_net")), ("scale", scale, ("none", "pow2", "mean")),
                                     ("zero", zero, ("plus", "published"))):
            if value not in allowed:
                raise ValueError(f"Binary: {name}={value!r}; allowed: {', '.join(map(repr, allowed))}.")
        self.gradient, self.scale, self.zero, self.normalise = gradient, scale, zero, normalise
        self.register_buffer("progress", torch.zeros(()))

    def anneal(self, progress: float) -> None:
        """Set the share of training done (0..1); sharpens the "ir_net" gradient from t = 0.1 to t = 10."""
        self.progress.fill_(min(max(progress, 0.0), 1.0))

    def _normalise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        axes = _over_channels(w)
        centred = normal = w
        if self.normalise:
            centred = w - w.mean(axes, keepdim=True)
            std = centred.std(axes, keepdim=True, correction=min(1, w[0].numel() - 1))  # of a single weight: 0, not NaN
            normal = centred / std.clamp_min(_smallest(w.dtype))
        if self.scale == "none":
            return normal, torch.ones_like(w[:, 0].reshape(w.shape[0], -1)[:, 0]).detach()
        if self.scale == "mean":
            return normal, centred.detach().abs().mean(axes).clamp_min(_smallest(w.dtype))
        mean = normal.detach().abs().mean(axes).clamp_min(_smallest(w.dtype))
        return normal, torch.exp2(torch.round(torch.log2(mean)))

    def forward(self, w: Tensor) -> Tensor:
        normal, scale = self._normalise(w)
        t = 10.0 ** (-1 + 2 * float(self.progress)) if self.gradient == "ir_net" else None
        sign = _Sign.apply(normal, t, self.zero == "plus")
        return sign if self.scale == "none" else sign * _shaped(scale, w)  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        normal, scale = self._normalise(w)
        sign = _Sign.apply(normal, None, self.zero == "plus").int()
        if not bool(sign.all()):
            where = "at its mean" if self.normalise else "zero"
            raise ValueError(f'Binary(zero="published"): a weight is exactly {where}, and the third level 0 has no 1-bit '
                             'code. Use zero="plus".')
        return sign, scale

    def extra_repr(self) -> str:
        return f"gradient={self.gradient!r}, scale={self.scale!r}, zero={self.zero!r}, normalise={self.normalise}"


# ---------------------------------------------------------------------------------------------- membrane
class Membrane(nn.Module):
    """k-bit membrane potential, applied after fire and reset, before the potential is stored; with 32 bits its tanh alone.

        z = tanh(u) (or u);  codes = clip( round(z / (a/Q)), -Q, Q ),  out = codes * (a/Q),  Q = 2^(k-1) - 1
        gradient of tanh where |z| < a, 0 beyond
        32 bits: out = tanh(u), and its gradient
    tanh acts at every step: a leak that grows with the potential, which alone changes what a network computes. So what the
    bits cost is seen against 32 bits, not against a network without a `Membrane`.
    a: "running" (default): a buffer, the running maximum of max|z| in training (momentum 0.1), fixed in evaluation, so no
    sample depends on its neighbours; "batch" (published): max|z| of this very batch, in evaluation too.

    Args: bits 2..8 or 32; scale "running" | "batch"; tanh (published True: it is applied at every step and bounds |u| < 1;
    with 32 bits it is all there is, so it cannot be switched off).
    Deploys as: the k-bit signed state of op `lif_packed`; scale "batch" and 32 bits, whose tanh is no function of integers,
    cannot be deployed.
    Source: Q-SNN (ACM MM 2024) section 3; released code has only "batch", which gives NaN for an all-zero potential
    (here: zero) and could not be deployed.

    >>> Membrane(4).train()(torch.tensor([1.0, 0.3])).tolist() == Membrane(32)(torch.tensor([1.0, 0.3])).tolist()
    False
    >>> bool((Membrane(32)(torch.tensor([1.0, 0.3])) == torch.tensor([1.0, 0.3]).tanh()).all())
    True
    """

    def __init__(self, bits: int = 8, scale: str = "running", tanh: bool = True, momentum: float = 0.1) -> None:
        super().__init__()
        if not (2 <= bits <= 8 or bits == 32):
            raise ValueError(f"Membrane: bits={bits}; allowed: 2..8, or 32 for the tanh alone.")
        if scale not in ("running", "batch"):
            raise ValueError(f"Membrane: scale={scale!r}; allowed: 'running', 'batch'.")
        if bits == 32 and not tanh:
            raise ValueError("Membrane: bits=32 with tanh=False does nothing; leave the membrane out.")
        self.bits, self.scale, self.tanh, self.momentum = bits, scale, tanh, momentum
        self.high = 2 ** (bits - 1) - 1 if self.quantizes else 0  # 0 tells the kernels of the tanh alone
        self.bound: Tensor
        self.register_buffer("bound", torch.zeros(()))

    @property
    def quantizes(self) -> bool:
        """Whether potentials are rounded, rather than only sent through tanh."""
        return self.bits != 32

    @property
    def moves(self) -> bool:
        """Whether the next potential decides on the bound."""
        return self.quantizes and (self.scale == "batch" or self.training or bool(self.bound == 0))

    def known_bound(self, dtype: torch.dtype) -> Tensor:
        """a where no potential decides on it, as a float32 scalar that is a number of `dtype`; infinite with 32 bits."""
        return self.bound.to(dtype).float() if self.quantizes else torch.full_like(self.bound, math.inf).float()

    def next_bound(self, peak: Tensor) -> Tensor:
        """a, from the largest |u| of a step; moves the running one as `forward` does. For the one-pass kernels."""
        return self._limit(torch.tanh(peak) if self.tanh else peak, self.training)

    def _bound(self, z: Tensor, update: bool) -> Tensor:
        """a; `update` moves the running one."""
        return self._limit(z.detach().abs().amax(), update)

    def _limit(self, top: Tensor, update: bool) -> Tensor:
        if self.scale == "batch":
            return top.clamp_min(_smallest(top.dtype))
        if update or self.bound == 0:  # the first batch sets it, whatever the mode
            with torch.no_grad():
                self.bound.copy_(top if self.bound == 0 else torch.lerp(self.bound, top.to(self.bound.dtype), self.momentum))
        return self.bound.to(top.dtype).clamp_min(_smallest(top.dtype))

    def forward(self, u: Tensor) -> Tensor:
        z = torch.tanh(u) if self.tanh else u
        if not self.quantizes:
            return z
        a = self._bound(z, self.training)
        step = a / self.high
        levels = (z.detach() / step).round_().clamp_(-self.high, self.high)
        # as in the released code, the clip stops the gradient at the bound itself, not only beyond it
        return _Straight.apply(z, levels.mul_(step), z.detach().abs() < a)  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Potential -> (int32 codes in -Q..Q, scale of shape [1]); the running bound stays what it is. Not with 32 bits."""
        if not self.quantizes:
            raise ValueError("Membrane: 32 bits are the tanh alone and have no codes; take 2..8 bits.")
        z = torch.tanh(u) if self.tanh else u
        step = self._bound(z, False) / self.high
        return (z / step).round_().clamp_(-self.high, self.high).int(), step.reshape(1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={self.scale!r}, tanh={self.tanh}"
