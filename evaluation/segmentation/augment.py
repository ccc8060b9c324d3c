"""Training views of an image and its mask: scale, crop, flip, colours; everything drawn from one generator.

The steps of ``open-mmlab/mmsegmentation: configs/_base_/datasets/cityscapes.py``: the image is scaled by a factor, a
crop of fixed size is cut out (what is missing is padded: ignored in the mask, 0 in the normalised image), flipped with
probability 0.5, and its colours are distorted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from evaluation.segmentation.metric import IGNORED
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["View", "augment", "distort_colors", "normalize", "resize_short_side"]

CROP_TRIES = 10  # at a crop in which no class has more than ``max_class_share`` of the pixels
BRIGHTNESS = 32.0  # largest shift of the 8-bit values
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18.0 / 180.0  # of the circle; OpenCV, which mmsegmentation uses, counts hue from 0 to 180

_MEAN, _STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)


class View(NamedTuple):
    """How training images are cut.

    Attributes:
        size: (height, width) of the crop, pixels.
        short_side: that the image is resized to before it is scaled; 0 keeps the image's own.
        scale: range of the factor, uniform.
        max_class_share: crops in which one class fills more of the labelled pixels are drawn again (10 times at most);
            1 takes the first.
        distort: whether colours are distorted.
    """

    size: tuple[int, int]
    short_side: int = 0
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 1.0
    distort: bool = False


def normalize(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), RGB -> float32 (3, H, W), ImageNet-normalised."""
    return np.ascontiguousarray(((image.astype(np.float32) / 255 - _MEAN) / _STD).transpose(2, 0, 1))


def scaled_size(shape: tuple[int, ...], short_side: int, factor: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image whose short side is brought to a length (0 keeps it) and then scaled."""
    height, width = shape[:2]
    factor *= short_side / min(height, width) if short_side else 1.0
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_short_side(image: np.ndarray, short_side: int) -> np.ndarray:
    """A whole image for scoring: uint8 (H, W, 3) with another short side; 0 keeps it."""
    height, width = scaled_size(image.shape, short_side)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def augment(image: np.ndarray, mask: np.ndarray, view: View, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One training view.

    Args:
        image: uint8 (H, W, 3), RGB.
        mask: uint8 (H, W), classes or ``IGNORED``.
        view: crop, scales, colours.
        rng: all random numbers come from here.

    Returns:
        float32 (3, h, w), ImageNet-normalised, and uint8 (h, w), both of ``view.size``.
    """
    scaled = scaled_size(mask.shape, view.short_side, rng.uniform(*view.scale))
    labels, corner = _crop_labels(mask, scaled, view, rng)
    picture = _cut_image(image, scaled, corner, labels.shape)
    if rng.random() < 0.5:
        picture, labels = picture[:, ::-1], labels[:, ::-1]
    if view.distort:
        picture = distort_colors(np.ascontiguousarray(picture), rng)
    missing = [(0, whole - part) for whole, part in zip(view.size, labels.shape, strict=True)]
    pixels = np.pad(normalize(picture), [(0, 0), *missing])
    return pixels, np.pad(labels, missing, constant_values=IGNORED)


def _crop_labels(
    mask: np.ndarray, scaled: tuple[int, int], view: View, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """The labels of a crop and its upper left corner in the scaled image."""
    size = min(view.size[0], scaled[0]), min(view.size[1], scaled[1])
    labels, corner = np.zeros((0, 0), np.uint8), (0, 0)
    for _ in range(CROP_TRIES + 1):
        corner = int(rng.integers(scaled[0] - size[0] + 1)), int(rng.integers(scaled[1] - size[1] + 1))
        labels = _cut_mask(mask, scaled, corner, size)
        if view.max_class_share >= 1 or _largest_share(labels) < view.max_class_share:
            break
    return labels, corner


def _largest_share(labels: np.ndarray) -> float:
    """Of the labelled pixels, the share of the most frequent class; 1 where there are none."""
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def _cut_image(
    image: np.ndarray, scaled: tuple[int, int], corner: tuple[int, int], size: tuple[int, ...]
) -> np.ndarray:
    """A crop of the resized image (bilinear, antialiased), without resizing the rest of it.

    Args:
        image: uint8 (H, W, 3).
        scaled: (height, width) that the whole image would be resized to.
        corner: (top, left) of the crop in the resized image.
        size: (height, width) of the crop.
    """
    height, width = image.shape[:2]
    down, across = height / scaled[0], width / scaled[1]
    top, left = corner
    box = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
    # Rounding must not put an edge outside of the image, which Pillow refuses.
    box = (box[0], box[1], min(box[2], float(width)), min(box[3], float(height)))
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box))


def _cut_mask(mask: np.ndarray, scaled: tuple[int, int], corner: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """The same crop of the mask (H, W): the label at the centre of each pixel."""
    rows, columns = (
        np.minimum(((first + np.arange(count) + 0.5) * own / whole).astype(np.int64), own - 1)
        for first, count, own, whole in zip(corner, size, mask.shape, scaled, strict=True)
    )
    return mask[rows[:, None], columns]


def distort_colors(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 0.5 (Liu et al., SSD, as in mmsegmentation).

    Contrast comes before or after the two steps in HSV, each with probability 0.5; values are rounded to 8 bits between
    the steps.

    Args:
        image: uint8 (H, W, 3), RGB.
        rng: generator.

    Returns:
        uint8 (H, W, 3).
    """
    chosen, contrast_first = rng.random(4) < 0.5, rng.random() < 0.5
    shift, hue = rng.uniform(-BRIGHTNESS, BRIGHTNESS), rng.uniform(-HUE, HUE)
    contrast, saturation = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    contrast = contrast if chosen[1] else 1.0
    image = _scale(image, contrast if contrast_first else 1.0, shift if chosen[0] else 0.0)
    if chosen[2] or chosen[3]:
        image = _shift_hsv(image, hue if chosen[3] else 0.0, saturation if chosen[2] else 1.0)
    return _scale(image, 1.0 if contrast_first else contrast, 0.0)


def _scale(values: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """(values + shift) * factor in 8 bits, both steps clipped."""
    if factor == 1.0 and shift == 0.0:
        return values
    table = np.clip(np.arange(256) + shift, 0, 255).astype(np.uint8)
    return np.clip(table * np.float64(factor), 0, 255).astype(np.uint8)[values]


def _shift_hsv(image: np.ndarray, hue: float, saturation: float) -> np.ndarray:
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    turn = np.int64(round(256 * hue))
    hsv[..., 0] = ((np.arange(256) + turn) % 256).astype(np.uint8)[hsv[..., 0]]
    hsv[..., 1] = _scale(hsv[..., 1], saturation, 0.0)
    return np.asarray(Image.frombytes("HSV", (image.shape[1], image.shape[0]), hsv.tobytes()).convert("RGB"))
