"""A segmenter through the training loop: the loss falls, a run goes on to the same weights, two processes are one."""
from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")

from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from bitspike.data import load  # noqa: E402
from bitspike.evaluation import limited  # noqa: E402
from bitspike.models.meta_spikeformer import MetaSpikeFormer  # noqa: E402
from bitspike.models.segmentation import SemanticFPN  # noqa: E402
from bitspike.neurons import IELIF  # noqa: E402
from bitspike.processes import share_  # noqa: E402
from bitspike.recipe import Recipe  # noqa: E402
from bitspike.training import evaluate, load_run, read_metrics, train  # noqa: E402

_spec = importlib.util.spec_from_file_location("scene_files", Path(__file__).parents[1] / "data" / "scene_files.py")
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)


def tiny() -> SemanticFPN:
    return SemanticFPN(MetaSpikeFormer((8, 8, 16, 16), depths=(1, 1), heads=2, layer_scale=0.5, topology="strict"), 11, 8,
                       auxiliary=1)


def exact() -> nn.Module:
    """One process, too, takes exact statistics: torch's own are off by 1e-5, so counts would differ here and there."""
    return share_(tiny())


class Smooth(nn.Module):
    """Nothing that rounds but one neuron."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.neuron = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 11, 1), IELIF(4)

    def forward(self, x):
        out = self.head(self.neuron(self.backbone(x)[None])[0])
        return {"out": out, "aux": out[..., ::2, ::2]} if self.training else out


RECIPE = Recipe("tiny", tiny, bits=4, task="segmentation", data="camvid", train_on="train+val", image_size=40, epochs=4,
                batch_size=4, lr=5e-3, flip="random", crop="random", scales=(0.8, 1.3), colour_jitter=0.2, workers=0,
                mean=(0.3,), std=(0.25,), auxiliary=0.4, ema=0.5)
EXACT = replace(RECIPE, model=Smooth, optimizer="sgd", lr=0.1, epochs=4 / 3, crop="whole", head_lr=2.0, ema=0.9)
WAYS = {"everything": {"accumulate": "2", "spike_penalty": "0.1", "grad_clip": "0.5", "crop": "random", "window": "32"}}
#: with batch norm, one step (after more of them single counts differ); float weights: see test_detection_training
NORMS = replace(RECIPE, model=exact, optimizer="sgd", lr=0.1, epochs=1 / 3, bits=32)


def go(data: str, out: str) -> None:
    """What each of two processes runs."""
    torch.set_num_threads(1)
    for name, changes in WAYS.items():
        train(EXACT, data, Path(out) / name, overrides=changes)
    train(NORMS, data, Path(out) / "norms")
    train(replace(NORMS, model=tiny), data, Path(out) / "apart", overrides={"sync_norm": "no"})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return files.camvid(tmp_path_factory.mktemp("data"))


def test_the_loss_falls_and_the_run_is_read_again(data, tmp_path):
    result = train(RECIPE, data, tmp_path / "run", overrides={
        "epochs": "5", "crop": "whole", "scales": "1", "colour_jitter": "0", "batch_size": "2", "optimizer": "muon",
        "lr": "0.03"})
    rows = read_metrics(tmp_path / "run")
    assert rows[-2]["loss"] < 0.8 * rows[0]["loss"] and {"test_miou", "test_pixel_accuracy", "test_n"} <= set(result)
    model, recipe = load_run(tmp_path / "run")
    again = evaluate(model, recipe, data)
    assert again["miou"] == result["test_miou"] and again["n"] == 5
    assert evaluate(model, recipe, data, "train", batch_size=1)["n"] == 11


def test_a_run_goes_on_to_the_same_weights(data, tmp_path, monkeypatch):
    train(RECIPE, data, tmp_path / "whole")
    import bitspike.training as training

    saved = training.save_checkpoint

    def once(run, weights, spec, state, tensors):
        saved(run, weights, spec, state, tensors)
        if state["step"] == 6 and not state["finished"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", once)
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, data, tmp_path / "parts")
    monkeypatch.setattr(training, "save_checkpoint", saved)
    train(RECIPE, data, tmp_path / "parts")
    one, two = (load_file(tmp_path / name / "checkpoint" / "ema.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_are_one(data, tmp_path, two_processes):
    two_processes(__name__, __file__, data, tmp_path / "two")
    for name, changes in WAYS.items():
        train(EXACT, data, tmp_path / "one" / name, overrides=changes)
        one, two = (load_file(tmp_path / part / name / "checkpoint" / "model.safetensors") for part in ("one", "two"))
        for key in one:
            assert torch.allclose(one[key].double(), two[key].double(), rtol=1e-5, atol=1e-6), key
        first, second = (read_metrics(tmp_path / part / name)[-1] for part in ("one", "two"))
        assert first["test_n"] == second["test_n"] == 5
        for key in ("test_miou", "test_pixel_accuracy", "test_loss"):
            assert abs(first[key] - second[key]) < 1e-4, key
    train(NORMS, data, tmp_path / "one" / "norms")
    one, two, apart = (load_file(tmp_path / part / "checkpoint" / "model.safetensors")
                       for part in ("one/norms", "two/norms", "two/apart"))
    for key in one:
        assert torch.allclose(one[key].double(), two[key].double(), rtol=1e-4, atol=1e-4), key
    assert not all(torch.allclose(one[key].double(), apart[key].double(), rtol=1e-2, atol=1e-2) for key in one)
    first, second = (read_metrics(tmp_path / part / "norms")[-1] for part in ("one", "two"))
    assert abs(first["test_loss"] - second["test_loss"]) < 1e-3


def test_a_signal_during_the_last_evaluation_ends_it(data, tmp_path, monkeypatch, capfd):
    import bitspike.training as training

    real = training.evaluate

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the signal was left waiting")

    monkeypatch.setattr(training, "evaluate", stopped)
    with pytest.raises(training.Interrupted) as stop:
        train(EXACT, data, tmp_path / "run")
    assert stop.value.code == 128 + signal.SIGTERM and "its test is not" in capfd.readouterr().err
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert not state["finished"] and state["step"] == state["steps"]
    monkeypatch.setattr(training, "evaluate", real)
    assert train(EXACT, data, tmp_path / "run")["test_n"] == 5


def test_some_pictures_evenly_spaced(data):
    whole = load("camvid", data)
    some = limited(whole, RECIPE.override({"pictures": "3"}))
    assert [p.name for p in some.train.paths] == [whole.train.paths[i].name for i in (0, 3, 7)]
    assert limited(some, RECIPE.override({"pictures": "3"})) is some and limited(whole, RECIPE) is whole


def test_distillation_from_a_segmenter(data, tmp_path):
    train(RECIPE, data, tmp_path / "teacher", overrides={"bits": "32", "epochs": "1"})
    result = train(RECIPE, data, tmp_path / "run", overrides={"epochs": "1", "distill_logits": "0.5",
                                                              "teacher": str(tmp_path / "teacher")})
    assert 0 <= result["test_miou"] <= 100


def test_a_file_sees_the_windows_of_evaluation(data, tmp_path):
    from bitspike.cli.files import evaluate_file, export_run

    train(RECIPE, data, tmp_path / "run", overrides={
        "window": "32", "image_size": "60", "crop": "whole", "optimizer": "muon", "lr": "0.03", "batch_size": "2"})
    model, recipe = load_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "a.bitspike", Path(data))
    one, two = evaluate(model, recipe, data), evaluate_file(str(tmp_path / "a.bitspike"), Path(data), "test")
    whole = evaluate(model, replace(recipe, window=0), data)
    assert abs(one["loss"] - two["loss"]) < 1e-3 < 5e-3 < abs(one["loss"] - whole["loss"])
    assert abs(one["miou"] - two["miou"]) < 0.5 and abs(one["pixel_accuracy"] - two["pixel_accuracy"]) < 0.5


def test_bfloat16_trains_and_float32_measures(data, tmp_path):
    """accelerate casts in the model's forward for good; the evaluation within the training must not see that."""
    last = train(RECIPE, data, tmp_path / "run", overrides={"precision": "bf16", "epochs": "1", "ema": "0"})
    model, recipe = load_run(tmp_path / "run")
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    again = evaluate(model, recipe, data)
    assert set(seen) == {torch.float32}
    assert again == evaluate(model, replace(recipe, precision="fp32"), data)
    assert again["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
