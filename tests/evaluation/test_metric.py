"""Intervals against scipy, and the checks that every frozen task relies on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evaluation import Features
from evaluation.metric import (
    accuracy_metric,
    check_image_splits,
    get_features,
    l2_normalize,
    mean_interval,
    wilson_half_width,
)
from tests.evaluation.synthetic import clusters, context_of


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (7, 7), (3, 10), (990, 1000), (50, 100)])
def test_wilson_half_width_is_the_larger_side_of_scipys_interval(correct: int, n: int) -> None:
    interval = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    p = correct / n
    assert wilson_half_width(correct, n) == pytest.approx(max(p - interval.low, interval.high - p), abs=1e-9)


def test_mean_interval_is_1_96_standard_errors_with_ddof_1() -> None:
    values = np.random.default_rng(0).random(600)
    mean, half_width = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert half_width == pytest.approx(1.96 * stats.sem(values, ddof=1), rel=1e-12)


def test_accuracy_metric_is_in_percent() -> None:
    metric = accuracy_metric("task/top1", np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0]))
    assert (metric.value, metric.n) == (75.0, 4)
    assert metric.ci95 == pytest.approx(100 * wilson_half_width(3, 4))


@pytest.mark.parametrize("split", ["test", "novel_classes"])
def test_phase_val_refuses_report_splits(split: str) -> None:
    def touched(name: str) -> Features:
        raise AssertionError(f"{name} was read")

    context = context_of({}, "val")
    object.__setattr__(context, "features", touched)
    with pytest.raises(ValueError, match="phase='test'"):
        get_features(context, split)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_counted(value: float) -> None:
    features = clusters(3, 4, 5, spread=1, seed=0)
    features.features[[3, 7], 2] = value
    with pytest.raises(ValueError, match=r"2 of 12 feature vectors of split 'train' .* row 3"):
        get_features(context_of({"train": features}, "val"), "train")


def test_wrong_shapes_are_refused() -> None:
    features = Features(np.zeros((4, 2, 2), np.float32), np.zeros(4, np.int64), ("a",))
    with pytest.raises(ValueError, match=r"shape \(4, 2, 2\)"):
        get_features(context_of({"train": features}, "val"), "train")
    empty = Features(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), ("a",))
    with pytest.raises(ValueError, match=r"shape \(0, 2\)"):
        get_features(context_of({"train": empty}, "val"), "train")


def test_collapsed_features_warn() -> None:
    features = Features(np.ones((4, 3), np.float32), np.zeros(4, np.int64), ("a",))
    with pytest.warns(RuntimeWarning, match="all 4 feature vectors .* collapsed"):
        get_features(context_of({"train": features}, "val"), "train")


def test_l2_normalize_keeps_zero_rows_and_warns() -> None:
    x = np.array([[3, 4], [0, 0], [1e-30, 0]], np.float32)
    with pytest.warns(RuntimeWarning, match="1 of 3 feature vectors of split 'val' are zero"):
        z = l2_normalize(x, "val")
    np.testing.assert_allclose(z, [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)


def test_image_splits_must_exist_and_share_classes() -> None:
    with pytest.raises(ValueError, match=r"split 'val'; the data has: train"):
        check_image_splits("knn", {"train": (3, 3), "val": (0, 0)}, ("train", "val"))
    with pytest.raises(ValueError, match=r"split 'val' has images of classes 1, 2"):
        check_image_splits("knn", {"train": (3, 0), "val": (1, 1, 1)}, ("train", "val"))
    check_image_splits("knn", {"train": (3, 3, 0), "val": (1, 0, 0)}, ("train", "val"))


def test_class_counts_include_classes_without_images() -> None:
    features = Features(np.zeros((3, 2), np.float32), np.array([0, 2, 2]), ("a", "b", "c", "d"))
    assert features.class_counts == (1, 0, 2, 0)
