"""What the tasks with a target for every pixel or object share: their batches, and how targets get to the device."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitspike.data.pipeline import Batches
from bitspike.data.scene_loader import (
    MULTIPLE,
    SceneAugment,
    SceneBatches,
    evaluation_scenes,
    padded_size,
    resized_like_pillow,
    stacked,
)
from bitspike.data.scenes import Scenes, Target
from bitspike.data.splits import Dataset
from bitspike.recipe import Recipe


def scene_augment(recipe: Recipe) -> SceneAugment:
    """What the recipe does to training pictures; borders have the mean colour, which the model sees as about 0."""
    step = MULTIPLE if recipe.task == "detection" and len(recipe.scales) > 1 else 1
    return SceneAugment(recipe.image_size, recipe.long_side, recipe.scales, step, recipe.crop == "random",
                        recipe.flip == "random", recipe.colour_jitter, border_colour(recipe))


def border_colour(recipe: Recipe) -> tuple[int, ...]:
    """The mean colour, three whole numbers 0..255.

    >>> border_colour(Recipe("x", torch.nn.Identity, mean=(0.5,), std=(1.0,)))
    (128, 128, 128)
    """
    mean = recipe.mean * 3 if len(recipe.mean) == 1 else recipe.mean
    return tuple(round(255 * m) for m in mean)


def usual_canvas(recipe: Recipe, split: Scenes) -> tuple[int, int]:
    """The padded size [height, width] that most pictures of a split have in evaluation (of equally many the smaller one).

    Of a large split 500 pictures are asked, evenly spaced.
    """
    plain, count = evaluation_augment(recipe), min(len(split), 500)
    asked = [i * len(split) // count for i in range(count)]
    sizes = Counter(padded_size([plain.resized(*split.size(i))]) for i in asked)
    return min(sizes, key=lambda size: (-sizes[size], size[0] * size[1], size))


def letterboxed(image: Tensor, canvas: tuple[int, int], fill: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [3, H, W] as large as fits into the canvas, at the top left of it, on `fill`; and its size there.

    For a picture whose canvas it is, these are the bytes of evaluation.
    """
    H, W = image.shape[-2:]
    factor = min(canvas[0] / H, canvas[1] / W)
    size = min(canvas[0], max(1, round(H * factor))), min(canvas[1], max(1, round(W * factor)))
    pictures, _ = stacked([(resized_like_pillow(image, size), {})], canvas, fill)
    return pictures[0], size


def evaluation_augment(recipe: Recipe) -> SceneAugment:
    """`scene_augment` without chance: the size of evaluation."""
    return replace(scene_augment(recipe), scales=(1.0,), step=1, crop=False)


class Dense:
    """The part of `Task` that segmentation and detection have in common. Targets are a list of `Target`."""

    def check(self, recipe: Recipe, data: Dataset, model: nn.Module, blank: Tensor) -> None:
        """That the model takes pictures of this size."""
        with torch.no_grad():
            model(blank)

    def batches(self, recipe: Recipe, data: Dataset) -> Batches:
        """See `SceneBatches`."""
        split: Any = data.split(recipe.train_on)
        return SceneBatches(split, recipe.batch_size, recipe.seed, scene_augment(recipe), recipe.workers)

    def evaluation_batches(self, recipe: Recipe, data: Dataset, split: str, batch_size: int, rank: int,
                           world: int) -> Iterator[tuple[Tensor, list[Target]]]:
        """See `evaluation_scenes`; the short side is `image_size`, or less where the long one would pass `long_side`."""
        found: Any = data.split(split)
        at_once = min(batch_size, recipe.batch_size)
        return evaluation_scenes(found, evaluation_augment(recipe), at_once, recipe.workers, rank, world)

    def blank(self, recipe: Recipe, data: Dataset) -> Tensor:
        """A square of `image_size`, padded."""
        side = -(-recipe.image_size // MULTIPLE) * MULTIPLE
        return torch.zeros(1, 3, side, side, dtype=torch.uint8)
