"""The integer programme: the choice of least damage within a budget, exactly (scipy's `milp`, HiGHS)."""
from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitspike.cost import MEMORY_LEVELS
from bitspike.searching.budget import Budget
from bitspike.searching.costs import Costs
from bitspike.searching.space import Choice, SearchError, Space
from bitspike.spec import Scheme

Damage = Mapping[str, Mapping[Scheme, float]]  # layer -> candidate -> what it is believed to cost in accuracy

_LARGEST = 1e6  # largest damage the solver sees: its gap of 1e-6 is then 1e-12 of it
_SLACK = 1e-9  # relative: how far rounding of a sum of floats may go past a limit


class OutOfTime(SearchError):
    """The solver's time went by without any choice: there may be one."""


@dataclass(frozen=True)
class Row:
    """One limit: sum over layers of cost[layer][candidate] <= limit."""

    name: str
    cost: Mapping[str, Mapping[Scheme, float]]
    limit: float

    def used(self, choice: Mapping[str, Scheme]) -> float:
        """What a choice takes of it."""
        return sum(self.cost[n][s] for n, s in choice.items())

    def least(self) -> float:
        """The least any choice can take."""
        return sum(min(c.values()) for c in self.cost.values())

    def holds(self, choice: Mapping[str, Scheme]) -> bool:
        """Is the limit met?"""
        return self.used(choice) <= self.limit + _SLACK * abs(self.limit)


def solve(layers: Mapping[str, tuple[Scheme, ...]], damage: Damage, rows: list[Row], seconds: float = 60.0) -> Choice | None:
    """The choice of least total damage that meets every row; None if there is none.

    Exact to 1e-12 of the total: the solver's gap is absolute, so a candidate that no best choice can take (it alone costs
    more than a choice that was found) is left out, and the rest is scaled and solved again. What is returned is checked in
    exact order of summation; a limit that the solver's tolerance overstepped is tightened and solved again.
    `seconds` bounds one solve; the best choice found so far is returned then, with a warning.
    Errors: SearchError for damages that are no numbers; OutOfTime if nothing was found in that time.
    """
    pairs = [(name, scheme) for name, found in layers.items() for scheme in found]
    values = np.array([damage[n][s] for n, s in pairs], np.float64)
    if not np.isfinite(values).all():
        name, scheme = pairs[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise SearchError(f"layer {name!r} with {scheme.kind} {scheme.bits} bits: the measured damage is not a number; "
                          "leave that candidate out, or look for what overflows there.")
    least = {name: min(damage[name].values()) for name in layers}
    more = np.array([damage[n][s] - least[n] for n, s in pairs], np.float64)  # of which every choice pays at least 0 a layer
    open_ = np.ones(len(pairs), bool)
    while True:
        scale = float(more[open_].max()) or 1.0
        choice = _solve_once(layers, pairs, np.where(open_, more, 0.0) / scale * _LARGEST, open_, rows, seconds)
        if choice is None:
            return None
        total = sum(damage[n][s] - least[n] for n, s in choice.items())
        if total >= scale or total == 0:
            return choice
        open_ = more <= total


def _solve_once(layers: Mapping[str, tuple[Scheme, ...]], pairs: list[tuple[str, Scheme]], values: np.ndarray,
                open_: np.ndarray, rows: list[Row], seconds: float) -> Choice | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    index = {name: i for i, name in enumerate(layers)}
    rows_of = np.array([index[n] for n, _ in pairs])
    one = csr_array((np.ones(len(pairs)), (rows_of, np.arange(len(pairs)))), shape=(len(layers), len(pairs)))
    limits = [row.limit + _SLACK * abs(row.limit) for row in rows]
    for _ in range(8):
        constraints: list[Any] = [LinearConstraint(one, 1, 1)]
        for row, limit in zip(rows, limits, strict=True):
            amounts = np.array([row.cost[n][s] for n, s in pairs], np.float64)
            unit = max(float(np.abs(amounts).max()), 1e-300)
            constraints.append(LinearConstraint(amounts[None] / unit, -np.inf, limit / unit))
        found = milp(values, integrality=np.ones(len(pairs)), bounds=Bounds(0, open_.astype(float)), constraints=constraints,
                     options={"mip_rel_gap": 0.0, "time_limit": seconds})
        stopped = found.status == 1
        if found.x is None:
            if stopped:
                raise OutOfTime(f"the integer programme found no choice within {seconds:g} s, which does not mean that there "
                                "is none; try fewer candidates.")
            return None
        if stopped:
            warnings.warn(f"the integer programme was stopped after {seconds:g} s: its choice meets the budget, a better one "
                          "may exist.", stacklevel=3)
        chosen = {pairs[i][0]: pairs[i][1] for i in np.flatnonzero(found.x > 0.5)}
        choice = {name: chosen[name] for name in layers}
        broken = [i for i, row in enumerate(rows) if not row.holds(choice)]
        if not broken:
            return choice
        for i in broken:  # by the solver's tolerance of about 1e-6
            limits[i] = min(limits[i], rows[i].limit) - 2 * (rows[i].used(choice) - rows[i].limit)
    return None


def _table(space: Space, value: Any) -> dict[str, dict[Scheme, float]]:
    return {name: {s: float(value(name, s)) for s in found} for name, found in space.layers.items()}


def _plain_rows(space: Space, costs: Costs, budget: Budget) -> list[Row]:
    rows = []
    if budget.bits is not None:
        total = sum(space.weights.values())
        rows.append(Row("bits", _table(space, lambda n, s: space.weights[n] * s.bits), budget.bits * total))
    if budget.bytes is not None:
        rows.append(Row("bytes", _table(space, costs.layer_bytes), budget.bytes - costs.fixed_bytes))
    return rows


def _energy_rows(space: Space, costs: Costs, held: float) -> tuple[Row, Row]:
    """Limit on the packed bytes so that they fit the memory of `held` bytes; energies there (without a limit yet)."""
    fits = Row("weight bytes", _table(space, costs.weight_bytes), held - costs.fixed_weight_bytes)
    energy = Row("energy", _table(space, lambda n, s: costs.layer_energy(n, s, held)), 0.0)
    return fits, energy


def choose(space: Space, costs: Costs, damage: Damage, budget: Budget, seconds: float = 60.0) -> Choice:
    """The choice of least damage that meets bits, bytes and energy. Errors: SearchError with the smallest reachable values.

    The energy of a weight depends on the memory that holds all of them, so energy budgets are solved once per memory level.
    """
    rows = _plain_rows(space, costs, budget)
    for row in rows:
        if row.least() > row.limit + _SLACK * abs(row.limit):
            raise SearchError(_unreachable(space, costs, row))
    if budget.energy_pj is None:
        choice = solve(space.layers, damage, rows, seconds)
        if choice is None:
            raise SearchError(f"{budget}: each limit alone can be met, all of them together cannot. {_reach(space, costs)}")
        return choice
    best: tuple[float, Choice] | None = None
    late: OutOfTime | None = None
    for held in _levels():
        fits, energy = _energy_rows(space, costs, held)
        if fits.least() > fits.limit:
            continue
        energy = Row("energy", energy.cost, budget.energy_pj - costs.fixed_energy(held))
        try:
            choice = solve(space.layers, damage, [*rows, fits, energy], seconds)
        except OutOfTime as error:  # another level may have an answer
            late = error
            continue
        if choice is not None and costs.of(choice).energy_pj <= budget.energy_pj * (1 + _SLACK):
            total = sum(damage[n][s] for n, s in choice.items())
            if best is None or total < best[0]:
                best = total, choice
    if best is None:
        raise late or SearchError(f"{budget}: cannot be met. {_reach(space, costs)}")
    if late is not None:
        warnings.warn(f"{late} The choice taken meets the budget, a better one may exist.", stacklevel=2)
    return best[1]


def cheapest(space: Space, costs: Costs, what: str) -> Choice:
    """The choice of least "bytes" or "energy" (or "bits")."""
    if what != "energy":
        table = _table(space, costs.layer_bytes if what == "bytes" else lambda n, s: s.bits)
        return {name: min(found, key=lambda s, c=table[name]: (c[s], s.bits)) for name, found in space.layers.items()}  # type: ignore[misc]
    best: tuple[float, Choice] | None = None
    for held in _levels():
        fits, energy = _energy_rows(space, costs, held)
        choice = solve(space.layers, energy.cost, [fits]) if fits.least() <= fits.limit else None
        if choice is not None:
            total = costs.of(choice).energy_pj
            if best is None or total < best[0]:
                best = total, choice
    if best is None:  # the highest level holds everything
        raise SearchError("no memory level holds the weights.")
    return best[1]


def _levels() -> list[float]:
    """Largest bytes of each memory level; of the last one, more than there can be."""
    return [min(limit, 1e18) for limit, _ in MEMORY_LEVELS]


def _reach(space: Space, costs: Costs) -> str:
    bits = space.bits(cheapest(space, costs, "bits"))
    least = costs.of(cheapest(space, costs, "bytes")).bytes
    energy = costs.of(cheapest(space, costs, "energy")).energy_pj
    return (f"These candidates reach down to bits={bits:.4g}, bytes={least:,} and energy={energy / 1e6:.4g}uJ, each on "
            "its own; raise the budget or add candidates of fewer bits.")


def _unreachable(space: Space, costs: Costs, row: Row) -> str:
    found = (f"bits={row.limit / sum(space.weights.values()):g}" if row.name == "bits"
             else f"bytes={row.limit + costs.fixed_bytes:,.0f}")
    return f"{found} cannot be met. {_reach(space, costs)}"
