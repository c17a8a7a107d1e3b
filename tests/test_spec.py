"""Specs: patterns, errors, JSON."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitspike.spec import KINDS, OPTIONS, QuantSpec, Scheme, SpecError


def schemes():
    def options(kind):
        known = OPTIONS.get(kind, {})
        return st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in known.items()})

    # 32-bit membranes take no options
    widths = st.sampled_from([(kind, bits) for kind in sorted(KINDS) for bits in KINDS[kind]])
    return widths.flatmap(lambda pair: st.builds(Scheme, st.just(pair[0]), st.just(pair[1]), st.sampled_from(
        ["channel", "tensor"]), st.just({}) if pair == ("membrane", 32) else options(pair[0])))


@given(st.lists(st.tuples(st.text(min_size=1), schemes()), max_size=5))
def test_json_round_trip(rules):
    spec = QuantSpec(rules)
    again = QuantSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)


@given(schemes())
def test_scheme_round_trip(scheme):
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_last_rule_holds_and_layers_without_a_rule_stay_full():
    spec = QuantSpec([("*", Scheme("lsq", 4)), ("head", Scheme("full")), ("a.?", Scheme("binary"))])
    found = spec.resolve(["stem", "a.1", "head"])
    assert {name: s.kind for name, s in found.items()} == {"stem": "lsq", "a.1": "binary", "head": "full"}
    assert QuantSpec({"stem": Scheme("lsq", 2)}).resolve(["stem", "head"]).keys() == {"stem"}


def test_membrane_rules_are_apart():
    spec = QuantSpec([("w", Scheme("lsq", 4)), ("n", Scheme("membrane", 8))])
    assert spec.resolve(["w"]).keys() == {"w"}
    assert spec.resolve(["n"], membrane=True).keys() == {"n"}


def test_a_rule_that_matches_nothing_names_the_nearest():
    with pytest.raises(SpecError, match=r"'haed' matches no layer \(nearest: 'head'\). 2 layers .*stem, head.*"
                                        r"bitspike layers RECIPE.*bitspike\.layers\.quantizable\(model\)"):
        QuantSpec({"haed": Scheme("lsq", 4)}).resolve(["stem", "head"])
    with pytest.raises(SpecError, match="0 layers"):
        QuantSpec({"*": Scheme("lsq", 4)}).resolve([])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Scheme("lqs", 4), r"'lqs' \(nearest: 'lsq'\)"),
    (lambda: Scheme("lsq", 1), 'Scheme\\("binary"\\)'),
    (lambda: Scheme("lsq", 9), "bits=9"),
    (lambda: Scheme("membrane", 32, options={"tanh": False}), "the tanh alone.*nothing to act on"),
    (lambda: Scheme("membrane", 32, options={"scale": "batch"}), "the tanh alone"),
    (lambda: Scheme("lsq"), "bits=0"),
    (lambda: Scheme("lsq", True), "bits=True"),
    (lambda: Scheme("lsq", 4.0), "bits=4.0"),  # type: ignore[arg-type]
    (lambda: Scheme("pow2", 5), "2, 3, 4"),
    (lambda: Scheme("lsq", 4, per="row"), "'channel', 'tensor'"),
    (lambda: Scheme("lsq", 4, options={"int": "tensor"}), r"no option 'int' \(nearest: 'init'\)"),
    (lambda: Scheme("binary", options={"zero": "minus"}), "zero='minus'"),
    (lambda: Scheme("full", options={"x": 1}), "allowed: none"),
    (lambda: QuantSpec([("a", 4)]), "a rule is a pair"),  # type: ignore[list-item]
    (lambda: QuantSpec.from_json("{"), "must be JSON"),
    (lambda: QuantSpec.from_json("[" * 100_000), "must be JSON"),
    (lambda: QuantSpec.from_json("{}"), "list of rules"),
    (lambda: QuantSpec.from_json('[{"kind": "lsq"}]'), "with 'layers'"),
    (lambda: QuantSpec.from_json('[{"layers": "*"}]'), "with a 'kind'"),
    (lambda: QuantSpec.from_json('[{"layers": "*", "kind": []}]'), "unknown scheme kind"),
    (lambda: QuantSpec.from_json('[{"layers": "*", "kind": "lsq", "bit": 4}]'), "no key 'bit'"),
    (lambda: QuantSpec.from_json('[{"layers": "*", "kind": "lsq", "bits": 4, "options": 1}]'), "must be an object"),
])
def test_errors(make, message):
    with pytest.raises(SpecError, match=message):
        make()
