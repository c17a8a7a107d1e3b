"""`profile(model or .bitspike file, images) -> Report`: sizes, operations, spikes and energy, layer by layer."""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitspike.deploy import Detector, Net, Segmenter, load
from bitspike.deploy.runtime import ZOO
from bitspike.profiling.of_artifact import profile_artifact, profile_dense
from bitspike.profiling.report import Report

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Report", "profile"]


def profile(network: nn.Module | Net | Segmenter | Detector | str | os.PathLike[str], images: Any, *, name: str = "",
            batch: int = 8, threads: int | None = None) -> Report:
    """What one image costs: bytes, operations, spikes, energy in three accounts (`bitspike.cost`), layer by layer.

    network: a torch model, quantized or not, any model of convolutions, linear layers and neurons; or a `.bitspike` file
    (its path, a built-in name, or what `load` gave), which is also timed. images: what it is called with, float
    [B, C, H, W] or uint8 [B, H, W, C], for the file of a segmenter or detector a list of uint8 [H, W, C]; take real ones, the
    spikes decide. batch: images at once while counting.
    threads: of the integer runtime, all cores if None.
    Errors: ValueError for no images; ArtifactError.
    """
    if isinstance(network, (str, os.PathLike)):
        path = Path(network)
        file = path if path.is_file() else ZOO / f"{path}.bitspike"
        net = load(network)
        if not isinstance(net, Net):
            return profile_dense(net, images, file_bytes=file.stat().st_size, threads=threads)
        return profile_artifact(net, images, file_bytes=file.stat().st_size, batch=batch, threads=threads)
    if isinstance(network, (Segmenter, Detector)):
        return profile_dense(network, images, threads=threads)
    if isinstance(network, Net):
        return profile_artifact(network, images, batch=batch, threads=threads)
    from bitspike.profiling.of_torch import profile_model

    return profile_model(network, images, name=name, batch=batch)
