"""Run by .ci/run in an environment that holds the base install only: classify pictures without torch.

    python base_install.py
"""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import bitspike
from bitspike.deploy import ArtifactError, artifact, kernels, load
from bitspike.deploy.runtime import builtin_names

for package in ("torch", "torchvision", "timm", "accelerate", "safetensors"):
    assert importlib.util.find_spec(package) is None, f"{package} came with the base install"

# a network of one convolution: the mean of each colour
tensors = {"w": artifact.pack_codes(np.eye(3, dtype=int).reshape(3, 1, 1, 3), {"kind": "uniform", "bits": 2}),
           "m": np.full(3, 256, np.int32), "b": np.zeros(3, np.int32)}
program = [{"op": "conv", "in": ["pixels"], "out": "x", "layer": "stem", "weight": "w", "shape": [3, 3, 1, 1],
            "scheme": {"kind": "uniform", "bits": 2}, "stride": [1, 1], "padding": [0, 0], "groups": 1, "m": "m", "s": 0,
            "b": "b", "range": [0, 255]},
           {"op": "mean", "in": ["x"], "out": "logits", "over": "space", "m": 1}]
artifact.write("colours.bitspike", {
    "name": "mean colour", "input": {"height": 8, "width": 8, "channels": 3, "resize": None},
    "classes": ["red", "green", "blue"], "time_steps": 1, "fraction_bits": 8, "program": program, "output": "logits",
    "provenance": {}}, tensors)
Image.new("RGB", (40, 30), (10, 220, 30)).save("photo.png")

names = ["colours.bitspike", *builtin_names()]
assert len(kernels.available()) >= 2, f"the compiled extension is missing: {kernels.available()}"
for name in names:
    net = load(name)
    images = np.random.default_rng(0).integers(0, 256, (5, *net.input_shape), np.uint8)
    expected = net(images)
    for isa in kernels.available():
        kernels.use(isa)
        assert np.array_equal(net(images), expected), isa
    done = subprocess.run(["bitspike", "run", name, "photo.png", "--json"], capture_output=True, text=True, check=True)
    print(name, json.loads(done.stdout)[0]["top"][0])
    subprocess.run(["bitspike", "profile", name], capture_output=True, check=True)

# segmenters and detectors: what is where, drawn over the picture
sys.path.insert(0, str(Path(__file__).resolve().parent / "deploy"))
import small_scenes  # noqa: E402

for kind, make in small_scenes.ALL.items():
    artifact.write(f"{kind}.bitspike", *make())
    command = ["bitspike", "run", f"{kind}.bitspike", "photo.png", "--json", "--save", f"{kind}.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(kind, str(json.loads(done.stdout)[0])[:100])
    assert Image.open(f"{kind}.png").width == 40
    subprocess.run(["bitspike", "profile", f"{kind}.bitspike"], capture_output=True, check=True)

try:
    load("photo.png")
    sys.exit("a picture was taken for a network")
except ArtifactError as error:
    print("as it should:", error)
done = subprocess.run(["bitspike", "train", "demo.float", "--out", "run"], capture_output=True, text=True)
assert done.returncode == 2 and "pip install 'bitspike[train]'" in done.stderr, done.stderr
print("bitspike", bitspike.__version__, "in", Path(bitspike.__file__).parent, kernels.available())
