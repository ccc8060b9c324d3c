"""Tests and intervals over seeds, against scipy and slow formulas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rayjobs.significance import against_best, difference, holm, welch_p


@pytest.mark.parametrize(("n", "m", "scale"), [(2, 2, 1.0), (3, 3, 5.0), (3, 7, 0.1), (10, 4, 1.0)])
def test_welch_equals_scipy(n, m, scale):
    rng = np.random.default_rng(n * m)
    a, b = rng.normal(60, 1, n), rng.normal(61, scale, m)
    assert welch_p(list(a), list(b)) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert welch_p(list(b), list(a)) == welch_p(list(a), list(b))


def test_welch_of_degenerate_samples():
    assert welch_p([1.0], [1.0, 2.0]) is None
    assert welch_p([], [1.0, 2.0]) is None
    assert welch_p([2.0, 2.0], [2.0, 2.0, 2.0]) == 1.0
    assert welch_p([2.0, 2.0], [3.0, 3.0]) == 0.0
    one_sample = stats.ttest_1samp([3.0, 3.1, 2.9], 2.0).pvalue  # what is left of the test when one side has no spread
    assert welch_p([2.0, 2.0, 2.0], [3.0, 3.1, 2.9]) == pytest.approx(one_sample)


def slow_holm(p_values):
    """Holm's step-down procedure as he states it: the least level at which each hypothesis is rejected, by search."""
    adjusted = []
    for i in range(len(p_values)):
        for level in np.linspace(0, 1, 20001):
            remaining, rejected = list(range(len(p_values))), set()
            while remaining:
                smallest = min(remaining, key=lambda k: p_values[k])
                if p_values[smallest] > level / len(remaining):
                    break
                rejected.add(smallest)
                remaining.remove(smallest)
            if i in rejected:
                break
        adjusted.append(level)
    return adjusted


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.9], [0.02], []])
def test_holm_equals_the_step_down_procedure(p_values):
    assert holm(p_values) == pytest.approx(slow_holm(p_values), abs=1e-4)


def test_holm_of_a_known_table():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_rows_are_tested_against_the_best_one():
    samples = {"low": [50.0, 51.0, 52.0], "best": [70.0, 71.0, 72.0], "tied": [69.5, 71.5, 70.5], "single": [69.0]}
    best, p_values = against_best(samples, 1)
    assert best == "best"
    raw = [stats.ttest_ind(samples[name], samples["best"], equal_var=False).pvalue for name in ("low", "tied")]
    assert p_values == pytest.approx({"low": 2 * raw[0], "tied": raw[1]})
    assert p_values["low"] < 0.05 < p_values["tied"]
    assert against_best(samples, -1)[0] == "low"


def test_a_best_row_of_one_seed_is_not_tested_against():
    assert against_best({"single": [80.0], "a": [70.0, 71.0], "b": [60.0, 61.0]}, 1) == ("single", {})


def test_same_seeds_are_compared_seed_by_seed():
    a, b = {0: 60.0, 1: 70.0, 2: 80.5}, {2: 79.4, 1: 69.0, 0: 59.2}
    found = difference(a, b)
    low, high = stats.ttest_rel([60, 70, 80.5], [59.2, 69, 79.4]).confidence_interval(0.95)
    assert found.kind == "paired"
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert low > 0, "the seeds differ by far more than the methods; pairing sees through that"


def test_other_seeds_get_welch_interval():
    a, b = {0: 60.0, 1: 61.0, 2: 62.5}, {0: 58.0, 1: 54.0}
    found = difference(a, b)
    low, high = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False).confidence_interval(0.95)
    assert found.kind == "welch"
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.num_seeds == (3, 2)


def test_differences_without_spread_or_with_one_seed():
    assert difference({0: 5.0, 1: 5.0}, {2: 4.0, 3: 4.0}).half == 0.0
    single = difference({0: 5.0}, {0: 4.0, 1: 2.0})
    assert (single.mean, single.half, single.kind) == (2.0, None, "single")
