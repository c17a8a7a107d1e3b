"""The error of every dataset; no torch here, so that reading recordings needs none."""
from __future__ import annotations


class DataError(ValueError):
    """A dataset that is missing, incomplete or corrupt: says what was found, what is expected and what to do."""
