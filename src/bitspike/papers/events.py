"""Small networks for event cameras, trained on a CPU in minutes: float, 4 bits, 1 bit; ours, after no paper.

`compact_events`: 3x3 convolutions on a membrane shortcut with plain LIF neurons, one spike-driven attention block, 10 event
frames. On N-MNIST the frames hold equal numbers of events, as the papers on DVS classification cut them; on the hand-held
objects they last 50 ms each, so that the trained network can run on a live stream (`bitspike run FILE REC --stream`).
"""
from __future__ import annotations

from dataclasses import replace

from bitspike.models.compact_spikeformer import compact_events
from bitspike.papers import train_command
from bitspike.recipe import Recipe

__all__ = ["RECIPES"]

_N_MNIST = Recipe(
    "events.n_mnist", compact_events, {"num_classes": 10, "time_steps": 10}, data="n_mnist", train_on="train+val",
    image_size=34, mean=(0.0, 0.0), std=(1 / 255, 1 / 255), frames=10, translate=3, translate_pad="zero", epochs=12,
    batch_size=25, optimizer="muon", lr=0.02, plain_lr=0.2, momentum=0.85, betas=(0.9, 0.98), weight_decay=0.01,
    schedule="triangle", warmup_epochs=1, precision="bf16", label_smoothing=0.1,
    notes="The network sees counts of events: std is one 255th, which undoes the division of pixels by 255.")

_OBJECTS = replace(
    _N_MNIST, name="events.dvs128_objects", model_options={"num_classes": 5, "time_steps": 10}, data="dvs128_objects",
    image_size=32, frames_by="time", flip="random", translate=4, epochs=24, warmup_epochs=2)


def _twins(recipe: Recipe, cost: str) -> list[Recipe]:
    return [replace(recipe, name=recipe.name + suffix, bits=bits, scheme="uniform", claim="ours; see RESULTS.md",
                    cost=f"{cost}. {train_command(recipe.name + suffix)}")
            for suffix, bits in (("_float", 32), ("", 4), ("_binary", 1))]


#: name -> recipe
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    *_twins(_N_MNIST, "1,000 of the 60,000 recordings: minutes on one CPU core"),
    *_twins(_OBJECTS, "minutes on one CPU core"))}
