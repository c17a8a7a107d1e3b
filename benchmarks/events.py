"""Reading recordings of event cameras, beside peers that read them too, and making frames of them.

    python benchmarks/events.py [--data DIR ...] [--events 4000000] [--repeats 7] [--json FILE] [--hour]

Every format is written by us, with --events events of a moving edge, and read back; with --data so are the real recordings in
these folders: format_samples/* and dvs128-objects/session2/caneca.aedat. Peers are run in the same process on the same file, in
turns with us; the best of the repeats counts. Their arrays are compared with ours before any time is taken, and a peer that is
not installed or fails is named in the row. Peers: expelliarmus (.dat, EVT 2, EVT 3), tonic's readers (AEDAT 2.0 and 3.1 of a
DVS128, AEDAT 4, N-MNIST), and for the plain forms numpy and h5py, with the columns put into one array as we do it. --hour: an
hour of synthetic stream.
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


def with_numpy(path: Path) -> np.ndarray:
    """.npy of one array, .npz of one a column."""
    found = np.load(path)
    return events(found["t"], found["x"], found["y"], found["p"])


def with_h5py(path: Path) -> np.ndarray:
    """Columns of the group `events`."""
    import h5py

    with h5py.File(path) as file:
        return events(*(file["events"][name][:] for name in "txyp"))


def expelliarmus(encoding: str) -> Read:
    """Errors: ImportError."""
    from expelliarmus import Wizard

    return lambda path: Wizard(encoding=encoding).read(path)


def tonic(call: Callable[[Any, str], Any]) -> Read:
    """call: of (tonic.io, path). Errors: ImportError.

    Its readers of AEDAT take two of the three values that its reader of their headers gives (1.7.0), and so fail for every
    file; they get the two here.
    """
    from tonic import io

    header = io.read_aedat_header_from_file
    if header.__module__ == io.__name__:
        io.read_aedat_header_from_file = lambda path: header(path)[:2]
    return lambda path: call(io, str(path))


#: format -> (name of the peer, what gives its reader or raises ImportError)
PEERS: dict[str, tuple[str, Callable[[], Read]]] = {
    "dat": ("expelliarmus", lambda: expelliarmus("dat")),
    "evt2": ("expelliarmus", lambda: expelliarmus("evt2")),
    "evt3": ("expelliarmus", lambda: expelliarmus("evt3")),
    "aedat2": ("tonic", lambda: tonic(lambda io, path: array_of(io.read_dvs_128(path)))),
    "aedat3": ("tonic", lambda: tonic(lambda io, path: array_of(io.read_dvs_ibm(path)))),
    "aedat4": ("tonic", lambda: tonic(lambda io, path: io.read_aedat4(path))),
    "nmnist": ("tonic", lambda: tonic(lambda io, path: io.read_mnist_file(path, np.dtype("i8,i8,i8,i8")))),
    "npy": ("numpy", lambda: with_numpy),
    "npz": ("numpy", lambda: with_numpy),
    "hdf5": ("h5py", lambda: with_h5py)}


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
    name, reader = PEERS[format]
    calls: list[Callable[[], Any]] = [lambda: read(path), lambda: sum(len(piece) for piece in iterate(path))]
    try:
        peer = reader()
        row[f"{name}_differs_in"] = differences(peer(path), ours)
        calls.append(lambda: peer(path))
    except ImportError as error:
        row[name] = f"not installed ({error})"
    except Exception as error:  # what a peer raises for a file it cannot read is its own affair
        row[name] = f"fails: {type(error).__name__}: {str(error)[:60]}"
    seconds = best_of(repeats, calls)
    row["read_M_per_s"], row["iterate_M_per_s"] = (round(len(ours) / s / 1e6, 2) for s in seconds[:2])
    for s in seconds[2:]:
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
    parser.add_argument("--data", type=Path, nargs="+", default=[])
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
        real = [path for folder in given.data
                for path in (*sorted(folder.glob("format_samples/*")), *folder.glob("dvs128-objects/session2/caneca.aedat"))]
        if given.data and not real:
            parser.error(f"--data {' '.join(map(str, given.data))}: no format_samples/ and no dvs128-objects/ in it.")
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
                                 ("dat", (480, 640)), ("evt2", (480, 640)), ("evt3", (720, 1280)), ("npy", (128, 128)),
                                 ("npz", (128, 128)), ("hdf5", (128, 128))):
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
