"""Data sets with label maps, on files written here; the real ones where BITSPIKE_DATA or shared/data has them."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from PIL import Image  # noqa: E402

from bitspike.data import DataError, load  # noqa: E402
from bitspike.data.broken import BrokenAnnotations  # noqa: E402
from bitspike.data.scenes import VOID  # noqa: E402

from . import scene_files as files  # noqa: E402


def target(split, index):
    return split.target(index, *split.size(index))["semantic"].numpy()


def real(name: str) -> Path:
    root = Path(os.environ.get("BITSPIKE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
    if not (root / name).is_dir():
        pytest.skip(f"no {name} in {root}; set BITSPIKE_DATA to the folder that holds it")
    return root


def test_camvid(tmp_path):
    data = load("camvid", files.camvid(tmp_path))
    assert (len(data.train), len(data.val), len(data.test), len(data.classes)) == (11, 1, 5, 11)
    whole = data.split("train+val")
    names = sorted(path.name for path in whole.paths)
    assert names == [f"{i:03d}.png" for i in range(12)]
    index = [path.name for path in whole.paths].index("003.png")
    _, labels = files.scene(503)
    found = target(whole, index)
    assert (found[:-1] == labels[:-1]).all() and (found[-1] == VOID).all()
    assert whole.image(index).shape == (3, 40, 56)


def test_camvid_with_a_test_part(tmp_path):
    data = load("camvid", files.camvid(tmp_path, {"train": 4, "val": 3, "test": 2}))
    assert (len(data.train), len(data.val), len(data.test)) == (4, 3, 2)


def test_pascal_voc(tmp_path):
    data = load("pascal_voc", files.voc(tmp_path))
    assert (len(data.train), len(data.val), len(data.test), len(data.classes)) == (3, 1, 2, 21)
    _, labels = files.scene(30 + 1, classes=21)
    found = target(data.test, 1)
    assert (found[1:] == labels[1:]).all() and (found[0] == VOID).all()


def test_ade20k(tmp_path):
    data = load("ade20k", files.ade20k(tmp_path))
    assert (len(data.train), len(data.val), len(data.test), len(data.classes)) == (3, 1, 2, 150)
    _, labels = files.scene(100, (30, 50))
    found = target(data.test, 0)
    assert (found[labels == 0] == VOID).all() and (found[labels > 0] == labels[labels > 0] - 1).all()
    (tmp_path / "ADEChallengeData2016" / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    with pytest.raises(DataError, match="1 classes, expected 150"):
        load("ade20k", tmp_path)


def test_ade20k_in_full(tmp_path):
    data = load("ade20k_full", files.ade20k_full(tmp_path))
    assert data.classes == ("thing 5", "thing 312", "thing 1831", "thing 2420")  # by number; parts are no classes
    _, labels = files.scene(100, classes=4)
    assert (target(data.test, 0) == np.array([1, 3, 0, 2])[labels]).all()


def test_ade20k_without_some_json(tmp_path):
    files.ade20k_full(tmp_path)
    for part, i in (("training", 1), ("validation", 0)):
        (tmp_path / "images" / "ADE" / part / "urban" / "street" / f"ADE_{i}.json").unlink()
    with pytest.raises(DataError, match=r"2 of 6 annotations are broken: missing JSON \(2\): .*ADE_0.json, .*ADE_1.json"):
        load("ade20k_full", tmp_path)
    with pytest.warns(BrokenAnnotations, match=r"missing JSON \(2\)"):
        data = load("ade20k_full", tmp_path, skip_broken=True)
    assert len(data.train) + len(data.val) == 3 and len(data.test) == 1


def test_the_real_camvid():
    data = load("camvid", real("camvid"))
    assert (len(data.train), len(data.val), len(data.test)) == (58, 4, 26)
    assert data.train.size(0) == (360, 480) and set(np.unique(target(data.test, 0))) <= {*range(11), VOID}


def test_the_real_ade20k(tmp_path):
    home = real("ade20k_sample") / "ade20k_sample" / "images" / "ADE" / "training"
    for part in ("training", "validation"):
        shutil.copytree(home, tmp_path / "images" / "ADE" / part)
    data = load("ade20k_full", tmp_path)
    picture = [path.stem for path in data.test.paths].index("ADE_train_00016869")
    pixels = np.bincount(target(data.test, picture).ravel(), minlength=256)
    assert pixels[data.classes.index("road")] == 1155851 and pixels[data.classes.index("sky")] == 437203
    assert pixels[VOID] == 89604


def broken(root: Path) -> None:
    annotations = root / "camvid" / "trainannot"
    (annotations / "000.png").unlink()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(annotations / "001.png")
    Image.fromarray(np.full((40, 56), 37, np.uint8)).save(annotations / "002.png")
    (annotations / "003.png").write_bytes(b"not a picture")
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(annotations / "004.png")
    (root / "camvid" / "train" / "005.png").unlink()


def test_broken_annotations_are_named(tmp_path):
    broken(files.camvid(tmp_path))
    with pytest.raises(DataError) as error:
        load("camvid", tmp_path)
    text = str(error.value)
    assert "camvid: 6 of 17 annotations are broken" in text and "skip_broken" in text
    for part in ("missing annotation (1): 000.png", "another size than the picture (1): 001.png has 3 x 3, not 56 x 40",
                 "labels out of range (1): 002.png has 37, not 0..10", "unreadable annotation (1): 003.png",
                 "colours instead of class numbers (1): 004.png", "missing picture (1): 005.png"):
        assert part in text, part


def test_broken_annotations_are_left_out_when_asked(tmp_path):
    broken(files.camvid(tmp_path))
    with pytest.warns(BrokenAnnotations, match=r"6 of 17 .* Left out"):
        data = load("camvid", tmp_path, skip_broken=True)
    assert len(data.split("train+val")) == 6 and len(data.test) == 5


def test_the_hash_sees_every_label(tmp_path):
    first = load("camvid", files.camvid(tmp_path)).hash
    assert load("camvid", tmp_path).hash == first
    path = tmp_path / "camvid" / "valannot" / "000.png"
    labels = np.array(Image.open(path))
    labels[0, 0] = (labels[0, 0] + 1) % 11
    Image.fromarray(labels).save(path)
    assert load("camvid", tmp_path).hash != first


@pytest.mark.parametrize("name", ["camvid", "pascal_voc", "ade20k", "ade20k_full"])
def test_a_folder_without_them(name, tmp_path):
    with pytest.raises(DataError, match=r"found nothing; expected|expected images/ADE"):
        load(name, tmp_path)


def test_no_labels_of_pictures(tmp_path):
    with pytest.raises(DataError, match="classification only"):
        load("camvid", files.camvid(tmp_path)).train.labels
