"""The extension's unpacking and accumulator bound against what they replace."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import kernels
from bitspike.deploy.packing import BITS, code_table, pack_codes, unpack_codes
from bitspike.deploy.program import _accumulator_bound

extension = kernels.extension(kernels.available()[-1])
pytestmark = pytest.mark.skipif(extension is None, reason="there is no compiled extension")
SCHEMES = [{"kind": kind, "bits": bits} for kind, all_bits in BITS.items() for bits in all_bits]


def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "extension", lambda name=None: None)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 63, 64, 65, 1001])
def test_unpacking(scheme: dict, count: int, monkeypatch: pytest.MonkeyPatch):
    codes = np.random.default_rng(count).choice(code_table(scheme), count)
    packed = pack_codes(codes, scheme)
    np.testing.assert_array_equal(unpack_codes(packed, (count,), scheme), codes)
    without_extension(monkeypatch)
    np.testing.assert_array_equal(unpack_codes(packed, (count,), scheme), codes)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_bound(data: st.DataObject):
    groups, each, outputs = (data.draw(st.integers(1, 4)) for _ in range(3))
    taps = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weight = rng.integers(-128, 128, (outputs * groups, *taps, each)).astype(np.int8)
    top = data.draw(st.sampled_from([0, 1, 255, 1 << 15]))
    largest = np.full(groups * each, top) if data.draw(st.booleans()) else rng.integers(0, top + 1, groups * each)
    spread = np.tile(largest.reshape(groups, 1, 1, 1, each), (1, outputs, 1, 1, 1)).reshape(groups * outputs, 1, 1, each)
    expected = int((np.abs(weight.astype(np.int64)) * spread).sum((1, 2, 3)).max())
    assert _accumulator_bound(weight, largest, groups) == expected
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        assert _accumulator_bound(weight, largest, groups) == expected


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="length"):
        extension.unpack(np.zeros(2, np.uint8), 4, np.zeros(16, np.int8), np.empty(5, np.int8))
    with pytest.raises(ValueError, match="every field"):
        extension.unpack(np.zeros(2, np.uint8), 4, np.zeros(8, np.int8), np.empty(4, np.int8))
    with pytest.raises(ValueError, match="input channel"):
        extension.bound(np.zeros((2, 1, 1, 3), np.int8), np.zeros(2, np.int64), 1)
    with pytest.raises(ValueError, match=r"2\^15"):
        extension.bound(np.zeros((2, 1, 1, 1), np.int8), np.full(1, 1 << 16), 1)
