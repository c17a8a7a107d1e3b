"""Batches of augmented uint8 images, decided by (seed, epoch, position) alone.

Every random draw is made for the whole batch of a step and then cut to this process's part. So a step can be repeated
from its number, a run goes on exactly where it stopped, and two processes see what one would have seen.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass

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


class ArrayBatches:
    """Training batches from memory, vectorised; `batch(step, part, parts)` is a pure function of its arguments.

    data: uint8 [N, C, H, W]. batch_size: of one optimizer step. Steps count on over the epochs; the last N % batch_size
    samples of an epoch's order wait for another epoch.
    """

    def __init__(self, data: Arrays, batch_size: int, seed: int, augment: Augment) -> None:
        self.data, self.batch_size, self.seed, self.augment = data, batch_size, seed, augment
        self.steps_per_epoch = len(data) // batch_size
        self._epoch = -1

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = order(len(self.data), self.seed, epoch)
            self._mirrored = mirrored(len(self.data), self.seed, epoch, self.augment.flip)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """(uint8 [B/parts, C, H, W], int64 [B/parts]): part `part` of the step's batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        self._enter(epoch)
        size = self.batch_size // parts
        mine = slice(part * size, (part + 1) * size)
        index = self._order[position * self.batch_size :][: self.batch_size][mine]
        images = self.data.images[index]
        rows = torch.nonzero(self._mirrored[index]).flatten()
        images[rows] = images[rows].flip(-1)
        draw = generator(self.seed, "augment", step)
        images = shift(images, self.augment.translate, self.augment.pad, self.batch_size, mine, draw)
        images = cut_out(images, self.augment, self.batch_size, mine, draw)
        images = erase(images, self.augment, self.batch_size, mine, draw, (self.seed, "erase", step))
        return images, self.data.labels[index]


def shift(images: Tensor, most: int, pad: str, batch: int, mine: slice, draw: torch.Generator) -> Tensor:
    """Move each image by -most..most pixels both ways; the border is reflected or black. uint8 [b, C, H, W]."""
    if most == 0:
        return images
    offsets = torch.randint(2 * most + 1, (2, batch), generator=draw)[:, mine]
    H, W = images.shape[-2:]
    if pad == "reflect":
        reach = torch.arange(-most, H + most).abs(), torch.arange(-most, W + most).abs()
        rows, columns = (torch.where(r >= n, 2 * (n - 1) - r, r) for r, n in zip(reach, (H, W), strict=True))
        padded = images[:, :, rows][..., columns]
    else:
        padded = F.pad(images, (most,) * 4)
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
    mean, std = (255 * torch.tensor(t)[:, None, None] for t in (augment.mean, augment.std))
    for i in torch.nonzero(u[0, mine] < augment.erasing).flatten().tolist():
        p = (mine.start or 0) + i
        box = images[i, :, top[p] : top[p] + h[p], left[p] : left[p] + w[p]]
        noise = torch.randn(box.shape, generator=generator(*key, p))  # per sample: independent of the cut into parts
        box.copy_((mean + std * noise).round().clamp(0, 255))
    return images


def mix(images: Tensor, targets: Tensor, classes: int, mixup: float, cutmix: float, key: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix (either with probability 1/2 if both are on) of neighbours 2i, 2i+1; one ratio for the step.

    images: float [B, C, H, W], B even; targets: int64 [B] -> float [B, K]. Batches are shuffled, so neighbours are
    strangers, and a pair is never split between processes.
    """
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    u = torch.rand(3, generator=generator(*key), dtype=torch.float64).tolist()
    cut = cutmix > 0 and (mixup <= 0 or u[0] < 0.5)
    alpha = cutmix if cut else mixup
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed_of(*key, "beta"))
    ratio = float(torch.distributions.Beta(alpha, alpha).sample())
    torch.random.set_rng_state(torch_state)
    other = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    hot = F.one_hot(targets, classes).to(images.dtype)
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
