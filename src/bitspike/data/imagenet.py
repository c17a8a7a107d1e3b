"""ImageNet layout: train/<class>/<image> and val/<class>/<image>."""
from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from bitspike.data.splits import DataError, Dataset, Files, held_out

_ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


def _scan(folder: Path, classes: list[str]) -> Files:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in _ENDINGS)
        if not images:
            raise DataError(f"{folder / name}: no images ({', '.join(_ENDINGS)}); every class folder needs some.")
        paths += images
        labels += [label] * len(images)
    return Files(tuple(paths), torch.tensor(labels))


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def imagenet(data_dir: Path | str) -> Dataset:
    """Any set of images in ImageNet's folder layout, from `data_dir`/imagenet or `data_dir` itself.

    `test` is the published val/ folder; `val` is 5 % of train/. The hash covers class names, file names and sizes, not
    the pixels (150 GB). Classes are named by their folders. Errors: DataError.
    """
    root = Path(data_dir)
    folder = next((f for f in (root / "imagenet", root) if (f / "train").is_dir() and (f / "val").is_dir()), None)
    if folder is None:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing" if root.is_dir() else "no such folder"
        raise DataError(f"{root}: found {found}; expected train/<class>/<image> and val/<class>/<image>, there or in "
                        "imagenet/. Get ILSVRC 2012 from https://image-net.org and sort val into one folder per class.")
    classes = _classes(folder / "train")
    if not classes:
        raise DataError(f"{folder / 'train'}: no class folders; expected one folder per class, with its images.")
    extra = sorted(set(_classes(folder / "val")) ^ set(classes))
    if extra:
        raise DataError(f"{folder}: train/ and val/ name different classes, for example {extra[0]!r}; "
                        f"train has {len(classes)}, val {len(_classes(folder / 'val'))}.")
    train, test = _scan(folder / "train", classes), _scan(folder / "val", classes)
    rest, val = held_out(train.labels, [f"{p.parent.name}/{p.name}" for p in train.paths])
    digest = hashlib.sha256()
    for path in (*train.paths, *test.paths):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
    digest.update(val.numpy().data)
    return Dataset("imagenet", tuple(classes), train.take(rest), train.take(val), test, digest.hexdigest())
