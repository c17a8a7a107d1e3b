"""Where results go: checked before the work that makes them."""
from __future__ import annotations

import os
from pathlib import Path


class OutputError(ValueError):
    """A path that nothing can be written to."""


def _check_place(option: str, path: Path) -> None:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there != path and not there.is_dir():
        raise OutputError(f"{option} {path}: {there} is a file, not a folder. Choose another path.")
    if not os.access(there, os.W_OK):
        raise OutputError(f"{option} {path}: {there} is not writable. Choose another path.")


def check_file(option: str, path: Path) -> None:
    """Errors: OutputError if `path` is a folder or cannot be written; folders on the way may be missing."""
    if path.is_dir():
        raise OutputError(f"{option} {path}: this is a folder; the name of a file is needed.")
    _check_place(option, path)


def check_folder(option: str, path: Path) -> None:
    """Errors: OutputError if `path` is a file or no folder can be made or filled there."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{option} {path}: this is a file; a folder is needed.")
    _check_place(option, path)
