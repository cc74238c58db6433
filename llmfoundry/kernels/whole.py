"""Arithmetic of launches on the host, where Triton's own functions take several microseconds a call."""

from __future__ import annotations


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n, for n > 0."""
    return 1 << (n - 1).bit_length()
