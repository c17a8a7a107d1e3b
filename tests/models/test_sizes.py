"""The published networks as files: whole sizes, random weights. Sizes do not depend on training."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bitspike import cost
from bitspike.deploy import Steps, load
from bitspike.layers import quantize_
from bitspike.models import bestformer, spiking_resnet
from bitspike.spec import QuantSpec, Scheme

from .test_export import exported

PIXELS = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)


@pytest.mark.slow
def test_bestformer_4_384_for_cifar10_is_at_most_1_45_megabytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bestformer.cifar_4_384()
    assert sum(p.numel() for p in model.parameters()) == 9_314_884
    first_and_last = {name: Scheme("max", 8) for name in ("tokenizer.stages.0.conv", "head", "head2")}
    quantize_(model, QuantSpec({"*": Scheme("binary"), **first_and_last}))
    report = exported(model.eval(), tmp_path / "a.bitspike", PIXELS, 4, classes=10)
    assert sum(layer.weights for layer in report.layers if layer.bits == 1) == 9_275_904
    assert report.bytes <= 1_450_000
    assert report.operations["attention_map"] == report.operations["attention_read"] == 4


@pytest.mark.slow
def test_q_snn_resnet19_is_at_most_1_75_megabytes_and_its_potentials_are_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = spiking_resnet.cifar_resnet19()
    quantize_(model, QuantSpec({"*": Scheme("binary", options={"scale": "pow2", "gradient": "ir_net"}),
                                "stem.conv": Scheme("max", 8, "tensor"), "head": Scheme("max", 8, "tensor"),
                                "*neuron*": Scheme("membrane", 4)}))
    report = exported(model.eval(), tmp_path / "a.bitspike", PIXELS, 2, classes=10)
    assert report.weights == 12_558_720
    assert report.bytes <= 1_750_000
    weights_alone = cost.published_bytes((layer.weights, layer.bits) for layer in report.layers)
    assert weights_alone == pytest.approx(1.577e6, rel=1e-3) and report.bytes > weights_alone
    steps = Steps(load(tmp_path / "a.bitspike"))
    neurons = 1_441_792
    assert steps.state_bytes == neurons * 4 // 8
