"""Layer by layer: which kernel computes it, on what density, how fast, and how near that is to what the machine can do."""
from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bitspike.deploy import Net, kernels

_SHAPES = ((28, 28, 64, 96, 3), (16, 16, 256, 192, 1), (14, 14, 256, 192, 3))  # height, width, inputs, outputs, kernel


@cache
def dense_rate(name: str) -> float:
    """MACs per second of one thread at best: the dense kernel of a set on shapes that suit it, all in the caches.

    A layer may pass it: what events and popcount skip or pack is counted as if it had been done.
    """
    rng, best = np.random.default_rng(0), 0.0
    for height, width, inputs, outputs, size in _SHAPES:
        weight = rng.integers(-8, 8, (outputs, size, size, inputs)).astype(np.int8)
        zeros = np.zeros(outputs, np.int32)
        conv = kernels.get(name).prepare_conv(weight, (1, 1), (size // 2, size // 2), 1, np.zeros(inputs, np.int16),
                                              zeros + 1, 4, zeros, False)
        x = np.full((1, 1, height, width, inputs), 255, np.uint8)
        macs = height * width * weight.size
        for _ in range(20):
            began = time.perf_counter()
            conv(x, 1)
            best = max(best, macs / (time.perf_counter() - began))
    return best


def bound_of(name: str) -> tuple[float, str]:
    """What `explained` measures against, in MACs per second of one thread, and in words: the matrix unit, if there is one."""
    if name == "amx":
        return kernels.extension(name).spin_macs(name, "matrix", 0.1), "the matrix unit on registers alone"
    return dense_rate(name), "the dense kernel at its best"


def explained(net: Net, images: NDArray[np.uint8], threads: int = 1) -> list[dict[str, Any]]:
    """Plain rows, one per stage of the compiled plan, in the order of execution."""
    bound = bound_of(kernels.active())[0] * threads
    batch = images.shape[0] if net.input_steps == 1 else images.shape[1]
    net(images, threads)  # the choice of the kernels follows the density of calls before
    rows = []
    for layer in net.explain(images, threads, repeats=15):
        rate = layer.macs * batch / (layer.ms / 1e3) if layer.ms > 0 else 0.0
        rows.append({"layer": layer.layer, "ops": list(layer.ops), "choice": layer.variant, "able": list(layer.able),
                     "density": layer.density, "ms": round(layer.ms, 5), "macs": layer.macs,
                     "gmacs_per_s": round(rate / 1e9, 2), "percent_of_bound": round(100 * rate / bound, 2)})
    return rows


def table_of(rows: list[dict[str, Any]], threads: int = 1) -> Table:
    """The rows as a table, with sums."""
    bound, what = bound_of(kernels.active())
    total = sum(row["ms"] for row in rows)
    table = Table(title=f"bound: {bound * threads / 1e9:,.0f} GMAC/s, {what} on {threads} thread{'s' * (threads > 1)}",
                  title_justify="left")
    for heading in ("layer", "what", "choice"):
        table.add_column(heading, no_wrap=True)
    for heading in ("density", "ms", "% of time", "M MACs", "GMAC/s", "% of bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        density = "" if row["density"] is None else f"{row['density']:.1%}"
        works = row["macs"] > 0
        table.add_row(row["layer"], "+".join(row["ops"]), row["choice"] or "", density, f"{row['ms']:.3f}",
                      f"{100 * row['ms'] / max(total, 1e-12):.1f}", f"{row['macs'] / 1e6:,.1f}" if works else "",
                      f"{row['gmacs_per_s']:,.0f}" if works else "", f"{row['percent_of_bound']:.0f}" if works else "")
    by_choice: dict[str, float] = {}
    for row in rows:
        by_choice[row["choice"] or "other"] = by_choice.get(row["choice"] or "other", 0.0) + row["ms"]
    table.caption = f"{total:.3f} ms in all: " + ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(
        by_choice.items(), key=lambda item: -item[1]))
    return table
