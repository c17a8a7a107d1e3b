"""`bitspike bench`: how fast a network runs, alone or against other engines."""
from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from cyclopts import Parameter
from rich.console import Console

from bitspike.cli.device import ENDINGS
from bitspike.cli.messages import console
from bitspike.cli.networks import (
    Pixels,
    class_names,
    kind_of,
    pictures_for,
    sample_frames,
    sample_pictures,
    split_pictures,
)
from bitspike.cli.options import Data, JsonFile, Settings, Words, read_settings
from bitspike.cli.outputs import check_file
from bitspike.deploy import Net, load_classifier, read_image
from bitspike.deploy.runtime import ZOO
from bitspike.writing import write_json

if TYPE_CHECKING:
    from bitspike.recipe import Recipe


class BenchError(ValueError):
    """What was asked for cannot be measured."""


def bench(model: str, /, *, peers: Annotated[bool, Parameter(negative=())] = False, threads: int = 1, batch: int = 1,
          seconds: float = 10.0, explain: Annotated[bool, Parameter(negative=())] = False, json_file: JsonFile = None,
          pictures: list[Path] | None = None, data: Data = None, topology: str | None = None,
          mean_count: float | None = None, skip: Words = (), settings: Settings = ()) -> int:
    """Time a network on this machine; with --peers also in ONNX Runtime, OpenVINO and PyTorch, on the same pictures.

    Parameters
    ----------
    model
        A .bitspike file, the name of a built-in network, or a recipe's name: random weights, norms calibrated on the pictures.
    peers
        Build the same network for every other engine that is installed, compare the answers, and time all in turns.
    threads
        Threads of every engine.
    batch
        Pictures in one call.
    seconds
        Time to measure for, all engines together.
    explain
        Show how each layer is computed: the kernel, density, time and share of the machine's bound.
    json_file
        Write the result there, too.
    pictures
        Picture files, or folders with pictures. Default: the network's own data, or the embedded Fashion-MNIST sample.
    data
        Folder of the data sets. Default: the environment variable BITSPIKE_DATA.
    topology
        For a recipe whose model has a choice: published or strict.
    mean_count
        For a recipe: move every neuron's threshold until it sends so many spikes a step on the pictures. Published
        QSD-Transformers: about 0.25 (of 4). Default: thresholds as they are.
    skip
        Leave out peers with this word in their name, for example compiled, which takes minutes to build; may be repeated.
    settings
        For a recipe: override a field, --set field=value; may be repeated.
    """
    from bitspike.benching import benchmark
    from bitspike.benching.report import tables

    for option, value in (("--threads", threads), ("--batch", batch)):
        if not 1 <= value <= 1024:
            raise BenchError(f"{option} {value}: 1..1024 are allowed.")
    if not 0 < seconds <= 3600:
        raise BenchError(f"--seconds {seconds:g}: more than 0 and at most 3600 are allowed.")
    if json_file is not None:
        check_file("--json", json_file)
    with tempfile.TemporaryDirectory(prefix="bitspike-bench-") as folder:
        artifact, plain, images, used = _subject(model, Path(folder), pictures, data, max(batch, 4), topology,
                                                 read_settings(settings), peers, mean_count)
        net = load_classifier(artifact)
        images = _batch(net, images, batch)
        with console().status("starting", spinner="dots") as status:
            result = benchmark(net, artifact, images, used, threads=threads, peers=peers, seconds=seconds, plain=plain,
                               skip=skip, say=lambda text: status.update(text))
        told: dict[str, Any] = {**result.to_dict(), "model": model}
        wide = Console(highlight=False, width=max(console().width, 160))
        for item in tables(result):
            wide.print(item, markup=False) if isinstance(item, str) else wide.print(item)
        if explain:
            from bitspike.benching.explain import explained, table_of

            rows = explained(net, images, threads)
            wide.print(table_of(rows, threads))
            told["layers"] = rows
    if json_file is not None:
        write_json(json_file, told)
    return 0


# ------------------------------------------------------------------------------------------------ what is measured
def _batch(net: Net, images: Pixels, batch: int) -> Pixels:
    """`batch` pictures, repeated where there are fewer; frames first for a network of sequences."""
    axis = 0 if net.input_steps == 1 else 1
    return np.ascontiguousarray(np.take(images, np.arange(batch) % images.shape[axis], axis))


def _given(places: list[Path], source: Mapping[str, Any], count: int) -> Pixels:
    """Pictures from files, and from folders all the way down, as a network with this input sees them; spread over all."""
    found: list[Path] = []
    for place in places:
        inside = [place]
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        if not inside:
            raise BenchError(f"--pictures {place}: the folder holds no pictures (looked for {', '.join(ENDINGS)}).")
        found += inside
    index = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)
    return np.stack([read_image(found[i], source) for i in index])


def _subject(model: str, folder: Path, files: list[Path] | None, data: Path | None, count: int, topology: str | None,
             overrides: dict[str, str], peers: bool, mean_count: float | None) -> tuple[Path, Path | None, Pixels, str]:
    """(artifact, saved torch model or None, pictures, where they are from)."""
    kind = kind_of(model)
    if kind == "run":
        raise BenchError(f"{model} is a RUN folder: 'bitspike export {model} -o FILE.bitspike', then 'bitspike bench "
                         "FILE.bitspike'.")
    if kind == "file":
        if overrides or topology or mean_count is not None:
            raise BenchError(f"--set, --topology and --mean-count change a recipe; {model} is a finished network.")
        path = Path(model) if Path(model).is_file() else ZOO / f"{model}.bitspike"
        net = load_classifier(model)
        return path, None, *_file_pictures(net, files, data, count)
    if topology is not None:
        overrides["model_options.topology"] = topology
    from bitspike.papers import find_recipe

    recipe = find_recipe(model).override(overrides)
    if recipe.task != "classification":
        raise BenchError(f"{model} is for {recipe.task}; other engines are compared on classifiers. 'bitspike profile FILE' "
                         "times the file of a segmenter or detector, benchmarks/scenes.py torch beside it.")
    return _from_recipe(recipe, folder, files, data, count, peers, mean_count)


def _file_pictures(net: Net, files: list[Path] | None, data: Path | None, count: int) -> tuple[Pixels, str]:
    height, width, channels = net.input_shape
    if net.input_steps > 1:
        return sample_frames(count, net.input_steps, height, width, channels), "synthetic event frames"
    if files:
        images = _given(files, net.header["input"], count)
        return images, f"{len(images)} pictures of {', '.join(map(str, files))}"
    name, why = net.header.get("provenance", {}).get("data"), ""
    if data is not None and isinstance(name, str) and name != "fashion_mnist_sample":
        from bitspike.data import DataError
        from bitspike.data import load as load_data

        try:
            images = split_pictures(load_data(name, data), "test", count, height, channels)
            return images, f"{len(images)} pictures of {name} test"
        except DataError as error:
            why = f", because its own data cannot be read: {error}"
    images = sample_pictures(count, height, width, channels)
    return images, f"{len(images)} pictures of the embedded Fashion-MNIST sample{why}"


def _from_recipe(recipe: Recipe, folder: Path, files: list[Path] | None, data: Path | None, count: int,
                 peers: bool, mean_count: float | None) -> tuple[Path, Path | None, Pixels, str]:
    import torch

    from bitspike.benching.rates import set_mean_count
    from bitspike.benching.to_torch import PlainModel
    from bitspike.checkpoints import build
    from bitspike.exporting import calibrate_norms, export_model

    size, channels = recipe.image_size, len(recipe.mean)
    wanted = max(count, 16 if size > 64 else 128)  # the norms want more pictures than the clock
    if files:
        source = {"height": size, "width": size, "channels": channels, "resize": round(size / 0.875)}
        pixels = _given(files, source, wanted)
        used = f"{len(pixels)} pictures of {', '.join(map(str, files))}"
    else:
        pixels, found = pictures_for(recipe, data, wanted, "test")
        used = f"pictures of {recipe.data} test" if found is not None else "pictures of the embedded Fashion-MNIST sample"
    model = build(recipe)
    if mean_count is None:
        calibrate_norms(model, pixels, recipe.mean, recipe.std)
    else:
        set_mean_count(model, pixels, recipe.mean, recipe.std, mean_count)
        used += f", every neuron at a mean count of {mean_count:g}"
    path = folder / "net.bitspike"
    export_model(model, path, mean=recipe.mean, std=recipe.std, image_size=size, channels=channels,
                 classes=class_names(model.eval(), recipe), calibration_images=pixels, name=recipe.name,
                 time_steps=int(getattr(model, "time_steps", 1)), min_agreement=0.0, check_images=pixels[:1])
    plain = None
    if peers:
        plain = folder / "model.pt"
        torch.save(PlainModel(model, recipe.mean, recipe.std), plain)
    return path, plain, pixels, f"{used}, weights random, norms calibrated on the same pictures"
