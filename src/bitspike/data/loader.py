"""Batches that are decoded, cropped or RandAugmented one image at a time, by worker processes."""
from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitspike.data.pipeline import Augment, augmented, generator, mirrored, order, seed_globals, seed_of, slices
from bitspike.data.recordings import Recordings
from bitspike.data.splits import Arrays, Split


def _at_least_one_bit(level_fn: Callable[[float, Any], tuple[int]], level: float, options: Any) -> tuple[int]:
    return (max(1, level_fn(level, options)[0]),)


class _Train(Dataset[tuple[Tensor, "int | Tensor"]]):
    """Sample (epoch, index) -> (augmented image, label): a pure function of seed, epoch and index.

    Where recordings are mixed, the label is shares of the classes, float [K].
    """

    def __init__(self, split: Split, seed: int, size: int, crop: str, rand_augment: str,
                 mean: tuple[float, ...], classes: int) -> None:
        from timm.data.auto_augment import rand_augment_transform
        from torchvision.transforms import v2

        self.split, self.seed, self.classes = split, seed, classes
        bicubic = v2.InterpolationMode.BICUBIC
        self.fit = (v2.RandomResizedCrop(size, interpolation=bicubic, antialias=True) if crop == "random_resized"
                    else v2.Resize((size, size), bicubic, antialias=True))
        self.augment = None
        if rand_augment:
            options = {"img_mean": tuple(round(255 * m) for m in mean), "translate_const": int(size * 0.45)}
            self.augment = rand_augment_transform(rand_augment, options)
            for op in self.augment.ops:  # at full strength timm posterizes to 0 bits, which Pillow refuses since version 12
                if op.name.startswith("Posterize"):
                    op.level_fn = partial(_at_least_one_bit, op.level_fn)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int | Tensor]:  # type: ignore[override]
        from torchvision.transforms.v2 import functional as vision

        epoch, index = key
        seed = seed_of(self.seed, "sample", epoch, index)
        seed_globals(seed)
        if isinstance(self.split, Recordings):  # changed as events, before the frames are made
            frames, shares = self.split.augmented(index, seed)
            if not self.split.frames.mixes:
                return frames, shares[0][0]
            target = torch.zeros(self.classes)
            for label, share in shares:
                target[label] += share
            return frames, target
        image = self.fit(self.split.image(index))
        if self.augment is not None:
            grey = image.shape[0] == 1
            image = vision.pil_to_tensor(self.augment(vision.to_pil_image(image.expand(3, -1, -1) if grey else image)))
            image = image[:1] if grey else image
        return image, int(self.split.labels[index])


class Keys:
    """The epoch's batches of (epoch, index) keys for one process, from a step on: what the DataLoader walks through."""

    def __init__(self, order: Tensor, epoch: int, batches: list[slice]) -> None:
        self.order, self.epoch, self.batches = order, epoch, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self.batches:
            yield [(self.epoch, i) for i in self.order[part].tolist()]


def obey_the_main_process(worker: int) -> None:
    """Ctrl-C reaches the workers too, but it is the training loop that decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class FileBatches:
    """`Batches` for images on disk or with RandAugment; they do not depend on the number of workers.

    size: side of the square the model sees. crop: "random_resized" (8..100 % of the area) or "whole" (resized).
    rand_augment: timm's text, such as "rand-m9-mstd0.5-inc1", or "". classes: K, for recordings that are mixed.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, augment: Augment, size: int, crop: str,
                 rand_augment: str, workers: int, classes: int = 0) -> None:
        self.split, self.batch_size, self.seed, self.augment, self.workers = split, batch_size, seed, augment, workers
        self.steps_per_epoch = len(split) // batch_size
        self._data = _Train(split, seed, size, crop, rand_augment, augment.mean, classes)
        self._next: tuple[int, int, int, int] | None = None  # what the open loader will give next

    def _open(self, step: int, rank: int, world: int, accumulate: int) -> None:
        """A loader from this step to the end of its epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        self._order = order(len(self.split), self.seed, epoch)
        self._mirrored = mirrored(len(self.split), self.seed, epoch, self.augment.flip)
        parts = [slice(p * self.batch_size + s.start, p * self.batch_size + s.stop)
                 for p in range(position, self.steps_per_epoch) for s in slices(self.batch_size, rank, world, accumulate)]
        self._loader = iter(DataLoader(
            self._data, batch_sampler=Keys(self._order, epoch, parts),  # type: ignore[arg-type]
            num_workers=self.workers, generator=generator(self.seed, "workers", epoch),
            worker_init_fn=obey_the_main_process, pin_memory=torch.cuda.is_available()))

    def step(self, step: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.step`."""
        if self._next != (step, rank, world, accumulate) or step % self.steps_per_epoch == 0:
            self._open(step, rank, world, accumulate)
        start = step % self.steps_per_epoch * self.batch_size
        for mine in slices(self.batch_size, rank, world, accumulate):
            images, labels = next(self._loader)
            mirror = self._mirrored[self._order[start + mine.start : start + mine.stop]]
            yield augmented(images, mirror, self.augment, self.batch_size, mine, self.seed, step), labels
        self._next = (step + 1, rank, world, accumulate)


class _Plain(Dataset[tuple[Tensor, int]]):
    """Resize the short side to size / 0.875 and cut the middle (already fitting images pass unchanged)."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional as vision

        image = self.split.image(index)
        if image.dim() == 3 and tuple(image.shape[-2:]) != (self.size, self.size):
            whole = isinstance(self.split, Arrays)  # small square images: no border to cut
            side = self.size if whole else round(self.size / 0.875)
            image = vision.resize(image, [side], v2.InterpolationMode.BICUBIC, antialias=True)
            image = vision.center_crop(image, [self.size, self.size])
        return image, int(self.split.labels[index])


def evaluation_batches(split: Split, size: int, batch_size: int, workers: int, rank: int = 0,
                       world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 [b, C, size, size] or [b, T, 2, size, size], int64 [b]) over samples rank, rank + world, ... in order."""
    index = torch.arange(rank, len(split), world)
    if isinstance(split, Arrays) and split.images.shape[-1] == size:
        for part in index.split(batch_size):
            yield split.images[part], split.labels[part]
        return
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        _Plain(split, size), batch_sampler=[p.tolist() for p in index.split(min(batch_size, 64))],
        num_workers=workers, generator=generator("evaluation"),
        worker_init_fn=obey_the_main_process)
    yield from loader
