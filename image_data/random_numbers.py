"""Counter-based random numbers: every number is a hash of its address, so there is no state to keep or to share.

The address of a number is (seed, epoch, view, index, slot): the run's seed, the epoch, the number of the view, the
stable id of the image and a slot number that says what the number is for (``draws.py`` lists the slots). An image's
view therefore does not depend on the batch it sits in, on the order of the batches, or on how many workers or threads
make them.

The hash is the SplitMix64 output function (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"; constants of Stafford's variant 13), chained once per part of the address.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["image_keys", "uniforms"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the SplitMix64 increment
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def _mix_integer(value: int) -> int:
    """The same bijection of 64-bit words as `_mix`, for one Python integer."""
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & _MASK
    return value ^ (value >> 31)


def _mix(words: np.ndarray) -> np.ndarray:
    """Scramble uint64 words in place with the SplitMix64 output function and return them."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(_MULTIPLIER_1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_MULTIPLIER_2)
    words ^= words >> np.uint64(31)
    return words


def image_keys(seed: int, epoch: int, view: int, index: np.ndarray) -> np.ndarray:
    """One key per image, from which all its random numbers of this epoch and view follow.

    For fixed (seed, epoch, view) the map from index to key is a bijection: two images never share a key.

    Args:
        seed: any integer; taken modulo 2**64.
        epoch: any integer; taken modulo 2**64.
        view: number of the view.
        index: integers (B,), stable ids of the images.

    Returns:
        uint64 (B,).
    """
    key = 0
    for part in (seed, epoch, view):
        key = _mix_integer(((key ^ (part & _MASK)) + _GOLDEN) & _MASK)
    words = np.asarray(index).astype(np.uint64)  # a copy: mixed in place below
    words ^= np.uint64(key)
    return _mix(words)


def uniforms(keys: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    """The numbers of the given slots: SplitMix64 streams started at the keys, read at positions `slots`.

    Args:
        keys: uint64 (B,), from `image_keys`.
        slots: S slot numbers, each >= 0.

    Returns:
        float64 (S, B) in [0, 1), multiples of 2**-53; one contiguous row per slot.
    """
    steps = np.array([((slot + 1) * _GOLDEN) & _MASK for slot in slots], dtype=np.uint64)
    words = _mix(steps[:, None] + keys[None, :])
    return (words >> np.uint64(11)) * (1.0 / (1 << 53))
