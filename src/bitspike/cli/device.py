"""`bitspike run`: pictures through the integer runtime. Imports nothing beyond the base install."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from bitspike.cli.messages import complain

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_BATCH = 32


def pictures(given: list[Path]) -> Iterator[tuple[Path, str | None]]:
    """(file, None) for every picture named, or in a folder named and not hidden; (path, message) for what cannot be one."""
    for path in given:
        if not path.is_dir():
            yield path, None
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS and p.name[0] != "." and p.is_file())
        if not found:
            held = sum(1 for _ in path.iterdir())
            yield path, f"{path}: the folder holds no pictures ({held} entries; looked for {', '.join(ENDINGS)})."
        for picture in found:
            yield picture, None


def run(file: str, inputs: list[Path], /, *, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
        top: Annotated[int, Parameter(name=["--top", "-k"])] = 5, threads: int | None = None,
        stream: Annotated[bool, Parameter(negative=())] = False, window_us: int | None = None,
        window_events: int | None = None, never_reset: Annotated[bool, Parameter(negative=())] = False, speed: float = 0.0,
        save: Path | None = None, prefix: Annotated[bool, Parameter(negative=())] = False,
        score: float | None = None) -> int:
    """Classify pictures, or recordings of an event camera, with a .bitspike file, on the integer runtime (no torch).

    With a detector, say where which objects are; with a segmenter, which classes the pixels have; --save draws it over the
    picture. What cannot be read is reported on stderr and makes the exit code 2; the others are still answered.

    Parameters
    ----------
    file
        Path of a .bitspike file, or the name of a built-in network: cifar10, cifar10-binary or cifar10-binary-spikes.
    inputs
        Picture files, or folders of them; for a network of event frames, recordings of any format that is read.
    as_json
        Print JSON instead of text.
    top
        How many classes, or detections of a picture, to show.
    threads
        Threads of the runtime; all cores if not given.
    stream
        Play the recording through the network window by window, with a decision after each.
    window_us
        With --stream: a window lasts so many microseconds (default: as the network was trained).
    window_events
        With --stream: a window holds so many events.
    never_reset
        With --stream: the membranes are carried on for ever, not only for the T windows the network was trained on.
    speed
        With --stream: 1 plays in real time, 2 twice as fast, 0 as fast as it can.
    save
        With --stream: also write the events and the decisions over time as .gif or .html. With a detector or segmenter: the
        drawing of a picture, or a folder for those of several.
    prefix
        Of a damaged recording, take what is whole before the damage, with a warning.
    score
        With a detector: what is less sure is left out (default 0.5).
    """
    from bitspike.cli import stream as streaming
    from bitspike.cli.scenes import Showing, show
    from bitspike.data.events import EventError
    from bitspike.deploy import Detector, ImageError, Net, load, read_image

    if top < 1:
        raise ImageError(f"--top {top}: at least 1 class must be shown.")
    net = load(file)
    if score is not None and (not 0 <= score <= 1 or not isinstance(net, Detector)):
        raise ImageError(f"--score {score}: a number of 0..1, for a detector.")
    if not isinstance(net, Net):
        if stream or prefix or window_us or window_events or never_reset or speed:
            raise ImageError(f"{file}: this network was made for {net.task} of pictures; --stream and what goes with "
                             "it are for networks of event frames.")
        how = Showing(top, 0.5 if score is None else score, as_json, threads, save)
        return show(net, list(pictures(inputs)), how)
    if stream:
        return streaming.play(net, inputs, streaming.Options(top, as_json, threads, window_us, window_events, never_reset,
                                                             speed, save, prefix))
    if save is not None or window_us or window_events or never_reset or speed:
        raise ImageError("--save, --window-us, --window-events, --never-reset and --speed go with --stream.")
    results: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], np.ndarray]] = []

    def flush() -> None:
        if waiting:
            logits = net(np.stack([pixels for _, pixels in waiting], int(frames)), threads)
            for (entry, _), row in zip(waiting, logits, strict=True):
                entry["top"] = streaming.best(row, net.classes, top)
            waiting.clear()

    frames = net.input_steps > 1
    for path, problem in ((path, None) for path in inputs) if frames else pictures(inputs):
        entry: dict[str, Any] = {"image": str(path)}
        results.append(entry)
        if problem is None:
            try:
                waiting.append((entry, streaming.read_frames(path, net, prefix) if frames
                                else read_image(path, net.header["input"])))
            except (ImageError, EventError, OSError) as error:
                problem = streaming.told(error)
        if problem is not None:
            entry["error"] = problem
        if len(waiting) == _BATCH:
            flush()
    flush()
    _show(results, as_json)
    return 2 if any("error" in entry for entry in results) else 0


def _show(results: list[dict[str, Any]], as_json: bool) -> None:
    from bitspike.deploy.fields import printable

    out = Console(highlight=False, soft_wrap=True)
    for entry in results:
        if "error" in entry:
            complain(printable(entry["error"]))
        elif not as_json:
            ranked = "  ".join(f"{guess['class']} {guess['probability']:.1%}" for guess in entry["top"])
            out.print(Text(printable(f"{entry['image']}: {ranked}")))
    if as_json:
        print(json.dumps(results, indent=1))
