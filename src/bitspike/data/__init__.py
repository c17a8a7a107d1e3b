"""Datasets: `load(name, data_dir)` -> classes and three fixed, hashed splits. Nothing is ever downloaded."""
from __future__ import annotations

import os
from pathlib import Path

from bitspike.data.cifar import cifar10, cifar100
from bitspike.data.fashion_mnist import fashion_mnist, fashion_mnist_sample
from bitspike.data.imagenet import imagenet
from bitspike.data.splits import Arrays, DataError, Dataset, Files

__all__ = ["Arrays", "DataError", "Dataset", "Files", "load"]

_READERS = {"cifar10": cifar10, "cifar100": cifar100, "fashion_mnist": fashion_mnist, "imagenet": imagenet}


def load(name: str, data_dir: Path | str | None) -> Dataset:
    """The dataset of that name; `data_dir` holds its folder, by default the environment variable BITSPIKE_DATA says where.

    Errors: DataError for an unknown name, a missing folder or damaged files.

    >>> load("fashion_mnist_sample", None).classes[:2]
    ('T-shirt/top', 'trouser')
    """
    if name == "fashion_mnist_sample":
        return fashion_mnist_sample()
    if name == "cifar10_dvs":
        raise DataError("cifar10_dvs: training on event recordings is not built yet; no split of it can be loaded.")
    if name not in _READERS:
        raise DataError(f"unknown dataset {name!r}; allowed: {', '.join(_READERS)}, fashion_mnist_sample.")
    data_dir = data_dir or os.environ.get("BITSPIKE_DATA")
    if not data_dir:
        raise DataError(f"{name} is read from a folder: say which with --data DIR or set BITSPIKE_DATA.")
    return _READERS[name](data_dir)
