"""Batches that are decoded, cropped or RandAugmented one image at a time, by worker processes."""
from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitspike.data.pipeline import Augment, cut_out, erase, generator, mirrored, order, seed_of, shift
from bitspike.data.splits import Arrays, Files


class _Train(Dataset[tuple[Tensor, int]]):
    """Sample (epoch, index) -> augmented image: a pure function of seed, epoch and index."""

    def __init__(self, split: Arrays | Files, seed: int, size: int, crop: str, rand_augment: str, mean: tuple[float, ...]) -> None:
        from timm.data.auto_augment import rand_augment_transform
        from torchvision.transforms import v2

        self.split, self.seed = split, seed
        fit = (v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
               if crop == "random_resized" else v2.Resize((size, size), v2.InterpolationMode.BICUBIC, antialias=True))
        self.fit = fit
        fill = tuple(round(255 * m) for m in mean)
        self.augment = rand_augment_transform(rand_augment, {"img_mean": fill, "translate_const": int(size * 0.45)}) \
            if rand_augment else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:  # type: ignore[override]
        from torchvision.transforms.v2 import functional as vision

        epoch, index = key
        seed = seed_of(self.seed, "sample", epoch, index)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        image = self.fit(self.split.image(index))
        if self.augment is not None:
            grey = image.shape[0] == 1
            image = vision.pil_to_tensor(self.augment(vision.to_pil_image(image.expand(3, -1, -1) if grey else image)))
            image = image[:1] if grey else image
        return image, int(self.split.labels[index])


class FileBatches:
    """Like `ArrayBatches`, for images on disk or with RandAugment; the result does not depend on the number of workers.

    size: side of the square the model sees. crop: "random_resized" (8..100 % of the area) or "whole" (resized).
    rand_augment: timm's text, such as "rand-m9-mstd0.5-inc1", or "".
    """

    def __init__(self, split: Arrays | Files, batch_size: int, seed: int, augment: Augment, size: int, crop: str,
                 rand_augment: str, workers: int) -> None:
        self.split, self.batch_size, self.seed, self.augment = split, batch_size, seed, augment
        self.steps_per_epoch = len(split) // batch_size
        self.workers = workers
        self._data = _Train(split, seed, size, crop, rand_augment, augment.mean)
        self._stream: Iterator[tuple[Tensor, Tensor]] | None = None
        self._next: tuple[int, int] | None = None

    def _keys(self, step: int, part: int, parts: int) -> Iterator[list[tuple[int, int]]]:
        """Keys of this process's batches from (step, part) to the end of the epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        index = order(len(self.split), self.seed, epoch).tolist()
        size = self.batch_size // parts
        for p in range(position, self.steps_per_epoch):
            start = p * self.batch_size + part * size
            yield [(epoch, i) for i in index[start : start + size]]

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """(uint8 [B/parts, C, H, W], int64 [B/parts]): part `part` of the step's batch."""
        images, labels, index = self._streams(step, part, parts)
        epoch = step // self.steps_per_epoch
        if epoch != getattr(self, "_epoch", -1):
            self._epoch, self._mirrored = epoch, mirrored(len(self.split), self.seed, epoch, self.augment.flip)
        rows = torch.nonzero(self._mirrored[index]).flatten()
        images[rows] = images[rows].flip(-1)
        size = self.batch_size // parts
        mine = slice(part * size, (part + 1) * size)
        draw = generator(self.seed, "augment", step)
        images = shift(images, self.augment.translate, self.augment.pad, self.batch_size, mine, draw)
        images = cut_out(images, self.augment, self.batch_size, mine, draw)
        images = erase(images, self.augment, self.batch_size, mine, draw, (self.seed, "erase", step))
        return images, labels

    def _streams(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take the batch from this part's loader, started anew at each epoch and wherever the caller jumps."""
        streams: dict[int, tuple[int, Iterator[list[Tensor]], Iterator[list[tuple[int, int]]]]]
        streams = self.__dict__.setdefault("_open", {})
        epoch = step // self.steps_per_epoch
        if part not in streams or streams[part][0] != step or step % self.steps_per_epoch == 0:
            keys = list(self._keys(step, part, parts))
            loader: DataLoader[tuple[Tensor, int]] = DataLoader(
                self._data, batch_sampler=keys, num_workers=self.workers,  # type: ignore[arg-type]
                generator=generator(self.seed, "workers", epoch), pin_memory=torch.cuda.is_available())
            streams[part] = (step, iter(loader), iter(keys))
        _, batches, keys_left = streams[part]
        images, labels = next(batches)
        index = torch.tensor([i for _, i in next(keys_left)])
        streams[part] = (step + 1, batches, keys_left)
        return images, labels, index


class _Plain(Dataset[tuple[Tensor, int]]):
    """Resize the short side to size / 0.875 and cut the middle (already fitting images pass unchanged)."""

    def __init__(self, split: Arrays | Files, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional as vision

        image = self.split.image(index)
        if tuple(image.shape[-2:]) != (self.size, self.size):
            whole = isinstance(self.split, Arrays)  # small square images: no border to cut
            side = self.size if whole else round(self.size / 0.875)
            image = vision.resize(image, [side], v2.InterpolationMode.BICUBIC, antialias=True)
            image = vision.center_crop(image, [self.size, self.size])
        return image, int(self.split.labels[index])


def evaluation_batches(split: Arrays | Files, size: int, batch_size: int, workers: int, rank: int = 0,
                       world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 [b, C, size, size], int64 [b]) over samples rank, rank + world, ... in order."""
    index = torch.arange(rank, len(split), world)
    if isinstance(split, Arrays) and split.images.shape[-1] == size:
        for part in index.split(batch_size):
            yield split.images[part], split.labels[part]
        return
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        _Plain(split, size), batch_sampler=[p.tolist() for p in index.split(min(batch_size, 64))],
        num_workers=workers, generator=generator("evaluation"))
    for images, labels in loader:
        yield images, labels
