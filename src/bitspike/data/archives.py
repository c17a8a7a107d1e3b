"""Files by name, in a folder or in an archive as its publisher ships it (.zip, .tar, .tar.gz): nothing has to be unpacked."""
from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bitspike.data.errors import DataError
from bitspike.data.events.arrays import DAMAGED

_BAD = (*DAMAGED, tarfile.TarError)


class Store:
    """The files of several folders and archives, by one path each; can be passed to worker processes.

    names: all of them, sorted. A folder's own name does not stand in them; what an archive holds, does. A zip inside a zip
    is opened, too.
    """

    def __init__(self, places: Iterable[Path]) -> None:
        self.places = tuple(places)
        self._where: dict[str, tuple[int, str]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._packed_twice = False
        self._open: dict[tuple[int, int, str], zipfile.ZipFile] = {}
        for index, place in enumerate(self.places):
            for name, key, size, mark in self._list(index, place):
                self._where[name], self._sizes[name] = (index, key), (size, mark)
        self.names = tuple(sorted(self._where))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # an open archive has one position: a worker opens its own

    def _list(self, index: int, place: Path) -> Iterator[tuple[str, str, int, int]]:
        if place.is_dir():
            for path in sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")):
                state = path.stat()
                yield path.relative_to(place).as_posix(), "", state.st_size, state.st_mtime_ns
            return
        try:
            if place.suffix == ".zip":
                yield from self._list_zip(index, "", self._zip(index, ""))
                return
            with tarfile.open(place) as tar:
                for member in tar:
                    if member.isfile() and not Path(member.name).name.startswith("."):
                        yield member.name.removeprefix("./"), member.name, member.size, int(member.mtime)
        except _BAD as error:
            raise DataError(f"{place}: not a whole archive ({error}). Fetch it again.") from None

    def _list_zip(self, index: int, inner: str, archive: zipfile.ZipFile) -> Iterator[tuple[str, str, int, int]]:
        for member in archive.infolist():
            name = member.filename
            if member.is_dir() or Path(name).name.startswith(".") or name.startswith("__MACOSX/"):
                continue
            if name.endswith(".zip") and not inner:
                self._packed_twice |= member.compress_type != zipfile.ZIP_STORED
                yield from self._list_zip(index, name, self._zip(index, name))
            else:
                yield name, inner, member.file_size, member.CRC

    def _zip(self, index: int, inner: str) -> zipfile.ZipFile:
        key = (os.getpid(), index, inner)
        if key not in self._open:
            self._open[key] = zipfile.ZipFile(self._zip(index, "").open(inner) if inner else self.places[index])
        return self._open[key]

    def read(self, name: str) -> bytes:
        """The content of one file. Errors: DataError for a damaged archive; OSError for a file that is gone."""
        index, key = self._where[name]
        place = self.places[index]
        if place.is_dir():
            return (place / name).read_bytes()
        try:
            if place.suffix == ".zip":
                return self._zip(index, key).read(name)
            with tarfile.open(place) as tar:
                return self._of_tar(tar, key)
        except _BAD as error:
            raise DataError(f"{place}: {name} cannot be unpacked ({error}). Fetch the archive again.") from None

    def _of_tar(self, tar: tarfile.TarFile, key: str) -> bytes:
        with tar.extractfile(key) as file:  # type: ignore[union-attr]
            return file.read()

    def walk(self, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the wanted files in the order of `ordered`: a packed archive is read once, from its beginning."""
        in_order = self.ordered(wanted)
        for index, place in enumerate(self.places):
            mine = [name for name in in_order if self._where[name][0] == index]
            if place.is_dir() or place.suffix == ".zip":
                for name in mine:
                    yield name, self.read(name)
                continue
            named = {self._where[name][1]: name for name in mine}
            if not named:
                continue
            try:
                with tarfile.open(place) as tar:
                    for member in tar:
                        if member.name in named:
                            yield named[member.name], self._of_tar(tar, member.name)
            except _BAD as error:
                raise DataError(f"{place}: cannot be unpacked ({error}). Fetch it again.") from None

    def ordered(self, names: Iterable[str]) -> list[str]:
        """These names as they stand in the folders (sorted) and archives (as packed), without repetition."""
        wanted = set(names)
        return [name for name in self._where if name in wanted]

    @property
    def fast(self) -> bool:
        """False if reading one file may unpack the whole archive before it."""
        return not self._packed_twice and not any(place.is_file() and place.suffix != ".zip" for place in self.places)

    def fingerprint(self, names: Iterable[str]) -> str:
        """sha256 over names, sizes, and CRC or time of change: another one as soon as a file may have changed."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(repr((name, *self._sizes[name])).encode())
        return digest.hexdigest()

    def size(self, name: str) -> int:
        """Bytes of that file when it is unpacked."""
        return self._sizes[name][0]


def check_md5(path: Path, expected: str) -> None:
    """Errors: DataError if the archive is not the one that was published."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise DataError(f"{path}: its MD5 is {digest.hexdigest()}, that of the published archive {expected}; the download is "
                        "not whole, or another version. Fetch it again, or unpack it yourself: folders are not compared.")
