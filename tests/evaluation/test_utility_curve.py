"""n_hat and U(n) by hand, against a slow search, and the reference's mistakes by name."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.utility_curve import labels_worth, scratch_curve, utility_points

COUNTS = np.array([100, 200, 400, 800])
CURVE = np.array([20.0, 30.0, 50.0, 60.0])


@pytest.mark.parametrize(
    ("value", "n_hat", "status"),
    [
        (40.0, 300.0, "ok"),  # halfway between 200 and 400
        (25.0, 150.0, "ok"),
        (30.0, 200.0, "ok"),  # exactly a mean
        (20.0, 100.0, "ok"),
        (60.0, 800.0, "ok"),
        (19.9, 100.0, "below_range"),
        (60.1, 800.0, "above_range"),
    ],
)
def test_by_hand(value: float, n_hat: float, status: str) -> None:
    found = labels_worth(value, 100, COUNTS, CURVE)
    assert found.n_hat == pytest.approx(n_hat)
    assert found.status == status


def test_logarithmic_interpolation() -> None:
    assert labels_worth(40.0, 100, COUNTS, CURVE, "log").n_hat == pytest.approx(200 * 2**0.5)


def test_a_curve_that_falls_counts_its_first_crossing_and_isotonic_means_never_fall() -> None:
    falling = np.array([20.0, 40.0, 30.0, 60.0])
    assert labels_worth(35.0, 100, COUNTS, falling).n_hat == pytest.approx(175.0)
    assert labels_worth(50.0, 100, COUNTS, falling).n_hat == pytest.approx(400 + 400 * 20 / 30)
    np.testing.assert_allclose(scratch_curve(falling[:, None], monotone=True), [20, 35, 35, 60])


@pytest.mark.parametrize(("n", "n_hat"), [(100, 200.0), (200, 200.0), (300, 300.0), (400, 400.0), (800, 400.0)])
def test_where_the_curve_is_flat_the_solution_nearest_to_n_counts(n: int, n_hat: float) -> None:
    flat = np.array([20.0, 30.0, 30.0, 60.0])
    assert labels_worth(30.0, n, COUNTS, flat) == (n_hat, "ok")


def test_nothing_is_gained_or_lost_where_both_are_always_right() -> None:
    """Not -1 + n_1 / n, which the first n that reaches 100 % would give."""
    points = utility_points(COUNTS, np.full((4, 2), 100.0), np.full((4, 2), 100.0))
    assert [(point.utility, point.half_width, point.status) for point in points] == [(0.0, 0.0, "ok")] * 4


def test_against_a_slow_search() -> None:
    """The smallest n on a fine grid at which the interpolated scratch curve reaches the accuracy."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = np.sort(rng.choice(np.arange(10, 400), 5, replace=False))
        curve = rng.uniform(20, 80, 5)
        value = rng.uniform(curve[0], curve.max())
        grid = np.linspace(counts[0], counts[-1], 400_001)
        expected = grid[np.argmax(np.interp(grid, counts, curve) >= value - 1e-9)]
        assert labels_worth(float(value), 100, counts, curve).n_hat == pytest.approx(expected, abs=2e-3)


def test_utility_is_computed_per_run_and_then_averaged() -> None:
    scratch = np.column_stack([CURVE - 1, CURVE + 1])
    finetuned = np.array([[25.0, 40.0], [30.0, 30.0], [55.0, 50.0], [60.0, 60.0]])
    points = utility_points(COUNTS, scratch, finetuned)
    assert [point.utility for point in points] == pytest.approx([(0.5 + 2.0) / 2, 0.0, (0.5 + 0.0) / 2, 0.0])
    assert points[0].half_width == pytest.approx(12.7062047 * np.std([0.5, 2.0], ddof=1) / np.sqrt(2))
    assert [point.status for point in points] == ["ok"] * 4


def test_a_run_above_every_scratch_mean_does_not_pull_the_mean_down() -> None:
    """The reference stores n_hat = -1 for it: a utility near -1."""
    finetuned = np.array([[70.0, 60.0], [30.0, 30.0], [50.0, 50.0], [60.0, 60.0]])
    point = utility_points(COUNTS, CURVE[:, None], finetuned)[0]
    assert point.utility == pytest.approx(800 / 100 - 1)
    assert (point.status, point.half_width) == ("above_range", None)


def test_the_end_of_the_curve_subtracts_one() -> None:
    """The reference stores n_max / n there: 1 where nothing is gained."""
    finetuned = np.repeat(np.array([[20.0], [30.0], [50.0], [61.0]]), 2, axis=1)
    assert utility_points(COUNTS, CURVE[:, None], finetuned)[-1].utility == 0.0


def test_statuses_of_several_runs() -> None:
    finetuned = np.array([[10.0, 20.0], [10.0, 70.0], [50.0, 70.0], [60.0, 60.0]])
    assert [point.status for point in utility_points(COUNTS, CURVE[:, None], finetuned)] == [
        "below_range",
        "mixed",
        "above_range",
        "ok",
    ]


def test_counts_must_ascend() -> None:
    with pytest.raises(ValueError, match="must ascend"):
        labels_worth(30.0, 100, COUNTS[::-1], CURVE)
