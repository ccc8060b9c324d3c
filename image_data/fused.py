"""The fast renderer: crop, antialiased resize, colour operations, blur and flip of a whole batch in one compiled call.

`render_views` runs without the GIL and writes each view once, straight into a planar uint8 batch. Per image:

1. the triangle-filter taps of both axes are computed once (`fill_taps`); the flip is nothing but their order reversed;
2. a *pass* makes a block of rows at a time, small enough for the first-level cache: vertical filter over the rows
   needed, horizontal filter, then all colour operations up to the next one that needs more than its own pixel (contrast
   needs the mean gray of the image, blur its neighbours);
3. such an operation starts another pass over the rows, kept as float32; after the last operation a row is rounded to
uint8.

Everything is float32, rounded once at the end. The compiler may not reorder sums (no fastmath), so a view has the same
bytes whatever batch or thread renders it, flipped or not. ``reference.py`` does the same with torchvision.

All functions here are compiled together and cached on disk by numba, which notices changes of this file only: keep them
in one file.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from image_data.contracts import ImageBuffer
from image_data.draws import BLUR, BLUR_TRUNCATE, BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, ViewParameters

__all__ = ["fused_views", "render_views"]

# Typed constants: a Python float would turn float32 loops into float64 ones.
_F = np.float32
_ZERO, _HALF, _ONE, _TWO, _FOUR, _SIX, _WHITE = _F(0), _F(0.5), _F(1), _F(2), _F(4), _F(6), _F(255)
_RED, _GREEN, _BLUE = _F(0.2989), _F(0.587), _F(0.114)  # torchvision's rgb_to_grayscale

_BLOCK_PIXELS = 512  # pixels of a block of rows: 6 kB in float32, and long enough to pay for entering a vector loop

_compiled = njit(nogil=True, cache=True, error_model="numpy")


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


@_compiled
def fill_taps(low, length, first, last, flip, starts, weights):
    """Filter taps of one axis, as Pillow's and torch's antialiased bilinear resize.

    Args:
        low: where the box starts, in source pixels.
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
    width = 2 * math.ceil(support) + 1  # no output has more taps
    most = 1
    for i in range(size):
        center = low + (i + 0.5) * scale
        start = max(int(center - support + 0.5), first)
        stop = min(int(center + support + 0.5), last)
        row = size - 1 - i if flip else i
        total = 0.0
        for j in range(start, stop):
            total += max(1.0 - abs(j + 0.5 - center) / support, 0.0)
        for k in range(width):
            weights[row, k] = (
                _F(max(1.0 - abs(start + k + 0.5 - center) / support, 0.0) / total) if start + k < stop else _ZERO
            )
        while weights[row, stop - start - 1] <= _ZERO:
            stop -= 1
        starts[row] = start
        most = max(most, stop - start)
    return most


@_compiled
def sum_rows(image, start, count, weights, left, line):
    """Vertical filter: line[i] = sum_k weights[k] * image[start + k, left + i], float32, for all of `line`."""
    n = line.shape[0]
    right = left + n
    line[:] = _ZERO
    k = 0
    while k + 4 <= count:
        y = start + k
        a, b, c, d = image[y, left:right], image[y + 1, left:right], image[y + 2, left:right], image[y + 3, left:right]
        wa, wb, wc, wd = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for i in range(n):
            line[i] += (wa * _F(a[i]) + wb * _F(b[i])) + (wc * _F(c[i]) + wd * _F(d[i]))
        k += 4
    if k + 2 <= count:
        a, b = image[start + k, left:right], image[start + k + 1, left:right]
        wa, wb = weights[k], weights[k + 1]
        for i in range(n):
            line[i] += wa * _F(a[i]) + wb * _F(b[i])
        k += 2
    if k < count:
        a, wa = image[start + k, left:right], weights[k]
        for i in range(n):
            line[i] += wa * _F(a[i])


@_compiled
def sum_columns(line, left, count, starts, weights, red, green, blue):
    """Horizontal filter of one RGB line that begins at source pixel `left`, into three planar rows."""
    for x in range(starts.shape[0]):
        red[x], green[x], blue[x] = _weigh_pixels(line, (starts[x] - left) * 3, weights[x], count)


@_compiled
def blend(values, factor, other):
    """values = clip(factor * values + other, 0, 255)."""
    for i in range(values.shape[0]):
        values[i] = min(max(factor * values[i] + other, _ZERO), _WHITE)


@_compiled
def saturate(red, green, blue, factor):
    """Blend each pixel with its own gray; factor 0 is grayscale."""
    rest = _ONE - factor
    for i in range(red.shape[0]):
        gray = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
        red[i] = min(max(factor * red[i] + gray, _ZERO), _WHITE)
        green[i] = min(max(factor * green[i] + gray, _ZERO), _WHITE)
        blue[i] = min(max(factor * blue[i] + gray, _ZERO), _WHITE)


@_compiled
def _ramp(turn):
    """clip(min(k, 4 - k), 0, 1) of k = turn mod 6: how far a channel lies below the maximum, in units of chroma."""
    k = turn - _SIX if turn >= _SIX else turn
    return min(max(min(k, _FOUR - k), _ZERO), _ONE)


@_compiled
def shift_hue(red, green, blue, shift):
    """Turn the hue of HSV by `shift` turns, without branches and with one division a pixel.

    With maximum M, chroma c and hue h in [0, 6): channel n of (5, 3, 1) is M - c * ramp(n + h), the closed form of HSV
    to RGB.
    """
    turn = _SIX * (shift if shift >= _ZERO else _ONE + shift)
    for i in range(red.shape[0]):
        r, g, b = red[i], green[i], blue[i]
        high = max(max(r, g), b)
        chroma = high - min(min(r, g), b)
        scale = _ONE / (chroma if chroma > _ZERO else _ONE)
        hue = _FOUR + (r - g) * scale
        hue = _TWO + (b - r) * scale if g == high else hue
        hue = (g - b) * scale if r == high else hue
        hue += turn
        hue = hue + _SIX if hue < _ZERO else hue
        hue = hue - _SIX if hue >= _SIX else hue
        red[i] = high - chroma * _ramp(hue + _F(5))
        green[i] = high - chroma * _ramp(hue + _F(3))
        blue[i] = high - chroma * _ramp(hue + _F(1))


@_compiled
def apply_pointwise(red, green, blue, codes, arguments, start, stop, gray_mean):
    """Operations start..stop-1 on a run of pixels; a contrast takes the image's mean gray as given."""
    for k in range(start, stop):
        code, argument = codes[k], arguments[k]
        if code in (BRIGHTNESS, CONTRAST):
            other = _ZERO if code == BRIGHTNESS else (_ONE - argument) * gray_mean
            blend(red, argument, other)
            blend(green, argument, other)
            blend(blue, argument, other)
        elif code == SATURATION:
            saturate(red, green, blue, argument)
        elif code == HUE:
            shift_hue(red, green, blue, argument)
        elif code == GRAY:
            saturate(red, green, blue, _ZERO)


@_compiled
def add_gray(red, green, blue, totals):
    """totals[i] += gray of pixel i. Many running totals, because one would have to be summed in order, one by one."""
    for i in range(red.shape[0]):
        totals[i] += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]


@_compiled
def round_to(values, out):
    """Round to uint8; the values are already in [0, 255]."""
    for i in range(values.shape[0]):
        out[i] = np.uint8(values[i] + _HALF)


@_compiled
def _reflect(position, size):
    """Mirror a position into 0..size-1 without repeating the edge."""
    position = abs(position)
    return 2 * (size - 1) - position if position >= size else position


@_compiled
def blur_row(row, weights, radius, padded):
    """Horizontal Gaussian of one row, in place; weights[k] belongs to distance k."""
    size = row.shape[0]
    for x in range(size + 2 * radius):
        padded[x] = row[_reflect(x - radius, size)]
    center = padded[radius : radius + size]
    for x in range(size):
        row[x] = weights[0] * center[x]
    for k in range(1, radius + 1):
        before, after, weight = (
            padded[radius - k : radius - k + size],
            padded[radius + k : radius + k + size],
            weights[k],
        )
        for x in range(size):
            row[x] += weight * (before[x] + after[x])


@_compiled
def blur_column(plane, y, size, weights, radius, row):
    """Vertical Gaussian: row y of a plane (S * S,) into `row`."""
    center = plane[y * size : (y + 1) * size]
    for x in range(size):
        row[x] = weights[0] * center[x]
    for k in range(1, radius + 1):
        top, bottom, weight = _reflect(y - k, size) * size, _reflect(y + k, size) * size, weights[k]
        before, after = plane[top : top + size], plane[bottom : bottom + size]
        for x in range(size):
            row[x] += weight * (before[x] + after[x])


@_compiled
def fill_blur(sigma, size, weights):
    """Gaussian weights of distances 0..radius, normalised over both sides; returns the radius (``draws.blur_radius``)."""
    radius = min(math.ceil(BLUR_TRUNCATE * sigma), size - 1)
    total = 0.0
    for k in range(-radius, radius + 1):
        total += math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(radius + 1):
        weights[k] = _F(math.exp(-0.5 * (k / sigma) ** 2) / total)
    return radius


class _Scratch(NamedTuple):
    """Buffers of one thread, used again for every image (S: side of the view)."""

    starts_y: np.ndarray  # int64 (S,)
    starts_x: np.ndarray
    weights_y: np.ndarray  # float32 (S, T), T: most taps of the batch
    weights_x: np.ndarray
    line: np.ndarray  # float32, one RGB row of the source after the vertical filter
    block: np.ndarray  # float32 (3, rows of a block * S)
    planes: np.ndarray  # float32 (2, 3, S * S), the view between two passes
    totals: np.ndarray  # float32 (rows of a block * S,)
    blur: np.ndarray  # float32 (S,)
    padded: np.ndarray  # float32 (3 * S,)


@_compiled
def resize_rows(image, top, bottom, count_y, count_x, left, width, scratch, size, red, green, blue):
    """Rows top..bottom-1 of the resized view into planar runs; source columns left..left+width-1 are read."""
    line = scratch.line[: width * 3]
    for y in range(top, bottom):
        row = slice((y - top) * size, (y - top + 1) * size)
        start = scratch.starts_y[y]
        count = min(count_y, image.shape[0] - start)  # what lies past the image has weight 0
        sum_rows(image, start, count, scratch.weights_y[y], left * 3, line)
        sum_columns(scratch.line, left, count_x, scratch.starts_x, scratch.weights_x, red[row], green[row], blue[row])


@_compiled
def finish_rows(red, green, blue, position, codes, arguments, start, stop, gray_mean, radius, scratch, size, out):
    """Operations start..stop-1 on whole rows, then what operation `stop` needs, or the end: uint8 into `out`."""
    apply_pointwise(red, green, blue, codes, arguments, start, stop, gray_mean)
    end = position + red.shape[0]
    if stop == codes.shape[0]:
        round_to(red, out[0, position:end])
        round_to(green, out[1, position:end])
        round_to(blue, out[2, position:end])
    elif codes[stop] == CONTRAST:
        add_gray(red, green, blue, scratch.totals)
    else:
        for first in range(0, red.shape[0], size):
            blur_row(red[first : first + size], scratch.blur, radius, scratch.padded)
            blur_row(green[first : first + size], scratch.blur, radius, scratch.padded)
            blur_row(blue[first : first + size], scratch.blur, radius, scratch.padded)


@_compiled
def next_stop(codes, start):
    """The first operation from `start` on that needs more than its own pixel, or the number of operations."""
    for k in range(start, codes.shape[0]):
        if codes[k] == CONTRAST or codes[k] == BLUR:
            return k
    return codes.shape[0]


@_compiled
def resize_pass(image, box, crop_first, codes, arguments, stop, radius, flip, scratch, size, out):
    """First pass: resize, operations before `stop`; the rows stay in plane 0 unless they are finished."""
    top, left, height, width = box[0], box[1], box[2], box[3]
    first_y, last_y, first_x, last_x = 0, image.shape[0], 0, image.shape[1] // 3
    if crop_first:
        first_y, last_y, first_x, last_x = int(top), int(top + height), int(left), int(left + width)
    count_y = fill_taps(top, height, first_y, last_y, False, scratch.starts_y, scratch.weights_y)
    count_x = fill_taps(left, width, first_x, last_x, flip, scratch.starts_x, scratch.weights_x)
    source_left = min(scratch.starts_x[0], scratch.starts_x[size - 1])
    source_right = min(max(scratch.starts_x[0], scratch.starts_x[size - 1]) + count_x, last_x)
    rows = scratch.block.shape[1] // size
    for y in range(0, size, rows):
        bottom = min(y + rows, size)
        run = slice(0, (bottom - y) * size) if stop == codes.shape[0] else slice(y * size, bottom * size)
        work = scratch.block if stop == codes.shape[0] else scratch.planes[0]
        red, green, blue = work[0, run], work[1, run], work[2, run]
        resize_rows(
            image, y, bottom, count_y, count_x, source_left, source_right - source_left, scratch, size, red, green, blue
        )
        finish_rows(red, green, blue, y * size, codes, arguments, 0, stop, _ZERO, radius, scratch, size, out)


@_compiled
def later_pass(source, codes, arguments, start, stop, gray_mean, radius, scratch, size, out):
    """A pass that begins with a contrast (in place) or with the vertical half of a blur (into the other plane)."""
    rows = scratch.block.shape[1] // size
    blurs = codes[start] == BLUR
    for y in range(0, size, rows):
        bottom = min(y + rows, size)
        run = slice(y * size, bottom * size)
        work = scratch.planes[1 - source] if blurs else scratch.planes[source]
        red, green, blue = work[0, run], work[1, run], work[2, run]
        if blurs:
            for row in range(y, bottom):
                inside = slice((row - y) * size, (row - y + 1) * size)
                blur_column(scratch.planes[source, 0], row, size, scratch.blur, radius, red[inside])
                blur_column(scratch.planes[source, 1], row, size, scratch.blur, radius, green[inside])
                blur_column(scratch.planes[source, 2], row, size, scratch.blur, radius, blue[inside])
        finish_rows(red, green, blue, y * size, codes, arguments, start, stop, gray_mean, radius, scratch, size, out)
    return 1 - source if blurs else source


@_compiled
def render_image(image, box, crop_first, codes, arguments, flip, scratch, size, out):
    """One view of one image, uint8 (H, W * 3), into `out`, uint8 (3, S * S)."""
    num_codes = codes.shape[0]
    start, stop, source, radius = 0, next_stop(codes, 0), 0, 0
    first = True
    gray_mean = _ZERO
    while first or start < num_codes:
        if stop < num_codes and codes[stop] == BLUR:
            radius = fill_blur(float(arguments[stop]), size, scratch.blur)
        scratch.totals[:] = _ZERO
        if first:
            resize_pass(image, box, crop_first, codes, arguments, stop, radius, flip, scratch, size, out)
        else:
            source = later_pass(source, codes, arguments, start, stop, gray_mean, radius, scratch, size, out)
        total = 0.0
        for value in scratch.totals:
            total += value
        gray_mean = _F(total / (size * size))
        first = False
        start, stop = stop, next_stop(codes, stop + 1)


@_compiled
def render_views(
    pixels, offsets, heights, widths, boxes, crop_first, codes, arguments, flips, num_taps, first, last, out
):
    """Views of images first..last-1 of a batch into `out`, uint8 (B, 3, S, S), C-contiguous."""
    size = out.shape[3]
    block_pixels = max(1, _BLOCK_PIXELS // size) * size
    scratch = _Scratch(
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty((size, num_taps), np.float32),
        np.empty((size, num_taps), np.float32),
        np.zeros((widths[first:last].max() + num_taps + 1) * 3, np.float32),
        np.empty((3, block_pixels), np.float32),
        np.empty((2, 3, size * size), np.float32),
        np.empty(block_pixels, np.float32),
        np.empty(size, np.float32),
        np.empty(3 * size, np.float32),
    )
    for i in range(first, last):
        height, width = np.int64(heights[i]), np.int64(widths[i])
        image = pixels[offsets[i] : offsets[i] + height * width * 3].reshape(height, width * 3)
        planar = out[i].reshape(3, size * size)
        render_image(image, boxes[i], crop_first, codes[i], arguments[i], flips[i], scratch, size, planar)


def fused_views(images: ImageBuffer, parameters: ViewParameters, out: np.ndarray, first: int, last: int) -> None:
    """Fill rows first..last-1 of `out`, uint8 (B, 3, S, S), C-contiguous."""
    if first >= last:
        return
    # A read-only plain array, whatever a memory map or a writable buffer came in: one compiled version serves all.
    pixels = np.asarray(images.pixels)[:]
    pixels.flags.writeable = False
    largest_scale = max(1.0, float(parameters.boxes[first:last, 2:].max()) / out.shape[-1])
    render_views(
        pixels,
        images.offsets,
        images.heights,
        images.widths,
        parameters.boxes,
        parameters.crop_first,
        parameters.codes,
        parameters.arguments,
        parameters.flips,
        2 * math.ceil(largest_scale) + 1,
        first,
        last,
        out,
    )
