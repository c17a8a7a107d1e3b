"""What every dataset here is: named classes and three fixed, hashed splits of uint8 images."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitspike.data.errors import DataError

VAL_SHARE = 0.05


class Split(Protocol):
    """Images, or recordings as event frames, with labels."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """uint8 [C, H, W], as stored (images of a folder differ in size); a recording's frames: [T, 2, H, W]."""
        ...

    def take(self, indices: Tensor) -> Split:
        """The samples at `indices` (int64 [M]), in that order."""
        ...

    def joined(self, other: Split) -> Split:
        """Both splits as one. Errors: DataError if they are of different kinds."""
        ...


def _kinds_differ() -> DataError:
    return DataError("a split in memory and a split on disk cannot be joined.")


@dataclass(frozen=True)
class Arrays:
    """A split held in memory. images: uint8 [N, C, H, W], or sequences [N, T, C, H, W]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """uint8 [C, H, W] or [T, C, H, W]."""
        return self.images[index]

    def take(self, indices: Tensor) -> Arrays:
        """See `Split`."""
        return Arrays(self.images[indices], self.labels[indices])

    def joined(self, other: Split) -> Arrays:
        """See `Split`."""
        if not isinstance(other, Arrays):
            raise _kinds_differ()
        return Arrays(torch.cat([self.images, other.images]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class Files:
    """A split that stays on disk, one file an image."""

    paths: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """Decoded RGB, uint8 [3, H, W]. Errors: DataError naming the file."""
        import numpy as np
        from PIL import Image

        try:
            with Image.open(self.paths[index]) as picture:
                pixels = np.array(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{self.paths[index]}: cannot be read as an image ({error}); replace or remove it.") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def take(self, indices: Tensor) -> Files:
        """See `Split`."""
        return Files(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices])

    def joined(self, other: Split) -> Files:
        """See `Split`."""
        if not isinstance(other, Files):
            raise _kinds_differ()
        return Files(self.paths + other.paths, torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class Dataset:
    """Three splits; `val` is a fixed share of the published training set, `test` is reported once.

    hash: sha256 over the decoded images, the labels and the indices of `val`. events: of recordings only, what a
    device must know to make the same frames: sensor [height, width], layout (see `bitspike.data.events.read`) and window_us,
    how long a frame lasts, where all last as long.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    hash: str
    events: Mapping[str, Any] | None = None

    def split(self, name: str) -> Split:
        """"train", "val", "test" or "train+val". Errors: DataError for any other name.

        >>> a = Arrays(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> len(Dataset("x", ("a", "b"), a, a, a, "").split("train+val"))
        4
        """
        if name == "train+val":
            return self.train.joined(self.val)
        if name not in ("train", "val", "test"):
            raise DataError(f"{self.name} has no split {name!r}; allowed: 'train', 'val', 'test', 'train+val'.")
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def held_out(labels: Tensor, names: Sequence[str] | None = None, share: float = VAL_SHARE) -> tuple[Tensor, Tensor]:
    """(train indices, val indices): of each class, the `share` of samples with the smallest sha256 of their name.

    names: one a sample; default its index. The same samples on every machine, in any order of the files.

    >>> train, val = held_out(torch.arange(100) % 2)
    >>> len(train), len(val), sorted(set((torch.arange(100) % 2)[val].tolist()))
    (94, 6, [0, 1])
    """
    keys = [hashlib.sha256(f"bitspike val {i if names is None else names[i]}".encode()).digest() for i in range(len(labels))]
    chosen: list[int] = []
    for c in torch.unique(labels).tolist():
        members = torch.nonzero(labels == c).flatten().tolist()
        members.sort(key=keys.__getitem__)
        chosen += members[: math.ceil(len(members) * share)] if len(members) > 1 else []
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[chosen] = True
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()


def in_memory(name: str, classes: Sequence[str], train: Arrays, test: Arrays) -> Dataset:
    """Hold out `val` and hash everything."""
    rest, val = held_out(train.labels)
    digest = hashlib.sha256()
    for tensor in (train.images, train.labels, test.images, test.labels, val):
        digest.update(tensor.contiguous().numpy().data)
    return Dataset(name, tuple(classes), train.take(rest), train.take(val), test, digest.hexdigest())


def check_labels(labels: Tensor, classes: int, where: Path) -> None:
    """Errors: DataError for a label outside 0..classes-1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise DataError(f"{where}: labels {int(labels.min())}..{int(labels.max())}, expected 0..{classes - 1}; "
                        "the file is not what its name says.")
