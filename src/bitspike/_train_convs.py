"""A convolution of spikes or spike counts that keeps half a byte per input for its backward pass.

Same values as the `nn.Conv2d` it is given; eager torch would keep the counts as floats (4 bytes each, the larger half of
what a training step of these networks has to remember). And the weight gradient of a depthwise convolution, which is
slow in torch on the CPU, comes from a kernel of ours.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from bitspike import _train_kernels

_aten = torch.ops.aten


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, weight: Tensor, bias: Tensor | None, conv: nn.Conv2d, scale: float,
                dtype: torch.dtype) -> Tensor:
        s, w = s.to(dtype), weight.to(dtype)
        ctx.conv, ctx.scale, ctx.dtypes = conv, scale, (weight.dtype, None if bias is None else bias.dtype)
        ctx.shape, ctx.strides = s.shape, s.stride()
        codes = _train_kernels.pack_counts(s, scale)
        ctx.packed = codes is not None
        ctx.save_for_backward(codes if ctx.packed else s, w)
        return nn.functional.conv2d(s, w, None if bias is None else bias.to(dtype), conv.stride, conv.padding,
                                    conv.dilation, conv.groups)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s, w = ctx.saved_tensors
        if ctx.packed:
            s = _train_kernels.unpack_counts(s, ctx.shape, ctx.strides, w.dtype, ctx.scale)
        conv, grad = ctx.conv, grads[0].to(w.dtype)
        needs_s, needs_w, needs_b = ctx.needs_input_grad[:3]
        grad_w: Tensor | None = None
        if needs_w and _depthwise(conv):
            grad_w = _train_kernels.depthwise_weight(s, grad, conv.kernel_size[0], conv.padding[0])
        grad_s, torch_w, grad_b = _aten.convolution_backward(
            grad, s, w, None if conv.bias is None else [conv.out_channels], conv.stride, conv.padding, conv.dilation,
            False, [0, 0], conv.groups, [needs_s, needs_w and grad_w is None, needs_b])
        grad_w = torch_w if grad_w is None else grad_w
        weight_dtype, bias_dtype = ctx.dtypes
        return (grad_s, None if grad_w is None else grad_w.to(weight_dtype),
                None if grad_b is None else grad_b.to(bias_dtype), None, None, None)


def _depthwise(conv: nn.Conv2d) -> bool:
    return (conv.groups == conv.in_channels == conv.out_channels and conv.stride == conv.dilation == (1, 1)
            and conv.kernel_size[0] == conv.kernel_size[1] and conv.padding[0] == conv.padding[1])


def _unwatched(conv: nn.Module) -> bool:
    """No hook would miss its call."""
    return not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
                or _has_any_global_hook())


def conv(conv: nn.Module, s_NCHW: Tensor, scale: float, levels: int) -> Tensor:
    """conv(s) for an s of counts 0..levels times scale; the convolution itself where nothing can be gained."""
    if (not torch.is_grad_enabled() or levels > 15 or not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros"
            or type(conv).forward is not nn.Conv2d.forward or isinstance(conv.padding, str) or not _unwatched(conv)
            or not _train_kernels.usable(s_NCHW)):
        return conv(s_NCHW)  # type: ignore[no-any-return]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else s_NCHW.dtype
    weight = conv.weight
    if dtype not in (torch.float32, torch.bfloat16) or (weight.dtype != dtype and not torch.is_autocast_enabled("cpu")):
        return conv(s_NCHW)  # type: ignore[no-any-return]
    return _Conv.apply(s_NCHW, weight, conv.bias, conv, scale, dtype)  # type: ignore[no-any-return]
