"""Every model that exists becomes an integer program that fires the same spikes, also step by step."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitspike.deploy import Steps, artifact, load
from bitspike.exporting import ExportError, ExportReport, explain, export_model
from bitspike.layers import quantize_
from bitspike.models.blocks import as_sequence
from bitspike.neurons import IELIF, LIF
from bitspike.quantizers import Membrane
from bitspike.spec import QuantSpec, Scheme

from .zoo import MODELS, lively

MEAN, STD = 0.4, 0.25
#: models with real-valued inputs of convolutions, which are rounded to 8 bits
ROUNDED = {"published", "published_lif", "events", "odd"}
#: share of a neuron's outputs that may differ: float32 and integer sums round differently, near a threshold only
BOUNDARY = 1e-4


def frames(shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pictures [N, H, W, C] or sequences [T, N, H, W, C] for a model that takes `shape`."""
    C, H, W = shape[-3:]
    front = (shape[0], count) if len(shape) == 5 else (count,)
    return np.random.default_rng(seed).integers(0, 256, (*front, H, W, C), np.uint8)


def normalised(pixels: Any) -> Tensor:
    return (torch.from_numpy(pixels).movedim(-1, -3).double() / 255 - MEAN) / STD


def built(name: str, binary: bool) -> tuple[nn.Module, tuple[int, ...], int]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build()
    weights = Scheme("binary", options={"scale": "pow2"}) if binary else Scheme("lsq", 4)
    quantize_(model, QuantSpec({"*": weights, "*head*": Scheme("max", 8)}))
    return lively(model).eval(), shape, shape[0] if len(shape) == 5 else int(getattr(model, "time_steps", 1))


def exported(model: nn.Module, path: Path, pixels: Any, steps: int, classes: int = 5, **options: Any) -> ExportReport:
    C = pixels.shape[-1]
    return export_model(model, path, mean=[MEAN] * C, std=[STD] * C, image_size=pixels.shape[-3:-1], channels=C,
                        classes=[f"class {i}" for i in range(classes)], calibration_images=pixels, name="test",
                        time_steps=steps, **{"min_agreement": 0.0, **options})


def wrong_counts(model: nn.Module, path: Path, pixels: Any) -> float:
    """Share of all neurons' outputs that the program computes differently than torch in float64."""
    model, seen = model.double(), {}
    hooks = [module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, torch.round(o / m.scale)))
             for name, module in model.named_modules() if isinstance(module, (LIF, IELIF))]
    with torch.no_grad():
        model(normalised(pixels))
    for hook in hooks:
        hook.remove()
    values, wrong, compared = load(path).trace(pixels), [0, 0], set()
    for row in explain(path):
        if row["op"] not in ("quantize", "lif", "lif_packed", "ielif") or row["layer"] not in seen:
            continue
        y, x = seen[row["layer"]], values[row["out"]]
        if row["layer"].endswith("map_neuron"):  # [T, B, heads, X, Y], stored as [T, B, X, heads, Y] or [T, B, Y, heads, X]
            expected = y.permute(0, 1, 3, 2, 4) if model.blocks[0].attn.product == "qk" else y.permute(0, 1, 4, 2, 3)
        else:
            expected = y.reshape(*y.shape[:3], *(y.shape[3:] or (1, 1))).permute(0, 1, 3, 4, 2)
        assert x.shape == expected.shape
        wrong[0] += int((x != expected.numpy()).sum())
        wrong[1] += x.size
        compared.add(row["layer"])
    assert compared == set(seen)
    assert sum(bool(y.any()) for y in seen.values()) > 0.9 * len(seen), "most neurons are silent; that would show little"
    return wrong[0] / wrong[1]


@pytest.mark.parametrize(("name", "binary"), [
    *((name, False) for name in MODELS),
    *((name, True) for name in MODELS if name.startswith(("best", "resnet", "vgg", "spik", "compact")))])
def test_every_model_is_exported_and_fires_the_same_spikes(name: str, binary: bool, tmp_path: Path) -> None:
    model, shape, T = built(name, binary)
    pixels = frames(shape, 3)
    path = tmp_path / "a.bitspike"
    report = exported(model, path, pixels, T)
    net = load(path)
    logits = net(pixels)
    steps = Steps(net, batch=3)
    for t in range(T):
        last = steps.push(pixels[t] if len(shape) == 5 else pixels)
    np.testing.assert_array_equal(last, logits)
    if name in ROUNDED:
        assert any(layer.input == "codes" for layer in report.layers)
        return
    assert wrong_counts(model, path, pixels) <= BOUNDARY
    with torch.no_grad():
        expected = model(normalised(pixels))
    expected = expected.mean(0) if expected.dim() == 3 else expected
    # heads on a real-valued stream read 16 bits of it
    assert np.abs(logits - expected.numpy()).max() <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_sixteen_bits_inside_fire_closer_than_eight(name: str, tmp_path: Path) -> None:
    model, shape, T = built(name, False)
    pixels = frames(shape, 3)
    wrong = {}
    for bits in (8, 16):
        exported(model, tmp_path / "a.bitspike", pixels, T, inner_bits=bits)
        wrong[bits] = wrong_counts(model, tmp_path / "a.bitspike", pixels)
    assert wrong[16] < wrong[8] / 5, wrong


# ---------------------------------------------------------------------------------------------- membranes
class Recurrent(nn.Module):
    """Two convolutions with neurons over T steps."""

    def __init__(self, T: int, **neuron: Any) -> None:
        super().__init__()
        self.time_steps = T
        self.conv1, self.neuron1 = nn.Conv2d(3, 8, 3, padding=1), LIF(**neuron)
        self.conv2, self.neuron2 = nn.Conv2d(8, 8, 3, padding=1), LIF(**neuron)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = as_sequence(x, self.time_steps)
        for conv, neuron in ((self.conv1, self.neuron1), (self.conv2, self.neuron2)):
            T, B = self.time_steps, x.shape[0]
            y = neuron(conv(y) if isinstance(y, torch.fx.Proxy) else conv(y.flatten(0, 1)).unflatten(0, (T, B)))
        return self.head(y.mean((3, 4))).mean(0)  # type: ignore[no-any-return]


def recurrent(bits: int, tanh: bool, pixels: Any, **neuron: Any) -> Recurrent:
    torch.manual_seed(0)
    net = Recurrent(4, **neuron)
    for layer in (net.conv1, net.conv2):
        nn.init.normal_(layer.weight, std=0.3)
    rules = [("*", Scheme("lsq", 4))]
    if bits:
        rules.append(("*neuron*", Scheme("membrane", bits, options={"tanh": tanh})))
    quantize_(net, QuantSpec(rules))
    with torch.no_grad():
        net.train()(normalised(pixels).float())  # the membranes' bounds
    return net.eval()


@pytest.mark.parametrize("neuron", [{"scale_input": False, "strict": True}, {"reset": "soft", "threshold": 0.7}], ids=str)
@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_low_bit_membranes_fire_the_same_spikes_and_are_stored_at_their_bits(bits: int, tanh: bool, neuron: Any,
                                                                            tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 10, 10, 3), np.uint8)
    net = recurrent(bits, tanh, pixels, **neuron)
    report = exported(net, tmp_path / "a.bitspike", pixels, 4)
    assert report.operations["lif_packed"] == 2
    assert report.largest_difference < 1e-3
    assert wrong_counts(net, tmp_path / "a.bitspike", pixels) <= BOUNDARY
    exported(recurrent(0, tanh, pixels, **neuron), tmp_path / "wide.bitspike", pixels, 4)
    packed, wide = (Steps(load(tmp_path / file)) for file in ("a.bitspike", "wide.bitspike"))
    assert packed.state_bytes * 32 == wide.state_bytes * bits


def test_a_membrane_that_ties_rounds_as_torch_does() -> None:
    """Half to even: potentials on the very edges between two codes."""
    from bitspike.deploy import ops
    from bitspike.exporting.membrane import membrane_table

    for bits in (2, 3, 5, 8):
        membrane = Membrane(bits, tanh=False)
        membrane.bound.fill_((2 ** (bits - 1) - 1) / 4)  # a code is worth 1/4
        found, step, table = membrane_table(membrane, 2.0**10, "neuron")
        u = torch.arange(-2 * 2**bits, 2 * 2**bits + 1) / 8  # every edge and every code
        expected = membrane.codes(u)[0].numpy()
        np.testing.assert_array_equal(ops.store((u * 2**10).numpy().astype(np.int32), table), expected)
        assert found == bits and step == 0.25


def test_late_reset_is_a_soft_reset_by_another_amount(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 10, 10, 3), np.uint8)
    net = recurrent(0, True, pixels, decay=0.8, scale_input=False, reset="late", strict=True)
    exported(net, tmp_path / "a.bitspike", pixels, 4)
    op = next(op for op in artifact.read(tmp_path / "a.bitspike").program.ops if op.name == "lif")
    assert op.attributes["amount"] > op.attributes["threshold"]
    assert wrong_counts(net, tmp_path / "a.bitspike", pixels) <= BOUNDARY


@pytest.mark.parametrize(("scheme", "message"), [
    (Scheme("max", 8, options={"top": "signed"}), r'conv1: MaxScale\(top="signed"\): a weight has code -508, beyond 8 bits'),
    (Scheme("binary", options={"zero": "published", "normalise": False}), r'conv1: Binary\(zero="published"\).* exactly zero'),
])
def test_codes_that_exist_in_training_only_are_refused_with_their_layer(scheme: Scheme, message: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 10, 10, 3), np.uint8)
    net = Recurrent(4)
    with torch.no_grad():
        net.conv1.weight.clamp_(0, 0.5).view(-1)[:3] = torch.tensor([0.5, -2.0, 0.0])
    quantize_(net, QuantSpec({"conv1": scheme}))
    with pytest.raises(ExportError, match=message):
        exported(net, tmp_path / "a.bitspike", pixels, 4)
    assert not list(tmp_path.iterdir())


def test_a_membrane_that_is_not_rounded_is_refused_with_advice(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 10, 10, 3), np.uint8)
    net = quantize_(Recurrent(4), QuantSpec({"*neuron*": Scheme("membrane", 32)}))
    with pytest.raises(ExportError, match=r"neuron1: a Membrane of 32 bits is a tanh that is not rounded.* 2\.\.8 bits"):
        exported(net, tmp_path / "a.bitspike", pixels, 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("neuron", "options", "message"), [
    ({}, {"scale": "batch"}, r'neuron1: a Membrane with scale="batch" depends on the other pictures .* "running"'),
    ({"reset": "late", "decay": 0.0}, None, r'neuron1: .* reset="late" and decay 0 has no integer form; use reset="soft"'),
    ({"reset": "late"}, {}, r'neuron1: .* reset="late" and a quantized membrane'),
])
def test_what_has_no_integer_form_is_refused_with_advice(neuron: Any, options: Any, message: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 10, 10, 3), np.uint8)
    net = Recurrent(4, **neuron)
    if options is not None:
        quantize_(net, QuantSpec({"*neuron*": Scheme("membrane", 4, options=options)}))
    with pytest.raises(ExportError, match=message):
        exported(net, tmp_path / "a.bitspike", pixels, 4)
    assert not list(tmp_path.iterdir())
