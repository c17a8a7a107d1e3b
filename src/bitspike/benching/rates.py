"""Random networks that spike as rarely as trained ones: thresholds moved until every neuron fires at a given mean."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitspike.exporting.export import calibrate_norms, normalised
from bitspike.neurons import IELIF, LIF

_SAMPLE = 1 << 16    # values of a neuron's input that its threshold is found on
_HALVINGS = 24
_FURTHEST = 2.0**12  # thresholds move at most by this factor
_PICTURES = 16


class RateError(ValueError):
    """A mean count that no neuron of the network can have."""


def set_mean_count(model: nn.Module, pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float],
                   count: float) -> int:
    """Move the threshold of every neuron until its mean count (spikes a step, for LIF) on these pictures is `count`.

    For models that were never trained: norms alone give them about twice the spikes of the published networks. In the
    order of execution, each neuron sees what the neurons before it now send. `LIF` gets another threshold, `IELIF` another
    gain, its inverse; both are part of the exported program. Ends with `calibrate_norms`.

    Args: pixels uint8 [N, H, W, C] or [T, N, H, W, C]; mean, std of the normalisation; count, more than 0 and below the
    levels of every neuron.
    Returns the number of neurons. Errors: RateError for a count that is out of range.

    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), IELIF(4))
    >>> pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1), np.uint8)
    >>> set_mean_count(net, pictures, [0.5], [0.25], 0.25)
    1
    >>> round(float(net.eval()(normalised(pictures, [0.5], [0.25])).mean() / net[2].scale), 2)
    0.25
    """
    neurons = [m for m in model.modules() if isinstance(m, LIF | IELIF)]
    if not neurons:
        raise RateError(f"mean count {count:g}: the network has no spiking neurons.")
    levels = min(neuron.levels for neuron in neurons)
    if not 0 < count < levels:
        raise RateError(f"mean count {count:g}: a number above 0 and below {levels} is needed, the most that a neuron of this "
                        "network can send in a step; the published QSD-Transformers have about 0.25.")
    done: set[nn.Module] = set()

    def adapt(neuron: nn.Module, inputs: tuple[Any, ...]) -> None:
        if neuron not in done:
            done.add(neuron)
            _adapt(neuron, inputs[0], count)

    handles = [neuron.register_forward_pre_hook(adapt) for neuron in neurons]
    training = model.training
    try:
        with torch.no_grad():
            model.train()  # norms by the statistics of what the changed neurons send
            model(normalised(pixels[..., :_PICTURES, :, :, :], np.asarray(mean, float), np.asarray(std, float)))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    calibrate_norms(model, pixels, mean, std)
    return len(done)


def _adapt(neuron: Any, x_TBX: Tensor, count: float) -> None:
    flat = x_TBX.reshape(len(x_TBX), -1)
    sample = flat[:, ::max(1, flat.shape[1] // (_SAMPLE // len(flat)))].contiguous()
    field = "threshold" if isinstance(neuron, LIF) else "gain"
    start = float(getattr(neuron, field))
    low, high = start / _FURTHEST, start * _FURTHEST  # searched on a scale of ratios
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        setattr(neuron, field, middle)
        too_many = float(neuron(sample).mean()) / neuron.scale > count
        if too_many == (field == "gain"):
            high = middle
        else:
            low = middle
