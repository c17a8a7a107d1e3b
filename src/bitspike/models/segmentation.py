"""Semantic FPN on any spiking backbone: a class for every pixel.

    backbone -> maps -> Pyramid -> every level enlarged to the finest (conv, bilinear x2, ...) -> sum -> N -> conv1x1

As QSD-Transformer's segmenter (QFPN and QFPNHead, 128 channels) a neuron stands in front of every convolution of neck and head;
unlike there, neck and head can be quantized like any other layer, and become part of the integer program. The result is at the
finest level's stride (4); whoever wants pixels enlarges it.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.models import meta_spikeformer
from bitspike.models.blocks import SpikeConv
from bitspike.models.meta_spikeformer import MetaSpikeFormer
from bitspike.models.pyramid import Pyramid, features_of, measure, without_classifier
from bitspike.neurons import IELIF, timewise

NeuronFactory = Callable[[], nn.Module]


def dense_neuron(levels: int = 4, reach: float = 4.0) -> IELIF:
    """Counts 0..D up to the potential `reach`: the release's round(clip(x, 0, 4)) / 4 in training and in evaluation."""
    return IELIF(levels, gain=levels / reach, scale=1 / levels)


def twice(x_NCHW: Tensor) -> Tensor:
    """Twice as high and wide; every new pixel is the mean of four old ones with weights 9, 3, 3, 1 over 16."""
    return F.interpolate(x_NCHW, scale_factor=2, mode="bilinear", align_corners=False)


class _Branch(nn.Module):
    """One level on its way to the finest: (neuron, conv3x3, norm, bilinear x2) as often as it takes, at least once."""

    def __init__(self, width: int, factor: int, neuron: NeuronFactory) -> None:
        super().__init__()
        doublings = factor.bit_length() - 1
        self.convs = nn.ModuleList([SpikeConv(neuron(), nn.Conv2d(width, width, 3, padding=1, bias=False))
                                    for _ in range(max(1, doublings))])
        self.enlarges = doublings > 0

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        for conv in self.convs:
            x_TBCHW = conv(x_TBCHW)
            if self.enlarges:
                x_TBCHW = timewise(twice, x_TBCHW)
        return x_TBCHW


class _Classes(nn.Module):
    """Neuron and 1x1 convolution to the classes: [T, B, C, H, W] -> [T, B, K, H, W]."""

    def __init__(self, width: int, num_classes: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.neuron, self.conv = neuron(), nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return timewise(self.conv, self.neuron(x_TBCHW))


class SemanticFPN(nn.Module):
    """The network of this file.

    Args: backbone: a network with `forward_features`; its classifier is taken off. width: channels of neck and head.
    neuron: gives a new neuron of neck and head. auxiliary: index of the backbone's map that a second, small head reads in
    training; None for none. Maps and strides are measured (`models.pyramid`); maps of one stride make one level.
    Shapes: images [B, C, H, W] or sequences [T, B, C, H, W], H and W multiples of the coarsest stride -> logits [B, K, H / s,
    W / s], s the finest stride, mean over T; in training with an auxiliary head {"out": those, "aux": at its level's stride}.
    Errors: ValueError for a backbone that gives no pyramid, or an unknown level.
    Source: Kirillov et al., CVPR 2019; QSD-Transformer's segmentation release.

    >>> backbone = MetaSpikeFormer((8, 8, 16, 16), depths=(1, 1), heads=2)
    >>> net = SemanticFPN(backbone, num_classes=5, width=8)
    >>> net.strides, net(torch.zeros(2, 3, 64, 96)).shape
    ((4, 8, 16), torch.Size([2, 5, 16, 24]))
    """

    def __init__(self, backbone: nn.Module, num_classes: int, width: int = 128, neuron: NeuronFactory = dense_neuron,
                 auxiliary: int | None = None) -> None:
        super().__init__()
        maps = measure(backbone)
        if auxiliary is not None and not 0 <= auxiliary < len(maps.channels):
            raise ValueError(f"SemanticFPN: auxiliary={auxiliary}; allowed: None or a map 0..{len(maps.channels) - 1}.")
        self.backbone, self.map = without_classifier(backbone), auxiliary or 0
        self.neck = Pyramid(maps, width, len(set(maps.strides)), neuron=neuron)
        self.strides = self.neck.strides
        self.branches = nn.ModuleList([_Branch(width, stride // self.strides[0], neuron) for stride in self.strides])
        self.classes = _Classes(width, num_classes, neuron)
        self.auxiliary = None
        if auxiliary is not None:
            before = SpikeConv(neuron(), nn.Conv2d(maps.channels[auxiliary], width, 3, padding=1, bias=False))
            self.auxiliary = nn.Sequential(before, _Classes(width, num_classes, neuron))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        maps = features_of(self.backbone, x)
        total = None
        for branch, level in zip(self.branches, self.neck(maps), strict=True):
            y = branch(level)
            total = y if total is None else total + y
        logits_BKHW = self.classes(total).mean(0)
        if self.auxiliary is None or not self.training:
            return logits_BKHW  # type: ignore[no-any-return]
        return {"out": logits_BKHW, "aux": self.auxiliary(maps[self.map]).mean(0)}


def enlarged(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits [B, K, h, w] at another size, bilinear, corners not aligned."""
    if tuple(logits.shape[-2:]) == (height, width):
        return logits
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def predicted_logits(logits: Tensor, canvas: tuple[int, int], size: tuple[int, int],
                     original: tuple[int, int]) -> Tensor:
    """Logits of one picture [K, h, w] on a padded canvas -> [K, H, W] at the picture's own size.

    canvas: what the model saw; size: the picture's part of it; original: its size as stored.
    """
    on_canvas = enlarged(logits[None].float(), *canvas)[..., : size[0], : size[1]]
    return enlarged(on_canvas, *original)[0]


def step_of(window: int) -> int:
    """How far apart windows are by default: two thirds of their side."""
    return max(1, 2 * window // 3)


@torch.no_grad()
def slide(model: Callable[[Tensor], Tensor], images: Tensor, window: int, step: int | None = None) -> Tensor:
    """Logits of large pictures from overlapping windows: [B, C, H, W] -> [B, K, H, W].

    Every window of `window` x `window` pixels (the whole side where it is shorter), `step` apart (default two thirds of it; the
    last ones end at the border), is seen alone; its logits are enlarged to pixels, and where windows overlap their mean counts.
    model: in evaluation mode; gives logits at any stride. Errors: ValueError for a window or step below 1.
    """
    step = step_of(window) if step is None else step
    if window < 1 or step < 1:
        raise ValueError(f"slide: window={window}, step={step}; both must be at least 1.")
    H, W = images.shape[-2:]
    h, w = min(window, H), min(window, W)
    total, count = None, images.new_zeros(H, W)
    for top in (*range(0, H - h, step), H - h):
        for left in (*range(0, W - w, step), W - w):
            logits = model(images[..., top : top + h, left : left + w]).float()
            pixels = enlarged(logits, h, w)
            if total is None:
                total = pixels.new_zeros(*pixels.shape[:2], H, W)
            total[..., top : top + h, left : left + w] += pixels
            count[top : top + h, left : left + w] += 1
    assert total is not None
    return total / count


# -------------------------------------------------------------------------------------------------- sizes
def semantic_fpn_15m(num_classes: int = 150, time_steps: int = 1, levels: int = 4, topology: str = "published",
                     width: int = 128, auxiliary: int | None = None) -> SemanticFPN:
    """QSD-Transformer's 15 M backbone with neck and head of 128 channels."""
    backbone = meta_spikeformer.imagenet_15m(time_steps=time_steps, levels=levels, topology=topology)
    return SemanticFPN(backbone, num_classes, width, partial(dense_neuron, levels), auxiliary)


def semantic_fpn_small(num_classes: int = 11, levels: int = 4, widths: tuple[int, ...] = (16, 32, 64, 96),
                       depths: tuple[int, ...] = (1, 1), heads: int = 4, mlp_ratio: int = 2, width: int = 48,
                       reach: float = 2.0, auxiliary: int | None = 2) -> SemanticFPN:
    """For CPUs: Meta-SpikeFormer at small widths, strict topology (a spike count on one side of every product).

    The factor on q (k^T v) is 1/64: with the published 1/4 the sums over a few hundred tokens saturate every neuron.
    """
    neuron = partial(dense_neuron, levels, reach)
    backbone = MetaSpikeFormer(widths, (depths[0], depths[1]), heads, mlp_ratio, attention_scale=1 / 64, layer_scale=None,
                               topology="strict", neuron=partial(meta_spikeformer.ielif, levels, reach),
                               attention_neuron=partial(meta_spikeformer.ielif_attention, levels))
    return SemanticFPN(backbone, num_classes, width, neuron, auxiliary)
