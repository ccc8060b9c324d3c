"""Images of the fine-tuning tasks that see one whole square image: loading, augmentation, normalisation.

The augmentations are those of Newell & Deng (``princeton-vl/selfstudy: util/augment.py, datasets/base.py``), on
normalised images, so that 0, which fills what a crop or a cutout leaves empty, is the mean colour. The reference does
all this in Lab; ours stays in RGB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD, DataError
from image_data.tables import ImageTable

__all__ = ["Augmentation", "augment", "check_same_size", "load_square", "normalized_batch", "square"]

_MEAN = 255 * np.array(IMAGENET_MEAN, np.float32)
_SCALE = 1 / (255 * np.array(IMAGENET_STD, np.float32))


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image; the defaults leave it as it is.

    Attributes:
        flip: mirrored left to right with probability 1/2.
        crop: four of five images are moved by up to an eighth of their side in both directions, all positions equally
            likely.
        cutout: a square of a quarter of the side, anywhere inside the image, is emptied.
        color_jitter: probability that every channel is multiplied by 2^(0.25 z) and shifted by 0.25 z', z and z'
            standard normal; 0.8 in the reference.
        grayscale: probability that the channels are replaced by their mean; 0.25 in the reference.
    """

    flip: bool = False
    crop: bool = False
    cutout: bool = False
    color_jitter: float = 0.0
    grayscale: float = 0.0


def augment(image: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """A view of a training image.

    Args:
        image: normalised, float32 (S, S, 3).
        augmentation: what may happen.
        rng: the image's own random numbers.

    Returns:
        float32 (S, S, 3), and whether it was mirrored (dense targets must follow).
    """
    side = len(image)
    if rng.random() < augmentation.color_jitter:
        gain, shift = rng.normal(size=(2, 3)).astype(np.float32) / 4
        image = image * np.exp2(gain) + shift
    if rng.random() < augmentation.grayscale:
        image = np.broadcast_to(image.mean(2, keepdims=True), image.shape)
    flipped = augmentation.flip and rng.random() < 0.5
    if flipped:
        image = image[:, ::-1]
    if augmentation.crop and rng.random() < 0.8:
        pad = side // 8
        top, left = rng.integers(0, 2 * pad + 1, 2)
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[top : top + side, left : left + side]
    if augmentation.cutout:
        hole = side // 4
        top, left = rng.integers(0, side - hole + 1, 2)
        image = image.copy()
        image[top : top + hole, left : left + hole] = 0
    return image, flipped


def square(pixels: np.ndarray, size: int, *, nearest: bool = False) -> np.ndarray:
    """The central square of an image or of a target map, at S px.

    Args:
        pixels: (H, W) or (H, W, 3); uint8, or uint16 where ``nearest``.
        size: S; 0 keeps the stored size, the image is then not cut either.
        nearest: the value at the centre of each new pixel, for targets; else bilinear with antialiasing.
    """
    height, width = pixels.shape[:2]
    if size == 0 or (height, width) == (size, size):
        return pixels
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = pixels[top : top + side, left : left + side]
    if nearest:
        at = ((np.arange(size) + 0.5) * side / size).astype(np.int64)
        return cut[at][:, at]
    return np.asarray(Image.fromarray(cut).resize((size, size), Image.Resampling.BILINEAR))


def load_square(table: ImageTable, row: int, size: int) -> np.ndarray:
    """An image at S px (0: stored size), normalised with ImageNet's mean and deviation, float32 (S, S, 3)."""
    return (square(table.image(row), size).astype(np.float32) - _MEAN) * _SCALE


def normalized_batch(images: Sequence[np.ndarray]) -> Tensor:
    """Normalised images (S, S, 3) as a batch float32 (B, 3, S, S)."""
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def check_same_size(task: str, table: ImageTable, image_size: int) -> None:
    """DataError unless all images of a table are squares of one size, or are made so by ``image_size``."""
    if image_size:
        return
    sizes = set(zip(table.column("height"), table.column("width"), strict=True))
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:3])
        raise DataError(
            f"{task}: image_size is 0 (as stored), but the images are not squares of one size: {shown}"
            f"{' and others' if len(sizes) > 3 else ''}. Give an image_size in pixels, such as 64."
        )
