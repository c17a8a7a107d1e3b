"""A 4-bit segmenter on drawn streets: draw a data set, train, measure, save photo, truth and prediction side by side.

Takes about half a minute. `python examples/segment_drawings.py FOLDER [EPOCHS]` keeps the data, the run and the picture there.
"""
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from bitspike import load_run, train
from bitspike.data import load as load_data
from bitspike.evaluation import as_input, normalise
from bitspike.papers import find_recipe
from bitspike.tasks.segmentation import enlarged

HEIGHT, WIDTH = 96, 128
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, CAR = 0, 1, 2, 3, 4, 5, 6, 8  # class numbers of CamVid
COLOURS = {SKY: (150, 190, 235), BUILDING: (150, 110, 90), POLE: (190, 190, 180), ROAD: (95, 95, 100),
           PAVEMENT: (170, 160, 150), TREE: (60, 120, 50), SIGN: (200, 60, 40), CAR: (70, 60, 140)}


def street(seed: int) -> tuple[Image.Image, Image.Image]:
    """A drawn street and its label map."""
    draw = np.random.default_rng(seed)
    labels = Image.new("L", (WIDTH, HEIGHT), SKY)
    pen = ImageDraw.Draw(labels)
    horizon, vanish = int(draw.integers(40, 56)), int(draw.integers(44, 84))
    x = 0
    while x < WIDTH:
        w, h = int(draw.integers(14, 40)), int(draw.integers(8, 38))
        if abs(x + w / 2 - vanish) > 20:
            pen.rectangle([x, horizon - h, x + w, horizon + 8], fill=BUILDING)
        x += w
    pen.rectangle([0, horizon, WIDTH, HEIGHT], fill=PAVEMENT)
    pen.polygon([(vanish - 4, horizon), (vanish + 4, horizon), (WIDTH - 12, HEIGHT), (12, HEIGHT)], fill=ROAD)
    for _ in range(int(draw.integers(1, 4))):
        x, r = int(draw.choice([draw.integers(2, 36), draw.integers(92, 126)])), int(draw.integers(7, 15))
        pen.rectangle([x - 1, horizon - 6, x + 1, horizon + 14], fill=TREE)
        pen.ellipse([x - r, horizon - 8 - r, x + r, horizon - 4 + r], fill=TREE)
    for _ in range(int(draw.integers(1, 3))):
        depth = draw.uniform(0.25, 1)
        y, s = int(horizon + depth * 34), int(5 + 11 * depth)
        x = int(vanish + draw.uniform(-0.5, 0.5) * 70 * depth)
        pen.rectangle([x - s, y - s, x + s, y], fill=CAR)
    x = int(draw.choice([draw.integers(6, 30), draw.integers(98, 122)]))
    pen.rectangle([x - 1, horizon - 30, x + 1, horizon + 22], fill=POLE)
    pen.rectangle([x - 6, horizon - 36, x + 6, horizon - 26], fill=SIGN)
    index = np.asarray(labels)
    pixels = np.zeros((HEIGHT, WIDTH, 3))
    for label, colour in COLOURS.items():
        pixels[index == label] = np.array(colour) * draw.uniform(0.75, 1.25, 3)
    pixels += draw.normal(0, 9, pixels.shape) + 25 * np.linspace(-1, 1, HEIGHT)[:, None, None] * draw.uniform(-1, 1)
    photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return photo, labels


def write(root: Path) -> None:
    """The drawings in CamVid's layout."""
    for part, seeds in (("train", range(64)), ("val", range(1000, 1012))):
        for name in (part, f"{part}annot"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            photo, labels = street(seed)
            photo.save(root / part / f"{seed:04d}.png")
            labels.save(root / f"{part}annot" / f"{seed:04d}.png")
        (root / f"{part}.txt").write_text("".join(f"{part}/{s:04d}.png {part}annot/{s:04d}.png\n" for s in seeds))


def coloured(labels: np.ndarray) -> np.ndarray:
    """[H, W] of classes -> RGB."""
    table = np.zeros((256, 3), np.uint8)
    for label, colour in COLOURS.items():
        table[label] = colour
    return table[labels]


folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
epochs = float(sys.argv[2]) if len(sys.argv) > 2 else 6
write(folder / "camvid")
recipe = replace(find_recipe("qsd_transformer.camvid_small"), epochs=epochs, image_size=HEIGHT, warmup_epochs=1, ema=0.9,
                 model_options={"widths": (16, 32, 48, 64), "width": 32})
result = train(recipe, folder, folder / f"run_{epochs:g}")
assert result["test_pixel_accuracy"] > 50

model, _ = load_run(folder / f"run_{epochs:g}")
test = load_data("camvid", folder).test
rows = []
for i in range(3):
    picture = test.image(i)
    with torch.no_grad():
        logits = enlarged(model(as_input(normalise(picture[None], recipe))), HEIGHT, WIDTH)
    truth = test.target(i, HEIGHT, WIDTH)["semantic"].numpy()
    rows.append(np.hstack([picture.permute(1, 2, 0).numpy(), coloured(truth), coloured(logits[0].argmax(0).numpy())]))
Image.fromarray(np.vstack(rows)).resize((6 * WIDTH, 6 * HEIGHT), Image.Resampling.NEAREST).save(
    folder / "segmentation.png", optimize=True)
print(f"{folder / 'segmentation.png'}: photo, truth, prediction of a 4-bit network")
