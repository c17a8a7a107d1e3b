"""From the observed graph to the integer program: every affine map folds into the fixed point of the conv before it.

A `Value` is `a[c] * raw + b[c]`, where raw is what the program stores (codes or potentials) or what a convolution that is
not written yet would accumulate. Batch norms, scales and constants only change a and b; a neuron, a sum or a second
reader makes the program write the value down as a potential.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn.utils import parametrize

from bitspike.exporting.emit import Array, Program
from bitspike.exporting.lower import Codes, Lowering, Value, vector
from bitspike.exporting.trace import (
    CONVS,
    NORMS,
    NOTHING,
    POOLS,
    ExportError,
    arguments,
    flat_outputs,
    kind_of,
    place,
    unknown,
)
from bitspike.layers import latent_weight, quantizer_of
from bitspike.models.blocks import LayerScale, NormPad
from bitspike.neurons import IELIF, LIF


def _pair(x: Any) -> tuple[int, int]:
    return (int(x), int(x)) if not isinstance(x, (tuple, list)) else (int(x[0]), int(x[-1]))


class Folder:
    """Walks one observed graph and lowers every node; `lowering` keeps the record of what was done."""

    def __init__(self, module: torch.fx.GraphModule, program: Program, *, mean: Array, std: Array, allow_float: bool,
                 inner_bits: int = 8, regions: bool = False) -> None:
        self.module, self.lowering = module, Lowering(program, allow_float, inner_bits)
        self.pixel_mean, self.pixel_std, self.regions = mean, std, regions

    # ------------------------------------------------------------------------------------------- the walk
    def run(self) -> list[Value]:
        """Write every operation; returns what the graph returns, as potentials, in order."""
        env: dict[Node, Any] = {}
        for node in self.module.graph.nodes:
            if node.op == "output":
                return [self._output(env[one]) for one in flat_outputs(node.args[0])]
            value = self._node(node, torch.fx.node.map_arg(node.args, env.__getitem__),
                               torch.fx.node.map_arg(node.kwargs, env.__getitem__))
            if isinstance(value, Value):
                if "top" in node.meta:
                    value = replace(value, top=node.meta["top"].cpu().numpy())
                self._check_shape(node, value)
                if len(node.users) > 1 and value.border is None and value.kind in ("acc", "i32") and not value.plain:
                    value = self.lowering.potential(value, place(node))  # two readers: written once, read twice
            env[node] = value
        raise ExportError("the graph has no output.")

    def _output(self, value: Value) -> Value:
        return self.lowering.mean(self.lowering.potential(value, "output"), "time", "output")

    @staticmethod
    def _check_shape(node: Node, value: Value) -> None:
        sizes = node.meta["sizes"]
        pad = 2 * value.border[0] if value.border else 0
        found = (value.channels, value.height + pad, value.width + pad)
        expected = (sizes.get("C", 1), sizes.get("H", 1), sizes.get("W", 1))
        if found != expected:
            raise unknown(node, f"its result has [C, H, W] = {list(expected)}, the integer operation gives {list(found)}; "
                                "options such as ceil_mode, dilation or uneven adaptive pooling have no integer form")

    def _node(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.op == "placeholder":
            sizes = node.meta["sizes"]
            if self.regions:
                return Value("pixels", "real", np.ones(sizes["C"]), np.zeros(sizes["C"]), sizes["H"], sizes["W"], 1)
            return Value("pixels", "u8", 1 / (255 * self.pixel_std), -self.pixel_mean / self.pixel_std, sizes["H"], sizes["W"],
                         sizes.get("T", 1), (0, 255), pixels=True)
        if node.op == "get_attr":
            found: Any = self.module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        if node.op == "call_module":
            return self._module(node, self.module.get_submodule(str(node.target)), args[0])
        flat: list[Value] = []
        torch.fx.node.map_aggregate((args, kwargs), lambda x: flat.append(x) if isinstance(x, Value) else None)
        if any(x.kind == "real" for x in flat) and kind_of(node) not in ("same", "shape", "repeat"):
            raise unknown(node, "a head of regions must begin with its neuron")
        if not flat or node.target is getattr or node.target in ("size", "dim", "numel"):
            return self._constant(node, args, kwargs)
        return self._call(node, kind_of(node), flat, args, kwargs)

    @staticmethod
    def _constant(node: Node, args: Any, kwargs: Any) -> Any:
        """Things computed from parameters are computed now; things computed from shapes no operation needs."""
        if any(isinstance(a, Value) or a is None for a in args):
            return None
        call: Callable[..., Any] = getattr(type(args[0]), node.target) if isinstance(node.target, str) else node.target
        with torch.no_grad():
            return call(*args, **kwargs)

    def _module(self, node: Node, module: nn.Module, x: Value) -> Value:
        lowering, layer = self.lowering, place(node)
        if x.kind == "real" and not isinstance(module, (*NOTHING, IELIF)):
            raise ExportError(f"{layer}: {type(module).__name__} reads the features of regions themselves; a head of regions "
                              "must begin with an IELIF neuron, which makes them counts.")
        if isinstance(module, (*NOTHING, nn.Flatten)):
            return x
        if isinstance(module, (LIF, IELIF)):
            return lowering.neuron(module, x, layer)
        if isinstance(module, LayerScale):
            return lowering.affine(x, vector(module.weight.detach().cpu(), x.channels), np.zeros(1), layer)
        if isinstance(module, NORMS):
            return self._norm(module, x, layer)
        if isinstance(module, NormPad):
            border = module.border().detach().double().cpu().numpy()
            return replace(self._norm(module.norm, x, layer), border=(module.padding, border))
        if isinstance(module, (*CONVS, nn.Linear)):
            return self._layer(module, x, layer)
        assert isinstance(module, POOLS), module
        if isinstance(module, nn.Upsample):
            return self._upsample(node, x, {"mode": module.mode, "align_corners": module.align_corners})
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return self._adaptive(node, x)
        options = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
        return self._pool(node, "maxpool" if isinstance(module, nn.MaxPool2d) else "avgpool", x, options)

    def _call(self, node: Node, kind: str, flat: list[Value], args: Any, kwargs: Any) -> Value:
        x, layer = flat[0], place(node)
        if kind in ("same", "dropout", "shape", "repeat", "stack", "permute"):
            return x
        if kind in ("add", "sub", "mul", "div", "neg"):
            return self._arithmetic(node, kind, args)
        named = arguments(node, args, kwargs)
        if kind == "mean":
            return self._mean(node, x)
        if kind == "attention":
            q, k, v = named["q_TBCHW"], named["k_TBCHW"], named["v_TBCHW"]
            return self.lowering.attention(q, k, v, named["heads"], named["scale"], layer)
        if kind == "map":
            a, b = (named["q_TBCHW"], named["k_TBCHW"]) if named["product"] == "qk" else (named["v_TBCHW"], named["k_TBCHW"])
            return self.lowering.attention_map(a, b, named["product"], named["heads"], layer)
        if kind == "read":
            x = named["v_TBCHW"] if named["product"] == "qk" else named["q_TBCHW"]
            factor = named["strength_Th"].detach().double().cpu().numpy() * named["scale"]
            return self.lowering.attention_read(named["map_TBhXX"], x, factor, named["product"], named["heads"], layer)
        if kind == "coincidences":
            return self.lowering.coincidences(named["k_TBCHW"], named["v_TBCHW"], layer)
        if kind == "mask":
            return self.lowering.mask(named["q_TBCHW"], named["mask_TBC11"], layer)
        if kind in ("maxpool", "avgpool"):
            return self._pool(node, kind, x, named)
        if kind == "adaptive":
            return self._adaptive(node, x)
        if kind == "upsample":
            return self._upsample(node, x, named)
        if kind in ("conv", "linear"):
            weight, bias = named["weight"], named.get("bias")
            if not isinstance(weight, Tensor):
                raise unknown(node, "its weight is computed from the picture")
            if kind == "linear":
                return self.lowering.conv(x, None, self._linear_weight(weight, x), bias, (1, 1), (0, 0), 1, layer)
            padding = named.get("padding", 0)
            self._plain_conv(layer, named.get("dilation", 1), padding, "zeros")
            return self.lowering.conv(x, None, weight, bias, _pair(named.get("stride", 1)), _pair(padding),
                                      named.get("groups", 1), layer)
        raise unknown(node)

    # -------------------------------------------------------------------------------------- affine maps
    def _norm(self, norm: nn.Module, x: Value, layer: str) -> Value:
        assert isinstance(norm, NORMS)
        if norm.running_mean is None or norm.running_var is None:
            raise ExportError(f"{layer}: {type(norm).__name__} has no running statistics, so its result depends on the batch. "
                              "Create it with track_running_stats=True.")
        mean, var = norm.running_mean.double().cpu().numpy(), norm.running_var.double().cpu().numpy()
        g = 1 / np.sqrt(var + norm.eps)
        if norm.weight is not None:
            g = g * norm.weight.detach().double().cpu().numpy()
        h = -mean * g
        if norm.bias is not None:
            h = h + norm.bias.detach().double().cpu().numpy()
        return self.lowering.affine(x, g, h, layer)

    def _arithmetic(self, node: Node, kind: str, args: Any) -> Value:
        layer = place(node)
        values = [x for x in args if isinstance(x, Value)]
        if kind == "neg":
            return self.lowering.affine(values[0], np.array(-1.0), np.zeros(1), layer)
        if len(args) != 2:
            raise unknown(node, "it takes two operands and no option")
        if len(values) == 2:
            if kind not in ("add", "sub"):
                raise unknown(node, "a product of two activations; only spike_attention multiplies them")
            x, y = args
            return self.lowering.add(x, self.lowering.affine(y, -np.ones(1), np.zeros(1), layer) if kind == "sub" else y, layer)
        x = values[0]
        factor = self._per_channel(node, args[1] if isinstance(args[0], Value) else args[0], x)
        none = np.zeros(1)
        if kind == "add":
            return self.lowering.affine(x, np.ones(1), factor, layer)
        if kind == "mul":
            return self.lowering.affine(x, factor, none, layer)
        if not isinstance(args[0], Value):
            if kind == "div":
                raise unknown(node, "a constant divided by an activation")
            return self.lowering.affine(x, -np.ones(1), factor, layer)
        if kind == "sub":
            return self.lowering.affine(x, np.ones(1), -factor, layer)
        return self.lowering.affine(x, 1 / factor, none, layer)

    @staticmethod
    def _per_channel(node: Node, constant: Any, x: Value) -> Array:
        """A constant operand as a factor per channel."""
        tensor = torch.as_tensor(constant, dtype=torch.float64).detach().cpu()
        axes = node.meta["axes"]
        for i in range(tensor.dim()):
            if tensor.shape[-1 - i] > 1 and axes[-1 - i] != ("C",):
                raise unknown(node, f"a constant of shape {list(tensor.shape)} that varies along {'*'.join(axes[-1 - i])}; it "
                                    "may vary along the channels only")
        return vector(tensor.numpy(), x.channels)

    # --------------------------------------------------------------------------------- layers and pools
    def _layer(self, module: nn.Module, x: Value, layer: str) -> Value:
        """A Conv1d, Conv2d or Linear module."""
        assert isinstance(module, (*CONVS, nn.Linear))
        quantizer = quantizer_of(module)
        if quantizer is None and parametrize.is_parametrized(module, "weight"):
            raise ExportError(f"{layer}: its weight has a parametrization that is not one of bitspike's quantizers; remove "
                              "it (torch.nn.utils.parametrize.remove_parametrizations) or use quantize_.")
        codes = None
        if isinstance(module, nn.Linear):
            kernel = self._linear_weight(latent_weight(module), x)
            stride, padding, groups = (1, 1), (0, 0), 1
        else:
            self._plain_conv(layer, module.dilation, module.padding, module.padding_mode)
            stride, padding, groups = _pair(module.stride), _pair(module.padding), module.groups
            kernel = latent_weight(module)
            if isinstance(module, nn.Conv1d):
                kernel = kernel[..., None]
        if quantizer is not None:
            try:
                integers, scale = quantizer.codes(latent_weight(module).detach())
            except ValueError as error:  # a form that exists in training only, such as a third level of "binary"
                raise ExportError(f"{layer}: {error}") from None
            codes = Codes(integers.cpu().numpy().reshape(kernel.shape), vector(scale.double().cpu(), len(integers)),
                          {"kind": quantizer.deploys_as, "bits": quantizer.bits})
        return self.lowering.conv(x, codes, kernel, module.bias, stride, padding, groups, layer)

    @staticmethod
    def _linear_weight(weight: Tensor, x: Value) -> Tensor:
        """[O, C] or, after a flatten, [O, C*H*W] -> the kernel of a convolution over the whole picture."""
        return weight[..., None, None] if weight.shape[1] == x.channels else weight.reshape(-1, x.channels, x.height, x.width)

    @staticmethod
    def _plain_conv(layer: str, dilation: Any, padding: Any, mode: str) -> None:
        if _pair(dilation) != (1, 1) or isinstance(padding, str) or mode != "zeros":
            raise ExportError(f"{layer}: a convolution with dilation={dilation}, padding={padding!r}, "
                              f"padding_mode={mode!r} cannot be exported; allowed: dilation 1, numeric padding, padding_mode "
                              "'zeros'.")

    def _pool(self, node: Node, kind: str, x: Value, options: dict[str, Any]) -> Value:
        """Max or average pooling; options by torch's names."""
        kernel = _pair(options["kernel_size"])
        stride = _pair(options["stride"]) if options.get("stride") not in (None, [], ()) else kernel
        padding = _pair(options.get("padding", 0))
        if kind == "maxpool":
            if _pair(options.get("dilation", 1)) != (1, 1):
                raise unknown(node, "dilation has no integer form")
            return self.lowering.maxpool(x, kernel, stride, padding, place(node))
        if padding != (0, 0) or options.get("divisor_override") is not None:
            raise unknown(node, "average pooling with padding or a divisor of its own")
        return self.lowering.avgpool(x, kernel, stride, place(node))

    def _adaptive(self, node: Node, x: Value) -> Value:
        height, width = node.meta["sizes"]["H"], node.meta["sizes"]["W"]
        kernel = (x.height // height, x.width // width)
        if kernel[0] * height != x.height or kernel[1] * width != x.width:
            raise unknown(node, f"adaptive pooling of {x.height}x{x.width} pixels to {height}x{width}, which is not a divisor")
        return self.lowering.avgpool(x, kernel, kernel, place(node))

    def _upsample(self, node: Node, x: Value, options: dict[str, Any]) -> Value:
        """`interpolate` by a scale or to a size; what counts is the size that came out."""
        height, width, mode = node.meta["sizes"]["H"], node.meta["sizes"]["W"], options.get("mode", "nearest")
        if (height, width) == (x.height, x.width):
            return x
        factor = height // x.height
        if (factor * x.height, factor * x.width) != (height, width):
            raise unknown(node, f"it makes {height}x{width} pixels of {x.height}x{x.width}; one whole factor is needed")
        if mode not in ("nearest", "nearest-exact", "bilinear") or options.get("align_corners") or options.get("antialias"):
            raise unknown(node, f"mode {mode!r}, align_corners={options.get('align_corners')}; allowed: 'nearest', and "
                                "'bilinear' with align_corners=False")
        if mode == "bilinear" and factor & (factor - 1):
            raise unknown(node, f"bilinear by {factor}; allowed: 2, 4, 8, 16, 32")
        return self.lowering.upsample(x, "bilinear" if mode == "bilinear" else "nearest", factor, place(node))

    def _mean(self, node: Node, x: Value) -> Value:
        before, after = node.args[0].meta["axes"], node.meta["axes"]  # type: ignore[union-attr]
        gone = {name for group in before for name in group} - {name for group in after for name in group}
        if not gone <= {"T", "H", "W"} or len(gone & {"H", "W"}) == 1:
            raise unknown(node, f"a mean over {' and '.join(sorted(gone))}; it may be over space, time or both")
        if "H" in gone:
            x = self.lowering.mean(x, "space", place(node))
        return self.lowering.mean(x, "time", place(node)) if "T" in gone else x

