"""The same views as ``fused.py``, image by image with plain torchvision operations: slow, and the definition of what is
right.

Everything is done in float32 on [0, 1] and rounded once at the end, so the fused kernel must agree to one level.
"""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from image_data.contracts import ImageBuffer
from image_data.draws import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NOTHING,
    SATURATION,
    SOLARIZE,
    ViewParameters,
    blur_radius,
)

__all__ = ["reference_view", "reference_views"]


def _crop_resize(image: torch.Tensor, box: np.ndarray, crop_first: bool, size: int) -> torch.Tensor:
    """Antialiased bilinear crop and resize: (3, H, W) -> (3, size, size)."""
    top, left, height, width = (float(value) for value in box)
    if crop_first:
        corner_and_sides = [int(top), int(left), int(height), int(width)]
        return F.resized_crop(image, *corner_and_sides, size=[size, size], antialias=True)
    # The box stands for a resize of the whole image and a crop of whole pixels from it; `crop` pads with black.
    resized_sides = [round(image.shape[1] * size / height), round(image.shape[2] * size / width)]
    resized = F.resize(image, resized_sides, antialias=True)
    return F.crop(resized, round(top * size / height), round(left * size / width), size, size)


def _apply(image: torch.Tensor, code: int, argument: float) -> torch.Tensor:
    """One operation on a float image (3, S, S) in [0, 1]."""
    match code:
        case _ if code == BRIGHTNESS:
            return F.adjust_brightness(image, argument)
        case _ if code == CONTRAST:
            return F.adjust_contrast(image, argument)
        case _ if code == SATURATION:
            return F.adjust_saturation(image, argument)
        case _ if code == HUE:
            return F.adjust_hue(image, argument)
        case _ if code == GRAY:
            return F.rgb_to_grayscale(image, num_output_channels=3)
        case _ if code == BLUR:
            return F.gaussian_blur(image, [2 * blur_radius(argument, image.shape[-1]) + 1] * 2, [argument] * 2)
        case _ if code == SOLARIZE:
            return F.solarize(image, argument)
        case _:
            assert code == NOTHING, f"unknown operation code {code}"
            return image


def reference_view(image: np.ndarray, parameters: ViewParameters, row: int, size: int) -> np.ndarray:
    """Carry out row `row` of the parameters on one image.

    Args:
        image: uint8 (H, W, 3), RGB.
        parameters: of a batch.
        row: which image of the batch this is.
        size: side of the view in pixels.

    Returns:
        uint8 (3, size, size).
    """
    view = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0
    view = _crop_resize(view, parameters.boxes[row], parameters.crop_first, size)
    for code, argument in zip(parameters.codes[row].tolist(), parameters.arguments[row].tolist(), strict=True):
        view = _apply(view, code, argument)
    if parameters.flips[row]:
        view = F.horizontal_flip(view)
    return (view * 255.0).round().clamp(0.0, 255.0).to(torch.uint8).numpy()


def reference_views(images: ImageBuffer, parameters: ViewParameters, out: np.ndarray, first: int, last: int) -> None:
    """Fill rows first..last-1 of `out`, uint8 (B, 3, S, S)."""
    for row in range(first, last):
        start, height, width = int(images.offsets[row]), int(images.heights[row]), int(images.widths[row])
        pixels = images.pixels[start : start + height * width * 3].reshape(height, width, 3)
        out[row] = reference_view(pixels, parameters, row, out.shape[-1])
