"""The whole chain in one script: train a few steps, export, run the integers, compare. Takes under a minute."""
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitspike import export_model, load, load_run, train
from bitspike.data import load as load_data
from bitspike.papers.demo import RECIPES

recipe = replace(RECIPES["demo.four_bit"], epochs=1)
data = load_data(recipe.data, None)  # embedded: real pictures, no download
with tempfile.TemporaryDirectory() as folder:
    train(recipe, None, Path(folder) / "run")
    model, _ = load_run(Path(folder) / "run")

    def pictures(split, count):  # uint8 [N, H, W, 3]: the network has three input channels
        return data.split(split).images[:count].permute(0, 2, 3, 1).repeat(1, 1, 1, 3).contiguous().numpy()

    report = export_model(model, Path(folder) / "net.bitspike", mean=recipe.mean, std=recipe.std, image_size=28,
                          classes=data.classes, calibration_images=pictures("train", 256), name="example",
                          check_images=pictures("test", 300), min_agreement=0.9)
    print(report)

    net = load(Path(folder) / "net.bitspike")
    right = net(pictures("test", 1000)).argmax(1) == data.test.labels.numpy()
    print(f"{np.mean(right):.1%} of {len(right)} test pictures, on integers")
