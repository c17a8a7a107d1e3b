import os
from pathlib import Path

import numpy as np
import pytest

from bitspike.data.events import events


@pytest.fixture
def recording():
    """A function that makes N sorted random events on a sensor (height, width)."""

    def make(number: int = 3000, size: tuple[int, int] = (100, 120), seed: int = 0, span: int = 200_000) -> np.ndarray:
        random = np.random.default_rng(seed)
        return events(np.sort(random.integers(0, span, number)), random.integers(0, size[1], number),
                      random.integers(0, size[0], number), random.integers(0, 2, number))

    return make


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real recordings, named by BITSPIKE_EVENTS; by default shared/data/events beside the repository."""
    folder = Path(os.environ.get("BITSPIKE_EVENTS") or Path(__file__).parents[3].parent / "shared" / "data" / "events")
    if not (folder / "format_samples").is_dir():
        pytest.skip(f"no recordings in {folder}; set BITSPIKE_EVENTS to the folder that holds format_samples/")
    return folder / "format_samples"
