"""COCO: pictures with boxes, classes and masks of objects (annotations/instances_*.json, polygons and runs)."""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitspike.data.broken import Broken
from bitspike.data.errors import DataError
from bitspike.data.scenes import Scenes, Target
from bitspike.data.splits import Dataset, held_out

_OUTSIDE = 1.0  # pixels that a polygon or box may pass the border by: coordinates are rounded in published files


@dataclass(frozen=True)
class Object:
    """One annotation: box (x, y, width, height in pixels), label from 1, outline (polygons or a run-length code)."""

    id: int
    label: int
    box: tuple[float, float, float, float]
    outline: Any
    area: float
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """One picture's annotations. licence: number in the file's list of licences."""

    id: int
    height: int
    width: int
    objects: tuple[Object, ...]
    licence: int


def coco(data_dir: Path | str, skip_broken: bool = False) -> Dataset:
    """COCO 2017 or anything in its layout, from `data_dir`/coco, `data_dir`/coco_subset or `data_dir` itself.

    `test` is val2017 (every picture of it); `val` is 5 % of train2017, where pictures without an object (crowds do not count)
    are left out, as all published training does. Classes are the annotation file's categories in the order of their ids;
    labels count from 1. The hash covers the annotation files, the names and sizes of the pictures and the split.
    skip_broken: leave out the broken objects alone (their pictures stay, and what they showed counts as background) and the
    missing pictures, with a `BrokenAnnotations` warning that counts and names them.
    Errors: DataError for a missing folder, a damaged file, or broken annotations: how many of each kind, with names.
    """
    folder = _folder(Path(data_dir))
    digest = hashlib.sha256()
    (names, train), (again, test) = (_read(folder, part, digest, skip_broken) for part in ("train2017", "val2017"))
    if names != again:
        odd = sorted(set(names.items()) ^ set(again.items()))[:3]
        raise DataError(f"{folder}: the two annotation files have different categories, for example {odd}.")
    filled = torch.tensor([i for i, scene in enumerate(train.annotations) if any(not o.crowd for o in scene.objects)],
                          dtype=torch.int64)
    if not len(filled) or not len(test):
        raise DataError(f"{folder}: {len(filled)} training pictures with objects, {len(test)} of validation; both need some.")
    train = train.take(filled)
    rest, val = held_out(torch.zeros(len(train), dtype=torch.int64), [p.name for p in train.paths])
    digest.update(val.numpy().data)
    return Dataset("coco", tuple(names.values()), train.take(rest), train.take(val), test, digest.hexdigest())


def coco_overfit(data_dir: Path | str, skip_broken: bool = False) -> Dataset:
    """Sixteen pictures that are training, validation and test set at once: can a network learn them by heart?

    They are, in the order of their ids, the first 16 training pictures of `coco` with 1 to 4 objects, none of them a crowd
    or smaller than a fortieth of the picture. Errors: those of `coco`; DataError if there are fewer than 16.
    """
    whole = coco(data_dir, skip_broken)
    every = whole.train.joined(whole.val)
    assert isinstance(every, Scenes)
    ids = [scene.id for scene in every.annotations]
    chosen = sorted((i for i, scene in enumerate(every.annotations) if _easy(scene)), key=ids.__getitem__)[:16]
    if len(chosen) < 16:
        raise DataError(f"{data_dir}: only {len(chosen)} pictures have 1 to 4 objects of at least a fortieth of the picture; "
                        "16 are needed.")
    few = every.take(torch.tensor(chosen))
    digest = hashlib.sha256(whole.hash.encode() + b"".join(b" %d" % ids[i] for i in chosen))
    return Dataset("coco_overfit", whole.classes, few, few, few, digest.hexdigest())


def _easy(scene: Scene) -> bool:
    least = scene.height * scene.width / 40
    return 1 <= len(scene.objects) <= 4 and all(not o.crowd and o.area >= least for o in scene.objects)


# ------------------------------------------------------------------------------------------------- a picture
def read_objects(scene: Scene, height: int, width: int) -> Target:
    """A picture's annotations -> `Target` with boxes, labels, masks, area, iscrowd and image_id.

    Needs faster-coco-eval. Errors: DataError if the picture has another size than its annotations say.
    """
    from torchvision import tv_tensors

    if (height, width) != (scene.height, scene.width):
        raise DataError(f"picture {scene.id} is {width} x {height} pixels, its annotations are for {scene.width} x "
                        f"{scene.height}: the file was resized or is another one.")
    objects = scene.objects
    boxes = torch.tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    masks = torch.stack([filled(o.outline, height, width) for o in objects]) if objects else torch.zeros(
        0, height, width, dtype=torch.uint8)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
        "labels": torch.tensor([o.label for o in objects], dtype=torch.int64),
        "masks": tv_tensors.Mask(masks),
        "area": torch.tensor([o.area for o in objects], dtype=torch.float32),
        "iscrowd": torch.tensor([o.crowd for o in objects], dtype=torch.int64),
        "image_id": scene.id,
    }


def filled(outline: Any, height: int, width: int) -> torch.Tensor:
    """Polygons [[x, y, x, y, ..], ..], or a run-length code {"counts", "size"}, as a mask: uint8 [height, width].

    Polygons are filled as COCO does it, by faster-coco-eval.

    >>> filled({"counts": [1, 2, 3], "size": [2, 3]}, 2, 3).tolist()
    [[0, 1, 0], [1, 0, 0]]
    """
    if isinstance(outline, Mapping):
        counts = run_lengths(outline["counts"])
        flat = np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts)
        return torch.from_numpy(flat.reshape(width, height)).T.contiguous()
    from faster_coco_eval.core import mask

    return torch.from_numpy(mask.decode(mask.merge(mask.frPyObjects(outline, height, width))).copy())


def run_lengths(counts: Any) -> list[int]:
    """Lengths of the runs of zeros, ones, zeros .., down the columns: a list as it is, or COCO's compressed text.

    In the text each number is cut into 5 bits a character, the lowest first, and from the fourth on is a difference to the
    number two places before. Errors: ValueError.

    >>> run_lengths("03401")
    [0, 3, 4, 3, 5]
    """
    if not isinstance(counts, str):
        if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("run lengths that are no whole numbers of at least 0")
        return counts
    numbers: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("a run length that is none")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
        if numbers[-1] < 0:
            raise ValueError("a run length below 0")
        value = shift = 0
    if shift:
        raise ValueError("a run length that is cut off")
    return numbers


# -------------------------------------------------------------------------------------------------- the file
def _folder(root: Path) -> Path:
    for folder in (root / "coco", root / "coco_subset", root):
        if (folder / "annotations").is_dir():
            return folder
    found = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing" if root.is_dir() else "no such folder"
    raise DataError(f"{root}: found {found}; expected annotations/instances_train2017.json and instances_val2017.json, "
                    "train2017/ and val2017/, there or in coco/. Get COCO 2017 from https://cocodataset.org/#download.")


def _read(folder: Path, part: str, digest: Any, skip_broken: bool) -> tuple[dict[int, str], Scenes]:
    """Category id -> name, and the pictures of one annotation file."""
    path = folder / "annotations" / f"instances_{part}.json"
    try:
        text = path.read_bytes()
        content = json.loads(text)
        names = {_whole(c["id"]): str(c["name"]) for c in content["categories"]}
        sizes = {_whole(p["id"]): (_whole(p["height"]), _whole(p["width"]), str(p["file_name"])) for p in content["images"]}
        licences = {p["id"]: p.get("license") for p in content["images"]}
        annotations = list(content["annotations"])
        if len(names) < len(content["categories"]) or len(sizes) < len(content["images"]):
            raise ValueError("two pictures or two categories with the same id")
    except (OSError, AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as COCO annotations ({type(error).__name__}: {error}); expected a JSON object "
                        "with images, annotations and categories.") from error
    names, sizes = dict(sorted(names.items())), dict(sorted(sizes.items()))
    broken = Broken(str(path), "entries", "leave out these objects and pictures")
    labels = {category: number for number, category in enumerate(names, 1)}
    objects: dict[int, list[Object]] = {i: [] for i in sizes}
    for number, annotation in enumerate(annotations):
        trouble, found = _object(annotation, sizes, labels)
        if found is None:
            broken.add(trouble, _place(annotation, number, sizes))
        else:
            objects[annotation["image_id"]].append(found)
    paths, scenes = [], []
    digest.update(text)
    for i, (height, width, name) in sizes.items():
        file = folder / part / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            broken.add("name outside of the folder", name)
            continue
        if not file.is_file():
            broken.add("missing file", name)
            continue
        digest.update(f"{part}/{name} {file.stat().st_size}\n".encode())
        paths.append(file)
        licence = licences[i]
        scenes.append(Scene(i, height, width, tuple(objects[i]), licence if isinstance(licence, int) else 0))
    broken.settle(len(annotations) + len(sizes), skip_broken)
    return names, Scenes(tuple(paths), tuple(scenes), read_objects)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number of at least 0")
    return value


def _place(annotation: Any, number: int, sizes: Mapping[int, tuple[int, int, str]]) -> str:
    """Which annotation, of which picture, as far as that can be said."""
    said = annotation if isinstance(annotation, Mapping) else {}
    picture = said.get("image_id")
    name = sizes[picture][2] if isinstance(picture, int) and picture in sizes else "an unknown picture"
    return f"annotation {said.get('id', f'number {number}')} of {name}"


def _object(annotation: Any, sizes: Mapping[int, tuple[int, int, str]],
            labels: Mapping[int, int]) -> tuple[str, Object | None]:
    """(what is wrong, None) or ("", the object)."""
    try:
        if _whole(annotation["image_id"]) not in sizes:
            return "unknown picture", None
        if _whole(annotation["category_id"]) not in labels:
            return "unknown category", None
        height, width, _ = sizes[annotation["image_id"]]
        x, y, w, h = (float(v) for v in annotation["bbox"])
        outline, crowd = annotation["segmentation"], bool(annotation.get("iscrowd", 0))
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            return "empty box", None
        if _outside((x, x + w), width) or _outside((y, y + h), height):
            return "box outside of the picture", None
        if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
            return "empty box", None
        area = float(annotation.get("area", w * h))
        if not 0 <= area <= 2.0 * height * width:
            return "area that cannot be", None
        trouble = _outline_trouble(outline, height, width)
        if trouble:
            return trouble, None
        return "", Object(_whole(annotation["id"]), labels[annotation["category_id"]], (x, y, w, h), outline, area, crowd)
    except (KeyError, TypeError, ValueError, OverflowError):
        return "missing or malformed field", None


def _outside(coordinates: Sequence[float], side: int) -> bool:
    return min(coordinates) < -_OUTSIDE or max(coordinates) > side + _OUTSIDE


def _outline_trouble(outline: Any, height: int, width: int) -> str:
    if isinstance(outline, Mapping):
        if list(outline["size"]) != [height, width]:
            return "mask of another size than the picture"
        try:
            return "" if sum(run_lengths(outline["counts"])) == height * width else "damaged mask"
        except ValueError:
            return "damaged mask"
    if not isinstance(outline, list) or not outline:
        return "no polygon"
    for polygon in outline:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
            return "damaged polygon"
        if _outside(polygon[0::2], width) or _outside(polygon[1::2], height):
            return "polygon outside of the picture"
    return ""
