"""Files of segmenters and detectors: what they answer on every kernel set, and what a reader refuses."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitspike.deploy import Detector, ImageError, Net, Segmenter, kernels, load, load_classifier, resample
from bitspike.deploy.artifact import encode, parse, write
from bitspike.deploy.errors import ArtifactError
from bitspike.deploy.preprocess import Scene

from .random_programs import random_artifact
from .small_scenes import ALL, anchors, regions, segmenter


def net_of(kind: str, seed: int = 0) -> Segmenter | Detector:
    found = parse(encode(*ALL[kind](seed)))
    return Segmenter(found) if found.task == "segmentation" else Detector(found)


def pictures(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in ((16, 24), (30, 20), (33, 70))]


@pytest.fixture(autouse=True)
def _restore():
    before = kernels.active()
    yield
    kernels.use(before)


@pytest.mark.parametrize("kind", list(ALL))
@pytest.mark.parametrize("seed", range(4))
def test_every_kernel_set_and_any_threads_give_the_same(kind, seed):
    net = net_of(kind, seed)
    kernels.use("numpy")
    expected = net(pictures(seed))
    for name in kernels.available()[1:]:
        kernels.use(name)
        for threads in (1, 3):
            for a, b in zip(expected, net(pictures(seed), threads=threads), strict=True):
                pairs = [(a[key], b[key]) for key in a] if isinstance(a, dict) else [(a, b)]
                for x, y in pairs:
                    np.testing.assert_array_equal(x, y)


def test_answers_have_the_pictures_size():
    labels = net_of("segmenter")(pictures())
    assert [x.shape for x in labels] == [(16, 24), (30, 20), (33, 70)]
    assert all(x.dtype == np.uint8 and x.max() < 2 for x in labels)
    found = net_of("regions")(pictures())
    assert any(len(one["scores"]) for one in found)
    for one, picture in zip(found, pictures(), strict=True):
        n = len(one["scores"])
        assert one["boxes"].shape == (n, 4) and one["labels"].shape == (n,) and one["masks"].shape == (n, *picture.shape[:2])
        assert n <= 9 and (np.diff(one["scores"]) <= 0).all() and (one["scores"] > 0.05).all()
        assert (one["boxes"] >= 0).all() and (one["boxes"][:, 2] <= picture.shape[1]).all()
        assert (one["boxes"][:, 3] <= picture.shape[0]).all() and set(one["labels"]) <= {0, 1}
        for mask, (x1, y1, x2, y2) in zip(one["masks"], one["boxes"], strict=True):
            ys, xs = np.nonzero(mask)
            assert not len(xs) or (xs.min() >= x1 - 4 and xs.max() <= x2 + 4 and ys.min() >= y1 - 4 and ys.max() <= y2 + 4)


def test_a_canvas_is_what_evaluation_makes_of_a_picture():
    net = net_of("segmenter")
    scene = net.scene(pictures()[2])  # 33 x 70: the long side decides
    assert (scene.size, scene.pixels.shape, scene.original) == ((14, 30), (16, 32, 3), (33, 70))
    assert scene.pixels[-1, -1].tolist() == [9, 8, 7]


def test_windows():
    """Logits of overlapping windows, enlarged to pixels, are averaged; a picture within a window is seen whole."""
    whole, net = net_of("segmenter"), net_of("windowed")
    assert net.input_shape == (16, 24, 3) and net.program.values["pixels"].width == 16 and whole.windows is None
    scene = net.scene(pictures()[2])  # 16 x 32: windows at 0, 10 and 16
    total, count = np.zeros((16, 32, 2)), np.zeros((16, 32, 1))
    for left in (0, 10, 16):
        part = Scene(np.ascontiguousarray(scene.pixels[:, left : left + 16]), (16, 16), (16, 16))
        total[:, left : left + 16] += resample.bilinear(whole.outputs(part)[0], 16, 16)
        count[:, left : left + 16] += 1
    np.testing.assert_allclose(net.logits(scene), total / count, rtol=1e-5, atol=1e-5)
    answer = resample.bilinear((total / count)[: scene.size[0], : scene.size[1]], *scene.original).argmax(-1)
    assert (net.labels(scene) == answer).mean() > 0.99
    small = net.scene(pictures()[0][:, :16])
    np.testing.assert_array_equal(net.labels(small), whole.labels(small))
    header, tensors = ALL["windowed"]()
    header["windows"] = {"side": 8, "step": 2}
    header["input"]["letterbox"] |= {"short": 2000, "long": 0}
    with pytest.raises(ImageError, match="at most 4096 are allowed"):
        Segmenter(parse(encode(header, tensors)))(pictures()[:1])


def test_nothing_found():
    header, tensors = regions()
    header["detection"]["score"] = 1
    net = Detector(parse(encode(header, tensors)))
    (found,) = net(pictures()[:1])
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 16, 24)
    assert set(net.trace(net.scene(pictures()[0]))) == {"", "box"}


def test_without_masks():
    (found,) = Detector(parse(encode(*regions(masks=False))))(pictures()[:1])
    assert sorted(found) == ["boxes", "labels", "scores"]


def test_canvases_are_kept_and_forgotten():
    net = net_of("segmenter")
    assert net.executor(16, 24) is net.executor(16, 24)
    first = net.executor(16, 24)
    for i in range(1, 12):
        net.executor(8 * i, 8)
    assert len(net._canvases) == 8 and net.executor(16, 24) is not first


def test_what_is_no_picture():
    net = net_of("segmenter")
    with pytest.raises(TypeError, match="uint8"):
        net([np.zeros((8, 8, 3), np.float32)])
    with pytest.raises(ValueError, match=r"\[8, 8, 1\]"):
        net([np.zeros((8, 8, 1), np.uint8)])
    with pytest.raises(TypeError, match=r"net\(\[picture\]\)"):
        net(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(TypeError, match=r"net\(\[picture\]\)"):
        net("street.jpg")
    with pytest.raises(ImageError, match="none"):
        net([np.zeros((0, 8, 3), np.uint8)])
    header, tensors = segmenter()
    header["input"]["letterbox"]["long"] = 0
    with pytest.raises(ImageError, match="too narrow"):
        Segmenter(parse(encode(header, tensors)))([np.zeros((1, 9000, 3), np.uint8)])


def test_load(tmp_path):
    for kind, make in ALL.items():
        write(tmp_path / f"{kind}.bitspike", *make())
    assert isinstance(load(tmp_path / "segmenter.bitspike"), Segmenter)
    assert isinstance(load(tmp_path / "anchors.bitspike"), Detector)
    with pytest.raises(ArtifactError, match="made for detection"):
        load_classifier(tmp_path / "regions.bitspike")
    write(tmp_path / "net.bitspike", *random_artifact(1))
    assert isinstance(load_classifier(tmp_path / "net.bitspike"), Net)


Change = Callable[[dict[str, Any]], None]


def put(*path: Any) -> Change:
    """A change that puts the last of `path` at the place the others name."""
    *keys, key, value = path

    def change(header: dict[str, Any]) -> None:
        place: Any = header
        for one in keys:
            place = place[one]
        if value is None and isinstance(place, dict):
            del place[key]
        else:
            place[key] = value

    return change


D = "detection"
BROKEN: list[tuple[str, Change, str]] = [
    ("segmenter", put("task", "poetry"), "task"),
    ("segmenter", put("task", "classification"), "letterbox"),
    ("segmenter", put("task", None), "letterbox"),
    ("segmenter", put("stride", 0), "stride"),
    ("segmenter", put("stride", 4), "height 4"),
    ("segmenter", put("stride", 5), "must divide"),
    ("segmenter", put("stride", None), "missing"),
    ("segmenter", put("output", "x"), "height 8"),
    ("segmenter", put("output", "pixels"), "i32"),
    ("segmenter", put("output", "z"), "no op writes"),
    ("segmenter", put("classes", ["a"]), "channels 1"),
    ("segmenter", put("input", "resize", 30), "resize"),
    ("segmenter", put("input", "letterbox", None), "letterbox"),
    ("segmenter", put("input", "letterbox", "multiple", 7), "must divide"),
    ("segmenter", put("input", "letterbox", "border", [1, 2]), "border"),
    ("segmenter", put("input", "letterbox", "border", [1, 2, 256]), "border"),
    ("segmenter", put("input", "letterbox", "short", 1 << 15), "short"),
    ("segmenter", put("input", "letterbox", "colour", 3), "colour"),
    ("segmenter", put("program", 1, "factor", 3), "power of two"),
    ("windowed", put("windows", "side", 12), "multiple of the letterbox's 8"),
    ("windowed", put("windows", "side", 0), "side"),
    ("windowed", put("windows", "side", 16.0), "side"),
    ("windowed", put("windows", "step", 3), "integer 4..16"),
    ("windowed", put("windows", "step", 17), "integer 4..16"),
    ("windowed", put("windows", "step", None), "missing"),
    ("windowed", put("windows", "more", 1), "unknown"),
    ("windowed", put("windows", 16), "must be an object"),
    ("anchors", put("windows", {"side": 16, "step": 10}), "unknown"),
    ("segmenter", put("program", 1, "factor", 64), "factor"),
    ("segmenter", put("program", 1, "mode", "cubic"), "mode"),
    ("segmenter", put("program", 1, "in", ["pixels"]), "kind i32"),
    ("anchors", put("output", "x"), "unknown"),
    ("anchors", put(D, None), "missing"),
    ("anchors", put(D, "kind", "regions"), "missing"),
    ("anchors", put(D, "levels", []), "levels"),
    ("anchors", put(D, "levels", 0, "stride", 8), "height 2"),
    ("anchors", put(D, "levels", 0, "stride", 5), "does not divide"),
    ("anchors", put(D, "levels", 0, "scores", "d4"), "channels 6"),
    ("anchors", put(D, "levels", 0, "scores", "n4"), "i32"),
    ("anchors", put(D, "levels", 0, "deltas", "s4"), "channels 12"),
    ("anchors", put(D, "levels", 0, "map", "map4"), "unknown"),
    ("anchors", put(D, "levels", 0, "anchors", [[0, 0, 1, 1]] * 65), "anchors"),
    ("anchors", put(D, "levels", 0, "anchors", [[0, 0, 1]] * 3), "anchor"),
    ("anchors", put(D, "levels", 0, "anchors", [[0, 0, 1, 0]] * 3), "x1 < x2"),
    ("anchors", put(D, "levels", 0, "anchors", [[0, 0, 1, 1.5]] * 3), "integers"),
    ("anchors", put(D, "coder", [1, 1, 1]), "coder"),
    ("anchors", put(D, "coder", [1, 1, 1, 0]), "coder"),
    ("anchors", put(D, "coder", [1, 1, 1, True]), "coder"),
    ("anchors", put(D, "score", 2), "score"),
    ("anchors", put(D, "score", "0.5"), "score"),
    ("anchors", put(D, "overlap", -0.1), "overlap"),
    ("anchors", put(D, "candidates", 10**6), "candidates"),
    ("anchors", put(D, "most", 10**4), "most"),
    ("anchors", put(D, "most", 9.0), "most"),
    ("anchors", put(D, "proposals", 5), "unknown"),
    ("regions", put(D, "kind", "anchors"), "unknown"),
    ("regions", put(D, "box", None), "missing"),
    ("regions", put(D, "mask", None), "used by no op"),
    ("regions", put(D, "levels", 0, "map", None), "first ones"),
    ("regions", put(D, "levels", 1, "map", "map4"), "height 2"),
    ("regions", put(D, "canonical", 0), "canonical"),
    ("regions", put(D, "sampling", 17), "sampling"),
    ("regions", put(D, "region_coder", None), "missing"),
    ("regions", put(D, "box", 3), "object"),
    ("regions", put(D, "box", "side", 3), "1 x 1"),
    ("regions", put(D, "box", "side", 129), "side"),
    ("regions", put(D, "box", "levels", 5), "range"),
    ("regions", put(D, "box", "levels", 256), "levels"),
    ("regions", put(D, "box", "codes", [1, 63]), "codes"),
    ("regions", put(D, "box", "classes", "d"), "channels 3"),
    ("regions", put(D, "box", "deltas", "x"), "no op writes"),
    ("regions", put(D, "box", "program", []), "detection.box.program"),
    ("regions", put(D, "box", "program", 0, "in", ["map4"]), "no earlier op"),
    ("regions", put(D, "mask", "masks", "u"), "i32"),
    ("regions", put(D, "mask", "side", 128), "square"),
    ("regions", put(D, "mask", "more", 1), "unknown"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BROKEN, ids=[f"{i}-{b[0]}" for i, b in enumerate(BROKEN)])
def test_a_reader_refuses(kind, change, message):
    header, tensors = ALL[kind]()
    header = copy.deepcopy(header)
    change(header)
    with pytest.raises(ArtifactError, match=message):
        parse(encode(header, tensors))


def test_a_program_is_checked_again_at_every_size():
    net = Segmenter(parse(encode(*segmenter())))
    with pytest.raises(ImageError, match=r"at least as large|must divide"):
        net.executor(2, 2)
    with pytest.raises(ImageError, match="16384"):
        net.executor(1 << 15, 8)


def test_too_many_masks():
    net = net_of("regions")
    scene = net.scene(pictures()[0])
    large = type(scene)(scene.pixels, scene.size, (30_000, 30_000))
    found = net.detect(scene)
    assert len(found["boxes"]) > 1
    with pytest.raises(ImageError, match="Make the picture smaller"):
        net.in_picture(found, large)


def test_anchors_run_as_they_are():
    assert any(len(one["scores"]) for one in Detector(parse(encode(*anchors())))(pictures()))
