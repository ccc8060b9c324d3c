"""Parts of the fused kernel: separable Gaussian blur of planar float32 rows with mirrored borders.

Compiled into ``fused.py``; see there. Both directions are one symmetric sum over a long run of values, in which a
neighbour at distance k is k values away (within rows) or k rows away (across rows).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from image_data.draws import BLUR_TRUNCATE

__all__ = ["blur_rows", "fill_blur", "mirror_rows", "weigh_neighbors"]

_F = np.float32

_part = njit(nogil=True, error_model="numpy")


@_part
def fill_blur(sigma, size, weights):
    """Gaussian weights of distances 0..radius, normalised over both sides, then a 0; returns ``draws.blur_radius``."""
    radius = min(math.ceil(BLUR_TRUNCATE * sigma), size - 1)
    total = 0.0
    for k in range(-radius, radius + 1):
        total += math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(radius + 1):
        weights[k] = _F(math.exp(-0.5 * (k / sigma) ** 2) / total)
    weights[radius + 1] = _F(0)
    return radius


@_part
def weigh_neighbors(values, begin, step, weights, radius, out):
    """out[i] = sum_k weights[k] * (values[begin + i - k * step] + values[begin + i + k * step]), k = 0 counted once.

    Reads one distance past the radius, with weight 0.
    """
    n = out.shape[0]
    low, high = begin - step, begin + step
    center, before, after = values[begin : begin + n], values[low : low + n], values[high : high + n]
    weight, weight_2 = weights[0], weights[1]
    for i in range(n):
        out[i] = weight * center[i] + weight_2 * (before[i] + after[i])
    for k in range(2, radius + 1, 2):
        low, high = begin - k * step, begin + k * step
        before, after = values[low : low + n], values[high : high + n]
        before_2, after_2 = values[low - step : low - step + n], values[high + step : high + step + n]
        weight, weight_2 = weights[k], weights[k + 1]
        for i in range(n):
            out[i] += weight * (before[i] + after[i]) + weight_2 * (before_2[i] + after_2[i])


@_part
def blur_rows(run, size, weights, radius, padded, blurred):
    """Horizontal Gaussian of consecutive rows, in place: laid out with their mirrored borders and filtered at once."""
    margin = radius + 1
    step = size + 2 * margin
    num_rows = run.shape[0] // size
    for y in range(num_rows):
        row, wide = run[y * size : (y + 1) * size], padded[y * step : (y + 1) * step]
        inside = wide[margin : margin + size]
        for x in range(size):
            inside[x] = row[x]
        for k in range(1, radius + 1):
            wide[margin - k] = row[k]
            wide[margin + size - 1 + k] = row[size - 1 - k]
    weigh_neighbors(padded, margin, 1, weights, radius, blurred[: num_rows * step - 2 * margin])
    for y in range(num_rows):
        row, result = run[y * size : (y + 1) * size], blurred[y * step : y * step + size]
        for x in range(size):
            row[x] = result[x]


@_part
def mirror_rows(plane, size, margin, radius):
    """Fill the rows above and below a view with its mirror image; row 0 of the view starts at margin * size."""
    for k in range(1, radius + 1):
        top, bottom = margin * size, (margin + size - 1) * size
        above, first = plane[top - k * size : top - (k - 1) * size], plane[top + k * size : top + (k + 1) * size]
        below, last = (
            plane[bottom + k * size : bottom + (k + 1) * size],
            plane[bottom - k * size : bottom - (k - 1) * size],
        )
        for x in range(size):
            above[x] = first[x]
            below[x] = last[x]
