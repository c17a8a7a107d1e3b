"""Data sets of event cameras: publishers' archives and folders, splits, caches, frames in the training pipeline."""
from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitspike.data import DataError, Frames, Recordings, event_cache, event_sets, frame_cache, load, recordings
from bitspike.data.archives import Store
from bitspike.data.events import EventError, events, write
from bitspike.data.loader import FileBatches, evaluation_batches
from bitspike.data.pipeline import ArrayBatches, Augment
from bitspike.papers import all_recipes

FRAMES = Frames(4, (17, 17))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def some(seed: int, size: tuple[int, int] = (34, 34), number: int = 60, span: int = 9000) -> np.ndarray:
    random = np.random.default_rng(seed)
    return events(np.sort(random.integers(0, span, number)), random.integers(0, size[1], number),
                  random.integers(0, size[0], number), random.integers(0, 2, number))


def file(data: np.ndarray, format: str, folder: Path) -> bytes:
    path = folder / "one"
    write(path, data, format)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSPIKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(event_sets, "_MD5", {})


@pytest.fixture
def n_mnist(tmp_path: Path) -> Path:
    """Twelve training digits and four test digits, in two zips as published."""
    folder = tmp_path / "data" / "n-mnist"
    folder.mkdir(parents=True)
    for part, number in (("Train", 12), ("Test", 4)):
        with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(number):
                archive.writestr(f"{part}/{i % 2}/{i:05d}.bin", file(some(i), "nmnist", tmp_path))
    return tmp_path / "data"


def test_n_mnist_zipped_and_unpacked(n_mnist: Path, tmp_path: Path):
    with pytest.warns(UserWarning, match="12 recordings for training, 60000 were published"):
        zipped = load("n_mnist", n_mnist, FRAMES)
    for part in ("Train", "Test"):
        with zipfile.ZipFile(n_mnist / "n-mnist" / f"{part}.zip") as archive:
            archive.extractall(tmp_path / "unpacked" / "n-mnist")
    unpacked = load("n_mnist", tmp_path / "unpacked", FRAMES)
    assert zipped.hash == unpacked.hash and zipped.classes == ("0", "1")
    assert [len(zipped.split(s)) for s in ("train", "val", "test")] == [10, 2, 4]
    assert torch.equal(zipped.train.images, unpacked.train.images)
    first = zipped.test.image(0)  # 00000.bin: pooled from 34 to 17 pixels, 15 events in each of 4 frames
    assert first.shape == (4, 2, 17, 17) and first.sum((1, 2, 3)).tolist() == [15] * 4
    data = some(0)[15:30]
    assert int(first[1, data["p"][0], data["y"][0] // 2, data["x"][0] // 2]) >= 1
    assert load("n_mnist", n_mnist, Frames(4, (34, 34))).hash != zipped.hash


def test_published_checksums(n_mnist: Path, monkeypatch):
    monkeypatch.setattr(event_sets, "_MD5", {"Train.zip": "0" * 32})
    with pytest.raises(DataError, match=r"Train\.zip: its MD5 is [0-9a-f]{32}, that of the published archive 0000"):
        load("n_mnist", n_mnist, FRAMES)


def test_damaged_archives_and_recordings(n_mnist: Path, tmp_path: Path):
    path = n_mnist / "n-mnist" / "Test.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"Test\.zip: not a whole archive"):
        load("n_mnist", n_mnist, FRAMES)
    path.write_bytes(whole.replace(whole[60:70], b"\xff" * 10))
    with pytest.raises(DataError, match=r"Test\.zip: .* cannot be unpacked|Test\.zip: not a whole"):
        load("n_mnist", n_mnist, FRAMES)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Test/0/00001.bin", file(some(1), "nmnist", tmp_path)[:-3])
    with pytest.raises(DataError, match=r"00001\.bin at byte 295: 2 bytes are left"):
        load("n_mnist", n_mnist, FRAMES)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_damaged_anywhere(method: int, tmp_path: Path):
    """Whatever byte is damaged, in names or in any compression: the same content, or DataError."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("Train/ä/0.bin", file(some(0), "nmnist", tmp_path))
    raw, random = path.read_bytes(), np.random.default_rng(method)
    whole = dict(Store([path]).walk(["Train/ä/0.bin"]))
    refused = 0
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ int(random.choice([1, 8, 128, 255]))]) + raw[at + 1:])
        try:
            store = Store([path])
            assert all(content == whole["Train/ä/0.bin"] for _, content in store.walk(store.names))
        except DataError:
            refused += 1
    assert refused > len(raw) // 2


def test_nothing_is_downloaded(tmp_path: Path):
    for name in event_sets.READERS:
        with pytest.raises(DataError, match=r"Nothing is downloaded here: get|is no folder"):
            load(name, tmp_path / "none", FRAMES)
    with pytest.raises(DataError, match=r"get airplane\.zip, .* from https://figshare.* unpacked or not"):
        load("cifar10_dvs", tmp_path, FRAMES)


def gesture_archive(folder: Path, tmp_path: Path, packed: str = "w:gz") -> None:
    with tarfile.open(folder / "DvsGesture.tar.gz", packed) as tar:
        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"DvsGesture/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for user in ("user01", "user02", "user24"):
            add(f"{user}_led.aedat", file(some(3, (128, 128), 500, 10_000), "aedat3", tmp_path))
            add(f"{user}_led_labels.csv", b"class,startTime_usec,endTime_usec\n1,0,5000\n11,5000,9000\n2,9000,9900\n")
        add("trials_to_train.txt", b"user01_led.aedat\nuser02_led.aedat\n")
        add("trials_to_test.txt", b"user24_led.aedat\n")


def test_dvs_gesture(tmp_path: Path):
    folder = tmp_path / "dvs-gesture"
    folder.mkdir()
    gesture_archive(folder, tmp_path)
    data = load("dvs_gesture", tmp_path, Frames(4, (32, 32)))
    assert len(data.classes) == 11 and len(data.split("train+val")) == 6 and data.test.labels.tolist() == [0, 10, 1]
    inside = some(3, (128, 128), 500, 10_000)["t"]
    assert [int(data.test.image(i).sum()) for i in range(3)] == [
        int(((inside >= a) & (inside < b)).sum()) for a, b in ((0, 5000), (5000, 9000), (9000, 9900))]


@pytest.mark.parametrize("recipe", ["q_snn.dvs_gesture_vgg", "spike_hq.dvs_gesture"])
def test_gesture_recipes_train_from_the_archive_as_published(recipe: str, tmp_path: Path, monkeypatch):
    folder = tmp_path / "dvs-gesture"
    folder.mkdir()
    gesture_archive(folder, tmp_path)
    made = all_recipes()[recipe].event_frames()
    assert made is not None and made.augment
    data = load("dvs_gesture", tmp_path, made)
    plain = load("dvs_gesture", tmp_path, Frames(made.steps, made.size, made.by))
    assert isinstance(data.train, Recordings) and data.hash == plain.hash
    assert all(torch.equal(data.train.image(i), plain.train.image(i)) for i in range(len(data.train)))
    assert torch.equal(data.train.augmented(0, 5)[0], data.train.augmented(0, 5)[0])
    # a clip that is gone is decoded again, the others are not touched; a damaged one is told
    (cache,) = (tmp_path / "cache").glob("dvs_gesture-events-*")
    kept = {p: p.stat().st_mtime_ns for p in cache.glob("*.npz")}
    gone, *_ = sorted(kept)
    gone.unlink()
    load("dvs_gesture", tmp_path, made)
    assert gone.is_file() and all(p.stat().st_mtime_ns == at for p, at in kept.items() if p != gone)
    raw = bytearray(gone.read_bytes())
    raw[200] ^= 1
    gone.write_bytes(raw)
    with pytest.raises(DataError):
        [data.split("train+val").image(i) for i in range(6)]
    monkeypatch.setattr(event_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    gone.unlink()
    with pytest.raises(DataError, match=r"GB of events would be kept there for event_augment, 0\.0 GB are free"):
        load("dvs_gesture", tmp_path, made)


def test_cifar10_dvs_splits_by_name(tmp_path: Path):
    folder = tmp_path / "cifar10-dvs"
    folder.mkdir()
    content = file(some(0, (128, 128)), "aedat2", tmp_path)
    for c in event_sets.CIFAR10_CLASSES:
        with zipfile.ZipFile(folder / f"{c}.zip", "w") as archive:
            for i in range(12):
                archive.writestr(f"{c}/cifar10_{c}_{i}.aedat", content)
    data = load("cifar10_dvs", tmp_path, Frames(2, (48, 48)))
    assert torch.bincount(data.split("train+val").labels).tolist() == [11] * 10
    assert torch.bincount(data.test.labels).tolist() == [1] * 10
    assert data.events == {"sensor": [128, 128], "layout": "cifar10-dvs", "window_us": None}


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_n_caltech101_zip_in_zip(packing: int, tmp_path: Path):
    folder = tmp_path / "n-caltech101"
    folder.mkdir()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for c in ("accordion", "airplanes"):
            for i in range(10):
                archive.writestr(f"Caltech101/{c}/image_{i:04d}.bin", file(some(i, (180, 240)), "nmnist", tmp_path))
    with zipfile.ZipFile(folder / "N-Caltech101-archive.zip", "w", packing) as archive:
        archive.writestr("Caltech101.zip", inner.getvalue())
        archive.writestr("Caltech101_annotations.zip", b"PK\5\6" + bytes(18))
        archive.writestr("ReadMe.txt", "text")
    data = load("n_caltech101", tmp_path, Frames(2, (45, 60)))
    assert data.classes == ("accordion", "airplanes") and torch.bincount(data.test.labels).tolist() == [1, 1]
    again = load("n_caltech101", tmp_path, Frames(2, (45, 60)))
    assert again.hash == data.hash and data.train.images.sum() == 16 * 60
    # one recording of an archive that is packed twice cannot be read without all before it
    assert Store([folder / "N-Caltech101-archive.zip"]).fast == (packing == zipfile.ZIP_STORED)
    changed = load("n_caltech101", tmp_path, Frames(2, (45, 60), augment="roll=0"))
    assert torch.equal(changed.train.augmented(3, 0)[0], data.train.images[3])
    # the publisher's archive unpacked, what is in it not
    with zipfile.ZipFile(folder / "N-Caltech101-archive.zip") as archive:
        archive.extractall(tmp_path / "unpacked" / "N-Caltech101-archive")
    assert load("n_caltech101", tmp_path / "unpacked", Frames(2, (45, 60))).train.images.sum() == 16 * 60
    with pytest.raises(DataError, match=r"get Caltech101\.zip or N-Caltech101-archive\.zip from .* and put it into .*101,"):
        load("n_caltech101", tmp_path / "nothing", FRAMES)


@pytest.mark.parametrize("split", [True, False])
def test_folder_per_class(split: bool, tmp_path: Path):
    for part in ("train", "test") if split else ("",):
        for c in ("cat", "dog"):
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(10):
                write(tmp_path / part / c / f"{i}.npz", some(i), "npz")
    data = load("events_folder", tmp_path, Frames(3, (10, 12), "time"))
    assert data.classes == ("cat", "dog") and len(data.test) == (20 if split else 2)
    assert data.train.image(0).shape == (3, 2, 10, 12) and data.events["sensor"] == [34, 34]
    (tmp_path / "extra" / "deep").mkdir(parents=True)
    write(tmp_path / "extra" / "deep" / "1.npz", some(1), "npz")  # neither split nor class
    assert load("events_folder", tmp_path, Frames(3, (10, 12), "time")).hash == data.hash
    whole = some(3)
    odd = np.concatenate([whole, whole[-1:]]).astype(whole.dtype)
    odd["x"][-1] = 900
    write(tmp_path / ("train" if split else "") / "cat" / "3.npz", odd, "npz")
    with pytest.raises(DataError, match=r"cat.3\.npz: an event at x=900, where all but 1 of .* have x below 3\d"):
        load("events_folder", tmp_path, Frames(3, (10, 12), "time"))
    (tmp_path / "half" / "train" / "cat").mkdir(parents=True)
    write(tmp_path / "half" / "train" / "cat" / "1.npz", some(1), "npz")
    with pytest.raises(DataError, match=r"holds train/CLASS/recording alone; both are needed"):
        load("events_folder", tmp_path / "half", FRAMES)
    with pytest.raises(DataError, match="is no folder; expected CLASS/recording in it"):
        load("events_folder", tmp_path / "none", FRAMES)
    (tmp_path / "lonely").mkdir()
    (tmp_path / "lonely" / "cat").mkdir()
    write(tmp_path / "lonely" / "cat" / "1.npy", some(1), "npy")
    with pytest.raises(DataError, match=r"one class folder \(cat\)"):
        load("events_folder", tmp_path / "lonely", FRAMES)


def test_windows_of_the_two_sessions(tmp_path: Path):
    for session in (1, 2):
        (tmp_path / f"session{session}").mkdir()
        for c in event_sets.OBJECTS:
            data = some(session, (128, 128), 300, 2_000_000)
            data["t"][[0, -1]] = 0, 2_000_000
            write(tmp_path / f"session{session}" / f"{c}.aedat", data, "aedat2")
    found = load("dvs128_objects", tmp_path, Frames(10, (32, 32), "time"))
    assert len(found.split("train+val")) == 5 * 7 and len(found.test) == 5 * 4 and found.events["window_us"] == 50_000
    data["t"] -= 500_000  # the second window of the last object
    assert int(found.test.image(17).sum()) == int(((data["t"] >= 0) & (data["t"] < 500_000)).sum())
    assert int(found.test.image(17)[3].sum()) == int(((data["t"] >= 150_000) & (data["t"] < 200_000)).sum())
    (tmp_path / "session2" / "caneca.aedat").unlink()
    with pytest.raises(DataError, match=r"session2/caneca\.aedat is missing"):
        load("dvs128_objects", tmp_path, FRAMES)


# ---------------------------------------------------------------------------------------------------- cache
def count_files(monkeypatch, stop_after: int | None = None) -> list[str]:
    read: list[str] = []
    original = Recordings.events

    def counted(self, content: bytes, name: str) -> np.ndarray:
        if stop_after is not None and len(read) == stop_after:
            raise KeyboardInterrupt
        read.append(name)
        return original(self, content, name)

    monkeypatch.setattr(Recordings, "events", counted)
    return read


def test_cache_goes_on_after_an_interruption(n_mnist: Path, tmp_path: Path, monkeypatch):
    expected = load("n_mnist", n_mnist, FRAMES)
    monkeypatch.setattr(recordings, "IN_MEMORY", 0)
    monkeypatch.setattr(frame_cache, "_EVERY", 3)
    with monkeypatch.context() as patch:
        count_files(patch, 7)
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="the frames of 6 recordings are kept"):
            load("n_mnist", n_mnist, FRAMES)
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / "frames.npy").exists() and not (folder / "whole.json").exists()
    # six files are noted; what was written of the seventh, Train/0/00006.bin or sample 7, is not trusted but made again
    partial = np.lib.format.open_memmap(folder / "frames.npy.partial", "r+")
    assert partial[7].any()
    partial[7] = 99
    partial.flush()
    with monkeypatch.context() as patch:
        read = count_files(patch)
        found = load("n_mnist", n_mnist, FRAMES)
        assert len(read) == 10
    assert found.hash == expected.hash and torch.equal(found.train.images, expected.train.images)
    with monkeypatch.context() as patch:
        assert not count_files(patch)
        assert load("n_mnist", n_mnist, FRAMES).hash == expected.hash


def test_cache_is_not_trusted_blindly(n_mnist: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(recordings, "IN_MEMORY", 0)
    monkeypatch.setattr(frame_cache, "_EVERY", 2)
    with monkeypatch.context() as patch:
        count_files(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            load("n_mnist", n_mnist, FRAMES)
    (folder,) = (tmp_path / "cache").iterdir()
    partial = np.lib.format.open_memmap(folder / "frames.npy.partial", "r+")
    partial[:] = 1  # a noted file was damaged on the disk
    partial.flush()
    with monkeypatch.context() as patch:
        read = count_files(patch)
        load("n_mnist", n_mnist, FRAMES)
        assert len(read) == 16, "begun anew"
    whole = bytearray((folder / "frames.npy").read_bytes())
    whole[-1] ^= 1
    (folder / "frames.npy").write_bytes(whole)
    with pytest.raises(DataError, match="not the frames that were written there; remove the folder"):
        load("n_mnist", n_mnist, FRAMES)


def test_a_full_disk_is_told_before_anything_is_made(n_mnist: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(recordings, "IN_MEMORY", 0)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frame_cache.os, "posix_fallocate", full, raising=False)
    read = count_files(monkeypatch)
    with pytest.raises(DataError, match=r"cannot be kept there .*No space left.*set BITSPIKE_CACHE"):
        load("n_mnist", n_mnist, FRAMES)
    (folder,) = (tmp_path / "cache").iterdir()
    assert not read and [p.name for p in folder.iterdir()] == ["lock"]


def test_cache_of_a_changed_archive_is_another(n_mnist: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(recordings, "IN_MEMORY", 0)
    before = load("n_mnist", n_mnist, FRAMES)
    with zipfile.ZipFile(n_mnist / "n-mnist" / "Test.zip", "w") as archive:
        archive.writestr("Test/1/00003.bin", file(some(99), "nmnist", tmp_path))
    assert load("n_mnist", n_mnist, FRAMES).hash != before.hash and len(list((tmp_path / "cache").iterdir())) == 2


# ------------------------------------------------------------------------------------------------- training
def test_event_augmentation_is_a_function_of_the_step(n_mnist: Path):
    data = load("n_mnist", n_mnist, Frames(4, (34, 34), augment="roll=3,drop=0.2,flip,rotate=5,jitter=50,cutout=4"))
    assert isinstance(data.train, Recordings)
    plain = load("n_mnist", n_mnist, Frames(4, (34, 34)))
    assert torch.equal(data.train.image(0), plain.train.images[0]) and torch.equal(data.test.images, plain.test.images)

    assert len(data.split("train+val")) == 12

    def batches(workers: int) -> FileBatches:
        return FileBatches(data.train, 4, 0, Augment(), 34, "whole", "", workers)

    (whole, labels), = batches(0).step(3)
    (other, _), = batches(1).step(3)
    assert whole.shape == (4, 4, 2, 34, 34) and whole.dtype == torch.uint8 and torch.equal(whole, other)
    assert not torch.equal(whole, next(iter(batches(0).step(4)))[0]) and 0 < whole.sum() < 4 * 60
    assert labels.shape == (4,)


def test_recordings_are_mixed(n_mnist: Path):
    """Events and targets by the same share, of recordings of the same split; a function of index and seed."""
    plain = load("n_mnist", n_mnist, Frames(4, (34, 34), "time", "drop=0.0"))
    data = load("n_mnist", n_mnist, Frames(4, (34, 34), "time", "mixup=1"))
    assert isinstance(data.train, Recordings) and isinstance(plain.train, Recordings) and data.hash == plain.hash
    labels = set(data.train.labels.tolist())
    shares = []
    for seed in range(40):
        frames, target = data.train.augmented(0, seed)
        assert torch.equal(frames, data.train.augmented(0, seed)[0])
        (own, share), (label, rest) = target
        assert own == int(data.train.labels[0]) and label in labels and share + rest == pytest.approx(1)
        most = max(float(plain.train.image(i).sum()) for i in range(len(plain.train)))
        assert 0 < frames.sum() <= 2 * most
        shares.append(share)
    assert min(shares) < 0.2 and max(shares) > 0.8
    sometimes = load("n_mnist", n_mnist, Frames(4, (34, 34), augment="mixup,roll=2"))
    number = sum(len(sometimes.train.augmented(1, seed)[1]) == 2 for seed in range(60))
    assert 15 < number < 45, "with probability 0.5 if nothing else is said"

    def batch(workers: int) -> tuple[torch.Tensor, torch.Tensor]:
        (found,) = FileBatches(sometimes.train, 8, 0, Augment(), 34, "whole", "", workers, 10).step(0)
        return found

    (frames, targets), (others, theirs) = batch(0), batch(1)
    assert torch.equal(frames, others) and torch.equal(targets, theirs)
    assert targets.shape == (8, 10) and targets.dtype == torch.float32 and torch.allclose(targets.sum(1), torch.ones(8))
    assert (targets.amax(1) < 1).any()


def test_a_recipe_trains_on_mixed_recordings(n_mnist: Path, tmp_path: Path):
    from dataclasses import replace

    from bitspike.training import train

    recipe = replace(all_recipes()["events.n_mnist"], event_augment="mixup=0.8", mixup=0.2, epochs=1, batch_size=4,
                     frames=2, workers=0, model_options={"num_classes": 2, "time_steps": 2})
    data = load("n_mnist", n_mnist, recipe.event_frames())
    found = train(recipe, data, tmp_path / "run")
    assert found["test_n"] == 4 and not np.isnan(found["test_loss"])


def test_windows_of_a_recording_are_mixed_at_their_place():
    """Of fixed windows it is the beginnings that fall together, not the first events."""
    first, second = events([10_050, 10_090], [0, 0], [0, 0], [1, 1]), events([500, 560], [1, 1], [1, 1], [0, 0])

    class Half(np.random.Generator):
        def random(self, size=None):
            return 0.5 if size is None else np.arange(size) * 0.6

    made, shares = Frames(5, (2, 2), "time", "mixup=1").mixed(first, (2, 2), Half(np.random.PCG64(0)), (10_000, 10_100),
                                                             lambda: (second, (490, 590)))
    assert shares == [0.5] and made.sum() == 2, "the first event of each"
    assert made[2, 1, 0, 0] == 1 and made[0, 0, 1, 1] == 1


def test_sequences_are_augmented_frame_by_frame_alike(n_mnist: Path):
    data = load("n_mnist", n_mnist, Frames(4, (34, 34)))
    (images, _), = ArrayBatches(data.train, 8, 0, Augment("random", 2, "zero", 6, 0.0, (0.0, 0.0), (1.0, 1.0))).step(0)
    assert images.shape == (8, 4, 2, 34, 34)
    (plain, _), = ArrayBatches(data.train, 8, 0, Augment()).step(0)
    # all frames move together: their sum over time moves like each of them
    (summed, _), = ArrayBatches(type(data.train)(data.train.images.sum(1, dtype=torch.uint8), data.train.labels), 8, 0,
                                Augment("random", 2, "zero", 6, 0.0, (0.0, 0.0), (1.0, 1.0))).step(0)
    assert torch.equal(images.sum(1, dtype=torch.uint8), summed) and not torch.equal(images, plain)
    found = list(evaluation_batches(data.test, 34, 3, 0))
    assert [len(y) for _, y in found] == [3, 1] and found[0][0].shape == (3, 4, 2, 34, 34)


def test_frames_that_cannot_be_meant():
    with pytest.raises(EventError, match="allowed: flip, roll, rotate, shear, geometric, cutout, jitter, drop, mixup"):
        Frames(4, (8, 8), augment="rol=3")
    with pytest.raises(EventError, match="by 'number'"):
        Frames(4, (8, 8), "number")
    for wrong in ("roll=nan", "roll=-1", "roll=2.5", "rotate=nan", "rotate=inf", "cutout=1e9", "jitter=1e300", "drop=2",
                  "flip=nan", "mixup=2", "mixup=-0.1", "shear=nan", "geometric=9"):
        with pytest.raises(EventError, match=f"event augmentation {wrong.partition('=')[0]}=.*allowed: "):
            Frames(4, (8, 8), augment=wrong)


def test_store_reads_the_same_from_everywhere(tmp_path: Path):
    names = ["a/1.txt", "b/2.txt"]
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "b").mkdir()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for name in reversed(names):
            (tmp_path / "folder" / name).write_text(name)
            archive.writestr(name, name)
            tar.add(tmp_path / "folder" / name, name)
    for place in ("folder", "x.zip", "x.tar.gz"):
        store = Store([tmp_path / place])
        assert list(store.names) == names and store.read("b/2.txt") == b"b/2.txt"
        assert dict(store.walk(names)) == {n: n.encode() for n in names}
        assert [n for n, _ in store.walk(names)] == store.ordered(names)
        assert store.fast == (place != "x.tar.gz") and store.size("a/1.txt") == 7
