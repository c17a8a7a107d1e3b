"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT licence): idx files, and the sample that ships with the package."""
from __future__ import annotations

import gzip
import struct
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitspike.data.splits import Arrays, DataError, Dataset, check_labels, in_memory

CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_idx(path: Path, axes: int) -> Tensor:
    """An idx file (or .gz) of unsigned bytes with that many axes. Errors: DataError."""
    raw = path.read_bytes()
    try:
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); it has {len(raw)} bytes. Fetch it again.") from None
    head = 4 + 4 * axes
    if len(data) < head or data[:4] != bytes((0, 0, 8, axes)):
        raise DataError(f"{path}: begins with {data[:4].hex(' ') or 'nothing'}, expected 00 00 08 {axes:02x} "
                        f"(an idx file of bytes with {axes} axes).")
    shape = struct.unpack(f">{axes}I", data[4:head])
    size = 1
    for extent in shape:
        size *= extent
    if len(data) - head != size:
        raise DataError(f"{path}: {len(data) - head} bytes of data, its header says {' x '.join(map(str, shape))} = {size}. "
                        "Fetch it again.")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=head).copy()).view(shape)


def _pair(folder: Path, images: str, labels: str) -> Arrays:
    x_path, y_path = (next(p for p in (folder / n, folder / f"{n}.gz") if p.is_file()) for n in (images, labels))
    x, y = read_idx(x_path, 3), read_idx(y_path, 1).long()
    if x.shape[1:] != (28, 28) or len(x) != len(y):
        raise DataError(f"{x_path}: images {tuple(x.shape)} and {len(y)} labels, expected (N, 28, 28) and N.")
    check_labels(y, len(CLASSES), y_path)
    return Arrays(x[:, None], y)


def _read(name: str, folder: Path) -> Dataset:
    return in_memory(name, CLASSES, _pair(folder, *_FILES[:2]), _pair(folder, *_FILES[2:]))


def fashion_mnist(data_dir: Path | str) -> Dataset:
    """Fashion-MNIST from `data_dir`/fashion-mnist (or `data_dir` itself, or torchvision's FashionMNIST/raw).

    57,000 train, 3,000 val, 10,000 test images of 1x28x28. Errors: DataError.
    """
    root = Path(data_dir)
    for folder in (root / "fashion-mnist", root / "FashionMNIST" / "raw", root):
        missing = [n for n in _FILES if not (folder / n).is_file() and not (folder / f"{n}.gz").is_file()]
        if not missing:
            return _read("fashion_mnist", folder)
        if len(missing) < len(_FILES):
            raise DataError(f"{folder}: {', '.join(missing)}[.gz] missing; expected {', '.join(_FILES)}.")
    state = "does not exist" if not root.is_dir() else "is empty" if not any(root.iterdir()) else "holds none of them"
    raise DataError(f"{root} {state}; expected the folder fashion-mnist/ with {', '.join(_FILES)} (.gz or not). Get them "
                    "from https://github.com/zalandoresearch/fashion-mnist (data/fashion) and put them in "
                    f"{root / 'fashion-mnist'}. A sample needs no download: data=fashion_mnist_sample.")


def fashion_mnist_sample() -> Dataset:
    """The embedded sample: 3,800 train, 200 val, 1,000 test images, balanced.

    Not the official split: accuracy on it is not comparable with published figures.

    >>> len(fashion_mnist_sample().train)
    3800
    """
    with resources.as_file(resources.files("bitspike.data") / "fashion_mnist_sample") as folder:
        return _read("fashion_mnist_sample", folder)
