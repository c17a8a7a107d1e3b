"""Pieces that every architecture here is made of; the exporter knows each of them as one node."""
from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from bitspike import _train_convs
from bitspike.neurons import IELIF, LIF, timewise


def as_sequence(x: Tensor, time_steps: int) -> Tensor:
    """A static image [B, C, H, W] -> the same image at every step [T, B, C, H, W]; a sequence stays what it is.

    Errors: ValueError for any other number of axes. Deploys as: nothing (the first stateful neuron repeats its input).
    """
    if x.dim() == 5:
        return x
    if x.dim() != 4:
        raise ValueError(f"a model takes images [B, C, H, W] or sequences [T, B, C, H, W], found {list(x.shape)}.")
    return x.unsqueeze(0).expand(time_steps, -1, -1, -1, -1)


class ConvNorm(nn.Sequential):
    """Convolution (or linear 1x1) and batch norm over a sequence: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return timewise(self.norm, timewise(self.conv, x_TBCHW))  # type: ignore[no-any-return]


class SpikeConv(nn.Module):
    """Neuron, convolution and, unless `norm` is False, batch norm: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, neuron: nn.Module, conv: nn.Conv2d, norm: bool = True) -> None:
        super().__init__()
        self.neuron, self.conv = neuron, conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else None

    def _conv_counts(self, s_NCHW: Tensor) -> Tensor:
        return _train_convs.conv(self.conv, s_NCHW, self.neuron.scale, self.neuron.levels)  # type: ignore[arg-type]

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        s = self.neuron(x_TBCHW)
        if isinstance(s, Tensor) and isinstance(self.neuron, LIF | IELIF):
            y = timewise(self._conv_counts, s)
        else:
            y = timewise(self.conv, s)
        return y if self.norm is None else timewise(self.norm, y)


class NormPad(nn.Module):
    """Batch norm, then a border of `padding` pixels with the value the norm gives to a zero input (RepConv).

    As published, the border uses the running statistics also in training and passes no gradient to the norm.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        if padding < 1:
            raise ValueError(f"NormPad: padding={padding}; it must be at least 1 (without a border use BatchNorm2d).")
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def border(self) -> Tensor:
        """[C]: the norm's response to zero."""
        n = self.norm
        assert n.running_mean is not None and n.running_var is not None
        return n.bias.detach() - n.running_mean * n.weight.detach() / torch.sqrt(n.running_var + n.eps)

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


torch.fx.wrap("as_sequence")
torch.fx.wrap("spike_attention")
