"""Detectors through the training loop: losses fall, a run is resumed and read, two processes compute what one computes."""
from __future__ import annotations

import importlib.util
import signal
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from bitspike.checkpoints import build  # noqa: E402
from bitspike.models import detection  # noqa: E402
from bitspike.processes import share_  # noqa: E402
from bitspike.recipe import Recipe  # noqa: E402
from bitspike.training import Interrupted, evaluate, load_run, read_metrics, train  # noqa: E402

_spec = importlib.util.spec_from_file_location("coco_files", Path(__file__).parents[1] / "data" / "coco_files.py")
coco_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coco_files)


def tiny(kind: str = "mask_rcnn") -> detection.Detector:
    backbone = detection.small_backbone((8, 8, 16, 16))
    if kind == "retinanet":
        return detection.retinanet(backbone, 3, width=8, levels=2, convs=1)
    return detection.mask_rcnn(backbone, 3, width=16, levels=2, finest=8, hidden=16, mask_convs=1, region_levels=2,
                               canonical=32, anchor_scale=2, regions_sampled=16, candidates=(50, 50), proposals=(20, 20))


def exact(kind: str) -> nn.Module:
    """One process, too, takes exact statistics: torch's own are off by 1e-5, so counts would differ here and there."""
    return share_(tiny(kind))


RECIPE = Recipe("tiny", tiny, task="detection", data="coco", train_on="train+val", image_size=32, long_side=48, epochs=2,
                batch_size=4, optimizer="adamw", lr=3e-3, flip="random", workers=0, bits=4, mean=(0.3,), std=(0.25,))
#: With batch norm and, of Mask R-CNN, with sampled anchors and regions. Float weights: at 4 bits so small a network has
#: channels that nothing reaches; they stand exactly on the edge of the neurons, where the last bit decides on the gradient.
EXACT = replace(RECIPE, model=exact, model_options={"kind": "retinanet"}, optimizer="sgd", lr=0.01, epochs=3 / 5, bits=32)
KINDS = ("retinanet", "mask_rcnn")


def go(data: str, out: str) -> None:
    """What each of two processes runs."""
    torch.set_num_threads(1)
    for kind in KINDS:
        train(EXACT, data, Path(out) / kind, overrides={"model_options.kind": kind})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coco_files.write(tmp_path_factory.mktemp("data"))


def test_a_run(tmp_path, data):
    last = train(RECIPE, data, tmp_path)
    assert last["test_n"] == 5
    assert {"test_box_map", "test_box_map50", "test_mask_map", "test_mask_map50", "test_mean_spikes"} <= last.keys()
    rows = read_metrics(tmp_path)
    assert rows[1]["loss"] < rows[0]["loss"]
    model, recipe = load_run(tmp_path)
    again = evaluate(model, recipe, data)
    assert again["box_map"] == last["test_box_map"]
    assert evaluate(model, replace(recipe, batch_size=1), data, batch_size=1)["mask_map"] == last["test_mask_map"]


def test_interrupted_and_resumed(tmp_path, data, monkeypatch):
    """Which anchors and regions are sampled is random too."""
    recipe = replace(RECIPE, epochs=1, colour_jitter=0.2, scales=(0.8, 1.2), ema=0.9)
    steps = []
    losses = detection.MaskRCNN._losses

    def interrupt(self, images, targets):
        steps.append(images)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return losses(self, images, targets)

    with monkeypatch.context() as patch:
        patch.setattr(detection.MaskRCNN, "_losses", interrupt)
        with pytest.raises(Interrupted):
            train(recipe, data, tmp_path / "cut")
    assert len(steps) == 3
    train(recipe, data, tmp_path / "cut")
    train(recipe, data, tmp_path / "whole")
    for part in ("model", "ema"):
        one, two = ((tmp_path / way / "checkpoint" / f"{part}.safetensors").read_bytes() for way in ("cut", "whole"))
        assert one == two


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_are_one(tmp_path, data, two_processes):
    two_processes(__name__, __file__, data, tmp_path / "two")
    for kind in KINDS:
        train(EXACT, data, tmp_path / "one" / kind, overrides={"model_options.kind": kind})
        one, two = (load_file(tmp_path / part / kind / "checkpoint" / "model.safetensors") for part in ("one", "two"))
        assert one.keys() == two.keys() and any(key.endswith("running_var") for key in one)
        start = build(EXACT.override({"model_options.kind": kind})).state_dict()
        assert sum(float((one[key] - start[key]).abs().max()) > 1e-2 for key in one) > 20  # far more than the tolerance
        for key in one:
            assert torch.allclose(one[key].double(), two[key].double(), rtol=1e-4, atol=5e-5), (kind, key)
        first, second = (read_metrics(tmp_path / part / kind) for part in ("one", "two"))
        assert abs(first[0]["loss"] - second[0]["loss"]) < 1e-5 * first[0]["loss"]
        assert first[-1]["test_n"] == second[-1]["test_n"] == 5
        assert first[-1]["test_box_map"] == pytest.approx(second[-1]["test_box_map"], abs=1e-6)
