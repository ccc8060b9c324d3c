"""The seeded rule that splits a source: classes first, then the images of the base classes.

Order comes from a hash of (purpose, seed, name), never from the order of files or from a generator's stream. So the
same names are split in the same way on every machine, file system and NumPy version, and a smaller subset is contained
in a larger one of the same seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from image_data.contracts import DataError

__all__ = ["ClassSplit", "check_fractions", "seeded_order", "split_classes", "split_images"]


class ClassSplit(NamedTuple):
    """Ids of the classes of each role, ascending.

    Attributes:
        base: classes whose images pretraining may see.
        val: classes for choosing hyperparameters of few-shot tasks ("val_classes").
        novel: classes for the final report ("novel_classes").
    """

    base: np.ndarray
    val: np.ndarray
    novel: np.ndarray


def seeded_order(names: Sequence[str], seed: int, purpose: str) -> np.ndarray:
    """A pseudo-random order that depends on the set of names, the seed and the purpose only.

    Args:
        names: of the things to order; equal names keep their given order.
        seed: any integer.
        purpose: makes the orders of different decisions independent.

    Returns:
        int64 (N,), indices into ``names``.
    """
    if len(names) == 0:
        return np.zeros(0, np.int64)
    start = hashlib.blake2b(f"{purpose}\0{seed}\0".encode(), digest_size=16)
    digests = bytearray()
    for name in names:
        state = start.copy()
        state.update(name.encode())
        digests += state.digest()
    keys = np.frombuffer(bytes(digests), dtype=">u8").reshape(-1, 2)
    return np.lexsort((keys[:, 1], keys[:, 0])).astype(np.int64)


def check_fractions(fractions: Sequence[float], option: str, parts: str) -> None:
    """Refuses fractions of a split that are not three shares of one whole.

    Args:
        fractions: the option's value.
        option: its name, for the error.
        parts: what the three shares are, for the error.
    """
    good = len(fractions) == 3 and all(0 <= f <= 1 for f in fractions) and abs(sum(fractions) - 1) < 1e-6
    if not good or fractions[0] <= 0:
        raise DataError(
            f"{option}={tuple(fractions)} (sum {sum(fractions):g}) is not a split: give the shares of {parts}, three "
            "numbers from 0 to 1 whose sum is 1 and of which the first is not 0."
        )


def split_classes(class_names: Sequence[str], fractions: tuple[float, float, float], seed: int) -> ClassSplit:
    """Divides classes into base, validation and novel ones.

    Every part with a positive share gets at least one class; numbers of classes are rounded, base takes the rest.

    Args:
        class_names: names of all classes.
        fractions: shares of base, validation and novel classes.
        seed: of the order.

    Raises:
        DataError: fewer classes than parts.
    """
    check_fractions(fractions, "class_split", "base, validation and novel classes")
    parts = sum(f > 0 for f in fractions)
    if len(class_names) < parts:
        raise DataError(
            f"{len(class_names)} classes ({', '.join(class_names) or 'none'}) are too few for class_split={fractions}, "
            f"which needs at least {parts}. Use class_split=None (pretraining then sees all classes) or more classes."
        )
    order = seeded_order(class_names, seed, "class_split")
    num_val, num_novel = (max(1, round(f * len(class_names))) if f > 0 else 0 for f in fractions[1:])
    while num_val + num_novel >= len(class_names):  # rounding up may leave nothing for base
        num_val, num_novel = (num_val - 1, num_novel) if num_val > num_novel else (num_val, num_novel - 1)
    cuts = [num_novel, num_novel + num_val]
    novel, val, base = (np.sort(part) for part in np.split(order, cuts))
    return ClassSplit(base, val, novel)


def split_images(
    names: Sequence[str],
    labels: np.ndarray,
    groups: Sequence[str] | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> np.ndarray:
    """Divides images into train, val and test, class by class, keeping every group together.

    Within a class, units (a group's images, or one image) are taken in the seeded order: a unit goes to val while val
    stays within half a unit of its share, then to test likewise, else to train. A class with at least three units has
    images in every part with a positive share; one with fewer may be in train alone. A group that spans classes counts
    for the class that most of its images have (of equally frequent ones, the first).

    Args:
        names: of the images; unique.
        labels: int64 (N,), class ids.
        groups: one per image, or None when every image is on its own.
        fractions: shares of train, val and test.
        seed: of the order.

    Returns:
        int8 (N,): 0 train, 1 val, 2 test.
    """
    check_fractions(fractions, "image_split", "train, val and test images")
    unit_of_image, unit_names = _units(names, groups)
    sizes = np.bincount(unit_of_image, minlength=len(unit_names))
    unit_class = _majority_class(unit_of_image, labels, len(unit_names))
    part_of_unit = np.zeros(len(unit_names), np.int8)
    order = seeded_order(unit_names, seed, "image_split")
    by_class = order[np.argsort(unit_class[order], kind="stable")]
    boundaries = np.flatnonzero(np.diff(unit_class[by_class])) + 1
    for units in np.split(by_class, boundaries):
        part_of_unit[units] = _divide(sizes[units], fractions)
    return part_of_unit[unit_of_image]


def _units(names: Sequence[str], groups: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """(unit id per image, name per unit); a unit is what may not be divided."""
    if groups is None:
        return np.arange(len(names)), list(names)
    ids: dict[str, int] = {}
    unit_of_image = np.fromiter((ids.setdefault(group, len(ids)) for group in groups), np.int64, len(groups))
    return unit_of_image, list(ids)


def _majority_class(unit_of_image: np.ndarray, labels: np.ndarray, num_units: int) -> np.ndarray:
    pairs, counts = np.unique(np.stack([unit_of_image, labels], axis=1), axis=0, return_counts=True)
    result = np.zeros(num_units, np.int64)
    order = np.lexsort((-pairs[:, 1], counts))  # the last write wins: most images, then the smallest label
    result[pairs[order, 0]] = pairs[order, 1]
    return result


def _divide(sizes: np.ndarray, fractions: tuple[float, float, float]) -> np.ndarray:
    """Parts (0 train, 1 val, 2 test) of one class's units, which come in the seeded order."""
    total = int(sizes.sum())
    parts = np.zeros(len(sizes), np.int8)
    filled = [0.0, 0.0, 0.0]
    targets = [f * total for f in fractions]
    for unit, size in enumerate(sizes):
        for part in (1, 2):
            if filled[part] + size / 2 <= targets[part] + 1e-9:  # 1e-9: 0.1 * 5 counts as a half
                parts[unit] = part
                filled[part] += size
                break
    if len(sizes) >= 3:
        _fill_empty_parts(parts, sizes, fractions)
    return parts


def _fill_empty_parts(parts: np.ndarray, sizes: np.ndarray, fractions: tuple[float, float, float]) -> None:
    """Moves the smallest unit of the part with the most units into each empty part, in place."""
    for part in range(3):
        if fractions[part] > 0 and not (parts == part).any():
            donors = np.flatnonzero(parts == np.bincount(parts, minlength=3).argmax())
            parts[donors[np.argmin(sizes[donors])]] = part
