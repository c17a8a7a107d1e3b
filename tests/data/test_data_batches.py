"""Training batches: functions of the step alone, the same for any number of processes and workers."""
import pytest
import torch

from bitspike.data import Arrays, load
from bitspike.data.loader import FileBatches, evaluation_batches
from bitspike.data.pipeline import ArrayBatches, Augment, generator, mirrored, mix, shift

FULL = Augment("alternating", 2, "reflect", 4, 0.5, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.fixture
def arrays():
    images = torch.randint(256, (50, 3, 12, 12), dtype=torch.uint8, generator=generator("test"))
    return Arrays(images, torch.arange(50) % 7)


@pytest.mark.parametrize("augment", [Augment(), FULL, Augment("random", 3, "zero")])
@pytest.mark.parametrize("world, accumulate", [(1, 4), (2, 1), (4, 2)])
def test_parts_make_up_the_batch(arrays, augment, world, accumulate):
    ((images, labels),) = ArrayBatches(arrays, 16, 3, augment).step(4)
    parts = [part for rank in range(world) for part in ArrayBatches(arrays, 16, 3, augment).step(4, rank, world, accumulate)]
    assert len(parts) == world * accumulate
    assert torch.equal(torch.cat([x for x, _ in parts]), images) and torch.equal(torch.cat([y for _, y in parts]), labels)


def test_an_epoch_shows_each_image_once(arrays):
    before = arrays.images.clone()
    batches = ArrayBatches(arrays, 10, 0, Augment())
    seen = torch.cat([x for s in range(5, 10) for x, _ in batches.step(s)])
    assert batches.steps_per_epoch == 5 and len(torch.unique(seen.flatten(1), dim=0)) == 50
    list(ArrayBatches(arrays, 10, 0, FULL).step(0))
    assert torch.equal(arrays.images, before), "augmentation must not write into the dataset"


def test_erasing_grey_images_with_three_means():
    grey = Arrays(torch.zeros(8, 1, 12, 12, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    ((images, _),) = ArrayBatches(grey, 8, 3, Augment(erasing=1.0, mean=(0.5, 0.1, 0.1), std=(0.01,) * 3)).step(0)
    assert images.shape == (8, 1, 12, 12) and 115 < int(images[images > 0].median()) < 140


def test_alternating_flip_shows_both_sides():
    first, second = (mirrored(1000, 0, epoch, "alternating") for epoch in (0, 1))
    assert torch.equal(first, ~second) and 400 < int(first.sum()) < 600
    assert torch.equal(first, mirrored(1000, 0, 2, "alternating"))
    assert not torch.equal(mirrored(1000, 0, 0, "random"), mirrored(1000, 0, 2, "random"))


@pytest.mark.parametrize("pad, mode", [("reflect", "reflect"), ("zero", "constant")])
def test_shift_is_a_crop_of_the_padded_image(arrays, pad, mode):
    shifted = shift(arrays.images, 2, pad, 50, slice(0, 50), generator(0))
    padded = torch.nn.functional.pad(arrays.images.float(), (2, 2, 2, 2), mode=mode).byte()
    crops = [(y, x) for y in range(5) for x in range(5)]
    used = set()
    for image, whole in zip(shifted, padded, strict=True):
        hits = [(y, x) for y, x in crops if torch.equal(whole[:, y : y + 12, x : x + 12], image)]
        assert hits
        used.add(hits[0])
    assert len(used) > 12


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix_keeps_label_mass_and_pairs(mixup, cutmix):
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 10, 10).contiguous()
    for key in range(6):
        x, y = mix(images, torch.arange(8), 8, mixup, cutmix, (key,))
        assert torch.allclose(y.sum(1), torch.ones(8))
        # a pixel's mean value is the label's expectation: pixels and targets are mixed in the same ratio
        assert torch.allclose(x.mean((1, 2, 3)), (y * torch.arange(8.0)).sum(1), atol=1e-5)
        half, labels = mix(images[4:], torch.arange(4, 8), 8, mixup, cutmix, (key,))
        assert torch.equal(half, x[4:]) and torch.equal(labels, y[4:])


@pytest.mark.parametrize("crop, rand_augment", [("random_resized", "rand-m9-mstd0.5-inc1"), ("whole", "")])
def test_files_do_not_depend_on_workers_or_start(tmp_path, write_imagenet, crop, rand_augment):
    split = load("imagenet", write_imagenet(tmp_path)).train
    make = lambda workers: FileBatches(split, 4, 1, FULL, 16, crop, rand_augment, workers)  # noqa: E731
    plain, spread = make(0), make(2)
    for step in range(5):  # two steps an epoch
        ((x, y),) = plain.step(step)
        ((x2, y2),) = spread.step(step)
        assert x.shape == (4, 3, 16, 16) and x.dtype == torch.uint8
        assert torch.equal(x, x2) and torch.equal(y, y2)
        ((x3, _),) = make(0).step(step)
        halves = torch.cat([h for rank in (0, 1) for h, _ in make(0).step(step, rank, 2)])
        assert torch.equal(x, x3) and torch.equal(x, halves)


def test_grey_images_take_rand_augment():
    data = load("fashion_mnist_sample", None)
    batches = FileBatches(data.val, 4, 0, Augment(mean=(0.5,)), 28, "whole", "rand-m9-mstd0.5-inc1", 0)
    ((x, _),) = batches.step(0)
    assert x.shape == (4, 1, 28, 28)


def test_evaluation_covers_everything_once(arrays, tmp_path, write_imagenet):
    for size in (12, 16):
        parts = [list(evaluation_batches(arrays, size, 8, 0, rank, 3)) for rank in range(3)]
        assert sorted(torch.cat([y for p in parts for _, y in p]).tolist()) == sorted(arrays.labels.tolist())
        assert parts[0][0][0].shape[1:] == (3, size, size)
    test = load("imagenet", write_imagenet(tmp_path)).test
    assert sum(len(y) for _, y in evaluation_batches(test, 16, 3, 0)) == 4
