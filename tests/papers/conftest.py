"""What tests of recipes share."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def imagenet_file(tmp_path: Path) -> Callable[..., str]:
    """A function that writes a backbone's weights in the form of the published ImageNet files, and returns the path."""
    from safetensors.torch import save_file

    def write(trained) -> str:
        # in released files conv and norm of these blocks stand side by side
        state = {name.replace("conv1.conv.", "conv1.").replace("conv2.conv.", "conv2.").replace("conv1.norm.", "bn1.")
                 .replace("conv2.norm.", "bn2."): value for name, value in trained.state_dict().items()}
        path = tmp_path / "imagenet.safetensors"
        save_file(state, path)
        return str(path)

    return write
