"""The compiled loops over records and events (csrc/events.cc), where there are any.

Each caller holds the same in numpy: the definition, which a test compares, and what runs where the extension is missing.
"""
from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bitspike.data.events.core import DTYPE

_VERSION = 2


def _load() -> Any:
    try:
        from bitspike.data.events import _decode  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _decode if _decode.version == _VERSION and sys.byteorder == "little" else None


#: the extension, or None
module: Any = _load()


def as_bytes(data: np.ndarray) -> np.ndarray | None:
    """Events [N] as uint8 [16 N] without a copy; None where the extension cannot look at them."""
    if module is None or data.dtype != DTYPE or data.ndim != 1 or not data.flags.c_contiguous:
        return None
    return data.view(np.uint8) if len(data) else np.empty(0, np.uint8)
