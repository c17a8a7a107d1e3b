"""Fuzzer of the artifact reader and the executor: `python tests/fuzz/fuzz_artifacts.py SECONDS [SEED] [FOLDER]`.

Each round makes a random valid artifact, or damages one and mends its checksums, so that what lies behind them is reached.
Two things must hold, whatever the bytes: the reader accepts the file or raises ArtifactError, nothing else; and what it accepts
runs to the same numbers on every set of kernels, batch split and thread count, and step by step. A finding is written to FOLDER
with its round. A crash of the process is a finding too: `make fuzz` runs this with AddressSanitizer, which turns a wild read
or write into one. Rounds depend on SEED and their number only.
"""
from __future__ import annotations

import copy
import faulthandler
import json
import struct
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.deploy.random_programs import random_artifact, random_images
from tests.deploy.small_artifact import assemble, small
from tests.deploy.small_scenes import ALL

from bitspike.deploy import ArtifactError, Detector, ImageError, Net, Segmenter, kernels
from bitspike.deploy.artifact import encode, parse

_MOST_MACS, _MOST_BYTES, _MOST_PIXELS = 3_000_000, 8_000_000, 200_000
_NUMBERS = [0, 1, -1, 2, 3, 7, 8, 15, 16, 31, 62, 63, 64, 127, 128, 255, 256, 1000, 2**14, 2**20, 2**31 - 1, -(2**31), 2**31,
            2**32, 2**62, 2**63, 2**64, -(2**63), 10**30]
_ODD: list[Any] = [None, True, False, 0.5, 1e300, "", "x", "pixels", "v0", "u8", "s8", "i32", [], {}, [1, 1], [0, 0], [-1, 300],
                   "\u0000", "\ud800"]


class Finding(Exception):
    """Something that must not happen."""


# ---------------------------------------------------------------------------------------------------------- damage
def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all leaves and containers below."""
    found: list[tuple[Any, ...]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((*path, key))
        found += _places(inner, (*path, key))
    return found


def _change(value: Any, rng: np.random.Generator) -> None:
    """One change somewhere in a JSON value."""
    places = _places(value)
    if not places:
        return
    path = places[rng.integers(len(places))]
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, which = path[-1], rng.integers(8)
    old = parent[key]
    if which == 0:
        del parent[key]
    elif which == 1 and isinstance(parent, dict):
        parent[key + "x"] = parent.pop(key)
    elif which == 2:
        other = places[rng.integers(len(places))]
        taken: Any = value
        for step in other:
            if (isinstance(taken, dict) and step not in taken) or (isinstance(taken, list) and step >= len(taken)):
                return
            taken = taken[step]
        parent[key] = copy.deepcopy(taken)
    elif which == 3 and isinstance(parent, list):
        parent.insert(int(rng.integers(len(parent) + 1)), copy.deepcopy(old))
    elif isinstance(old, int) and not isinstance(old, bool) and which < 7:
        parent[key] = old + int(rng.integers(-2, 3)) if rng.random() < 0.5 else _NUMBERS[rng.integers(len(_NUMBERS))]
    else:
        choice = rng.integers(len(_ODD) + len(_NUMBERS))
        parent[key] = _ODD[choice] if choice < len(_ODD) else _NUMBERS[choice - len(_ODD)]


def _apart(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    table = json.loads(data[8:8 + length])
    header = json.loads(table.pop("__metadata__")["bitspike"])
    return header, table, data[8 + length:]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to three faults: in its header, its table, its tensors (checksums mended), or in its raw bytes."""
    if rng.random() < 0.1:
        raw = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            raw[rng.integers(len(raw))] = rng.integers(256)
        return bytes(raw[:rng.integers(len(raw) + 1)] if rng.random() < 0.3 else raw)
    header, table, body = _apart(data)
    for _ in range(rng.integers(1, 4)):
        where = rng.random()
        if where < 0.6:
            _change(header, rng)
        elif where < 0.75:
            _change(table, rng)
        else:
            raw = bytearray(body)
            for _ in range(rng.integers(1, 9)):
                if raw:
                    raw[rng.integers(len(raw))] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
            body = bytes(raw[:len(raw) - rng.integers(0, 9)] if rng.random() < 0.1 else raw)
    if rng.random() < 0.98:
        header["crc32"] = zlib.crc32(body)
    return assemble(json.dumps(header), table, body)


# ------------------------------------------------------------------------------------------------------------ checks
def _on(name: str, net: Net, images: np.ndarray, threads: int) -> np.ndarray:
    before = kernels.active()
    kernels.use(name)
    try:
        return net(images, threads=threads)
    finally:
        kernels.use(before)


def _batch_axis(net: Net) -> int:
    return 0 if net.input_steps == 1 else 1


def check_run(net: Net, rng: np.random.Generator) -> None:
    """Every way to run the network gives the same numbers."""
    batch = int(rng.integers(1, 4))
    images = random_images(net.header, batch, int(rng.integers(2**31)))
    style = rng.random()
    if style < 0.3:
        images = images * (rng.random(images.shape) < rng.choice([0.0, 0.02, 0.15, 1.0]))
    elif style < 0.4:
        images = np.full_like(images, rng.choice([0, 1, 255]))
    images = np.ascontiguousarray(images.astype(np.uint8))
    expected = _on("numpy", net, images, 1)
    ways = {f"{name}, {threads} threads": _on(name, net, images, threads)
            for name in kernels.available()[1:] for threads in (1, int(rng.integers(2, 5)))}
    axis = _batch_axis(net)
    ways["one at a time"] = np.concatenate([net(np.ascontiguousarray(np.take(images, [i], axis)), 1) for i in range(batch)])
    for _ in range(2):  # densities are known now: the choice of kernels may change, the numbers may not
        ways["again"] = net(images, 1)
    if net.time_steps > 1 and rng.random() < 0.5:
        ways["step by step"] = _step_by_step(net, images)
    for way, found in ways.items():
        if found.shape != expected.shape or not np.array_equal(found, expected):
            raise Finding(f"{way} differs from numpy")


def check_scenes(net: Segmenter | Detector, rng: np.random.Generator) -> None:
    """A segmenter's or detector's answer is that of numpy's definitions; or the picture is refused."""
    how = net.letterbox
    if max(how.short, how.multiple) > 200 or not 0 < how.long <= 200:
        return
    picture = rng.integers(0, 256, (*rng.integers(1, 60, 2), net.input_shape[2])).astype(np.uint8)
    try:
        (expected,) = _on("numpy", net, [picture], 1)
    except ImageError as error:
        if len(str(error)) > 2000 or not str(error).isprintable():
            raise Finding("the message is too long, or could command a terminal") from None
        return
    for name in kernels.available()[1:]:
        (found,) = _on(name, net, [picture], int(rng.integers(1, 4)))
        pairs = [(expected, found)] if isinstance(net, Segmenter) else [(expected[key], found[key]) for key in expected]
        if any(a.shape != b.shape or not np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs):
            raise Finding(f"{name} differs from numpy on a scene")


def _step_by_step(net: Net, images: np.ndarray) -> np.ndarray:
    from bitspike.deploy.errors import StepError
    from bitspike.deploy.steps import Steps

    try:
        steps = Steps(net, batch=images.shape[_batch_axis(net)])
    except StepError:  # some programs cannot be cut into steps, and say so
        return net(images, 1)
    logits = np.empty(0)
    for t in range(net.time_steps):
        logits = steps.push(images[t] if net.input_steps > 1 else images)
    return logits


def one_round(seed: int, number: int) -> tuple[bytes, str]:
    """(the file, what became of it). Raises what must not happen."""
    rng = np.random.default_rng([seed, number])
    header, tensors = small() if rng.random() < 0.05 else random_artifact(int(rng.integers(2**31)), int(rng.integers(3, 24)))
    scenes = rng.random() < 0.25
    if scenes:
        header, tensors = list(ALL.values())[int(rng.integers(len(ALL)))](int(rng.integers(2**31)))
    data = encode(header, tensors)
    valid = rng.random() < 0.3
    if not valid:
        data = damaged(data, rng)
    one_round.data = data  # type: ignore[attr-defined]  # for the report, should anything be raised below
    try:
        found = parse(data)
        net = {"segmentation": Segmenter, "detection": Detector}.get(found.task, Net)(found)
    except ArtifactError as error:
        if valid:
            raise Finding(f"a valid file was refused: {error}") from None
        if len(str(error)) > 2000 or not str(error).isprintable():
            raise Finding("the message is too long, or could command a terminal") from None
        return data, "refused"
    program = net.program
    pixels = int(np.prod(net.input_shape)) * net.input_steps
    if sum(op.macs for op in program.ops) > _MOST_MACS or program.live_bytes > _MOST_BYTES or pixels > _MOST_PIXELS:
        return data, "too large to run"
    (check_run if isinstance(net, Net) else check_scenes)(net, rng)
    return data, "ran" if valid else "damaged, ran"


def main(seconds: float, seed: int = 1, folder: str = "fuzz-findings") -> int:
    """Fuzz for a time; returns the number of findings."""
    faulthandler.enable()
    print(f"kernels: {', '.join(kernels.available())}; seed {seed}, {seconds:g} s", flush=True)
    began = told = time.monotonic()
    counts: dict[str, int] = {}
    number = findings = 0
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    last = place / "running.bitspike"
    while time.monotonic() - began < seconds and findings < 20:
        (place / "running.txt").write_text(f"seed {seed} round {number}\n")  # what ran, should the process die
        try:
            _, outcome = one_round(seed, number)
        except Exception as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            findings += 1
            outcome = "FINDING"
            name = place / f"seed{seed}-round{number}.bitspike"
            name.write_bytes(getattr(one_round, "data", b""))
            print(f"FINDING in round {number} of seed {seed}, kept as {name}:", flush=True)
            traceback.print_exc()
        counts[outcome] = counts.get(outcome, 0) + 1
        number += 1
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{told - began:.0f} s: {number} rounds, {counts}", flush=True)
    last.unlink(missing_ok=True)
    (place / "running.txt").unlink(missing_ok=True)
    if findings == 0 and not any(place.iterdir()):
        place.rmdir()
    print(f"{number} rounds, {counts}: {findings} findings")
    return findings


if __name__ == "__main__":
    sys.exit(1 if main(float(sys.argv[1]), *(int(a) for a in sys.argv[2:3]), *sys.argv[3:4]) else 0)
