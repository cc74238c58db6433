"""Packing of examples into rows: best fit, longest first, within a bounded number of examples at a time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

BUFFER = 2**14  # number of examples that are packed together


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign examples to rows so that few positions stay empty.

    The result depends only on the lengths and their order.

    Args:
        lengths: tokens of each example; none is above the capacity.
        capacity: tokens per row.

    Returns:
        For each row, the indices of its examples.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), BUFFER):
        space: list[tuple[int, int]] = []  # (tokens left, row), sorted
        inside = range(start, min(start + BUFFER, len(lengths)))
        for i in sorted(inside, key=lambda i: (-lengths[i], i)):
            at = bisect_left(space, (lengths[i], -1))
            if at == len(space):
                rows.append([i])
                left, row = capacity - lengths[i], len(rows) - 1
            else:
                left, row = space.pop(at)
                left -= lengths[i]
                rows[row].append(i)
            if left:
                insort(space, (left, row))
    return rows
