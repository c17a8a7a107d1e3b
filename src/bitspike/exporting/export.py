"""`export_model`: trace, calibrate, fold, pack, compare."""
from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitspike.deploy import artifact, load_classifier
from bitspike.deploy.artifact import MAX_INPUT_CHANNELS
from bitspike.exporting.emit import Program
from bitspike.exporting.fold import Folder
from bitspike.exporting.lower import Layer, Value
from bitspike.exporting.trace import ExportError, Observer, trace
from bitspike.layers import norms_anew

FRACTION_BITS = 22  # at most: one step is then the rounding error of a float32 potential of 1
_LEAST_BITS = 8
_HEADROOM = 16  # potentials may grow this much past calibration before they saturate
_BATCH = 32

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ExportReport:
    """What was written and how well it agrees with the model. `str(report)` is a text for people.

    bytes: of the file. agreement: share of `samples` pictures with the same top-1 class as torch in float32 (whatever
    precision it was trained in). largest_difference: of a logit.
    operations: number of each operation. layers: every matrix product. notes: what was approximated, and where.
    compared: of what `agreement` is a share, where that is not the pictures.
    """

    path: Path
    bytes: int
    agreement: float
    largest_difference: float
    samples: int
    fraction_bits: int
    operations: Mapping[str, int]
    layers: Sequence[Layer]
    notes: Sequence[str]
    compared: str = ""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(layer.weights for layer in self.layers)

    def __str__(self) -> str:
        inputs = Counter(layer.input for layer in self.layers)
        floats = [layer.name for layer in self.layers if layer.from_float]
        lines = [f"{self.path}: {self.bytes:,} bytes, {self.weights:,} weights in {len(self.layers)} layers "
                 f"(inputs: {', '.join(f'{n} {kind}' for kind, n in sorted(inputs.items()))})",
                 f"agreement with the torch model in float32: {self.agreement:.2%} of "
                 f"{self.compared or f'{self.samples} pictures'}, "
                 f"largest logit difference {self.largest_difference:.2g}; potentials have {self.fraction_bits} fraction bits"]
        if floats:
            more = f", ... ({len(floats) - 4} more)" if len(floats) > 4 else ""
            lines.append(f"full-precision layers, deployed with 8 bits: {', '.join(floats[:4])}{more}")
        return "\n".join([*lines, *self.notes])


def normalised(pixels: Pixels, mean: NDArray[Any], std: NDArray[Any]) -> Tensor:
    """What a model sees of uint8 pictures [..., H, W, C]: float [..., C, H, W]."""
    x = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3).contiguous().float().div(255)
    shape = (-1, 1, 1)
    return (x - torch.tensor(mean).float().view(shape)) / torch.tensor(std).float().view(shape)


def _batches(pixels: Pixels, size: int) -> Iterator[Pixels]:
    """Parts of pictures [N, H, W, C] or sequences [T, N, H, W, C]."""
    for i in range(0, pixels.shape[-4], size):
        yield pixels[..., i:i + size, :, :, :]


def calibrate_norms(model: nn.Module, pixels: Pixels, mean: Sequence[float], std: Sequence[float], batch: int = 32) -> None:
    """Give every batch norm the exact mean and variance of these pictures, and every quantizer its first step.

    For models that were never trained ("how large would it be?"): runs the pictures [N, H, W, C] or sequences
    [T, N, H, W, C] in training mode, without gradients.
    """
    training = model.training
    with torch.no_grad(), norms_anew(model):
        model.train()
        for part in _batches(pixels, batch):
            model(normalised(part, np.asarray(mean, float), np.asarray(std, float)))
    model.train(training)


def _check_arguments(pixels: Pixels, mean: NDArray[Any], std: NDArray[Any], shape: tuple[int, int, int],
                     time_steps: int) -> None:
    if not 1 <= shape[2] <= MAX_INPUT_CHANNELS:
        raise ExportError(f"pictures or frames with {shape[2]} channels cannot be exported; a deployed program reads 1 to "
                          f"{MAX_INPUT_CHANNELS}.")
    sequence = pixels.ndim == 5
    if pixels.dtype != np.uint8 or pixels.ndim not in (4, 5) or pixels.shape[-3:] != shape or not pixels.shape[-4] \
            or (sequence and len(pixels) != time_steps):
        size = ", ".join(map(str, shape))
        raise ExportError(f"calibration pictures must be uint8 [N, {size}], sequences of frames uint8 [{time_steps}, N, "
                          f"{size}]; found {pixels.dtype} {list(pixels.shape)}.")
    if mean.shape != (shape[2],) or std.shape != (shape[2],) or not (std > 0).all():
        raise ExportError(f"mean and std must be {shape[2]} numbers each, std positive; found {mean.tolist()} and "
                          f"{std.tolist()}.")


def fold(module: torch.fx.GraphModule, steps: int, mean: NDArray[Any], std: NDArray[Any], allow_float: bool,
         inner_bits: int, regions: bool = False, prefix: str = "",
         headroom: int = _HEADROOM) -> tuple[Program, Folder, list[Value]]:
    """The program of an observed graph, with as many fraction bits as the calibrated potentials leave room for: `headroom`
    times as large they still fit.
    """
    bits = FRACTION_BITS
    while True:
        program = Program(bits, steps, prefix)
        folder = Folder(module, program, mean=mean, std=std, allow_float=allow_float, inner_bits=inner_bits, regions=regions)
        outputs = folder.run()
        if not program.overflow and folder.lowering.largest * headroom < 2.0 ** (31 - bits):
            return program, folder, outputs
        if bits == _LEAST_BITS:
            found = program.overflow or f"a potential of {folder.lowering.largest:.3g}"
            raise ExportError(f"{found} does not fit 32 bits with {bits} fraction bits. Is the running variance of a batch "
                              "norm next to zero?")
        bits -= 1


def pack(program: Program) -> dict[str, NDArray[Any]]:
    """Every tensor of a program, as it is stored."""
    packed = {name: artifact.pack_codes(codes, scheme) for name, (codes, scheme) in program.packed.items()}
    return {**program.tensors, **packed}


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """[B, classes], of a model that may leave the mean over time to its caller."""
    y: Tensor = model(x)
    return y.mean(0) if y.dim() == 3 else y


def _compare(path: Path, model: nn.Module, pixels: Pixels, mean: NDArray[Any], std: NDArray[Any]) -> tuple[float, float]:
    """(share of equal top-1 classes, largest difference of a logit) between the file and the model."""
    net, same, largest = load_classifier(path), 0, 0.0
    for batch in _batches(pixels, _BATCH):
        with torch.no_grad():
            expected = _logits(model, normalised(batch, mean, std)).numpy()
        found = net(np.ascontiguousarray(batch))
        same += int((found.argmax(1) == expected.argmax(1)).sum())
        largest = max(largest, float(np.abs(found - expected).max()))
    return same / pixels.shape[-4], largest


def export_model(model: nn.Module, path: str | os.PathLike[str], *, mean: Sequence[float], std: Sequence[float],
                 image_size: int | tuple[int, int], channels: int = 3, classes: Sequence[str], calibration_images: Pixels,
                 name: str, time_steps: int = 1, resize: int | None = None, provenance: Mapping[str, Any] | None = None,
                 min_agreement: float = 0.99, check_images: Pixels | None = None, allow_float: bool = True,
                 inner_bits: int | None = None) -> ExportReport:
    """Write a torch model as an integer artifact and prove that both agree on real pictures.

    The model is not changed; it is copied, in float32 and evaluation mode.

    Args:
        model: takes normalised pictures float [B, C, H, W] or sequences [T, B, C, H, W], returns logits [B, classes] or
            [T, B, classes].
        path: the file, conventionally `*.bitspike`; appears whole or not at all.
        mean, std: of the normalisation x = (pixel / 255 - mean) / std, one number per channel (std: or one
            for all); it becomes part of the program.
        image_size: height and width (one number: both). channels: 1..16. resize: shorter side before the centre crop.
        classes: one name per logit. name: free text, usually the recipe.
        calibration_images: uint8 [N, H, W, C], or sequences of frames [T, N, H, W, C]; they set the ranges of 8-bit inner
            activations and of the potentials. Some hundred pictures of the training set are enough.
        time_steps: T of the model. provenance: free JSON object, stored; the measured agreement with torch in float32 is added.
        min_agreement: smallest share of pictures with the same top-1 class; 0 switches the refusal off.
        check_images: pictures to compare on, default the calibration pictures; use 256 or more.
        allow_float: full-precision layers become 8-bit codes; False: they are an error.
        inner_bits: of real-valued inputs of a convolution, 8 or 16 (it then runs twice, on a coarse and a fine plane); None:
            8, and 16 if `min_agreement` is missed with 8.
    Errors: ExportError: an operation without an integer form (with its place), arguments that cannot be meant, or less
        agreement than asked for; then there is no file.

    >>> import tempfile
    >>> from bitspike.neurons import IELIF
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), IELIF(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    >>> pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_model(net, folder + "/net.bitspike", mean=[0.5], std=[0.25], image_size=8, channels=1,
    ...                           classes=["a", "b"], calibration_images=pixels, name="demo", min_agreement=0.9)
    >>> report.weights, report.samples
    (324, 64)
    """
    target = Path(path)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    means, stds = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if stds.size == 1 and means.ndim == 1:
        stds = np.broadcast_to(stds, means.shape)
    shape = (height, width, channels)
    if isinstance(classes, str) or not all(isinstance(label, str) for label in classes):
        raise ExportError(f"classes must be a list of texts, one name per logit; found {classes!r:.200}.")
    if not 0 <= min_agreement <= 1:
        raise ExportError(f"min_agreement={min_agreement}: a share of 0..1 is needed, 0.99 for 99 %.")
    if inner_bits not in (None, 8, 16):
        raise ExportError(f"inner_bits={inner_bits}; allowed: 8, 16, or None for 16 where 8 are not enough.")
    check = calibration_images if check_images is None else check_images
    _check_arguments(calibration_images, means, stds, shape, time_steps)
    _check_arguments(check, means, stds, shape, time_steps)
    if check.ndim != calibration_images.ndim:
        raise ExportError("calibration_images and check_images must both be pictures or both be sequences.")
    model = copy.deepcopy(model).cpu().float().eval()
    with parametrize.cached():
        module = trace(model)
        _calibrate(model, module, calibration_images, means, stds, time_steps, len(classes))
        picture = {"height": height, "width": width, "channels": channels, "resize": resize}
        if check.ndim == 5:
            picture["steps"] = time_steps
        draft, samples = target.with_name(f".{target.name}.{os.getpid()}.check"), check.shape[-4]
        try:
            for bits in (8, 16) if inner_bits is None else (inner_bits,):
                program, folder, (logits,) = fold(module, time_steps, means, stds, allow_float, bits)
                if (logits.height, logits.width) != (1, 1):
                    raise ExportError(f"the model's output has {logits.height}x{logits.width} pixels; logits are [B, classes]: "
                                      "take the mean over space.")
                header: dict[str, Any] = {
                    "name": name, "input": picture, "classes": list(classes), "time_steps": time_steps,
                    "fraction_bits": program.fraction_bits, "program": program.ops, "output": logits.source,
                    "provenance": dict(provenance or {})}
                tensors, notes = pack(program), tuple(folder.lowering.notes)
                artifact.write(draft, header, tensors)
                agreement, largest = _compare(draft, model, check, means, stds)
                if agreement >= min_agreement or not folder.lowering.rounded:
                    break
            if agreement < min_agreement:
                raise ExportError(
                    f"the integer program agrees with the torch model on {agreement:.2%} of {samples} pictures (largest "
                    f"logit difference {largest:.3g}); {min_agreement:.2%} are asked for, so nothing was written. Calibrate "
                    "on more or more typical pictures, put neurons in front of layers with real-valued inputs, or pass a "
                    f"smaller min_agreement.{''.join(' ' + note + '.' for note in notes)}")
            header["provenance"]["agreement"] = {"top1": agreement, "largest_logit_difference": largest, "samples": samples,
                                                 "with": "torch, float32"}
            artifact.write(target, header, tensors)
        finally:
            draft.unlink(missing_ok=True)
    return ExportReport(target, target.stat().st_size, agreement, largest, samples, program.fraction_bits,
                        dict(Counter(op["op"] for op in program.ops)), tuple(folder.lowering.layers), notes)


def _calibrate(model: nn.Module, module: torch.fx.GraphModule, pixels: Pixels, mean: NDArray[Any], std: NDArray[Any],
               time_steps: int, classes: int) -> None:
    """Run the graph on all pictures; on the first batch prove that it is the model."""
    observer = Observer(module)
    for i, part in enumerate(_batches(pixels, _BATCH)):
        x = normalised(part, mean, std)
        found = observer.run(x)
        if i:
            continue
        with torch.no_grad():
            expected = _logits(model, x)
        found = found.mean(0) if found.dim() == 3 else found
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
            raise ExportError(f"the traced graph of {type(model).__name__} does not compute what the model computes (logits "
                              f"{list(found.shape)} and {list(expected.shape)}). Does its forward depend on the data, or on "
                              "modules that change between calls?")
        if expected.shape != (x.shape[-4], classes):
            raise ExportError(f"the model returns {list(expected.shape)}; with {classes} class names it must return "
                              f"[{x.shape[-4]}, {classes}].")
    steps = max((node.meta["sizes"].get("T", 1) for node in module.graph.nodes if "sizes" in node.meta), default=1)
    if steps != time_steps:
        raise ExportError(f"the model runs {steps} time steps, time_steps={time_steps} was given.")


def explain(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What became of which layer: one row per operation of an artifact, in execution order.

    Row: "op", "out" (id of its value), "layer" (the torch module's name, "" if none), "kind", "shape" ([steps, height, width,
    channels] of the value), "weights", "bits" (0 without weights).
    Errors: `bitspike.deploy.ArtifactError`.
    """
    found = artifact.read(path)
    rows = []
    for op, entry in zip(found.program.ops, found.header["program"], strict=True):
        value = found.program.values[op.output]
        rows.append({"op": op.name, "out": op.output, "layer": op.layer or "", "kind": value.kind,
                     "shape": [value.steps, value.height, value.width, value.channels],
                     "weights": int(np.prod(entry["shape"])) if "shape" in entry else 0,
                     "bits": entry["scheme"]["bits"] if "scheme" in entry else 0})
    return rows
