"""What every dataset here is: named classes and three fixed, hashed splits of uint8 images."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

VAL_SHARE = 0.05


class DataError(ValueError):
    """A dataset that is missing, incomplete or corrupt: says what was found, what is expected and what to do."""


class Split(Protocol):
    """Images with labels. `labels`: int64 [N]."""

    labels: Tensor

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """uint8 [C, H, W], as stored (images of a folder differ in size)."""
        ...


@dataclass(frozen=True)
class Arrays:
    """A split held in memory. images: uint8 [N, C, H, W]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """uint8 [C, H, W]."""
        return self.images[index]


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


@dataclass(frozen=True)
class Dataset:
    """Three splits; `val` is a fixed share of the published training set, `test` is reported once.

    hash: sha256 over the decoded images, the labels and the indices of `val`.
    """

    name: str
    classes: tuple[str, ...]
    train: Arrays | Files
    val: Arrays | Files
    test: Arrays | Files
    hash: str

    def split(self, name: str) -> Arrays | Files:
        """"train", "val", "test" or "train+val". Errors: DataError for any other name.

        >>> a = Arrays(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> len(Dataset("x", ("a", "b"), a, a, a, "").split("train+val"))
        4
        """
        if name == "train+val":
            return concatenate(self.train, self.val)
        if name not in ("train", "val", "test"):
            raise DataError(f"{self.name} has no split {name!r}; allowed: 'train', 'val', 'test', 'train+val'.")
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def concatenate(first: Arrays | Files, second: Arrays | Files) -> Arrays | Files:
    """Both splits as one."""
    labels = torch.cat([first.labels, second.labels])
    if isinstance(first, Arrays) and isinstance(second, Arrays):
        return Arrays(torch.cat([first.images, second.images]), labels)
    if isinstance(first, Files) and isinstance(second, Files):
        return Files(first.paths + second.paths, labels)
    raise DataError("a split in memory and a split on disk cannot be joined.")


def take(whole: Arrays | Files, indices: Tensor) -> Arrays | Files:
    """The samples at `indices` (int64 [M]), in that order."""
    if isinstance(whole, Arrays):
        return Arrays(whole.images[indices], whole.labels[indices])
    return Files(tuple(whole.paths[i] for i in indices.tolist()), whole.labels[indices])


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
    return Dataset(name, tuple(classes), take(train, rest), take(train, val), test, digest.hexdigest())


def check_labels(labels: Tensor, classes: int, where: Path) -> None:
    """Errors: DataError for a label outside 0..classes-1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise DataError(f"{where}: labels {int(labels.min())}..{int(labels.max())}, expected 0..{classes - 1}; "
                        "the file is not what its name says.")
