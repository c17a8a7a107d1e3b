"""Batches of scenes: pure functions of seed and step, targets that stay with their pixels."""
from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from torchvision import tv_tensors  # noqa: E402

from bitspike.data import DataError, load  # noqa: E402
from bitspike.data.scene_loader import (  # noqa: E402
    SceneAugment,
    SceneBatches,
    evaluation_scenes,
    fitted,
    resized_like_pillow,
    stacked,
    without_empty,
)
from bitspike.data.scenes import VOID, Scenes  # noqa: E402
from bitspike.recipe import Recipe  # noqa: E402
from bitspike.tasks.dense import letterboxed, usual_canvas  # noqa: E402

from . import scene_files as files  # noqa: E402

AUGMENT = SceneAugment(40, 0, (0.6, 1.4), flip=True, colour=0.3, fill=(7, 8, 9))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return load("camvid", files.camvid(tmp_path_factory.mktemp("scenes"), {"train": 13, "val": 2})).split("train+val")


def batches(split, augment=AUGMENT, workers=0, batch=4):
    return SceneBatches(split, batch, 3, augment, workers)


def same(a, b):
    assert torch.equal(a[0], b[0]) and len(a[1]) == len(b[1])
    for one, two in zip(a[1], b[1], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(two[key])) for key in one)


@pytest.mark.parametrize("augment", [AUGMENT, replace(AUGMENT, crop=True)])
def test_a_step_is_a_pure_function(split, augment):
    one, other = batches(split, augment), batches(split, augment)
    steps = [list(one.step(s)) for s in range(5)]
    assert one.steps_per_epoch == 3
    for s in (4, 1, 2):  # another order, from the middle
        same(list(other.step(s))[0], steps[s][0])
    assert not torch.equal(steps[0][0][0], steps[3][0][0])


def test_neither_ranks_nor_parts_nor_workers_matter(split):
    whole = list(batches(split).step(1))[0]
    parts = [part for rank in (0, 1) for part in batches(split, workers=1).step(1, rank, 2, 2)]
    assert [len(p[1]) for p in parts] == [1, 1, 1, 1]
    same(whole, (torch.cat([p[0] for p in parts]), [t for p in parts for t in p[1]]))


def test_targets_stay_with_their_pixels(split):
    for augment in (replace(AUGMENT, colour=0.0), replace(AUGMENT, colour=0.0, crop=True)):
        for s in range(3):
            pictures, targets = list(batches(split, augment).step(s))[0]
            for picture, target in zip(pictures, targets, strict=True):
                h, w = target["size"].tolist()
                labels, red = target["semantic"][:h, :w].long(), picture[0, :h, :w].long()
                known = labels != VOID
                assert ((red - 20 * labels).abs() <= 2)[known].float().mean() > 0.85  # all but the blurred edges
                assert (target["semantic"][h:] == VOID).all() and (target["semantic"][:, w:] == VOID).all()
                assert (picture[:, h:].permute(1, 2, 0) == torch.tensor([7, 8, 9])).all()
                assert target["canvas"].tolist() == list(picture.shape[-2:])


def test_both_ways_and_all_sizes_occur(split):
    seen = [(target["size"].tolist(), target["semantic"]) for s in range(12)
            for target in list(batches(split, replace(AUGMENT, colour=0.0)).step(s))[0][1]]
    shorts = [min(size) for size, _ in seen]
    assert min(shorts) < 30 and max(shorts) > 50
    assert all(abs(max(size) / min(size) - 1.4) < 0.05 for size, _ in seen)


def test_a_crop_is_square_and_varied(split):
    pictures, targets = list(batches(split, replace(AUGMENT, crop=True, scales=(1.0,))).step(0))[0]
    assert pictures.shape[-2:] == (64, 64) and all(t["size"].tolist() == [40, 40] for t in targets)


def test_evaluation_takes_pictures_as_they_are(split):
    whole = [list(evaluation_scenes(split, replace(AUGMENT, scales=(1.0,)), 4, 0, rank, 2)) for rank in (0, 1)]
    counts = [sum(len(t) for _, t in part) for part in whole]
    assert counts == [7, 6]
    pictures, targets = whole[0][0]
    assert targets[0]["original_size"].tolist() == [40, 56] == targets[0]["size"].tolist()
    assert torch.equal(pictures[0][:, :40, :56], split.image(0)) and targets[0]["semantic"].shape == (40, 56)


def test_a_map_that_is_gone_is_an_error_of_its_own(tmp_path):
    split = load("camvid", files.camvid(tmp_path, {"train": 4, "val": 2})).split("train+val")
    (tmp_path / "camvid" / "trainannot" / "002.png").unlink()
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"002\.png: missing annotation; mend or remove it"):
            list(batches(split, workers=workers).step(0))


def test_long_side():
    assert fitted(480, 640, 800, 1333) == (800, 1067)
    assert fitted(400, 1200, 800, 1333) == (444, 1333)


def _boxes(boxes, size=(20, 30)):
    return tv_tensors.BoundingBoxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=size)


def _objects(annotation, height, width):
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, :, :3], masks[1, 5:9, 8:20] = 1, 1
    return {"boxes": _boxes([[0, 0, 3, height], [8, 5, 20, 9]], (height, width)), "labels": torch.tensor([4, 6]),
            "masks": tv_tensors.Mask(masks), "image_id": annotation}


def test_boxes_and_masks_move_together(tmp_path):
    from PIL import Image

    paths = []
    for i in range(4):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(files.scene(i, (20, 30))[0]).save(paths[-1])
    split = Scenes(tuple(paths), tuple(range(4)), _objects)
    for augment in (SceneAugment(40, flip=True), SceneAugment(16, flip=True, crop=True)):
        seen = [t for s in range(6) for t in list(SceneBatches(split, 4, 0, augment, 0).step(s))[0][1]]
        assert len({tuple(t["boxes"].flatten().tolist()) for t in seen}) > 1
        for t in seen:
            assert len(t["boxes"]) == len(t["labels"]) == len(t["masks"])
            for box, mask in zip(t["boxes"], t["masks"], strict=True):
                y, x = torch.nonzero(mask, as_tuple=True)
                edges = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
                assert (box - edges).abs().max() <= 1


def test_objects_cut_away_are_dropped():
    target = {"boxes": _boxes([[3, 3, 3.5, 9], [1, 1, 8, 8]]), "labels": torch.tensor([1, 2]), "image_id": 5,
              "masks": tv_tensors.Mask(torch.zeros(2, 20, 30, dtype=torch.uint8)), "size": torch.tensor([20, 30])}
    left = without_empty(target)
    assert left["labels"].tolist() == [2] and len(left["masks"]) == len(left["boxes"]) == 1
    assert left["image_id"] == 5 and left["size"].tolist() == [20, 30]
    assert isinstance(left["boxes"], tv_tensors.BoundingBoxes)


def test_letterbox(split):
    recipe = Recipe("x", torch.nn.Identity, task="segmentation", image_size=40, mean=(0.5,), std=(1.0,))
    canvas = usual_canvas(recipe, split)
    assert canvas == (64, 64)
    picture, size = letterboxed(split.image(0), (64, 96), (1, 2, 3))
    assert size == (64, 90) and (picture[:, :, 90:].permute(1, 2, 0) == torch.tensor([1, 2, 3])).all()
    assert torch.equal(picture[:, :, :90], resized_like_pillow(split.image(0), size))
    assert stacked([(picture, {})], (64, 96), (0, 0, 0))[0].shape == (1, 3, 64, 96)
