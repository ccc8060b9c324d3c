"""The records that cross the door of ``image_data``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "SPLITS", "DataError", "ImageBatch", "ImageBuffer"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; torchvision's constants
IMAGENET_STD = (0.229, 0.224, 0.225)

# Images of the base classes, then the classes that pretraining never sees.
SPLITS = ("train", "val", "test", "val_classes", "novel_classes")


class DataError(ValueError):
    """Bad input data or a bad data URI: says what was given, what is allowed and how to fix it."""


class ImageBatch(NamedTuple):
    """What a stream delivers to one worker.

    Attributes:
        views: one uint8 array (B, 3, H, W) per view, RGB, C-contiguous.
        labels: int64 (B,).
        index: int64 (B,), stable id of the image in its split.
        epoch: the epoch whose random numbers made these views.
    """

    views: list[np.ndarray]
    labels: np.ndarray
    index: np.ndarray
    epoch: int


@dataclass(frozen=True)
class ImageBuffer:
    """Decoded images of any sizes in one flat buffer.

    Attributes:
        pixels: uint8 (total bytes,), image i is ``pixels[offsets[i]:].reshape(heights[i], widths[i], 3)``, RGB.
        offsets: int64 (N,), in bytes.
        heights: int32 (N,).
        widths: int32 (N,).
    """

    pixels: np.ndarray
    offsets: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
