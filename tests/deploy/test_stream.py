"""A stream of events decides as the whole sequence does, in memory that does not grow, whatever the clock does."""
from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import Net, Steps, Stream
from bitspike.deploy.errors import StepError, StreamError
from bitspike.deploy.stream import CONFIRM, FAR, MOST_EMPTY

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


def seen(stream: Stream) -> tuple[int, ...]:
    totals = stream.totals
    return totals.events, totals.late, totals.astray, totals.jumps, totals.windows, totals.empty


def test_jumps_of_the_clock(net: Net):
    stream = Stream(net, window_us=100)
    far = 100 * MOST_EMPTY + 1000
    there, back = np.arange(far, far + CONFIRM), np.arange(15, 15 + CONFIRM)
    found = stream.push(make([10, 20, *there[:-1]]))
    assert not found and stream.totals.events == 2, "not sure yet"
    found += stream.push(make([there[-1], *back, 130]))
    assert [(d.start, d.events, d.step) for d in found] == [(10, 2, 1), (far, CONFIRM, 1), (15, CONFIRM, 1)]
    assert seen(stream) == (2 * CONFIRM + 3, 0, 0, 2, 3, 0), "no event is lost"


def test_one_wrong_timestamp_moves_nothing(net: Net):
    t = np.arange(0, 3000, 10)
    clean = Stream(net, window_us=100)
    expected = [*clean.push(make(t)), *clean.flush()]
    for wrong in (100_000, 10**12, 2**63 - 1, -10**9, -2**63):
        stream = Stream(net, window_us=100)
        events = make(t)
        odd = make([wrong])
        found = stream.push(np.concatenate([events[:77], odd, events[77:150], odd, odd, events[150:]])) + stream.flush()
        assert [(d.start, d.events) for d in found] == [(d.start, d.events) for d in expected]
        np.testing.assert_array_equal(found[-1].logits, expected[-1].logits)
        assert seen(stream) == (300, 0, 3, 0, 30, 0)


def test_a_first_timestamp_that_is_wrong_is_left(net: Net):
    stream = Stream(net, window_us=100)
    found = stream.push(make([10**9, *range(0, 1000, 5)]))
    assert [(d.start, d.events) for d in found] == [(10**9, 1), *((100 * i, 20) for i in range(9))]
    assert seen(stream)[:4] == (201, 0, 0, 1)


def test_a_clock_that_is_set_back_is_followed(net: Net):
    """Half an hour in, the camera's clock begins at 0 again: nothing is lost, the decisions go on."""
    before, after = make(np.arange(1_800_000_000, 1_800_001_000, 5)), make(np.arange(0, 1000, 5), seed=1)
    stream = Stream(net, window_us=100)
    found = stream.push(before) + stream.push(after)
    assert [d.start for d in found] == [*range(1_800_000_000, 1_800_001_000, 100), *range(0, 900, 100)]
    assert [d.step for d in found[9:12]] == [4, 1, 2] and all(d.events == 20 for d in found)
    assert seen(stream)[:4] == (400, 0, 0, 1)
    fresh = Stream(net, window_us=100)
    np.testing.assert_array_equal(fresh.push(after)[5].logits, found[15].logits)


def test_a_silence_within_reason_is_decided_on(net: Net):
    """Longer than FAR windows: the events behind it confirm that time went on, and so does `advance`, or the end."""
    gap = 100 * (FAR + 10)
    stream = Stream(net, window_us=100)
    found = stream.push(make([0, *range(gap, gap + CONFIRM)]))
    assert len(found) == gap // 100 and stream.totals.jumps == 0 and stream.totals.empty == len(found) - 1
    told = Stream(net, window_us=100)
    assert not told.push(make([0, gap]))
    found = told.advance(gap + 10)
    assert len(found) == gap // 100 and told.flush()[0].events == 1 and told.totals.astray == 0
    ended = Stream(net, window_us=100)
    ended.push(make([0, gap, gap + 1]))
    assert ended.flush()[-1].events == 2 and ended.totals.astray == 0
    alone = Stream(net, window_us=100)
    alone.push(make([0, gap]))
    assert [d.events for d in alone.flush()] == [1] and alone.totals.astray == 1 and not alone.flush()


class Plain:
    """What the docstring of `Stream` says of time, one event after another."""

    def __init__(self, window: int) -> None:
        self.window, self.start, self.held = window, None, 0
        self.doubt: list[int] = []
        self.found: list[tuple[int, int]] = []
        self.events = self.late = self.astray = self.jumps = 0

    def decide(self) -> None:
        self.found.append((self.start, self.held))
        self.start, self.held = self.start + self.window, 0

    def go_to(self, t: int) -> None:
        if not 0 <= (t - self.start) // self.window <= MOST_EMPTY:
            self.jumps += 1
            if self.held:
                self.decide()
            self.start = t
        while t >= self.start + self.window:
            self.decide()

    def see(self, t: int) -> None:
        if self.start is None:
            self.start = t
        if self.start - FAR * self.window <= t < self.start + (FAR + 1) * self.window:
            self.astray, self.doubt = self.astray + len(self.doubt), []
            if t < self.start:
                self.late += 1
                return
            self.go_to(t)
            self.held, self.events = self.held + 1, self.events + 1
            return
        if self.doubt and t < self.doubt[0] - FAR * self.window:
            self.astray, self.doubt = self.astray + len(self.doubt), []
        self.doubt.append(t)
        if len(self.doubt) == CONFIRM:
            held, self.doubt = self.doubt, []
            self.go_to(held[0])
            for one in held:
                self.see(one)


STRETCH = st.tuples(st.sampled_from([0, 0, 3, -3, 10, -10, 30, -30, 500, -500, 20_000, -20_000]), st.integers(1, 120),
                    st.sampled_from([0, 1, 9]), st.integers(0, 60))


@settings(deadline=None, max_examples=30)
@given(stretches=st.lists(STRETCH, max_size=7), window=st.sampled_from([50, 1000]), seed=st.integers(0, 99),
       cuts=st.lists(st.integers(0, 1200), max_size=8))
def test_any_clock_in_any_pieces(stretches, window: int, seed: int, cuts: list[int]):
    """Stretches of events that leap by some windows: as event by event, however they are cut, and none is forgotten."""
    random = np.random.default_rng(seed)
    now, t = 10**6, []
    for leap, number, step, noise in stretches:
        now += leap * window
        part = now + step * np.arange(number) + random.integers(-noise, noise + 1, number)
        t += part.tolist()
        now = int(part[-1])
    plain = Plain(window)
    for one in t:
        plain.see(one)
    net = packed_net(8, T, T, SIDE)
    events = make(t, seed=seed)
    runs = []
    for pieces in ([events], np.split(events, sorted(cuts)), [events[i:i + 1] for i in range(len(events))]):
        stream = Stream(net, window_us=window)
        found = [d for piece in pieces for d in stream.push(piece)]
        assert [(d.start, d.events) for d in found] == plain.found
        totals = stream.totals
        assert seen(stream)[:4] == (plain.events, plain.late, plain.astray, plain.jumps)
        found += stream.flush()
        assert totals.events + totals.late + totals.astray == len(events), "every event is accounted for"
        runs.append([(d.start, d.step, d.events, d.logits.tobytes(), d.frame.tobytes()) for d in found])
    assert runs[0] == runs[1] == runs[2]


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
    burst = make(np.full(300_000, 3000))
    began = time.perf_counter()
    stream.push(burst)
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
    for words in ({}, {"window_us": 5, "count": 5}):
        with pytest.raises(StreamError, match="give one of them"):
            Stream(net, **words)
    for name in ("window_us", "count"):
        for wrong in (0, -5, 2.5, True, "5", 1 << 60, float("nan")):
            with pytest.raises(StreamError, match=rf"{name}={wrong!r}: a whole number is needed, from 1 to"):
                Stream(net, **{name: wrong})
    for wrong in (-1, 1.0):
        with pytest.raises(StreamError, match=f"reset_every={wrong}"):
            Stream(net, window_us=5, reset_every=wrong)
    for sensor in ((0, 5), (5,), (5, 5, 2), 5, (5.0, 5), (1, 1 << 17), ("a", "b"), ()):
        with pytest.raises(StreamError, match=r"sensor=.*: \(height, width\) is needed"):
            Stream(net, sensor, window_us=5)
    with pytest.raises(StreamError, match=r"start_us=0\.5"):
        Stream(net, window_us=5, start_us=0.5)
    with pytest.raises(StreamError, match="now_us='now'"):
        Stream(net, window_us=5).advance("now")
    with pytest.raises(StreamError, match="found str; a network of event frames is needed"):
        Stream("net.bitspike", window_us=5)
    with pytest.raises(TypeError, match="structured array"):
        Stream(net, window_us=5).push(np.zeros((3, 4)))
    with pytest.raises(StepError, match="a batch of 2"):
        Stream(Steps(net, 2), window_us=5)
    from bitspike.deploy.artifact import encode, parse
    pictures = next(n for n in (Net(parse(encode(*random_artifact(s)))) for s in range(99)) if n.input_steps == 1)
    with pytest.raises(StepError, match=r"was made for pictures of .* channel.*needs a network of event frames"):
        Stream(pictures, window_us=5)
    assert Stream(net, np.array([8, 8]), window_us=np.int64(5)).sensor == (8, 8)
