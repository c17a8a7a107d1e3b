"""Files that appear whole or not at all: written beside their place, then moved there. Standard library only."""
from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to fill; it takes the place of `path` when the block ends, and is gone if the block fails.

    What was at `path` stays until then. Two writers never share a file; the last one to finish wins. Errors: OSError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder) / "a") as file:
    ...         _ = file.write(b"all of it")
    ...     [p.name for p in Path(folder).iterdir()]
    ['a']
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with draft.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Text in UTF-8. Errors: OSError."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, data: Any, indent: int | None = 1) -> None:
    """Plain data, with the folders on the way. Errors: OSError; TypeError for data that is not plain."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=indent) + "\n")
