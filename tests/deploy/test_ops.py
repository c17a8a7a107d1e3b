"""numpy = scalar = every instruction set of this machine, on odd shapes and extreme numbers; and a few by hand."""
from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import kernels, ops
from bitspike.deploy.program import OPS

from . import test_ops_spikes

COMPILED = kernels.available()[1:]
MOST = 2**31 - 1
channels = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 63, 64])
sides = st.integers(1, 9)
shifts = st.one_of(st.integers(0, 62), st.sampled_from([0, 1, 31, 32, 62]))
seeds = st.integers(0, 2**32 - 1)
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


def potentials(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """int32, of every magnitude, with the extremes among them."""
    x = rng.integers(-(2**31), 2**31, shape) >> rng.integers(0, 31, shape)
    extreme = rng.choice([-(2**31), MOST, 0, -1, 1], shape)
    return np.where(rng.random(shape) < 0.1, extreme, x).astype(np.int32)


def multipliers(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.maximum(potentials(rng, (count,)), -MOST)


def codes(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    lo, hi, dtype = {"u8": (0, 255, np.uint8), "s8": (-128, 127, np.int8)}[kind]
    return rng.choice([rng.integers(lo, hi + 1), lo, hi, 0, 1], shape).astype(dtype)


def values(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    return potentials(rng, shape) if kind == "i32" else codes(rng, kind, shape)


def same(op: str, *arguments: object, **more: object) -> np.ndarray:
    """The op on every kernel set; the numbers, shape and dtype must be numpy's."""
    expected = getattr(kernels.get("numpy"), op)(*arguments, **more, threads=1)
    for name in COMPILED:
        for threads in (1, 3):
            found = getattr(kernels.get(name), op)(*arguments, **more, threads=threads)
            assert found.dtype == expected.dtype and found.shape == expected.shape, name
            np.testing.assert_array_equal(found, expected, err_msg=f"{op}, {name}, {threads} threads")
    return expected


def same_conv(x: np.ndarray, *arguments: object) -> np.ndarray:
    signed = x.dtype == np.int8
    expected = kernels.get("numpy").prepare_conv(*arguments, signed)(x, 1)
    for name in COMPILED:
        for threads in (1, 3):
            found = kernels.get(name).prepare_conv(*arguments, signed)(x, threads)
            np.testing.assert_array_equal(found, expected, err_msg=f"conv, {name}, {threads} threads")
    return expected


@given(
    seeds, st.sampled_from(["u8", "s8"]), st.sampled_from(["dense", "grouped", "depthwise"]), channels,
    st.sampled_from([1, 3, 16, 17, 33, 49, 64, 80]), pairs, pairs, st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(sides, sides), shifts,
)
@settings(max_examples=150, deadline=None)
def test_conv(seed, kind, form, inputs, outputs, kernel, stride, padding, size, shift):
    rng = np.random.default_rng(seed)
    groups = {"dense": 1, "grouped": int(rng.integers(2, 4)), "depthwise": inputs}[form]
    group_inputs = 1 if form == "depthwise" else inputs
    group_outputs = int(rng.choice([1, 1, 3])) if form == "depthwise" else outputs
    if form == "grouped":
        group_inputs, group_outputs = min(inputs, 17), min(outputs, 20)
    size = tuple(max(n, k) for n, k in zip(size, kernel, strict=True))
    x = codes(rng, kind, (2, 1, *size, group_inputs * groups))
    weight = codes(rng, "s8", (group_outputs * groups, *kernel, group_inputs))
    pad = codes(rng, kind, (group_inputs * groups,)).astype(np.int16)
    count = group_outputs * groups
    same_conv(x, weight, stride, padding, groups, pad, multipliers(rng, count), shift, potentials(rng, (count,)))


def test_conv_at_the_accumulator_limit():
    # The sum comes within 2 % of 2^31; a saturating or 16-bit path would show.
    inputs = 65_536
    for sign in (1, -1):
        x = np.full((1, 1, 1, 1, inputs), 255, np.uint8)
        weight = np.full((3, 1, 1, inputs), 127 * sign, np.int8)
        one, zero, pad = np.ones(3, np.int32), np.zeros(3, np.int32), np.zeros(inputs, np.int16)
        y = same_conv(x, weight, (1, 1), (0, 0), 1, pad, one, 0, zero)
        assert (y == inputs * 255 * 127 * sign).all()


def test_many_images_and_few_rows_for_many_threads():
    rng = np.random.default_rng(3)
    x = codes(rng, "u8", (1, 7, 9, 5, 3))
    arguments = (codes(rng, "s8", (5, 3, 3, 3)), (1, 1), (1, 1), 1, np.zeros(3, np.int16), multipliers(rng, 5), 9,
                 potentials(rng, (5,)))
    expected = kernels.get("numpy").prepare_conv(*arguments, False)(x, 1)
    for name in COMPILED:
        run = kernels.get(name).prepare_conv(*arguments, False)
        for threads in (1, 2, 5, 64):
            np.testing.assert_array_equal(run(x, threads), expected)
            np.testing.assert_array_equal(run(x[:, :1], threads), expected[:, :1])


@given(seeds, channels, sides, shifts, st.booleans(), st.sampled_from(["u8", "s8"]))
@settings(max_examples=60, deadline=None)
def test_quantize(seed, count, side, shift, per_channel, dtype):
    rng = np.random.default_rng(seed)
    lo, hi = sorted(rng.integers(*{"u8": (0, 256), "s8": (-128, 128)}[dtype], 2).tolist())
    m = multipliers(rng, count) if per_channel else int(multipliers(rng, 1)[0])
    same("quantize", potentials(rng, (2, 1, side, 3, count)), m, shift, lo, hi, dtype)


@given(seeds, channels, sides, shifts, st.booleans(), st.booleans(), st.sampled_from(["u8", "s8", "i32"]))
@settings(max_examples=60, deadline=None)
def test_affine(seed, count, side, shift, m_per_channel, b_per_channel, kind):
    rng = np.random.default_rng(seed)
    m = multipliers(rng, count) if m_per_channel else int(multipliers(rng, 1)[0])
    b = potentials(rng, (count,)) if b_per_channel else int(potentials(rng, (1,))[0])
    same("affine", values(rng, kind, (1, 2, side, 2, count)), m, shift, b)


@given(seeds, channels, sides, st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1)]))
@settings(max_examples=40, deadline=None)
def test_add(seed, count, side, steps):
    rng = np.random.default_rng(seed)
    a, b = (potentials(rng, (s, 2, side, 3, count)) for s in steps)
    same("add", a, b)


@given(seeds, st.sampled_from([(1, 1), (3, 1), (6, 2), (32, 2), (48, 1), (63, 3), (130, 2)]), sides,
       st.tuples(*[st.sampled_from([1, 2])] * 3), shifts)
@settings(max_examples=50, deadline=None)
def test_attention(seed, width, side, steps, shift):
    rng = np.random.default_rng(seed)
    total, heads = width
    q, k, v = (rng.integers(0, rng.choice([2, 9, 60, 256]), (s, 2, side, 3, total)).astype(np.uint8) for s in steps)
    same("attention", q, k, v, heads, int(multipliers(rng, 1)[0]), shift)


@pytest.mark.parametrize("largest", [(1, 1, 1), (4, 4, 4), (255, 4, 4), (15, 30, 30)])
@pytest.mark.parametrize(
    ("tokens", "width"), [(32, 16), (33, 31), (63, 32), (64, 33), (65, 64), (80, 65), (196, 32), (196, 45)]
)
def test_attention_of_whole_tiles(tokens, width, largest):
    rng = np.random.default_rng(tokens * width)
    for q, k, v in ([rng.integers(0, most + 1, (1, 2, tokens, 1, 2 * width)).astype(np.uint8) for most in largest],
                    [np.full((1, 1, tokens, 1, 2 * width), most, np.uint8) for most in largest]):
        for m, s in ((2**30, 28), (2**30, 40), (700000001, 36), (-(2**30), 10)):
            same("attention", q, k, v, 2, m, s)


@given(seeds, channels, st.tuples(sides, sides), pairs, pairs, st.sampled_from(["u8", "s8", "i32"]))
@settings(max_examples=60, deadline=None)
def test_maxpool(seed, count, size, kernel, stride, kind):
    rng = np.random.default_rng(seed)
    size = tuple(max(n, k) for n, k in zip(size, kernel, strict=True))
    padding = tuple(int(rng.integers(0, k)) for k in kernel)
    same("maxpool", values(rng, kind, (1, 2, *size, count)), kernel, stride, padding)


@given(seeds, channels, sides, st.sampled_from(["space", "time"]), st.sampled_from(["u8", "s8", "i32"]))
@settings(max_examples=60, deadline=None)
def test_mean(seed, count, side, over, kind):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(-(2**24), 2**24))
    same("mean", values(rng, kind, (3, 2, side, 2, count)), over, m)


@given(seeds, channels, st.sampled_from([(1, 1), (1, 4), (4, 4)]), shifts, shifts,
       st.sampled_from(["hard", "soft", "none"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lif(seed, count, steps, decay_shift, gain_shift, reset, strict):
    rng = np.random.default_rng(seed)
    decay, gain = (int(multipliers(rng, 1)[0]), decay_shift), (int(multipliers(rng, 1)[0]), gain_shift)
    x = potentials(rng, (steps[0], 2, 3, 1, count))
    same("lif", x, decay, gain, int(potentials(rng, (1,))[0]), reset, steps[1], strict)


@given(seeds, channels, st.sampled_from([(1, 1), (1, 4), (4, 4)]), shifts, st.integers(1, 255), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_ielif(seed, count, steps, decay_shift, levels, fraction_bits):
    rng = np.random.default_rng(seed)
    decay = (int(multipliers(rng, 1)[0]), decay_shift)
    same("ielif", potentials(rng, (steps[0], 2, 3, 1, count)), levels, decay, steps[1], fraction_bits)


@given(seeds, channels, sides)
@settings(max_examples=20, deadline=None)
def test_lookup(seed, count, side):
    rng = np.random.default_rng(seed)
    table = rng.integers(-128, 128, (count, 256)).astype(np.int8)
    same("lookup", codes(rng, "u8", (1, 2, side, 3, count)), table)


def test_every_op_has_a_test():
    assert {f"test_{name}" for name in OPS} <= set(globals()) | set(vars(test_ops_spikes))


# By hand.

def test_rounding_shift_rounds_half_up_and_saturates():
    x = np.array([5, 6, 7, -5, -6, -7, MOST, -(2**31)], np.int32).reshape(1, 1, 1, 1, 8)
    assert same("affine", x, 1, 2, 0).ravel()[:6].tolist() == [1, 2, 2, -1, -1, -2]
    assert same("affine", x, 2, 0, 0).ravel()[6:].tolist() == [MOST, -(2**31)]


def test_padding_value_is_seen_by_border_pixels_only():
    x = np.ones((1, 1, 3, 3, 1), np.uint8)
    weight, one, zero = np.ones((1, 3, 3, 1), np.int8), np.ones(1, np.int32), np.zeros(1, np.int32)
    y = same_conv(x, weight, (1, 1), (1, 1), 1, np.array([10], np.int16), one, 0, zero)
    assert y[0, 0, :, :, 0].tolist() == [[54, 36, 54], [36, 9, 36], [54, 36, 54]]


def test_mean_is_rounded_half_up():
    x = np.array([[1, -1], [2, -2]], np.int32).reshape(1, 1, 2, 1, 2)
    assert same("mean", x, "space", 1).ravel().tolist() == [2, -1]       # 1.5 -> 2, -1.5 -> -1
    assert same("mean", x.reshape(2, 1, 1, 1, 2), "time", 3).ravel().tolist() == [5, -4]


def test_lif_by_hand():
    x = np.array([60, 60, 100, 10], np.int32).reshape(4, 1, 1, 1, 1)     # threshold 100, decay 1/2
    spikes = {reset: same("lif", x, (1, 1), (1, 0), 100, reset, 4, False).ravel().tolist() for reset in ("hard", "soft")}
    # h: 60, 90, 145 -> spike; then hard: 10; soft: 45 / 2 + 10 = 33
    assert spikes == {"hard": [0, 0, 1, 0], "soft": [0, 0, 1, 0]}
    exact = np.full((1, 1, 1, 1, 1), 100, np.int32)
    assert same("lif", exact, (1, 1), (1, 0), 100, "hard", 1, True).item() == 0
    assert same("lif", exact, (1, 1), (1, 0), 100, "hard", 1, False).item() == 1


def test_ielif_carries_what_it_did_not_emit():
    x = np.array([24, 24, 160], np.int32).reshape(3, 1, 1, 1, 1)         # F = 4: 1.5, 1.5, 10 spikes; D = 4; no decay
    assert same("ielif", x, 4, (1, 0), 3, 4).ravel().tolist() == [2, 1, 4]


# What the extension refuses.

@pytest.mark.skipif(not COMPILED, reason="no extension")
def test_wrong_arguments_are_refused_not_read_out_of_bounds():
    scalar = kernels.get("scalar")
    x = np.zeros((1, 1, 4, 4, 3), np.int32)
    with pytest.raises(TypeError):
        scalar.quantize(x.astype(np.float32), 1, 0, 0, 1, "u8", threads=1)
    with pytest.raises(TypeError):
        scalar.add(x[:, :, ::2], x[:, :, ::2], threads=1)
    with pytest.raises(ValueError, match="per channel"):
        scalar.quantize(x, np.ones(2, np.int32), 0, 0, 1, "u8", threads=1)
    with pytest.raises(ValueError, match="shift"):
        scalar.affine(x, 1, 63, 0, threads=1)
    with pytest.raises(ValueError, match="kernel is larger"):
        scalar.maxpool(x, (5, 5), (1, 1), (0, 0), threads=1)
    with pytest.raises(ValueError, match="pad_value"):
        one = np.ones(1, np.int32)
        scalar.prepare_conv(np.zeros((1, 1, 1, 3), np.int8), (1, 1), (0, 0), 1, np.full(3, -1), one, 0, one, False)


def test_use_chooses_and_refuses():
    before = kernels.active()
    try:
        for name in kernels.available():
            kernels.use(name)
            assert kernels.active() == name
        with pytest.raises(ValueError, match="numpy"):
            kernels.use("abacus")
    finally:
        kernels.use(before)


@pytest.mark.skipif(not COMPILED or not hasattr(os, "fork"), reason="needs the extension and fork")
def test_threads_work_in_a_forked_child():
    a = np.ones((1, 1, 300, 300, 3), np.int32)
    best = kernels.get(COMPILED[-1])
    best.add(a, a, threads=3)
    child = os.fork()
    if child == 0:
        os._exit(0 if (best.add(a, a, threads=3) == 2).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_numpy_rounding_shift():
    assert ops.rshift(np.array([2**62, -(2**62)]), 62).tolist() == [1, -1]
