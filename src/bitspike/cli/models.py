"""Torch models on the command line: profiles and lists of layers."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.table import Table

from bitspike.checkpoints import build, load_run
from bitspike.cli.networks import Pixels, pictures_for
from bitspike.exporting import calibrate_norms
from bitspike.layers import latent_weight, neurons_with_membrane, quantizable, quantizer_of
from bitspike.neurons import IELIF, LIF
from bitspike.papers import find_recipe
from bitspike.profiling import Report, profile
from bitspike.recipe import Recipe
from bitspike.training import as_input, normalise


def bits_of(recipe: Recipe) -> str:
    """The widths a recipe asks for, as text."""
    spec = recipe.quant_spec()
    if spec is None:
        return "float"
    widths = sorted({scheme.bits for _, scheme in spec.rules if scheme.kind not in ("full", "membrane")})
    return ", ".join(map(str, widths)) or "float"


def model_input(pixels: Pixels, recipe: Recipe) -> torch.Tensor:
    """uint8 [N, H, W, C] or [T, N, H, W, C] -> what the recipe's model takes, float [N, C, H, W] or [T, N, C, H, W]."""
    if pixels.ndim == 5:
        return as_input(normalise(torch.from_numpy(pixels).permute(1, 0, 4, 2, 3), recipe))
    return normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), recipe)


def _used(pixels: Pixels, recipe: Recipe, own: bool) -> str:
    if own:
        return f"{pixels.shape[-4]} of {recipe.data} test"
    if pixels.ndim == 5:
        return f"{pixels.shape[-4]} random sequences, not of {recipe.data}; give --data"
    return f"{len(pixels)} of the embedded Fashion-MNIST sample, not of {recipe.data}; give --data"


def profile_run(run: str, data_dir: Path | None, count: int) -> tuple[Report, str]:
    """Profile a trained run on test pictures of its own data."""
    model, recipe = load_run(run)
    pixels, data = pictures_for(recipe, data_dir, count, "test")
    return profile(model, model_input(pixels, recipe), name=f"{recipe.name} in {run}"), _used(pixels, recipe, data is not None)


def profile_recipe(name: str, overrides: Mapping[str, str], data_dir: Path | None, count: int) -> tuple[Report, str]:
    """Profile a recipe's model with random weights and calibrated norms: shapes are exact, spikes are not those of training."""
    recipe = find_recipe(name).override(overrides)
    model = build(recipe)
    large = recipe.image_size > 64
    pixels, data = pictures_for(recipe, data_dir, min(count, 8) if large else count, "test")
    calibrate_norms(model, pixels, recipe.mean, recipe.std)
    report = profile(model, model_input(pixels, recipe), name=f"{recipe.name}, random weights", batch=2 if large else 8)
    return report, _used(pixels, recipe, data is not None)


def layer_tables(recipe: Recipe) -> list[Table]:
    """Layers that can be quantized, and neurons."""
    model = build(recipe)
    listed = Table(title=f"{recipe.name}: layers", title_justify="left")
    for heading in ("layer", "type", "weight"):
        listed.add_column(heading, no_wrap=True)
    listed.add_column("weights", justify="right")
    listed.add_column("quantizer", no_wrap=True)
    total = 0
    for name, layer in quantizable(model).items():
        weight, quantizer = latent_weight(layer), quantizer_of(layer)
        form = "full precision" if quantizer is None else f"{type(quantizer).__name__}, {quantizer.bits} bits"
        kind = type(layer).__name__.removeprefix("Parametrized")
        listed.add_row(name, kind, "x".join(map(str, weight.shape)), f"{weight.numel():,}", form)
        total += weight.numel()
    listed.caption = f"{len(quantizable(model))} layers, {total:,} weights"
    neurons = Table(title="neurons", title_justify="left")
    neurons.add_column("neuron", no_wrap=True)
    neurons.add_column("membrane", no_wrap=True)
    neurons.add_column("is", overflow="fold")
    lifs = neurons_with_membrane(model)
    for name, module in model.named_modules():
        if isinstance(module, (LIF, IELIF)):
            kept = lifs[name].membrane if name in lifs else None
            neurons.add_row(name, "full" if kept is None else "tanh alone" if kept.bits == 32 else f"{kept.bits} bits",
                            f"{type(module).__name__}({module.extra_repr()})")
    return [listed, neurons]
