"""Q-SNN: quantized spiking neural networks (Wei et al., ACM MM 2024, arXiv 2406.13672).

The map of its ideas. "Release" is the authors' code, github.com/Wenjie-Wei/Q-SNN at 3b5f532, which is built on TET.

idea                                where it is here                      how it differs
----------------------------------  ------------------------------------  ----------------------------------------------
1-bit weights, normalised per       `quantizers.Binary`, scale "pow2",    Annealed at every step (release: every epoch) and
channel, power-of-two scale,        gradient "ir_net"                     on every binary layer (release: not the 1x1 ones
gradient annealed as in IR-Net                                            of the shortcuts); the state is in the checkpoint.
(weight-spike dual regulation,
part 1)
8-bit ends                          `quantizers.MaxScale`                 Scale from max|w|, so that all codes fit 8 bits
                                                                          (release: max(w); top="signed" gives it).
8/4/2-bit membrane after the        `quantizers.Membrane`                 The scale is a running maximum, fixed in evaluation
reset, through tanh                                                       (release: maximum of the batch, test time too;
                                                                          scale="batch" gives it). 32 bits: tanh alone.
spike regulation (part 2): firing   `regulated` below                     As in the release: a squared distance; the paper
rates towards 1/2                                                         speaks of entropy, which is largest there too.
TET: the loss of every step         `objectives.temporal_loss`
networks                            `models.spiking_resnet`               The release's VGG has float weights and its ResNet
                                                                          ignores --time and the number of classes.
DVS recordings                      `RECIPES["q_snn.*_vgg"]`              Quantized as the paper says.

Published sizes count weights * bits / 8: ResNet-19 for CIFAR-10 1.577 MB, VGG for DVS-CIFAR10 1.199 MB.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bitspike.models import spiking_resnet
from bitspike.objectives import SpikeCounts, refuse_unread, temporal_loss
from bitspike.papers import train_command
from bitspike.recipe import Loss, Output, Recipe
from bitspike.spec import QuantSpec, Scheme

__all__ = ["RECIPES", "regulated", "spec", "spike_regulation"]


def spec(first: str, membrane: int = 8, weights: bool = True, regulated: bool = True) -> QuantSpec:
    """The paper's: 8-bit ends, binary between them, `membrane`-bit potentials in every neuron.

    first: name of the first convolution; the last layer is called head. membrane: 8, 4, 2 or 32, float potentials that go
    through the same tanh: the neuron to compare with, since the tanh, not the rounding, is a leak of its own. weights:
    False leaves them float, and with 32-bit membranes that is the float twin. regulated: normalised weights with the annealed
    gradient; without it sign(w) mean|w| of the weights as they are (XNOR-Net's) and the straight-through gradient.
    """
    binary = (Scheme("binary", options={"gradient": "ir_net", "scale": "pow2"}) if regulated
              else Scheme("binary", options={"gradient": "ste", "scale": "mean", "normalise": False}))
    ends = Scheme("max", 8, per="tensor")
    rules = [("*", binary), (first, ends), ("head", ends)] if weights else []
    return QuantSpec([*rules, ("*", Scheme("membrane", membrane))])


# --------------------------------------------------------------------------------------------- regulation
def spike_regulation(counts: dict[str, Tensor]) -> Tensor:
    """Mean of (rate - 1/2)^2 over the neurons between the first and the last: a spike's entropy is largest at a rate of 1/2.

    counts: neuron -> mean number of spikes an element and step, in the order of the network (`SpikeCounts`).

    >>> round(float(spike_regulation({"a": torch.tensor(0.9), "b": torch.tensor(0.1), "c": torch.tensor(0.0)})), 4)
    0.16
    """
    inner = list(counts.values())[1:-1]
    if not inner:
        raise ValueError(f"spike_regulation: {len(counts)} neurons; the first and the last take no part, so it needs three.")
    return (torch.stack(inner) - 0.5).square().mean()


def regulated(model: nn.Module, recipe: Recipe, loss: Loss) -> Loss:
    """Objective: TET, the mean loss of all time steps, and spike regulation; published weight 5e-3.

        L = 1/T sum_t CE(logits[t], y) + recipe.regulation * mean over inner neurons (rate - 1/2)^2
    It asks for more spikes, and so for more energy. Errors: RecipeError for what it does not read, such as `distill`.
    Source: the release's `main_*.py`, `functions.py`.
    """
    refuse_unread(recipe, "regulation")
    per_step = temporal_loss(recipe)
    if not recipe.regulation:
        return per_step
    counts = SpikeCounts(model)

    def both(images: Tensor, output: Output, targets: Tensor) -> Tensor:
        return per_step(images, output, targets) + recipe.regulation * spike_regulation(counts.take())

    return both


# ------------------------------------------------------------------------------------------------- recipes
_UNKNOWN = "none that could be consulted"
_RESNET19 = Recipe(
    "q_snn.cifar10_resnet19", spiking_resnet.cifar_resnet19, {"num_classes": 10, "time_steps": 2}, spec=spec("stem.conv"),
    objective=regulated, data="cifar10", train_on="train+val", flip="random", translate=4, translate_pad="zero",
    rand_augment="rand-m9-n2-mstd0.5", cutout=16, workers=8, epochs=300, batch_size=64, optimizer="sgd", lr=0.1, momentum=0.9,
    weight_decay=1e-4, precision="bf16", regulation=5e-3, seed=3407,
    claim=_UNKNOWN + " (the abstract: up to about 96 % smaller at no loss)",
    cost="300 epochs of 2 x 2.3 G MACs an image forward: 2e17 MACs with the backward pass, a GPU. "
         + train_command("q_snn.cifar10_resnet19"),
    notes="Release: AutoAugment's CIFAR-10 policy, for which RandAugment stands here; plain momentum, ours is Nesterov's; no "
          "AMP. Trained on all 50,000 training images, as there; the test set is looked at once, at the end. Membranes have 8 "
          "bits; docs/binary.md has the specs of 4, 2 and 32.")

_VGG = Recipe(
    "q_snn.cifar10_dvs_vgg", spiking_resnet.dvs_vgg, {"num_classes": 10, "time_steps": 10}, spec=spec("features.0.conv"),
    objective=regulated, data="cifar10_dvs", frames=10, image_size=48, mean=(0.0, 0.0), std=(1 / 255,), flip="random",
    event_augment="roll=13", epochs=300, batch_size=64, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4,
    precision="bf16", regulation=5e-3, seed=3407, claim="79.10 % top-1 at 1.20 MB (quoted in T-BSO, ICML 2025)",
    cost="a GPU. " + train_command("q_snn.cifar10_dvs_vgg"),
    notes="The release's network has float weights; here they are binary with 8-bit ends, as the quoted size says. "
          "The published shift is up to 5 of a frame's 48 pixels; ours is up to 13 of the sensor's 128, the same share (4.9 "
          "frame pixels), of the events before the frames are made. It does not wrap: what leaves is dropped.")

# mean and std: whole pixel values and one width for all colours, so that the integer program reads the pixels as they are
_SMALL = Recipe(
    "q_snn.cifar10_small", spiking_resnet.small, spec=spec("stem.conv"), objective=regulated, data="cifar10",
    train_on="train+val", mean=(125 / 255, 123 / 255, 114 / 255), std=(64 / 255,), flip="alternating", translate=2, epochs=8,
    batch_size=250, optimizer="muon", lr=0.1, plain_lr=0.16, momentum=0.85, betas=(0.9, 0.98), weight_decay=0.01,
    schedule="triangle", warmup_epochs=1.0, precision="bf16", label_smoothing=0.1, regulation=5e-3,
    notes="Size and schedule are ours, for one CPU core. All 50,000 training images; the test set is looked at once, at the "
          "end.")

#: name -> recipe
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    _RESNET19,
    replace(_RESNET19, name="q_snn.cifar100_resnet19", model_options={"num_classes": 100, "time_steps": 2}, data="cifar100",
            mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), claim=_UNKNOWN,
            cost="as q_snn.cifar10_resnet19. " + train_command("q_snn.cifar100_resnet19")),
    Recipe("q_snn.imagenet_resnet18", spiking_resnet.imagenet_resnet18, {"num_classes": 1000, "time_steps": 4},
           spec=spec("stem.conv"), objective=regulated, data="imagenet", image_size=224, mean=(0.485, 0.456, 0.406),
           std=(0.229, 0.224, 0.225), flip="random", crop="random_resized", workers=8, epochs=300, batch_size=64,
           optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, precision="bf16", regulation=5e-3, seed=3407,
           claim=_UNKNOWN, cost="300 epochs of 4 x 1.8 G MACs an image forward: 8e18 MACs with the backward pass. "
           + train_command("q_snn.imagenet_resnet18"),
           notes="The network of the release; no schedule for it was released, it is that of CIFAR."),
    _VGG,
    replace(_VGG, name="q_snn.dvs_gesture_vgg", model_options={"num_classes": 11, "time_steps": 16}, frames=16,
            data="dvs_gesture", claim=_UNKNOWN, cost="a GPU. " + train_command("q_snn.dvs_gesture_vgg"), flip="none",
            notes="As q_snn.cifar10_dvs_vgg; never mirrored, since left and right are different gestures."),
    replace(_SMALL, claim="ours: 84.33 % in torch, 84.44 % on integers, 179 kB; see RESULTS.md",
            cost="70 minutes on one core of a busy machine. " + train_command("q_snn.cifar10_small")),
    replace(_SMALL, name="q_snn.cifar10_small_float", spec=spec("stem.conv", 32, weights=False), lr=0.03,
            claim="ours: the float twin of cifar10_small, 85.86 %; see RESULTS.md",
            cost="as cifar10_small. " + train_command("q_snn.cifar10_small_float"),
            notes=_SMALL.notes + " Weights and potentials are float; the potentials go through cifar10_small's tanh, so that "
            "the two differ in their bits alone."),
)}
