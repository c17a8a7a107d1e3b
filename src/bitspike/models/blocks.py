"""Pieces that every architecture here is made of; the exporter knows each of them as one node."""
from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from bitspike.neurons import timewise


class ConvNorm(nn.Sequential):
    """Convolution (or linear 1x1) and batch norm over a sequence: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return timewise(self.norm, timewise(self.conv, x_TBCHW))  # type: ignore[no-any-return]


class NormPad(nn.Module):
    """Batch norm, then a border of `padding` pixels with the value the norm gives to a zero input (RepConv)."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def border(self) -> Tensor:
        """[C]: the norm's response to zero."""
        n = self.norm
        assert n.running_mean is not None and n.running_var is not None
        return n.bias - n.running_mean * n.weight / torch.sqrt(n.running_var + n.eps)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y, p = self.norm(x_NCHW), self.padding
        # the norm's own output may be bf16 under autocast
        out = self.border().to(y.dtype)[None, :, None, None].expand(
            y.shape[0], -1, y.shape[2] + 2 * p, y.shape[3] + 2 * p).contiguous(memory_format=torch.channels_last)
        out[:, :, p:-p, p:-p] = y
        return out


class LayerScale(nn.Module):
    """Learned scale per channel on a residual branch: x * weight."""

    def __init__(self, channels: int, init: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), init))

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return x_TBCHW * self.weight[:, None, None]


def spike_attention(q_TBCHW: Tensor, k_TBCHW: Tensor, v_TBCHW: Tensor, heads: int, scale: float) -> Tensor:
    """Linear spike-driven self-attention without softmax: scale * q (k^T v) per head, over the H*W tokens.

    Shapes: all [T, B, C, H, W], C = heads * dim; result likewise. Deploys as: op `attention` (exact in integers).
    Source: SDSA-3 of Meta-SpikeFormer; Q-SDSA of QSD-Transformer.
    """
    T, B, C, H, W = q_TBCHW.shape

    def split(x: Tensor) -> Tensor:  # -> [T*B*heads, dim, N]
        return x.reshape(T * B * heads, C // heads, H * W)

    q, k, v = split(q_TBCHW), split(k_TBCHW), split(v_TBCHW)
    kv = v @ k.transpose(1, 2)  # (k^T v)^T: [.., dim of v, dim of k]
    return (kv @ q * scale).reshape(T, B, C, H, W)


torch.fx.wrap("spike_attention")
