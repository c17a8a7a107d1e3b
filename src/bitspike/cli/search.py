"""The command `search`: bits and schemes per layer, within a budget."""
from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitspike.cli.messages import console, print_wide, warn
from bitspike.cli.options import Data, Settings, Words, read_settings
from bitspike.cli.outputs import check_folder

if TYPE_CHECKING:
    from torch import nn

    from bitspike.recipe import Recipe
    from bitspike.searching import SearchData, SearchReport


def search(target: str, /, *, budget: Words, out: Path, data: Data = None, method: str = "sensitivity", measure: str = "loss",
           candidates: str = "", layer: Words = (), images: int = 2000, trials: int | None = None, steps: int | None = None,
           storage: str | None = None, technology: str = "45nm", cheap: str = "bytes", seed: int = 0,
           settings: Settings = ()) -> int:
    """Choose a scheme and a width for every layer, within a budget; the same command goes on after a kill.

    Writes DIR/spec.json (for 'bitspike train RECIPE --spec'), report.json, report.html and its figures.

    Parameters
    ----------
    target
        A trained RUN folder, or the name of a recipe (random weights: only costs mean something then).
    budget
        bits=3.2 (average), bytes=900kB (file), energy=25uJ (an image) or drop=1.0 (points lost before tuning). Repeated: all.
    out
        Folder for results and measurements.
    data
        Folder of the data sets. Default: the environment variable BITSPIKE_DATA.
    method
        sensitivity, differentiable or blackbox.
    measure
        For sensitivity: loss (measured) or fisher (estimated, for large networks).
    candidates
        Such as "uniform:2,3,4,8 pow2:3,4 binary". Default: binary, uniform 2..6 and 8, pow2 2..4.
    layer
        Candidates of some layers: --layer "stem.*=uniform:8"; may be repeated, the last that matches holds.
    images
        Training pictures to look at, half of them for the norms' statistics.
    trials
        For blackbox: how many specs to try. Default: 100.
    steps
        For differentiable: training steps of the search. Default: 200.
    storage
        For blackbox: optuna's storage, shared by several processes or machines. Default: a file in DIR.
    technology
        Energy of the operations: 45nm, bit_proportional or a JSON file of constants.
    cheap
        With drop=...: what to make small, bytes or energy.
    seed
        Of the choice of pictures and of the search.
    settings
        For a recipe: override a field, --set field=value; may be repeated.
    """
    import torch

    from bitspike.cost import technology as read_technology
    from bitspike.evaluation import as_input, autocast
    from bitspike.searching import (
        CANDIDATES,
        METHODS,
        Budget,
        SearchError,
        blackbox,
        differentiable,
        parse_candidates,
        write_report,
        write_spec,
    )
    from bitspike.searching import search as run_search
    from bitspike.searching.measure import check_finite

    check_folder("--out", out)
    if method not in METHODS:
        raise SearchError(f"--method {method}: allowed are {', '.join(METHODS)}.")
    for option, value, owner in (("--trials", trials, "blackbox"), ("--storage", storage, "blackbox"),
                                 ("--steps", steps, "differentiable")):
        if value is not None and method != owner:
            raise SearchError(f"{option} has no effect with --method {method}; it is for {owner}.")
    limits = Budget.parse(*budget)
    constants = read_technology(technology)
    rules = {"*": parse_candidates(candidates) if candidates else CANDIDATES}
    for rule in layer:
        pattern, equals, text = rule.partition("=")
        if not equals or not pattern.strip():
            raise SearchError(f"--layer {rule!r}: expected LAYERS=CANDIDATES, such as --layer 'head=uniform:8'.")
        rules[pattern.strip()] = parse_candidates(text)
    options: Any = {"blackbox": lambda: blackbox.Options(100 if trials is None else trials, storage),
                    "differentiable": lambda: differentiable.Options(200 if steps is None else steps),
                    "sensitivity": lambda: None}[method]()
    model, recipe, shown = _network(target, settings, data)
    check_finite(model)
    known = search_data(recipe, data, images, seed)

    def forward(network: nn.Module, x: torch.Tensor) -> Any:
        with autocast(recipe, x.device):
            return network(as_input(x))

    overhead = _overhead(model, recipe, data) if recipe.frames == 0 else 0
    out.mkdir(parents=True, exist_ok=True)
    teller = Teller()
    spec, report = run_search(model, rules, limits, known, method=method, measure=measure, out=out, seed=seed,
                              technology=constants, overhead_bytes=overhead, forward=forward, tell=teller, options=options,
                              cheap=cheap)
    write_spec(spec, out / "spec.json")
    write_report(report, out / "report.json")
    lines = _next_steps(shown, recipe, out, target, data)
    written = ["spec.json", "report.json", *_write_pictures(report, out, lines)]
    _tell_result(report, out, written, lines)
    return 0


class Teller:
    """Progress: a line every few seconds."""

    def __init__(self, every: float = 5.0) -> None:
        self.every, self.last = every, 0.0

    def __call__(self, text: str, done: int, total: int) -> None:
        """Print it, unless the last line is too fresh."""
        import time

        if time.monotonic() - self.last >= self.every or done == total:
            self.last = time.monotonic()
            console(stderr=True).print(f"{done}/{total}  {text}", markup=False)


def _network(target: str, settings: tuple[str, ...], data: Path | None) -> tuple[nn.Module, Recipe, str]:
    """(model, recipe, recipe's name)."""
    from bitspike.checkpoints import build, load_run
    from bitspike.cli.networks import kind_of, pictures_for
    from bitspike.exporting import calibrate_norms
    from bitspike.papers import find_recipe
    from bitspike.recipe import RecipeError
    from bitspike.searching import SearchError

    kind = kind_of(target)
    if kind == "file":
        raise SearchError(f"{target} is a .bitspike file, its weights are integers already; search takes a RUN folder or "
                          "a recipe.")
    if kind == "run":
        if settings:
            raise RecipeError("--set changes a recipe; a trained run is searched as it is.")
        model, recipe = load_run(target)
        _check_task(target, recipe)
        return model, recipe, recipe.name
    recipe = find_recipe(target).override(read_settings(settings))
    _check_task(target, recipe)
    warn(f"{target} is a recipe, its weights are random: bytes and bits are exact, but damage and energy are not those of "
         "a trained network. Search a RUN.")
    model = build(recipe)
    if recipe.frames == 0:
        pixels, _ = pictures_for(recipe, data, 64, "train")
        calibrate_norms(model, pixels, recipe.mean, recipe.std)
    return model, recipe, recipe.name


def _check_task(target: str, recipe: Recipe) -> None:
    from bitspike.searching import SearchError

    if recipe.task != "classification":
        raise SearchError(f"{target} is a network for {recipe.task}; search measures how the probabilities of classes "
                          "change, so it takes networks for classification only.")


def search_data(recipe: Recipe, data_dir: Path | None, count: int, seed: int) -> SearchData:
    """Pictures of the training set; where the recipe held some out, half are those, and they are the ones measured on."""
    import torch

    from bitspike.data import load
    from bitspike.data.loader import evaluation_batches
    from bitspike.data.pipeline import generator
    from bitspike.evaluation import normalise
    from bitspike.searching import SearchData, SearchError

    if count < 4:
        raise SearchError(f"--images {count}: at least 4 are needed, some hundred are sensible.")
    dataset = load(recipe.data, data_dir, recipe.event_frames())
    parts = []
    for split, key in (("train", "norms"), ("val" if recipe.train_on == "train" else "train", "measure")):
        whole = dataset.split(split)
        order = torch.randperm(len(whole), generator=generator(seed, "search", split))
        half = order[: count // 2] if key == "norms" or split == "val" else order[count // 2 : count]
        batches = list(evaluation_batches(whole.take(half), recipe.image_size, 64, recipe.workers))
        parts.append((normalise(torch.cat([b[0] for b in batches]), recipe), torch.cat([b[1] for b in batches])))
    return SearchData(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), len(parts[0][1]))


def _overhead(model: nn.Module, recipe: Recipe, data: Path | None) -> int:
    """Bytes of a file besides codes and tables: found by exporting once with 4 bits."""
    import copy
    import tempfile

    from bitspike.cli.networks import class_names, pictures_for
    from bitspike.cost import layer_bytes
    from bitspike.exporting import ExportError, export_model
    from bitspike.layers import quantizable, quantize_
    from bitspike.searching.measure import plain_copy
    from bitspike.spec import QuantSpec, Scheme

    trial = quantize_(plain_copy(copy.deepcopy(model)), QuantSpec({"*": Scheme("uniform", 4)}))
    pixels, known = pictures_for(recipe, data, 32, "train")
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = export_model(trial, Path(folder) / "x.bitspike", mean=recipe.mean, std=recipe.std,
                                  image_size=recipe.image_size, channels=len(recipe.mean),
                                  classes=class_names(trial, recipe, known), calibration_images=pixels, name=recipe.name,
                                  min_agreement=0.0, time_steps=int(getattr(model, "time_steps", 1)),
                                  provenance=_provenance_like(recipe))
    except ExportError as error:
        warn(f"the network cannot be exported yet, so file sizes leave out the program: {error}")
        return 0
    layers = quantizable(trial).values()
    weights: list[Any] = [layer.parametrizations.weight.original for layer in layers]  # type: ignore[union-attr]
    packed = sum(layer_bytes(w.numel(), 4, w.shape[0]) for w in weights)
    return report.bytes - packed + 32 * len(weights)  # names of schemes and multipliers differ by some characters


def _provenance_like(recipe: Recipe) -> dict[str, Any]:
    """As long as what `export` stores; the spec is longer than the recipe's own by a rule per layer."""
    from bitspike.layers import quantizable
    from bitspike.spec import QuantSpec, Scheme

    model = recipe.model(**recipe.model_options)
    rules = QuantSpec({name: Scheme("uniform", 8, options={"step": "normal"}) for name in quantizable(model)})
    settings = recipe.to_dict()
    import json

    return {"recipe": recipe.name, "data": recipe.data, "image_size": recipe.image_size, "bitspike": "0.0.0",
            "settings": {**settings, "spec": json.loads(rules.to_json()), "start": "x" * 80, "teacher": "x" * 80},
            "data_hash": "x" * 64, "commit": "x" * 46}


def _next_steps(name: str, recipe: Recipe, out: Path, target: str, data: Path | None) -> list[str]:
    """Commands that tune and use what was found: a tenth of the recipe's epochs, at less than half its learning rate."""
    run = shlex.quote(target) if Path(target).is_dir() else "RUN"
    where = "" if data is None else f" --data {shlex.quote(str(data))}"
    spec = shlex.quote(str(out / "spec.json"))
    shorter = {"epochs": recipe.epochs / 10, "warmup_epochs": recipe.epochs / 100, "lr": 0.4 * recipe.lr}
    return [f"bitspike train {name}{where} --spec {spec} --start {run} --set teacher={run} --set distill_logits=1 "
            + "".join(f"--set {field}={value:.2g} " for field, value in shorter.items()) + "--out TUNED",
            f"bitspike export TUNED{where} -o network.bitspike", "bitspike run network.bitspike PICTURE"]


def _write_pictures(report: SearchReport, out: Path, lines: list[str]) -> list[str]:
    """Figures and the page, where matplotlib is installed. Returns the name of the page."""
    from bitspike.extras import explain
    from bitspike.reporting import bits_figure, front_figure, save_figures, write_page

    plain = report.to_dict()
    try:
        save_figures({"front": front_figure([plain["searched"], *plain["points"]], "top-1 before fine-tuning"),
                      "bits": bits_figure(plain["searched"]["layers"], plain["layers"])}, out)
    except ModuleNotFoundError as error:
        warn(f"no figures and no page: {explain(error) or error}")
        return []
    write_page(out / "report.html", plain, lines)
    return ["report.html"]


def _tell_result(report: SearchReport, out: Path, written: list[str], lines: list[str]) -> None:
    from rich.table import Table

    table = Table(title=f"{report.method} within {report.budget}", title_justify="left")
    table.add_column("spec", no_wrap=True)
    for heading in ("bits", "file bytes", "smaller", "energy uJ", "less", "top-1 % before tuning"):
        table.add_column(heading, justify="right", no_wrap=True)
    full = next(p for p in report.points if p.group == "float")
    for point in (report.searched, *(p for p in report.points if p.group != "front")):
        t = point.totals
        table.add_row(point.name, f"{t.bits:.2f}", f"{t.bytes:,}", f"{full.totals.bytes / t.bytes:.1f}x",
                      f"{t.energy_pj / 1e6:.2f}", f"{full.totals.energy_pj / t.energy_pj:.1f}x", f"{point.top1:.2f}")
    print_wide(table)
    chosen = ", ".join(f"{name} {scheme.kind} {scheme.bits}" for name, scheme in report.searched.choice.items())
    console().print(f"Chosen: {chosen}.", markup=False)
    console().print(f"In {out}: {', '.join(written)}. Next:\n  " + "\n  ".join(lines), markup=False)
