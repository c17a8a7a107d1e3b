"""Data sets of event cameras, read from the archives as their publishers ship them, or from what was unpacked of them.

| name | split | classes, sensor |
|---|---|---|
| `dvs_gesture` | published: users 1..23 train, 24..29 test | 11, 128x128 |
| `cifar10_dvs` | none published; of each class the first 900 names train, as SpikingJelly's 0.9 has it | 10, 128x128 |
| `n_caltech101` | none published; of each class the tenth with the smallest hash of its name tests | 101, 240x180 |
| `n_mnist` | published: Train, Test | 10, 34x34 |
| `dvs128_objects` | two sessions of hand-held objects: the first trains, the second tests; windows of 500 ms | 5, 128x128 |
| `events_folder` | folders train and test of class folders; with class folders only, as `n_caltech101` | any |

Of what trains, `val` is held out as everywhere here (`splits.held_out`); windows of one recording are held out together.
"""
from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from bitspike.data.archives import Store, check_md5
from bitspike.data.cifar import CIFAR10_CLASSES
from bitspike.data.errors import DataError, told
from bitspike.data.event_cache import random_order
from bitspike.data.events import EventError
from bitspike.data.events.aedat3 import parse_gesture_labels
from bitspike.data.events.framing import Frames
from bitspike.data.recordings import Clip, Recordings
from bitspike.data.splits import Arrays, Dataset, Split, held_out

GESTURES = ("hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter clockwise",
            "left arm clockwise", "left arm counter clockwise", "arm roll", "air drums", "air guitar", "other gestures")
OBJECTS = ("caixa", "caneca", "estilete", "lapiseira", "tesoura")
WINDOW_US, HOP_US = 500_000, 250_000  # of dvs128_objects; test windows do not overlap
RECORDED = (".aedat", ".aedat4", ".bin", ".dat", ".raw", ".npy", ".npz", ".h5", ".hdf5")

_MD5 = {
    "DvsGesture.tar.gz": "8a5c71fb11e24e5ca5b11866ca6c00a1",
    "Train.zip": "20959b8e626244a1b502305a9e6e2031", "Test.zip": "69ca8762b2fe404d9b9bad1103e97832",
    "Caltech101.zip": "66201824eabb0239c7ab992480b50ba3", "N-Caltech101-archive.zip": "989af2c704103341d616b748b5daa70c",
    "airplane.zip": "0afd5c4bf9ae06af762a77b180354fdd", "automobile.zip": "8438dfeba3bc970c94962d995b1b9bdd",
    "bird.zip": "a9c207c91c55b9dc2002dc21c684d785", "cat.zip": "52c63c677c2b15fa5146a8daf4d56687",
    "deer.zip": "b6bf21f6c04d21ba4e23fc3e36c8a4a3", "dog.zip": "f379ebdf6703d16e0a690782e62639c3",
    "frog.zip": "cad6ed91214b1c7388a5f6ee56d08803", "horse.zip": "e7cbbf77bec584ffbf913f00e682782a",
    "ship.zip": "41c7bd7d6b251be82557c6cce9a7d5c9", "truck.zip": "89f3922fd147d9aeff89e76a2b0b70a7",
}


# ------------------------------------------------------------------------------------------- where it lies
def _store(data_dir: Path | str, folder: str, archives: Sequence[str], wanted: str, source: str, one_of: bool = False) -> Store:
    """What lies in data_dir/folder, or in data_dir itself: the archives if there are any, else the unpacked files.

    one_of: the first of the archives that is there holds everything.
    """
    root = Path(data_dir)
    for place in (root / folder, root):
        found = [place / name for name in archives if (place / name).is_file()]
        if found:
            found = found[:1] if one_of else found
            for archive in found:
                _verified(archive)
            return Store(found)
        if place.is_dir() and any(re.search(wanted, p.relative_to(place).as_posix()) for p in place.rglob("*")):
            return Store([place])
    names = [name for name in archives if "/" not in name]
    state = "does not exist" if not root.is_dir() else f"holds neither {' nor '.join(names[:2])} nor what is in them"
    raise DataError(f"{root} {state}. Nothing is downloaded here: get "
                    f"{(' or ' if one_of else ', ').join(names)} from {source} and put "
                    f"{'them' if len(names) > 1 and not one_of else 'it'} into {root / folder}, unpacked or not.")


_seen: set[tuple[str, int, int]] = set()


def _verified(archive: Path) -> None:
    """Compare with the published MD5, once a process. Errors: DataError."""
    state = archive.stat()
    key = (str(archive), state.st_size, state.st_mtime_ns)
    if archive.name in _MD5 and key not in _seen:
        check_md5(archive, _MD5[archive.name])
        _seen.add(key)


def _expect(name: str, found: Mapping[str, int], published: Mapping[str, int]) -> None:
    """Warn where recordings are missing. Errors: DataError where there are none."""
    for part, number in published.items():
        if not found[part]:
            raise DataError(f"{name}: no recordings for {part}; {number} were published. Look at the folder's layout.")
        if found[part] != number:
            warnings.warn(f"{name}: {found[part]} recordings for {part}, {number} were published: figures on it compare with "
                          "nothing published.", stacklevel=4)


# ------------------------------------------------------------------------------------------- split and hash
def _dataset(name: str, classes: Sequence[str], whole: Recordings, is_test: Tensor, groups: Sequence[str] | None = None,
             window_us: int | None = None) -> Dataset:
    """Hold out `val`, make the frames unless they are made from changed events at every step, hash everything."""
    trains = torch.nonzero(~is_test).flatten()
    names = [repr(clip) if groups is None else group
             for clip, group in zip(whole.clips, groups or [""] * len(whole), strict=True)]
    rest, val = held_out(whole.labels[trains], [names[i] for i in trains.tolist()])
    source = random_order(whole, name) if whole.frames.augment else whole  # first: it refuses a full disk at once
    images, digest = whole.decoded(name)
    arrays = Arrays(images, whole.labels)
    test = torch.nonzero(is_test).flatten()
    seal = hashlib.sha256(repr((digest, whole.labels.tolist(), trains[val].tolist(), test.tolist())).encode())
    parts: tuple[Split, Split] = (arrays.take(trains[rest]), arrays.take(trains[val]))
    if whole.frames.augment:
        parts = (source.take(trains[rest]), source.take(trains[val]))  # both: a recipe may train on both
    return Dataset(name, tuple(classes), *parts, arrays.take(test), seal.hexdigest(),
                   {"sensor": list(whole.sensor), "layout": whole.layout, "window_us": window_us})


def _held_out_tests(labels: Tensor, names: Sequence[str], share: float = 0.1) -> Tensor:
    """Which samples test: of each class, that share with the smallest sha256 of their name."""
    keys = [hashlib.sha256(f"bitspike test {name}".encode()).digest() for name in names]
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for c in torch.unique(labels).tolist():
        members = sorted(torch.nonzero(labels == c).flatten().tolist(), key=keys.__getitem__)
        is_test[members[: math.ceil(len(members) * share)] if len(members) > 1 else []] = True
    return is_test


# ------------------------------------------------------------------------------------------------ data sets
def dvs_gesture(data_dir: Path | str, frames: Frames) -> Dataset:
    """DVS128 Gesture (Amir et al. 2017, CVPR): the published split, one clip per labelled span. Errors: DataError."""
    store = _store(data_dir, "dvs-gesture", ["DvsGesture.tar.gz"], r"user\d\d_.*\.aedat$",
                   "https://research.ibm.com/interactive/dvsgesture")
    lists = {PurePosixPath(n).name: n for n in store.names if n.endswith(("trials_to_train.txt", "trials_to_test.txt"))}
    if len(lists) < 2:
        raise DataError(f"{store.places[0]}: trials_to_train.txt or trials_to_test.txt is missing; unpack all of the archive.")
    wanted = [n for n in store.names if n.endswith("_labels.csv")]
    texts = {n: content.decode("utf-8", "replace") for n, content in store.walk([*lists.values(), *wanted])}
    by_name = {PurePosixPath(n).name: n for n in store.names}
    clips: list[Clip] = []
    labels: list[int] = []
    tests: list[bool] = []
    for index, part in enumerate(("trials_to_train.txt", "trials_to_test.txt")):
        for trial in texts[lists[part]].split():
            stem = trial.removesuffix(".aedat")
            table = by_name.get(f"{stem}_labels.csv")
            if f"{stem}.aedat" not in by_name or table is None:
                raise DataError(f"{store.places[0]}: {part} names {trial}, but the recording or its labels are missing; unpack "
                                "all of the archive.")
            try:
                spans = parse_gesture_labels(texts[table], table)
            except EventError as error:
                raise DataError(told(error)) from None
            clips += [Clip(by_name[f"{stem}.aedat"], span.start, span.stop) for span in spans]
            labels += [span.label for span in spans]
            tests += [bool(index)] * len(spans)
    is_test = torch.tensor(tests, dtype=torch.bool)
    _expect("dvs_gesture", {"training": len(tests) - sum(tests), "test": sum(tests)}, {"training": 1176, "test": 288})
    whole = Recordings(store, tuple(clips), torch.tensor(labels), (128, 128), frames)
    return _dataset("dvs_gesture", GESTURES, whole, is_test, [clip.name for clip in clips])


def cifar10_dvs(data_dir: Path | str, frames: Frames) -> Dataset:
    """CIFAR10-DVS (Li et al. 2017, Frontiers): ten archives of a class each, 1,000 recordings a class. Errors: DataError."""
    store = _store(data_dir, "cifar10-dvs", [f"{c}.zip" for c in CIFAR10_CLASSES], r"cifar10_\w+_\d+\.aedat$",
                   "https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671")
    clips, labels, tests = [], [], []
    for label, c in enumerate(CIFAR10_CLASSES):
        names = sorted(n for n in store.names if re.search(rf"cifar10_{c}_\d+\.aedat$", n))
        clips += [Clip(n) for n in names]
        labels += [label] * len(names)
        tests += [i >= math.ceil(0.9 * len(names)) for i in range(len(names))]
    _expect("cifar10_dvs", {c: labels.count(i) for i, c in enumerate(CIFAR10_CLASSES)}, dict.fromkeys(CIFAR10_CLASSES, 1000))
    whole = Recordings(store, tuple(clips), torch.tensor(labels), (128, 128), frames, "cifar10-dvs")
    return _dataset("cifar10_dvs", CIFAR10_CLASSES, whole, torch.tensor(tests))


def _by_folder(store: Store, names: Sequence[str], frames: Frames, sensor: tuple[int, int], name: str,
               is_test: Callable[[str], bool] | None) -> Dataset:
    """The class is the folder that a recording lies in."""
    if not names:
        raise DataError(f"{store.places[0]}: no recordings in class folders (looked for {', '.join(RECORDED)}).")
    folders = [PurePosixPath(n).parent.name for n in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        raise DataError(f"{store.places[0]}: one class folder ({classes[0] or 'none'}); at least two are needed, one a class.")
    labels = torch.tensor([classes.index(folder) for folder in folders])
    tests = (_held_out_tests(labels, [f"{f}/{PurePosixPath(n).name}" for f, n in zip(folders, names, strict=True)])
             if is_test is None else torch.tensor([is_test(n) for n in names]))
    whole = Recordings(store, tuple(Clip(n) for n in names), labels, sensor, frames)
    return _dataset(name, classes, whole, tests)


def n_caltech101(data_dir: Path | str, frames: Frames) -> Dataset:
    """N-Caltech101 (Orchard et al. 2015, Frontiers): 8,709 recordings of 100 objects and a background. Errors: DataError."""
    # the publisher's archive holds the other one, which lies in a folder of its name when it is unpacked
    store = _store(data_dir, "n-caltech101",
                   ["Caltech101.zip", "N-Caltech101-archive.zip", "N-Caltech101-archive/Caltech101.zip"], r"image_\d+\.bin$",
                   "https://www.garrickorchard.com/datasets/n-caltech101", one_of=True)
    names = [n for n in store.names if re.search(r"image_\d+\.bin$", n) and "annotation" not in n.lower()]
    _expect("n_caltech101", {"all": len(names)}, {"all": 8709})
    return _by_folder(store, names, frames, (180, 240), "n_caltech101", None)


def n_mnist(data_dir: Path | str, frames: Frames) -> Dataset:
    """N-MNIST (Orchard et al. 2015, Frontiers): 60,000 and 10,000 saccades over digits. Errors: DataError."""
    store = _store(data_dir, "n-mnist", ["Train.zip", "Test.zip"], r"(?i)(train|test)/\d/\d+\.bin$",
                   "https://www.garrickorchard.com/datasets/n-mnist")
    names = [n for n in store.names if re.search(r"(?i)(train|test)/\d/\d+\.bin$", n)]

    def is_test(name: str) -> bool:
        return PurePosixPath(name).parts[-3].lower() == "test"

    tests = sum(map(is_test, names))
    _expect("n_mnist", {"training": len(names) - tests, "test": tests}, {"training": 60000, "test": 10000})
    return _by_folder(store, names, frames, (34, 34), "n_mnist", is_test)


def dvs128_objects(data_dir: Path | str, frames: Frames) -> Dataset:
    """Five hand-held objects before a DVS128 (E. Lawrence, DVS128_BioLab), windows of 500 ms. Errors: DataError.

    session1/<object>.aedat trains, with a window every 250 ms; session2/<object>.aedat tests, without overlap.
    """
    store = _store(data_dir, "dvs128-objects", ["dvs128_objects.zip"], r"session[12]/\w+\.aedat$",
                   "https://github.com/eberlawrence/DVS128_BioLab")
    clips: list[Clip] = []
    labels: list[int] = []
    tests: list[bool] = []
    whole = Recordings(store, (), torch.zeros(0, dtype=torch.int64), (128, 128), frames)
    for session in (1, 2):
        for label, thing in enumerate(OBJECTS):
            name = next((n for n in store.names if n.endswith(f"session{session}/{thing}.aedat")), None)
            if name is None:
                raise DataError(f"{store.places[0]}: session{session}/{thing}.aedat is missing.")
            t = whole.events(store.read(name), name)["t"]
            if not len(t):
                raise DataError(f"{store.places[0]}: {name} holds no events.")
            starts = np.arange(int(t[0]), int(t[-1]) - WINDOW_US + 1, HOP_US if session == 1 else WINDOW_US).tolist()
            clips += [Clip(name, start, start + WINDOW_US, True) for start in starts]
            labels += [label] * len(starts)
            tests += [session == 2] * len(starts)
    # neighbouring windows share events: stretches of 4 seconds are held out together
    groups = [f"{clip.name} {(clip.start or 0) // 4_000_000}" for clip in clips]
    whole = Recordings(store, tuple(clips), torch.tensor(labels), (128, 128), frames)
    window = WINDOW_US // frames.steps if frames.by == "time" else None
    return _dataset("dvs128_objects", OBJECTS, whole, torch.tensor(tests), groups, window)


def events_folder(data_dir: Path | str, frames: Frames) -> Dataset:
    """Recordings of any format in `data_dir`/CLASS/, or in `data_dir`/train/CLASS/ and `data_dir`/test/CLASS/.

    What is deeper or less deep is left alone, and so is every file whose name does not end as recordings do. With train and
    test both there, they are the split, and a class folder beside them is none; else a tenth of each class tests, chosen by
    the hash of its names. Classes are the folders' names in the order of the alphabet.

    All recordings are from one camera: its sensor is what the first one says, or where that says nothing, the smallest that
    holds the events of all. AEDAT 2.0 whose header does not name the chip is read as of a DVS128.

    Errors: DataError for no folder, no recordings, one class, a recording that is damaged or does not fit the sensor.
    """
    root = Path(data_dir)
    places = [root] if root.is_dir() else []
    if not places:
        raise DataError(f"{root} is no folder; expected CLASS/recording in it, or train/CLASS/... and test/CLASS/...")
    store = Store(places)
    names = [n for n in store.names if n.lower().endswith(RECORDED)]
    parts = {PurePosixPath(n).parts[0].lower() for n in names if len(PurePosixPath(n).parts) == 3}
    split = {"train", "test"} <= parts
    if not split and parts & {"train", "test"}:
        raise DataError(f"{root} holds {(parts & {'train', 'test'}).pop()}/CLASS/recording alone; both are needed, or "
                        "CLASS/recording without either, of which a tenth tests.")
    names = [n for n in names if (len(PurePosixPath(n).parts) == 3 and PurePosixPath(n).parts[0].lower() in ("train", "test")
                                  if split else len(PurePosixPath(n).parts) == 2)]
    sensor = _sensor(store, names)
    return _by_folder(store, names, frames, sensor, "events_folder",
                      (lambda n: PurePosixPath(n).parts[0].lower() == "test") if split else None)


def _sensor(store: Store, names: Sequence[str]) -> tuple[int, int]:
    """The size that the first recording names; where it names none, of the smallest sensor that holds every recording.

    Errors: DataError where hardly any events make that sensor twice as large as the others need: they are damaged.
    """
    from bitspike.data.events import iterate

    seen = {"y": np.zeros(1, np.int64), "x": np.zeros(1, np.int64)}  # events by row, by column
    farthest = {"y": "", "x": ""}
    for name in names:
        try:
            for piece in iterate(store.places[0] / name):
                if piece.size is not None:
                    return piece.size
                for axis, most in zip("yx", piece.extent, strict=True):
                    if most > len(seen[axis]):
                        farthest[axis] = name
                        seen[axis] = np.pad(seen[axis], (0, most - len(seen[axis])))
                    seen[axis] += np.bincount(piece.data[axis], minlength=len(seen[axis]))
        except EventError as error:
            raise DataError(told(error)) from None
    for axis, counts in seen.items():
        strays = max(3, int(counts.sum()) // 1000)
        usual = int((np.cumsum(counts[::-1])[::-1] > strays).sum())  # beyond it lie no more than those
        if 0 < usual <= len(counts) // 2:
            beyond, every = int(counts[usual:].sum()), int(counts.sum())
            raise DataError(f"{store.places[0] / farthest[axis]}: an event at {axis}={len(counts) - 1}, where all but {beyond} "
                            f"of {every} events of all recordings have {axis} below {usual}. "
                            "The recording is damaged: write it anew without such events, or remove it.")
    return len(seen["y"]), len(seen["x"])


READERS: dict[str, Callable[[Path | str, Frames], Dataset]] = {
    "cifar10_dvs": cifar10_dvs, "dvs128_objects": dvs128_objects, "dvs_gesture": dvs_gesture, "events_folder": events_folder,
    "n_caltech101": n_caltech101, "n_mnist": n_mnist}
