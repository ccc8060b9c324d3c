"""The random parameters of a recipe's views, drawn for a whole batch at once.

What is drawn is a small program per image: one crop box, then a row of operation codes with one argument each, then a
flip flag. Both renderers (``fused.py`` and ``reference.py``) carry out the same program, so they can be compared pixel
by pixel.

Every number has a fixed slot of the image's key (``random_numbers.py``), whatever else the recipe holds, so a recipe
with one step more or less draws the same values for the steps that stay (an ablation compares like with like):

====== =====================================================================================================
slot   used for
====== =====================================================================================================
0-1    crop: left edge, top edge (of the random resized crop and of the random crop)
2-21   crop: attempt a of 10 takes its area from slot 2 + 2 a and its log ratio from slot 3 + 2 a
22     flip happens if below p; a shared flip reads it from the image's key of view 0, whatever the view
23     grayscale happens if below p
24     jitter happens if below p
25-28  jitter: sort keys of brightness, contrast, saturation, hue; the operation with the lowest key comes first
29-32  jitter: factors of brightness, contrast, saturation, hue
33     blur happens if below p
34     blur: sigma
35     solarize happens if below p
====== =====================================================================================================
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from image_data.random_numbers import image_keys, uniforms
from image_data.recipes import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    ResizeCenterCrop,
    Solarize,
    ToLab,
    ViewRecipe,
)

__all__ = [
    "BLUR",
    "BLUR_TRUNCATE",
    "BRIGHTNESS",
    "CONTRAST",
    "GRAY",
    "HUE",
    "NOTHING",
    "SATURATION",
    "SOLARIZE",
    "ViewParameters",
    "blur_radius",
    "center_crop_boxes",
    "draw_parameters",
    "padded_crop_boxes",
    "random_crop_boxes",
]

# Operation codes. Compiled kernels keep them in numba's on-disk cache: append, never renumber.
NOTHING, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SOLARIZE = range(8)

# Slots; see the table above.
_CROP_OFFSETS, _CROP_ATTEMPTS, _FLIP, _GRAY, _JITTER = 0, 2, 22, 23, 24
_JITTER_ORDER, _JITTER_FACTORS, _BLUR, _SIGMA, _SOLARIZE = 25, 29, 33, 34, 35
_HAPPENS = {GRAY: _GRAY, BLUR: _BLUR, SOLARIZE: _SOLARIZE}
_NUM_ATTEMPTS = 10  # torchvision's RandomResizedCrop.get_params

BLUR_TRUNCATE = 3.0  # standard deviations kept by the blur kernel, as OpenCV does for 8-bit images


class ViewParameters(NamedTuple):
    """The program of one view of each image of a batch.

    Attributes:
        boxes: float64 (B, 4), top, left, height, width in pixels of the image; the box becomes the whole view. It may
            reach out of the image if `crop_first` is False; what lies there is black.
        crop_first: True: crop, then resize (the resize filter stops at the box's edge); False: resize, then crop (the
            filter also reads the image around the box).
        codes: uint8 (B, M), operation codes in the order of execution; NOTHING entries are skipped.
        arguments: float32 (B, M): factor of BRIGHTNESS, CONTRAST, SATURATION, shift in turns of HUE, sigma of BLUR,
            threshold of SOLARIZE as a share of white.
        flips: bool (B,), mirror left and right.
    """

    boxes: np.ndarray
    crop_first: bool
    codes: np.ndarray
    arguments: np.ndarray
    flips: np.ndarray


def blur_radius(sigma: float, size: int) -> int:
    """Radius in pixels of the blur kernel: ceil(3 sigma), and less than the view's side so that it can be reflected.

    The kernel has 2 radius + 1 taps exp(-d^2 / (2 sigma^2)), normalised, and the border is reflected without repeating
    the
    edge: torchvision's ``gaussian_blur(kernel_size=2 * radius + 1, sigma)``. The official MoCo code uses Pillow's
    ``GaussianBlur(radius=sigma)``, three box filters that approximate the same Gaussian.
    """
    return min(math.ceil(BLUR_TRUNCATE * sigma), size - 1)


def center_crop_boxes(heights: np.ndarray, widths: np.ndarray, size: int, enlarge: float) -> np.ndarray:
    """Where Resize(round(size * enlarge)) followed by CenterCrop(size) reads, as one box per image; not random.

    The short side becomes round(size * enlarge) pixels, the long side is scaled alike and truncated, the crop's corner
    is rounded half to even: torchvision's rules.

    Args:
        heights: (B,) in pixels.
        widths: (B,) in pixels.
        size: side of the view in pixels.
        enlarge: at least 1.

    Returns:
        float64 (B, 4): top, left, height, width.
    """
    short = round(size * enlarge)
    sides = np.stack([heights, widths], axis=1).astype(np.int64)  # (B, 2)
    resized = sides * short // sides.min(axis=1, keepdims=True)
    corner = np.rint((resized - size) / 2.0)
    scale = sides / resized
    return np.concatenate([corner * scale, size * scale], axis=1)


def padded_crop_boxes(
    step: RandomCrop, heights: np.ndarray, widths: np.ndarray, size: int, keys: np.ndarray
) -> np.ndarray:
    """Where Resize((size, size)) followed by RandomCrop(size, padding=round(padding * size)) reads.

    Args:
        step: the padding.
        heights: (B,) in pixels.
        widths: (B,) in pixels.
        size: side of the view in pixels.
        keys: uint64 (B,).

    Returns:
        float64 (B, 4): top, left, height, width; as large as the image and shifted by whole pixels of the view.
    """
    border = round(step.padding * size)
    u_left, u_top = uniforms(keys, (_CROP_OFFSETS, _CROP_OFFSETS + 1))
    corners = np.floor(np.stack([u_top, u_left], axis=1) * (2 * border + 1)) - border  # (B, 2), pixels of the view
    sides = np.stack([heights, widths], axis=1).astype(np.float64)
    return np.concatenate([corners * sides / size, sides], axis=1)


def random_crop_boxes(step: RandomResizedCrop, heights: np.ndarray, widths: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Boxes of torchvision's RandomResizedCrop, whole pixels.

    Up to 10 attempts draw an area and a log ratio; the first that fits in the image is placed uniformly. If none fits:
    the largest centre crop whose ratio is in the range.

    Args:
        step: ranges of area and ratio.
        heights: (B,) in pixels.
        widths: (B,) in pixels.
        keys: uint64 (B,).

    Returns:
        float64 (B, 4): top, left, height, width.
    """
    height, width = heights.astype(np.float64), widths.astype(np.float64)
    crop_height, crop_width = np.zeros_like(height), np.zeros_like(width)
    log_low, log_high = math.log(step.ratio[0]), math.log(step.ratio[1])
    left_to_do = np.arange(len(keys))
    for attempt in range(_NUM_ATTEMPTS):
        slot = _CROP_ATTEMPTS + 2 * attempt
        u_area, u_ratio = uniforms(keys[left_to_do], (slot, slot + 1))
        area = height[left_to_do] * width[left_to_do] * (step.area[0] + (step.area[1] - step.area[0]) * u_area)
        ratio = np.exp(log_low + (log_high - log_low) * u_ratio)
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width[left_to_do]) & (h > 0) & (h <= height[left_to_do])
        chosen = left_to_do[fits]
        crop_height[chosen], crop_width[chosen] = h[fits], w[fits]
        left_to_do = left_to_do[~fits]
        if not len(left_to_do):
            break

    u_left, u_top = uniforms(keys, (_CROP_OFFSETS, _CROP_OFFSETS + 1))
    top = np.minimum(np.floor(u_top * (height - crop_height + 1)), height - crop_height)
    left = np.minimum(np.floor(u_left * (width - crop_width + 1)), width - crop_width)
    boxes = np.stack([top, left, crop_height, crop_width], axis=1)
    if len(left_to_do):
        boxes[left_to_do] = _largest_center_boxes(height[left_to_do], width[left_to_do], step.ratio)
    return boxes


def _largest_center_boxes(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The fallback of RandomResizedCrop: the whole image, cut down to the nearest allowed ratio, in the centre."""
    crop_height = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    crop_width = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    return np.stack([(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width], axis=1)


def _jitter_program(step: ColorJitter, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and arguments (B, 4) of the jitter in each image's own order."""
    low_high = []
    for strength in (step.brightness, step.contrast, step.saturation):
        low_high.append((max(0.0, 1.0 - strength), 1.0 + strength))
    low_high.append((-step.hue, step.hue))
    low, high = np.array(low_high).T
    used = np.array([step.brightness, step.contrast, step.saturation, step.hue]) > 0.0
    codes = np.where(used, np.array([BRIGHTNESS, CONTRAST, SATURATION, HUE]), NOTHING).astype(np.uint8)

    u = uniforms(
        keys, (_JITTER, *range(_JITTER_ORDER, _JITTER_ORDER + 4), *range(_JITTER_FACTORS, _JITTER_FACTORS + 4))
    ).T
    happens, order, factors = u[:, 0] < step.p, np.argsort(u[:, 1:5], axis=1), low + (high - low) * u[:, 5:9]
    ordered_codes = np.where(happens[:, None], codes[order], np.uint8(NOTHING))
    return ordered_codes, np.take_along_axis(factors, order, axis=1)


def _operation_program(
    step: ColorJitter | Grayscale | GaussianBlur | Solarize, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and arguments, each (B, number of operations), of one step that changes values."""
    match step:
        case ColorJitter():
            return _jitter_program(step, keys)
        case Grayscale():
            code, argument = GRAY, np.zeros((len(keys), 1))
        case GaussianBlur():
            low, high = step.sigma
            code, argument = BLUR, low + (high - low) * uniforms(keys, (_SIGMA,)).T
        case Solarize():
            code, argument = SOLARIZE, np.full((len(keys), 1), step.threshold)
    u = uniforms(keys, (_HAPPENS[code],)).T
    return np.where(u < step.p, np.uint8(code), np.uint8(NOTHING)), argument


def draw_parameters(
    recipe: ViewRecipe,
    heights: np.ndarray,
    widths: np.ndarray,
    size: int,
    seed: int,
    epoch: int,
    view: int,
    index: np.ndarray,
) -> ViewParameters:
    """Draw the program of one view for every image of a batch.

    Args:
        recipe: what to draw.
        heights: (B,) in pixels, each >= 1.
        widths: (B,) in pixels, each >= 1.
        size: side of the view in pixels.
        seed: the run's seed.
        epoch: the epoch.
        view: number of the view, so that two views with the same recipe differ.
        index: (B,), stable ids of the images.
    """
    keys = image_keys(seed, epoch, view, index)
    flips = np.zeros(len(keys), dtype=np.bool_)
    boxes, crop_first = np.zeros((len(keys), 4)), True
    codes: list[np.ndarray] = []
    arguments: list[np.ndarray] = []
    for step in recipe.steps:
        match step:
            case RandomResizedCrop():
                boxes = random_crop_boxes(step, heights, widths, keys)
            case ResizeCenterCrop():
                boxes, crop_first = center_crop_boxes(heights, widths, size, step.enlarge), False
            case RandomCrop():
                boxes, crop_first = padded_crop_boxes(step, heights, widths, size, keys), False
            case HorizontalFlip():
                flip_keys = image_keys(seed, epoch, 0, index) if step.shared else keys
                flips = uniforms(flip_keys, (_FLIP,))[0] < step.p
            case ToLab():
                pass  # a marker: the backbone converts
            case _:
                step_codes, step_arguments = _operation_program(step, keys)
                codes.append(step_codes)
                arguments.append(step_arguments)
    empty = np.zeros((len(keys), 0))
    return ViewParameters(
        boxes,
        crop_first,
        np.concatenate([*codes, empty], axis=1).astype(np.uint8),
        np.concatenate([*arguments, empty], axis=1).astype(np.float32),
        flips,
    )
