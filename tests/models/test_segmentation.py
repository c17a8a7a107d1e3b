"""Semantic FPN: shapes, gradients, windows, and what it may be built on."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitspike.exporting.trace import trace
from bitspike.layers import quantizable, quantize_
from bitspike.models.compact_spikeformer import CompactSpikeformer
from bitspike.models.meta_spikeformer import MetaSpikeFormer
from bitspike.models.segmentation import SemanticFPN, dense_neuron, semantic_fpn_small, slide
from bitspike.neurons import IELIF, LIF
from bitspike.spec import QuantSpec, Scheme


def small(auxiliary=2, neuron=dense_neuron, **options):
    torch.manual_seed(0)
    backbone = MetaSpikeFormer((8, 8, 16, 24), depths=(1, 1), heads=2, layer_scale=0.5, topology="strict", **options)
    return SemanticFPN(backbone, 5, 12, neuron, auxiliary)


def test_shapes():
    model = small()
    images = torch.randn(2, 3, 64, 96)
    out = model(images)
    assert model.strides == (4, 8, 16)
    assert out["out"].shape == (2, 5, 16, 24) and out["aux"].shape == (2, 5, 4, 6)
    assert model.eval()(images).shape == (2, 5, 16, 24)


def test_every_parameter_gets_a_gradient():
    model = small()
    out = model(torch.randn(2, 3, 64, 64))
    (out["out"].square().mean() + out["aux"].square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_without_an_auxiliary_head_the_output_is_a_tensor():
    assert small(auxiliary=None)(torch.randn(1, 3, 64, 64)).shape == (1, 5, 16, 16)


def test_a_batch_is_its_pictures():
    model = small().eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(images), torch.cat([model(i[None]) for i in images]), atol=1e-5)


def test_time_steps():
    model = small(time_steps=2, neuron=lambda: LIF(scale_input=False)).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5, 16, 16)
    assert model(torch.randn(4, 1, 3, 64, 64)).shape == (1, 5, 16, 16)


def test_neck_and_head_are_quantized_by_the_spec():
    model = quantize_(small(), QuantSpec({"*": Scheme("uniform", 4)}))
    names = [name for name in quantizable(model) if not name.startswith("backbone.")]
    assert {name.split(".")[0] for name in names} == {"neck", "branches", "classes", "auxiliary"}
    assert not any(name.startswith("backbone.head") for name in quantizable(model))
    model(torch.randn(1, 3, 64, 64))["out"].sum().backward()


def test_one_traced_graph():
    calls = [node for node in trace(small().eval()).graph.nodes if node.target is F.interpolate]
    assert [node.kwargs["mode"] for node in calls] == ["nearest", "nearest", "bilinear", "bilinear", "bilinear"]
    assert all(node.kwargs["scale_factor"] == 2 and not node.kwargs.get("align_corners") for node in calls)


def test_the_neuron_has_the_published_range_in_both_modes():
    neuron = dense_neuron()
    x = torch.tensor([[-1.0, 0.4, 0.5, 1.49, 3.6, 9.0]])
    for mode in (True, False):
        assert neuron.train(mode)(x).tolist() == [[0, 0, 0.25, 0.25, 1, 1]]
    assert isinstance(neuron, IELIF)


def test_errors():
    with pytest.raises(TypeError, match="forward_features"):
        SemanticFPN(nn.Conv2d(3, 3, 1), 5)
    with pytest.raises(ValueError, match="divides the picture's"):
        SemanticFPN(CompactSpikeformer((8, 16, 16), heads=2), 5)
    with pytest.raises(ValueError, match=r"auxiliary=4; allowed: None or a map 0\.\.3"):
        small(auxiliary=4)


def test_windows_of_a_pixelwise_model_change_nothing():
    net = nn.Conv2d(3, 2, 1)
    images = torch.randn(2, 3, 37, 50)
    for window, step in ((16, None), (16, 16), (20, 3), (99, None)):
        assert torch.allclose(slide(net, images, window, step), net(images), atol=1e-6)


def test_a_window_sees_nothing_else():
    net = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(net.weight)
    images = torch.ones(1, 1, 8, 8)
    found = slide(net, images, 4, 4)
    assert found[0, 0, 3, 3] == 4 and found[0, 0, 1, 1] == 9  # a corner of its own window


def test_windows_are_averaged():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3), keepdim=True)

    images = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 4, 6)
    found = slide(Mean(), images, 4, 2)[0, 0, 0]
    assert found.tolist() == [1.5, 1.5, 2.5, 2.5, 3.5, 3.5]
    with pytest.raises(ValueError, match="at least 1"):
        slide(Mean(), images, 0)


def test_the_small_one():
    model = semantic_fpn_small(levels=2)
    assert {m.levels for m in model.modules() if isinstance(m, IELIF)} == {2}
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 11, 16, 16)
