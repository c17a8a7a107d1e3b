"""Typed errors of the device side. Messages say where, what was found, what is allowed, what to do."""
from __future__ import annotations


class ArtifactError(ValueError):
    """A `*.bitspike` file that is missing, damaged, of another version, or not allowed by docs/format.md."""


class ImageError(ValueError):
    """A picture that cannot be read or cannot become the network's input."""


class KernelError(ValueError):
    """A set of kernels that this build or this CPU does not have."""


class StepError(ValueError):
    """A network that cannot run step by step, or one step too many."""


class StreamError(ValueError):
    """An argument that a stream of events cannot be made or go on with."""
