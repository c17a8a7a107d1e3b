"""Searched specs against uniform, power-of-two-only and random ones at equal average bits, each fine-tuned equally shortly.

    python benchmarks/search.py FLOAT_RUN --data DIR --out OUT              # search, fine-tune all, table (hours)
    python benchmarks/search.py FLOAT_RUN --data DIR --out OUT --table      # only the table of what is finished
    python benchmarks/search.py FLOAT_RUN --data DIR --out OUT --short      # minutes: shows that it runs, measures nothing

All start from the same float weights and have the float network as their teacher; runs of one seed see the same images in the
same order. Searched and uniform specs are tuned with several seeds, random ones are several specs; the table has mean, standard
deviation, least and most. The search looks at training images only; accuracy is top-1 on the whole test set, once, at the end.
Interrupted, it goes on. --only tunes only the runs whose names begin like that: two processes can share the work.
Writes OUT/specs/*.json, OUT/runs/*, OUT/results.json, OUT/report.html.
"""
from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bitspike.checkpoints import load_run
from bitspike.cli.files import export_run
from bitspike.cli.search import Teller, search_data
from bitspike.cost import packed_bytes
from bitspike.data import load
from bitspike.data.loader import evaluation_batches
from bitspike.evaluation import as_input, autocast, normalise
from bitspike.layers import latent_weight, quantizable
from bitspike.papers import find_recipe
from bitspike.profiling import profile
from bitspike.reporting import bits_figure, front_figure, save_figures, write_page
from bitspike.searching import CANDIDATES, Budget, SearchReport, make_space, search
from bitspike.searching.programme import Row, solve
from bitspike.searching.space import key_of
from bitspike.spec import QuantSpec
from bitspike.training import read_metrics, train
from bitspike.writing import write_json, write_text


@dataclass(frozen=True)
class Run:
    """One fine-tuning: rows of the table are the runs of one `row`."""

    row: str
    group: str
    spec: QuantSpec
    number: int = 0  # of the random spec
    seed: int = 0
    epochs: str = ""

    @property
    def name(self) -> str:
        return f"{self.row}, spec {self.number}" if self.number else f"{self.row}, seed {self.seed}"

    @property
    def slug(self) -> str:
        return self.name.replace(",", "").replace(" ", "_")


def planned(asked: argparse.Namespace) -> tuple[list[Run], SearchReport]:
    """Every run, and the report of the search at the last of the bits."""
    model, recipe = load_run(asked.float_run)
    space = make_space(model, CANDIDATES)

    def forward(network, x):
        with autocast(recipe, x.device):
            return network(as_input(x))

    known = search_data(recipe, asked.data, asked.images, 0)

    def searched(bits):
        return search(model, CANDIDATES, Budget(bits=bits), known, out=asked.out, forward=forward, tell=Teller())

    runs, total = [], sum(space.weights.values())
    first, last = list(space.layers)[0], list(space.layers)[-1]
    for bits in asked.bits:
        spec, report = searched(bits)
        runs += [Run(f"searched {bits:g}", "searched", spec, seed=s) for s in range(asked.seeds)]
        if bits == int(bits):
            same = {n: next(s for s in c if (s.kind, s.bits) == ("uniform", bits)) for n, c in space.layers.items()}
            ends = {n: next(s for s in space.layers[n] if (s.kind, s.bits) == ("uniform", 8)) for n in (first, last)}
            runs += [Run(f"uniform {bits:g} with 8-bit ends", "uniform ends", space.spec({**same, **ends}), seed=s)
                     for s in range(asked.seeds)]
            runs.append(Run(f"uniform {bits:g}", "uniform", space.spec(same)))
        only = space.only(["pow2"])
        damage = {n: {s: report.damage[n][key_of(s)] for s in c} for n, c in only.layers.items()}
        limit = Row("bits", {n: {s: space.weights[n] * s.bits for s in c} for n, c in only.layers.items()}, bits * total)
        choice = solve(only.layers, damage, [limit])
        if choice is not None:
            runs.append(Run(f"power of two only {bits:g}", "pow2", only.spec(choice)))
        for draw, row in ((space.random, f"random {bits:g}"), (space.random_filled, f"random, filled {bits:g}")):
            runs += [Run(row, "random", space.spec(draw(s, bits)), number=s) for s in range(1, asked.random + 1)]
    if asked.main_bits:
        spec, report = searched(asked.main_bits)
        runs.append(Run(f"searched {asked.main_bits:g}, longer", "searched", spec, epochs=asked.main_epochs))
    return runs, report


def point(name: str, group: str, run: Path, data: Path, out: Path) -> dict | None:
    """What a finished run costs and reaches, or None."""
    finals = [row for row in read_metrics(run) if row.get("final")] if run.is_dir() else []
    if not finals:
        return None
    model, recipe = load_run(run)
    test = load(recipe.data, data).test
    index = torch.linspace(0, len(test) - 1, 64).long()
    images = torch.cat([normalise(p, recipe) for p, _ in evaluation_batches(test.take(index), recipe.image_size, 64, 0)])
    report = profile(model, images)
    layers = {n: latent_weight(layer).numel() for n, layer in quantizable(model).items()}
    bits = {op.name: op.weight_bits for op in report.layers}
    (out / "files").mkdir(parents=True, exist_ok=True)
    size = (4 * sum(layers.values()) if group == "float" else
            export_run(run, out / "files" / f"{run.name}.bitspike", data, 0.0).bytes)
    average = sum(layers[n] * bits[n] for n in layers) / sum(layers.values())
    return {"name": name, "group": group, "bits": average, "bytes": size,
            "weight_bytes": sum(packed_bytes(layers[n], bits[n]) for n in layers), "energy_pj": report.bit_aware.total_pj,
            "literature_pj": report.literature_pj, "top1": finals[-1]["test_top1"], "n": finals[-1]["test_n"],
            "spikes_per_neuron": report.spikes_per_neuron, "energy": vars(report.bit_aware)}


def table(points: Sequence[dict]) -> str:
    """Markdown: one line per row, the mean over its runs; costs are those of its first run."""
    full, lines = points[0], ["| spec | runs | bits | top-1, mean | deviation | least to most | to float | file, bytes "
                              "| smaller | energy, uJ | less |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    rows: dict[str, list[dict]] = {}
    for p in points:
        rows.setdefault(p["row"], []).append(p)
    means = {row: statistics.mean(p["top1"] for p in found) for row, found in rows.items()}
    for row in sorted(rows, key=lambda row: (round(rows[row][0]["bits"], 1), -means[row])):
        found, one = [p["top1"] for p in rows[row]], rows[row][0]
        spread = f"{statistics.stdev(found):.2f} | {min(found):.2f} to {max(found):.2f}" if len(found) > 1 else " | "
        lines.append(f"| {row} | {len(found)} | {one['bits']:.2f} | {means[row]:.2f} % | {spread} | "
                     f"{means[row] - full['top1']:+.2f} | {one['bytes']:,} | {full['bytes'] / one['bytes']:.1f}x | "
                     f"{one['energy_pj'] / 1e6:.1f} | {full['energy_pj'] / one['energy_pj']:.1f}x |")
    return "\n".join(lines)


def agreement(points: Sequence[dict]) -> str:
    """How well the search's estimate, a sum of divergences before any fine-tuning, orders the specs as fine-tuning does."""
    from scipy.stats import spearmanr

    if len(points) < 3:
        return f"{len(points)} runs: too few to tell whether the search's estimate orders them rightly."
    found = spearmanr([p["estimate"] for p in points], [-p["top1"] for p in points]).statistic
    return (f"Rank correlation of the search's estimate (sum of divergences before fine-tuning) with the accuracy after it: "
            f"{found:.2f} over {len(points)} runs.")


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("float_run", type=Path)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--bits", type=float, nargs="+", default=[2.0, 3.0])
    options.add_argument("--seeds", type=int, default=3, help="of searched specs and uniform ones with 8-bit ends")
    options.add_argument("--random", type=int, default=4, help="random specs of either sort")
    options.add_argument("--images", type=int, default=2000, help="the search looks at")
    options.add_argument("--epochs", default="0.5")
    options.add_argument("--main-bits", type=float, default=3.2, help="one searched spec that is tuned longer; 0: none")
    options.add_argument("--main-epochs", default="2")
    options.add_argument("--recipe", help="to fine-tune with; default: the float run's")
    options.add_argument("--set", action="append", default=[], help="of every fine-tuning, field=value")
    options.add_argument("--only", nargs="+", default=[""], help="tune only runs whose names begin like that; no table")
    options.add_argument("--table", action="store_true")
    options.add_argument("--short", action="store_true", help="3 bits, one run a row, a hundredth of an epoch")
    asked = options.parse_args(words)
    if asked.short:
        asked.bits, asked.seeds, asked.random, asked.images, asked.epochs, asked.main_bits = [3.0], 1, 1, 100, "0.01", 0.0
    return asked


def main(words: Sequence[str] | None = None) -> None:
    asked = arguments(words)
    runs, report = planned(asked)
    own = load_run(asked.float_run)[1]
    recipe = find_recipe(asked.recipe or own.name)
    given = dict(s.split("=", 1) for s in asked.set)
    for run in runs:
        path = asked.out / "specs" / f"{run.slug}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or QuantSpec.from_json(path.read_text()) != run.spec:
            write_text(path, run.spec.to_json() + "\n")
        if not asked.table and run.name.startswith(tuple(asked.only)):
            settings = {"spec": str(path), "start": str(asked.float_run), "teacher": str(asked.float_run),
                        "distill_logits": "1", "epochs": run.epochs or asked.epochs, "warmup_epochs": "0.05",
                        "batch_size": "250", "lr": f"{0.4 * recipe.lr:.2g}", "seed": str(run.seed), **given}
            if float(settings["epochs"]) < 0.1:
                settings["warmup_epochs"] = "0"
            train(recipe, asked.data, asked.out / "runs" / run.slug, overrides=settings)
    if asked.only != [""]:
        return
    points = [{**point("float", "float", asked.float_run, asked.data, asked.out), "row": "float"}]
    for run in runs:
        found = point(run.name, run.group, asked.out / "runs" / run.slug, asked.data, asked.out)
        if found is not None:
            chosen = run.spec.resolve(list(report.damage))
            estimate = sum(report.damage[n][key_of(s)] for n, s in chosen.items())
            points.append({**found, "row": run.row, "estimate": estimate})
    write_json(asked.out / "results.json", points)
    print(table(points))
    print(f"\n{agreement(points[1:])}")
    plain = report.to_dict()
    save_figures({"front": front_figure(points, "top-1 after fine-tuning"),
                  "bits": bits_figure(plain["searched"]["layers"], plain["layers"])}, asked.out)
    write_page(asked.out / "report.html", plain, (), points)


if __name__ == "__main__":
    main()
