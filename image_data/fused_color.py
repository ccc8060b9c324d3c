"""Parts of the fused kernel: colour operations on planar float32 rows with values in [0, 255].

Compiled into ``fused.py``; see there. Formulas are torchvision's.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from image_data.draws import BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, SOLARIZE

__all__ = ["add_gray", "apply_pointwise", "round_to"]

# Typed constants: a Python float would turn float32 loops into float64 ones.
_F = np.float32
_ZERO, _HALF, _ONE, _TWO, _FOUR, _SIX, _WHITE = _F(0), _F(0.5), _F(1), _F(2), _F(4), _F(6), _F(255)
_RED, _GREEN, _BLUE = _F(0.2989), _F(0.587), _F(0.114)  # torchvision's rgb_to_grayscale

_part = njit(nogil=True, error_model="numpy")


@_part
def blend(values, factor, other):
    """values = clip(factor * values + other, 0, 255)."""
    for i in range(values.shape[0]):
        values[i] = min(max(factor * values[i] + other, _ZERO), _WHITE)


@_part
def saturate(red, green, blue, factor):
    """Blend each pixel with its own gray; factor 0 is grayscale."""
    rest = _ONE - factor
    for i in range(red.shape[0]):
        gray = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
        red[i] = min(max(factor * red[i] + gray, _ZERO), _WHITE)
        green[i] = min(max(factor * green[i] + gray, _ZERO), _WHITE)
        blue[i] = min(max(factor * blue[i] + gray, _ZERO), _WHITE)


@_part
def invert_above(values, threshold):
    """values = white - values where values >= threshold."""
    for i in range(values.shape[0]):
        values[i] = _WHITE - values[i] if values[i] >= threshold else values[i]


@_part
def _ramp(turn):
    """clip(min(k, 4 - k), 0, 1) of k = turn mod 6: how far a channel lies below the maximum, in units of chroma."""
    k = turn - _SIX if turn >= _SIX else turn
    return min(max(min(k, _FOUR - k), _ZERO), _ONE)


@_part
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


@_part
def apply_pointwise(work, begin, end, codes, arguments, start, stop, gray_mean):
    """Operations start..stop-1 on pixels begin..end-1 of `work` (3, N); contrast uses the given mean gray."""
    red, green, blue = work[0, begin:end], work[1, begin:end], work[2, begin:end]
    for k in range(start, stop):
        code, argument = codes[k], arguments[k]
        if code in (BRIGHTNESS, CONTRAST):
            other = _ZERO if code == BRIGHTNESS else (_ONE - argument) * gray_mean
            for channel in range(3):
                blend(work[channel, begin:end], argument, other)
        elif code in (SATURATION, GRAY):
            saturate(red, green, blue, argument if code == SATURATION else _ZERO)
        elif code == HUE:
            shift_hue(red, green, blue, argument)
        elif code == SOLARIZE:
            for channel in range(3):
                invert_above(work[channel, begin:end], argument * _WHITE)


@_part
def add_gray(red, green, blue, totals):
    """totals[i] += gray of pixel i. Many running totals, because one would have to be summed in order, one by one."""
    for i in range(red.shape[0]):
        totals[i] += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]


@_part
def round_to(values, out):
    """Round to uint8; the values are already in [0, 255]."""
    for i in range(values.shape[0]):
        out[i] = np.uint8(values[i] + _HALF)
