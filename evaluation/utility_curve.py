"""How many labels an accuracy is worth: n_hat and the utility U(n) = n_hat / n - 1 of Newell & Deng (CVPR 2020).

With a(n) the test accuracy from scratch with n labels and y the accuracy after pretraining and fine-tuning with n,
n_hat solves a(n_hat) = y. U = 1: pretraining is worth as much as doubling the labels.

As in ``princeton-vl/selfstudy: util/vis.py``: a(n) is the mean over runs at each measured n; the first n whose mean
reaches y and the one before bracket n_hat; linear interpolation in n; the utility of every fine-tuned run, then their
mean. Where that code is inconsistent with the formula, this one is not:

* a run above every scratch mean is *censored*: n_hat is at least the largest n. The reference stores n_hat = -1, a
  utility near -1 that pulls the mean of good runs down.
* the end of its curve stores n_hat / n without the "- 1"; here "- 1" is subtracted everywhere.
* a run below the first scratch mean is censored too: n_hat is at most the smallest n (the reference: 0, so U = -1).
* where the scratch curve is flat at y (both at 100 %), every n of the flat part solves a(n_hat) = y, and the one
  nearest to n is taken: U = 0 where both are equally good with n labels.

Every point carries its status; a censored mean is a bound, has no interval, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

__all__ = ["Interpolation", "LabelsWorth", "Status", "UtilityPoint", "labels_worth", "scratch_curve", "utility_points"]

Interpolation = Literal["linear", "log"]
Status = Literal["ok", "below_range", "above_range", "mixed"]


class LabelsWorth(NamedTuple):
    """What one accuracy is worth.

    Attributes:
        n_hat: labels from scratch that give it; where it is out of range, the end of the range.
        status: ok; above_range (n_hat is a lower bound); below_range (n_hat is an upper bound).
    """

    n_hat: float
    status: Status


@dataclass(frozen=True)
class UtilityPoint:
    """U at one label count.

    Attributes:
        n: labels.
        utility: mean over the fine-tuned runs; a bound where the status is not ok.
        half_width: of its 95 % interval (Student's t over runs); None for one run or a bound.
        status: ok where all runs are; above_range or below_range where some are (a lower, an upper bound); mixed where
            some are above and others below, which bounds nothing.
        runs: what every fine-tuned run is worth.
    """

    n: int
    utility: float
    half_width: float | None
    status: Status
    runs: tuple[LabelsWorth, ...]


def scratch_curve(accuracies: np.ndarray, monotone: bool = False) -> np.ndarray:
    """Mean accuracy from scratch per label count.

    Args:
        accuracies: (L, runs), label counts ascending.
        monotone: the closest curve that never falls (isotonic regression) instead of the means themselves.

    Returns:
        (L,).
    """
    means = accuracies.mean(axis=1)
    if not monotone:
        return means
    from sklearn.isotonic import isotonic_regression

    return isotonic_regression(means)


def labels_worth(
    value: float, n: float, counts: np.ndarray, curve: np.ndarray, interpolation: Interpolation = "linear"
) -> LabelsWorth:
    """n_hat of one accuracy.

    Args:
        value: accuracy of one fine-tuned run.
        n: labels that it was fine-tuned with; decides where the curve is flat at ``value``.
        counts: (L,), ascending label counts of the scratch curve.
        curve: (L,), its accuracies; where it falls and rises again, the first crossing counts.
        interpolation: between two counts linear in n, or in log n.

    Raises:
        ValueError: counts are not ascending or do not fit the curve.
    """
    counts, curve = np.asarray(counts, np.float64), np.asarray(curve, np.float64)
    if counts.ndim != 1 or counts.shape != curve.shape or not len(counts) or (np.diff(counts) <= 0).any():
        raise ValueError(f"label counts {counts.tolist()} must ascend and have one accuracy each, got {curve.shape}.")
    if value < curve[0]:
        return LabelsWorth(float(counts[0]), "below_range")
    reached = np.flatnonzero(curve >= value)
    if not len(reached):
        return LabelsWorth(float(counts[-1]), "above_range")
    upper = int(reached[0])
    if curve[upper] == value:
        last = upper + int(np.argmin(np.append(curve[upper:] == value, False))) - 1  # of the flat part
        return LabelsWorth(float(np.clip(n, counts[upper], counts[last])), "ok")
    share = (value - curve[upper - 1]) / (curve[upper] - curve[upper - 1])
    low, high = counts[upper - 1], counts[upper]
    if interpolation == "log":
        return LabelsWorth(float(low * (high / low) ** share), "ok")
    return LabelsWorth(float(low + share * (high - low)), "ok")


def utility_points(
    counts: np.ndarray,
    scratch: np.ndarray,
    finetuned: np.ndarray,
    interpolation: Interpolation = "linear",
    monotone: bool = False,
) -> list[UtilityPoint]:
    """U at every label count.

    Args:
        counts: (L,), ascending.
        scratch: (L, runs), accuracies from scratch.
        finetuned: (L, runs), accuracies of the pretrained network after fine-tuning.
        interpolation: see ``labels_worth``.
        monotone: see ``scratch_curve``.
    """
    curve = scratch_curve(scratch, monotone)
    points = []
    for n, values in zip(np.asarray(counts).tolist(), finetuned, strict=True):
        runs = tuple(labels_worth(float(value), n, counts, curve, interpolation) for value in values)
        utilities = np.array([run.n_hat / n - 1 for run in runs])
        found: list[Status] = sorted({run.status for run in runs if run.status != "ok"})
        status: Status = "mixed" if len(found) > 1 else found[0] if found else "ok"
        points.append(UtilityPoint(int(n), float(utilities.mean()), _half_width(utilities, status), status, runs))
    return points


def _half_width(values: np.ndarray, status: Status) -> float | None:
    if status != "ok" or len(values) < 2:
        return None
    from evaluation.intervals import mean_and_half_width

    return mean_and_half_width(values, "rfs")[1]
