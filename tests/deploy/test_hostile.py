"""Files with right checksums and wrong content: each an ArtifactError, and nothing else."""
from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import ArtifactError, Net
from bitspike.deploy.artifact import encode, pack_codes, parse
from bitspike.deploy.program import _accumulator_bound

from .random_programs import random_images
from .small_artifact import assemble, dismantle, small


def set_header(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header.update(changes)


def set_op(index: int, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["program"][index].update(changes)


HOSTILE_HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "newer version": set_header(format_version=2),
    "version true": set_header(format_version=True),
    "version 1.0": set_header(format_version=1.0),
    "unknown key": set_header(extra=1),
    "no program": set_header(program=[]),
    "program no list": set_header(program={"op": "add"}),
    "op no object": set_header(program=["add"]),
    "no classes": set_header(classes=[]),
    "classes not text": set_header(classes=[1, 2]),
    "one class too few": set_header(classes=["cat"]),
    "T = 0": set_header(time_steps=0),
    "T true": set_header(time_steps=True),
    "T huge": set_header(time_steps=2**40),
    "F negative": set_header(fraction_bits=-1),
    "F float": set_header(fraction_bits=8.0),
    "F 31": set_header(fraction_bits=31),
    "output unknown": set_header(output="nothing"),
    "output is codes": set_header(output="n"),
    "output list": set_header(output=["logits"]),
    "crc text": set_header(crc32="0"),
    "crc wrong": set_header(crc32=0),
    "height huge": lambda h: h["input"].update(height=2**40),
    "height negative": lambda h: h["input"].update(height=-4),
    "17 channels": lambda h: h["input"].update(channels=17),
    "3 frames of 2 steps": lambda h: h["input"].update(steps=3),
    "no frames": lambda h: h["input"].update(steps=0),
    "frames true": lambda h: h["input"].update(steps=True),
    "input unknown key": lambda h: h["input"].update(mean=0),
    "resize below crop": lambda h: h["input"].update(resize=3),
    "resize missing": lambda h: h["input"].pop("resize"),
    "missing name": lambda h: h.pop("name"),
    "provenance list": set_header(provenance=[]),
    "unknown op": set_op(0, op="exec"),
    "op a list": set_op(0, op=["lookup"]),
    "unknown attribute": set_op(0, shell="true"),
    "reads itself": set_op(4, **{"in": ["r", "x"]}),
    "reads later": set_op(0, **{"in": ["logits"]}),
    "in no list": set_op(0, **{"in": "pixels"}),
    "in of numbers": set_op(0, **{"in": [0]}),
    "too many inputs": set_op(0, **{"in": ["pixels", "pixels"]}),
    "writes pixels": set_op(0, out="pixels"),
    "writes twice": set_op(2, out="x"),
    "out missing": lambda h: h["program"][0].pop("out"),
    "layer number": set_op(0, layer=3),
    "table is no tensor": set_op(0, table="nowhere"),
    "table a number": set_op(0, table=0),
    "wrong dtype": set_op(0, table="m"),
    "wrong length": set_op(1, m="m2"),
    "scheme unknown": set_op(1, scheme={"kind": "ternary", "bits": 2}),
    "9 bits": set_op(1, scheme={"kind": "uniform", "bits": 9}),
    "other bits": set_op(1, scheme={"kind": "uniform", "bits": 3}),
    "scheme text": set_op(1, scheme="uniform"),
    "shape negative": set_op(1, shape=[4, 3, -3, -3]),
    "shape huge": set_op(1, shape=[2**20, 2**20, 2**20, 2**20]),
    "shape overflows": set_op(1, shape=[2**62, 3, 3, 3]),
    "shape other": set_op(1, shape=[4, 1, 3, 9]),
    "shape floats": set_op(1, shape=[4.0, 3, 3, 3]),
    "kernel larger than image": set_op(7, shape=[2, 4, 5, 5]),
    "stride 0": set_op(1, stride=[0, 1]),
    "stride true": set_op(1, stride=[True, 1]),
    "padding negative": set_op(1, padding=[-1, 1]),
    "padding huge": set_op(1, padding=[2**31, 1]),
    "padding large": set_op(1, padding=[2**14, 2**14]),
    "groups 0": set_op(1, groups=0),
    "groups 2": set_op(1, groups=2),
    "shift 63": set_op(1, s=63),
    "shift -1": set_op(1, s=-1),
    "shift huge": set_op(1, s=10**300),
    "range too small": set_op(1, range=[-126, 127]),
    "range reversed": set_op(1, range=[127, -127]),
    "range of another kind": set_op(1, range=[-127, 255]),
    "range missing": lambda h: h["program"][1].pop("range"),
    "s8 table as u8": set_op(3, **{"in": ["codes", "codes", "codes"]}),
    "conv of potentials": set_op(1, **{"in": ["x"]}),
    "m too large": set_op(2, m=2**31),
    "m nan": set_op(2, m=float("nan")),
    "m infinite": set_op(2, m=float("inf")),
    "m float": set_op(2, m=4.0),
    "m null": set_op(2, m=None),
    "m a list": set_op(2, m=[4]),
    "lo over hi": set_op(2, lo=5),
    "hi 256": set_op(2, hi=256),
    "dtype i32": set_op(2, dtype="i32"),
    "lo -128": set_op(2, dtype="s8", lo=-128),
    "3 heads": set_op(3, heads=3),
    "0 heads": set_op(3, heads=0),
    "add of spikes": set_op(4, **{"in": ["n", "x"]}),
    "decay a number": set_op(5, decay=1),
    "decay of 3": set_op(5, decay=[1, 1, 1]),
    "gain shift": set_op(5, gain=[1, 63]),
    "gain m": set_op(5, gain=[-(2**31), 1]),
    "threshold": set_op(5, threshold=2**31),
    "reset": set_op(5, reset="zero"),
    "3 steps": set_op(5, steps=3),
    "0 steps": set_op(5, steps=0),
    "strict 0": set_op(5, strict=0),
    "pool padding": set_op(6, padding=[2, 0]),
    "pool kernel": set_op(6, kernel=[0, 2]),
    "over channels": set_op(8, over="C"),
    "mean m": set_op(8, m=2**31),
    "add of other shapes": set_op(4, **{"in": ["x", "pixels"]}),
    "unused tensor": lambda h: h["program"][1].pop("pad_value"),
    "5 MB header": set_header(provenance={"x": "x" * (5 << 20)}),
    "many ops": lambda h: h.update(program=[{}] * 10_001),
    "large name": set_header(name="x" * 10**5),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_header(name: str):
    header, table, body = dismantle()
    HOSTILE_HEADERS[name](header)
    with pytest.raises(ArtifactError) as raised:
        parse(assemble(json.dumps(header), table, body))
    assert len(str(raised.value)) < 2000


def table_entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda table: table["m"].update(changes)


HOSTILE_TABLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "float tensor": table_entry(dtype="F32"),
    "dtype a list": table_entry(dtype=["I32"]),
    "shape negative": table_entry(shape=[-4]),
    "shape huge": table_entry(shape=[2**63]),
    "product overflows": table_entry(shape=[2**32, 2**32]),
    "product wraps to 4": table_entry(shape=[2**31, 2**31, 4]),
    "two negatives": table_entry(shape=[-2, -2]),
    "empty": table_entry(shape=[0]),
    "shape float": table_entry(shape=[4.0]),
    "shape true": table_entry(shape=[True]),
    "many dimensions": table_entry(shape=[1] * 40),
    "shape a number": table_entry(shape=4),
    "overlap": lambda t: t["m"].update(data_offsets=t["b"]["data_offsets"]),
    "past the end": table_entry(data_offsets=[10**6, 10**6 + 16]),
    "negative offset": table_entry(data_offsets=[-16, 0]),
    "reversed": table_entry(data_offsets=[16, 0]),
    "one offset": table_entry(data_offsets=[0]),
    "unknown key": table_entry(strides=[1]),
    "missing": lambda t: t.pop("m"),
    "entry a list": lambda t: t.update(m=[]),
    "extra empty tensor": lambda t: t.update(z={"dtype": "I32",
    "shape": [0], "data_offsets": [0, 0]}),
}


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_hostile_table(name: str):
    header, table, body = dismantle()
    HOSTILE_TABLES[name](table)
    with pytest.raises(ArtifactError):
        parse(assemble(json.dumps(header), table, body))


HOSTILE_JSON = {
    "deep lists": "[" * 100_000, "deep objects": '{"a":' * 100_000, "closed deep lists": "[" * 5000 + "]" * 5000,
    "too deep": '{"provenance":' + "[" * 40 + "]" * 40 + "}", "nan": '{"a": NaN}', "infinity": '{"a": -Infinity}',
    "a key twice": '{"a": 1, "a": 2}', "absurd number": '{"format_version": ' + "9" * 100_000 + "}", "a list": "[]",
    "a text": '"x"', "nothing": "", "half a surrogate": '{"format_version": "\\ud800"}', "raw surrogate": '"\ud800"',
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json(name: str):
    _, table, body = dismantle()
    with pytest.raises(ArtifactError):
        parse(assemble(HOSTILE_JSON[name], table, body))
    front = HOSTILE_JSON[name].encode("utf-8", "surrogatepass")
    with pytest.raises(ArtifactError):
        parse(struct.pack("<Q", len(front)) + front)


@pytest.mark.parametrize("metadata", [
    {}, {"bitspike": "{}"}, {"bitspike": "{}", "header_crc32": 0}, {"bitspike": {}, "header_crc32": "0"},
    {"bitspike": "{}", "header_crc32": "0"}, {"bitspike": "{}", "header_crc32": "0", "more": ""},
], ids=str)
def test_hostile_metadata(metadata: dict[str, Any]):
    with pytest.raises(ArtifactError):
        parse(assemble("", {}, b"", metadata))


def test_accumulators_that_overflow_are_found():
    assert _accumulator_bound(np.full((3, 1, 1, 70_000), -128, np.int8), np.full(70_000, 255), 1) == 70_000 * 128 * 255
    taps = np.array([[[[1], [-2]]], [[[3], [4]]]], np.int8)  # 2 groups of one channel, largest codes 10 and 100
    assert _accumulator_bound(taps, np.array([10, 100]), 2) == 700
    header, _ = small()
    header["input"] |= {"height": 256, "width": 256, "resize": None}
    header["program"] = [{"op": "attention", "in": ["pixels"] * 3, "out": "a", "heads": 1, "m": 1, "s": 0}]
    with pytest.raises(ArtifactError, match=r"2\^31"):
        parse(encode(header, {}))
    codes = np.full((1, 170, 170, 3), -128)  # 86,700 products of up to 128 * 255
    tensors = {"w": pack_codes(codes, {"kind": "uniform", "bits": 8}), "one": np.ones(1, np.int32)}
    header["program"] = [{
        "op": "conv", "in": ["pixels"], "out": "logits", "weight": "w", "scheme": {"kind": "uniform", "bits": 8},
        "shape": [1, 3, 170, 170], "stride": [1, 1], "padding": [0, 0], "groups": 1, "m": "one", "s": 0, "b": "one",
        "range": [0, 255]}]
    with pytest.raises(ArtifactError, match=r"2\^31.*2829888000"):
        parse(encode(header, tensors))


def test_memory_is_bounded_before_it_is_used():
    header, _ = small()
    side = {"height": 16384, "width": 16384, "resize": None}
    header["input"] |= side
    header["program"] = [{"op": "affine", "in": ["pixels"], "out": "logits", "m": 1, "s": 0, "b": 0}]
    with pytest.raises(ArtifactError, match="too large"):
        parse(encode(header, {}))
    header["input"] |= {"height": 4096, "width": 4096}
    chain = [f"x{i}" for i in range(8)]
    header["program"] = [{"op": "affine", "in": ["pixels"], "out": name, "m": 1, "s": 0, "b": 0} for name in chain]
    header["program"] += [{"op": "add", "in": [a, b], "out": a + b} for a, b in zip(chain[:4], chain[4:], strict=True)]
    header["output"] = chain[-1]
    with pytest.raises(ArtifactError, match=r"at once|too large"):
        parse(encode(header, {}))


def test_codes_that_many_ops_name_are_unpacked_once():
    header, _ = small()
    binary = {"kind": "binary", "bits": 1}
    tensors = {"w": pack_codes(np.ones(64 * 3 * 64 * 64, int), binary), "one": np.ones(64, np.int32)}
    header["input"] |= {"height": 64, "width": 64, "resize": None}
    header["classes"], header["output"] = ["x"] * 64, "x0"
    conv = {"op": "conv", "in": ["pixels"], "weight": "w", "scheme": binary, "shape": [64, 3, 64, 64], "stride": [1, 1],
            "padding": [0, 0], "groups": 1, "m": "one", "s": 0, "b": "one", "range": [0, 255]}
    other = {"shape": [64, 3, 32, 128], "padding": [0, 32]}
    header["program"] = [{**conv, **(other if i % 2 else {}), "out": f"x{i}"} for i in range(31)]
    data = encode(header, tensors)
    tracemalloc.start()
    found = parse(data)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.program.ops) == 31
    assert held < 12 * len(data), "8 times the packed bits, and some for the header"


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_mutated_headers(data: st.DataObject):
    """Any node of a good header replaced by anything: an ArtifactError, or a network that runs."""
    header, table, body = dismantle()
    node: Any = header
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 3)):
            node = node[key]
            continue
        node[key] = data.draw(st.one_of(
            st.sampled_from([-1, 0, 1, 2, 3, 7, 62, 63, 127, 128, 255, 2**31 - 1, 2**31, -(2**31), 2**63, 2**200, 0.5,
                             True, None, "", "x", "n", "pixels", "logits", "m", "w", "u8", "s8", [], {}, [1, 1], [0, 0], [[]]]),
            st.integers(), st.text(max_size=3),
        ))
        break
    try:
        good = parse(assemble(json.dumps(header), table, body))
    except ArtifactError:
        return
    if good.program.live_bytes < 1 << 20 and sum(op.macs for op in good.program.ops) < 1 << 24:
        assert np.isfinite(Net(good)(random_images(header, 2), threads=1)).all()
