"""RUN folders: config, metrics and an atomic checkpoint; reading a trained model back.

    RUN/config.json                  recipe, overrides, versions, commit, hash of the data
    RUN/metrics.jsonl                one line an epoch, and one at the end
    RUN/checkpoint/                  the latest state: model.safetensors, ema.safetensors, spec.json, state.json, state.pt
"""
from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitspike.layers import neurons_with_membrane, quantizable, quantize_
from bitspike.recipe import Recipe, RecipeError, differences
from bitspike.spec import QuantSpec
from bitspike.writing import write_json


class RunError(RuntimeError):
    """A run folder that cannot be used: holds something else, or is damaged."""


def build(recipe: Recipe) -> nn.Module:
    """The recipe's model with its quantizers, freshly initialised from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = recipe.model(**recipe.model_options)
    spec = recipe.quant_spec()
    return model if spec is None else quantize_(model, spec)


def resolved_spec(model: nn.Module, spec: QuantSpec | None) -> QuantSpec:
    """One rule per layer: what the patterns came to."""
    if spec is None:
        return QuantSpec()
    rules = {**spec.resolve(quantizable(model)), **spec.resolve(neurons_with_membrane(model), membrane=True)}
    return QuantSpec(rules)


# --------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(run: Path, weights: Mapping[str, Mapping[str, Tensor]], spec: QuantSpec, state: Mapping[str, Any],
                    tensors: Mapping[str, Any]) -> None:
    """Write RUN/checkpoint so that a kill at any moment leaves this state or the one before it, whole.

    weights: file stem -> state dict, as safetensors. state: plain JSON. tensors: what `torch.load(weights_only=True)`
    reads back (optimizer state).
    """
    new, current, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for stem, values in weights.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, new / f"{stem}.safetensors")
    (new / "spec.json").write_text(spec.to_json())
    torch.save(dict(tensors), new / "state.pt")
    (new / "state.json").write_text(json.dumps(state))
    for file in new.iterdir():
        _sync(file)
    _sync(new)
    if current.exists():  # a folder cannot be replaced in one step: between these two, checkpoint.old is the whole one
        shutil.rmtree(old, ignore_errors=True)
        current.rename(old)
    new.rename(current)
    _sync(run)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def sole_trainer(run: Path, active: bool) -> Iterator[None]:
    """Hold RUN/lock, which the system lets go when the process ends, however it ends. Errors: RunError if it is held."""
    if not active:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would be inherited by the data workers
        except OSError:
            raise RunError(f"{run}: another process is training it; wait for it or choose another --out.") from None
        yield


def checkpoint_folder(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return next((f for f in (run / "checkpoint", run / "checkpoint.old") if f.is_dir()), None)


def load_weights(folder: Path, stem: str, model: nn.Module) -> None:
    """Load one safetensors file into the model. Errors: RunError naming the file and the first keys that differ."""
    path = folder / f"{stem}.safetensors"
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: not a whole safetensors file ({error}).") from None
    expected = model.state_dict()
    wrong = sorted(set(values) ^ set(expected)) or [k for k in expected if values[k].shape != expected[k].shape]
    if wrong:
        raise RunError(f"{path}: {len(wrong)} tensors do not fit the recipe's model, for example {wrong[0]!r}.")
    model.load_state_dict(values)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain part of a checkpoint: step, steps, finished, seconds, running sums."""
    try:
        return json.loads((folder / "state.json").read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / 'state.json'}: cannot be read ({error}).") from None


# ---------------------------------------------------------------------------------------------------- runs
def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json. Errors: RunError where it is missing or no JSON."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        found = sorted(p.name for p in run.iterdir())[:5] if run.is_dir() else None
        state = "does not exist" if found is None else f"holds {', '.join(found)}" if found else "is empty"
        raise RunError(f"{run}: not a run, there is no config.json (the folder {state}). Train one with "
                       f"'bitspike train RECIPE --out {run}'.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(config, dict) or not isinstance(config.get("recipe"), dict):
        raise RunError(f"{path}: expected an object with a 'recipe'.")
    return config


def open_run(run: Path, recipe: Recipe, data_hash: str) -> Path | None:
    """The checkpoint that training goes on from, or None where it begins; writes nothing.

    A folder without a checkpoint has nothing to lose: it may be begun again with other settings. Errors: RunError saying
    what differs, or that the folder holds something else.
    """
    if not run.exists() or {p.name for p in run.iterdir()} <= {"lock", "config.json.new"}:  # killed in its first moment
        return None
    stored = read_config(run)
    folder = checkpoint_folder(run)
    if folder is None:
        return None
    different = differences(stored["recipe"], recipe.to_dict())
    if stored.get("data_hash") != data_hash:
        different.append(f"data: sha256 {str(stored.get('data_hash'))[:12]}... -> {data_hash[:12]}...")
    if different:
        raise RunError(f"{run} is a run of recipe {stored.get('recipe_name')!r} with other settings: "
                       f"{'; '.join(different)}. Choose another --out, or the same settings to go on.")
    return folder


def start_run(run: Path, recipe: Recipe, overrides: Mapping[str, str], data_hash: str) -> None:
    """Write RUN/config.json of a run that begins. Call it as the sole trainer. Errors: RunError if there is a checkpoint."""
    if checkpoint_folder(run):  # trained by another process since `open_run`
        raise RunError(f"{run}: another process has trained it in the meantime; the same command looks again.")
    config: dict[str, Any] = {"recipe_name": recipe.name, "overrides": dict(overrides), "recipe": recipe.to_dict(),
                              "data_hash": data_hash, "commit": _commit(), "versions": _versions()}
    write_json(run / "config.json", config)


def load_run(path: Path | str, recipe: Recipe | None = None) -> tuple[nn.Module, Recipe]:
    """The trained model of a RUN, in eval mode, with the averaged weights if it has them; and its recipe.

    recipe: only needed for a model function that is not part of bitspike and not imported. Errors: RunError.
    """
    run = Path(path)
    if recipe is None:
        try:
            recipe = Recipe.from_dict(read_config(run)["recipe"])
        except (RecipeError, TypeError) as error:
            raise RunError(f"{run / 'config.json'}: {error}") from None
    folder = checkpoint_folder(run)
    if folder is None:
        raise RunError(f"{run} has no checkpoint yet; let 'bitspike train' go on with it.")
    model = build(recipe)
    load_weights(folder, "ema" if (folder / "ema.safetensors").is_file() else "model", model)
    return model.eval(), recipe


def start_from_run(model: nn.Module, path: Path | str) -> None:
    """Give a network of the same layers, quantized or not, the trained weights and statistics of a RUN, in place.

    Quantizers begin anew from these weights, whatever the RUN's were. Errors: RunError naming what does not fit; then nothing
    is changed.
    """
    trained = _plain_state(load_run(path)[0])
    own = _plain_state(model)
    wrong = sorted(set(trained) ^ set(own)) or [name for name in own if own[name].shape != trained[name].shape]
    if wrong:
        raise RunError(f"start={path}: {len(wrong)} tensors do not fit the recipe's model, for example {wrong[0]!r}; a run of "
                       "the same network is needed, its weights may have any number of bits.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(trained[name])


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state without quantizers: names as in the full-precision model."""
    state = {name.replace(".parametrizations.weight.original", ".weight"): value for name, value in model.state_dict().items()}
    return {name: value for name, value in state.items() if ".parametrizations." not in name and ".membrane." not in name}


def _commit() -> str:
    """Commit of the source tree, "-dirty" if it has changes; "unknown" for an installed package."""
    here = Path(__file__).parent
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name, folder=here)  # installed inside somebody's repository?
        head, changes = _git("rev-parse", "HEAD", folder=here), _git("status", "--porcelain", "-uno", ".", folder=here)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("-dirty" if changes else "")


def _git(*words: str, folder: Path) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    import platform
    from importlib import metadata

    import bitspike

    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "accelerate", "numpy")}
    return {"bitspike": bitspike.__version__, "python": platform.python_version(), **packages}
