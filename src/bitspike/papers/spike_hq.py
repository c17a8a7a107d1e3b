"""SpikeHQ: heterogeneous quantization search for spiking vision transformers (Xu, Song, Li, arXiv 2412.05505).

The map of its ideas. Neither code nor the paper's body could be consulted, only its abstract and summaries by others; what is
marked "ours" is a reading.

idea                                where it is here                      how it differs
----------------------------------  ------------------------------------  ----------------------------------------------
scheme and bits per layer: uniform  `searching.make_space`                Candidates were not published; ours are uniform
or power of two                                                           2..6 and 8, power of two 2..4, and one bit.
uniform affine quantizer with a     `quantizers.Uniform`, `LSQ`           Symmetric: the deployed codes have no zero point,
zero point                                                                and a norm behind each layer takes the mean.
power-of-two quantizer, in two      `quantizers.PowerOfTwo`               levels=True (A) is the default, `pow2_scale` is B.
readings                                                                  scale="normal" is ours: a scale fitted to the
                                                                          weights' spread instead of their largest.
differentiable search: Gumbel       `searching` with                      Alternating updates on two halves of the data;
softmax, hardware cost in the loss  method="differentiable"               the divergence from the float network stands in
                                                                          place of the labels (ours).
quantization-aware training of      `bitspike train --spec --start`       From the float weights, with distillation of the
what was found                                                            float network's logits (ours).
hardware overhead per layer         `cost`, technology "45nm" and         Its constants were not published. Its factors in
                                    "bit_proportional"                    two of three rows are 32 / average bits, which is
                                                                          what "bit_proportional" gives.
(not in the paper)                  method="sensitivity": measured        Meets a budget exactly, in minutes, without
                                    damage and an integer programme       training; the default.

Claims (abstract): 3.14 to 3.67 bits on average, 8.71x to 10.19x smaller, less than one point lost, and
5.69x (N-Caltech101, 85.3 %), 8.72x (DVS-Gesture, 97.57 %) and 10.2x (CIFAR10-DVS, 80.4 %) less energy.
Base networks, sizes and schedules were not published: here the 2-256 Spikformer that others use on these data sets.

The way through: train the float network of a recipe, search, tune, export:

    bitspike train spike_hq.dvs_gesture --data DIR --out FLOAT
    bitspike search FLOAT --data DIR --budget bits=3.2 --out FOUND
    bitspike train spike_hq.dvs_gesture --data DIR --spec FOUND/spec.json --start FLOAT --set teacher=FLOAT \
        --set distill_logits=1 --set epochs=20 --set lr=3e-4 --out TUNED
    bitspike export TUNED -o dvs_gesture.bitspike --data DIR
"""
from __future__ import annotations

from dataclasses import replace

from bitspike.models import spikformer
from bitspike.models.compact_spikeformer import compact
from bitspike.papers import NO_CLAIM, train_command
from bitspike.recipe import Recipe
from bitspike.spec import QuantSpec, Scheme

__all__ = ["RECIPES", "SEARCHED"]


def _uniform(bits: int) -> Scheme:
    return Scheme("uniform", bits, options={"step": "normal"})


def _pow2(bits: int) -> Scheme:
    return Scheme("pow2", bits, options={"scale": "normal"})


#: what the search found for the compact network at 3.2 bits on average, from the weights of qsd_transformer.cifar10_small_float
SEARCHED = QuantSpec([
    ("stem.conv", _uniform(8)), ("groups.0.conv", _uniform(8)), ("groups.0.blocks.0.conv", _uniform(6)),
    ("groups.1.conv", _uniform(6)), ("groups.1.blocks.0.conv", _pow2(3)), ("groups.2.conv", _pow2(3)),
    ("groups.2.blocks.0.conv", _pow2(2)), ("attention.q.conv", _uniform(4)), ("attention.k.conv", _uniform(3)),
    ("attention.v.conv", _uniform(5)), ("attention.proj.conv", _uniform(6)), ("head", _uniform(8))])

_DVS = Recipe(
    "spike_hq.cifar10_dvs", spikformer.dvs_2_256, {"num_classes": 10, "time_steps": 16}, data="cifar10_dvs", frames=16,
    image_size=128, mean=(0.0, 0.0), std=(1 / 255,), flip="random", event_augment="geometric", mixup=0.5, epochs=96,
    batch_size=16, optimizer="adamw", lr=1e-3, weight_decay=0.06, warmup_epochs=10, warmup_lr=1e-5, min_lr=1e-5,
    precision="bf16", label_smoothing=0.1,
    notes="The float network; size, schedule and augmentation are Spikformer's for CIFAR10-DVS, since the paper's were not "
          "published. Of the augmentation: its release turns, shifts, shears or cuts the frames, ours the events, by the same "
          "shares of the sensor; it mixes every other batch, ours every one; it ends with ten epochs at the smallest rate.")

#: name -> recipe; those without a spec are the float networks that a search begins with
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    replace(_DVS, claim="80.4 % at 3.14 to 3.67 bits, 10.2x less energy (abstract)",
            cost="a GPU. " + train_command("spike_hq.cifar10_dvs")),
    replace(_DVS, name="spike_hq.dvs_gesture", model_options={"num_classes": 11, "time_steps": 16}, data="dvs_gesture",
            flip="none", epochs=200, claim="97.57 % at 3.14 to 3.67 bits, 8.72x less energy (abstract)",
            cost="a GPU. " + train_command("spike_hq.dvs_gesture"),
            notes=_DVS.notes + " Never mirrored: left and right are different gestures."),
    replace(_DVS, name="spike_hq.n_caltech101", model_options={"num_classes": 101, "time_steps": 16}, data="n_caltech101",
            claim="85.3 %, 5.69x less energy (abstract)", cost="a GPU. " + train_command("spike_hq.n_caltech101")),
    Recipe("spike_hq.cifar10", spikformer.cifar_4_256, data="cifar10", flip="random", translate=4, cutmix=1.0, epochs=300,
           batch_size=128, optimizer="adamw", lr=5e-4, weight_decay=0.06, warmup_epochs=20, warmup_lr=1e-5, min_lr=1e-5,
           precision="bf16", label_smoothing=0.1, claim=NO_CLAIM,
           cost="300 epochs of 4 time steps, a GPU. " + train_command("spike_hq.cifar10"),
           notes="The float network: Spikformer 4-256 and its schedule."),
    Recipe("spike_hq.cifar10_small", compact, spec=SEARCHED, data="cifar10", train_on="train+val",
           mean=(125 / 255, 123 / 255, 114 / 255), std=(64 / 255,), flip="alternating", translate=2, cutout=8, epochs=2,
           batch_size=250, optimizer="muon", lr=0.01, plain_lr=0.16, momentum=0.85, betas=(0.9, 0.98), weight_decay=0.01,
           schedule="triangle", warmup_epochs=0.1, precision="bf16", label_smoothing=0.1,
           claim="ours: at most 1 point below the float network (91.97 %) at 3.2 bits, 8.7x smaller; see RESULTS.md",
           cost="minutes on one CPU core, from a trained qsd_transformer.cifar10_small_float. "
                + train_command("spike_hq.cifar10_small", " --start FLOAT --set teacher=FLOAT --set distill_logits=1"),
           notes="Fine-tunes the searched spec. Without --start it would train from random weights, which two epochs are too "
                 "few for."),
)}
