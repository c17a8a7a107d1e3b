"""What can be exported, in which spelling, and what is refused with which words."""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from bitspike.deploy import artifact, load
from bitspike.exporting import ExportError, ExportReport, calibrate_norms, explain, export_model
from bitspike.exporting.emit import fixed_pair, fixed_point
from bitspike.exporting.trace import regroup
from bitspike.layers import quantize_
from bitspike.models.blocks import LayerScale, NormPad, as_sequence
from bitspike.neurons import IELIF, LIF
from bitspike.spec import QuantSpec, Scheme

MEAN, STD = [0.4] * 3, [0.25] * 3
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)


class Net(nn.Module):
    """Two convolutions with counts between them, and any function of the model and of the second one's input after that."""

    def __init__(self, rest: Callable[[Net, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.neuron = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), IELIF(4)
        self.conv2, self.norm2, self.neuron2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), IELIF(4)
        self.neuron3, self.head = IELIF(16, gain=32.0), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.1, 1.0, -0.3]))
        for name, module in modules.items():
            self.add_module(name, module)
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self, self.neuron(self.norm(self.conv(x))))


def end(net: Any, y: Tensor) -> Tensor:
    """Neuron, mean over space, neuron, linear head."""
    return net.head(net.neuron3(net.neuron2(y).mean((2, 3))))  # type: ignore[no-any-return]


def export(net: nn.Module, path: Path, **options: Any) -> ExportReport:
    values: dict[str, Any] = {"mean": MEAN, "std": STD, "image_size": 8, "classes": list("abcd"),
                              "calibration_images": PIXELS, "name": "test", "min_agreement": 0.0}
    return export_model(net, path, **{**values, **options})


def prepared(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    quantize_(net, QuantSpec({"*": Scheme("lsq", 4)}))
    calibrate_norms(net, PIXELS, MEAN, STD)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0, 0.5)
    return net.eval()


#: spelling -> (forward after the first neuron, extra modules, largest difference of a logit)
REAL = 0.2  # one real-valued input in 8 bits
FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], float]] = {
    "residual": (lambda n, x: end(n, x + n.norm2(n.conv2(x))), {}, 1e-4),
    "torch.add": (lambda n, x: end(n, torch.add(n.norm2(n.conv2(x)), x)), {}, 1e-4),
    "minus": (lambda n, x: end(n, x - n.norm2(n.conv2(x))), {}, 1e-4),
    "negative": (lambda n, x: end(n, -n.norm2(n.conv2(x)) + 1), {}, 1e-4),
    "in place": (lambda n, x: end(n, n.norm2(n.conv2(x)).add_(x)), {}, 1e-4),
    "constants": (lambda n, x: end(n, (2 * n.conv2(x) - 0.5) / 3 + 1.25), {}, 1e-4),
    "constant minus": (lambda n, x: end(n, 0.75 - n.norm2(n.conv2(x))), {}, 1e-4),
    "scale per channel": (lambda n, x: end(n, n.conv2(x) * n.scale[:, None, None]), {}, 1e-4),
    "layer scale": (lambda n, x: end(n, x + n.ls(n.conv2(x))), {"ls": LayerScale(6, 0.3)}, 1e-4),
    "tiny layer scale": (lambda n, x: end(n, x + n.ls(n.conv2(x))), {"ls": LayerScale(6, 1e-6)}, 1e-4),
    "two readers": (lambda n, x: (lambda y: end(n, y + n.norm2(n.conv2(n.neuron2(y)))))(n.conv2(x)), {}, 1e-4),
    "norm after a sum": (lambda n, x: end(n, n.norm2(n.conv2(x) + x)), {}, 1e-4),
    "norm of spikes": (lambda n, x: end(n, n.conv2(n.norm2(x))), {}, REAL),
    "dropout": (lambda n, x: end(n, n.drop(functional.dropout(n.conv2(x), 0.5, n.training))), {"drop": nn.Dropout(0.5)}, 1e-4),
    "max pool": (lambda n, x: end(n, n.norm2(n.pool(n.conv2(x)))), {"pool": nn.MaxPool2d(2)}, 1e-4),
    "max pool, then a falling map": (lambda n, x: end(n, -n.pool(n.conv2(x))), {"pool": nn.MaxPool2d(3, 2, 1)}, 1e-4),
    "max pool of spikes": (lambda n, x: end(n, n.conv2(functional.max_pool2d(x, 2))), {}, 1e-4),
    "max pool of a sum": (lambda n, x: end(n, functional.max_pool2d(n.conv2(x) + x, (2, 1), stride=2)), {}, 1e-4),
    "average pool of spikes": (lambda n, x: end(n, n.pool(x) + 0.1), {"pool": nn.AvgPool2d(2)}, 1e-4),
    "average pool of potentials": (lambda n, x: end(n, functional.avg_pool2d(n.conv2(x), 4, 2)), {}, REAL),
    "average pool of everything": (lambda n, x: n.head(functional.avg_pool2d(n.conv2(x), 8).flatten(1)), {}, REAL),
    "adaptive 1": (lambda n, x: n.head(n.neuron2(n.pool(n.conv2(x))).flatten(1)), {"pool": nn.AdaptiveAvgPool2d(1)}, 1e-4),
    "adaptive 2": (lambda n, x: end(n, functional.adaptive_avg_pool2d(x, (2, 4))), {}, 1e-4),
    "mean twice": (lambda n, x: n.head(n.neuron2(n.conv2(x).flatten(2).mean(-1))), {}, 1e-4),
    "mean keepdim": (lambda n, x: n.head(n.neuron2(n.conv2(x).mean(dim=(-1, -2), keepdim=True)).squeeze(-1).squeeze(-1)),
                     {}, 1e-4),
    "head on tokens": (lambda n, x: n.head(x.flatten(2).transpose(1, 2)).mean(1), {}, 1e-4),
    "flatten and linear": (lambda n, x: n.big(torch.flatten(x, 1)), {"big": nn.Linear(6 * 64, 4)}, 1e-4),
    "view and linear": (lambda n, x: n.big(x.view(x.size(0), -1)), {"big": nn.Linear(6 * 64, 4)}, 1e-4),
    "nn.Flatten": (lambda n, x: n.big(n.flat(x)), {"big": nn.Linear(6 * 64, 4), "flat": nn.Flatten()}, 1e-4),
    "shape arithmetic": (lambda n, x: n.big(x.reshape(x.shape[0], x.shape[1] * 64)), {"big": nn.Linear(6 * 64, 4)}, 1e-4),
    "conv1d on tokens": (lambda n, x: n.one(x.flatten(2)).mean(2), {"one": nn.Conv1d(6, 4, 1)}, 1e-4),
    "grouped and strided": (lambda n, x: end(n, n.g(x)), {"g": nn.Conv2d(6, 6, (3, 2), (2, 1), (1, 0), groups=3)}, 1e-4),
    "depthwise with two outputs": (lambda n, x: n.d(x).mean((2, 3))[:, None].flatten(1),
                                   {"d": nn.Conv2d(6, 12, 3, groups=6)}, 1e-4),
    "functional conv": (lambda n, x: end(n, functional.conv2d(x, n.scale.view(6, 1, 1, 1), padding=0, groups=6)), {}, 0.02),
    "real input": (lambda n, x: end(n, n.last(n.conv2(x))), {"last": nn.Conv2d(6, 6, 1)}, REAL),
    "real depthwise input": (lambda n, x: end(n, n.last(n.conv2(x))), {"last": nn.Conv2d(6, 6, 3, padding=1, groups=6)}, REAL),
    "border through a norm": (lambda n, x: end(n, n.dw(n.norm2(n.pad(n.conv2(x))))),
                              {"pad": NormPad(6, 2), "dw": nn.Conv2d(6, 6, 5, groups=6)}, REAL),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_program_computes_what_the_model_computes(form: str, tmp_path: Path) -> None:
    rest, modules, limit = FORMS[form]
    net = prepared(Net(rest, **modules))
    with torch.no_grad():
        classes = net(torch.zeros(1, 3, 8, 8)).shape[-1]
    report = export(net, tmp_path / "a.bitspike", classes=[str(i) for i in range(classes)])
    assert report.largest_difference <= limit
    assert (tmp_path / "a.bitspike").stat().st_size == report.bytes


def test_time_may_be_repeated_in_any_spelling_and_averaged_by_the_caller(tmp_path: Path) -> None:
    class Timed(nn.Module):
        def __init__(self, repeat: Callable[[Tensor], Tensor], mean: bool) -> None:
            super().__init__()
            self.neuron, self.count, self.head = LIF(threshold=0.25), IELIF(16), nn.Linear(3, 4)
            self.repeat, self.mean = repeat, mean

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.count(self.neuron(self.repeat(x)).mean((3, 4))))
            return y.mean(0) if self.mean else y

    spellings: list[Callable[[Tensor], Tensor]] = [
        lambda x: as_sequence(x, 3), lambda x: x.unsqueeze(0).expand(3, -1, -1, -1, -1),
        lambda x: x[None].repeat(3, 1, 1, 1, 1), lambda x: torch.stack([x] * 3)]
    logits = []
    for spelling in spellings:
        for mean in (True, False):
            torch.manual_seed(0)
            net = prepared(Timed(spelling, mean))
            report = export(net, tmp_path / "a.bitspike", time_steps=3)
            assert report.largest_difference < 1e-5
            assert report.operations["lif"] == 1 and report.operations["mean"] == 2
            logits.append(load(tmp_path / "a.bitspike")(PIXELS))
    assert all(np.array_equal(logits[0], other) for other in logits)


def test_without_state_a_repeated_picture_is_computed_once(tmp_path: Path) -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron, self.count, self.head = IELIF(4), IELIF(16), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.count(self.neuron(as_sequence(x, 4)).mean((3, 4)))).mean(0)  # type: ignore[no-any-return]

    report = export(prepared(Repeated()), tmp_path / "a.bitspike", time_steps=4)
    assert all(row["shape"][0] == 1 for row in explain(tmp_path / "a.bitspike"))
    assert report.largest_difference < 1e-5


# ---------------------------------------------------------------------------------------------- refusals
class Upsampling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="bicubic")


def branching(n: Any, x: Tensor) -> Tensor:
    return end(n, x if x.mean() > 0 else n.conv2(x))


class Double(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def foreign() -> nn.Module:
    layer = nn.Conv2d(6, 6, 1)
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], str]] = {
    "unknown module": (lambda n, x: end(n, n.act(x)), {"act": nn.ReLU()}, r"module 'act' \(ReLU\) cannot be exported"),
    "unknown function": (lambda n, x: end(n, torch.relu(x)), {}, r"operation 'relu' in the model's own forward"),
    "where it stands": (lambda n, x: end(n, n.inner(x)), {"inner": nn.Sequential(Upsampling())}, r"'interpolate' in inner.0"),
    "unknown method": (lambda n, x: end(n, x.sigmoid()), {}, r"operation 'sigmoid'"),
    "product": (lambda n, x: end(n, x * n.conv2(x)), {}, r"'mul' .* product of two activations"),
    "branch": (branching, {}, r"Net.forward cannot be written down .* Branches"),
    "a part": (lambda n, x: end(n, x[:, :, 1:]), {}, r"selects a part"),
    "dilation": (lambda n, x: end(n, n.d(x)), {"d": nn.Conv2d(6, 6, 3, padding=2, dilation=2)}, r"d: .* with dilation"),
    "reflect": (lambda n, x: end(n, n.d(x)), {"d": nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")}, r"mode='reflect'"),
    "wide conv1d": (lambda n, x: n.d(x.flatten(2)).mean(2), {"d": nn.Conv1d(6, 4, 3)}, r"d: a Conv1d with kernel 3"),
    "ceil_mode": (lambda n, x: end(n, n.p(x)), {"p": nn.MaxPool2d(3, 2, ceil_mode=True)}, r"ceil_mode"),
    "uneven pool": (lambda n, x: end(n, n.p(x)), {"p": nn.AdaptiveAvgPool2d(3)}, r"in p .* pooling of 8x8 pixels to 3x3"),
    "padded average": (lambda n, x: end(n, n.p(x)), {"p": nn.AvgPool2d(3, 1, 1)}, r"average pooling with padding"),
    "mean of rows": (lambda n, x: n.head(x.mean(3).mean(2)), {}, r"mean over W"),
    "batch statistics": (lambda n, x: end(n, n.b(x)), {"b": nn.BatchNorm2d(6, track_running_stats=False)},
                         r"b: BatchNorm2d has no running statistics"),
    "constant in space": (lambda n, x: end(n, x * torch.arange(8.0)), {}, r"varies along W"),
    "lif without time": (lambda n, x: end(n, n.lif(x)), {"lif": LIF()}, r"lif: LIF runs over time"),
    "linear over pixels": (lambda n, x: n.lin(x).mean((2, 3)), {"lin": nn.Linear(8, 8)}, r"lin: .* over the axis W"),
    "border to nowhere": (lambda n, x: end(n, n.pad(x)), {"pad": NormPad(6, 1)}, r"border of a NormPad"),
    "border twice": (lambda n, x: end(n, n.d(n.pad(x))), {"pad": NormPad(6, 1), "d": nn.Conv2d(6, 6, 3, padding=1)},
                     r"needs padding=0"),
    "no logits": (lambda n, x: n.conv2(x), {}, r"with 4 class names it must return"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_named(case: str, tmp_path: Path) -> None:
    rest, modules, message = REFUSED[case]
    net = Net(rest, **modules).eval()
    with pytest.raises(ExportError, match=re.compile(message, re.DOTALL)):
        export(net, tmp_path / "a.bitspike")
    assert not list(tmp_path.iterdir())


def test_a_foreign_parametrization_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="odd: its weight has a parametrization"):
        export(Net(lambda n, x: end(n, n.odd(x)), odd=foreign()), tmp_path / "a.bitspike")


def test_full_precision_can_be_forbidden(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="conv: full-precision weights, and allow_float is off"):
        export(Net(lambda n, x: end(n, n.conv2(x))), tmp_path / "a.bitspike", allow_float=False)


def test_too_little_agreement_leaves_no_file_and_an_older_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitspike.exporting.export._compare", lambda *_: (0.98, 1.0))
    net = prepared(Net(lambda n, x: end(n, n.conv2(x))))
    target = tmp_path / "a.bitspike"
    with pytest.raises(ExportError, match=r"agrees with the torch model on .* of 32 pictures .* nothing was written"):
        export(net, target, min_agreement=0.99)
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"older")
    with pytest.raises(ExportError):
        export(net, target, min_agreement=0.99)
    assert target.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"calibration_images": PIXELS.astype(float)}, "must be uint8"),
    ({"calibration_images": PIXELS[:0]}, "must be uint8"),
    ({"image_size": 9}, r"must be uint8 \[N, 9, 9, 3\]"),
    ({"calibration_images": np.stack([PIXELS] * 2)}, r"sequences of frames uint8 \[1, N, 8, 8, 3\]; found uint8 \[2, 32"),
    ({"check_images": PIXELS[None]}, "both be pictures or both be sequences"),
    ({"inner_bits": 12}, "inner_bits=12; allowed: 8, 16"),
    ({"channels": 17, "mean": [0.5] * 17, "std": [0.5] * 17}, "17 channels cannot be exported"),
    ({"mean": [0.5]}, "must be 3 numbers each"),
    ({"std": [0.5, 0.5, 0.0]}, "std positive"),
    ({"classes": ["one"]}, "with 1 class names"),
    ({"classes": [0, 1, 2, 3]}, r"classes must be a list of texts.*\[0, 1, 2, 3\]"),
    ({"classes": "abcd"}, "classes must be a list of texts"),
    ({"min_agreement": 99}, "min_agreement=99"),
    ({"min_agreement": float("nan")}, "min_agreement=nan"),
    ({"time_steps": 2}, "runs 1 time steps, time_steps=2"),
])
def test_arguments_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(Net(lambda n, x: end(n, n.conv2(x))), tmp_path / "a.bitspike", **options)
    assert not list(tmp_path.iterdir())


def test_a_sum_past_int32_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 300 * 300, 2))
    nn.init.ones_(net[1].weight)  # type: ignore[arg-type]
    pixels = np.zeros((2, 300, 300, 3), np.uint8)
    with pytest.raises(ExportError, match=r"1: an accumulator may reach \d+, past 2\^31"):
        export(net, tmp_path / "a.bitspike", calibration_images=pixels, image_size=300, classes=["a", "b"])


# ------------------------------------------------------------------------------------------- the artifact
def test_the_file_tells_what_it_is(tmp_path: Path) -> None:
    net = prepared(Net(lambda n, x: end(n, x + n.norm2(n.conv2(x)))))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = export(net, tmp_path / "a.bitspike", provenance={"recipe": "test"}, min_agreement=0.99, check_images=PIXELS[:20])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    header = artifact.read(tmp_path / "a.bitspike").header
    assert header["provenance"] == {"recipe": "test", "agreement": {
        "top1": report.agreement, "largest_logit_difference": report.largest_difference, "samples": 20,
        "with": "torch, float32"}}
    assert header["fraction_bits"] == report.fraction_bits
    rows = explain(tmp_path / "a.bitspike")
    assert [(row["op"], row["layer"]) for row in rows] == [
        ("conv", "conv"), ("quantize", "neuron"), ("conv", "conv2"), ("affine", ""), ("add", ""), ("quantize", "neuron2"),
        ("mean", ""), ("quantize", ""), ("conv", "head")] or rows[0]["layer"] == "conv"
    assert sum(row["weights"] for row in rows) == report.weights == 3 * 54 + 6 * 54 + 24
    assert "agreement with the torch model in float32" in str(report)


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(3)), nn.Flatten(), nn.Linear(192, 4))
    export(net, tmp_path / "a.bitspike")
    assert sum(name.endswith(".b") for name in artifact.read(tmp_path / "a.bitspike").tensors) == 3


def test_large_potentials_cost_fraction_bits(tmp_path: Path) -> None:
    small = export(prepared(Net(lambda n, x: end(n, n.conv2(x) + x))), tmp_path / "a.bitspike")
    large = export(prepared(Net(lambda n, x: end(n, (n.conv2(x) + x) * 1e4 + x))), tmp_path / "b.bitspike")
    assert large.fraction_bits < small.fraction_bits


def test_an_offset_that_needs_room_costs_fraction_bits_and_one_past_all_bounds_is_refused(tmp_path: Path) -> None:
    net = prepared(Net(lambda n, x: end(n, n.norm2(n.conv2(x)))))
    norm: Any = net.norm2
    norm.running_mean.fill_(3000.0)
    assert export(net, tmp_path / "a.bitspike").fraction_bits < 20
    norm.running_mean.fill_(1e9)
    with pytest.raises(ExportError, match="running variance"):
        export(net, tmp_path / "b.bitspike")


# ------------------------------------------------------------------------------------------------- pieces
@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_fixed_point_is_as_precise_as_it_says(values: list[float]) -> None:
    numbers = np.array(values)
    m, s = fixed_point(numbers)
    assert m.dtype == np.int32 and 0 <= s <= 62
    assert np.abs(m / 2.0**s - numbers).max() <= max(np.abs(numbers).max() * 2.0**-30, 2.0**-63)


@pytest.mark.parametrize("exponent", range(-30, 30))
def test_powers_of_two_are_exact_and_reduced(exponent: int) -> None:
    m, s = fixed_pair(2.0**exponent)
    assert m / 2**s == 2.0**exponent and (m == 1 or s == 0)


def test_factors_past_int32_are_refused() -> None:
    with pytest.raises(ExportError, match="does not fit"):
        fixed_point(np.array([2.0**31]))


def test_regroup_follows_axes_through_reshapes() -> None:
    axes = (("T",), ("B",), ("C",), ("H",), ("W",))
    assert regroup(axes, (2, 3, 4, 5, 5), (6, 4, 25)) == (("T", "B"), ("C",), ("H", "W"))
    assert regroup(axes, (1, 3, 4, 1, 1), (1, 3, 4)) == (("T",), ("B",), ("C", "H", "W"))
    assert regroup(axes, (2, 3, 4, 5, 5), (3, 2, 4, 5, 5)) is None
