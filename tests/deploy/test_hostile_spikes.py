"""The ops of networks over time, in files with right checksums and wrong content: each an ArtifactError, and nothing else."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import ArtifactError, Net, StepError, Steps
from bitspike.deploy.artifact import encode, pack_codes, parse

from .random_programs import random_images

_BINARY = {"kind": "binary", "bits": 1}
_NEURON = {"op": "lif", "decay": [1, 1], "gain": [1, 0], "threshold": 256, "reset": "hard", "steps": 2, "strict": False}


def spiking() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Every op of attention and state, over two frames of two channels."""
    tensors = {
        "w": pack_codes(np.ones((4, 1, 1, 2), int), _BINARY), "w2": pack_codes(np.ones((2, 1, 1, 4), int), _BINARY),
        "m": np.full(4, 9, np.int32), "b": np.zeros(4, np.int32), "one": np.ones(2, np.int32),
        "membrane": np.arange(-300, 301, 120).astype(np.int32), "rows": np.array([[9, 7], [5, 3]], np.int32),
    }
    conv = {"op": "conv", "stride": [1, 1], "padding": [0, 0], "groups": 1, "scheme": _BINARY, "s": 1}
    program = [
        {**conv, "in": ["pixels"], "out": "x", "weight": "w", "shape": [4, 2, 1, 1], "m": "m", "b": "b", "range": [0, 255]},
        {**_NEURON, "op": "lif_packed", "in": ["x"], "out": "s", "decay": [40, 0], "bits": 3, "table": "membrane"},
        {"op": "attention_map", "in": ["s", "s"], "out": "a", "over": "channels", "heads": 2, "m": 128, "s": 0},
        {**_NEURON, "in": ["a"], "out": "chosen", "reset": "soft", "amount": 300},
        {"op": "attention_read", "in": ["chosen", "s"], "out": "o", "over": "tokens", "heads": 2, "m": "rows", "s": 1},
        {**_NEURON, "in": ["o"], "out": "p", "threshold": 6},
        {"op": "coincidences", "in": ["s", "p"], "out": "c", "m": 99, "s": 0},
        {**_NEURON, "in": ["c"], "out": "bits"},
        {"op": "mask", "in": ["s", "bits"], "out": "q"},
        {"op": "sum", "in": ["q", "s"], "out": "n"},
        {**conv, "in": ["n"], "out": "y", "weight": "w2", "shape": [2, 4, 1, 1], "m": "one", "b": "one", "range": [0, 2]},
        {"op": "mean", "in": ["y"], "out": "space", "over": "space", "m": 1},
        {"op": "mean", "in": ["space"], "out": "logits", "over": "time", "m": 1},
    ]
    header = {
        "name": "spiking", "input": {"height": 3, "width": 2, "channels": 2, "resize": None, "steps": 2}, "time_steps": 2,
        "classes": ["left", "right"], "fraction_bits": 8, "program": program, "output": "logits", "provenance": {},
    }
    return header, tensors


def test_it_runs_and_every_value_is_alive():
    net = Net(parse(encode(*spiking())))
    values = net.trace(random_images(net.header, 8))
    assert all(values[name].any() and not values[name].all() for name in ("s", "chosen", "p", "bits", "q", "n"))


def op(index: int, **changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    return lambda header, tensors: header["program"][index].update(changes)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "1 bit": (op(1, bits=1), "'bits' is 1"),
    "9 bits": (op(1, bits=9), "'bits' is 9"),
    "bits true": (op(1, bits=True), "'bits' is True"),
    "4 bits, table of 3": (op(1, bits=4), "int32.14."),
    "a falling table": (lambda h, t: t.update(membrane=t["membrane"][::-1].copy()), "growing order"),
    "table of int8": (lambda h, t: t.update(membrane=np.zeros(6, np.int8)), "must be int32"),
    "a table for a plain lif": (op(3, table="membrane"), "unknown 'table'"),
    "bits missing": (lambda h, t: h["program"][1].pop("bits"), "'bits' is missing"),
    "amount of a hard reset": (op(5, amount=3), "belongs to a soft reset"),
    "amount too large": (op(3, amount=2**31), "'amount' is 2147483648"),
    "over rows": (op(2, over="rows"), "'over' is 'rows'"),
    "map over the other side": (op(2, over="tokens"), "a map .S, B, 6, 2, 6. first"),
    "read over the other side": (op(4, over="channels"), "a map .S, B, 2, 2, 2. first"),
    "3 heads": (op(2, heads=3), "a divisor of the 4 channels"),
    "other heads when read": (op(4, heads=4), "a map"),
    "map of potentials": (op(2, **{"in": ["x", "s"]}), "of kind u8"),
    "read of a potential map": (op(4, **{"in": ["a", "s"]}), "of kind u8"),
    "one input": (op(4, **{"in": ["chosen"]}), "a list of 2"),
    "rows of 3 heads": (lambda h, t: t.update(rows=np.ones((2, 3), np.int32)), "'m' is tensor 'rows'"),
    "3 rows": (lambda h, t: t.update(rows=np.ones((3, 2), np.int32)), "'m' is tensor 'rows'"),
    "rows of int16": (lambda h, t: t.update(rows=np.ones((2, 2), np.int16)), "'m' is tensor 'rows'"),
    "a row of -2^31": (lambda h, t: t.update(rows=np.full((2, 2), -(2**31), np.int32)), "holds -2147483648"),
    "no rows": (op(4, m="nothing"), "the name of a tensor"),
    "m a float": (op(4, m=1.0), "'m' is 1.0"),
    "coincidences shift": (op(6, s=63), "'s' is 63"),
    "coincidences of other shapes": (op(6, **{"in": ["s", "pixels"]}), "same shape"),
    "mask of pixels by s": (op(8, **{"in": ["s", "s"]}), "a mask .S, B, 1, 1, 4."),
    "mask of potentials": (op(8, **{"in": ["x", "bits"]}), "of kind u8"),
    "sum of potentials": (op(9, **{"in": ["x", "s"]}), "of kind u8"),
    "sum past 255": (op(9, **{"in": ["pixels", "pixels"]}), "at most 255; it can reach 510"),
    "range of a sum": (op(10, range=[0, 1]), "which are 0..2"),
    "1 frame": (lambda h, t: h["input"].update(steps=3), "'steps' is 3"),
    "16 + 1 channels": (lambda h, t: h["input"].update(channels=17), "'channels' is 17"),
    "a step too few": (op(7, steps=1), "'steps' is 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(name: str):
    header, tensors = spiking()
    change, message = HOSTILE[name]
    change(header, tensors)
    with pytest.raises(ArtifactError, match=message):
        parse(encode(header, tensors))


def test_products_that_overflow_are_found():
    header, _ = spiking()
    header["input"] |= {"height": 256, "width": 256, "channels": 1}
    base = {"heads": 1, "m": 1, "s": 0}
    for bad in ({"op": "attention_map", "in": ["pixels", "pixels"], "out": "a", "over": "tokens", **base},
                {"op": "coincidences", "in": ["pixels", "pixels"], "out": "a", "m": 1, "s": 0}):
        header["program"] = [bad]
        with pytest.raises(ArtifactError, match=r"below 2\^31; it can reach 4261478400"):
            parse(encode(header, {}))
    header["program"] = [{"op": "attention_map", "in": ["pixels", "pixels"], "out": "a", "over": "channels", **base}]
    with pytest.raises(ArtifactError, match="too large"):  # 65,536 x 65,536 pairs of tokens
        parse(encode(header, {}))
    header["program"] = [{"op": "mask", "in": ["pixels", "pixels"], "out": "a"}]
    header["input"] |= {"height": 1, "width": 1}
    with pytest.raises(ArtifactError, match="at most 255; it can reach 65025"):
        parse(encode(header, {}))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_headers(data: st.DataObject):
    """Any number, text or list of a good header replaced by anything: an ArtifactError, or a network that runs and steps."""
    header, tensors = copy.deepcopy(spiking())
    node: Any = header
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 4)):
            node = node[key]
            continue
        node[key] = data.draw(st.one_of(
            st.sampled_from([-1, 0, 1, 2, 3, 6, 8, 62, 255, 2**31 - 1, 2**31, -(2**31), 0.5, True, None, "", "x", "s", "a",
                             "chosen", "pixels", "logits", "membrane", "rows", "tokens", "channels", "soft", "lif_packed",
                             "mask", "sum", [], {}, [1, 1], ["s", "s"], ["chosen", "s"]]),
            st.integers(), st.text(max_size=3)))
        break
    try:
        good = parse(encode(header, tensors))
    except ArtifactError:
        return
    if good.program.live_bytes > 1 << 20 or sum(op.macs for op in good.program.ops) > 1 << 24:
        return
    net, images = Net(good), random_images(header, 2)
    logits = net(images, threads=1)
    assert np.isfinite(logits).all()
    try:
        steps = Steps(net, batch=2, threads=1)
    except StepError:
        return
    for t in range(net.time_steps):
        last = steps.push(images[t] if net.input_steps > 1 else images)
    np.testing.assert_array_equal(last, logits)
