"""COCO on files written here, and on the real thing where BITSPIKE_DATA has it; the pipeline against torchvision's own."""
from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.transforms.v2 import functional as vision  # noqa: E402

from bitspike.data import DataError, load  # noqa: E402
from bitspike.data.broken import BrokenAnnotations  # noqa: E402
from bitspike.data.coco import coco, coco_overfit, filled, read_objects, run_lengths  # noqa: E402
from bitspike.recipe import Recipe  # noqa: E402
from bitspike.tasks.detection import Detection  # noqa: E402

from .coco_files import polygon, write  # noqa: E402


def real():
    root = Path(os.environ.get("BITSPIKE_DATA", "data"))
    if not any((root / name / "annotations").is_dir() for name in ("coco", "coco_subset")):
        pytest.skip("no COCO under BITSPIKE_DATA")
    return root


def test_splits(tmp_path):
    data = coco(write(tmp_path))
    assert data.classes == ("car", "dog", "toothbrush")  # in the order of their ids, not of the file
    assert (len(data.train), len(data.val), len(data.test)) == (20, 2, 5)
    names = [p.name for p in (*data.train.paths, *data.val.paths)]
    assert len(set(names)) == 22
    assert names[:3] == sorted(names[:3])
    assert coco(tmp_path).hash == data.hash == load("coco", tmp_path).hash == coco(tmp_path / "coco").hash
    file = next((tmp_path / "coco" / "train2017").iterdir())
    file.write_bytes(file.read_bytes() + b" ")
    assert coco(tmp_path).hash != data.hash


def test_targets(tmp_path):
    data = coco(write(tmp_path))
    crowded = next(i for i, scene in enumerate(data.train.annotations) if any(o.crowd for o in scene.objects))
    scene = data.train.annotations[crowded]
    target = data.train.target(crowded, 40, 56)
    n = len(scene.objects)
    assert tuple(target["boxes"].shape) == (n, 4)
    assert tuple(target["masks"].shape) == (n, 40, 56)
    assert target["iscrowd"].tolist() == [0] * (n - 1) + [1]
    assert target["image_id"] == scene.id
    x, y, w, h = scene.objects[0].box
    assert target["boxes"][0].tolist() == [x, y, x + w, y + h]
    inside = target["masks"][0, int(y) : int(y + h), int(x) : int(x + w)]
    assert inside.float().mean() > 0.98
    assert target["masks"][0].sum() == inside.sum()
    assert target["masks"][-1].sum() == 80  # runs go down the columns
    assert target["masks"][-1, 5:, 0].all()
    assert not target["masks"][-1, :5, 0].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 70000), min_size=1, max_size=9), st.integers(1, 3))
def test_compressed_runs(counts, height):
    """The text that COCO's own code writes for a mask, read by ours."""
    from faster_coco_eval.core import mask

    counts = [*counts, -sum(counts) % height]
    width = sum(counts) // height
    if width:
        plain = {"counts": counts, "size": [height, width]}
        packed = mask.frPyObjects(plain, height, width)
        text = packed["counts"].decode() if isinstance(packed["counts"], bytes) else packed["counts"]
        assert run_lengths(text) == counts
        whole = mask.decode(packed)
        assert torch.equal(filled({**plain, "counts": text}, height, width), torch.from_numpy(whole))


@pytest.mark.parametrize("text", ["\x7f\x7f", "P", "~", "o" * 9, "0O"])
def test_compressed_runs_that_are_none(text):
    with pytest.raises(ValueError, match="run length"):
        run_lengths(text)


def test_two_polygons_are_one_object():
    mask = filled(polygon(2, 2, 4, 4) + polygon(10, 10, 4, 4), 20, 20)
    assert mask.dtype == torch.uint8
    assert mask[3, 3] == mask[12, 12] == 1
    assert mask.sum() == 32


def test_a_picture_without_annotations_is_only_tested(tmp_path):
    def change(part, content):
        first = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]

    data = coco(write(tmp_path, change=change))
    assert len(data.train) + len(data.val) == 21
    assert len(data.test) == 5
    empty = next(i for i, scene in enumerate(data.test.annotations) if not scene.objects)
    assert tuple(data.test.target(empty, 40, 56)["masks"].shape) == (0, 40, 56)


BROKEN = {
    "empty box": {"bbox": [3, 3, 0, 5]}, "box outside of the picture": {"bbox": [50, 3, 20, 5]},
    "polygon outside of the picture": {"segmentation": [[0, 0, 90, 0, 9, 9]]},
    "damaged polygon": {"segmentation": [[1, 2, 3, 4]]},
    "no polygon": {"segmentation": []}, "unknown category": {"category_id": 5}, "unknown picture": {"image_id": 1},
    "mask of another size than the picture": {"segmentation": {"counts": [4], "size": [2, 2]}},
    "damaged mask": {"segmentation": {"counts": [4, 4], "size": [40, 56]}},
    "missing or malformed field": {"bbox": None}, "area that cannot be": {"area": -1},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_annotations_are_counted_and_named(tmp_path, kind):
    def change(part, content):
        if part == "train2017":
            content["annotations"][4].update(BROKEN[kind])

    write(tmp_path, change=change)
    said = rf"train2017.json: 1 of \d+ entries are broken: {kind} \(1\)"
    with pytest.raises(DataError, match=said + ": annotation 5 of .*skip_broken=yes"):
        coco(tmp_path)
    with pytest.warns(BrokenAnnotations, match=said):
        data = load("coco", tmp_path, skip_broken=True)
    ids = [o.id for split in (data.train, data.val) for scene in split.annotations for o in scene.objects]
    assert 5 not in ids
    assert len(data.train) + len(data.val) >= 21


def test_missing_pictures(tmp_path):
    write(tmp_path)
    (tmp_path / "coco" / "val2017" / "000207.png").unlink()
    with pytest.raises(DataError, match=r"missing file \(1\): 000207.png"):
        coco(tmp_path)
    with pytest.warns(BrokenAnnotations, match="missing file"):
        assert len(coco(tmp_path, skip_broken=True).test) == 4


def test_another_picture_of_that_name(tmp_path):
    data = coco(write(tmp_path))
    Image.new("RGB", (8, 8)).save(data.train.paths[0])
    with pytest.raises(DataError, match="is 8 x 8 pixels, its annotations are for 56 x 40"):
        data.train.target(0, *data.train.size(0))


def test_folders_and_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"expected annotations/instances_train2017\.json"):
        coco(tmp_path)
    write(tmp_path)
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").write_text('{"images": [')
    with pytest.raises(DataError, match="cannot be read as COCO annotations"):
        coco(tmp_path)
    with pytest.raises(DataError, match="only 0 pictures have 1 to 4 objects"):
        coco_overfit(write(tmp_path / "b", size=(300, 400)))


def test_the_real_subset():
    root = real()
    data, few = coco(root), coco_overfit(root)
    assert len(data.classes) == 80
    assert len(few.train) == 16
    assert few.train == few.val == few.test
    assert all(1 <= len(scene.objects) <= 4 for scene in few.train.annotations)
    ids = [scene.id for scene in few.train.annotations]
    assert ids == sorted(ids)
    for i in (0, 5):
        target = few.train.target(i, *few.train.size(i))
        areas = target["masks"].sum((1, 2)).float()
        assert torch.allclose(areas, target["area"], rtol=0.05)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["counts", "size", "id"]), inner, max_size=2),
    max_leaves=6)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = write(tmp_path_factory.mktemp("good"), pictures=4)
    return root, json.loads((root / "coco" / "annotations" / "instances_val2017.json").read_text())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, choice=st.data())
def test_hostile_annotations(good, value, choice):
    """Anything at any place: the file is read, or refused with a DataError."""
    root, content = good
    content = copy.deepcopy(content)
    part = choice.draw(st.sampled_from(["images", "annotations", "categories", None]))
    if part is None:
        content[choice.draw(st.sampled_from(["images", "annotations", "categories"]))] = value
    else:
        entry = choice.draw(st.sampled_from(content[part]))
        key = choice.draw(st.sampled_from(sorted(entry)))
        if key == "segmentation" and isinstance(entry[key], list) and choice.draw(st.booleans()):
            entry[key][0] = value
        else:
            entry[key] = value
    (root / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for skip in (False, True):
            try:
                data = coco(root, skip)
                for i in range(len(data.test)):
                    target = data.test.target(i, *data.test.size(i))
                    assert torch.isfinite(target["boxes"]).all()
            except DataError:
                pass


def test_names_stay_in_the_folder(tmp_path):
    def change(part, content):
        content["images"][0]["file_name"] = "../val2017/000107.png"

    write(tmp_path, change=change)
    with pytest.raises(DataError, match=r"name outside of the folder \(1\): \.\./val2017/000107.png"):
        coco(tmp_path)


# ------------------------------------------------------------------------------------- against torchvision
def reference_target(scene, path):
    """What torchvision's references/detection/coco_utils.py does: polygons to masks, boxes clipped, empty ones dropped."""
    from faster_coco_eval.core import mask as coco_mask

    with Image.open(path) as file:
        image = file.convert("RGB")
    w, h = image.size
    objects = [o for o in scene.objects if not o.crowd]
    boxes = torch.as_tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=w)
    boxes[:, 1::2].clamp_(min=0, max=h)
    masks = []
    for o in objects:
        mask = torch.as_tensor(coco_mask.decode(coco_mask.frPyObjects(o.outline, h, w)), dtype=torch.uint8)
        masks.append(mask.any(dim=2))
    masks = torch.stack(masks) if masks else torch.zeros((0, h, w), dtype=torch.uint8)
    labels = torch.tensor([o.label for o in objects], dtype=torch.int64)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    target = {"boxes": boxes[keep], "masks": masks[keep].to(torch.uint8), "labels": labels[keep]}
    return vision.pil_to_tensor(image).float() / 255, target


def reference_flip(image, target):
    """torchvision's references/detection/transforms.py: RandomHorizontalFlip, when it flips."""
    width = image.shape[-1]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


@pytest.mark.parametrize("which", ["written", "real", "real, resized"])
def test_torchvisions_mask_rcnn_loses_the_same_with_its_own_transforms(tmp_path, which):
    """Decoded, scaled and mirrored by torchvision's functions, every pixel, box and mask is that of our pipeline; so are the
    losses. "real": pictures as they are stored, as in torchvision's references, where only the model's own transform resizes.
    """
    from torchvision.models.detection import MaskRCNN, rpn
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    data = load("coco", write(tmp_path) if which == "written" else real())
    side = 480 if which == "real" else min(data.train.size(i)[0] for i in range(4))
    if which == "real":
        alike = [i for i in range(len(data.train)) if min(data.train.size(i)) == side]
        data = replace(data, train=data.train.take(torch.tensor(alike)))
        assert len(alike) >= 6
    body = nn.Sequential(nn.Conv2d(3, 8, 7, 16, padding=3), nn.ReLU())
    body.out_channels = 8
    torch.manual_seed(0)
    model = MaskRCNN(body, len(data.classes) + 1, min_size=96, max_size=160,
                     rpn_anchor_generator=AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),)),
                     box_roi_pool=_pool(7), mask_roi_pool=_pool(14)).train()
    assert isinstance(model.rpn, rpn.RegionProposalNetwork)
    mirrored = resized = 0
    recipe = Recipe("x", nn.Identity, task="detection", data="coco", image_size=side, flip="random", batch_size=2, workers=0)
    task = Detection()
    batches = task.batches(recipe, data)
    by_id = {scene.id: (scene, path) for scene, path in zip(data.train.annotations, data.train.paths, strict=True)}
    for step in range(3):
        for pixels, targets in batches.step(step):
            ours, theirs = [], []
            for canvas, target in zip(pixels, task.to_device(targets, torch.device("cpu")), strict=True):
                h, w = target["size"].tolist()
                scene, path = by_id[target["image_id"]]
                image, wanted = reference_target(scene, path)
                if (h, w) != tuple(image.shape[-2:]):
                    image, wanted = reference_resize(image, wanted, (h, w))
                    resized += 1
                picture = canvas[:, :h, :w].float() / 255
                if not torch.equal(picture, image):
                    image, wanted = reference_flip(image, wanted)
                    mirrored += 1
                assert torch.equal(picture, image)
                keep = target["iscrowd"] == 0
                ours.append((picture, {key: target[key][keep] for key in ("boxes", "labels", "masks")}))
                theirs.append((image, wanted))
                assert torch.equal(ours[-1][1]["masks"], wanted["masks"])
                torch.testing.assert_close(ours[-1][1]["boxes"], wanted["boxes"], rtol=1e-6, atol=1e-4)  # pixels
            losses = []
            for samples in (ours, theirs):
                torch.manual_seed(step)
                losses.append(model(*map(list, zip(*samples, strict=True))))
            for name, value in losses[0].items():
                assert torch.allclose(value, losses[1][name], rtol=1e-5, atol=1e-7), name
    assert 0 < mirrored < 6 and (resized > 0) == (which == "real, resized")


def reference_resize(image, target, size):
    """Boxes by ratio and masks by nearest neighbours, as torchvision's GeneralizedRCNNTransform; the picture by its transform
    of uint8, which is ours, too, and which no decoder, rounding or layout of memory makes differ.
    """
    ratio = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]]).repeat(2)
    masks = nn.functional.interpolate(target["masks"][:, None].float(), size=size)[:, 0].byte()
    picture = vision.resize((image * 255).round().byte(), list(size), antialias=True).float() / 255
    return picture, {**target, "boxes": target["boxes"] * ratio, "masks": masks}


def _pool(side):
    from torchvision.ops import MultiScaleRoIAlign

    return MultiScaleRoIAlign(["0"], side, 2)


def test_augmentation_is_deterministic_and_keeps_boxes_on_objects(tmp_path):
    data = load("coco", write(tmp_path))
    recipe = Recipe("x", nn.Identity, task="detection", data="coco", image_size=64, long_side=96, scales=(0.5, 1.0),
                    flip="random", colour_jitter=0.2, batch_size=4, workers=0)
    task = Detection()
    again = task.batches(recipe, data)
    for step in (0, 1):
        for (a, ta), (b, tb) in zip(task.batches(recipe, data).step(step), again.step(step), strict=True):
            assert torch.equal(a, b)
            assert a.shape[-1] % 32 == a.shape[-2] % 32 == 0
            for one, other in zip(ta, tb, strict=True):
                assert torch.equal(one["boxes"], other["boxes"])
                h, w = one["size"].tolist()
                assert tuple(one["masks"].shape[1:]) == (h, w)
                for box, mask, crowd in zip(one["boxes"], one["masks"], one["iscrowd"], strict=True):
                    if crowd:
                        continue
                    rows, columns = np.nonzero(mask.numpy())
                    edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1.0])
                    assert (box.as_subclass(torch.Tensor) - edges).abs().max() <= 2
                assert all(len(one[key]) == len(one["boxes"]) for key in ("labels", "masks", "area", "iscrowd"))


def test_read_objects_is_what_the_split_reads(tmp_path):
    data = coco(write(tmp_path))
    assert data.train.read is data.test.read is read_objects
    assert len(data.train.joined(data.val)) == 22
