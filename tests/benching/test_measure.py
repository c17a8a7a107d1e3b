from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest

from bitspike.benching.measure import interleaved
from bitspike.cli import call


def test_turns_are_interleaved_and_ordered():
    order: list[str] = []

    def run(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = interleaved({"slow": lambda: run("slow", 0.02), "fast": lambda: run("fast", 0.004)}, 0.01, rounds_at_least=3)
    assert found["fast"].median < found["slow"].median and found["slow"].least >= 0.02
    assert found["fast"].least <= found["fast"].p10 <= found["fast"].median <= found["fast"].p90
    changes = sum(a != b for a, b in pairwise(order))
    assert changes >= 5  # three rounds of two


def test_bench_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "bench.json"
    assert call(["bench", "cifar10", "--seconds", "0.05", "--batch", "2", "--explain", "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert told["threads"] == 1 and told["batch"] == 2 and told["peers"] == {} and told["ratio_to_best_peer"] is None
    assert told["ours_ms"] > 0 and 0 < told["density"] < 1 and told["file_bytes"] == 1_144_616
    assert told["fresh_process"]["bitspike"]["peak_mb"] > 10
    layers = told["layers"]
    assert sum(layer["macs"] for layer in layers) > 100e6 and all(layer["ms"] >= 0 for layer in layers)
    shown = capsys.readouterr().out
    assert "density" in shown and "% of bound" in shown


@pytest.mark.parametrize(("arguments", "message"), [
    (["cifar10", "--threads", "0"], "--threads 0"),
    (["cifar10", "--batch", "5000"], "--batch 5000"),
    (["cifar10", "--seconds", "0"], "--seconds 0"),
    (["cifar10", "--set", "bits=2"], "finished network"),
    (["cifar10", "--pictures", "."], "holds no pictures"),
    (["no.such_recipe"], "no.such_recipe"),
])
def test_what_cannot_be_measured_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
                                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert call(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
