"""Feature pyramid with integer neurons over any backbone here, and how a backbone is measured for it.

    backbone maps c_i -> lateral: N conv1x1 -> (maps of one stride are added) -> + up-sampled coarser level -> N conv3x3
                         extra, coarser levels: N conv3x3 of stride 2 on the level before

All sums are on real-valued potentials; a neuron N stands in front of every convolution.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.models.blocks import SpikeConv
from bitspike.neurons import IELIF, timewise

NeuronFactory = Callable[[], nn.Module]


def published_neuron(levels: int = 4) -> IELIF:
    """The neuron of QSD-Transformer's detection neck and heads: the count round(clip(x, 0, D)) itself, not divided by D.

    The same range in training and in evaluation. The release clamps its neck to 1 in evaluation, which is left out here.
    """
    return IELIF(levels, gain=1.0)


@dataclass(frozen=True)
class Maps:
    """What a backbone's `forward_features` returns: channels and stride (input pixels per cell) of each map."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


@torch.no_grad()
def measure(backbone: nn.Module, size: int = 64, in_channels: int = 3) -> Maps:
    """Show the backbone a blank picture of size x size pixels and measure its maps.

    The mode of the backbone is kept. Errors: TypeError without `forward_features`; ValueError for a network that cannot look at
    the picture, a map whose side does not divide the picture's, or maps that become finer.

    >>> from bitspike.models.meta_spikeformer import MetaSpikeFormer
    >>> measure(MetaSpikeFormer((8, 8, 16, 16), depths=(1, 1), heads=2)).strides
    (4, 8, 16, 16)
    """
    features = getattr(backbone, "forward_features", None)
    if not callable(features):
        raise TypeError(f"{type(backbone).__name__} has no forward_features(images) -> list of maps [T, B, C, H, W]; a neck "
                        "needs one.")
    mode = backbone.training
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    try:
        maps = features_of(backbone.eval(), torch.zeros(1, in_channels, size, size, device=device))
    except RuntimeError as error:
        raise ValueError(f"{type(backbone).__name__} cannot look at a picture of {in_channels} channels and {size} pixels, as "
                         f"the networks on top of it do ({error}).") from None
    finally:
        backbone.train(mode)
    sides = [int(m.shape[-1]) for m in maps]
    if any(size % side for side in sides) or sides != sorted(sides, reverse=True):
        raise ValueError(f"{type(backbone).__name__}: its maps of a picture of {size} pixels have sides {sides}; a pyramid "
                         "needs maps in order of their stride, each of whose sides divides the picture's (pad the stem so "
                         "that a stride of 2 halves the side).")
    return Maps(tuple(int(m.shape[2]) for m in maps), tuple(size // side for side in sides))


def features_of(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """`backbone.forward_features(images)`, typed: the maps [T, B, C, H, W]."""
    return backbone.forward_features(images)  # type: ignore[operator,no-any-return]


def without_classifier(backbone: nn.Module) -> nn.Module:
    """Replace what `forward_features` does not use (final neuron, pool, head) by nothing, in place.

    A neck on top would leave these parts without gradient, and a spec would quantize what nobody runs.

    >>> from bitspike.models.meta_spikeformer import MetaSpikeFormer
    >>> without_classifier(MetaSpikeFormer((8, 8, 16, 16), depths=(1, 1), heads=2)).head
    Identity()
    """
    used: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: used.add(module)) for m in backbone.modules()]
    measure(backbone)
    for handle in handles:
        handle.remove()
    for name, child in backbone.named_children():
        if not any(m in used for m in child.modules()):
            setattr(backbone, name, nn.Identity())
    return backbone


class Pyramid(nn.Module):
    """Spiking feature pyramid: the backbone's maps -> one map of `width` channels for each of `strides`.

    Args: maps (see `measure`); width; levels: how many maps to give; finest: the smallest stride that takes part (0: the
    backbone's); neuron: function that returns a new neuron.
    Maps of the same stride (Meta-SpikeFormer's stages 2 and 3) are added after their lateral convolutions and make one
    level, so that every level has its own true stride; levels the backbone does not have are made with stride-2
    convolutions. Shapes: list of [T, B, C_i, H_i, W_i] -> list of [T, B, width, H, W], finest first.
    Errors: ValueError for strides that are not each twice the one before, or no level at all.
    Source: QSD-Transformer's SpikeFPN (256 channels; five levels, of strides 4 to 64), which calls its two maps of stride 16
    strides 16 and 32; the up-sampling is nearest, as there.

    >>> neck = Pyramid(Maps((8, 16, 16), (8, 16, 16)), 4, levels=3)
    >>> neck.strides, [tuple(y.shape) for y in neck([torch.zeros(1, 2, c, s, s) for c, s in ((8, 8), (16, 4), (16, 4))])]
    ((8, 16, 32), [(1, 2, 4, 8, 8), (1, 2, 4, 4, 4), (1, 2, 4, 2, 2)])
    """

    def __init__(self, maps: Maps, width: int = 256, levels: int = 5, finest: int = 0,
                 neuron: NeuronFactory = published_neuron) -> None:
        super().__init__()
        chosen = [i for i, stride in enumerate(maps.strides) if stride >= finest]
        own = sorted({maps.strides[i] for i in chosen})[:levels]
        chosen = [i for i in chosen if maps.strides[i] in own]
        if not own or levels < 1:
            raise ValueError(f"Pyramid: levels={levels}, finest={finest}: the backbone's strides are {maps.strides}; at least "
                             "one must be as coarse as `finest`, and levels at least 1.")
        if any(b != 2 * a for a, b in pairwise(own)):
            raise ValueError(f"Pyramid: strides {tuple(own)}; each must be twice the one before.")
        self.strides = tuple(own[0] * 2 ** i for i in range(levels))
        self.sources = tuple(tuple(i for i in chosen if maps.strides[i] == stride) for stride in own)
        self.lateral = nn.ModuleDict({str(i): SpikeConv(neuron(), nn.Conv2d(maps.channels[i], width, 1, bias=False))
                                      for i in chosen})
        self.smooth = nn.ModuleList([SpikeConv(neuron(), nn.Conv2d(width, width, 3, padding=1, bias=False)) for _ in own])
        self.coarser = nn.ModuleList([SpikeConv(neuron(), nn.Conv2d(width, width, 3, 2, padding=1, bias=False))
                                      for _ in range(levels - len(own))])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sums = []
        for level in self.sources:
            y = self.lateral[str(level[0])](maps[level[0]])
            for i in level[1:]:
                y = y + self.lateral[str(i)](maps[i])
            sums.append(y)
        for i in range(len(sums) - 2, -1, -1):
            sums[i] = sums[i] + timewise(twice, sums[i + 1])
        outputs = [conv(y) for conv, y in zip(self.smooth, sums, strict=True)]
        for conv in self.coarser:
            outputs.append(conv(outputs[-1]))
        return outputs


twice = partial(F.interpolate, scale_factor=2, mode="nearest")  # [N, C, H, W] -> [N, C, 2 H, 2 W]


class SharedConv(nn.Module):
    """Neuron and one convolution for all levels of a pyramid, with a batch norm per level, whose statistics differ.

    Shapes: ([T, B, C, H, W], level) -> [T, B, C', H, W].
    """

    def __init__(self, neuron: nn.Module, conv: nn.Conv2d, levels: int) -> None:
        super().__init__()
        self.neuron, self.conv = neuron, conv
        self.norms = nn.ModuleList([nn.BatchNorm2d(conv.out_channels) for _ in range(levels)])

    def forward(self, x_TBCHW: Tensor, level: int) -> Tensor:
        return timewise(self.norms[level], timewise(self.conv, self.neuron(x_TBCHW)))
