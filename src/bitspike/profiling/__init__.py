"""`profile(model or .bitspike file, images) -> Report`: sizes, operations, spikes and energy, layer by layer."""
from __future__ import annotations

from bitspike.profiling.report import Report

__all__ = ["Report"]
