"""From a recording to what a network is trained on: uint8 event frames, with the events changed before that if asked."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bitspike.data.events import augment
from bitspike.data.events.core import DTYPE, EventError
from bitspike.data.events.representations import frames

_Change = Callable[[np.ndarray, tuple[int, int], np.random.Generator, float], np.ndarray]

def _alone(data: np.ndarray, size: tuple[int, int], random: np.random.Generator, value: float) -> np.ndarray:
    """Mixup where there is no other recording to mix with."""
    augment.mix(data[:0], data[:0], random, value)  # refuses what is no probability
    return data


#: name in `event_augment` -> (the change, its default strength)
CHANGES: dict[str, tuple[_Change, float]] = {
    "flip": (lambda data, size, random, value: augment.flip(data, size, random, value), 0.5),
    "roll": (lambda data, size, random, value: augment.roll(data, size, random, value), 5),
    "rotate": (lambda data, size, random, value: augment.rotate(data, size, random, value), 15.0),
    "shear": (lambda data, size, random, value: augment.shear(data, size, random, value), 0.3),
    "geometric": (lambda data, size, random, value: augment.geometric(data, size, random, value), 1.0),
    "cutout": (lambda data, size, random, value: augment.cutout(data, size, random, value), 16),
    "jitter": (lambda data, size, random, value: augment.jitter_time(data, random, value), 1000.0),
    "drop": (lambda data, size, random, value: augment.drop(data, random, value), 0.1),
    "mixup": (_alone, 0.5),
}


@dataclass(frozen=True)
class Frames:
    """How a recording becomes frames.

    steps: T; size: (height, width) of a frame, the sensor's pixels are pooled to it; by: "count" or "time", see
    `representations.edges`; augment: changes of the events of training recordings, "name" or "name=strength" separated
    by commas, in that order, from `CHANGES` (strengths in sensor pixels, degrees, microseconds, probability). "mixup" mixes
    with another training recording, with that probability and a share drawn evenly from 0..1; see `mixed`.

    Errors: EventError for anything else.

    >>> Frames(10, (48, 48), augment="roll=5,drop").changes()
    [('roll', 5.0), ('drop', 0.1)]
    """

    steps: int
    size: tuple[int, int]
    by: str = "count"
    augment: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1024 or min(self.size) < 1 or self.by not in ("count", "time"):
            raise EventError(f"frames: {self.steps} of {self.size[1]} x {self.size[0]} by {self.by!r}; allowed: 1..1024 of at "
                             "least 1 x 1, by 'count' or 'time'.")
        for name, value in self.changes():  # now, not at some step of a training
            try:
                CHANGES[name][0](np.empty(0, DTYPE), (1, 1), np.random.default_rng(0), value)
            except EventError as error:
                raise EventError(f"event augmentation {name}={value:g}: {error}") from None

    def changes(self) -> list[tuple[str, float]]:
        """`augment` as (name, strength)."""
        found = []
        for part in filter(None, (word.strip() for word in self.augment.split(","))):
            name, _, value = part.partition("=")
            try:
                default = CHANGES[name][1]
                found.append((name, float(value) if value else default))
            except (KeyError, ValueError):
                raise EventError(f"event augmentation {part!r}; allowed: {', '.join(CHANGES)}, each alone or as name=number, "
                                 "separated by commas.") from None
        return found

    @property
    def mixes(self) -> bool:
        """Whether recordings are mixed, so that a target is shares of classes."""
        return any(name == "mixup" for name, _ in self.changes())

    def mixed(self, data: np.ndarray, sensor: tuple[int, int], random: np.random.Generator, span: tuple[int, int] | None,
              other: Callable[[], tuple[np.ndarray, tuple[int, int] | None]]) -> tuple[np.ndarray, Sequence[float]]:
        """(`of` with the augmentation, and with "mixup" among it; the share of the target that each mixing left to the first).

        other: the events, not changed, and the span of another recording; called once for every mixing.
        """
        shares: list[float] = []
        for name, value in self.changes():
            if name == "mixup" and random.random() < value:
                share = float(random.random())
                second, second_span = other()
                starts = None if span is None or second_span is None else (span[0], second_span[0])
                data = augment.mix(data, second, random, share, starts)
                span = None if span is None else (0, span[1] - span[0])
                shares.append(share)
            else:
                data = CHANGES[name][0](data, sensor, random, value)
        return self.of(data, sensor, None, span), shares

    def of(self, data: np.ndarray, sensor: tuple[int, int], random: np.random.Generator | None = None,
           span: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 [T, 2, height, width] of events `DTYPE` [N]; a count over 255 is 255.

        random: with the augmentation. span: the time [start, stop) to cut, where that is not the events' own.

        >>> from bitspike.data.events import events
        >>> Frames(1, (1, 1)).of(events([0, 1], [0, 1], [0, 1], [1, 1]), (2, 2)).ravel().tolist()
        [0, 2]
        """
        if random is not None:
            for name, value in self.changes():
                data = CHANGES[name][0](data, sensor, random, value)
        return np.minimum(frames(data, sensor, self.steps, self.by, self.size, span), 255).astype(np.uint8)
