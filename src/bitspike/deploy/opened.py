"""What every opened artifact tells of itself."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitspike.deploy.artifact import Artifact
from bitspike.deploy.program import Program


class Opened:
    """What `Net`, `Segmenter` and `Detector` share: the header's numbers and names."""

    #: what the network is asked: "classification", "segmentation" or "detection"
    task = ""

    def __init__(self, source: Artifact) -> None:
        self._artifact = source

    @property
    def header(self) -> Mapping[str, Any]:
        """The artifact's header, as in docs/format.md."""
        return self._artifact.header

    @property
    def program(self) -> Program:
        """The checked program that sees the whole picture: ops with their layer names and multiplications, and the shape of
        every value, at the size of the header's `input`, or of a window of it.
        """
        return self._artifact.program

    @property
    def classes(self) -> list[str]:
        """Class names; of a classifier one per logit."""
        return list(self.header["classes"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture; segmenters and detectors were exported for it and run at others, too."""
        source = self.header["input"]
        return source["height"], source["width"], source["channels"]

    @property
    def input_steps(self) -> int:
        """Frames of one input: 1 for a picture, T for a sequence of event frames."""
        return int(self.header["input"].get("steps", 1))

    @property
    def time_steps(self) -> int:
        """T, the number of time steps."""
        return int(self.header["time_steps"])
