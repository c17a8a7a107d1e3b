"""Ops on spikes that a spiking network over time needs: written here a second time, as sums over indices, and compared.

Kernel sets that have a kernel of their own must give the same integers on any number of threads.
"""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import kernels, ops

MOST = 2**31 - 1
seeds = st.integers(0, 2**32 - 1)
shifts = st.one_of(st.integers(0, 62), st.sampled_from([0, 1, 31, 62]))
steps = st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1)])
widths = st.sampled_from([(1, 1), (6, 2), (32, 2), (33, 1), (63, 3), (64, 8)])
sides = st.integers(1, 5)


def same(op: str, *arguments: object, **more: object) -> np.ndarray:
    """The op by its definition, and by every kernel set that has it."""
    expected = getattr(ops, op)(*arguments, **more)
    for name in kernels.available():
        run = getattr(kernels.get(name), op, None)
        for threads in (1, 3) if run is not None else ():
            found = run(*arguments, **more, threads=threads)
            assert found.dtype == expected.dtype and found.shape == expected.shape, name
            np.testing.assert_array_equal(found, expected, err_msg=f"{op}, {name}, {threads} threads")
    return expected


def codes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Spikes at any density, or counts."""
    if rng.random() < 0.6:
        return (rng.random(shape) < rng.choice([0.0, 0.1, 0.5, 1.0])).astype(np.uint8)
    return rng.integers(0, rng.choice([3, 60]), shape).astype(np.uint8)


def potentials(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.integers(-(2**31), 2**31, shape) >> rng.integers(0, 31, shape)
    return np.where(rng.random(shape) < 0.1, rng.choice([-(2**31), MOST, 0, -1, 1], shape), x).astype(np.int32)


def number(rng: np.random.Generator) -> int:
    return max(int(potentials(rng, (1,))[0]), -MOST)


def scaled(acc: np.ndarray, m: int | np.ndarray, s: int) -> np.ndarray:
    """Python's own integers: no width to overflow."""
    def one(a: int, factor: int) -> int:
        y = int(a) * int(factor)
        y = (y + (1 << (s - 1))) >> s if s else y
        return min(max(y, -(2**31)), MOST)

    return np.vectorize(one, otypes=[np.int32])(acc, m)


def per_head(x: np.ndarray, heads: int) -> np.ndarray:
    """[S, B, H, W, C] -> int64 [S, B, N, heads, d]."""
    return x.reshape(*x.shape[:2], -1, heads, x.shape[4] // heads).astype(np.int64)


@given(seeds, sides, steps)
@settings(max_examples=30, deadline=None)
def test_sum(seed, side, counts):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 128, (s, 2, side, 3, 5)).astype(np.uint8) for s in counts)
    np.testing.assert_array_equal(same("sum", a, b), a.astype(int) + b)


@given(seeds, widths, sides, steps, shifts, st.sampled_from(["channels", "tokens"]))
@settings(max_examples=50, deadline=None)
def test_attention_map(seed, width, side, counts, s, over):
    rng, (channels, heads) = np.random.default_rng(seed), width
    a, b = (codes(rng, (n, 2, side, 2, channels)) for n in counts)
    m = number(rng)
    found = same("attention_map", a, b, over, heads, m, s)
    how = "sbnhi,sblhi->sbnhl" if over == "channels" else "sbnhj,sbnhi->sbjhi"
    pair = np.broadcast_arrays(per_head(a, heads), per_head(b, heads))
    np.testing.assert_array_equal(found, scaled(np.einsum(how, *pair), m, s))


@given(seeds, widths, sides, steps, shifts, st.sampled_from(["channels", "tokens"]), st.sampled_from([0, 1, 3]))
@settings(max_examples=50, deadline=None)
def test_attention_read(seed, width, side, counts, s, over, rows):
    rng, (channels, heads) = np.random.default_rng(seed), width
    x = codes(rng, (counts[0], 2, side, 2, channels))
    edge = 2 * side if over == "tokens" else channels // heads
    chosen = codes(rng, (counts[1], 2, edge, heads, edge))
    m = np.array([[number(rng) for _ in range(heads)] for _ in range(rows)], np.int32) if rows else number(rng)
    found = same("attention_read", chosen, x, over, heads, m, s)
    how = "sbnhl,sblhj->sbnhj" if over == "tokens" else "sbjhi,sbnhi->sbnhj"
    n = max(*counts, rows)
    pair = (np.broadcast_to(y, (n, *y.shape[1:])) for y in (chosen.astype(np.int64), per_head(x, heads)))
    factor = np.asarray(m).reshape(-1, 1, 1, heads, 1) if rows else m
    np.testing.assert_array_equal(found, scaled(np.einsum(how, *pair), factor, s).reshape(n, *x.shape[1:]))


@pytest.mark.parametrize("over", ["channels", "tokens"])
def test_the_map_read_with_all_ones_is_the_linear_attention(over):
    """Without a neuron between them, both halves together are q k^T v, in either order."""
    rng = np.random.default_rng(0)
    q, k, v = (codes(rng, (2, 2, 3, 3, 12)) % 2 for _ in range(3))
    expected = ops.attention(q, k, v, 3, 1, 0)
    if over == "channels":
        chosen = ops.attention_map(q, k, "channels", 3, 1, 0).astype(np.uint8)
        found = ops.attention_read(chosen, v, "tokens", 3, 1, 0)
    else:
        chosen = ops.attention_map(v, k, "tokens", 3, 1, 0).astype(np.uint8)
        found = ops.attention_read(chosen, q, "channels", 3, 1, 0)
    np.testing.assert_array_equal(found, expected)


@given(seeds, widths, sides, steps, shifts)
@settings(max_examples=30, deadline=None)
def test_coincidences(seed, width, side, counts, s):
    rng = np.random.default_rng(seed)
    k, v = (codes(rng, (n, 2, side, 3, width[0])) for n in counts)
    m = number(rng)
    found = same("coincidences", k, v, m, s)
    np.testing.assert_array_equal(found, scaled((k.astype(int) * v).sum((2, 3), keepdims=True), m, s))


@given(seeds, widths, sides, steps)
@settings(max_examples=30, deadline=None)
def test_mask(seed, width, side, counts):
    rng = np.random.default_rng(seed)
    q, chosen = codes(rng, (counts[0], 2, side, 3, width[0])), codes(rng, (counts[1], 2, 1, 1, width[0])) % 2
    np.testing.assert_array_equal(same("mask", q, chosen), np.where(chosen > 0, q, 0))


@given(seeds, st.sampled_from([(1, 1), (1, 4), (4, 4)]), st.integers(0, 40), st.integers(0, 40),
       st.sampled_from(["hard", "soft", "none"]), st.booleans(), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_lif_packed(seed, counts, decay_shift, gain_shift, reset, strict, bits):
    rng = np.random.default_rng(seed)
    x = potentials(rng, (counts[0], 1, 2, 1, 5))
    table = np.sort(potentials(rng, (2**bits - 2,)))
    decay, gain = (number(rng), decay_shift), (number(rng), gain_shift)
    threshold = int(potentials(rng, (1,))[0])
    more = {"amount": number(rng)} if reset == "soft" and rng.random() < 0.5 else {}
    found = same("lif_packed", x, decay, gain, threshold, reset, counts[1], strict, bits=bits, table=table, **more)

    most = 2 ** (bits - 1) - 1
    for index in np.ndindex(x.shape[1:]):
        c = 0
        for t in range(counts[1]):
            drive = int(x[(t if counts[0] > 1 else 0, *index)])
            h = _shift(c * decay[0], decay[1]) + _shift(drive * gain[0], gain[1])
            h = min(max(h, -(2**31)), MOST)
            spike = h > threshold if strict else h >= threshold
            if spike and reset == "hard":
                h = 0
            if spike and reset == "soft":
                h = min(max(h - more.get("amount", threshold), -(2**31)), MOST)
            c = sum(int(h >= int(entry)) for entry in table) - most
            assert -most <= c <= most and found[(t, *index)] == spike


def _shift(x: int, s: int) -> int:
    return (x + (1 << (s - 1))) >> s if s else x


def test_store_counts_the_entries_that_are_reached():
    table = np.array([-15, -5, 5, 15, 15, 25], np.int32)              # 3 bits: codes -3..3, one of them never used
    v = np.array([-99, -16, -15, -5, 4, 5, 14, 15, 24, 25, MOST], np.int32)
    assert ops.store(v, table).tolist() == [-3, -3, -2, -1, -1, 0, 0, 2, 2, 3, 3]


def test_a_soft_reset_may_take_another_amount_than_the_threshold():
    x = np.array([60, 60, 60, 60], np.int32).reshape(4, 1, 1, 1, 1)
    run = {amount: ops.lif(x, (1, 0), (1, 0), 100, "soft", 4, False, amount).ravel().tolist() for amount in (None, 100, 200)}
    assert run == {None: [0, 1, 0, 1], 100: [0, 1, 0, 1], 200: [0, 1, 0, 0]}   # 120 - 100 = 20, 80, 140; 120 - 200 = -80


@given(seeds, st.sampled_from(["u8", "s8", "i32"]), st.sampled_from([1, 3, 16, 33]), sides, sides, st.sampled_from([2, 3, 4]))
@settings(max_examples=30, deadline=None)
def test_upsample(seed, kind, channels, height, width, factor):
    rng = np.random.default_rng(seed)
    x = (rng.integers(-MOST, MOST, (2, 2, height, width, channels)) if kind == "i32" else codes(
        rng, (2, 2, height, width, channels))).astype({"u8": np.uint8, "s8": np.int8, "i32": np.int32}[kind])
    y = same("upsample", x, "nearest", factor)
    assert y.dtype == x.dtype
    for i, j in np.ndindex(factor, factor):
        np.testing.assert_array_equal(y[:, :, i::factor, j::factor], x)
    if kind == "i32" and factor != 3:
        z = same("upsample", x, "bilinear", factor)
        at = {n: np.clip((np.arange(n * factor) + 0.5) / factor - 0.5, 0, n - 1) for n in (height, width)}
        rows, columns = (np.maximum(0, 1 - np.abs(at[n][:, None] - np.arange(n))) for n in (height, width))
        exact = np.einsum("yh,sbhwc,xw->sbyxc", rows, x.astype(np.float64), columns)  # exact: numbers of 43 bits
        np.testing.assert_array_equal(z, np.floor(exact + 0.5))


def test_bilinear_by_two_weighs_nine_three_three_one():
    x = np.zeros((1, 1, 3, 3, 1), np.int32)
    x[0, 0, 1, 1] = 16
    expected = [[0, 0, 0, 0, 0, 0], [0, 1, 3, 3, 1, 0], [0, 3, 9, 9, 3, 0], [0, 3, 9, 9, 3, 0], [0, 1, 3, 3, 1, 0], [0] * 6]
    assert ops.upsample(x, "bilinear", 2)[0, 0, :, :, 0].tolist() == expected
