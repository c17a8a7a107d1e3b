"""Attach quantizers to any torch model: `quantize_(model, spec)`; read them back: `codes(layer)`.

Uses `torch.nn.utils.parametrize`, so the model's own classes, forward code and layer names stay what they are.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from bitspike.neurons import LIF
from bitspike.quantizers import LSQ, Binary, MaxScale, Membrane, PowerOfTwo, Quantizer, Uniform
from bitspike.spec import QuantSpec, Scheme, SpecError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, for every Conv1d, Conv2d and Linear of the model, in definition order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}


def neurons_with_membrane(model: nn.Module) -> dict[str, LIF]:
    """Name -> LIF neuron: what a "membrane" rule can match."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LIF)}


def make_quantizer(scheme: Scheme, weight: Tensor) -> Quantizer:
    """The quantizer module a scheme names, sized for this weight."""
    channels = weight.shape[0] if scheme.per == "channel" else 1
    if scheme.kind == "lsq":
        return LSQ(scheme.bits, channels, **scheme.options)
    if scheme.kind == "uniform":
        return Uniform(scheme.bits, per_channel=scheme.per == "channel", **scheme.options)
    if scheme.kind in ("pow2", "pow2_scale"):
        return PowerOfTwo(scheme.bits, levels=scheme.kind == "pow2", per_channel=scheme.per == "channel", **scheme.options)
    if scheme.kind == "max":
        return MaxScale(scheme.bits, per_channel=scheme.per == "channel", **scheme.options)
    if scheme.kind == "binary":
        return Binary(**scheme.options)
    raise SpecError(f"Scheme {scheme.kind!r} is not a weight scheme.")


def quantize_(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """Attach the spec's quantizers in place and return the model.

    Works on every `nn.Conv1d`, `nn.Conv2d` and `nn.Linear`, whoever wrote the model; a "membrane" rule goes to `LIF`
    neurons. `Scheme("full")` and layers without a rule are left alone. Errors: SpecError for a rule that matches
    nothing, a layer that is already quantized or otherwise parametrized, a lazy layer without its shape (then nothing is
    changed).

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> _ = quantize_(net, QuantSpec({"*": Scheme("lsq", 4), "1": Scheme("full")}))
    >>> codes(net[0])[0].dtype, quantizer_of(net[1])
    (torch.int32, None)
    """
    layers, neurons = quantizable(model), neurons_with_membrane(model)
    weights = {name: scheme for name, scheme in spec.resolve(layers).items() if scheme.kind != "full"}
    membranes = spec.resolve(neurons, membrane=True)
    for name in weights:
        layer = layers[name]
        if quantizer_of(layer) is not None:
            raise SpecError(f"layer {name!r} is already quantized; call quantize_ once, on the full-precision model.")
        if "weight" not in layer._parameters:  # weight_norm, spectral_norm, pruning
            raise SpecError(f"layer {name!r}: its weight is no plain parameter but computed by something else, such as "
                            "weight_norm; make that permanent before quantize_ (torch.nn.utils.parametrize."
                            "remove_parametrizations, remove_weight_norm or prune.remove).")
        if isinstance(layer.weight, UninitializedParameter):
            raise SpecError(f"layer {name!r} is a {type(layer).__name__} without a shape yet; run one forward first.")
    for name, scheme in weights.items():
        layer = layers[name]
        weight = latent_weight(layer)
        quantizer = make_quantizer(scheme, weight).to(weight.device)
        # unsafe: skips a trial run that would initialise the steps before any checkpoint is loaded
        parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    for name, scheme in membranes.items():
        neurons[name].membrane = Membrane(scheme.bits, **scheme.options)
    return model


def quantizer_of(layer: nn.Module) -> Quantizer | None:
    """The layer's weight quantizer, or None for a full-precision layer."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    return first if isinstance(first, Quantizer) else None


def latent_weight(layer: nn.Module) -> Tensor:
    """The trained full-precision weight behind a layer, quantized or not."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]
    return layer.weight  # type: ignore[return-value]


def codes(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(int32 codes, scale [O] or [1]) of a quantized layer. Errors: SpecError for a full-precision one."""
    quantizer = quantizer_of(layer)
    if quantizer is None:
        raise SpecError(f"{layer} has no quantizer; attach one with quantize_(model, spec).")
    return quantizer.codes(latent_weight(layer).detach())


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(layer name, quantizer) of every quantized layer."""
    for name, layer in quantizable(model).items():
        found = quantizer_of(layer)
        if found is not None:
            yield name, found


def annealed_modules(model: nn.Module) -> list[Any]:
    """Every module whose form follows the training: the training loop calls its `anneal(progress)`, 0..1, at each step.

    What it sets must be a buffer, so that a checkpoint holds it.
    """
    return [module for module in model.modules() if callable(getattr(module, "anneal", None))]


@contextmanager
def norms_anew(model: nn.Module) -> Iterator[int]:
    """Every batch norm forgets its statistics and takes the plain average over the batches that run inside.

    Afterwards momentum and mode are as before; other modules keep their mode throughout. Norms without running statistics are
    left alone; the value is the number of the others: with 0 nothing needs to run.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    try:
        yield len(norms)
    finally:
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)


def cached_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: quantize each weight once inside it (evaluation, gradient accumulation)."""
    del model  # torch keeps one cache for all parametrizations
    return parametrize.cached()
