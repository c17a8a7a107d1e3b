"""Readers on files written here; the real CIFAR-10 where BITSPIKE_DATA has it."""
import gzip
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from bitspike.data import DataError, Frames, load
from bitspike.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES
from bitspike.data.splits import held_out

pytestmark = pytest.mark.filterwarnings("ignore:.*MD5 differs")
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_cifar10(root: Path, n: int = 40) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in BATCHES:
        batch = {b"data": random.integers(0, 256, (n, 3072), dtype=np.uint8), b"labels": [i % 10 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    raw = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_fashion(folder: Path, ending: str = ".gz") -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in (("train", 100), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", random.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", (np.arange(n) % 10).astype(np.uint8))
    return folder


# ------------------------------------------------------------------------------------------------- CIFAR
def test_cifar10_splits(tmp_path):
    folder = write_cifar10(tmp_path)
    data = load("cifar10", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (190, 10, 40)
    assert data.classes == CIFAR10_CLASSES and data.val.labels.bincount().tolist() == [1] * 10
    assert data.train.images.shape == (190, 3, 32, 32) and data.train.images.dtype == torch.uint8
    assert len(data.split("train+val")) == 200
    assert load("cifar10", folder).hash == data.hash, "the folder itself may be named too"
    with pytest.raises(DataError, match=r"no split 'dev'; allowed: 'train', 'val', 'test', 'train\+val'"):
        data.split("dev")


def test_other_pixels_have_another_hash(tmp_path):
    folder = write_cifar10(tmp_path)
    before = load("cifar10", tmp_path).hash
    path = folder / "data_batch_2"
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    batch[b"data"][3, 5] ^= 1
    path.write_bytes(pickle.dumps(batch, protocol=2))
    assert load("cifar10", tmp_path).hash != before


def test_other_md5_warns(tmp_path):
    write_cifar10(tmp_path)
    with pytest.warns(UserWarning, match="data_batch_1, .*: MD5 differs from the published one"):
        load("cifar10", tmp_path)


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        batch = {b"data": np.zeros((100, 3072), np.uint8), b"fine_labels": list(range(100)), b"coarse_labels": [0] * 100}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    data = load("cifar100", tmp_path)
    assert data.classes == CIFAR100_CLASSES and len(set(data.classes)) == 100 and len(data.test) == 100


class Evil:
    def __reduce__(self):
        return os.system, ("echo hacked",)


@pytest.mark.parametrize("content, message", [
    (pickle.dumps(Evil()), r"asks for \w+\.system, which a CIFAR batch has no use for"),
    (b"", "not a readable CIFAR batch"),
    (b"not a pickle", "not a readable CIFAR batch"),
    (pickle.dumps([1, 2], 2), "its images are NoneType, expected uint8"),
    (pickle.dumps({b"data": np.zeros((4, 3000), np.uint8), b"labels": [0] * 4}, 2), r"uint8 \(4, 3000\), expected"),
    (pickle.dumps({b"data": np.zeros((4, 3072), np.float32), b"labels": [0] * 4}, 2), "float32"),
    (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0] * 3}, 2), "expected a list 'labels' of 4 labels"),
    (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 10]}, 2), r"labels 0\.\.10, expected 0\.\.9"),
])
def test_damaged_cifar(tmp_path, content, message):
    (write_cifar10(tmp_path) / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load("cifar10", tmp_path)
    assert "data_batch_3" in str(error.value)


def test_truncated_cifar(tmp_path):
    path = write_cifar10(tmp_path) / "test_batch"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"test_batch: not a readable CIFAR batch .* it has 5000 bytes"):
        load("cifar10", tmp_path)


def test_missing_cifar(tmp_path):
    with pytest.raises(DataError, match=r"is empty; expected the folder cifar-10-batches-py/.*Get cifar-10-python.tar.gz from"):
        load("cifar10", tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist"):
        load("cifar10", tmp_path / "nowhere")
    (write_cifar10(tmp_path) / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4 missing"):
        load("cifar10", tmp_path)


def test_real_cifar10():
    root = Path(os.environ.get("BITSPIKE_DATA", "data"))
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip("no CIFAR-10 under BITSPIKE_DATA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load("cifar10", root)
    assert (len(data.train), len(data.val), len(data.test)) == (47500, 2500, 10000)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    pixels = data.split("train+val").images.float()
    assert torch.allclose(pixels.mean((0, 2, 3)) / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-3)


# --------------------------------------------------------------------------------------------- Fashion-MNIST
@pytest.mark.parametrize("folder, ending", [("fashion-mnist", ".gz"), ("FashionMNIST/raw", ""), (".", ".gz")])
def test_fashion_mnist(tmp_path, folder, ending):
    write_fashion(tmp_path / "root" / folder, ending)
    data = load("fashion_mnist", tmp_path / "root")
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 20)
    assert data.train.images.shape[1:] == (1, 28, 28)


def test_embedded_sample():
    data = load("fashion_mnist_sample", None)
    assert (len(data.train), len(data.val), len(data.test)) == (3800, 200, 1000)
    assert data.test.labels.bincount().tolist() == [100] * 10
    assert data.hash == load("fashion_mnist_sample", None).hash


def _gz(data):
    """Without the time of day, which would give each pytest worker other test names."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize("name, content, message", [
    ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08", "not a whole gzip file"),
    ("train-images-idx3-ubyte.gz", _gz(b"\0\0\x08\x03" + struct.pack(">3I", 100, 28, 28)),
     "0 bytes of data, its header"),
    ("train-labels-idx1-ubyte.gz", _gz(b"\0\0\x0d\x01aaaa"), "begins with 00 00 0d 01, expected 00 00 08 01"),
    ("train-labels-idx1-ubyte.gz", _gz(b""), "begins with nothing"),
    ("t10k-labels-idx1-ubyte.gz", _gz(b"\0\0\x08\x01" + struct.pack(">I", 20) + b"\x0b" * 20), r"labels 11\.\.11"),
    ("t10k-labels-idx1-ubyte.gz", _gz(b"\0\0\x08\x01" + struct.pack(">I", 2) + b"\0\0"), "and 2 labels"),
])
def test_damaged_fashion_mnist(tmp_path, name, content, message):
    (write_fashion(tmp_path / "fashion-mnist") / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("fashion_mnist", tmp_path)


def test_missing_fashion_mnist(tmp_path):
    with pytest.raises(DataError, match=r"is empty; expected the folder fashion-mnist/.*data=fashion_mnist_sample"):
        load("fashion_mnist", tmp_path)
    (write_fashion(tmp_path / "fashion-mnist") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.*missing"):
        load("fashion_mnist", tmp_path)


# ------------------------------------------------------------------------------------------------- ImageNet
def test_imagenet_layout(tmp_path, write_imagenet):
    write_imagenet(tmp_path / "imagenet")
    data = load("imagenet", tmp_path)
    assert data.classes == ("n01", "n02") and (len(data.train), len(data.val), len(data.test)) == (10, 2, 4)
    assert data.test.image(0).shape == (3, 24, 24) and data.test.image(1).shape == (3, 25, 24)
    assert len(data.split("train+val")) == 12


def test_imagenet_errors(tmp_path, write_imagenet):
    with pytest.raises(DataError, match="found nothing; expected train/<class>/<image>"):
        load("imagenet", tmp_path)
    write_imagenet(tmp_path)
    broken = tmp_path / "val" / "n01" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"n01/0\.png: cannot be read as an image"):
        load("imagenet", tmp_path).test.image(0)
    (tmp_path / "train" / "n03").mkdir()
    with pytest.raises(DataError, match="train/ and val/ name different classes, for example 'n03'"):
        load("imagenet", tmp_path)
    (tmp_path / "val" / "n03").mkdir()
    with pytest.raises(DataError, match="n03: no images"):
        load("imagenet", tmp_path)


# --------------------------------------------------------------------------------------------------- splits
def test_unknown_dataset(monkeypatch):
    with pytest.raises(DataError, match=r"how many frames are made of one \(frames=10\)"):
        load("cifar10_dvs", "somewhere")
    with pytest.raises(DataError, match="cifar10 holds pictures, no recordings"):
        load("cifar10", "somewhere", Frames(10, (32, 32)))
    with pytest.raises(DataError, match="unknown dataset 'cifar'; allowed: cifar10, cifar100"):
        load("cifar", None)
    monkeypatch.delenv("BITSPIKE_DATA", raising=False)
    with pytest.raises(DataError, match="--data DIR or set BITSPIKE_DATA"):
        load("cifar10", None)


def test_held_out_ignores_the_order_of_files():
    names = [f"{c}/{i}" for c in range(3) for i in range(30)]
    labels = torch.arange(3).repeat_interleave(30)
    back = torch.arange(89, -1, -1)
    one = {names[i] for i in held_out(labels, names)[1].tolist()}
    other = [names[i] for i in back.tolist()]
    assert one == {other[i] for i in held_out(labels[back], other)[1].tolist()} and len(one) == 6
