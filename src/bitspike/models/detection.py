"""Detectors with spiking neurons throughout: Mask R-CNN and RetinaNet on any backbone here.

The dense part (`detector.dense`: backbone, pyramid and the heads that slide over it) and, for Mask R-CNN, the two heads of a
region (`detector.regions.box_head`, `detector.regions.mask_head`) are graphs of convolutions, norms and neurons: they can be
quantized by a spec and become integer programs. Anchors, matching, sampling, losses, RoIAlign and NMS between them are
torchvision's.

    detector(images, targets) in training mode -> dict of losses;   detector(images) in eval mode -> list of detections

Labels are 1 .. classes in targets and detections; 0 is the background.
Source: QSD-Transformer's Mask R-CNN and RetinaNet (a frozen MMDetection): integer neurons round(clip(x, 0, 4)) in neck and
heads, 256 channels, anchors of 8 strides with ratios 0.5, 1, 2. Left out from there: the neck's range of 1 in evaluation
(training: 4), and strides 16 and 32 for two maps that both have stride 16. Each neuron is followed by convolution and norm.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import _utils as matching
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss

from bitspike.models.meta_spikeformer import MetaSpikeFormer, ielif_attention
from bitspike.models.pyramid import Pyramid, SharedConv, features_of, measure, published_neuron, without_classifier
from bitspike.models.rois import BoxHead, MaskHead, Proposals, Regions, small_normal
from bitspike.neurons import IELIF, timewise

NeuronFactory = Callable[[], nn.Module]
#: per picture: boxes float [N, 4] (x1, y1, x2, y2 in pixels), labels int64 [N] from 1; masks uint8 [N, H, W] for Mask R-CNN
Targets = Sequence[dict[str, Tensor]]
Detections = list[dict[str, Tensor]]

_RATIOS = (0.5, 1.0, 2.0)


class SlidingHead(nn.Module):
    """What slides over every level of the pyramid: towers of N conv3x3 norm, then N conv for scores and for deltas.

    Shapes: list of L maps [T, B, C, H, W] -> (scores, deltas), lists of [B, anchors * outputs, H, W] and
    [B, anchors * 4, H, W], means over time. depth: convolutions per tower; `apart`: one tower for scores and one for deltas
    (RetinaNet), otherwise both share one (RPN). Channels are sorted by anchor, then output.
    """

    def __init__(self, channels: int, levels: int, anchors: int, outputs: int, depth: int, apart: bool, kernel: int,
                 prior: float, neuron: NeuronFactory) -> None:
        super().__init__()

        def tower() -> nn.ModuleList:
            return nn.ModuleList([SharedConv(neuron(), nn.Conv2d(channels, channels, 3, padding=1, bias=False), levels)
                                  for _ in range(depth)])

        def predictor(outputs: int, bias: float = 0.0) -> nn.Conv2d:
            return small_normal(nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), bias=bias)

        self.tower = tower()
        self.box_tower = tower() if apart else None
        self.neuron = neuron()
        self.box_neuron = neuron() if apart else None
        self.scores = predictor(anchors * outputs, -math.log((1 - prior) / prior))
        self.deltas = predictor(anchors * 4)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = [], []
        for level, x in enumerate(maps):
            y = x
            for conv in self.tower:
                y = conv(y, level)
            s = self.neuron(y)
            scores.append(timewise(self.scores, s).mean(0))
            if self.box_tower is not None and self.box_neuron is not None:
                y = x
                for conv in self.box_tower:
                    y = conv(y, level)
                s = self.box_neuron(y)
            deltas.append(timewise(self.deltas, s).mean(0))
        return scores, deltas


class Dense(nn.Module):
    """Backbone, pyramid and sliding head: the part of a detector that sees the whole picture.

    images [B, 3, H, W] or [T, B, C, H, W] -> (maps, scores, deltas), lists over the levels: the pyramid's potentials
    [B, C, h, w] as means over time, and what `SlidingHead` gives. H and W must be multiples of the coarsest stride.
    """

    def __init__(self, backbone: nn.Module, neck: Pyramid, head: SlidingHead) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        maps = self.neck(features_of(self.backbone, images))
        scores, deltas = self.head(maps)
        return [y.mean(0) for y in maps], scores, deltas


class Detector(nn.Module):
    """What both detectors share: pictures in, losses or detections out.

    A call takes a batch [B, 3, H, W] (normalised, padded) or a list of pictures [3, H_i, W_i]; it pads them at the right and
    below with zeros, to a multiple of the coarsest stride. In training mode it needs targets and returns the losses; in eval
    mode a list of dicts: boxes [N, 4] in pixels of the picture, labels int64 [N], scores [N] in descending order and, of Mask
    R-CNN, masks [N, 1, H, W] (probabilities, 0 outside of the box), as torchvision's detectors do.
    targets: boxes, labels, masks; "draw", a whole number that seeds what is sampled of this picture (else torch's global
    generator is asked); "iscrowd" [N], objects that are left out where it is not 0; "size" [2], in either mode:
    height and width of the picture itself, without the padding that the batch already has.
    Errors: ValueError for training without targets or with targets that cannot be meant.
    """

    def __init__(self, dense: Dense, anchors: AnchorGenerator, classes: int) -> None:
        super().__init__()
        self.dense, self.anchors, self.num_classes = dense, anchors, classes

    @property
    def backbone(self) -> nn.Module:
        """What looked at the picture before the neck: may have a learning rate of its own."""
        return self.dense.backbone

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per cell of every level."""
        return self.dense.neck.strides

    def forward(self, images: Tensor | Sequence[Tensor], targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        pictures = self._batch(images, targets)
        if self.training:
            return self._losses(pictures, self._checked(targets))
        found = self._detect(pictures)
        for one, size in zip(found, pictures.image_sizes, strict=True):
            if "masks" in one:
                one["masks"] = paste_masks_in_image(one["masks"], one["boxes"], size)
        return found

    @torch.no_grad()
    def detect(self, images: Tensor | Sequence[Tensor], targets: Targets | None = None) -> Detections:
        """As a call in eval mode, but with each mask as the head gives it, [N, 1, 28, 28] in its box."""
        return self._detect(self._batch(images, targets))

    def _losses(self, images: ImageList, targets: Targets) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} defines no losses; use mask_rcnn or retinanet.")

    def _detect(self, images: ImageList) -> Detections:
        raise NotImplementedError(f"{type(self).__name__} finds nothing; use mask_rcnn or retinanet.")

    def _batch(self, images: Tensor | Sequence[Tensor], targets: Targets | None) -> ImageList:
        coarsest = self.strides[-1]
        pictures = list(images.unbind(images.dim() - 4)) if isinstance(images, Tensor) else list(images)
        whole = [(int(p.shape[-2]), int(p.shape[-1])) for p in pictures]
        targets = [{}] * len(whole) if targets is None else targets
        if len(targets) != len(whole):
            raise ValueError(f"{type(self).__name__}: {len(whole)} pictures but {len(targets)} targets; give a dict for each.")
        sizes = [own if "size" not in one else (int(one["size"][0]), int(one["size"][1]))
                 for own, one in zip(whole, targets, strict=True)]
        height, width = (-(-max(s[i] for s in whole) // coarsest) * coarsest for i in (0, 1))
        if isinstance(images, Tensor) and tuple(images.shape[-2:]) == (height, width):
            return ImageList(images, sizes)
        padded = [nn.functional.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2])) for p in pictures]
        return ImageList(torch.stack(padded, padded[0].dim() - 3), sizes)

    def _run(self, images: ImageList) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        maps, scores, deltas = self.dense(images.tensors)
        return [m.float() for m in maps], [s.float() for s in scores], [d.float() for d in deltas]

    def _checked(self, targets: Targets | None) -> Targets:
        name = type(self).__name__
        if targets is None:
            raise ValueError(f"{name}: in training mode it needs targets, one dict a picture (boxes, labels, masks); for "
                             "detections call eval() first.")
        for i, one in enumerate(targets):
            boxes, labels = one["boxes"], one["labels"]
            if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) != len(labels):
                raise ValueError(f"{name}: targets[{i}] has boxes {list(boxes.shape)} and labels {list(labels.shape)}; "
                                 "allowed: [N, 4] and [N].")
            if len(labels) and (int(labels.min()) < 1 or int(labels.max()) > self.num_classes):
                raise ValueError(f"{name}: targets[{i}] has labels {int(labels.min())}..{int(labels.max())}; allowed: "
                                 f"1..{self.num_classes} (0 is the background).")
            if len(boxes) and not bool((boxes[:, 2:] > boxes[:, :2]).all()):
                raise ValueError(f"{name}: targets[{i}] has a box without area; every box needs x1 < x2 and y1 < y2.")
        return [_without_crowds(one) for one in targets]


def _without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    if "iscrowd" not in target:
        return target
    keep = target["iscrowd"] == 0
    drawn = {"draw": target["draw"]} if "draw" in target else {}
    return {name: target[name][keep] for name in ("boxes", "labels", "masks") if name in target} | drawn


def in_picture(found: dict[str, Tensor], size: Tensor, original: Tensor) -> dict[str, Tensor]:
    """What `Detector.detect` found in a resized picture, in pixels of the picture as it was.

    size, original: int64 [2], height and width after and before the resizing. Masks become bool [N, H, W]: probability
    above one half.

    >>> one = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 1.0]]), "masks": torch.ones(1, 1, 28, 28)}
    >>> shown = in_picture(one, torch.tensor([2, 4]), torch.tensor([4, 8]))
    >>> shown["boxes"].tolist(), tuple(shown["masks"].shape)
    ([[0.0, 0.0, 4.0, 2.0]], (1, 4, 8))
    """
    height, width = original.tolist()
    ratio = (original / size).flip(0).repeat(2).to(found["boxes"])  # x, y, x, y
    boxes = clip_boxes_to_image(found["boxes"] * ratio, (height, width))
    found = {**found, "boxes": boxes}
    if "masks" in found:
        found["masks"] = paste_masks_in_image(found["masks"], boxes, (height, width))[:, 0] > 0.5
    return found


# ------------------------------------------------------------------------------------------------ Mask R-CNN
class MaskRCNN(Detector):
    """See `mask_rcnn`."""

    def __init__(self, dense: Dense, anchors: AnchorGenerator, classes: int, regions: Regions,
                 proposals: Proposals) -> None:
        super().__init__(dense, anchors, classes)
        self.proposals, self.regions = proposals, regions

    def _both(self, images: ImageList, targets: Any) -> tuple[Detections, dict[str, Tensor]]:
        maps, scores, deltas = self._run(images)
        # the network of proposals asks its head for what the dense part has already computed
        said = {str(i): torch.cat(pair, 1) for i, pair in enumerate(zip(scores, deltas, strict=True))}
        boxes, losses = self.proposals(images, said, targets)
        found, more = self.regions({str(i): m for i, m in enumerate(maps)}, boxes, images.image_sizes, targets)
        return found, {**losses, **more}

    def _losses(self, images: ImageList, targets: Targets) -> dict[str, Tensor]:
        draws = [one.get("draw") for one in targets]
        seeds = None if None in draws else [int(draw) for draw in draws if draw is not None]
        self.proposals.sampler.draws = seeds
        self.regions.sampler.draws = None if seeds is None else [seed ^ 1 for seed in seeds]
        return self._both(images, list(targets))[1]

    def _detect(self, images: ImageList) -> Detections:
        return self._both(images, None)[0]


class _Said(nn.Module):
    """Splits scores and deltas that were concatenated: the head of torchvision's proposal network."""

    def __init__(self, anchors: int) -> None:
        super().__init__()
        self.anchors = anchors

    def forward(self, said: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [s[:, : self.anchors] for s in said], [s[:, self.anchors :] for s in said]


def mask_rcnn(backbone: nn.Module, num_classes: int = 80, *, width: int = 256, levels: int = 5, finest: int = 0,
              neuron: NeuronFactory = published_neuron, anchor_scale: float = 8, hidden: int = 1024, mask_convs: int = 4,
              masks: bool = True, region_levels: int = 4, canonical: int = 224, anchors_sampled: int = 256,
              regions_sampled: int = 512, candidates: tuple[int, int] = (2000, 1000),
              proposals: tuple[int, int] = (1000, 1000), score: float = 0.05, nms: float = 0.5, most: int = 100,
              time_steps: int = 1) -> MaskRCNN:
    """Mask R-CNN (Faster R-CNN without masks) with spiking neck and heads; the defaults are the published 15 M model's.

    Args:
        backbone: any model here with `forward_features`; strides and widths are measured, its classifier is taken off.
        num_classes: without the background.
        width, levels, finest, neuron: of the `Pyramid` and all heads; 384 channels for the published 31 M, 192 for the 8 M.
        anchor_scale: side of a square anchor in strides of its level.
        hidden, mask_convs: width of the box head (768 and 1536 for 8 M and 31 M), depth of the mask head. masks: have one.
        region_levels: how many of the finest levels regions are taken from. canonical: side in pixels of a box that belongs to
            the level of stride 16; for pictures smaller than 800 pixels take less than 224.
        anchors_sampled, regions_sampled: of a picture, for the losses.
        candidates, proposals: boxes a level before, and a picture after NMS of the proposals; in training and in evaluation.
        score, nms, most: threshold, overlap and number of what is detected. time_steps: of the backbone.
    Errors: those of `measure` and `Pyramid`; ValueError for region_levels that are not there.

    >>> from bitspike.models.meta_spikeformer import MetaSpikeFormer
    >>> backbone = MetaSpikeFormer((8, 8, 16, 16), depths=(1, 1), heads=2)
    >>> net = mask_rcnn(backbone, 3, width=8, levels=3, hidden=8, region_levels=3)
    >>> net.strides, sorted(net.eval()(torch.zeros(1, 3, 64, 64))[0])
    ((4, 8, 16), ['boxes', 'labels', 'masks', 'scores'])
    """
    if not 1 <= region_levels <= levels:
        raise ValueError(f"mask_rcnn: region_levels={region_levels}; allowed: 1..{levels}, the levels of the pyramid.")
    neck = Pyramid(measure(backbone), width, levels, finest, neuron)
    dense = Dense(without_classifier(backbone), neck,
                  SlidingHead(width, levels, len(_RATIOS), 1, 1, False, 1, 0.5, neuron))
    anchors = AnchorGenerator(tuple((anchor_scale * stride,) for stride in neck.strides), (_RATIOS,) * levels)
    regions = Regions(
        BoxHead(width, num_classes, 7, hidden, time_steps, neuron),
        MaskHead(width, num_classes, mask_convs, time_steps, neuron) if masks else None, neck.strides[:region_levels],
        mask_side=14, sampling_ratio=2, canonical=canonical, samples=regions_sampled, score=score, nms=nms, most=most)
    network = Proposals(anchors, _Said(len(_RATIOS)), anchors_sampled, dict(zip(_MODES, candidates, strict=True)),
                        dict(zip(_MODES, proposals, strict=True)))
    return MaskRCNN(dense, anchors, num_classes, regions, network)


_MODES = ("training", "testing")


# ------------------------------------------------------------------------------------------------- RetinaNet
class RetinaNet(Detector):
    """See `retinanet`. Both losses are means over the pictures, each divided by its number of positive anchors."""

    def __init__(self, dense: Dense, anchors: AnchorGenerator, classes: int, candidates: int, score: float, nms: float,
                 most: int) -> None:
        super().__init__(dense, anchors, classes)
        self.candidates, self.score, self.nms, self.most = candidates, score, nms, most
        self.matcher = matching.Matcher(0.5, 0.4, allow_low_quality_matches=True)
        self.coder = matching.BoxCoder((1.0, 1.0, 1.0, 1.0))

    def _predict(self, images: ImageList) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: logits [B, cells, classes], deltas [B, cells, 4] and the anchors [cells, 4]; cells = h * w * anchors."""
        maps, scores, deltas = self._run(images)
        logits = [_by_anchor(s, self.num_classes) for s in scores]
        anchors = self.anchors(images, maps)[0].split([x.shape[1] for x in logits])
        return logits, [_by_anchor(d, 4) for d in deltas], list(anchors)

    def _losses(self, images: ImageList, targets: Targets) -> dict[str, Tensor]:
        logits, deltas, levels = self._predict(images)
        anchors, logits_BNK, deltas_BN4 = torch.cat(levels), torch.cat(logits, 1), torch.cat(deltas, 1)
        scores, boxes = [], []
        for one, said, moved in zip(targets, logits_BNK, deltas_BN4, strict=True):
            match = (self.matcher(box_iou(one["boxes"], anchors)) if len(one["boxes"])
                     else torch.full((len(anchors),), self.matcher.BELOW_LOW_THRESHOLD, device=anchors.device))
            positive, counted = match >= 0, match != self.matcher.BETWEEN_THRESHOLDS
            wanted = torch.zeros_like(said)
            wanted[positive, one["labels"][match[positive]] - 1] = 1
            number = max(1, int(positive.sum()))
            scores.append(sigmoid_focal_loss(said[counted], wanted[counted], reduction="sum") / number)
            goal = self.coder.encode_single(one["boxes"][match[positive]], anchors[positive])
            boxes.append((moved[positive] - goal).abs().sum() / number)
        return {"loss_classifier": torch.stack(scores).mean(), "loss_box_reg": torch.stack(boxes).mean()}

    def _detect(self, images: ImageList) -> Detections:
        logits, deltas, anchors = self._predict(images)
        return [self._of_picture([x[i] for x in logits], [d[i] for d in deltas], anchors, size)
                for i, size in enumerate(images.image_sizes)]

    def _of_picture(self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor],
                    size: tuple[int, int]) -> dict[str, Tensor]:
        boxes, scores, labels = [], [], []
        for said, moved, cells in zip(logits, deltas, anchors, strict=True):
            of_level = said.sigmoid().flatten()
            kept = torch.nonzero(of_level > self.score)[:, 0]
            best, order = of_level[kept].topk(min(self.candidates, len(kept)))
            kept = kept[order]
            cell = kept // self.num_classes
            boxes.append(clip_boxes_to_image(self.coder.decode_single(moved[cell], cells[cell]), size))
            scores.append(best)
            labels.append(kept % self.num_classes + 1)
        all_boxes, all_scores, all_labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        keep = batched_nms(all_boxes, all_scores, all_labels, self.nms)[: self.most]
        return {"boxes": all_boxes[keep], "labels": all_labels[keep], "scores": all_scores[keep]}


def _by_anchor(x_BCHW: Tensor, outputs: int) -> Tensor:
    """[B, anchors * outputs, H, W] -> [B, H * W * anchors, outputs], the order of torchvision's anchors."""
    B, _, H, W = x_BCHW.shape
    return x_BCHW.view(B, -1, outputs, H, W).permute(0, 3, 4, 1, 2).reshape(B, -1, outputs)


def retinanet(backbone: nn.Module, num_classes: int = 80, *, width: int = 256, levels: int = 5, finest: int = 8,
              neuron: NeuronFactory = published_neuron, anchor_scale: float = 4, convs: int = 4, candidates: int = 1000,
              score: float = 0.05, nms: float = 0.5, most: int = 100) -> RetinaNet:
    """RetinaNet with spiking neck and heads: focal loss on the classes, L1 loss on the deltas of matched anchors.

    Args as `mask_rcnn`'s; anchors have three sizes a level, anchor_scale * 2^(0, 1/3, 2/3) strides, and three ratios.
    convs: depth of both towers.

    >>> from bitspike.models.meta_spikeformer import MetaSpikeFormer
    >>> net = retinanet(MetaSpikeFormer((8, 8, 16, 16), depths=(1, 1), heads=2), 3, width=8, levels=3, convs=1)
    >>> target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])}
    >>> net.strides, sorted(net(torch.zeros(2, 3, 64, 64), [target, target]))
    ((8, 16, 32), ['loss_box_reg', 'loss_classifier'])
    """
    neck = Pyramid(measure(backbone), width, levels, finest, neuron)
    sizes = tuple(tuple(anchor_scale * stride * 2 ** (i / 3) for i in range(3)) for stride in neck.strides)
    dense = Dense(without_classifier(backbone), neck,
                  SlidingHead(width, levels, 3 * len(_RATIOS), num_classes, convs, True, 3, 0.01, neuron))
    return RetinaNet(dense, AnchorGenerator(sizes, (_RATIOS,) * levels), num_classes, candidates, score, nms, most)


# ----------------------------------------------------------------------------------------- sizes for a CPU
# Ours, for pictures of 192 to 320 pixels. The counts reach 0..2 in steps of 1/2, since the norms before every neuron give
# values of about 1; anchors are 4 strides, 32 to 256 pixels.
def small_backbone(widths: tuple[int, int, int, int] = (24, 48, 96, 96), time_steps: int = 1, levels: int = 4,
                   gain: float = 2.0) -> MetaSpikeFormer:
    """Meta-SpikeFormer of strict topology without a purpose of its own; strides 4, 8, 16, 16."""
    return MetaSpikeFormer(widths, (1, 1), heads=4, mlp_ratio=2, num_classes=1, time_steps=time_steps,
                           neuron=partial(IELIF, levels, gain), attention_neuron=partial(ielif_attention, levels),
                           attention_scale=1 / 64, layer_scale=1.0, topology="strict", stem=(3, 2))


def small_mask_rcnn(num_classes: int = 80, widths: tuple[int, int, int, int] = (24, 48, 96, 96), width: int = 64,
                    hidden: int = 256, mask_convs: int = 2, levels: int = 4, gain: float = 2.0,
                    score: float = 0.05) -> MaskRCNN:
    """1.9 M weights with 80 classes; strides 8, 16, 32, 64. `levels` and `gain` are those of the neurons."""
    return mask_rcnn(small_backbone(widths, levels=levels, gain=gain), num_classes, width=width, levels=4, finest=8,
                     neuron=partial(IELIF, levels, gain), anchor_scale=4, hidden=hidden, mask_convs=mask_convs, region_levels=3,
                     canonical=64, anchors_sampled=128, regions_sampled=32, candidates=(200, 200), proposals=(100, 50),
                     score=score)


def small_retinanet(num_classes: int = 80, widths: tuple[int, int, int, int] = (24, 48, 96, 96), width: int = 64,
                    convs: int = 2, levels: int = 4, gain: float = 2.0, score: float = 0.05) -> RetinaNet:
    """1.0 M weights with 80 classes; strides 8, 16, 32, 64."""
    return retinanet(small_backbone(widths, levels=levels, gain=gain), num_classes, width=width, levels=4, finest=8,
                     neuron=partial(IELIF, levels, gain), anchor_scale=4, convs=convs, candidates=200, score=score)
