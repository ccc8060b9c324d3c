from __future__ import annotations

import numpy as np
import pytest

from image_data.contracts import DataError
from image_data.subset import SubsetConfig, choose_images, frequent_classes, unknown_classes

CLASSES = [f"class{i}" for i in range(12)]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 30))
NAMES = [f"{i}.png" for i in range(360)]


def counts(config: SubsetConfig) -> list[int]:
    chosen = choose_images(NAMES, LABELS, CLASSES, config)
    return np.bincount(LABELS[chosen], minlength=12).tolist()


def test_default_takes_everything():
    assert counts(SubsetConfig()) == [30] * 12


@pytest.mark.parametrize(("fraction", "each"), [(0.1, 3), (0.5, 15), (0.01, 1), (0.11, 4)])
def test_fraction_applies_to_every_class(fraction, each):
    assert counts(SubsetConfig(fraction=fraction)) == [each] * 12


def test_smaller_subsets_lie_in_larger_ones():
    def chosen(**options):
        return choose_images(NAMES, LABELS, CLASSES, SubsetConfig(seed=5, **options))

    assert not (chosen(fraction=0.1) & ~chosen(fraction=0.3)).any()
    assert not (chosen(num_classes=3) & ~chosen(num_classes=7)).any()
    assert not (chosen(num_images=24) & ~chosen(num_images=120)).any()


def test_classes_by_name():
    assert counts(SubsetConfig(classes=("class3", "class1"))) == [30 * (i in (1, 3)) for i in range(12)]


def test_number_of_classes_at_a_fixed_number_of_images():
    for num_classes in (2, 4, 6):
        own = counts(SubsetConfig(num_classes=num_classes, num_images=60))
        assert sorted(own, reverse=True) == [60 // num_classes] * num_classes + [0] * (12 - num_classes)
    assert sum(counts(SubsetConfig(num_images=50))) == 50
    assert set(counts(SubsetConfig(num_images=50))) == {4, 5}


def test_classes_too_small_for_the_quota_are_not_drawn():
    keep = (LABELS >= 6) | (np.arange(360) % 3 == 0)
    names, labels = [NAMES[i] for i in np.flatnonzero(keep)], LABELS[keep]
    config = SubsetConfig(num_classes=4, num_images=100)
    for seed in range(4):
        chosen = choose_images(names, labels, CLASSES, SubsetConfig(num_classes=4, num_images=100, seed=seed))
        assert set(np.bincount(labels[chosen], minlength=12)) == {0, 25}
    with pytest.raises(DataError, match="only 6 training classes with at least 25"):
        choose_images(names, labels, CLASSES, SubsetConfig(num_classes=7, num_images=175))
    assert config.check() is None


def test_seed_changes_classes_and_images():
    for options in ({"num_classes": 4}, {"fraction": 0.3}):
        first, second = (choose_images(NAMES, LABELS, CLASSES, SubsetConfig(seed=s, **options)) for s in (0, 1))
        assert (first != second).any()
        assert first.sum() == second.sum()


def test_choice_does_not_depend_on_the_order_of_files():
    config = SubsetConfig(num_classes=5, num_images=40, seed=3)
    mixed = np.random.default_rng(1).permutation(360)
    names = [NAMES[i] for i in mixed]
    first = choose_images(NAMES, LABELS, CLASSES, config)
    second = choose_images(names, LABELS[mixed], CLASSES, config)
    assert {NAMES[i] for i in np.flatnonzero(first)} == {names[i] for i in np.flatnonzero(second)}


def test_frequent_classes():
    assert frequent_classes(np.array([0, 0, 0, 1, 3, 3]), 4, 2).tolist() == [True, False, False, True]
    assert frequent_classes(np.array([0, 1]), 3, 0).tolist() == [True, True, False]


def drawn(config: SubsetConfig) -> list[int]:
    """How many classes of each of three categories, which have 3, 6 and 9, were chosen."""
    sizes = [3, 6, 9]
    category = np.repeat(np.arange(3), sizes)
    labels = np.repeat(np.arange(18), 10)
    names, classes = [f"{i}.png" for i in range(180)], [f"class{i}" for i in range(18)]
    chosen = choose_images(names, labels, classes, config, category[labels], ["a", "b", "c"])
    images = np.bincount(labels[chosen], minlength=18)
    return np.bincount(category[images > 0], minlength=3).tolist()


def test_classes_are_drawn_equally_from_categories():
    assert drawn(SubsetConfig(num_classes=9, num_categories=3)) == [3, 3, 3]
    assert sorted(drawn(SubsetConfig(num_classes=8, num_categories=3))) == [2, 3, 3]
    assert drawn(SubsetConfig(num_classes=12, num_categories=2)) == [0, 6, 6]  # a has too few
    assert drawn(SubsetConfig(num_categories=3)) == [3, 6, 9]
    for seed in range(5):
        one, two = (drawn(SubsetConfig(num_categories=n, seed=seed)) for n in (1, 2))
        assert [o and t for o, t in zip(one, two, strict=True)] == one  # nested
    assert len({tuple(drawn(SubsetConfig(num_categories=1, seed=seed))) for seed in range(30)}) == 3
    with pytest.raises(DataError, match=r"only 1 of 3 categories have at least 7 training classes"):
        drawn(SubsetConfig(num_classes=14, num_categories=2))


def test_a_class_of_two_categories_is_refused():
    with pytest.raises(DataError, match=r"several coarse classes: class0, class1"):
        config = SubsetConfig(num_categories=1)
        choose_images(
            NAMES[:6], np.array([0, 0, 1, 1, 2, 2]), CLASSES, config, np.array([0, 1, 1, 0, 1, 1]), ["a", "b"]
        )


def test_unknown_class_is_answered_with_close_names():
    with pytest.raises(DataError, match=r"'clas7' \(did you mean class7"):
        counts(SubsetConfig(classes=("class1", "clas7")))
    assert unknown_classes(["xyz"], ["dog"]) == "'xyz'"
    assert unknown_classes(["dog"], ["dog"]) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction=0"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"labels": "medium"}, "fine or coarse"),
        ({"classes": ("a",), "num_classes": 2}, "both given"),
        ({"fraction": 0.5, "num_images": 10}, "both given"),
        ({"classes": ("a", "a")}, "twice"),
        ({"num_classes": 13}, "only 12 training classes"),
        ({"classes": ("a",), "num_categories": 2}, "draw from categories"),
        ({"num_classes": 3, "num_categories": 4}, "less than one class for each of subset.num_categories=4"),
        ({"num_categories": -1}, "num_categories=-1"),
        ({"num_images": 5}, "less than one image for each of 12"),
        ({"num_images": 3600}, "At most 360 images fit"),
    ],
)
def test_impossible_subsets_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        counts(SubsetConfig(**options))
