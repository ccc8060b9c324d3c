"""Average precision of Pascal VOC, over IoU thresholds 0.50 to 0.95 as detectron2 reports it.

The rules of ``facebookresearch/detectron2: detectron2/evaluation/pascal_voc_evaluation.py`` (``voc_eval``), which the
published VOC numbers of MoCo and Zhao et al. come from. A detection belongs to the object of its class and image that
it overlaps most, found already or not; it is correct when their IoU exceeds the threshold (strictly; VOC's own program
also takes equality) and no detection with a higher score has found the object. Where that object is a difficult one,
the detection does not count at all.

Unlike there, scores and boxes are not rounded (to 0.001 and 0.1 pixels), and a class without objects is left out of the
means instead of counting as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.detection.objects import Objects, box_iou, check_detections

__all__ = ["VOC_THRESHOLDS", "VocScore", "voc_ap"]

VOC_THRESHOLDS = tuple(np.arange(50, 100, 5) / 100)

# As detectron2 makes them: the fourth is 0.30000000000000004, which 3 of 10 objects do not reach.
_RECALLS = np.arange(0.0, 1.1, 0.1)


@dataclass(frozen=True)
class VocScore:
    """Average precisions, in percent.

    Attributes:
        ap: mean over thresholds and classes.
        ap50, ap75: mean over classes at IoU 0.50 and 0.75; NaN where these are not among the thresholds.
        per_class: float64 (C, T); NaN for classes without objects.
    """

    ap: float
    ap50: float
    ap75: float
    per_class: np.ndarray


def voc_ap(
    detections: np.ndarray,
    objects: Sequence[Objects],
    num_classes: int,
    eleven_point: bool = True,
    thresholds: Sequence[float] = VOC_THRESHOLDS,
) -> VocScore:
    """Scores detections.

    Args:
        detections: float (M, 7): row of the image, class, score, x0, y0, x1, y1.
        objects: of every image; crowds are treated as difficult objects.
        num_classes: C.
        eleven_point: precision averaged at recalls 0, 0.1 ... 1 (the rule of VOC 2007); else the area under the
            monotone precision curve (2010 and later).
        thresholds: T values of the IoU.

    Raises:
        ValueError: malformed detections; no object that counts.
    """
    check_detections(detections, len(objects), num_classes)
    classes = np.concatenate([one.classes for one in objects])
    ignored = np.concatenate([one.difficult | one.crowd for one in objects])
    if ignored.all():
        raise ValueError("the scored images have no object that counts, so average precision is not defined.")
    overlap, nearest = _nearest_objects(detections, objects)
    per_class = np.full((num_classes, len(thresholds)), np.nan)
    for c in np.unique(classes[~ignored]):
        rows = np.flatnonzero(detections[:, 1] == c)
        rows = rows[np.argsort(-detections[rows, 2], kind="stable")]
        num_objects = int((~ignored[classes == c]).sum())
        for t, threshold in enumerate(thresholds):
            found = np.where(overlap[rows] > threshold, nearest[rows], -1)
            per_class[c, t] = _average_precision(found, ignored, num_objects, eleven_point)
    means = 100 * np.nanmean(per_class, axis=0)
    return VocScore(float(means.mean()), _at(0.5, thresholds, means), _at(0.75, thresholds, means), 100 * per_class)


def _at(threshold: float, thresholds: Sequence[float], means: np.ndarray) -> float:
    """The mean at one threshold; NaN where it was not asked for."""
    return next((float(mean) for t, mean in zip(thresholds, means, strict=True) if np.isclose(t, threshold)), np.nan)


def _nearest_objects(detections: np.ndarray, objects: Sequence[Objects]) -> tuple[np.ndarray, np.ndarray]:
    """Of each detection: its largest IoU with an object of its class, and that object's number among all."""
    overlap, nearest = np.zeros(len(detections)), np.full(len(detections), -1)
    first = np.cumsum([0, *(len(one.classes) for one in objects)])
    by_image = np.argsort(detections[:, 0], kind="stable")
    bounds = np.searchsorted(detections[by_image, 0], np.arange(len(objects) + 1))
    for image, one in enumerate(objects):
        mine = by_image[bounds[image] : bounds[image + 1]]
        if not len(mine) or not len(one.classes):
            continue
        iou = box_iou(detections[mine, 3:], one.boxes)
        iou[detections[mine, 1][:, None] != one.classes[None]] = 0
        best = iou.argmax(axis=1)
        overlap[mine] = iou[np.arange(len(mine)), best]
        nearest[mine] = first[image] + best
    return overlap, nearest


def _average_precision(found: np.ndarray, ignored: np.ndarray, num_objects: int, eleven_point: bool) -> float:
    """Of one class at one threshold, 0 to 1.

    Args:
        found: int (m,), number of the object of each detection by falling score; -1: none.
        ignored: bool, by number of the object.
        num_objects: that count.
    """
    numbers, first = np.unique(found, return_index=True)
    correct = np.zeros(len(found), bool)
    correct[first[numbers >= 0]] = True
    counts = (found < 0) | ~ignored[found]
    correct &= counts
    hits, wrong = np.cumsum(correct), np.cumsum(counts & ~correct)
    recall, precision = hits / num_objects, hits / np.maximum(hits + wrong, 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    if eleven_point:
        at = np.searchsorted(recall, _RECALLS)
        return float(np.append(highest, 0.0)[at].sum() / len(_RECALLS))
    return float((np.diff(recall, prepend=0.0) * highest).sum())
