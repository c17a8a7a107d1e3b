"""Spikformer: convolutional tokens, softmax-free spiking self-attention; and its successor Spikingformer.

Both are this file's `Spikformer`; they differ in the order of the layers (`shortcut`):

"spike" (Spikformer, Zhou et al., ICLR 2023): convolution, norm, neuron; residual sums add spikes, so the stream holds
counts 0, 1, 2, ...
"membrane" (Spikingformer, Zhou et al., arXiv 2304.11954): neuron, convolution, norm; residual sums are on the real-valued
potential, and every convolution but the first sees spikes.

    image -> 4 convolutions, pooled where `pooling` says so -> + position -> blocks -> mean over space and time -> head

The last convolution of the tokenizer is the relative position embedding x + N(norm(conv(x))) of Spikformer, a fifth step like
the others in Spikingformer. Weights are full precision here; `quantize_` makes them low-bit.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch.fx
from torch import Tensor, nn

from bitspike.models.blocks import ConvNorm, SpikeConv, as_sequence, spike_attention
from bitspike.models.published import load_renamed, read_table, rename
from bitspike.neurons import LIF, timewise

NeuronFactory = Callable[[], nn.Module]

# torch.fx patches a function where it is called from, so each importing module has to say it again
torch.fx.wrap("as_sequence")
torch.fx.wrap("spike_attention")


def lif() -> LIF:
    """The neuron of these papers: tau 2, threshold 1, hard and detached reset."""
    return LIF()


def lif_attention() -> LIF:
    """Their neuron after the attention product: threshold 1/2."""
    return LIF(threshold=0.5)


# ------------------------------------------------------------------------------------------------- blocks
def halve() -> nn.MaxPool2d:
    """The maximum of 3x3 pixels at every second one: [.., H, W] -> [.., (H + 1) // 2, (W + 1) // 2]."""
    return nn.MaxPool2d(3, 2, padding=1)


def pooling_steps(pooling: str) -> list[bool]:
    """Which of the tokenizer's four steps halve the resolution: "0011" -> [False, False, True, True].

    Errors: ValueError unless it is four characters 0 or 1.
    """
    if len(pooling) != 4 or set(pooling) - {"0", "1"}:
        raise ValueError(f'pooling={pooling!r}; it must be four characters 0 or 1, such as "0011" (32x32 images) or "1111" '
                         "(ImageNet).")
    return [digit == "1" for digit in pooling]


class ConvSpike(nn.Module):
    """Convolution, batch norm, neuron and, where `pool`, `halve`: [T, B, C, H, W] -> spikes [T, B, C', H', W']."""

    def __init__(self, conv: nn.Conv2d, neuron: nn.Module, pool: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.neuron = conv, nn.BatchNorm2d(conv.out_channels), neuron
        self.pool = halve() if pool else None

    def potential(self, x_TBCHW: Tensor) -> Tensor:
        """What the neuron integrates, [T, B, C', H, W]."""
        return timewise(self.norm, timewise(self.conv, x_TBCHW))  # type: ignore[no-any-return]

    def fired(self, u_TBCHW: Tensor) -> Tensor:
        """The spikes of a potential, pooled: [T, B, C', H', W']."""
        s = self.neuron(u_TBCHW)
        return s if self.pool is None else timewise(self.pool, s)  # type: ignore[no-any-return]

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.fired(self.potential(x_TBCHW))


class SpikePoolConv(SpikeConv):
    """Neuron, `halve`, convolution, batch norm: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, neuron: nn.Module, conv: nn.Conv2d) -> None:
        super().__init__(neuron, conv)
        self.pool = halve()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        s = timewise(self.pool, self.neuron(x_TBCHW))
        return timewise(self.norm, timewise(self.conv, s))  # type: ignore[no-any-return]


def token_widths(channels: int) -> tuple[int, int, int, int]:
    """Channels of the tokenizer's first four convolutions: 1/8, 1/4, 1/2 and all. Errors: ValueError if 8 is no divisor."""
    if channels < 8 or channels % 8:
        raise ValueError(f"channels={channels}; the tokenizer begins with an eighth of them: take a multiple of 8.")
    return channels // 8, channels // 4, channels // 2, channels


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3 pixels, without bias, at full resolution: [.., inputs, H, W] -> [.., outputs, H, W]."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class Tokenizer(nn.Module):
    """Spikformer's: 4 x (conv norm neuron [pool]), then x + neuron(norm(conv(x))): [T, B, 3, H, W] -> [T, B, C, H', W']."""

    def __init__(self, in_channels: int, channels: int, pooling: str, neuron: NeuronFactory) -> None:
        super().__init__()
        widths = token_widths(channels)
        self.stages = nn.Sequential(*(
            ConvSpike(conv3(i, o), neuron(), pool)
            for i, o, pool in zip((in_channels, *widths), widths, pooling_steps(pooling), strict=False)))
        self.rpe = ConvSpike(conv3(channels, channels), neuron())

    def maps(self, x_TBCHW: Tensor) -> list[Tensor]:
        """The potentials in front of every halving but the first (of half the size, a quarter, ..), then the tokens."""
        x, found = x_TBCHW, []
        for stage in self.stages:
            u = stage.potential(x)  # type: ignore[operator]
            x = stage.fired(u)  # type: ignore[operator]
            if stage.pool is not None:
                found.append(u)
        return [*found[1:], self.rpe(x) + x]

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.maps(x_TBCHW)[-1]


class MembraneTokenizer(nn.Module):
    """Spikingformer's and BESTformer's: conv norm, then 4 x (neuron [pool] conv norm): [T, B, 3, H, W] -> [T, B, C, H', W'].

    The result is a potential; there is no position embedding.
    """

    def __init__(self, in_channels: int, channels: int, pooling: str, neuron: NeuronFactory) -> None:
        super().__init__()
        widths = token_widths(channels)
        steps: list[nn.Module] = [ConvNorm(conv3(in_channels, widths[0]), nn.BatchNorm2d(widths[0]))]
        for i, o, pool in zip(widths, (*widths[1:], channels), pooling_steps(pooling), strict=True):
            steps.append((SpikePoolConv if pool else SpikeConv)(neuron(), conv3(i, o)))
        self.stages = nn.Sequential(*steps)

    def maps(self, x_TBCHW: Tensor) -> list[Tensor]:
        """The potentials in front of every halving but the first (of half the size, a quarter, ..), then the tokens."""
        x, found = x_TBCHW, []
        for stage in self.stages:
            if isinstance(stage, SpikePoolConv):
                found.append(x)
            x = stage(x)
        return [*found[1:], x]

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.maps(x_TBCHW)[-1]


class SelfAttention(nn.Module):
    """Spiking self-attention (SSA): scale * (q k^T) v per head, without softmax: [T, B, C, H, W] -> same.

    The product is computed as q (k^T v): spikes are integers, so both orders give the same numbers.
    Forward hooks on `q_neuron`, `k_neuron`, `v_neuron` see q, k and v.
    """

    def __init__(self, channels: int, heads: int, neuron: NeuronFactory, attention_neuron: NeuronFactory, scale: float,
                 membrane: bool, qkv_bias: bool) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"SelfAttention: {channels} channels in {heads} heads; take a multiple of {heads}.")

        def conv(bias: bool) -> ConvNorm:
            return ConvNorm(nn.Conv2d(channels, channels, 1, bias=bias), nn.BatchNorm2d(channels))

        self.heads, self.scale = heads, scale
        self.neuron = neuron() if membrane else None
        self.q, self.k, self.v = conv(qkv_bias), conv(qkv_bias), conv(qkv_bias)
        self.q_neuron, self.k_neuron, self.v_neuron = neuron(), neuron(), neuron()
        self.attention_neuron = attention_neuron()
        self.proj = conv(True)
        self.proj_neuron = None if membrane else neuron()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        s = x_TBCHW if self.neuron is None else self.neuron(x_TBCHW)
        q, k, v = self.q_neuron(self.q(s)), self.k_neuron(self.k(s)), self.v_neuron(self.v(s))
        y = self.proj(self.attention_neuron(spike_attention(q, k, v, self.heads, self.scale)))
        return y if self.proj_neuron is None else self.proj_neuron(y)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:g}"


class Mlp(nn.Module):
    """Two linear layers over the channels of each pixel: [T, B, C, H, W] -> same.

    membrane: neuron, linear, norm, twice; otherwise linear, norm, neuron, twice.
    """

    def __init__(self, channels: int, ratio: int, neuron: NeuronFactory, membrane: bool, bias: bool = True) -> None:
        super().__init__()
        hidden = channels * ratio

        def step(inputs: int, outputs: int) -> nn.Module:
            conv = nn.Conv2d(inputs, outputs, 1, bias=bias)
            return SpikeConv(neuron(), conv) if membrane else ConvSpike(conv, neuron())

        self.fc1, self.fc2 = step(channels, hidden), step(hidden, channels)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.fc2(self.fc1(x_TBCHW))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(x), then x + Mlp(x): [T, B, C, H, W] -> same."""

    def __init__(self, attn: nn.Module, mlp: Mlp) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        x = x_TBCHW + self.attn(x_TBCHW)
        return x + self.mlp(x)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- model
class Spikformer(nn.Module):
    """Spikformer or Spikingformer; the defaults are Spikformer 4-384 for CIFAR-10.

    Args:
        channels, depth: width of the tokens, number of blocks.
        heads: attention heads; must divide channels. mlp_ratio: hidden channels of the MLPs per channel.
        num_classes, in_channels: of the head and of the image (3), or of the event frames (2).
        time_steps: how often a static image is shown; a sequence brings its own number of steps.
        neuron, attention_neuron: functions that return a new neuron, everywhere and after the attention product.
        attention_scale: factor of (q k^T) v.
        shortcut: "spike" (Spikformer) or "membrane" (Spikingformer), see the module's docstring.
        pooling: which of the tokenizer's four steps halve the resolution: "0011" for CIFAR, "1111" for ImageNet.
        qkv_bias: a bias in q, k and v; true only in Spikformer's CIFAR code. The norm behind it makes it superfluous.
    Shapes: images [B, C, H, W] or sequences [T, B, C, H, W] -> logits [B, num_classes].
    Errors: ValueError for sizes that cannot be meant.
    Source: `cifar10/model.py` and `imagenet/model.py` of both releases. Linear layers are 1x1 convolutions here and keep
    torch's initialisation (the CIFAR code draws Spikformer's with standard deviation 0.02; a norm follows each); the head is
    trunc_normal(0.02), as there.

    >>> net = Spikformer(16, depth=1, heads=2, num_classes=5, shortcut="membrane")
    >>> net(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(self, channels: int = 384, depth: int = 4, heads: int = 12, mlp_ratio: int = 4, num_classes: int = 10,
                 in_channels: int = 3, time_steps: int = 4, neuron: NeuronFactory = lif,
                 attention_neuron: NeuronFactory = lif_attention, attention_scale: float = 0.125, shortcut: str = "spike",
                 pooling: str = "0011", qkv_bias: bool = False) -> None:
        super().__init__()
        if shortcut not in ("spike", "membrane"):
            raise ValueError(f"Spikformer: shortcut={shortcut!r}; allowed: 'spike', 'membrane'.")
        if time_steps < 1 or depth < 1:
            raise ValueError(f"Spikformer: time_steps={time_steps}, depth={depth}; both must be at least 1.")
        self.time_steps, self.shortcut, self.num_classes = time_steps, shortcut, num_classes
        membrane = shortcut == "membrane"
        self.tokenizer = (MembraneTokenizer if membrane else Tokenizer)(in_channels, channels, pooling, neuron)
        self.blocks = nn.Sequential(*(
            Block(SelfAttention(channels, heads, neuron, attention_neuron, attention_scale, membrane, qkv_bias),
                  Mlp(channels, mlp_ratio, neuron, membrane)) for _ in range(depth)))
        self.head = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images or a sequence -> the tokenizer's maps from half the size on, the last one behind the blocks, [T, B, C, H, W].

        "0011" gives maps at 1/2 and 1/4, "1111" at 1/2 .. 1/16; potentials, but for the last one of the "spike" shortcut,
        which holds counts.
        """
        maps = self.tokenizer.maps(as_sequence(x, self.time_steps))  # type: ignore[operator]
        return [*maps[:-1], self.blocks(maps[-1])]

    def forward(self, x: Tensor) -> Tensor:
        y_TBCHW = self.forward_features(x)[-1]
        return self.head(y_TBCHW.mean((3, 4)).mean(0))  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- sizes
# Named <depth>_<channels>, as published. Parameters are counted with 10 (CIFAR) and 1000 classes (ImageNet).
_cifar = partial(Spikformer, pooling="0011", qkv_bias=True)
_imagenet = partial(Spikformer, pooling="1111")


def cifar_4_256(num_classes: int = 10, time_steps: int = 4) -> Spikformer:
    """Spikformer, 4.16 M parameters."""
    return _cifar(256, 4, 8, num_classes=num_classes, time_steps=time_steps)


def cifar_2_384(num_classes: int = 10, time_steps: int = 4) -> Spikformer:
    """Spikformer, 5.77 M parameters."""
    return _cifar(384, 2, 12, num_classes=num_classes, time_steps=time_steps)


def cifar_4_384(num_classes: int = 10, time_steps: int = 4) -> Spikformer:
    """Spikformer, 9.32 M parameters."""
    return _cifar(384, 4, 12, num_classes=num_classes, time_steps=time_steps)


def dvs_2_256(num_classes: int = 10, time_steps: int = 16, heads: int = 16, shortcut: str = "spike") -> Spikformer:
    """Spikformer (shortcut "membrane": Spikingformer) for event frames of 128x128, two polarities: 2.57 M parameters."""
    return Spikformer(256, 2, heads, num_classes=num_classes, in_channels=2, time_steps=time_steps, shortcut=shortcut,
                      pooling="1111")


def imagenet_8_384(num_classes: int = 1000, time_steps: int = 4, heads: int = 8) -> Spikformer:
    """Spikformer, 16.81 M parameters."""
    return _imagenet(384, 8, heads, num_classes=num_classes, time_steps=time_steps)


def imagenet_8_512(num_classes: int = 1000, time_steps: int = 4, heads: int = 8) -> Spikformer:
    """Spikformer, 29.69 M parameters."""
    return _imagenet(512, 8, heads, num_classes=num_classes, time_steps=time_steps)


def imagenet_8_768(num_classes: int = 1000, time_steps: int = 4, heads: int = 8) -> Spikformer:
    """Spikformer, 66.34 M parameters."""
    return _imagenet(768, 8, heads, num_classes=num_classes, time_steps=time_steps)


def spikingformer_cifar_4_256(num_classes: int = 10, time_steps: int = 4) -> Spikformer:
    """Spikingformer, 4.15 M parameters."""
    return Spikformer(256, 4, 8, num_classes=num_classes, time_steps=time_steps, shortcut="membrane")


def spikingformer_cifar_2_384(num_classes: int = 10, time_steps: int = 4) -> Spikformer:
    """Spikingformer, 5.76 M parameters."""
    return Spikformer(384, 2, 12, num_classes=num_classes, time_steps=time_steps, shortcut="membrane")


def spikingformer_cifar_4_384(num_classes: int = 10, time_steps: int = 4) -> Spikformer:
    """Spikingformer, 9.32 M parameters."""
    return Spikformer(384, 4, 12, num_classes=num_classes, time_steps=time_steps, shortcut="membrane")


def spikingformer_8_384(num_classes: int = 1000, time_steps: int = 4, heads: int = 8) -> Spikformer:
    """Spikingformer for ImageNet, 16.81 M parameters."""
    return _imagenet(384, 8, heads, num_classes=num_classes, time_steps=time_steps, shortcut="membrane")


def spikingformer_8_512(num_classes: int = 1000, time_steps: int = 4, heads: int = 8) -> Spikformer:
    """Spikingformer for ImageNet, 29.69 M parameters."""
    return _imagenet(512, 8, heads, num_classes=num_classes, time_steps=time_steps, shortcut="membrane")


def spikingformer_8_768(num_classes: int = 1000, time_steps: int = 4, heads: int = 8) -> Spikformer:
    """Spikingformer for ImageNet, 66.34 M parameters."""
    return _imagenet(768, 8, heads, num_classes=num_classes, time_steps=time_steps, shortcut="membrane")


# -------------------------------------------------------------------------------------- published weights
_ATTENTION = (
    (r"^block(?=\.|$)", "blocks"),
    (r"\.(q|k|v|proj)_(?:conv|linear)(?=\.|$)", r".\1.conv"),
    (r"\.(q|k|v|proj)_bn(?=\.|$)", r".\1.norm"),
    (r"\.(q|k|v)_lif$", r".\1_neuron"),
    (r"\.attn_lif$", ".attention_neuron"),
)
_SPIKE = (
    (r"^patch_embed\.rpe_", "patch_embed.rpe."),
    (r"^patch_embed\.proj_(conv|bn|lif)(?=\.|$)", r"patch_embed.stages.0.\1"),
    (r"^patch_embed\.proj_(conv|bn|lif)(\d)", r"patch_embed.stages.\2.\1"),
    (r"^patch_embed\.maxpool$", "patch_embed.stages.0.pool"),
    (r"^patch_embed\.maxpool(\d)$", r"patch_embed.stages.\1.pool"),
    *_ATTENTION,
    (r"\.attn\.proj_lif$", ".attn.proj_neuron"),
    (r"\.fc([12])_(?:conv|linear)(?=\.|$)", r".fc\1.conv"),
    (r"\.fc([12])_(bn|lif)(?=\.|$)", r".fc\1.\2"),
)
_MEMBRANE = (
    (r"^patch_embed\.proj_(conv|bn)(?=\.|$)", r"patch_embed.stages.0.\1"),
    (r"^patch_embed\.(?:block|proj)(\d)_(conv|bn|lif)(?=\.|$)", r"patch_embed.stages.\1.\2"),
    (r"^patch_embed\.(?:block(\d)_mp|maxpool(\d))$", r"patch_embed.stages.\1\2.pool"),
    *_ATTENTION,
    (r"\.attn\.proj_lif$", ".attn.neuron"),
    (r"\.mlp([12])_(conv|bn|lif)(?=\.|$)", r".fc\1.\2"),
)
_OURS = (
    (r"^patch_embed(?=\.|$)", "tokenizer"),
    (r"\.lif$", ".neuron"),
    (r"\.bn(?=\.|$)", ".norm"),
)
# layer norms that both releases create and never use
_DEAD = r"block\.\d+\.norm[12]\.(weight|bias)"


def published_name(name: str, shortcut: str = "spike") -> str:
    """Name of a module or parameter in the released Spikformer ("spike") or Spikingformer code -> the same thing's here.

    >>> published_name("block.0.attn.q_linear.weight"), published_name("patch_embed.block3_bn", "membrane")
    ('blocks.0.attn.q.conv.weight', 'tokenizer.stages.3.norm')
    """
    return rename(name, (*(_SPIKE if shortcut == "spike" else _MEMBRANE), *_OURS))


def load_published(model: Spikformer, weights: str | Path | Mapping[str, Tensor]) -> Spikformer:
    """Load a released Spikformer or Spikingformer checkpoint (the model's `shortcut` says which) in place; return the model.

    weights: a `.safetensors` file, a torch `.pth` (tensors only), or a table of tensors; before `quantize_`. The layer norms
    that the release never uses are skipped.
    Errors: PublishedWeightsError with the lists of keys, and then nothing is changed; FileNotFoundError.
    """
    state, where = read_table(weights)
    load_renamed(model, state, partial(published_name, shortcut=model.shortcut), where, _DEAD)
    return model
