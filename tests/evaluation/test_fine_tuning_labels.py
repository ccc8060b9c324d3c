"""Which images keep their labels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evaluation.fine_tuning_labels import label_subset

LABELS = np.random.default_rng(0).choice([0, 3, 4, 9], size=200, p=[0.5, 0.3, 0.17, 0.03])


@pytest.mark.parametrize("n", [1, 3, 4, 7, 50, 150, 199, 200])
def test_as_even_as_the_classes_allow(n: int) -> None:
    rows = label_subset(LABELS, n, seed=5)
    assert (rows.dtype, len(rows)) == (np.int64, n)
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < 200
    available = np.array([np.count_nonzero(label == LABELS) for label in (0, 3, 4, 9)])
    found = np.array([(LABELS[rows] == label).sum() for label in (0, 3, 4, 9)])
    level = found.max()
    assert ((found >= level - 1) | (found == available)).all()  # water filling: only an exhausted class has fewer


def test_smaller_sets_are_parts_of_larger_ones_and_seeds_differ() -> None:
    sets = [set(label_subset(LABELS, n, seed=1).tolist()) for n in range(1, 201)]
    assert all(small < large for small, large in itertools.pairwise(sets))
    assert label_subset(LABELS, 30, 1).tolist() == label_subset(LABELS, 30, 1).tolist()
    assert label_subset(LABELS, 30, 1).tolist() != label_subset(LABELS, 30, 2).tolist()


def test_every_image_is_equally_likely() -> None:
    labels = np.repeat([0, 1], 5)
    counts = np.bincount(np.concatenate([label_subset(labels, 4, seed) for seed in range(2000)]), minlength=10)
    assert (np.abs(counts / 2000 - 0.4) < 0.05).all()  # 4.5 standard deviations


def test_zero_is_everything_and_too_many_is_an_error() -> None:
    assert label_subset(LABELS, 0, 0).tolist() == list(range(200))
    with pytest.raises(ValueError, match=r"num_labels is 1,000, but there are 200 training images; give 0"):
        label_subset(LABELS, 1000, 0)
    with pytest.raises(ValueError, match=r"num_labels is -1"):
        label_subset(LABELS, -1, 0)
