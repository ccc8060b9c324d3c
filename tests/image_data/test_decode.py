from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from image_data.decode import UnreadableImage, decode_image
from tests.image_data.samples import encode

GENERATOR = np.random.default_rng(0)
RGB = GENERATOR.integers(0, 256, (9, 13, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (9, 13), dtype=np.uint8)
ALPHA = GENERATOR.integers(0, 256, (9, 13), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(RGB).resize((50, 40), Image.Resampling.BICUBIC))


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return colour * share + 255 * (1 - share)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.dtype == np.uint8
    assert actual.flags.c_contiguous
    assert actual.flags.writeable
    assert actual.shape == expected.shape
    assert np.abs(actual - expected.astype(float)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_exact_in_lossless_formats(kind):
    assert_close(decode_image(encode(RGB, kind)), RGB, 0)


def test_lossless_webp_and_gif():
    assert_close(decode_image(encode(RGB, "WEBP", lossless=True)), RGB, 0)
    palette = Image.fromarray(RGB).quantize(16)
    assert_close(decode_image(encode(palette, "GIF")), np.asarray(palette.convert("RGB")), 0)


def test_rgba_is_composited_over_white():
    data = encode(np.dstack([RGB, ALPHA]))
    assert_close(decode_image(data), over_white(RGB, ALPHA), 0.51)


def test_grey_and_grey_with_alpha():
    three = np.dstack([GREY] * 3)
    assert_close(decode_image(encode(GREY)), three, 0)
    with_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    assert_close(decode_image(encode(with_alpha)), over_white(three, ALPHA), 0.51)


def test_palette_with_and_without_transparency():
    palette = Image.fromarray(RGB).quantize(8)
    colours = np.asarray(palette.convert("RGB"))
    assert_close(decode_image(encode(palette)), colours, 0)
    transparent = decode_image(encode(palette, transparency=3))
    hidden = np.asarray(palette) == 3
    assert hidden.any()
    assert (transparent[hidden] == 255).all()
    assert_close(transparent[~hidden], colours[~hidden], 0)


def test_colour_key_transparency_of_grey_and_rgb():
    key_value = int(GREY[0, 0])
    decoded = decode_image(encode(GREY, transparency=key_value))
    assert (decoded[key_value == GREY] == 255).all()
    assert (decoded[key_value != GREY, 0] == GREY[key_value != GREY]).all()
    colour = tuple(int(c) for c in RGB[2, 3])
    assert (decode_image(encode(RGB, transparency=colour))[2, 3] == 255).all()


def test_one_bit():
    bits = GREY > 127
    assert_close(
        decode_image(encode(Image.fromarray(GREY).point(lambda v: 255 * (v > 127), "1"))),
        np.dstack([bits * 255] * 3),
        0,
    )


def test_sixteen_bit_grey_is_divided_by_257():
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    decoded = decode_image(encode(Image.fromarray(values)))
    assert decoded[0, :, 0].tolist() == [round(v / 257) for v in values[0].tolist()] == [0, 0, 1, 1, 128, 255]
    assert (decoded == decoded[..., :1]).all()
    assert (decode_image(encode(Image.fromarray(values), "TIFF")) == decoded).all()


def test_jpeg_equals_pillow():
    for mode in ("RGB", "L"):
        data = encode(Image.fromarray(SMOOTH).convert(mode), "JPEG", quality=90)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert_close(decode_image(data), expected, 1)


def test_cmyk_jpeg():
    data = encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    decoded = decode_image(data)
    assert np.abs(decoded.astype(float) - SMOOTH).mean() < 8  # colours as before, not inverted


def test_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode_image(encode(SMOOTH, "JPEG", exif=exif)).shape == SMOOTH.shape


def test_first_frame_of_an_animation():
    second = Image.fromarray(255 - RGB)
    data = encode(Image.fromarray(RGB), "WEBP", save_all=True, append_images=[second], lossless=True)
    assert_close(decode_image(data), RGB, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_images_are_refused_by_name(kind, keep):
    data = encode(SMOOTH, kind)
    with pytest.raises(UnreadableImage, match=r"class/a\.img") as caught:
        decode_image(data[: int(keep * len(data))], "class/a.img")
    assert caught.value.name == "class/a.img"
    assert caught.value.reason


def test_harmless_defects_of_a_jpeg_are_read_as_pillow_does():
    data = encode(SMOOTH, "JPEG")
    assert_close(decode_image(data + b"trailing"), decode_image(data), 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
    ],
)
def test_what_is_not_an_image_is_described(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(data, "x")


def test_floating_point_images_are_refused_with_advice():
    with pytest.raises(UnreadableImage, match="convert"):
        decode_image(encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "x")


def test_error_survives_pickling_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "why")))
    assert (error.name, error.reason) == ("a.png", "why")
    assert "a.png" in str(error)
