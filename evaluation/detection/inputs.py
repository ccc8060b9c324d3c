"""Images and objects as detectron2 takes them, for training (resized, flipped, with targets) and for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from evaluation.detection.detectron import BitMasks, Boxes, Instances, PolygonMasks
from evaluation.detection.objects import Objects
from evaluation.detection.recipes import Recipe

__all__ = ["network_size", "scored_input", "training_input"]


def network_size(height: int, width: int, side: int, recipe: Recipe) -> tuple[int, int]:
    """Height and width of the image that the network sees: its short side is ``side``, if the long one allows it."""
    if recipe.square:
        return side, side
    scale = min(side / min(height, width), recipe.max_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def training_input(image: np.ndarray, objects: Objects, recipe: Recipe, rng: np.random.Generator) -> dict[str, Any]:
    """An augmented image with its targets and the seed of its sampling.

    Crowds are no targets; difficult objects are, as in detectron2.

    Args:
        image: RGB, uint8 (H, W, 3).
        objects: in its pixels.
        recipe: sizes; whether masks are trained.
        rng: of this image.
    """
    height, width = image.shape[:2]
    size = network_size(height, width, int(rng.choice(recipe.train_sides)), recipe)
    flipped = bool(rng.random() < 0.5)
    seed = int(rng.integers(2**63))
    scales = size[1] / width, size[0] / height
    boxes = objects.boxes * np.array([*scales, *scales], np.float32)
    if flipped:
        boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
    boxes = boxes.clip(0, np.array([size[1], size[0]] * 2, np.float32))
    kept = ~objects.crowd & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    targets = Instances(size)
    targets.gt_boxes = Boxes(torch.from_numpy(boxes[kept]))
    targets.gt_classes = torch.from_numpy(objects.classes[kept])
    if recipe.masks:
        masks = [objects.masks[i] for i in np.flatnonzero(kept)]
        targets.gt_masks = _masks(masks, (height, width), size, flipped)
    return {"image": _resized(image, size, flipped), "instances": targets, "seed": seed}


def scored_input(image: np.ndarray, recipe: Recipe) -> dict[str, Any]:
    """An image to find objects in; they are returned in its own pixels."""
    height, width = image.shape[:2]
    size = network_size(height, width, recipe.test_side, recipe)
    return {"image": _resized(image, size, False), "height": height, "width": width}


def _resized(image: np.ndarray, size: tuple[int, int], flipped: bool) -> torch.Tensor:
    """uint8 (3, H, W)."""
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    image = image[:, ::-1] if flipped else image
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _masks(masks: Sequence[Any], old: tuple[int, int], new: tuple[int, int], flipped: bool) -> Any:
    """Polygons where all masks are polygons, else bitmaps."""
    if all(isinstance(mask, list) for mask in masks):
        scale = np.array([new[1] / old[1], new[0] / old[0]])
        polygons = [[np.asarray(polygon, np.float64).reshape(-1, 2) * scale for polygon in mask] for mask in masks]
        if flipped:
            polygons = [[polygon * [-1, 1] + [new[1], 0] for polygon in mask] for mask in polygons]
        return PolygonMasks([[polygon.flatten() for polygon in mask] for mask in polygons])
    bitmaps = np.zeros((len(masks), *new), bool)
    for bitmap, mask in zip(bitmaps, masks, strict=True):
        rle = coco_mask.merge(coco_mask.frPyObjects(mask, *old)) if isinstance(mask, list) else mask
        picture = Image.fromarray(coco_mask.decode(rle)).resize((new[1], new[0]), Image.Resampling.NEAREST)
        bitmap[:] = np.asarray(picture)[:, ::-1] if flipped else np.asarray(picture)
    return BitMasks(torch.from_numpy(bitmaps))
