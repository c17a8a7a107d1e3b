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

    Each group carries `lr_scale`, the factor on the scheduled learning rate.

    >>> [len(g["params"]) for g in parameter_groups(nn.Linear(2, 2), Recipe("x", nn.Identity))]
    [1, 1]
    """
    steps = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    least = 3 if recipe.optimizer == "muon" else 2
    weights = [p for p in trained if p.dim() >= least and id(p) not in steps]
    plain = [p for p in trained if p.dim() < least and id(p) not in steps]
    scales = [p for p in trained if id(p) in steps]
    groups: list[dict[str, object]] = [
        {"params": weights, "weight_decay": recipe.weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": recipe.plain_lr},
        {"params": scales, "weight_decay": 0.0, "lr_scale": recipe.scale_lr},
    ]
    return [g for g in groups if g["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer. LAMB clips its trust ratio at 1, as the published recipes do; SGD uses Nesterov momentum."""
    groups = parameter_groups(model, recipe)
    betas = (recipe.betas[0], recipe.betas[1])
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, fused=True)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)
    from timm.optim import Lamb, Muon

    if recipe.optimizer == "lamb":
        return Lamb(groups, lr=recipe.lr, betas=betas, trust_clip=True)
    for group in groups:  # Muon orthogonalises matrices; the rest falls back to AdamW inside it
        group["use_fallback"] = group["weight_decay"] == 0.0 and group is not groups[0]
    return Muon(groups, lr=recipe.lr, momentum=recipe.momentum, betas=betas, nesterov=True)


def learning_rate(recipe: Recipe, step: int, steps: int, steps_per_epoch: int) -> float:
    """The rate of step 0..steps-1: linear from `warmup_lr` over the warm-up, then half a cosine or a line to `min_lr`.

    >>> recipe = Recipe("x", nn.Identity, lr=1.0, schedule="triangle", warmup_epochs=1)
    >>> [learning_rate(recipe, s, 8, 4) for s in (0, 2, 4, 6)]
    [0.0, 0.5, 1.0, 0.5]
    """
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps)
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done
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
