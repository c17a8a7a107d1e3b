"""Every variant of a convolution, on every instruction set, with any epilogue, equals the numpy definition."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import ops

_kernels = pytest.importorskip("bitspike.deploy._kernels", reason="the compiled extension is not installed")

SETS = _kernels.available()
VARIANTS = _kernels.variants()
MOST = 2**31 - 1
sizes = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 33, 63, 64, 65, 130])
#: name -> (smallest, largest code); what an input of counts, spikes, pixels or signed codes holds
RANGES = {"spikes": (0, 1), "counts": (0, 4), "many": (0, 15), "pixels": (0, 255), "signed": (-127, 127)}
#: name -> weights drawn from
WEIGHTS = {
    "bipolar": [-1, 1], "ternary": [-1, 0, 1], "two bits": [-2, -1, 0, 1], "four bits": list(range(-8, 8)),
    "lowest": [-8], "powers": [0, *(s << e for e in range(7) for s in (1, -1))], "bytes": list(range(-128, 128)),
    "extreme": [-128, 127],
}


def draw(rng: np.random.Generator, shape: tuple[int, ...], density: float | None, lo: int, hi: int) -> np.ndarray:
    """Codes lo..hi of that share of nonzeros; None: a single one."""
    codes = rng.integers(lo, hi + 1, shape)
    codes[codes == 0] = hi
    keep = rng.random(shape) < (density or 0)
    if density is None:
        keep.flat[rng.integers(keep.size)] = True
    return np.where(keep, codes, 0).astype(np.int8 if lo < 0 else np.uint8)


def quantizer(rng: np.random.Generator, channels: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    count = channels if rng.random() < 0.4 else 1
    m = (rng.integers(-MOST, MOST, count) >> rng.integers(0, 31)).astype(np.int32)
    if rng.random() < 0.4:
        m = np.full(count, rng.choice([1, 2, 3, 4, 7, 255]), np.int32)
    lo, hi = [(0, 1), (0, 4), (0, 255), (-127, 127), (-3, 2)][rng.integers(5)]
    return m, int(rng.choice([0, 1, 16, 22, 31, 32, 40, 62, rng.integers(63)])), lo, hi, np.full(shape, 99, np.uint8)


def epilogue(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, Any, list[tuple[Any, ...]]]:
    """A residual, an output and quantizers, each of them or none."""
    residual = (rng.integers(-MOST - 1, MOST, shape) >> rng.integers(0, 20)).astype(np.int32)
    out = np.full(shape, 12345, np.int32)
    codes = [quantizer(rng, shape[2], shape) for _ in range(rng.integers(3))]
    return residual if rng.random() < 0.5 else None, out if rng.random() < 0.7 else None, codes


def expect(x: np.ndarray, residual: Any, out: Any, codes: list[tuple[Any, ...]]) -> tuple[Any, list[np.ndarray]]:
    """What the numpy definitions make of potentials [H, W, C]: the output, if one is wanted, and each quantizer's codes."""
    y = x if residual is None else ops.add(x[None, None], residual[None, None])[0, 0]
    made = []
    for m, s, lo, hi, _ in codes:
        made.append(ops.quantize(y[None, None], m if len(m) > 1 else int(m[0]), s, lo, hi, "s8" if lo < 0 else "u8")[0, 0])
    return y if out is not None else None, made


def check(run: Any, x: np.ndarray, residual: Any, out: Any, codes: list[tuple[Any, ...]], what: str) -> None:
    """run(residual, out, codes) -> counts of nonzeros must do what numpy does with potentials x; also in place."""
    expected, made = expect(x, residual, out, codes)
    for in_place in (False, True) if residual is not None and out is not None else (False,):
        to = None if out is None else residual.copy() if in_place else out.copy()
        fresh = [(*q[:4], q[4].copy()) for q in codes]
        nonzero = run(to if in_place else residual, to, fresh)
        if expected is not None:
            np.testing.assert_array_equal(to, expected, err_msg=what)
        for q, want in zip(fresh, made, strict=True):
            np.testing.assert_array_equal(q[4].view(want.dtype), want, err_msg=what)
        assert nonzero == [int(np.count_nonzero(want)) for want in made], what


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(sorted(RANGES)), weights=st.sampled_from(sorted(WEIGHTS)),
    channels=sizes, outputs=sizes, groups=st.sampled_from([1, 1, 1, 2, 0]), height=st.integers(1, 8),
    width=st.integers(1, 11), kernel=st.sampled_from([(1, 1), (3, 3), (1, 4), (2, 3), (5, 5), (4, 7), (7, 7)]),
    stride=st.sampled_from([(1, 1), (2, 2), (1, 3)]), padded=st.booleans(), pad_codes=st.booleans(),
    density=st.sampled_from([0.0, 1.0, 0.15, 0.5, None]), shift=st.sampled_from([0, 1, 12, 20, 32, 40, 62]),
)
def test_every_variant_is_the_definition(
    seed, kind, weights, channels, outputs, groups, height, width, kernel, stride, padded, pad_codes, density, shift
):
    rng = np.random.default_rng(seed)
    if groups == 0:  # depthwise
        groups = outputs = channels
    elif groups > 1:
        channels, outputs = 2 * channels, 2 * outputs
    padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
    height, width = max(height, kernel[0]), max(width, kernel[1])
    lo, hi = RANGES[kind]
    x = draw(rng, (height, width, channels), density, lo, hi)
    w = rng.choice(WEIGHTS[weights], (outputs, *kernel, channels // groups)).astype(np.int8)
    pad = rng.integers(lo, hi + 1, channels).astype(np.int16) if pad_codes else np.zeros(channels, np.int16)
    m = (rng.integers(-MOST, MOST, outputs) >> rng.integers(0, 31)).astype(np.int32)
    b = (rng.integers(-MOST - 1, MOST, outputs) >> rng.integers(0, 31)).astype(np.int32)
    potentials = ops.conv(x[None, None], w, stride, padding, groups, pad, m, shift, b)[0, 0]
    row0 = int(rng.integers(len(potentials)))
    rows = (row0, int(rng.integers(row0 + 1, len(potentials) + 1))) if rng.random() < 0.5 else (0, len(potentials))
    part = potentials[rows[0] : rows[1]]
    residual, out, codes = epilogue(rng, part.shape)
    for isa in SETS:
        for variant in VARIANTS:
            conv = _kernels.OneConv(isa, variant, (height, width), w, stride, padding, groups, pad, m, shift, b, (lo, hi))
            if conv.supported:
                check(lambda r, o, c, f=conv: f(x, rows, r, o, c), part, residual, out, codes, f"{isa} {variant}")


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), columns=st.integers(1, 9), channels=sizes)
def test_the_epilogue_alone_is_the_definition(seed, rows, columns, channels):
    rng = np.random.default_rng(seed)
    x = (rng.integers(-MOST - 1, MOST, (rows, columns, channels)) >> rng.integers(0, 31)).astype(np.int32)
    residual, out, codes = epilogue(rng, x.shape)
    for isa in SETS:
        check(lambda r, o, c, isa=isa: _kernels.finish(isa, x, r, o, c), x, residual, out, codes, isa)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("weight", [-8, 7, -128, 127, -1])
@pytest.mark.parametrize("count", [1, 4, 15])
def test_partial_sums_of_events_cannot_overflow(isa, weight, count):
    """The worst case of the bound in csrc/events.h: every code and every weight as large as it can be, of one sign."""
    channels = 300
    x = np.full((3, 3, channels), count, np.uint8)
    w = np.full((70, 3, 3, channels), weight, np.int8)
    one, zero = np.ones(70, np.int32), np.zeros(70, np.int32)
    conv = _kernels.OneConv(
        isa, "events", (3, 3), w, (1, 1), (0, 0), 1, np.zeros(channels, np.int16), one, 0, zero, (0, count)
    )
    out = np.empty((1, 1, 70), np.int32)
    conv(x, (0, 1), None, out, [])
    assert (out == 9 * channels * count * weight).all()


def supported(weights: list[int], kind: str, isa: str, groups: int = 1) -> set[str]:
    w = np.resize(np.array(weights, np.int8), (16, 3, 3, 16 // groups))
    numbers = np.ones(16, np.int32)
    return {
        v for v in VARIANTS
        if _kernels.OneConv(
            isa, v, (5, 5), w, (1, 1), (1, 1), groups, np.zeros(16, np.int16), numbers, 0, numbers, RANGES[kind]
        ).supported
    }


@pytest.mark.parametrize("isa", ["scalar", *(s for s in SETS if s in ("avx2", "avx512", "amx"))])
def test_what_each_variant_supports(isa):
    def among(names: set[str]) -> set[str]:  # a CPU may lack the bit counts of 512 bits
        return names - {"popcount"} if isa == "avx512" else names

    matrix = {"matrix"} if isa in ("scalar", "amx") else set()
    assert among(supported([-1, 1], "counts", isa)) == among(
        {"dense", "narrow", "events", "sliced", "popcount", "shift", "winograd", *matrix}
    )
    assert supported([-8, 7], "counts", isa) == {"dense", "narrow", "events", "winograd", *matrix}
    assert supported([-14, 14], "counts", isa) == {"dense", "events", "winograd", *matrix}
    assert supported([-15, 1], "counts", isa) == {"dense", "events", *matrix}
    assert supported([-8, 4, 0], "signed", isa) == {"dense", "narrow", "shift", *matrix}
    assert supported([-64, 64], "counts", isa) == {"dense", "events", "shift", *matrix}
    assert supported([-1, 1], "counts", isa, groups=16) == {"dense"}


@pytest.mark.parametrize("isa", SETS)
def test_narrow_weights_take_less_memory(isa):
    def size(variant: str, weights: list[int]) -> int:
        w = np.resize(np.array(weights, np.int8), (64, 3, 3, 64))
        m = np.ones(64, np.int32)
        pad = np.zeros(64, np.int16)
        return _kernels.OneConv(isa, variant, (5, 5), w, (1, 1), (1, 1), 1, pad, m, 0, m, (0, 4)).packed_bytes

    if isa == "scalar":
        return  # the definition keeps bytes
    assert size("narrow", [-8, 7]) < 0.55 * size("dense", [-8, 7])
    assert size("narrow", [-2, 1]) < 0.3 * size("dense", [-2, 1])


def test_a_wrong_call_is_refused():
    w, m = np.ones((4, 3, 3, 4), np.int8), np.ones(4, np.int32)
    pad = np.zeros(4, np.int16)

    def conv(variant: str = "dense", isa: str = "scalar", size: tuple[int, int] = (5, 5), codes: tuple[int, int] = (0, 4)):
        return _kernels.OneConv(isa, variant, size, w, (1, 1), (1, 1), 1, pad, m, 0, m, codes)

    for bad in ({"variant": "magic"}, {"isa": "abacus"}, {"size": (0, 5)}, {"codes": (5, 4)}, {"codes": (-1, 200)}):
        with pytest.raises(ValueError):
            conv(**bad)
    x, out = np.zeros((5, 5, 4), np.uint8), np.empty((5, 5, 4), np.int32)
    conv()(x, (0, 5), None, out, [])
    for bad_rows in ((0, 6), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match="rows"):
            conv()(x, bad_rows, None, out, [])
    with pytest.raises(ValueError, match="size"):
        conv()(x, (0, 4), None, out, [])
    with pytest.raises(ValueError, match="dtype"):
        conv()(x.view(np.int8), (0, 5), None, out, [])
    with pytest.raises(ValueError, match="support"):
        three = _kernels.OneConv("scalar", "shift", (5, 5), 3 * w, (1, 1), (1, 1), 1, pad, m, 0, m, (0, 4))
        three(x, (0, 5), None, out, [])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("weights", ["four bits", "bytes"])
@pytest.mark.parametrize("channels, kernel, width, outputs", [
    (700, (1, 1), 3, 20), (1300, (1, 1), 2, 300), (300, (3, 3), 4, 33), (1000, (3, 3), 3, 140),
    (2, (3, 3), 120, 129), (70, (1, 1), 150, 7),
    # 2 to 8 neighbouring pixels have one list, the last ones of a row are fewer; the last two shapes would need too many rows
    (40, (3, 3), 9, 32), (20, (3, 3), 7, 16), (33, (3, 5), 5, 64), (300, (3, 3), 11, 16), (700, (3, 3), 5, 64),
])
def test_chunks_and_strips_of_events_change_nothing(isa, weights, channels, kernel, width, outputs):
    """More rows of weights than a chunk has, more channels than a part has, more pixels than a strip has."""
    rng = np.random.default_rng(channels + width)
    x = draw(rng, (3, width, channels), 0.3, 0, 4)
    w = rng.choice(WEIGHTS[weights], (outputs, *kernel, channels)).astype(np.int8)
    pad, around = rng.integers(0, 5, channels).astype(np.int16), (1, 1)
    m, b = rng.integers(-MOST, MOST, outputs).astype(np.int32), rng.integers(-999, 999, outputs).astype(np.int32)
    expected = ops.conv(x[None, None], w, (1, 1), around, 1, pad, m, 30, b)[0, 0]
    conv = _kernels.OneConv(isa, "events", (3, width), w, (1, 1), around, 1, pad, m, 30, b, (0, 4))
    out = np.empty_like(expected)
    conv(x, (0, len(out)), None, out, [])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("channels, kernel, size, outputs, top, share", [
    (3, (3, 3), (3, 120), 60, 1, 0.5),  # rows of taps side by side, cut into strips that overlap
    (20, (2, 4), (4, 9), 129, 2, 0.3), (40, (1, 3), (2, 50), 256, 1, 0.2), (16, (3, 2), (5, 5), 31, 15, 1.0),
    (65, (3, 3), (5, 7), 600, 1, 0.2), (30, (5, 5), (6, 6), 70, 1, 0.1),  # whole windows
    (4000, (1, 1), (2, 2), 530, 15, 1.0), (300, (3, 3), (2, 2), 9, 4, 1.0),  # as many planes as there are
    (100, (1, 1), (1, 70), 513, 1, 0.0), (64, (3, 3), (1, 1), 128, 1, None),
])
def test_rows_of_bits_are_the_definition_whatever_is_counted(isa, channels, kernel, size, outputs, top, share):
    rng = np.random.default_rng(channels + outputs)
    x = draw(rng, (*size, channels), share, 1 if share == 1.0 else 0, top)
    w = np.ones((outputs, *kernel, channels), np.int8)  # the first outputs count every event
    w[2:] = rng.choice([-1, 1], w[2:].shape)
    pad, around = rng.integers(0, top + 1, channels).astype(np.int16), (kernel[0] // 2, kernel[1] // 2)
    m, b = rng.integers(-MOST, MOST, outputs).astype(np.int32), rng.integers(-999, 999, outputs).astype(np.int32)
    expected = ops.conv(x[None, None], w, (1, 1), around, 1, pad, m, 20, b)[0, 0]
    conv = _kernels.OneConv(isa, "sliced", size, w, (1, 1), around, 1, pad, m, 20, b, (0, top))
    assert conv.supported
    for first in {0, len(expected) - 1}:
        out = np.empty_like(expected[first:])
        conv(x, (first, len(expected)), None, out, [])
        np.testing.assert_array_equal(out, expected[first:])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kernel, outputs", [((1, 3), 130), ((1, 1), 530), ((1, 5), 20)])  # the first: taps side by side
def test_counts_of_every_list_length_and_around_every_power_of_two_are_exact(isa, kernel, outputs):
    """A window with n events, for n at which a sum needs one bit more, and for n that leave each number of groups over."""
    rng = np.random.default_rng(outputs)
    taps = kernel[1]
    channels = 4200 // taps
    w = np.ones((outputs, *kernel, channels), np.int8)
    w[1], w[2:] = -1, rng.choice([-1, 1], w[2:].shape)
    pad, m, b = np.zeros(channels, np.int16), np.full(outputs, 1 << 20, np.int32), np.zeros(outputs, np.int32)
    conv = _kernels.OneConv(isa, "sliced", (1, taps), w, (1, 1), (0, 0), 1, pad, m, 20, b, (0, 1))
    assert conv.supported
    rows = w.reshape(outputs, -1).astype(np.int64)
    limits = [n for bit in range(5, 13) for n in ((1 << bit) - 1, 1 << bit)]
    for n in [*limits, *range(0, 140, 8), *range(3, 140, 8), 4200]:
        x = rng.permutation(np.arange(4200) < n).astype(np.uint8).reshape(1, taps, channels)
        out = np.empty((1, 1, outputs), np.int32)
        conv(x, (0, 1), None, out, [])
        np.testing.assert_array_equal(out[0, 0], rows @ x.reshape(-1), f"{n} events")
        assert tuple(out[0, 0, :2]) == (n, -n)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("weights, top", [  # the last three may be worked on in tiles of 2x4
    ([-14, 14], 63), ([-14, 13, 0], 63), (list(range(-8, 8)), 4), ([-6, 6], 7), ([-1, 1], 1), (list(range(-3, 4)), 4),
])
@pytest.mark.parametrize("channels, outputs, size, around", [
    (1, 2, (1, 1), (1, 1)), (3, 17, (2, 3), (1, 1)), (64, 48, (5, 4), (1, 1)), (65, 70, (9, 33), (0, 0)),
    (130, 33, (7, 70), (2, 1)), (600, 5, (3, 3), (1, 0)), (6, 129, (12, 29), (3, 3)), (33, 65, (4, 18), (1, 1)),
])
def test_tiles_of_four_outputs_are_the_definition(isa, weights, top, channels, outputs, size, around):
    """Codes and weights as large as winograd takes, odd sizes, more tiles than it holds at a time, parts of the rows."""
    rng = np.random.default_rng(channels + outputs)
    x = np.where(rng.random((*size, channels)) < 0.5, top, draw(rng, (*size, channels), 0.5, 0, top)).astype(np.uint8)
    w = rng.choice(weights, (outputs, 3, 3, channels)).astype(np.int8)
    w[0] = weights[0]  # the largest sums there are
    w[-1, :, ::2], w[-1, :, 1::2] = weights[1], weights[0]
    pad = rng.integers(0, top + 1, channels).astype(np.int16)
    m, b = rng.integers(-MOST, MOST, outputs).astype(np.int32), rng.integers(-999, 999, outputs).astype(np.int32)
    expected = ops.conv(x[None, None], w, (1, 1), around, 1, pad, m, 30, b)[0, 0]
    conv = _kernels.OneConv(isa, "winograd", size, w, (1, 1), around, 1, pad, m, 30, b, (0, top))
    assert conv.supported
    for first, last in {(0, len(expected)), (len(expected) // 2, len(expected)), (0, (len(expected) + 1) // 2)}:
        out = np.empty_like(expected[first:last])
        conv(x, (first, last), None, out, [])
        np.testing.assert_array_equal(out, expected[first:last])


@pytest.mark.parametrize("isa", [s for s in SETS if s != "scalar"])
@pytest.mark.parametrize("lo, hi", [(0, 1), (0, 4), (-127, 127), (-128, 127), (0, 255)])
@pytest.mark.parametrize("slope", [0.004, 0.13, 0.97, 2.83, 40.0])
def test_codes_straight_from_sums_are_the_definition(isa, lo, hi, slope):
    """One multiplication in place of two roundings, for every sum there is: one channel, weights that are its sums."""
    rng = np.random.default_rng(int(100 * slope) + hi)
    w = np.array([-128, -127, -64, -3, -1, 1, 2, 64, 126, 127], np.int8).reshape(10, 1, 1, 1).repeat(2, 0)
    x = np.arange(64, dtype=np.uint8).reshape(1, 64, 1)
    m = (rng.integers(1 << 24, 1 << 28, 20) * np.where(rng.random(20) < 0.3, -1, 1)).astype(np.int32)
    b = rng.integers(-1 << 26, 1 << 26, 20).astype(np.int32)
    m[3] = 0  # one code whatever comes
    s = 12
    q = np.round(slope * 2.0 ** (s + 40) / np.abs(np.where(m == 0, 1 << 26, m))).astype(np.int64)
    q = np.minimum(q, MOST).astype(np.int32)
    conv = _kernels.OneConv(isa, "dense", (1, 64), w, (1, 1), (0, 0), 1, np.zeros(1, np.int16), m, s, b, (0, 63))
    y = ops.conv(x[None, None], w, (1, 1), (0, 0), 1, np.zeros(1, np.int16), m, s, b)[0, 0]
    codes = np.empty((1, 64, 20), np.uint8)
    conv(x, (0, 1), None, None, [(q, 40, lo, hi, codes)])
    expected = ops.quantize(y[None, None], q, 40, lo, hi, "s8" if lo < 0 else "u8")[0, 0]
    np.testing.assert_array_equal(codes.view(expected.dtype), expected)
    assert conv.codes_by != "definition"
    # Where a code has no sum of its own to begin at, or sums leave 31 bits, the definition is followed step by step.
    coarse = (m >> 20).astype(np.int32)
    conv = _kernels.OneConv(isa, "dense", (1, 64), w, (1, 1), (0, 0), 1, np.zeros(1, np.int16), coarse, 20, b >> 20, (0, 63))
    y = ops.conv(x[None, None], w, (1, 1), (0, 0), 1, np.zeros(1, np.int16), coarse, 20, b >> 20)[0, 0]
    conv(x, (0, 1), None, None, [(q, 40, lo, hi, codes)])
    expected = ops.quantize(y[None, None], q, 40, lo, hi, "s8" if lo < 0 else "u8")[0, 0]
    np.testing.assert_array_equal(codes.view(expected.dtype), expected)


@pytest.mark.parametrize("isa", [s for s in SETS if s != "scalar"])
@pytest.mark.parametrize("variant", ["dense", "matrix"])
def test_codes_on_ties_are_those_of_both_roundings(isa, variant):
    """Steps that are a 127th of the largest sum: codes lie on ties, which the rounding of the potential decides."""
    rng = np.random.default_rng(7)
    w, x = np.zeros((70, 1, 1, 8), np.int8), np.zeros((1, 255, 8), np.uint8)  # as many as `matrix` wants
    w[..., :2], x[0, :, 0], x[0, 7:, 1] = rng.integers(-8, 8, (70, 1, 1, 2)), np.arange(255), np.arange(248)[::-1]
    pad = np.zeros(8, np.int16)
    seen = set()
    slopes = [225.0617, 245.267, 253.627, 1630.33, 9768.2]
    for top, potentials in [(t, p) for t in (482, 964, 1000, 1270, 1778, 1930) for p in slopes]:
        m = np.round(potentials * (1 << 17) * (1 + rng.random(70) * 1e-6) * rng.choice([-1, 1], 70)).astype(np.int32)
        b = rng.integers(-5, 6, 70).astype(np.int32)
        q = np.array([round(127 / top / potentials * (1 << 40))], np.int32)
        y = ops.conv(x[None, None], w, (1, 1), (0, 0), 1, pad, m, 17, b)[0, 0]
        conv = _kernels.OneConv(isa, variant, (1, 255), w, (1, 1), (0, 0), 1, pad, m, 17, b, (0, 254))
        if not conv.supported:
            pytest.skip(f"{isa} has no {variant}")
        codes = np.empty((1, 255, 70), np.uint8)
        conv(x, (0, 1), None, None, [(q, 40, -127, 127, codes)])
        seen.add(conv.codes_by)
        np.testing.assert_array_equal(codes.view(np.int8), ops.quantize(y[None, None], q, 40, -127, 127, "s8")[0, 0])
    assert isa.startswith(("avx2", "neon")) or "potentials and codes in floats" in seen


@pytest.mark.parametrize("isa", [s for s in SETS if s != "scalar"])
@pytest.mark.parametrize("lo, hi", [(0, 1), (0, 6), (-9, 20), (-128, 127)])
@pytest.mark.parametrize("groups", [1, 5])
def test_codes_straight_from_few_sums_are_the_definition(isa, lo, hi, groups):
    """Sums that end before the codes do: every input there is, of three bits a group."""
    rng = np.random.default_rng(hi)
    bits = np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, 8).T.astype(np.uint8)
    x = np.ascontiguousarray(np.tile(bits[:, None], (1, 1, groups)))
    for _ in range(20):
        w = rng.integers(-3, 4, (75, 1, 1, 3)).astype(np.int8)
        m, b = rng.integers(-500, 500, 75).astype(np.int32), rng.integers(-1000, 1000, 75).astype(np.int32)
        q, s = np.array([rng.integers(1, 60)], np.int32), int(rng.integers(0, 9))
        pad = np.zeros(3 * groups, np.int16)
        y = ops.conv(x[None, None], w, (1, 1), (0, 0), groups, pad, m, 2, b)[0, 0]
        codes = np.empty(y.shape, np.uint8)
        conv = _kernels.OneConv(isa, "dense", (8, 1), w, (1, 1), (0, 0), groups, pad, m, 2, b, (0, 1))
        conv(x, (0, 8), None, None, [(q, s, lo, hi, codes)])
        expected = ops.quantize(y[None, None], int(q[0]), s, lo, hi, "s8" if lo < 0 else "u8")[0, 0]
        np.testing.assert_array_equal(codes.view(expected.dtype), expected)


def spikes_or_counts(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> np.ndarray:
    density = rng.choice([0.0, 0.15, 0.5, 1.0, -1.0])
    return draw(rng, shape, None if density < 0 else density, 0, min(most, int(rng.choice([1, 1, 4, 255]))))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), tokens=st.sampled_from([1, 4, 9, 31, 32, 33, 49, 64, 70]), heads=st.integers(1, 3),
    width=st.sampled_from([1, 3, 15, 16, 17, 32, 33, 63, 64, 65]), shift=st.sampled_from([0, 1, 7, 31, 40, 62]),
    over=st.sampled_from(["channels", "tokens"]),
)
def test_maps_of_attention_are_the_definition(seed, tokens, heads, width, shift, over):
    """Spikes and counts, all of the rows or some, map and reading."""
    rng = np.random.default_rng(seed)
    a, b = (spikes_or_counts(rng, (tokens, heads * width), 255) for _ in range(2))
    m = int(rng.integers(-MOST, MOST) >> rng.integers(0, 31))
    side = tokens if over == "channels" else width
    row0 = int(rng.integers(side)) if rng.random() < 0.5 else 0
    row1 = int(rng.integers(row0 + 1, side + 1))
    expected = ops.attention_map(a[None, None, None], b[None, None, None], over, heads, m, shift)[0, 0].reshape(side, -1)
    for isa in SETS:
        y = np.full((row1 - row0, heads * side), 7, np.int32)
        _kernels.attention_map(isa, over == "channels", a, b, heads, (row0, row1), m, shift, y)
        np.testing.assert_array_equal(y, expected[row0:row1], err_msg=f"{isa} map over {over}")

    over = "tokens" if over == "channels" else "channels"
    chosen = spikes_or_counts(rng, (side, heads * side), 255)
    factors = (rng.integers(-MOST, MOST, heads) >> rng.integers(0, 31)).astype(np.int32)
    shaped = chosen.reshape(1, 1, side, heads, side)
    expected = ops.attention_read(shaped, a[None, None, None], over, heads, factors[None], shift).reshape(tokens, -1)
    first = int(rng.integers(tokens)) if rng.random() < 0.5 else 0
    count = int(rng.integers(1, tokens - first + 1))
    for isa in SETS:
        y = np.full((count, heads * width), 7, np.int32)
        _kernels.attention_read(isa, over == "tokens", chosen, a, heads, first, factors, shift, y)
        np.testing.assert_array_equal(y, expected[first : first + count], err_msg=f"{isa} reading over {over}")


def potential_table(rng: np.random.Generator, kind: str, bits: int) -> np.ndarray:
    """A sorted table of 2^bits - 2 entries; "none" has none."""
    count = 2**bits - 2
    if kind == "even":
        table = rng.integers(1, 2**22) * (np.arange(count) - count // 2)
    elif kind == "tanh":
        high = count // 2
        table = np.arctanh((np.arange(count) - high + 0.5) / (high + 0.6)) * 2.0 ** rng.integers(9, 29)
    elif kind == "wide":
        table = np.linspace(-MOST - 1 + rng.integers(2), MOST, count)
    else:
        table = rng.integers(-MOST - 1, MOST, count) >> rng.integers(31)
    return np.sort(np.clip(table, -MOST - 1, MOST).astype(np.int32)) if kind != "none" else np.empty(0, np.int32)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["even", "tanh", "wide", "any", "none"]), bits=st.integers(2, 8),
    steps=st.integers(1, 4), count=sizes, reset=st.sampled_from(["hard", "soft", "none"]), strict=st.booleans(),
    tame=st.booleans(), repeated=st.booleans(),
)
def test_neurons_with_any_table_are_the_definition(seed, kind, bits, steps, count, reset, strict, tame, repeated):
    rng = np.random.default_rng(seed)
    table = potential_table(rng, kind, bits)
    x = (rng.integers(-MOST - 1, MOST, (1 if repeated else steps, count)) >> rng.integers(0, 31, count)).astype(np.int32)
    if len(table):  # on the edges, where one potential more or less is another code
        edge = rng.choice(table, x.shape).astype(np.int64) + rng.integers(-1, 2, x.shape)
        x = np.where(rng.random(x.shape) < 0.5, np.clip(edge, -MOST - 1, MOST), x).astype(np.int32)
    x.flat[rng.integers(x.size)] = rng.choice([-MOST - 1, MOST])
    decay = (1, int(rng.choice([0, 1, 2, 31, 32]))) if tame else (
        int(rng.integers(-MOST, MOST) >> rng.integers(31)), int(rng.choice([0, 1, 8, 15, 16, 17, 18, 30, 46, 47])),
    )
    gain = (1, int(rng.choice([0, 1, 1, 31, 40]))) if tame or rng.random() < 0.5 else (int(rng.integers(-MOST, MOST)), 30)
    threshold, amount = (int(v) for v in rng.choice([-MOST - 1, MOST - 1, MOST, 0, 1 << 20, 1000], 2))
    y, shape = np.full((steps, count), 9, np.uint8), (len(x), 1, 1, 1, count)
    if len(table):
        expected = ops.lif_packed(x.reshape(shape), decay, gain, threshold, reset, steps, strict, bits, table, amount)
    else:
        expected = ops.lif(x.reshape(shape), decay, gain, threshold, reset, steps, strict, amount)
    for isa in SETS:
        y[:] = 9
        buckets = _kernels.lif_packed(isa, x, decay, gain, threshold, reset, strict, amount, table, y)
        np.testing.assert_array_equal(y, expected.reshape(steps, count), err_msg=f"{isa} {kind} {decay} {gain}")
        if kind == "tanh" and len(table) == 2**8 - 2 and np.diff(table.astype(np.int64)).min() > 15:
            assert buckets > 254, "the table of a membrane has buckets"
