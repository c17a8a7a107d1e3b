"""From a torch model to a graph whose every node has named axes, a shape and a calibrated range.

`trace(model)` writes the graph down; `observe` runs it on pictures. In the graph a convolution sees the whole sequence
[T, B, C, H, W] (`timewise` is transparent to the tracer), so the same program serves any number of steps.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn import functional

from bitspike.models.bestformer import spike_attention_map, spike_attention_read
from bitspike.models.blocks import LayerScale, NormPad, as_sequence, spike_attention
from bitspike.models.spike_driven import spike_coincidences, spike_mask
from bitspike.neurons import IELIF, LIF

#: axes of a tensor, one group of names per dimension: [B, C, H*W] is (("B",), ("C",), ("H", "W")); () is a new axis of 1
Axes = tuple[tuple[str, ...], ...]

CONVS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_OURS = (LIF, IELIF, NormPad, LayerScale, *CONVS, *NORMS, *POOLS, *NOTHING, nn.Linear, nn.Flatten)

#: what a call is, whatever spelling was used: functions of `operator`, torch and torch.nn.functional, tensor methods
_SPELLINGS: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
    "sub": (operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    "mul": (operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    "div": (operator.truediv, operator.itruediv, torch.div, "div", "div_"),
    "neg": (operator.neg, torch.neg, "neg"),
    "mean": (torch.mean, "mean"),
    "same": ("contiguous", "clone", "detach", "float", "to", "type_as", torch.clone),
    "dropout": (functional.dropout, functional.dropout1d, functional.dropout2d, torch.dropout),
    "shape": (torch.flatten, torch.reshape, torch.unflatten, torch.squeeze, torch.unsqueeze, "flatten", "reshape", "view",
              "unflatten", "squeeze", "unsqueeze", operator.getitem),
    "repeat": ("expand", "repeat", "expand_as", as_sequence),
    "stack": (torch.stack,),
    "permute": (torch.permute, torch.transpose, "permute", "transpose"),
    "maxpool": (functional.max_pool2d, torch.max_pool2d),
    "avgpool": (functional.avg_pool2d,),
    "adaptive": (functional.adaptive_avg_pool2d,),
    "upsample": (functional.interpolate,),
    "conv": (functional.conv2d, torch.conv2d),
    "linear": (functional.linear,),
    "attention": (spike_attention,),
    "map": (spike_attention_map,),
    "read": (spike_attention_read,),
    "coincidences": (spike_coincidences,),
    "mask": (spike_mask,),
}
_KINDS: dict[Any, str] = {target: kind for kind, targets in _SPELLINGS.items() for target in targets}
#: parameters of the functions that have options, in order
PARAMETERS = {
    "maxpool": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avgpool": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive": ("input", "output_size"),
    "upsample": ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "linear": ("input", "weight", "bias"),
    "mean": ("input", "dim", "keepdim"),
    "attention": ("q_TBCHW", "k_TBCHW", "v_TBCHW", "heads", "scale"),
    "map": ("q_TBCHW", "k_TBCHW", "v_TBCHW", "heads", "product"),
    "read": ("map_TBhXX", "q_TBCHW", "v_TBCHW", "strength_Th", "heads", "product", "scale"),
    "coincidences": ("k_TBCHW", "v_TBCHW"),
    "mask": ("q_TBCHW", "mask_TBC11"),
}
#: functions of the models that are one operation, not looked into
_WHOLE = (as_sequence, spike_attention, spike_attention_map, spike_attention_read, spike_coincidences, spike_mask)


class ExportError(ValueError):
    """A model that cannot become an integer program, or whose program disagrees with it; says where and what to do."""


def kind_of(node: Node) -> str:
    """What a node does, whatever spelling the model used; "" if the exporter does not know it."""
    return _KINDS.get(node.target, "") if node.op in ("call_function", "call_method") else node.op


def place(node: Node) -> str:
    """Dotted name of the module where a node stands, for messages and for the `layer` attribute."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return (list(stack)[-1] if stack else "") or "the model's own forward"


def arguments(node: Node, args: Iterable[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by their names (see `PARAMETERS`)."""
    names = PARAMETERS[kind_of(node)]
    args = list(args)
    if kind_of(node) == "mean" and len(args) > 2 and all(isinstance(a, int) for a in args[1:3]) \
            and not isinstance(args[2], bool):
        args = [args[0], tuple(args[1:])]  # x.mean(-2, -1)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


class _Tracer(torch.fx.Tracer):
    """Stops at what the exporter turns into operations; looks into everything else."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_WHOLE)  # also where it was imported by name

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _OURS) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> torch.fx.GraphModule:
    """The model's graph, in evaluation mode. Errors: ExportError where the forward depends on the data."""
    try:
        graph = _Tracer().trace(model)
    except torch.fx.proxy.TraceError as error:
        raise ExportError(f"{type(model).__name__}.forward cannot be written down as a fixed program: {error}. Branches and "
                          "loops may depend on the configuration, not on tensors or their shapes; move the decision to "
                          "__init__.") from error
    module = torch.fx.GraphModule(model, graph)
    graph.eliminate_dead_code()
    return module


# ------------------------------------------------------------------------------------------------- axes
def regroup(axes: Axes, sizes: tuple[int, ...], shape: tuple[int, ...]) -> Axes | None:
    """Axes after a reshape from `sizes` to `shape`; None if a dimension would be a part of an axis.

    `sizes`: the size of each name, in the order of the flattened `axes`.

    >>> regroup((("B",), ("C",), ("H",), ("W",)), (2, 8, 3, 5), (2, 8, 15))
    (('B',), ('C',), ('H', 'W'))
    >>> regroup((("B",), ("C",)), (2, 8), (2, 4, 2)) is None
    True
    """
    names = [name for group in axes for name in group]
    groups: list[tuple[str, ...]] = []
    at = 0
    for size in shape:
        start, product = at, 1
        while product < size and at < len(names):
            product *= sizes[at]
            at += 1
        if product != size:
            return None
        if size == 1 and at < len(names) and sizes[at] == 1:
            at += 1  # an axis that happens to have one element stays an axis
        groups.append(tuple(names[start:at]))
    if any(sizes[i] != 1 for i in range(at, len(names))):
        return None
    if groups and at < len(names):
        groups[-1] += tuple(names[at:])
    return tuple(groups)


@dataclass
class Labelled:
    """A tensor with named axes; `sizes`: the size of every name."""

    tensor: Tensor
    axes: Axes
    sizes: dict[str, int]

    def size_list(self) -> tuple[int, ...]:
        """Size of every name, in the order of the axes."""
        return tuple(self.sizes[name] for group in self.axes for name in group)


def label(tensor: Tensor, axes: Axes) -> Labelled:
    """Label a tensor none of whose dimensions is merged."""
    return Labelled(tensor, axes, {group[0]: n for group, n in zip(axes, tensor.shape, strict=True) if group})


# -------------------------------------------------------------------------------------------- execution
class Observer:
    """Runs a traced graph on real tensors and keeps, per node: axes, sizes and the largest |x| of every channel.

    After `run`, `node.meta["axes"]`, `["sizes"]`, `["top"]` (float64 [C], or [1] where channels are merged) are set.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self.module = module
        self.last_use: dict[Node, Node] = {}
        for node in module.graph.nodes:
            for used in node.all_input_nodes:
                self.last_use[used] = node

    def run(self, x: Tensor) -> Tensor:
        """Logits of one normalised batch of pictures [B, C, H, W] or sequences [T, B, C, H, W], computed node by node."""
        outputs = self.run_all(x)
        if len(outputs) != 1:
            raise ExportError(f"the model returns {len(outputs)} tensors; an exported model returns the logits [B, classes].")
        return outputs[0]

    @torch.no_grad()
    def run_all(self, x: Tensor) -> list[Tensor]:
        """Every tensor that the model returns, in order, from lists and tuples too."""
        values: dict[Node, Any] = {}
        result: Any = None
        for node in self.module.graph.nodes:
            args = torch.fx.node.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
            if node.op == "placeholder":
                if values:
                    raise ExportError(f"the model takes a second input {node.name!r}; an exported model takes one picture.")
                value: Any = label(x, (("T",), ("B",), ("C",), ("H",), ("W",))[5 - x.dim():])
            elif node.op == "output":
                result = flat_outputs(args[0])
            else:
                value = self._call(node, args, kwargs)
            if node.op != "output":
                values[node] = value
                self._note(node, value)
            for used in node.all_input_nodes:
                if self.last_use[used] is node:
                    del values[used]
        strange = [type(one).__name__ for one in result if not isinstance(one, Labelled)]
        if strange:
            raise ExportError(f"the model returns {strange[0]}; an exported model returns the logits [B, classes].")
        return [one.tensor for one in result]

    @staticmethod
    def _note(node: Node, value: Any) -> None:
        if not isinstance(value, Labelled):
            return
        x = value.tensor.detach().abs()
        channel = value.axes.index(("C",)) if ("C",) in value.axes else None
        top = (x.amax() if channel is None else x.amax([i for i in range(x.dim()) if i != channel])).double().reshape(-1)
        if not bool(torch.isfinite(top).all()):
            raise ExportError(f"{place(node)}: the calibration pictures give values that are not finite.")
        before = node.meta.get("top")
        node.meta["top"] = top if before is None else torch.maximum(before, top)
        node.meta["axes"], node.meta["sizes"] = value.axes, value.sizes

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "get_attr":
            return _attribute(self.module, str(node.target))
        if node.op == "call_module":
            return _apply_module(node, self.module.get_submodule(str(node.target)), args, kwargs)
        call: Callable[..., Any] = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        flat: list[Labelled] = []
        torch.fx.node.map_aggregate((args, kwargs), lambda a: flat.append(a) if isinstance(a, Labelled) else None)
        plain_args, plain_kwargs = torch.fx.node.map_aggregate(
            (args, kwargs), lambda a: a.tensor if isinstance(a, Labelled) else a)  # type: ignore[misc]
        if not flat:
            return getattr(args[0], node.target)(*args[1:], **kwargs) if isinstance(node.target, str) \
                else call(*args, **kwargs)
        kind = kind_of(node)
        if node.target is getattr or node.target in ("size", "dim", "numel") or \
                (node.target is operator.getitem and not isinstance(args[0], Labelled)):
            return call(*plain_args, **plain_kwargs)
        if not kind:
            raise unknown(node)
        first = flat[0]
        if kind in ("maxpool", "avgpool", "adaptive", "upsample", "conv"):
            return _spatial(node, first, lambda x: call(x, *plain_args[1:], **plain_kwargs))
        out = call(*plain_args, **plain_kwargs)
        return Labelled(out, *_axes_after(node, kind, first, flat, args, kwargs, out))


def flat_outputs(result: Any) -> list[Any]:
    """What a graph returns, without the lists and tuples around it.

    >>> flat_outputs((1, [2, (3,)]))
    [1, 2, 3]
    """
    return [x for one in result for x in flat_outputs(one)] if isinstance(result, (list, tuple)) else [result]


def _attribute(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def unknown(node: Node, why: str = "") -> ExportError:
    """The error for an operation that has no integer form."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return ExportError(f"operation {name!r} in {place(node)} cannot be exported{': ' + why if why else ''}. A deployed model "
                       "is made of conv, linear, batch norm, LIF, IELIF, spike attention, residual +, * constant, pooling, "
                       "interpolation by a whole factor, mean and flatten; replace the operation or keep it out of forward().")


def _spatial(node: Node, x: Labelled, call: Callable[[Tensor], Tensor]) -> Labelled:
    """A module that knows no time on [..., C, H, W] or [..., C, N]: leading axes are merged and split again."""
    lead = len(x.axes) - (x.axes.index(("C",)) if ("C",) in x.axes else len(x.axes))
    merged = x.tensor.flatten(0, x.tensor.dim() - lead - 1) if x.tensor.dim() > lead + 1 else x.tensor
    out = call(merged)
    if x.tensor.dim() > lead + 1:
        out = out.unflatten(0, x.tensor.shape[: x.tensor.dim() - lead])
    sizes = dict(x.sizes)
    axes = list(x.axes)
    for i in range(len(axes) - lead, len(axes)):
        if axes[i] == ("H", "W") and out.shape[i] == sizes["H"] * sizes["W"]:
            continue
        if len(axes[i]) != 1:
            raise ExportError(f"{place(node)}: a spatial operation on the merged axis {'*'.join(axes[i])}; it needs "
                              "[.., C, H, W].")
        sizes[axes[i][0]] = out.shape[i]
    return Labelled(out, tuple(axes), sizes)


def _apply_module(node: Node, module: nn.Module, args: Any, kwargs: Any) -> Labelled:
    if len(args) != 1 or kwargs or not isinstance(args[0], Labelled):
        raise unknown(node, "it is called with more than one tensor")
    x: Labelled = args[0]
    if isinstance(module, NOTHING):
        return x
    if isinstance(module, (LIF, IELIF)):
        stateful = isinstance(module, LIF) or module.decay is not None
        if stateful and x.axes[0] not in (("T",), ()):
            raise ExportError(f"{place(node)}: {type(module).__name__} runs over time, and its input's first axis is "
                              f"{'*'.join(x.axes[0])}. Give it [T, B, ...], for example by x.unsqueeze(0).")
        return Labelled(module(x.tensor), x.axes, x.sizes)
    if isinstance(module, LayerScale):
        return Labelled(module(x.tensor), x.axes, x.sizes)
    if isinstance(module, nn.Flatten):
        out = module(x.tensor)
        return Labelled(out, _reshaped(node, x, out), x.sizes)
    if isinstance(module, nn.Linear):
        return _linear(node, x, module(x.tensor))
    if isinstance(module, nn.Conv1d) and (module.kernel_size, module.stride, module.padding) != ((1,), (1,), (0,)):
        raise ExportError(f"{place(node)}: a Conv1d with kernel {module.kernel_size[0]}, stride {module.stride[0]}, padding "
                          f"{module.padding[0]} cannot be exported; kernel 1 over tokens can, for neighbourhoods use Conv2d.")
    if isinstance(module, (*CONVS, *NORMS, *POOLS, NormPad)):
        if ("C",) not in x.axes:
            raise ExportError(f"{place(node)}: {type(module).__name__} needs an axis of channels; its input has the axes "
                              f"{x.axes}.")
        return _spatial(node, x, module)
    raise ExportError(f"module {place(node)!r} ({type(module).__name__}) cannot be exported. A deployed model is made of conv, "
                      "linear, batch norm, LIF, IELIF, spike_attention, residual +, * constant, pooling, mean and flatten.")


def _linear(node: Node, x: Labelled, out: Tensor) -> Labelled:
    last = x.axes[-1]
    if last[:1] != ("C",) or last not in (("C",), ("C", "H", "W")):
        raise ExportError(f"{place(node)}: a linear layer over the axis {'*'.join(last) or '1'} cannot be exported; it must "
                          "work on channels, or on flattened [C, H, W].")
    sizes = {name: n for name, n in x.sizes.items() if name == "C" or name not in last}
    return Labelled(out, (*x.axes[:-1], ("C",)), {**sizes, "C": out.shape[-1]})


def _reshaped(node: Node, x: Labelled, out: Tensor) -> Axes:
    axes = regroup(x.axes, x.size_list(), tuple(out.shape))
    if axes is None:
        raise unknown(node, f"it splits an axis: {tuple(x.tensor.shape)} with axes {x.axes} -> {tuple(out.shape)}")
    return axes


def _axes_after(node: Node, kind: str, x: Labelled, flat: list[Labelled], args: Any, kwargs: Any,
                out: Tensor) -> tuple[Axes, dict[str, int]]:
    """Axes and sizes of `out`, the result of a call of this kind on `flat`."""
    if kind == "linear":
        done = _linear(node, x, out)
        return done.axes, done.sizes
    if kind in ("map", "read", "coincidences", "mask"):
        return _attended(kind, arguments(node, args, kwargs), out)
    if kind in ("add", "sub", "mul", "div", "neg", "same", "dropout", "attention"):
        largest = max(flat, key=lambda a: a.tensor.dim())
        if out.shape != largest.tensor.shape:
            raise unknown(node, f"it broadcasts {[tuple(a.tensor.shape) for a in flat]} to {tuple(out.shape)}")
        return largest.axes, largest.sizes
    if kind == "mean":
        named = arguments(node, args, kwargs)
        dims = named.get("dim")
        if dims is None:
            raise unknown(node, "a mean over everything")
        gone = {d % len(x.axes) for d in ((dims,) if isinstance(dims, int) else tuple(dims))}
        axes = tuple(() if i in gone else group for i, group in enumerate(x.axes) if named.get("keepdim") or i not in gone)
        sizes = {name: n for name, n in x.sizes.items() if any(name in group for group in axes)}
        return axes, sizes
    if kind == "permute":
        marked = torch.empty([i + 2 for i in range(x.tensor.dim())], device="meta")  # distinct sizes show the order
        call: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        order = [n - 2 for n in call(marked, *args[1:], **kwargs).shape]
        return tuple(x.axes[i] for i in order), x.sizes
    if kind == "stack" and len({id(a) for a in flat}) == 1 and kwargs.get("dim", args[1] if len(args) > 1 else 0) == 0:
        return _timed(node, ((), *x.axes), x.sizes, out)
    if kind == "repeat":
        new = out.dim() - x.tensor.dim()
        return _timed(node, (*[()] * new, *x.axes), x.sizes, out)
    if kind == "shape":
        if node.target is operator.getitem:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(not (i is None or i is Ellipsis or i == slice(None)) for i in index):
                raise unknown(node, "it selects a part of a tensor")
        if node.target in (torch.unsqueeze, "unsqueeze"):
            dim = (args[1] if len(args) > 1 else kwargs["dim"]) % out.dim()
            return (*x.axes[:dim], (), *x.axes[dim:]), x.sizes
        return _reshaped(node, x, out), x.sizes
    raise unknown(node)


def _attended(kind: str, named: dict[str, Any], out: Tensor) -> tuple[Axes, dict[str, int]]:
    """Axes after a part of an attention. A map [T, B, heads, X, Y] is laid out as the op `attention_map` does it: what
    `attention_read` sums over is C, the heads are W.
    """
    x: Labelled = next(iter(a for name, a in named.items() if isinstance(a, Labelled) and name != "map_TBhXX"))
    if kind == "map":
        names = ("T", "B", "W", "H", "C") if named["product"] == "qk" else ("T", "B", "W", "C", "H")
        return tuple((name,) for name in names), dict(zip(names, out.shape, strict=True))
    return x.axes, {**x.sizes, "H": 1, "W": 1} if kind == "coincidences" else x.sizes


def _timed(node: Node, axes: Axes, sizes: dict[str, int], out: Tensor) -> tuple[Axes, dict[str, int]]:
    """Axes after a repetition: only a new first axis may grow, and it is time."""
    known = [math.prod(sizes[name] for name in group) for group in axes]
    grown = [i for i, (n, size) in enumerate(zip(known, out.shape, strict=True)) if n != size]
    if not grown:
        grown = [0] if not axes[0] and not any("T" in group for group in axes) else []
    if not grown:
        return axes, sizes
    if grown != [0] or axes[0] or any("T" in group for group in axes):
        raise unknown(node, "it repeats something else than the picture over time (a new first axis)")
    return (("T",), *axes[1:]), {**sizes, "T": out.shape[0]}
