"""Datasets: `load(name, data_dir)` -> classes and three fixed, hashed splits. Nothing is ever downloaded.

The names here are imported when they are first used: `bitspike.data.events` reads recordings on a device without torch.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitspike.data.errors import DataError

if TYPE_CHECKING:
    from bitspike.data.catalogue import NAMES, load
    from bitspike.data.events.framing import Frames
    from bitspike.data.recordings import Recordings
    from bitspike.data.scenes import Scenes
    from bitspike.data.splits import Arrays, Dataset, Files

__all__ = ["NAMES", "Arrays", "DataError", "Dataset", "Files", "Frames", "Recordings", "Scenes", "load"]

_WHERE = {"NAMES": "catalogue", "load": "catalogue", "Frames": "events.framing", "Recordings": "recordings",
          "Scenes": "scenes"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'splits')}"), name)
