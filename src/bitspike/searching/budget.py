"""The limits a user has."""
from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bitspike.searching.space import SearchError

_UNITS = {"bytes": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "kib": 1024, "mib": 1024**2},
          "energy": {"pj": 1, "nj": 1e3, "uj": 1e6, "mj": 1e9}, "bits": {"": 1}, "drop": {"": 1}}
_EXAMPLES = {"bytes": "bytes=900kB", "bits": "bits=3.2", "energy": "energy=25uJ", "drop": "drop=1.0"}


@dataclass(frozen=True)
class Budget:
    """Upper limits; every one that is given holds.

    bytes: of the file on disk. bits: average of a weight. energy_pj: per image. drop: points of accuracy, measured on the
    search's own data before fine-tuning; with it the search looks for the cheapest spec (fewest bytes, or least energy)
    instead of the most accurate one.

    >>> Budget.parse("bits=3.2")
    Budget(bytes=None, bits=3.2, energy_pj=None, drop=None)
    >>> Budget.parse("bytes=900kB", "energy=25uJ").energy_pj
    25000000.0
    """

    bytes: int | None = None
    bits: float | None = None
    energy_pj: float | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        given = {n: v for n, v in vars(self).items() if v is not None}
        if not given:
            raise SearchError(f"no budget; give at least one of {', '.join(_EXAMPLES.values())}.")
        for name, value in given.items():
            if not 0 < value < math.inf and not (name == "drop" and value == 0):
                raise SearchError(f"budget {name}={value}: it must be a finite number above 0.")

    @classmethod
    def parse(cls, *texts: str) -> Budget:
        """From "name=number[unit]". Errors: SearchError."""
        found: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition("=")
            match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*", value)
            units = _UNITS.get(name.strip(), {})
            try:
                number = float(match[1]) * units[match[2].lower()]  # type: ignore[index]
                number = float(int(number)) if name.strip() == "bytes" else number
            except (KeyError, OverflowError, ValueError, TypeError):
                raise SearchError(f"budget {text!r}: allowed are {', '.join(_EXAMPLES.values())} (units: B, kB, MB, KiB, MiB; "
                                  "pJ, nJ, uJ, mJ).") from None
            key = {"energy": "energy_pj"}.get(name.strip(), name.strip())
            if key in found:
                raise SearchError(f"budget {text!r}: {name.strip()} is limited twice; give it once.")
            found[key] = number
        size = found.pop("bytes", None)
        return cls(None if size is None else int(size), **found)

    def over(self, bits: float, size: float, energy_pj: float, drop: float | None = None) -> list[float]:
        """How far each limit that is given is passed, relative to it (a limit of 0: as such); not above 0 where it is met.

        drop: leave it out where it is not known; a limit on it is not looked at then.

        >>> Budget(bits=4, bytes=100).over(bits=3, size=150, energy_pj=1)
        [-0.25, 0.5]
        """
        pairs = ((bits, self.bits), (size, self.bytes), (energy_pj, self.energy_pj), (drop, self.drop))
        return [found / limit - 1 if limit else found for found, limit in pairs if limit is not None and found is not None]

    def __str__(self) -> str:
        parts: Sequence[tuple[str, float | None, str]] = (
            ("bytes", self.bytes, ",.0f"), ("bits", self.bits, "g"), ("drop", self.drop, "g"))
        texts = [f"{name}={value:{form}}" for name, value, form in parts if value is not None]
        return ", ".join(texts + ([f"energy={self.energy_pj / 1e6:g}uJ"] if self.energy_pj is not None else []))
