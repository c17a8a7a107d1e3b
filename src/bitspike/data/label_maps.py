"""Pictures with a class for every pixel: reading label maps, checking all of them, and making a `Dataset` of them."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bitspike.data.broken import Broken
from bitspike.data.errors import DataError
from bitspike.data.scenes import VOID, Scenes, Target
from bitspike.data.splits import Dataset, held_out
from bitspike.progress import counted

Pairs = list[tuple[Path, Path]]  # (picture, label map)


class MapReader(Protocol):
    """Reads one kind of label map."""

    def decode(self, path: Path) -> NDArray[np.uint8]:
        """[H, W], classes 0..K-1 and VOID. Errors: `MapError`."""
        ...

    def __call__(self, annotation: Any, height: int, width: int) -> Target:
        """See `Scenes.read`."""
        ...


class MapError(DataError):
    """A label map that cannot be used: `kind` in words that are the same for every such map, and details."""

    def __init__(self, path: Path | str, kind: str = "", details: str = "") -> None:
        # a worker process hands over nothing but the text
        super().__init__(f"{path}: {kind}{f' ({details})' if details else ''}; mend or remove it." if kind else str(path))
        self.kind, self.details = kind, details


def pixels_of(path: Path) -> NDArray[Any]:
    """The stored numbers of a PNG, [H, W] or [H, W, C]; a palette is not looked up. Errors: MapError."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except FileNotFoundError:
        raise MapError(path, "missing annotation") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise MapError(path, "unreadable annotation", str(error)) from None


def semantic(reader: MapReader, path: Path, height: int, width: int) -> Target:
    """The target of a picture of that size. Errors: MapError."""
    from torchvision import tv_tensors

    found = reader.decode(path)
    if found.shape != (height, width):
        raise MapError(path, "another size than the picture", f"{found.shape[1]} x {found.shape[0]}, not {width} x {height}")
    return {"semantic": tv_tensors.Mask(torch.from_numpy(found))}


@dataclass(frozen=True)
class IndexMaps:
    """Maps of one channel: stored numbers `first` .. first + classes - 1 are the classes, those in `void` count for nothing."""

    classes: int
    first: int = 0
    void: tuple[int, ...] = (VOID,)

    def decode(self, path: Path) -> NDArray[np.uint8]:
        """See `MapReader`."""
        stored = pixels_of(path)
        if stored.ndim != 2:
            raise MapError(path, "an annotation with colours instead of class numbers", f"{stored.shape[2]} channels")
        last = self.first + self.classes - 1
        known = np.zeros(256, bool)
        known[[*range(self.first, last + 1), *self.void]] = True
        seen = np.unique(stored)
        strange = [int(v) for v in seen if not 0 <= v < 256 or not known[int(v)]]
        if strange:
            raise MapError(path, "labels out of range", f"{strange[0]}, not {self.first}..{last}")
        table = np.full(256, VOID, np.uint8)
        table[self.first : last + 1] = np.arange(self.classes)
        return table[stored]

    def __call__(self, annotation: Any, height: int, width: int) -> Target:
        """See `Scenes.read`."""
        return semantic(self, annotation, height, width)


def _inspect(pair: tuple[Path, Path], reader: MapReader) -> tuple[MapError | None, bytes]:
    """What is wrong with a pair, if anything, and the hash of its labels."""
    from PIL import Image

    picture, path = pair
    try:
        found = reader.decode(path)
        with Image.open(picture) as image:
            size = image.height, image.width
        if found.shape != size:
            details = f"{found.shape[1]} x {found.shape[0]}, not {size[1]} x {size[0]}"
            raise MapError(path, "another size than the picture", details)
    except MapError as error:
        return error, b""
    except FileNotFoundError:
        return MapError(path, "missing picture", picture.name), b""
    except (OSError, SyntaxError, ValueError) as error:
        return MapError(path, "unreadable picture", str(error)), b""
    return None, hashlib.sha256(found.tobytes()).digest()


def segmentation(name: str, classes: Sequence[str], train: Pairs, val: Pairs | None, test: Pairs, reader: MapReader,
                 skip_broken: bool, key: Callable[[Path], str] = lambda path: path.name) -> Dataset:
    """Look at every label map, hash them, and hold out `val` where the data come without one.

    val: None takes 5 % of the training pictures. key: what a picture is called in the hash that chooses those. The hash of the
    data covers class names, file names, sizes of the pictures and all labels. Errors: DataError for broken annotations, with
    their number by kind and names, unless `skip_broken` (then a `BrokenAnnotations` warning); for a part without pictures.
    """
    parts = {"train": train, "val": val or [], "test": test}
    everything = [pair for pairs in parts.values() for pair in pairs]
    broken, digest, good = Broken(name), hashlib.sha256(repr(tuple(classes)).encode()), dict[Path, bytes]()
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        results = counted(pool.map(lambda pair: _inspect(pair, reader), everything), len(everything), f"checking {name}")
        for (picture, path), (error, labels) in zip(everything, results, strict=True):
            if error is None:
                good[picture] = labels
            else:
                broken.add(error.kind, path.name + (f" has {error.details}" if error.details else ""))
    broken.settle(len(everything), skip_broken)
    scenes = {}
    for part, pairs in parts.items():
        kept = [pair for pair in pairs if pair[0] in good]
        for picture, _ in kept:
            digest.update(f"{part} {key(picture)} {picture.stat().st_size} ".encode() + good[picture])
        scenes[part] = Scenes(tuple(p for p, _ in kept), tuple(a for _, a in kept), reader)
    for part in ("train", "test"):
        if not scenes[part]:
            raise DataError(f"{name}: its {part} part has no pictures{' with whole annotations' if broken else ''}.")
    if val is None:
        whole = scenes["train"]
        rest, chosen = held_out(torch.zeros(len(whole), dtype=torch.int64), [key(path) for path in whole.paths])
        digest.update(chosen.numpy().tobytes())
        scenes["train"], scenes["val"] = whole.take(rest), whole.take(chosen)
    return Dataset(name, tuple(classes), scenes["train"], scenes["val"], scenes["test"], digest.hexdigest())
