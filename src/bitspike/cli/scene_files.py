"""Segmenters and detectors as files on the command line: write, evaluate, profile."""
from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitspike.deploy import Detector, Segmenter
from bitspike.deploy.fields import printable
from bitspike.deploy.tasks import Letterbox
from bitspike.profiling import Report, profile

if TYPE_CHECKING:
    from torch import nn

    from bitspike.data.scenes import Scenes
    from bitspike.exporting import ExportReport
    from bitspike.recipe import Recipe

    Picture = np.ndarray[Any, np.dtype[np.uint8]]

_CALIBRATION, _CHECK, _RANDOM = 32, 100, 4  # pictures have many pixels, and objects


# ------------------------------------------------------------------------------------------------- export
def letterbox_of(recipe: Recipe, model: nn.Module) -> Letterbox:
    """How evaluation scales and pads pictures for this model."""
    from bitspike.data.scene_loader import MULTIPLE
    from bitspike.tasks.dense import border_colour

    strides: Any = model.strides
    return Letterbox(recipe.image_size, recipe.long_side, max(MULTIPLE, *strides), border_colour(recipe))


def _some(split: Scenes, count: int) -> list[Picture]:
    from bitspike.cli.networks import _spread

    return [_picture(split, i) for i in _spread(len(split), count).tolist()]


def _picture(split: Scenes, index: int) -> Picture:
    return np.ascontiguousarray(split.image(index).permute(1, 2, 0).numpy())


def _write(model: nn.Module, recipe: Recipe, output: Path, classes: Iterable[str], calibration: list[Picture],
           check: list[Picture], min_agreement: float, provenance: dict[str, Any]) -> ExportReport:
    from bitspike.exporting import export_detector, export_segmenter

    output.parent.mkdir(parents=True, exist_ok=True)
    write = export_detector if recipe.task == "detection" else partial(export_segmenter, window=recipe.window)
    mean = recipe.mean * 3 if len(recipe.mean) == 1 else recipe.mean  # scenes have three channels
    return write(model, output, mean=mean, std=recipe.std, letterbox=letterbox_of(recipe, model), classes=list(classes),
                 calibration_images=calibration, check_images=check, name=recipe.name, provenance=provenance,
                 time_steps=int(getattr(getattr(model, "dense", model).backbone, "time_steps", 1)),
                 min_agreement=min_agreement)


def export_run(model: nn.Module, recipe: Recipe, output: Path, data_dir: Path | None, min_agreement: float,
               provenance: dict[str, Any]) -> ExportReport:
    """Export a trained network, calibrated on training pictures and compared on test pictures of its own data."""
    from bitspike.data import load as load_data

    data = load_data(recipe.data, data_dir, None, recipe.skip_broken)
    train, test = _scenes(data.split("train")), _scenes(data.split("test"))
    if recipe.task == "detection":  # detections are fewer than pixels, and their edges are a matter of thresholds
        min_agreement = min(min_agreement, 0.98)
    return _write(model, recipe, output, data.classes, _some(train, _CALIBRATION), _some(test, _CHECK), min_agreement,
                  {**provenance, "data_hash": data.hash})


def export_recipe(model: nn.Module, recipe: Recipe, output: Path, data_dir: Path | None,
                  provenance: dict[str, Any]) -> ExportReport:
    """Export random weights with calibrated norms (of a detector: of its part for whole pictures): for the size."""
    from bitspike.cli.networks import pictures_for
    from bitspike.exporting import calibrate_norms

    pixels, data = pictures_for(recipe, data_dir, _RANDOM, "train")
    whole: Any = getattr(model, "dense", model)
    calibrate_norms(whole, pixels, recipe.mean, recipe.std)
    _settled(model)
    inner: Any = model
    count = inner.num_classes if recipe.task == "detection" else inner.classes.conv.out_channels
    classes = [f"class {i}" for i in range(count)] if data is None else data.classes
    pictures = list(pixels)
    return _write(model.eval(), recipe, output, classes, pictures, pictures, 0.0, provenance)


def _settled(model: nn.Module) -> None:
    """Quantizers choose their first step when they first see a weight in training; those of heads have not yet."""
    import torch

    from bitspike.layers import quantizers

    model.train()
    with torch.no_grad():
        for name, _ in quantizers(model):
            layer: Any = model.get_submodule(name)
            _ = layer.weight


def _scenes(split: Any) -> Scenes:
    from bitspike.data import DataError
    from bitspike.data.scenes import Scenes

    if not isinstance(split, Scenes):
        raise DataError("these data have a class a picture; a network for dense tasks needs maps or boxes.")
    return split


# --------------------------------------------------------------------------------------------------- eval
def evaluate_file(net: Segmenter | Detector, target: str, name: str, data_dir: Path | None, split: str,
                  threads: int | None = None) -> dict[str, Any]:
    """What evaluation measures (mIoU and pixel accuracy, or box and mask mAP) of an artifact on its own data, and
    ms_per_image. Errors: ArtifactError, DataError.
    """
    import torch

    from bitspike.data import DataError
    from bitspike.data import load as load_data
    from bitspike.evaluation import limited
    from bitspike.recipe import Recipe
    from bitspike.tasks import task_of

    settings: Any = net.header.get("provenance", {}).get("settings")
    settings = settings if isinstance(settings, dict) else {}
    data = load_data(name, data_dir, None, bool(settings.get("skip_broken", False)))
    if list(data.classes) != net.classes:
        raise DataError(f"{target} has {len(net.classes)} classes ({net.classes[0]!r} ...), {name} there has "
                        f"{len(data.classes)} ({data.classes[0]!r} ...).")
    pictures = settings.get("pictures")
    recipe: Any = Recipe(net.header["name"], torch.nn.Identity, task=net.task, data=name,  # type: ignore[arg-type]
                         pictures=pictures if isinstance(pictures, int) and pictures > 0 else 0)
    task, scenes = task_of(recipe), _scenes(limited(data, recipe).split(split))
    meter = task.meter(recipe, data, torch.device("cpu"))
    seconds = 0.0
    for i in range(len(scenes)):
        picture = _picture(scenes, i)
        truth = scenes.target(i, picture.shape[0], picture.shape[1])
        began = time.perf_counter()
        scene = net.scene(picture)
        if isinstance(net, Detector):
            found = net.in_picture(net.detect(scene, threads), scene)
            seconds += time.perf_counter() - began
            answer: Any = {key: torch.from_numpy(value) for key, value in found.items()}
            answer["labels"] = answer["labels"] + 1  # 0 is the background there
            meter.add([answer], [{**truth, "original_size": torch.tensor(scene.original)}])
        else:
            net.labels(scene, threads)
            seconds += time.perf_counter() - began
            logits = torch.from_numpy(net.logits(scene, threads)).permute(2, 0, 1)[None]
            sizes = {"canvas": scene.pixels.shape[:2], "size": scene.size, "original_size": scene.original}
            meter.add(logits, [{**truth, **{key: torch.tensor(size) for key, size in sizes.items()}}])
    result = meter.compute()
    if not len(scenes):
        raise DataError(f"{name}: its split {split!r} has no images.")
    return {"target": target, "runtime": "integer", "recipe": net.header["name"], "data": name, "split": split,
            "train_on": settings.get("train_on"), **result, "n": len(scenes), "ms_per_image": 1e3 * seconds / len(scenes),
            "says": task.says(result)}


# ------------------------------------------------------------------------------------------------ profile
def profile_file(net: Segmenter | Detector, target: str, data_dir: Path | None, count: int,
                 threads: int | None = None) -> tuple[Report, str]:
    """(report, where the pictures are from): its own data, the embedded sample if that cannot be found."""
    from bitspike.cli.networks import sample_pictures

    provenance: Any = net.header.get("provenance", {})
    name, remedy = provenance.get("data"), "give --data"
    if data_dir is not None and isinstance(name, str):
        from bitspike.data import DataError
        from bitspike.data import load as load_data

        try:
            pictures = _some(_scenes(load_data(name, data_dir, None, True).split("test")), count)
            return profile(target, pictures, threads=threads), f"{len(pictures)} of {name} test"
        except DataError as error:
            remedy = str(error).rstrip(".")
    pixels = sample_pictures(min(count, 8), *net.input_shape)
    return profile(target, list(pixels), threads=threads), printable(
        f"{len(pixels)} of the embedded Fashion-MNIST sample, which are not what the network was made for; {remedy}")
