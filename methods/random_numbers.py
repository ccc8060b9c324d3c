"""Random numbers on any device as a pure function of (seed, counter, position): nothing to store but the seed.

Position j of draw `counter` has the same value on every worker and for any number of workers, so one process draws what
N processes draw, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["random_bits", "random_integers", "random_normals"]

# Multipliers of splitmix64 (Steele et al. 2014) as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # The mask turns torch's arithmetic shift of int64 into the logical shift that the mixer is defined with.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64; the caller's tensor stays as it is."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)).mul_(_MIX_1)
    x = (x ^ _shift_right(x, 27)).mul_(_MIX_2)
    return x ^ _shift_right(x, 31)


@torch.no_grad()
def random_bits(count: int, seed: Tensor, counter: int, first: int = 0) -> Tensor:
    """64 random bits at each of the positions first..first+count-1.

    Args:
        count: number of positions.
        seed: int64 (), usually a buffer of the method, so that it is part of the checkpoint.
        counter: number of this draw within the run.
        first: first position; a worker passes where its share of the global draw begins.

    Returns:
        int64 (count,) on the device of `seed`.
    """
    stream = splitmix64(splitmix64(seed) + counter)
    return splitmix64(stream + torch.arange(first, first + count, device=seed.device))


@torch.no_grad()
def random_integers(count: int, high: int, seed: Tensor, counter: int, first: int = 0) -> Tensor:
    """Uniform integers 0..high-1, with replacement; int64 (count,). See ``random_bits``."""
    return _shift_right(random_bits(count, seed, counter, first), 1).remainder_(high)


@torch.no_grad()
def random_normals(count: int, seed: Tensor, counter: int, first: int = 0) -> Tensor:
    """Standard normal numbers by Box and Muller's transform; float32 (count,). See ``random_bits``."""
    bits = random_bits(2 * count, seed, counter, 2 * first).view(count, 2)
    uniform = (_shift_right(bits, 11).double() + 0.5) / 2**53  # inside (0, 1)
    radius = (-2.0 * uniform[:, 0].log()).sqrt()
    return (radius * (2.0 * math.pi * uniform[:, 1]).cos()).float()
