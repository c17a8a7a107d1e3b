"""A small segmenter and two small detectors, written by hand: for what a reader accepts, refuses and computes."""
from __future__ import annotations

from typing import Any

import numpy as np

from bitspike.deploy.artifact import pack_codes

SCHEME = {"kind": "uniform", "bits": 4}
CLASSES = ["cat", "dog"]


class _Tensors(dict[str, np.ndarray]):
    """Makes convolutions of random codes and keeps their tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def conv(self, name: str, source: str, shape: list[int], stride: int = 1, most: int = 255,
             shift: int = 0) -> dict[str, Any]:
        outputs = shape[0]
        self[f"{name}.w"] = pack_codes(self.rng.integers(-7, 8, (outputs, *shape[2:], shape[1])), SCHEME)
        self[f"{name}.m"] = self.rng.integers(1, 9, outputs).astype(np.int32)
        self[f"{name}.b"] = self.rng.integers(-99, 99, outputs).astype(np.int32)
        return {"op": "conv", "in": [source], "out": name.rpartition("/")[2], "weight": f"{name}.w", "scheme": SCHEME,
                "shape": shape, "stride": [stride, stride], "padding": [0, 0], "groups": 1, "m": f"{name}.m", "s": shift,
                "b": f"{name}.b", "range": [0, most], "layer": name}


def _header(task: str, program: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"name": "small", "task": task, "classes": CLASSES, "time_steps": 1, "fraction_bits": 8, "provenance": {},
            "input": {"height": 16, "width": 24, "channels": 3, "resize": None,
                      "letterbox": {"short": 15, "long": 30, "multiple": 8, "border": [9, 8, 7]}}, "program": program, **more}


def segmenter(seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Logits at stride 2."""
    t = _Tensors(seed)
    program = [t.conv("x", "pixels", [2, 3, 4, 4], 4, shift=4),
               {"op": "upsample", "in": ["x"], "out": "y", "mode": "bilinear", "factor": 2}]
    return _header("segmentation", program, output="y", stride=2), t


def windowed(seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A segmenter that sees overlapping squares of 16 pixels."""
    header, tensors = segmenter(seed)
    return {**header, "windows": {"side": 16, "step": 10}}, tensors


def _levels(t: _Tensors, each: int, maps: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two levels, strides 4 and 8, three anchors each."""
    program, levels = [], []
    for stride in (4, 8):
        program.append(t.conv(f"map{stride}", "pixels", [2, 3, stride, stride], stride, shift=4))
        program.append({"op": "quantize", "in": [f"map{stride}"], "out": f"n{stride}", "m": 4, "s": 8, "lo": 0, "hi": 4,
                        "dtype": "u8"})
        program.append(t.conv(f"s{stride}", f"n{stride}", [3 * each, 2, 1, 1], most=4))
        program.append(t.conv(f"d{stride}", f"n{stride}", [12, 2, 1, 1], most=4))
        anchors = [[-h * stride, -w * stride, h * stride, w * stride] for h, w in ((1, 1), (1, 2), (2, 1))]
        level: dict[str, Any] = {"stride": stride, "scores": f"s{stride}", "deltas": f"d{stride}", "anchors": anchors}
        levels.append(level | ({"map": f"map{stride}"} if maps else {}))
    return program, levels


def anchors(seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A detector without regions."""
    t = _Tensors(seed)
    program, levels = _levels(t, len(CLASSES), False)
    return _header("detection", program, detection={
        "kind": "anchors", "levels": levels, "coder": [1, 1, 1, 1], "candidates": 50, "score": 0.05, "overlap": 0.5,
        "most": 9}), t


def regions(seed: int = 0, masks: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A detector with regions, and masks."""
    t = _Tensors(seed)
    program, levels = _levels(t, 1, True)
    part = {"levels": 4, "codes": [2, 8], "fraction_bits": 8}
    box = {"side": 2, **part, "program": [t.conv("box/c", "pixels", [3, 2, 2, 2], most=4),
                                          t.conv("box/d", "pixels", [12, 2, 2, 2], most=4)], "classes": "c", "deltas": "d"}
    mask = {"side": 3, **part, "program": [
        {"op": "upsample", "in": ["pixels"], "out": "u", "mode": "nearest", "factor": 2},
        t.conv("mask/m", "u", [3, 2, 1, 1], most=4)], "masks": "m"}
    detection = {"kind": "regions", "levels": levels, "coder": [1, 1, 1, 1], "candidates": 20, "proposals": 12,
                 "proposal_overlap": 0.7, "score": 0.05, "overlap": 0.5, "most": 9, "region_coder": [10, 10, 5, 5],
                 "canonical": 16, "sampling": 2, "box": box, **({"mask": mask} if masks else {})}
    if not masks:
        for name in [name for name in t if name.startswith("mask/")]:
            del t[name]
    return _header("detection", program, detection=detection), t


ALL = {"segmenter": segmenter, "windowed": windowed, "anchors": anchors, "regions": regions}
