"""Spike-driven Transformer (v1, Yao et al., NeurIPS 2023): attention by mask and addition only.

    image -> 4 convolutions, pooled where `pooling` says so -> + position -> blocks -> mean over space -> neuron -> head
          -> mean over T

Attention (SDSA-1) has no matrix product: the coincidences of k and v are added up over the tokens, a neuron makes one bit
per channel of the sum, and that bit passes or stops the whole channel of q. Its cost is linear in tokens and channels, and
heads make no difference. All residual sums are on the potential ("membrane shortcut").
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch.fx
from torch import Tensor, nn

from bitspike.models.blocks import ConvNorm, SpikeConv, as_sequence
from bitspike.models.published import load_renamed, read_table, rename
from bitspike.models.spikformer import (
    Block,
    ConvSpike,
    Mlp,
    conv3,
    halve,
    lif,
    lif_attention,
    pooling_steps,
    token_widths,
)
from bitspike.neurons import timewise

NeuronFactory = Callable[[], nn.Module]


def spike_coincidences(k_TBCHW: Tensor, v_TBCHW: Tensor) -> Tensor:
    """How many tokens have a spike in both k and v, per channel: [T, B, C, H, W] twice -> [T, B, C, 1, 1]."""
    return (k_TBCHW * v_TBCHW).sum((3, 4), keepdim=True)


def spike_mask(q_TBCHW: Tensor, mask_TBC11: Tensor) -> Tensor:
    """The channels of q that the mask lets pass: [T, B, C, H, W] and [T, B, C, 1, 1] -> [T, B, C, H, W]."""
    return q_TBCHW * mask_TBC11


# torch.fx patches a function where it is called from, so each importing module has to say it again
torch.fx.wrap("as_sequence")
torch.fx.wrap("spike_coincidences")
torch.fx.wrap("spike_mask")


class Tokenizer(nn.Module):
    """3 x (conv norm neuron [pool]), conv norm [pool], then x + norm(conv(neuron(x))): the result is a potential.

    Shapes: [T, B, 3, H, W] -> [T, B, C, H', W'].
    """

    def __init__(self, in_channels: int, channels: int, pooling: str, neuron: NeuronFactory) -> None:
        super().__init__()
        widths, pools = token_widths(channels), pooling_steps(pooling)
        steps: list[nn.Module] = [
            ConvSpike(conv3(i, o), neuron(), pool)
            for i, o, pool in zip((in_channels, *widths[:2]), widths[:3], pools[:3], strict=True)]
        self.stages = nn.Sequential(*steps, ConvNorm(conv3(widths[2], channels), nn.BatchNorm2d(channels)))
        self.pool = halve() if pools[3] else None
        self.rpe = SpikeConv(neuron(), conv3(channels, channels))

    def maps(self, x_TBCHW: Tensor) -> list[Tensor]:
        """The potentials in front of every halving but the first (of half the size, a quarter, ..), then the tokens."""
        x, found = x_TBCHW, []
        for stage in self.stages:
            if not isinstance(stage, ConvSpike):
                x = stage(x)
                continue
            u = stage.potential(x)
            x = stage.fired(u)
            if stage.pool is not None:
                found.append(u)
        if self.pool is not None:
            found.append(x)
            x = timewise(self.pool, x)
        return [*found[1:], self.rpe(x) + x]

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.maps(x_TBCHW)[-1]


class Attention(nn.Module):
    """SDSA-1: q masked by neuron(sum over tokens of k v): [T, B, C, H, W] -> same.

    Forward hooks on `q_neuron`, `k_neuron`, `v_neuron` see q, k and v.
    """

    def __init__(self, channels: int, neuron: NeuronFactory, attention_neuron: NeuronFactory) -> None:
        super().__init__()

        def conv(bias: bool) -> ConvNorm:
            return ConvNorm(nn.Conv2d(channels, channels, 1, bias=bias), nn.BatchNorm2d(channels))

        self.neuron = neuron()
        self.q, self.k, self.v = conv(False), conv(False), conv(False)
        self.q_neuron, self.k_neuron, self.v_neuron = neuron(), neuron(), neuron()
        self.attention_neuron = attention_neuron()
        self.proj = conv(True)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        s = self.neuron(x_TBCHW)
        q, k, v = self.q_neuron(self.q(s)), self.k_neuron(self.k(s)), self.v_neuron(self.v(s))
        return self.proj(spike_mask(q, self.attention_neuron(spike_coincidences(k, v))))  # type: ignore[no-any-return]


class SpikeDrivenTransformer(nn.Module):
    """Spike-driven Transformer v1; the defaults are 2-512 for CIFAR-10.

    Args:
        channels, depth: width of the tokens, number of blocks. mlp_ratio: hidden channels of the MLPs per channel.
        num_classes, in_channels: of the head and of the image (3), or of the event frames (2).
        time_steps: how often a static image is shown; a sequence brings its own number of steps.
        neuron, attention_neuron: functions that return a new neuron, everywhere and on the sum of coincidences.
        pooling: which of the tokenizer's four steps halve the resolution: "0011" for CIFAR, "1111" for ImageNet.
    Shapes: images [B, C, H, W] or sequences [T, B, C, H, W] -> logits [B, num_classes], the mean over T.
    Errors: ValueError for sizes that cannot be meant.
    Source: `model/spikeformer.py`, `module/*.py` of the release; all convolutions begin as trunc_normal(0.02), as there.
    Differs from it: no "dvs_mode" (it widens k, v and their product by a 3x3 maximum); the layer `talking_heads` that its
    forward never uses is left out.

    >>> SpikeDrivenTransformer(16, depth=1, num_classes=5)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(self, channels: int = 512, depth: int = 2, mlp_ratio: int = 4, num_classes: int = 10,
                 in_channels: int = 3, time_steps: int = 4, neuron: NeuronFactory = lif,
                 attention_neuron: NeuronFactory = lif_attention, pooling: str = "0011") -> None:
        super().__init__()
        if time_steps < 1 or depth < 1:
            raise ValueError(f"SpikeDrivenTransformer: time_steps={time_steps}, depth={depth}; both must be at least 1.")
        if mlp_ratio < 2:
            raise ValueError(f"SpikeDrivenTransformer: mlp_ratio={mlp_ratio}; it must be at least 2 (at 1 the release adds "
                             "another shortcut, which is not built).")
        self.time_steps, self.num_classes = time_steps, num_classes
        self.tokenizer = Tokenizer(in_channels, channels, pooling, neuron)
        self.blocks = nn.Sequential(*(
            Block(Attention(channels, neuron, attention_neuron), Mlp(channels, mlp_ratio, neuron, membrane=True))
            for _ in range(depth)))
        self.neuron = neuron()
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images or a sequence -> the tokenizer's potentials from half the size on, the last ones behind the blocks,
        [T, B, C, H, W]: "0011" gives maps at 1/2 and 1/4, "1111" at 1/2 .. 1/16.
        """
        maps = self.tokenizer.maps(as_sequence(x, self.time_steps))
        return [*maps[:-1], self.blocks(maps[-1])]

    def forward(self, x: Tensor) -> Tensor:
        y_TBCHW = self.forward_features(x)[-1]
        return self.head(self.neuron(y_TBCHW.mean((3, 4)))).mean(0)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- sizes
# Named <depth>_<channels>, as published.
def _imagenet(channels: int, depth: int, num_classes: int, time_steps: int) -> SpikeDrivenTransformer:
    return SpikeDrivenTransformer(channels, depth, num_classes=num_classes, time_steps=time_steps, pooling="1111")


def cifar_2_512(num_classes: int = 10, time_steps: int = 4) -> SpikeDrivenTransformer:
    """10.23 M parameters, for 32x32 images."""
    return SpikeDrivenTransformer(512, 2, num_classes=num_classes, time_steps=time_steps)


def dvs_2_256(num_classes: int = 10, time_steps: int = 10) -> SpikeDrivenTransformer:
    """For event frames of 128x128 with two polarities: 2.57 M parameters."""
    return SpikeDrivenTransformer(256, 2, num_classes=num_classes, in_channels=2, time_steps=time_steps, pooling="1111")


def imagenet_8_384(num_classes: int = 1000, time_steps: int = 4) -> SpikeDrivenTransformer:
    """16.81 M parameters."""
    return _imagenet(384, 8, num_classes, time_steps)


def imagenet_6_512(num_classes: int = 1000, time_steps: int = 4) -> SpikeDrivenTransformer:
    """23.37 M parameters."""
    return _imagenet(512, 6, num_classes, time_steps)


def imagenet_8_512(num_classes: int = 1000, time_steps: int = 4) -> SpikeDrivenTransformer:
    """29.69 M parameters."""
    return _imagenet(512, 8, num_classes, time_steps)


def imagenet_10_512(num_classes: int = 1000, time_steps: int = 4) -> SpikeDrivenTransformer:
    """36.01 M parameters."""
    return _imagenet(512, 10, num_classes, time_steps)


def imagenet_8_768(num_classes: int = 1000, time_steps: int = 4) -> SpikeDrivenTransformer:
    """66.34 M parameters."""
    return _imagenet(768, 8, num_classes, time_steps)


# -------------------------------------------------------------------------------------- published weights
_MODULES = (
    (r"^patch_embed\.proj_lif3$", "patch_embed.rpe.lif"),  # the last convolution's neuron stands in front of the next one
    (r"^patch_embed\.rpe_", "patch_embed.rpe."),
    (r"^patch_embed\.proj_(conv|bn|lif)(?=\.|$)", r"patch_embed.stages.0.\1"),
    (r"^patch_embed\.proj_(conv|bn|lif)(\d)", r"patch_embed.stages.\2.\1"),
    (r"^patch_embed(?=\.|$)", "tokenizer"),
    (r"^block(?=\.|$)", "blocks"),
    (r"^head_lif$", "neuron"),
    (r"\.(q|k|v|proj)_(conv|bn)(?=\.|$)", r".\1.\2"),
    (r"\.(q|k|v)_lif$", r".\1_neuron"),
    (r"\.talking_heads_lif$", ".attention_neuron"),
    (r"\.shortcut_lif$", ".neuron"),
    (r"\.fc([12])_(conv|bn|lif)(?=\.|$)", r".fc\1.\2"),
    (r"\.lif$", ".neuron"),
    (r"\.bn(?=\.|$)", ".norm"),
)
# created with every attention, never used by its forward
_DEAD = r"block\.\d+\.attn\.talking_heads\.weight"


def published_name(name: str) -> str:
    """Name of a module or parameter in the released code -> the name of the same thing here.

    >>> published_name("block.0.attn.q_bn.weight"), published_name("patch_embed.proj_conv2.weight")
    ('blocks.0.attn.q.norm.weight', 'tokenizer.stages.2.conv.weight')
    """
    return rename(name, _MODULES)


def load_published(model: SpikeDrivenTransformer, weights: str | Path | Mapping[str, Tensor]) -> SpikeDrivenTransformer:
    """Load a released Spike-driven Transformer checkpoint in place and return the model.

    weights: a `.safetensors` file, a torch `.pth` (tensors only), or a table of tensors; before `quantize_`. The release's
    unused `talking_heads` are skipped.
    Errors: PublishedWeightsError with the lists of keys, and then nothing is changed; FileNotFoundError.
    """
    state, where = read_table(weights)
    load_renamed(model, state, published_name, where, _DEAD)
    return model
