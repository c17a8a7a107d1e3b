"""The events of an archive that cannot be read in random order, kept clip by clip, so that augmentation can.

A folder per archive and way of reading; one `.npz` per clip (its CRC is compared whenever it is read), which has its name only
when it is whole. An interrupted decoding goes on with the clips that are missing; two processes may do the same work, but
never write into one file.
"""
from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitspike.data.archives import Store
from bitspike.data.errors import DataError
from bitspike.data.events.core import DTYPE
from bitspike.data.events.reading import write
from bitspike.data.frame_cache import cache_folder
from bitspike.data.recordings import Clip, Recordings
from bitspike.progress import counted

_VERSION = 1  # of what is decoded: another one makes folders of the old one unused
_RECORD = 8   # bytes an event takes in the tightest of the packed formats, AEDAT 3.1


def random_order(whole: Recordings, name: str) -> Recordings:
    """The same clips in the same order, each a file that can be read alone; `whole` itself if its store can do that.

    name: of the data set, for the folder and for messages. The archive is read once, from its beginning; later starts find
    the clips. Frames made of either are the same bit for bit.

    Errors: DataError for damaged recordings, and before anything is read if the events would not fit the disk.
    """
    if whole.store.fast:
        return whole
    files = whole.store.ordered(clip.name for clip in whole.clips)
    key = repr((_VERSION, whole.store.fingerprint(files), whole.clips, whole.layout))
    folder = cache_folder() / f"{name}-events-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    paths = [f"{index:06d}.npz" for index in range(len(whole.clips))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: no events can be kept there ({error}); set BITSPIKE_CACHE to a folder that can be "
                        "written.") from None
    missing: dict[str, list[int]] = defaultdict(list)
    for index, clip in enumerate(whole.clips):
        if not (folder / paths[index]).is_file():
            missing[clip.name].append(index)
    _room(whole, missing, folder)
    left = [file for file in files if file in missing]
    walk = counted(whole.store.walk(left), len(files), f"{name}: decoding recordings", len(files) - len(left))
    for file, content in walk if left else ():
        data = whole.events(content, file)
        for index in missing[file]:
            _keep(folder / paths[index], whole.clips[index].cut(data))
    clips = tuple(Clip(path, *clip[1:]) for path, clip in zip(paths, whole.clips, strict=True))
    return replace(whole, store=Store([folder]), clips=clips, layout=None)


def _room(whole: Recordings, missing: dict[str, list[int]], folder: Path) -> None:
    need = sum(whole.store.size(file) for file in missing) * DTYPE.itemsize // _RECORD
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(f"{folder}: up to {need / 1e9:,.1f} GB of events would be kept there for event_augment, "
                        f"{free / 1e9:,.1f} GB are free. Set BITSPIKE_CACHE to a folder with room, or "
                        "unpack the archive and move it away.")


def _keep(path: Path, data: np.ndarray) -> None:
    try:
        write(path, data, "npz")
    except OSError as error:
        raise DataError(f"{path}: the events cannot be kept there ({error}). Set BITSPIKE_CACHE to a folder with room; what "
                        "is there is used again.") from None
