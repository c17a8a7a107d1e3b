"""From a picture to the network's input, as the artifact's header says. Pillow is imported when first needed."""
from __future__ import annotations

import os
import warnings
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


def _eight_bits(image: Image, name: str) -> Image:
    """A picture of 16 bits as one of 8: 257 of the first are 1 of the second. Pillow's own conversion would clip."""
    from PIL import Image as pillow

    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F" or low < 0 or high > 65535 or (image.mode == "I" and high < 256):
        raise ImageError(f"{name}: pixels of mode {image.mode!r}, values {low}..{high}, have no agreed brightness. Scale them "
                         "to 0..255 and save 8 bits per channel, or to 0..65535 and 16 bits")
    return pillow.fromarray(((pixels.astype(np.int32) + 128) // 257).astype(np.uint8))


def _opaque(image: Image) -> Image:
    """The picture on white, where parts of it are transparent."""
    from PIL import Image as pillow

    if "transparency" not in image.info and not image.mode.endswith(("A", "a")):
        return image
    return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image.convert("RGBA"))


def read_image(source: str | os.PathLike[str] | Image, input: Mapping[str, Any]) -> NDArray[np.uint8]:
    """One picture as uint8 `[H, W, C]`, C = 3 (RGB) or 1 (grey).

    It is turned upright where its EXIF data say how the camera was held; 16 bits per channel are scaled to 8; transparent
    pixels are put on white.

    Args:
        source: a file's path or a Pillow image.
        input: `net.header["input"]`: height, width, channels, and resize (shorter side before the centre crop; None
            stretches the picture).

    Raises:
        ImageError: the file is missing, is no picture, is too large, or its pixels are 32-bit or float numbers.

    >>> from PIL import Image
    >>> read_image(Image.new("RGB", (9, 7), (1, 2, 3)), {"height": 2, "width": 2, "channels": 3, "resize": 4})[0, 0].tolist()
    [1, 2, 3]
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    name = "the picture" if isinstance(source, pillow.Image) else os.fspath(source)
    height, width, channels = input["height"], input["width"], input["channels"]
    if channels not in (1, 3) or input.get("steps", 1) != 1:
        raise ImageError(f"{name}: this network reads {input.get('steps', 1)} frames of {channels} channels, no picture. Give "
                         "it event frames, uint8 [T, B, H, W, C]")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            image = source if isinstance(source, pillow.Image) else pillow.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
        image = _opaque(_eight_bits(ImageOps.exif_transpose(image), name)).convert("RGB" if channels == 3 else "L")
        if input["resize"] is not None:
            image = _fit(image, name, input["resize"], height, width)
        elif image.size != (width, height):
            image = image.resize((width, height), pillow.Resampling.BICUBIC)
    except ImageError:
        raise
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {error}. Make it smaller") from None
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        reason = f"{type(error).__name__}: {error}"
        raise ImageError(f"{name}: cannot be read as a picture ({reason}). Give a PNG or JPEG file") from None
    pixels = np.asarray(image, np.uint8)
    return pixels if channels == 3 else pixels[:, :, None]
