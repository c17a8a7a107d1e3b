"""QSD-Transformer's segmenter: Semantic FPN on ADE20K, the recipes (the map of the paper is in `qsd_transformer`).

Published: the ImageNet backbone of 4-bit weights, neck (QFPN) and head of 128 channels with float weights behind neurons
round(clip(x, 0, 4)) / 4, crops of 512 x 512, AdamW 1e-3 with weight decay 5e-3, 160,000 steps of 16 pictures a GPU, a line to 0
after 1500 steps of warm-up, twice the learning rate for neck and head. No result of it could be consulted. The small recipes
are ours: 4-bit weights everywhere, from scratch.
"""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from bitspike.models import meta_spikeformer, segmentation
from bitspike.models.segmentation import SemanticFPN, dense_neuron
from bitspike.papers import NO_CLAIM, train_command
from bitspike.papers.qsd_transformer import start_from, transfer
from bitspike.recipe import Recipe
from bitspike.spec import QuantSpec, Scheme

SIZES = {"8m": meta_spikeformer.imagenet_8m, "15m": meta_spikeformer.imagenet_15m, "31m": meta_spikeformer.imagenet_31m,
         "55m": meta_spikeformer.imagenet_55m}


def ade20k_semantic_fpn(num_classes: int = 150, size: str = "15m", start: str = "", levels: int = 4, width: int = 128,
                        auxiliary: int | None = None) -> SemanticFPN:
    """Semantic FPN on an ImageNet backbone.

    start: a RUN folder of ours or a published checkpoint; a path that does not exist leaves the fresh weights, since a trained
    run must be readable without it; `transfer` refuses to *train* so. Errors: ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}; allowed: {', '.join(SIZES)}.")
    backbone = SIZES[size](levels=levels)
    if start and Path(start).exists():
        start_from(backbone, start)
    return SemanticFPN(backbone, num_classes, width, partial(dense_neuron, levels), auxiliary)


_BATCH, _PICTURES = 16, 20210 - 1011  # the training part less what is held out

_ADE20K = Recipe(
    "qsd_transformer.ade20k", ade20k_semantic_fpn, {"size": "15m", "start": ""}, objective=transfer, task="segmentation",
    data="ade20k", spec=QuantSpec([("backbone.*", Scheme("lsq", 4))]), image_size=512, long_side=2048, crop="random",
    scales=(0.5, 2.0), flip="random", colour_jitter=0.5, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    epochs=160_000 / (_PICTURES // _BATCH), batch_size=_BATCH, optimizer="adamw", lr=1e-3, weight_decay=5e-3, head_lr=2.0,
    schedule="triangle", warmup_epochs=1500 / (_PICTURES // _BATCH), warmup_lr=1e-6, precision="bf16", workers=8,
    validate_every=10,
    notes="Neck and head are float, as published; --set spec=none --set bits=4 quantizes them too. batch_size is that of one "
          "GPU in the release; its number of GPUs is not known. Needs --set model_options.start=PATH.")

# mean and std: whole pixel values and one width for all colours, so that the integer program reads the pixels as they are
_CAMVID = Recipe(
    "qsd_transformer.camvid_small", segmentation.semantic_fpn_small, {"num_classes": 11}, bits=4, scheme="uniform",
    task="segmentation", data="camvid", train_on="train+val", image_size=192, mean=(105 / 255, 107 / 255, 107 / 255),
    std=(64 / 255,), flip="random", crop="random", scales=(0.8, 1.6), colour_jitter=0.3, workers=1, epochs=80, batch_size=4,
    optimizer="muon", lr=0.02, plain_lr=0.16, momentum=0.9, weight_decay=0.01, warmup_epochs=5, min_lr=1e-4, precision="bf16",
    ema=0.99, auxiliary=0.4, validate_every=20,
    notes="Network and schedule are ours, for one CPU core; from scratch. Backbone, neck and head have 4-bit weights, the "
          "strict topology and counts 0..4.")

#: name -> recipe
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    replace(_ADE20K, name="qsd_transformer.ade20k_15m", claim=NO_CLAIM,
            cost="160,000 steps of 16 crops of 512 x 512, a GPU. "
                 + train_command("qsd_transformer.ade20k_15m", " --set model_options.start=PATH")),
    replace(_CAMVID, claim="ours: mIoU 39.8 %, 83.1 % of the pixels of the 26 held-out frames; see RESULTS.md",
            cost="five minutes on one CPU core. " + train_command("qsd_transformer.camvid_small")),
    replace(_CAMVID, name="qsd_transformer.camvid_small_float", bits=32,
            claim="ours: mIoU 41.4 %, 83.8 % of the pixels; see RESULTS.md",
            cost="as camvid_small. " + train_command("qsd_transformer.camvid_small_float")),
    replace(_CAMVID, name="qsd_transformer.camvid_overfit", train_on="train", pictures=16, flip="none", crop="whole",
            scales=(1.0,), colour_jitter=0.0, epochs=150, ema=0.98, validate_every=50,
            claim="ours: 94.3 % of the pixels of these 16 frames; see RESULTS.md",
            cost="ten minutes on one CPU core. " + train_command("qsd_transformer.camvid_overfit"),
            notes="Not a measure of quality: can a 4-bit segmenter learn 16 frames by heart? bitspike eval RUN --split train."),
)}
