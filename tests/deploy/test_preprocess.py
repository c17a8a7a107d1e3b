from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitspike.deploy import ImageError, read_image

CROP = {"height": 8, "width": 6, "channels": 3, "resize": 10}


@pytest.mark.parametrize("size", [(6, 8), (10, 10), (31, 17), (17, 31), (1, 1), (500, 7)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
def test_shape_and_type_of_any_picture(size, mode, tmp_path: Path):
    image = Image.new(mode, size)
    for channels in (1, 3):
        for resize in (10, None):
            pixels = read_image(image, {**CROP, "channels": channels, "resize": resize})
            assert pixels.shape == (8, 6, channels) and pixels.dtype == np.uint8


def test_crop_is_the_centre(tmp_path: Path):
    picture = np.zeros((10, 20, 3), np.uint8)
    picture[1:9, 7:13] = np.random.default_rng(0).integers(0, 256, (8, 6, 3))
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", CROP), picture[1:9, 7:13])


def test_no_resize_is_exact():
    picture = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    np.testing.assert_array_equal(read_image(Image.fromarray(picture), {**CROP, "resize": None}), picture)


def test_same_as_torchvision_sizes():
    # Resize(10) of 17 x 31: shorter side 10, longer int(10 * 31 / 17) = 18
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 17, 3)).astype(np.uint8))
    whole = np.asarray(picture.resize((10, 18), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(read_image(picture, CROP), whole[5:13, 2:8])


@pytest.mark.parametrize("content", [None, b"", b"not a picture", b"\x89PNG\r\n\x1a\n\0\0", b"\xff\xd8\xff\xe0"])
def test_unreadable_pictures_are_named(content, tmp_path: Path):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=r"bad\.png"):
        read_image(path, CROP)


def test_truncated_and_too_narrow(tmp_path: Path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.png"):
        read_image(path, CROP)
    with pytest.raises(ImageError, match="narrow"):
        read_image(Image.new("L", (1, 60_000)), {**CROP, "height": 256, "width": 256, "resize": 256})


WHOLE = {"height": 3, "width": 4, "channels": 1, "resize": None}


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(ending, tmp_path: Path):
    eight = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    path = tmp_path / f"deep.{ending}"
    Image.fromarray(eight.astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(read_image(path, WHOLE)[:, :, 0], eight)


@pytest.mark.parametrize("pixels", [np.full((3, 4), 0.5, np.float32), np.full((3, 4), 70_000, np.int32),
                                    np.full((3, 4), -1, np.int32), np.full((3, 4), 9, np.int32)])
def test_numbers_that_are_no_brightness_are_refused(pixels):
    with pytest.raises(ImageError, match="save 8 bits"):
        read_image(Image.fromarray(pixels), WHOLE)


def test_the_camera_may_lie_on_its_side(tmp_path: Path):
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", WHOLE)[:, :, 0], upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode, tmp_path: Path):
    clear = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    clear.putpixel((1, 2), (10, 10, 10, 255))
    clear.convert(mode).save(tmp_path / "a.png")
    expected = np.full((3, 4), 255)
    expected[2, 1] = 10
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", WHOLE)[:, :, 0], expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("limit", [100, 40])  # Pillow warns above its limit and refuses above twice that
def test_what_pillow_takes_for_a_bomb(limit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("L", (11, 11)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=r"bomb\.png: Image size \(121 pixels\)"):
        read_image(tmp_path / "bomb.png", WHOLE)
