"""`export_segmenter` and `export_detector`: models that answer for a whole picture, as one file of integer programs.

As `export_model`, with two differences: pictures have any size and are scaled and padded as in evaluation, and what the model
and the file are compared on is their answer in the picture itself, pixels or boxes.
"""
from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitspike.deploy import Detector, Segmenter, artifact, load
from bitspike.deploy.preprocess import Scene, letterbox
from bitspike.deploy.tasks import Letterbox, Windows
from bitspike.exporting.emit import Program, fixed_pair
from bitspike.exporting.export import ExportReport, fold, normalised, pack
from bitspike.exporting.fold import Folder
from bitspike.exporting.lower import Value
from bitspike.exporting.trace import ExportError, Observer, flat_outputs, trace
from bitspike.models.segmentation import predicted_logits, slide, step_of

Pictures = Sequence[NDArray[np.uint8]]

#: detections with at least this score are compared; where fewer than _FEW have it, the best _BEST of every picture
_SURE, _FEW, _BEST = 0.5, 20, 10
_OVERLAP = 0.95
#: less than for classifiers: boxes hang on the last bits of potentials, and a picture has many of them to calibrate on
_HEADROOM = 4


@dataclass(frozen=True)
class _Task:
    """What the two exports share: the copied model, the pictures as scenes, and what goes into the header."""

    model: nn.Module
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    letterbox: Letterbox
    calibration: list[Scene]
    check: list[Scene]
    header: dict[str, Any]
    time_steps: int
    allow_float: bool
    windows: Windows | None = None

    def tensor(self, scene: Scene) -> Tensor:
        """[1, C, H, W], as the model sees it."""
        return normalised(scene.pixels[None], self.mean, self.std)

    @property
    def canvas(self) -> tuple[int, int]:
        """The most frequent size of the calibration scenes."""
        return Counter((s.pixels.shape[0], s.pixels.shape[1]) for s in self.calibration).most_common(1)[0][0]

    @property
    def shown(self) -> tuple[int, int]:
        """What the program sees of such a canvas."""
        return self.canvas if self.windows is None else self.windows.shape(*self.canvas)

    def parts(self, scene: Scene) -> list[Tensor]:
        """What the model sees of a scene: its canvas, or the windows of it."""
        x = self.tensor(scene)
        if self.windows is None:
            return [x]
        h, w = self.windows.shape(*x.shape[2:])
        return [x[..., top : top + h, left : left + w]
                for top in self.windows.starts(x.shape[2]) for left in self.windows.starts(x.shape[3])]

    def observed(self, module: torch.fx.GraphModule, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Run the graph on all inputs, the last one of which gives the sizes; on the first prove that it is the model."""
        observer = Observer(module)
        for i, x in enumerate(inputs):
            found = observer.run_all(x)
            if i:
                continue
            with torch.no_grad():
                expected = flat_outputs(model(x))
            if [y.shape for y in found] != [y.shape for y in expected] or not all(
                    torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, expected, strict=True)):
                raise ExportError(f"the traced graph of {type(model).__name__} does not compute what the model computes. Does "
                                  "its forward depend on the data, or on modules that change between calls?")

    def whole_picture(self, model: nn.Module) -> torch.fx.GraphModule:
        """The observed graph of the part that sees the whole picture."""
        module = trace(model)
        typical = next(s for s in self.calibration if s.pixels.shape[:2] == self.canvas)
        self.observed(module, model, [*(x for s in self.calibration for x in self.parts(s)), self.parts(typical)[0]])
        return module

    def fold(self, module: torch.fx.GraphModule, bits: int, inside: str = "", regions: bool = False,
             prefix: str = "") -> tuple[Program, Folder, list[Value]]:
        """See `export.fold`; `inside`: where the graph is in the whole model, for the names of layers."""
        steps = 1 if regions else self.time_steps
        program, folder, outputs = fold(module, steps, self.mean, self.std, self.allow_float, bits, regions, prefix,
                                        _HEADROOM)
        for op in program.ops:
            if "layer" in op:
                op["layer"] = inside + op["layer"]
        folder.lowering.layers[:] = [replace(layer, name=inside + layer.name) for layer in folder.lowering.layers]
        return program, folder, outputs


def _task(model: nn.Module, mean: Sequence[float], std: Sequence[float], how: Letterbox, classes: Sequence[str],
          calibration: Pictures, check: Pictures | None, name: str, task: str, time_steps: int,
          provenance: Mapping[str, Any] | None, allow_float: bool) -> _Task:
    means, stds = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if stds.size == 1 and means.ndim == 1:
        stds = np.broadcast_to(stds, means.shape)
    if isinstance(classes, str) or not all(isinstance(label, str) for label in classes):
        raise ExportError(f"classes must be a list of texts, one name per class; found {classes!r:.200}.")
    if means.ndim != 1 or means.shape != stds.shape or not (stds > 0).all():
        raise ExportError(f"mean and std must be one number per channel, std positive; found {means.tolist()} and "
                          f"{stds.tolist()}.")
    channels = len(means)
    if len(how.border) != channels:
        raise ExportError(f"the letterbox's border has {len(how.border)} numbers; {channels} channels need {channels}.")
    for picture in [*calibration, *(check or ())]:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != channels:
            raise ExportError(f"pictures must be uint8 [H, W, {channels}]; found {picture.dtype} {list(picture.shape)}.")
    if not len(calibration) or (check is not None and not len(check)):
        raise ExportError("at least one picture to calibrate and to check on is needed.")
    scenes = [letterbox(picture, how) for picture in calibration]
    found = scenes if check is None else [letterbox(picture, how) for picture in check]
    header: dict[str, Any] = {"name": name, "task": task, "classes": list(classes), "time_steps": time_steps,
                              "provenance": dict(provenance or {})}
    model = copy.deepcopy(model).cpu().float().eval()
    return _Task(model, means, stds, how, scenes, found, header, time_steps, allow_float)


def _write(task: _Task, path: str | os.PathLike[str], min_agreement: float, inner_bits: int | None,
           build: Callable[[int], tuple[dict[str, Any], dict[str, NDArray[Any]], list[Folder]]],
           compare: Callable[[Any], tuple[float, float, int, str]]) -> ExportReport:
    """Build the file with 8 and, if it must be, 16 bits inside; compare; write, or refuse."""
    if not 0 <= min_agreement <= 1:
        raise ExportError(f"min_agreement={min_agreement}: a share of 0..1 is needed, 0.99 for 99 %.")
    if inner_bits not in (None, 8, 16):
        raise ExportError(f"inner_bits={inner_bits}; allowed: 8, 16, or None for 16 where 8 are not enough.")
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.check")
    height, width = task.canvas
    source = {"height": height, "width": width, "channels": len(task.mean), "resize": None,
              "letterbox": {**asdict(task.letterbox), "border": list(task.letterbox.border)}}
    try:
        for bits in (8, 16) if inner_bits is None else (inner_bits,):
            more, tensors, folders = build(bits)
            header = {**task.header, "input": source, **more}
            artifact.write(draft, header, tensors)
            agreement, largest, count, what = compare(load(draft))
            if agreement >= min_agreement or not any(folder.lowering.rounded for folder in folders):
                break
        notes = tuple(note for folder in folders for note in folder.lowering.notes)
        if agreement < min_agreement and not count:
            raise ExportError(f"{what}, so there is nothing to compare the integer program on, and nothing was written. Train "
                              "longer, give pictures that show its classes (calibration_images, check_images; from a RUN those "
                              "of its data), or lower the score threshold of the detector; min_agreement=0 writes "
                              "the file unchecked.")
        if agreement < min_agreement:
            raise ExportError(f"the integer program agrees with the torch model on {agreement:.2%} of {what}; "
                              f"{min_agreement:.2%} are asked for, so nothing was written. Calibrate on more or more typical "
                              "pictures, put neurons in front of layers with real-valued inputs, or pass a smaller "
                              "min_agreement."
                              + "".join(f" {note}." for note in notes))
        header["provenance"]["agreement"] = {"share": agreement, "of": what, "number": count, "samples": len(task.check),
                                             "largest_difference": largest, "with": "torch, float32"}
        artifact.write(target, header, tensors)
    finally:
        draft.unlink(missing_ok=True)
    ops = Counter(op["op"] for program in _listings(header) for op in program)
    return ExportReport(target, target.stat().st_size, agreement, largest, len(task.check), header["fraction_bits"], dict(ops),
                        tuple(layer for folder in folders for layer in folder.lowering.layers), notes, what)


def _listings(header: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    parts = [header["detection"][name]["program"] for name in ("box", "mask") if name in header.get("detection", {})]
    return [header["program"], *parts]


# ------------------------------------------------------------------------------------------------ segmentation
def export_segmenter(model: nn.Module, path: str | os.PathLike[str], *, mean: Sequence[float], std: Sequence[float],
                     letterbox: Letterbox, classes: Sequence[str], calibration_images: Pictures, name: str, time_steps: int = 1,
                     provenance: Mapping[str, Any] | None = None, min_agreement: float = 0.99,
                     check_images: Pictures | None = None, allow_float: bool = True, inner_bits: int | None = None,
                     window: int = 0) -> ExportReport:
    """Write a torch model that gives every pixel a class as one integer artifact, and prove that both agree.

    Args:
        model: normalised pictures float [B, C, H, W] -> logits [B, classes, H / s, W / s] at any whole stride s.
        letterbox: how evaluation scales and pads a picture. The program runs at any size that comes of it.
        calibration_images, check_images: uint8 [H, W, C] of any sizes; check_images: default the calibration pictures.
        min_agreement: smallest share of equal pixels, counted in the pictures as they are.
        window: the model is asked, by torch and from the file, for overlapping squares of that side (`slide`), a multiple of
            the letterbox's; 0: for whole pictures.
        the others as `export_model`'s.
    Errors: ExportError, as `export_model`.
    """
    task = _task(model, mean, std, letterbox, classes, calibration_images, check_images, name, "segmentation", time_steps,
                 provenance, allow_float)
    if window:
        if window < 0 or window % letterbox.multiple:
            raise ExportError(f"window={window}: it must be a multiple of {letterbox.multiple}, as the sides of a padded "
                              "picture are; 0 for whole pictures.")
        task = replace(task, windows=Windows(window, step_of(window)))

    def build(bits: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]], list[Folder]]:
        program, folder, outputs = task.fold(module, bits)
        if len(outputs) != 1 or outputs[0].channels != len(classes):
            raise ExportError(f"the model gives maps of {[y.channels for y in outputs]} channels; with {len(classes)} class "
                              f"names it must give one map of {len(classes)}.")
        (logits,) = outputs
        stride = task.shown[0] // logits.height
        more: dict[str, Any] = {"program": program.ops, "output": logits.source, "stride": stride,
                                "fraction_bits": program.fraction_bits}
        if task.windows is not None:
            more["windows"] = asdict(task.windows)
        return more, pack(program), [folder]

    def compare(net: Segmenter) -> tuple[float, float, int, str]:
        same = pixels = 0
        largest = 0.0
        for scene in task.check:
            expected = torch_logits(task.model, task.tensor(scene), net.windows)
            largest = max(largest, float(np.abs(net.logits(scene) - expected[0].permute(1, 2, 0).numpy()).max()))
            truth = torch_labels(expected, scene)
            same, pixels = same + int((net.labels(scene) == truth).sum()), pixels + truth.size
        return same / pixels, largest, pixels, f"the pixels of {len(task.check)} pictures"

    with parametrize.cached():
        module = task.whole_picture(task.model)
        return _write(task, path, min_agreement, inner_bits, build, compare)


@torch.no_grad()
def torch_logits(model: nn.Module, x: Tensor, windows: Windows | None) -> Tensor:
    """Logits [1, K, h, w] of a canvas by torch, as a file with these windows computes them."""
    return model(x) if windows is None else slide(model, x, windows.side, windows.step)  # type: ignore[no-any-return]


def torch_labels(logits: Tensor, scene: Scene) -> NDArray[Any]:
    """The class of every pixel of a scene's picture by torch, from logits [1, K, h, w] of its canvas."""
    return predicted_logits(logits[0], scene.pixels.shape[:2], scene.size, scene.original).argmax(0).numpy()


# --------------------------------------------------------------------------------------------------- detection
def export_detector(model: nn.Module, path: str | os.PathLike[str], *, mean: Sequence[float], std: Sequence[float],
                    letterbox: Letterbox, classes: Sequence[str], calibration_images: Pictures, name: str, time_steps: int = 1,
                    provenance: Mapping[str, Any] | None = None, min_agreement: float = 0.98,
                    check_images: Pictures | None = None, allow_float: bool = True,
                    inner_bits: int | None = None) -> ExportReport:
    """Write a detector of `bitspike.models.detection` as one artifact of integer programs, and prove that both agree.

    Args:
        model: what `mask_rcnn` or `retinanet` gives.
        letterbox: as for `export_segmenter`; its `multiple` must be one of the coarsest stride.
        classes: one name per class, without the background: label 1 of the model is classes[0].
        min_agreement: smallest share of the model's detections with a score of 0.5 and more (of the best ones where there are
            hardly any) that the file finds, too: same class, intersection over union of at least 0.95.
        the others as `export_segmenter`'s.
    Errors: ExportError, as `export_model`.
    """
    task = _task(model, mean, std, letterbox, classes, calibration_images, check_images, name, "detection", time_steps,
                 provenance, allow_float)
    found: Any = task.model
    if found.num_classes != len(classes):
        raise ExportError(f"the model tells {found.num_classes} classes apart; {len(classes)} names were given.")
    if letterbox.multiple % found.strides[-1]:
        raise ExportError(f"the letterbox pads to multiples of {letterbox.multiple}, the coarsest stride is "
                          f"{found.strides[-1]}.")
    regions = hasattr(found, "regions")

    def build(bits: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]], list[Folder]]:
        program, folder, outputs = task.fold(module, bits, "dense.")
        names = [y.source for y in outputs]
        n = len(found.strides)
        maps, scores, deltas = names[:n], names[n : 2 * n], names[2 * n :]
        anchors = [cell.tolist() for cell in found.anchors.cell_anchors]
        with_map = len(found.regions.box_roi_pool.scales) if regions else 0
        levels = [{"stride": found.strides[i], "scores": scores[i], "deltas": deltas[i],
                   "anchors": [[round(v) for v in box] for box in anchors[i]], **({"map": maps[i]} if i < with_map else {})}
                  for i in range(n)]
        tensors, folders = pack(program), [folder]
        header: dict[str, Any] = {"kind": "regions" if regions else "anchors", "levels": levels}
        if regions:
            header |= _regions_header(found)
            for key, part in parts.items():
                of_part, part_folder, made = task.fold(part, bits, f"regions.{key}_head.", True, f"{key}.")
                reads = part_folder.lowering.reads
                if reads is None:
                    raise ExportError(f"{key}: the head has no neuron in front.")
                m, s = fixed_pair(reads.gain)
                keys = ("classes", "deltas") if key == "box" else ("masks",)
                header[key] = {"side": sides[key], "levels": reads.levels, "codes": [m, s + program.fraction_bits],
                               "fraction_bits": of_part.fraction_bits, "program": of_part.ops,
                               **{k: y.source for k, y in zip(keys, made, strict=True)}}
                tensors |= pack(of_part)
                folders.append(part_folder)
        else:
            header |= {"coder": list(found.coder.weights), "candidates": found.candidates, "score": found.score,
                       "overlap": found.nms, "most": found.most}
        return {"program": program.ops, "detection": header, "fraction_bits": program.fraction_bits}, tensors, folders

    def compare(net: Detector) -> tuple[float, float, int, str]:
        pairs = [(_torch_detections(task, scene), net.detect(scene)) for scene in task.check]
        return _agreement(pairs)

    with parametrize.cached(), torch.no_grad():
        module = task.whole_picture(found.dense)
        _torch_detections(task, task.check[0])  # makes the anchors of a cell
        parts: dict[str, torch.fx.GraphModule] = {}
        sides: dict[str, int] = {}
        if regions:
            for key, features in _region_features(task).items():
                head = getattr(found.regions, f"{key}_head")
                parts[key], sides[key] = trace(head), int(features[0].shape[-1])
                task.observed(parts[key], head, features)
        return _write(task, path, min_agreement, inner_bits, build, compare)


def _regions_header(model: Any) -> dict[str, Any]:
    rpn, heads = model.proposals, model.regions
    levels = heads.box_roi_pool.map_levels
    return {"coder": list(rpn.box_coder.weights), "candidates": rpn.pre_nms_top_n(), "proposals": rpn.post_nms_top_n(),
            "proposal_overlap": rpn.nms_thresh, "score": heads.score_thresh, "overlap": heads.nms_thresh,
            "most": heads.detections_per_img, "region_coder": list(heads.box_coder.weights), "canonical": levels.s0,
            "sampling": heads.box_roi_pool.sampling_ratio}


def _torch_detections(task: _Task, scene: Scene) -> dict[str, NDArray[Any]]:
    """What the model finds, in pixels of the canvas; labels from 0."""
    model: Any = task.model
    with torch.no_grad():
        (found,) = model.detect(task.tensor(scene), [{"size": torch.tensor(scene.size)}])
    found = {key: value.numpy() for key, value in found.items()}
    return {**found, "labels": found["labels"] - 1}


def _region_features(task: _Task) -> dict[str, list[Tensor]]:
    """What RoIAlign gives each head on the calibration pictures."""
    model: Any = task.model
    heads, features = model.regions, dict[str, list[Tensor]]()

    def keep(_: nn.Module, args: Any) -> None:
        if len(args[1][0]):
            features.setdefault("box", []).append(heads.box_roi_pool.forward(*args))
            if heads.mask_head is not None:
                features.setdefault("mask", []).append(heads.mask_roi_pool.forward(*args))

    handle = heads.box_roi_pool.register_forward_pre_hook(keep)
    try:
        for scene in task.calibration:
            _torch_detections(task, scene)
    finally:
        handle.remove()
    if not features:
        raise ExportError(f"the detector proposes no region in any of the {len(task.calibration)} calibration pictures, so the "
                          "ranges of its box and mask heads cannot be measured. Is it trained? If so, calibrate on pictures "
                          "that show its classes.")
    return features


def _agreement(pairs: Sequence[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]) -> tuple[float, float, int, str]:
    """(share found again, largest difference of a score, number, of what) of torch's detections and the file's."""
    sure = sum(int((expected["scores"] >= _SURE).sum()) for expected, _ in pairs)
    few = sure < _FEW
    hits = total = 0
    largest = 0.0
    for expected, found in pairs:
        count = min(_BEST, len(expected["scores"])) if few else int((expected["scores"] >= _SURE).sum())
        overlaps = _overlaps(expected["boxes"][:count], found["boxes"])
        overlaps *= expected["labels"][:count, None] == found["labels"][None]
        for row in range(count):
            total += 1
            if not overlaps.shape[1]:
                continue
            best = int(overlaps[row].argmax())
            if overlaps[row, best] >= _OVERLAP:
                hits += 1
                largest = max(largest, abs(float(expected["scores"][row] - found["scores"][best])))
                overlaps[:, best] = 0
    what = f"{total} detections " + (f"(the best {_BEST} of each picture)" if few else f"(score of {_SURE} and more)")
    if not total:
        return 0.0, 0.0, 0, f"the model finds nothing in the {len(pairs)} pictures to compare on"
    return hits / total, largest, total, what


def _overlaps(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union [A, B]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.maximum(high - low, 0).prod(-1)
    return both / np.maximum((a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1)[None] - both, 1e-9)
