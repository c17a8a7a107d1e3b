"""A tiny data set in COCO's layout, written by the tests themselves: rectangles of colour with polygons and a crowd."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write(folder: Path, pictures: int = 22, size: tuple[int, int] = (40, 56), change=None) -> Path:
    """Write both parts under `folder`/coco; change: function (part, content) -> None that breaks the annotations."""
    height, width = size
    for part, count in (("train2017", pictures), ("val2017", 5)):
        draw = np.random.default_rng(len(part))
        content = {"images": [], "annotations": [], "categories": CATEGORIES, "licenses": [{"id": 4, "name": "CC BY"}]}
        (folder / "coco" / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            number = 100 * (count - i) + 7  # not in the order of the list
            pixels = draw.integers(0, 60, (height, width, 3)).astype(np.uint8)
            for j in range(1 + i % 3):
                x, y, w, h = (int(v) for v in (draw.integers(0, 30), draw.integers(0, 20), draw.integers(10, 25),
                                               draw.integers(9, 19)))
                category = CATEGORIES[(i + j) % 3]["id"]
                pixels[y : y + h, x : x + w] = [60 * j + 70, 100 + category, 200 - category]
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": category, "bbox": [x, y, w, h],
                    "area": w * h, "iscrowd": 0, "segmentation": polygon(x, y, w, h)})
            if i % 4 == 1:
                counts = [5, 80, height * width - 85]
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": number, "category_id": 18, "bbox": [0, 0, 3, height],
                    "area": 80, "iscrowd": 1, "segmentation": {"counts": counts, "size": [height, width]}})
            Image.fromarray(pixels).save(folder / "coco" / part / f"{number:06d}.png")
            content["images"].append({"id": number, "file_name": f"{number:06d}.png", "height": height, "width": width,
                                      "license": 4})
        if change:
            change(part, content)
        (folder / "coco" / "annotations").mkdir(exist_ok=True)
        (folder / "coco" / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return folder
