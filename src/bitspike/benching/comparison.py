"""One network against other engines: built, compared, timed in turns, weighed."""
from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.benching.engines import MODEL, OURS, PEERS, STREAMS, Engine, Opened, int8_share, missing, write_files
from bitspike.benching.lower import PeerError
from bitspike.benching.measure import Timing, in_fresh_process, interleaved
from bitspike.deploy import Net, kernels

Say = Callable[[str], None]


@dataclass
class Result:
    """Everything a bench found; `to_dict` is the JSON."""

    name: str
    threads: int
    batch: int
    pictures: str
    density: float
    density_by_macs: float
    file_bytes: int
    timings: dict[str, Timing]
    kernels: str
    machine: str
    agreement: dict[str, dict[str, Any]] = field(default_factory=dict)
    fresh: dict[str, dict[str, Any]] = field(default_factory=dict)
    int8: dict[str, str] = field(default_factory=dict)
    peer_file_bytes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    same_function: dict[str, Any] | None = None

    @property
    def peers(self) -> dict[str, float]:
        """Peer -> median milliseconds."""
        return {name: timing.median for name, timing in self.timings.items() if name != OURS.name}

    @property
    def ours_ms(self) -> float:
        """Median milliseconds of the integer runtime."""
        return self.timings[OURS.name].median

    @property
    def best_peer(self) -> str | None:
        """The fastest peer."""
        return min(self.peers, key=lambda name: self.peers[name]) if self.peers else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data. All times are milliseconds per call, that is per batch."""
        best = self.best_peer
        return {
            "model": self.name, "ours_ms": round(self.ours_ms, 4),
            "peers": {name: round(ms, 4) for name, ms in self.peers.items()},
            "best_peer": best, "ratio_to_best_peer": round(self.peers[best] / self.ours_ms, 4) if best else None,
            "density": round(self.density, 4), "density_by_macs": round(self.density_by_macs, 4), "threads": self.threads,
            "batch": self.batch, "timings": {name: timing.to_dict() for name, timing in self.timings.items()},
            "agreement": self.agreement, "same_function": self.same_function, "fresh_process": self.fresh,
            "int8_convolutions": self.int8, "file_bytes": self.file_bytes, "peer_file_bytes": self.peer_file_bytes,
            "left_out": self.left_out, "pictures": self.pictures, "kernels": self.kernels, "machine": self.machine,
        }


def density(net: Net, images: NDArray[np.uint8]) -> tuple[float, float]:
    """Share of spikes or counts that are not 0, over all inputs of convolutions and attention that are such; plain, and
    weighted by multiplications.
    """
    values = net.trace(images)
    plain, weighted = np.zeros(2), np.zeros(2)
    seen: set[str] = set()
    for op in net.program.ops:
        if op.name == "lookup" or not op.macs:
            continue
        for name in op.inputs:
            value = net.program.values[name]
            if name == "pixels" or value.kind != "u8" or value.hi > 127:
                continue
            nonzero = np.count_nonzero(values[name]) / values[name].size
            weighted += (nonzero * op.macs, op.macs)
            if name not in seen:
                plain += (nonzero * values[name].size, values[name].size)
                seen.add(name)
    return float(plain[0] / max(plain[1], 1)), float(weighted[0] / max(weighted[1], 1))


def machine() -> str:
    """The processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def _compare(found: NDArray[np.float32], ours: NDArray[np.float32]) -> dict[str, Any]:
    return {"largest_logit_difference": float(np.abs(found - ours).max()),
            "logits_largest": float(np.abs(ours).max()),
            "top1_agreement": float((found.argmax(1) == ours.argmax(1)).mean())}


def _wanted(peers: bool, plain: Path | None, threads: int, batch: int, skip: Sequence[str],
            result: Result) -> dict[str, Engine]:
    engines = {OURS.name: OURS}
    if not peers:
        return engines
    for engine in PEERS + ((STREAMS,) if threads > 1 and batch > 1 else ()) + ((MODEL,) if plain else ()):
        lacking = missing(engine)
        if any(word in engine.name for word in skip):
            result.left_out[engine.name] = "left out, as asked"
        elif lacking:
            result.left_out[engine.name] = f"{', '.join(lacking)} not installed: {engine.install}"
        else:
            engines[engine.name] = engine
    return engines


def benchmark(net: Net, artifact: Path, images: NDArray[np.uint8], pictures: str, *, threads: int = 1, peers: bool = False,
              seconds: float = 10.0, plain: Path | None = None, skip: Sequence[str] = (), say: Say = print) -> Result:
    """Time a network, alone or against every installed peer.

    Args:
        images: uint8 [B, H, W, C], the batch. pictures: where they are from, in words.
        threads: of every engine. seconds: of timing in all. plain: a saved torch model of the same weights, one peer more.
        skip: words; peers with one of them in their name are left out. say: told what goes on.
    Errors: PeerError if another engine cannot be given this network.
    """
    few = images[:4] if net.input_steps == 1 else images[:, :4]
    plain_density, by_macs = density(net, few)
    batch = len(images) if net.input_steps == 1 else images.shape[1]
    result = Result(net.header["name"], threads, batch, pictures, plain_density, by_macs, artifact.stat().st_size, {},
                    kernels.active(), machine())
    with tempfile.TemporaryDirectory(prefix="bitspike-bench-") as place:
        folder = Path(place)
        engines = _wanted(peers, plain, threads, batch, skip, result)
        say("writing the files of the engines" if peers else "timing")
        write_files(net, artifact, folder, images, engines)
        if plain is not None and MODEL.name in engines:
            (folder / MODEL.file).symlink_to(plain.absolute())
        np.save(folder / "pixels.npy", images)
        runs = _open_all(engines, folder, images, threads, result, say)
        if peers and not missing(MODEL):
            result.same_function = _same_function(net, few)
        result.timings = interleaved(runs, seconds)
        for name in runs:
            say(f"memory and cold start: {name}")
            result.fresh[name] = in_fresh_process(name, folder, threads)
            result.peer_file_bytes[name] = (folder / engines[name].file).stat().st_size
    return result


def _open_all(engines: dict[str, Engine], folder: Path, images: NDArray[np.uint8], threads: int, result: Result,
              say: Say) -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {}
    ours: NDArray[np.float32] | None = None
    for name, engine in engines.items():
        say(f"preparing {name}")
        try:
            opened = engine.open(folder / engine.file, threads)
            given = opened.prepare(images)
            logits = opened.run(given)
        except Exception as error:  # an engine's own failure must not spoil the comparison with the others
            if engine is OURS or isinstance(error, PeerError):
                raise
            result.left_out[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if ours is None:
            ours = logits
        else:
            result.agreement[name] = _compare(logits, ours)
            share = int8_share(name, folder, images)
            if share is not None:
                result.int8[name] = share
        runs[name] = _bound(opened, given)
    return runs


def _bound(opened: Opened, given: Any) -> Callable[[], object]:
    return lambda: opened.run(given)


def _same_function(net: Net, images: NDArray[np.uint8]) -> dict[str, Any]:
    """The float network of the peers against the integers, op by op: see `compare`."""
    from bitspike.benching.to_torch import PeerModule, compare

    found = compare(PeerModule(net).eval(), net, images)
    return {"largest_potential_difference": found.largest_potential, "codes": found.codes, "codes_different": found.different}
