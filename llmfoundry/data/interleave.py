"""Which source the n-th row of a mixture is from: a sequence that keeps every prefix within one row of its shares.

After n rows, a source with share p has had between floor(n p) and ceil(n p) rows, for every source and every n. So its
k-th row has a window: it is due at row ceil(k / p), and not before row floor((k - 1) / p) + 1. Taking the released row
with the earliest due date meets all of them (unit jobs with integer release times, Jackson 1955; that the windows can
be met: Steiner and Yeomans 1993). All arithmetic is in integers. Shares are multiples of 1/Q, so the sequence repeats
after Q rows, and one period is all that is kept: 6 bytes per row, made as far as it is needed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# The longest period. Shares with up to six decimals are exact; others are rounded to a multiple of 2^-20.
PERIOD = 2**20
_STEP = 2**14  # rows added to the table at a time


def exact(weight: float) -> Fraction:
    """Return a weight as it is written: 0.1 is 1/10."""
    return Fraction(repr(weight))


def shares_of(weights: Sequence[Fraction]) -> list[int]:
    """Return integers in the ratio of the weights, whose sum is the period.

    Args:
        weights: positive.

    Returns:
        The smallest such integers, or if they sum to more than PERIOD, the nearest ones that sum to PERIOD.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    common = math.gcd(*whole)
    whole = [each // common for each in whole]
    total = sum(whole)
    if total <= PERIOD:
        return whole
    least = [max(1, each * PERIOD // total) for each in whole]
    missing = PERIOD - sum(least)
    # Largest remainders are rounded up. If tiny shares were raised to 1, the excess is taken from the largest share.
    order = sorted(range(len(whole)), key=lambda i: (-(whole[i] * PERIOD % total), i))
    for i in order[: max(missing, 0)]:
        least[i] += 1
    least[least.index(max(least))] += min(missing, 0)
    common = math.gcd(*least)
    return [each // common for each in least]


class Interleave:
    """For each row of a mixture: its source, and its number within that source."""

    def __init__(self, shares: Sequence[int]) -> None:
        """Interleave sources.

        Args:
            shares: positive integers; source s has shares[s] of every sum(shares) rows.
        """
        self.shares = np.array(shares, dtype=np.int64)  # (n_sources,)
        self.period = int(self.shares.sum())
        self._sources = np.empty(0, dtype=np.int16)  # (rows so far,) for one period
        self._ranks = np.empty(0, dtype=np.int32)  # (rows so far,) number of earlier rows of the source in the period
        self._had = np.zeros(len(shares), dtype=np.int64)
        self._waiting: list[int] = []  # a heap of rows that are released but not taken, in the format of `_next`

    def at(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each row, and its number in that source's own order, both in the shape of `rows`."""
        periods, places = np.divmod(rows, self.period)
        self._reach(int(places.max(initial=-1)))
        sources = self._sources[places].astype(np.int64)
        return sources, periods * self.shares[sources] + self._ranks[places]

    def counts(self, n: int) -> NDArray[np.int64]:
        """Return the number of rows of each source among the first n: (n_sources,)."""
        periods, rest = divmod(n, self.period)
        self._reach(rest - 1)
        here = np.bincount(self._sources[:rest], minlength=len(self.shares))
        return periods * self.shares + here

    def _reach(self, place: int) -> None:
        """Extend the table so that it holds a place."""
        while place >= len(self._sources):
            first = len(self._sources)
            new = self._next(first + 1, min(first + _STEP, self.period))
            ranks = np.empty(len(new), dtype=np.int32)
            for source in np.unique(new):
                mine = np.flatnonzero(new == source)
                ranks[mine] = self._had[source] + np.arange(len(mine))
                self._had[source] += len(mine)
            self._sources = np.concatenate([self._sources, new])
            self._ranks = np.concatenate([self._ranks, ranks])

    def _next(self, first: int, last: int) -> NDArray[np.int16]:
        """Return the sources of rows [first, last] of a period, counted from 1. The table already has earlier rows."""
        n_sources, period, shares = len(self.shares), self.period, self.shares
        # Source s has released ceil(row * share / period) rows by any row. These are the newly released ones.
        before, by_now = (-(-row * shares // period) for row in (first - 1, last))
        source = np.repeat(np.arange(n_sources), by_now - before)
        k = np.arange(len(source)) - np.repeat(np.cumsum(by_now - before) - by_now, by_now - before)  # counted from 0
        release = k * period // shares[source] + 1
        key = -(-(k + 1) * period // shares[source]) * n_sources + source  # by due row, then by source
        order = np.argsort(release, kind="stable")
        releases, keys = release[order].tolist(), key[order].tolist()
        found, i, waiting = [], 0, self._waiting
        for row in range(first, last + 1):
            while i < len(releases) and releases[i] <= row:
                heapq.heappush(waiting, keys[i])
                i += 1
            found.append(heapq.heappop(waiting) % n_sources)
        return np.array(found, dtype=np.int16)
