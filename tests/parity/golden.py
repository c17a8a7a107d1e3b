"""Golden files: where they are, what they hold, and the network their metadata describes."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from bitspike.layers import quantize_
from bitspike.models import bestformer, meta_spikeformer, spike_driven, spikformer, spiking_resnet
from bitspike.spec import QuantSpec, Scheme

FOLDER = Path(os.environ.get("BITSPIKE_GOLDEN") or Path(__file__).parents[2] / "../shared/golden")


@dataclass(frozen=True)
class Golden:
    path: Path

    @cached_property
    def metadata(self) -> dict[str, str]:
        with safe_open(str(self.path), "pt") as file:
            return dict(file.metadata() or {})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path)

    @property
    def system(self) -> str:
        """"" for a file of single pieces."""
        return self.metadata.get("system", "")

    @property
    def is_units(self) -> bool:
        with safe_open(str(self.path), "pt") as file:
            return not {"input"} & set(file.keys())

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix`, by the rest of their name."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def files() -> list[Golden]:
    return [Golden(path) for path in sorted(FOLDER.glob("*.safetensors"))]


# ------------------------------------------------------------------------------------------------- networks
def _sizes(golden: Golden) -> dict[str, Any]:
    """What the metadata of every transformer says."""
    meta = golden.metadata
    return {"mlp_ratio": int(meta.get("mlp_ratio", 4)), "num_classes": int(meta["num_classes"]),
            "in_channels": golden.tensors["input"].shape[-3], "time_steps": int(meta["time_steps"])}


def _pooling(golden: Golden) -> str:
    return golden.metadata.get("pooling", "1111" if "imagenet" in golden.system.lower() else "0011")


def _meta_spikeformer(golden: Golden) -> nn.Module:
    meta = golden.metadata
    quantized = golden.system.lower().startswith("qsd-transformer")
    levels = int(meta.get("levels", 4))
    depth = int(meta["depth"])
    model = meta_spikeformer.MetaSpikeFormer(
        widths=json.loads(meta["embed_dims"]),
        depths=(int(depth * 0.75), int(depth * 0.25)),
        heads=int(meta["num_heads"]),
        **_sizes(golden),
        neuron=(lambda: meta_spikeformer.ielif(levels)) if quantized else meta_spikeformer.lif,
        attention_neuron=(lambda: meta_spikeformer.ielif_attention(levels)) if quantized else meta_spikeformer.lif_attention,
        attention_scale=float(meta.get("attention_scale", 0.25 if quantized else 0.125)),
        layer_scale=1e-6 if quantized else None,
    )
    bits = int(meta.get("bits", 32))
    if bits < 32:
        quantize_(model, QuantSpec({"*": Scheme("lsq", bits)}))
    return meta_spikeformer.load_published(model, golden.part("state."))


def _spikformer(golden: Golden, shortcut: str) -> nn.Module:
    meta, state = golden.metadata, golden.part("state.")
    model = spikformer.Spikformer(
        int(meta["embed_dim"]), int(meta["depth"]), int(meta["num_heads"]), **_sizes(golden), shortcut=shortcut,
        pooling=_pooling(golden), qkv_bias=bool({"block.0.attn.q_linear.bias", "block.0.attn.q_conv.bias"} & state.keys()))
    return spikformer.load_published(model, state)


def _spike_driven(golden: Golden) -> nn.Module:
    meta = golden.metadata
    model = spike_driven.SpikeDrivenTransformer(int(meta["embed_dim"]), int(meta["depth"]), **_sizes(golden),
                                                pooling=_pooling(golden))
    return spike_driven.load_published(model, golden.part("state."))


def _bestformer(golden: Golden) -> nn.Module:
    meta = golden.metadata
    model = bestformer.BESTformer(
        int(meta["embed_dim"]), int(meta["depth"]), int(meta["num_heads"]), **_sizes(golden),
        product={"q k^T": "qk", "k^T v": "kv"}[meta["attention_map"]], pooling=_pooling(golden))
    bestformer.load_published(model, golden.part("state."))
    return quantize_(model, QuantSpec({"*": Scheme("binary", options={"zero": "published"}),
                                       "tokenizer.stages.0.conv": Scheme("full"), "head*": Scheme("full")}))


def _q_snn(golden: Golden) -> nn.Module:
    meta, state = golden.metadata, golden.part("state.")
    depths, width, kernel = json.loads(meta["layers"]), int(meta["stem_width"]), state["conv1.weight"].shape[-1]
    model = spiking_resnet.SpikingResNet(
        [width * 2 ** stage for stage in range(len(depths))], depths, int(meta["num_classes"]),
        in_channels=golden.tensors["input"].shape[-3], time_steps=int(meta["time_steps"]),
        stem=(kernel, 2 if kernel == 7 else 1), pool=kernel == 7)
    spiking_resnet.load_published(model, state)
    ends = Scheme("max", 8, per="tensor", options={"top": "signed"})
    return quantize_(model, QuantSpec({
        "*": Scheme("binary", options={"gradient": "ir_net", "scale": "pow2", "zero": "published"}),
        "stem.conv": ends, "head": ends,
        "*neuron*": Scheme("membrane", int(meta["membrane_bits"]), options={"scale": "batch"})}))


# ----------------------------------------------------------------------------------------------------- taps
@dataclass(frozen=True)
class Tap:
    """Where our network computes what the release's module returned: module, and its (input, output) -> the tensor."""

    module: str
    of: Callable[[Tensor, Any], Tensor] = lambda _input, output: output


def _tokens(x_TBCHW: Tensor) -> Tensor:
    return x_TBCHW.flatten(3).transpose(2, 3)


def _spikformer_tap(golden: Golden, name: str, shape: tuple[int, ...], shortcut: str) -> Tap:
    """The CIFAR code of Spikformer works on tokens [T, B, N, C], whatever shape its k and v neurons show."""
    module = spikformer.published_name(name, shortcut)
    channels = int(golden.metadata["embed_dim"])
    tokens = shortcut == "spike" and any(".q_linear." in key for key in golden.tensors)
    if tokens and (name == "patch_embed" or name.startswith("block")) and (
            name.endswith((".k_lif", ".v_lif")) or shape[-1] in (channels, 4 * channels)):
        return Tap(module, lambda _input, output: _tokens(output))
    return Tap(module)


def _spike_driven_tap(golden: Golden, name: str, shape: tuple[int, ...]) -> Tap:
    """A block and its attention return two tensors: v per head [T, B, heads, N, dim] is the one recorded last."""
    heads = int(golden.metadata["num_heads"])
    module = spike_driven.published_name(name)
    if shape[2] == heads and shape[2] * shape[4] == int(golden.metadata["embed_dim"]):
        v = module.removesuffix(".attn") + ".attn.v_neuron"
        return Tap(v, lambda _input, output: _tokens(output).unflatten(3, (heads, -1)).transpose(2, 3))
    if module.endswith((".attn", ".mlp")):  # the shortcut is inside of these modules there
        return Tap(module, lambda x, output: x + output)
    return Tap(module)


def _bestformer_tap(_golden: Golden, name: str, _shape: tuple[int, ...]) -> Tap:
    """Of a block's two streams the last is recorded."""
    return Tap(bestformer.published_name(name), lambda _input, output: output[-1] if isinstance(output, tuple) else output)


@dataclass(frozen=True)
class System:
    """One published system: how to build its network, find its taps and get its outputs."""

    build: Callable[[Golden], nn.Module]
    tap: Callable[[Golden, str, tuple[int, ...]], Tap]
    outputs: Callable[[Any, Tensor], tuple[Tensor, ...]] = lambda model, image: (model(image),)


_META = System(_meta_spikeformer, lambda _golden, name, _shape: Tap(meta_spikeformer.published_name(name)))
#: beginning of `system` in the metadata, lower case -> what it is
SYSTEMS = {
    "qsd-transformer": _META, "meta-spikeformer": _META, "sdt-v2": _META,
    "spikformer": System(partial(_spikformer, shortcut="spike"), partial(_spikformer_tap, shortcut="spike")),
    "spikingformer": System(partial(_spikformer, shortcut="membrane"), partial(_spikformer_tap, shortcut="membrane")),
    "spike-driven transformer": System(_spike_driven, _spike_driven_tap),
    "bestformer": System(_bestformer, _bestformer_tap, lambda model, image: model.forward_heads(image)),
    "q-snn": System(_q_snn, lambda _golden, name, _shape: Tap(spiking_resnet.published_name(name))),
}


def system(golden: Golden) -> System:
    """Errors: KeyError for a system nobody knows."""
    for beginning, known in SYSTEMS.items():
        if golden.system.lower().startswith(beginning):
            return known
    raise KeyError(f"{golden.path.name}: unknown system {golden.system!r}")


def build(golden: Golden) -> nn.Module:
    """The network of a file, with its weights, in evaluation mode. Errors: KeyError for a system nobody knows."""
    return system(golden).build(golden).eval()
