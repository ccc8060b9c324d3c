"""Metrics of predicted depths as sums over each image, so that workers can score parts of the images."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from evaluation.fine_tuning import Predictions

__all__ = ["SHARES", "Ratio", "depth_sums", "main_value", "rmse", "share"]

SHARES = ("within_1_25", "within_1_1", "within_1_25_object", "within_1_1_object")
THRESHOLDS = {"within_1_25": 1.25, "within_1_1": 1.1}


def depth_sums(predicted: np.ndarray, depths: np.ndarray, largest: float) -> Predictions:
    """Sums over the pixels of each image, from which all metrics follow; (B,) each.

    Args:
        predicted: (B, h, w), in units of the largest depth.
        depths: (B, h, w), likewise; exactly 1 counts as background.
        largest: depth of 1, in the data's unit.
    """
    is_object = depths != 1
    with np.errstate(divide="ignore"):
        ratio = np.where(predicted > 0, np.maximum(predicted / depths, depths / predicted), np.inf)
    squared = (largest * (predicted.astype(np.float64) - depths)) ** 2
    found: Predictions = {
        "pixels": np.full(len(depths), depths[0].size, np.int64),
        "pixels_object": is_object.sum((1, 2)),
        "squared": squared.sum((1, 2)),
        "squared_object": (squared * is_object).sum((1, 2)),
    }
    for name, threshold in THRESHOLDS.items():
        found[name] = (ratio < threshold).sum((1, 2))
        found[f"{name}_object"] = ((ratio < threshold) & is_object).sum((1, 2))
    return found


class Ratio(NamedTuple):
    """A ratio of sums over images.

    Attributes:
        value: the ratio.
        half_width: of its 95 % interval over images; None for a single image.
        parts: what each image adds (N,); their mean is the ratio.
    """

    value: float
    half_width: float | None
    parts: np.ndarray


def share(sums: Predictions, name: str) -> Ratio:
    """One of ``SHARES`` in percent of the pixels of all images."""
    counted = sums["pixels_object" if name.endswith("_object") else "pixels"]
    return _ratio_of_sums(100.0 * sums[name], counted)


def _ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> Ratio:
    """Sum over sum; the interval is that of the linearised ratio, 1.96 standard errors over images."""
    n, mean = len(numerators), max(float(denominators.mean()), 1 / len(numerators))
    value = float(numerators.mean()) / mean
    residuals = (numerators - value * denominators) / mean
    half = 1.96 * float(residuals.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Ratio(value, half, numerators / mean)


def rmse(sums: Predictions, suffix: str) -> tuple[float, float | None]:
    """RMSE in the data's unit and its half width by the delta method; ``suffix`` is empty or "_object"."""
    squared = _ratio_of_sums(sums[f"squared{suffix}"], sums[f"pixels{suffix}"])
    root = math.sqrt(squared.value)
    return root, squared.half_width / (2 * root) if squared.half_width is not None and root > 0 else None


def main_value(predictions: Predictions) -> float:
    """Percentage of pixels within a factor of 1.25."""
    return share(predictions, "within_1_25").value
