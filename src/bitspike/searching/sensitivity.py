"""How much each candidate of each layer hurts: measured one at a time, or estimated from gradients."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitspike.layers import make_quantizer
from bitspike.searching.measure import Bench, Journal, logits_of
from bitspike.searching.space import Choice, SearchError, Space, key_of
from bitspike.spec import Scheme

Table = dict[str, dict[Scheme, float]]


def choice_key(choice: Choice) -> str:
    """A choice as one line of text."""
    return " ".join(f"{name}={key_of(scheme)}" for name, scheme in choice.items())


def measured_table(bench: Bench, space: Space, journal: Journal, tell: Callable[[str, int, int], None]) -> Table:
    """Layer -> candidate -> divergence from the full-precision network when only that layer is quantized.

    One measurement per entry, each stored in the journal; norms are renewed, so that what only shifts or scales does not count.
    """
    table: Table = {}
    total, done = sum(len(found) for found in space.layers.values()), 0
    for name, found in space.layers.items():
        table[name] = {}
        for scheme in found:
            key = choice_key({name: scheme})
            result = journal.get(key, lambda n=name, s=scheme: vars(bench.measure({n: s})))  # type: ignore[misc]
            table[name][scheme] = result["divergence"]
            done += 1
            tell(key, done, total)
    return table


def fisher_table(bench: Bench, space: Space, journal: Journal, tell: Callable[[str, int, int], None],
                 batch: int = 16, most: int = 512) -> Table:
    """Layer -> candidate -> 1/2 sum_i F_i (w_q - w)_i^2: the divergence to second order, F the diagonal Fisher information.

    Labels are drawn from the model's own predictions (seeded); the squared gradients are those of mini-batches, times their
    size. One backward pass for all candidates, so it suits large networks; it sees neither the norms' statistics renewed
    nor errors that are not small. Source: the second-order view of HAWQ (ICCV 2019) with the Fisher diagonal in place of
    the Hessian's.
    """
    images, _ = bench.data.measured
    images = images[:most]
    parameters: dict[str, Tensor] = {name: bench.layers[name].weight for name in space.layers}  # type: ignore[misc]
    key = f"fisher of {len(images)}"

    def compute() -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for done, part in enumerate(images.split(batch)):
            logits = logits_of(bench.forward, bench.model, part)
            labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=draw)[:, 0].to(logits.device)
            grads = torch.autograd.grad(F.cross_entropy(logits, labels), list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    fisher[name] += grad.square() * len(part) ** 2
            tell(key, done * batch + len(part), len(images))
        rows = {}
        with torch.no_grad():
            for name, found in space.layers.items():
                w = parameters[name]
                moved = ((make_quantizer(s, w)(w) - w).square() for s in found)
                rows[name] = {key_of(s): float((fisher[name] * m).sum() / 2 / len(images))
                              for s, m in zip(found, moved, strict=True)}
        return rows

    for p in parameters.values():
        p.requires_grad_(True)
    stored = journal.get(f"{key}: {space_key(space)}", compute)
    table = {name: {s: stored[name][key_of(s)] for s in found} for name, found in space.layers.items()}
    for name, row in table.items():
        if not all(v == v and abs(v) != float("inf") for v in row.values()):
            raise SearchError(f"layer {name!r}: the gradients are not finite; measure='loss' shows which candidate is to "
                              "blame.")
    return table


def space_key(space: Space) -> str:
    """The candidates of every layer as one line of text."""
    return " ".join(f"{name}={'|'.join(key_of(s) for s in found)}" for name, found in space.layers.items())
