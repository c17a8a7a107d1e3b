"""`bitspike run` with segmenters and detectors: text, JSON, drawings, and clear words for what cannot be meant."""
from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from bitspike import cli
from bitspike.deploy import artifact, draw, load

from .deploy.small_scenes import ALL


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for kind, make in ALL.items():
        artifact.write(folder / f"{kind}.bitspike", *make())
    return folder


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a", (60, 40)), ("b", (33, 70))):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size).save(folder / f"{name}.png")
    return folder


def call(*arguments):
    return cli.call([str(a) for a in arguments])


def test_detections_as_text_and_json(files, photos, capsys):
    assert call("run", files / "regions.bitspike", photos, "--score", "0.1", "-k", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "a.png: " in lines[0] and "%" in lines[0] and " more" in lines[0]
    assert call("run", files / "regions.bitspike", photos / "a.png", "--json", "--score", "0.1") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    (found,) = load(files / "regions.bitspike")([photos / "a.png"])
    kept = found["scores"] >= 0.1
    assert entry["size"] == [40, 60] and len(entry["detections"]) == kept.sum() > 0
    first = entry["detections"][0]
    assert first["class"] in ("cat", "dog") and first["score"] == pytest.approx(found["scores"][0], abs=1e-6)
    assert first["box"] == pytest.approx(found["boxes"][0].tolist(), abs=0.01)
    assert first["mask_pixels"] == int(found["masks"][0].sum())


def test_nothing_is_said_so(files, photos, capsys):
    assert call("run", files / "anchors.bitspike", photos / "a.png", "--score", "1") == 0
    assert "nothing with a score of 100% or more" in capsys.readouterr().out


def test_segmentation(files, photos, capsys):
    assert call("run", files / "segmenter.bitspike", photos / "b.png", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert sum(one["share"] for one in entry["classes"]) == pytest.approx(1, abs=1e-5)
    assert call("run", files / "segmenter.bitspike", photos / "b.png") == 0
    assert "%" in capsys.readouterr().out


@pytest.mark.parametrize("kind", list(ALL))
def test_drawings(files, photos, tmp_path, kind, capsys):
    one = tmp_path / "out.png"
    more = ("--score", "0.05") if kind in ("anchors", "regions") else ()
    assert call("run", files / f"{kind}.bitspike", photos / "a.png", "--save", one, *more) == 0
    assert f"-> {one}" in capsys.readouterr().out
    drawn = np.asarray(Image.open(one))
    assert drawn.shape[1:] == (60, 3) and (drawn[:40] != np.asarray(Image.open(photos / "a.png"))).any()
    assert call("run", files / f"{kind}.bitspike", photos, "--save", tmp_path / "all", *more) == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("regions", "{a}", "{b}", "--save", "x.png"), "give a folder"),
    (("regions", "{a}", "--save", "x.pdf"), r".png"),
    (("regions", "{a}", "--score", "2"), "0..1"),
    (("segmenter", "{a}", "--score", "0.5"), "for a detector"),
    (("regions", "{a}", "--stream"), "networks of event frames"),
    (("regions", "{a}.txt"), "no such file|cannot be read"),
    (("regions", "{a}", "--top", "0"), "at least 1"),
])
def test_what_cannot_be_meant(files, photos, arguments, message, capsys):
    import re

    kind, *rest = (a.format(a=photos / "a.png", b=photos / "b.png") for a in arguments)
    assert call("run", files / f"{kind}.bitspike", *rest) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(message, told, re.IGNORECASE) and "Traceback" not in told


def test_other_commands_say_what_they_need(files, capsys):
    assert call("bench", files / "regions.bitspike") == 2
    assert "made for detection" in " ".join(capsys.readouterr().err.split())
    assert call("bench", "qsd_transformer.coco_small") == 2
    assert "is for detection" in " ".join(capsys.readouterr().err.split())
    assert call("eval", files / "regions.bitspike") == 2
    assert "names no data set" in " ".join(capsys.readouterr().err.split())
    assert call("profile", files / "regions.bitspike", "--images", "2") == 0
    assert "energy 2" in capsys.readouterr().out


def test_colours_of_neighbouring_classes_differ():
    shades = [draw.colour(k) for k in range(80)]
    assert len(set(shades)) == 80
    assert all(sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 60 for a, b in pairwise(shades))


def test_drawing_stays_within_odd_pictures():
    grey = np.zeros((3, 2, 1), np.uint8)
    found = {"boxes": np.array([[0, 0, 2, 3]], np.float32), "labels": np.array([0]), "scores": np.array([0.9], np.float32),
             "masks": np.ones((1, 3, 2), bool)}
    assert draw.detections(grey, found, ["a"]).size == (2, 3)
    assert draw.segmentation(grey, np.zeros((3, 2), np.uint8), ["a"]).width == 2
