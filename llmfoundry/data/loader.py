"""Token rows for training and evaluation, as a pure function of the row's number.

Shapes: B rows, S max_seq_len.
Row n of a run depends only on (seed, n): it is in epoch n // rows_per_epoch, at the place that a keyed permutation
gives to n % rows_per_epoch. So the order does not depend on ranks, workers or microbatches, the state of the loader is
the number of rows consumed, and a batch may span two epochs. Row i of the data is tokens [i*S, i*S + S + 1) of the
stream: every token of the stream except the first is a label exactly once per epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import Choice, ConfigError
from llmfoundry.data.packing import TokenStream, pack
from llmfoundry.data.sources import DatasetConfig, Source
from llmfoundry.data.tokenizer import PLAIN_TEXT, SpecialTokens
from llmfoundry.runtime import cache_root, seed_of

log = logging.getLogger(__name__)

IGNORE = -100  # the label of a position that is not predicted


class Batch(NamedTuple):
    """Rows of tokens, and for each token the one that follows it."""

    tokens: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64, IGNORE where nothing is predicted
    rows: Tensor  # (B,) int64, each row's number in the run
    sequence_ids: Tensor | None = None  # (B, S) int32, each token's document, counted from the row's start

    @property
    def n_labels(self) -> Tensor:
        """() int64: labels that count."""
        return (self.labels != IGNORE).sum()

    def split(self, rows: int) -> list[Batch]:
        """Microbatches of at most `rows` rows, in order."""
        return [self._each(itemgetter(slice(start, start + rows))) for start in range(0, len(self.rows), rows)]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        ids = None if self.sequence_ids is None else change(self.sequence_ids)
        return Batch(change(self.tokens), change(self.labels), change(self.rows), ids)


class LoaderConfig(Choice, tag="name"):
    """A dataset and how its rows are read. `name: text` may be left out."""

    name: str = "text"
    dataset: DatasetConfig
    drop_last: bool = False  # training leaves out the last, partly filled row of an epoch; evaluation never does
    num_workers: int = Field(default=0, ge=0)  # 0: each batch is read on demand; more: a thread reads the next one

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        max_seq_len: int | None = None,
        sequence_ids: bool = False,
        special: SpecialTokens = PLAIN_TEXT,
    ) -> Loader:
        """Open the tokenized dataset; tokenize it first if it is not in the cache.

        Args:
            seed: the run's seed; `dataset.shuffle_seed` takes precedence.
            max_seq_len: tokens per row; `dataset.max_seq_len` takes precedence.
            sequence_ids: whether batches contain the number of each token's document.
            special: the rule for special tokens.
        """
        raise NotImplementedError


class TextLoaderConfig(LoaderConfig, names=("text",)):
    """Documents joined by end-of-text tokens and cut into rows of max_seq_len."""

    def build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        max_seq_len: int | None = None,
        sequence_ids: bool = False,
        special: SpecialTokens = PLAIN_TEXT,
    ) -> Loader:
        dataset = self.dataset
        length = dataset.max_seq_len or max_seq_len
        if length is None:
            raise ConfigError("dataset.max_seq_len: is missing; set it here or at the top of the file")
        source = dataset.build()
        if source.summary:
            log.info("%s", source.summary)
        shuffled = dataset.split == "train" if dataset.shuffle is None else dataset.shuffle
        shuffle_seed = seed if dataset.shuffle_seed is None else dataset.shuffle_seed
        return Loader(
            pack(source, tokenizer, cache_root(dataset.cache_dir), special),
            source,
            max_seq_len=length,
            shuffle_seed=shuffle_seed if shuffled else None,
            drop_last=self.drop_last,
            read_ahead=self.num_workers > 0,
            sequence_ids=sequence_ids,
        )


class Loader:
    """Serves any rows of an endless sequence of epochs, or one pass over the data. It has no state."""

    def __init__(
        self,
        stream: TokenStream,
        source: Source,
        *,
        max_seq_len: int,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        read_ahead: bool = False,
        sequence_ids: bool = False,
    ) -> None:
        """Serve rows of `max_seq_len` tokens of a stream.

        Args:
            shuffle_seed: None keeps the order of the data.

        Raises:
            ConfigError: there are too few tokens for one row.
        """
        self.max_seq_len = max_seq_len
        self.fingerprint = stream.fingerprint  # of the documents and the tokenizer
        self.n_tokens = stream.n_tokens - 1  # labels in one pass
        self.n_bytes = stream.n_bytes  # of the documents as UTF-8
        self.n_rows = -(-self.n_tokens // max_seq_len)  # of one pass; the last may be partly filled
        self.rows_per_epoch = self.n_tokens // max_seq_len if drop_last else self.n_rows
        if self.rows_per_epoch == 0:
            raise ConfigError(
                f"dataset {source.title}: {self.n_tokens} tokens do not fill one row of "
                f"max_seq_len={max_seq_len}; lower max_seq_len, add text, or set drop_last: false"
            )
        self._stream = stream
        self._seed, self._sequence_ids = shuffle_seed, sequence_ids
        self._thread = ThreadPoolExecutor(1, "read-ahead") if read_ahead else None
        self._ahead: tuple[tuple[int, int, int, int], Future[Batch]] | None = None

    def batch(self, start_row: int, n_rows: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's contiguous share of rows [start_row, start_row + n_rows) of the run.

        Where `world` does not divide `n_rows`, shares differ by one row. Epochs follow one another: a batch
        may hold the last rows of one epoch and the first of the next.
        """
        wanted = (start_row, n_rows, rank, world)
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead is not None and ahead[0] == wanted else self._batch(*wanted)
        if self._thread is not None:
            following = (start_row + n_rows, n_rows, rank, world)
            self._ahead = (following, self._thread.submit(self._batch, *following))
        return batch

    def one_pass(self, n_rows: int, rank: int = 0, world: int = 1, limit: int | None = None) -> Iterator[Batch]:
        """Every label of the data exactly once, in order: `n_rows` rows at a time over all ranks.

        Every batch has the same shape on every rank, as collectives and compiled models need: past the end, rows have
        no labels. The sum of nats over these labels / ln 2 / `n_bytes` is the loss in bits per byte; it includes the
        cost of the end-of-text tokens, but not their bytes.

        Args:
            n_rows: a multiple of `world`.
            limit: rows to read, from the first; None: all.
        """
        if n_rows % world:
            raise ValueError(f"n_rows={n_rows} is not a multiple of world={world}")
        share, stop = n_rows // world, self.n_rows if limit is None else min(limit, self.n_rows)
        for start in range(0, stop, n_rows):
            rows = np.arange(share) + start + rank * share
            yield self._gather(rows, np.where(rows < stop, rows, self.n_rows))

    def _batch(self, start_row: int, n_rows: int, rank: int, world: int) -> Batch:
        rows = np.arange(start_row + n_rows * rank // world, start_row + n_rows * (rank + 1) // world)
        epochs, places = np.divmod(rows, self.rows_per_epoch)
        if self._seed is not None:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                seed = seed_of(self._seed, "epoch", int(epoch))
                places[here] = permuted(places[here], self.rows_per_epoch, seed)
        return self._gather(rows, places)

    def _gather(self, rows: NDArray[np.int64], places: NDArray[np.int64]) -> Batch:
        """Read rows at `places` of the data; a place past the end is a row without labels."""
        length, stream = self.max_seq_len, self._stream
        tokens = np.full((len(rows), length), stream.eos_token_id, dtype=np.int64)  # (B, S)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)  # (B, S)
        for i, place in enumerate(places.tolist()):
            start = min(place * length, stream.n_tokens - 1)
            found = stream.read(start, min(start + length + 1, stream.n_tokens))
            tokens[i, : len(found) - 1] = found[:-1]
            labels[i, : len(found) - 1] = found[1:]
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(rows))
        if not self._sequence_ids:
            return batch
        # The document's first token is predicted from the token that opens it, and from nothing before that.
        documents = np.cumsum(tokens == stream.opening_token_id, axis=1, dtype=np.int32)  # (B, S)
        return batch._replace(sequence_ids=torch.from_numpy(documents))


def permuted(places: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """The images of `places` in [0, n) under a random permutation of [0, n) that is not stored.

    A Feistel network permutes the smallest 2^(2k) >= n; an image outside [0, n) is permuted again until it is inside
    (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    keys = [np.uint64(seed_of(seed, "round", i)) for i in range(6)]
    out = _feistel(places.astype(np.uint64), half, keys)
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half: np.uint64, keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of MurmurHash3: every input bit reaches every output bit."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(multiplier)
    return x ^ (x >> np.uint64(33))
