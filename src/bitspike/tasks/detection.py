"""The objects of a picture: boxes, classes and masks."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitspike.data.scenes import Target
from bitspike.data.splits import Dataset
from bitspike.models.detection import in_picture
from bitspike.recipe import Loss, Recipe
from bitspike.tasks import Meter
from bitspike.tasks.average_precision import AveragePrecision
from bitspike.tasks.dense import Dense


class Detection(Dense):
    """See `Task`.

    A model is called `model(images, targets)`, both in training, where it gives a dict of losses, and in evaluation, where it
    gives a list of dicts: boxes [N, 4], labels [N], scores [N] and perhaps masks. images: float [B, 3, H, W], padded to a
    multiple of 32. targets: a list of dicts, boxes [N, 4] (XYXY, pixels of the picture as resized, not moved by the padding),
    labels [N], masks [N, h, w] and "size" [2], the height and width of the picture's own part of the canvas; in evaluation a
    model may look at "size" only, for the other entries are of the stored picture. A model with a method `detect` is asked by
    that name, and gives each mask in its box, [N, 1, m, m]: it is then drawn once, in the stored picture.
    """

    def to_device(self, targets: list[Target], device: torch.device) -> list[Target]:
        """Every tensor on the device, as a plain tensor."""
        return [{name: value.as_subclass(Tensor).to(device) if isinstance(value, Tensor) else value
                 for name, value in target.items()} for target in targets]

    def forward(self, model: nn.Module, images: Tensor, targets: Any) -> Any:
        """A dict of losses, or in evaluation a list of detections, in pixels of the stored picture."""
        if model.training:
            return model(images, targets)
        detect = getattr(model, "detect", None)
        if detect is None:
            raise TypeError(f"{type(model).__name__} has no detect(images, targets); build it with bitspike.models.detection.")
        return [in_picture(one, target["size"], target["original_size"])
                for one, target in zip(detect(images, targets), targets, strict=True)]

    def loss(self, recipe: Recipe) -> Loss:
        """The sum of the model's losses."""

        def loss(images: Tensor, losses: dict[str, Tensor], targets: Any) -> Tensor:
            return torch.stack([value.float() for value in losses.values()]).sum()

        return loss

    def meter(self, recipe: Recipe, data: Dataset, device: torch.device) -> Meter:
        """box_map, box_map50, mask_map, mask_map50 and more, in percent, and n: see `AveragePrecision`."""
        return AveragePrecision(len(data.classes))

    def says(self, result: dict[str, Any], prefix: str = "") -> str:
        """
        >>> Detection().says({"box_map": 40.0, "box_map50": 60.0, "mask_map": 35.0, "mask_map50": 55.0})
        'box mAP 40.00 %, at 0.5 60.00 %, mask mAP 35.00 %, at 0.5 55.00 %'
        """
        return ", ".join(f"{kind} mAP {result[f'{prefix}{kind}_map']:.2f} %, at 0.5 {result[f'{prefix}{kind}_map50']:.2f} %"
                         for kind in ("box", "mask") if f"{prefix}{kind}_map" in result)
