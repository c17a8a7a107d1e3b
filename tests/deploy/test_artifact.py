"""Good files round-trip; every other file is an ArtifactError, and nothing else."""
from __future__ import annotations

import copy
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import ArtifactError, Net, load
from bitspike.deploy import artifact as module
from bitspike.deploy.artifact import encode, parse, read, write

from .random_programs import random_artifact, random_images
from .small_artifact import GOOD, assemble, small


def test_round_trip(tmp_path: Path):
    header, tensors = small()
    path = tmp_path / "small.bitspike"
    write(path, header, tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["small.bitspike"]
    found = read(path)
    assert {key: found.header[key] for key in header} == header
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)
        assert not found.tensors[name].flags.writeable
    y = found.program.values["spikes"]
    assert (y.kind, y.steps, y.height, y.width, y.channels, y.lo, y.hi) == ("u8", 2, 4, 4, 4, 0, 1)
    assert found.program.ops[1].macs == 16 * 4 * 27


def test_another_writer_may_order_tensors_as_it_likes():
    header, tensors = small()
    table, body = {}, b""
    for name in sorted(tensors, reverse=True):  # unaligned int32 included
        raw = tensors[name].tobytes()
        table[name] = {"dtype": module._DTYPE_NAMES[tensors[name].dtype], "shape": list(tensors[name].shape),
                       "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    header |= {"format_version": 1, "crc32": zlib.crc32(body)}
    images = random_images(header, 3)
    other = Net(parse(assemble(json.dumps(header), table, body)))
    np.testing.assert_array_equal(other(images), Net(parse(GOOD))(images))


def test_safetensors_can_list_it(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "small.bitspike"
    path.write_bytes(GOOD)
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(small()[1])


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_are_readable(seed: int):
    header, tensors = random_artifact(seed)
    assert parse(encode(header, tensors)).header["name"] == "random"


def test_cut_short_anywhere():
    for length in range(len(GOOD)):
        with pytest.raises(ArtifactError):
            parse(GOOD[:length])
    with pytest.raises(ArtifactError):
        parse(GOOD + b"\0")


def test_any_flipped_bit_is_found():
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(GOOD) * 8, 1500, replace=False).tolist() + list(range(64)):
        data = bytearray(GOOD)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError):
            parse(bytes(data))


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_noise(data: bytes):
    for candidate in (data, struct.pack("<Q", len(data)) + data, struct.pack("<Q", len(data) // 2) + data):
        with pytest.raises(ArtifactError):
            parse(candidate)


def test_write_checks_and_leaves_nothing_behind(tmp_path: Path):
    header, tensors = small()
    path = tmp_path / "net.bitspike"
    broken = copy.deepcopy(header)
    broken["program"][2]["hi"] = 300
    for bad in (lambda: write(path, broken, tensors), lambda: write(path, {**header, "format_version": 3}, tensors),
                lambda: write(path, {**header, "provenance": {"x": float("nan")}}, tensors),
                lambda: write(path, header, {**tensors, "m": tensors["m"].astype(np.float32)})):
        with pytest.raises(ArtifactError, match=r"net\.bitspike"):
            bad()
    with pytest.raises(OSError, match="no_folder"):
        write(tmp_path / "no_folder" / "net.bitspike", header, tensors)
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_file(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing.bitspike", tmp_path / "missing" / "x", "nul\0byte.bitspike", os.devnull):
        with pytest.raises(ArtifactError):
            read(path)
    (tmp_path / "empty.bitspike").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"empty\.bitspike: the file has 0 bytes"):
        load(tmp_path / "empty.bitspike")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ArtifactError):
            read(tmp_path / "pipe")
