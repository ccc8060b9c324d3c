from __future__ import annotations

import numpy as np
import pytest

from image_data.contracts import DataError
from image_data.splits import seeded_order, split_classes, split_images

NAMES = [f"class {i}" for i in range(50)]


def test_order_is_a_permutation_that_depends_on_seed_and_purpose():
    order = seeded_order(NAMES, 0, "a")
    assert sorted(order) == list(range(50))
    assert (order == seeded_order(NAMES, 0, "a")).all()
    for other in (seeded_order(NAMES, 1, "a"), seeded_order(NAMES, 0, "b")):
        assert (order != other).mean() > 0.8
    assert len(seeded_order([], 0, "a")) == 0


def test_order_is_uniform_enough():
    """First places over many seeds hit every name about equally often: chi-squared below its 99.9 % quantile."""
    names = [str(i) for i in range(10)]
    first = np.bincount([seeded_order(names, seed, "x")[0] for seed in range(2000)], minlength=10)
    assert ((first - 200) ** 2 / 200).sum() < 27.9


def test_order_of_names_does_not_depend_on_how_they_are_listed():
    shuffled = [NAMES[i] for i in np.random.default_rng(0).permutation(50)]
    assert [NAMES[i] for i in seeded_order(NAMES, 3, "a")] == [shuffled[i] for i in seeded_order(shuffled, 3, "a")]


def test_known_order():
    """The rule is part of the record: it may not change between versions."""
    assert seeded_order(["cat", "dog", "car", "sun", "map"], 0, "class_split").tolist() == KNOWN_ORDER


KNOWN_ORDER = [4, 2, 3, 1, 0]


def test_classes_are_divided_by_share():
    parts = split_classes([f"c{i}" for i in range(100)], (0.64, 0.16, 0.20), 0)
    assert [len(p) for p in parts] == [64, 16, 20]
    assert sorted(np.concatenate(parts)) == list(range(100))
    assert all((np.diff(p) > 0).all() for p in parts)


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_every_part_gets_a_class(count):
    for fractions in ((0.64, 0.16, 0.20), (0.02, 0.49, 0.49)):
        parts = split_classes(NAMES[:count], fractions, 0)
        assert min(len(p) for p in parts) >= 1
        assert sum(len(p) for p in parts) == count
    assert len(split_classes(NAMES[:count], (0.8, 0.0, 0.2), 0).val) == 0


def test_too_few_classes_for_a_class_split():
    with pytest.raises(DataError, match=r"2 classes \(class 0, class 1\).*at least 3"):
        split_classes(NAMES[:2], (0.64, 0.16, 0.20), 0)


@pytest.mark.parametrize("fractions", [(0.6, 0.2, 0.1), (1.2, -0.1, -0.1), (0.5, 0.5), (0.0, 0.5, 0.5)])
def test_fractions_must_be_shares_of_one(fractions):
    with pytest.raises(DataError, match="class_split="):
        split_classes(NAMES, fractions, 0)
    with pytest.raises(DataError, match="image_split="):
        split_images(NAMES, np.zeros(50, np.int64), None, fractions, 0)


def test_images_are_stratified_by_class():
    labels = np.repeat(np.arange(6), [10, 20, 40, 25, 100, 7])
    names = [f"{label}/{i}" for i, label in enumerate(labels)]
    part = split_images(names, labels, None, (0.8, 0.1, 0.1), 0)
    for label, count in enumerate([10, 20, 40, 25, 100, 7]):
        own = np.bincount(part[labels == label], minlength=3)
        assert own.sum() == count
        assert abs(own[1] - 0.1 * count) <= 0.5
        assert abs(own[2] - 0.1 * count) <= 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_small_classes(count):
    part = split_images(NAMES[:count], np.zeros(count, np.int64), None, (0.8, 0.1, 0.1), 0)
    assert np.bincount(part, minlength=3).tolist() == ([count, 0, 0] if count < 3 else [count - 2, 1, 1])


def test_group_never_straddles_splits():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 600)
    groups = [f"{label}-{generator.integers(0, 25)}" for label in labels]
    part = split_images([str(i) for i in range(600)], labels, groups, (0.6, 0.2, 0.2), 0)
    parts_of_group = {group: {p for g, p in zip(groups, part, strict=True) if g == group} for group in groups}
    assert all(len(parts) == 1 for parts in parts_of_group.values())
    for label in range(5):
        share = np.bincount(part[labels == label], minlength=3) / (labels == label).sum()
        assert np.abs(share - (0.6, 0.2, 0.2)).max() < 0.07
    assert (part != split_images([str(i) for i in range(600)], labels, None, (0.6, 0.2, 0.2), 0)).any()


def test_group_over_several_classes_stays_together():
    labels = np.array([0, 1] * 30)
    groups = [f"g{i // 4}" for i in range(60)]
    part = split_images([str(i) for i in range(60)], labels, groups, (0.6, 0.2, 0.2), 0)
    assert all(len(set(part[i : i + 4])) == 1 for i in range(0, 60, 4))


def test_one_large_group_leaves_the_small_ones_for_val_and_test():
    groups = ["large"] * 90 + [f"small{i}" for i in range(30)]
    for seed in range(5):
        part = split_images([str(i) for i in range(120)], np.zeros(120, np.int64), groups, (0.8, 0.1, 0.1), seed)
        assert set(part[:90]) == {0}
        assert np.bincount(part, minlength=3).tolist() == [96, 12, 12]


def test_split_does_not_depend_on_the_order_of_files():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 200)
    names = [f"{i}.png" for i in range(200)]
    groups = [f"g{i % 60}" for i in range(200)]
    mixed = generator.permutation(200)
    for own in (None, groups):
        first = dict(zip(names, split_images(names, labels, own, (0.8, 0.1, 0.1), 7), strict=True))
        again = [names[i] for i in mixed]
        moved = None if own is None else [own[i] for i in mixed]
        second = dict(zip(again, split_images(again, labels[mixed], moved, (0.8, 0.1, 0.1), 7), strict=True))
        assert first == second


def test_other_seed_other_split():
    labels = np.zeros(100, np.int64)
    names = [str(i) for i in range(100)]
    parts = [split_images(names, labels, None, (0.8, 0.1, 0.1), seed) for seed in (0, 1)]
    assert (parts[0] != parts[1]).any()
