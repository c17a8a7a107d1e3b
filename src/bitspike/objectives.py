"""Losses every recipe may use, and the spike counts they need."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bitspike.neurons import Neuron
from bitspike.recipe import Loss, Output, Recipe, RecipeError


def neurons(model: nn.Module) -> dict[str, Neuron]:
    """Name -> spiking neuron, in definition order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Neuron)}


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """The recipe's precision, outside of the training loop (which has accelerate's)."""
    if recipe.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if recipe.precision == "bf16" else torch.float16)


def prediction(output: Output) -> Tensor:
    """What a model returns -> logits [B, K]: the mean over its heads (a tuple) and over time (a third axis in front).

    Of a segmenter [B, K, h, w], which are the entry "out" of a dict.

    >>> prediction((torch.zeros(4, 2, 10), torch.ones(2, 10)))[0, 0].item()
    0.5
    """
    if isinstance(output, tuple):
        return torch.stack([prediction(head) for head in output]).mean(0)
    if isinstance(output, dict):
        return output["out"]
    return output.mean(0) if output.dim() == 3 else output


def _over_heads(output: Output, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of the loss of every head."""
    heads = output if isinstance(output, tuple) else (output,)
    return torch.stack([loss(head) for head in heads]).mean()  # type: ignore[arg-type]


def classification_loss(recipe: Recipe) -> Loss:
    """Cross entropy with the recipe's label smoothing, of the prediction; of several heads the mean of their losses.

    Logits with a time axis [T, B, K] are averaged over time first; `temporal_loss` is the other way round.
    """

    def loss(images: Tensor, output: Output, targets: Tensor) -> Tensor:
        return _over_heads(output, lambda head: F.cross_entropy(prediction(head).float(), targets,
                                                                label_smoothing=recipe.label_smoothing))

    return loss


def temporal_loss(recipe: Recipe) -> Loss:
    """Temporal efficient training (TET): the mean over time of each step's cross entropy, 1/T sum_t CE(logits[t], y).

    Logits without a time axis are one step. The term that pulls the logits to a constant is not built (Q-SNN weighs it 0).
    Source: Deng et al., ICLR 2022.
    """

    def loss(images: Tensor, output: Output, targets: Tensor) -> Tensor:
        def over_time(logits: Tensor) -> Tensor:
            logits_TBK = logits if logits.dim() == 3 else logits[None]
            return torch.stack([F.cross_entropy(logits_BK.float(), targets, label_smoothing=recipe.label_smoothing)
                                for logits_BK in logits_TBK]).mean()

        return _over_heads(output, over_time)

    return loss


def with_logits_of(teacher: Callable[[Tensor], Tensor], recipe: Recipe, loss: Loss) -> Loss:
    """(1 - a) loss + a KL(teacher || model), a = recipe.distill_logits (at most 1): knowledge distillation at temperature 1.

    teacher: images, the same augmented ones -> logits [B, K], without gradient (see `teachers.load_teacher`); for every pixel
    [B, K, h, w]. With a = 1 the targets take no part. Source: Hinton et al., 2015; at temperature 1, where a low-bit copy only
    has to find its way back.
    """
    share = recipe.distill_logits

    def distilled(images: Tensor, output: Output, targets: Any) -> Tensor:
        wanted = teacher(images)
        found, told = F.log_softmax(prediction(output).float(), 1), F.log_softmax(wanted.float(), 1)
        places = found.shape[2:].numel()  # 1 without pixels
        term = F.kl_div(found, told, reduction="batchmean", log_target=True) / places
        return share * term + ((1 - share) * loss(images, output, targets) if share < 1 else 0.0)

    return distilled


#: what only an objective reads, and its value where nothing is meant
_FOR_OBJECTIVES = ("regulation", "distill", "teacher", "teacher_labels", "temperature")


def refuse_unread(recipe: Recipe, *read: str) -> None:
    """For objectives: RecipeError for a field that is set, that only objectives read, and that is not one of `read`.

    >>> refuse_unread(Recipe("x", nn.Identity, temperature=2.0, objective=lambda model, recipe, loss: loss), "distill")
    Traceback (most recent call last):
    ...
    bitspike.recipe.RecipeError: recipe 'x', field temperature=2.0: allowed: 1.0, since as the recipe is set its objective \
reads only distill.
    """
    default = {f.name: f.default for f in fields(Recipe)}
    for name in _FOR_OBJECTIVES:
        found = getattr(recipe, name)
        if name not in read and found != default[name] and not (name == "teacher" and recipe.distill_logits):
            reads = "only " + ", ".join(read) if read else "none of such fields"
            raise RecipeError(f"recipe {recipe.name!r}, field {name}={found!r}: allowed: {default[name]!r}, since as the "
                              f"recipe is set its objective reads {reads}.")


class SpikeCounts:
    """Mean spike count of every neuron in the last forward pass, by hooks; differentiable.

    count = output / scale: 0 or 1 for LIF, 0..D for IE-LIF; of a neuron that was called several times (a head that is shared
    by the levels of a pyramid) over all its outputs. Call `take()` once after each forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._means: dict[str, list[tuple[Tensor, int]]] = {}
        self._handles = [n.register_forward_hook(self._hook(name)) for name, n in neurons(model).items()]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.numel():
                # float32 sum: a bfloat16 mean would keep three digits
                mean = output.mean(dtype=torch.float32) / float(module.scale)  # type: ignore[arg-type]
                self._means.setdefault(name, []).append((mean, output.numel()))

        return hook

    def take(self) -> dict[str, Tensor]:
        """Name -> scalar mean count of the pass since the last call."""
        seen, self._means = self._means, {}
        return {name: parts[0][0] if len(parts) == 1 else
                torch.stack([mean * n for mean, n in parts]).sum() / sum(n for _, n in parts) for name, parts in seen.items()}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


class _FollowSpikes(TorchDispatchMode):
    """Which neurons' outputs each matrix product reads.

    A tensor is tagged with neuron -> share of its elements that carry that neuron's spikes; tags pass through views, pools
    and sums (of a sum each term keeps its share: its every spike is worked on) and end at a matrix product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tags: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.macs: dict[str, float] = {}

    def _of(self, tensor: Any) -> dict[str, float]:
        return self.tags.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def mark(self, tensor: Tensor, name: str) -> None:
        self.tags[tensor] = {name: 1.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("convolution", "mm", "addmm", "bmm", "baddbmm"):
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            inner = right.numel() / right.shape[0] if name == "convolution" else left.shape[-1]
            reading = [tags for tags in (self._of(left), self._of(right)) if tags]
            for tags in reading:  # of a product of two spike tensors each accounts for half
                for source, share in tags.items():
                    self.macs[source] = self.macs.get(source, 0.0) + share * result.numel() * inner / len(reading)
            return result
        found: dict[str, float] = {}
        inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        for tensor in inputs:
            part = tensor.numel() / result.numel() if name == "cat" else 1.0
            for source, share in self._of(tensor).items():
                found[source] = found.get(source, 0.0) + share * part if name == "cat" else max(found.get(source, 0.0), share)
        for tensor in tree_leaves(result) if found else ():
            if isinstance(tensor, Tensor):
                self.tags[tensor] = found
        return result


@torch.no_grad()
def spike_costs(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Neuron -> multiply-accumulates per image that its output takes part in (0 for a neuron nobody multiplies).

    images: what the model takes, [B, C, H, W] or [T, B, C, H, W].
    Measured on a copy of the model, so that nothing in it changes. A product of two spike tensors counts half for each.
    """
    probe = copy.deepcopy(model).eval()
    found = neurons(probe)
    with _FollowSpikes() as follow:
        for name, neuron in found.items():
            neuron.register_forward_hook(lambda module, inputs, output, name=name: follow.mark(output, name))
        probe(images)
    batch = images.shape[1] if images.dim() == 5 else len(images)
    return {name: follow.macs.get(name, 0.0) / batch for name in found}


def spike_penalty(counts: dict[str, Tensor], costs: dict[str, float]) -> Tensor:
    """Mean count, each neuron weighted by its share of the operations: sum_i macs_i count_i / sum_i macs_i.

    Times the total of macs it is the number of synaptic operations an image costs.
    """
    total = sum(costs.values())
    terms = [counts[name] * (cost / total) for name, cost in costs.items() if cost and name in counts]
    if not terms:
        raise ValueError("spike_penalty: no neuron of the model feeds a convolution or matrix product.")
    return torch.stack(terms).sum()


class NonFinite(ArithmeticError):
    """A loss that is not finite: names step, learning rate and the first offending module."""


@contextmanager
def _watch(model: nn.Module, bad: list[str]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bad and not bool(output.isfinite().all()):
                broken = [n for n, p in module.named_parameters() if not bool(p.isfinite().all())]
                fine = all(bool(i.isfinite().all()) for i in inputs if isinstance(i, Tensor) and i.is_floating_point())
                why = (f"its parameter {broken[0]!r} is not finite" if broken
                       else "its input is finite" if fine else "its input is not finite either")
                bad.append(f"{name} ({type(module).__name__}; {why})")

        return check

    handles = [m.register_forward_hook(hook(name or "the model")) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_nonfinite(model: nn.Module, run: Callable[[], Any]) -> str:
    """Run the batch again (`run` calls the model) and name the first module whose output is not finite, or say that all are."""
    bad: list[str] = []
    with torch.no_grad(), _watch(model, bad):
        run()
    return bad[0] if bad else "none: every module's output is finite, so it is the loss itself"
