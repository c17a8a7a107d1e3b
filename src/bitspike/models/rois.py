"""What a Mask R-CNN does with one region: a box head and a mask head that begin with a neuron, and their RoIAlign.

Both heads are graphs of their own. Their first neuron turns what RoIAlign gives into counts 0..D, so on a device they are
integer programs whose input is one byte a value.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from bitspike.models.blocks import SpikeConv, as_sequence
from bitspike.models.pyramid import twice
from bitspike.neurons import timewise
from bitspike.processes import SharedBatchNorm, summed, world_size

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
        if self.training and len(x_RCHW) == 0 and not _shares(self):
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
        if self.training and len(x_RCHW) == 0 and not _shares(self):
            return _no_regions(self, x_RCHW).expand(0, self.masks.out_channels, 2 * x_RCHW.shape[2], 2 * x_RCHW.shape[3])
        y = as_sequence(x_RCHW, self.time_steps)
        for conv in self.convs:
            y = conv(y)
        y = timewise(self.up_norm, timewise(self.up_conv, timewise(twice, self.up_neuron(y))))
        return timewise(self.masks, self.neuron(y)).mean(0)  # type: ignore[no-any-return]


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of anchors or regions for the losses, from the same distribution, drawn for each picture alone.

    `draws`: a seed for every picture of the next call, or None for torch's global generator. Every candidate draws a number
    and those with the lowest are taken: which are chosen depends neither on the other pictures of a batch nor on how they are
    split over processes, and hardly on a candidate that matches more or less.
    """

    draws: Sequence[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels of every picture (1 and more: positive, 0: negative, -1: neither) -> two uint8 masks of every picture."""
        chosen: tuple[list[Tensor], list[Tensor]] = [], []
        for i, labels in enumerate(matched_idxs):
            draw = None if self.draws is None else torch.Generator().manual_seed(self.draws[i])
            number = torch.rand(len(labels), generator=draw).to(labels.device)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            most = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
            rest = min(len(negative), self.batch_size_per_image - most)
            for masks, candidates, count in zip(chosen, (positive, negative), (most, rest), strict=True):
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[candidates[number[candidates].argsort()[:count]]] = 1
                masks.append(mask)
        return chosen


def over_all(count: int, like: Tensor) -> Tensor:
    """This process's `count` over the mean count of all: times this, its mean loss averages to that of the whole batch."""
    total = summed(torch.tensor(float(count), dtype=torch.float64, device=like.device))
    return (count * world_size() / total.clamp(min=1)).float()


class Proposals(RegionProposalNetwork):
    """torchvision's network of proposals, with `Sampler`; its losses count every sampled anchor of all processes the same."""

    over_processes = False

    def __init__(self, anchors: nn.Module, head: nn.Module, samples: int, candidates: dict[str, int],
                 most: dict[str, int]) -> None:
        super().__init__(anchors, head, 0.7, 0.3, samples, 0.5, candidates, most, 0.7)
        self.fg_bg_sampler = self.sampler = Sampler(samples, 0.5)

    def compute_loss(self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor],
                     regression_targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See torchvision's."""
        losses = super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        if not self.over_processes:
            return losses
        # what was sampled, told by how many there are to take
        count, most = 0, int(self.sampler.batch_size_per_image * self.sampler.positive_fraction)
        for one in labels:
            positive = min(int((one >= 1).sum()), most)
            count += positive + min(int((one == 0).sum()), self.sampler.batch_size_per_image - positive)
        share = over_all(count, objectness)
        return losses[0] * share, losses[1] * share


class Regions(RoIHeads):
    """torchvision's RoIHeads with our heads: matching, losses, decoding and NMS are its own; see `Sampler` for the sampling.

    `box_head` and `mask_head` (or None) are the graphs of this file. See `detection.mask_rcnn` for the options.
    In evaluation the masks are [N, 1, 2 side, 2 side], one for each box. Losses are means over the regions (or masks) of the
    whole batch, also where it is split over processes.
    """

    over_processes = False

    def __init__(self, box: BoxHead, mask: MaskHead | None, strides: Sequence[int], *, mask_side: int, sampling_ratio: int,
                 canonical: int, samples: int, score: float, nms: float, most: int) -> None:
        names = [str(i) for i in range(len(strides))]
        super().__init__(
            _align(names, box.side, strides, sampling_ratio, canonical), box, _AsFloat(), fg_iou_thresh=0.5,
            bg_iou_thresh=0.5, batch_size_per_image=samples, positive_fraction=0.25, bbox_reg_weights=None, score_thresh=score,
            nms_thresh=nms, detections_per_img=most,
            mask_roi_pool=None if mask is None else _align(names, mask_side, strides, sampling_ratio, canonical),
            mask_head=mask, mask_predictor=None if mask is None else _AsFloat())
        self.fg_bg_sampler = self.sampler = Sampler(samples, 0.25)
        self._sampled: tuple[int, int] = 0, 0

    def select_training_samples(self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
                                ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """See torchvision's; keeps the numbers of regions and of masks."""
        chosen = super().select_training_samples(proposals, targets)
        self._sampled = sum(map(len, chosen[2])), sum(int((labels > 0).sum()) for labels in chosen[2])
        return chosen  # type: ignore[no-any-return]

    def forward(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]],
                targets: list[dict[str, Tensor]] | None = None) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """See torchvision's."""
        found, losses = super().forward(features, proposals, image_shapes, targets)
        if self.training and self.over_processes:
            regions, masks = self._sampled
            for name, value in losses.items():
                count = masks if name == "loss_mask" else regions
                # the mean over none is not a number, and has no gradient
                losses[name] = over_all(count, value) * (value if count else torch.nan_to_num(value))
        return found, losses


class _AsFloat(nn.Module):
    """torchvision's place for a predictor: our heads predict themselves, under autocast in another type than the losses'."""

    def forward(self, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return tuple(o.float() for o in output) if isinstance(output, tuple) else output.float()


def _shares(head: nn.Module) -> bool:
    """Are its batch norms those of all processes, so that it has to take part even with no region?"""
    return any(isinstance(module, SharedBatchNorm) for module in head.modules())


def _no_regions(head: nn.Module, x_RCHW: Tensor) -> Tensor:
    """A zero for a training step without regions, in which every parameter takes part: other processes may have some."""
    return sum((p.sum() * 0.0 for p in head.parameters()), x_RCHW.sum() * 0.0)


def _align(names: list[str], side: int, strides: Sequence[int], sampling_ratio: int, canonical: int) -> MultiScaleRoIAlign:
    """RoIAlign at the true scales of the levels; the level of a box is floor(4 + log2(sqrt(area) / canonical)), clamped."""
    pool = MultiScaleRoIAlign(names, side, sampling_ratio, canonical_scale=canonical, canonical_level=4)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])), canonical, 4)
    return pool
