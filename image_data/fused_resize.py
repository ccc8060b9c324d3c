"""Parts of the fused kernel: antialiased bilinear resize of one uint8 image, rows first, then columns.

Compiled into ``fused.py``; see there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["fill_taps", "sum_columns", "sum_rows"]

_F = np.float32
_ZERO = _F(0)  # a Python float would turn float32 loops into float64 ones

_part = njit(nogil=True, error_model="numpy")


@intrinsic
def _weigh_pixels(typing_context: Any, line: Any, start: Any, weights: Any, count: Any) -> Any:
    """sum_k weights[k] * pixel k after position `start` of an RGB float32 line, as (r, g, b).

    One four-lane product per pixel, where plain loops compile to three scalar ones (2 x the time of the horizontal
    filter). The fourth lane is the next pixel's red and is dropped, so the line must be one value longer than its
    pixels.
    """
    signature = types.UniTuple(types.float32, 3)(line, types.intp, weights, types.intp)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lanes = ir.VectorType(ir.FloatType(), 4)
        lane = ir.IntType(32)
        undefined = ir.Constant(lanes, ir.Undefined)
        line_data = context.make_array(signature.args[0])(context, builder, values[0]).data
        weights_data = context.make_array(signature.args[2])(context, builder, values[2]).data
        total = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * 4))
        first = builder.gep(line_data, [values[1]])
        with cgutils.for_range(builder, values[3]) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, 3))
            pixel = builder.load(builder.bitcast(builder.gep(first, [offset]), lanes.as_pointer()), align=4)
            weight = builder.load(builder.gep(weights_data, [loop.index]))
            weight = builder.insert_element(undefined, weight, ir.Constant(lane, 0))
            weight = builder.shuffle_vector(weight, undefined, ir.Constant(ir.VectorType(lane, 4), [0] * 4))
            builder.store(builder.fadd(builder.load(total), builder.fmul(pixel, weight)), total)
        rgb = builder.load(total)
        channels = [builder.extract_element(rgb, ir.Constant(lane, channel)) for channel in range(3)]
        return context.make_tuple(builder, signature.return_type, channels)

    return signature, generate


@_part
def fill_taps(low, length, first, last, flip, starts, weights):
    """Filter taps of one axis, as Pillow's and torch's antialiased bilinear resize.

    An output whose centre lies outside first..last gets no weights: black.

    Args:
        low: where the box starts, in source pixels; it may lie before `first`.
        length: length of the box, in source pixels.
        first: first source pixel that may be read.
        last: one past the last that may be read.
        flip: store the outputs in reverse order.
        starts: int64 (S,), filled with the first source pixel of each output.
        weights: float32 (S, T), filled; zero after each output's last tap.

    Returns:
        The largest number of taps.
    """
    size = starts.shape[0]
    scale = length / size
    support = max(scale, 1.0)
    slope = 1.0 / support
    width = 2 * math.ceil(support) + 1  # no output has more taps
    most = 1
    for i in range(size):
        center = low + (i + 0.5) * scale
        start = max(int(center - support + 0.5), first)
        stop = min(int(center + support + 0.5), last)
        row = size - 1 - i if flip else i
        if not first <= center <= last:
            starts[row] = first if center < first else last - 1  # a pixel that may be read
            weights[row, :width] = _ZERO
            continue
        total = 0.0
        for j in range(start, stop):
            weight = max(1.0 - abs(j + 0.5 - center) * slope, 0.0)
            weights[row, j - start] = _F(weight)
            total += weight
        normalizer = _F(1.0 / total)
        for k in range(stop - start):
            weights[row, k] *= normalizer
        for k in range(stop - start, width):
            weights[row, k] = _ZERO
        while weights[row, stop - start - 1] <= _ZERO:
            stop -= 1
        starts[row] = start
        most = max(most, stop - start)
    return most


@_part
def sum_rows(image, start, count, weights, left, line):
    """Vertical filter: line[i] = sum_k weights[k] * image[start + k, left + i], float32, for all of `line`."""
    n = line.shape[0]
    right = left + n
    a, weight = image[start, left:right], weights[0]
    if count == 1:
        for i in range(n):
            line[i] = weight * _F(a[i])
        return
    b, weight_2 = image[start + 1, left:right], weights[1]
    for i in range(n):
        line[i] = weight * _F(a[i]) + weight_2 * _F(b[i])
    for k in range(2, count - 1, 2):
        a, weight = image[start + k, left:right], weights[k]
        b, weight_2 = image[start + k + 1, left:right], weights[k + 1]
        for i in range(n):
            line[i] += weight * _F(a[i]) + weight_2 * _F(b[i])
    if count % 2:
        a, weight = image[start + count - 1, left:right], weights[count - 1]
        for i in range(n):
            line[i] += weight * _F(a[i])


@_part
def sum_columns(line, left, count, starts, weights, red, green, blue):
    """Horizontal filter of one RGB line that begins at source pixel `left`, into three planar rows."""
    for x in range(starts.shape[0]):
        position = (starts[x] - left) * 3
        red[x], green[x], blue[x] = _weigh_pixels(line, position, weights[x], count)  # pyright: ignore[reportCallIssue]
