"""The rows that the loader serves: all of one length, found by their number.

Shapes: B rows, S max_seq_len.
`Rows` are finite and in the order of the data; each kind of data has its own class. An `Order` is what a run reads: an
endless sequence whose row n is a function of (seed, n) alone. `Epochs` is the order of one set of rows;
data/mixture.py mixes orders.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.open_file import OpenFile
from llmfoundry.data.packing import TokenStream, open_shards, pack
from llmfoundry.data.permutation import permuted_in_blocks
from llmfoundry.data.sources import DatasetConfig
from llmfoundry.data.tokenizer import PLAIN_TEXT, SpecialTokens
from llmfoundry.runtime import cache_root, seed_of

log = logging.getLogger(__name__)

STRETCH = 4096  # rows whose positions are computed at once
IGNORE = -100  # the label of positions that are not predicted


class Block(NamedTuple):
    """Some rows, in the order in which they were requested."""

    tokens: NDArray[np.int64]  # (B, S)
    labels: NDArray[np.int64]  # (B, S), IGNORE where nothing is predicted
    documents: NDArray[np.int32] | None = None  # (B, S) each token's document, counted from the row's start
    positions: NDArray[np.int64] | None = None  # (B, S) position in the document; None: in the row
    sources: NDArray[np.int64] | None = None  # (B,) source of each row, by its index in a mixture


class How(NamedTuple):
    """How a run needs its rows."""

    length: int  # S
    seed: int  # the run's seed
    documents: bool = False  # whether blocks include each token's document number
    drop_last: bool = False  # leave out the last, partly filled row of an epoch
    special: SpecialTokens = PLAIN_TEXT  # the rule for special tokens


class Numbered:
    """Rows that are found by their number.

    Attributes:
        fingerprint: rows with equal fingerprints are equal.
        length: S, tokens.
        documents: whether blocks contain the document number of each token.
        own_positions: whether positions restart inside a row.
        sequences: number of equal parts of a row that the model sees separately: 2 for pairs (data/preferences.py).
    """

    fingerprint: str
    length: int
    documents: bool = False
    own_positions: bool = False
    sequences: int = 1

    def read(self, numbers: NDArray[np.int64]) -> Block:
        """Read the rows with these numbers."""
        raise NotImplementedError

    def empty(self, n_rows: int) -> Block:
        """Return a block to fill; its positions are those within the row."""
        shape = (n_rows, self.length)
        return Block(
            np.empty(shape, dtype=np.int64),
            np.empty(shape, dtype=np.int64),
            np.empty(shape, dtype=np.int32) if self.documents else None,
            np.tile(np.arange(self.length), (n_rows, 1)) if self.own_positions else None,
        )


class Rows(Numbered):
    """A finite number of rows, in the order of the data. Row numbers past the end give rows without labels.

    Attributes:
        title: name in messages, e.g. "text_files-train".
        n_rows: rows in one pass; the last may be partly filled.
        n_full: rows in one pass, not counting a last one that is partly filled.
        n_tokens: labels in one pass, or the positions that may have one.
        n_bytes: bytes of the text as UTF-8; None if unknown.
    """

    title: str
    n_rows: int
    n_full: int
    n_tokens: int
    n_bytes: int | None = None

    def put(self, number: int, out: Block, i: int) -> None:
        """Write the row with this number as row `i` of a block."""
        raise NotImplementedError

    def read(self, numbers: NDArray[np.int64]) -> Block:
        out = self.empty(len(numbers))
        for i, number in enumerate(numbers.tolist()):
            self.put(number, out, i)
        return out


class Stretch(NamedTuple):
    """Consecutive rows of an order, and their places in the data."""

    first: int  # index of the first one
    places: NDArray[np.int64]


class Order(Numbered):
    """The endless sequence of rows of a run.

    Attributes:
        rows_per_epoch: rows after which a new epoch starts.
        labels: names of a mixture's sources; empty for a single dataset.
        once: what one pass over the data reads; None for a mixture, which has no end.
    """

    rows_per_epoch: int
    labels: tuple[str, ...] = ()
    once: Rows | None = None

    def stretch(self, number: int) -> Stretch:
        """Return the stretch that contains a row."""
        raise NotImplementedError


class RowsConfig(DatasetConfig):
    """Base of the datasets that make their own rows instead of giving text to pack."""

    split: str = "train"  # type: ignore[assignment]  # any name

    def order(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
        """Open the rows, making them first if they are not in the cache."""
        raise NotImplementedError

    def of_split(self, split: str) -> Self:
        """Return the dataset itself: there is no other split to read."""
        return self


def open_order(dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
    """Open the order in which a run reads a dataset. `dataset.max_seq_len` takes precedence over the run's.

    Raises:
        ConfigError: if the data cannot be read, or does not fill one row.
    """
    how = how._replace(length=dataset.max_seq_len or how.length)
    if isinstance(dataset, RowsConfig):
        return dataset.order(tokenizer, how)
    source = dataset.build()
    if source.summary:
        log.info("%s", source.summary)
    stream = pack(source, tokenizer, cache_root(dataset.cache_dir), how.special)
    return epochs_of(StreamRows(stream, source.title, how), dataset, how)


class StreamReader:
    """Reads rows of one or several token streams, a block at a time.

    Only the read itself is done row by row, so many sources cost about as much as one.
    """

    def __init__(self, streams: Sequence[TokenStream], length: int, documents: bool) -> None:
        """Read streams.

        Args:
            streams: streams made with one tokenizer.
            length: S.
            documents: whether blocks contain the document number of each token.
        """
        self._streams, self._length, self._documents = streams, length, documents
        self._watched = list(streams)  # streams whose checksums may still be being compared
        self._dtype, self._end, self._opening = streams[0].dtype, streams[0].eos_token_id, streams[0].opening_token_id
        # The streams are treated as one: offsets in tokens where streams and shards start.
        self._firsts = np.cumsum([0, *(stream.n_tokens for stream in streams)])
        self._lasts = np.diff(self._firsts) - 1  # index of each stream's last token
        inside = [first + np.array(stream.starts[:-1]) for first, stream in zip(self._firsts, streams, strict=False)]
        self._shards = np.concatenate([*inside, self._firsts[-1:]])
        keys = [np.arange(stream.first_shard, stream.first_shard + stream.n_shards) for stream in streams]
        self._keys = np.concatenate(keys)  # of each shard, for `open_shards`

    def read(self, sources: NDArray[np.int64], numbers: NDArray[np.int64]) -> Block:
        """Read rows: row i of a stream is its tokens [i*S, i*S + S + 1).

        Args:
            sources: (B,) the stream of each row.
            numbers: (B,) the number of each row in its stream.
        """
        unfinished = [stream for stream in self._watched if stream.is_watched]
        for stream in self._watched:
            stream.check()
        self._watched = unfinished
        length, size = self._length, self._dtype.itemsize
        raw = np.empty((len(numbers), length + 1), self._dtype)
        last = self._lasts[sources]
        starts = np.minimum(numbers * length, last)
        counts = np.minimum(last - starts, length) + 1  # tokens of each row, plus the next one
        places = self._firsts[sources] + starts
        shards = np.searchsorted(self._shards, places, side="right") - 1
        offsets = (places - self._shards[shards]) * size
        across = places + counts > self._shards[shards + 1]  # whether a row spans two shards
        # Read file by file, so that a file's kernel and Python state stays in the caches for all its rows in a batch.
        order = np.argsort(shards, kind="stable")
        order = order[~across[order]]
        opened, file = -1, None
        memory, begins = raw.reshape(-1).view(np.uint8).data, order * (length + 1) * size
        columns = (order, self._keys[shards[order]], offsets[order], begins, begins + counts[order] * size)
        for i, at, offset, begin, end in zip(*(column.tolist() for column in columns), strict=True):
            if at != opened or file is None:
                opened, file = at, open_shards.get(at) or self._opened(int(sources[i]), at)
            file.fill(memory[begin:end], offset)
        for i in np.flatnonzero(across).tolist():
            raw[i, : counts[i]] = self._streams[sources[i]].read(int(starts[i]), int(starts[i] + counts[i]))
        short = np.flatnonzero(counts <= length).tolist()  # at the end of a stream
        for i in short:
            raw[i, counts[i] :] = self._end
        tokens, labels = raw[:, :-1].astype(np.int64), raw[:, 1:].astype(np.int64)
        for i in short:
            labels[i, counts[i] - 1 :] = IGNORE
        if not self._documents:
            return Block(tokens, labels)
        # A document's first token is predicted from the token that opens it, and from nothing before.
        documents = (raw[:, :-1] == self._opening).astype(np.int32)
        return Block(tokens, labels, np.cumsum(documents, axis=1, out=documents))

    def _opened(self, source: int, key: int) -> OpenFile:
        return self._streams[source].file(key - self._streams[source].first_shard)


class StreamRows(Rows):
    """A stream of packed tokens, cut every `length` tokens.

    Every token of the stream except the first is a label exactly once.
    """

    def __init__(self, stream: TokenStream, title: str, how: How) -> None:
        self.title, self.length, self.documents = title, how.length, how.documents
        self.fingerprint = stream.fingerprint  # of the documents and the tokenizer
        self.n_tokens = stream.n_tokens - 1
        self.n_bytes = stream.n_bytes
        self.n_rows, self.n_full = -(-self.n_tokens // how.length), self.n_tokens // how.length
        self.stream = stream
        self._reader = StreamReader([stream], how.length, how.documents)

    def read(self, numbers: NDArray[np.int64]) -> Block:
        return self._reader.read(np.zeros_like(numbers), numbers)


def epochs_of(rows: Rows, dataset: DatasetConfig, how: How) -> Epochs:
    """Return the order of a dataset's rows. It is shuffled unless the YAML says otherwise or it is for evaluation.

    Raises:
        ConfigError: if a full row is needed and there is none.
    """
    held_out = dataset.split.startswith(("val", "test", "dev", "eval"))
    shuffled = not held_out if dataset.shuffle is None else dataset.shuffle
    seed = how.seed if dataset.shuffle_seed is None else dataset.shuffle_seed
    return Epochs(rows, seed if shuffled else None, how.drop_last, dataset.shuffle_block_size)


class Epochs(Order):
    """All rows, repeatedly: row n is in epoch n // rows_per_epoch, at a place given by a keyed permutation."""

    def __init__(self, rows: Rows, seed: int | None, drop_last: bool = False, block: int | None = None) -> None:
        """Order rows.

        Args:
            seed: seed of the permutations; None keeps the order of the data.
            drop_last: leave out a partly filled last row.
            block: number of rows that are shuffled together (`permuted_in_blocks`); None: all.

        Raises:
            ConfigError: if no row is left.
        """
        self.fingerprint, self.length, self.documents = rows.fingerprint, rows.length, rows.documents
        self.own_positions, self.sequences, self.once, self._rows = rows.own_positions, rows.sequences, rows, rows
        self.rows_per_epoch = rows.n_full if drop_last else rows.n_rows
        self._seed, self._block = seed, block
        self._places = Places([self])
        if self.rows_per_epoch == 0:
            raise ConfigError(
                f"dataset {rows.title}: {rows.n_tokens} tokens do not fill one row of "
                f"max_seq_len={rows.length}; lower max_seq_len, add text, or set drop_last: false"
            )

    def read(self, numbers: NDArray[np.int64]) -> Block:
        return self._rows.read(self._places.of(np.zeros_like(numbers), numbers))

    def stretch(self, number: int) -> Stretch:
        epoch, row = divmod(number, self.rows_per_epoch)
        start, stop = row - row % STRETCH, min(row - row % STRETCH + STRETCH, self.rows_per_epoch)
        places = np.arange(start, stop)
        if self._seed is not None:
            block = self.rows_per_epoch if self._block is None else self._block
            places = permuted_in_blocks(places, self.rows_per_epoch, block, seed_of(self._seed, "epoch", epoch))
        return Stretch(number - row + start, places)


class Places:
    """Finds where rows of several orders are in their data.

    Rows are requested in order, so the last stretch of each order is kept.
    """

    def __init__(self, orders: Sequence[Order]) -> None:
        self._orders = orders
        self._first = np.zeros(len(orders), dtype=np.int64)
        self._stop = np.zeros(len(orders), dtype=np.int64)  # none is cached yet
        self._kept = np.empty((len(orders), STRETCH), dtype=np.int64)

    def of(self, sources: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of rows: (B,).

        Args:
            sources: (B,) the order of each row.
            numbers: (B,) the number of each row in its order.
        """
        places = np.empty_like(numbers)
        rest = np.arange(len(numbers))
        while len(rest):
            source, number = sources[rest], numbers[rest]
            inside = (self._first[source] <= number) & (number < self._stop[source])
            found = rest[inside]
            places[found] = self._kept[source[inside], (number - self._first[source])[inside]]
            rest = rest[~inside]
            _, nearest = np.unique(sources[rest], return_index=True)
            for i in rest[nearest].tolist():
                self._move(int(sources[i]), int(numbers[i]))
        return places

    def _move(self, source: int, number: int) -> None:
        first, places = self._orders[source].stretch(number)
        self._first[source], self._stop[source] = first, first + len(places)
        self._kept[source, : len(places)] = places
