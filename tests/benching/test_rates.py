"""Networks brought to a mean count: every neuron fires at it, in torch and in the exported program."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitspike.benching.rates import RateError, set_mean_count
from bitspike.benching.to_torch import PeerModule, compare
from bitspike.deploy import load
from bitspike.exporting import export_model
from bitspike.exporting.export import normalised
from bitspike.neurons import IELIF, LIF

PIXELS = np.random.default_rng(3).integers(0, 256, (8, 12, 12, 1), np.uint8)


def chain(levels: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs in (1, 16, 16):
        parts += [nn.Conv2d(inputs, 16, 3, padding=1), nn.BatchNorm2d(16), IELIF(levels)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(16 * 144, 3))


@pytest.mark.parametrize("count", [0.1, 0.25, 0.8])
def test_every_neuron_reaches_the_count_and_so_does_the_file(count: float, tmp_path: Path):
    net = chain(4)
    assert set_mean_count(net, PIXELS, [0.5], [0.25], count) == 3
    x = normalised(PIXELS, np.array([0.5]), np.array([0.25]))
    for layer in net.eval():
        x = layer(x)
        if isinstance(layer, IELIF):
            assert float(x.detach().mean()) / layer.scale == pytest.approx(count, rel=0.02)
    export_model(net, tmp_path / "net.bitspike", mean=[0.5], std=[0.25], image_size=12, channels=1, classes=["a", "b", "c"],
                 calibration_images=PIXELS, name="chain", min_agreement=0.0)
    artifact = load(tmp_path / "net.bitspike")
    values = artifact.trace(PIXELS)
    means = [values[op.output].mean() for op in artifact.program.ops if op.name == "quantize"]
    assert len(means) == 3
    assert np.allclose(means, count, rtol=0.02)


def test_other_engines_get_moved_gains_inside_their_convolutions(tmp_path: Path):
    """A product between a convolution and its neuron would keep ONNX Runtime from computing the convolution on int8."""
    net = chain(4)
    set_mean_count(net, PIXELS, [0.5], [0.25], 0.25)
    export_model(net, tmp_path / "net.bitspike", mean=[0.5], std=[0.25], image_size=12, channels=1, classes=["a", "b", "c"],
                 calibration_images=PIXELS, name="chain", min_agreement=0.0)
    artifact = load(tmp_path / "net.bitspike")
    gains = {(op.attributes["m"], op.attributes["s"]) for op in artifact.program.ops if op.name == "quantize"}
    module = PeerModule(artifact).eval()
    convs = [i for i, (kind, _, _) in enumerate(module.steps) if kind == "conv"]
    assert len(gains) == 3 and [module.steps[i + 1][0] for i in convs[:3]] == ["neuron"] * 3
    found = compare(module, artifact, PIXELS)
    assert found.largest_potential < 0.01 and found.different <= 1e-3 * found.codes


def test_spikes_over_time_too():
    torch.manual_seed(0)
    neuron = LIF(decay=0.5)
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Unflatten(0, (2, -1)), neuron)
    set_mean_count(net, PIXELS, [0.5], [0.25], 0.15)
    x = normalised(PIXELS, np.array([0.5]), np.array([0.25]))
    assert float(net.eval()(x).detach().mean()) == pytest.approx(0.15, rel=0.05)


@pytest.mark.parametrize("count", [0.0, -1.0, 4.0, float("nan")])
def test_refuses_what_no_neuron_can_send(count: float):
    with pytest.raises(RateError, match="mean count"):
        set_mean_count(chain(4), PIXELS, [0.5], [0.25], count)


def test_refuses_networks_without_neurons():
    with pytest.raises(RateError, match="no spiking neurons"):
        set_mean_count(nn.Sequential(nn.Conv2d(1, 2, 3)), PIXELS, [0.5], [0.25], 0.2)
