"""Profile a torch model by watching it run: hooks on layers and neurons, a function mode for what has no module."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from bitspike import cost
from bitspike.cost import Operation
from bitspike.layers import quantizable, quantizer_of
from bitspike.models.meta_spikeformer import RepConv
from bitspike.neurons import IELIF, LIF
from bitspike.profiling.report import Report

_PRODUCTS = ("torch.Tensor.matmul", "torch.matmul", "torch.bmm", "torch.Tensor.bmm", "torch.Tensor.__matmul__",
             "torch.Tensor.__rmatmul__")
_SUMS = ("torch.Tensor.add", "torch.add", "torch.Tensor.add_", "torch.Tensor.__add__", "torch.Tensor.__radd__",
         "torch.Tensor.__iadd__")
_PRODUCTS_EACH = ("torch.Tensor.mul", "torch.mul", "torch.Tensor.__mul__", "torch.Tensor.__rmul__")
_GRID = 1e-3  # how far from a multiple of the smallest value a count may be (float16 has 1e-3)


@dataclass
class _Seen:
    """Sums over the batches for one layer or product."""

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    weights: int
    weight_bits: int
    inputs: int
    outputs: int
    steps: int
    levels: int
    weight_kind: str = "uniform"
    total: float = 0.0
    nonzero: int = 0
    elements: int = 0

    def operation(self) -> Operation:
        return Operation(self.name, self.kind, self.shape, self.macs, self.weights, self.weight_bits, self.inputs,
                         self.outputs, self.steps, self.levels, self.total / max(1, self.elements),
                         self.nonzero / max(1, self.elements), weight_kind=self.weight_kind)


@dataclass
class _Codes:
    """What is known about a tensor as a set of codes."""

    counts: Tensor | None  # None: real-valued
    levels: int


class _Watch(TorchFunctionMode):
    """Collects the statistics of forward passes run inside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = quantizable(model)
        self.names = {id(layer): name for name, layer in self.layers.items()}
        self.modules = {id(m): name for name, m in model.named_modules()}
        self.seen: dict[str, _Seen] = {}
        self.steps = self.batch = 1
        self.sequences = False  # is the input itself a sequence?
        self.sources: dict[int, tuple[Tensor, float, int]] = {}  # by memory: spikes or counts, the value of one, the largest
        self.masked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # products of spikes, element by element
        self.path: list[str] = []
        self.inside = 0  # > 0: within a neuron or a layer, whose own arithmetic is not the model's
        self.products_of: dict[str, int] = {}
        self.spikes = self.neurons = 0.0
        self.residuals: list[tuple[int, int]] = []  # of the last batch: (bytes moved, bytes held) per image
        self.states: list[tuple[int, int]] = []
        self.handles: list[Any] = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def start(self, batch: int, steps: int | None) -> None:
        """Forget what belongs to the batch before. steps: of sequences; None for single images."""
        self.sequences = steps is not None
        self.batch = batch
        if steps is not None:
            self.steps = steps
        self.sources.clear()
        self.masked.clear()
        self.products_of.clear()
        self.residuals.clear()
        self.states.clear()

    # ------------------------------------------------------------------------------------------- hooks
    def _enter(self, module: nn.Module, args: Any) -> None:
        self.path.append(self.modules.get(id(module), ""))
        if isinstance(module, (LIF, IELIF)) or id(module) in self.names:
            self.inside += 1
        if isinstance(module, (LIF, IELIF)) and args[0].dim() > 2 and args[0].shape[1] == self.batch:
            self.steps = args[0].shape[0]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.path.pop()
        if isinstance(module, (LIF, IELIF)):
            self.inside -= 1
            self._neuron(module, output)
        elif id(module) in self.names:
            self.inside -= 1
            self._layer(self.names[id(module)], module, args[0], output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "max_pool2d" in getattr(func, "__name__", "") and isinstance(out, Tensor) and isinstance(args[0], Tensor):
            source = self.sources.get(args[0].untyped_storage().data_ptr())
            if source is not None:  # the largest of some counts is a count
                self.sources[out.untyped_storage().data_ptr()] = (out, *source[1:])
            return out
        if not self.inside and isinstance(out, Tensor) and len(args) > 1 and all(isinstance(a, Tensor) for a in args[:2]):
            name = resolve_name(func)
            if name in _PRODUCTS:
                self._product(args[0], args[1], out)
            elif name in _SUMS and args[0].shape == args[1].shape and not isinstance(args[1], nn.Parameter):
                self._sum(args[0], args[1], out)
            elif name in _PRODUCTS_EACH and args[0].shape == args[1].shape and \
                    all(a.untyped_storage().data_ptr() in self.sources for a in args[:2]):
                self.masked[out.untyped_storage().data_ptr()] = (out, args[0], args[1])
        elif not self.inside and isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and self.masked \
                and resolve_name(func) in ("torch.Tensor.sum", "torch.sum"):
            pair = self.masked.get(args[0].untyped_storage().data_ptr())
            if pair is not None:  # coincidences of spikes, added up
                self._product(pair[1], pair[2], out, pair[0].numel())
        return out

    # ------------------------------------------------------------------------------------------ records
    def _neuron(self, module: LIF | IELIF, y: Tensor) -> None:
        self.sources[y.untyped_storage().data_ptr()] = (y, module.scale, module.levels)
        self.spikes += float(y.sum(dtype=torch.float64)) / module.scale
        self.neurons += y.numel() // self.steps
        keeps = isinstance(module, LIF) or module.decay is not None
        if keeps and self.steps > 1:
            membrane = module.membrane if isinstance(module, LIF) else None
            bits = cost.POTENTIAL_BITS if membrane is None else int(membrane.bits)  # type: ignore[arg-type]
            held = y.numel() // self.batch // self.steps * bits // 8
            self.states.append((2 * self.steps * held, held))

    def _sum(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """A residual sum: one side is read back, the sum is written; of counts, it is a count."""
        known = [self.sources.get(x.untyped_storage().data_ptr()) for x in (a, b)]
        bits = cost.POTENTIAL_BITS
        if known[0] is not None and known[1] is not None and known[0][1] == known[1][1] and known[0][2] + known[1][2] <= 255:
            bits = 8
            self.sources[out.untyped_storage().data_ptr()] = (out, known[0][1], known[0][2] + known[1][2])
        image = out.numel() // self.batch * bits // 8
        self.residuals.append((2 * image, image // self._steps_of(out)))

    def codes(self, x: Tensor) -> _Codes:
        """The counts behind a tensor, if a neuron made it (or if its values lie on a grid of 0..255 steps)."""
        source = self.sources.get(x.untyped_storage().data_ptr())
        if source is not None:
            return _Codes((x.float() / source[1]).round_(), source[2])
        x = x.float()
        low, high = x.aminmax()
        if low < 0:
            return _Codes(None, 255)
        if high == 0:
            return _Codes(x, 1)
        step = x[x > 0].min()
        counts = x / step
        if counts.max() > 255 or (counts - counts.round()).abs().max() > _GRID * counts.max():
            return _Codes(None, 255)
        return _Codes(counts.round_(), int(counts.max().round()))

    def _steps_of(self, x: Tensor) -> int:
        if self.steps > 1 and (x.shape[0] == self.steps * self.batch or x.shape[:2] == (self.steps, self.batch)):
            return self.steps
        return 1

    def _layer(self, name: str, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        # a static image gives the same first layer at every step: a device computes it once
        first = not self.seen and x.dim() == 4 and not self.sequences
        steps, per = (1, x.shape[0]) if first else (self._steps_of(x), self.batch * self._steps_of(x))
        weight: Tensor = layer.weight  # type: ignore[assignment]
        fan_in = weight[0].numel()
        quantizer = quantizer_of(layer)
        record = self.seen.get(name)
        codes = self.codes(x)
        if record is None:
            kind = cost.FIRST if not self.seen else cost.DENSE if codes.counts is None else (
                cost.SPIKE if codes.levels == 1 else cost.COUNT)
            record = self.seen[name] = _Seen(
                name, kind, tuple(weight.shape), out.numel() // per * fan_in, weight.numel(),
                cost.FLOAT_BITS if quantizer is None else quantizer.bits, x.numel() // per, out.numel() // per, steps,
                codes.levels, "uniform" if quantizer is None else quantizer.deploys_as)
        self._count(record, codes, x)

    def _product(self, a: Tensor, b: Tensor, out: Tensor, products: int = 0) -> None:
        """A product of two activations (attention): driven by the side that is spikes; `products`: if no matrix product."""
        steps, per = self.steps, self.batch * self.steps
        left, right = self.codes(a), self.codes(b)
        # with spikes on both sides, the sparser one drives
        if left.counts is not None and right.counts is not None:
            driver = (left, a) if left.counts.mean() <= right.counts.mean() else (right, b)
        else:
            driver = (right, b) if left.counts is None else (left, a)
        other = right if driver[1] is a else left
        module = self.path[-1] if self.path else ""
        index = self.products_of[module] = self.products_of.get(module, 0) + 1
        name = f"{module or 'model'}.product{index}"
        record = self.seen.get(name)
        if record is None:
            kind = cost.ATTENTION if driver[0].counts is not None else cost.DENSE
            width = cost.code_bits(other.levels) if other.counts is not None else 16
            record = self.seen[name] = _Seen(name, kind, (), (products or out.numel() * a.shape[-1]) // per, 0, width,
                                             driver[1].numel() // per, out.numel() // per, steps, driver[0].levels)
        self._count(record, driver[0], driver[1])

    @staticmethod
    def _count(record: _Seen, codes: _Codes, x: Tensor) -> None:
        if codes.counts is None and record.kind in (cost.SPIKE, cost.COUNT):
            record.kind = cost.DENSE  # an earlier batch only looked like counts
        record.levels = max(record.levels, codes.levels)
        values = x if codes.counts is None else codes.counts
        record.elements += values.numel()
        record.nonzero += int(values.count_nonzero())
        record.total += float(values.abs().sum(dtype=torch.float64))


def _as_published(model: nn.Module, operations: list[Operation]) -> list[Operation]:
    """What the papers put in place of the layers they would merge, or drive by the spikes one layer further up."""
    rep = [name for name, module in model.named_modules() if isinstance(module, RepConv)]
    out: list[Operation] = []
    count = 0.0
    for op in operations:
        inside = next((name for name in rep if op.name.startswith(name + ".")), None)
        if op.kind in (cost.SPIKE, cost.COUNT):
            count = op.mean_count
        if inside is not None and op.name == f"{inside}.mix":
            out.append(replace(op, published_macs=9 * op.macs))  # a dense 3x3 convolution at the same resolution
        elif inside is not None:
            out.append(replace(op, published_macs=0))
        elif op.kind == cost.DENSE:
            out.append(replace(op, published_count=count))
        else:
            out.append(op)
    return out


@torch.no_grad()
def profile_model(model: nn.Module, images: Tensor, *, name: str = "", batch: int = 8,
                  forward: Callable[[nn.Module, Tensor], Any] | None = None) -> Report:
    """Run the model (in evaluation mode) on normalised images [B, C, H, W] or sequences [T, B, C, H, W] and count.

    forward: (model, samples) -> logits, where the model is not simply called; the samples then have any shape with their
    number in front, sequences [B, T, C, H, W]. See `bitspike.profile`.
    """
    axis = 0 if forward is not None else images.dim() - 4
    if axis < 0 or images.shape[axis] == 0:
        raise ValueError("profile: no images; give at least one, [B, C, H, W] or [T, B, C, H, W].")
    was_training = model.training
    model.eval()
    watch = _Watch(model)
    try:
        with watch:
            for part in images.split(batch, axis):
                watch.start(part.shape[axis], part.shape[1 - axis] if part.dim() == 5 else None)
                if forward is None:
                    model(part)
                else:
                    forward(model, part)
    finally:
        watch.close()
        model.train(was_training)
    operations = _as_published(model, [seen.operation() for seen in watch.seen.values()])
    return Report(name or type(model).__name__, "torch model", tuple(operations), images.shape[axis],
                  watch.spikes / max(1.0, watch.neurons), tuple(watch.residuals), tuple(watch.states))
