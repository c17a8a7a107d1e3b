"""Tiny data sets with label maps, written by the tests themselves: the red of a pixel is 20 times its class."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def scene(seed: int, size: tuple[int, int] = (40, 56), classes: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """(picture [H, W, 3], classes [H, W])."""
    draw = np.random.default_rng(seed)
    labels = np.zeros(size, np.uint8)
    for _ in range(4):
        top, left = draw.integers(0, size[0] - 12), draw.integers(0, size[1] - 12)
        labels[top : top + draw.integers(8, 25), left : left + draw.integers(8, 25)] = draw.integers(classes)
    picture = np.stack([labels * 20, np.full(size, 50, np.uint8), np.full(size, seed % 250, np.uint8)], 2)
    return picture.astype(np.uint8), labels


def camvid(folder: Path, counts: dict[str, int] | None = None, size: tuple[int, int] = (40, 56)) -> Path:
    """`folder`/camvid in SegNet's layout; the last row of every map is void (11)."""
    root = folder / "camvid"
    for part, count in (counts or {"train": 12, "val": 5}).items():
        for name in (part, f"{part}annot"):
            (root / name).mkdir(parents=True)
        lines = []
        for i in range(count):
            picture, labels = scene(100 * len(part) + i, size)
            labels[-1] = 11
            Image.fromarray(picture).save(root / part / f"{i:03d}.png")
            Image.fromarray(labels).save(root / f"{part}annot" / f"{i:03d}.png")
            lines.append(f"/somewhere/{part}/{i:03d}.png /somewhere/{part}annot/{i:03d}.png\n")
        (root / f"{part}.txt").write_text("".join(lines))
    return folder


def voc(folder: Path) -> Path:
    """`folder`/VOC2012; maps with a palette, 255 is void."""
    root = folder / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for part, count in (("train", 4), ("val", 2)):
        for i in range(count):
            picture, labels = scene(10 * len(part) + i, classes=21)
            labels[0] = 255
            Image.fromarray(picture).save(root / "JPEGImages" / f"{part}_{i}.jpg")
            mapped = Image.fromarray(labels).convert("P")
            mapped.putpalette([255 - v // 3 for v in range(768)])
            mapped.save(root / "SegmentationClass" / f"{part}_{i}.png")
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(f"{part}_{i}" for i in range(count)))
    return folder


def ade20k(folder: Path) -> Path:
    """`folder`/ADEChallengeData2016; 0 is void, classes are 1..150."""
    root = folder / "ADEChallengeData2016"
    for part, count in (("training", 4), ("validation", 2)):
        (root / "images" / part).mkdir(parents=True)
        (root / "annotations" / part).mkdir(parents=True)
        for i in range(count):
            picture, labels = scene(10 * len(part) + i, (30 + i, 50))
            Image.fromarray(picture).save(root / "images" / part / f"ADE_{i}.jpg")
            Image.fromarray(labels).save(root / "annotations" / part / f"ADE_{i}.png")
    return folder


def ade20k_full(folder: Path, objects: tuple[int, ...] = (312, 2420, 5, 1831)) -> Path:
    """`folder`/images/ADE; the map's red and green are an object's number, blue its instance."""
    for part, count in (("training", 4), ("validation", 2)):
        place = folder / "images" / "ADE" / part / "urban" / "street"
        place.mkdir(parents=True)
        for i in range(count):
            picture, labels = scene(10 * len(part) + i, classes=len(objects))
            number = np.array(objects)[labels]
            coded = np.stack([number // 256 * 10 + i, number % 256, labels], 2).astype(np.uint8)
            Image.fromarray(picture).save(place / f"ADE_{i}.jpg")
            Image.fromarray(coded).save(place / f"ADE_{i}_seg.png")
            content = [{"name_ndx": n, "name": f"thing {n}, alias", "parts": {"part_level": 0}} for n in objects[: 3 + i % 2]]
            content.append({"name_ndx": 77, "name": "handle", "parts": {"part_level": 1}})
            (place / f"ADE_{i}.json").write_text(json.dumps({"annotation": {"object": content}}))
    return folder
