"""Input normalisation, and what a model is measured by on a split."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitspike.data import DataError, Dataset, load
from bitspike.layers import cached_weights
from bitspike.objectives import SpikeCounts, autocast
from bitspike.recipe import Recipe
from bitspike.tasks import rank_and_world, summed, task_of

__all__ = ["as_input", "autocast", "evaluate", "limited", "load_for", "normalise"]


def normalise(pixels: Tensor, recipe: Recipe) -> Tensor:
    """uint8 [B, C, H, W] -> float32: (pixel / 255 - mean) / std; one channel becomes as many as `mean` has.

    Sequences of frames [B, T, C, H, W], as the data come, stay so: `as_input` turns them round for the model.

    >>> normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), Recipe("x", nn.Identity, mean=(0.5,), std=(0.25,))).item()
    2.0
    """
    if pixels.dim() == 5:
        return normalise(pixels.flatten(0, 1), recipe).unflatten(0, pixels.shape[:2])
    B, C, H, W = pixels.shape
    C = max(C, len(recipe.mean))
    mean, std = (255 * torch.tensor(t).expand(C).repeat(W).to(pixels.device) for t in (recipe.mean, recipe.std))
    # rows of W * C numbers: on a CPU five times faster than broadcasting over channels
    rows = pixels.expand(B, C, H, W).permute(0, 2, 3, 1).reshape(B, H, W * C).float()
    images = rows.sub_(mean).div_(std).view(B, H, W, C).permute(0, 3, 1, 2)
    return images if recipe.channels_last else images.contiguous()


def as_input(images: Tensor) -> Tensor:
    """A batch of the data -> what models take: images [B, C, H, W] as they are, sequences [B, T, ...] as [T, B, ...]."""
    return images.transpose(0, 1).contiguous() if images.dim() == 5 else images


@torch.no_grad()
def evaluate(model: nn.Module, recipe: Recipe, data: Dataset | Path | str | None, split: str = "test",
             batch_size: int = 500) -> dict[str, float]:
    """What the recipe's task measures, the number of images n, and the mean spike count of the neurons, mean_spikes.

    classification: top1 and top5 in percent, mean loss (cross entropy). segmentation: miou and pixel_accuracy in percent, mean
    loss. detection: box_map, box_map50 and of masks likewise, in percent.
    data: a loaded dataset or its folder. In eval mode; the model's mode is restored. Classification in the recipe's precision,
    segmentation and detection in float32 whatever trained them: bfloat16 rounds coordinates and close scores (a detector
    trained in it lost 4.7 points of box mAP). Under torchrun every process takes its share.
    """
    dataset = limited(data, recipe) if isinstance(data, Dataset) else load_for(recipe, data)
    task = task_of(recipe)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    meter = task.meter(recipe, dataset, device)
    was_training, dense = model.training, recipe.task != "classification"
    model.eval()
    counts = SpikeCounts(model)
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # pictures, spikes
    try:
        # cached: the weights stand still, so they are quantized once, not for every batch
        with cached_weights(model), _uncast(model) if dense else nullcontext():
            for pixels, targets in task.evaluation_batches(recipe, dataset, split, batch_size, *rank_and_world()):
                with nullcontext() if dense else autocast(recipe, device):
                    output = task.forward(model, as_input(normalise(pixels.to(device), recipe)), targets)
                meter.add(output, targets)
                spikes = counts.take()
                mean = sum(spikes.values(), torch.zeros((), device=device)) / max(1, len(spikes))
                totals += torch.stack([torch.tensor(len(pixels), device=device), mean * len(pixels)])
    finally:
        counts.remove()
        model.train(was_training)
    result = meter.compute()
    n, spikes_sum = summed(totals).tolist()
    if n == 0:
        raise DataError(f"{recipe.data}: its split {split!r} has no images.")
    return {**result, "mean_spikes": spikes_sum / n}


@contextmanager
def _uncast(model: nn.Module) -> Iterator[None]:
    """Inside, the model's own forward, without the autocast that accelerate wraps around it in training."""
    wrapped = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            vars(model)["forward"] = wrapped


def load_for(recipe: Recipe, data_dir: Path | str | None) -> Dataset:
    """The recipe's data, as it wants them. Errors: DataError."""
    return limited(load(recipe.data, data_dir, recipe.event_frames(), recipe.skip_broken), recipe)


def limited(data: Dataset, recipe: Recipe) -> Dataset:
    """The data with only `recipe.pictures` training pictures, evenly spaced; all of them if it is 0 or there are no more."""
    count, there = recipe.pictures, len(data.train)
    if not 0 < count < there:
        return data
    return replace(data, train=data.train.take(torch.arange(count) * there // count))
