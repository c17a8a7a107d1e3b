"""`bitspike demo`: the whole chain on embedded pictures, ending in one table."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table
from torch import nn

from bitspike.cli.files import evaluate_file, export_run
from bitspike.cli.messages import console
from bitspike.cli.models import model_input
from bitspike.cli.networks import Pixels, pictures_for
from bitspike.papers.demo import RECIPES
from bitspike.profiling import Report, profile
from bitspike.profiling.of_artifact import milliseconds
from bitspike.profiling.report import energy
from bitspike.recipe import Recipe
from bitspike.training import load_run, train

_PROFILED = 100


def demonstrate(out: Path, overrides: Mapping[str, str]) -> tuple[Table, str]:
    """Train both twins in `out`, export the 4-bit one, measure everything; returns the table and what to do next."""
    table = Table(title="One network, float and 4-bit, on 1,000 real test pictures it has not seen", title_justify="left")
    table.add_column("network", no_wrap=True)
    for heading in ("accuracy", "bytes", "spikes per\nneuron", "energy,\nliterature", "energy,\nbit-aware", "ms per\nimage",
                    "agrees\nwith torch"):
        table.add_column(heading, justify="right", no_wrap=True)

    for name, recipe in RECIPES.items():
        run = out / name.partition(".")[2]
        weights = "float weights" if recipe.bits == 32 else f"{recipe.bits}-bit weights"
        console().print(f"Training {name} into {run} ({weights}{' in every layer' * (recipe.bits < 32)})", style="bold")
        result = train(recipe, None, run, overrides=overrides)
        model, recipe = load_run(run)
        images = model_input(_pictures(recipe), recipe)
        report = profile(model, images, name=name, batch=50)
        _row(table, f"{weights}, torch", result["test_top1"], report.weight_bytes, report, _torch_ms(model, images), "")

    file = out / "four_bit.bitspike"
    console().print(f"Packing {run} into {file}", style="bold")
    exported = export_run(run, file, None)
    result = evaluate_file(str(file), None, "test")
    pixels = _pictures(recipe)
    report = profile(file, pixels)
    _row(table, f"{file.name}, integers", result["top1"], exported.bytes, report, report.ms_per_image or 0.0,
         f"{exported.agreement:.1%}")
    folder = _leave_pictures(out / "pictures", pixels)
    return table, (
        f"Bytes: packed weights, and the whole file of {file.name}. Energy and time are per image, in batches of {_PROFILED}; "
        f"'bitspike profile {file}' tells more.\n"
        f"The 4-bit network is in {file} and runs without torch:\n  bitspike run {file} {folder}")


def _pictures(recipe: Recipe) -> Pixels:
    return pictures_for(recipe, None, _PROFILED, "test")[0]


def _torch_ms(model: nn.Module, images: torch.Tensor) -> float:
    with torch.inference_mode():
        return milliseconds(lambda: model(images), len(images))


def _row(table: Table, label: str, top1: float, size: int, report: Report, ms: float, agreement: str) -> None:
    table.add_row(label, f"{top1:.1f} %", f"{size:,}", f"{report.spikes_per_neuron:.3f}", energy(report.literature_pj),
                  energy(report.bit_aware.total_pj), f"{ms:.2f}", agreement)


def _leave_pictures(folder: Path, pixels: Pixels) -> Path:
    """A few test pictures as files, to try `bitspike run` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pixels[:5]):
        Image.fromarray(picture[:, :, 0]).save(folder / f"test_{i}.png")
    return folder
