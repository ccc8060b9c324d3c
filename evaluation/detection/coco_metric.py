"""Average precision of COCO for boxes and masks, computed by pycocotools.

IoU 0.50 to 0.95 in steps of 0.05, precision at 101 recalls, at most 100 detections per image and class. Crowds are
ignored: a detection inside one is not wrong. Difficult objects (of VOC) are ignored too.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.detection.objects import Objects, check_detections

__all__ = ["CocoKind", "CocoScore", "coco_ap"]

CocoKind = Literal["bbox", "segm"]
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # places of pycocotools' ranges of areas: below 32^2, to 96^2, above


@dataclass(frozen=True)
class CocoScore:
    """Average precisions, in percent.

    Attributes:
        ap: mean over thresholds and classes. Classes without objects are left out of every mean.
        ap50, ap75: mean over classes at IoU 0.50 and 0.75.
        ap_small, ap_medium, ap_large: as ``ap``, of objects of up to 32^2, up to 96^2 and more square pixels; NaN where
            there is no such object.
        per_class: float64 (C, 10), by class and threshold; NaN for classes without objects.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    per_class: np.ndarray


def coco_ap(
    detections: np.ndarray,
    objects: Sequence[Objects],
    sizes: np.ndarray,
    num_classes: int,
    kind: CocoKind = "bbox",
    masks: Sequence[bytes] | None = None,
) -> CocoScore:
    """Scores detections.

    Args:
        detections: float (M, 7): row of the image, class, score, x0, y0, x1, y1.
        objects: of every image.
        sizes: int (n, 2), heights and widths of the images.
        num_classes: C.
        kind: what must overlap, the boxes or the masks.
        masks: counts of the run lengths of each detection's mask (``split_masks``); needed for "segm" alone.

    Raises:
        ValueError: malformed detections; no object that counts; masks are asked for and missing.
    """
    check_detections(detections, len(objects), num_classes)
    if all((one.difficult | one.crowd).all() for one in objects):
        raise ValueError("the scored images have no object that counts, so average precision is not defined.")
    if kind == "segm":
        _check_masks(detections, objects, masks)
    truth = _annotations(objects, kind)
    found = _results(detections, sizes, masks if kind == "segm" else None)
    evaluation: Any = COCOeval(_data_set(truth, sizes, num_classes), _data_set(found, sizes, num_classes), iouType=kind)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, classes, areas), at the largest number of detections; -1 where there are no objects
    precision = evaluation.eval["precision"][..., -1]
    return CocoScore(
        ap=float(_mean(precision[..., _ALL])),
        ap50=float(_mean(precision[0, :, :, _ALL])),
        ap75=float(_mean(precision[5, :, :, _ALL])),
        ap_small=float(_mean(precision[..., _SMALL])),
        ap_medium=float(_mean(precision[..., _MEDIUM])),
        ap_large=float(_mean(precision[..., _LARGE])),
        per_class=_mean(precision[..., _ALL], axis=1).T,
    )


def _check_masks(detections: np.ndarray, objects: Sequence[Objects], masks: Sequence[bytes] | None) -> None:
    if masks is None or len(masks) != len(detections):
        given = "none" if masks is None else f"{len(masks):,}"
        raise ValueError(
            f"masks are to be scored: give one for each of the {len(detections):,} detections, not {given}."
        )
    if any(len(one.masks) != len(one.classes) for one in objects):
        raise ValueError("masks are to be scored, but some objects have none; use data with masks or score the boxes.")


def _mean(precision: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean in percent of all that is not -1; NaN where everything is."""
    known = precision > -1
    count = known.sum(axis)
    return 100 * np.where(count > 0, np.where(known, precision, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


def _annotations(objects: Sequence[Objects], kind: CocoKind) -> Iterator[dict[str, Any]]:
    for image, one in enumerate(objects):
        for i, (x0, y0, x1, y1) in enumerate(one.boxes.tolist()):
            entry = {
                "image_id": image,
                "category_id": int(one.classes[i]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                # beyond all ranges of areas: ignored, as difficult objects are to be, without being a crowd
                "area": math.inf if one.difficult[i] else float(one.areas[i]),
                "iscrowd": int(one.crowd[i]),
            }
            yield {**entry, "segmentation": one.masks[i]} if kind == "segm" else entry


def _results(detections: np.ndarray, sizes: np.ndarray, masks: Sequence[bytes] | None) -> Iterator[dict[str, Any]]:
    for i, (image, label, score, x0, y0, x1, y1) in enumerate(detections.tolist()):
        entry: dict[str, Any] = {
            "image_id": int(image),
            "category_id": int(label),
            "score": score,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
        }
        if masks is not None:
            rle: Any = {"size": sizes[int(image)].tolist(), "counts": masks[i]}
            entry |= {"segmentation": rle, "area": float(coco_mask.area(rle))}
        yield entry


def _data_set(annotations: Iterator[dict[str, Any]], sizes: np.ndarray, num_classes: int) -> COCO:
    """What pycocotools would have read from a file."""
    data: Any = COCO()
    data.dataset = {
        "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes.tolist())],
        "categories": [{"id": c} for c in range(num_classes)],
        # from 1: COCOeval stores the ids of matches, and takes 0 for none
        "annotations": [{**entry, "id": number} for number, entry in enumerate(annotations, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        data.createIndex()
    return data
