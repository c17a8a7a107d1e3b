"""From a picture to the network's input, as the artifact's header says. Pillow is imported when first needed."""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitspike.deploy.errors import ImageError
from bitspike.deploy.program import MAX_SIDE
from bitspike.deploy.tasks import Letterbox

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
    name = "the picture" if not isinstance(source, (str, os.PathLike)) else os.fspath(source)
    height, width, channels = input["height"], input["width"], input["channels"]
    if channels not in (1, 3) or input.get("steps", 1) != 1:
        raise ImageError(f"{name}: this network reads {input.get('steps', 1)} frames of {channels} channels, no picture. Give "
                         "it event frames, uint8 [T, B, H, W, C]")

    def fitted(image: Image) -> Image:
        from PIL import Image as pillow

        if input["resize"] is not None:
            return _fit(image, name, input["resize"], height, width)
        return image if image.size == (width, height) else image.resize((width, height), pillow.Resampling.BICUBIC)

    return _pixels(source, name, channels, fitted)


def _pixels(source: str | os.PathLike[str] | Image, name: str, channels: int,
            fitted: Callable[[Image], Image]) -> NDArray[np.uint8]:
    """The picture upright, opaque, of 8 bits and 3 or 1 channels, then `fitted`; uint8 `[H, W, C]`. Errors: ImageError."""
    from PIL import Image as pillow
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            image = source if isinstance(source, pillow.Image) else pillow.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{name}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
        image = _opaque(_eight_bits(ImageOps.exif_transpose(image), name)).convert("RGB" if channels == 3 else "L")
        pixels = np.asarray(fitted(image), np.uint8)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file") from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: {error}. Make it smaller") from None
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        reason = f"{type(error).__name__}: {error}"
        raise ImageError(f"{name}: cannot be read as a picture ({reason}). Give a PNG or JPEG file") from None
    return pixels if channels == 3 else pixels[:, :, None]


def open_picture(source: str | os.PathLike[str] | Image, channels: int = 3) -> NDArray[np.uint8]:
    """A whole picture as uint8 `[H, W, C]`: upright, opaque, 8 bits, as `read_image`. Errors: ImageError."""
    name = "the picture" if not isinstance(source, (str, os.PathLike)) else os.fspath(source)
    return _pixels(source, name, channels, lambda image: image)


@dataclass(frozen=True)
class Scene:
    """A picture as a program of any size reads it.

    pixels: uint8 `[H, W, C]`, padded; size: height and width of the part that is the picture; original: of the picture itself.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    original: tuple[int, int]


def letterbox(picture: NDArray[np.uint8], how: Letterbox) -> Scene:
    """Scale a picture `[H, W, C]` as evaluation in training does (Pillow's bilinear filter), and pad it.

    Errors: ImageError: it has no pixels, or too many after scaling.

    >>> scene = letterbox(np.zeros((30, 40, 3), np.uint8), Letterbox(short=15, long=0, multiple=8, border=(1, 2, 3)))
    >>> scene.size, scene.pixels.shape, scene.pixels[-1, 0].tolist()
    ((15, 20), (16, 24, 3), [1, 2, 3])
    """
    original = height, width = picture.shape[:2]
    if not height or not width:
        raise ImageError(f"a picture of {height} x {width} pixels has none")
    factor = how.short / min(original)
    if how.long:
        factor = min(factor, how.long / max(original))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    if size[0] * size[1] > MAX_PIXELS or max(size) > MAX_SIDE:
        raise ImageError(f"a picture of {height} x {width} pixels is too narrow for a shorter side of {how.short}")
    canvas = -(-size[0] // how.multiple) * how.multiple, -(-size[1] // how.multiple) * how.multiple
    if canvas[0] * canvas[1] > MAX_PIXELS:
        raise ImageError(f"a picture of {height} x {width} pixels takes {canvas[0]} x {canvas[1]} with its border; at most "
                         f"{MAX_PIXELS} pixels are allowed")
    return _placed(picture, size, canvas, how.border)


def on_canvas(picture: NDArray[np.uint8], height: int, width: int, border: Sequence[int]) -> Scene:
    """A picture `[H, W, C]` as large as fits into height x width pixels, at the top left of them."""
    factor = min(height / picture.shape[0], width / picture.shape[1])
    size = (min(height, max(1, round(picture.shape[0] * factor))), min(width, max(1, round(picture.shape[1] * factor))))
    return _placed(picture, size, (height, width), border)


def _placed(picture: NDArray[np.uint8], size: tuple[int, int], canvas: tuple[int, int], border: Sequence[int]) -> Scene:
    from PIL import Image as pillow

    original = (picture.shape[0], picture.shape[1])
    if size != original:
        grey = picture.shape[2] == 1
        image = pillow.fromarray(picture[:, :, 0] if grey else picture)
        picture = np.asarray(image.resize(size[::-1], pillow.Resampling.BILINEAR))
        picture = picture[:, :, None] if grey else picture
    pixels = np.empty((*canvas, picture.shape[2]), np.uint8)
    pixels[:] = np.array(border, np.uint8)
    pixels[: size[0], : size[1]] = picture
    return Scene(pixels, size, original)
