"""Random numbers that are the same on every machine, in every process, with every version of NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 256


class Random:
    """Draws of the Philox counter generator under a key of two 64-bit words.

    Only the generator's raw words are used: NumPy promises those, but not that `numpy.random.Generator` turns
    them into the same numbers in its next version.
    """

    def __init__(self, key: tuple[int, int]):
        self._bits = np.random.Philox(key=np.array(key, np.uint64))
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            self._words = (self._bits.random_raw(_BLOCK) >> np.uint64(32)).tolist()[::-1]
        return self._words.pop()

    def below(self, n: int) -> int:
        """An integer in [0, n), n at most 2^20 (so that the bias stays under 2^-12)."""
        return self._word() * n >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        return self._word() < probability * 2**32

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def weighted(self, options: dict[T, int]) -> T:
        """One of the keys, as often as its whole-numbered weight says."""
        left = self.below(sum(options.values()))
        for option, weight in options.items():
            left -= weight
            if left < 0:
                return option
        raise ValueError("no option has a weight.")

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """That many different ones, in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]
