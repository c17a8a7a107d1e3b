"""The chain of equality: torch module = integers x scale = integer program."""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitspike.deploy import artifact, load
from bitspike.exporting import ExportReport, calibrate_norms, explain, export_model
from bitspike.layers import codes, latent_weight, quantize_
from bitspike.models.blocks import NormPad, as_sequence
from bitspike.models.meta_spikeformer import MetaSpikeFormer
from bitspike.neurons import IELIF, LIF, timewise
from bitspike.spec import QuantSpec, Scheme

SCHEMES = [
    Scheme("lsq", 2), Scheme("lsq", 3), Scheme("lsq", 4), Scheme("lsq", 8), Scheme("lsq", 4, "tensor"),
    Scheme("pow2", 2), Scheme("pow2", 4), Scheme("pow2", 3, "tensor"), Scheme("pow2_scale", 4),
    Scheme("binary"), Scheme("binary", options={"scale": "pow2", "gradient": "ir_net"}),
    Scheme("binary", options={"scale": "mean"}),
]
#: (neuron, time steps)
NEURONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ielif": (lambda: IELIF(4), 1),
    "ielif_gain": (lambda: IELIF(6, gain=2.5, scale=0.5), 1),
    "ielif_two_steps": (lambda: IELIF(4), 2),
    "ielif_carry": (lambda: IELIF(3, decay=0.5), 3),
    "ielif_carry_odd": (lambda: IELIF(4, gain=2.7, decay=0.3), 3),
    "lif": (lambda: LIF(threshold=0.5), 3),
    "lif_soft": (lambda: LIF(decay=0.7, threshold=0.5, reset="soft"), 3),
    "lif_none": (lambda: LIF(decay=0.25, scale_input=False, reset="none"), 2),
    "lif_strict": (lambda: LIF(decay=0.9, scale_input=False, strict=True), 4),
}
#: share of neuron outputs that may differ by one: float32 and integer sums round differently, near a threshold only
BOUNDARY = 1e-4


class Small(nn.Module):
    """Conv, norm, neuron, conv, norm, neuron, max-pool, flatten, linear; over T steps."""

    def __init__(self, neuron: Callable[[], nn.Module], time_steps: int, channels: int = 3) -> None:
        super().__init__()
        self.time_steps = time_steps
        self.conv1, self.norm1, self.neuron1 = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), neuron()
        self.conv2, self.norm2, self.neuron2 = nn.Conv2d(8, 12, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(12), neuron()
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(12 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.neuron1(timewise(self.norm1, timewise(self.conv1, as_sequence(x, self.time_steps))))
        y = self.neuron2(timewise(self.norm2, timewise(self.conv2, y)))
        return self.head(timewise(self.pool, y).flatten(2)).mean(0)  # type: ignore[no-any-return]


def pictures(n: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), np.uint8)


def normalised(pixels: Any, mean: list[float], std: list[float]) -> Tensor:
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def ready(net: nn.Module, scheme: Scheme | None, pixels: Any, mean: list[float], std: list[float]) -> nn.Module:
    """Quantized, with norms that fit the pictures and shifts that leave no symmetry."""
    if scheme is not None:
        quantize_(net, QuantSpec({"*": scheme}))
    calibrate_norms(net, pixels, mean, std)
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0, 0.5)
    return net.eval()


def exported(net: nn.Module, path: Path, pixels: Any, mean: list[float], std: list[float], **options: Any) -> ExportReport:
    with torch.no_grad():
        count = net(normalised(pixels[:1], mean, std)).shape[-1]
    return export_model(net, path, mean=mean, std=std, image_size=pixels.shape[1], channels=pixels.shape[3],
                        classes=[f"class {i}" for i in range(count)], calibration_images=pixels, name="test",
                        time_steps=int(getattr(net, "time_steps", 1)), **{"min_agreement": 0.0, **options})


def wrong_counts(net: nn.Module, path: Path, pixels: Any, mean: list[float], std: list[float]) -> dict[str, float]:
    """Neuron -> share of its outputs (as integers) that the program computes differently."""
    seen: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o / m.scale))
             for name, module in net.named_modules() if isinstance(module, (LIF, IELIF))]
    with torch.no_grad():
        net(normalised(pixels, mean, std))
    for hook in hooks:
        hook.remove()
    values = load(path).trace(pixels)
    wrong = {}
    for row in explain(path):
        if row["op"] in ("quantize", "lif", "ielif") and row["layer"] in seen:
            y = torch.round(seen[row["layer"]])
            expected = (y.permute(0, 1, 3, 4, 2) if y.dim() == 5 else y[:, :, None, None]).numpy()
            assert expected.any(), f"{row['layer']} is silent: the comparison would show nothing"
            wrong[row["layer"]] = float((values[row["out"]] != expected).mean())
    assert set(wrong) == set(seen)
    return wrong


# ------------------------------------------------------------------------------------- weights and codes
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.kind}{s.bits}{s.per[0]}")
def test_weights_are_integers_times_scale_in_torch_and_in_the_file(scheme: Scheme, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels, mean, std = pictures(8, 12), [0.4] * 3, [0.25] * 3
    net = ready(Small(lambda: IELIF(4), 1), scheme, pixels, mean, std)
    exported(net, tmp_path / "a.bitspike", pixels, mean, std)
    found = artifact.read(tmp_path / "a.bitspike")
    stored = {op.layer: op.attributes["weight"] for op in found.program.ops if op.name == "conv"}
    for name in ("conv1", "conv2", "head"):
        layer = net.get_submodule(name)
        integers, scale = codes(layer)
        weight: Any = layer.weight
        assert torch.equal(integers * scale.view(-1, *[1] * (weight.dim() - 1)), weight)
        expected = integers.reshape(5, 12, 3, 3) if name == "head" else integers
        assert np.array_equal(stored[name].transpose(0, 3, 1, 2), expected.numpy())


def test_full_precision_layers_become_eight_bit_codes_within_half_a_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels, mean, std = pictures(32, 12), [0.4] * 3, [0.25] * 3
    net = ready(Small(lambda: IELIF(4), 1), None, pixels, mean, std)
    report = exported(net, tmp_path / "a.bitspike", pixels, mean, std)
    assert all(layer.bits == 8 and layer.from_float for layer in report.layers)
    assert "deployed with 8 bits: conv1, conv2, head" in str(report)
    stored = artifact.read(tmp_path / "a.bitspike").program.ops[0].attributes["weight"].transpose(0, 3, 1, 2)
    weight = latent_weight(net.conv1).detach().numpy()  # type: ignore[arg-type]
    step = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
    assert np.abs(stored * step - weight).max() <= step.max() / 2 * 1.0001


# ---------------------------------------------------------------------------------- neurons and networks
@pytest.mark.parametrize("scheme", [SCHEMES[2], SCHEMES[6], SCHEMES[8], SCHEMES[10]], ids=lambda s: s.kind)
@pytest.mark.parametrize("neuron", NEURONS)
def test_neurons_of_the_program_fire_as_in_torch(neuron: str, scheme: Scheme, tmp_path: Path) -> None:
    make, steps = NEURONS[neuron]
    torch.manual_seed(0)
    pixels, mean, std = pictures(32, 12), [0.4] * 3, [0.25] * 3
    net = ready(Small(make, steps), scheme, pixels, mean, std)
    report = exported(net, tmp_path / "a.bitspike", pixels, mean, std, min_agreement=0.99)
    wrong = wrong_counts(net, tmp_path / "a.bitspike", pixels, mean, std)
    assert wrong["neuron1"] <= BOUNDARY
    assert wrong["neuron2"] <= 10 * BOUNDARY
    if not any(wrong.values()):
        assert report.largest_difference < 1e-4


@pytest.mark.parametrize(("neuron", "steps"), [(lambda: IELIF(4), 1), (lambda: IELIF(4, decay=0.5), 3),
                                               (lambda: LIF(threshold=0.125), 3),
                                               (lambda: LIF(threshold=0.125, reset="soft", strict=True), 3)])
@pytest.mark.parametrize("scheme", [Scheme("pow2_scale", 4), Scheme("binary", options={"scale": "pow2"})], ids=str)
def test_powers_of_two_make_the_program_exact(neuron: Any, steps: int, scheme: Scheme, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels, mean, std = pictures(16, 12), [0.0] * 3, [128 / 255] * 3
    net = quantize_(Small(neuron, steps), QuantSpec({"*": scheme}))
    for norm in (net.norm1, net.norm2):
        norm.eps = 0.0  # type: ignore[union-attr]
        norm.weight.data.fill_(0.5)  # type: ignore[union-attr]
    net.conv1.bias.data.fill_(0.0131)  # type: ignore[union-attr]  # off the grid: no sum is at a threshold
    net.norm2.bias.data.fill_(0.5)  # type: ignore[union-attr]
    net.head.bias.data.copy_(torch.arange(5) / 8)  # type: ignore[union-attr]
    net.eval()
    report = exported(net, tmp_path / "a.bitspike", pixels, mean, std)
    wrong = wrong_counts(net, tmp_path / "a.bitspike", pixels, mean, std)
    assert set(wrong.values()) == {0.0}
    assert report.agreement == 1
    assert report.largest_difference <= (0 if steps == 1 else 1e-6)  # the mean over three steps rounds


def former(topology: str, steps: int, **options: Any) -> MetaSpikeFormer:
    neurons: dict[str, Any] = {} if steps == 1 else {
        "neuron": lambda: LIF(threshold=0.5), "attention_neuron": lambda: LIF(threshold=0.25), "attention_scale": 0.125}
    net = MetaSpikeFormer((8, 16, 16, 24), depths=(1, 1), heads=2, num_classes=7, time_steps=steps, topology=topology,
                          stem=(3, 1), strides=(2, 2, 1, 1), layer_scale=1.0, **neurons, **options)
    net.neuron = IELIF(8, gain=16.0)  # random features are small after the mean; keep the logits apart
    return net


@pytest.mark.parametrize("steps", [1, 2])
def test_strict_meta_spikeformer_runs_on_spikes_only(steps: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels, mean, std = pictures(32, 16), [0.4] * 3, [0.25] * 3
    net = ready(former("strict", steps), Scheme("lsq", 4), pixels, mean, std)
    report = exported(net, tmp_path / "a.bitspike", pixels, mean, std)
    kinds = [layer.input for layer in report.layers]
    assert kinds[0] == "pixels" and set(kinds[1:]) <= {"spikes", "counts"}
    assert report.operations["attention"] == 2 and "affine" not in report.operations
    wrong = wrong_counts(net, tmp_path / "a.bitspike", pixels, mean, std)
    assert max(wrong.values()) <= 0.01 and np.mean(list(wrong.values())) <= 0.002  # a flipped count moves later ones


def test_published_meta_spikeformer_has_eight_bit_codes_inside_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels, mean, std = pictures(32, 16), [0.4] * 3, [0.25] * 3
    net = ready(former("published", 1), Scheme("lsq", 4), pixels, mean, std)
    report = exported(net, tmp_path / "a.bitspike", pixels, mean, std)
    real = [layer.name for layer in report.layers if layer.input == "codes"]
    assert all(re.fullmatch(r".*(attn\.(q|k|v|proj)\.(depthwise|project\.conv)|sep\.project\.conv)", name) for name in real)
    assert len(real) == 2 * 8 + 4
    wrong = wrong_counts(net, tmp_path / "a.bitspike", pixels, mean, std)
    assert wrong["stem_block.sep.depthwise.neuron"] <= BOUNDARY  # before the first real-valued input


# ------------------------------------------------------------------------------------ pixels and borders
class Stem(nn.Module):
    """One padded convolution and the mean of its corner, so that the border decides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x)).flatten(1)


def stem(mean: list[float], std: list[float], tmp_path: Path) -> tuple[Any, Any, float, ExportReport]:
    """(potentials of the conv, the same in float64, sum |w| of its largest channel, report)."""
    torch.manual_seed(0)
    pixels = pictures(8, 6, len(mean))
    net = quantize_(Stem(len(mean)), QuantSpec({"*": Scheme("lsq", 4)})).eval()
    report = exported(net, tmp_path / "a.bitspike", pixels, mean, std)
    program = load(tmp_path / "a.bitspike")
    op = [op for op in program.program.ops if op.layer == "conv"][-1]
    found = program.trace(pixels)[op.output][0] / 2.0 ** report.fraction_bits
    conv: Any = net.conv
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).double().view(1, -1, 1, 1)) \
        / torch.tensor(std).double().view(1, -1, 1, 1)
    with torch.no_grad():
        expected = nn.functional.conv2d(x, conv.weight.double(), conv.bias.double(), padding=1)
        reach = float(conv.weight.abs().sum((1, 2, 3)).max())
    return found, expected.permute(0, 2, 3, 1).numpy(), reach, report


@pytest.mark.parametrize("mean", [[0.0] * 3, [0.4] * 3, [0.2, 0.4, 0.6], [1.0], [51 / 255]])
def test_zero_padding_of_a_normalised_picture_is_exact(mean: list[float], tmp_path: Path) -> None:
    found, expected, _, report = stem(mean, [0.25] * len(mean), tmp_path)
    assert np.abs(found - expected).max() < 1e-6
    assert report.layers[0].input == "pixels" and not report.notes


@pytest.mark.parametrize(("mean", "std"), [([0.5] * 3, [0.25] * 3), ([0.286], [0.353]),
                                           ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])])
def test_other_normalisations_have_sixteen_bits(mean: list[float], std: list[float], tmp_path: Path) -> None:
    found, expected, reach, report = stem(mean, std, tmp_path)
    assert report.operations["lookup"] == 2 and report.operations["conv"] == 2 and "16 bits" in report.notes[0]
    assert len([name for name in artifact.read(tmp_path / "a.bitspike").tensors if name.endswith("weight")]) == 1
    largest = max(max(m, 1 - m) / s for m, s in zip(mean, std, strict=True))
    assert np.abs(found - expected).max() <= reach * largest / 127 / 254 * 0.51 + 1e-6


class Rep(nn.Module):
    """The head of RepConv: 1x1, norm with a border, depthwise 3x3."""

    def __init__(self, neuron: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.spike = nn.Conv2d(3, 8, 3, padding=1), IELIF(4)
        self.mix, self.pad = nn.Conv2d(8, 8, 1, bias=False), NormPad(8, 1)
        self.neuron = neuron or nn.Identity()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.neuron(self.pad(self.mix(self.spike(self.first(x)))))
        return self.pool(self.depthwise(y)).flatten(1)


@pytest.mark.parametrize("neuron", [None, IELIF(4)], ids=["real", "counts"])
def test_the_border_of_a_rep_conv_is_the_code_of_the_norms_response_to_zero(neuron: nn.Module | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels, mean, std = pictures(16, 8), [0.4] * 3, [0.25] * 3
    net = ready(Rep(neuron), Scheme("lsq", 4), pixels, mean, std)
    pad: Any = net.pad
    pad.norm.bias.data.uniform_(0.2, 0.8)
    exported(net, tmp_path / "a.bitspike", pixels, mean, std)
    seen: dict[str, Tensor] = {}
    depthwise: Any = net.depthwise
    depthwise.register_forward_hook(lambda m, i, o: seen.update(x=i[0], y=o))
    with torch.no_grad():
        net(normalised(pixels, mean, std))
    program = load(tmp_path / "a.bitspike")
    op = next(op for op in program.program.ops if op.layer == "depthwise" and op.name == "conv")
    assert op.attributes["padding"] == (1, 1) and op.attributes["pad_value"].any()
    found = program.trace(pixels)[op.output][0] / 2.0 ** program.header["fraction_bits"]
    step = seen["x"].abs().amax((0, 2, 3)) / 127 if neuron is None else torch.zeros(8)
    bound = (step / 2 * depthwise.weight.abs().sum((1, 2, 3))).detach().numpy()
    error = np.abs(found - seen["y"].permute(0, 2, 3, 1).numpy())
    assert (error.max((0, 1, 2)) <= bound * 1.01 + 1e-5).all()
