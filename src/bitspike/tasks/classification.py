"""One class for a whole picture or recording: cross entropy, top-1 and top-5."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.data.loader import FileBatches, evaluation_batches
from bitspike.data.pipeline import ArrayBatches, Augment, Batches
from bitspike.data.splits import Arrays, Dataset
from bitspike.objectives import classification_loss, prediction
from bitspike.recipe import Loss, Recipe, RecipeError
from bitspike.tasks import Meter, summed


class Classification:
    """See `Task`. Targets are labels, int64 [B]; with mixup, cutmix or mixed recordings shares of the
    classes, [B, K].
    """

    def batches(self, recipe: Recipe, data: Dataset) -> Batches:
        """From memory where nothing has to be decoded, resized or RandAugmented, else by worker processes."""
        split = data.split(recipe.train_on)
        augment = Augment(recipe.flip, recipe.translate, recipe.translate_pad, recipe.cutout, recipe.random_erasing,
                          recipe.mean, recipe.std)
        plain = recipe.crop == "whole" and not recipe.rand_augment
        if plain and isinstance(split, Arrays) and split.images.shape[-1] == recipe.image_size:
            return ArrayBatches(split, recipe.batch_size, recipe.seed, augment)
        try:
            return FileBatches(split, recipe.batch_size, recipe.seed, augment, recipe.image_size, recipe.crop,
                               recipe.rand_augment, recipe.workers, len(data.classes))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            if not recipe.rand_augment:
                raise
            raise RecipeError(f"recipe {recipe.name!r}, field rand_augment={recipe.rand_augment!r}: allowed: what timm reads, "
                              f"such as rand-m9-mstd0.5-inc1 ({str(error) or type(error).__name__}).") from None

    def evaluation_batches(self, recipe: Recipe, data: Dataset, split: str, batch_size: int, rank: int,
                           world: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Photographs lose a border, small pictures are taken whole."""
        return evaluation_batches(data.split(split), recipe.image_size, batch_size, recipe.workers, rank, world)

    def blank(self, recipe: Recipe, data: Dataset) -> Tensor:
        """As many channels, and time steps, as the first picture or recording has."""
        axes = data.train.image(0).shape[:-2]
        return torch.zeros(1, *axes, recipe.image_size, recipe.image_size, dtype=torch.uint8)

    def check(self, recipe: Recipe, data: Dataset, model: nn.Module, blank: Tensor) -> None:
        """As many outputs as the data has classes."""
        with torch.no_grad():
            _check_outputs(recipe, prediction(model(blank)).shape[1], len(data.classes))

    def to_device(self, targets: Tensor, device: torch.device) -> Tensor:
        """Labels on the device."""
        return targets.to(device)

    def forward(self, model: nn.Module, images: Tensor, targets: Any) -> Any:
        """Logits [B, K], of every step [T, B, K], or a tuple of such."""
        return model(images)

    def loss(self, recipe: Recipe) -> Loss:
        """Cross entropy."""
        return classification_loss(recipe)

    def meter(self, recipe: Recipe, data: Dataset, device: torch.device) -> Meter:
        """top1 and top5 in percent, mean loss, n."""
        return _Accuracy(recipe, len(data.classes), device)

    def says(self, result: dict[str, Any], prefix: str = "") -> str:
        """
        >>> Classification().says({"val_top1": 91.2, "val_top5": 99.0}, "val_")
        'top-1 91.20 %'
        """
        return f"top-1 {result[prefix + 'top1']:.2f} %"


def _check_outputs(recipe: Recipe, outputs: int, classes: int) -> None:
    if outputs != classes:
        raise RecipeError(f"recipe {recipe.name!r}: its model has {outputs} outputs, {recipe.data} has {classes} classes. Give "
                          f"the model as many: --set model_options.num_classes={classes}.")


class _Accuracy:
    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        self.recipe, self.classes = recipe, classes
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # top1, top5, loss, n

    def add(self, output: Any, targets: Tensor) -> None:
        mean = prediction(output).float()
        _check_outputs(self.recipe, mean.shape[1], self.classes)
        labels = targets.to(mean.device)
        hits = mean.topk(min(5, mean.shape[1])).indices == labels[:, None]
        self.sums += torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(mean, labels, reduction="sum"),
                                  torch.tensor(len(labels), device=mean.device)])

    def compute(self) -> dict[str, float]:
        top1, top5, loss, n = summed(self.sums.clone()).tolist()
        if not n:
            return {"n": 0}
        return {"top1": round(100 * top1 / n, 4), "top5": round(100 * top5 / n, 4), "loss": loss / n, "n": int(n)}
