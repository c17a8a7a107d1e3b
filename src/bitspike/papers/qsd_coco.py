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

from torch import nn

from bitspike.models import compact_spikeformer, detection, meta_spikeformer
from bitspike.models.detection import MaskRCNN, RetinaNet
from bitspike.models.pyramid import published_neuron
from bitspike.neurons import IELIF
from bitspike.papers import NO_CLAIM, train_command
from bitspike.papers.qsd_transformer import start_from, transfer
from bitspike.recipe import Loss, Recipe, RecipeError
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


def coco_compact_retinanet(num_classes: int = 80, start: str = "", width: int = 64, convs: int = 2, levels: int = 4,
                           gain: float = 2.0, score: float = 0.02) -> RetinaNet:
    """RetinaNet for pictures of 128 pixels on the CIFAR-10 network `compact_spikeformer.compact`; strides 8, 16, 32.

    start: a RUN of `qsd_transformer.cifar10_small_float` or its 4-bit twin. An object of 32 pixels, a photograph of CIFAR-10,
    is an anchor of the middle level. The attention sums over 1024 tokens, not 49, so its factor is 1/64, not 1/4.
    """
    backbone = compact_spikeformer.compact(levels=levels, gain=gain, stem_padding=1, attention_scale=1 / 64)
    if start and Path(start).exists():
        start_from(backbone, start)
    return detection.retinanet(backbone, num_classes, width=width, levels=3, finest=8, neuron=partial(IELIF, levels, gain),
                               anchor_scale=2, convs=convs, candidates=200, score=score)


def transfer_cifar(model: nn.Module, recipe: Recipe, loss: Loss) -> Loss:
    """Objective of the recipes that start from CIFAR-10: refuse to train without. Errors: RecipeError."""
    start = str(recipe.model_options.get("start", ""))
    if not start or not Path(start).exists():
        raise RecipeError(f"recipe {recipe.name!r} starts from a network trained on CIFAR-10, found start={start!r}; train "
                          "qsd_transformer.cifar10_small_float and give its folder: --set model_options.start=RUN.")
    return loss


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

_FROM_CIFAR = replace(
    _SMALL, name="qsd_transformer.coco_small_from_cifar", model=coco_compact_retinanet, model_options={"start": ""},
    objective=transfer_cifar, scheme="uniform", image_size=128, long_side=128, scales=(0.75, 1.25), epochs=60, lr=1e-3,
    head_lr=2.0, weight_decay=0.02, warmup_epochs=2, ema=0.99, train_on="train+val",
    notes="Needs --set model_options.start=RUN, of qsd_transformer.cifar10_small_float. Boxes only.")

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
            claim="ours: box mAP 0.70 % at 0.5, from random weights on 166 pictures (RESULTS.md)",
            cost="CPU. " + train_command("qsd_transformer.coco_small_retinanet")),
    replace(_FROM_CIFAR, claim="ours: box mAP 0.45 % at 0.5 of the held-out pictures; see RESULTS.md",
            cost="40 minutes on one CPU core. "
                 + train_command("qsd_transformer.coco_small_from_cifar", " --set model_options.start=RUN")),
    replace(_FROM_CIFAR, name="qsd_transformer.coco_small_from_cifar_float", bits=32,
            claim="ours: the float-weight twin of coco_small_from_cifar",
            cost="as coco_small_from_cifar. "
                 + train_command("qsd_transformer.coco_small_from_cifar_float", " --set model_options.start=RUN")),
    replace(_OVERFIT, claim="ours: box mAP 97.4 %, mask mAP 92.1 % at 0.5 on what it was trained on; see RESULTS.md",
            cost="6 minutes on one CPU core. " + train_command("qsd_transformer.coco_overfit")),
    replace(_OVERFIT, name="qsd_transformer.coco_overfit_float", bits=32, claim="ours: the float-weight twin of coco_overfit",
            cost="as coco_overfit. " + train_command("qsd_transformer.coco_overfit_float")),
)}
