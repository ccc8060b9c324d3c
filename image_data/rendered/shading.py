"""Procedural solid textures and the final colour of each pixel: numba kernels without the GIL.

A material is a row of 16 numbers: texture kind, colours A (3) and B (3) in [0, 1] RGB, frequency, phase (3), axis (3,
unit vector), tint, spare. The texture value m in [0, 1] at a point mixes A and B. Only exact IEEE operations are used.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["MATERIAL_SIZE", "NUM_TEXTURES", "shade"]

MATERIAL_SIZE = 16
FLAT, STRIPES, CHECKER, DOTS, CLOUDS, MARBLE, RINGS, BRICKS, PATCHES, WEAVE = range(10)
NUM_TEXTURES = 10

kernel = njit(cache=True, nogil=True, error_model="numpy")


@kernel
def _lattice(x, y, z):
    """A hash of an integer lattice point, uniform in [0, 1)."""
    h = (x * 73856093) ^ (y * 19349663) ^ (z * 83492791)
    h = (h ^ ((h >> 13) & 0x7FFFF)) * 1274126177
    return ((h ^ ((h >> 16) & 0xFFFF)) & 0xFFFFF) / 1048576.0


@kernel
def _noise(x, y, z):
    """Value noise: lattice hashes with smooth trilinear interpolation, in [0, 1]."""
    fx, fy, fz = math.floor(x), math.floor(y), math.floor(z)
    ix, iy, iz = int(fx), int(fy), int(fz)
    x, y, z = x - fx, y - fy, z - fz
    x, y, z = x * x * (3.0 - 2.0 * x), y * y * (3.0 - 2.0 * y), z * z * (3.0 - 2.0 * z)
    total = 0.0
    for k in range(2):
        a = _lattice(ix, iy, iz + k) * (1.0 - x) + _lattice(ix + 1, iy, iz + k) * x
        b = _lattice(ix, iy + 1, iz + k) * (1.0 - x) + _lattice(ix + 1, iy + 1, iz + k) * x
        total += (a * (1.0 - y) + b * y) * (z if k == 1 else 1.0 - z)
    return total


@kernel
def _wave(x):
    """Triangle wave of period 1 from 0 to 1 and back."""
    return abs(2.0 * (x - math.floor(x)) - 1.0)


@kernel
def _step(x, width):
    """0 below -width, 1 above width, smooth between: a hard edge without jagged pixels."""
    x = min(max(0.5 + 0.5 * x / width, 0.0), 1.0)
    return x * x * (3.0 - 2.0 * x)


@kernel
def _pattern(material, x, y, z):
    """Texture value in [0, 1] at a point (object or wall coordinates)."""
    kind, frequency = int(material[0]), material[7]
    x, y, z = x * frequency + material[8], y * frequency + material[9], z * frequency + material[10]
    along = x * material[11] + y * material[12] + z * material[13]
    if kind == STRIPES:
        return _step(_wave(along) - 0.5, 0.25)
    if kind == CHECKER:
        sign = 1.0
        for value in (x, y, z):
            sign *= 2.0 * _step(_wave(value) - 0.5, 0.2) - 1.0
        return 0.5 + 0.5 * sign
    if kind == DOTS:
        a, b, c = x - math.floor(x) - 0.5, y - math.floor(y) - 0.5, z - math.floor(z) - 0.5
        return _step(0.36 - math.sqrt(a * a + b * b + c * c), 0.1)
    if kind == CLOUDS:
        value = 0.6 * _noise(x, y, z) + 0.4 * _noise(2.1 * x + 5.0, 2.1 * y, 2.1 * z)
        return min(max(1.8 * value - 0.4, 0.0), 1.0)
    if kind == MARBLE:
        return _wave(along + 1.6 * _noise(x, y, z))
    if kind == RINGS:
        a, b = x - 0.3 * z, y + 0.2 * z
        return _wave(math.sqrt(a * a + b * b) + 0.6 * _noise(x, y, z))
    if kind == BRICKS:
        row = math.floor(z + 0.5 * x)
        shifted = x + y + 0.5 * (row - 2.0 * math.floor(0.5 * row))
        joint = min(_wave(z + 0.5 * x + 0.5), _wave(0.7 * shifted))
        return 0.85 * _step(joint - 0.2, 0.12) * (0.7 + 0.3 * _lattice(int(row), math.floor(0.7 * shifted), 7))
    if kind == PATCHES:
        return _step(_noise(x, y, z) - 0.5, 0.05)
    if kind == WEAVE:
        return 0.5 * (_step(_wave(x + 0.5 * z) - 0.5, 0.25) + _step(_wave(y - 0.5 * z) - 0.5, 0.25))
    return 0.0


@kernel
def shade(pixel, owner, values, tints, materials, size):
    """Colours of an image.

    Args:
        pixel, owner, values: fragments, lit by ``geometry.light_fragments``.
        tints: (P,) brightness of each primitive. materials: (2, MATERIAL_SIZE): object, wall.

    Returns:
        uint8 (size, size, 3) RGB.
    """
    colour = np.zeros((size * size, 3))
    for f in range(pixel.shape[0]):
        k = owner[f]
        material = materials[0] if k >= 0 else materials[1]
        tint = tints[k] if k >= 0 else 1.0
        mix = _pattern(material, values[f, 3], values[f, 4], values[f, 5])
        for channel in range(3):
            base = material[1 + channel] * (1.0 - mix) + material[4 + channel] * mix
            colour[pixel[f], channel] += values[f, 0] * (base * tint * values[f, 1] + values[f, 2])
    image = np.empty((size, size, 3), np.uint8)
    for i in range(size * size):
        for channel in range(3):
            # sqrt stands for the display's gamma of 2.2, in exact arithmetic
            level = math.sqrt(min(max(colour[i, channel], 0.0), 1.0))
            image[i // size, i % size, channel] = np.uint8(level * 255.0 + 0.5)
    return image
