"""Choose the documents of a source to keep: empty ones, duplicates and those that a function rejects are dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self


class Counts(NamedTuple):
    """How many documents were read, and what became of them."""

    read: int = 0  # number of documents
    empty: int = 0
    duplicates: int = 0  # identical to an earlier one
    filtered: int = 0  # rejected by the function
    kept: int = 0
    kept_bytes: int = 0  # in UTF-8

    def plus(self, other: Self) -> Self:
        """Return the sum of two counts."""
        return type(self)(*(a + b for a, b in zip(self, other, strict=True)))

    def __str__(self) -> str:
        """Return the counts as text, e.g. `read 9 documents; left out 1 empty, 2 duplicates; kept 7 (1,234 bytes)`."""
        counts = {"empty": self.empty, "duplicates": self.duplicates, "by the filter": self.filtered}
        left = ", ".join(f"{n:,} {why}" for why, n in counts.items() if n)
        left = f"; left out {left}" if left else ""
        return f"read {self.read:,} documents{left}; kept {self.kept:,} ({self.kept_bytes:,} bytes)"


NONE = Counts()


class Sieve:
    """Filters documents one by one. With `dedup` it remembers 16 bytes per document, which take about 100 in memory."""

    def __init__(self, dedup: bool = False, keep: Callable[[str], bool] | None = None) -> None:
        self._seen: set[bytes] | None = set() if dedup else None
        self._keep = keep

    def see(self, documents: Iterable[str]) -> None:
        """Remember documents that were read elsewhere, so that equal ones count as duplicates."""
        if self._seen is not None:
            self._seen.update(digest(document.encode()) for document in documents if document)

    def through(self, documents: Iterable[str], counts: Counts = NONE) -> Iterator[tuple[str, Counts]]:
        """Yield the documents that are kept, each with the counts after it, starting from `counts`."""
        read, empty, duplicates, filtered, kept, kept_bytes = counts
        for document in documents:
            read += 1
            if not document:
                empty += 1
            elif self._seen is not None and self._is_known(document):
                duplicates += 1
            elif self._keep is not None and not self._keep(document):
                filtered += 1
            else:
                kept += 1
                kept_bytes += len(document) if document.isascii() else len(document.encode())
                yield document, Counts(read, empty, duplicates, filtered, kept, kept_bytes)
        self.last = Counts(
            read, empty, duplicates, filtered, kept, kept_bytes
        )  # includes documents after the last one kept

    def _is_known(self, document: str) -> bool:
        assert self._seen is not None
        n = len(self._seen)
        self._seen.add(digest(document.encode()))
        return len(self._seen) == n


def digest(content: bytes) -> bytes:
    """Return a digest of 16 bytes: equal for equal contents."""
    return hashlib.blake2b(content, digest_size=16).digest()
