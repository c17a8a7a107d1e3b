"""A search takes converted networks like any other."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
snn = pytest.importorskip("snntorch", reason="snnTorch is not installed: pip install 'bitspike[snntorch]'")
pytest.importorskip("scipy", reason="scipy is not installed: pip install 'bitspike[search]'")

from torch import nn  # noqa: E402

from bitspike import Scheme, quantize_  # noqa: E402
from bitspike.interop.snntorch import convert  # noqa: E402
from bitspike.layers import quantizable, quantizer_of  # noqa: E402
from bitspike.searching import SearchData, search  # noqa: E402


def test_bits_for_a_network_of_snntorch():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), snn.Leaky(beta=0.9, init_hidden=True), nn.Flatten(), nn.Linear(4 * 6 * 6, 20),
                        snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(20, 3), snn.Leaky(beta=0.9, init_hidden=True))
    images = torch.randn(32, 1, 8, 8) * 2
    ours = convert(net, images[:2], steps=4)
    data = SearchData(images, torch.randint(3, (32,)))
    spec, report = search(ours, [Scheme("uniform", 2), Scheme("uniform", 4), Scheme("uniform", 8)], "bits=5", data,
                          forward=lambda model, x: model(x).mean(0))
    assert report.searched.totals.bits <= 5
    quantize_(ours, spec)
    assert list(quantizable(ours)) == ["0.0", "3", "5"]
    assert all(quantizer_of(layer).bits in (2, 4, 8) for layer in quantizable(ours).values())
