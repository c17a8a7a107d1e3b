"""Input normalisation and the accuracy of a model on a split."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.data import DataError, Dataset, load
from bitspike.data.loader import evaluation_batches
from bitspike.layers import cached_weights
from bitspike.objectives import SpikeCounts, prediction
from bitspike.recipe import Recipe, RecipeError


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
    """top1 and top5 in percent, mean loss (cross entropy), number of images n, mean spike count of the neurons.

    data: a loaded dataset or its folder. In eval mode and in the recipe's precision; the model's mode is restored. Under
    torchrun every process takes its share.
    """
    dataset = data if isinstance(data, Dataset) else load(recipe.data, data, recipe.event_frames())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ranks = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ranks else (0, 1)
    was_training = model.training
    model.eval()
    counts = SpikeCounts(model)
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # top1, top5, loss, n, spikes
    with cached_weights(model):  # the weights stand still: quantize them once, not for every batch
        batches = evaluation_batches(dataset.split(split), recipe.image_size, batch_size, recipe.workers, rank, world)
        for pixels, labels in batches:
            with autocast(recipe, device):
                mean = prediction(model(as_input(normalise(pixels.to(device), recipe)))).float()
            targets = labels.to(device)
            if mean.shape[1] != len(dataset.classes):
                raise RecipeError(f"recipe {recipe.name!r}: its model has {mean.shape[1]} outputs, {recipe.data} has "
                                  f"{len(dataset.classes)} classes.")
            hits = mean.topk(min(5, mean.shape[1])).indices == targets[:, None]
            spikes = counts.take()
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(mean, targets, reduction="sum"),
                                 torch.tensor(len(labels), device=device),
                                 sum(spikes.values(), torch.zeros((), device=device)) / max(1, len(spikes)) * len(labels)])
    counts.remove()
    model.train(was_training)
    if ranks:
        torch.distributed.all_reduce(sums)
    top1, top5, loss, n, spikes_mean = sums.tolist()
    if n == 0:
        raise DataError(f"{recipe.data}: its split {split!r} has no images.")
    return {"top1": round(100 * top1 / n, 4), "top5": round(100 * top5 / n, 4), "loss": loss / n, "n": int(n),
            "mean_spikes": spikes_mean / n}


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """The recipe's precision, outside of training."""
    if recipe.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if recipe.precision == "bf16" else torch.float16)
