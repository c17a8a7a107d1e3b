"""What a choice does to the network: measured on data, before any fine-tuning, and kept on disk as it is measured."""
from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitspike.layers import latent_weight, make_quantizer, norms_anew, quantizable, quantizer_of
from bitspike.objectives import prediction
from bitspike.searching.space import SearchError, key_of
from bitspike.spec import Scheme
from bitspike.writing import write_text

#: (model, images) -> logits [B, K] or [T, B, K]
Forward = Callable[[nn.Module, Tensor], Tensor]


def call(model: nn.Module, images: Tensor) -> Tensor:
    """The plain forward pass."""
    return model(images)  # type: ignore[no-any-return]


def logits_of(forward: Forward, model: nn.Module, images: Tensor) -> Tensor:
    """[B, K] in float32, the mean over time and heads where there are such."""
    return prediction(forward(model, images)).float()


@dataclass(frozen=True)
class SearchData:
    """What a search looks at. images: as the model takes them, [N, ...]; labels: int64 [N].

    The first `norms` images renew the batch norms' statistics of a quantized network, the others measure it (all do both where
    norms is 0 or N). None of them should be test data. Errors: SearchError.
    """

    images: Tensor
    labels: Tensor
    norms: int = 0

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or len(self.labels) < 2:
            raise SearchError(f"search data: {len(self.images)} images and {len(self.labels)} labels; as many are needed, "
                              "and at least two.")
        if not 0 <= self.norms <= len(self.images):
            raise SearchError(f"search data: norms={self.norms}; allowed: 0..{len(self.images)}.")

    @property
    def for_norms(self) -> Tensor:
        """Images that renew the statistics."""
        return self.images[: self.norms] if self.norms else self.images

    @property
    def measured(self) -> tuple[Tensor, Tensor]:
        """Images and labels to measure on."""
        start = self.norms if self.norms < len(self.images) else 0
        return self.images[start:], self.labels[start:]

    def fingerprint(self) -> str:
        """sha256 over everything."""
        digest = hashlib.sha256(str((tuple(self.images.shape), self.norms)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def plain_copy(model: nn.Module) -> nn.Module:
    """A full-precision copy in evaluation mode: quantizers are taken off, their trained weights stay."""
    twin = copy.deepcopy(model).eval()
    for layer in quantizable(twin).values():
        if quantizer_of(layer) is not None:
            # torch's own removal edits the layer's class, which the copy shares with the original
            weight = latent_weight(layer)
            layer.__class__ = type(layer).__mro__[1]
            del layer.parametrizations
            layer.register_parameter("weight", nn.Parameter(weight.detach(), requires_grad=weight.requires_grad))
    return twin


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over names and values of the state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Errors: SearchError naming the first tensor of the model that holds NaN or infinity."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise SearchError(f"{name} holds values that are not finite: its training went wrong, and nothing can be measured. "
                              "Take an earlier checkpoint, or train again with a lower learning rate.")


@torch.no_grad()
def renew_norms(model: nn.Module, images: Tensor, forward: Forward = call, batch: int = 250) -> None:
    """Give every batch norm the mean and variance of these images, in place: a quantized layer shifts and scales its output."""
    with norms_anew(model) as count:
        for part in images.split(batch) if count else ():
            forward(model, part)


@dataclass(frozen=True)
class Measured:
    """divergence: mean KL(full precision || this) of the predictions, in nats; loss: cross entropy; top1: in percent."""

    divergence: float
    loss: float
    top1: float


class Bench:
    """Measures choices on one network; the network itself is not changed.

    model: full precision. The quantizers are those of training (`layers.make_quantizer`), statistics of batch norms are renewed
    for every choice, and for the full-precision network that all are compared with. Results are exact repeats: the same choice
    gives the same numbers.
    """

    def __init__(self, model: nn.Module, data: SearchData, forward: Forward = call, batch: int = 250) -> None:
        self.model, self.data, self.forward, self.batch = plain_copy(model), data, forward, batch
        self.layers = quantizable(self.model)
        self._state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._wanted: Tensor | None = None

    def fingerprint(self) -> str:
        """sha256 over weights and data."""
        return hashlib.sha256((weights_fingerprint(self.model) + self.data.fingerprint()).encode()).hexdigest()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        images, _ = self.data.measured
        return torch.cat([logits_of(self.forward, self.model, part) for part in images.split(self.batch)])

    @property
    def wanted(self) -> Tensor:
        """Log-probabilities of the full-precision network, its norms renewed on the same images."""
        if self._wanted is None:
            with self.applied({}):
                logits = self._logits()
            if not bool(logits.isfinite().all()):
                raise SearchError("the full-precision network gives logits that are not finite on the search data; look at the "
                                  "images' normalisation, or train it anew.")
            self._wanted = F.log_softmax(logits, 1)
        return self._wanted

    @contextmanager
    def applied(self, choice: Mapping[str, Scheme]) -> Iterator[nn.Module]:
        """The network with these layers quantized and its norms renewed; restored on leaving."""
        with torch.no_grad():
            try:
                for name, scheme in choice.items():
                    weight: Tensor = self.layers[name].weight  # type: ignore[assignment]
                    if scheme.kind != "full":
                        weight.copy_(make_quantizer(scheme, weight)(weight))
                renew_norms(self.model, self.data.for_norms, self.forward, self.batch)
                yield self.model
            finally:
                for name, value in self.model.state_dict().items():
                    value.copy_(self._state[name])

    @torch.no_grad()
    def measure(self, choice: Mapping[str, Scheme]) -> Measured:
        """Errors: SearchError naming the choice if the result is not finite."""
        wanted = self.wanted
        with self.applied(choice):
            logits = self._logits()
        _, labels = self.data.measured
        found = F.log_softmax(logits, 1)
        divergence = float(F.kl_div(found, wanted, reduction="batchmean", log_target=True))
        loss = float(F.nll_loss(found, labels))
        if not math.isfinite(divergence) or not math.isfinite(loss):
            listed = ", ".join(f"{n} {key_of(s)}" for n, s in list(choice.items())[:3])
            raise SearchError(f"with {listed}{', ...' if len(choice) > 3 else ''} the loss is not finite; leave that "
                              "candidate out, or look for what overflows in that layer.")
        return Measured(max(0.0, divergence), loss, 100 * float((logits.argmax(1) == labels).float().mean()))


class Journal:
    """Results by key in a JSON-lines file, written as they come: a killed search goes on behind the last one.

    path: None keeps them in memory. subject: what the results are of (weights, data, settings); a file of another subject is
    an error, SearchError. A last line cut by a kill is dropped. Several processes may append to one file.
    """

    def __init__(self, path: Path | None, subject: Mapping[str, Any]) -> None:
        self.path, self.results = path, dict[str, dict[str, Any]]()
        if path is None:
            return
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
        rows: list[dict[str, Any]] = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                if not rows:  # the first line is written whole, or not at all: no kill has cut it
                    raise SearchError(f"{path} begins with {line.strip()[:40]!r}, which no search wrote; choose another --out, "
                                      "or move the file away.") from None
                break
            inner = row.get("result" if rows else "subject", {}) if isinstance(row, dict) else None
            if not isinstance(inner, dict) or (rows and not {"key", "result"} <= set(row)):
                raise SearchError(f"{path} holds {line.strip()[:40]!r}, which is no measurement; choose another --out, or "
                                  "delete the file.")
            rows.append(row)
        if rows and rows[0] != {"subject": dict(subject)}:
            stored = rows[0].get("subject", {})
            different = sorted(k for k in {**stored, **subject} if stored.get(k) != subject.get(k))
            raise SearchError(f"{path} holds measurements of another search ({', '.join(different) or 'another file'} differ); "
                              "choose another --out, or the same settings to go on.")
        if len(rows) < len(lines) or not rows or not lines[-1].endswith("\n"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows or [{"subject": dict(subject)}]))
        self.results = {row["key"]: row["result"] for row in rows[1:]}

    def get(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored result, or a new one, stored before it is returned."""
        if key not in self.results:
            self.results[key] = compute()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "result": self.results[key]}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        return self.results[key]
