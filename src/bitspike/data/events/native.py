"""The compiled loops over records and events (csrc/events.cc), where there are any.

Each caller holds the same in numpy: the definition, which a test compares, and what runs where the extension is missing.
"""
from __future__ import annotations

import sys
from typing import Any

_VERSION = 2


def _load() -> Any:
    try:
        from bitspike.data.events import _decode  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _decode if _decode.version == _VERSION and sys.byteorder == "little" else None


#: the extension, or None
module: Any = _load()
