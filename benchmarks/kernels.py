"""Convolution kernels one by one: GMAC/s, percent of the machine's bound, ratio to torch's int8 product where torch is there.

    python benchmarks/kernels.py                          # every variant and instruction set, shapes of the 15 M network
    python benchmarks/kernels.py --isa avx512 --variant events --json FILE

One thread. Times are the fastest of many runs, epilogue included (a neuron with counts 0..4 and its count of spikes). GMAC/s
counts every product of the layer, also those with a code of 0, whatever the kernel skipped; that is why events may be faster
than the bound of additions times density. The bound is the variant's instruction alone, in registers: products for dense,
narrow and winograd (times 72 / 24), AND + count + add for popcount (one pass per bit of a count), byte additions for
events and full adders for sliced (divided by the mean code). `vs torch` is the time of torch._int_mm (oneDNN) on the
matrices of the same layer, laid out beforehand and without epilogue, over ours.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from bitspike.deploy import _kernels  # type: ignore[attr-defined]

LINE_SECONDS = 0.25  # per line


class Shape(NamedTuple):
    """A convolution of the 15 M QSD-Transformer on a 224 x 224 picture; the input is `side` x `side`."""

    name: str
    side: int
    channels: int
    outputs: int
    kernel: int
    groups: int = 1

    @property
    def macs(self) -> int:
        """Products of one image (stride 1, same size)."""
        return self.side**2 * self.outputs * self.kernel**2 * self.channels // self.groups


SHAPES = [
    Shape("stem 3x3", 112, 32, 128, 3), Shape("stem 3x3", 112, 128, 32, 3),
    Shape("stage 1 3x3", 56, 64, 256, 3), Shape("stage 1 3x3", 56, 256, 64, 3),
    Shape("stage 2 3x3", 28, 128, 512, 3), Shape("stage 2 3x3", 28, 512, 128, 3),
    Shape("stage 1 1x1", 56, 128, 64, 1), Shape("stage 3 1x1", 14, 256, 256, 1),
    Shape("stage 4 fc1", 14, 360, 1440, 1), Shape("stage 4 fc2", 14, 1440, 360, 1),
    Shape("stem depthwise", 112, 64, 64, 7, 64), Shape("stage 1 depthwise", 56, 128, 128, 7, 128),
]
DENSITIES = [0.05, 0.15, 0.3, 0.5]


#: what bounds a variant, where it is not products
INSTRUCTIONS = {"popcount": "popcount", "events": "add", "sliced": "carry", "shift": None, "matrix": "matrix"}
BARE = ("dot", "popcount", "add", "carry", "matrix")


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest run."""
    run()
    best, end = float("inf"), time.perf_counter() + LINE_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def torch_seconds(shape: Shape) -> float | None:
    """Of torch._int_mm on the layer as one matrix product; None without torch, or where it does not apply."""
    if shape.groups > 1:
        return None
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    a = torch.randint(0, 5, (shape.side**2, shape.kernel**2 * shape.channels), dtype=torch.int8)
    b = torch.randint(-8, 8, (shape.outputs, a.shape[1]), dtype=torch.int8).t()
    return fastest(lambda: torch._int_mm(a, b))


def counts(rng: np.random.Generator, shape: Shape, density: float, levels: int) -> np.ndarray:
    """Codes of that share of nonzeros; each further spike of a count is there with probability 1/4."""
    x = np.zeros((shape.side, shape.side, shape.channels), np.uint8)
    alive = rng.random(x.shape) < density
    for _ in range(levels):
        x += alive
        alive &= rng.random(x.shape) < 0.25
    return x


def measure(
    isa: str, variant: str, shape: Shape, density: float, levels: int, bounds: dict[str, float]
) -> dict[str, Any] | None:
    """One line of the table; None where the variant does not support the shape."""
    rng = np.random.default_rng(0)
    weights = {"popcount": [-1, 1], "sliced": [-1, 1], "shift": [-4, -2, -1, 0, 1, 2, 4],
               "winograd": list(range(-3, 4))}.get(variant, list(range(-8, 8)))
    w = rng.choice(weights, (shape.outputs, shape.kernel, shape.kernel, shape.channels // shape.groups)).astype(np.int8)
    m, b = np.full(shape.outputs, 1 << 28, np.int32), np.zeros(shape.outputs, np.int32)
    pad = shape.kernel // 2
    conv = _kernels.OneConv(
        isa, variant, (shape.side, shape.side), w, (1, 1), (pad, pad), shape.groups, np.zeros(shape.channels, np.int16),
        m, 20, b, (0, levels),
    )
    if not conv.supported:
        return None
    x = counts(rng, shape, density, levels)
    codes = np.empty((shape.side, shape.side, shape.outputs), np.uint8)
    neuron = [(np.array([4], np.int32), 16, 0, 4, codes)]
    seconds = fastest(lambda: conv(x, (0, shape.side), None, None, neuron))
    instruction = INSTRUCTIONS.get(variant, "dot")
    bound = bounds.get(f"{isa} {instruction}", 0.0)
    if variant == "winograd":
        bound *= 72 / 24
    if variant == "popcount":
        bound /= levels.bit_length()
    if variant in ("events", "sliced"):
        bound /= max(float(x.mean()), 1e-9)
    rate = shape.macs / seconds
    return {
        "op": variant, "isa": isa, "shape": f"{shape.name} {shape.side}x{shape.side} {shape.channels}>{shape.outputs}",
        "density": round(float((x > 0).mean()), 3), "mean_code": round(float(x.mean()), 3), "levels": levels,
        "ms": seconds * 1e3, "gmacs": rate / 1e9, "percent_of_bound": 100 * rate / bound if bound else None,
        "packed_bytes": conv.packed_bytes,
    }


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=_kernels.available(), action="append", help="default: all but scalar")
    parser.add_argument("--variant", choices=_kernels.variants(), action="append", help="default: all")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--levels", type=int, default=4, choices=range(1, 16), help="largest count; 1 is binary spikes")
    parser.add_argument("--json", help="write the lines to this file")
    options = parser.parse_args()
    isas = options.isa or [i for i in _kernels.available() if i != "scalar"] or ["scalar"]
    bounds = {}
    for isa in isas:
        if isa != "scalar":
            bounds.update({f"{isa} {what}": _kernels.spin_macs(isa, what, 0.3) for what in BARE})
    for name, rate in bounds.items():
        if rate:
            print(f"bound: {name}: {rate / 1e9:.0f} GMAC/s in registers")
    lines = []
    for shape in SHAPES:
        if options.shape not in shape.name:
            continue
        reference = torch_seconds(shape)
        if reference:
            print(f"torch._int_mm        {shape.name} {shape.side}x{shape.side} {shape.channels}>{shape.outputs}"
                  f"  {reference * 1e3:8.3f} ms {shape.macs / reference / 1e9:6.0f} GMAC/s")
        for isa in isas:
            for variant in options.variant or _kernels.variants():
                for density in DENSITIES if variant in ("events", "sliced") else [0.15]:
                    line = measure(isa, variant, shape, density, options.levels, bounds)
                    if line is None:
                        continue
                    line["vs_torch_int_mm"] = reference * 1e3 / line["ms"] if reference else None
                    lines.append(line)
                    part = f"{line['percent_of_bound']:4.0f} % of bound" if line["percent_of_bound"] else " " * 15
                    ratio = f"{line['vs_torch_int_mm']:6.2f} x torch" if reference else ""
                    print(f"{variant:9} {isa:7} {line['shape']:34} density {line['density']:.2f} {line['ms']:8.3f} ms "
                          f"{line['gmacs']:6.0f} GMAC/s {part} {ratio}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"bounds": bounds, "lines": lines}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
