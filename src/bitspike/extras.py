"""Which optional part of the installation a missing package belongs to."""
from __future__ import annotations

#: package -> extra of pyproject.toml that brings it
EXTRAS = {"torch": "train", "torchvision": "train", "timm": "train", "accelerate": "train", "safetensors": "train",
          "matplotlib": "plot", "scipy": "search", "optuna": "search", "onnx": "bench", "onnxruntime": "bench",
          "openvino": "bench", "lz4": "events", "zstandard": "events", "h5py": "events", "spikingjelly": "spikingjelly",
          "snntorch": "snntorch", "torchmetrics": "dense", "faster_coco_eval": "dense"}


class MissingExtra(ImportError):
    """A part of bitspike was used that the installed extras do not cover."""


def explain(error: ImportError) -> MissingExtra | None:
    """The error with the command that mends it, or None if the missing module is none of ours to install.

    >>> print(explain(ModuleNotFoundError("No module named 'torch'", name="torch")))
    torch is not installed; the base install runs and profiles .bitspike files only. Install it with: \
pip install 'bitspike[train]'
    """
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    return MissingExtra(f"{package} is not installed; the base install runs and profiles .bitspike files only. "
                        f"Install it with: pip install 'bitspike[{EXTRAS[package]}]'", name=package)
