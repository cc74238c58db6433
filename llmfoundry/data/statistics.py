"""Statistics of a dataset: number of documents or rows, their lengths, and duplicates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmfoundry.data.rows import IGNORE, Rows
from llmfoundry.data.sieve import digest
from llmfoundry.data.tokenizer import Encoder

QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
_TEXTS = 256  # texts tokenized at once


class Lengths(NamedTuple):
    """A distribution of lengths."""

    what: str  # e.g. "tokens per document"
    total: int
    mean: float
    quantiles: dict[str, int]  # keyed by QUANTILES


class Statistics(NamedTuple):
    """Statistics of a dataset, or of its first part."""

    name: str
    kind: str  # "documents" or "rows"
    number: int  # number of documents or rows
    empty: int  # documents without text, or rows without a label
    duplicates: int  # identical to an earlier one
    lengths: list[Lengths]
    complete: bool  # whether all of it was read
    summary: str = ""  # what was read and skipped


def lengths_of(what: str, lengths: NDArray[np.int64]) -> Lengths:
    """Compute the distribution of lengths."""
    if not len(lengths):
        return Lengths(what, 0, 0.0, dict.fromkeys(QUANTILES, 0))
    found = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf").astype(int).tolist()
    return Lengths(what, int(lengths.sum()), float(lengths.mean()), dict(zip(QUANTILES, found, strict=True)))


def of_texts(
    name: str, documents: Iterator[str], encoder: Encoder | None, limit: int | None, summary: str = ""
) -> Statistics:
    """Statistics of documents: bytes and, with an encoder, tokens.

    Args:
        limit: maximum number of documents to read; None: all.
    """
    sizes, tokens, hashes, empty = [], [], bytearray(), 0
    first = itertools.islice(documents, limit)
    while texts := list(itertools.islice(first, _TEXTS)):
        for text in texts:
            data = text.encode()
            sizes.append(len(data))
            empty += not data
            hashes += digest(data)
        if encoder is not None:
            tokens += [len(ids) for ids in encoder.ids(texts)]
    lengths = [lengths_of("bytes per document", np.array(sizes, np.int64))]
    if encoder is not None:
        lengths.append(lengths_of("tokens per document", np.array(tokens, np.int64)))
    complete = next(documents, None) is None
    return Statistics(name, "documents", len(sizes), empty, _duplicates(hashes), lengths, complete, summary)


def of_rows(name: str, rows: Rows, limit: int | None) -> Statistics:
    """Statistics of rows that a dataset makes itself: labels, and tokens per document if rows hold several."""
    n = rows.n_rows if limit is None else min(limit, rows.n_rows)
    labels, documents, hashes = [], [], bytearray()
    for start in range(0, n, _TEXTS):
        block = rows.read(np.arange(start, min(start + _TEXTS, n)))
        learned = block.labels != IGNORE
        labels += learned.sum(axis=1).tolist()
        for row in block.tokens:
            hashes += digest(row.tobytes())
        if block.documents is not None:
            # In a row with per-document positions, document 0 is the padding.
            first = 1 if block.positions is not None else 0
            documents += [n for ids in block.documents for n in np.bincount(ids)[first:].tolist() if n]
    lengths = [lengths_of("labels per row", np.array(labels, np.int64))]
    if documents:
        lengths.append(lengths_of("tokens per document of a row", np.array(documents, np.int64)))
    return Statistics(name, "rows", n, labels.count(0), _duplicates(hashes), lengths, n == rows.n_rows)


def _duplicates(hashes: bytes | bytearray) -> int:
    digests = np.frombuffer(bytes(hashes), dtype="V16")
    return len(digests) - len(np.unique(digests))


def as_data(each: Statistics) -> dict[str, object]:
    """Return the statistics as JSON data."""
    return each._asdict() | {"lengths": [lengths._asdict() for lengths in each.lengths]}


def lines(found: Sequence[Statistics]) -> Iterable[str]:
    """Return the statistics as lines for a file or a pipe."""
    for each in found:
        if each.summary:
            yield f"{each.name}: {each.summary}"
        first = "" if each.complete else "the first "
        yield (
            f"{each.name}: {first}{each.number:,} {each.kind}; {each.empty:,} empty, "
            f"{each.duplicates:,} equal to an earlier one"
        )
        for lengths in each.lengths:
            quantiles = ", ".join(f"{name} {value:,}" for name, value in lengths.quantiles.items())
            what, _, per = lengths.what.partition(" ")
            yield f"{each.name}: {lengths.total:,} {what}; {per}: mean {lengths.mean:,.1f}, {quantiles}"
