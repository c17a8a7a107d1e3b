"""Pictures on disk whose target is more than a number: a class for every pixel, or a list of objects."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitspike.data.errors import DataError
from bitspike.data.splits import Files, Split

#: Segmentation: "semantic", a `tv_tensors.Mask` uint8 [H, W] of classes, VOID where nothing counts.
#: Detection: "boxes" `tv_tensors.BoundingBoxes` float32 [N, 4] (XYXY, pixels), "labels" int64 [N], "masks" `tv_tensors.Mask`
#: uint8 [N, H, W], and what else has one entry an object ("iscrowd", "area"); other entries go through unchanged ("image_id").
#: In training "draw", a seed of this picture in this epoch for what a model draws of it.
Target = dict[str, Any]

#: the class of pixels that neither train nor count
VOID = 255


@dataclass(frozen=True)
class Scenes:
    """A split of pictures with such targets. `Split` but for `labels`, which it has not.

    annotations: one a picture, whatever `read` takes. read: (annotation, height, width of the picture) -> `Target`; a function
    of a module or an instance of a class there, since worker processes call it. Errors of `read`: DataError.
    """

    paths: tuple[Path, ...]
    annotations: tuple[Any, ...] = field(repr=False)
    read: Callable[[Any, int, int], Target]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> Tensor:
        """Errors: DataError, always."""
        raise DataError("these pictures have no class each: their targets are maps or boxes. What was asked for works on data "
                        "of classification only.")

    def image(self, index: int) -> Tensor:
        """Decoded RGB, uint8 [3, H, W]. Errors: DataError naming the file."""
        return Files(self.paths, torch.empty(0)).image(index)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width), from the file's header alone. Errors: DataError naming the file."""
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as picture:
                return picture.height, picture.width
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.paths[index]}: cannot be read as an image ({error}); replace or remove it.") from error

    def target(self, index: int, height: int, width: int) -> Target:
        """What is in picture `index`, whose size is given. Errors: DataError naming the annotation."""
        return self.read(self.annotations[index], height, width)

    def take(self, indices: Tensor) -> Scenes:
        """See `Split`."""
        chosen = indices.tolist()
        return Scenes(tuple(self.paths[i] for i in chosen), tuple(self.annotations[i] for i in chosen), self.read)

    def joined(self, other: Split) -> Scenes:
        """See `Split`."""
        if not isinstance(other, Scenes) or other.read != self.read:
            raise DataError("these two splits hold targets of different kinds and cannot be joined.")
        return Scenes(self.paths + other.paths, self.annotations + other.annotations, self.read)
