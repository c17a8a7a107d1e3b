"""Interleaved timing: every engine has its turn in every round, so that a busy moment hits all of them."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

_TURN_SECONDS = 0.03   # of calls in a row, after one that is not counted: it brings the engine's data into the caches
_PAUSE_SECONDS = 0.005  # between turns: thread pools of the engine before stop spinning


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, tenth and ninetieth percentile, minimum; and how many calls."""

    median: float
    p10: float
    p90: float
    least: float
    calls: int

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def interleaved(runs: Mapping[str, Callable[[], object]], seconds: float, rounds_at_least: int = 5) -> dict[str, Timing]:
    """Time every function for about `seconds` in all.

    >>> result = interleaved({"nothing": lambda: None}, seconds=0.01)
    >>> result["nothing"].calls >= 5
    True
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    began, rounds = time.perf_counter(), 0
    while rounds < rounds_at_least or time.perf_counter() - began < seconds:
        for name, run in runs.items():
            time.sleep(_PAUSE_SECONDS)
            run()
            turn, calls = time.perf_counter(), 0
            while calls < 1 or (time.perf_counter() - turn < _TURN_SECONDS and calls < 1000):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
                calls += 1
        rounds += 1
    return {name: _timing(took) for name, took in times.items()}


def _timing(seconds: list[float]) -> Timing:
    ms = 1e3 * np.asarray(seconds)
    p10, median, p90 = np.percentile(ms, [10, 50, 90])
    return Timing(float(median), float(p10), float(p90), float(ms.min()), len(ms))


def in_fresh_process(engine: str, folder: Path, threads: int) -> dict[str, Any]:
    """Cold start and peak memory of an engine, in a process of its own; {"error": text} if that fails."""
    command = [sys.executable, "-m", "bitspike.benching.engines", engine, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": last[0]}
    return {key: round(value, 2) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
