"""Every model's profile: watched in torch and read from the file, the accounts see the same layers."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitspike import cost
from bitspike.deploy import load
from bitspike.profiling.of_artifact import profile_artifact
from bitspike.profiling.of_torch import profile_model

from .test_export import built, exported, frames, normalised
from .zoo import MODELS

# a mean over 3x3 or more pixels may be a count in torch's eyes and eight bits on the device, or the other way round
REAL = (cost.DENSE, cost.COUNT)


@pytest.mark.parametrize("name", MODELS)
def test_torch_and_the_file_are_counted_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitspike.profiling.of_artifact.milliseconds", lambda run, images: 1.0)
    model, shape, T = built(name, False)
    pixels = frames(shape, 3)
    exported(model, tmp_path / "a.bitspike", pixels, T)
    torch_side = profile_model(model, normalised(pixels).float(), batch=2)
    file_side = profile_artifact(load(tmp_path / "a.bitspike"), pixels, batch=2)
    a, b = ({op.name: op for op in report.layers if op.weights or op.kind == cost.ATTENTION or ".product" in op.name}
            for report in (torch_side, file_side))
    assert set(a) == set(b)
    for layer, x in a.items():
        y = b[layer]
        assert (x.macs, x.weights, x.weight_bits, x.outputs) == (y.macs, y.weights, y.weight_bits, y.outputs) \
            or ".product" in layer, layer
        assert x.macs == y.macs and x.steps == y.steps, layer
        assert x.kind == y.kind or {x.kind, y.kind} <= set(REAL), (layer, x.kind, y.kind)
        if x.kind == y.kind in (cost.SPIKE, cost.COUNT):
            # a real-valued input before it may have moved a count
            assert x.mean_count == pytest.approx(y.mean_count, rel=0.1, abs=0.01), layer
            assert x.inputs == y.inputs and x.levels <= y.levels, layer
    assert torch_side.weights == file_side.weights
    assert torch_side.spikes_per_neuron == pytest.approx(file_side.spikes_per_neuron, rel=0.02)
    assert sorted(torch_side.states) == sorted(file_side.states)
    assert sum(moved for moved, _ in torch_side.residuals) == sum(moved for moved, _ in file_side.residuals)
    assert torch_side.images == file_side.images == 3


def test_low_bit_membranes_are_counted_at_their_bits(tmp_path: Path) -> None:
    from bitspike.layers import quantize_
    from bitspike.spec import QuantSpec, Scheme

    model, shape, T = built("resnet", False)
    quantize_(model, QuantSpec({"*neuron*": Scheme("membrane", 4)}))
    pixels = frames(shape, 2)
    with torch.no_grad():
        model.train()(normalised(pixels).float())
    exported(model.eval(), tmp_path / "a.bitspike", pixels, T)
    sides = profile_model(model, normalised(pixels).float()), profile_artifact(load(tmp_path / "a.bitspike"), pixels)
    wide = profile_model(built("resnet", False)[0], normalised(pixels).float())
    assert sorted(sides[0].states) == sorted(sides[1].states)
    assert 8 * sum(held for _, held in sides[1].states) == sum(held for _, held in wide.states)
