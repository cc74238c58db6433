"""Batches of token rows for training and evaluation, as a pure function of the rows' numbers.

Shapes: B rows, S max_seq_len.
Row n of a run depends only on (seed, n); data/rows.py says how. So the order does not depend on ranks, workers or
microbatches, the loader's state is the number of rows consumed, and a batch may span two epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from threading import Lock
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import Choice, ConfigError, lifted
from llmfoundry.data.rows import IGNORE, Block, How, Order, open_order
from llmfoundry.data.sources import DatasetConfig
from llmfoundry.data.tokenizer import PLAIN_TEXT, SpecialTokens


class Batch(NamedTuple):
    """Rows of tokens, and for each token its label, the token that follows it."""

    tokens: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64, IGNORE where nothing is predicted
    rows: Tensor  # (B,) int64, each row's index in the run
    sequence_ids: Tensor | None = None  # (B, S) int32, each token's document, counted from the row's start
    positions: Tensor | None = None  # (B, S) int64, each token's place in its document; None: in its row
    sources: Tensor | None = None  # (B,) int64, each row's source, by its place in a mixture

    @property
    def n_labels(self) -> Tensor:
        """Number of labels that count: () int64."""
        return (self.labels != IGNORE).sum()

    def split(self, rows: int) -> list[Batch]:
        """Split into microbatches of at most `rows` rows, in order."""
        return [self._each(itemgetter(slice(start, start + rows))) for start in range(0, len(self.rows), rows)]

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to another device.

        The host does not wait for what a GPU has still to do: from memory that is not pinned, a copy may begin only
        when all that was launched before it has ended.
        """
        pins = torch.device(device).type == "cuda" and not self.tokens.is_cuda
        return self._each(lambda part: (part.pin_memory() if pins else part).to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        optional = (None if part is None else change(part) for part in self[3:])
        return Batch(change(self.tokens), change(self.labels), change(self.rows), *optional)


KINDS = {"finetuning": "chats", "preferences": "preferences"}  # the dataset that a loader of this name reads


class LoaderConfig(Choice, tag="name"):
    """A dataset and how its rows are read. `name: text` may be left out."""

    name: str = "text"  # the kind of rows
    dataset: DatasetConfig  # the dataset; its name may be left out if the loader's name or the dataset's keys imply it
    drop_last: bool = False  # in training, drop the last, partly filled row of an epoch; evaluation never does
    num_workers: int = Field(default=0, ge=0)  # 0: read each batch on demand; more: a thread reads the next batch ahead
    label: str | None = None  # in eval_loaders: the name in metrics
    rows: int | None = Field(default=None, ge=1)  # for evaluation: maximum number of rows to read; None: all

    @model_validator(mode="wrap")
    @classmethod
    def _written_out(cls, data: object, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(cls._without_shorthand(data))
        except ValidationError as error:
            if not isinstance(data, dict) or "datasets" not in data:
                raise
            raise lifted(error, "dataset", cls) from None

    @staticmethod
    def _without_shorthand(data: object) -> object:
        """Expand shorthand: `datasets: [...]` beside the loader's keys means a dataset of the kind `mixture`.

        A dataset without a name gets the one that its loader or its keys imply.
        """
        if not isinstance(data, dict):
            return data
        dataset = data.get("dataset")
        if "datasets" not in data and isinstance(dataset, dict) and "name" not in dataset:
            folders = {"local", "remote", "streams"} & dataset.keys()
            kind = KINDS.get(str(data.get("name")), "mds" if folders else None)
            return data if kind is None else data | {"dataset": {"name": kind} | dataset}
        if "datasets" not in data:
            return data
        if data.get("dataset") is not None:
            raise ValueError("dataset and datasets are both given; keep one")
        of_mixture = {key: data[key] for key in ("datasets", "mixture", "temperature") if key in data}
        rest = {key: value for key, value in data.items() if key not in of_mixture and key != "dataset"}
        return rest | {"dataset": {"name": "mixture"} | of_mixture}

    @model_validator(mode="after")
    def _fits_dataset(self) -> Self:
        kind, found = KINDS.get(self.name), self.dataset.name
        if kind is not None and found not in (kind, "mixture"):
            raise ValueError(f"name={self.name} reads {kind}, and dataset.name is {found}; leave one of the names out")
        return self

    def datasets(self, where: str) -> dict[str, DatasetConfig]:
        """Return the dataset, or each dataset of a mixture, by its place in the YAML.

        Args:
            where: the loader's place in the YAML.
        """
        parts = self.dataset.parts()
        return {where: parts[0]} if len(parts) == 1 else {f"{where}.{i}": part for i, part in enumerate(parts)}

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
            sequence_ids: whether batches contain the document number of each token.
            special: the rule for special tokens.
        """
        length = self.dataset.max_seq_len or max_seq_len
        if length is None:
            raise ConfigError("dataset.max_seq_len: is missing; set it here or at the top of the file")
        order = open_order(self.dataset, tokenizer, How(length, seed, sequence_ids, self.drop_last, special))
        return Loader(order, read_ahead=self.num_workers > 0, label=self.label, limit=self.rows)


class TextLoaderConfig(LoaderConfig, names=("text",)):
    """Documents joined by end-of-text tokens and cut into rows of max_seq_len, or datasets that make their own rows."""


class FinetuningLoaderConfig(LoaderConfig, names=("finetuning",)):
    """Conversations and instructions (data/chats.py); the dataset needs no name."""


class PreferencesLoaderConfig(LoaderConfig, names=("preferences",)):
    """Pairs of answers (data/preferences.py); the dataset needs no name."""


class Loader:
    """Serves rows of an endless sequence of epochs, or one pass over the data. It has no state."""

    def __init__(
        self, order: Order, *, read_ahead: bool = False, label: str | None = None, limit: int | None = None
    ) -> None:
        """Serve the rows of an order.

        Args:
            read_ahead: a thread reads the next batch while the current one is used.
            label: the loader's name in evaluation metrics.
            limit: rows that one pass reads; None: all.
        """
        self.label, self.limit = label, limit
        self.order = order
        self.max_seq_len, self.fingerprint = order.length, order.fingerprint
        self.rows_per_epoch, self.labels = order.rows_per_epoch, order.labels
        once = order.once
        self.n_rows = once.n_rows if once is not None else 0  # in one pass; the last may be partly filled
        self.n_tokens = once.n_tokens if once is not None else 0  # labels in one pass
        self.n_bytes = once.n_bytes if once is not None else None  # of the text as UTF-8
        self._reading = Lock()  # orders cache what they compute, so only one thread may read at a time
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
        """Yield every label of the data exactly once, in order: `n_rows` rows at a time over all ranks.

        Every batch has the same shape on every rank, as collectives and compiled models need: past the end, rows have
        no labels. The sum of nats over these labels / ln 2 / `n_bytes` is the loss in bits per byte; it includes the
        cost of the end-of-text tokens, but not their bytes.

        Args:
            n_rows: a multiple of `world`.
            limit: rows to read, from the first; None: all.
        """
        if n_rows % world:
            raise ValueError(f"n_rows={n_rows} is not a multiple of world={world}")
        once = self.order.once
        assert once is not None, "a mixture has no end"
        share, stop = n_rows // world, self.n_rows if limit is None else min(limit, self.n_rows)
        for start in range(0, stop, n_rows):
            rows = np.arange(share) + start + rank * share
            with self._reading:
                block = once.read(np.where(rows < stop, rows, self.n_rows))
            yield _batch_of(rows, block)

    def _batch(self, start_row: int, n_rows: int, rank: int, world: int) -> Batch:
        return self.gather(np.arange(start_row + n_rows * rank // world, start_row + n_rows * (rank + 1) // world))

    def gather(self, rows: NDArray[np.int64]) -> Batch:
        """Read any rows of the run, by their numbers."""
        with self._reading:
            return _batch_of(rows, self.order.read(rows))


def _batch_of(rows: NDArray[np.int64], block: Block) -> Batch:
    first = (block.tokens, block.labels, rows)
    optional = (block.documents, block.positions, block.sources)
    return Batch(
        *(torch.from_numpy(part) for part in first),
        *(None if part is None else torch.from_numpy(part) for part in optional),
    )
