"""What a word on the command line can mean (a RUN folder, a .bitspike FILE, a RECIPE), and pictures to feed a network."""
from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitspike.deploy.runtime import builtin_names

if TYPE_CHECKING:
    from torch import nn

    from bitspike.data import Dataset
    from bitspike.recipe import Recipe

Pixels = np.ndarray  # uint8 [N, H, W, C], or sequences of frames [T, N, H, W, C]


class TargetError(ValueError):
    """A path where nothing is."""


def kind_of(target: str) -> str:
    """"run", "file" or "recipe". Errors: TargetError for a path, told by its separator, that does not exist."""
    path = Path(target)
    if path.is_dir():
        return "run"
    if path.is_file() or target.endswith(".bitspike") or target in builtin_names():
        return "file"
    if len(path.parts) > 1:
        raise TargetError(f"{target}: no such RUN folder, and no recipe is called so. 'bitspike train' writes RUN folders; "
                          "'bitspike recipes' lists the recipes.")
    return "recipe"


# ------------------------------------------------------------------------------------------------ pictures
def sample_pictures(count: int, height: int, width: int, channels: int) -> Pixels:
    """Pictures of the embedded Fashion-MNIST sample, fitted to any size: for networks whose own data is not at hand."""
    from PIL import Image

    folder = resources.files("bitspike") / "data" / "fashion_mnist_sample"  # bitspike.data would import torch
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    grey = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    grey = grey[_spread(len(grey), count)]
    if (height, width) != (28, 28):
        grey = np.stack([np.asarray(Image.fromarray(g).resize((width, height), Image.Resampling.BICUBIC)) for g in grey])
    return np.ascontiguousarray(np.repeat(grey[..., None], channels, axis=3))


def sample_frames(count: int, steps: int, height: int, width: int, channels: int) -> Pixels:
    """Sparse random frames [T, N, H, W, C], about one event in ten pixels: where a network's own recordings are not at hand."""
    rng = np.random.default_rng(0)
    return rng.poisson(0.1, (steps, count, height, width, channels)).clip(0, 255).astype(np.uint8)


def split_pictures(data: Dataset, split: str, count: int, size: int, channels: int) -> Pixels:
    """`count` pictures of a split, as evaluation sees them; from all over it, since it may be sorted by class."""
    import torch

    from bitspike.data.loader import evaluation_batches

    whole = data.split(split)
    index = torch.from_numpy(_spread(len(whole), count))
    parts = [pixels for pixels, _ in evaluation_batches(whole.take(index), size, 64, 0)]
    return as_pixels(torch.cat(parts), channels)


def scene_pictures(recipe: Recipe, data: Dataset, split: str, count: int) -> Pixels:
    """`count` pictures of a data set for dense tasks, [N, H, W, 3], on the canvas that most of them have in evaluation.

    A picture of other proportions is shown whole, with a border of the mean colour on the right or below.
    """
    import torch

    from bitspike.data import DataError, Scenes
    from bitspike.tasks.dense import border_colour, letterboxed, usual_canvas

    whole = data.split(split)
    if not isinstance(whole, Scenes):
        raise DataError(f"{recipe.data} has a class a picture; {recipe.name} is for {recipe.task}.")
    canvas = usual_canvas(recipe, whole)
    pictures = [letterboxed(whole.image(i), canvas, border_colour(recipe))[0] for i in _spread(len(whole), count).tolist()]
    return as_pixels(torch.stack(pictures), 3)


def _spread(total: int, count: int) -> np.ndarray:
    return np.linspace(0, total - 1, min(count, total)).astype(np.int64)


def as_pixels(images: Any, channels: int) -> Pixels:
    """torch uint8 [B, C, H, W] -> numpy uint8 [B, H, W, channels]; a grey picture becomes three equal channels.

    Sequences [B, T, C, H, W] become [T, B, H, W, C].
    """
    if images.dim() == 5:
        return np.ascontiguousarray(images.permute(1, 0, 3, 4, 2).numpy())
    pixels = images.permute(0, 2, 3, 1).numpy()
    if pixels.shape[3] != channels:
        pixels = np.repeat(pixels[..., :1], channels, axis=3)
    return np.ascontiguousarray(pixels)


def pictures_for(recipe: Recipe, data_dir: Path | None, count: int, split: str) -> tuple[Pixels, Dataset | None]:
    """Pictures of the recipe's own data, or of the embedded sample where the data is not at hand."""
    from bitspike.data import load

    channels = len(recipe.mean)
    if data_dir is None and recipe.frames:
        return sample_frames(count, recipe.frames, recipe.image_size, recipe.image_size, channels), None
    if data_dir is None and recipe.data != "fashion_mnist_sample":
        side = recipe.image_size if recipe.task == "classification" else -(-recipe.image_size // 32) * 32
        return sample_pictures(count, side, side, channels), None
    data = load(recipe.data, data_dir, recipe.event_frames(), recipe.skip_broken)
    if recipe.task != "classification":
        return scene_pictures(recipe, data, split, count), data
    return split_pictures(data, split, count, recipe.image_size, channels), data


def class_names(model: nn.Module, recipe: Recipe, data: Dataset | None = None) -> tuple[str, ...]:
    """Names of a model's outputs: those of its data, else "class 0", "class 1", as many as it gives."""
    import torch

    if data is not None:
        return data.classes
    steps = (recipe.frames,) if recipe.frames else ()
    with torch.no_grad():
        outputs = model.eval()(torch.zeros(*steps, 1, len(recipe.mean), recipe.image_size, recipe.image_size))
    found = outputs.shape[1] if recipe.task == "segmentation" else outputs.shape[-1]
    return tuple(f"class {i}" for i in range(found))
