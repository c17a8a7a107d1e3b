"""Reading JSON that may be hostile: every getter names the place, what was found, and what is allowed."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.errors import ArtifactError

INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)
_REQUIRED = object()


def shown(value: Any) -> str:
    """A value for an error message: ASCII, cut short, and never slow."""
    if isinstance(value, (dict, list)) and len(value) > 20:
        return f"{type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 120 else text[:120] + "..."


def printable(text: str) -> str:
    r"""A text of a file without the characters that could command a terminal.

    >>> printable("cat \x1b[31m\u202e")
    'cat [31m'
    """
    return "".join(c for c in text if c.isprintable())


class Fields:
    """The keys of one JSON object; `done()` complains about keys that nobody asked for."""

    def __init__(self, found: Any, where: str, tensors: Mapping[str, NDArray[Any]] | None = None) -> None:
        if not isinstance(found, dict):
            raise ArtifactError(f"{where} is {shown(found)}; it must be an object")
        self._found = found
        self.where = where
        self._asked: set[str] = set()
        self._tensors = tensors or {}
        #: names of the tensors that were asked for
        self.used: set[str] = set()

    def fail(self, key: str, allowed: str) -> ArtifactError:
        """The error to raise about `key`."""
        return ArtifactError(f"{self.where}: '{key}' is {shown(self._found.get(key))}; it must be {allowed}")

    def has(self, key: str) -> bool:
        """Whether an optional key is there."""
        self._asked.add(key)
        return key in self._found

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it is in the file."""
        self._asked.add(key)
        if key in self._found:
            return self._found[key]
        if default is _REQUIRED:
            raise ArtifactError(f"{self.where}: '{key}' is missing")
        return default

    def done(self) -> None:
        """Raise if the object has a key that was not asked for."""
        unknown = [key for key in self._found if key not in self._asked]
        if unknown:
            raise ArtifactError(
                f"{self.where}: unknown {shown(unknown[0])}; known here: {', '.join(sorted(self._asked))}. "
                "A newer version of bitspike may have written this file"
            )

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer low..high."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"an integer {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A number low..high, whole or not; JSON has no infinities."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.fail(key, f"a number {low}..{high}")
        return float(value)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `count` numbers low..high."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(key, f"a list of {count} numbers {low}..{high}")
        return tuple(Fields({key: one}, self.where).number(key, low, high) for one in value)

    def text(self, key: str, longest: int = 1000) -> str:
        """A text."""
        value = self.get(key)
        if not isinstance(value, str) or len(value) > longest:
            raise self.fail(key, f"a text of at most {longest} characters")
        return value

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of the allowed texts."""
        value = self.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise self.fail(key, "one of " + ", ".join(map(repr, allowed)))
        return value

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def texts(self, key: str, least: int, most: int, longest: int = 1000) -> list[str]:
        """A list of least..most texts."""
        value = self.get(key)
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise self.fail(key, f"a list of {least}..{most} texts")
        if not all(isinstance(text, str) and len(text) <= longest for text in value):
            raise self.fail(key, f"a list of texts of at most {longest} characters")
        return value

    def integers(self, key: str, count: int, low: int, high: int) -> tuple[int, ...]:
        """A list of `count` integers low..high."""
        value = self.get(key)
        fits = isinstance(value, list) and len(value) == count
        if not fits or not all(type(v) is int and low <= v <= high for v in value):
            raise self.fail(key, f"a list of {count} integers {low}..{high}")
        return tuple(value)

    def factor(self, key: str) -> tuple[int, int]:
        """`[m, s]`: a multiplier, |m| < 2^31, and a shift 0..62."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int for v in value):
            raise self.fail(key, "a list [m, s] of 2 integers")
        m, s = value
        if not -INT32_MAX <= m <= INT32_MAX or not 0 <= s <= 62:
            raise self.fail(key, "[m, s] with |m| < 2^31 and s in 0..62")
        return m, s

    def tensor(self, key: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        """The tensor that `key` names, of exactly that dtype and shape."""
        name = self.get(key)
        if not isinstance(name, str) or name not in self._tensors:
            raise self.fail(key, "the name of a tensor of this file")
        tensor = self._tensors[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ArtifactError(
                f"{self.where}: '{key}' is tensor {shown(name)} of {tensor.dtype}{list(tensor.shape)}; "
                f"it must be {np.dtype(dtype)}{list(shape)}"
            )
        self.used.add(name)
        return tensor

    def per_channel(self, key: str, channels: int, low: int) -> int | NDArray[Any]:
        """One integer low..2^31-1, or an int32 tensor `[channels]` of them."""
        if not isinstance(self.get(key), str):
            return self.integer(key, low, INT32_MAX)
        tensor = self.tensor(key, np.int32, (channels,))
        if tensor.min() < low:
            raise ArtifactError(f"{self.where}: '{key}' holds {tensor.min()}; the least allowed is {low}")
        return tensor

    def rows(self, key: str, counts: Sequence[int], width: int, low: int) -> tuple[NDArray[Any], int]:
        """An int32 tensor `[rows, width]` of numbers from low, with one of the allowed counts of rows; and that count."""
        tensor = self._tensors.get(self.text(key))
        found = next((n for n in counts if tensor is not None and tensor.shape == (n, width)), counts[-1])
        table = self.tensor(key, np.int32, (found, width))
        if table.size and table.min() < low:
            raise ArtifactError(f"{self.where}: '{key}' holds {table.min()}; the least allowed is {low}")
        return table, found
