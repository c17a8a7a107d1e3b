"""A segmenter or detector as a file beside the torch model it came from: the same answers, and milliseconds per picture.

    python benchmarks/scenes.py RUN FILE.bitspike DIR [PICTURES] [THREADS]

RUN: of the training. DIR: the data sets. Both get the same canvas, one picture at a time, and do everything up to pixels, or
boxes and masks, in the picture. Torch runs eagerly in float32. Times are medians over the pictures, of the best of five
interleaved runs.
"""
from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.utils import parametrize

from bitspike.checkpoints import load_run
from bitspike.data import load as load_data
from bitspike.deploy import Segmenter, load
from bitspike.exporting.dense import torch_labels, torch_logits
from bitspike.exporting.export import normalised
from bitspike.models.detection import in_picture


def main(run: str, file: str, data: str, pictures: int = 16, threads: int = 1) -> None:
    """Print one line."""
    torch.set_num_threads(threads)
    model, recipe = load_run(run)
    model.float().eval()
    net = load(file)
    split = load_data(recipe.data, data, None, recipe.skip_broken).split("test")
    mean, std = np.asarray(recipe.mean), np.broadcast_to(np.asarray(recipe.std), len(recipe.mean))
    ours, theirs = [], []
    held = parametrize.cached()  # torch quantizes its weights once, not for every picture
    held.__enter__()
    for i in np.linspace(0, len(split) - 1, min(pictures, len(split))).astype(int).tolist():
        scene = net.scene(np.ascontiguousarray(split.image(i).permute(1, 2, 0).numpy()))

        def deployed(scene=scene) -> None:
            if isinstance(net, Segmenter):
                net.labels(scene, threads)
            else:
                net.in_picture(net.detect(scene, threads), scene)

        @torch.inference_mode()
        def eager(scene=scene) -> None:
            x = normalised(scene.pixels[None], mean, std)
            size, original = torch.tensor(scene.size), torch.tensor(scene.original)
            if isinstance(net, Segmenter):
                torch_labels(torch_logits(model, x, net.windows), scene)
            else:
                in_picture(model.detect(x, [{"size": size}])[0], size, original)

        both: tuple[tuple[Callable[[], None], list[float]], ...] = ((deployed, []), (eager, []))
        for _ in range(6):
            for call, times in both:
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
        for (_, times), kept in zip(both, (ours, theirs), strict=True):
            kept.append(1e3 * min(times[1:]))
    held.__exit__(None, None, None)
    mine, torchs = statistics.median(ours), statistics.median(theirs)
    print(f"{recipe.name}: file {mine:.2f} ms a picture, torch eager {torchs:.2f} ms ({torchs / mine:.1f} x), "
          f"{threads} thread(s), {len(ours)} pictures, canvas {net.input_shape[0]} x {net.input_shape[1]}")


if __name__ == "__main__":
    main(*sys.argv[1:4], *(int(n) for n in sys.argv[4:6]))
