"""COCO's mean average precision of boxes and masks, by faster-coco-eval, over all processes."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed
from torch import Tensor

from bitspike.data.errors import DataError

_AREAS = ("small", "medium", "large")


class AveragePrecision:
    """A `Meter` of detections against COCO's annotations.

    `add(detections, targets)`: per picture boxes [N, 4] (x1, y1, x2, y2), labels, scores and perhaps masks [N, H, W], in pixels
    of the stored picture; targets as `data.coco.read_objects` gives them, with crowds.
    `compute()`: box_map (mean over the overlaps 0.5 .. 0.95, in percent), box_map50, box_map75, box_map_small, _medium, _large,
    the same as mask_* where there are masks, and n, the pictures. An area without objects has no number. Every process keeps
    its own pictures and all see all when it is computed, sorted by picture: the result does not depend on their number.
    Errors of `compute`: DataError for a picture that came twice.
    Source: Lin et al. 2014; equal to pycocotools' figures.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._seen: dict[int, dict[str, Any]] = {}
        self._twice: list[int] = []

    def add(self, output: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Take in one batch."""
        for found, target in zip(output, targets, strict=True):
            picture = int(target["image_id"])
            if picture in self._seen:
                self._twice.append(picture)
            self._seen[picture] = {
                "found": _plain(found, ("boxes", "labels", "scores")),
                "true": _plain(target, ("boxes", "labels", "area", "iscrowd")),
                "found_masks": _runs(found["masks"]) if "masks" in found else None,
                "true_masks": _runs(target["masks"]) if "masks" in target else None,
                "size": tuple(int(v) for v in target.get("original_size", target["masks"].shape[-2:])),
            }

    def compute(self) -> dict[str, float]:
        """See the class."""
        seen, twice = dict(self._seen), list(self._twice)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, (self._seen, self._twice))
            seen = {}
            for part, again in parts:
                twice += [*again, *(seen.keys() & part.keys())]
                seen |= part
        if twice:
            raise DataError(f"picture {twice[0]} was evaluated twice; every picture of a split must come once.")
        ordered = sorted(seen.items())
        result: dict[str, float] = {"n": len(ordered)}
        if ordered:
            result |= _figures(ordered, self.classes, "box")
            if all(one["found_masks"] is not None and one["true_masks"] is not None for _, one in ordered):
                result |= _figures(ordered, self.classes, "mask")
        return result


def _plain(table: Mapping[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: table[name].detach().cpu().numpy().astype(np.float64) for name in names if name in table}


def _runs(masks: Tensor) -> list[dict[str, Any]]:
    """uint8 or bool [N, H, W] -> COCO's compressed run-length codes."""
    from faster_coco_eval.core import mask

    array = np.asfortranarray(masks.detach().cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
    return list(mask.encode(array)) if array.shape[2] else []


def ground_truth(pictures: Sequence[tuple[int, dict[str, Any]]], classes: int, kind: str) -> dict[str, Any]:
    """What was annotated, in COCO's own format."""
    annotations: list[dict[str, Any]] = []
    for picture, one in pictures:
        true = one["true"]
        for i, (box, label) in enumerate(zip(_xywh(true["boxes"]), true["labels"], strict=True)):
            annotation = {"id": len(annotations) + 1, "image_id": picture, "category_id": int(label), "bbox": box,
                          "area": float(true["area"][i]), "iscrowd": int(true["iscrowd"][i])}
            if kind == "mask":
                annotation["segmentation"] = one["true_masks"][i]
            annotations.append(annotation)
    return {"images": [{"id": picture, "height": one["size"][0], "width": one["size"][1]} for picture, one in pictures],
            "categories": [{"id": i, "name": str(i)} for i in range(1, classes + 1)], "annotations": annotations}


def results(pictures: Sequence[tuple[int, dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    """What was found, in COCO's format of results for boxes or masks."""
    rows = []
    for picture, one in pictures:
        found = one["found"]
        for i, (box, label, score) in enumerate(zip(_xywh(found["boxes"]), found["labels"], found["scores"], strict=True)):
            place = {"bbox": box} if kind == "box" else {"segmentation": one["found_masks"][i]}
            rows.append({"image_id": picture, "category_id": int(label), "score": float(score), **place})
    return rows


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist() if len(boxes) else []


def _figures(pictures: Sequence[tuple[int, dict[str, Any]]], classes: int, kind: str) -> dict[str, float]:
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(text: object) -> None:
        return None

    truth = COCO(ground_truth(pictures, classes, kind), print_function=silent)
    found = truth.loadRes(results(pictures, kind))
    judge = COCOeval_faster(truth, found, {"box": "bbox", "mask": "segm"}[kind], print_function=silent)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    figures = dict(zip(("", "50", "75", *(f"_{area}" for area in _AREAS)), judge.stats[:6], strict=True))
    return {f"{kind}_map{name}": 100 * float(value) for name, value in figures.items() if value >= 0}
