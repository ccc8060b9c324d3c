"""Which images keep their labels when a task is trained on a part of them (Newell & Deng's label counts).

The reference takes the first n rows of an unordered file (``princeton-vl/selfstudy: datasets/base.py``, setup_idxs), so
class counts are random and every run sees the same images. Here the classes are as even as the data allow, the images
depend on the seed, and a larger set contains the smaller ones, so that a curve over n has no jumps from the draw.
"""

from __future__ import annotations

import numpy as np

__all__ = ["label_subset"]

_WORD = 0x4C42  # keeps this draw apart from others of the same seed


def label_subset(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Rows of n images whose classes are as even as possible.

    Classes are visited in rounds, one image of each class per round, in random order; a class that has no more images
    is passed over. So class counts differ by at most 1 except where a class is exhausted, and the rows for n are a
    subset of those for any larger n with the same seed.

    Args:
        labels: integers (N,), the classes that are to be even.
        n: images to keep; 0 keeps all.
        seed: of the draw.

    Returns:
        int64 (n,), ascending rows.

    Raises:
        ValueError: n is negative or there are fewer images.
    """
    total = len(labels)
    if not 0 <= n <= total:
        raise ValueError(
            f"num_labels is {n:,}, but there are {total:,} training images; give 0 (all of them) to {total:,}."
        )
    if n == 0:
        return np.arange(total, dtype=np.int64)
    order = np.random.default_rng([_WORD, seed]).permutation(total)
    return np.sort(order[np.argsort(_rounds(labels[order]), kind="stable")[:n]]).astype(np.int64)


def _rounds(labels: np.ndarray) -> np.ndarray:
    """How many earlier entries have the same label, int64 (N,)."""
    by_class = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    rounds = np.empty(len(labels), np.int64)
    rounds[by_class] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return rounds
