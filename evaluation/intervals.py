"""95 % intervals of a mean over few-shot tasks: the three formulas of the papers, by name.

They differ by less than 0.3 % of their width at 600 tasks, but a result names the one that it used. All describe the
spread over tasks, not over pretraining seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from evaluation.metric import Metric, Samples

__all__ = [
    "INTERVALS",
    "Interval",
    "IntervalName",
    "accuracy_outputs",
    "check_interval",
    "interval_record",
    "mean_and_half_width",
]

IntervalName = Literal["camtrast", "closer_look", "rfs"]


class Interval(NamedTuple):
    """One formula.

    Attributes:
        formula: as text, stored with the results.
        source: whose it is.
        half_width: values (n,), n >= 2 -> half width, in their unit.
    """

    formula: str
    source: str
    half_width: Callable[[np.ndarray], float]


def _normal(values: np.ndarray, ddof: int) -> float:
    return float(1.96 * values.std(ddof=ddof) / math.sqrt(len(values)))


def _student(values: np.ndarray) -> float:
    from scipy.stats import t  # slow to import

    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


INTERVALS: dict[str, Interval] = {
    "camtrast": Interval(
        "1.96 s / sqrt(n), s with ddof = 1", "jinghanSunn/CAMtrast: test.py, util.py", partial(_normal, ddof=1)
    ),
    "closer_look": Interval(
        "1.96 s / sqrt(n), s with ddof = 0",
        "wyharveychen/CloserLookFewShot: test.py",
        partial(_normal, ddof=0),
    ),
    "rfs": Interval("t(0.975, n - 1) s / sqrt(n), s with ddof = 1", "WangYueFt/rfs: eval/meta_eval.py", _student),
}


def check_interval(task: str, name: str) -> None:
    """ValueError for an unknown formula."""
    if name not in INTERVALS:
        known = "; ".join(f"{key}: {interval.formula}" for key, interval in INTERVALS.items())
        raise ValueError(f"{task} interval is {name!r}; allowed: {known}.")


def mean_and_half_width(values: np.ndarray, name: IntervalName) -> tuple[float, float]:
    """Mean of the values (n,), n >= 2, and the half width of its interval."""
    return float(values.mean()), INTERVALS[name].half_width(values)


def interval_record(name: IntervalName) -> str:
    """Name and formula, for protocols."""
    return f"{name}: mean +- {INTERVALS[name].formula}, n tasks: spread over tasks, not over pretraining seeds"


def accuracy_outputs(name: str, accuracies: np.ndarray, interval: IntervalName) -> Iterator[Metric | Samples]:
    """The metric of a task list and, under the same name, the accuracy of each task; both in percent.

    Args:
        name: of the metric.
        accuracies: (T,) in [0, 1].
        interval: which formula.
    """
    percent = 100.0 * accuracies
    yield Metric(name, *mean_and_half_width(percent, interval), len(percent))
    yield Samples(name, percent)
