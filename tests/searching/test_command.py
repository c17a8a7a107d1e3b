"""`bitspike search` to `train --spec --start` to `export` and `run`, as a user types them."""
import json
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from bitspike import cli
from bitspike.checkpoints import load_run
from bitspike.deploy import artifact
from bitspike.spec import QuantSpec

SHORT = ("--set", "epochs=0.05", "--set", "warmup_epochs=0.01", "--set", "model_options.widths=[8,16,16]")


def call(*words):
    return cli.call([str(w) for w in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "float"
    assert call("train", "demo.float", "--out", run, *SHORT) == 0
    return run


def test_from_search_to_pictures(trained, tmp_path, capsys):
    out = tmp_path / "found"
    asked = ("search", trained, "--budget", "bits=3", "--out", out, "--images", 80, "--candidates", "uniform:2,4,8 pow2:2")
    assert call(*asked) == 0
    assert sorted(p.name for p in out.iterdir()) == ["bits.png", "bits.svg", "front.png", "front.svg", "measurements.jsonl",
                                                     "report.html", "report.json", "spec.json"]
    report = json.loads((out / "report.json").read_text())
    assert report["searched"]["bits"] <= 3 and report["budget"] == "bits=3"
    spec = (out / "spec.json").read_text()
    assert call(*asked) == 0 and (out / "spec.json").read_text() == spec
    printed = capsys.readouterr().out
    assert "uniform, 2 bits" in printed and "--spec" in printed

    tuned = tmp_path / "tuned"
    assert call("train", "demo.float", "--spec", out / "spec.json", "--start", trained, "--out", tuned,
                "--set", f"teacher={trained}", "--set", "distill_logits=1", *SHORT) == 0
    _, recipe = load_run(tuned)
    assert recipe.start == str(trained) and recipe.spec == QuantSpec.from_json(spec)
    file = tmp_path / "net.bitspike"
    assert call("export", tuned, "-o", file, "--min-agreement", 0.9) == 0
    assert file.stat().st_size <= report["searched"]["bytes"] + 600
    bits = {e["layer"]: e["scheme"]["bits"] for e in artifact.read(file).header["program"] if e["op"] == "conv"}
    assert bits == {n: s["bits"] for n, s in report["searched"]["layers"].items()}
    Image.new("L", (28, 28), 200).save(tmp_path / "a.png")
    assert call("run", file, tmp_path / "a.png") == 0


@pytest.mark.parametrize("words,message", [
    (("--budget", "bits=0.5"), "down to bits=1"), (("--budget", "weight=3"), "bytes=900kB"),
    (("--budget", "bits=3", "--candidates", "magic:3"), "unknown scheme 'magic'"),
    (("--budget", "bits=3", "--layer", "nose=uniform:8"), "no such layer"),
    (("--budget", "bits=3", "--layer", "head"), "expected LAYERS=CANDIDATES"),
    (("--budget", "bits=3", "--cheap", "time"), "bytes, energy"),
    (("--budget", "bits=3", "--method", "blackbox", "--trials", "0"), "trials=0"),
    (("--budget", "bits=3", "--technology", "none.json"), "no preset"), (("--budget", "bits=3", "--images", "2"), "at least 4"),
    (("--budget", "bits=3", "--method", "magic"), "sensitivity, differentiable, blackbox")])
def test_one_message_per_mistake(trained, tmp_path, capsys, words, message):
    assert call("search", trained, "--out", tmp_path / "x", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_files_and_runs_with_settings_are_refused(trained, tmp_path, capsys):
    assert call("search", "x.bitspike", "--budget", "bits=3", "--out", tmp_path / "x") == 2
    assert call("search", trained, "--budget", "bits=3", "--out", tmp_path / "x", "--set", "lr=1") == 2
    assert call("search", "qsd_transformer.camvid_small", "--budget", "bits=3", "--out", tmp_path / "x") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "integers already" in err and "searched as it is" in err and "network for segmentation" in err


def test_broken_weights_are_named(trained, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    file = broken / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("conv.weight"))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, file)
    assert call("search", broken, "--budget", "bits=3", "--out", tmp_path / "x") == 2
    assert f"{name} holds values that are not finite" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()
