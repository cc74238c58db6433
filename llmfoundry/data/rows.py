"""What the loader serves: rows of one length, by their number.

Shapes: B rows, S max_seq_len.
`Rows` are finite and in the order of the data; each kind of data has its own. An `Order` is what a run reads: row n of
it is a function of (seed, n) alone, without end. `Epochs` is the order of one set of rows; data/mixture.py
mixes orders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.cache import cache_root
from llmfoundry.data.packing import TokenStream, pack
from llmfoundry.data.permutation import permuted
from llmfoundry.data.sources import DatasetConfig
from llmfoundry.runtime import seed_of

log = logging.getLogger(__name__)

IGNORE = -100  # the label of a position that is not predicted


class Block(NamedTuple):
    """Some rows, in the order in which they were asked for."""

    tokens: NDArray[np.int64]  # (B, S)
    labels: NDArray[np.int64]  # (B, S), IGNORE where nothing is predicted
    documents: NDArray[np.int32] | None = None  # (B, S) each token's document, counted from the row's start
    positions: NDArray[np.int64] | None = None  # (B, S) in its document; None: in the row
    sources: NDArray[np.int64] | None = None  # (B,) the source of each row, by its place in a mixture


class How(NamedTuple):
    """How a run wants its rows."""

    length: int  # S
    seed: int  # of the run
    documents: bool = False  # whether blocks contain the number of each token's document
    drop_last: bool = False  # leave out the last, partly filled row of an epoch


class Rows(Protocol):
    """A number of rows in the order of the data.

    Attributes:
        title: in messages, e.g. "text_files-train".
        fingerprint: equal fingerprints, equal rows.
        length: S, tokens.
        n_rows: of one pass; the last may be partly filled.
        n_full: without a last one that is partly filled.
        n_tokens: labels of one pass, or the positions that may have one.
        n_bytes: of the text as UTF-8; None if it is not known.
    """

    title: str
    fingerprint: str
    length: int
    n_rows: int
    n_full: int
    n_tokens: int
    n_bytes: int | None

    def read(self, numbers: NDArray[np.int64]) -> Block:
        """The rows with these numbers; a number past the end is a row without labels."""
        ...


class Order(Protocol):
    """The endless sequence of rows of a run.

    Attributes:
        rows_per_epoch: rows after which a new epoch begins.
        labels: names of the sources of a mixture; empty for a single one.
        once: what one pass over the data reads; None for a mixture, which has no end.
    """

    fingerprint: str
    length: int
    rows_per_epoch: int
    labels: tuple[str, ...]
    once: Rows | None

    def read(self, numbers: NDArray[np.int64]) -> Block:
        """Rows of the run by their numbers."""
        ...


class RowsConfig(DatasetConfig):
    """Root of the datasets that are more than text to be packed: they make their own rows."""

    split: str = "train"  # type: ignore[assignment]  # any name

    def order(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
        """Open the rows, making them first if they are not in the cache."""
        raise NotImplementedError

    def of_split(self, split: str) -> Self:
        """The same: other data is only read where the YAML names it."""
        return self


def open_order(dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
    """The order in which a run reads a dataset. `dataset.max_seq_len` takes precedence over the run's.

    Raises:
        ConfigError: the data cannot be read, or does not fill one row.
    """
    how = how._replace(length=dataset.max_seq_len or how.length)
    if isinstance(dataset, RowsConfig):
        return dataset.order(tokenizer, how)
    source = dataset.build()
    if source.summary:
        log.info("%s", source.summary)
    stream = pack(source, tokenizer, cache_root(dataset.cache_dir))
    return epochs_of(StreamRows(stream, source.title, how), dataset, how)


def read_each(of: NDArray[np.int64], read: Callable[[int, NDArray[np.bool_]], Block]) -> Block:
    """Rows from several places, in the order in which they were asked for.

    Args:
        of: (B,) the place of each row.
        read: reads the rows of one place, given where they are among the B.
    """
    blocks = [read(i, of == i) for i in np.unique(of).tolist()]
    if any(block.positions is not None for block in blocks):
        blocks = [block if block.positions is not None else _with_positions(block) for block in blocks]
    order = np.argsort(np.argsort(of, kind="stable"), kind="stable")
    tokens, labels, documents, positions = (
        None if columns[0] is None else np.concatenate(columns)[order]
        for columns in zip(*(block[:4] for block in blocks), strict=True)
    )
    return Block(tokens, labels, documents, positions)


def _with_positions(block: Block) -> Block:
    return block._replace(positions=np.broadcast_to(np.arange(block.tokens.shape[1]), block.tokens.shape))


class StreamRows:
    """A stream of packed tokens, cut every `length` tokens: row i is tokens [i*S, i*S + S + 1).

    Every token of the stream except the first is a label exactly once.
    """

    def __init__(self, stream: TokenStream, title: str, how: How) -> None:
        self.title, self.length = title, how.length
        self.fingerprint = stream.fingerprint  # of the documents and the tokenizer
        self.n_tokens = stream.n_tokens - 1
        self.n_bytes = stream.n_bytes
        self.n_rows, self.n_full = -(-self.n_tokens // how.length), self.n_tokens // how.length
        self.stream, self._documents = stream, how.documents

    def read(self, numbers: NDArray[np.int64]) -> Block:
        length, stream = self.length, self.stream
        tokens = np.full((len(numbers), length), stream.eos_token_id, dtype=np.int64)  # (B, S)
        labels = np.full((len(numbers), length), IGNORE, dtype=np.int64)  # (B, S)
        for i, number in enumerate(numbers.tolist()):
            start = min(number * length, stream.n_tokens - 1)
            found = stream.read(start, min(start + length + 1, stream.n_tokens))
            tokens[i, : len(found) - 1] = found[:-1]
            labels[i, : len(found) - 1] = found[1:]
        if not self._documents:
            return Block(tokens, labels)
        # eos opens a document: the document's first token is predicted from it and from nothing before it.
        return Block(tokens, labels, np.cumsum(tokens == stream.eos_token_id, axis=1, dtype=np.int32))


def epochs_of(rows: Rows, dataset: DatasetConfig, how: How) -> Epochs:
    """The order of a dataset's rows: it is shuffled unless told otherwise, or named for evaluation.

    Raises:
        ConfigError: there is no whole row where one is needed.
    """
    held_out = dataset.split.startswith(("val", "test", "dev", "eval"))
    shuffled = not held_out if dataset.shuffle is None else dataset.shuffle
    seed = how.seed if dataset.shuffle_seed is None else dataset.shuffle_seed
    return Epochs(rows, seed if shuffled else None, how.drop_last)


class Epochs:
    """All rows again and again: row n is in epoch n // rows_per_epoch, at the place that a keyed permutation gives."""

    labels: tuple[str, ...] = ()

    def __init__(self, rows: Rows, seed: int | None, drop_last: bool = False) -> None:
        """Order rows.

        Args:
            seed: of the permutations; None keeps the order of the data.
            drop_last: leave out a partly filled row.

        Raises:
            ConfigError: no row is left.
        """
        self.fingerprint, self.length, self.once = rows.fingerprint, rows.length, rows
        self.rows_per_epoch = rows.n_full if drop_last else rows.n_rows
        self._seed = seed
        if self.rows_per_epoch == 0:
            raise ConfigError(
                f"dataset {rows.title}: {rows.n_tokens} tokens do not fill one row of "
                f"max_seq_len={rows.length}; lower max_seq_len, add text, or set drop_last: false"
            )

    def read(self, numbers: NDArray[np.int64]) -> Block:
        epochs, places = np.divmod(numbers, self.rows_per_epoch)
        if self._seed is not None:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                seed = seed_of(self._seed, "epoch", int(epoch))
                places[here] = permuted(places[here], self.rows_per_epoch, seed)
        return self.once.read(places)
