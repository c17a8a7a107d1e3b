"""Golden files: where they are, what they hold, and the network their metadata describes."""
from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from bitspike.layers import quantize_
from bitspike.models.meta_spikeformer import MetaSpikeFormer, ielif, ielif_attention, lif, lif_attention, load_published
from bitspike.spec import QuantSpec, Scheme

FOLDER = Path(os.environ.get("BITSPIKE_GOLDEN") or Path(__file__).parents[2] / "../shared/golden")
# beginnings of `system`, lower case; the order matters where one is the beginning of another
NOT_BUILT = ("spikformer", "spike-driven transformer", "bestformer", "q-snn")


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


def build(golden: Golden) -> nn.Module:
    """The network of a file, with its weights, in evaluation mode. Errors: KeyError for a system nobody knows."""
    meta = golden.metadata
    quantized = golden.system.lower().startswith("qsd-transformer")
    if not quantized and not golden.system.lower().startswith(("meta-spikeformer", "sdt-v2")):
        raise KeyError(f"{golden.path.name}: unknown system {golden.system!r}")
    levels = int(meta.get("levels", 4))
    depth = int(meta["depth"])
    model = MetaSpikeFormer(
        widths=json.loads(meta["embed_dims"]),
        depths=(int(depth * 0.75), int(depth * 0.25)),
        heads=int(meta["num_heads"]),
        mlp_ratio=int(meta.get("mlp_ratio", 4)),
        num_classes=int(meta["num_classes"]),
        in_channels=golden.tensors["input"].shape[-3],
        time_steps=int(meta["time_steps"]),
        neuron=(lambda: ielif(levels)) if quantized else lif,
        attention_neuron=(lambda: ielif_attention(levels)) if quantized else lif_attention,
        attention_scale=float(meta.get("attention_scale", 0.25 if quantized else 0.125)),
        layer_scale=1e-6 if quantized else None,
    )
    bits = int(meta.get("bits", 32))
    if bits < 32:
        quantize_(model, QuantSpec({"*": Scheme("lsq", bits)}))
    return load_published(model, golden.part("state.")).eval()
