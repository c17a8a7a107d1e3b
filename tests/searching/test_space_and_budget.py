"""Candidates, spaces and limits: what is meant, and what cannot be."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitspike.searching import CANDIDATES, Budget, SearchError, make_space, parse_candidates
from bitspike.searching.space import Space, key_of
from bitspike.spec import Scheme

NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))


def test_candidates_parse_and_name_themselves():
    found = parse_candidates("uniform:2,8 pow2:3 binary")
    assert [key_of(s) for s in found] == ["uniform:2", "uniform:8", "pow2:3", "binary:1"]
    assert found[0].options == {"step": "normal"} and found[3].options == {"scale": "mean"}
    assert key_of(Scheme("uniform", 2)) != key_of(found[0]) and len({key_of(s) for s in CANDIDATES}) == len(CANDIDATES)


@pytest.mark.parametrize("text,match", [("", "no candidates"), ("unifrom:2", "unknown scheme 'unifrom'"),
                                        ("uniform:1", "binary"), ("uniform:x", "uniform:x"), ("membrane:4", "unknown scheme")])
def test_candidates_that_cannot_be_meant(text, match):
    with pytest.raises(SearchError, match=match):
        parse_candidates(text)


def test_last_pattern_holds_and_the_rest_is_left_out():
    eight = [Scheme("uniform", 8)]
    space = make_space(NET, {"*": CANDIDATES, "0": eight})
    assert space.layers["0"] == tuple(eight) and space.layers["1"] == CANDIDATES
    assert list(make_space(NET, {"3": eight}).layers) == ["3"]
    assert space.weights == {"0": 36, "1": 16, "3": 32}
    assert space.size == len(CANDIDATES) ** 2


@pytest.mark.parametrize("candidates,match", [({"nothing*": CANDIDATES}, "no such layer"), ({"*": []}, "name at least one"),
                                              ({"*": [Scheme("membrane", 4)]}, "no scheme of weights"),
                                              ({"*": ["uniform"]}, "no scheme")])
def test_spaces_that_cannot_be_meant(candidates, match):
    with pytest.raises(SearchError, match=match):
        make_space(NET, candidates)


def test_no_layers_and_layers_without_a_choice():
    with pytest.raises(SearchError, match="nothing to search"):
        make_space(nn.ReLU())
    with pytest.raises(SearchError, match="one weight per output"):
        make_space(nn.Conv2d(4, 4, 1, groups=4), [Scheme("binary")])
    with pytest.raises(SearchError, match="has no candidate of kind pow2"):
        make_space(NET, [Scheme("uniform", 4)]).only(["pow2"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(0, 2**31), st.floats(1, 8))
def test_filled_random_choices_leave_no_room(weights, seed, most):
    names = [f"l{i}" for i in range(len(weights))]
    space = Space(dict.fromkeys(names, CANDIDATES), dict(zip(names, weights, strict=True)))
    choice = space.random_filled(seed, most)
    assert space.bits(choice) <= most + 1e-6 and choice == space.random_filled(seed, most)
    # no single layer could have more
    room = most * sum(weights) + 1e-6 - sum(space.weights[n] * s.bits for n, s in choice.items())
    steps = [space.weights[n] * (s.bits - choice[n].bits) for n in names for s in CANDIDATES if s.bits > choice[n].bits]
    assert all(step > room for step in steps)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(0, 2**31), st.floats(1, 8))
def test_random_choices_keep_to_the_limit(weights, seed, most):
    names = [f"l{i}" for i in range(len(weights))]
    space = Space(dict.fromkeys(names, CANDIDATES), dict(zip(names, weights, strict=True)))
    choice = space.random(seed, most, draws=200)
    assert space.bits(choice) <= most + 1e-6 and choice == space.random(seed, most, draws=200)


def test_random_choices_of_equal_bits_are_equally_likely():
    """Of two equal layers with 3 bits on average, every pair whose bits add up to 6 comes as often as any other."""
    space = Space(dict.fromkeys("ab", tuple(Scheme("uniform", b) for b in (2, 3, 4, 8))), {"a": 50, "b": 50})
    drawn = [tuple(s.bits for s in space.random(seed, 3.0).values()) for seed in range(300)]
    assert {pair: drawn.count(pair) > 70 for pair in ((2, 4), (3, 3), (4, 2))} == dict.fromkeys(((2, 4), (3, 3), (4, 2)), True)
    assert len(drawn) == sum(map(drawn.count, ((2, 4), (3, 3), (4, 2))))


def test_a_random_choice_in_a_large_space_is_close_to_the_limit():
    names = [f"l{i}" for i in range(112)]
    space = Space(dict.fromkeys(names, CANDIDATES), dict.fromkeys(names, 1000))
    assert all(1.95 <= space.bits(space.random(seed, 2.0)) <= 2 for seed in range(5))


@pytest.mark.parametrize("kind", ["random", "random_filled"])
def test_random_choice_out_of_reach(kind):
    with pytest.raises(SearchError, match="smallest average of these candidates is 4"):
        getattr(make_space(NET, [Scheme("uniform", 4)]), kind)(0, 3)


def test_a_budget_given_twice():
    with pytest.raises(SearchError, match="bits is limited twice"):
        Budget.parse("bits=3", "bytes=1kB", "bits=4")


def test_budgets_parse():
    assert Budget.parse("bytes=900kB") == Budget(bytes=900_000) and Budget.parse("bytes=1MiB").bytes == 2**20
    assert Budget.parse("energy=25uJ", "bits=3.2") == Budget(bits=3.2, energy_pj=25e6)
    assert str(Budget.parse("drop=0", "bytes=10")) == "bytes=10, drop=0"


@pytest.mark.parametrize("text", ["bits", "bits=", "bits=3kB", "energy=25", "size=3", "bits=-1", "bits=nan", "bytes=1e999"])
def test_budgets_that_cannot_be_meant(text):
    with pytest.raises(SearchError, match=r"allowed are bytes|above 0"):
        Budget.parse(text)


def test_no_or_nonpositive_budget():
    with pytest.raises(SearchError, match="no budget"):
        Budget()
    with pytest.raises(SearchError, match="above 0"):
        Budget(bits=0.0)
