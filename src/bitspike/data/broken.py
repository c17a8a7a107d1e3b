"""Broken annotations: counted by kind, named, refused or, when asked, left out with a warning."""
from __future__ import annotations

import warnings
from collections.abc import Sequence

from bitspike.data.errors import DataError

_NAMED = 5


class BrokenAnnotations(UserWarning):
    """Pictures were left out because their annotations are broken; says how many, why and which."""


class Broken:
    """Collects what is wrong with the annotations of a data set; `settle` decides once all have been looked at.

    what: is counted; remedy: what skip_broken does with it.

    >>> broken = Broken("camvid")
    >>> broken.add("no such file", "0001.png")
    >>> broken.settle(62, skip=False)
    Traceback (most recent call last):
    ...
    bitspike.data.errors.DataError: camvid: 1 of 62 annotations are broken: no such file (1): 0001.png. Mend or remove them, \
or leave these pictures out with --set skip_broken=yes.
    """

    def __init__(self, data: str, what: str = "annotations", remedy: str = "leave these pictures out") -> None:
        self.data, self.what, self.remedy, self.found = data, what, remedy, dict[str, list[str]]()

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def add(self, kind: str, name: str) -> None:
        """kind: what is wrong, the same words for the same fault; name: of the picture or annotation, perhaps with details."""
        self.found.setdefault(kind, []).append(name)

    def text(self, total: int) -> str:
        """How many of `total`, by kind, with the first names of each."""
        kinds = [f"{kind} ({len(names)}): {_listed(names)}" for kind, names in self.found.items()]
        return f"{self.data}: {len(self)} of {total} {self.what} are broken: {'; '.join(kinds)}."

    def settle(self, total: int, skip: bool) -> None:
        """A `BrokenAnnotations` warning if there are any and they may be skipped. Errors: DataError if they may not."""
        if not self.found:
            return
        if not skip:
            raise DataError(f"{self.text(total)} Mend or remove them, or {self.remedy} with --set skip_broken=yes.")
        warnings.warn(f"{self.text(total)} Left out.", BrokenAnnotations, stacklevel=3)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
