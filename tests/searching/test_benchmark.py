"""`benchmarks/search.py` from its first search to its page, on a network of a few thousand weights."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bitspike import cli

FILE = Path(__file__).parents[2] / "benchmarks" / "search.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_search", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_short_run_gives_every_row_and_goes_on_where_it_was(benchmark, tmp_path, capsys):
    run, out = tmp_path / "float", tmp_path / "out"
    small = ("model_options.widths=[8,16,16]", "warmup_epochs=0")
    sets = [word for text in ("epochs=0.02", *small) for word in ("--set", text)]
    assert cli.call(["train", "demo.float", "--out", str(run), *sets]) == 0
    asked = [str(run), "--data", str(tmp_path), "--out", str(out), "--short", "--set", "batch_size=50",
             *(word for text in small for word in ("--set", text))]
    benchmark.main([*asked, "--only", "searched"])
    assert [p.name for p in (out / "runs").iterdir()] == ["searched_3_seed_0"] and not (out / "results.json").exists()
    kept = (out / "runs" / "searched_3_seed_0" / "metrics.jsonl").read_text()
    benchmark.main(asked)
    assert (out / "runs" / "searched_3_seed_0" / "metrics.jsonl").read_text() == kept
    points = {p["row"]: p for p in json.loads((out / "results.json").read_text())}
    assert set(points) == {"float", "searched 3", "uniform 3", "uniform 3 with 8-bit ends", "power of two only 3", "random 3",
                           "random, filled 3"}
    assert points["searched 3"]["bits"] <= 3 and points["uniform 3"]["bits"] == 3 and points["float"]["bits"] == 32
    printed = capsys.readouterr().out
    assert all(f"| {row} | 1 |" in printed for row in points) and "over 6 runs" in printed
    assert (out / "report.html").stat().st_size > 10_000


def test_the_table_tells_mean_and_spread(benchmark):
    same = {"bits": 3.0, "bytes": 100, "energy_pj": 1e6}
    points = [{"row": "float", "top1": 90.0, "bits": 32.0, "bytes": 1000, "energy_pj": 2e6},
              *({"row": "b", "top1": v, **same} for v in (80.0, 82.0, 87.0)), {"row": "a", "top1": 85.0, **same}]
    lines = benchmark.table(points).splitlines()[2:]
    assert lines[0].startswith("| a | 1 | 3.00 | 85.00 % |  |  | -5.00 | 100 | 10.0x | 1.0 | 2.0x |")
    assert lines[1].startswith("| b | 3 | 3.00 | 83.00 % | 3.61 | 80.00 to 87.00 | -7.00 |")
    assert lines[2].startswith("| float | 1 | 32.00 | 90.00 % |")


def test_the_estimates_order_is_compared_with_that_of_accuracy(benchmark):
    points = [{"estimate": e, "top1": t} for e, t in ((0.1, 91.0), (0.2, 90.5), (0.4, 80.0))]
    assert ": 1.00 over 3 runs" in benchmark.agreement(points)
    assert ": -1.00 over 3 runs" in benchmark.agreement([{**p, "top1": -p["top1"]} for p in points])
    assert "too few" in benchmark.agreement(points[:2])
