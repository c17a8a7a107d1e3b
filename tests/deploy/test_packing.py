from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import ArtifactError
from bitspike.deploy.artifact import pack_codes, unpack_codes
from bitspike.deploy.packing import BITS, code_table, packed_bytes

SCHEMES = [{"kind": kind, "bits": bits} for kind, allowed in BITS.items() for bits in allowed]


@given(st.sampled_from(SCHEMES), st.integers(0, 2**32 - 1), st.tuples(*[st.integers(1, 5)] * 4))
@settings(max_examples=100, deadline=None)
def test_round_trip(scheme, seed, shape):
    codes = np.random.default_rng(seed).choice(code_table(scheme), shape)
    packed = pack_codes(codes, scheme)
    assert packed.size == packed_bytes(codes.size, scheme)
    np.testing.assert_array_equal(unpack_codes(packed, shape, scheme), codes)
    np.testing.assert_array_equal(unpack_codes(packed.tobytes(), shape, scheme), codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_more_than_one_block(scheme):
    codes = np.random.default_rng(0).choice(code_table(scheme), (1 << 20) + 13)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, scheme), codes.shape, scheme), codes)


def test_bytes_by_hand():
    # codes 1, -2, 3 of 3 bits: fields 001, 110, 011, first in the low bits: 0 1111 0001 and one more byte
    assert pack_codes(np.array([1, -2, 3]), {"kind": "uniform", "bits": 3}).tolist() == [0b11110001, 0b0]
    assert pack_codes(np.array([-64, 0]), {"kind": "pow2", "bits": 4}).tolist() == [0b00001111]
    assert code_table({"kind": "pow2", "bits": 4}).tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64]


@pytest.mark.parametrize(("codes", "scheme"), [
    ([0], {"kind": "binary", "bits": 1}), ([3], {"kind": "pow2", "bits": 4}), ([8], {"kind": "uniform", "bits": 4}),
    ([300], {"kind": "uniform", "bits": 8}), ([-129], {"kind": "uniform", "bits": 8}), ([2**40], {"kind": "pow2", "bits": 2}),
    ([0.5], {"kind": "uniform", "bits": 2}), ([0], {"kind": "uniform", "bits": 9}), ([0], {"kind": "binary", "bits": 2}),
    ([0], {"kind": "uniform", "bits": True}), ([0], {"kind": "ternary", "bits": 2}), ([0], {"kind": "pow2"}), ([0], "pow2"),
    ([0], {"kind": ["pow2"], "bits": 2}),
], ids=str)
def test_what_cannot_be_packed(codes, scheme):
    with pytest.raises(ArtifactError):
        pack_codes(np.array(codes), scheme)


def test_what_cannot_be_unpacked():
    scheme = {"kind": "uniform", "bits": 3}
    with pytest.raises(ArtifactError, match="2 bytes"):
        unpack_codes(bytes(2), (2,), scheme)
    with pytest.raises(ArtifactError, match="zero bits"):
        unpack_codes(bytes([0x80]), (2,), scheme)
