"""The published code's numbers: every file in the folder named by BITSPIKE_GOLDEN (default: ../shared/golden)."""
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch.nn.functional as F  # noqa: E402

from bitspike.neurons import IELIF, LIF, Triangle  # noqa: E402
from bitspike.quantizers import LSQ, Binary, MaxScale, Membrane  # noqa: E402

from .golden import FOLDER, build, files, system  # noqa: E402

FILES = files()
if not FILES:
    pytest.skip(f"no golden files in {FOLDER}; name their folder in BITSPIKE_GOLDEN", allow_module_level=True)

NETWORKS = [golden for golden in FILES if not golden.is_units]
UNITS = [golden for golden in FILES if golden.is_units]


def close(found, expected, tolerance, what):
    """Largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}"
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))
    assert error <= tolerance, f"{what}: relative difference {error:.3g}, allowed {tolerance:g}"


# ------------------------------------------------------------------------------------------------ networks
@torch.no_grad()
def run(golden, model, image, taps):
    """(outputs, {published module name: what our network has there})."""
    seen = {}
    hooks = []
    for name, expected in taps.items():
        tap = system(golden).tap(golden, name, tuple(expected.shape))
        hooks.append(model.get_submodule(tap.module).register_forward_hook(
            lambda _module, inputs, output, name=name, tap=tap: seen.__setitem__(name, tap.of(inputs[0], output))))
    outputs = system(golden).outputs(model, image)
    for hook in hooks:
        hook.remove()
    return outputs, seen


@pytest.mark.parametrize("golden", NETWORKS, ids=lambda golden: golden.path.stem)
def test_network(golden):
    """Outputs in float32 (1e-4) and, where recorded, float64 (1e-9), and every recorded tap."""
    model = build(golden)
    taps = golden.part("tap.")
    for dtype, prefix, tolerance in ((torch.float32, "output.", 1e-4), (torch.float64, "output64.", 1e-9)):
        expected_outputs = golden.part(prefix)
        if not expected_outputs and dtype == torch.float64:  # code that rounds in float32 may round differently in float64
            continue
        outputs, seen = run(golden, model.to(dtype), golden.tensors["input"].to(dtype), taps)
        for name, expected in taps.items():  # the release flattens time into the batch, or the image into tokens
            assert seen[name].numel() == expected.numel(), f"tap {name}: {list(seen[name].shape)}, {list(expected.shape)}"
            close(seen[name].reshape(expected.shape), expected, 1e-4, f"tap {name}, {dtype}")
        assert expected_outputs.keys() == {str(i) for i in range(len(outputs))}, f"outputs: {sorted(expected_outputs)}"
        for i, found in enumerate(outputs):
            close(found, expected_outputs[str(i)], tolerance, f"output {i}, {dtype}")


# --------------------------------------------------------------------------------------------- single pieces
def _ielif(group, scale):
    x = group["x"].clone().requires_grad_()
    return {"y": IELIF(4, scale=scale)(x[None])[0]}, {"grad_x": x}


def _lsq(group, bits):
    weight, x = group["weight"].clone().requires_grad_(), group["x"].clone().requires_grad_()
    quantizer = LSQ(bits, weight.shape[0])
    quantizer(weight)
    close(quantizer.scale.detach(), group["scale_init"], 1e-6, "first step")
    quantizer.scale.data.copy_(group["scale"])
    return ({"y": F.conv2d(x, quantizer(weight), padding=1)},
            {"grad_weight": weight, "grad_x": x, "grad_scale": quantizer.scale})


def _binary(group, quantizer):
    weight, x = group["weight"].clone().requires_grad_(), group["x"].clone().requires_grad_()
    if "t" in group:
        quantizer.anneal((math.log10(float(group["t"])) + 1) / 2)
        assert max(1 / float(group["t"]), 1.0) == pytest.approx(float(group["k"]))
    return {"y": F.conv2d(x, quantizer(weight), padding=1)}, {"grad_weight": weight, "grad_x": x}


def _first(group, quantizer):
    return {"y": F.conv2d(group["x"], quantizer(group["weight"]), padding=1)}, {}


def _membrane(group, bits):
    u = group["u"].clone().requires_grad_()
    return {"y": Membrane(bits, "batch")(u)}, {"grad_u": u}


def _lif(group, neuron):
    x = group["x"].clone().requires_grad_()
    return {"s": neuron(x)}, {"grad_x": x}


def _qsnn_lif(bits):
    return LIF(decay=0.5, scale_input=False, detach_reset=False, surrogate=Triangle(), strict=True,
               membrane=Membrane(bits, "batch"))


def evaluate(name, group):
    """Group of tensors -> ({output name: tensor}, {gradient name: leaf}). Errors: KeyError for an unknown piece."""
    digits = name.lstrip("abcdefghijklmnopqrstuvwxyz_")
    number = int(digits) if digits else 0
    kind = name.removesuffix(digits)
    if kind == "ielif":
        return _ielif(group, None)
    if kind == "ielif_attention":
        return _ielif(group, 0.5)
    if kind == "lsq":
        return _lsq(group, number)
    if kind == "best_binary":
        return _binary(group, Binary(zero="published"))
    if kind == "qsnn_binary":
        return _binary(group, Binary("ir_net", "pow2", "published"))
    if kind == "qsnn_first":  # recorded without gradients
        return _first(group, MaxScale(8, per_channel=False, top="signed"))
    if kind == "membrane":
        return _membrane(group, number)
    if kind in ("lif_hard", "lif_soft", "lif_half"):
        return _lif(group, {"lif_hard": LIF(), "lif_soft": LIF(reset="soft"), "lif_half": LIF(threshold=0.5)}[kind])
    if kind == "qsnn_lif":
        return _lif(group, _qsnn_lif(number))
    raise KeyError(f"unknown piece {name!r}")


def _groups():
    for golden in UNITS:
        for name in sorted({key.split(".")[0] for key in golden.tensors}):
            yield pytest.param(golden, name, id=f"{golden.path.stem}-{name}")


@pytest.mark.parametrize(("golden", "name"), _groups())
def test_unit(golden, name):
    """Values and gradients of one piece, to 1e-5."""
    group = golden.part(f"{name}.")
    if name == "ielif_attention":  # it shares the input and the outer gradient of "ielif"
        group = {**golden.part("ielif."), **group}
    outputs, leaves = evaluate(name, group)
    (output_name, output), = outputs.items()
    close(output.detach(), group[output_name], 1e-5, output_name)
    gradients = {key for key in group if key.startswith("grad_") and key != f"grad_{output_name}"}
    assert gradients <= leaves.keys()
    if gradients:
        output.backward(group[f"grad_{output_name}"])
    for key in gradients:
        close(leaves[key].grad, group[key], 1e-5, key)
