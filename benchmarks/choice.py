"""Calibrate the cost model by which the runtime chooses how to compute a convolution (csrc/choice.cc).

    python benchmarks/choice.py [--isa avx512] [--repeats 15] [--table]

Times every variant on shapes of the shipped networks over a range of densities, fits the model's constants, and prints them
as lines of csrc/choice.cc, with what the choice costs compared with always taking the fastest: that of the constants which are
compiled in, and that of the new ones. Processor time, so that other work on the machine does little harm.
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np

from bitspike.deploy import kernels

#: height = width, channels, outputs, kernel, stride
SHAPES = [
    (56, 32, 128, 3, 1), (56, 64, 128, 1, 1), (28, 128, 128, 3, 1), (14, 256, 256, 1, 1), (14, 256, 1024, 1, 1),
    (14, 1024, 256, 1, 1), (14, 128, 256, 3, 2), (15, 64, 64, 3, 1), (7, 256, 256, 3, 1), (7, 256, 256, 1, 1),
    (56, 128, 32, 3, 1), (56, 256, 64, 3, 1), (32, 128, 128, 3, 1), (16, 256, 256, 3, 1), (8, 512, 512, 3, 1),
    (8, 384, 1536, 1, 1),
]
#: outputs that an addition makes at once, whether there are so many or not, and bits of a row: csrc/choice.cc has the same
ADDED, ROW = {"avx512": 128, "amx": 128}, {"avx512": 512, "amx": 512, "avx2": 256, "neon": 128, "neon_dot": 128}
#: of a vector
BYTES = {"avx512": 64, "amx": 64, "avx2": 32, "neon": 16, "neon_dot": 16}
#: share of codes that are not 0, and the largest code
INPUTS = [(0.02, 1), (0.05, 1), (0.15, 1), (0.30, 1), (0.50, 1), (0.05, 4), (0.15, 4), (0.40, 4)]
VARIANTS = ["dense", "narrow", "events", "sliced", "popcount", "shift", "winograd", "matrix"]
#: weights that make each variant possible
WEIGHTS = {"binary": [-1, 1], "pow2": [-4, -2, -1, 0, 1, 2, 4], "4 bits": list(range(-8, 8))}


@dataclass
class Sample:
    variant: str
    features: list[float]
    ns: float
    label: tuple[object, ...]


def measure(isa: str, shape: tuple[int, ...], share: float, top: int, weights: str, repeats: int) -> tuple[str, list[Sample]]:
    """The variant that the runtime takes once it knows the load, and the times of all."""
    size, channels, outputs, kernel, stride = shape
    rng = np.random.default_rng(0)
    codes = rng.integers(1, top + 1, (1, 1, size, size, channels)) * (rng.random((1, 1, size, size, channels)) < share)
    images = codes.astype(np.uint8)
    weight = rng.choice(WEIGHTS[weights], (outputs, kernel, kernel, channels)).astype(np.int8)
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    plan = kernels.extension(isa).Plan(isa)
    x = plan.value("u8", "pixels", (1, channels), (size, size), 0)
    y = plan.value("u8", "arena", (1, outputs), (out, out), 0)
    end = (out * out * outputs + 63) // 64 * 64
    z = plan.value("i32", "arena", (1, outputs), (1, 1), end)
    plan.stage((out, out), 0 if kernel == 1 and stride == 1 else out)
    numbers = np.full(outputs, 4096, np.int32)
    plan.conv(x, weight, (stride, stride), (pad, pad), 1, np.zeros(channels, np.int16), numbers, 8, numbers, (0, top), -1, -1,
              [(y, np.array([4], np.int32), 16, 0, 4)])
    plan.done(z, 1.0, end + 4 * outputs)
    logits = np.empty((1, outputs), np.float32)
    samples = []
    reads = out * out * kernel * kernel * channels
    events = {False: codes.sum() / codes.size, True: np.unpackbits(images).sum() / codes.size}  # by bits, or one by one
    for _ in range(9):
        plan.run(images, logits, 1, np.empty(0))
    (layer,) = plan.layers()
    for variant in layer["able"]:
        plan.force(0, variant)
        best = np.inf
        for _ in range(repeats + 1):
            start = time.thread_time_ns()
            plan.run(images, logits, 1, np.empty(0))
            best = min(best, time.thread_time_ns() - start)
        across = pixels_across(isa, outputs, kernel, stride, channels) if variant == "events" else 1
        wide_reads = out * -(-out // across) * kernel * (kernel + (across - 1) * stride) * channels
        added = additions(isa, variant, wide_reads, across * outputs, kernel, stride)
        wide = 21 * max(map(abs, WEIGHTS[weights])) <= 127
        products = (tile_products(out, wide) * channels * outputs if variant == "winograd"
                    else matrix_products(out, channels, outputs, kernel) if variant == "matrix" else reads * outputs)
        if variant == "matrix":
            wide_reads = matrix_products(1, channels, outputs, kernel) // 16  # its weights
        features = [products, added * events[variant == "events" and layer["by_bits"]], wide_reads, out * out * outputs]
        samples.append(Sample(variant, features, best, (shape, share, top, weights)))
    return layer["variant"], samples


def additions(isa: str, variant: str, reads: int, outputs: int, kernel: int, stride: int) -> float:
    """Of all events if every code were one, outputs rounded up; across (csrc/sliced.h), a row of taps is one addition."""
    row = ROW.get(isa, 1) if variant == "sliced" else ADDED.get(isa, 1)
    if variant == "sliced" and stride == 1 and 2 <= kernel <= 4 and outputs <= row // 2:
        return reads / kernel * -(-4 * outputs // row) * row
    return reads * -(-outputs // row) * row


def pixels_across(isa: str, outputs: int, kernel: int, stride: int, channels: int) -> int:
    """How many pixels have one list of events, weights of 4 bits (events_across in csrc/kernels.h)."""
    if kernel <= stride or outputs < 16 or outputs & (outputs - 1):
        return 1
    across = max((2 if isa in ("avx512", "amx") else 1) * BYTES.get(isa, 0) // outputs, 1)
    while across > 1 and kernel * (kernel + (across - 1) * stride) * channels > 8191:
        across //= 2
    return across


def tile_products(out: int, wide: bool) -> int:
    """Of one channel and output on out x out pixels: 24 for 2x4 of them or 16 for 2x2 (csrc/winograd.h)."""
    return (out + 1) // 2 * (-(-out // 4) * 24 if wide else (out + 1) // 2 * 16)


def matrix_products(out: int, channels: int, outputs: int, kernel: int) -> int:
    """With whole tiles of 16 pixels, 64 codes and two times 16 outputs (csrc/amx.cc)."""
    return -(-out * out // 16) * 16 * kernel * -(-kernel * channels // 64) * 64 * -(-outputs // 32) * 32


def fit(samples: list[Sample]) -> np.ndarray:
    """Constants that are not negative, smallest relative error."""
    columns = {"events": [0, 1, 2, 3], "sliced": [0, 1, 2, 3], "matrix": [0, 2, 3]}.get(samples[0].variant, [0, 3])
    a = np.array([[s.features[i] / s.ns for i in columns] for s in samples])
    constants = np.full(len(columns), 1e-3)
    for _ in range(20_000):  # multiplicative updates: a, constants and the target are positive
        constants *= a.sum(0) / (a.T @ (a @ constants))
    full = np.zeros(4)
    full[columns] = constants
    return full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=kernels.available()[-1], choices=kernels.available()[1:])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="print every measurement")
    arguments = parser.parse_args()
    samples: list[Sample] = []
    shipped = 0.0
    for weights in WEIGHTS:
        for index, shape in enumerate(SHAPES):
            print(f"\r{weights}: shape {index + 1} of {len(SHAPES)}", end="", file=sys.stderr)
            for share, top in INPUTS:
                taken, some = measure(arguments.isa, shape, share, top, weights, arguments.repeats)
                shipped += next(s.ns for s in some if s.variant == taken)
                samples += some
    print(file=sys.stderr)
    found = {v: fit([s for s in samples if s.variant == v]) for v in VARIANTS if any(s.variant == v for s in samples)}
    cases: dict[tuple[object, ...], list[Sample]] = {}
    for s in samples:
        cases.setdefault(s.label, []).append(s)
    chosen = sum(min(c, key=lambda s: float(found[s.variant] @ s.features)).ns for c in cases.values())
    best, dense = sum(min(s.ns for s in c) for c in cases.values()), sum(c[0].ns for c in cases.values())
    if arguments.table:
        for label, case in cases.items():
            print(label, {s.variant: f"{s.ns / 1e3:.1f} us (model {found[s.variant] @ s.features / 1e3:.1f})" for s in case})
    print(f"chosen by the runtime: {shipped / best:.3f} x the fastest; by the constants below: {chosen / best:.3f} x; "
          f"always dense: {dense / best:.3f} x")
    lines = ["{" + ", ".join(f"{n:.5f}f" for n in found.get(v, np.array([1.0, 0, 0, 0]))) + "}" for v in VARIANTS]
    print(f'{{"{arguments.isa}",\n {{' + ",\n  ".join(lines) + "}},")


if __name__ == "__main__":
    main()
