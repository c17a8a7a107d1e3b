"""Compact SpikeFormer: 3x3 convolutions on a membrane shortcut and one spike-driven attention block, for 32x32 images.

Ours, made for training on a CPU. It keeps QSD-Transformer's neuron (IE-LIF), its linear attention q (k^T v) without softmax
and its real-valued residual stream, and takes from fast float networks for CIFAR (K. Jordan, "94% on CIFAR-10 in 3.29
seconds", 2024) what makes the first epochs count: a decorrelating 2x2 stem, norms without scale, a maximum over the last map.

    image -> stem 2x2 -> group: N conv pool, + N conv  -> group -> + attention -> group -> max -> N -> head

A neuron N stands in front of every convolution and linear layer except the stem, so one side of every matrix product is a
spike count ("strict" in the sense of `meta_spikeformer`).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bitspike.models.blocks import ConvNorm, SpikeConv, as_sequence, spike_attention
from bitspike.neurons import IELIF, LIF, timewise

NeuronFactory = Callable[[], nn.Module]

_BRANCH = 0.5  # scale of a residual branch: the sum stays in the neurons' range

# torch.fx patches a function where it is called from, so each importing module has to say it again
torch.fx.wrap("as_sequence")
torch.fx.wrap("spike_attention")


def _norm(channels: int, scale: float = 1.0) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=0.3)  # schedules here are short: statistics must keep up with the weights
    nn.init.constant_(norm.weight, scale)
    norm.weight.requires_grad_(False)  # the neuron's gain fixes the scale; only the bias is trained
    return norm


def haar_stem(out_channels: int) -> Tensor:
    """[out_channels, 3, 2, 2]: 2x2 Haar patterns of brightness and two colour differences, each with both signs.

    They are close to the principal axes of small natural image patches, so the norm that follows whitens the patch
    without looking at any data; their entries are 0, 1 and 2 in size, which 4-bit codes hold exactly.

    >>> haar_stem(24).flatten(1).abs().sum(1).max().item()
    16.0
    """
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    patterns = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [1.0, -1.0]],
                             [[1.0, 1.0], [-1.0, -1.0]], [[1.0, -1.0], [-1.0, 1.0]]])
    basis = (patterns[:, None, None] * colours[None, :, :, None, None]).flatten(0, 1)
    basis = torch.cat([basis, -basis])
    return basis.repeat(-(-out_channels // len(basis)), 1, 1, 1)[:out_channels].clone()


class SpikeAttention(nn.Module):
    """x + proj(N(scale q (k^T v))) with 1x1 convolutions for q, k, v, proj: [T, B, C, H, W] -> same.

    Forward hooks on `q_neuron`, `k_neuron`, `v_neuron` see q, k and v.
    """

    def __init__(self, channels: int, heads: int, scale: float, neuron: NeuronFactory) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"SpikeAttention: {channels} channels in {heads} heads; take a multiple of {heads}.")

        def conv() -> ConvNorm:
            return ConvNorm(nn.Conv2d(channels, channels, 1, bias=False), _norm(channels))

        self.heads, self.scale = heads, scale
        self.neuron = neuron()
        self.q, self.k, self.v = conv(), conv(), conv()
        self.q_neuron, self.k_neuron, self.v_neuron = neuron(), neuron(), neuron()
        self.attention_neuron = neuron()
        self.proj = ConvNorm(nn.Conv2d(channels, channels, 1, bias=False), _norm(channels, _BRANCH))

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        s = self.neuron(x_TBCHW)
        q, k, v = self.q_neuron(self.q(s)), self.k_neuron(self.k(s)), self.v_neuron(self.v(s))
        y = self.attention_neuron(spike_attention(q, k, v, self.heads, self.scale))
        return x_TBCHW + self.proj(y)  # type: ignore[no-any-return]


class Group(nn.Module):
    """N conv3x3 pool2 norm, then `extra` times x + N conv3x3 norm: [T, B, C, H, W] -> [T, B, C', H // 2, W // 2]."""

    def __init__(self, channels: int, out_channels: int, extra: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.neuron = neuron()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm = _norm(out_channels)
        self.blocks = nn.ModuleList()
        for _ in range(extra):
            block = SpikeConv(neuron(), nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), norm=False)
            block.norm = _norm(out_channels, _BRANCH)
            self.blocks.append(block)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        x = timewise(self.norm, timewise(self.pool, timewise(self.conv, self.neuron(x_TBCHW))))
        for block in self.blocks:
            x = x + block(x)
        return x  # type: ignore[no-any-return]


class CompactSpikeformer(nn.Module):
    """The network of this file.

    Args: widths of the three groups; extra: residual convolutions per group; heads; attention: on or off (off leaves the
    block out); num_classes; time_steps; neuron: function that returns a new neuron; attention_scale: factor on
    q (k^T v), per channel of a head; the default keeps 49 tokens in the neuron's range; logit_scale: factor on the logits;
    in_channels: 3, or 2 for event frames (then the stem is drawn at random); stem_padding: 1 makes the maps half, a quarter and
    an eighth as large as the picture exactly, as a pyramid on top of them needs (`retinanet`, `mask_rcnn`, `SemanticFPN`).
    Shapes: images [B, in_channels, H, W] (H, W from 26 to 33 give the final 3x3 map that is pooled) or sequences ->
    [B, classes].

    >>> CompactSpikeformer((8, 16, 16), heads=2)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[int] = (64, 256, 256), extra: Sequence[int] = (1, 1, 1), heads: int = 8,
                 attention: bool = True, num_classes: int = 10, time_steps: int = 1,
                 neuron: NeuronFactory = partial(IELIF, 4, 2.0), stem_width: int = 24, attention_scale: float = 0.25,
                 logit_scale: float = 0.25, in_channels: int = 3, stem_padding: int = 0) -> None:
        super().__init__()
        if len(widths) != 3 or len(extra) != 3:
            raise ValueError(f"CompactSpikeformer: widths={tuple(widths)}, extra={tuple(extra)}; both need three numbers.")
        self.time_steps, self.logit_scale = time_steps, logit_scale
        self.stem = ConvNorm(nn.Conv2d(in_channels, stem_width, 2, padding=stem_padding, bias=False), _norm(stem_width))
        before = (stem_width, *widths[:2])
        self.groups = nn.ModuleList([Group(i, o, n, neuron) for i, o, n in zip(before, widths, extra, strict=True)])
        self.attention = SpikeAttention(widths[1], heads, attention_scale * heads / widths[1], neuron) if attention else None
        self.pool = nn.MaxPool2d(3)
        self.neuron = neuron()
        self.head = nn.Linear(widths[2], num_classes, bias=False)
        if in_channels != 3:  # event frames: no colours, no axes known beforehand
            return
        with torch.no_grad():
            self.stem.conv.weight.copy_(haar_stem(stem_width))  # type: ignore[operator]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images or a sequence -> the potentials after the three groups, [T, B, C, H, W]."""
        y_TBCHW = self.stem(as_sequence(x, self.time_steps))
        features = []
        for index, group in enumerate(self.groups):
            y_TBCHW = group(y_TBCHW)
            if index == 1 and self.attention is not None:
                y_TBCHW = self.attention(y_TBCHW)
            features.append(y_TBCHW)
        return features

    def forward(self, x: Tensor) -> Tensor:
        y_TBC11 = self.neuron(timewise(self.pool, self.forward_features(x)[-1]))
        return self.head(y_TBC11.flatten(2)).mean(0) * self.logit_scale  # type: ignore[no-any-return]


def compact(num_classes: int = 10, levels: int = 4, gain: float = 2.0, attention: bool = True,
            widths: tuple[int, int, int] = (64, 256, 256), extra: tuple[int, int, int] = (1, 1, 1),
            stem_padding: int = 0, attention_scale: float = 0.25) -> CompactSpikeformer:
    """2.2 M weights, 131 M MACs at 32x32; IE-LIF neurons. For larger pictures see `CompactSpikeformer`'s last options."""
    return CompactSpikeformer(widths, extra, attention=attention, num_classes=num_classes,
                              neuron=partial(IELIF, levels, gain), attention_scale=attention_scale, stem_padding=stem_padding)


def compact_lif(num_classes: int = 10, time_steps: int = 4, attention: bool = True,
                widths: tuple[int, int, int] = (64, 256, 256), extra: tuple[int, int, int] = (1, 1, 1)) -> CompactSpikeformer:
    """`compact` with plain LIF neurons over T steps."""
    return CompactSpikeformer(widths, extra, attention=attention, num_classes=num_classes, time_steps=time_steps,
                              neuron=partial(LIF, 0.5, 0.5), attention_scale=2.0)


def compact_events(num_classes: int = 10, time_steps: int = 10, attention: bool = True,
                   widths: tuple[int, int, int] = (32, 64, 128),
                   extra: tuple[int, int, int] = (1, 1, 1)) -> CompactSpikeformer:
    """`compact_lif` for event frames [T, B, 2, H, W], smaller: 0.3 M weights."""
    return CompactSpikeformer(widths, extra, attention=attention, num_classes=num_classes, time_steps=time_steps,
                              neuron=partial(LIF, 0.5, 0.5), stem_width=16, attention_scale=2.0, in_channels=2)
