"""COCO: pictures with boxes, classes and masks of objects (annotations/instances_*.json, polygons and runs)."""
from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    skip_broken: leave out broken annotations and missing pictures, with a warning that counts them.
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

    COCO's own rasterisation, by faster-coco-eval.

    >>> filled({"counts": [1, 2, 3], "size": [2, 3]}, 2, 3).tolist()
    [[0, 1, 0], [1, 0, 0]]
    """
    from faster_coco_eval.core import mask

    runs = mask.frPyObjects(outline, height, width)
    whole = mask.merge(runs) if isinstance(runs, list) else runs
    return torch.from_numpy(mask.decode(whole).copy())


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
        names = {int(c["id"]): str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
        pictures = {int(p["id"]): p for p in sorted(content["images"], key=lambda p: p["id"])}
        annotations = list(content["annotations"])
        sizes = {i: (int(p["height"]), int(p["width"]), str(p["file_name"])) for i, p in pictures.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as COCO annotations ({type(error).__name__}: {error}); expected a JSON object "
                        "with images, annotations and categories.") from error
    broken: list[tuple[str, str]] = []  # (what, where)
    labels = {category: number for number, category in enumerate(names, 1)}
    objects: dict[int, list[Object]] = {i: [] for i in sizes}
    for annotation in annotations:
        trouble, found = _object(annotation, sizes, labels)
        if found is None:
            name = sizes.get(annotation.get("image_id"), ("", "", "an unknown picture"))[2]
            broken.append((trouble, f"annotation {annotation.get('id')} of {name}"))
        else:
            objects[annotation["image_id"]].append(found)
    paths, scenes = [], []
    digest.update(text)
    for i, (height, width, name) in sizes.items():
        file = folder / part / name
        if not file.is_file():
            broken.append(("missing file", name))
            continue
        digest.update(f"{part}/{name} {file.stat().st_size}\n".encode())
        paths.append(file)
        scenes.append(Scene(i, height, width, tuple(objects[i]), int(pictures[i].get("license", 0))))
    if broken:
        _tell(path, broken, skip_broken)
    return names, Scenes(tuple(paths), tuple(scenes), read_objects)


def _object(annotation: Mapping[str, Any], sizes: Mapping[int, tuple[int, int, str]],
            labels: Mapping[int, int]) -> tuple[str, Object | None]:
    """(what is wrong, None) or ("", the object)."""
    try:
        if annotation["image_id"] not in sizes:
            return "unknown picture", None
        if annotation["category_id"] not in labels:
            return "unknown category", None
        height, width, _ = sizes[annotation["image_id"]]
        x, y, w, h = (float(v) for v in annotation["bbox"])
        outline, crowd = annotation["segmentation"], bool(annotation.get("iscrowd", 0))
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            return "empty box", None
        if x < -_OUTSIDE or y < -_OUTSIDE or x + w > width + _OUTSIDE or y + h > height + _OUTSIDE:
            return "box outside of the picture", None
        trouble = _outline_trouble(outline, height, width)
        if trouble:
            return trouble, None
        return "", Object(int(annotation["id"]), labels[annotation["category_id"]], (x, y, w, h), outline,
                          float(annotation.get("area", w * h)), crowd)
    except (KeyError, TypeError, ValueError):
        return "missing or malformed field", None


def _outline_trouble(outline: Any, height: int, width: int) -> str:
    if isinstance(outline, Mapping):
        if list(outline["size"]) != [height, width]:
            return "mask of another size than the picture"
        counts = outline["counts"]
        good = isinstance(counts, str) or (all(isinstance(n, int) and n >= 0 for n in counts) and sum(counts) == height * width)
        return "" if good else "damaged mask"
    if not isinstance(outline, list) or not outline:
        return "no polygon"
    for polygon in outline:
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(math.isfinite, polygon)):
            return "damaged polygon"
        xs, ys = polygon[0::2], polygon[1::2]
        if min(polygon) < -_OUTSIDE or max(xs) > width + _OUTSIDE or max(ys) > height + _OUTSIDE:
            return "polygon outside of the picture"
    return ""


def _tell(path: Path, broken: Sequence[tuple[str, str]], skip: bool) -> None:
    counts = Counter(what for what, _ in broken)
    text = "; ".join(f"{what}: {number} ({_some(where for kind, where in broken if kind == what)})"
                     for what, number in counts.most_common())
    if not skip:
        raise DataError(f"{path}: {len(broken)} broken entries. {text}. Mend the file, or leave them out with --set "
                        "skip_broken=true.")
    warnings.warn(f"{path}: left out {len(broken)} broken entries. {text}.", stacklevel=4)


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", .." if len(names) > most else "")
