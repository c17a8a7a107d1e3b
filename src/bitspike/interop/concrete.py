"""Tracing with an example at hand (`as_graph`): torch.fx where shapes, their comparisons and loops over them have values.

torch.fx alone stops at `T, B, C, H, W = x.shape`, `if x.ndim == 4` and `range(x.size(0))`. Here every symbolic value carries
the one that the example gives, so a forward may unpack shapes and branch on them. Tensors stay symbolic: a branch on what
a tensor holds is still an error.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import Node
from torch.fx.proxy import Attribute, Proxy, TraceError

from bitspike.interop.translate import InteropError, OverTime, SteadyDropout
from bitspike.models.blocks import LayerScale, NormPad, as_sequence, spike_attention
from bitspike.neurons import IELIF, LIF

#: modules of ours that are one operation
_LEAVES = (LIF, IELIF, NormPad, LayerScale, OverTime, SteadyDropout)


def as_graph(model: nn.Module, example: Tensor) -> torch.fx.GraphModule:
    """The model with its forward written down as a fixed graph, for `export_model`; it shares the model's layers.

    Needed for a forward that unpacks shapes or branches on them; the batch size stays free, everything else that the forward
    asks of shapes is what it is for the example. The graph is that of evaluation.

    Args: model: converted, quantized or not; example: a small batch as the model takes it.
    Errors: InteropError where the forward branches on what a tensor holds, or takes more than one input.
    """
    tracer = ConcreteTracer(example, lambda m, name: isinstance(m, _LEAVES) or (
        m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)), (as_sequence, spike_attention))
    training = model.training
    try:
        graph = tracer.trace(model.eval())
    except TraceError as error:
        raise InteropError(f"{type(model).__name__}.forward cannot be written down: {error}. Its loops and branches "
                           "may depend on shapes and settings, not on what tensors hold; it takes one tensor.") from error
    finally:
        model.train(training)
    new = torch.fx.GraphModule(model, graph, type(model).__name__)
    graph.eliminate_dead_code()
    new.recompile()
    return new.train(training)


class ConcreteProxy(Proxy):
    """A symbolic value that knows what it is for the example."""

    def _value(self) -> Any:
        return self.tracer.values[self.node]  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return ConcreteAttribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        value = self._value()
        if isinstance(value, (tuple, list, Tensor)):
            return iter([self[i] for i in range(len(value))])  # type: ignore[index]
        return super().__iter__()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._value())

    def __index__(self) -> int:
        value = self._value()
        if isinstance(value, int):
            return value
        raise TraceError(f"{type(value).__name__} is no whole number")

    def __int__(self) -> int:
        return self.__index__()

    def __bool__(self) -> bool:
        value = self._value()
        if isinstance(value, Tensor):
            raise TraceError("a branch depends on what a tensor holds")
        return bool(value)


class ConcreteAttribute(Attribute, ConcreteProxy):
    """`x.shape` and its like; `x.flatten` until it is called."""


class ConcreteTracer(torch.fx.Tracer):
    """Traces a model on an example; `values[node]` is what each node gives for it.

    leaf: is this module one operation of the graph? functions: calls that are one operation, wherever they are made.
    """

    def __init__(self, example: Tensor, leaf: Callable[[nn.Module, str], bool],
                 functions: tuple[Callable[..., Any], ...] = ()) -> None:
        super().__init__(autowrap_functions=functions)
        self.example, self.leaf = example, leaf
        self.values: dict[Node, Any] = {}
        self.evaluating = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """One operation, or looked into."""
        return self.leaf(m, module_qualified_name)

    def proxy(self, node: Node) -> Proxy:
        """The symbolic value of a node."""
        return ConcreteProxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's forward, unless it is run for its value."""
        return forward(*args, **kwargs) if self.evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter, as a symbolic value unless a module is run for its value."""
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None,
                     type_expr: Any = None, proxy_factory_fn: Any = None) -> Proxy:
        """A new node, and its value for the example."""
        made = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        if made.node not in self.values:
            self.values[made.node] = self._evaluate(made.node)
        return made

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None,
                    type_expr: Any = None) -> Node:
        """A new node; a tensor of the model is looked up now, before the forward changes it."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "get_attr":
            self.values[node] = self._evaluate(node)
        return node

    @torch.no_grad()
    def _evaluate(self, node: Node) -> Any:
        args = torch.fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs = torch.fx.node.map_arg(node.kwargs, self.values.__getitem__)
        if node.op == "placeholder":
            if self.values:
                raise TraceError(f"the model takes a second input {node.name!r}")
            return self.example
        if node.op == "output":
            return args[0]
        was, self.evaluating = self.evaluating, True
        try:
            if node.op == "get_attr":
                found: Any = self.root
                for part in str(node.target).split("."):
                    found = getattr(found, part)
                return found
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target)).forward(*args, **kwargs)  # type: ignore[attr-defined]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.evaluating = was
