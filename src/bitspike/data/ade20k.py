"""ADE20K in its full original layout: a colour-coded `_seg.png` and a JSON beside every picture."""
from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.data.broken import Broken
from bitspike.data.errors import DataError
from bitspike.data.label_maps import MapError, Pairs, pixels_of, segmentation, semantic
from bitspike.data.scenes import VOID, Target
from bitspike.data.splits import Dataset

MOST = 150


@dataclass(frozen=True)
class SegMaps:
    """`_seg.png`: a pixel's object number is (red // 10) * 256 + green. numbers: of the classes, in order; others are void."""

    numbers: tuple[int, ...]

    def decode(self, path: Path) -> NDArray[np.uint8]:
        """See `MapReader`."""
        stored = pixels_of(path)
        if stored.ndim != 3 or stored.shape[2] < 3:
            raise MapError(path, "an annotation without colours")
        number = stored[..., 0].astype(np.int32) // 10 * 256 + stored[..., 1]
        table = np.full(26 * 256, VOID, np.uint8)
        table[list(self.numbers)] = np.arange(len(self.numbers))
        return table[number]

    def __call__(self, annotation: Any, height: int, width: int) -> Target:
        """See `Scenes.read`."""
        return semantic(self, annotation, height, width)


def _objects(picture: Path) -> dict[int, str]:
    """Object number -> name, of one picture's JSON. Errors: FileNotFoundError; DataError for another content."""
    path = picture.with_suffix(".json")
    try:
        objects = json.loads(path.read_bytes().decode("latin-1"))["annotation"]["object"]
        whole = [o for o in objects if not int(o["parts"]["part_level"])]  # parts of objects have maps of their own
        return {int(o["name_ndx"]): str(o["name"]) for o in whole}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the annotation of an ADE20K picture ({type(error).__name__}: {error}).") from None


def ade20k_full(data_dir: Path | str, skip_broken: bool = False) -> Dataset:
    """ADE20K in its original layout: images/ADE/{training,validation}/<scene>/.../<picture>.jpg with `_seg.png` and `.json`.

    The classes are the 150 objects that the most training pictures show (fewer if there are fewer), in the order of their
    numbers; everything else is void. That is our choice: the benchmark's 150 classes, which merge some objects, are the data
    set "ade20k". `test` is the published validation part; `val` is 5 % of training. Looked for in `data_dir` and
    `data_dir`/ADE20K_2021_17_01. A picture without its JSON is a broken one. Errors: DataError.
    """
    root = Path(data_dir)
    homes = [root / sub / "images" / "ADE" for sub in ("ADE20K_2021_17_01", "")]
    home = next((h for h in homes if (h / "training").is_dir()), None)
    if home is None:
        raise DataError(f"{root}: expected images/ADE/training there or in ADE20K_2021_17_01/. Get ADE20K from "
                        "https://groups.csail.mit.edu/vision/datasets/ADE20K.")

    def pairs(part: str) -> Pairs:
        return [(path, path.with_name(f"{path.stem}_seg.png")) for path in sorted((home / part).rglob("*.jpg"))]

    train = pairs("training")
    pictures: Counter[int] = Counter()
    names: dict[int, str] = {}
    test, whole, broken = pairs("validation"), list[tuple[Path, Path]](), Broken("ade20k_full")
    for pair in test:
        if not pair[0].with_suffix(".json").is_file():
            broken.add("missing JSON", str(pair[0].with_suffix(".json").relative_to(home)))
    for picture, labels in train:
        try:
            objects = _objects(picture)
        except FileNotFoundError:
            broken.add("missing JSON", str(picture.with_suffix(".json").relative_to(home)))
            continue
        whole.append((picture, labels))
        names.update(objects)
        pictures.update(objects.keys())
    broken.settle(len(train) + len(test), skip_broken)
    test = [pair for pair in test if pair[0].with_suffix(".json").is_file()]
    # objects that as many pictures show: the smaller number first, so that the choice is the same everywhere
    numbers = tuple(sorted(sorted(names, key=lambda n: (-pictures[n], n))[:MOST]))
    if not numbers:
        raise DataError(f"{home / 'training'}: {len(train)} pictures, none with a JSON that names objects.")
    classes = [names[n].split(",")[0] for n in numbers]
    return segmentation("ade20k_full", classes, whole, None, test, SegMaps(numbers), skip_broken,
                        key=lambda path: str(path.relative_to(home)))
