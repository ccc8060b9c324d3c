"""The objects that detectors are trained on and scored by, read from the images' targets.

Boxes are continuous coordinates in pixels, ends excluded: a box over the whole image is (0, 0, width, height). Pascal
VOC counts pixels from 1, ends included: its (xmin, ymin, xmax, ymax) is our (xmin - 1, ymin - 1, xmax, ymax), so that
its "+ 1" widths, and with them every IoU, are ours. Two sources:

* column ``objects``: JSON, a list of ``{"box", "class", "id", "difficult", "crowd", "area", "mask"}`` per image (VOC,
  COCO); "id" (of the category) and "mask" may be missing;
* columns ``box``, ``coarse`` and ``mask`` of the rendered data: one object per image, its class the coarse category.

Detections of all images are one array: float32 (M, 7), row of the image, class, score, x0, y0, x1, y1. Their masks,
where there are any, are compressed run lengths (the "counts" of COCO's RLE), joined into one array of bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from image_data.contracts import DataError
from image_data.layouts.voc import VOC_CLASSES
from image_data.tables import ImageTable

__all__ = [
    "VOC_CLASSES",
    "Objects",
    "box_iou",
    "check_detections",
    "has_objects",
    "join_masks",
    "read_classes",
    "read_objects",
    "split_masks",
]


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image.

    Attributes:
        boxes: float32 (n, 4), x0, y0, x1, y1 in pixels, ends excluded.
        classes: int64 (n,), places in the list of classes.
        difficult: bool (n,); VOC: finding them is neither demanded nor wrong.
        crowd: bool (n,); COCO: a box around many; detections inside are not wrong, and it is no training example.
        areas: float32 (n,), square pixels, of the mask where there is one, else of the box.
        masks: n COCO segmentations, each a list of polygons ([x, y, x, y, ...]) or a compressed RLE
            {"size": [height, width], "counts": str}; empty where there are no masks.
    """

    boxes: np.ndarray
    classes: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: tuple[Any, ...] = ()


def has_objects(columns: Sequence[str]) -> bool:
    """Whether images with these target columns have objects to detect."""
    return "objects" in columns or {"box", "mask"} <= set(columns)


def read_classes(tables: Sequence[ImageTable]) -> tuple[str, ...]:
    """Names of the classes to detect.

    All 20 of VOC, in VOC's order, where every name is one of them; else those of the first table in the order of their
    category ids, or sorted where there are none; for the rendered data its coarse categories.

    Args:
        tables: the training images first, then those that are scored.

    Raises:
        DataError: a table has no object at all; a later one has objects of a class that the first one lacks.
    """
    if not all(has_objects(table.columns) for table in tables):
        lacking = next(table for table in tables if not has_objects(table.columns))
        raise DataError(
            f"the images have no objects to detect; their columns are {', '.join(lacking.columns)}. Detection needs "
            "boxes: use voc:, coco: or rendered: data."
        )
    first, *others = (_category_ids(table) for table in tables)
    if not first or not all(others):
        which = "scored" if first else "training"
        raise DataError(f"the {which} images have no object at all; a detector needs annotated objects.")
    unknown = sorted({name for other in others for name in other} - set(first))
    if unknown:
        raise DataError(
            f"the scored images have objects of {', '.join(map(repr, unknown))}, of which the training images have "
            f"none (they have {', '.join(sorted(first))}), so they can never be detected. Train on images that show "
            "every class or drop the class."
        )
    if "objects" not in tables[0].columns:
        return tables[0].coarse_names
    if set(first) <= set(VOC_CLASSES):
        return VOC_CLASSES
    if all(number is not None for number in first.values()):
        return tuple(sorted(first, key=lambda name: (first[name], name)))
    return tuple(sorted(first))


def _category_ids(table: ImageTable) -> dict[str, int | None]:
    """Names of the classes that have an object, with their category ids."""
    if "objects" not in table.columns:
        return {table.coarse_names[coarse]: coarse for coarse in set(table.column("coarse"))}
    found: dict[str, int | None] = {}
    for row in range(table.num_images):  # by row: the masks of a large data set do not fit into memory
        found.update((entry["class"], entry.get("id")) for entry in json.loads(table.value(row, "objects")))
    return found


def read_objects(table: ImageTable, row: int, classes: Sequence[str]) -> Objects:
    """The objects of one image.

    Args:
        classes: from ``read_classes``.

    Raises:
        DataError: an object of another class; only some objects have masks.
    """
    if "objects" not in table.columns:
        return _rendered_object(table, row)
    entries = json.loads(table.value(row, "objects"))
    unknown = sorted({entry["class"] for entry in entries} - set(classes))
    if unknown:
        raise DataError(
            f"image {table.value(row, 'name')!r} has an object of class {unknown[0]!r}; known are {', '.join(classes)}."
        )
    masks = tuple(_compressed(entry["mask"]) for entry in entries if entry.get("mask"))
    if masks and len(masks) < len(entries):
        raise DataError(
            f"image {table.value(row, 'name')!r} has masks for {len(masks)} of its {len(entries)} objects; give all "
            "objects a mask or none."
        )
    boxes = np.array([entry["box"] for entry in entries], np.float32).reshape(-1, 4)
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    number = {name: place for place, name in enumerate(classes)}
    return Objects(
        boxes=boxes,
        classes=np.array([number[entry["class"]] for entry in entries], np.int64),
        difficult=np.array([entry.get("difficult", False) for entry in entries], bool),
        crowd=np.array([entry.get("crowd", False) for entry in entries], bool),
        areas=np.array([entry.get("area", area) for entry, area in zip(entries, box_areas, strict=True)], np.float32),
        masks=masks,
    )


def _compressed(segmentation: Any) -> Any:
    """A COCO segmentation with its run lengths compressed; polygons stay as they are."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        runs: Any = segmentation  # a third kind of argument, which the function's annotations leave out
        return _with_text(coco_mask.frPyObjects(runs, *segmentation["size"]))
    return segmentation


def _with_text(rle: Any) -> dict[str, Any]:
    """An RLE whose counts are a str, as in COCO's files."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _rendered_object(table: ImageTable, row: int) -> Objects:
    """The one object of a rendered image; none where it is out of sight."""
    x0, y0, x1, y1 = table.value(row, "box")
    visible = int(x1 > x0 and y1 > y0)
    with Image.open(io.BytesIO(table.value(row, "mask"))) as picture:
        mask = np.asarray(picture) > 0
    rle = _with_text(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
    return Objects(
        boxes=np.array([[x0, y0, x1, y1]], np.float32)[:visible],
        classes=np.array([table.value(row, "coarse")], np.int64)[:visible],
        difficult=np.zeros(visible, bool),
        crowd=np.zeros(visible, bool),
        areas=np.array([mask.sum()], np.float32)[:visible],
        masks=(rle,)[:visible],
    )


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs of boxes (n, 4) and (m, 4): float64 (n, m); 0 for empty boxes."""
    a, b = boxes[:, None].astype(np.float64), others[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    common = sides.clip(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clip(min=0).prod(-1) for box in (a, b))
    return common / np.maximum(area_a + area_b - common, np.finfo(np.float64).tiny)


def check_detections(detections: np.ndarray, num_images: int, num_classes: int) -> None:
    """ValueError unless these are detections (M, 7) in such images, finite numbers throughout."""
    if detections.ndim != 2 or detections.shape[1] != 7:
        raise ValueError(
            f"detections have shape {detections.shape}; expected (M, 7): image row, class, score, x0, y0, x1, y1."
        )
    bad = np.flatnonzero(~np.isfinite(detections).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad):,} of {len(detections):,} detections contain NaN or infinity (first: number {bad[0]}): "
            "training diverged. Look at its loss and lower the learning rate."
        )
    for column, (name, limit) in enumerate((("image", num_images), ("class", num_classes))):
        outside = detections[(detections[:, column] < 0) | (detections[:, column] >= limit), column]
        if len(outside):
            raise ValueError(f"a detection is of {name} {outside[0]:g}; there are {name} 0 to {limit - 1}.")


def join_masks(counts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Masks of detections as arrays: their bytes, uint8, one after the other, and how many each has, int64 (M,)."""
    return np.frombuffer(b"".join(counts), np.uint8).copy(), np.array([len(part) for part in counts], np.int64)


def split_masks(mask_rle: np.ndarray, mask_sizes: np.ndarray) -> list[bytes]:
    """The opposite of ``join_masks``."""
    assert mask_sizes.sum() == len(mask_rle), (mask_sizes.sum(), len(mask_rle))
    ends = np.cumsum(mask_sizes)
    return [mask_rle[end - size : end].tobytes() for end, size in zip(ends, mask_sizes, strict=True)]
