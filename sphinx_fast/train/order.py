"""Which row is read when: a function of (seed, position) alone, whatever reads it and however it was interrupted.

Arithmetic of our own, because a library's shuffle may change between versions and a resumed run must not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

_WORD = (1 << 64) - 1


def _scrambled(word: int) -> int:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the word."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def mixed(*numbers: int) -> int:
    """64 bits that depend on all numbers and their order."""
    state = 0
    for number in numbers:
        state = _scrambled((state + 0x9E3779B97F4A7C15 ^ number) & _WORD)
    return state


def permuted(position: int, count: int, key: int) -> int:
    """The number at `position` of a permutation of range(count) drawn by `key`, in constant memory.

    A Feistel network over the next even power of two, walked until it lands inside.
    """
    if not 0 <= position < count:
        raise IndexError(f"position {position} of {count}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for turn in range(6):
            left, right = right, left ^ (_scrambled(key + 0x9E3779B97F4A7C15 * turn + right & _WORD) & low)
        position = left << half | right
        if position < count:
            return position


class Mixture:
    """Rows of several data sets in one order, over as many epochs as are asked for.

    An epoch holds round(ratio * length) rows of each set, so with ratios of 1 every row once: the chance that a row is
    of a set is the set's share, the "natural frequency" of the paper. Sets with a ratio below 1 go on in the next
    epoch where they stopped.
    """

    def __init__(self, lengths: Sequence[int], ratios: Sequence[float] | None = None, seed: int = 0) -> None:
        ratios = [1.0] * len(lengths) if ratios is None else ratios
        self.lengths, self.seed = list(lengths), seed
        self.counts = [max(1, round(n * ratio)) if n else 0 for n, ratio in zip(lengths, ratios, strict=True)]
        self.ends = list(accumulate(self.counts))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(data set, row) at a position counted over all epochs."""
        epoch, position = divmod(position, len(self))
        drawn = permuted(position, len(self), mixed(self.seed, epoch))
        source = bisect_right(self.ends, drawn)
        visit = epoch * self.counts[source] + drawn - (self.ends[source] - self.counts[source])
        cycle, visit = divmod(visit, self.lengths[source])
        return source, permuted(visit, self.lengths[source], mixed(self.seed, source, cycle, 1))
