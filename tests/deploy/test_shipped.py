"""The networks inside the package: their answers are integers, so they are the same numbers everywhere and for good."""
from __future__ import annotations

import zlib

import numpy as np
import pytest

from bitspike.deploy import kernels, load
from bitspike.deploy.runtime import ZOO, builtin_names

#: name -> largest size in bytes, checksum of the logits of `pictures()`
SHIPPED = {
    "cifar10": (1_150_000, 3952000275),
    "cifar10-binary": (300_000, 1189728384),
    "cifar10-binary-spikes": (180_000, 507137660),
}


def pictures() -> np.ndarray:
    """Two smooth pictures: a colour gradient and a bright disc."""
    y, x = np.mgrid[:32, :32]
    gradient = np.stack([8 * x, 8 * y, 255 - 4 * (x + y)], -1)
    disc = np.where(((x - 15) ** 2 + (y - 12) ** 2 < 80)[..., None], (240, 180, 40), (30, 60, 120))
    return np.stack([gradient, disc]).astype(np.uint8)


def test_every_shipped_network_is_listed():
    assert builtin_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_same_answers_on_every_kernel_set(name):
    most, checksum = SHIPPED[name]
    assert (ZOO / f"{name}.bitspike").stat().st_size < most
    net = load(name)
    assert net.classes[3] == "cat" and len(net.classes) == 10
    before = kernels.active()
    try:
        for kernel_set in kernels.available():
            kernels.use(kernel_set)
            assert zlib.crc32(net(pictures()).tobytes()) == checksum, kernel_set
    finally:
        kernels.use(before)


def test_binary_spikes_are_binary():
    """Every neuron of the Q-SNN network gives 0 or 1, and its weights between the ends have one bit."""
    net = load("cifar10-binary-spikes")
    spikes = [value for op in net.program.ops for value in [net.program.values[op.output]] if op.name.startswith("lif")]
    assert len(spikes) > 5 and all((value.lo, value.hi) == (0, 1) for value in spikes)
    inner = [op for op in net.program.ops if op.name == "conv"][1:-1]
    assert all(set(np.unique(op.attributes["weight"])) == {-1, 1} for op in inner)
