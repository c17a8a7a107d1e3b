"""SpikeHQ's search: Gumbel-softmax over each layer's candidates while the weights train.

    g_l = softmax((a_l + Gumbel noise) / tau),   W_l = sum_k g_lk Q_k(W_l)          one convolution per layer, mixed weights
    weights:  KL(full precision || mixed)                                            on the first part of the data
    choices:  KL(full precision || mixed) + cost_weight * max(0, cost / budget - 1)  on the second part
    tau falls geometrically; then k_l = argmax a_lk, and where that is over the budget, the integer programme on -log
    softmax(a).

A reading of SpikeHQ (arXiv 2412.05505), whose formulas and schedule were not published: the divergence from the full-precision
network stands in place of the labels' cross entropy, and the cost enters relative to the budget.
"""
from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitspike.layers import make_quantizer, quantizable
from bitspike.searching.budget import Budget
from bitspike.searching.costs import Costs
from bitspike.searching.measure import Bench, logits_of
from bitspike.searching.programme import choose
from bitspike.searching.space import Choice, SearchError, Space, key_of
from bitspike.spec import Scheme
from bitspike.writing import whole_file


@dataclass(frozen=True)
class Options:
    """steps: pairs of updates; batch: images of each; lr of the weights (SGD, momentum 0.9) and choice_lr of the logits (Adam);
    tau_start, tau_end: temperatures; cost_weight: of the relative excess over the budget; save_every: steps between two
    checkpoints."""

    steps: int = 200
    batch: int = 100
    lr: float = 0.002
    choice_lr: float = 0.1
    tau_start: float = 5.0
    tau_end: float = 0.3
    cost_weight: float = 4.0
    save_every: int = 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise SearchError(f"differentiable.Options: {name}={value}; it must be a finite number above 0.")


class Mixture(nn.Module):
    """The weight of one layer as a mixture of its quantized forms; `mix` is set before each forward pass."""

    def __init__(self, schemes: tuple[Scheme, ...], weight: Tensor) -> None:
        super().__init__()
        self.forms = nn.ModuleList([nn.Identity() if s.kind == "full" else make_quantizer(s, weight) for s in schemes])
        self.mix = weight.new_full((len(schemes),), 1 / len(schemes))

    def forward(self, w: Tensor) -> Tensor:
        """sum_k mix_k Q_k(w)."""
        return sum((g * form(w) for g, form in zip(self.mix, self.forms, strict=True)), torch.zeros_like(w))


def _soft_costs(space: Space, costs: Costs, budget: Budget) -> list[tuple[dict[str, Tensor], float, float]]:
    """(layer -> cost per candidate, fixed part, limit) of every budget that is a sum over layers."""
    total = sum(space.weights.values())
    held = costs.fixed_weight_bytes + sum(costs.weight_bytes(n, f[len(f) // 2]) for n, f in space.layers.items())
    rows: list[tuple[Callable[[str, Scheme], float], float, float | None]] = [
        (lambda n, s: space.weights[n] * s.bits / total, 0.0, budget.bits),
        (costs.layer_bytes, costs.fixed_bytes, budget.bytes),
        (lambda n, s: costs.layer_energy(n, s, held), costs.fixed_energy(held), budget.energy_pj)]
    return [({n: torch.tensor([float(value(n, s)) for s in found]) for n, found in space.layers.items()}, fixed, float(limit))
            for value, fixed, limit in rows if limit is not None]


def run(bench: Bench, space: Space, costs: Costs, budget: Budget, options: Options, seed: int, folder: Path | None,
        tell: Callable[[str, int, int], None]) -> Choice:
    """The choice of most weight. Errors: SearchError for a `drop` budget, too little data, or a loss that is not finite."""
    if budget.drop is not None:
        raise SearchError("method='differentiable' weighs a cost that must be known beforehand; for drop=... use "
                          "'sensitivity' or 'blackbox'.")
    if len(bench.data.images) < 2:
        raise SearchError("differentiable search needs at least two images.")
    with torch.random.fork_rng(devices=[]):  # of the network's own dropout and the like
        torch.manual_seed(seed)
        return _search(bench, space, costs, budget, options, seed, folder, tell)


def _search(bench: Bench, space: Space, costs: Costs, budget: Budget, options: Options, seed: int, folder: Path | None,
            tell: Callable[[str, int, int], None]) -> Choice:
    images = bench.data.images
    half = len(images) // 2
    model = copy.deepcopy(bench.model).train()
    layers = quantizable(model)
    mixtures: dict[str, Mixture] = {}
    for name, found in space.layers.items():
        weight: Tensor = layers[name].weight.detach()  # type: ignore[assignment,operator]
        mixtures[name] = Mixture(found, weight)
        parametrize.register_parametrization(layers[name], "weight", mixtures[name], unsafe=True)
    logits = {name: torch.zeros(len(found), requires_grad=True) for name, found in space.layers.items()}
    weights = [p for p in model.parameters() if p.requires_grad]
    of_weights = torch.optim.SGD(weights, options.lr, momentum=0.9)
    of_choices = torch.optim.Adam(list(logits.values()), options.choice_lr, betas=(0.5, 0.999))
    rows = _soft_costs(space, costs, budget)
    settings = {**asdict(options), "seed": seed, "budget": str(budget), "subject": bench.fingerprint(),
                "costs": costs.describe(), "space": {n: [key_of(s) for s in f] for n, f in space.layers.items()}}
    store = None if folder is None else folder / "differentiable.pt"
    step = _load(store, settings, model, logits, of_weights, of_choices)

    def divergence(part: Tensor, tau: float, hard: bool, key: int) -> Tensor:
        draw = torch.Generator().manual_seed((seed * 1_000_003 + key) % 2**63)
        for name, mixture in mixtures.items():
            noise = -torch.log(-torch.log(torch.rand(len(logits[name]), generator=draw).clamp(1e-9, 1 - 1e-7)))
            g = ((logits[name] + noise) / tau).softmax(0)
            mixture.mix = g.detach() if hard else g
        with torch.no_grad():
            wanted = F.log_softmax(logits_of(bench.forward, bench.model, part), 1)
        found = F.log_softmax(logits_of(bench.forward, model, part), 1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def part_of(first: int, count: int, key: int) -> Tensor:
        draw = torch.Generator().manual_seed((seed * 7_368_787 + key) % 2**63)
        return images[first + torch.randint(count, (min(options.batch, count),), generator=draw)]

    while step < options.steps:
        tau = options.tau_start * (options.tau_end / options.tau_start) ** (step / max(1, options.steps - 1))
        loss = divergence(part_of(0, half, 2 * step), tau, True, 2 * step)
        _finite(loss, "weights", step)
        of_weights.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        of_weights.step()
        loss = divergence(part_of(half, len(images) - half, 2 * step + 1), tau, False, 2 * step + 1)
        for table, fixed, limit in rows:
            spent = fixed + torch.stack([(logits[n].softmax(0) * table[n]).sum() for n in table]).sum()
            loss = loss + options.cost_weight * F.relu(spent / limit - 1)
        _finite(loss, "choices", step)
        of_choices.zero_grad()
        loss.backward()
        of_choices.step()
        step += 1
        tell(f"temperature {tau:.2f}, loss {loss.item():.3f}", step, options.steps)
        if store is not None and (step % options.save_every == 0 or step == options.steps):
            _save(store, settings, step, model, logits, of_weights, of_choices)
    return _settled(space, costs, budget, {n: a.detach() for n, a in logits.items()})


def _settled(space: Space, costs: Costs, budget: Budget, logits: dict[str, Tensor]) -> Choice:
    """Arg max; where that overshoots, the most probable choice that meets the budget."""
    choice = {n: found[int(logits[n].argmax())] for n, found in space.layers.items()}
    totals = costs.of(choice)
    if all(excess <= 1e-9 for excess in budget.over(totals.bits, totals.bytes, totals.energy_pj)):
        return choice
    damage = {n: dict(zip(found, (-logits[n].log_softmax(0)).tolist(), strict=True)) for n, found in space.layers.items()}
    return choose(space, costs, damage, budget)


def _finite(loss: Tensor, of: str, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise SearchError(f"differentiable search: the loss of the {of} is not finite in step {step}; lower lr in its Options.")


def _save(path: Path, settings: dict[str, Any], step: int, model: nn.Module, logits: dict[str, Tensor],
          *optimizers: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        torch.save({"settings": json.dumps(settings), "step": step, "model": model.state_dict(),
                    "logits": {n: a.detach() for n, a in logits.items()}, "random": torch.get_rng_state(),
                    "optimizers": [o.state_dict() for o in optimizers]}, file)


def _load(path: Path | None, settings: dict[str, Any], model: nn.Module, logits: dict[str, Tensor],
          *optimizers: torch.optim.Optimizer) -> int:
    if path is None or not path.is_file():
        return 0
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if json.loads(stored["settings"]) != settings:
            raise SearchError(f"{path} is of another search; choose another --out, or the same settings to go on.")
        model.load_state_dict(stored["model"])
        with torch.no_grad():
            for name, value in logits.items():
                value.copy_(stored["logits"][name])
        for optimizer, state in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(stored["random"])
        return int(stored["step"])
    except SearchError:
        raise
    except Exception as error:  # torch's reader raises almost anything on a broken file
        raise SearchError(f"{path} cannot be read ({type(error).__name__}); it is damaged: choose another --out, or delete the "
                          "file to begin again.") from None
