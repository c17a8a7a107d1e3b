"""From a forward with a loop over time to one over whole sequences.

Traced, such a forward is a graph in which every layer stands T times, once per step. `Roller` follows the T values of one place
back to the input together: where the same operation made all of them, it is written once, on the sequence of its inputs.
Anything that makes one step different from another, other than the neurons' own potentials, is an error.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import Argument, Node
from torch.nn import functional

from bitspike.interop.translate import InteropError, OverTime, as_steps, each_step

#: operations on single elements: the same on a step and on a sequence
_ELEMENTWISE: frozenset[Any] = frozenset({
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.relu, torch.clone, functional.dropout, functional.relu,
    "add", "add_", "sub", "mul", "mul_", "div", "neg", "relu", "float", "double", "to", "type", "type_as", "detach", "clone",
    "contiguous"})
#: operations on [B, C, H, W] or [B, C, L] -> their names in torch.nn.functional
_SPATIAL: dict[Any, str] = {
    call: name for name in ("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
                            "adaptive_avg_pool2d", "adaptive_max_pool2d", "dropout2d")
    for call in (getattr(functional, name), getattr(torch, name, None)) if call is not None}
_RESHAPES: frozenset[Any] = frozenset({torch.flatten, torch.reshape, "flatten", "view", "reshape"})
_SUMS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
#: modules that take a sequence as it is
_ANY_AXES = (nn.Linear, nn.Dropout, nn.Identity)

Steps = tuple[Node, ...]


def describe(node: Node) -> str:
    """Where and what a node is, for messages."""
    stack = node.meta.get("nn_module_stack")
    place = (list(stack)[-1] if stack else "") or "forward"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name!r} in {place}"


class Roller:
    """Rolls one traced graph up.

    Args: root: the traced model; graph, values: of `ConcreteTracer`; calls: neuron -> its calls in order, all of the same
        number; steps: T, where the forward makes only one step.
    After `run`: `sequences`, the modules that now get whole sequences.
    """

    def __init__(self, root: nn.Module, graph: torch.fx.Graph, values: dict[Node, Any], calls: dict[str, list[Node]],
                 steps: int) -> None:
        self.root, self.graph, self.values, self.calls, self.steps = root, graph, values, calls, steps
        self.count = len(next(iter(calls.values())))
        self.new = torch.fx.Graph()
        self.once_done: dict[Node, Node] = {}
        self.each_done: dict[Steps, Node] = {}
        self.sequences: set[str] = set()
        self.pictures: set[str] = set()
        # nodes that belong to a step: what depends on a neuron, or, where the forward is one step, on the input
        roots = {node for made in calls.values() for node in made}
        if self.count == 1:
            roots |= {node for node in graph.nodes if node.op == "placeholder"}
        self.timed: set[Node] = set()
        for node in graph.nodes:
            if node in roots or any(used in self.timed for used in node.all_input_nodes):
                self.timed.add(node)

    def run(self, output: int) -> torch.fx.Graph:
        """The graph over whole sequences; output: which of several results it returns."""
        for node in self.graph.nodes:  # the input comes first in any graph
            if node.op == "placeholder":
                self.once_done[node] = self.new.placeholder(node.name)
        (end,) = [node for node in self.graph.nodes if node.op == "output"]
        result: Any = end.args[0]
        if isinstance(result, (tuple, list)) and not self._is_record(result):
            if not 0 <= output < len(result):
                raise InteropError(f"output={output}: the network returns {len(result)} values, 0 to {len(result) - 1}.")
            result = result[output]
        self.new.output(self._result(result))
        both = self.sequences & self.pictures
        if both:
            raise InteropError(f"layer {min(both)!r} is used both inside and outside of the loop over time. Give each "
                               "place a layer of its own.")
        return self.new

    def _is_record(self, result: Sequence[Any]) -> bool:
        """Is this a list with one entry per step, rather than several results?"""
        if self.count == 1 or len(result) != self.count:
            return False
        try:
            self.each(tuple(result))
        except InteropError:
            return False
        return True

    def _result(self, result: Any) -> Argument:
        if isinstance(result, (tuple, list)):
            return self.each(tuple(result))
        if not isinstance(result, Node):
            raise InteropError(f"the network returns {type(result).__name__}; it must return its neurons' spikes, or a "
                               "result of them.")
        return self.each((result,)) if self.count == 1 else self.once(result)

    # ------------------------------------------------------------------------------------- outside the loop
    def once(self, node: Node) -> Node:
        """A node that exists once: before the loop, or of whole sequences behind it."""
        if node not in self.once_done:
            self.once_done[node] = self._once(node)
        return self.once_done[node]

    def _once(self, node: Node) -> Node:
        if node.target is torch.stack and node in self.timed:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            sequence = self.each(tuple(node.args[0]))  # type: ignore[arg-type]
            return sequence if dim == 0 else self.new.call_method("movedim", (sequence, 0, dim))
        if node.target in _SUMS and node in self.timed:
            terms = self._terms(node)
            if len(terms) == self.count:
                try:
                    return self.new.call_method("sum", (self.each(tuple(terms)), 0))
                except InteropError:
                    pass  # a sum of something else than the steps
        if node.op == "call_module":
            if node in self.timed and (node.target in self.calls or node.target in self.sequences):
                raise InteropError(f"{describe(node)}: its value at a single step is used behind the loop. Return the "
                                   "values of all steps, for example torch.stack(spikes), or their sum.")
            self.pictures.add(str(node.target))
        if node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0].target in self.calls:
            raise InteropError(f"neuron {node.args[0].target!r}: its value at a single step is used behind the loop. "
                               "Return the values of all steps, for example torch.stack(spikes), or their sum.")
        return self.new.node_copy(node, self.once)

    def _terms(self, node: Node) -> list[Node]:
        """x, y, z of ((0 + x) + y) + z."""
        out: list[Node] = []
        for arg in node.args:
            if isinstance(arg, Node) and arg.target in _SUMS and arg in self.timed and len(arg.users) == 1:
                out += self._terms(arg)
            elif isinstance(arg, Node) and not self._is_zero(arg):
                out.append(arg)
            elif not isinstance(arg, Node) and arg != 0:
                return []
        return out

    def _is_zero(self, node: Node) -> bool:
        value = self.values[node]
        return node not in self.timed and isinstance(value, Tensor) and not bool(value.any())

    # -------------------------------------------------------------------------------------- inside the loop
    def each(self, nodes: Steps) -> Node:
        """The values of one place at all steps, as one sequence [T, B, ...]."""
        bad = next((node for node in nodes if not isinstance(node, Node)), None)
        if bad is not None or len(nodes) != self.count:
            raise InteropError(f"a list of {len(nodes)} values is not one of the {self.count} steps that the neurons are run.")
        if nodes not in self.each_done:
            self.each_done[nodes] = self._each(nodes)
        return self.each_done[nodes]

    def _each(self, nodes: Steps) -> Node:
        first = nodes[0]
        if len(set(nodes)) == 1 and (first not in self.timed or first.op == "placeholder"):
            value = self.values[first]
            if not isinstance(value, Tensor):
                raise InteropError(f"{describe(first)} gives {type(value).__name__}; inside the loop only tensors may be used.")
            return self.new.call_function(as_steps, (self.once(first), self.steps, value.dim()))
        frames = self._frames(nodes)
        if frames is not None:
            return frames
        if len(set(nodes)) != len(nodes) or any((n.op, n.target) != (first.op, first.target) for n in nodes):
            odd = next((n for n in nodes if (n.op, n.target) != (first.op, first.target)), first)
            raise InteropError(f"{describe(odd)}: the steps of the loop are not alike, or one step uses values of another. In "
                               "a network with an integer form only the neurons remember; recurrent connections have none.")
        if first.op == "call_module":
            return self._neuron(nodes) if first.target in self.calls else self._layer(nodes)
        if first.target is operator.getitem and isinstance(first.args[0], Node) and first.args[0].target in self.calls:
            if any(node.args[1] != 0 for node in nodes):
                raise InteropError(f"the potentials of neuron {first.args[0].target!r} are used. A deployed neuron gives "
                                   "its spikes only; let spikes be the output (or choose it: convert(..., output=...)).")
            return self._neuron(tuple(node.args[0] for node in nodes))  # type: ignore[misc]
        if first.target in _RESHAPES:
            return self._flattened(nodes)
        if first.target in _ELEMENTWISE:
            return self._same(nodes, lambda args, kwargs: self.new.create_node(first.op, first.target, args, kwargs))
        if first.target in _SPATIAL:
            name = _SPATIAL[first.target]
            return self._same(nodes, lambda args, kwargs: self.new.call_function(each_step, (name, *args), kwargs))
        raise InteropError(f"{describe(first)} inside the loop over time is not known. Known are torch.nn layers, "
                           "arithmetic, pooling and flattening; make it a layer, or take it out of the loop.")

    def _frames(self, nodes: Steps) -> Node | None:
        """x[0], x[1], .. or x[:, 0], x[:, 1], .. of one sequence x."""
        if self.count == 1 or any(n.target is not operator.getitem or n.args[0] is not nodes[0].args[0] for n in nodes):
            return None
        source: Any = nodes[0].args[0]
        if source in self.timed or not isinstance(self.values[source], Tensor):
            return None
        if [n.args[1] for n in nodes] == list(range(self.count)) and len(self.values[source]) == self.count:
            return self.once(source)
        if [n.args[1] for n in nodes] == [(slice(None), t) for t in range(self.count)] and \
                self.values[source].shape[1] == self.count:
            return self.new.call_method("transpose", (self.once(source), 0, 1))
        raise InteropError(f"the loop over time takes {[n.args[1] for n in nodes][:4]}.. of its input; whole sequences "
                           "are x[0], x[1], .. or x[:, 0], x[:, 1], ..")

    def _neuron(self, calls: Steps) -> Node:
        name = str(calls[0].target)
        if list(calls) != self.calls[name]:
            raise InteropError(f"neuron {name!r}: its calls are not one per step, in order.")
        for t, call in enumerate(calls):
            rest = [*call.args[1:], *call.kwargs.values()]
            state = rest[0] if rest else None
            if not isinstance(state, Node):
                continue
            value = self.values[state]
            if t == 0 and isinstance(value, Tensor) and not bool(value.any()):
                continue
            if t > 0 and state.target is operator.getitem and state.args == (calls[t - 1], 1):
                continue
            raise InteropError(f"neuron {name!r}: its potential before step {t + 1} is not "
                               f"{'zero' if t == 0 else 'what step ' + str(t) + ' left'}. Only the neuron may change it.")
        return self.new.call_module(name, (self.each(tuple(c.args[0] for c in calls)),))  # type: ignore[misc]

    def _layer(self, nodes: Steps) -> Node:
        if any(len(n.args) != 1 or n.kwargs for n in nodes):
            raise InteropError(f"{describe(nodes[0])} takes more than one input; layers of one input are known.")
        name = str(nodes[0].target)
        self.sequences.add(name)
        return self.new.call_module(name, (self.each(tuple(n.args[0] for n in nodes)),))  # type: ignore[misc]

    def _same(self, nodes: Steps, emit: Callable[[tuple[Any, ...], dict[str, Any]], Node]) -> Node:
        """One call with the sequence of every argument."""
        if len({(len(n.args), tuple(n.kwargs)) for n in nodes}) != 1:
            raise InteropError(f"{describe(nodes[0])}: the steps of the loop are not alike.")
        args = tuple(self._argument([n.args[i] for n in nodes], nodes) for i in range(len(nodes[0].args)))
        return emit(args, {key: self._argument([n.kwargs[key] for n in nodes], nodes) for key in nodes[0].kwargs})

    def _argument(self, found: list[Any], nodes: Steps) -> Any:
        if not any(isinstance(a, Node) for a in found):
            if any(a != found[0] for a in found):
                raise InteropError(f"{describe(nodes[0])}: a number that changes with the step ({found[0]}, {found[1]}, ..).")
            return found[0]
        if self._is_constant(found) and (
                any(isinstance(a, Node) and not self._is_constant([n.args[i] for n in nodes])  # another argument has the steps
                    for i, a in enumerate(nodes[0].args))
                or not isinstance(self.values[found[0]], Tensor) or self.values[found[0]].dim() < self.values[nodes[0]].dim()):
            return self.once(found[0])  # it is broadcast over the steps
        return self.each(tuple(found))

    def _is_constant(self, found: list[Any]) -> bool:
        """Is this one value, for all steps?"""
        return len(set(found)) == 1 and (not isinstance(found[0], Node) or found[0] not in self.timed)

    def _flattened(self, nodes: Steps) -> Node:
        """Flattening of [B, ...] to [B, n] -> of [T, B, ...] to [T, B, n]."""
        source: Any = nodes[0].args[0]
        before, after = self.values[source], self.values[nodes[0]]
        if after.dim() != 2 or before.shape[0] != after.shape[0]:
            raise InteropError(f"{describe(nodes[0])}: {list(before.shape)} becomes {list(after.shape)}; inside the "
                               "loop over time a step may only be flattened to [B, n].")
        return self.new.call_function(torch.flatten, (self.each(tuple(n.args[0] for n in nodes)), 2))  # type: ignore[misc]


def over_sequences(root: nn.Module, names: set[str]) -> None:
    """Let these modules of the model take whole sequences."""
    for name in names:
        module = root.get_submodule(name)
        if isinstance(module, nn.Flatten):
            new: nn.Module = nn.Flatten(*(d + 1 if d >= 0 else d for d in (module.start_dim, module.end_dim)))
        elif isinstance(module, _ANY_AXES):
            continue
        else:
            new = OverTime(module)
        root.set_submodule(name, new.train(module.training))
