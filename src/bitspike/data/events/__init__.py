"""Event cameras: recordings of every usual format as one structured array, and what networks take made of it.

`read(path)` and `iterate(path)` recognise the format by content; `write` is their inverse; `representations` makes frames,
voxel grids and time surfaces; `augment` changes events before that. Only numpy is needed; lz4, zstandard and h5py where a
file asks for them.
"""
from __future__ import annotations

from bitspike.data.events.aedat3 import Span, cut, gesture_labels
from bitspike.data.events.core import DTYPE, EventError, Events, events
from bitspike.data.events.reading import FORMATS, iterate, read, write
from bitspike.data.events.representations import frames, time_surface, voxel_grid

__all__ = ["DTYPE", "FORMATS", "EventError", "Events", "Span", "cut", "events", "frames", "gesture_labels", "iterate", "read",
           "time_surface", "voxel_grid", "write"]
