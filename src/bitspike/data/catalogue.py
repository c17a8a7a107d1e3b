"""Which datasets there are, by the names that recipes use."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bitspike.data.cifar import cifar10, cifar100
from bitspike.data.coco import coco, coco_overfit
from bitspike.data.errors import DataError
from bitspike.data.event_sets import READERS as _EVENTS
from bitspike.data.events.framing import Frames
from bitspike.data.fashion_mnist import fashion_mnist, fashion_mnist_sample
from bitspike.data.imagenet import imagenet
from bitspike.data.segmentation_sets import READERS as _SEGMENTATION
from bitspike.data.splits import Dataset

_READERS = {"cifar10": cifar10, "cifar100": cifar100, "fashion_mnist": fashion_mnist, "imagenet": imagenet}

#: pictures with targets for every pixel or object: (data_dir, skip_broken) -> Dataset
_SCENES: dict[str, Callable[[Path | str, bool], Dataset]] = {"coco": coco, "coco_overfit": coco_overfit, **_SEGMENTATION}

#: every name that `load` takes
NAMES = (*_READERS, "fashion_mnist_sample", *_EVENTS, *_SCENES)


def load(name: str, data_dir: Path | str | None, frames: Frames | None = None, skip_broken: bool = False) -> Dataset:
    """The dataset of that name; `data_dir` holds its folder, by default the environment variable BITSPIKE_DATA says where.

    frames: how recordings of an event camera become sequences [T, 2, H, W]; needed for those data sets only. skip_broken: leave
    out pictures whose annotations are broken; without it they are an error. Of no effect where there are no annotations.

    Errors: DataError for an unknown name, a missing folder or damaged files.

    >>> load("fashion_mnist_sample", None).classes[:2]
    ('T-shirt/top', 'trouser')
    """
    if name not in NAMES:
        raise DataError(f"unknown dataset {name!r}; allowed: {', '.join(NAMES)}.")
    if frames is not None and name not in _EVENTS:
        raise DataError(f"{name} holds pictures, no recordings: frames must not be set. Recordings: {', '.join(_EVENTS)}.")
    if name == "fashion_mnist_sample":
        return fashion_mnist_sample()
    data_dir = data_dir or os.environ.get("BITSPIKE_DATA")
    if not data_dir:
        raise DataError(f"{name} is read from a folder: say which with --data DIR or set BITSPIKE_DATA.")
    if name in _SCENES:
        return _SCENES[name](data_dir, skip_broken)
    if name not in _EVENTS:
        return _READERS[name](data_dir)
    if frames is None:
        raise DataError(f"{name} holds recordings of events: the recipe must say how many frames are made of one (frames=10).")
    return _EVENTS[name](data_dir, frames)
