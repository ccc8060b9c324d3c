"""Controlled subsets of what pretraining sees: declarative, seeded, and nested.

The same seed makes nested subsets: 10 % of a class is contained in 20 % of it, and 10 classes in 20 classes. So a curve
over sizes changes one thing only.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from image_data.contracts import DataError
from image_data.splits import seeded_order
from image_data.uri import some

__all__ = ["SubsetConfig", "choose_images", "frequent_classes", "unknown_classes"]


@dataclass(frozen=True)
class SubsetConfig:
    """What pretraining sees of the data.

    ``fraction``, ``classes``, ``num_classes``, ``num_categories`` and ``num_images`` shrink "train"; "val" and "test"
    then keep the images of the classes that are left, so that the three share one label space; "val_classes" and
    "novel_classes" stay whole, so that results of different subsets are compared on the same novel classes. ``labels``
    and ``min_per_class`` apply to every split.

    Attributes:
        fraction: share of every class's training images, at least one image per class.
        classes: names of the classes to pretrain on; empty for all.
        num_classes: how many classes to pretrain on, drawn by the seed; 0 for all.
        num_categories: how many coarse classes the classes are drawn from, by the seed, equally many of each (the first
            drawn get the remainder); 0 draws them whatever their coarse class. ``num_classes`` then counts fine classes
            (0 takes all of the drawn categories), and ``labels`` only names what was drawn: coarse and fine labels of
            the same images.
        num_images: training images in total, equally many per class (the first drawn get the remainder); 0 for all.
        labels: "fine" labels, or the source's "coarse" ones. Base, validation and novel classes are always divided by
            fine class; ``classes`` and ``num_classes`` count the labels chosen here.
        min_per_class: fine classes with fewer images are left out before anything is split.
        seed: of the draws.
    """

    fraction: float = 1.0
    classes: tuple[str, ...] = ()
    num_classes: int = 0
    num_categories: int = 0
    num_images: int = 0
    labels: Literal["fine", "coarse"] = "fine"
    min_per_class: int = 0
    seed: int = 0

    def check(self) -> None:
        """Refuses values that no data could satisfy, and options that contradict each other."""
        if not 0 < self.fraction <= 1:
            raise DataError(f"subset.fraction={self.fraction:g}: give a share of the training images, 0 < share <= 1.")
        for name in ("num_classes", "num_categories", "num_images", "min_per_class"):
            if getattr(self, name) < 0:
                raise DataError(
                    f"subset.{name}={getattr(self, name)}: give a number that is not negative; 0 means all."
                )
        if self.labels not in ("fine", "coarse"):
            raise DataError(f"subset.labels={self.labels!r}: give fine or coarse.")
        if self.classes and self.num_classes:
            raise DataError("subset.classes and subset.num_classes are both given: name the classes or their number.")
        if self.classes and self.num_categories:
            raise DataError(
                "subset.classes and subset.num_categories are both given: name the classes, or draw from categories."
            )
        if 0 < self.num_classes < self.num_categories:
            raise DataError(
                f"subset.num_classes={self.num_classes} is less than one class for each of subset.num_categories="
                f"{self.num_categories}. Ask for more classes or fewer categories."
            )
        if self.fraction < 1 and self.num_images:
            raise DataError("subset.fraction and subset.num_images are both given: choose one size.")
        if len(set(self.classes)) < len(self.classes):
            raise DataError(f"subset.classes names a class twice: {', '.join(self.classes)}.")

    def sentence(self) -> str:
        """Labels and cut of train, for the record; "" when nothing is changed."""
        parts = ["coarse labels"] if self.labels == "coarse" else []
        train = [f"the classes {some(self.classes)}"] if self.classes else []
        train += [f"{self.num_classes or 'all'} classes"] if self.num_classes or self.num_categories else []
        if self.num_categories:
            train[-1] += f" of {self.num_categories} categories, equally many of each"
        train += [f"{self.num_images} images in total, equally many per class"] if self.num_images else []
        train += [f"{self.fraction:.4g} of every class's images"] if self.fraction < 1 else []
        if train:
            parts.append(f"train cut to {', '.join(train)} (seed {self.seed})")
        return "; ".join(parts)


def frequent_classes(labels: np.ndarray, num_classes: int, min_per_class: int) -> np.ndarray:
    """bool (num_classes,): the classes with at least ``min_per_class`` images and at least one."""
    return np.bincount(labels, minlength=num_classes) >= max(1, min_per_class)


def unknown_classes(wanted: Sequence[str], known: Sequence[str]) -> str:
    """The wanted classes that are not known, each with the closest known names; "" if there are none."""
    parts = []
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            parts.append(f"{name!r}" + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    return ", ".join(parts)


def choose_images(
    names: Sequence[str],
    labels: np.ndarray,
    class_names: Sequence[str],
    config: SubsetConfig,
    coarse: np.ndarray | None = None,
    coarse_names: Sequence[str] = (),
) -> np.ndarray:
    """Chooses the training images that pretraining may see.

    Args:
        names: of the training images.
        labels: int64 (N,), indices into ``class_names``, at the level of ``config.labels``; with
            ``config.num_categories`` the fine ones.
        class_names: all classes of the label space.
        config: the subset.
        coarse: int64 (N,), indices into ``coarse_names``; needed for ``config.num_categories`` only.
        coarse_names: names of the categories.

    Returns:
        bool (N,).

    Raises:
        DataError: a class that is not there, or too few classes or images.
    """
    config.check()
    order = seeded_order(names, config.seed, "subset_images")
    counts = np.bincount(labels, minlength=len(class_names))
    category = np.zeros(len(class_names), np.int64)
    if config.num_categories:
        assert coarse is not None
        category = _category_of_class(labels, class_names, coarse)
    chosen = _choose_classes(counts, class_names, config, category, coarse_names)
    quota = _quota(counts, chosen, class_names, config)
    # Rank of each image within its class, in the seeded order; the first `quota` of a class are taken.
    by_class = order[np.argsort(labels[order], kind="stable")]
    first_of_class = np.cumsum(counts) - counts
    rank = np.empty(len(names), np.int64)
    rank[by_class] = np.arange(len(names)) - first_of_class[labels[by_class]]
    return rank < quota[labels]


def _category_of_class(labels: np.ndarray, class_names: Sequence[str], coarse: np.ndarray) -> np.ndarray:
    """int64 (classes,): the coarse class of each class; -1 where a class has no image."""
    category = np.full(len(class_names), -1, np.int64)
    category[labels] = coarse
    mixed = np.unique(labels[category[labels] != coarse])
    if len(mixed):
        raise DataError(
            f"subset.num_categories: these classes have images of several coarse classes: "
            f"{some(class_names[int(i)] for i in mixed)}. Give every class one."
        )
    return category


def _choose_classes(
    counts: np.ndarray,
    class_names: Sequence[str],
    config: SubsetConfig,
    category: np.ndarray,
    category_names: Sequence[str],
) -> np.ndarray:
    """Class ids in the order in which they were drawn."""
    if config.classes:
        unknown = unknown_classes(config.classes, class_names)
        if unknown:
            raise DataError(
                f"subset.classes: not among the {len(class_names)} training classes: {unknown}. There are: "
                f"{some(class_names, 50)}."
            )
        return np.array([list(class_names).index(name) for name in config.classes], np.int64)
    order = seeded_order(class_names, config.seed, "subset_classes")
    order = order[counts[order] > 0]
    if config.num_images and config.num_classes:
        order = order[counts[order] >= -(-config.num_images // config.num_classes)]
    if config.num_categories:
        return _classes_of_categories(order, config, category, category_names)
    if not config.num_classes:
        return order
    if len(order) < config.num_classes:
        enough = f" with at least {-(-config.num_images // config.num_classes)} images" if config.num_images else ""
        raise DataError(
            f"subset.num_classes={config.num_classes}, but there are only {len(order)} training classes{enough}. "
            "Ask for fewer classes or images."
        )
    return order[: config.num_classes]


def _classes_of_categories(
    order: np.ndarray, config: SubsetConfig, category: np.ndarray, category_names: Sequence[str]
) -> np.ndarray:
    """Classes of the first categories that have enough, equally many of each, in the order of ``order``."""
    each, remainder = divmod(config.num_classes, config.num_categories)
    needed = max(1, each + (remainder > 0))
    sizes = np.bincount(category[order], minlength=len(category_names))
    drawn = seeded_order(category_names, config.seed, "subset_categories")
    drawn = drawn[sizes[drawn] >= needed][: config.num_categories]
    if len(drawn) < config.num_categories:
        enough = f", each with enough images for {config.num_images} in total" if config.num_images else ""
        raise DataError(
            f"subset.num_categories={config.num_categories}, but only {len(drawn)} of {len(category_names)} categories "
            f"have at least {needed} training classes{enough}. Ask for fewer categories, classes or images."
        )
    room = np.zeros(len(category_names), np.int64)
    room[drawn] = each + (np.arange(len(drawn)) < remainder) if config.num_classes else sizes[drawn]
    chosen = []
    for label in order:
        if room[category[label]] > 0:
            room[category[label]] -= 1
            chosen.append(label)
    return np.array(chosen, np.int64)


def _quota(counts: np.ndarray, chosen: np.ndarray, class_names: Sequence[str], config: SubsetConfig) -> np.ndarray:
    """int64 (classes,): how many images to take of each class."""
    quota = np.zeros(len(counts), np.int64)
    if not config.num_images:
        # 1e-9: 0.1 * 30 images are 3, not 4
        quota[chosen] = np.maximum(1, np.ceil(config.fraction * counts[chosen] - 1e-9)).astype(np.int64)
        return quota
    each, remainder = divmod(config.num_images, len(chosen))
    if each == 0:
        raise DataError(
            f"subset.num_images={config.num_images} is less than one image for each of {len(chosen)} classes. Ask for "
            "more images, or for fewer classes with subset.num_classes."
        )
    quota[chosen] = each
    quota[chosen[:remainder]] += 1
    short = np.flatnonzero(counts < quota)
    if len(short):
        raise DataError(
            f"subset.num_images={config.num_images} asks for up to {quota.max()} images of each of {len(chosen)} "
            f"classes, but these have fewer in train: {some(class_names[int(i)] for i in short)}. At most "
            f"{int(counts[chosen].min()) * len(chosen)} images fit; or leave small classes out with "
            "subset.min_per_class, or choose fewer with subset.num_classes."
        )
    return quota
