"""The fast renderer: crop, antialiased resize, colour operations, blur and flip of a whole batch in one compiled call.

`render_views` runs without the GIL and writes each view once, straight into a planar uint8 batch. Per image:

1. the triangle-filter taps of both axes are computed once; the flip is nothing but their order reversed;
2. a *pass* makes a block of rows at a time, small enough for the first-level cache: vertical filter over the rows
needed,
   horizontal filter, then all colour operations up to the next one that needs more than its own pixel (contrast needs
   the mean gray of the image, blur its neighbours);
3. such an operation starts another pass over the rows, kept as float32; finished rows are rounded to uint8.

Everything is float32, rounded once at the end. The compiler may not reorder sums (no fastmath), so a view has the same
bytes whatever batch or thread renders it, flipped or not. ``reference.py`` does the same with torchvision.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from image_data import draws, fused_blur, fused_color, fused_resize
from image_data.contracts import ImageBuffer
from image_data.draws import BLUR, CONTRAST, ViewParameters, blur_radius
from image_data.fused_blur import blur_rows, fill_blur, mirror_rows, weigh_neighbors
from image_data.fused_color import add_gray, apply_pointwise, round_to
from image_data.fused_resize import fill_taps, sum_columns, sum_rows

__all__ = ["SOURCE_DIGEST", "fused_views", "render_views"]

_BLOCK_PIXELS = 512  # pixels of a block of rows: 6 kB in float32, and long enough to pay for entering a vector loop

# numba's cache on disk notices changes of this file only; this number makes it notice changes of the parts.
SOURCE_DIGEST = zlib.crc32(
    b"".join(Path(str(part.__file__)).read_bytes() for part in (draws, fused_blur, fused_color, fused_resize))
)

_part = njit(nogil=True, error_model="numpy")
_inlined = njit(inline="always", nogil=True, error_model="numpy")  # a third less compile time for the large functions


class _Scratch(NamedTuple):
    """Buffers of one thread, used again for every image (S: side of the view)."""

    starts_y: np.ndarray  # int64 (S,)
    starts_x: np.ndarray
    weights_y: np.ndarray  # float32 (S, T), T: most taps of the batch
    weights_x: np.ndarray
    line: np.ndarray  # float32, one RGB row of the source after the vertical filter
    block: np.ndarray  # float32 (3, rows of a block * S)
    planes: np.ndarray  # float32 (2, 3, (S + 2 * margin) * S), the view between two passes, between mirrored rows
    margin: int  # largest blur radius + 1
    totals: np.ndarray  # float32 (rows of a block * S,)
    blur: np.ndarray  # float32 (margin + 1,), weights of the blur
    padded: np.ndarray  # float32 (2, rows of a block * (S + 2 * margin)), rows with mirrored borders, and their blur


@_part
def place_taps(image, box, crop_first, flip, scratch):
    """Fill the taps of both axes; returns taps per row, taps per column, first source column, source columns."""
    top, left, height, width = box[0], box[1], box[2], box[3]
    first_y, last_y, first_x, last_x = 0, image.shape[0], 0, image.shape[1] // 3
    if crop_first:
        first_y, last_y, first_x, last_x = int(top), int(top + height), int(left), int(left + width)
    upright = np.bool_(False)  # a literal would compile `fill_taps` twice
    count_y = fill_taps(top, height, first_y, last_y, upright, scratch.starts_y, scratch.weights_y)
    count_x = fill_taps(left, width, first_x, last_x, flip, scratch.starts_x, scratch.weights_x)
    left_end, right_end = scratch.starts_x[0], scratch.starts_x[-1]
    source_left = min(left_end, right_end)
    return count_y, count_x, source_left, min(max(left_end, right_end) + count_x, last_x) - source_left


@_part
def resize_rows(image, window, top, bottom, scratch, work, begin):
    """Rows top..bottom-1 of the resized view into pixels `begin`... of `work`; `window` is from `place_taps`."""
    count_y, count_x, left, width = window
    size = scratch.starts_x.shape[0]
    for y in range(top, bottom):
        start = scratch.starts_y[y]
        count = min(count_y, image.shape[0] - start)  # what lies past the image has weight 0
        sum_rows(image, start, count, scratch.weights_y[y], left * 3, scratch.line[: width * 3])
        end = begin + size
        red, green, blue = work[0, begin:end], work[1, begin:end], work[2, begin:end]
        sum_columns(scratch.line, left, count_x, scratch.starts_x, scratch.weights_x, red, green, blue)
        begin = end


@_part
def finish_rows(work, begin, end, codes, stop, radius, scratch, out, position):
    """After the operations of a pass: prepare what operation `stop` needs, or round to `out` if there is none."""
    size = scratch.starts_x.shape[0]
    if stop == codes.shape[0]:
        for channel in range(3):
            round_to(work[channel, begin:end], out[channel, position : position + end - begin])
    elif codes[stop] == CONTRAST:
        add_gray(work[0, begin:end], work[1, begin:end], work[2, begin:end], scratch.totals)
    else:
        for channel in range(3):
            run = work[channel, begin:end]
            blur_rows(run, size, scratch.blur, radius, scratch.padded[0], scratch.padded[1])


@_part
def next_stop(codes, start):
    """The first operation from `start` on that needs more than its own pixel, or the number of operations."""
    for k in range(start, codes.shape[0]):
        if codes[k] in (CONTRAST, BLUR):
            return k
    return codes.shape[0]


@_inlined
def run_pass(image, window, source, codes, arguments, start, stop, gray_mean, radius, scratch, out):
    """One pass over the view, operations start..stop-1; returns the plane in which its rows are.

    It begins with the resize (start < 0), with a contrast (in place) or with the vertical half of a blur (into the
    other plane). Rows that are finished after the pass need no plane and go through the small block buffer.
    """
    size = scratch.starts_x.shape[0]
    rows = scratch.block.shape[1] // size
    resizes = start < 0
    blurs = not resizes and codes[start] == BLUR
    target = source
    if blurs:
        target = 1 - source
        for channel in range(3):
            mirror_rows(scratch.planes[source, channel], size, scratch.margin, radius)
    passes_through = stop == codes.shape[0] and (resizes or blurs)
    for top in range(0, size, rows):
        bottom = min(top + rows, size)
        work = scratch.block if passes_through else scratch.planes[target]
        position = (scratch.margin + top) * size
        begin = 0 if passes_through else position
        end = begin + (bottom - top) * size
        if resizes:
            resize_rows(image, window, top, bottom, scratch, work, begin)
        elif blurs:
            for channel in range(3):
                values, run = scratch.planes[source, channel], work[channel, begin:end]
                weigh_neighbors(values, position, size, scratch.blur, radius, run)
        apply_pointwise(work, begin, end, codes, arguments, max(start, 0), stop, gray_mean)
        finish_rows(work, begin, end, codes, stop, radius, scratch, out, top * size)
    return target


@_inlined
def render_image(image, box, crop_first, codes, arguments, flip, scratch, out):
    """One view of one image, uint8 (H, W * 3), into `out`, uint8 (3, S * S)."""
    window = place_taps(image, box, crop_first, flip, scratch)
    size, num_codes = scratch.starts_x.shape[0], codes.shape[0]
    start, source, radius, gray_mean = np.int64(-1), np.int64(0), np.int64(0), np.float32(0)
    while start < num_codes:
        stop = next_stop(codes, start + 1)
        if stop < num_codes and codes[stop] == BLUR:
            radius = fill_blur(float(arguments[stop]), size, scratch.blur)
        for i in range(scratch.totals.shape[0]):
            scratch.totals[i] = np.float32(0)
        source = run_pass(image, window, source, codes, arguments, start, stop, gray_mean, radius, scratch, out)
        total = 0.0  # float64: exact, so that a mirrored view has the same mean
        for value in scratch.totals:
            total += value
        gray_mean = np.float32(total / (size * size))
        start = stop


@njit(nogil=True, cache=True, error_model="numpy")
def render_views(
    pixels,
    offsets,
    heights,
    widths,
    boxes,
    crop_first,
    codes,
    arguments,
    flips,
    taps,
    radius,
    first,
    last,
    out,
    key=SOURCE_DIGEST,
):
    """Views of images first..last-1 of a batch into `out`, uint8 (B, 3, S, S), C-contiguous.

    Args:
        taps: at least the resize taps of any output row or column.
        radius: at least the radius of any blur.
        key: never given; its default is part of the signature and so of the key of numba's cache.
    """
    size = out.shape[3]
    block_rows, margin = max(1, _BLOCK_PIXELS // size), radius + 1
    scratch = _Scratch(
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty((size, taps), np.float32),
        np.empty((size, taps), np.float32),
        np.zeros((widths[first:last].max() + taps + 1) * 3, np.float32),
        np.empty((3, block_rows * size), np.float32),
        np.zeros((2, 3, (size + 2 * margin) * size), np.float32),  # zeros: finite where only a weight 0 reads
        margin,
        np.empty(block_rows * size, np.float32),
        np.empty(margin + 1, np.float32),
        np.zeros((2, block_rows * (size + 2 * margin)), np.float32),
    )
    for i in range(first, last):
        height, width = heights[i], widths[i]
        image = pixels[offsets[i] : offsets[i] + height * width * 3].reshape(height, width * 3)
        planar = out[i].reshape(3, size * size)
        render_image(image, boxes[i], crop_first, codes[i], arguments[i], flips[i], scratch, planar)


def fused_views(images: ImageBuffer, parameters: ViewParameters, out: np.ndarray, first: int, last: int) -> None:
    """Fill rows first..last-1 of `out`, uint8 (B, 3, S, S), C-contiguous."""
    if first >= last:
        return
    # Whatever comes in (memory map, Ray's read-only arrays, other integer types), the compiled function sees one set of
    # types: each new set would be compiled anew.
    pixels = np.asarray(images.pixels)[:]
    pixels.flags.writeable = False
    size = out.shape[-1]
    largest_scale = max(1.0, float(parameters.boxes[first:last, 2:].max()) / size)
    blurs = parameters.codes[first:last] == BLUR
    assert blurs.sum(axis=1).max() <= 1, "one blur a view: a pass keeps the weights of one"
    largest_sigma = float(parameters.arguments[first:last].max(initial=0.0, where=blurs))
    render_views(
        pixels,
        np.array(images.offsets, np.int64),
        np.array(images.heights, np.int64),
        np.array(images.widths, np.int64),
        parameters.boxes,
        parameters.crop_first,
        parameters.codes,
        parameters.arguments,
        parameters.flips,
        2 * math.ceil(largest_scale) + 1,
        blur_radius(largest_sigma, size),
        first,
        last,
        out,
    )
