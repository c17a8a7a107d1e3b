"""Loading weights that other people's code saved: read the file, rename, check every key, then copy.

Each architecture's file holds its own table of names; this one only applies it.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

_SHOWN = 12  # keys listed in the message; the error's attributes hold them all


class PublishedWeightsError(ValueError):
    """A published checkpoint that does not fit the model; nothing was loaded.

    missing: our names without a tensor. unexpected: the file's names without a place. mismatched: texts
    "name: found shape, the model has shape".
    """

    def __init__(self, message: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (),
                 mismatched: Sequence[str] = ()) -> None:
        self.missing, self.unexpected, self.mismatched = list(missing), list(unexpected), list(mismatched)
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
            if keys:
                more = f", ... ({len(keys) - _SHOWN} more)" if len(keys) > _SHOWN else ""
                message += f"\n  {len(keys)} {title}: {', '.join(sorted(keys)[:_SHOWN])}{more}"
        super().__init__(message)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor of a `.safetensors` file or a torch `.pth` (tensors only; never runs code from the file).

    Takes the entry 'model' or 'state_dict' of a training checkpoint, and drops the prefix 'module.' that data-parallel
    training adds. Errors: FileNotFoundError; PublishedWeightsError for a file that holds no table of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: object = load_file(path)
        except SafetensorError as error:
            raise PublishedWeightsError(f"{path}: not a safetensors file: {error}.") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a different type for each kind of damage
            raise PublishedWeightsError(
                f"{path}: cannot be read as plain tensors ({type(error).__name__}: {str(error).splitlines()[0]}). "
                "A file that holds other Python objects is refused, since loading it would run its code.") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise PublishedWeightsError(f"{path}: holds no table of tensors (directly, or under 'model' or 'state_dict').")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def read_table(weights: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """What `load_published` may be given, a file or a table of tensors -> (a table to change at will, its name in errors).

    Errors: as `read_weights`.
    """
    if isinstance(weights, str | Path):
        return read_weights(weights), str(weights)
    return dict(weights), "the table of weights"


def rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    """Apply the regular expressions of a table one after the other.

    >>> rename("block3.1.lif", [(r"^block3\\.", "stages.2.blocks."), (r"\\.lif$", ".neuron")])
    'stages.2.blocks.1.neuron'
    """
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def load_renamed(model: nn.Module, weights: Mapping[str, Tensor], to_ours: Callable[[str], str], where: str,
                 dead: str = r"(?!)") -> None:
    """Copy published weights into the model, in place; every key must have its place, and every place a key.

    weights: published name -> tensor. to_ours: published parameter name -> ours, before quantizers are looked at: a
    layer's `weight` goes to the latent weight of a quantized layer, its `alpha` and `init_state` to the LSQ quantizer.
    where: what to call them in an error. dead: regular expression of published names that have no effect and are skipped
    (default: none). A weight [O, I] of a Linear or [O, I, k] of a Conv1d goes into a Conv2d as [O, I, 1, 1] or [O, I, k, 1].
    Errors: PublishedWeightsError, and then nothing is changed.
    """
    own = model.state_dict()
    loaded: dict[str, Tensor] = {}
    unexpected, mismatched = [], []
    for name, tensor in weights.items():
        if re.fullmatch(dead, name):
            continue
        layer, _, leaf = to_ours(name).rpartition(".")
        inner = {"alpha": "0.scale", "init_state": "0.initialized", "weight": "original"}.get(leaf)
        quantized = f"{layer}.parametrizations.weight.{inner}"
        ours = quantized if quantized in own else f"{layer}.{leaf}" if layer else leaf
        if ours not in own or ours in loaded:
            unexpected.append(name)
            continue
        if leaf == "weight" and tensor.dim() in (2, 3) and own[ours].dim() == 4:
            tensor = tensor.reshape(*tensor.shape, *[1] * (4 - tensor.dim()))
        if tensor.numel() == 1 and own[ours].numel() == 1:
            tensor = tensor.reshape(own[ours].shape)
        if tensor.shape != own[ours].shape:
            mismatched.append(f"{name}: found {list(tensor.shape)}, the model has {list(own[ours].shape)}")
        loaded[ours] = tensor.to(own[ours].dtype)
    missing = [name for name in own if name not in loaded]
    if missing or unexpected or mismatched:
        hint = ""
        if unexpected and all(name.endswith((".alpha", ".init_state")) for name in unexpected):
            hint = " The file holds quantizer steps: call quantize_(model, spec) with an 'lsq' scheme first."
        elif missing and all(".parametrizations.weight.0." in name for name in missing):
            hint = " The file is full precision: load it first, then call quantize_(model, spec)."
        raise PublishedWeightsError(f"{where} does not fit this {type(model).__name__}; nothing was loaded.{hint}",
                                    missing, unexpected, mismatched)
    model.load_state_dict(loaded, strict=True)
