"""`search(model, candidates, budget, data) -> (QuantSpec, SearchReport)`: one interface, three methods."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitspike import writing
from bitspike.cost import CMOS_45NM, Technology
from bitspike.searching import blackbox, differentiable
from bitspike.searching.budget import Budget
from bitspike.searching.costs import Costs, Totals
from bitspike.searching.measure import Bench, Forward, Journal, SearchData, call, check_finite
from bitspike.searching.programme import Damage, cheapest, choose
from bitspike.searching.sensitivity import choice_key, fisher_table, measured_table
from bitspike.searching.space import CANDIDATES, Choice, SearchError, Space, key_of, make_space
from bitspike.spec import QuantSpec, Scheme

METHODS = ("sensitivity", "differentiable", "blackbox")
_PROFILED = 64  # images that spikes are counted on
_FRONT = 9  # budgets on the front of the report

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """One spec: what it costs, and what it does to the network before fine-tuning (top1 in percent, divergence in nats)."""

    name: str
    group: str  # "searched", "front", "uniform", "pow2", "float"
    totals: Totals
    top1: float
    divergence: float
    choice: Mapping[str, Scheme]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"name": self.name, "group": self.group, **self.totals.to_dict(), "top1": self.top1,
                "divergence": self.divergence, "layers": {n: {**s.to_dict(), "key": key_of(s)} for n, s in self.choice.items()}}


@dataclass(frozen=True)
class SearchReport:
    """What a search found, beside what it is to be compared with. Accuracies are before fine-tuning, on the search's own data.

    searched: the answer; points: float, uniform 2/3/4/8 bits, power of two only, and the front of least damage; damage:
    layer -> candidate -> divergence (methods that measure it); layers: name -> weights, MACs, mean input count.
    """

    method: str
    budget: str
    searched: Point
    points: tuple[Point, ...]
    damage: Mapping[str, Mapping[str, float]]
    layers: Mapping[str, Mapping[str, Any]]
    technology: Technology
    seconds: float
    seed: int

    def point(self, name: str) -> Point:
        """A point by name. Errors: KeyError."""
        return next(p for p in (self.searched, *self.points) if p.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"method": self.method, "budget": self.budget, "seed": self.seed, "seconds": round(self.seconds, 1),
                "searched": self.searched.to_dict(), "points": [p.to_dict() for p in self.points],
                "damage": {n: dict(row) for n, row in self.damage.items()},
                "layers": {n: dict(r) for n, r in self.layers.items()},
                "technology": self.technology.name, "constants": self.technology.describe()}


def search(model: nn.Module, candidates: Sequence[Scheme] | Mapping[str, Sequence[Scheme]] = CANDIDATES,
           budget: Budget | str = "bits=4", data: SearchData | None = None, *, method: str = "sensitivity",
           measure: str = "loss", out: Path | str | None = None, seed: int = 0, technology: Technology = CMOS_45NM,
           overhead_bytes: int = 0, forward: Forward = call, tell: Tell | None = None, cheap: str = "bytes",
           options: differentiable.Options | blackbox.Options | None = None) -> tuple[QuantSpec, SearchReport]:
    """Choose a scheme and a width for every layer, within a budget.

    The model is not changed. It is any `nn.Module` of Conv1d, Conv2d and Linear layers; quantizers it has are taken off.

    Args:
        candidates: schemes for every layer, or pattern -> schemes (`space.make_space`).
        budget: `Budget`, or its text: "bits=3.2", "bytes=900kB", "energy=25uJ", "drop=1.0".
        data: images and labels that no final number is measured on.
        method: "sensitivity": damage per layer and candidate, then the exact integer programme. "differentiable":
            Gumbel-softmax over the candidates while the weights train. "blackbox": optuna over whole choices.
        measure: for "sensitivity": "loss", measured one by one, or "fisher", estimated from gradients (large networks).
        out: folder for what is measured, so that a killed search goes on (`measurements.jsonl` and the like); None keeps
        nothing.
        forward: (model, images) -> logits, where the model is not simply called: state to reset, autocast.
        cheap: what a search for `drop` makes small: "bytes" or "energy".
        overhead_bytes: of the file, besides the layers; `bitspike search` finds it by exporting once.
        tell: called with (text, done, total) as it goes.
    Returns: the spec, one rule per layer, and the report.
    Errors: SearchError: nothing to search, a budget that cannot be met (with the smallest values that can), weights or a loss
        that are not finite (with the tensor or the candidate to blame), a folder of another search.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> data = SearchData(torch.randn(32, 4), torch.randint(2, (32,)))
    >>> spec, report = search(net, [Scheme("uniform", 2), Scheme("uniform", 8)], "bits=5", data)
    >>> report.searched.totals.bits <= 5
    True
    """
    if data is None:
        raise SearchError("search needs data: SearchData(images, labels), some hundred images at least.")
    if method not in METHODS or measure not in ("loss", "fisher"):
        raise SearchError(f"method={method!r}, measure={measure!r}; allowed: {', '.join(METHODS)}; loss, fisher.")
    limits = Budget.parse(*budget.replace(",", " ").split()) if isinstance(budget, str) else budget
    if cheap not in ("bytes", "energy"):
        raise SearchError(f"cheap={cheap!r}; allowed: bytes, energy.")
    check_finite(model)
    started, folder = time.monotonic(), None if out is None else Path(out)
    say = tell or (lambda text, done, total: None)
    bench = Bench(model, data, forward)
    space = make_space(bench.model, candidates)
    costs = Costs(bench.model, data.images[:_PROFILED], space, technology, overhead_bytes, forward)
    costs.check()
    _reachable(space, costs, limits)
    subject = {"version": 1, "network and data": bench.fingerprint()}
    journal = Journal(folder / "measurements.jsonl" if folder else None, subject)
    damage: Damage = {}
    if method == "sensitivity":
        damage = (fisher_table if measure == "fisher" else measured_table)(bench, space, journal, say)
        choice = (_for_drop(bench, space, costs, damage, limits, journal, cheap, say) if limits.drop is not None
                  else choose(space, costs, damage, limits))
    elif method == "differentiable":
        chosen = options if isinstance(options, differentiable.Options) else differentiable.Options()
        choice = differentiable.run(bench, space, costs, limits, chosen, seed, folder, say)
    else:
        picked = options if isinstance(options, blackbox.Options) else blackbox.Options()
        choice = blackbox.run(bench, space, costs, limits, picked, seed, folder, say, cheap)
    report = _report(bench, space, costs, damage, limits, choice, journal, method, seed, technology, say)
    return space.spec(choice), SearchReport(seconds=time.monotonic() - started, **report)


def _reachable(space: Space, costs: Costs, budget: Budget) -> None:
    """Refuse an impossible budget before anything is measured."""
    no_damage = {name: dict.fromkeys(found, 0.0) for name, found in space.layers.items()}
    if (budget.bits, budget.bytes, budget.energy_pj) != (None, None, None):
        choose(space, costs, no_damage, budget)


def measured_point(bench: Bench, costs: Costs, journal: Journal, name: str, group: str, choice: Choice) -> Point:
    """Measure one choice, or take it from the journal."""
    result = journal.get(choice_key(choice), lambda: vars(bench.measure(choice)))
    totals = costs.of_float() if group == "float" else costs.of(choice)
    return Point(name, group, totals, result["top1"], result["divergence"], choice)


def _for_drop(bench: Bench, space: Space, costs: Costs, damage: Damage, budget: Budget, journal: Journal, cheap: str,
              say: Tell) -> Choice:
    """The cheapest choice on the front whose measured accuracy is within the drop: bisection over the front."""
    full = journal.get("float", lambda: vars(bench.measure({})))["top1"]
    front = _front(space, costs, damage, 33, cheap, budget)
    best: Choice | None = None
    low, high, smallest = 0, len(front) - 1, math.inf
    while low <= high:
        middle = (low + high) // 2
        found = journal.get(choice_key(front[middle]), lambda m=middle: vars(bench.measure(front[m])))["top1"]  # type: ignore[misc]
        smallest = min(smallest, full - found)
        say(f"drop {full - found:.2f} points at {space.bits(front[middle]):.2f} bits", middle, len(front))
        if full - found <= budget.drop:  # type: ignore[operator]
            best, high = front[middle], middle - 1
        else:
            low = middle + 1
    if best is None:
        raise SearchError(f"drop={budget.drop:g}: the most accurate spec of these candidates loses {smallest:.2f} points "
                          "before fine-tuning. Raise the drop, add candidates of more bits, or fine-tune.")
    return best


def _front(space: Space, costs: Costs, damage: Damage, points: int, what: str, budget: Budget | None = None) -> list[Choice]:
    """Choices of least damage from the cheapest to the dearest, by budgets at equal steps; without repeats."""
    def cost_of(choice: Choice) -> float:
        totals = costs.of(choice)
        return {"bytes": totals.bytes, "energy": totals.energy_pj, "bits": totals.bits}[what]

    low = cost_of(cheapest(space, costs, what))
    high = max(low, cost_of({n: min(found, key=lambda s, n=n: (damage[n][s], s.bits)) for n, found in space.layers.items()}))  # type: ignore[misc]
    found: dict[str, Choice] = {}
    for i in range(points):
        limit = low + (high - low) * i / max(1, points - 1)
        limits = Budget(bytes=math.ceil(limit) if what == "bytes" else budget.bytes if budget else None,
                        bits=limit if what == "bits" else budget.bits if budget else None,
                        energy_pj=limit * (1 + 1e-9) if what == "energy" else budget.energy_pj if budget else None)
        try:
            choice = choose(space, costs, damage, limits, 5.0)
        except SearchError:
            continue
        found.setdefault(choice_key(choice), choice)
    return list(found.values())


def _report(bench: Bench, space: Space, costs: Costs, damage: Damage, budget: Budget, choice: Choice, journal: Journal,
            method: str, seed: int, technology: Technology, say: Tell) -> dict[str, Any]:
    wanted: list[tuple[str, str, Choice]] = []
    for kind, group in (("uniform", "uniform"), ("pow2", "pow2")):
        widths = sorted({s.bits for found in space.layers.values() for s in found if s.kind == kind and s.bits in (2, 3, 4, 8)})
        for bits in widths:
            same = {n: next((s for s in found if (s.kind, s.bits) == (kind, bits)), None) for n, found in space.layers.items()}
            plain = {n: s for n, s in same.items() if s is not None}
            if len(plain) == len(same):
                wanted.append((f"{'power of two' if kind == 'pow2' else 'uniform'}, {bits} bits", group, plain))
    if damage:
        wanted += [(f"front {costs.of(c).bits:.2f} bits", "front", c) for c in _front(space, costs, damage, _FRONT, "bits")]
    points = []
    for index, (name, group, one) in enumerate(wanted):
        points.append(measured_point(bench, costs, journal, name, group, one))
        say(name, index + 1, len(wanted))
    full = journal.get("float", lambda: vars(bench.measure({})))
    points.insert(0, Point("full precision", "float", costs.of_float(), full["top1"], 0.0, {}))
    held = costs.of(choice).weight_bytes
    layers = {name: {"weights": op.weights, "macs": op.macs, "steps": op.steps, "mean_count": op.mean_count, "kind": op.kind,
                     "energy_pj": costs.layer_energy(name, choice[name], held)}
              for name, op in costs.layers.items() if name in choice}
    return {"method": method, "budget": str(budget), "seed": seed, "technology": technology, "layers": layers,
            "searched": measured_point(bench, costs, journal, "searched", "searched", choice), "points": tuple(points),
            "damage": {n: {key_of(s): v for s, v in row.items()} for n, row in damage.items()}}


def write_spec(spec: QuantSpec, path: Path) -> None:
    """The spec as JSON, whole or not at all."""
    writing.write_text(path, spec.to_json() + "\n")


def write_report(report: SearchReport, path: Path) -> None:
    """The report as JSON, whole or not at all."""
    writing.write_json(path, report.to_dict())


__all__ = ["METHODS", "Point", "SearchReport", "search", "write_report", "write_spec"]
