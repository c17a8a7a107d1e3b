"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their published layout: Python batches, read without running any pickle code."""
from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitspike.data.splits import Arrays, DataError, Dataset, check_labels, in_memory

_CIFAR10 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
}
_CIFAR100 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple((  # noqa: SIM905 (two hundred quotes would read worse)
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail "
    "snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout "
    "tulip turtle wardrobe whale willow_tree wolf woman worm").split())


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    if shape != (0,):  # what numpy itself writes; anything else would reserve memory of the file's choice
        raise pickle.UnpicklingError(f"an array of shape {shape} before its data")
    return np.ndarray.__new__(np.ndarray, shape, "b")


class _Plain(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers and numpy arrays; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, encoding: text.encode("latin-1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a CIFAR batch has no use for")


def _read_all(folder: Path, files: dict[str, str], labels: str, classes: int) -> list[Arrays]:
    """Every batch file; one warning names those that are not the published ones. Errors: DataError."""
    parts, other = [], []
    for name, md5 in files.items():
        data = (folder / name).read_bytes()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
            other.append(name)
        parts.append(_read(folder / name, data, labels, classes))
    if other:
        warnings.warn(f"{folder}: {', '.join(other)}: MD5 differs from the published one; the run records the hash of what "
                      "it read.", stacklevel=3)
    return parts


def _read(path: Path, data: bytes, labels: str, classes: int) -> Arrays:
    """The bytes of one batch file as images [N, 3, 32, 32] and labels. Errors: DataError."""
    try:
        batch = _Plain(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path}: not a readable CIFAR batch ({error}); it has {len(data)} bytes. Unpack it again.") from None
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    found = batch.get(labels.encode()) if isinstance(batch, dict) else None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        shape = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{path}: its images are {shape}, expected uint8 (N, 3072). Unpack it again.")
    if not isinstance(found, list) or len(found) != len(pixels) or not all(isinstance(n, int) for n in found):
        raise DataError(f"{path}: expected a list {labels!r} of {len(pixels)} labels. Unpack it again.")
    y = torch.tensor(found, dtype=torch.int64)
    check_labels(y, classes, path)
    return Arrays(torch.from_numpy(np.array(pixels)).view(-1, 3, 32, 32), y)


def _folder(data_dir: Path, name: str, files: dict[str, str], archive: str) -> Path:
    for folder in (data_dir / name, data_dir):
        missing = [f for f in files if not (folder / f).is_file()]
        if not missing:
            return folder
        if len(missing) < len(files):
            raise DataError(f"{folder}: {', '.join(missing)} missing; expected {', '.join(files)}. Unpack {archive} again.")
    found = sorted(p.name for p in data_dir.iterdir())[:5] if data_dir.is_dir() else None
    state = "does not exist" if found is None else f"holds {', '.join(found)}" if found else "is empty"
    raise DataError(f"{data_dir} {state}; expected the folder {name}/ with {', '.join(files)}. Get {archive} from "
                    f"https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there: "
                    f"tar xf {archive} -C {data_dir}")


def cifar10(data_dir: Path | str) -> Dataset:
    """CIFAR-10 from `data_dir`/cifar-10-batches-py: 47,500 train, 2,500 val, 10,000 test images of 3x32x32.

    Errors: DataError for a missing, empty, incomplete or corrupt folder. A different MD5 only warns.
    """
    folder = _folder(Path(data_dir), "cifar-10-batches-py", _CIFAR10, "cifar-10-python.tar.gz")
    parts = _read_all(folder, _CIFAR10, "labels", 10)
    train = Arrays(torch.cat([p.images for p in parts[:5]]), torch.cat([p.labels for p in parts[:5]]))
    return in_memory("cifar10", CIFAR10_CLASSES, train, parts[5])


def cifar100(data_dir: Path | str) -> Dataset:
    """CIFAR-100 (fine labels) from `data_dir`/cifar-100-python; like `cifar10`."""
    folder = _folder(Path(data_dir), "cifar-100-python", _CIFAR100, "cifar-100-python.tar.gz")
    train, test = _read_all(folder, _CIFAR100, "fine_labels", 100)
    return in_memory("cifar100", CIFAR100_CLASSES, train, test)
