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


def _best(logits: np.ndarray, classes: list[str], top: int) -> list[dict[str, Any]]:
    shifted = np.exp(logits - logits.max(), dtype=np.float64)
    share = shifted / shifted.sum()
    order = np.argsort(-logits, kind="stable")[:top]
    return [{"class": classes[i], "index": int(i), "probability": round(float(share[i]), 6), "logit": float(logits[i])}
            for i in order]


def run(file: str, images: list[Path], /, *, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
        top: Annotated[int, Parameter(name=["--top", "-k"])] = 5, threads: int | None = None) -> int:
    """Classify pictures with a .bitspike file, on the integer runtime (no torch).

    Pictures that cannot be read are reported on stderr and make the exit code 2; the others are still classified.

    Parameters
    ----------
    file
        Path of a .bitspike file, or the name of a built-in network (cifar10).
    images
        Picture files, or folders of them.
    as_json
        Print a JSON list instead of text.
    top
        How many classes to show.
    threads
        Threads of the runtime; all cores if not given.
    """
    from bitspike.deploy import ImageError, load, read_image

    if top < 1:
        raise ImageError(f"--top {top}: at least 1 class must be shown.")
    net = load(file)
    results: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], np.ndarray]] = []

    def flush() -> None:
        if waiting:
            logits = net(np.stack([pixels for _, pixels in waiting]), threads)
            for (entry, _), row in zip(waiting, logits, strict=True):
                entry["top"] = _best(row, net.classes, top)
            waiting.clear()

    for path, problem in pictures(images):
        entry: dict[str, Any] = {"image": str(path)}
        results.append(entry)
        if problem is None:
            try:
                waiting.append((entry, read_image(path, net.header["input"])))
            except ImageError as error:
                problem = str(error)
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
