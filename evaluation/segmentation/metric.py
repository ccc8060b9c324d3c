"""Confusion matrices of pixels and what is read off them: mIoU, mAcc, aAcc, as mmsegmentation defines them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["IGNORED", "Scores", "bootstrap_half_widths", "confusion_matrix", "score"]

IGNORED = 255  # label of pixels that are neither trained on nor scored
RESAMPLES = 1_000  # of the images
_BOOTSTRAP_WORD = 0x5345  # keeps these draws apart from others of the same seed


class Scores(NamedTuple):
    """Percentages over all pixels of all images.

    Attributes:
        miou: mean of ``iou`` over the classes that occur in the truth or the prediction.
        macc: mean over the classes that occur in the truth of the share of their pixels that are right.
        aacc: share of all pixels that are right.
        iou: (C,), intersection over union per class. A class that is predicted but never true has 0; one that is
            neither is NaN and left out of the mean.
        num_absent: classes that are NaN in ``iou``.
    """

    miou: float
    macc: float
    aacc: float
    iou: np.ndarray
    num_absent: int


def confusion_matrix(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns); ignored pixels are left out.

    Args:
        truth: integers, any shape: 0 to C - 1 or ``IGNORED``.
        predicted: integers of the same shape, 0 to C - 1.
        num_classes: C.

    Returns:
        int64 (C, C).
    """
    valid = truth != IGNORED
    cells = truth[valid].long() * num_classes + predicted[valid].long()
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def score(confusion: np.ndarray) -> Scores:
    """The scores of one pooled confusion matrix.

    Args:
        confusion: counts (C, C), rows are the truth.

    Returns:
        Percentages; all NaN where no pixel is scored.
    """
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    iou = _ratio(right, true + predicted - right)
    absent = np.isnan(iou)
    return Scores(
        miou=_mean(iou),
        macc=_mean(_ratio(right, true)),
        aacc=float(_ratio(right.sum(), true.sum())),
        iou=iou,
        num_absent=int(absent.sum()),
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Percent; NaN where the whole is 0."""
    return np.divide(100.0 * part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: np.ndarray) -> float:
    """Of what is not NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def bootstrap_half_widths(confusion: np.ndarray, output_pixels: np.ndarray, seed: int) -> tuple[float, ...]:
    """Half widths of 95 % intervals over images: 1.96 standard deviations of what resampled images give.

    Args:
        confusion: int64 (n, C, C), per image.
        output_pixels: int64 (n, 2), right and scored pixels per image at another resolution.
        seed: of the resamples.

    Returns:
        Of miou, macc, aacc, and of the share of right ``output_pixels``, in percentage points.
    """
    n, num_classes = confusion.shape[:2]
    weights = np.random.default_rng([_BOOTSTRAP_WORD, seed]).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    # Products in float64, which the linear algebra library multiplies fast; counts of pixels stay exact below 2^53.
    pooled = weights.astype(np.float64) @ confusion.reshape(n, -1).astype(np.float64)
    small = weights @ output_pixels
    values = []
    for cells, pixels in zip(pooled.reshape(-1, num_classes, num_classes), small, strict=True):
        found = score(cells)
        values.append((found.miou, found.macc, found.aacc, float(_ratio(pixels[0], pixels[1]))))
    return tuple(float(width) for width in 1.96 * np.nanstd(np.array(values), axis=0))
