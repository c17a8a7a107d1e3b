"""A live stream of events through a packed network: a decision every window, in memory that does not grow.

Events are counted into the current frame as they come; when the window is over, the frame goes through the network as one
time step (`Steps`: the integer membranes are carried on), and the logits so far are the decision. Nothing is kept of an event
but its count.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.errors import StepError, StreamError
from bitspike.deploy.runtime import Net
from bitspike.deploy.steps import Steps

#: windows that a gap in the timestamps may open before it counts as a jump of the clock
MOST_EMPTY = 10_000
#: an event more than so many windows before or after the current one is in doubt ...
FAR = 20
#: ... until so many in a row say that it is the clock that moved
CONFIRM = 64
_BLOCK = 1 << 16
_LOOK = 1 << 10  # events looked at for the end of a window, at first
_KEPT = np.dtype([("t", "<i8"), ("x", "<i8"), ("y", "<i8"), ("p", "<i8")])
_LAST = 1 << 62  # microseconds: no sum of times leaves int64
_LONGEST = 1 << 50


@dataclass(frozen=True)
class Decision:
    """What the network says at the end of a window.

    start, stop: of the window in microseconds, [start, stop); by count, of its earliest and latest event. step: windows
    since the membranes were at rest, 1..; logits: float32 [classes], the mean over those windows; events: as many were counted;
    latency_ms: from the end of the window to the decision, that is, the time of the network alone; frame: what it was given,
    uint8 [H, W, 2] (OFF, ON), not to be written into; jumped: whether the clock jumped before this window.
    """

    start: int
    stop: int
    step: int
    logits: NDArray[np.float32]
    events: int
    latency_ms: float
    frame: NDArray[np.uint8] = field(repr=False)
    jumped: bool = False

    @property
    def best(self) -> int:
        """Index of the class with the largest logit."""
        return int(self.logits.argmax())


@dataclass
class Totals:
    """What a stream has seen: events counted into frames, late (dropped), astray (dropped: their time was far off, and the
    events behind them did not follow), outside the sensor (dropped), clipped at 255 (a pixel's count beyond), windows, of
    them empty; jumps of the clock; seconds spent with frames and with the network; latencies_ms: of the last 1,000 decisions.
    """

    events: int = 0
    late: int = 0
    astray: int = 0
    outside: int = 0
    clipped: int = 0
    windows: int = 0
    empty: int = 0
    jumps: int = 0
    frame_seconds: float = 0.0
    net_seconds: float = 0.0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=1000), repr=False)

    @property
    def events_per_second(self) -> float:
        """Events counted into frames a second of computing, the network included."""
        spent = self.frame_seconds + self.net_seconds
        return self.events / spent if spent > 0 else 0.0


class Stream:
    """Events in, decisions out. Not for use by several threads at once.

    Args:
        net: a network of event frames (`input.steps` T > 1, 2 channels), or its `Steps` with a batch of 1.
        sensor: (height, width) of the camera; its pixels are pooled to the network's frame, (y * h // H, x * w // W).
            None: it has the network's size.
        window_us: a window lasts that long, from `start_us` on (default: the first event); or
        count: a window holds that many events.
        reset_every: the membranes go to rest after that many windows; default T, as the network was trained. 0: never,
            which a network with an own factor for each step cannot do.
        start_us: where the first window begins.
        threads: of the runtime; all cores if None.
    Raises:
        StepError: the network is none of event frames, or cannot run step by step.
        StreamError: not exactly one of window_us and count, or an argument that is none.

    Time. Windows by time end when an event at or after their end comes, or when `advance(now)` says that time has passed: a
    sensor that sends nothing still gets its decisions, from empty frames. An event before the current window (out of order
    across a window's end) is dropped and counted in `totals.late`; inside the window the order does not matter.

    An event more than `FAR` windows before or after the current window is held back. If the clock moved, those behind it
    follow: at `CONFIRM` such events in a row, none of them more than FAR windows before the first, the windows go on from
    the first, and none of them is lost. If not, what is held is dropped and counted in `totals.astray`. So one wrong
    timestamp moves nothing, and a clock that was set back is followed after so many events. Going on means: over a gap of
    up to `MOST_EMPTY` windows the empty ones are decided on; a larger gap, and a step back, are a jump of the clock, counted
    in `totals.jumps`: the membranes go to rest and the windows begin anew.

    How the events are cut into calls of `push` makes no difference.

    After T windows the decision equals `net(frames)` of the same T frames bit for bit.

    >>> from bitspike.data.events import iterate                     # doctest: +SKIP
    >>> stream = Stream(net, sensor=(128, 128), window_us=50_000)    # doctest: +SKIP
    >>> for piece in iterate("recording.aedat"):                     # doctest: +SKIP
    ...     for decision in stream.push(piece.data):
    ...         print(decision.stop, decision.best)
    """

    def __init__(self, net: Net | Steps, sensor: tuple[int, int] | None = None, *, window_us: int | None = None,
                 count: int | None = None, reset_every: int | None = None, start_us: int | None = None,
                 threads: int | None = None) -> None:
        if not isinstance(net, Net | Steps):
            raise StreamError(f"net: found {type(net).__name__}; a network of event frames is needed, as bitspike.deploy.load "
                              "gives it, or its Steps")
        check_frames(net.net if isinstance(net, Steps) else net)
        self.steps = net if isinstance(net, Steps) else Steps(net, 1, threads)
        self.net = self.steps.net
        height, width, _ = self.net.input_shape
        if self.steps.batch != 1:
            raise StepError(f"these steps were made for a batch of {self.steps.batch}; a stream takes Steps(net, 1)")
        if (window_us is None) == (count is None):
            raise StreamError(f"window_us={window_us}, count={count}: give one of them: microseconds, or events, of a window")
        self.window_us = None if window_us is None else _whole("window_us", window_us, 1, _LONGEST)
        self.count = None if count is None else _whole("count", count, 1, _LONGEST)
        self.reset_every = self.net.time_steps if reset_every is None else _whole("reset_every", reset_every, 0, _LONGEST)
        if not self.steps.endless and not 1 <= self.reset_every <= self.net.time_steps:
            raise StreamError(f"reset_every={reset_every}: 1..{self.net.time_steps} are allowed, what this network can take")
        sides = (height, width) if sensor is None else tuple(sensor) if isinstance(sensor, Iterable) else (sensor,)
        if len(sides) != 2 or not all(_is_whole(side) and 1 <= side <= 1 << 16 for side in sides):
            raise StreamError(f"sensor={sensor!r}: (height, width) is needed, two whole numbers of 1..65536")
        self.sensor = (int(sides[0]), int(sides[1]))
        self.totals = Totals()
        self._row = np.arange(self.sensor[0]) * height // self.sensor[0] * width
        self._column = np.arange(self.sensor[1]) * width // self.sensor[1]
        self._counts = np.zeros((2, height, width), np.int32)
        self._empty = np.zeros((height, width, 2), np.uint8)
        self._empty.flags.writeable = False
        self._held = 0
        self._jumped = False
        self._start = self._last = None if start_us is None else _whole("start_us", start_us, -_LAST, _LAST)
        self._doubted = np.zeros(CONFIRM, _KEPT)
        self._doubts = 0

    # ------------------------------------------------------------------------------------------------ input
    def push(self, events: np.ndarray) -> list[Decision]:
        """Events (structured, with t in microseconds, x, y, p) of any number -> the decisions of the windows they end.

        None is kept; the decisions hold a frame each, so a recording of hours is pushed in pieces.

        Raises:
            TypeError: no structured array with t, x, y and p in whole numbers. The stream is as it was before.
        """
        names = events.dtype.names or () if isinstance(events, np.ndarray) else ()
        if not {"t", "x", "y", "p"} <= set(names) or events.ndim != 1:
            found = f"{events.dtype} {events.shape}" if isinstance(events, np.ndarray) else type(events).__name__
            raise TypeError(f"events: found {found}; a one-dimensional structured array with t, x, y and p is needed "
                            "(bitspike.data.events.read makes one)")
        if not (all(events.dtype[name].kind in "iu" for name in "txy") and events.dtype["p"].kind in "iub"):
            raise TypeError(f"events: found {events.dtype}; t (microseconds), x, y and p are whole numbers")
        began, net = time.perf_counter(), self.totals.net_seconds
        try:
            return list(self._push(events))
        finally:  # all that was not the network's
            self.totals.frame_seconds += time.perf_counter() - began - (self.totals.net_seconds - net)

    def _push(self, events: np.ndarray) -> Iterator[Decision]:
        for first in range(0, len(events), _BLOCK):
            block = events[first:first + _BLOCK]
            if self.count is not None:
                yield from self._by_count(block)
            else:
                yield from self._by_time(block, self.window_us or 1)

    def advance(self, now_us: int) -> list[Decision]:
        """Time has passed up to `now_us`: the decisions of all windows that ended by then. Only with window_us.

        Raises:
            StreamError: the windows are made by count, or `now_us` is no whole number.
        """
        if self.window_us is None:
            raise StreamError("the windows of this stream are made by count: time does not end them")
        return list(self._advance(_whole("now_us", now_us, -_LAST, _LAST), self.window_us))

    def flush(self) -> list[Decision]:
        """The decision of a window that was begun, though it is not over: for the end of a recording. Empty if none was.

        Two events or more that were held back as one are taken for time that went on, a single one is dropped.
        """
        found = list(self._follow(self.window_us)) if self._doubts > 1 and self.window_us is not None else []
        self._stray()
        return [*found, self._decide()] if self._held else found

    def reset(self) -> None:
        """Membranes to rest and the window empty; the next event begins a new one. The totals stay."""
        self.steps.reset()
        self._counts[:] = 0
        self._held = 0
        self._jumped = False
        self._start = self._last = None
        self._stray()

    # ---------------------------------------------------------------------------------------------- windows
    def _by_count(self, block: np.ndarray) -> Iterator[Decision]:
        want = self.count or 1
        block = self.on_sensor(block)
        while len(block):
            part, block = block[:want - self._held], block[want - self._held:]
            if self._start is None or not self._held:
                self._start = self._last = int(part["t"][0])
            self._add(part)
            first, last = int(part["t"].min()), int(part["t"].max())  # times may be out of order
            self._start, self._last = min(self._start, first), max(last if self._last is None else self._last, last)
            if self._held == want:
                yield self._decide()

    def _by_time(self, block: np.ndarray, window: int) -> Iterator[Decision]:
        times = block["t"].astype(np.int64)
        in_order = bool((times[1:] >= times[:-1]).all())
        if not in_order or times[0] < -_LAST or times[-1] > _LAST:
            times = np.clip(times, -_LAST, _LAST)
        first, look = 0, _LOOK
        while first < len(block):
            if self._start is None:
                self._start = int(times[first])
            start = self._start
            earliest, stop, latest = start - FAR * window, start + window, start + (FAR + 1) * window
            if in_order and earliest <= times[first] < latest:  # as below, without a look at every event
                until = first + int(np.searchsorted(times[first:], stop))
                self._on_clock(block[first:until], times[first:until], start)
                first = until
                if first < len(block) and times[first] < latest:
                    self._stray()
                    yield from self._advance(int(times[first]), window)
                continue
            t = times[first:first + look]
            ends = (t >= stop) & (t < latest)
            ended = bool(ends.any())
            until = int(ends.argmax()) if ended else len(t)
            look = max(_LOOK, look // 2 + until) if ended else 2 * look  # as long as windows are
            t = t[:until]
            good = (t >= earliest) & (t < stop)
            if good.all():
                self._on_clock(block[first:first + until], t, start)
                first += until
            else:
                at, far = _doubtful(good, self._doubts)
                part = slice(first, first + at)
                self._on_clock(block[part][good[:at]], t[:at][good[:at]], start)
                self.totals.astray += at - int(good[:at].sum())
                first += at
                taken = self._doubt(block[first:first + far], window)
                first += taken
                if self._doubts == CONFIRM:
                    yield from self._follow(window)
                    continue
            if ended and first < len(block) and stop <= times[first] < latest:
                self._stray()
                yield from self._advance(int(times[first]), window)

    def _on_clock(self, part: np.ndarray, t: np.ndarray, start: int) -> None:
        """Events of this window, or late by little: what was held back is astray then."""
        if len(part):
            self._stray()
            if t.min() < start:
                late = t < start
                self.totals.late += int(late.sum())
                part = part[~late]
            self._add(self.on_sensor(part))

    def _doubt(self, part: np.ndarray, window: int) -> int:
        """Hold events back, up to CONFIRM of them; how many were looked at."""
        taken = 0
        while taken < len(part) and self._doubts < CONFIRM:
            more = part[taken:taken + CONFIRM - self._doubts]
            t = np.clip(more["t"].astype(np.int64), -_LAST, _LAST)
            first = int(self._doubted["t"][0]) if self._doubts else int(t[0])
            before = t < first - FAR * window
            agree = int(before.argmax()) if before.any() else len(t)
            for name, column in (("t", t), *((name, more[name]) for name in "xyp")):
                self._doubted[name][self._doubts:self._doubts + agree] = column[:agree]
            self._doubts += agree
            taken += agree
            if agree < len(t):
                self._stray()  # those behind do not follow, so it was not the clock
        return taken

    def _stray(self) -> None:
        self.totals.astray += self._doubts
        self._doubts = 0

    def _follow(self, window: int) -> Iterator[Decision]:
        """The clock is where the events are that were held back."""
        held, self._doubts = self._doubted[:self._doubts].copy(), 0
        yield from self._go_to(int(held["t"][0]), window)
        yield from self._by_time(held, window)

    def _advance(self, now: int, window: int) -> Iterator[Decision]:
        if self._start is None:
            self._start = now
        if self._doubts and self._start <= self._doubted["t"][0] <= now:
            yield from self._follow(window)
        if now >= self._start:
            yield from self._go_to(now, window)

    def _go_to(self, now: int, window: int) -> Iterator[Decision]:
        start = now if self._start is None else self._start
        if not 0 <= (now - start) // window <= MOST_EMPTY:
            yield from self._jump(now)
        while self._start is not None and now >= self._start + window:
            yield self._decide()

    def _jump(self, start: int) -> Iterator[Decision]:
        """The clock has leapt: end the window that was begun, and begin anew."""
        self.totals.jumps += 1
        if self._held:
            yield self._decide()
        self.reset()
        self._start, self._jumped = start, True

    # ------------------------------------------------------------------------------------------------ a window
    def on_sensor(self, part: np.ndarray) -> np.ndarray:
        """Those events that lie on the sensor; the others are counted in `totals.outside`. `push` does so by itself."""
        inside = (part["x"] < self.sensor[1]) & (part["y"] < self.sensor[0]) & (part["x"] >= 0) & (part["y"] >= 0)
        if inside.all():
            return part
        self.totals.outside += len(part) - int(inside.sum())
        return part[inside]

    def _add(self, part: np.ndarray) -> None:
        if not len(part):
            return
        at = self._row[part["y"]] + self._column[part["x"]]
        at += (part["p"] > 0) * (self._counts.size // 2)
        if len(part) > self._counts.size // 8:
            self._counts += np.bincount(at, minlength=self._counts.size).astype(np.int32).reshape(self._counts.shape)
        else:
            np.add.at(self._counts.reshape(-1), at, 1)
        self._held += len(part)
        self.totals.events += len(part)

    def _decide(self) -> Decision:
        began = time.perf_counter()
        if self.reset_every and self.steps.t >= self.reset_every:
            self.steps.reset()
        totals = self.totals
        over = int((self._counts - 255).clip(0).sum()) if self._held > 255 else 0
        frame = np.ascontiguousarray(np.minimum(self._counts, 255).astype(np.uint8).transpose(1, 2, 0)) if self._held \
            else self._empty  # one for all: a long silence ends many windows at once
        logits = self.steps.push(frame)[0]
        spent = time.perf_counter() - began
        start = self._start or 0
        stop = start + self.window_us if self.window_us is not None else int(self._last or start)
        found = Decision(start, stop, self.steps.t, logits, self._held, 1e3 * spent, frame, self._jumped)
        self._jumped = False
        totals.windows += 1
        totals.empty += not self._held
        totals.clipped += over
        totals.net_seconds += spent
        totals.latencies_ms.append(1e3 * spent)
        self._counts[:] = 0
        self._held = 0
        if self.window_us is not None:
            self._start = stop
        return found


def check_frames(net: Net) -> None:
    """Errors: StepError for a network that is none of event frames."""
    channels = net.input_shape[2]
    if channels != 2 or net.input_steps < 2:
        made = f"{net.input_steps} frames" if net.input_steps > 1 else "pictures"
        raise StepError(f"{net!r} was made for {made} of {channels} channel{'s' if channels > 1 else ''}; a stream needs a "
                        "network of event frames: T > 1 of them with 2 channels (OFF, ON), as recipes with frames=T train them")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(name: str, value: int, least: int, most: int) -> int:
    if not (_is_whole(value) and least <= value <= most):
        raise StreamError(f"{name}={value!r}: a whole number is needed, from {least} to {most}")
    return int(value)


def _doubtful(good: np.ndarray, before: int) -> tuple[int, int]:
    """(where a run of events that are not good begins, its length): the first that is long enough to move the clock, with the
    `before` that were held back already; else the last run, which may go on (and may be empty).
    """
    places = np.concatenate(([-1], np.flatnonzero(good), [len(good)]))
    runs = np.diff(places) - 1
    enough = runs >= CONFIRM
    enough[0] = runs[0] > 0 and runs[0] + before >= CONFIRM
    which = int(enough.argmax()) if enough.any() else len(runs) - 1
    return int(places[which]) + 1, int(runs[which])
