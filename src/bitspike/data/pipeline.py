"""Batches of augmented uint8 images, decided by (seed, epoch, position) alone.

Every random draw is made for the whole batch of a step and then cut to this process's part. So a step can be repeated
from its number, a run goes on exactly where it stopped, and two processes see what one would have seen.
"""
from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitspike.data.splits import Arrays


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key.

    >>> int(torch.randint(100, (), generator=generator(0, "x"))) == int(torch.randint(100, (), generator=generator(0, "x")))
    True
    """
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: object) -> int:
    """63 bits of sha256 over the key: unrelated for neighbouring keys, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def seed_globals(seed: int) -> None:
    """Seed what models and libraries draw from: torch, random and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (timm's augmentation draws from the old generator)


@dataclass(frozen=True)
class Augment:
    """Vectorised augmentation of small images. Units: pixels (translate, cutout), probability (erasing).

    mean and std (of pixel / 255) fill what cutout removes and shape the noise of erasing.
    """

    flip: str = "none"
    translate: int = 0
    pad: str = "reflect"
    cutout: int = 0
    erasing: float = 0.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)


def order(samples: int, seed: int, epoch: int) -> Tensor:
    """The epoch's order of the samples, int64 [N]."""
    return torch.randperm(samples, generator=generator(seed, "order", epoch))


def mirrored(samples: int, seed: int, epoch: int, flip: str) -> Tensor:
    """Which samples are mirrored in this epoch, bool [N].

    "alternating" (airbench): a fixed random half in even epochs, the other half in odd ones, so that two epochs show
    every image both ways.
    """
    if flip == "none":
        return torch.zeros(samples, dtype=torch.bool)
    alternating = flip == "alternating"
    half = torch.randint(2, (samples,), generator=generator(seed, "flip", 0 if alternating else epoch)).bool()
    return half ^ bool(epoch % 2) if alternating else half


class Batches(Protocol):
    """Training batches; `step` is a pure function of its arguments."""

    steps_per_epoch: int

    def step(self, step: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[tuple[Tensor, Any]]:
        """The `accumulate` parts that process `rank` of `world` computes in this step, of equal size.

        Each is (uint8 [b, C, H, W] or [b, T, C, H, W], int64 [b], or what else the task's targets are); part a of
        rank r is part r * accumulate + a of the step's batch.
        """
        ...


class ArrayBatches:
    """`Batches` from memory, vectorised. data: uint8 [N, (T,) C, H, W]; batch_size: of one optimizer step.

    Steps count on over the epochs; the last N % batch_size samples of an epoch's order wait for another epoch.
    """

    def __init__(self, data: Arrays, batch_size: int, seed: int, augment: Augment) -> None:
        self.data, self.batch_size, self.seed, self.augment = data, batch_size, seed, augment
        self.steps_per_epoch = len(data) // batch_size
        self._epoch = -1

    def step(self, step: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order(len(self.data), self.seed, epoch)
            self._mirrored = mirrored(len(self.data), self.seed, epoch, self.augment.flip)
        batch = self._order[position * self.batch_size :][: self.batch_size]
        for mine in slices(self.batch_size, rank, world, accumulate):
            index = batch[mine]
            images = self.data.images.index_select(0, index)
            yield (augmented(images, self._mirrored[index], self.augment, self.batch_size, mine, self.seed, step),
                   self.data.labels[index])


def slices(batch: int, rank: int, world: int, accumulate: int) -> list[slice]:
    """Which positions of the step's batch each part of this process takes.

    >>> slices(8, 1, 2, 2)
    [slice(4, 6, None), slice(6, 8, None)]
    """
    size = batch // (world * accumulate)
    return [slice(p * size, (p + 1) * size) for p in range(rank * accumulate, (rank + 1) * accumulate)]


def augmented(images: Tensor, mirror: Tensor, augment: Augment, batch: int, mine: slice, seed: int, step: int) -> Tensor:
    """Everything `augment` asks for, on positions `mine` of a batch of `batch` images. Writes into `images`.

    A sequence [b, T, C, H, W] is treated as one image of T * C channels: all of its frames alike.
    """
    if images.dim() == 5:
        same = replace(augment, mean=augment.mean * images.shape[1], std=augment.std * images.shape[1])
        return augmented(images.flatten(1, 2), mirror, same, batch, mine, seed, step).unflatten(1, images.shape[1:3])
    rows = torch.nonzero(mirror).flatten()
    images[rows] = images[rows].flip(-1)
    draw = generator(seed, "augment", step)
    images = shift(images, augment.translate, augment.pad, batch, mine, draw)
    images = cut_out(images, augment, batch, mine, draw)
    return erase(images, augment, batch, mine, draw, (seed, "erase", step))


def shift(images: Tensor, most: int, pad: str, batch: int, mine: slice, draw: torch.Generator) -> Tensor:
    """Move each image by -most..most pixels both ways; the border is reflected or black. uint8 [b, C, H, W]."""
    if most == 0:
        return images
    offsets = torch.randint(2 * most + 1, (2, batch), generator=draw)[:, mine]
    H, W, m = *images.shape[-2:], most
    if pad == "reflect":  # by parts: an index over single bytes is ten times slower
        tall = torch.cat([images[:, :, 1 : m + 1].flip(2), images, images[:, :, -m - 1 : -1].flip(2)], 2)
        padded = torch.cat([tall[..., 1 : m + 1].flip(3), tall, tall[..., -m - 1 : -1].flip(3)], 3)
    else:
        padded = F.pad(images, (m,) * 4)
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # [b, C, 2 most + 1, 2 most + 1, H, W], a view
    return windows[torch.arange(len(images)), :, offsets[0], offsets[1]]


def cut_out(images: Tensor, augment: Augment, batch: int, mine: slice, draw: torch.Generator) -> Tensor:
    """Fill one square of `cutout` pixels per image with the mean colour, its centre anywhere in the image."""
    side = augment.cutout
    if side == 0:
        return images
    H, W = images.shape[-2:]
    top = torch.randint(H, (batch,), generator=draw)[mine, None] - side // 2
    left = torch.randint(W, (batch,), generator=draw)[mine, None] - side // 2
    row, column = torch.arange(H), torch.arange(W)
    hole = (((row >= top) & (row < top + side))[:, None, :, None] & ((column >= left) & (column < left + side))[:, None, None])
    colour = (255 * torch.tensor(augment.mean)).round().to(torch.uint8)[:, None, None]
    return torch.where(hole, colour[: images.shape[1]], images)


def erase(images: Tensor, augment: Augment, batch: int, mine: slice, draw: torch.Generator,
          key: tuple[object, ...]) -> Tensor:
    """Random erasing (Zhong et al. 2020) with noise per pixel, timm's "pixel" mode: 2..33 % of the area."""
    if augment.erasing == 0:
        return images
    u = torch.rand(5, batch, generator=draw)
    H, W = images.shape[-2:]
    area = (0.02 + (1 / 3 - 0.02) * u[1]) * H * W
    aspect = torch.exp(torch.log(torch.tensor(3.3)) * (2 * u[2] - 1))
    h = (area * aspect).sqrt().round().clamp(1, H - 1).long()
    w = (area / aspect).sqrt().round().clamp(1, W - 1).long()
    top, left = (u[3] * (H - h + 1)).long(), (u[4] * (W - w + 1)).long()
    # grey pixels become as many channels as mean has only when they are normalised
    mean, std = (255 * torch.tensor(t)[: images.shape[1], None, None] for t in (augment.mean, augment.std))
    for i in torch.nonzero(u[0, mine] < augment.erasing).flatten().tolist():
        p = (mine.start or 0) + i
        box = images[i, :, top[p] : top[p] + h[p], left[p] : left[p] + w[p]]
        noise = torch.randn(box.shape, generator=generator(*key, p))  # per sample: independent of the cut into parts
        box.copy_((mean + std * noise).round().clamp(0, 255))
    return images


def mix(images: Tensor, targets: Tensor, classes: int, mixup: float, cutmix: float,
        key: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix (either with probability 1/2 if both are on) of neighbours 2i, 2i+1; one ratio for the step.

    images: float [B, C, H, W] or sequences [B, T, C, H, W], B even; targets: int64 [B] -> float [B, K]. Batches are
    shuffled, so neighbours are strangers, and a pair is never split between processes. Targets that are shares of the classes
    already, float [B, K], are mixed as such.
    """
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    u = torch.rand(3, generator=generator(*key), dtype=torch.float64).tolist()
    cut = cutmix > 0 and (mixup <= 0 or u[0] < 0.5)
    alpha = cutmix if cut else mixup
    ratio = float(np.random.default_rng(seed_of(*key, "beta")).beta(alpha, alpha))
    other = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    hot = (targets if targets.is_floating_point() else F.one_hot(targets, classes)).to(images.dtype)
    if cut:
        H, W = images.shape[-2:]
        h, w = round(H * (1 - ratio) ** 0.5), round(W * (1 - ratio) ** 0.5)
        top, left = int(u[1] * H) - h // 2, int(u[2] * W) - w // 2
        rows = slice(max(top, 0), min(top + h, H))
        columns = slice(max(left, 0), min(left + w, W))
        images = images.clone()
        images[..., rows, columns] = other[..., rows, columns]
        ratio = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (H * W)
    else:
        images = images * ratio + other * (1 - ratio)
    partner = hot.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return images, hot * ratio + partner * (1 - ratio)
