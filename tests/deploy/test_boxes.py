"""Boxes, regions, masks and enlarged maps: what torchvision and torch compute, on random input."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import boxes as b
from bitspike.deploy import regions, resample

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

import torch.nn.functional as F  # noqa: E402
from torchvision import ops  # noqa: E402
from torchvision.models.detection._utils import BoxCoder  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.roi_heads import paste_masks_in_image  # noqa: E402
from torchvision.ops.poolers import initLevelMapper  # noqa: E402

seeds = st.integers(0, 2**32 - 1)


def some_boxes(rng: np.random.Generator, count: int, size: float = 100) -> np.ndarray:
    """Of all sides, some without area, some the same."""
    corner, side = rng.uniform(-5, size, (count, 2)), rng.exponential(size / 4, (count, 2)) * (rng.random((count, 2)) > 0.05)
    found = np.concatenate([corner, corner + side], 1).astype(np.float32)
    found[rng.random(count) < 0.1] = found[:1]
    return found


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


@given(seeds, st.sampled_from([0, 1, 7, 200]), st.sampled_from([1, 3]), st.sampled_from([0.3, 0.5, 0.7]))
@settings(max_examples=30, deadline=None)
def test_suppression(seed, count, groups, overlap):
    rng = np.random.default_rng(seed)
    boxes, scores = some_boxes(rng, max(count, 1))[:count], rng.random(count).astype(np.float32)
    group = rng.integers(0, groups, count)
    found = b.suppress(boxes, scores, group, overlap, 1000)
    kept = [] if count == 0 else torch.cat([  # one class at a time, as torchvision defines it
        torch.nonzero(tensor(group) == g)[:, 0][ops.nms(tensor(boxes)[group == g], tensor(scores)[group == g], overlap)]
        for g in range(groups)]).tolist()
    assert sorted(found.tolist()) == sorted(kept)
    assert (np.diff(scores[found]) <= 0).all()
    np.testing.assert_array_equal(b.suppress(boxes, scores, group, overlap, 3), found[:3])


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_batched_suppression_gives_torchvisions_indices(seed):
    rng = np.random.default_rng(seed)
    boxes = rng.integers(0, 50, (60, 4)).astype(np.float32)  # whole numbers: torchvision's shifted coordinates are exact
    boxes[:, 2:] += boxes[:, :2] + 1
    scores, group = rng.permutation(60).astype(np.float32), rng.integers(0, 4, 60)
    expected = ops.batched_nms(tensor(boxes), tensor(scores), tensor(group), 0.5)
    assert b.suppress(boxes, scores, group, 0.5, 100).tolist() == expected.tolist()


@given(seeds, st.sampled_from([(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]))
@settings(max_examples=20, deadline=None)
def test_decoding_and_clipping(seed, coder):
    rng = np.random.default_rng(seed)
    boxes, deltas = some_boxes(rng, 40), rng.normal(0, 3, (40, 4)).astype(np.float32)
    expected = BoxCoder(coder).decode_single(tensor(deltas), tensor(boxes))
    np.testing.assert_allclose(b.decode(deltas, boxes, coder), expected, rtol=1e-5, atol=1e-4)
    clipped = ops.clip_boxes_to_image(expected, (50, 70))
    np.testing.assert_allclose(b.clip(b.decode(deltas, boxes, coder), 50, 70), clipped, rtol=1e-5, atol=1e-4)
    large = ops.remove_small_boxes(clipped, 0.01)
    assert b.large(clipped.numpy(), 0.01).tolist() == large.tolist()


def test_anchors():
    generator = AnchorGenerator(((32.0,), (64.0, 81.0)), ((0.5, 1.0, 2.0),) * 2)
    maps = [torch.zeros(1, 1, 6, 8), torch.zeros(1, 1, 3, 4)]
    expected = generator(ImageList(torch.zeros(1, 3, 48, 64), [(48, 64)]), maps)[0]
    found = [b.grid(cell.numpy(), *m.shape[-2:], stride) for cell, m, stride in zip(generator.cell_anchors, maps, (8, 16),
                                                                                  strict=True)]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert all((cell == cell.round()).all() for cell in generator.cell_anchors)  # which is why a file holds whole numbers


@given(seeds, st.sampled_from([1, 5, 100]))
@settings(max_examples=20, deadline=None)
def test_the_best_come_first_and_equal_ones_in_order(seed, count):
    scores = np.random.default_rng(seed).integers(0, 9, 40).astype(np.float32)
    assert b.best(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


@given(seeds, st.sampled_from([1, 2, 3]), st.sampled_from([2, 7, 14]))
@settings(max_examples=30, deadline=None)
def test_regions(seed, sampling, side):
    rng = np.random.default_rng(seed)
    strides, shapes = [8, 16], [(13, 16), (7, 8)]
    maps = [rng.normal(0, 1, (*shape, 5)) for shape in shapes]
    boxes = some_boxes(rng, 12, 130)
    levels = regions.level_of(boxes, strides, 56)
    mapper = initLevelMapper(3, 4, 56, 4)
    assert levels.tolist() == mapper([tensor(boxes)]).tolist()
    found = regions.roi_align(maps, boxes, levels, strides, side, sampling)
    rough = regions.roi_align(maps, boxes, levels, strides, side, sampling, regions.PLACE_BITS)
    for i, level in enumerate(levels):
        expected = ops.roi_align(tensor(np.moveaxis(maps[level], 2, 0))[None], [tensor(boxes[i : i + 1]).double()], side,
                                 1 / strides[level], sampling)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found[i], expected, atol=1e-4)
        np.testing.assert_allclose(rough[i], expected, atol=1e-3)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_codes_are_what_the_first_neuron_counts(seed):
    from bitspike.neurons import IELIF

    x = np.random.default_rng(seed).normal(0.5, 1, (3, 2, 2, 4))
    potentials = np.rint(x * 2**22)
    codes = regions.codes_of(potentials, 2, 22, 4)  # gain 2
    expected = IELIF(4, gain=2.0)(tensor(potentials / 2**22)[None])[0] * 2
    if not (np.abs(2 * x % 1 - 0.5) < 1e-5).any():
        np.testing.assert_array_equal(codes, np.rint(expected.numpy()))


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_masks_in_pictures(seed):
    rng = np.random.default_rng(seed)
    boxes = b.clip(some_boxes(rng, 6, 40), 50, 70)  # torchvision pastes no box that lies outside
    masks = rng.random((6, 28, 28)).astype(np.float32)
    expected = paste_masks_in_image(tensor(masks)[:, None], tensor(boxes), (50, 70))[:, 0].numpy()
    for i in range(6):
        found = regions.paste(masks[i], boxes[i], 50, 70)
        assert (found == (expected[i] > 0.5))[np.abs(expected[i] - 0.5) > 1e-5].all()


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_bilinear(seed, height, width, new_height, new_width):
    x = np.random.default_rng(seed).normal(0, 1, (height, width, 3)).astype(np.float32)
    expected = F.interpolate(tensor(np.moveaxis(x, 2, 0))[None], size=(new_height, new_width), mode="bilinear",
                             align_corners=False)[0].permute(1, 2, 0)
    np.testing.assert_allclose(resample.bilinear(x, new_height, new_width), expected, atol=1e-5)


def test_labels_of_a_padded_picture():
    logits = np.random.default_rng(0).normal(0, 1, (8, 10, 4)).astype(np.float32)
    whole = F.interpolate(tensor(np.moveaxis(logits, 2, 0))[None], size=(32, 40), mode="bilinear", align_corners=False)
    expected = F.interpolate(whole[..., :30, :37], size=(61, 75), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    found = resample.labels(logits, (32, 40), (30, 37), (61, 75))
    assert found.dtype == np.uint8 and found.shape == (61, 75)
    assert (found == expected).mean() > 0.999
    assert resample.labels(np.zeros((2, 2, 300), np.float32), (2, 2), (2, 2), (2, 2)).dtype == np.uint16


def test_probabilities():
    x = np.random.default_rng(0).normal(0, 20, (5, 7)).astype(np.float32)
    np.testing.assert_allclose(b.sigmoid(x), tensor(x).sigmoid(), atol=1e-7)
    np.testing.assert_allclose(b.softmax(x), tensor(x).softmax(-1), atol=1e-6)
