"""Parameter groups, optimizers and the learning rate as a function of the step."""
from __future__ import annotations

import math

import torch
from torch import nn

from bitspike.quantizers import Quantizer
from bitspike.recipe import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    """Weights; biases and other 1-D parameters (no decay, lr times `plain_lr`); quantizer steps (no decay, `scale_lr`).

    With Muon, which is for hidden layers, linear weights (the head's) go with the second group.

    Where the model has a `backbone`, the same again for what is not in it, times `head_lr`.
    Each group carries `lr_scale`, the factor on the scheduled learning rate, and `hidden`: are these weights?

    >>> [len(g["params"]) for g in parameter_groups(nn.Linear(2, 2), Recipe("x", nn.Identity))]
    [1, 1]
    """
    steps = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    backbone = getattr(model, "backbone", model)
    inner = {id(p) for p in backbone.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    least = 3 if recipe.optimizer == "muon" else 2
    groups: list[dict[str, object]] = []
    for inside, factor in ((True, 1.0), (False, recipe.head_lr)):
        parts = [p for p in trained if (id(p) in inner) == inside]
        weights = [p for p in parts if p.dim() >= least and id(p) not in steps]
        plain = [p for p in parts if p.dim() < least and id(p) not in steps]
        scales = [p for p in parts if id(p) in steps]
        groups += [
            {"params": weights, "weight_decay": recipe.weight_decay, "lr_scale": factor, "hidden": True},
            {"params": plain, "weight_decay": 0.0, "lr_scale": factor * recipe.plain_lr, "hidden": False},
            {"params": scales, "weight_decay": 0.0, "lr_scale": factor * recipe.scale_lr, "hidden": False},
        ]
    return [g for g in groups if g["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer. LAMB clips its trust ratio at 1, as the published recipes do; SGD uses Nesterov momentum."""
    groups = parameter_groups(model, recipe)
    hidden = [bool(group.pop("hidden")) for group in groups]
    betas = (recipe.betas[0], recipe.betas[1])
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)
    from timm.optim import Lamb, Muon

    if recipe.optimizer == "lamb":
        return Lamb(groups, lr=recipe.lr, betas=betas, trust_clip=True)
    for group, matrices in zip(groups, hidden, strict=True):  # Muon orthogonalises matrices; for the rest it is AdamW
        group["use_fallback"] = not matrices
    return Muon(groups, lr=recipe.lr, momentum=recipe.momentum, betas=betas, nesterov=True)


def learning_rate(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate of step 0..steps-1: linear from `warmup_lr` over the warm-up, then half a cosine, a line to `min_lr`, or steps.

    "covered_cosine" is the cosine of the whole run, whose beginning the warm-up covers: timm's, and that of papers built on it.

    >>> recipe = Recipe("x", nn.Identity, lr=1.0, schedule="triangle", warmup_epochs=1)
    >>> [learning_rate(recipe, s, 8, 4) for s in (0, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5]
    """
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps)
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
    if recipe.schedule == "steps":
        return recipe.lr * 0.1 ** sum(step >= drop * steps_per_epoch for drop in recipe.drop_epochs)
    covered = recipe.schedule == "covered_cosine"
    done = step / steps if covered else (step - warmup) / max(1, steps - warmup)
    share = 1 - done if recipe.schedule == "triangle" else 0.5 * (1 + math.cos(math.pi * done))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share


class Average:
    """Exponential moving average of a model's weights, in a second model of the same form.

    ema <- d ema + (1 - d) weight,   d = min(decay, (1 + n) / (10 + n)) after n updates; the first update copies.
    Running statistics are averaged like weights, integer and boolean state is copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = model.eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Take in the weights of `source` after an optimizer step."""
        mine, theirs = self.model.state_dict(), source.state_dict()
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        floats = [k for k, v in theirs.items() if v.is_floating_point()]
        torch._foreach_lerp_([mine[k] for k in floats], [theirs[k] for k in floats], 1 - decay)
        for name in theirs.keys() - set(floats):
            mine[name].copy_(theirs[name])
        self.updates += 1
