"""A stream of events decides as the whole sequence does, in memory that does not grow, whatever the clock does."""
from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import Net, Stream
from bitspike.deploy.errors import StepError
from bitspike.deploy.stream import MOST_EMPTY

from .random_programs import random_artifact
from .test_steps import packed_net

T, SIDE = 6, 8
DTYPE = np.dtype({"names": ["t", "x", "y", "p"], "formats": ["<i8", "<u2", "<u2", "u1"], "offsets": [0, 8, 10, 12],
                  "itemsize": 16})


def make(t, side: int = SIDE, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    out = np.zeros(len(t), DTYPE)
    out["t"] = t
    for name, top in (("x", side), ("y", side), ("p", 2)):
        out[name] = random.integers(0, top, len(t))
    return out


def frames_of(events: np.ndarray, window: int, number: int, start: int = 0, side: int = SIDE) -> np.ndarray:
    """uint8 [number, H, W, 2], event by event."""
    out = np.zeros((number, SIDE, SIDE, 2), np.int64)
    for t, x, y, p in events.tolist():
        out[(t - start) // window, y * SIDE // side, x * SIDE // side, p] += 1
    return np.minimum(out, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def net() -> Net:
    return packed_net(8, T, T, SIDE)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 900), max_size=6), bits=st.sampled_from([4, 32]))
def test_T_windows_are_the_whole_sequence(seed: int, cuts: list[int], bits: int):
    net = packed_net(bits, T, T, SIDE)
    events = make(np.sort(np.random.default_rng(seed).integers(0, 2 * T * 100, 900)), 16, seed)
    stream = Stream(net, (16, 16), window_us=100, start_us=0)
    found = [d for part in np.split(events, sorted(cuts)) for d in stream.push(part)] + stream.advance(2 * T * 100)
    frames = frames_of(events, 100, 2 * T, side=16)
    assert [d.step for d in found] == [*range(1, T + 1)] * 2
    for half in (0, 1):  # at rest again after T windows
        expected = net(frames[half * T:(half + 1) * T, None])[0]
        np.testing.assert_array_equal(found[(half + 1) * T - 1].logits, expected)
    assert [(d.start, d.stop) for d in found] == [(100 * i, 100 * i + 100) for i in range(2 * T)]
    assert stream.totals.events == 900 and stream.totals.windows == 2 * T and stream.totals.late == 0


def test_windows_by_count(net: Net):
    events = make(np.arange(1000))
    stream = Stream(net, count=150)
    found = [d for part in np.array_split(events, 7) for d in stream.push(part)]
    assert len(found) == 6 and all(d.events == 150 for d in found)
    frames = np.stack([frames_of(events[150 * i:150 * i + 150], 1 << 40, 1)[0] for i in range(T)])
    np.testing.assert_array_equal(found[-1].logits, net(frames[:, None])[0])
    (last,) = stream.flush()
    assert last.events == 100 and (last.start, last.stop) == (900, 999) and not stream.flush()
    with pytest.raises(ValueError, match="time does not end them"):
        stream.advance(5)


def test_a_silent_sensor(net: Net):
    stream = Stream(net, window_us=100, start_us=0)
    found = stream.advance(100 * T + 50)
    assert len(found) == T and all(d.events == 0 for d in found) and stream.totals.empty == T
    np.testing.assert_array_equal(found[-1].logits, net(np.zeros((T, 1, SIDE, SIDE, 2), np.uint8))[0])
    assert [d.start for d in stream.push(make([100 * T + 350]))] == [100 * T, 100 * T + 100, 100 * T + 200]


def test_out_of_order(net: Net):
    stream = Stream(net, window_us=100, start_us=0)
    shuffled = make([5, 90, 40, 120, 99, 110, 30, 205])  # 99 and 30 come when their window is over
    found = stream.push(shuffled)
    assert [d.events for d in found] == [3, 2] and stream.totals.late == 2
    assert stream.totals.events == 6  # one of them in the window that is open


def test_jumps_of_the_clock(net: Net):
    stream = Stream(net, window_us=100)
    far = 100 * MOST_EMPTY + 1000
    found = stream.push(make([10, 20, far, far + 10, 15, 25, 130]))
    assert [(d.start, d.events, d.step) for d in found] == [(10, 2, 1), (far, 2, 1), (15, 2, 1)]
    assert stream.totals.jumps == 2 and stream.totals.late == 0


def test_a_burst_needs_no_memory(net: Net):
    burst = np.tile(make(np.full(100_000, 50)), 100).view(DTYPE)  # 10 M events
    stream = Stream(net, window_us=100, start_us=0)
    stream.push(burst[:200_000])
    tracemalloc.start()
    stream.push(burst)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, f"{peak} bytes for a burst of {burst.nbytes}"
    (decision,) = stream.advance(100)
    assert decision.frame.max() == 255 and stream.totals.clipped == 10_200_000 - 2 * SIDE * SIDE * 255


def test_memory_stays_flat(net: Net):
    stream = Stream(net, window_us=1000, reset_every=0)
    events = make(np.arange(0, 100_000, 50))

    def minutes(number: int) -> int:
        for _ in range(number):
            events["t"] += 100_000
            stream.push(events)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before = minutes(12)
    after = minutes(30)
    tracemalloc.stop()
    assert stream.totals.windows > 4000 and after - before < 20_000, (before, after)


def test_events_outside_the_sensor(net: Net):
    stream = Stream(net, (4, 4), window_us=100, start_us=0)
    stream.push(make(np.zeros(500, np.int64), SIDE))
    (decision,) = stream.advance(100)
    assert stream.totals.outside + decision.events == 500 and 50 < decision.events < 220


def test_rates_and_latency_are_measured(net: Net):
    stream = Stream(net, window_us=100)
    found = stream.push(make(np.arange(0, 3000)))
    assert len(repr(found[-1])) < 250
    assert "latencies" not in repr(stream.totals) and len(repr(stream.totals)) < 250
    assert all(d.latency_ms > 0 for d in found) and len(stream.totals.latencies_ms) == len(found) == 29
    assert stream.totals.events_per_second > 1000
    began = time.perf_counter()
    stream.push(make(np.full(300_000, 3000)))
    spent = time.perf_counter() - began
    totals = stream.totals
    assert 0.5 * spent < totals.frame_seconds + totals.net_seconds, "all of the work counts"


def test_a_call_does_its_work_at_once(net: Net):
    """Nothing waits for a loop over what comes back."""
    stream = Stream(net, window_us=100)
    stream.push(make(np.arange(250)))
    assert stream.totals.events == 250 and stream.totals.windows == 2
    stream.advance(350)
    assert stream.totals.windows == 3
    stream.push(make([360]))
    stream.flush()
    assert stream.totals.windows == 4 and stream.flush() == []


def test_a_long_silence_takes_no_memory(net: Net):
    stream = Stream(net, window_us=10, start_us=0)
    found = stream.advance(10 * MOST_EMPTY)
    assert len(found) == MOST_EMPTY and len({id(d.frame) for d in found}) == 1 and not found[0].frame.any()
    with pytest.raises(ValueError, match="read-only"):
        found[0].frame[:] = 1
    stream.push(make([10 * MOST_EMPTY + 1]))
    assert stream.flush()[0].frame.sum() == 1


def test_other_arrays_of_events(net: Net):
    """Columns of any whole numbers; coordinates below 0 lie outside."""
    stream = Stream(net, window_us=100, start_us=0)
    signed = np.array([(1, -1, 0, -1), (2, 0, -3, 1), (3, 4, 5, 1), (4, 4, 5, -1)],
                      [("t", "<u4"), ("x", "<i2"), ("y", "<i2"), ("p", "i1")])
    stream.push(signed)
    (decision,) = stream.flush()
    assert stream.totals.outside == 2 and decision.frame.sum() == 2 and decision.frame[5, 4].tolist() == [1, 1]
    for wrong in ("t", "x", "p"):
        kinds = [(name, "<f4" if name == wrong else "<i4") for name in "txyp"]
        with pytest.raises(TypeError, match="whole numbers"):
            stream.push(np.zeros(3, kinds))


def test_what_is_refused(net: Net):
    with pytest.raises(ValueError, match="give one of them"):
        Stream(net)
    with pytest.raises(ValueError, match="give one of them"):
        Stream(net, window_us=5, count=5)
    with pytest.raises(ValueError, match="reset_every=-1"):
        Stream(net, window_us=5, reset_every=-1)
    with pytest.raises(ValueError, match="sensor"):
        Stream(net, (0, 5), window_us=5)
    with pytest.raises(TypeError, match="structured array"):
        Stream(net, window_us=5).push(np.zeros((3, 4)))
    from bitspike.deploy.artifact import encode, parse
    pictures = next(n for n in (Net(parse(encode(*random_artifact(s)))) for s in range(99)) if n.input_steps == 1)
    with pytest.raises(StepError, match="needs a network of event frames"):
        Stream(pictures, window_us=5)
