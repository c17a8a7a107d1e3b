"""BESTformer: binary event-driven spiking transformer (Cao et al., IJCAI 2025, arXiv 2501.05904).

The map of its ideas. "Release" is the authors' code and logs, github.com/CaoHLin/BESTFormer (cifar/ at 584b91d, imagenet/ at
1add5b2, logs at 74ad6b2).

idea                                where it is here                      how it differs
----------------------------------  ------------------------------------  ----------------------------------------------
1-bit weights: sign of the weight   `quantizers.Binary`                   sign(0) is +1 (release: torch.sign, a third
normalised per output channel, no                                         level); zero="published" gives theirs.
scale: the norm behind absorbs it
1-bit attention map with a soft     `models.bestformer.Attention`         Same numbers (golden tensors). The CIFAR code
reset neuron, learned strength                                            binarises q k^T, the ImageNet code k^T v:
                                                                          `product`. The strength has as many steps as the
                                                                          model (release: always 4).
coupled information enhancement,    `models.bestformer.ReversibleBlock`   `inverse` is there, and back-propagation without
part 1: reversible blocks                                                 stored activations (`memory="recompute"`), which
                                                                          the release leaves out.
part 2: information-enhancement     `information_enhancement` below       Same loss. The release's teachers for CIFAR (a
distillation (IED), hard or soft                                          fine-tuned ViT-B/16) are not released: any
                                                                          torchvision or timm classifier or RUN will do.
CIFAR training                      `RECIPES["bestformer.cifar10"]`       The logs' learning rate, 1.414e-3, not that of the
                                                                          yml, 5e-4, on timm's cosine over all 400 epochs;
                                                                          ten epochs of cool-down are left out. The logs
                                                                          choose the best epoch on the test set; here it
                                                                          is looked at once.
ImageNet training                   `RECIPES["bestformer.imagenet"]`      The yml's.
CIFAR10-DVS                         `RECIPES["bestformer.cifar10_dvs"]`   Not released: size and schedule are Spikformer's.

Published sizes: 9,314,884 parameters for CIFAR-10, of which 9.276 M are binary: 1.16 MB, 1.20 MB with float ends.
"""
from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.models import bestformer
from bitspike.models.compact_spikeformer import CompactSpikeformer
from bitspike.objectives import prediction, refuse_unread
from bitspike.papers import NO_CLAIM, train_command
from bitspike.recipe import Loss, Output, Recipe, RecipeError
from bitspike.spec import QuantSpec, Scheme
from bitspike.teachers import load_teacher

__all__ = ["RECIPES", "information_enhancement", "teacher_cnn"]

_FIRST, _HEADS = "tokenizer.stages.0.conv", "head*"
#: the paper's: one bit everywhere but in the first convolution and the heads
PUBLISHED = QuantSpec([("*", Scheme("binary")), (_FIRST, Scheme("full")), (_HEADS, Scheme("full"))])
#: the same with 8-bit ends, so that what is trained is what a device holds
DEPLOYED = QuantSpec([("*", Scheme("binary")), (_FIRST, Scheme("max", 8)), (_HEADS, Scheme("max", 8))])


# ------------------------------------------------------------------------------------------- distillation
def information_enhancement(model: nn.Module, recipe: Recipe, loss: Loss) -> Loss:
    """Objective: the first head learns the labels, the second what a teacher says of the same augmented images.

        L = (1 - a) CE(head 1, labels) + a KD(head 2, teacher),      a = recipe.distill
        KD = CE(head 2, argmax teacher)                                          teacher_labels = "hard"
           = tau^2 mean KL(softmax(teacher / tau) || softmax(head 2 / tau))      "soft", tau = recipe.temperature
    The mean is over images; the release divides the soft term by images x classes. Without `distill` both heads learn the
    labels. Teacher: see `teachers.py`. A model with one head gives both its terms.
    Errors: RecipeError without a teacher, for one that does not fit, and for fields that have no effect (a teacher without
    `distill`, a temperature of hard labels, `regulation`); RunError for a folder that is no run.
    Source: the release's `losses.py`, which is DeiT's; a = 0.5, tau = 1, hard.
    """
    soft = ("temperature",) if recipe.teacher_labels == "soft" else ()
    refuse_unread(recipe, *(("distill", "teacher", "teacher_labels", *soft) if recipe.distill else ()))
    if not recipe.distill:
        return loss
    if not recipe.teacher:
        raise RecipeError(f"recipe {recipe.name!r}: distill={recipe.distill} needs a teacher: a run, for example of "
                          "bestformer.teacher_cifar10, or a classifier of torchvision or timm: --set teacher=RUN or "
                          "--set teacher=torchvision:NAME:WEIGHTS. Without one: --set distill=0.")
    if recipe.distill > 1:
        raise RecipeError(f"recipe {recipe.name!r}, field distill={recipe.distill}: allowed here: 0..1, the teacher's share.")
    device = next(model.parameters()).device
    teach = load_teacher(recipe, int(model.num_classes), device)  # type: ignore[arg-type]
    share, tau = recipe.distill, recipe.temperature

    def enhanced(images: Tensor, output: Output, targets: Tensor) -> Tensor:
        first, second = output if isinstance(output, tuple) else (output, output)
        told, heard = teach(images), prediction(second).float()
        if recipe.teacher_labels == "hard":
            term = F.cross_entropy(heard, told.argmax(1))
        else:
            term = tau**2 * F.kl_div(F.log_softmax(heard / tau, 1), F.log_softmax(told / tau, 1), reduction="batchmean",
                                     log_target=True)
        return (1 - share) * loss(images, first, targets) + share * term

    return enhanced


def teacher_cnn(num_classes: int = 10, widths: tuple[int, int, int] = (64, 256, 256)) -> CompactSpikeformer:
    """The compact network with ReLUs in place of spiking neurons: a float teacher that a CPU trains in half an hour."""
    return CompactSpikeformer(widths, num_classes=num_classes, neuron=nn.ReLU)


# ------------------------------------------------------------------------------------------------- recipes
_CIFAR = Recipe(
    "bestformer.cifar10", bestformer.cifar_4_384, spec=PUBLISHED, objective=information_enhancement, data="cifar10",
    train_on="train+val", flip="random", translate=4, translate_pad="zero", rand_augment="rand-m9-n1-mstd0.4-inc1",
    random_erasing=0.25, mixup=0.5, mixup_off_epoch=200, workers=8, epochs=400, batch_size=512, optimizer="adamw", lr=1.414e-3,
    weight_decay=0.06, schedule="covered_cosine", warmup_epochs=20, warmup_lr=1e-5, min_lr=1e-5, precision="bf16",
    label_smoothing=0.1, distill=0.5, seed=42,
    claim="95.73 % top-1 (log; the best epoch, chosen on the test set); 75.3 % after 12 epochs, 88.7 % after 40",
    cost="400 epochs of 4 x 0.934 G MACs an image forward: 2.2e17 MACs with the backward pass; 3.2 hours on 4 GPUs. "
         + train_command("bestformer.cifar10", " --set teacher=TEACHER"),
    notes="Release: 4 GPUs x 128 images, AMP fp16. All 50,000 training images, as there; the test set is looked at once, at "
          "the end (--set train_on=train holds 2,500 out and measures on them along the way). Its teacher is a fine-tuned "
          "ViT-B/16 that was not released: train bestformer.teacher_cifar10, or give a torchvision or timm file.")

# mean and std: whole pixel values and one width for all colours, so that the integer program reads the pixels as they are
_SMALL = Recipe(
    "bestformer.cifar10_small", bestformer.small, spec=DEPLOYED, objective=information_enhancement, data="cifar10",
    train_on="train+val", mean=(125 / 255, 123 / 255, 114 / 255), std=(64 / 255,), flip="alternating", translate=2, epochs=8,
    batch_size=250, optimizer="muon", lr=0.1, plain_lr=0.16, momentum=0.85, betas=(0.9, 0.98), weight_decay=0.01,
    schedule="triangle", warmup_epochs=1.0, precision="bf16", label_smoothing=0.1, distill=0.5,
    notes="Size and schedule are ours, for one CPU core. All 50,000 training images; the test set is looked at once, at the "
          "end. Its teacher: a run of bestformer.teacher_cifar10 or of qsd_transformer.cifar10_small_float.")

_TEACHER = Recipe(
    "bestformer.teacher_cifar10", teacher_cnn, data="cifar10", train_on="train+val",
    mean=(125 / 255, 123 / 255, 114 / 255), std=(64 / 255,), flip="alternating", translate=2, cutout=8, epochs=18,
    batch_size=500, optimizer="muon", lr=0.025, plain_lr=0.16, momentum=0.85, betas=(0.9, 0.98), weight_decay=0.01,
    schedule="triangle", warmup_epochs=1.5, precision="bf16", label_smoothing=0.1,
    claim="ours: 93.22 % top-1, a float teacher (RESULTS.md)",
    cost="about 45 minutes on one CPU core. " + train_command("bestformer.teacher_cifar10"),
    notes="For bestformer.cifar10 and cifar10_small, where no classifier is at hand.")

#: name -> recipe
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (
    _CIFAR,
    replace(_CIFAR, name="bestformer.cifar100", model_options={"num_classes": 100}, data="cifar100",
            mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
            claim="79.80 % top-1 (log; the best epoch, chosen on the test set); 44.9 % after 12 epochs, 65.9 % after 41",
            cost="as bestformer.cifar10. " + train_command("bestformer.cifar100", " --set teacher=TEACHER")),
    Recipe("bestformer.imagenet", bestformer.imagenet_8_512, spec=PUBLISHED, objective=information_enhancement,
           data="imagenet", image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip="random",
           crop="random_resized", rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, mixup=0.8, cutmix=1.0,
           workers=8, epochs=300, batch_size=96, optimizer="adamw", lr=5e-4, weight_decay=0.05,
           schedule="covered_cosine", warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5, precision="bf16", label_smoothing=0.1,
           distill=0.5, teacher="torchvision:vit_b_16:IMAGENET1K_SWAG_E2E_V1",
           claim="7.85 points above binary spiking networks of its size (abstract); no absolute figure could be consulted",
           cost="300 epochs of 4 time steps at 224x224: several days on 4 GPUs. " + train_command("bestformer.imagenet"),
           notes="Release's yml: 4 GPUs x 24 images. torchvision downloads the teacher on first use."),
    Recipe("bestformer.cifar10_dvs", bestformer.dvs_2_256, spec=PUBLISHED, objective=information_enhancement,
           data="cifar10_dvs", frames=16, image_size=128, mean=(0.0, 0.0), std=(1 / 255,), flip="random",
           event_augment="geometric", mixup=0.5, epochs=96, batch_size=16, optimizer="adamw", lr=1e-3,
           weight_decay=0.06, warmup_epochs=10, warmup_lr=1e-5, min_lr=1e-5, precision="bf16", label_smoothing=0.1,
           claim=NO_CLAIM, cost="a GPU. " + train_command("bestformer.cifar10_dvs"),
           notes="No code or settings were released for it: size, schedule and augmentation are Spikformer's, see "
                 "spike_hq.cifar10_dvs."),
    _TEACHER,
    replace(_SMALL, claim="ours: 76.36 % in torch, 76.42 % on integers, 125 kB; see RESULTS.md",
            cost="80 minutes on one core of a busy machine. "
                 + train_command("bestformer.cifar10_small", " --set teacher=TEACHER")),
    replace(_SMALL, name="bestformer.cifar10_small_float", spec=None, lr=0.03,
            claim="ours: the float-weight twin of cifar10_small, 78.93 %; see RESULTS.md",
            cost="as cifar10_small. " + train_command("bestformer.cifar10_small_float", " --set teacher=TEACHER")),
)}
