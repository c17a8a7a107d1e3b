"""Reading recordings of event cameras, beside the peers that are installed, and making frames of them.

    python benchmarks/events.py [--data DIR] [--events 4000000] [--repeats 7] [--json FILE] [--hour]

DIR holds format_samples/ and dvs128-objects/ or n-mnist/ as far as they are at hand; every format is also written by us,
with --events events of a moving edge, and read back. Peers are run in the same process on the same file, in turns with us; the
best of the repeats counts. Their arrays are compared with ours before any time is taken. Peers: expelliarmus
(.dat, EVT 2, EVT 3), tonic's readers (AEDAT 2 as its CIFAR10-DVS and N-MNIST read them). --hour: an hour of synthetic stream.
"""
from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitspike.data.events import events, frames, iterate, read, write

Read = Callable[[Path], Any]


def moving_edge(number: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Sorted events: an edge that crosses the sensor, with noise; about 1 M events a second."""
    random = np.random.default_rng(seed)
    t = np.cumsum(random.integers(0, 3, number))
    x = (t // 500 + random.integers(0, 12, number)) % size[1]
    y = np.repeat(random.integers(0, size[0], -(-number // 4)), 4)[:number]  # neighbours in a row, as sensors read out
    return events(t, x, y, random.integers(0, 2, number))


def best_of(repeats: int, calls: list[Callable[[], Any]]) -> list[float]:
    """Shortest seconds of each call, taken in turns."""
    least = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call()
            least[i] = min(least[i], time.perf_counter() - began)
    return least


def array_of(found: Any) -> Any:
    """Some readers of tonic give (size, events)."""
    return found[-1] if isinstance(found, tuple) else found


def peers_of(format: str) -> dict[str, Read]:
    """Installed peers that read the format: name -> function of the path."""
    found: dict[str, Read] = {}
    try:
        from expelliarmus import Wizard
        if format in ("dat", "evt2", "evt3"):
            found["expelliarmus"] = lambda path: Wizard(encoding=format).read(path)
    except ImportError:
        pass
    try:
        from tonic import io as tonic_io
        if format == "aedat2":
            found["tonic"] = lambda path: array_of(tonic_io.read_dvs_128(str(path)))
        elif format == "nmnist":
            found["tonic"] = lambda path: tonic_io.read_mnist_file(str(path), np.dtype("i8,i8,i8,i8"))
        elif format == "aedat3":
            found["tonic"] = lambda path: array_of(tonic_io.read_dvs_ibm(str(path)))
        elif format == "aedat4":
            found["tonic"] = lambda path: tonic_io.read_aedat4(str(path))
    except ImportError:
        pass
    return found


def differences(theirs: Any, ours: np.ndarray) -> str:
    """Which columns of a peer's array are not ours ("number" for their length)."""
    if len(theirs) != len(ours):
        return f"number ({len(theirs)})"
    names = theirs.dtype.names or ()
    alias = {"on": "p", "f0": "x", "f1": "y", "f2": "t", "f3": "p"}
    found = {alias.get(name, name): name for name in names}
    return "".join(c for c in "txyp" if c not in found or not np.array_equal(
        np.asarray(theirs[found[c]]).astype(np.int64), ours[c].astype(np.int64))) or "nothing"


def reading(path: Path, format: str, repeats: int) -> dict[str, Any]:
    """Seconds of `read`, of `iterate` and of each peer on one file; their events are compared with ours."""
    ours = read(path).data
    row: dict[str, Any] = {"file": path.name, "format": format, "events": len(ours), "bytes": path.stat().st_size}
    peers = {}
    for name, call in peers_of(format).items():
        try:
            theirs = call(path)
        except Exception as error:  # what a peer raises for a file it cannot read is its own affair
            row[name] = f"fails: {type(error).__name__}: {str(error)[:60]}"
            continue
        row[f"{name}_differs_in"] = differences(theirs, ours)
        peers[name] = call
    calls = [lambda: read(path), lambda: sum(len(piece) for piece in iterate(path)),
             *[(lambda call=call: call(path)) for call in peers.values()]]
    seconds = best_of(repeats, calls)
    row["read_M_per_s"], row["iterate_M_per_s"] = (round(len(ours) / s / 1e6, 2) for s in seconds[:2])
    for name, s in zip(peers, seconds[2:], strict=True):
        row[f"{name}_M_per_s"] = round(len(ours) / s / 1e6, 2)
        row[f"times_{name}"] = round(s / seconds[0], 2)
    return row


def framing(number: int, repeats: int) -> list[dict[str, Any]]:
    """M events a second into frames, on one core (numpy and the extension start no threads for it)."""
    rows = []
    for size, steps, pooled in (((128, 128), 10, None), ((128, 128), 10, (48, 48)), ((720, 1280), 10, None)):
        data = moving_edge(number, size)
        for by in ("count", "time"):
            (seconds,) = best_of(repeats, [lambda d=data, s=size, n=steps, b=by, p=pooled: frames(d, s, n, b, p)])
            rows.append({"sensor": f"{size[1]}x{size[0]}", "frames": steps, "by": by, "pooled": str(pooled or ""),
                         "M_per_s": round(number / seconds / 1e6, 1)})
    return rows


def hour(minutes: int = 60) -> dict[str, Any]:
    """An hour of a synthetic stream through the packed network of tests: memory at every tenth of it, events a second."""
    from bitspike.deploy import Net, Stream
    from bitspike.deploy.artifact import encode, pack_codes, parse

    random, T, side, width = np.random.default_rng(0), 10, 32, 16
    scheme = {"kind": "uniform", "bits": 4}
    tensors = {"w": pack_codes(random.integers(-8, 8, (width, 3, 3, 2)), scheme), "m": np.full(width, 900, np.int32),
               "b": random.integers(-9999, 9999, width).astype(np.int32)}
    program = [
        {"op": "conv", "in": ["pixels"], "out": "x", "weight": "w", "scheme": scheme, "shape": [width, 2, 3, 3],
         "stride": [1, 1], "padding": [1, 1], "groups": 1, "m": "m", "s": 3, "b": "b", "range": [0, 255]},
        {"op": "lif", "in": ["x"], "out": "s", "decay": [1, 1], "gain": [1, 0], "threshold": 1 << 16, "reset": "soft",
         "steps": T, "strict": False},
        {"op": "mean", "in": ["s"], "out": "a", "over": "space", "m": 1 << 16},
        {"op": "mean", "in": ["a"], "out": "logits", "over": "time", "m": 1}]
    header = {"name": "stream", "input": {"height": side, "width": side, "channels": 2, "resize": None, "steps": T},
              "classes": [str(i) for i in range(width)], "time_steps": T, "fraction_bits": 16, "program": program,
              "output": "logits", "provenance": {}}
    stream = Stream(Net(parse(encode(header, tensors))), (128, 128), window_us=50_000)
    second = moving_edge(400_000, (128, 128))
    second["t"] = np.arange(len(second)) * 1_000_000 // len(second)
    resident = []
    began = time.perf_counter()
    for index in range(60 * minutes):
        stream.push(second)
        second["t"] += 1_000_000
        if index % (6 * minutes) == 6 * minutes - 1:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(round(pages * resource.getpagesize() / 1e6, 1))
    spent = time.perf_counter() - began
    return {"minutes": minutes, "windows": stream.totals.windows, "events": stream.totals.events, "seconds": round(spent, 1),
            "M_events_per_s": round(stream.totals.events / spent / 1e6, 2), "resident_MB": resident,
            "latency_ms_median": round(float(np.median(stream.totals.latencies_ms)), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--events", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hour", type=int, nargs="?", const=60, default=0, help="minutes of synthetic stream")
    given = parser.parse_args()
    result: dict[str, Any] = {"reading": [], "framing": []}

    def tell(row: dict[str, Any]) -> None:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    if given.hour:
        result = {"hour": hour(given.hour)}
        tell(result["hour"])
    else:
        real = sorted((given.data / "format_samples").glob("*")) + sorted(
            (given.data / "dvs128-objects").glob("session2/caneca.aedat")) if given.data else []
        for path in real:
            try:
                found = read(path)
            except (ValueError, ImportError):
                continue
            if len(found):
                result["reading"].append(reading(path, found.format, given.repeats))
                tell(result["reading"][-1])
        with tempfile.TemporaryDirectory() as folder:
            for format, size in (("aedat2", (128, 128)), ("aedat3", (128, 128)), ("aedat4", (480, 640)), ("nmnist", (34, 34)),
                                 ("dat", (480, 640)), ("evt2", (480, 640)), ("evt3", (720, 1280)), ("npy", (128, 128))):
                data = moving_edge(given.events, size)
                if format == "nmnist":
                    data = data[:given.events // 4]
                ending = {"evt2": "raw", "evt3": "raw", "nmnist": "bin"}.get(format, format)
                path = Path(folder) / f"{format}.{ending}"
                write(path, data, format, size=size if format in ("aedat4", "dat", "evt2", "evt3") else None)
                result["reading"].append(reading(path, format, given.repeats))
                tell(result["reading"][-1])
        for row in framing(given.events, given.repeats):
            result["framing"].append(row)
            tell(row)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
