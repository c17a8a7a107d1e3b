"""COCO's mean average precision: pycocotools' figures, and the same from any number of processes."""
from __future__ import annotations

import contextlib
import io

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("faster_coco_eval")

from bitspike.data.errors import DataError  # noqa: E402
from bitspike.tasks.average_precision import AveragePrecision, ground_truth, results  # noqa: E402

CLASSES = 4


def rectangles(boxes, height, width):
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[max(y1, 0) : y2, max(x1, 0) : x2] = 1
    return masks


def picture(number):
    """One picture with up to 6 objects, some of them crowds, and detections near them, some wrong; sometimes none of either."""
    draw = torch.Generator().manual_seed(number)

    def rand(*shape):
        return torch.rand(*shape, generator=draw)

    H, W = 120 + number % 3 * 40, 160
    n = number % 7
    corner = rand(n, 2) * 80
    boxes = torch.cat([corner, corner + 4 + rand(n, 2) ** 2 * 90], 1)
    boxes[:, 0::2].clamp_(0, W)
    boxes[:, 1::2].clamp_(0, H)
    labels = torch.randint(1, CLASSES + 1, (n,), generator=draw)
    masks = rectangles(boxes, H, W)
    target = {"boxes": boxes, "labels": labels, "masks": masks, "area": masks.sum((1, 2)).float(), "image_id": number,
              "iscrowd": (rand(n) < 0.2).long(), "original_size": torch.tensor([H, W])}
    k = torch.randint(0, max(n, 1), (9 if n and number % 5 else 0,), generator=draw)
    near = boxes[k] + torch.randn(len(k), 4, generator=draw) * 3
    near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 2)
    shown = {"boxes": near, "labels": torch.where(rand(len(k)) < 0.8, labels[k], 1 + labels[k] % CLASSES),
             "scores": (rand(len(k)) * 20).round() / 20, "masks": rectangles(near, H, W)}
    return shown, target


def meter(numbers):
    judge = AveragePrecision(CLASSES)
    for number in numbers:
        found, target = picture(number)
        judge.add([found], [target])
    return judge


def test_it_is_pycocotools():
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    judge = meter(range(60))
    ours = judge.compute()
    assert ours["n"] == 60
    pictures = sorted(judge._seen.items())
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = ground_truth(pictures, CLASSES, kind)
            truth.createIndex()
            theirs = COCOeval(truth, truth.loadRes(results(pictures, kind)), name)
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
        for figure, value in zip(("", "50", "75", "_small", "_medium", "_large"), theirs.stats[:6], strict=True):
            if value < 0:
                assert f"{kind}_map{figure}" not in ours
            else:
                assert abs(ours[f"{kind}_map{figure}"] / 100 - value) < 1e-6
        assert 5 < ours[f"{kind}_map"] < 95


def test_the_truth_itself_is_perfect():
    judge = AveragePrecision(CLASSES)
    for number in range(12):
        target = picture(number)[1]
        keep = target["iscrowd"] == 0
        judge.add([{**{key: target[key][keep] for key in ("boxes", "labels", "masks")}, "scores": torch.ones(int(keep.sum()))}],
                  [target])
    found = judge.compute()
    assert found["box_map"] == found["mask_map"] == pytest.approx(100, abs=0.01)


def test_order_does_not_matter():
    assert meter(range(20)).compute() == meter(reversed(range(20))).compute()


def test_boxes_alone():
    judge = AveragePrecision(CLASSES)
    found, target = picture(4)
    del found["masks"]
    judge.add([found], [target])
    assert {name.split("_")[0] for name in judge.compute()} == {"n", "box"}


def test_nothing_found_and_nothing_seen():
    judge = AveragePrecision(CLASSES)
    assert judge.compute() == {"n": 0}
    found, target = picture(4)
    judge.add([{name: value[:0] for name, value in found.items()}], [target])
    assert judge.compute()["box_map"] == judge.compute()["mask_map"] == 0


def test_a_picture_may_come_once():
    with pytest.raises(DataError, match="picture 3 was evaluated twice"):
        meter([1, 3, 3]).compute()


def test_processes_put_their_pictures_together(monkeypatch):
    """Real processes train in test_detection_training."""
    parts = [meter(range(rank, 25, 3)) for rank in range(3)]

    def gather(into, mine):
        into[:] = [(part._seen, part._twice) for part in parts]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    together = [part.compute() for part in parts]
    parts[1] = meter([1, 2])  # 2 is another's
    with pytest.raises(DataError, match="picture 2 was evaluated twice"):
        parts[0].compute()
    monkeypatch.undo()
    assert together == [meter(range(25)).compute()] * 3
