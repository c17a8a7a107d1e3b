"""Boxes, masks and segmentations over the picture they were found in. Pillow is imported when first needed."""
from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_STRENGTH = 0.45  # of a colour over the picture


def colour(index: int) -> tuple[int, int, int]:
    """A bright colour for a class, red, green, blue 0..255; neighbouring classes differ clearly.

    >>> colour(0), colour(0) == colour(1)
    ((242, 48, 48), False)
    """
    ring, turn = index // 8, index % 8
    hue = (turn * 3 % 8) / 8 + ring * 0.61803 / 8
    rgb = colorsys.hsv_to_rgb(hue % 1, 0.8 - 0.15 * (ring % 3), 0.95 - 0.15 * (ring % 2))
    return tuple(round(255 * part) for part in rgb)  # type: ignore[return-value]


def _over(pixels: NDArray[np.uint8], where: NDArray[Any], paint: NDArray[Any]) -> None:
    pixels[where] = np.rint((1 - _STRENGTH) * pixels[where] + _STRENGTH * paint).astype(np.uint8)


def _rgb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array(np.broadcast_to(picture, (*picture.shape[:2], 3)))


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner


def detections(picture: NDArray[np.uint8], found: Mapping[str, NDArray[Any]], classes: Sequence[str],
               least: float = 0.5) -> Image:
    """The picture uint8 `[H, W, C]` with the boxes, masks, names and scores of what was found with a score of `least` or more.

    The best ones are drawn last, on top.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont

    shown = [i for i in range(len(found["scores"])) if found["scores"][i] >= least][::-1]
    pixels = _rgb(picture)
    for i in shown:
        if "masks" in found:
            paint = np.array(colour(int(found["labels"][i])))
            _over(pixels, found["masks"][i], paint)
            pixels[_edge(found["masks"][i])] = paint
    image = pillow.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    size = max(10, min(image.size) // 28)
    font, width = ImageFont.load_default(size), max(1, min(image.size) // 200)
    for i in shown:
        x1, y1, x2, y2 = (float(v) for v in found["boxes"][i])
        paint_box = colour(int(found["labels"][i]))
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=paint_box, width=width)
        text = f"{classes[int(found['labels'][i])]} {float(found['scores'][i]):.0%}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x = max(0.0, min(x1, image.width - (right - left) - 4))
        y = y1 - (bottom - top) - 5 if y1 > bottom - top + 5 else y1
        draw.rectangle((x, y, x + right - left + 4, y + bottom - top + 5), fill=paint_box)
        draw.text((x + 2 - left, y + 2 - top), text, fill=_readable(paint_box), font=font)
    return image


def _readable(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white."""
    red, green, blue = background
    return (0, 0, 0) if 299 * red + 587 * green + 114 * blue > 140_000 else (255, 255, 255)


def segmentation(picture: NDArray[np.uint8], labels: NDArray[Any], classes: Sequence[str]) -> Image:
    """The picture uint8 `[H, W, C]` with the colour of its class over every pixel, and below it which colour is which class.

    Classes are listed by their share of the picture, as many as there is room for.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont

    counts = np.bincount(labels.reshape(-1), minlength=len(classes))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    pixels = _rgb(picture)
    palette = np.array([colour(k) for k in range(len(counts))])
    _over(pixels, np.ones(labels.shape, bool), palette[labels.reshape(-1)])
    height, width = labels.shape
    size = max(10, min(height, width) // 28)
    font = ImageFont.load_default(size)
    line, columns = size + 6, max(1, width // (11 * size))
    rows = min(-(-len(order) // columns), 6)
    image = pillow.new("RGB", (width, height + rows * line + 4), "white")
    image.paste(pillow.fromarray(pixels), (0, 0))
    draw = ImageDraw.Draw(image)
    for i, k in enumerate(order[: rows * columns]):
        x, y = (i % columns) * (width // columns) + 4, height + (i // columns) * line + 4
        draw.rectangle((x, y, x + size, y + size), fill=colour(k))
        draw.text((x + size + 4, y - 1), f"{classes[k]} {counts[k] / labels.size:.0%}", fill="black", font=font)
    return image
