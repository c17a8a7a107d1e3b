"""The frames of a data set on disk, made once: nothing that was cut off in the middle is ever taken for whole.

A folder per data set and way of framing: `frames.npy.partial` while it is made, with `progress.json`, which says how many
files are done and their CRC, and is only written when their frames are on the disk; at the end `frames.npy` and `whole.json`
with the sha256 of all frames, which is compared at every start.
"""
from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitspike.data.errors import DataError
from bitspike.writing import write_json

_EVERY = 64  # files between two notes


def cache_folder() -> Path:
    """BITSPIKE_CACHE, or ~/.cache/bitspike (XDG_CACHE_HOME)."""
    named = os.environ.get("BITSPIKE_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitspike"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


class Cache:
    """uint8 frames of that shape in `folder`; one process makes them, others wait for it."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self.folder, self.shape = folder, shape
        self._whole, self._partial = folder / "frames.npy", folder / "frames.npy.partial"
        self._crc = 0
        self._noted = 0

    def __enter__(self) -> Cache:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise DataError(f"{self.folder}: no frames can be kept there ({error}); set BITSPIKE_CACHE to a folder that can be "
                            "written.") from None
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except ImportError:  # Windows: two processes may do the work twice, into the same bytes
            pass
        for draft in self.folder.glob(".*.part"):  # of a note, by a process that was killed
            draft.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()
        if kind is KeyboardInterrupt and self._noted:
            warnings.warn(f"the frames of {self._noted} recordings are kept in {self.folder}; the next start goes on from "
                          "there.", stacklevel=2)

    @property
    def finished(self) -> bool:
        """Whether all frames are there."""
        return self._whole.is_file() and _read_json(self.folder / "whole.json").get("shape") == list(self.shape)

    def begin(self, order: list[list[int]]) -> int:
        """Open `images` for writing; returns how many of the files (lists of samples) in `order` are done already."""
        note = _read_json(self.folder / "progress.json")
        done = note.get("files", 0)
        if self._partial.is_file() and isinstance(done, int) and 0 < done <= len(order):
            try:
                self.images: np.ndarray = np.lib.format.open_memmap(self._partial, "r+")
                if self.images.shape == self.shape and self.images.dtype == np.uint8 \
                        and self._chain(order, 0, done) == note.get("crc32"):
                    self._noted = done
                    return done
            except (OSError, ValueError):
                pass
        self._crc, self._noted = 0, 0
        try:
            self.images = np.lib.format.open_memmap(self._partial, "w+", np.uint8, self.shape)
            if hasattr(os, "posix_fallocate"):  # else a disk that fills up ends the process without a word, by SIGBUS
                with self._partial.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, self._partial.stat().st_size)
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            size = int(np.prod(self.shape, dtype=np.int64))
            raise DataError(f"{self.folder}: {size / 1e6:,.1f} MB of frames cannot be kept there ({error}); set BITSPIKE_CACHE "
                            "to a folder with room.") from None
        return 0

    def _chain(self, order: list[list[int]], start: int, stop: int) -> int:
        for indices in order[start:stop]:
            for index in indices:
                self._crc = zlib.crc32(self.images[index].data, self._crc)
        return self._crc

    def note(self, order: list[list[int]], done: int) -> None:
        """The first `done` files' frames are written."""
        if done - self._noted >= _EVERY or done == len(order):
            self.images.flush()  # type: ignore[attr-defined]
            write_json(self.folder / "progress.json", {"files": done, "crc32": self._chain(order, self._noted, done)})
            self._noted = done

    def finish(self) -> None:
        """All files are done: give the frames their name."""
        digest = hashlib.sha256(self.images.data).hexdigest()
        self.images.flush()  # type: ignore[attr-defined]
        del self.images
        self._partial.replace(self._whole)
        write_json(self.folder / "whole.json", {"shape": list(self.shape), "sha256": digest})
        (self.folder / "progress.json").unlink(missing_ok=True)

    def open(self) -> tuple[Tensor, str]:
        """(frames, not in memory until they are used; their sha256). Errors: DataError if they have changed on the disk."""
        expected = _read_json(self.folder / "whole.json").get("sha256")
        try:
            images = np.load(self._whole, mmap_mode="r")
            digest = hashlib.sha256(images.data).hexdigest()
        except (OSError, ValueError) as error:
            raise DataError(f"{self._whole}: cannot be read ({error}); remove the folder {self.folder}.") from None
        if images.shape != self.shape or digest != expected:
            raise DataError(f"{self._whole}: not the frames that were written there; remove the folder {self.folder}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of memory that cannot be written; nothing here writes into it
            return torch.from_numpy(images), digest
