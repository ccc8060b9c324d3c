"""Made-up objects and detections, for the tests of what detections are scored by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from evaluation.detection.objects import Objects

__all__ = ["box_mask", "detections", "image", "random_scene"]

SIDE = 100  # pixels of every image


def box_mask(box: Sequence[float]) -> dict:
    """The box filled, as compressed run lengths."""
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    x0, y0, x1, y1 = (round(float(value)) for value in box)
    mask[y0:y1, x0:x1] = 1
    return coco_mask.encode(mask)


def image(*objects: tuple, difficult: Sequence[int] = (), crowd: Sequence[int] = ()) -> Objects:
    """Objects of one image from (class, x0, y0, x1, y1), with masks that fill the boxes."""
    rows = np.array(objects, np.float32).reshape(-1, 5)
    n = len(rows)
    return Objects(
        boxes=rows[:, 1:],
        classes=rows[:, 0].astype(np.int64),
        difficult=np.isin(np.arange(n), difficult),
        crowd=np.isin(np.arange(n), crowd),
        areas=((rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])).astype(np.float32),
        masks=tuple(box_mask(box) for box in rows[:, 1:]),
    )


def detections(*rows: tuple) -> np.ndarray:
    """Rows of (image, class, score, x0, y0, x1, y1)."""
    return np.array(rows, np.float32).reshape(-1, 7)


def random_scene(seed: int, num_images: int = 12, num_classes: int = 4) -> tuple[np.ndarray, list[Objects]]:
    """Integer boxes: objects, and detections near them (some of another class), doubled, or anywhere; scores differ."""
    rng = np.random.default_rng(seed)

    def boxes(n: int) -> np.ndarray:
        start = rng.integers(0, 60, (n, 2))
        return np.concatenate([start, start + rng.integers(5, 40, (n, 2))], axis=1)

    images, found = [], []
    for row in range(num_images):
        n = int(rng.integers(0, 5))
        objects = np.column_stack([rng.integers(0, num_classes, n), boxes(n)])
        images.append(image(*objects.tolist(), difficult=np.flatnonzero(rng.random(n) < 0.2).tolist()))
        near = np.repeat(objects, rng.integers(0, 4, n), axis=0)
        near[:, 1:] += rng.integers(-4, 5, (len(near), 4))
        near[:, 0] = np.where(rng.random(len(near)) < 0.25, rng.integers(0, num_classes, len(near)), near[:, 0])
        anywhere = np.column_stack([rng.integers(0, num_classes, 3), boxes(3)])
        for label, *box in [*near.tolist(), *anywhere.tolist()]:
            found.append((row, label, 0.0, *box))
    result = detections(*found)
    result[:, 3:5] = result[:, 3:5].clip(0)
    result[:, 2] = rng.permutation(len(result)) / len(result)
    return result, images
