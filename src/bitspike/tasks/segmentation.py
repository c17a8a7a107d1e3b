"""One class for every pixel: cross entropy, mean intersection over union."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.data.scenes import VOID, Target
from bitspike.data.splits import Dataset
from bitspike.models.segmentation import enlarged, predicted_logits, slide
from bitspike.objectives import prediction
from bitspike.recipe import Loss, Recipe, RecipeError
from bitspike.tasks import Meter
from bitspike.tasks.dense import Dense


def pixel_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of enlarged logits, summed over the pixels that have a class, divided by the number of all pixels.

    logits: [B, K, h, w] at any stride; truth: int64 [B, H, W] with VOID where nothing counts. Dividing by all pixels, as
    MMSegmentation does by default, weighs every pixel the same however a batch is split over processes.
    """
    whole = enlarged(logits.float(), *truth.shape[-2:])
    return F.cross_entropy(whole, truth, ignore_index=VOID, reduction="sum") / truth.numel()


class Segmentation(Dense):
    """See `Task`. A model gives logits [B, K, h, w] at any stride; in training it may give {"out": those, "aux": others}."""

    def __init__(self, window: int = 0) -> None:
        self.window = window

    def to_device(self, targets: list[Target], device: torch.device) -> Tensor:
        """int64 [B, H, W], VOID where nothing counts."""
        return torch.stack([target["semantic"] for target in targets]).to(device).long()

    def forward(self, model: nn.Module, images: Tensor, targets: Any) -> Any:
        """Logits [B, K, h, w], or in training a dict of them; with a `window` in evaluation by `models.segmentation.slide`."""
        return slide(model, images, self.window) if self.window and not model.training else model(images)

    def loss(self, recipe: Recipe) -> Loss:
        """`pixel_loss`, plus recipe.auxiliary times that of an auxiliary head."""

        def loss(images: Tensor, output: Any, truth: Tensor) -> Tensor:
            total = pixel_loss(prediction(output), truth)
            if isinstance(output, dict) and "aux" in output and recipe.auxiliary:
                total = total + recipe.auxiliary * pixel_loss(output["aux"], truth)
            return total

        return loss

    def meter(self, recipe: Recipe, data: Dataset, device: torch.device) -> Meter:
        """miou and pixel_accuracy in percent, mean loss, n."""
        return SegmentationMeter(recipe, len(data.classes), device)

    def says(self, result: dict[str, Any], prefix: str = "") -> str:
        """
        >>> Segmentation().says({"miou": 30.0, "pixel_accuracy": 90.0})
        'mIoU 30.00 %, pixels 90.00 %'
        """
        return f"mIoU {result[prefix + 'miou']:.2f} %, pixels {result[prefix + 'pixel_accuracy']:.2f} %"


class SegmentationMeter:
    """Pixels by true and predicted class, at the size of the stored annotation; VOID does not count.

        IoU_c = hits_c / (true_c + predicted_c - hits_c),    mIoU = mean over the classes that occur in either

    pixel_accuracy: the share of hits. loss: mean cross entropy of the pixels that count. All in float64 or integers, so that
    any split over processes gives the same numbers. Needs torchmetrics (the extra "dense").
    """

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        from torchmetrics import SumMetric
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.recipe, self.classes = recipe, classes
        self.pixels = MulticlassConfusionMatrix(classes, ignore_index=VOID).to(device)
        self.loss, self.n = (SumMetric().set_dtype(torch.float64).to(device) for _ in range(2))
        self.seen = 0

    def add(self, output: Any, targets: list[Target]) -> None:
        """Logits [B, K, h, w] and the targets of `evaluation_batches`."""
        logits = prediction(output)
        if logits.dim() != 4 or logits.shape[1] != self.classes:
            raise RecipeError(f"recipe {self.recipe.name!r}: its model gives {list(logits.shape)}; {self.recipe.data} needs "
                              f"[B, {self.classes}, h, w].")
        for one, target in zip(logits, targets, strict=True):
            canvas, size, original = (tuple(target[name].tolist()) for name in ("canvas", "size", "original_size"))
            found = predicted_logits(one, canvas, size, original)
            truth = target["semantic"].as_subclass(Tensor).to(found.device).long()
            self.pixels.update(found.argmax(0)[None], truth[None])
            self.loss.update(F.cross_entropy(found[None], truth[None], ignore_index=VOID, reduction="sum").double())
            self.seen += 1

    def compute(self) -> dict[str, float]:
        """See the class."""
        self.n.update(float(self.seen))
        self.seen = 0
        table, n = self.pixels.compute().double().cpu(), int(self.n.compute())
        if n == 0:
            return {"n": 0}
        hits, union = table.diag(), table.sum(0) + table.sum(1) - table.diag()
        pixels = max(1.0, float(table.sum()))
        return {"miou": round(100 * float((hits / union)[union > 0].mean()), 4),
                "pixel_accuracy": round(100 * float(hits.sum()) / pixels, 4),
                "loss": float(self.loss.compute()) / pixels, "n": n}
