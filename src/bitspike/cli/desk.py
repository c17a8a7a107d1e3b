"""The commands that want torch: train, eval, export, profile, layers, recipes, demo. Each imports it when called."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from bitspike.cli.messages import console, print_wide, warn
from bitspike.cli.options import Data, JsonFile, Settings, read_settings
from bitspike.cli.outputs import check_file, check_folder
from bitspike.writing import write_json


# -------------------------------------------------------------------------------------------------- train
def train(recipe: str, /, *, out: Path, data: Data = None, spec: Path | None = None, start: Path | None = None,
          settings: Settings = ()) -> int:
    """Train a recipe into a RUN folder, or go on with an unfinished one (the same command).

    Parameters
    ----------
    recipe
        Name of a recipe; 'bitspike recipes' lists them.
    out
        The RUN folder: weights, settings and metrics.
    data
        Folder of the data sets. Default: the environment variable BITSPIKE_DATA.
    spec
        Bits and scheme of each layer, a JSON file as 'bitspike search' writes it. The same as --set spec=FILE.
    start
        A trained RUN of the same network to begin with, float or not. The same as --set start=RUN.
    settings
        Override a field of the recipe: --set field=value; may be repeated.
    """
    from bitspike.papers import find_recipe
    from bitspike.training import train as train_recipe

    check_folder("--out", out)
    values = read_settings(settings)
    values |= {name: str(path) for name, path in (("spec", spec), ("start", start)) if path is not None}
    train_recipe(find_recipe(recipe), data, out, overrides=values)
    return 0


# --------------------------------------------------------------------------------------------------- eval
def evaluate(target: str, /, *, data: Data = None, json_file: JsonFile = None, split: str = "test",
             threads: int | None = None) -> int:
    """Accuracy on a data set: with torch for a RUN, with the integer runtime for a .bitspike FILE.

    Parameters
    ----------
    target
        A RUN folder, a .bitspike file or the name of a built-in network.
    data
        Folder of the data sets. Default: the environment variable BITSPIKE_DATA.
    json_file
        Write the result there, too.
    split
        test, val or train.
    threads
        Threads of the integer runtime; all cores if not given.
    """
    from bitspike.cli.networks import kind_of
    from bitspike.papers import find_recipe

    if json_file is not None:
        check_file("--json", json_file)
    kind = kind_of(target)
    if kind == "recipe":
        find_recipe(target)  # an unknown name is an error of its own
        from bitspike.recipe import RecipeError

        raise RecipeError(f"{target} is a recipe, which is not trained yet: 'bitspike train {target} --out RUN', then "
                          "'bitspike eval RUN'.")
    if kind == "run":
        from bitspike.tasks import task_of
        from bitspike.training import evaluate as evaluate_model
        from bitspike.training import load_run

        model, recipe = load_run(target)
        result: dict[str, Any] = {"target": target, "runtime": "torch", "recipe": recipe.name, "data": recipe.data,
                                  "split": split, "train_on": recipe.train_on,
                                  **evaluate_model(model, recipe, data, split)}
    else:
        from bitspike.cli.files import evaluate_file

        result = evaluate_file(target, data, split, threads)
    measured = (task_of(recipe).says(result) if kind == "run" and recipe.task != "classification"
                else result.pop("says") if "says" in result
                else f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %")
    spent = f", {result['ms_per_image']:.3f} ms per image" if "ms_per_image" in result else ""
    console().print(f"{target}: {measured} of {result['n']} images "
                     f"({result['data']} {split}, {result['runtime']}{spent})", markup=False)
    if split == "val" and result["train_on"] == "train+val":
        warn(f"{target} was trained on train+val: it has seen these very pictures, so this is no estimate of its accuracy. "
             "--split test is.")
    if json_file is not None:
        write_json(json_file, result)
    return 0


# ------------------------------------------------------------------------------------------------- export
def export(target: str, /, *, output: Annotated[Path, Parameter(name=["--output", "-o"])], data: Data = None,
           settings: Settings = (), min_agreement: float = 0.99) -> int:
    """Write a trained RUN as one .bitspike file and compare the two.

    A RECIPE gives random weights with calibrated norms: how large would the file be?

    Parameters
    ----------
    target
        A RUN folder or the name of a recipe.
    output
        The file to write.
    data
        Folder of the data sets. Default: the environment variable BITSPIKE_DATA.
    settings
        For a recipe: override a field, --set field=value; may be repeated.
    min_agreement
        Refuse if fewer pictures (of 1) have the same top-1 class as with torch. Random weights are never refused.
    """
    from bitspike.cli.files import export_recipe, export_run
    from bitspike.cli.networks import kind_of
    from bitspike.exporting import ExportError
    from bitspike.papers import find_recipe
    from bitspike.recipe import RecipeError

    check_file("--output", output)
    if not 0 <= min_agreement <= 1:
        raise ExportError(f"--min-agreement {min_agreement}: a share of 0..1 is needed, 0.99 for 99 %.")
    kind = kind_of(target)
    if kind == "file":
        raise ExportError(f"{target} is a file already; export takes a RUN folder or a recipe's name.")
    if kind == "run":
        if settings:
            raise RecipeError("--set changes a recipe; a trained run is exported as it is.")
        report = export_run(target, output, data, min_agreement)
    else:
        report = export_recipe(find_recipe(target).override(read_settings(settings)), output, data)
    console().print(str(report), markup=False)
    return 0


# ------------------------------------------------------------------------------------------------ profile
def profile(target: str, /, *, data: Data = None, json_file: JsonFile = None, images: int = 64, settings: Settings = (),
            threads: int | None = None) -> int:
    """Bytes, operations, spikes and energy (three accounts), layer by layer.

    Parameters
    ----------
    target
        A RUN folder, a .bitspike file (also timed; needs no torch), or a recipe's name (random weights).
    data
        Folder of the data sets; without it the pictures are those of the embedded Fashion-MNIST sample.
        Default: the environment variable BITSPIKE_DATA.
    json_file
        Write the report there, too.
    images
        How many pictures to count spikes on.
    settings
        For a recipe: override a field, --set field=value; may be repeated.
    threads
        Threads of the integer runtime; all cores if not given.
    """
    from bitspike.cli.networks import kind_of

    if images < 1:
        raise ValueError(f"--images {images}: at least 1 is needed.")
    if json_file is not None:
        check_file("--json", json_file)
    kind = kind_of(target)
    if kind == "file":
        from bitspike.cli.files import profile_file

        report, used = profile_file(target, data, images, threads)
    else:
        from bitspike.cli.models import profile_recipe, profile_run

        report, used = (profile_run(target, data, images) if kind == "run"
                        else profile_recipe(target, read_settings(settings), data, images))
    print_wide(report, report.WIDTH)
    console().print(f"Pictures: {used}.", style="dim", markup=False)
    if json_file is not None:
        write_json(json_file, {**report.to_dict(), "pictures": used})
    return 0


# ------------------------------------------------------------------------------------- layers and recipes
def layers(recipe: str, /, *, settings: Settings = ()) -> int:
    """List the layers of a recipe that can be quantized, with their shapes and bits, and its neurons.

    Parameters
    ----------
    recipe
        Name of a recipe; 'bitspike recipes' lists them.
    settings
        Override a field of the recipe: --set field=value; may be repeated.
    """
    from bitspike.cli.models import layer_tables
    from bitspike.papers import find_recipe

    for table in layer_tables(find_recipe(recipe).override(read_settings(settings))):
        print_wide(table)
    return 0


def recipes(words: list[str] | None = None, /, *, json: JsonFile = None) -> int:
    """List the recipes: name, data, bits, claimed result, cost of training and its command.

    Parameters
    ----------
    words
        Only recipes with all these words in their name or data: q_snn, or cifar10 small.
    json
        Write them, with their notes, to this file too.
    """
    from bitspike.cli.models import bits_of
    from bitspike.papers import all_recipes
    from bitspike.recipe import RecipeError

    if json is not None:
        check_file("--json", json)
    known = all_recipes()
    found = [recipe for name, recipe in known.items() if all(word in f"{name} {recipe.data}" for word in words or ())]
    if not found:
        raise RecipeError(f"no recipe has {' and '.join(map(repr, words or ()))} in its name or data; there are {len(known)}: "
                          "'bitspike recipes' lists them all.")
    table = Table(show_lines=True)
    table.add_column("recipe\ndata, bits of the weights", no_wrap=True)
    table.add_column("claim\ncost", overflow="fold")
    for recipe in found:
        bits = bits_of(recipe)
        width = bits if bits == "float" else f"{bits} bit{'s' * (bits != '1')}"
        table.add_row(Text.assemble((recipe.name, "bold"), f"\n  {recipe.data}, {width}"),
                      Text(f"{recipe.claim}\n{recipe.cost}"))
    print_wide(table)
    if json is not None:
        write_json(json, [{"name": recipe.name, "data": recipe.data, "bits": bits_of(recipe), "claim": recipe.claim,
                           "cost": recipe.cost, "notes": recipe.notes} for recipe in found])
    return 0


# --------------------------------------------------------------------------------------------------- demo
def demo(*, out: Path = Path("runs/demo"), settings: Settings = ()) -> int:
    """Train a float and a 4-bit spiking transformer on embedded pictures, pack it, run it as integers: some minutes.

    Parameters
    ----------
    out
        Folder for both runs and the .bitspike file. What is there is used again.
    settings
        Override a field of both recipes: --set field=value; may be repeated.
    """
    from bitspike.cli.demonstration import demonstrate

    check_folder("--out", out)
    table, next_steps = demonstrate(out, read_settings(settings))
    print_wide(table)
    console().print(next_steps, markup=False)
    return 0
