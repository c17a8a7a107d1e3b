"""Counting by watching: against numbers worked out by hand, and against the published energy."""
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from bitspike import cost
from bitspike.layers import quantize_
from bitspike.models.blocks import spike_attention
from bitspike.models.meta_spikeformer import MetaSpikeFormer, cifar_small, imagenet_15m
from bitspike.neurons import IELIF, LIF, timewise
from bitspike.profiling.of_torch import profile_model
from bitspike.profiling.report import Report
from bitspike.spec import QuantSpec, Scheme

FOUR_BITS = QuantSpec({"*": Scheme("lsq", 4)})


class Tiny(nn.Module):
    """Stem, counts, depthwise without a neuron in front, a residual sum, attention, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.neuron = IELIF(4)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.q = IELIF(4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)[None]
        s = self.neuron(x)
        x = x + timewise(self.depthwise, timewise(self.conv, s))
        q = self.q(x)
        x = spike_attention(q, q, q, 2, 0.25)
        return self.head(x.mean((3, 4))).mean(0)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = quantize_(Tiny(), FOUR_BITS)
    return profile_model(model, torch.randn(3, 3, 16, 16), name="tiny", batch=2)


def test_shapes_and_kinds(tiny):
    found = {op.name: op for op in tiny.layers}
    assert [(op.name, op.kind) for op in tiny.layers] == [
        ("stem", cost.FIRST), ("conv", cost.COUNT), ("depthwise", cost.DENSE), ("model.product1", cost.ATTENTION),
        ("model.product2", cost.ATTENTION), ("head", cost.DENSE)]
    assert found["stem"].macs == 8 * 27 * 64 and found["stem"].inputs == 3 * 256
    assert found["conv"].macs == 8 * 72 * 64 and found["depthwise"].macs == 8 * 9 * 64
    assert found["conv"].levels == 4 and found["conv"].packed_bytes == 288
    # two heads of 4 channels over 64 tokens: k^T v and q (k^T v)
    assert found["model.product1"].macs == found["model.product2"].macs == 2 * 4 * 4 * 64
    assert found["head"].macs == 40 and found["head"].inputs == 8
    assert tiny.weights == 216 + 576 + 72 + 40 and tiny.images == 3


def test_counts_are_those_of_the_neuron():
    torch.manual_seed(1)
    model, images = Tiny(), torch.randn(4, 3, 16, 16)
    report = profile_model(model, images, batch=3)  # 3 and 1: an uneven last batch
    with torch.no_grad():
        counts = 4 * model.neuron(model.stem(images)[None])
    layer = next(op for op in report.layers if op.name == "conv")
    assert layer.mean_count == pytest.approx(float(counts.mean()))
    assert layer.density == pytest.approx(float((counts > 0).float().mean()))
    assert layer.synaptic_ops == pytest.approx(float(counts.mean()) * layer.macs)
    assert layer.weight_bits == 32


def test_the_residual_sum_is_traffic(tiny):
    # one sum of 8 x 8 x 8 potentials: 4 bytes read, 4 written
    assert tiny.residuals == ((2 * 4 * 512, 4 * 512),) and tiny.states == ()
    assert tiny.bit_aware.potentials_pj == tiny.quantized_ann.potentials_pj == 2 * 4 * 512 / 8 * 10


def test_time_steps_of_lif():
    torch.manual_seed(0)
    model = MetaSpikeFormer((8, 8, 16, 16), (1, 1), heads=2, num_classes=5, time_steps=3, neuron=LIF,
                            attention_neuron=LIF, stem=(3, 1), strides=(1, 2, 2, 1), layer_scale=None, topology="strict")
    report = profile_model(model.train(), torch.randn(4, 3, 16, 16))
    assert model.training, "the mode is put back"
    assert [op.steps for op in report.layers] == [1] + [3] * (len(report.layers) - 1)
    assert report.layers[0].macs == 4 * 27 * 256  # the image does not change: the stem runs once
    assert {op.kind for op in report.layers} == {cost.FIRST, cost.SPIKE, cost.ATTENTION}
    assert report.states and all(moved == 6 * held for moved, held in report.states)
    assert 0 <= report.spikes_per_neuron <= 3


def test_strict_topology_has_products_in_the_first_layer_only():
    torch.manual_seed(0)
    report = profile_model(quantize_(cifar_small(), FOUR_BITS), torch.randn(2, 3, 32, 32))
    assert [op.name for op in report.layers if op.kind in (cost.FIRST, cost.DENSE)] == ["stem.conv"]


def test_published_energy_of_the_15m_model():
    """Mean count 0.25 of 4, RepConv merged, nothing off for 4 bits: the published 2.5 mJ (methods: QSD-Transformer)."""
    torch.manual_seed(0)
    with torch.no_grad():
        report = profile_model(quantize_(imagenet_15m(), FOUR_BITS), torch.randn(1, 3, 224, 224))
    assert report.weights == 15_015_072
    assert cost.published_params_m(report.sizes) == pytest.approx(1.877, abs=5e-4)
    merged = sum(op.macs if op.published_macs is None else op.published_macs for op in report.layers)
    assert merged == pytest.approx(9.96e9, rel=0.01)
    layers = [replace(op, mean_count=0.25, published_count=0.25) for op in report.layers]
    assert sum(cost.published_pj(op) for op in layers) / 1e9 == pytest.approx(2.5, rel=0.02)
    # counted as built, the real-valued inputs of RepConv and SepConv are products and cost more than all spikes
    assert sum(cost.literature_pj(op) for op in layers) / 1e9 == pytest.approx(3.2, abs=0.3)


def test_statistics_are_of_spikes_only(tiny):
    rows = {row["layer"]: row for row in tiny.to_dict()["layers"]}
    assert {name for name, row in rows.items() if row["mean_count"] is None} == {"stem", "depthwise", "head"}
    assert all((row["mean_count"] is None) == (row["density"] is None) for row in rows.values())


def test_forms(tiny):
    data = json.loads(json.dumps(tiny.to_dict()))
    assert data["totals"]["packed_bytes"] == sum(row["packed_bytes"] for row in data["layers"])
    assert data["totals"]["literature_pj"] == pytest.approx(sum(row["literature_pj"] for row in data["layers"]))
    assert data["constants"]["DRAM"]["unit"] == "pJ per 64 bits"
    console = Console(width=tiny.WIDTH, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(tiny)
    text = console.export_text()
    assert "Horowitz" in text and "model.product2" in text and "8x8x3x3" in text


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        profile_model(Tiny(), torch.zeros(0, 3, 16, 16))


def test_a_bit_budget_that_is_a_mean_says_so():
    def text(*layers):
        table = Report("x", "torch model", layers, 1, 0.1)._summary()
        return " ".join(str(cell) for cell in table.columns[1]._cells)

    one = cost.Operation("a", cost.SPIKE, (), 900, 10, 1, 1, 1, steps=2, mean_count=0.2)
    eight = cost.Operation("head", cost.SPIKE, (), 100, 10, 8, 1, 1, steps=2, mean_count=0.2)
    assert "bit budget 2 (T x weight bits x spike bits)" in text(one)
    assert "bit budget 3.4 (T x weight bits x spike bits: the mean over MACs of layers from 2 to 16)" in text(one, eight)
