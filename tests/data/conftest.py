from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_imagenet():
    """A function that writes a small tree in ImageNet's layout and returns its root."""

    def write(root: Path, size: int = 24, train: int = 6) -> Path:
        random = np.random.default_rng(0)
        for part, n in (("train", train), ("val", 2)):
            for c in ("n01", "n02"):
                (root / part / c).mkdir(parents=True)
                for i in range(n):
                    pixels = random.integers(0, 256, (size + i, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / part / c / f"{i}.png")
        return root

    return write
