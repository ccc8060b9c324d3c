"""The three interval formulas against scipy, and how far they lie apart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evaluation import Metric, Samples
from evaluation.intervals import INTERVALS, accuracy_outputs, check_interval, interval_record, mean_and_half_width

VALUES = np.random.default_rng(0).normal(55.0, 10.0, size=37)


def test_student_interval_is_scipys() -> None:
    low, high = stats.t.interval(0.95, len(VALUES) - 1, loc=VALUES.mean(), scale=stats.sem(VALUES))
    mean, half_width = mean_and_half_width(VALUES, "rfs")
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))


@pytest.mark.parametrize(("name", "ddof"), [("camtrast", 1), ("closer_look", 0)])
def test_normal_intervals_differ_in_ddof(name, ddof) -> None:
    mean, half_width = mean_and_half_width(VALUES, name)
    assert mean == VALUES.mean()
    assert half_width == pytest.approx(1.96 * stats.sem(VALUES, ddof=ddof))


def test_formulas_agree_within_a_third_of_a_percent_at_600_tasks() -> None:
    values = np.random.default_rng(1).normal(50.0, 10.0, size=600)
    widths = {name: interval.half_width(values) for name, interval in INTERVALS.items()}
    assert widths["closer_look"] < widths["camtrast"] < widths["rfs"] < 1.003 * widths["closer_look"]
    assert widths["rfs"] / widths["camtrast"] == pytest.approx(1.9639 / 1.96, abs=2e-5)


@pytest.mark.parametrize("name", INTERVALS)
def test_equal_values_have_no_width(name) -> None:
    assert mean_and_half_width(np.full(5, 20.0), name) == (20.0, 0.0)


def test_record_holds_name_and_formula() -> None:
    assert interval_record("rfs").startswith("rfs: mean +- t(0.975, n - 1) s / sqrt(n), s with ddof = 1")


def test_outputs_are_a_metric_and_its_samples_in_percent() -> None:
    metric, samples = accuracy_outputs("few_shot/x", np.array([0.2, 0.6]), "closer_look")
    assert isinstance(metric, Metric)
    assert isinstance(samples, Samples)
    assert metric[:2] == ("few_shot/x", pytest.approx(40.0))
    assert metric[2:] == (pytest.approx(1.96 * 20 / np.sqrt(2)), 2)
    assert samples.name == "few_shot/x"
    np.testing.assert_allclose(samples.values, [20.0, 60.0])


def test_unknown_name_lists_the_formulas() -> None:
    with pytest.raises(ValueError, match=r"few_shot interval is 'normal'; allowed: camtrast: .*closer_look: .*rfs: t"):
        check_interval("few_shot", "normal")
