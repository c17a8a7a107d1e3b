"""Recordings of an event camera as a split: decoded and made into frames when they are asked for, or once into a cache."""
from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitspike.data.archives import Store
from bitspike.data.errors import DataError, told
from bitspike.data.events import EventError
from bitspike.data.events.framing import Frames
from bitspike.data.events.reading import read_from
from bitspike.data.frame_cache import Cache, cache_folder
from bitspike.data.splits import Split
from bitspike.progress import counted

IN_MEMORY = 64 << 20  # bytes of recordings that are decoded anew at each start: quicker than to explain a cache
_VERSION = 1  # of the frames' definition: another one makes caches of the old one unused


class Clip(NamedTuple):
    """A file of the store, or its events with start <= t < stop (microseconds) where these are given.

    fixed: frames by time divide [start, stop); else the time from the clip's first to its last event.
    """

    name: str
    start: int | None = None
    stop: int | None = None
    fixed: bool = False

    @property
    def span(self) -> tuple[int, int] | None:
        """[start, stop) that frames by time divide, if not the events' own."""
        return (self.start, self.stop) if self.fixed and self.start is not None and self.stop is not None else None

    def cut(self, data: np.ndarray) -> np.ndarray:
        """The clip's events of its file's."""
        if self.start is None or self.stop is None:
            return data
        return data[(data["t"] >= self.start) & (data["t"] < self.stop)]


@dataclass(frozen=True)
class Recordings:
    """A split of clips. sensor: (height, width); layout: see `bitspike.data.events.read`; labels: int64 [N]."""

    store: Store
    clips: tuple[Clip, ...]
    labels: Tensor
    sensor: tuple[int, int]
    frames: Frames
    layout: str | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def events(self, content: bytes, name: str) -> np.ndarray:
        """The events of one file's content. Errors: DataError naming it."""
        try:
            found = read_from(io.BytesIO(content), name, layout=self.layout)
        except EventError as error:
            raise DataError(f"{', '.join(map(str, self.store.places))}: {told(error)}") from None
        return found.data

    def _frames(self, data: np.ndarray, clip: Clip) -> np.ndarray:
        try:
            return self.frames.of(clip.cut(data), self.sensor, None, clip.span)
        except EventError as error:
            raise DataError(f"{clip.name}: {told(error)}") from None

    def image(self, index: int) -> Tensor:
        """uint8 [T, 2, H, W], not augmented. Errors: DataError."""
        clip = self.clips[index]
        return torch.from_numpy(self._frames(self.events(self.store.read(clip.name), clip.name), clip))

    def _clip_events(self, clip: Clip) -> np.ndarray:
        return clip.cut(self.events(self.store.read(clip.name), clip.name))

    def augmented(self, index: int, seed: int) -> tuple[Tensor, list[tuple[int, float]]]:
        """(uint8 [T, 2, H, W] of the events changed as `frames.augment` says, (label, share) of its target, shares sum to 1).

        A pure function of index and seed. Several entries only where recordings are mixed.
        """
        clip, random = self.clips[index], np.random.default_rng(seed)
        target = [(int(self.labels[index]), 1.0)]
        others: list[int] = []

        def other() -> tuple[np.ndarray, tuple[int, int] | None]:
            others.append(int(random.integers(len(self))))
            second = self.clips[others[-1]]
            return self._clip_events(second), second.span

        try:
            made, shares = self.frames.mixed(self._clip_events(clip), self.sensor, random, clip.span, other)
        except EventError as error:
            raise DataError(f"{clip.name}: {told(error)}") from None
        for share, second in zip(shares, others, strict=True):
            target = [*((label, part * share) for label, part in target), (int(self.labels[second]), 1 - share)]
        return torch.from_numpy(made), target

    def take(self, indices: Tensor) -> Recordings:
        """See `Split`."""
        return replace(self, clips=tuple(self.clips[i] for i in indices.tolist()), labels=self.labels[indices])

    def joined(self, other: Split) -> Recordings:
        """See `Split`."""
        if not isinstance(other, Recordings) or other.store is not self.store:
            raise DataError("recordings can only be joined with others of the same data set.")
        return replace(self, clips=self.clips + other.clips, labels=torch.cat([self.labels, other.labels]))

    # ------------------------------------------------------------------------------------------ all at once
    def decoded(self, name: str) -> tuple[Tensor, str]:
        """(uint8 [N, T, 2, H, W] of all clips, sha256 of them); from the cache, or made and put there. Errors: DataError."""
        files = self.store.ordered(clip.name for clip in self.clips)
        held: dict[str, list[int]] = defaultdict(list)
        for index, clip in enumerate(self.clips):
            held[clip.name].append(index)
        shape = (len(self.clips), self.frames.steps, 2, *self.frames.size)
        if sum(map(self.store.size, files)) <= IN_MEMORY:
            images = np.empty(shape, np.uint8)
            for file, content in counted(self.store.walk(files), len(files), f"{name}: reading recordings"):
                self._fill(images, self.events(content, file), held[file])
            return torch.from_numpy(images), hashlib.sha256(images.data).hexdigest()
        key = repr((_VERSION, self.store.fingerprint(files), self.clips, self.sensor, replace(self.frames, augment=""),
                    self.layout))
        with Cache(cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}", shape) as cache:
            if not cache.finished:
                order = [held[file] for file in files]
                done = cache.begin(order)
                for index, (file, content) in enumerate(
                        counted(self.store.walk(files[done:]), len(files), f"{name}: making frames of recordings", done), done):
                    self._fill(cache.images, self.events(content, file), held[file])
                    cache.note(order, index + 1)
                cache.finish()
            return cache.open()

    def _fill(self, images: np.ndarray, data: np.ndarray, indices: list[int]) -> None:
        for index in indices:
            images[index] = self._frames(data, self.clips[index])
