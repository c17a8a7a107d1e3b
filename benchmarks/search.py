"""Searched specs against uniform, power-of-two-only and random ones at equal average bits, each fine-tuned equally shortly.

    python benchmarks/search.py FLOAT_RUN --data DIR --out OUT              # search, fine-tune all, table (an hour or more)
    python benchmarks/search.py FLOAT_RUN --data DIR --out OUT --table      # only the table of what is finished

All start from the same float weights, see the same images in the same order and have the float network as their teacher. The
search looks at training images only; accuracy is top-1 on the whole test set, once, at the end. Interrupted, it goes on.
Writes OUT/specs/*.json, OUT/runs/*, OUT/results.json, OUT/report.html.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bitspike.checkpoints import load_run
from bitspike.cli.files import export_run
from bitspike.cli.search import _data, _Teller
from bitspike.cost import packed_bytes
from bitspike.data import load
from bitspike.data.loader import evaluation_batches
from bitspike.data.splits import take
from bitspike.evaluation import as_input, autocast, normalise
from bitspike.layers import latent_weight, quantizable
from bitspike.profiling import profile
from bitspike.reporting import bits_figure, front_figure, save_figures, write_page
from bitspike.searching import CANDIDATES, Budget, make_space, search
from bitspike.searching.programme import Row, solve
from bitspike.searching.space import key_of
from bitspike.spec import QuantSpec
from bitspike.training import read_metrics, train

BITS = (2.0, 2.5, 3.0, 3.2)
MAIN = "searched 3.2"


def specs(float_run: Path, data: Path, out: Path, images: int):
    """Name -> (group, spec), and the report of the search at 3.2 bits."""
    model, recipe = load_run(float_run)
    space = make_space(model, CANDIDATES)

    def forward(network, x):
        with autocast(recipe, x.device):
            return network(as_input(x))

    known = _data(recipe, data, images, 0)
    found, report = {}, None
    for bits in BITS:
        spec, report = search(model, CANDIDATES, Budget(bits=bits), known, out=out, forward=forward, tell=_Teller())
        found[f"searched {bits:g}"] = ("searched", spec)
    damage = {n: {s: report.damage[n][key_of(s)] for s in c} for n, c in space.layers.items()}
    total = sum(space.weights.values())
    for bits in (2.5, 3.0):
        only = space.only(["pow2"])
        row = Row("bits", {n: {s: space.weights[n] * s.bits for s in c} for n, c in only.layers.items()}, bits * total)
        found[f"power of two {bits:g}"] = ("pow2", only.spec(solve(only.layers, damage, [row])))
        for seed in (1, 2):
            found[f"random {bits:g}, seed {seed}"] = ("random", space.spec(space.random(seed, bits)))
    same = {b: {n: next(s for s in c if (s.kind, s.bits) == ("uniform", b)) for n, c in space.layers.items()}
            for b in (2, 3, 4, 8)}
    for bits in (2, 3, 4):
        found[f"uniform {bits}"] = ("uniform", space.spec(same[bits]))
    first, last = list(space.layers)[0], list(space.layers)[-1]
    found["uniform 3, ends 8"] = ("uniform ends", space.spec({**same[3], first: same[8][first], last: same[8][last]}))
    halves = {n: same[2 if n.startswith("groups.2") else 3][n] for n in space.layers}
    found["uniform 2 and 3"] = ("uniform", space.spec(halves))
    return found, report


def point(name: str, group: str, run: Path, data: Path, out: Path) -> dict | None:
    """What a finished run costs and reaches, or None."""
    finals = [row for row in read_metrics(run) if row.get("final")] if run.is_dir() else []
    if not finals:
        return None
    cache = out / "points" / f"{run.name}.json"
    if cache.is_file():
        return json.loads(cache.read_text())
    model, recipe = load_run(run)
    test = load(recipe.data, data).test
    index = torch.linspace(0, len(test) - 1, 64).long()
    images = torch.cat([normalise(p, recipe) for p, _ in evaluation_batches(take(test, index), recipe.image_size, 64, 0)])
    report = profile(model, images)
    layers = {n: latent_weight(layer).numel() for n, layer in quantizable(model).items()}
    bits = {op.name: op.weight_bits for op in report.layers}
    size = (4 * sum(layers.values()) if group == "float" else
            export_run(run, out / "files" / f"{run.name}.bitspike", data, 0.9).bytes)
    average = sum(layers[n] * bits[n] for n in layers) / sum(layers.values())
    result = {"name": name, "group": group, "bits": average, "bytes": size,
              "weight_bytes": sum(packed_bytes(layers[n], bits[n]) for n in layers), "energy_pj": report.bit_aware.total_pj,
              "literature_pj": report.literature_pj, "top1": finals[-1]["test_top1"], "n": finals[-1]["test_n"],
              "spikes_per_neuron": report.spikes_per_neuron, "energy": vars(report.bit_aware)}
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(result))
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("float_run", type=Path)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--epochs", default="0.5")
    options.add_argument("--main-epochs", default="2")
    options.add_argument("--recipe", default="qsd_transformer.cifar10_small")
    options.add_argument("--set", action="append", default=[], help="of every fine-tuning, field=value")
    options.add_argument("--table", action="store_true")
    asked = options.parse_args()
    from bitspike.papers import find_recipe

    found, report = specs(asked.float_run, asked.data, asked.out, asked.images)
    (asked.out / "specs").mkdir(parents=True, exist_ok=True)
    runs = {}
    for name, (_, spec) in found.items():
        slug = name.replace(" ", "_").replace(",", "")
        path = asked.out / "specs" / f"{slug}.json"
        if not path.is_file() or QuantSpec.from_json(path.read_text()) != spec:
            path.write_text(spec.to_json())
        runs[name] = asked.out / "runs" / slug
        if not asked.table:
            settings = {"spec": str(path), "start": str(asked.float_run), "teacher": str(asked.float_run),
                        "distill_logits": "1", "epochs": asked.main_epochs if name == MAIN else asked.epochs,
                        "warmup_epochs": "0.05", "batch_size": "250", "lr": "0.01",
                        **dict(s.split("=", 1) for s in asked.set)}
            train(find_recipe(asked.recipe), asked.data, runs[name], overrides=settings)
    points = [point("float", "float", asked.float_run, asked.data, asked.out)]
    points += [point(name, group, runs[name], asked.data, asked.out) for name, (group, _) in found.items()]
    done = [p for p in points if p is not None]
    full = done[0]
    (asked.out / "results.json").write_text(json.dumps(done, indent=1) + "\n")
    print("| spec | bits | top-1 | to float | file, bytes | smaller | energy, uJ | less |\n|---|---|---|---|---|---|---|---|")
    for p in sorted(done, key=lambda p: (round(p["bits"], 1), -p["top1"])):
        print(f"| {p['name']} | {p['bits']:.2f} | {p['top1']:.2f} % | {p['top1'] - full['top1']:+.2f} | {p['bytes']:,} | "
              f"{full['bytes'] / p['bytes']:.1f}x | {p['energy_pj'] / 1e6:.1f} | {full['energy_pj'] / p['energy_pj']:.1f}x |")
    plain = report.to_dict()
    save_figures({"front": front_figure(done, "top-1 after fine-tuning"),
                  "bits": bits_figure(plain["searched"]["layers"], plain["layers"])}, asked.out)
    write_page(asked.out / "report.html", plain, (), done)


if __name__ == "__main__":
    main()
