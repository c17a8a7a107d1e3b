"""One small artifact with most ops, and how to take it apart and put it together wrongly."""
from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np

from bitspike.deploy.artifact import encode, pack_codes

IDENTITY = {"kind": "uniform", "bits": 2}


def small() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One op of most kinds, small enough to damage at every byte."""
    tensors = {
        "table": np.tile(np.arange(-127, 129).clip(-127, 127).astype(np.int8), (3, 1)),
        "w": pack_codes(np.ones((4, 3, 3, 3), int), IDENTITY), "m": np.full(4, 9, np.int32),
        "b": np.zeros(4, np.int32), "pad": np.array([1, 2, 3], np.int16),
        "w2": pack_codes(np.ones((2, 1, 1, 4), int), IDENTITY), "m2": np.ones(2, np.int32), "b2": np.ones(2, np.int32),
    }
    conv = {"op": "conv", "stride": [1, 1], "padding": [1, 1], "groups": 1, "scheme": IDENTITY, "s": 3}
    program = [
        {"op": "lookup", "in": ["pixels"], "out": "codes", "table": "table"},
        {**conv, "in": ["codes"], "out": "x", "weight": "w", "shape": [4, 3, 3, 3], "m": "m", "b": "b", "range": [-127, 127],
         "pad_value": "pad"},
        {"op": "quantize", "in": ["x"], "out": "n", "m": 4, "s": 8, "lo": 0, "hi": 4, "dtype": "u8", "layer": "block.neuron"},
        {"op": "attention", "in": ["n", "n", "n"], "out": "a", "heads": 2, "m": 3, "s": 1},
        {"op": "add", "in": ["a", "x"], "out": "r"},
        {"op": "lif", "in": ["r"], "out": "spikes", "decay": [1, 1], "gain": [1, 0], "threshold": 256, "reset": "hard",
         "steps": 2, "strict": False},
        {"op": "maxpool", "in": ["spikes"], "out": "p", "kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]},
        {**conv, "in": ["p"], "out": "y", "weight": "w2", "shape": [2, 4, 1, 1], "padding": [0, 0], "m": "m2", "b": "b2",
         "range": [0, 1]},
        {"op": "mean", "in": ["y"], "out": "pooled", "over": "space", "m": 1},
        {"op": "mean", "in": ["pooled"], "out": "logits", "over": "time", "m": 1},
    ]
    header = {
        "name": "small", "input": {"height": 4, "width": 4, "channels": 3, "resize": 5}, "classes": ["cat", "dog"],
        "time_steps": 2, "fraction_bits": 8, "program": program, "output": "logits", "provenance": {},
    }
    return header, tensors


GOOD = encode(*small())


def assemble(text: str, table: dict[str, Any], body: bytes, metadata: dict[str, Any] | None = None) -> bytes:
    """A file with right checksums around any header text and tensor table."""
    if metadata is None:
        compact = json.dumps(table, sort_keys=True, separators=(",", ":"))
        metadata = {"bitspike": text, "header_crc32": str(zlib.crc32((text + compact).encode("utf-8", "surrogatepass")))}
    front = json.dumps({"__metadata__": metadata, **table}).encode()
    return struct.pack("<Q", len(front)) + front + body


def dismantle() -> tuple[dict[str, Any], dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", GOOD)
    table = json.loads(GOOD[8 : 8 + length])
    header = json.loads(table.pop("__metadata__")["bitspike"])
    return header, table, GOOD[8 + length :]
