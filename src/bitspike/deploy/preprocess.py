"""From a picture to the network's input, as the artifact's header says. Pillow is imported when first needed."""
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000  # of a picture, before and after resizing


def _fit(image: Image, name: str, resize: int, height: int, width: int) -> Image:
    """Shorter side to `resize` (bicubic), then the centre height x width: torchvision's Resize and CenterCrop."""
    from PIL import Image as pillow

    short, long = sorted(image.size)
    longer = int(resize * long / short)
    if resize * longer > MAX_PIXELS:
        raise ImageError(f"{name}: {image.width} x {image.height} pixels is too narrow for a shorter side of {resize}")
    size = (resize, longer) if image.width <= image.height else (longer, resize)
    if size != image.size:
        image = image.resize(size, pillow.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def read_image(source: str | os.PathLike[str] | Image, input: Mapping[str, Any]) -> NDArray[np.uint8]:
    """One picture as uint8 `[H, W, C]`, C = 3 (RGB) or 1 (grey).

    Args:
        source: a file's path or a Pillow image.
        input: `net.header["input"]`: height, width, channels, and resize (shorter side before the centre crop; None
            stretches the picture).

    Raises:
        ImageError: the file is missing, is no picture, or is too large.

    >>> from PIL import Image
    >>> read_image(Image.new("RGB", (9, 7), (1, 2, 3)), {"height": 2, "width": 2, "channels": 3, "resize": 4})[0, 0].tolist()
    [1, 2, 3]
    """
    from PIL import Image as pillow

    name = "the picture" if isinstance(source, pillow.Image) else os.fspath(source)
    height, width, channels = input["height"], input["width"], input["channels"]
    try:
        image = source if isinstance(source, pillow.Image) else pillow.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
        image = image.convert("RGB" if channels == 3 else "L")
        if input["resize"] is not None:
            image = _fit(image, name, input["resize"], height, width)
        elif image.size != (width, height):
            image = image.resize((width, height), pillow.Resampling.BICUBIC)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        reason = f"{type(error).__name__}: {error}"
        raise ImageError(f"{name}: cannot be read as a picture ({reason}). Give a PNG or JPEG file") from None
    pixels = np.asarray(image, np.uint8)
    return pixels if channels == 3 else pixels[:, :, None]
