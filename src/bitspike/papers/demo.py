"""The demonstration: QSD-Transformer's ideas at the size of a laptop, on the Fashion-MNIST sample inside the package.

One small Meta-SpikeFormer with a neuron in front of every convolution (strict topology), IE-LIF counts 0..4, and attention
over 7 x 7 tokens; once with float weights, once with 4 bits in every layer. `bitspike demo` trains both, exports the
second and runs it as integers.
"""
from __future__ import annotations

from dataclasses import replace

from bitspike.models.meta_spikeformer import MetaSpikeFormer
from bitspike.recipe import Recipe

__all__ = ["RECIPES"]

_FLOAT = Recipe(
    "demo.float", MetaSpikeFormer,
    {"widths": (16, 32, 64, 96), "depths": (1, 1), "heads": 4, "mlp_ratio": 2, "num_classes": 10, "in_channels": 1,
     "layer_scale": 1.0, "topology": "strict", "stem": (3, 2), "strides": (2, 1, 1, 1)},
    data="fashion_mnist_sample", train_on="train+val", image_size=28, mean=(0.2860,), std=(0.3530,), flip="random", translate=2,
    epochs=12, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=0.05, schedule="triangle", warmup_epochs=3,
    label_smoothing=0.1, workers=0, claim="ours; the sample is no official split", cost="about 2 minutes on 2 cores",
    notes="bitspike demo trains it and its 4-bit twin")

#: name -> recipe
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (_FLOAT, replace(_FLOAT, name="demo.four_bit", bits=4))}
