"""The command line: forms, exit codes, one clear message per mistake."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitspike import cli
from bitspike.deploy import artifact
from bitspike.deploy.runtime import builtin_names


def write_colours(path, **header):
    """An artifact whose logits are the mean of the red, green and blue pixels."""
    tensors = {"w": artifact.pack_codes(np.eye(3, dtype=int).reshape(3, 1, 1, 3), {"kind": "uniform", "bits": 2}),
               "m": np.full(3, 256, np.int32), "b": np.zeros(3, np.int32)}
    program = [
        {"op": "conv", "in": ["pixels"], "out": "x", "layer": "stem", "weight": "w", "scheme": {"kind": "uniform", "bits": 2},
         "shape": [3, 3, 1, 1], "stride": [1, 1], "padding": [0, 0], "groups": 1, "m": "m", "s": 0, "b": "b",
         "range": [0, 255]},
        {"op": "mean", "in": ["x"], "out": "logits", "over": "space", "m": 1}]
    header = {"name": "mean colour", "input": {"height": 4, "width": 4, "channels": 3, "resize": None},
              "classes": ["red", "green", "blue"], "time_steps": 1, "fraction_bits": 8, "program": program,
              "output": "logits", "provenance": {}} | header
    artifact.write(path, header, tensors)
    return path


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    return write_colours(tmp_path_factory.mktemp("artifact") / "colours.bitspike")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in (("a.png", (0, 200, 0)), ("b.jpg", (0, 0, 250))):
        Image.new("RGB", (9, 7), colour).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def call(*arguments):
    return cli.call([str(a) for a in arguments])


# ---------------------------------------------------------------------------------------------------- run
def test_run_file_and_folder(colours, photos, capsys):
    assert call("run", colours, photos, photos / "a.png", "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "a.png: green 100.0%" in lines[0] and "b.jpg: blue" in lines[1]
    assert all(line.count("%") == 2 for line in lines)


def test_run_leaves_hidden_files_alone(colours, photos, capsys):
    (photos / "._a.png").write_bytes(b"what macOS leaves on other disks")
    assert call("run", colours, photos) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_file_cannot_command_the_terminal(photos, tmp_path, capsys):
    file = write_colours(tmp_path / "evil.bitspike", name="\x1b[2Jnet", classes=["a\x1b[31m", "b\r\n\x07", "c\u202e"])
    assert call("run", file, photos / "a.png") == 0
    assert call("profile", file, "--images", 1) == 0
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\r\x07\u202e") and "b 100.0%" in out and "[2Jnet" in out
    assert call("run", file, photos / "a.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["top"][0]["class"] == "b\r\n\x07"


def test_run_json(colours, photos, capsys):
    assert call("run", colours, photos, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["top"][0]["class"] for entry in found] == ["green", "blue"]
    assert len(found[0]["top"]) == 3 and found[0]["top"][0]["index"] == 1
    assert found[0]["top"][0]["logit"] == pytest.approx(200, abs=1)


def test_run_reports_bad_pictures_and_goes_on(colours, photos, capsys):
    (photos / "broken.png").write_bytes(b"\x89PNG but not really")
    assert call("run", colours, photos, photos / "missing.jpg", "--json") == 2
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert [("error" in entry) for entry in found] == [False, False, True, True]
    assert "broken.png" in streams.err and "missing.jpg" in streams.err and "Traceback" not in streams.err


def test_run_empty_folder(colours, tmp_path, capsys):
    assert call("run", colours, tmp_path) == 2
    assert "holds no pictures" in capsys.readouterr().err


@pytest.mark.parametrize("name,says", [("nothing", "no built-in network"), ("missing.bitspike", "no such file")])
def test_run_missing_network(photos, name, says, capsys):
    assert call("run", name, photos) == 2
    assert says in capsys.readouterr().err


def test_run_damaged_network(colours, photos, tmp_path, capsys):
    data = bytearray(colours.read_bytes())
    data[-3] ^= 4
    damaged = tmp_path / "damaged.bitspike"
    damaged.write_bytes(data)
    assert call("run", damaged, photos) == 2
    error = capsys.readouterr().err
    assert "checksum" in error and "damaged.bitspike" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments,says", [
    ((), None), (("walk",), "walk"), (("run",), "FILE"), (("run", "a.bitspike"), "INPUTS"), (("train", "x"), "--out"),
    (("recipes", "--colour"), "--colour")])
def test_wrong_usage(arguments, says, capsys):
    code = call(*arguments)
    streams = capsys.readouterr()
    if says is None:
        assert code == 0 and "Usage: bitspike" in streams.out
    else:
        assert code == 2 and says in streams.err and "Traceback" not in streams.err


# -------------------------------------------------------------------------------------------- output paths
@pytest.mark.parametrize("arguments", [
    ("train", "demo.float", "--out", "a_file"), ("train", "demo.float", "--out", "a_file/run"), ("demo", "--out", "a_file"),
    ("export", "demo.float", "-o", "a_folder"), ("export", "demo.float", "-o", "a_file/x.bitspike"),
    ("eval", "missing.bitspike", "--json", "a_folder"), ("profile", "missing.bitspike", "--json", "a_file/x.json")])
def test_output_paths_are_checked_before_the_work(arguments, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("mine")
    (tmp_path / "a_folder").mkdir()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {'--output' if arguments[-2] == '-o' else arguments[-2]} a_")
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_file", "a_folder"] and not list((tmp_path / "a_folder").iterdir())


def test_the_result_is_printed_though_json_cannot_be_written(colours, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("bitspike.cli.desk.write_json", full)
    assert call("profile", colours, "--images", 1, "--json", "x.json") == 2
    streams = capsys.readouterr()
    assert "spikes per neuron" in streams.out and "no space left" in streams.err


@pytest.mark.parametrize("share", ["99", "-0.1", "nan"])
def test_a_share_is_between_0_and_1(share, tmp_path, capsys):
    pytest.importorskip("torch")
    assert call("export", "demo.float", "-o", tmp_path / "x.bitspike", "--min-agreement", share) == 2
    assert "0..1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ without torch
def test_run_and_profile_need_no_torch(colours, photos, tmp_path):
    code = (f"import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'timm', 'accelerate', 'safetensors']))\n"
            f"from bitspike import cli\n"
            f"assert cli.call(['run', {str(colours)!r}, {str(photos)!r}]) == 0\n"
            f"assert cli.call(['profile', {str(colours)!r}, '--json', {str(tmp_path / 'r.json')!r}]) == 0\n"
            f"assert sys.modules['torch'] is None")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    stem = report["layers"][0]
    assert (stem["kind"], stem["macs"], stem["weight_bits"], stem["packed_bytes"]) == ("first layer", 144, 2, 3)
    assert report["totals"]["file_bytes"] == colours.stat().st_size and report["totals"]["ms_per_image"] > 0


def test_a_missing_extra_is_one_line(tmp_path):
    code = ("import sys; sys.modules['torch'] = None\nfrom bitspike import cli\n"
            "sys.exit(cli.call(['train', 'x', '--out', 'y']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'bitspike[train]'" in done.stderr and "Traceback" not in done.stderr


def test_module_entry(colours, photos):
    done = subprocess.run([sys.executable, "-m", "bitspike", "run", colours, photos / "a.png"], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0 and "green" in done.stdout


# -------------------------------------------------------------------------------------------- with torch
def test_recipes_and_layers(capsys, tmp_path):
    pytest.importorskip("torch")
    assert call("recipes") == 0
    text = capsys.readouterr().out
    assert "demo.four_bit" in text and "\u2026" not in text
    assert call("recipes", "demo", "four", "--json", str(tmp_path / "r.json")) == 0
    (listed,) = json.loads((tmp_path / "r.json").read_text())
    assert listed["name"] == "demo.four_bit" and listed["bits"] == "4" and listed["cost"] == "about 1 minute on 2 cores"
    text = capsys.readouterr().out
    assert "demo.four_bit" in text and "fashion_mnist_sample, 4 bits" in text and "demo.float" not in text
    assert call("recipes", "fashion_mnist_sample", "cifar10") == 2
    assert "'fashion_mnist_sample' and 'cifar10'" in capsys.readouterr().err
    assert call("layers", "demo.four_bit") == 0
    text = capsys.readouterr().out
    assert "LSQ, 4 bits" in text and "IELIF(levels=4" in text and "groups.0.conv" in text
    assert call("layers", "demo.four_bit", "--set", "bits=1") == 0
    assert "Binary, 1 bits" in capsys.readouterr().out


@pytest.mark.parametrize("command", [("train", "--out", "nowhere"), ("layers",), ("export", "-o", "x.bitspike"), ("profile",),
                                     ("eval",)])
def test_unknown_recipe_names_the_nearest(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    assert call(command[0], "demo.four_bits", *command[1:]) == 2
    error = capsys.readouterr().err
    assert "'demo.four_bit'" in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("export", "-o", "x.bitspike"), ("profile",), ("eval",), ("bench",),
                                     ("search", "--budget", "bits=3", "--out", "found")])
def test_missing_run_is_not_taken_for_a_recipe(command, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    assert call(command[0], "runs/none", *command[1:]) == 2
    assert "runs/none: no such RUN folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_built_in_networks_are_named_in_the_help(capsys):
    for command in ((), ("run",)):
        assert call(*command, "--help") == 0
        text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
        assert all(name in text for name in builtin_names())


@pytest.mark.parametrize("setting,says", [("epoch=1", "'epochs'"), ("epochs", "field=value"), ("epochs=many", "a number"),
                                          ("flip=sideways", "alternating")])
def test_wrong_settings(setting, says, tmp_path, capsys):
    pytest.importorskip("torch")
    assert call("train", "demo.float", "--out", tmp_path / "run", "--set", setting) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The demonstration, shortened to a few steps: (folder, text)."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "COLUMNS": "140", "BITSPIKE_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-m", "bitspike", "demo", "--out", folder, "--set", "epochs=0.3"],
                          capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_demo_ends_in_a_table_and_a_file(trained, capsys):
    folder, text = trained
    for word in ("float weights, torch", "4-bit weights, torch", "four_bit.bitspike, integers", "accuracy", "ms per"):
        assert word in text
    file = folder / "four_bit.bitspike"
    assert str(file) in text and file.stat().st_size < 400_000
    assert call("run", file, folder / "pictures", "--top", 1) == 0
    assert capsys.readouterr().out.count("%") == 5


def test_eval_of_run_and_file_agree(trained, tmp_path, capsys):
    folder, _ = trained
    assert call("eval", folder / "four_bit", "--json", tmp_path / "run.json") == 0
    assert call("eval", folder / "four_bit.bitspike", "--json", tmp_path / "file.json") == 0
    run, file = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("run", "file"))
    assert run["n"] == file["n"] == 1000
    assert abs(run["top1"] - file["top1"]) <= 1.0
    assert run["runtime"] == "torch" and file["runtime"] == "integer"


def test_profile_of_run_file_and_recipe(trained, tmp_path, capsys):
    folder, _ = trained
    totals = {}
    for name, target in (("run", folder / "four_bit"), ("file", folder / "four_bit.bitspike"), ("recipe", "demo.four_bit")):
        assert call("profile", target, "--images", 8, "--json", tmp_path / f"{name}.json") == 0
        totals[name] = json.loads((tmp_path / f"{name}.json").read_text())["totals"]
    assert "Horowitz" in capsys.readouterr().out
    assert totals["run"]["packed_bytes"] == totals["file"]["packed_bytes"] == totals["recipe"]["packed_bytes"]
    assert totals["run"]["macs"] == totals["file"]["macs"]
    for key in ("synaptic_ops", "spikes_per_neuron", "literature_pj"):
        assert totals["file"][key] == pytest.approx(totals["run"][key], rel=0.02), key
    assert totals["file"]["bit_aware"]["total_pj"] == pytest.approx(totals["run"]["bit_aware"]["total_pj"], rel=0.05)


def test_first_layers_of_run_and_file_are_told_alike(trained, tmp_path, capsys):
    folder, _ = trained
    for name in ("four_bit", "four_bit.bitspike"):
        assert call("profile", folder / name, "--images", 2, "--json", tmp_path / "x.json") == 0
        first = json.loads((tmp_path / "x.json").read_text())["layers"][0]
        assert first["kind"] == "first layer" and first["mean_count"] is None and first["density"] is None
        assert "n/a" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["four_bit", "four_bit.bitspike"])
def test_pictures_that_were_trained_on_are_told(name, trained, capsys):
    folder, _ = trained
    assert call("eval", folder / name, "--split", "val") == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and "trained on train+val" in error
    assert call("eval", folder / name) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("data,says", [("cifar10", "does not exist"), ("no_such_set", "unknown dataset")])
def test_profile_of_a_file_goes_on_without_its_data(data, says, tmp_path, capsys):
    pytest.importorskip("torch")
    file = write_colours(tmp_path / "a.bitspike", provenance={"data": data})
    assert call("profile", file, "--images", 1, "--data", tmp_path / "none") == 0
    out = capsys.readouterr().out
    assert "embedded Fashion-MNIST sample" in out and says in out


def test_warnings_are_one_line(colours, monkeypatch, capsys):
    def load(_):
        warnings.warn("the MD5\ndiffers", stacklevel=1)
        raise FileNotFoundError("gone")

    monkeypatch.setattr("bitspike.deploy.load", load)
    before = warnings.showwarning
    assert call("run", colours, "x.png") == 2
    assert capsys.readouterr().err == "warning: the MD5 differs\nerror: gone\n"
    assert warnings.showwarning is before


def test_train_goes_on_or_refuses(trained, capsys):
    folder, _ = trained
    assert call("train", "demo.float", "--out", folder / "float", "--set", "epochs=0.3") == 0
    assert "finished" in capsys.readouterr().err
    assert call("train", "demo.four_bit", "--out", folder / "float", "--set", "epochs=0.3") == 2
    assert "bits" in capsys.readouterr().err


def test_export(trained, tmp_path, capsys):
    folder, _ = trained
    target = tmp_path / "new" / "net.bitspike"
    assert call("export", folder / "four_bit", "-o", target, "--min-agreement", "0.9") == 0
    assert "agreement with the torch model in float32" in capsys.readouterr().out
    assert artifact.read(target).header["provenance"]["recipe"] == "demo.four_bit"
    assert call("export", target, "-o", tmp_path / "again.bitspike") == 2
    assert "already" in capsys.readouterr().err
    assert call("export", "demo.four_bit", "-o", tmp_path / "random.bitspike", "--set", "bits=1") == 0
    assert (tmp_path / "random.bitspike").stat().st_size < target.stat().st_size / 2


def test_no_run_and_no_data(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.delenv("BITSPIKE_DATA", raising=False)
    assert call("eval", tmp_path) == 2
    assert "config.json" in capsys.readouterr().err
    assert call("train", "qsd_transformer.cifar10", "--out", tmp_path / "run") == 2
    assert "--data" in capsys.readouterr().err
    monkeypatch.setenv("BITSPIKE_DATA", str(tmp_path))
    assert call("train", "qsd_transformer.cifar10", "--out", tmp_path / "run") == 2
    assert str(tmp_path) in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- exit codes
def test_interrupted(monkeypatch, colours, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitspike.deploy.load", stop)
    assert call("run", colours, "x.png") == 1
    assert "interrupted" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("BITSPIKE_DEBUG", "1")
    with pytest.raises(ValueError, match="no such file"):
        call("run", tmp_path / "missing.bitspike", "x.png")


def test_defects_keep_their_traceback(monkeypatch, colours):
    def broken(*_):
        return {}["no such key"]

    monkeypatch.setattr("bitspike.deploy.load", broken)
    with pytest.raises(KeyError):
        call("run", colours, Path("x.png"))


def test_bench_says_when_it_takes_other_pictures(tmp_path, capsys):
    assert call("bench", "cifar10", "--seconds", "0.05", "--data", str(tmp_path / "nowhere")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "embedded Fashion-MNIST sample, because its own data cannot be read" in told and "nowhere does not exist" in told
