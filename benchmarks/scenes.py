"""A segmenter or detector as a file beside the torch model it came from: the same answers, and milliseconds per picture.

    python benchmarks/scenes.py RUN FILE.bitspike DIR [PICTURES] [THREADS]

RUN: of the training. DIR: the data sets. All get the same canvas, one picture at a time, and do everything up to pixels, or
boxes and masks, in the picture. Torch runs eagerly in float32: the network of RUN, its low-bit weights held ready as floats,
and its float twin: the weights before quantization, IE-LIF neurons as the clipped linear units that they round. The twin is
not trained so, it is there for its time; the objects that each finds are counted, since masks take time. Times are medians
over the pictures, of the best of five interleaved runs.
"""
from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bitspike.checkpoints import load_run
from bitspike.data import load as load_data
from bitspike.deploy import Segmenter, load
from bitspike.exporting.dense import torch_labels, torch_logits
from bitspike.exporting.export import normalised
from bitspike.models.detection import in_picture
from bitspike.neurons import IELIF


class Clipped(nn.Module):
    """What an IE-LIF neuron rounds: clip(gain x, 0, D) * scale."""

    def __init__(self, neuron: IELIF) -> None:
        super().__init__()
        self.most, self.slope = neuron.levels / neuron.gain, neuron.gain * neuron.scale

    def forward(self, x: Tensor) -> Tensor:
        y = x.clamp(0, self.most)
        return y if self.slope == 1 else y.mul_(self.slope)


def float_twin(twin: nn.Module) -> nn.Module:
    """The network with float weights and without rounding, in place (a copy would share the classes that torch makes of
    quantized layers). Errors: ValueError for neurons that spike over time.
    """
    for module in list(twin.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        for name, child in list(module.named_children()):
            if isinstance(child, IELIF) and child.decay is None:
                setattr(module, name, Clipped(child))
    spiking = [name for name, module in twin.named_modules() if type(module).__module__ == "bitspike.neurons"]
    if spiking:
        raise ValueError(f"{spiking[0]} has no float form: only IE-LIF neurons without carry-over have one.")
    return twin.float().eval()


def main(run: str, file: str, data: str, pictures: int = 16, threads: int = 1) -> None:
    """Print one line."""
    torch.set_num_threads(threads)
    model, recipe = load_run(run)
    model.float().eval()
    twin = float_twin(load_run(run)[0])
    net = load(file)
    split = load_data(recipe.data, data, None, recipe.skip_broken).split("test")
    mean, std = np.asarray(recipe.mean), np.broadcast_to(np.asarray(recipe.std), len(recipe.mean))
    ways = ("file", "torch", "float twin")
    medians: dict[str, list[float]] = {way: [] for way in ways}
    objects: dict[str, list[int]] = {way: [] for way in ways}
    held = parametrize.cached()  # torch quantizes its weights once, not for every picture
    held.__enter__()
    for i in np.linspace(0, len(split) - 1, min(pictures, len(split))).astype(int).tolist():
        scene = net.scene(np.ascontiguousarray(split.image(i).permute(1, 2, 0).numpy()))

        def deployed(scene=scene) -> int:
            if isinstance(net, Segmenter):
                return int(net.labels(scene, threads).size > 0)
            return len(net.in_picture(net.detect(scene, threads), scene)["boxes"])

        @torch.inference_mode()
        def eager(network: nn.Module, scene=scene) -> int:
            x = normalised(scene.pixels[None], mean, std)
            size, original = torch.tensor(scene.size), torch.tensor(scene.original)
            if isinstance(net, Segmenter):
                return int(torch_labels(torch_logits(network, x, net.windows), scene).size > 0)
            return len(in_picture(network.detect(x, [{"size": size}])[0], size, original)["boxes"])

        calls: dict[str, Callable[[], int]] = {"file": deployed, "torch": lambda: eager(model),
                                               "float twin": lambda: eager(twin)}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(6):
            for way in ways:
                began = time.perf_counter()
                found = calls[way]()
                times[way].append(time.perf_counter() - began)
                if len(times[way]) == 1:
                    objects[way].append(found)
        for way in ways:
            medians[way].append(1e3 * min(times[way][1:]))
    held.__exit__(None, None, None)
    ms = {way: statistics.median(medians[way]) for way in ways}
    canvas = f"{net.input_shape[0]} x {net.input_shape[1]}"
    print(f"{recipe.name}: " + ", ".join(
        f"{way} {ms[way]:.2f} ms" + (f" ({ms[way] / ms['file']:.1f} x)" if way != "file" else "")
        + ("" if isinstance(net, Segmenter) else f" for {statistics.mean(objects[way]):.1f} objects") for way in ways)
        + f" a picture; {threads} thread(s), {len(medians['file'])} pictures, canvas {canvas}")


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(n) for n in sys.argv[4:6]))
