"""The error of every dataset; no torch here, so that reading recordings needs none."""
from __future__ import annotations

import re


class DataError(ValueError):
    """A dataset that is missing, incomplete or corrupt: says what was found, what is expected and what to do."""


def told(error: Exception) -> str:
    """The message of a recording's error, without the option of a function that a data set does not have.

    >>> told(ValueError('truncated. Copy it again, or read what is whole with on_error="prefix".'))
    'truncated. Copy it again, or remove it.'
    """
    return re.sub(r',? or (read what is whole with|use) on_error="prefix"', ", or remove it", str(error))
