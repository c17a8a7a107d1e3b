"""What a Mask R-CNN does with one region: a box head and a mask head that begin with a neuron, and their RoIAlign.

Both heads are graphs of their own. Their first neuron turns what RoIAlign gives into counts 0..D, so on a device they are
integer programs whose input is one byte a value.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from bitspike.models.blocks import SpikeConv, as_sequence
from bitspike.models.pyramid import twice
from bitspike.neurons import timewise

NeuronFactory = Callable[[], nn.Module]

# torch.fx patches a function where it is called from, so each importing module has to say it again
torch.fx.wrap("as_sequence")


def small_normal(layer: nn.Conv2d, std: float = 0.01, bias: float = 0.0) -> nn.Conv2d:
    """A predictor's initialisation: weights normal(0, std), so that it begins with equal scores."""
    nn.init.normal_(layer.weight, std=std)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return layer


class BoxHead(nn.Module):
    """Region -> class logits and box deltas: N conv over the whole region, N conv1x1, N two conv1x1.

    The two fully connected layers of the published head, written as convolutions: 7x7 without border, and 1x1.
    Shapes: [R, C, side, side] -> ([R, classes + 1], [R, 4 (classes + 1)]); class 0 is the background.
    """

    def __init__(self, channels: int, classes: int, side: int, hidden: int, time_steps: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.side, self.time_steps = side, time_steps
        self.fc1 = SpikeConv(neuron(), nn.Conv2d(channels, hidden, side, bias=False))
        self.fc2 = SpikeConv(neuron(), nn.Conv2d(hidden, hidden, 1, bias=False))
        self.neuron = neuron()
        self.classes = small_normal(nn.Conv2d(hidden, classes + 1, 1))
        self.deltas = small_normal(nn.Conv2d(hidden, 4 * (classes + 1), 1), 0.001)

    def forward(self, x_RCHW: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and len(x_RCHW) == 0:
            zero, n = _no_regions(self, x_RCHW), self.classes.out_channels
            return zero.expand(0, n), zero.expand(0, 4 * n)
        s_TRC11 = self.neuron(self.fc2(self.fc1(as_sequence(x_RCHW, self.time_steps))))
        logits, deltas = timewise(self.classes, s_TRC11), timewise(self.deltas, s_TRC11)
        return logits.mean(0).flatten(1), deltas.mean(0).flatten(1)


class MaskHead(nn.Module):
    """Region -> one mask a class: `depth` times N conv3x3, then N up-sampling conv3x3, N conv1x1.

    Shapes: [R, C, side, side] -> [R, classes + 1, 2 side, 2 side]. The published head up-samples with a transposed 2x2
    convolution; here the counts are repeated (nearest) and a 3x3 convolution follows, which a device can run as it is.
    """

    def __init__(self, channels: int, classes: int, depth: int, time_steps: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.time_steps = time_steps
        self.convs = nn.ModuleList([SpikeConv(neuron(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))
                                    for _ in range(depth)])
        self.up_neuron, self.up_conv = neuron(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.up_norm = nn.BatchNorm2d(channels)
        self.neuron = neuron()
        self.masks = small_normal(nn.Conv2d(channels, classes + 1, 1))

    def forward(self, x_RCHW: Tensor) -> Tensor:
        if self.training and len(x_RCHW) == 0:
            return _no_regions(self, x_RCHW).expand(0, self.masks.out_channels, 2 * x_RCHW.shape[2], 2 * x_RCHW.shape[3])
        y = as_sequence(x_RCHW, self.time_steps)
        for conv in self.convs:
            y = conv(y)
        y = timewise(self.up_norm, timewise(self.up_conv, timewise(twice, self.up_neuron(y))))
        return timewise(self.masks, self.neuron(y)).mean(0)  # type: ignore[no-any-return]


class Regions(RoIHeads):
    """torchvision's RoIHeads with our heads: sampling, matching, losses, decoding and NMS are its own.

    `box_head` and `mask_head` (or None) are the graphs of this file. See `detection.mask_rcnn` for the options.
    In evaluation the masks are [N, 1, 2 side, 2 side], one for each box.
    """

    def __init__(self, box: BoxHead, mask: MaskHead | None, strides: Sequence[int], *, mask_side: int, sampling_ratio: int,
                 canonical: int, samples: int, score: float, nms: float, most: int) -> None:
        names = [str(i) for i in range(len(strides))]
        super().__init__(
            _align(names, box.side, strides, sampling_ratio, canonical), box, _AsFloat(), fg_iou_thresh=0.5,
            bg_iou_thresh=0.5, batch_size_per_image=samples, positive_fraction=0.25, bbox_reg_weights=None, score_thresh=score,
            nms_thresh=nms, detections_per_img=most,
            mask_roi_pool=None if mask is None else _align(names, mask_side, strides, sampling_ratio, canonical),
            mask_head=mask, mask_predictor=None if mask is None else _AsFloat())


class _AsFloat(nn.Module):
    """torchvision's place for a predictor: our heads predict themselves, under autocast in another type than the losses'."""

    def forward(self, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return tuple(o.float() for o in output) if isinstance(output, tuple) else output.float()


def _no_regions(head: nn.Module, x_RCHW: Tensor) -> Tensor:
    """A zero for a training step without regions, in which every parameter takes part: other processes may have some."""
    return sum((p.sum() * 0.0 for p in head.parameters()), x_RCHW.sum() * 0.0)


def _align(names: list[str], side: int, strides: Sequence[int], sampling_ratio: int, canonical: int) -> MultiScaleRoIAlign:
    """RoIAlign at the true scales of the levels; the level of a box is floor(4 + log2(sqrt(area) / canonical)), clamped."""
    pool = MultiScaleRoIAlign(names, side, sampling_ratio, canonical_scale=canonical, canonical_level=4)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])), canonical, 4)
    return pool
