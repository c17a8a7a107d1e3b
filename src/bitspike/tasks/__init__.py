"""What a network is asked: a class of the picture, a class of every pixel, or the objects in it.

A task says what one batch is, how it reaches the model, what is lost and what is measured; the training loop and the
evaluation know nothing else about it. `task_of(recipe)` gives the task of a recipe.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitspike.data.pipeline import Batches
from bitspike.data.splits import Dataset
from bitspike.processes import summed, world_size
from bitspike.recipe import Loss, Recipe

__all__ = ["Meter", "Task", "rank_and_world", "summed", "task_of"]


class Meter(Protocol):
    """Takes in the predictions of one process, batch by batch, and tells the numbers of all of them."""

    def add(self, output: Any, targets: Any) -> None:
        """What `Task.forward` returned in evaluation mode, and the targets that came with the pictures."""
        ...

    def compute(self) -> dict[str, float]:
        """Name -> number, over all processes and the same in each; "n" is the number of pictures."""
        ...


class Task(Protocol):
    """One of the recipe's tasks."""

    def batches(self, recipe: Recipe, data: Dataset) -> Batches:
        """Training batches (uint8 pictures, targets) of `recipe.train_on`; see `data.pipeline.Batches`."""
        ...

    def evaluation_batches(self, recipe: Recipe, data: Dataset, split: str, batch_size: int, rank: int,
                           world: int) -> Iterator[tuple[Tensor, Any]]:
        """(uint8 pictures, targets) of the samples rank, rank + world, ... of a split, in order."""
        ...

    def blank(self, recipe: Recipe, data: Dataset) -> Tensor:
        """One black picture of the size and kind the model is meant for: uint8 [1, C, H, W] or [1, T, C, H, W]."""
        ...

    def check(self, recipe: Recipe, data: Dataset, model: nn.Module, blank: Tensor) -> None:
        """Errors, before anything is trained: RecipeError where the model's outputs, of a blank input, cannot be the answer."""
        ...

    def to_device(self, targets: Any, device: torch.device) -> Any:
        """Targets as the loss takes them."""
        ...

    def forward(self, model: nn.Module, images: Tensor, targets: Any) -> Any:
        """Call the model on normalised pictures, in whatever mode it is."""
        ...

    def loss(self, recipe: Recipe) -> Loss:
        """The loss of one batch: (images, what `forward` returned in training mode, targets) -> scalar."""
        ...

    def meter(self, recipe: Recipe, data: Dataset, device: torch.device) -> Meter:
        """A new meter."""
        ...

    def says(self, result: dict[str, Any], prefix: str = "") -> str:
        """The numbers that matter as text, for progress and results; `prefix` is that of the names in `result`."""
        ...


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe.

    >>> task_of(Recipe("x", nn.Identity)).says({"top1": 91.2})
    'top-1 91.20 %'
    """
    if recipe.task == "segmentation":
        from bitspike.tasks.segmentation import Segmentation

        return Segmentation(recipe.window)
    if recipe.task == "detection":
        from bitspike.tasks.detection import Detection

        return Detection()
    from bitspike.tasks.classification import Classification

    return Classification()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) without torchrun."""
    world = world_size()
    return (torch.distributed.get_rank(), world) if world > 1 else (0, 1)
