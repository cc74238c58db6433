"""The sequence of a mixture: within one row of the shares after every row, and found at any place."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from llmfoundry.data.interleave import PERIOD, Interleave, exact, shares_of

SHARES = {
    "one": [1], "equal": [1] * 50, "decimal": [7, 2, 1], "tiny": [1, 9999], "one large": [1000] + [1] * 7,
    "primes": [2, 3, 5, 7, 11, 13, 17], "halves": [64, 32, 16, 8, 4, 2, 1, 1],
}  # fmt: skip


def check_prefixes(shares: list[int], n: int) -> None:
    """Every prefix of n rows is within one row of its shares, and each source's rows come in order."""
    interleave = Interleave(shares)
    sources, numbers = interleave.at(np.arange(n))
    counts = np.cumsum(sources[:, None] == np.arange(len(shares)), axis=0)  # (n, n_sources)
    asked = np.arange(1, n + 1)[:, None] * np.array(shares)  # times the period
    assert (np.abs(counts * interleave.period - asked) < interleave.period).all()
    for source in range(len(shares)):
        mine = numbers[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))
    assert np.array_equal(interleave.counts(n), counts[-1])


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES.keys())
def test_every_prefix_is_within_one_row(shares: list[int]) -> None:
    check_prefixes(shares, 3 * sum(shares) + 5 if sum(shares) < 2000 else 12_000)


@pytest.mark.parametrize("seed", range(12))
def test_every_prefix_is_within_one_row_of_random_shares(seed: int) -> None:
    rng = random.Random(seed)
    shares = [rng.choice([1, 2, 100, rng.randint(1, 20_000)]) for _ in range(rng.randint(2, 60))]
    check_prefixes(shares, 4000)


def test_any_row_is_found_without_those_before_it() -> None:
    whole, parts = Interleave([5, 3, 11]), Interleave([5, 3, 11])
    sources, numbers = whole.at(np.arange(10_000))
    rows = np.array([9_999, 3, 3, 777, 0])
    assert np.array_equal(parts.at(rows)[0], sources[rows]) and np.array_equal(parts.at(rows)[1], numbers[rows])
    far = 10**15
    assert Interleave([1, 2]).counts(3 * far).tolist() == [far, 2 * far]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (["0.7", "0.2", "0.1"], [7, 2, 1]),
        (["1", "1", "1"], [1, 1, 1]),
        (["0.333333", "0.666667"], [333_333, 666_667]),
        (["5e9", "2.5e9"], [2, 1]),
        (["3"], [1]),
    ],
)
def test_weights_as_they_are_written(weights: list[str], shares: list[int]) -> None:
    assert shares_of([exact(float(weight)) for weight in weights]) == shares


def test_other_weights_are_rounded_and_none_is_lost() -> None:
    rng = random.Random(0)
    for _ in range(50):
        weights = [Fraction(rng.randint(1, 10**9), rng.randint(1, 10**6)) for _ in range(rng.randint(2, 40))]
        shares = shares_of(weights)
        total = sum(weights)
        assert min(shares) >= 1 and PERIOD % sum(shares) == 0
        assert max(abs(each / sum(shares) - weight / total) for each, weight in zip(shares, weights, strict=True)) < (
            len(weights) / PERIOD
        )
    assert shares_of([exact(1e-9), exact(1.0)]) == [1, PERIOD - 1]
