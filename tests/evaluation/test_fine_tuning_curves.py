"""Curves over fine-tuning iterations."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t

from evaluation.fine_tuning_curves import _half_widths, curve_outputs
from evaluation.metric import Artifact, Samples

VALUES = np.array([[10.0, 30.0, 35.0], [14.0, 28.0, 40.0], [12.0, 35.0, 39.0]])


def test_samples_hold_the_iterations_and_every_seed() -> None:
    samples, plot = curve_outputs("depth", "share (%)", (5, 10, 20), VALUES)
    assert isinstance(samples, Samples)
    assert isinstance(plot, Artifact)
    assert (samples.name, plot.name) == ("depth/curve", "depth/iterations.png")
    np.testing.assert_array_equal(samples.values[:, 0], [5, 10, 20])
    np.testing.assert_array_equal(samples.values[:, 1:], VALUES.T)
    assert Image.open(io.BytesIO(plot.data)).format == "PNG"


def test_the_band_is_scipys_t_interval() -> None:
    for column, half in zip(VALUES.T, _half_widths(VALUES), strict=True):
        low, high = t.interval(0.95, 2, column.mean(), column.std(ddof=1) / 3**0.5)
        assert half == pytest.approx((high - low) / 2)


def test_one_seed_and_one_point_are_enough_and_other_shapes_are_not() -> None:
    assert len(list(curve_outputs("pose", "top-1 accuracy (%)", (20,), np.array([[50.0]])))) == 2
    with pytest.raises(ValueError, match=r"pose: a curve of 2 iterations got values of shape \(3, 3\)"):
        list(curve_outputs("pose", "top-1", (5, 10), VALUES))
