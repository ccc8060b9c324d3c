"""From 2 x 2 samples per pixel to fragments: the parts of a pixel that one primitive covers, each lit only once."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["group_samples"]


@njit(cache=True, nogil=True, error_model="numpy")
def group_samples(samples, owners):
    """Groups the four samples of every pixel by primitive.

    Args:
        samples: (2 S, 2 S) depths. owners: int32 (2 S, 2 S), primitive numbers, -1 for the wall.

    Returns:
        pixel, owner: int32 (F,) per fragment, in pixel order.
        values: (F, 6): column 0 the share of the pixel, column 1 the fragment's first sample (0 to 3), rest unset.
        depth: (S, S): the nearest sample, 0 where less than half of the pixel shows the object.
    """
    size = samples.shape[0] // 2
    pixel, owner = np.empty(4 * size * size, np.int32), np.empty(4 * size * size, np.int32)
    share, first = np.empty(4 * size * size), np.empty(4 * size * size)
    depth = np.zeros((size, size))
    count = 0
    for i in range(size * size):
        row, column = 2 * (i // size), 2 * (i % size)
        begin, covered, nearest = count, 0, np.inf
        for sample in range(4):
            k = owners[row + sample // 2, column + sample % 2]
            if k >= 0:
                covered += 1
                nearest = min(nearest, samples[row + sample // 2, column + sample % 2])
            f = begin
            while f < count and owner[f] != k:
                f += 1
            if f == count:
                pixel[f], owner[f], share[f], first[f] = i, k, 0.0, sample
                count += 1
            share[f] += 0.25
        if covered >= 2:
            depth[i // size, i % size] = nearest
    values = np.empty((count, 6))
    for f in range(count):
        values[f, 0], values[f, 1] = share[f], first[f]
    return pixel[:count].copy(), owner[:count].copy(), values, depth
