"""Encoded bytes of any common image format to RGB, by one stated rule.

The rule, the same everywhere (verification, streams, evaluation):

- JPEG is decoded by simplejpeg (libjpeg-turbo); what its strict mode refuses, and CMYK, is left to Pillow, so that
  the same files are readable as with torchvision's ``ImageFolder``.
- Transparency of any kind (RGBA, LA, palette or colour-key transparency) is composited over white.
- Grey, palette, 1-bit, CMYK, YCbCr, HSV and Lab are converted by Pillow.
- 16-bit grey is divided by 257, so that 65535 becomes 255. Of 16-bit colour Pillow delivers the high byte.
- EXIF orientation and colour profiles are not applied, as in ``ImageFolder``; of an animation the first frame counts.
- Only raster formats are opened: never one whose decoder starts another program (EPS, WMF).
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image

from image_data.contracts import DataError

__all__ = ["IMAGE_EXTENSIONS", "MAX_PIXELS", "UnreadableImage", "decode_image"]

# What a folder or a tar shard is searched for; the decoder looks at the content, not at the name.
IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".qoi"}
)
# Without TGA: it has no signature, so that damaged files of other formats would pass as TGA.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "ICO")

MAX_PIXELS = 178_956_970  # where Pillow too refuses an image as a decompression bomb: 1/2 GiB of RGB

# Pillow's decoders have no common base class of errors.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(DataError):
    """Bytes that are not an image that can be read completely.

    Attributes:
        name: the image's name in its source.
        reason: what the decoder said.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image {name or '(no name)'}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return UnreadableImage, (self.name, self.reason)


def decode_image(data: bytes, name: str = "") -> np.ndarray:
    """Decodes one image by the rule in the module's docstring; releases the GIL for most of its time.

    Args:
        data: the encoded bytes of the file.
        name: said in the error.

    Returns:
        uint8 (H, W, 3), RGB, C-contiguous and writable.

    Raises:
        UnreadableImage: empty, not an image, truncated, damaged, or larger than ``MAX_PIXELS``.
    """
    if not data:
        raise UnreadableImage(name, "empty file (0 bytes)")
    if data[:3] == b"\xff\xd8\xff":
        pixels = _decode_jpeg(data, name)
        if pixels is not None:
            return pixels
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _to_rgb(image)
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(name, _describe(data)) from error
    except _DECODER_ERRORS as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def _decode_jpeg(data: bytes, name: str) -> np.ndarray | None:
    """RGB of a JPEG, or None where simplejpeg refuses and Pillow decides: CMYK, or a defect that libjpeg warns of."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if int(height) * int(width) > MAX_PIXELS:
            raise UnreadableImage(name, f"{width} x {height} pixels, more than the {MAX_PIXELS:,} allowed")
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except UnreadableImage:
        raise
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """The first frame of an opened image as uint8 (H, W, 3)."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating point pixels have no defined range; convert them to 8 or 16 bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over_white(image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _over_white(image: Image.Image) -> np.ndarray:
    if image.mode == "La":  # Pillow converts premultiplied grey only to LA
        image = image.convert("LA")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return np.array(canvas)


def _describe(data: bytes) -> str:
    """What bytes that no decoder knows look like: the first question of whoever reads the error."""
    head = data[:64].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return f"not an image but HTML, XML or SVG text ({len(data)} bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "not an image but a Git LFS pointer: run 'git lfs pull'"
    return f"not an image in a known format ({len(data)} bytes, first bytes {data[:8].hex(' ')})"
