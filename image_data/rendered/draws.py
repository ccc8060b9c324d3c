"""Random numbers that depend on a key only, so that any image can be rendered alone, in any order, by any process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Draws", "stable"]

T = TypeVar("T")
_MASK = (1 << 64) - 1
_DIGITS = 9


def stable(value: float) -> float:
    """Rounds away the last bits, in which the C libraries' sin, cos and log differ between machines."""
    return round(value, _DIGITS)


def _mix(state: int) -> int:
    """The output function of splitmix64 (Steele, Lea & Flood 2014)."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class Draws:
    """A stream of random numbers named by integers, e.g. ``Draws(seed, VIEW, instance, image)``.

    The k-th number of a stream is a hash of its key and k: no state is shared between streams.
    """

    def __init__(self, *key: int) -> None:
        state = 0
        for word in key:
            state = _mix((state + 0x9E3779B97F4A7C15 + (word & _MASK)) & _MASK)
        self._state = state

    def fork(self, word: int) -> Draws:
        """The stream of this key with one more word; where this stream stands does not matter if none was drawn."""
        return Draws(self._state, word)

    def _next(self) -> int:
        """``_mix`` of the next state, written out: a third of the Python time of an image is spent here."""
        self._state = state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        return state ^ (state >> 31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high) with 53 random bits."""
        return low + (high - low) * ((self._next() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + (self._next() >> 11) % (high - low + 1)

    def choice(self, options: Sequence[T]) -> T:
        """One of ``options``, all equally likely."""
        return options[self.integer(0, len(options) - 1)]

    def normal(self) -> float:
        """A standard normal number (Box-Muller)."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        return stable(radius * math.cos(2.0 * math.pi * self.uniform()))
