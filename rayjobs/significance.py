"""Is a difference between two models more than chance? Tests and intervals over seeds.

Rows of a table are compared with its best row: Welch's t-test, since methods spread differently over seeds, with Holm's
correction, since many rows are tested (Holm, Scandinavian Journal of Statistics 1979). The best row is chosen from the
same numbers, which favours it a little; no correction for that is made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evaluation import paired

__all__ = ["LEVEL", "Difference", "against_best", "difference", "holm", "welch_p"]

LEVEL = 0.05  # a smaller adjusted p counts as a difference


@dataclass(frozen=True)
class Difference:
    """How much larger one model's metric is than another's, over seeds.

    Attributes:
        mean: difference of the means, in the metric's unit.
        half: half width of its 95 % interval; None where a side has fewer than two seeds.
        num_seeds: seeds of the two sides; the shared ones twice where paired.
        kind: "paired" (t-interval of the differences per seed), "welch" (different seeds) or "single" (no interval).
    """

    mean: float
    half: float | None
    num_seeds: tuple[int, int]
    kind: Literal["paired", "welch", "single"]


def welch_p(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of Welch's t-test; None where a side has fewer than two values.

    Two sides without any spread are told apart by their means alone: p is 1 where these are equal, else 0.
    """
    if min(len(a), len(b)) < 2:
        return None
    error, degrees = _welch(a, b)
    gap = abs(statistics.fmean(a) - statistics.fmean(b))
    if error == 0:
        return float(gap == 0)
    from scipy.stats import t

    return float(2 * t.sf(gap / error, degrees))


def _welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Standard error of the difference of two means and Welch-Satterthwaite's degrees of freedom."""
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    total = sum(parts)
    if total == 0:
        return 0.0, math.inf
    shares = [(part / total) ** 2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)]
    return math.sqrt(total), 1 / sum(shares)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the k-th smallest of m times (m - k), k from 0, never falling."""
    return paired.holm(np.asarray(p_values, np.float64)).tolist()


def against_best(samples: Mapping[str, Sequence[float]], sign: int) -> tuple[str, dict[str, float]]:
    """The row with the best mean, and the Holm-adjusted p of every other row that can be tested against it.

    Args:
        samples: row -> its values, one per seed; at least one row, each with at least one value.
        sign: 1 where larger is better, -1 where smaller is.

    Returns:
        Name of the best row; row -> p, without the rows (or, where the best is one, any row) of a single seed.
    """
    best = max(samples, key=lambda name: sign * statistics.fmean(samples[name]))
    found = {name: welch_p(values, samples[best]) for name, values in samples.items() if name != best}
    tested = {name: p for name, p in found.items() if p is not None}
    return best, dict(zip(tested, holm(list(tested.values())), strict=True))


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Mean of ``a`` minus mean of ``b`` (seed -> value), with an interval.

    The same seeds on both sides (the same data order and task lists) are compared seed by seed.
    """
    from scipy.stats import t

    mean = statistics.fmean(a.values()) - statistics.fmean(b.values())
    counts = (len(a), len(b))
    if min(counts) < 2:
        return Difference(mean, None, counts, "single")
    if a.keys() == b.keys():
        gaps = [a[seed] - b[seed] for seed in a]
        half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        return Difference(mean, half, counts, "paired")
    error, degrees = _welch(list(a.values()), list(b.values()))
    return Difference(mean, float(t.ppf(0.975, degrees)) * error, counts, "welch")
