"""Artifacts on the command line: write, evaluate, profile."""
from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitspike.cli.networks import (
    Pixels,
    as_pixels,
    class_names,
    pictures_for,
    sample_frames,
    sample_pictures,
    split_pictures,
)
from bitspike.deploy import ArtifactError, Detector, Net, Segmenter, load
from bitspike.deploy.fields import printable
from bitspike.profiling import Report, profile

if TYPE_CHECKING:
    from torch import nn

    from bitspike.data.events.framing import Frames
    from bitspike.exporting import ExportReport
    from bitspike.recipe import Recipe

_CALIBRATION, _CHECK = 256, 500


# ------------------------------------------------------------------------------------------------- export
def _provenance(recipe: Recipe, **more: Any) -> dict[str, Any]:
    import bitspike

    settings = recipe.to_dict()
    for name in ("start", "teacher"):  # a file that is handed on does not tell how its author's folders are called
        settings[name] = Path(settings[name]).name
    return {"recipe": recipe.name, "data": recipe.data, "image_size": recipe.image_size, "settings": settings,
            "bitspike": bitspike.__version__, **more}


def _export(model: nn.Module, recipe: Recipe, output: Path, classes: tuple[str, ...], calibration: Pixels, check: Pixels,
            min_agreement: float, in_memory: bool, **provenance: Any) -> ExportReport:
    from bitspike.exporting import export_model

    output.parent.mkdir(parents=True, exist_ok=True)
    # as evaluation does it: small pictures are taken whole, photographs lose a border
    resize = recipe.image_size if in_memory else round(recipe.image_size / 0.875)
    channels = calibration.shape[-1]
    return export_model(model, output, mean=recipe.mean, std=recipe.std, image_size=recipe.image_size, channels=channels,
                        classes=classes, calibration_images=calibration, name=recipe.name,
                        time_steps=calibration.shape[0] if calibration.ndim == 5 else int(getattr(model, "time_steps", 1)),
                        resize=resize,
                        provenance=_provenance(recipe, **provenance), min_agreement=min_agreement, check_images=check)


def export_run(run: str | Path, output: Path, data_dir: Path | None, min_agreement: float = 0.99) -> ExportReport:
    """Export a trained run, calibrated on training pictures and compared on test pictures of its own data."""
    from bitspike.checkpoints import load_run, read_config
    from bitspike.data import Arrays
    from bitspike.data import load as load_data

    model, recipe = load_run(run)
    if recipe.task != "classification":
        from bitspike.cli import scene_files

        return scene_files.export_run(model, recipe, output, data_dir, min_agreement, _provenance(
            recipe, commit=read_config(Path(run)).get("commit", "unknown")))
    data = load_data(recipe.data, data_dir, recipe.event_frames())
    channels = len(recipe.mean)
    calibration = split_pictures(data, "train", _CALIBRATION, recipe.image_size, channels)
    check = split_pictures(data, "test", _CHECK, recipe.image_size, channels)
    return _export(model, recipe, output, data.classes, calibration, check, min_agreement, isinstance(data.test, Arrays),
                   data_hash=data.hash, events=data.events, commit=read_config(Path(run)).get("commit", "unknown"))


def export_recipe(recipe: Recipe, output: Path, data_dir: Path | None) -> ExportReport:
    """Export random weights with calibrated norms: for the size, not for the answers."""
    from bitspike.checkpoints import build
    from bitspike.data import Arrays
    from bitspike.exporting import calibrate_norms

    model = build(recipe)
    if recipe.task != "classification":
        from bitspike.cli import scene_files

        return scene_files.export_recipe(model, recipe, output, data_dir, _provenance(recipe, weights="random"))
    count = 32  # pictures have many pixels: enough for the statistics of norms
    pixels, data = pictures_for(recipe, data_dir, count, "train")
    calibrate_norms(model, pixels, recipe.mean, recipe.std)
    whole = data is None or isinstance(data.test, Arrays)
    classes = class_names(model, recipe, data)
    return _export(model.eval(), recipe, output, classes, pixels, pixels, 0.0, whole and recipe.image_size <= 64,
                   weights="random")


# --------------------------------------------------------------------------------------------------- eval
def _dataset_name(net: Net | Segmenter | Detector, target: str) -> str:
    name = net.header.get("provenance", {}).get("data")
    if not isinstance(name, str):
        raise ArtifactError(f"{target}: its provenance names no data set, so it cannot be evaluated; 'bitspike run' takes "
                            "pictures.")
    return name


def _frames(net: Net) -> Frames | None:
    """How recordings become the frames of a network of sequences, as its recipe had it; None for a network of pictures."""
    settings = net.header.get("provenance", {}).get("settings")
    if net.input_steps == 1 or not isinstance(settings, dict):
        return None
    from bitspike.data.events.framing import Frames

    return Frames(net.input_steps, net.input_shape[:2], settings.get("frames_by", Frames.by))


def evaluate_file(target: str, data_dir: Path | None, split: str, threads: int | None = None) -> dict[str, Any]:
    """top1 and top5 in percent, n and ms_per_image of an artifact on its own data. Errors: ArtifactError, DataError."""
    net = load(target)
    name = _dataset_name(net, target)
    if not isinstance(net, Net):
        from bitspike.cli import scene_files

        return scene_files.evaluate_file(net, target, name, data_dir, split, threads)
    from bitspike.data import DataError
    from bitspike.data import load as load_data
    from bitspike.data.loader import evaluation_batches

    data = load_data(name, data_dir, _frames(net))
    if list(data.classes) != net.classes:
        raise DataError(f"{target} has {len(net.classes)} classes ({net.classes[0]!r} ...), {name} there has "
                        f"{len(data.classes)} ({data.classes[0]!r} ...).")
    height, _, channels = net.input_shape
    hits = np.zeros(2, np.int64)
    seen, seconds = 0, 0.0
    for pixels, labels in evaluation_batches(data.split(split), height, 250, 2):
        images = as_pixels(pixels, channels)
        began = time.perf_counter()
        logits = net(images, threads)
        seconds += time.perf_counter() - began
        order = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels.numpy()[:, None]
        hits += [order[:, 0].sum(), order.sum()]
        seen += len(labels)
    if not seen:
        raise DataError(f"{name}: its split {split!r} has no images.")
    top1, top5 = (100 * hits / seen).round(4).tolist()
    settings = net.header["provenance"].get("settings")
    train_on = settings.get("train_on") if isinstance(settings, dict) else None
    return {"target": target, "runtime": "integer", "recipe": net.header["name"], "data": name, "split": split,
            "train_on": train_on, "top1": top1, "top5": top5, "n": seen, "ms_per_image": 1e3 * seconds / seen}


# ------------------------------------------------------------------------------------------------ profile
def profile_file(target: str, data_dir: Path | None, count: int, threads: int | None = None) -> tuple[Report, str]:
    """(report, where the pictures are from): its own data, the embedded sample if that cannot be found.

    Without a data folder it needs no torch.
    """
    net = load(target)
    if not isinstance(net, Net):
        from bitspike.cli import scene_files

        return scene_files.profile_file(net, target, data_dir, count, threads)
    height, width, channels = net.input_shape
    name = net.header.get("provenance", {}).get("data")
    remedy = "give --data"
    if data_dir is not None and isinstance(name, str) and name != "fashion_mnist_sample":
        from bitspike.data import DataError
        from bitspike.data import load as load_data

        try:
            pixels = split_pictures(load_data(name, data_dir, _frames(net)), "test", count, height, channels)
            return profile(target, pixels, threads=threads), f"{pixels.shape[-4]} of {name} test"
        except DataError as error:
            remedy = str(error).rstrip(".")
    if net.input_steps > 1:
        pixels = sample_frames(count, net.input_steps, height, width, channels)
        return profile(net, pixels, threads=threads), f"{count} random sequences, which are no recordings; {remedy}"
    pixels = sample_pictures(count, height, width, channels)
    used = f"{len(pixels)} of the embedded Fashion-MNIST sample"
    if name != "fashion_mnist_sample":
        used += f", which are not what the network was made for; {remedy}"
    return profile(target, pixels, threads=threads), printable(used)
