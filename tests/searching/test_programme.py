"""The integer programme against brute force, on every kind of budget."""
import itertools
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from bitspike.neurons import IELIF
from bitspike.searching import CANDIDATES, Budget, SearchError, make_space, programme
from bitspike.searching.costs import Costs
from bitspike.searching.programme import OutOfTime, Row, cheapest, choose, solve
from bitspike.searching.space import Space
from bitspike.spec import Scheme

FEW = (Scheme("binary"), Scheme("uniform", 2), Scheme("pow2", 4), Scheme("uniform", 8))


@pytest.fixture(scope="module")
def costs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), IELIF(4), nn.Conv2d(16, 32, 3, padding=1), IELIF(4),
                        nn.Conv2d(32, 96, 3, padding=1), IELIF(4), nn.Flatten(), nn.Linear(96 * 36, 10))
    return Costs(net, torch.randn(4, 1, 6, 6), make_space(net, FEW), overhead_bytes=100)


def everything(space):
    names = list(space.layers)
    return [dict(zip(names, found, strict=True)) for found in itertools.product(*space.layers.values())]


def table(space, numbers):
    numbers = iter(numbers)
    return {name: {s: next(numbers) for s in found} for name, found in space.layers.items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=16, max_size=16), st.floats(0, 1),
       st.sampled_from(["bits", "bytes", "energy", "bits and bytes", "bits and energy"]))
def test_equals_brute_force(costs, damages, where, limits):
    space = costs.space
    damage = table(space, damages)
    totals = [(choice, costs.of(choice), sum(damage[n][s] for n, s in choice.items())) for choice in everything(space)]
    reach = {"bits": [t.bits for _, t, _ in totals], "bytes": [t.bytes for _, t, _ in totals],
             "energy": [t.energy_pj for _, t, _ in totals]}
    at = {name: min(values) + where * (max(values) - min(values)) for name, values in reach.items()}
    budget = Budget(bits=at["bits"] if "bits" in limits else None, bytes=int(at["bytes"]) if "bytes" in limits else None,
                    energy_pj=at["energy"] if "energy" in limits else None)

    def fits(t, slack):
        return ((budget.bits is None or t.bits <= budget.bits * (1 + slack))
                and (budget.bytes is None or t.bytes <= budget.bytes)
                and (budget.energy_pj is None or t.energy_pj <= budget.energy_pj * (1 + slack)))

    allowed = [d for _, t, d in totals if fits(t, 0)]
    assume(allowed)
    choice = choose(space, costs, damage, budget)
    assert fits(costs.of(choice), 1e-8)
    assert sum(damage[n][s] for n, s in choice.items()) <= min(allowed)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 10**7), min_size=3, max_size=3), st.data())
def test_any_budget_that_a_choice_uses_up_exactly_is_met(weights, data):
    """Limits at the very edge, where a solver's tolerance shows."""
    names = [f"l{i}" for i in range(3)]
    space = Space(dict.fromkeys(names, CANDIDATES), dict(zip(names, weights, strict=True)))
    target = {n: data.draw(st.sampled_from(CANDIDATES)) for n in names}
    used = {n: {s: float(space.weights[n] * s.bits) for s in found} for n, found in space.layers.items()}
    damage = table(space, data.draw(st.lists(st.floats(0, 1), min_size=30, max_size=30)))
    row = Row("bits", used, sum(used[n][s] for n, s in target.items()))
    choice = solve(space.layers, damage, [row])
    best = min(sum(damage[n][s] for n, s in c.items()) for c in everything(space) if row.used(c) <= row.limit)
    assert choice is not None and row.used(choice) <= row.limit
    assert sum(damage[n][s] for n, s in choice.items()) <= best + 1e-6


def test_cheapest_is_the_least_of_all(costs):
    found = [costs.of(choice) for choice in everything(costs.space)]
    assert costs.of(cheapest(costs.space, costs, "bytes")).bytes == min(t.bytes for t in found)
    assert costs.of(cheapest(costs.space, costs, "bits")).bits == min(t.bits for t in found)
    assert costs.of(cheapest(costs.space, costs, "energy")).energy_pj == pytest.approx(min(t.energy_pj for t in found))


def test_unreachable_budgets_say_what_is_reachable(costs):
    zero = table(costs.space, [0.0] * 16)
    least = min(costs.of(c).bytes for c in everything(costs.space))
    with pytest.raises(SearchError, match=f"bytes={least:,}"):
        choose(costs.space, costs, zero, Budget(bytes=least - 1))
    assert costs.of(choose(costs.space, costs, zero, Budget(bytes=least))).bytes == least
    with pytest.raises(SearchError, match="bits=1, "):
        choose(costs.space, costs, zero, Budget(bits=0.5))
    with pytest.raises(SearchError, match="energy="):
        choose(costs.space, costs, zero, Budget(energy_pj=1.0))
    energy = costs.of(cheapest(costs.space, costs, "energy")).energy_pj
    assert costs.of(choose(costs.space, costs, zero, Budget(energy_pj=energy * (1 + 1e-9)))).energy_pj <= energy * (1 + 1e-8)


def test_a_memory_level_without_an_answer_in_time_is_told(costs, monkeypatch):
    real, calls = programme.solve, []

    def late(layers, damage, rows, seconds=60.0):
        calls.append(seconds)
        if len(calls) == 1 or every:
            raise OutOfTime("found no choice within 1 s.")
        return real(layers, damage, rows, seconds)

    monkeypatch.setattr(programme, "solve", late)
    zero, budget = table(costs.space, [0.0] * 16), Budget(energy_pj=1e12)
    every = False
    with pytest.warns(UserWarning, match="a better one may exist"):
        assert costs.of(choose(costs.space, costs, zero, budget)).energy_pj <= 1e12
    every = True
    with pytest.raises(OutOfTime, match="within 1 s"):
        choose(costs.space, costs, zero, budget)


def test_damages_too_small_to_divide_by(costs):
    damage = table(costs.space, [0.0] * 15 + [1e-320])
    assert choose(costs.space, costs, damage, Budget(bits=8))[list(costs.space.layers)[-1]] != FEW[-1]


def test_damage_that_is_no_number(costs):
    damage = table(costs.space, [0.0] * 15 + [float("nan")])
    with pytest.raises(SearchError, match="not a number"):
        choose(costs.space, costs, damage, Budget(bits=4))


def test_a_large_network_is_solved_in_seconds():
    """As many layers as the 55 M network has, and their sizes' spread; the goal is 10 s."""
    draw = torch.Generator().manual_seed(0)
    names = [f"l{i}" for i in range(112)]
    weights = {n: int(w) for n, w in zip(names, torch.logspace(3, 6.5, 112, base=10), strict=True)}
    space = Space(dict.fromkeys(names, CANDIDATES), weights)
    damage = {n: {s: float(torch.rand((), generator=draw)) * 4.0**-s.bits for s in CANDIDATES} for n in names}
    row = Row("bits", {n: {s: float(weights[n] * s.bits) for s in CANDIDATES} for n in names}, 3.2 * sum(weights.values()))
    began = time.process_time()
    choice = solve(space.layers, damage, [row])
    assert choice is not None and row.holds(choice)
    assert time.process_time() - began < 10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-8, 6), min_size=20, max_size=20), st.floats(0, 1))
def test_damages_of_very_different_sizes(powers, where):
    """One candidate that ruins the network must not hide the differences between the others."""
    names = [f"l{i}" for i in range(5)]
    space = Space(dict.fromkeys(names, FEW), dict.fromkeys(names, 100))
    damage = table(space, [10.0**p for p in powers])
    used = {n: {s: float(100 * s.bits) for s in found} for n, found in space.layers.items()}
    row = Row("bits", used, 500 + where * 3500)
    best = min(sum(damage[n][s] for n, s in c.items()) for c in everything(space) if row.holds(c))
    choice = solve(space.layers, damage, [row])
    assert row.holds(choice)
    assert sum(damage[n][s] for n, s in choice.items()) <= best * (1 + 1e-9)


def test_a_solver_out_of_time_is_told_from_a_budget_out_of_reach(monkeypatch):
    from types import SimpleNamespace

    space = Space(dict.fromkeys("ab", FEW), dict.fromkeys("ab", 100))
    monkeypatch.setattr("scipy.optimize.milp", lambda *a, **k: SimpleNamespace(x=None, status=1))
    with pytest.raises(SearchError, match="within 5 s, which does not mean"):
        solve(space.layers, table(space, range(8)), [], seconds=5)
