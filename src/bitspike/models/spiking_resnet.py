"""Spiking residual and plain convolutional networks: the ones Q-SNN (ACM MM 2024) and TET train.

    image -> stem conv N [pool] -> stages of basic blocks -> mean over space -> head at every time step
    block:  N(norm(conv(N(norm(conv(s))))) + s), with a 1x1 convolution on s where the size changes

The shortcut adds spikes to a current in front of the neuron, so every convolution but the first sees spikes. The neuron is
Q-SNN's: potential halved at each step, input not scaled, fires above the threshold, reset not detached. Weights and potentials
are full precision here; `quantize_` makes them low-bit, the potentials with a "membrane" rule for `*neuron*`.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.fx
from torch import Tensor, nn

from bitspike.models.blocks import ConvNorm, as_sequence
from bitspike.models.published import PublishedWeightsError, load_renamed, read_table, rename
from bitspike.neurons import LIF, Triangle, timewise

NeuronFactory = Callable[[], nn.Module]

# torch.fx patches a function where it is called from, so each importing module has to say it again
torch.fx.wrap("as_sequence")


def lif_strict() -> LIF:
    """Q-SNN's neuron: u = u/2 + x, fires above 1, hard reset inside the graph, triangular surrogate."""
    return LIF(decay=0.5, scale_input=False, detach_reset=False, surrogate=Triangle(), strict=True)


def _draw(model: nn.Module) -> None:
    """The releases' initialisation: convolutions by fan-out, linear layers with standard deviation 1 / inputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / module.in_features)
            nn.init.zeros_(module.bias)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> ConvNorm:
    return ConvNorm(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs))


# ------------------------------------------------------------------------------------------------- ResNet
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a neuron behind each: spikes [T, B, C, H, W] -> spikes [T, B, C', H', W']."""

    def __init__(self, inputs: int, outputs: int, stride: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.conv1, self.neuron1 = _conv(inputs, outputs, 3, stride), neuron()
        self.conv2, self.neuron2 = _conv(outputs, outputs, 3), neuron()
        self.shortcut = _conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def current(self, s_TBCHW: Tensor) -> Tensor:
        """What the last neuron integrates, [T, B, C', H', W']."""
        current = self.conv2(self.neuron1(self.conv1(s_TBCHW)))
        return current + (s_TBCHW if self.shortcut is None else self.shortcut(s_TBCHW))  # type: ignore[no-any-return]

    def forward(self, s_TBCHW: Tensor) -> Tensor:
        return self.neuron2(self.current(s_TBCHW))  # type: ignore[no-any-return]


class SpikingResNet(nn.Module):
    """Spiking ResNet; the defaults are the ResNet-19 of Q-SNN for 32x32 images.

    Args:
        widths, depths: channels and number of basic blocks of each stage; every stage but the first halves the resolution.
        num_classes, in_channels: of the head and of the image (3), or of the event frames (2).
        time_steps: how often a static image is shown; a sequence brings its own number of steps.
        neuron: function that returns a new neuron.
        stem: kernel size and stride of the first convolution; pool: a 3x3 maximum of stride 2 behind it.
        per_step: the logits of every step (what the TET loss takes), or their mean, the prediction.
    Shapes: images [B, C, H, W] or sequences [T, B, C, H, W] -> logits [T, B, num_classes], or [B, num_classes].
    Errors: ValueError for sizes that cannot be meant.
    Source: Q-SNN, `models/resnet_models.py`.

    >>> SpikingResNet((8, 16), (1, 1), num_classes=5)(torch.zeros(3, 3, 8, 8)).shape
    torch.Size([2, 3, 5])
    """

    def __init__(self, widths: Sequence[int] = (128, 256, 512), depths: Sequence[int] = (3, 3, 2), num_classes: int = 10,
                 in_channels: int = 3, time_steps: int = 2, neuron: NeuronFactory = lif_strict,
                 stem: tuple[int, int] = (3, 1), pool: bool = False, per_step: bool = True) -> None:
        super().__init__()
        if not widths or len(widths) != len(depths) or min(depths) < 1:
            raise ValueError(f"SpikingResNet: widths={tuple(widths)}, depths={tuple(depths)}; both need one number per stage, "
                             "and each stage at least one block.")
        if time_steps < 1:
            raise ValueError(f"SpikingResNet: time_steps={time_steps}; it must be at least 1.")
        self.time_steps, self.num_classes, self.per_step = time_steps, num_classes, per_step
        self.stem, self.neuron = _conv(in_channels, widths[0], *stem), neuron()
        self.pool = nn.MaxPool2d(3, 2, padding=1) if pool else None
        self.stages = nn.Sequential()
        before = widths[0]
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [BasicBlock(before, width, 2 if index else 1, neuron)]
            blocks += [BasicBlock(width, width, 1, neuron) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
            before = width
        self.head = nn.Linear(before, num_classes)
        _draw(self)

    def _stem(self, x: Tensor) -> Tensor:
        s_TBCHW = self.neuron(self.stem(as_sequence(x, self.time_steps)))
        return s_TBCHW if self.pool is None else timewise(self.pool, s_TBCHW)  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images or a sequence -> what the last neuron of each stage integrates, [T, B, C, H, W]."""
        s_TBCHW, maps = self._stem(x), []
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                current = block.current(s_TBCHW)
                s_TBCHW = block.neuron2(current)
            maps.append(current)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        logits_TBK = self.head(self.stages(self._stem(x)).mean((3, 4)))
        return logits_TBK if self.per_step else logits_TBK.mean(0)


# ---------------------------------------------------------------------------------------------------- VGG
class Layer(nn.Module):
    """3x3 convolution with bias, norm, neuron: [T, B, C, H, W] -> spikes [T, B, C', H, W]."""

    def __init__(self, inputs: int, outputs: int, neuron: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.neuron = neuron

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.neuron(timewise(self.norm, timewise(self.conv, x_TBCHW)))  # type: ignore[no-any-return]


class Pool(nn.Module):
    """Mean (or maximum, which keeps spikes spikes) of 2x2 pixels: [T, B, C, H, W] -> [T, B, C, H // 2, W // 2]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in ("mean", "max"):
            raise ValueError(f"SpikingVGG: pool={kind!r}; allowed: 'mean' (published), 'max'.")
        self.pool = nn.AvgPool2d(2) if kind == "mean" else nn.MaxPool2d(2)

    def forward(self, s_TBCHW: Tensor) -> Tensor:
        return timewise(self.pool, s_TBCHW)  # type: ignore[no-any-return]


class SpikingVGG(nn.Module):
    """Plain 3x3 convolutions with a neuron behind each; the defaults are the VGGSNN of TET and Q-SNN for DVS-CIFAR10.

    Args:
        widths: channels of each convolution, 0 for a pool.
        num_classes, in_channels: of the head and of the event frames (2) or the image (3).
        size: height and width of the input in pixels.
        time_steps: how often a static image is shown; a sequence brings its own number of steps.
        neuron: function that returns a new neuron. pool: "mean" (published) or "max".
        per_step: the logits of every step, or their mean.
    Shapes: sequences [T, B, C, size, size] or images -> logits [T, B, num_classes], or [B, num_classes].
    Errors: ValueError for sizes that cannot be meant.
    Source: TET's `VGGSNN`, on which Q-SNN's code is built; the sizes agree with Q-SNN's published 1.20 MB.

    >>> SpikingVGG((8, 0, 16, 0), 5, size=8)(torch.zeros(3, 2, 2, 8, 8)).shape
    torch.Size([3, 2, 5])
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0), num_classes: int = 10,
                 in_channels: int = 2, size: int = 48, time_steps: int = 10, neuron: NeuronFactory = lif_strict,
                 pool: str = "mean", per_step: bool = True) -> None:
        super().__init__()
        side = size // 2 ** list(widths).count(0)
        if side < 1 or not widths or widths[0] < 1:
            raise ValueError(f"SpikingVGG: widths={tuple(widths)}, size={size}; it begins with a convolution, and the pools "
                             "must leave a pixel.")
        if time_steps < 1:
            raise ValueError(f"SpikingVGG: time_steps={time_steps}; it must be at least 1.")
        self.time_steps, self.num_classes, self.per_step = time_steps, num_classes, per_step
        self.features = nn.Sequential()
        before = in_channels
        for width in widths:
            self.features.append(Layer(before, width, neuron()) if width else Pool(pool))
            before = width or before
        self.head = nn.Linear(before * side * side, num_classes)
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        logits_TBK = self.head(self.features(as_sequence(x, self.time_steps)).flatten(2))
        return logits_TBK if self.per_step else logits_TBK.mean(0)


# -------------------------------------------------------------------------------------------------- sizes
def cifar_resnet19(num_classes: int = 10, time_steps: int = 2, per_step: bool = True) -> SpikingResNet:
    """12,558,720 weights with 10 classes: 3,456 in the first convolution, 5,120 in the head."""
    return SpikingResNet(num_classes=num_classes, time_steps=time_steps, per_step=per_step)


def small(num_classes: int = 10, time_steps: int = 2, widths: tuple[int, ...] = (64, 128, 256),
          depths: tuple[int, ...] = (1, 1, 1), per_step: bool = True) -> SpikingResNet:
    """1.2 M weights, 50 M MACs a step at 32x32 (a pool behind the stem): what a CPU core trains in minutes."""
    return SpikingResNet(widths, depths, num_classes, time_steps=time_steps, pool=True, per_step=per_step)


def imagenet_resnet18(num_classes: int = 1000, time_steps: int = 4, per_step: bool = True) -> SpikingResNet:
    """11.68 M weights."""
    return SpikingResNet((64, 128, 256, 512), (2, 2, 2, 2), num_classes, time_steps=time_steps, stem=(7, 2), pool=True,
                         per_step=per_step)


def dvs_vgg(num_classes: int = 10, time_steps: int = 10, pool: str = "mean", per_step: bool = True) -> SpikingVGG:
    """9.263 M weights, for event frames of 48x48 with two polarities."""
    return SpikingVGG(num_classes=num_classes, time_steps=time_steps, pool=pool, per_step=per_step)


# -------------------------------------------------------------------------------------- published weights
_MODULES = (
    (r"^(?:conv1|conv1_s\.layer\.module)(?=\.|$)", "stem.conv"),
    (r"^(?:bn1|conv1_s\.bn)(?=\.|$)", "stem.norm"),
    (r"^conv1_s$", "stem"),
    (r"^lif1$", "neuron"),
    (r"^maxpool$", "pool"),
    (r"^fc(?:\.ops)?(?=\.|$)", "head"),
    *((rf"^layer{stage}(?=\.|$)", f"stages.{stage - 1}") for stage in range(1, 5)),
    (r"\.downsample\.layer\.module(?=\.|$)", ".shortcut.conv"),
    (r"\.downsample\.bn(?=\.|$)", ".shortcut.norm"),
    (r"\.downsample$", ".shortcut"),
    (r"\.conv([12])_s\.layer\.module(?=\.|$)", r".conv\1.conv"),
    (r"\.conv([12])_s\.bn(?=\.|$)", r".conv\1.norm"),
    (r"\.conv([12])_s$", r".conv\1"),
    (r"^(stages\.\d+\.\d+)\.conv([12])(\.weight)$", r"\1.conv\2.conv\3"),
    (r"^(stages\.\d+\.\d+)\.bn([12])(?=\.|$)", r"\1.conv\2.norm"),
    (r"\.lif([12])$", r".neuron\1"),
    (r"\.norm\.(?:bn|seqbn\.module|seqbn)(?=\.|$)", ".norm"),
    # the plain network
    (r"^features\.(\d+)\.fwd\.module\.0(?=\.|$)", r"features.\1.conv"),
    (r"^features\.(\d+)\.fwd\.module\.1(?=\.|$)", r"features.\1.norm"),
    (r"^features\.(\d+)\.act$", r"features.\1.neuron"),
    (r"^classifier\.0(?:\.module)?(?=\.|$)", "head"),
)


def published_name(name: str) -> str:
    """Name of a module or parameter in Q-SNN's (ResNet) or TET's (VGGSNN) code -> the name of the same thing here.

    The ResNet's state has each convolution under two names and each norm under four; all become one.

    >>> published_name("layer2.0.conv1.weight"), published_name("layer2.0.conv1_s.layer.module.weight")
    ('stages.1.0.conv1.conv.weight', 'stages.1.0.conv1.conv.weight')
    """
    return rename(name, _MODULES)


def load_published(model: SpikingResNet | SpikingVGG, weights: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Load a released Q-SNN ResNet or a VGGSNN checkpoint (its full-precision latent weights) in place; return the model.

    weights: a `.safetensors` file, a torch `.pth` (tensors only), or a table of tensors; before `quantize_`.
    Errors: PublishedWeightsError with the lists of keys, and where the several names of one tensor hold different values;
    then nothing is changed. FileNotFoundError.
    """
    state, where = read_table(weights)
    first: dict[str, str] = {}
    for name, tensor in state.items():
        known = first.setdefault(published_name(name), name)
        if known != name and not torch.equal(tensor, state[known]):
            raise PublishedWeightsError(f"{where}: {known} and {name} are one tensor in the released code, but differ.")
    once = {name: state[name] for name in first.values()}
    load_renamed(model, once, published_name, where)
    return model
