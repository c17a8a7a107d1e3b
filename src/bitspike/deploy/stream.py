"""A live stream of events through a packed network: a decision every window, in memory that does not grow.

Events are counted into the current frame as they come; when the window is over, the frame goes through the network as one
time step (`Steps`: the integer membranes are carried on), and the logits so far are the decision. Nothing is kept of an event
but its count.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.errors import StepError
from bitspike.deploy.runtime import Net
from bitspike.deploy.steps import Steps

#: windows that a gap in the timestamps may open before it counts as a jump of the clock
MOST_EMPTY = 10_000
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Decision:
    """What the network says at the end of a window.

    start, stop: of the window in microseconds, [start, stop); by count, of its first and last event. step: windows since the
    membranes were at rest, 1..; logits: float32 [classes], the mean over those windows; events: how many were counted;
    latency_ms: from the end of the window to the decision, that is, the time of the network alone; frame: what it was given,
    uint8 [H, W, 2] (OFF, ON), not to be written into.
    """

    start: int
    stop: int
    step: int
    logits: NDArray[np.float32]
    events: int
    latency_ms: float
    frame: NDArray[np.uint8] = field(repr=False)

    @property
    def best(self) -> int:
        """Index of the class with the largest logit."""
        return int(self.logits.argmax())


@dataclass
class Totals:
    """What a stream has seen: events counted into frames, late (dropped), outside the sensor (dropped), clipped at 255 (a
    pixel's count beyond), windows, of them empty; jumps of the clock; seconds spent with frames and with the network;
    latencies_ms: of the last 1,000 decisions.
    """

    events: int = 0
    late: int = 0
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
        ValueError: not exactly one of window_us and count, or a number out of range.

    Time. Windows by time end when an event at or after their end comes, or when `advance(now)` says that time has passed: a
    sensor that sends nothing still gets its decisions, from empty frames. An event before the current window (out of order
    across a window's end) is dropped and counted in `totals.late`; inside the window the order does not matter. A gap of more
    than `MOST_EMPTY` windows, and a step back of more than as many, are a jump of the clock: the membranes go to rest, the
    windows begin anew at that event, and it is counted in `totals.jumps`.

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
        self.steps = net if isinstance(net, Steps) else Steps(net, 1, threads)
        self.net = self.steps.net
        height, width, channels = self.net.input_shape
        if channels != 2 or self.net.input_steps < 2 or self.steps.batch != 1:
            raise StepError(f"{self.net!r} takes {self.net.input_steps} frames of {channels} channels in a batch of "
                            f"{self.steps.batch}; a stream needs a network of event frames with 2 channels (OFF, ON), batch 1")
        if (window_us is None) == (count is None) or (window_us or count or 0) < 1:
            raise ValueError(f"window_us={window_us}, count={count}: give one of them, at least 1")
        every = self.net.time_steps if reset_every is None else reset_every
        if every < 0 or (not self.steps.endless and not 1 <= every <= self.net.time_steps):
            allowed = "0 (never) or more" if self.steps.endless else f"1..{self.net.time_steps}, what this network can take"
            raise ValueError(f"reset_every={every}: allowed: {allowed}")
        self.sensor = sensor or (height, width)
        if not all(1 <= side <= 1 << 16 for side in self.sensor):
            raise ValueError(f"sensor={self.sensor}: (height, width) of 1..65536 are allowed")
        self.window_us, self.count, self.reset_every = window_us, count, every
        self.totals = Totals()
        self._row = np.arange(self.sensor[0]) * height // self.sensor[0] * width
        self._column = np.arange(self.sensor[1]) * width // self.sensor[1]
        self._counts = np.zeros((2, height, width), np.int32)
        self._empty = np.zeros((height, width, 2), np.uint8)
        self._empty.flags.writeable = False
        self._held = 0
        self._start = self._last = start_us

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
            ValueError: the windows are made by count.
        """
        if self.window_us is None:
            raise ValueError("the windows of this stream are made by count: time does not end them")
        return list(self._advance(int(now_us), self.window_us))

    def flush(self) -> list[Decision]:
        """The decision of a window that was begun, though it is not over: for the end of a recording. Empty if none was."""
        return [self._decide()] if self._held else []

    def reset(self) -> None:
        """Membranes to rest and the window empty; the next event begins a new one. The totals stay."""
        self.steps.reset()
        self._counts[:] = 0
        self._held = 0
        self._start = self._last = None

    # ---------------------------------------------------------------------------------------------- windows
    def _by_count(self, block: np.ndarray) -> Iterator[Decision]:
        want = self.count or 1
        block = self._on_sensor(block)
        while len(block):
            part, block = block[:want - self._held], block[want - self._held:]
            if self._start is None or not self._held:
                self._start = int(part["t"][0])
            self._add(part)
            self._last = int(part["t"][-1])
            if self._held == want:
                yield self._decide()

    def _by_time(self, block: np.ndarray, window: int) -> Iterator[Decision]:
        first = 0
        while first < len(block):
            t = block["t"][first:]
            if self._start is None:
                self._start = int(t[0])
            # events of this window come first, as a rule: up to the first that lies beyond it
            beyond = t >= self._start + window
            cut = int(beyond.argmax()) if beyond.any() else len(t)
            now = block[first:first + cut]
            early = now["t"] < self._start
            if early.any():
                back = int(early.argmax())
                if self._start - int(now["t"][back]) > MOST_EMPTY * window:
                    self._add(self._on_sensor(now[:back]))
                    first += back
                    yield from self._jump(int(now["t"][back]))
                    continue
                self.totals.late += int(early.sum())
                now = now[~early]
            self._add(self._on_sensor(now))
            first += cut
            if first < len(block):
                yield from self._advance(int(block["t"][first]), window)

    def _advance(self, now: int, window: int) -> Iterator[Decision]:
        if self._start is None:
            self._start = now
        if (now - self._start) // window > MOST_EMPTY:
            yield from self._jump(now)
        while now >= self._start + window:
            yield self._decide()

    def _jump(self, start: int) -> Iterator[Decision]:
        """The clock has leapt: end the window that was begun, and begin anew."""
        self.totals.jumps += 1
        if self._held:
            yield self._decide()
        self.reset()
        self._start = start

    # ------------------------------------------------------------------------------------------------ a window
    def _on_sensor(self, part: np.ndarray) -> np.ndarray:
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
        found = Decision(start, stop, self.steps.t, logits, self._held, 1e3 * spent, frame)
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
