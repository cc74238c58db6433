"""Host arithmetic for kernel launches, where Triton's own functions take several microseconds per call."""

from __future__ import annotations


def cdiv(n: int, d: int) -> int:
    """Return n / d, rounded up."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()
