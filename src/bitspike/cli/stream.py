"""`bitspike run FILE RECORDING [--stream]`: recordings of event cameras through the integer runtime. No torch."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bitspike.cli.film import Elapsed, write_film
from bitspike.cli.messages import complain, warn
from bitspike.data.events import EventError, Events, iterate, read
from bitspike.data.events.framing import Frames
from bitspike.deploy import Decision, ImageError, Net, Stream
from bitspike.deploy.fields import printable
from bitspike.deploy.stream import check_frames

_CHUNK = 1 << 16  # events read at once
_PUSH = 1 << 13   # of them pushed at once: what is shown lags by no more,
_PACED = 1 << 6   # and by this at a pace
_STRAYS = 3       # events outside the sensor, or one in a thousand, are damage and not another sensor
FILM = 600        # windows at most that --save keeps


@dataclass(frozen=True)
class Options:
    """What the command line said, see `device.run`."""

    top: int = 5
    as_json: bool = False
    threads: int | None = None
    window_us: int | None = None
    window_events: int | None = None
    never_reset: bool = False
    speed: float = 0.0
    save: Path | None = None
    prefix: bool = False

    @property
    def on_error(self) -> str:
        """As `iterate` takes it."""
        return "prefix" if self.prefix else "raise"


def told(error: Exception) -> str:
    """The error's message, with the option of the command for that of the functions."""
    return str(error).replace("on_error=\"prefix\"", "--prefix")


def _check_there(path: Path) -> None:
    """Errors: EventError."""
    if path.is_dir():
        raise EventError(f"this is a folder; recordings are named one by one, such as {path / '*'}.", path)
    if not path.exists():
        raise EventError("there is no such file. Give the path of a recording.", path)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its word.

    >>> counted(1, "window"), counted(1200, "event"), counted(2, "event left", "events left")
    ('1 window', '1,200 events', '2 events left')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _empty(path: Path) -> EventError:
    return EventError("there are no events in it, so there is nothing to decide on.", path)


def _trained(net: Net) -> Mapping[str, Any]:
    """sensor, layout, window_us of the recordings that the network was trained on, and how they were cut ("by": count or time),
    as far as its file says.
    """
    provenance = net.header.get("provenance", {})
    known, settings = provenance.get("events"), provenance.get("settings")
    by = settings.get("frames_by") if isinstance(settings, dict) else None
    return {**(known if isinstance(known, dict) else {}), "by": by if by in ("count", "time") else None}


def _window_us(net: Net) -> int | None:
    """Microseconds of a window, where the network was trained on windows of a fixed length."""
    found = _trained(net).get("window_us")
    return found if isinstance(found, int) and found > 0 else None


def _layout(net: Net, path: Path) -> str | None:
    """The layout is for AEDAT 2.0 only."""
    with path.open("rb") as file:
        return _trained(net).get("layout") if file.read(10) == b"#!AER-DAT2" else None


def _known_sensor(net: Net) -> tuple[int, int] | None:
    """(height, width) that the network was trained on."""
    known = _trained(net).get("sensor")
    return (int(known[0]), int(known[1])) if isinstance(known, list) and len(known) == 2 else None


def _inside(data: np.ndarray, sensor: tuple[int, int]) -> np.ndarray:
    """Which events lie on the sensor."""
    return (data["y"] < sensor[0]) & (data["x"] < sensor[1])  # type: ignore[no-any-return]


def _sensor(net: Net, size: tuple[int, int] | None, extent: tuple[int, int], number: int, outside: int) -> tuple[int, int]:
    """(height, width): what the recording says, else what the network was trained on, if the events fit or hardly any of them
    (`outside` of `number`) do not: these are dropped and counted. Else just enough.
    """
    if size is not None:
        return size
    known = _known_sensor(net)
    found = max(1, extent[0]), max(1, extent[1])
    if known is not None:
        if outside <= max(_STRAYS, number // 1000):
            return known
        warn(f"Events reach column {found[1] - 1} and row {found[0] - 1}, and the network was trained on a sensor of "
             f"{known[1]} x {known[0]} pixels. {outside:,} of {number:,} "
             f"events lie outside. Taken: a sensor of {found[1]} x {found[0]}, shrunk to the network's size.")
    return found


def read_frames(path: Path, net: Net, prefix: bool = False) -> np.ndarray:
    """A recording as the network takes it, uint8 [T, H, W, 2]; cut as in training. Errors: EventError, OSError, ImageError.

    A network of windows of a fixed length takes T of them from the first event on, and nothing that lasts longer.
    prefix: of a damaged recording, take what is whole before the damage, with a warning.
    """
    height, width, channels = net.input_shape
    if channels != 2:
        raise ImageError(f"{net!r} takes frames of {channels} channels; a recording gives two (OFF, ON).")
    _check_there(path)
    found: Events = read(path, on_error="prefix" if prefix else "raise", layout=_layout(net, path))
    if not len(found):
        raise found.problem or _empty(path)
    if found.problem is not None:
        warn(f"{told(found.problem)} Taken: the {counted(len(found), 'event')} before.")
    by, window, span = _trained(net)["by"], _window_us(net), None
    if window is not None:
        first, last = int(found.data["t"].min()), int(found.data["t"].max())
        by, span = "time", (first, first + net.input_steps * window)
        if last >= span[1]:
            raise EventError(
                f"it lasts {last - first + 1:,} us; the network was trained on {net.input_steps} windows of {window:,} us, "
                f"{net.input_steps * window:,} us in all. Give --stream: it plays the recording window by window and decides "
                "after each.", path)
    elif by is None:
        warn(f"{path}: the network's file does not say how its recordings were cut; taken: {net.input_steps} frames of equal "
             "numbers of events.")
    frames = Frames(net.input_steps, (height, width), by or "count")
    known = found.size or _known_sensor(net)
    outside = 0 if known is None else len(found) - int(_inside(found.data, known).sum())
    sensor = _sensor(net, found.size, found.extent, len(found), outside)
    here = _inside(found.data, sensor)
    if not here.all():
        warn(f"{path}: {counted(len(found) - int(here.sum()), 'event')} outside the sensor of {sensor[1]} x {sensor[0]} pixels "
             "dropped.")
    if not here.any():
        raise _empty(path)
    cut = frames.of(found.data[here], sensor, span=span)
    return np.ascontiguousarray(cut.transpose(0, 2, 3, 1))


# ----------------------------------------------------------------------------------------------------- play
def _scan(path: Path, layout: str | None, on_error: str,
          known: tuple[int, int] | None) -> tuple[int, int, tuple[int, int] | None, tuple[int, int]]:
    """(number of events, how many of them outside the sensor, size by the file, extent), read once in pieces. `known`: the
    sensor where the file says none. Errors: EventError, of an empty one too.
    """
    number, outside, height, width = 0, 0, 1, 1
    size, problem = None, None
    for piece in iterate(path, on_error=on_error, layout=layout):
        number, size, problem = number + len(piece), piece.size, piece.problem
        height, width = max(height, piece.extent[0]), max(width, piece.extent[1])
        limit = size or known
        if limit is not None and (height > limit[0] or width > limit[1]):
            outside += len(piece) - int(_inside(piece.data, limit).sum())
    if not number:
        raise problem or _empty(path)
    if problem is not None:
        warn(f"{told(problem)} Taken: the {counted(number, 'event')} before.")
    return number, outside, size, (height, width)


def _window(net: Net, number: int, options: Options, path: Path) -> dict[str, int]:
    """window_us or count for the stream; number: of the events on the sensor."""
    if options.window_us is not None and options.window_events is not None:
        raise ImageError("give one of --window-us and --window-events.")
    if options.window_us is not None or options.window_events is not None:
        kind, value = ("window_us", options.window_us) if options.window_us is not None else ("count", options.window_events)
        if value is None or value < 1:
            raise ImageError("--window-us and --window-events: at least 1.")
        return {kind: value}
    window = _window_us(net)
    if window is not None:
        return {"window_us": window}
    if _trained(net)["by"] == "count":
        if number < net.time_steps:
            raise ImageError(f"{path}: {counted(number, 'event')}; the network was trained on recordings cut into "
                             f"{net.time_steps} parts. Take a longer one, or give --window-us or --window-events.")
        return {"count": number // net.time_steps}  # as in training: the whole recording in T parts
    raise ImageError(f"{path}: how long is a window? The network's file does not say; give --window-us or --window-events.")


def play(net: Net, paths: list[Path], options: Options) -> int:
    """Every recording through a stream of its own; 2 if one could not be read, else 0. Errors: ImageError for such options."""
    check_frames(net)
    if not 0 <= options.speed < float("inf"):
        raise ImageError(f"--speed {options.speed}: a number, 0 (as fast as it can) or more.")
    if options.save is not None and (options.save.suffix.lower() not in (".gif", ".html") or len(paths) != 1):
        raise ImageError(f"--save {options.save}, of {counted(len(paths), 'recording')}: a .gif or .html of one recording is "
                         "written. Other films, such as .mp4, are made of the .gif, for example by ffmpeg.")
    if options.save is not None and not options.save.parent.is_dir():
        raise ImageError(f"--save {options.save}: there is no folder {options.save.parent}; make it first.")
    found: list[dict[str, Any]] = []
    for path in paths:
        if len(paths) > 1 and not options.as_json:
            Console(highlight=False, soft_wrap=True).print(Text(printable(f"{path}"), style="bold"))
        try:
            found.append(_play_one(net, path, options))
        except (EventError, OSError) as error:
            complain(printable(told(error)))
            found.append({"recording": str(path), "error": told(error)})
    if options.as_json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=1))
    return 2 if any("error" in one for one in found) else 0


def _play_one(net: Net, path: Path, options: Options) -> dict[str, Any]:
    _check_there(path)
    layout = _layout(net, path)
    number, outside, size, extent = _scan(path, layout, options.on_error, _known_sensor(net))
    sensor = _sensor(net, size, extent, number, outside)
    if extent[0] <= sensor[0] and extent[1] <= sensor[1]:
        outside = 0
    number -= outside
    if not number:
        raise _empty(path)
    stream = Stream(net, sensor, **_window(net, number, options, path), reset_every=0 if options.never_reset else None,
                    threads=options.threads)
    kept: list[Decision] = []
    rows: list[dict[str, Any]] = []
    show = _Show(net, stream, path, options)
    with show:
        for decision in _decisions(stream, path, layout, options, number):
            show.decision(decision)
            if options.save is not None and len(kept) < FILM:
                kept.append(decision)
            if options.as_json:
                rows.append({"start_us": decision.start, "stop_us": decision.stop, "step": decision.step,
                             "ends_round": show.round_ends(decision), "clock_jumped": decision.jumped,
                             "events": decision.events, "latency_ms": round(decision.latency_ms, 4),
                             "top": best(decision.logits, net.classes, options.top)})
    if options.save is not None:
        write_film(options.save, net.classes, kept)
        more = f" (the first {FILM} windows)" if stream.totals.windows > FILM else ""
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"wrote {options.save}{more}", markup=False)
    totals = asdict(stream.totals)
    del totals["latencies_ms"]
    return {"recording": str(path), "decisions": rows, "totals": totals}


def _decisions(stream: Stream, path: Path, layout: str | None, options: Options, number: int) -> Iterator[Decision]:
    """Every window, the last one cut short; at `speed` times the recording's own pace (0: no waiting).

    number: of the events on the sensor. Where it is cut into T parts, the last of them takes the rest, as in training.
    """
    began, clock, speed = time.monotonic(), Elapsed(), options.speed
    for part in _parts(stream, path, layout, options, number):
        for decision in stream.push(part):
            if speed:
                time.sleep(max(0.0, clock.after(decision) / speed - (time.monotonic() - began)))
            yield decision
    yield from stream.flush()


def _parts(stream: Stream, path: Path, layout: str | None, options: Options, number: int) -> Iterator[np.ndarray]:
    some, seen = _PACED if options.speed else _PUSH, 0
    whole = stream.count is not None and options.window_events is None
    last = (stream.net.time_steps - 1) * (stream.count or 0) if whole else -1  # where the last part begins
    for piece in iterate(path, _CHUNK, on_error=options.on_error, layout=layout):
        data = stream.on_sensor(piece.data) if whole else piece.data  # parts are parts of what counts
        for start in range(0, len(data), some):
            part = data[start:start + some]
            if seen <= last < seen + len(part):
                yield part[:last - seen]
                stream.count = number - last
                yield part[last - seen:]
            else:
                yield part
            seen += len(part)


def best(logits: np.ndarray, classes: list[str], top: int) -> list[dict[str, Any]]:
    """The `top` classes with their softmax, in falling order."""
    shifted = np.exp(logits - logits.max(), dtype=np.float64)
    share = shifted / shifted.sum()
    order = np.argsort(-logits, kind="stable")[:top]
    return [{"class": classes[i], "index": int(i), "probability": round(float(share[i]), 6), "logit": float(logits[i])}
            for i in order]


class _Show:
    """Live in a terminal; in a pipe, a line whenever a round of T windows ends. Nothing with --json."""

    def __init__(self, net: Net, stream: Stream, path: Path, options: Options) -> None:
        self.net, self.stream, self.path, self.options = net, stream, path, options
        is_live = sys.stdout.isatty() and not options.as_json
        self.console = Console(highlight=False, soft_wrap=not is_live)
        self.live = Live(console=self.console, refresh_per_second=12, transient=False) if is_live else None
        self.last: Decision | None = None
        self.whole: Decision | None = None  # the last one that ended a round
        self.clock, self.drawn = Elapsed(), 0.0
        self.seconds = self.whole_seconds = 0.0  # of the recording, when these two were made

    def __enter__(self) -> _Show:
        (self.live or nullcontext()).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            shown = self.whole or self.last
            if shown is not None:
                # an unfinished round may say little: it is not what stays
                self.live.update(self._picture(shown, self.whole_seconds if self.whole else self.seconds))
            self.live.__exit__(*error)
        elif self.last is not None and not self.options.as_json and error[0] in (None, KeyboardInterrupt):
            if not self.round_ends(self.last):
                self._line(self.last)
            self.console.print(self._summary())

    def round_ends(self, decision: Decision) -> bool:
        """Whether the network has seen as many windows as in training (without resets: a multiple of them)."""
        return decision.step % (self.stream.reset_every or self.net.time_steps) == 0

    def decision(self, decision: Decision) -> None:
        self.last, self.seconds = decision, self.clock.after(decision)
        if self.round_ends(decision):
            self.whole, self.whole_seconds = decision, self.seconds
        if decision.jumped and self.live is None:
            warn(f"{self.path}: its clock jumped, to {decision.start} us: the windows begin anew there, the membranes at rest.")
        if self.options.as_json:
            return
        if self.live is None:
            if self.round_ends(decision):
                self._line(decision)
        elif time.monotonic() - self.drawn > 0.08:
            self.drawn = time.monotonic()
            self.live.update(self._picture(decision, self.seconds))

    def _line(self, decision: Decision) -> None:
        ranked = "  ".join(f"{guess['class']} {guess['probability']:.1%}"
                           for guess in best(decision.logits, self.net.classes, self.options.top))
        every = self.stream.reset_every
        begun = "" if not every or self.round_ends(decision) else f" (a round not over: {decision.step} of {every} windows)"
        self.console.print(Text(printable(f"{self.seconds:.3f} s{begun}: {ranked}")))

    def _picture(self, decision: Decision, seconds: float) -> Group:
        table = Table.grid(padding=(0, 1))
        for guess in best(decision.logits, self.net.classes, self.options.top):
            width = round(30 * guess["probability"])
            table.add_row(Text(printable(guess["class"])[:40]), Text("█" * width + "·" * (30 - width), style="cyan"),
                          Text(f"{guess['probability']:.1%}"))
        head = Text(printable(f"{self.path.name}  {seconds:.3f} s  window {decision.step} of "
                              f"{self.stream.reset_every or 'endless'}, {counted(decision.events, 'event')}"), style="bold")
        return Group(head, table, self._summary())

    def _summary(self) -> Text:
        totals = self.stream.totals
        decided = ""
        if self.whole is not None and self.whole is not self.last and self.live is None:
            (guess,) = best(self.whole.logits, self.net.classes, 1)
            decided = printable(f"; after the last whole round, at {self.whole_seconds:.3f} s: {guess['class']} "
                                f"{guess['probability']:.1%}")
        times = np.array(totals.latencies_ms or [0.0])
        odd = [counted(number, *words) for number, *words in (
            (totals.empty, "empty window"), (totals.late, "late event dropped", "late events dropped"),
            (totals.astray, "event dropped whose time was far off", "events dropped whose time was far off"),
            (totals.outside, "event outside the sensor", "events outside the sensor"),
            (totals.clipped, "event above 255 in a pixel", "events above 255 in a pixel"),
            (totals.jumps, "jump of the clock", "jumps of the clock")) if number]
        return Text(f"{counted(totals.windows, 'window')}, {counted(totals.events, 'event')}, "
                    f"{totals.events_per_second / 1e6:.2f} M events/s; "
                    f"decision after {np.median(times):.2f} ms (median), {times.max():.2f} ms (most)"
                    + (f"; {', '.join(odd)}" if odd else "") + decided)
