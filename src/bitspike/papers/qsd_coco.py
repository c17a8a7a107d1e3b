"""QSD-Transformer on COCO: Mask R-CNN and RetinaNet, the recipes (the map of the paper is in `qsd_transformer`).

Published: the ImageNet backbone of 4-bit weights, neck and heads of float weights behind integer neurons, AdamW 2e-4 with
weight decay 0.05, 1000 steps of warm-up, 12 epochs, a tenth after 8 and 11, short sides from 480 to 800 pixels. Of its results
only a checkpoint's name is known (0.440 mAP at 0.5 for the 15 M detector). The small recipes are ours: 4-bit weights
everywhere, from scratch.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from bitspike.models import detection, meta_spikeformer
from bitspike.models.detection import MaskRCNN, RetinaNet
from bitspike.models.pyramid import published_neuron
from bitspike.papers import NO_CLAIM, train_command
from bitspike.papers.qsd_transformer import start_from, transfer
from bitspike.recipe import Recipe
from bitspike.spec import QuantSpec, Scheme

#: size -> (backbone, channels of the neck, width of the box head), as published
SIZES = {"8m": (meta_spikeformer.imagenet_8m, 192, 768), "15m": (meta_spikeformer.imagenet_15m, 256, 1024),
         "31m": (meta_spikeformer.imagenet_31m, 384, 1536)}


def _backbone(size: str, start: str, levels: int) -> meta_spikeformer.MetaSpikeFormer:
    if size not in SIZES:
        raise ValueError(f"size={size!r}; allowed: {', '.join(SIZES)}.")
    model = SIZES[size][0](levels=levels)
    if start and Path(start).exists():  # a trained run must be readable without it; `transfer` refuses to train so
        start_from(model, start)
    return model


def coco_mask_rcnn(num_classes: int = 80, size: str = "15m", start: str = "", levels: int = 4) -> MaskRCNN:
    """Mask R-CNN on an ImageNet backbone; start: a RUN folder of ours or a published checkpoint."""
    _, width, hidden = SIZES.get(size, (None, 0, 0))
    return detection.mask_rcnn(_backbone(size, start, levels), num_classes, width=width, hidden=hidden,
                               neuron=partial(published_neuron, levels))


def coco_retinanet(num_classes: int = 80, size: str = "15m", start: str = "", levels: int = 4) -> RetinaNet:
    """RetinaNet on an ImageNet backbone; arguments as `coco_mask_rcnn`'s."""
    _, width, _ = SIZES.get(size, (None, 0, 0))
    return detection.retinanet(_backbone(size, start, levels), num_classes, width=width,
                               neuron=partial(published_neuron, levels))


_COCO = Recipe(
    "qsd_transformer.coco", coco_mask_rcnn, {"size": "15m", "start": ""}, objective=transfer, task="detection", data="coco",
    spec=QuantSpec([("dense.backbone.*", Scheme("lsq", 4))]), train_on="train+val",
    image_size=800, long_side=1333, scales=(0.6, 1.0), flip="random", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    epochs=12, batch_size=64, lr=2e-4, weight_decay=0.05, warmup_epochs=1000 * 64 / 117266, warmup_lr=2e-7,
    schedule="steps", drop_epochs=(8, 11), precision="bf16", workers=8,
    notes="Neck and heads are float, as published; --set spec=none --set bits=4 quantizes them too. "
          "Needs --set model_options.start=PATH, an ImageNet run or checkpoint.")

# mean and std: whole pixel values and one width for all colours, so that the integer program reads the pixels as they are
_SMALL = Recipe(
    "qsd_transformer.coco_small", detection.small_mask_rcnn, bits=4, task="detection", data="coco", train_on="train+val",
    image_size=192, long_side=192, mean=(125 / 255, 123 / 255, 114 / 255), std=(64 / 255,), scales=(0.8, 1.2), flip="random",
    colour_jitter=0.3, epochs=40, batch_size=4, lr=2e-3, weight_decay=0.05, warmup_epochs=1, grad_clip=5.0, precision="bf16",
    validate_every=10, workers=0)

_OVERFIT = replace(
    _SMALL, name="qsd_transformer.coco_overfit", data="coco_overfit", scales=(1.0,), flip="none", colour_jitter=0.0,
    epochs=150, weight_decay=0.01, warmup_epochs=5, train_on="train", validate_every=30,
    notes="Not a measure of quality: can the network learn 16 pictures by heart? Which ones: see data.coco.coco_overfit.")

_START = " --set model_options.start=PATH"

#: name -> recipe
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    replace(_COCO, name="qsd_transformer.coco_mask_rcnn_15m",
            claim="44.0 % box mAP at 0.5 (second hand: the name of a checkpoint)",
            cost="12 epochs of COCO, several GPUs. " + train_command("qsd_transformer.coco_mask_rcnn_15m", _START)),
    replace(_COCO, name="qsd_transformer.coco_mask_rcnn_31m", model_options={"size": "31m", "start": ""}, claim=NO_CLAIM,
            cost="12 epochs of COCO, several GPUs. " + train_command("qsd_transformer.coco_mask_rcnn_31m", _START)),
    replace(_COCO, name="qsd_transformer.coco_retinanet_15m", model=coco_retinanet, claim=NO_CLAIM,
            cost="12 epochs of COCO, several GPUs. " + train_command("qsd_transformer.coco_retinanet_15m", _START)),
    replace(_SMALL, claim="ours: mAP 0 % of the held-out pictures after 40 epochs; see RESULTS.md",
            cost="ten minutes on one CPU core. " + train_command("qsd_transformer.coco_small")),
    replace(_SMALL, name="qsd_transformer.coco_small_float", bits=32, claim="ours: the float-weight twin of coco_small",
            cost="as coco_small. " + train_command("qsd_transformer.coco_small_float")),
    replace(_SMALL, name="qsd_transformer.coco_small_retinanet", model=detection.small_retinanet,
            claim="ours: boxes only, not measured yet", cost="CPU. " + train_command("qsd_transformer.coco_small_retinanet")),
    replace(_OVERFIT, claim="ours: box mAP 96.6 %, mask mAP 88.5 % at 0.5 on what it was trained on; see RESULTS.md",
            cost="6 minutes on one CPU core. " + train_command("qsd_transformer.coco_overfit")),
    replace(_OVERFIT, name="qsd_transformer.coco_overfit_float", bits=32, claim="ours: the float-weight twin of coco_overfit",
            cost="as coco_overfit. " + train_command("qsd_transformer.coco_overfit_float")),
)}
