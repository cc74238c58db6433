"""A random order of any number of places that need not be stored: a keyed permutation.

Each place is computed from the key, so every rank and every restart gets the same one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmfoundry.runtime import seed_of

RUNS = 16  # runs of consecutive images per block


def permuted(places: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Return the images of `places` in [0, n) under a random permutation of [0, n) that is not stored.

    A Feistel network permutes the smallest 2^(2k) >= n; an image outside [0, n) is permuted again until it is inside
    (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = [np.uint64(seed_of(seed, "round", i)) for i in range(6)]
    if 2 * len(places) >= n:  # find all images at once, because the last walks are long and concern few places
        table = _feistel(np.arange(1 << 2 * int(half), dtype=np.uint64), half, keys).astype(np.int64)
        images = table[places]
        while len(outside := np.flatnonzero(images >= n)):
            images[outside] = table[images[outside]]
        return images
    out = _feistel(places.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(out >= n)):
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def permuted_in_blocks(places: NDArray[np.int64], n: int, block: int, seed: int) -> NDArray[np.int64]:
    """Return the same as `permuted`, except that about `block` consecutive places map to RUNS runs of such places.

    Reading in this order touches a few regions at a time, and each of them once.
    """
    if block >= n:
        return permuted(places, n, seed)
    run = max(n // (n * RUNS // block), 1)
    runs = n // run
    images = places.copy()  # the last few, which do not fill a run, keep their places
    blocks = np.where(places < runs * run, places // (RUNS * run), -1)
    for b in np.unique(blocks[blocks >= 0]).tolist():
        here, first = blocks == b, b * RUNS
        inside = permuted(places[here] - first * run, min(RUNS, runs - first) * run, seed_of(seed, "block", b))
        images[here] = permuted(first + inside // run, runs, seed) * run + inside % run
    return images


def _feistel(x: NDArray[np.uint64], half: np.uint64, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finalizer of MurmurHash3: every input bit reaches every output bit."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
    return x ^ (x >> np.uint64(33))
