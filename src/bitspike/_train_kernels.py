"""One-pass CPU kernels for training: when they apply, and how tensors are handed to them.

`bitspike._train` takes bare addresses, so everything that could go wrong is checked here. Each function returns None
(or False) where the kernels do not apply - another device or dtype, tensors that are not dense in memory, no compiled
extension - and the caller then computes the same values with torch.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:  # after torch: both then share one OpenMP run time
    from bitspike import _train as _native  # type: ignore[attr-defined]
except ImportError:  # a source tree without a compiler trains too, only slower
    _native = None

# in a source tree the compiled module may be older than these lines: then it is as if there were none
_native_: Any = _native if getattr(_native, "version", None) == 4 else None


def isa() -> str | None:
    """Instruction set of the kernels in use, or None without the extension."""
    return None if _native_ is None else _native_.isa()


def _plain(x: Tensor) -> bool:
    """A real CPU tensor with memory of its own: not a subclass, not traced, not under a functional transform."""
    return (_native_ is not None and type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
            and x.layout == torch.strided and not torch.compiler.is_compiling()
            and not torch._C._functorch.is_functorch_wrapped_tensor(x))


def _dense(x: Tensor) -> bool:
    """Every element once, in some order, without gaps: then elementwise work may follow memory."""
    if x.is_contiguous():
        return True
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def usable(x: Tensor) -> bool:
    """A dense float32 or bfloat16 tensor on the CPU, and the kernels are there."""
    return _plain(x) and x.dtype in (torch.float32, torch.bfloat16) and _dense(x)


def _like(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The values of x, laid out with these (dense) strides: x itself where it has them."""
    if all(n == 1 or s == t for n, s, t in zip(x.shape, x.stride(), strides, strict=True)):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def count_forward(x: Tensor, levels: int, gain: float, scale: float) -> tuple[Tensor, Tensor] | None:
    """(y, packed mask of 0 < gain x < levels in the order of memory): IE-LIF counts in one pass."""
    if not usable(x):
        return None
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    _native_.count_forward(x.data_ptr(), y.data_ptr(), mask.data_ptr(), x.numel(), x.dtype == torch.bfloat16,
                           levels, gain, scale, torch.get_num_threads())
    return y, mask


def count_backward(grad: Tensor, mask: Tensor, strides: tuple[int, ...], slope: float) -> Tensor:
    """grad * mask * slope for a mask of `count_forward`; strides: those of its x."""
    if grad.dtype not in (torch.float32, torch.bfloat16):
        grad = grad.float()
    grad = _like(grad, strides)
    out = torch.empty_strided(grad.shape, strides, dtype=grad.dtype)
    _native_.count_backward(grad.data_ptr(), mask.data_ptr(), out.data_ptr(), grad.numel(),
                            grad.dtype == torch.bfloat16, slope, torch.get_num_threads())
    return out


def _weights(w: Tensor, scale: Tensor) -> bool:
    """Float32, dense, channels outermost in memory: [O, ...] in its default or channels_last layout."""
    return (usable(w) and usable(scale) and w.dtype == scale.dtype == torch.float32 and w.dim() > 1
            and w.numel() > 0 and w.stride(0) == w.numel() // w.shape[0] and scale.numel() in (1, w.shape[0]))


def lsq_forward(w: Tensor, scale: Tensor, low: int, high: int, smallest: float) -> Tensor | None:
    """clip(round(w / step), low, high) * step with step = max(scale, smallest), in one pass."""
    if not _weights(w, scale):
        return None
    q = torch.empty_strided(w.shape, w.stride(), dtype=w.dtype)
    _native_.lsq_forward(w.data_ptr(), scale.data_ptr(), q.data_ptr(), w.shape[0], w.numel() // w.shape[0],
                         scale.numel(), low, high, smallest, torch.get_num_threads())
    return q


def lsq_backward(w: Tensor, scale: Tensor, grad: Tensor, low: int, high: int, smallest: float,
                 grad_scale: float) -> tuple[Tensor, Tensor] | None:
    """(gradient of w, gradient of scale) of `lsq_forward`; the latter times grad_scale."""
    if not _weights(w, scale) or not _plain(grad) or grad.dtype != torch.float32:
        return None
    grad = _like(grad, w.stride())
    grad_w = torch.empty_strided(w.shape, w.stride(), dtype=w.dtype)
    grad_steps = torch.empty(w.shape[0], dtype=w.dtype)
    _native_.lsq_backward(w.data_ptr(), scale.data_ptr(), grad.data_ptr(), grad_w.data_ptr(), grad_steps.data_ptr(),
                          w.shape[0], w.numel() // w.shape[0], scale.numel(), low, high, smallest, grad_scale,
                          torch.get_num_threads())
    return grad_w, grad_steps if scale.numel() > 1 else grad_steps.sum().view(scale.shape)


def pack_counts(y: Tensor, scale: float) -> Tensor | None:
    """y = count * scale with counts 0..15 -> half a byte each; None where an element is anything else (NaN too)."""
    if not usable(y):
        return None
    codes = torch.empty((y.numel() + 1) // 2, dtype=torch.uint8)
    exact = _native_.pack_counts(y.data_ptr(), codes.data_ptr(), y.numel(), y.dtype == torch.bfloat16, scale,
                                 torch.get_num_threads())
    return codes if exact else None


def unpack_counts(codes: Tensor, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    """Inverse of `pack_counts`, exactly."""
    y = torch.empty_strided(shape, strides, dtype=dtype)
    _native_.unpack_counts(codes.data_ptr(), y.data_ptr(), y.numel(), dtype == torch.bfloat16, scale,
                           torch.get_num_threads())
    return y


_RESETS = ("hard", "soft", "none")


def lif_shape(x: Tensor, *, decay: float, gain: float, threshold: float, reset: str, strict: bool, detach: bool, surrogate: int,
              parameter: float, high: int = 0, tanh: bool = False) -> tuple[Any, ...] | None:
    """What the LIF kernels take for x [T, ...]; None where they do not apply.

    surrogate: 0 sigmoid, 1 triangle, 2 arctan, 3 rectangle.
    """
    T = x.shape[0]
    if not usable(x) or x.numel() == 0 or _native_.lif_steps < T or (T > 1 and x.stride(0) != x.numel() // T):
        return None
    if reset not in _RESETS:
        return None
    # eager torch subtracts a number in the dtype of the tensor, but multiplies by it in float32
    threshold = torch.tensor(threshold, dtype=x.dtype).item()
    return (T, x.numel() // T, decay, gain, threshold, _RESETS.index(reset), strict, detach, surrogate, parameter, high, tanh)


def lif_forward(x: Tensor, shape: Any, next_bound: Callable[[Tensor], Tensor] | None,
                bounds: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(spikes, bounds) of a LIF neuron.

    next_bound: from the largest potential of a step (a scalar of x's dtype) to that step's bound, asked after each step but
    the last; or `bounds`, float32 [T], known before; or neither.
    """
    s = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    shape = _native_.LifShape(*shape)  # made for each call: what autograd keeps is plain Python
    T, bf16, threads = x.shape[0], x.dtype == torch.bfloat16, torch.get_num_threads()
    addresses = x.data_ptr(), s.data_ptr()
    if next_bound is None:
        known = 0 if bounds is None else bounds.data_ptr()
        _native_.lif_forward(*addresses, 0, 0, T, shape, known, bf16, threads)
        return s, bounds
    bounds, state = torch.zeros(T), torch.empty(x.numel() // T)
    for t in range(T):
        peak = _native_.lif_forward(*addresses, state.data_ptr(), t, t + 1, shape, bounds.data_ptr(), bf16, threads)
        if t < T - 1:
            bounds[t] = next_bound(torch.tensor(peak, dtype=x.dtype))
    return s, bounds


def lif_backward(x: Tensor, grad: Tensor, shape: Any, bounds: Tensor | None) -> Tensor:
    """Gradient of x from that of the spikes."""
    grad = _like(grad.to(x.dtype), x.stride())
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    known = 0 if bounds is None else bounds.data_ptr()
    _native_.lif_backward(x.data_ptr(), grad.data_ptr(), out.data_ptr(), _native_.LifShape(*shape), known,
                          x.dtype == torch.bfloat16, torch.get_num_threads())
    return out


def depthwise_weight(x: Tensor, grad: Tensor, kernel: int, padding: int) -> Tensor | None:
    """Weight gradient [C, 1, k, k] of a depthwise convolution of stride 1, in float32; None where it does not apply."""
    if not usable(x) or not _plain(grad) or grad.dtype != x.dtype or x.shape[1] % 16 or kernel not in (3, 5, 7):
        return None
    x, grad = x.contiguous(memory_format=torch.channels_last), grad.contiguous(memory_format=torch.channels_last)
    weight = torch.empty(x.shape[1], 1, kernel, kernel)
    _native_.depthwise_weight(x.data_ptr(), grad.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[2], x.shape[3],
                              x.shape[1], kernel, padding, grad.shape[2], grad.shape[3], x.dtype == torch.bfloat16,
                              torch.get_num_threads())
    return weight
