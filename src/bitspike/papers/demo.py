"""The demonstration: QSD-Transformer's ideas at the size of a laptop, on the Fashion-MNIST sample inside the package.

One small `compact_spikeformer` (IE-LIF counts 0..4 in front of every convolution, linear spike-driven attention), once with
float weights, once with 4 bits in every layer. `bitspike demo` trains both, exports the second and runs it as integers.
"""
from __future__ import annotations

from dataclasses import replace

from bitspike.models.compact_spikeformer import compact
from bitspike.recipe import Recipe

__all__ = ["RECIPES"]

# the network wants three channels: three means make grey pictures into them
_FLOAT = Recipe(
    "demo.float", compact, {"widths": (32, 64, 128)}, data="fashion_mnist_sample", train_on="train+val", image_size=28,
    mean=(0.2860,) * 3, std=(0.3530,) * 3, flip="alternating", translate=2, epochs=20, batch_size=128, optimizer="adamw",
    lr=4e-3, weight_decay=0.05, schedule="triangle", warmup_epochs=3, label_smoothing=0.1,
    claim="ours; the sample is no official split", cost="about 1 minute on 2 cores",
    notes="'bitspike demo' trains it and its 4-bit twin.")

#: name -> recipe
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (_FLOAT, replace(_FLOAT, name="demo.four_bit", bits=4))}
