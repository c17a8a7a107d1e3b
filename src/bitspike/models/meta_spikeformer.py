"""Meta-SpikeFormer: four stages of spiking convolutions and linear spike-driven attention.

Two published systems share this one file: Spike-driven Transformer v2 (Yao et al., ICLR 2024; LIF neurons, attention
scale 1/8, no layer scale) and QSD-Transformer (Qiu et al., ICLR 2025; IE-LIF neurons, attention scale 1/4, layer scale
1e-6). Weights are full precision here; `quantize_` makes them low-bit.

    image -> stem conv -> ConvBlock -> stage 0: down, ConvBlock -> stage 1: down, 2 ConvBlocks
          -> stage 2: down, Transformer blocks -> stage 3: widen, Transformer blocks
          -> mean over space -> neuron -> head -> mean over T

All residual sums are on the real-valued potential ("membrane shortcut"); a neuron stands in front of each branch.

`topology="published"` is the released code: inside `RepConv` and `SepConv` some convolutions take real-valued inputs.
`topology="strict"` is ours: a neuron in front of every convolution and linear layer except the stem that sees the
image, so that one side of every matrix product is a spike or a spike count. It is a network of its own: published
weights do not load into it.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch.fx
from torch import Tensor, nn

from bitspike.models.blocks import ConvNorm, LayerScale, NormPad, SpikeConv, as_sequence, spike_attention
from bitspike.models.published import load_renamed, read_table, rename
from bitspike.neurons import IELIF, LIF, timewise

NeuronFactory = Callable[[], nn.Module]

# torch.fx patches a function where it is called from, so each importing module has to say it again
torch.fx.wrap("as_sequence")
torch.fx.wrap("spike_attention")


# ------------------------------------------------------------------------------------------------ neurons
def ielif(levels: int = 4, reach: float = 1.0) -> IELIF:
    """QSD-Transformer's neuron: counts 0..D up to the potential `reach`. The release fixes D = 4 and reach = 1."""
    return IELIF(levels, gain=levels / reach)


def ielif_attention(levels: int = 4) -> IELIF:
    """QSD-Transformer's neuron after the attention product: counts 0..D, values 0, 2/D .. 2."""
    return IELIF(levels, scale=2 / levels)


def lif() -> LIF:
    """SDT-v2's neuron: tau 2, threshold 1, hard and detached reset."""
    return LIF()


def lif_attention() -> LIF:
    """SDT-v2's neuron after the attention product: threshold 1/2."""
    return LIF(threshold=0.5)


# ------------------------------------------------------------------------------------------------- blocks
class SepConv(nn.Module):
    """Inverted separable convolution: expand 1x1 to 2C, depthwise 7x7, project 1x1: [T, B, C, H, W] -> same.

    Published: no neuron (and no norm) between the depthwise and the last convolution. Strict: norm and neuron there.
    """

    def __init__(self, channels: int, neuron: NeuronFactory, strict: bool) -> None:
        super().__init__()
        hidden = 2 * channels
        last = nn.Conv2d(hidden, channels, 1, bias=False)
        self.expand = SpikeConv(neuron(), nn.Conv2d(channels, hidden, 1, bias=False))
        middle = nn.Conv2d(hidden, hidden, 7, padding=3, groups=hidden, bias=False)
        self.depthwise = SpikeConv(neuron(), middle, norm=strict)
        self.project = SpikeConv(neuron(), last) if strict else ConvNorm(last, nn.BatchNorm2d(channels))

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x_TBCHW)))  # type: ignore[no-any-return]


class ConvBlock(nn.Module):
    """x + SepConv(x), then x + two 3x3 convolutions over `ratio` * C channels: [T, B, C, H, W] -> same."""

    def __init__(self, channels: int, ratio: int, neuron: NeuronFactory, strict: bool) -> None:
        super().__init__()
        hidden = channels * ratio
        self.sep = SepConv(channels, neuron, strict)
        self.conv1 = SpikeConv(neuron(), nn.Conv2d(channels, hidden, 3, padding=1, bias=False))
        self.conv2 = SpikeConv(neuron(), nn.Conv2d(hidden, channels, 3, padding=1, bias=False))

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        x = x_TBCHW + self.sep(x_TBCHW)
        return x + self.conv2(self.conv1(x))  # type: ignore[no-any-return]


class RepConv(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution, as published: only the first one's input is spikes.

    The authors mean it to be merged into one 3x3 convolution; with low-bit factors the merged weight is not low-bit, so
    it is kept as three. The two norms in a row are theirs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        self.pad = NormPad(channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
        self.project = ConvNorm(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, s_TBCHW: Tensor) -> Tensor:
        y = timewise(self.depthwise, timewise(self.pad, timewise(self.mix, s_TBCHW)))
        return timewise(self.norm, self.project(y))


class StrictRepConv(nn.Module):
    """`RepConv` with a norm and a neuron between the convolutions, and no doubled norm."""

    def __init__(self, channels: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.mix = ConvNorm(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.depthwise = SpikeConv(neuron(), nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False))
        self.project = SpikeConv(neuron(), nn.Conv2d(channels, channels, 1, bias=False))

    def forward(self, s_TBCHW: Tensor) -> Tensor:
        return self.project(self.depthwise(self.mix(s_TBCHW)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Linear spike-driven attention (SDSA-3, Q-SDSA): scale * q (k^T v) per head: [T, B, C, H, W] -> same.

    Forward hooks on the modules `q_neuron`, `k_neuron`, `v_neuron` see q, k and v; `qkv(x)` returns them.
    """

    def __init__(self, channels: int, heads: int, neuron: NeuronFactory, attention_neuron: NeuronFactory, scale: float,
                 strict: bool) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"Attention: {channels} channels in {heads} heads; take a multiple of {heads}.")

        def conv() -> nn.Module:
            return StrictRepConv(channels, neuron) if strict else RepConv(channels)

        self.heads, self.scale = heads, scale
        self.neuron = neuron()
        self.q, self.k, self.v = conv(), conv(), conv()
        self.q_neuron, self.k_neuron, self.v_neuron = neuron(), neuron(), neuron()
        self.attention_neuron = attention_neuron()
        self.proj = conv()

    def qkv(self, x_TBCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Potential -> the spikes (or counts) q, k, v, each [T, B, C, H, W]."""
        s = self.neuron(x_TBCHW)
        return self.q_neuron(self.q(s)), self.k_neuron(self.k(s)), self.v_neuron(self.v(s))

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        q, k, v = self.qkv(x_TBCHW)
        return self.proj(self.attention_neuron(spike_attention(q, k, v, self.heads, self.scale)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:g}"


class Mlp(nn.Module):
    """Two linear layers over the channels of each pixel, with bias: [T, B, C, H, W] -> same."""

    def __init__(self, channels: int, ratio: int, neuron: NeuronFactory) -> None:
        super().__init__()
        hidden = channels * ratio
        self.fc1 = SpikeConv(neuron(), nn.Conv2d(channels, hidden, 1))
        self.fc2 = SpikeConv(neuron(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.fc2(self.fc1(x_TBCHW))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """x + scale1 * Attention(x), then x + scale2 * Mlp(x): [T, B, C, H, W] -> same."""

    def __init__(self, channels: int, heads: int, ratio: int, neuron: NeuronFactory, attention_neuron: NeuronFactory,
                 attention_scale: float, layer_scale: float | None, strict: bool) -> None:
        super().__init__()
        self.attn = Attention(channels, heads, neuron, attention_neuron, attention_scale, strict)
        self.mlp = Mlp(channels, ratio, neuron)
        self.scale1 = None if layer_scale is None else LayerScale(channels, layer_scale)
        self.scale2 = None if layer_scale is None else LayerScale(channels, layer_scale)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        a = self.attn(x_TBCHW)
        x = x_TBCHW + (a if self.scale1 is None else self.scale1(a))
        m = self.mlp(x)
        return x + (m if self.scale2 is None else self.scale2(m))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """A strided 3x3 convolution to the stage's width, then its blocks: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, down: SpikeConv, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.down = down
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.blocks(self.down(x_TBCHW))  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- model
class MetaSpikeFormer(nn.Module):
    """Meta-SpikeFormer; the defaults are the 15 M QSD-Transformer.

    Args:
        widths: channels of the four stages; the stem has half of the first.
        depths: number of Transformer blocks in stage 2 and in stage 3.
        heads: attention heads; must divide widths[2] and widths[3].
        mlp_ratio: hidden channels of the MLPs and of the 3x3 convolutions, per channel.
        num_classes, in_channels: of the head and of the image (3), or of the event frames (2).
        time_steps: how often a static image is shown; a sequence brings its own number of steps.
        neuron, attention_neuron: functions that return a new neuron, everywhere and after the attention product.
        attention_scale: factor of q (k^T v). layer_scale: its initial value, None for none.
        topology: "published" or "strict" (see the module's docstring).
        stem: kernel size and stride of the first convolution: (7, 2) for ImageNet, (3, 1) for 32x32 images.
        strides: of the four stages' first convolutions.
    Shapes: images [B, C, H, W] or sequences [T, B, C, H, W] -> logits [B, num_classes], the mean over T.
    Errors: ValueError for sizes that cannot be meant.
    Source: SDT-v2 and QSD-Transformer, `classification/models.py` of each; convolutions keep torch's initialisation,
    the head is trunc_normal(0.02), as there.

    >>> net = MetaSpikeFormer((8, 8, 16, 16), depths=(1, 1), heads=2, num_classes=5, stem=(3, 1), strides=(1, 2, 2, 1))
    >>> net(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 360), depths: tuple[int, int] = (6, 2), heads: int = 8,
                 mlp_ratio: int = 4, num_classes: int = 1000, in_channels: int = 3, time_steps: int = 1,
                 neuron: NeuronFactory = ielif, attention_neuron: NeuronFactory = ielif_attention,
                 attention_scale: float = 0.25, layer_scale: float | None = 1e-6, topology: str = "published",
                 stem: tuple[int, int] = (7, 2), strides: Sequence[int] = (2, 2, 2, 1)) -> None:
        super().__init__()
        if topology not in ("published", "strict"):
            raise ValueError(f"MetaSpikeFormer: topology={topology!r}; allowed: 'published', 'strict'.")
        if len(widths) != 4 or len(strides) != 4 or widths[0] % 2:
            raise ValueError(f"MetaSpikeFormer: widths={tuple(widths)}, strides={tuple(strides)}; both need four "
                             "numbers, and the first width must be even.")
        if time_steps < 1 or min(depths) < 0:
            raise ValueError(f"MetaSpikeFormer: time_steps={time_steps}, depths={tuple(depths)}; allowed: at least 1, "
                             "at least 0.")
        strict = topology == "strict"
        self.time_steps, self.topology, self.num_classes = time_steps, topology, num_classes

        def conv_blocks(channels: int, count: int) -> list[nn.Module]:
            return [ConvBlock(channels, mlp_ratio, neuron, strict) for _ in range(count)]

        def transformer_blocks(channels: int, count: int) -> list[nn.Module]:
            return [TransformerBlock(channels, heads, mlp_ratio, neuron, attention_neuron, attention_scale, layer_scale,
                                     strict) for _ in range(count)]

        def down(stage: int) -> SpikeConv:
            before = widths[stage - 1] if stage else half
            return SpikeConv(neuron(), nn.Conv2d(before, widths[stage], 3, strides[stage], padding=1))

        half = widths[0] // 2
        kernel, stride = stem
        self.stem = ConvNorm(nn.Conv2d(in_channels, half, kernel, stride, padding=kernel // 2), nn.BatchNorm2d(half))
        self.stem_block = ConvBlock(half, mlp_ratio, neuron, strict)
        self.stages = nn.ModuleList([
            Stage(down(0), conv_blocks(widths[0], 1)),
            Stage(down(1), conv_blocks(widths[1], 2)),
            Stage(down(2), transformer_blocks(widths[2], depths[0])),
            Stage(down(3), transformer_blocks(widths[3], depths[1])),
        ])
        self.neuron = neuron()
        self.head = nn.Linear(widths[3], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images or a sequence -> the potentials after the four stages, [T, B, C, H, W] (ImageNet: at 1/4 .. 1/16)."""
        y_TBCHW = self.stem_block(self.stem(as_sequence(x, self.time_steps)))
        features = []
        for stage in self.stages:
            y_TBCHW = stage(y_TBCHW)
            features.append(y_TBCHW)
        return features

    def forward(self, x: Tensor) -> Tensor:
        mean_TBC = self.forward_features(x)[-1].mean((3, 4))
        return self.head(self.neuron(mean_TBC)).mean(0)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- sizes
# QSD-Transformer; named by the number of convolution and linear weights with 1000 classes.
def _qsd(widths: tuple[int, int, int, int], depths: tuple[int, int], num_classes: int, time_steps: int, levels: int,
         topology: str) -> MetaSpikeFormer:
    return MetaSpikeFormer(widths, depths, num_classes=num_classes, time_steps=time_steps, topology=topology,
                           neuron=partial(ielif, levels), attention_neuron=partial(ielif_attention, levels))


def imagenet_8m(num_classes: int = 1000, time_steps: int = 1, levels: int = 4,
                topology: str = "published") -> MetaSpikeFormer:
    """8.261 M weights: the smallest size in the QSD release."""
    return _qsd((48, 96, 192, 256), (6, 2), num_classes, time_steps, levels, topology)


def imagenet_15m(num_classes: int = 1000, time_steps: int = 1, levels: int = 4,
                 topology: str = "published") -> MetaSpikeFormer:
    """15.015 M weights: 'QSD-Transformer 1.8M' of the paper."""
    return _qsd((64, 128, 256, 360), (6, 2), num_classes, time_steps, levels, topology)


def imagenet_31m(num_classes: int = 1000, time_steps: int = 1, levels: int = 4,
                 topology: str = "published") -> MetaSpikeFormer:
    """31.194 M weights: 'QSD-Transformer 3.9M' of the paper."""
    return _qsd((96, 192, 384, 480), (6, 2), num_classes, time_steps, levels, topology)


def imagenet_55m(num_classes: int = 1000, time_steps: int = 1, levels: int = 4,
                 topology: str = "published") -> MetaSpikeFormer:
    """55.163 M weights: 'QSD-Transformer 6.8M' of the paper."""
    return _qsd((128, 256, 512, 640), (6, 2), num_classes, time_steps, levels, topology)


def imagenet_74m(num_classes: int = 1000, time_steps: int = 1, levels: int = 4,
                 topology: str = "published") -> MetaSpikeFormer:
    """74.378 M weights: the 55 M widths with depth 12."""
    return _qsd((128, 256, 512, 640), (9, 3), num_classes, time_steps, levels, topology)


def imagenet_123m(num_classes: int = 1000, time_steps: int = 1, levels: int = 4,
                  topology: str = "published") -> MetaSpikeFormer:
    """123.461 M weights: the largest size in the release."""
    return _qsd((192, 384, 768, 960), (6, 2), num_classes, time_steps, levels, topology)


# Spike-driven Transformer v2; the numbers are depth and third width, as published.
def _sdt_v2(widths: tuple[int, int, int, int], num_classes: int, time_steps: int) -> MetaSpikeFormer:
    return MetaSpikeFormer(widths, num_classes=num_classes, time_steps=time_steps, neuron=lif,
                           attention_neuron=lif_attention, attention_scale=0.125, layer_scale=None)


def metaspikformer_8_256(num_classes: int = 1000, time_steps: int = 4) -> MetaSpikeFormer:
    """SDT-v2 15.1 M, LIF neurons."""
    return _sdt_v2((64, 128, 256, 360), num_classes, time_steps)


def metaspikformer_8_384(num_classes: int = 1000, time_steps: int = 4) -> MetaSpikeFormer:
    """SDT-v2 31.3 M, LIF neurons."""
    return _sdt_v2((96, 192, 384, 480), num_classes, time_steps)


def metaspikformer_8_512(num_classes: int = 1000, time_steps: int = 4) -> MetaSpikeFormer:
    """SDT-v2 55.4 M, LIF neurons."""
    return _sdt_v2((128, 256, 512, 640), num_classes, time_steps)


def metaspikformer_8_768(num_classes: int = 1000, time_steps: int = 4) -> MetaSpikeFormer:
    """SDT-v2 123.7 M, LIF neurons."""
    return _sdt_v2((192, 384, 768, 960), num_classes, time_steps)


# For 32x32 images (ours: the papers only transfer to CIFAR, at 128x128). Attention sees 8x8 tokens. Two departures that a
# network trained from scratch needs: the layer scale begins at 1, and the attention scale is about 16 / (tokens * head
# dim). With the published 1/4 every attention neuron is saturated at initialisation, so q, k and v get no gradient.
def cifar_small(num_classes: int = 10, time_steps: int = 1, levels: int = 4, reach: float = 1.0,
                attention_scale: float = 1 / 64, layer_scale: float = 1.0, topology: str = "strict") -> MetaSpikeFormer:
    """1.97 M weights, 163 M MACs: for a CPU. Resolutions 32, 16, 8, 8, 8."""
    return MetaSpikeFormer((32, 64, 128, 160), (2, 1), num_classes=num_classes, time_steps=time_steps,
                           neuron=partial(ielif, levels, reach), attention_neuron=partial(ielif_attention, levels),
                           attention_scale=attention_scale, layer_scale=layer_scale, topology=topology, stem=(3, 1),
                           strides=(2, 2, 1, 1))


def cifar_small_lif(num_classes: int = 10, time_steps: int = 4, attention_scale: float = 1 / 64, layer_scale: float = 1.0,
                    topology: str = "strict") -> MetaSpikeFormer:
    """`cifar_small` with plain LIF neurons over T steps."""
    return MetaSpikeFormer((32, 64, 128, 160), (2, 1), num_classes=num_classes, time_steps=time_steps, neuron=lif,
                           attention_neuron=lif_attention, attention_scale=attention_scale, layer_scale=layer_scale,
                           topology=topology, stem=(3, 1), strides=(2, 2, 1, 1))


def cifar_base(num_classes: int = 10, time_steps: int = 1, levels: int = 4, reach: float = 1.0,
               attention_scale: float = 1 / 128, layer_scale: float = 1.0, topology: str = "strict") -> MetaSpikeFormer:
    """8.34 M weights, 1.43 G MACs: for a GPU. Resolutions 32, 32, 16, 8, 8."""
    return MetaSpikeFormer((64, 128, 256, 360), (2, 1), num_classes=num_classes, time_steps=time_steps,
                           neuron=partial(ielif, levels, reach), attention_neuron=partial(ielif_attention, levels),
                           attention_scale=attention_scale, layer_scale=layer_scale, topology=topology, stem=(3, 1),
                           strides=(1, 2, 2, 1))


def dvs_small(num_classes: int = 10, time_steps: int = 16, levels: int = 4,
              topology: str = "published") -> MetaSpikeFormer:
    """2.0 M weights for event frames of 128x128 with two polarities (ours: no size for events was published)."""
    return MetaSpikeFormer((32, 64, 128, 160), (2, 1), num_classes=num_classes, in_channels=2, time_steps=time_steps,
                           neuron=partial(ielif, levels), attention_neuron=partial(ielif_attention, levels),
                           attention_scale=1 / 64, layer_scale=1.0, topology=topology)


# -------------------------------------------------------------------------------------- published weights
# The released names, rewritten one rule after the other; what they call "lif" is a LIF or an IE-LIF neuron.
_MODULES = (
    (r"^downsample1_1(?=\.|$)", "stem"),
    (r"^downsample1_2(?=\.|$)", "stages.0.down"),
    (r"^downsample2(?=\.|$)", "stages.1.down"),
    (r"^downsample3(?=\.|$)", "stages.2.down"),
    (r"^downsample4(?=\.|$)", "stages.3.down"),
    (r"\.encode_(conv|bn|lif)(?=\.|$)", r".\1"),
    (r"^ConvBlock1_1\.0(?=\.|$)", "stem_block"),
    (r"^ConvBlock1_2\.0(?=\.|$)", "stages.0.blocks.0"),
    (r"^ConvBlock2_1\.0(?=\.|$)", "stages.1.blocks.0"),
    (r"^ConvBlock2_2\.0(?=\.|$)", "stages.1.blocks.1"),
    (r"^block3\.(\d+)(?=\.|$)", r"stages.2.blocks.\1"),
    (r"^block4\.(\d+)(?=\.|$)", r"stages.3.blocks.\1"),
    # SepConv
    (r"\.Conv\.lif1(?=\.|$)", ".sep.expand.lif"),
    (r"\.Conv\.pwconv1(?=\.|$)", ".sep.expand.conv"),
    (r"\.Conv\.bn1(?=\.|$)", ".sep.expand.bn"),
    (r"\.Conv\.lif2(?=\.|$)", ".sep.depthwise.lif"),
    (r"\.Conv\.dwconv(?=\.|$)", ".sep.depthwise.conv"),
    (r"\.Conv\.pwconv2(?=\.|$)", ".sep.project.conv"),
    (r"\.Conv\.bn2(?=\.|$)", ".sep.project.bn"),
    (r"\.Conv$", ".sep"),
    # ConvBlock and MLP: lif, conv, bn of one step side by side
    (r"\.conv([12])(?=\.|$)", r".conv\1.conv"),
    (r"\.(lif|bn)([12])(?=\.|$)", r".conv\2.\1"),
    (r"\.fc([12])_(conv|bn|lif)(?=\.|$)", r".fc\1.\2"),
    # attention: `<q>_conv` is Sequential(RepConv, norm)
    (r"\.(q|k|v|proj)_conv\.0\.body\.0(?=\.|$)", r".\1.mix"),
    (r"\.(q|k|v|proj)_conv\.0\.body\.1\.bn(?=\.|$)", r".\1.pad.bn"),
    (r"\.(q|k|v|proj)_conv\.0\.body\.1(?=\.|$)", r".\1.pad"),
    (r"\.(q|k|v|proj)_conv\.0\.body\.2\.0(?=\.|$)", r".\1.depthwise"),
    (r"\.(q|k|v|proj)_conv\.0\.body\.2\.1(?=\.|$)", r".\1.project.conv"),
    (r"\.(q|k|v|proj)_conv\.0\.body\.2\.2(?=\.|$)", r".\1.project.bn"),
    (r"\.(q|k|v|proj)_conv\.0(\.body(\.2)?)?$", r".\1.project"),
    (r"\.(q|k|v|proj)_conv\.1(?=\.|$)", r".\1.bn"),
    (r"\.(q|k|v|proj)_conv$", r".\1"),
    (r"\.(q|k|v)_lif$", r".\1_neuron"),
    (r"\.attn_lif$", ".attention_neuron"),
    (r"\.head_lif$", ".neuron"),
    (r"\.layer_scale([12])$", r".scale\1.weight"),
    (r"(^|\.)lif$", r"\1neuron"),
    (r"\.bn(?=\.|$)", ".norm"),
)
# created with every layer of the QSD release, never used by its forward
_DEAD = r".*\.act\.(alpha|zero_point|signed|init_state)"


def published_name(name: str) -> str:
    """Name of a module or parameter in the released QSD-Transformer and SDT-v2 code -> the name of the same thing here.

    >>> published_name("block3.0.attn.q_conv.0.body.2.1.weight")
    'stages.2.blocks.0.attn.q.project.conv.weight'
    """
    return rename(name, _MODULES)


def load_published(model: MetaSpikeFormer, weights: str | Path | Mapping[str, Tensor]) -> MetaSpikeFormer:
    """Load a released QSD-Transformer or SDT-v2 checkpoint in place and return the model.

    weights: a `.safetensors` file, a torch `.pth` (read with weights_only; an outer 'model' and the prefix 'module.'
    are taken off), or a table of tensors. A quantized checkpoint (with `alpha`) needs the model quantized first, with
    an "lsq" scheme; a full-precision one needs it not yet quantized. The release's unused activation parameters `*.act.*`
    are skipped; of a distilled SDT-v2 checkpoint the two heads are averaged, which is what its evaluation does.
    Errors: PublishedWeightsError with the lists of keys, and then nothing is changed; FileNotFoundError.
    """
    if model.topology != "published":
        raise ValueError(f"load_published: the model's topology is {model.topology!r}; these weights belong to "
                         "topology='published'.")
    state, where = read_table(weights)
    for leaf in ("weight", "bias"):
        if {f"head.{leaf}", f"head_kd.{leaf}"} <= state.keys():
            state[f"head.{leaf}"] = (state[f"head.{leaf}"] + state.pop(f"head_kd.{leaf}")) / 2
    load_renamed(model, state, published_name, where, _DEAD)
    return model
