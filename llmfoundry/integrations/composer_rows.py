"""llmfoundry's loaders as Composer's `DataSpec`: rows in llmfoundry's order, label counts, and a resumable position.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import llmfoundry.integrations.torchvision_operators  # noqa: F401  before composer

# isort: split
from composer.core import DataSpec
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from llmfoundry.config import ConfigError
from llmfoundry.data.loader import Batch, Loader
from llmfoundry.data.rows import IGNORE

Rows = dict[str, Tensor]  # the fields of `Batch` that are not None, by name: Composer moves and splits mappings


class TrainingRows(IterableDataset[Rows]):
    """The rows of a run, batch by batch, in llmfoundry's order; each epoch continues where the last one ended.

    Args:
        loader: provides the rows.
        global_rows: number of rows in a batch over all ranks.
        rank: this rank.
        world: number of ranks.
    """

    def __init__(self, loader: Loader, global_rows: int, rank: int, world: int) -> None:
        self.loader, self.global_rows, self.rank, self.world = loader, global_rows, rank, world
        self.row = 0  # index in the run of the next batch's first row

    def __len__(self) -> int:
        return max(1, self.loader.rows_per_epoch // self.global_rows)

    def __iter__(self) -> Iterator[Rows]:
        done = self.row // self.global_rows % len(self)  # of this epoch, before a resume
        for _ in range(len(self) - done):
            batch = self.loader.batch(self.row, self.global_rows, self.rank, self.world)
            self.row += self.global_rows
            yield as_rows(batch)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, int | str]:
        """Return the position in the data."""
        return {"row": self.row, "data": self.loader.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a position.

        Raises:
            ConfigError: if the data is not that of the checkpoint.
        """
        if state["data"] != self.loader.fingerprint:
            raise ConfigError("load_path: was trained on other data or with another tokenizer; restore them, or load "
                              "only its weights: load_weights_only=True")  # fmt: skip
        self.row = int(state["row"])


class OnePass(IterableDataset[Rows]):
    """One pass over an evaluation's data, with every label once."""

    def __init__(self, loader: Loader, global_rows: int, rank: int, world: int) -> None:
        self.loader, self.global_rows, self.rank, self.world = loader, global_rows, rank, world

    def __len__(self) -> int:
        rows = self.loader.n_rows if self.loader.limit is None else min(self.loader.limit, self.loader.n_rows)
        return -(-rows // self.global_rows)

    def __iter__(self) -> Iterator[Rows]:
        return map(as_rows, self.loader.one_pass(self.global_rows, self.rank, self.world, self.loader.limit))


def as_rows(batch: Batch) -> Rows:
    """Convert a batch to a mapping of the fields that are not None."""
    return {name: part for name, part in batch._asdict().items() if part is not None}


def split_rows(batch: Rows, rows: int) -> list[Rows]:
    """Split a batch into microbatches of at most this many rows, in order."""
    return [as_rows(micro) for micro in Batch(**batch).split(rows)]


def count_tokens(batch: Rows) -> dict[str, int]:
    """Count a batch's tokens, and its labels, by which Composer weights the losses of microbatches and ranks."""
    return {"total": batch["tokens"].numel(), "loss_generating": int((batch["labels"] != IGNORE).sum())}


def data_spec(dataset: IterableDataset[Rows]) -> DataSpec:
    """Return a `DataSpec` that counts labels and splits batches into microbatches."""
    return DataSpec(
        DataLoader(dataset, batch_size=None),
        split_batch=split_rows,
        get_num_samples_in_batch=lambda batch: len(batch["rows"]),
        get_num_tokens_in_batch=count_tokens,
    )
