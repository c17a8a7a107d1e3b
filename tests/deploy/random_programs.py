"""Random small artifacts that obey docs/format.md: every op, odd widths, one or several time steps."""
from __future__ import annotations

from typing import Any

import numpy as np

from bitspike.deploy.artifact import pack_codes
from bitspike.deploy.packing import code_table

SCHEMES = [
    {"kind": "binary", "bits": 1}, {"kind": "uniform", "bits": 2}, {"kind": "uniform", "bits": 3},
    {"kind": "uniform", "bits": 4}, {"kind": "uniform", "bits": 8}, {"kind": "pow2", "bits": 2}, {"kind": "pow2", "bits": 4},
]


class Builder:
    """Adds ops to a program; keeps what the next op must know: kind, S, H, W, C and largest code of every value."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.steps = int(self.rng.integers(1, 4))
        self.fraction_bits = int(self.rng.integers(4, 13))
        self.height, self.width = (int(n) for n in self.rng.integers(3, 9, 2))
        self.channels = int(self.rng.choice([1, 2, 3, 5]))
        self.frames = int(self.rng.choice([1, self.steps]))
        self.program: list[dict[str, Any]] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.values = {"pixels": ("u8", self.frames, self.height, self.width, self.channels, 255)}

    def emit(self, op: str, inputs: list[str], like: tuple, **attributes: Any) -> str:
        name = f"v{len(self.program)}"
        self.program.append({"op": op, "in": inputs, "out": name, **attributes})
        if self.rng.random() < 0.5:
            self.program[-1]["layer"] = f"layer.{name}"
        self.values[name] = like
        return name

    def tensor(self, array: np.ndarray) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = array
        return name

    def numbers(self, count: int, low: int, high: int) -> str:
        return self.tensor(self.rng.integers(low, high, count).astype(np.int32))

    def number(self, count: int, low: int, high: int) -> int | str:
        return int(self.rng.integers(low, high)) if self.rng.random() < 0.5 else self.numbers(count, low, high)

    def conv(self, x: str, outputs: int | None = None) -> str:
        rng = self.rng
        kind, steps, height, width, channels, largest = self.values[x]
        kernel = [int(k) for k in rng.integers(1, 4, 2)] if outputs is None else [1, 1]
        padding = [int(p) for p in rng.integers(0, 2, 2)] if outputs is None else [0, 0]
        stride = [int(s) for s in rng.integers(1, 3, 2)] if outputs is None else [1, 1]
        kernel = [min(k, size) for k, size in zip(kernel, (height, width), strict=True)]
        groups = int(rng.choice([g for g in range(1, channels + 1) if channels % g == 0])) if outputs is None else 1
        if outputs is None:
            outputs = groups * int(rng.choice([1, 2, 5, 17]))
        scheme = SCHEMES[rng.integers(len(SCHEMES))]
        codes = rng.choice(code_table(scheme), (outputs, *kernel, channels // groups))
        low = 0 if kind == "u8" else -largest
        attributes = {
            "weight": self.tensor(pack_codes(codes, scheme)), "scheme": scheme,
            "shape": [outputs, channels // groups, *kernel], "stride": stride, "padding": padding, "groups": groups,
            "m": self.numbers(outputs, -500, 500), "s": int(rng.integers(0, 12)),
            "b": self.numbers(outputs, -1000, 1000), "range": [low, largest],
        }
        if rng.random() < 0.5:
            pad = rng.integers(low, largest + 1, channels).astype(np.int16)
            attributes["pad_value"] = self.tensor(pad)
        out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, kernel, stride, strict=True)]
        return self.emit("conv", [x], ("i32", steps, *out, outputs, 2**31), **attributes)

    def codes(self, x: str) -> str:
        """Potentials to codes, one way or another."""
        kind, steps, height, width, channels, _ = self.values[x]
        if kind != "i32":
            return x
        which = self.rng.integers(5)
        shape = (height, width, channels)
        if which == 0:
            dtype, low = ("u8", 0) if self.rng.random() < 0.5 else ("s8", -127)
            high = int(self.rng.integers(1, 127))
            return self.emit(
                "quantize", [x], (dtype, steps, *shape, 127), m=self.number(channels, 1, 9), s=self.fraction_bits - 3,
                lo=low, hi=high, dtype=dtype,
            )
        after = steps if steps > 1 else int(self.rng.choice([1, self.steps]))
        if which in (1, 4):
            decay, gain = [int(self.rng.integers(0, 257)), 8], [int(self.rng.integers(1, 300)), 8]
            reset = str(self.rng.choice(["hard", "soft", "none"]))
            more: dict[str, Any] = {}
            if reset == "soft" and self.rng.random() < 0.5:
                more["amount"] = int(self.rng.integers(-99, 2 << self.fraction_bits))
            if which == 4:
                bits = int(self.rng.integers(2, 9))
                top = 2 << self.fraction_bits
                table = np.sort(self.rng.integers(-top, top, 2**bits - 2)).astype(np.int32)
                more |= {"bits": bits, "table": self.tensor(table)}
                decay = [int(self.rng.integers(0, 99)) << self.fraction_bits, 8]
            return self.emit(
                "lif" if which == 1 else "lif_packed", [x], ("u8", after, *shape, 1), decay=decay, gain=gain,
                threshold=1 << self.fraction_bits, reset=reset, steps=after, strict=bool(self.rng.integers(2)), **more,
            )
        levels = int(self.rng.integers(1, 9))
        if which == 2:
            decay = [int(self.rng.integers(0, 257)), 8]
            return self.emit("ielif", [x], ("u8", after, *shape, levels), levels=levels, decay=decay, steps=after)
        return self.emit(
            "quantize", [x], ("u8", steps, *shape, levels), m=levels, s=self.fraction_bits, lo=0, hi=levels, dtype="u8"
        )

    def alike(self, x: str) -> str:
        """Another value of the same kind and shape, whose steps fit; x itself if there is none."""
        kind, steps, *shape, _ = self.values[x]
        same = [n for n, v in self.values.items() if v[0] == kind and list(v[2:5]) == shape and
                (v[1] == steps or 1 in (v[1], steps))]
        return str(self.rng.choice(same))

    def map_and_read(self, x: str) -> None:
        rng, other = self.rng, self.alike(x)
        _, steps, height, width, channels, largest = self.values[x]
        steps, largest = max(steps, self.values[other][1]), max(largest, self.values[other][5])
        if largest**2 * max(height * width, channels) >= 2**31:
            return
        heads = int(rng.choice([h for h in range(1, channels + 1) if channels % h == 0]))
        over = ["channels", "tokens"]
        rng.shuffle(over)
        side = height * width if over[0] == "channels" else channels // heads
        chosen = self.codes(self.emit("attention_map", [x, other], ("i32", steps, side, heads, side, 2**31), over=over[0],
                                      heads=heads, m=int(rng.integers(1, 99)), s=2))
        steps = max(self.values[chosen][1], self.values[x][1])
        if self.values[chosen][0] != "u8" or {self.values[chosen][1], self.values[x][1]} - {1, steps}:
            return
        m: int | str = int(rng.integers(-99, 99))
        if rng.random() < 0.5:
            rows = self.steps if steps in (1, self.steps) and rng.random() < 0.5 else 1
            m, steps = self.tensor(rng.integers(-99, 99, (rows, heads)).astype(np.int32)), max(steps, rows)
        self.emit("attention_read", [chosen, x], ("i32", steps, height, width, channels, 2**31), over=over[1], heads=heads,
                  m=m, s=3)

    def any_op(self) -> None:
        rng = self.rng
        x = str(rng.choice(list(self.values)))
        kind, steps, height, width, channels, largest = self.values[x]
        which = rng.integers(11)
        if which == 0 and kind != "i32":
            self.codes(self.conv(x))
        elif which == 1:
            self.codes(self.emit(
                "affine", [x], ("i32", steps, height, width, channels, 2**31), m=self.number(channels, -99, 99),
                s=int(rng.integers(0, 6)), b=self.number(channels, -9999, 9999),
            ))
        elif which == 2:
            kernel = [min(n, int(k)) for n, k in zip((height, width), rng.integers(1, 4, 2), strict=True)]
            stride, padding = [int(s) for s in rng.integers(1, 3, 2)], [int(rng.integers(0, k)) for k in kernel]
            out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, kernel, stride, strict=True)]
            self.emit("maxpool", [x], (kind, steps, *out, channels, largest), kernel=kernel, stride=stride, padding=padding)
        elif which == 3 and kind == "i32":
            other = self.alike(x)
            self.emit("add", [x, other], ("i32", max(steps, self.values[other][1]), height, width, channels, 2**31))
        elif which == 4 and kind == "u8":
            if largest**3 * height * width * channels < 2**31:
                heads = int(rng.choice([h for h in range(1, channels + 1) if channels % h == 0]))
                like = ("i32", steps, height, width, channels, 2**31)
                self.codes(self.emit("attention", [x, x, x], like, heads=heads, m=int(rng.integers(1, 99)), s=3))
        elif which == 5:
            like = ("i32", 1, height, width, channels, 2**31)
            self.emit("mean", [x], like, over="time", m=int(rng.integers(1, 1 << self.fraction_bits)))
        elif which == 6 and x == "pixels":
            table = rng.integers(-127, 128, (channels, 256)).astype(np.int8)
            self.emit("lookup", [x], ("s8", steps, height, width, channels, 127), table=self.tensor(table))
        elif which == 7 and kind == "u8":
            other = self.alike(x)
            if largest + self.values[other][5] <= 255:
                steps = max(steps, self.values[other][1])
                self.emit("sum", [x, other], ("u8", steps, height, width, channels, largest + self.values[other][5]))
        elif which == 8 and kind == "u8":
            other = self.alike(x)
            steps = max(steps, self.values[other][1])
            if largest * self.values[other][5] * height * width < 2**31:
                chosen = self.codes(self.emit("coincidences", [x, other], ("i32", steps, 1, 1, channels, 2**31),
                                              m=int(rng.integers(1, 99)), s=2))
                like, now = self.values[chosen], self.values[x]
                if like[0] == "u8" and like[5] * now[5] <= 255 and 1 in (like[1], now[1], like[1] // now[1]):
                    steps = max(like[1], now[1])
                    self.emit("mask", [x, chosen], ("u8", steps, height, width, channels, like[5] * now[5]))
        elif which == 9 and kind == "u8":
            self.map_and_read(x)
        elif which == 10 and height * width < 80:
            mode = str(rng.choice(["nearest", "bilinear"] if kind == "i32" else ["nearest"]))
            factor = int(rng.choice([2, 4] if mode == "bilinear" else [2, 3]))
            self.emit("upsample", [x], (kind, steps, factor * height, factor * width, channels, largest), mode=mode,
                      factor=factor)

    def finish(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        classes = int(self.rng.integers(1, 40))
        x = self.conv(self.codes(list(self.values)[-1]), classes)
        x = self.emit("mean", [x], ("i32", self.values[x][1], 1, 1, classes, 2**31), over="space", m=3)
        x = self.emit("mean", [x], ("i32", 1, 1, 1, classes, 2**31), over="time", m=1)
        header = {
            "name": "random", "classes": [f"class {i}" for i in range(classes)], "time_steps": self.steps,
            "input": {"height": self.height, "width": self.width, "channels": self.channels, "resize": None,
                      **({"steps": self.frames} if self.frames > 1 else {})},
            "fraction_bits": self.fraction_bits, "program": self.program, "output": x, "provenance": {"by": "a test"},
        }
        return header, self.tensors


def random_artifact(seed: int, length: int = 14) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and tensors of a valid program of about `length` ops."""
    builder = Builder(seed)
    builder.codes(builder.conv("pixels"))
    while len(builder.program) < length:
        builder.any_op()
    return builder.finish()


def random_images(header: dict[str, Any], batch: int, seed: int = 0) -> np.ndarray:
    """Pictures for that artifact."""
    source = header["input"]
    shape = (batch, source["height"], source["width"], source["channels"])
    if source.get("steps", 1) > 1:
        shape = (source["steps"], *shape)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
