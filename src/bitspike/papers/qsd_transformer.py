"""QSD-Transformer: quantized spike-driven transformer (Qiu et al., ICLR 2025, arXiv 2501.13492).

The map of its ideas. "Release" is the authors' code, github.com/bollossom/QSD-Transformer at cd73383; "not released"
means that neither formula nor code of it could be consulted, so that ours is a reading.

idea                                where it is here                      how it differs
----------------------------------  ------------------------------------  ----------------------------------------------
IE-LIF: counts in training, binary  `neurons.IELIF`                       D is free (release: 4), and so is carry-over
spikes on the device (sec. 4)                                             between time steps (release: none). The release
                                                                          only trains; `IELIF.binary_steps` and the
                                                                          integer runtime are the described inference.
4-bit weights: LSQ, one step per    `quantizers.LSQ`                      The step is kept positive (release: no guard)
output channel, every convolution                                         and also initialised when evaluated first.
and linear layer, ends included
Q-SDSA, attention without softmax   `models.meta_spikeformer.Attention`   Same numbers (golden tensors). The release's inner
on Meta-SpikeFormer, RepConv,                                             convolutions of RepConv and SepConv take real
layer scale                                                               inputs; `topology="strict"`, ours, does not.
bimodal distribution of q, k, v     the same neuron after q, k, v         "Rectification" is the IE-LIF neuron's range; no
("information distortion")                                                further code of it exists in the release.
fine-grained distillation (FGD)     `fine_grained_distillation`           Not released: no teacher, no term, no hook. Ours
of q, k, v from an ANN                                                    is read from the figure and from Q-ViT, its
                                                                          ancestor: see `fine_grained_loss`.
ImageNet training                   `RECIPES["qsd_transformer.            Release's train.sh. It evaluates the raw weights,
                                    imagenet_*"]`                         though it keeps an average; we evaluate the
                                                                          average.
CIFAR and CIFAR10-DVS               the other recipes                     Not released: schedules are ours.

The published "parameters" (1.8, 3.9, 6.8 M) are weights * bits / 32: 15.015, 31.194 and 55.163 M weights of 4 bits.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitspike.checkpoints import load_run
from bitspike.models import compact_spikeformer, meta_spikeformer
from bitspike.models.compact_spikeformer import SpikeAttention
from bitspike.models.meta_spikeformer import Attention, MetaSpikeFormer, published_name
from bitspike.models.published import PublishedWeightsError, read_weights
from bitspike.neurons import IELIF, LIF
from bitspike.objectives import autocast, refuse_unread
from bitspike.papers import NO_CLAIM, train_command
from bitspike.recipe import Loss, Output, Recipe, RecipeError
from bitspike.spec import QuantSpec, Scheme

__all__ = ["RECIPES", "QKVTaps", "as_ann", "fine_grained_distillation", "fine_grained_loss", "start_from"]

Triple = tuple[Tensor, Tensor, Tensor]
Model = TypeVar("Model", bound=nn.Module)
_TINY = 1e-12


# -------------------------------------------------------------------------------- fine-grained distillation
def _tokens(x: Tensor, heads: int) -> Tensor:
    """[T, B, C, H, W], or [B, C, H, W] from a network without time -> mean over T, [B, heads, N, C / heads]."""
    if x.dim() == 5:
        x = x.mean(0)
    B, C, H, W = x.shape
    if C % heads:
        raise ValueError(f"fine_grained_loss: {C} channels do not divide into {heads} heads.")
    return x.reshape(B, heads, C // heads, H * W).transpose(2, 3)


def _gram_norm(a: Tensor, b: Tensor) -> Tensor:
    """||a^T b||_F^2 over the last two axes, which is the inner product of a a^T and b b^T."""
    return (a.transpose(-1, -2) @ b).square().sum((-1, -2))


def fine_grained_loss(student: Sequence[Triple], teacher: Sequence[Triple], heads: int, parts: str = "qkv") -> Tensor:
    """How differently two networks relate their tokens to each other, in every attention block.

        G_F = F F^T / ||F F^T||_F         F in {q, k, v} of one head: tokens x channels, averaged over the time steps
        loss = mean over the batch of  sum over blocks, heads, F of  || G_F(student) - G_F(teacher) ||_F

    Only the number of tokens has to agree, not the width. The N x N matrices are never formed: with
    <F F^T, E E^T> = ||F^T E||_F^2 the distance is that of small matrices, channels x channels.

    Args:
        student, teacher: (q, k, v) of each block, in the same order, each [T, B, C, H, W] or [B, C, H, W]. No gradient
            goes to the teacher.
        heads: into how many heads the channels are cut; must divide both widths. 1 compares all channels at once.
        parts: which of "q", "k", "v" take part. Q-ViT uses "qk"; the figure of this paper shows all three.
    Returns: a scalar, 0 where all similarities agree. A map of zeros has G = 0.
    Errors: ValueError for different numbers of blocks or tokens, or an unknown part.
    Source: a reading, since the paper's formula was not released: Q-ViT (NeurIPS 2022), distribution-guided distillation.

    >>> x = torch.rand(1, 2, 4, 3, 3)
    >>> float(fine_grained_loss([(x, x, x)], [(2 * x, x, x)], heads=2)) < 0.01
    True
    """
    if not parts or not set(parts) <= set("qkv"):
        raise ValueError(f"fine_grained_loss: parts={parts!r}; allowed: letters of 'qkv'.")
    if len(student) != len(teacher) or not student:
        raise ValueError(f"fine_grained_loss: the student shows {len(student)} attention blocks, the teacher "
                         f"{len(teacher)}; they must be as many, and at least one.")
    total = student[0][0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        for part in dict.fromkeys(parts):
            f = _tokens(ours["qkv".index(part)].float(), heads)
            e = _tokens(theirs["qkv".index(part)].detach().float(), heads)
            if f.shape[:3] != e.shape[:3]:
                raise ValueError(f"fine_grained_loss: the student has {f.shape[2]} tokens in a batch of {f.shape[0]}, the "
                                 f"teacher {e.shape[2]} in {e.shape[0]}; give both the same images and stride.")
            # scaled first, so that the fourth powers below stay in the range of float32
            f = f / f.square().sum((-1, -2), keepdim=True).clamp_min(_TINY).sqrt()
            e = e / e.square().sum((-1, -2), keepdim=True).clamp_min(_TINY).sqrt()
            ff, ee = _gram_norm(f, f), _gram_norm(e, e)
            norm_f, norm_e = ff.clamp_min(_TINY).sqrt(), ee.clamp_min(_TINY).sqrt()
            squared = ff / norm_f.square() + ee / norm_e.square() - 2 * _gram_norm(f, e) / (norm_f * norm_e)
            # the root has no slope at 0; below 1e-6 rounding decides
            total = total + squared.clamp_min(1e-6).sqrt().sum(1).mean()
    return total


class QKVTaps:
    """Sees q, k and v of every attention block in the last forward pass, by hooks on the neurons behind them.

    model: any module; its blocks are the submodules that have `q_neuron`, `k_neuron` and `v_neuron`, unless `blocks` names
    the three modules of each. `take()` returns the triples once; `remove()` takes the hooks off.
    Errors: ValueError for a model without such blocks; RuntimeError for `take` without a forward pass.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[nn.Module, nn.Module, nn.Module]] | None = None) -> None:
        if blocks is None:
            blocks = [(m.q_neuron, m.k_neuron, m.v_neuron) for m in model.modules()  # type: ignore[misc]
                      if all(isinstance(getattr(m, f"{part}_neuron", None), nn.Module) for part in "qkv")]
        if not blocks:
            raise ValueError(f"{type(model).__name__} shows no q, k, v: no submodule has q_neuron, k_neuron and v_neuron; "
                             "name the modules in `blocks`.")
        self._count = len(blocks)
        self._seen: dict[tuple[int, int], Tensor] = {}
        seen = self._seen

        def hook(key: tuple[int, int]) -> Any:
            def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
                seen[key] = output

            return keep

        self._handles = [module.register_forward_hook(hook((i, j)))
                         for i, block in enumerate(blocks) for j, module in enumerate(block)]

    def take(self) -> list[Triple]:
        """(q, k, v) per block, as the modules returned them."""
        if len(self._seen) < 3 * self._count:
            raise RuntimeError("QKVTaps.take: no complete forward pass since the last call.")
        triples = [(self._seen[i, 0], self._seen[i, 1], self._seen[i, 2]) for i in range(self._count)]
        self._seen.clear()
        return triples

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def fine_grained_distillation(model: nn.Module, recipe: Recipe, loss: Loss) -> Loss:
    """Objective: loss + recipe.distill * fine_grained_loss(model, teacher); without `distill` the loss itself.

    The teacher is the trained model of the RUN folder `recipe.teacher`, frozen, in eval mode: a float network of the same
    token grid, for example the same size trained with `--set bits=32` or with real activations (`as_ann`). Weight and
    teacher were not published: try `distill` 0.1 to 10.
    Errors: RecipeError without a teacher; RunError for a folder that is no run; ValueError where the two do not match.
    """
    refuse_unread(recipe, *(("distill", "teacher") if recipe.distill else ()))
    if not recipe.distill:
        return loss
    if not recipe.teacher:
        raise RecipeError(f"recipe {recipe.name!r}: distill={recipe.distill} needs a teacher; train one (for example with "
                          "--set bits=32 --set distill=0) and give its folder: --set teacher=RUN.")
    teacher, _ = load_run(recipe.teacher)
    device = next(model.parameters()).device
    teacher = teacher.to(device).requires_grad_(False).eval()
    heads = next((m.heads for m in model.modules() if isinstance(m, Attention | SpikeAttention)), 1)
    student_taps, teacher_taps = QKVTaps(model), QKVTaps(teacher)

    def distilled(images: Tensor, logits: Output, targets: Tensor) -> Tensor:
        with torch.no_grad(), autocast(recipe, device):
            teacher(images)
        with torch.autocast(device.type, enabled=False):
            term = fine_grained_loss(student_taps.take(), teacher_taps.take(), heads)
        return loss(images, logits, targets) + recipe.distill * term

    return distilled


def as_ann(model: Model) -> Model:
    """Replace every spiking neuron by a ReLU, in place: the "counterpart ANN", a teacher with real q, k, v."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, IELIF | LIF):
                setattr(parent, name, nn.ReLU())
    return model


def cifar_base_ann(num_classes: int = 10) -> MetaSpikeFormer:
    """`cifar_base` with ReLUs: the teacher of the CIFAR recipes."""
    return as_ann(meta_spikeformer.cifar_base(num_classes))


# ------------------------------------------------------------------------------------------------ transfer
def imagenet_15m_from(num_classes: int = 10, start: str = "", levels: int = 4,
                      topology: str = "published") -> MetaSpikeFormer:
    """`imagenet_15m` for other classes, starting from trained weights.

    start: a RUN folder of ours or a published checkpoint file. Everything but the head is taken over, and not the
    quantizers' steps: they start from the weights again. A path that does not exist leaves the fresh weights, since a
    trained run must be readable without it; `transfer` refuses to *train* so.
    """
    model = meta_spikeformer.imagenet_15m(num_classes, levels=levels, topology=topology)
    if start and Path(start).exists():
        start_from(model, start)
    return model


def start_from(model: nn.Module, path: str | Path) -> nn.Module:
    """Copy the weights of a RUN or a published checkpoint into a full-precision model, all but `head.*`, in place.

    Errors: RunError, PublishedWeightsError (listing keys; nothing is changed).
    """
    path = Path(path)
    if path.is_dir():
        source = load_run(path)[0].state_dict()
    else:
        dead = (".alpha", ".zero_point", ".signed", ".init_state")
        source = {published_name(name): value for name, value in read_weights(path).items() if not name.endswith(dead)}
    weights: dict[str, Tensor] = {}
    for name, value in source.items():
        name = name.replace(".parametrizations.weight.original", ".weight")
        if ".parametrizations." not in name and not name.startswith(("head.", "head_kd.")):
            weights[name] = value
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    weights = {k: v.unsqueeze(-1) if k in own and v.dim() == 3 and own[k].dim() == 4 else v for k, v in weights.items()}
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f"{k}: found {list(weights[k].shape)}, the model has {list(own[k].shape)}"
              for k in own if k in weights and weights[k].shape != own[k].shape]
    if missing or unexpected or shapes:
        raise PublishedWeightsError(f"{path} does not fit this {type(model).__name__}; nothing was loaded.", missing,
                                    unexpected, shapes)
    model.load_state_dict(weights, strict=False)
    return model


def transfer(model: nn.Module, recipe: Recipe, loss: Loss) -> Loss:
    """Objective of the transfer recipes: refuse to train without the start, then `fine_grained_distillation`."""
    start = str(recipe.model_options.get("start", ""))
    if not start or not Path(start).exists():
        raise RecipeError(f"recipe {recipe.name!r} starts from trained ImageNet weights, found start={start!r}; give a run "
                          "or a published checkpoint: --set model_options.start=PATH.")
    return fine_grained_distillation(model, recipe, loss)


# ------------------------------------------------------------------------------------------------- recipes
_IMAGENET = Recipe(
    "qsd_transformer.imagenet", meta_spikeformer.imagenet_15m, bits=4, objective=fine_grained_distillation,
    data="imagenet", image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip="random",
    crop="random_resized", rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, workers=8,
    epochs=300, batch_size=1568, optimizer="lamb", lr=3.675e-3, weight_decay=0.05, warmup_epochs=15, min_lr=1e-6,
    precision="bf16", ema=0.99996, label_smoothing=0.1,
    notes="Release's train.sh: 8 GPUs x 196 images, lr 6e-4 * 1568 / 256. Its AMP is fp16; bf16 needs no loss scaling. "
          "On fewer GPUs set accumulate, the batch stays 1568. Distillation is off until distill and teacher are set.")

_CIFAR = Recipe(
    "qsd_transformer.cifar", meta_spikeformer.cifar_base, bits=4, objective=fine_grained_distillation,
    data="cifar10", flip="random", translate=4, cutout=8, cutmix=1.0, epochs=200, batch_size=256, optimizer="adamw",
    lr=2e-3, weight_decay=0.05, warmup_epochs=10, min_lr=1e-5, grad_clip=1.0, precision="bf16", ema=0.9995,
    label_smoothing=0.1, mixup_off_epoch=180,
    notes="Schedule and size are ours: the paper only transfers to CIFAR. Strict topology: every product has a spike "
          "count on one side.")

# mean and std: whole pixel values and one width for all colours, so that the integer program reads the pixels as they are
_SMALL = Recipe(
    "qsd_transformer.cifar10_small", compact_spikeformer.compact, bits=4, scheme="uniform",
    objective=fine_grained_distillation, data="cifar10", train_on="train+val", mean=(125 / 255, 123 / 255, 114 / 255),
    std=(64 / 255,), flip="alternating", translate=2, cutout=8, epochs=18, batch_size=500, optimizer="muon", lr=0.025,
    plain_lr=0.16, momentum=0.85, betas=(0.9, 0.98), weight_decay=0.01, schedule="triangle", warmup_epochs=1.5,
    precision="bf16", label_smoothing=0.1,
    notes="Network and schedule are ours, for two CPU cores: see models/compact_spikeformer.py. All 50,000 training images; "
          "the test set is looked at once, at the end.")

_BINARY = replace(
    _SMALL, name="qsd_transformer.cifar10_binary", epochs=16, lr=0.12,
    spec=QuantSpec([("*", Scheme("binary", options={"scale": "mean"})), ("stem.conv", Scheme("uniform", 8)),
                    ("head", Scheme("uniform", 8))]),
    model_options={"widths": (64, 256, 240)},  # what fits into 300 kB
    notes="Not of the paper: 1-bit weights (XNOR-Net's scale) behind counts 0..4, 8-bit ends. Signs take a higher learning "
          "rate than 4-bit codes: 0.1 gains 4 points over 0.025 in one epoch.")

_TRANSFER = Recipe(
    "qsd_transformer.transfer", imagenet_15m_from, {"num_classes": 10, "start": ""}, bits=4, objective=transfer,
    data="cifar10", image_size=128, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip="random", translate=8,
    cutmix=1.0, epochs=60, batch_size=128, optimizer="adamw", lr=2e-4, weight_decay=0.05, warmup_epochs=3, min_lr=1e-6,
    grad_clip=1.0, precision="bf16", ema=0.9995, label_smoothing=0.1,
    notes="128x128 as published; the schedule was not published and is ours. Needs --set model_options.start=PATH.")


def _listed(*recipes: Recipe) -> dict[str, Recipe]:
    return {recipe.name: recipe for recipe in recipes}


#: name -> recipe. Claims marked "second hand" were quoted from elsewhere, not read in the paper.
RECIPES: dict[str, Recipe] = _listed(
    replace(_IMAGENET, name="qsd_transformer.imagenet_15m",
            claim="75.5 % top-1, 2.5 mJ, '1.8 M' (second hand; with distillation)",
            cost="300 epochs of 6.4 G MACs an image forward: 7.4e18 MACs. "
                 + train_command("qsd_transformer.imagenet_15m")),
    replace(_IMAGENET, name="qsd_transformer.imagenet_31m", model=meta_spikeformer.imagenet_31m,
            claim="77.5 % top-1, 5.7 mJ, '3.9 M' (second hand; with distillation)",
            cost="300 epochs of 13.9 G MACs an image forward: 1.6e19 MACs. "
                 + train_command("qsd_transformer.imagenet_31m")),
    replace(_IMAGENET, name="qsd_transformer.imagenet_55m", model=meta_spikeformer.imagenet_55m,
            claim="80.3 % top-1, 8.7 mJ, '6.8 M' (abstract; with distillation)",
            cost="300 epochs of 24.6 G MACs an image forward: 2.8e19 MACs. "
                 + train_command("qsd_transformer.imagenet_55m")),
    replace(_CIFAR, name="qsd_transformer.cifar10", claim="ours: 95 % or more is the goal, not measured yet",
            cost="200 epochs of 1.4 G MACs an image forward: 4.3e16 MACs, a GPU. "
                 + train_command("qsd_transformer.cifar10")),
    replace(_CIFAR, name="qsd_transformer.cifar100", data="cifar100", model_options={"num_classes": 100},
            mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), claim="ours: not measured yet",
            cost="200 epochs of 1.4 G MACs an image forward: 4.3e16 MACs, a GPU. "
                 + train_command("qsd_transformer.cifar100")),
    Recipe("qsd_transformer.cifar10_teacher", cifar_base_ann, data="cifar10", flip="random", translate=4, cutout=8,
           cutmix=1.0, epochs=200, batch_size=256, optimizer="adamw", lr=2e-3, weight_decay=0.05, warmup_epochs=10,
           min_lr=1e-5, grad_clip=1.0, precision="bf16", ema=0.9995, label_smoothing=0.1, mixup_off_epoch=180,
           claim="none: a float network with real activations, the teacher of qsd_transformer.cifar10",
           cost="as qsd_transformer.cifar10. " + train_command("qsd_transformer.cifar10_teacher")),
    replace(_SMALL, claim="ours: 91.29 % in torch, 91.18 % on integers, 1.14 MB; see RESULTS.md",
            cost="41 minutes on one CPU core. " + train_command("qsd_transformer.cifar10_small")),
    replace(_SMALL, name="qsd_transformer.cifar10_small_float", bits=32,
            claim="ours: the float-weight twin of cifar10_small, 91.97 %; see RESULTS.md",
            cost="as cifar10_small. " + train_command("qsd_transformer.cifar10_small_float")),
    replace(_BINARY, claim="ours: 89.75 % in torch, 90.00 % on integers, 296 kB; see RESULTS.md",
            cost="an hour on one CPU core. " + train_command(
                "qsd_transformer.cifar10_binary", " --set distill_logits=0.7 --set teacher=RUN_OF_CIFAR10_SMALL_FLOAT")),
    replace(_SMALL, name="qsd_transformer.cifar10_small_lif", model=compact_spikeformer.compact_lif,
            claim="ours: plain LIF over 4 time steps in place of IE-LIF, for comparison, not measured yet",
            cost="four times cifar10_small. " + train_command("qsd_transformer.cifar10_small_lif")),
    replace(_TRANSFER, name="qsd_transformer.cifar10_transfer", claim=NO_CLAIM,
            cost="60 epochs of 2.1 G MACs an image forward: 1.9e16 MACs, a GPU. "
                 + train_command("qsd_transformer.cifar10_transfer", " --set model_options.start=PATH")),
    replace(_TRANSFER, name="qsd_transformer.cifar100_transfer", data="cifar100",
            model_options={"num_classes": 100, "start": ""}, claim=NO_CLAIM,
            cost="60 epochs of 2.1 G MACs an image forward: 1.9e16 MACs, a GPU. "
                 + train_command("qsd_transformer.cifar100_transfer", " --set model_options.start=PATH")),
    Recipe("qsd_transformer.cifar10_dvs", meta_spikeformer.dvs_small, {"num_classes": 10, "time_steps": 16}, bits=4,
           objective=fine_grained_distillation, data="cifar10_dvs", image_size=128, frames=16, mean=(0.0, 0.0),
           std=(1 / 255,), flip="random", translate=5, translate_pad="zero",
           epochs=200, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.05,
           warmup_epochs=10, min_lr=1e-5, grad_clip=1.0, precision="bf16", ema=0.999, label_smoothing=0.1,
           claim=NO_CLAIM, cost="a GPU. " + train_command("qsd_transformer.cifar10_dvs"),
           notes="Schedule, size and number of frames are ours; frames hold equal numbers of events."),
)
