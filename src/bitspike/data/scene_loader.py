"""Batches of scenes: resized, cropped, mirrored and recoloured together with their targets, padded to one size.

As everywhere, every draw is a pure function of (seed, epoch, picture), and a batch's size is that of the whole step: neither
the number of processes, of parts nor of workers changes a pixel.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitspike.data.errors import DataError
from bitspike.data.loader import Keys, obey_the_main_process
from bitspike.data.pipeline import generator, order, seed_globals, seed_of, slices
from bitspike.data.scenes import VOID, Scenes, Target

#: pictures are padded to a multiple of this, on the right and below
MULTIPLE = 32
_MOST_OF_ONE = 0.75  # a crop that one class covers more of is drawn again (MMSegmentation's cat_max_ratio)

Sample = tuple[Tensor, Target]


@dataclass(frozen=True)
class SceneAugment:
    """How a training picture becomes an input.

    Its short side becomes size * f, f uniform in `scales` (one number: fixed), where `step` > 1 rounds that to a multiple of
    it; the long side is kept to `long_side` * f_max at most if that is not 0. crop: cut a square of `size`, at a place drawn
    until no class covers more than three quarters (segmentation; ten times at most). flip: mirror with probability 1/2.
    colour: strength of the change of brightness, contrast and saturation (1 +- colour) and hue (+- colour / 8).
    fill: the colour of the border, one number 0..255 a channel.
    """

    size: int
    long_side: int = 0
    scales: tuple[float, ...] = (1.0,)
    step: int = 1
    crop: bool = False
    flip: bool = False
    colour: float = 0.0
    fill: tuple[int, ...] = (0, 0, 0)

    def resized(self, height: int, width: int, u: float = 0.0) -> tuple[int, int]:
        """Size of a picture of that size after scaling; u in 0..1 says where in `scales`."""
        factor = self.scales[0] + u * (self.scales[-1] - self.scales[0])
        short = self.size * factor
        if self.step > 1:
            short = max(self.step, round(short / self.step) * self.step)
        return fitted(height, width, short, self.long_side * (factor if self.crop else 1))

    def shape(self, height: int, width: int, u: float) -> tuple[int, int]:
        """Size of what a picture of that size becomes, before padding."""
        return (self.size, self.size) if self.crop else self.resized(height, width, u)


def fitted(height: int, width: int, short: float, long: float = 0) -> tuple[int, int]:
    """The size with the same proportions whose short side is `short`, or less if the long one would pass `long` (0: may).

    >>> fitted(480, 640, 240), fitted(480, 640, 240, 256)
    ((240, 320), (192, 256))
    """
    factor = short / min(height, width)
    if long:
        factor = min(factor, long / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def padded_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The smallest size that holds all of them and is a multiple of MULTIPLE.

    >>> padded_size([(30, 64), (33, 40)])
    (64, 64)
    """
    return tuple(-(-max(side) // MULTIPLE) * MULTIPLE for side in zip(*sizes, strict=True))  # type: ignore[return-value]


def stacked(samples: list[Sample], size: tuple[int, int], fill: tuple[int, ...]) -> tuple[Tensor, list[Target]]:
    """Pictures padded to `size` with `fill`, uint8 [b, C, H, W], and their targets.

    Each target gets "canvas" and "size", int64 [2]: height and width of all and of its own part. A "semantic" map is
    padded with VOID; boxes and masks stay as they are.
    """
    import torch.nn.functional as F

    pictures = torch.tensor(fill, dtype=torch.uint8)[None, :, None, None].repeat(len(samples), 1, *size)
    targets = []
    for canvas, (image, target) in zip(pictures, samples, strict=True):
        H, W = image.shape[-2:]
        canvas[:, :H, :W] = image
        target = {**target, "size": torch.tensor([H, W]), "canvas": torch.tensor(size)}
        if "semantic" in target:
            target["semantic"] = F.pad(target["semantic"].as_subclass(Tensor), (0, size[1] - W, 0, size[0] - H), value=VOID)
        targets.append(target)
    return pictures, targets


def _apply(name: str, image: Any, target: Target, *args: Any, **kwargs: Any) -> tuple[Any, Target]:
    """One of torchvision's functional transforms on the picture and on everything in the target that has a place."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as vision

    call = getattr(vision, name)
    return call(image, *args, **kwargs), {key: call(value, *args, **kwargs) if isinstance(value, tv_tensors.TVTensor) else value
                                          for key, value in target.items()}


def without_empty(target: Target) -> Target:
    """Drop the objects of a detection target whose box has less than a pixel in one direction (cut away by a crop)."""
    if "boxes" not in target:
        return target
    from torchvision import tv_tensors

    boxes = target["boxes"]
    keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    if bool(keep.all()):
        return target
    return {key: tv_tensors.wrap(value[keep], like=value) if isinstance(value, tv_tensors.TVTensor) else value[keep]
            if isinstance(value, Tensor) and value.dim() and len(value) == len(keep) and key != "size" else value
            for key, value in target.items()}


class _Train(Dataset[Sample]):
    """Sample (epoch, index) -> augmented picture and target."""

    def __init__(self, split: Scenes, seed: int, augment: SceneAugment) -> None:
        self.split, self.seed, self.augment = split, seed, augment

    def __len__(self) -> int:
        return len(self.split)

    def _draw(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.seed, "scene", epoch, index))

    def shape(self, epoch: int, index: int) -> tuple[int, int]:
        """What `[epoch, index]` will measure, without decoding it."""
        if self.augment.crop:
            return self.augment.size, self.augment.size
        return self.augment.shape(*self.split.size(index), self._draw(epoch, index).random())

    def __getitem__(self, key: tuple[int, int]) -> Sample:  # type: ignore[override]
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        epoch, index = key
        draw, a = self._draw(epoch, index), self.augment
        image: Any = tv_tensors.Image(self.split.image(index))
        target = self.split.target(index, *image.shape[-2:])
        target["draw"] = seed_of(self.seed, "sample", epoch, index)
        size = a.resized(image.shape[-2], image.shape[-1], draw.random())
        image, target = _apply("resize", image, target, list(size), antialias=True)
        if a.crop:
            image, target = self._cropped(image, target, draw)
        if a.flip and draw.random() < 0.5:
            image, target = _apply("horizontal_flip", image, target)
        if a.colour:
            seed_globals(seed_of(self.seed, "colour", epoch, index))
            image = v2.ColorJitter(a.colour, a.colour, a.colour, a.colour / 8)(image)
        return image.as_subclass(Tensor), without_empty(target)

    def _cropped(self, image: Any, target: Target, draw: np.random.Generator) -> tuple[Any, Target]:
        """A window of size x size or, where the picture is smaller, all of it."""
        H, W = image.shape[-2:]
        h, w = min(H, self.augment.size), min(W, self.augment.size)
        for _ in range(10):
            top, left = int(draw.integers(H - h + 1)), int(draw.integers(W - w + 1))
            if "semantic" not in target:
                break
            window = target["semantic"][top : top + h, left : left + w].reshape(-1)
            seen = torch.bincount(window.long(), minlength=VOID + 1)[:VOID]
            if int((seen > 0).sum()) > 1 and int(seen.max()) < _MOST_OF_ONE * int(seen.sum()):
                break
        return _apply("crop", image, target, top, left, h, w)


class SceneBatches:
    """`Batches` of scenes: (uint8 [b, 3, H, W], list of `Target`), see `stacked`.

    Errors of `step`: DataError naming the file that cannot be read.
    """

    def __init__(self, split: Scenes, batch_size: int, seed: int, augment: SceneAugment, workers: int) -> None:
        if not isinstance(split, Scenes):
            raise DataError("a task with targets for every pixel or object needs data that have them; these have a class a "
                            "picture.")
        self.split, self.batch_size, self.seed, self.augment, self.workers = split, batch_size, seed, augment, workers
        self.steps_per_epoch = len(split) // batch_size
        self._data = _Train(split, seed, augment)
        self._next: tuple[int, int, int, int] | None = None

    def _open(self, step: int, rank: int, world: int, accumulate: int) -> None:
        epoch, position = divmod(step, self.steps_per_epoch)
        self._order = order(len(self.split), self.seed, epoch)
        parts = [slice(p * self.batch_size + s.start, p * self.batch_size + s.stop)
                 for p in range(position, self.steps_per_epoch) for s in slices(self.batch_size, rank, world, accumulate)]
        self._loader = iter(_loader(self._data, Keys(self._order, epoch, parts), self.workers, (self.seed, "workers", epoch)))

    def step(self, step: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[tuple[Tensor, list[Target]]]:
        """See `Batches.step`."""
        if self._next != (step, rank, world, accumulate) or step % self.steps_per_epoch == 0:
            self._open(step, rank, world, accumulate)
        epoch, position = divmod(step, self.steps_per_epoch)
        members = self._order[position * self.batch_size :][: self.batch_size].tolist()
        size = padded_size([self._data.shape(epoch, i) for i in members])
        for _ in range(accumulate):
            yield stacked(next(self._loader), size, self.augment.fill)
        self._next = (step + 1, rank, world, accumulate)


class _Plain(Dataset[Sample]):
    def __init__(self, split: Scenes, augment: SceneAugment) -> None:
        self.split, self.augment = split, augment

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        image = self.split.image(index)
        H, W = image.shape[-2:]
        target = self.split.target(index, H, W)
        return resized_like_pillow(image, self.augment.resized(H, W)), {**target, "original_size": torch.tensor([H, W])}


def resized_like_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] at another size, bilinear with Pillow's own filter: the bytes that the runtime sees."""
    from PIL import Image

    if tuple(image.shape[-2:]) == size:
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def evaluation_scenes(split: Scenes, augment: SceneAugment, batch_size: int, workers: int, rank: int = 0,
                      world: int = 1) -> Iterator[tuple[Tensor, list[Target]]]:
    """(uint8 [b, 3, H, W], targets) over samples rank, rank + world, ... in order; only size, long side and fill are used.

    The targets are those of the pictures as stored; "original_size" [2] is their height and width, "size" [2] that of their
    part of the canvas. "semantic" maps are of the original size, so they are not padded.
    """
    if not isinstance(split, Scenes):
        raise DataError("a task with targets for every pixel or object needs data that have them; these have a class a "
                        "picture.")
    index = torch.arange(rank, len(split), world)
    keys = [part.tolist() for part in index.split(batch_size)]
    for samples in _loader(_Plain(split, augment), keys, workers, ("evaluation",)):
        alike: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:  # padded as if alone: who else is in the batch must not matter
            alike.setdefault(padded_size([(sample[0].shape[1], sample[0].shape[2])]), []).append(sample)
        for size, members in alike.items():
            maps = [target.pop("semantic", None) for _, target in members]
            pictures, targets = stacked(members, size, augment.fill)
            for target, semantic in zip(targets, maps, strict=True):
                if semantic is not None:
                    target["semantic"] = semantic
            yield pictures, targets


def _as_they_are(samples: list[Sample]) -> list[Sample]:
    return samples


def _loader(data: Dataset[Sample], keys: Any, workers: int, key: tuple[object, ...]) -> DataLoader[Any]:
    return DataLoader(data, batch_sampler=keys, num_workers=workers, generator=generator(*key), collate_fn=_as_they_are,
                      worker_init_fn=obey_the_main_process)
