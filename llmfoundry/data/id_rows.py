"""The `ids` dataset: rows of token ids in a column of .jsonl, .json or .parquet files, tokenized and cut elsewhere.

The ids are copied once into one file that every run reads in place: row i is bytes [i*S*w, (i + 1)*S*w).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError, is_url
from llmfoundry.data.open_file import OpenFile
from llmfoundry.data.provenance import Gone
from llmfoundry.data.remote import DataPath
from llmfoundry.data.rows import IGNORE, Block, How, Order, Rows, RowsConfig, epochs_of
from llmfoundry.data.sources import Source, fingerprint_of
from llmfoundry.data.table_files import Table, gone_table, table_of
from llmfoundry.data.tables import BadRow
from llmfoundry.data.watch import Watch
from llmfoundry.runtime import cache_root

log = logging.getLogger(__name__)


class IdsConfig(RowsConfig, names=("ids",)):
    """Rows of token ids in tables. Each is used unchanged, truncated to max_seq_len; its last token has no label."""

    path: DataPath  # a folder, a glob or one file, also as a URL: .jsonl, .json, .parquet
    ids_key: str = "input_ids"  # the column with a list of ids in each row
    # The id that ends a document inside a row; None: the tokenizer's end of text
    eos_token_id: int | None = Field(default=None, ge=-1, lt=2**32)

    def of_split(self, split: str) -> Self:
        return self.model_copy(update={"split": split})

    def heap(self) -> str:
        return json.dumps(["ids", self.path if is_url(self.path) else str(Path(self.path).resolve())])

    def build(self) -> Source:
        """Return a source without text, whose fingerprint tells whether two loaders read the same."""
        table = self._table()
        return Source(table.title, table.fingerprint, self._no_text, files=table.files, summary=table.summary)

    def _no_text(self) -> Iterator[str]:
        raise ConfigError(
            f"dataset.path: {self.path}: holds token ids, and no text that a tokenizer could learn from; name the "
            "tokenizer that made them in tokenizer.name"
        )

    def _table(self) -> Table:
        try:
            return table_of(self.path, f"ids-{self.split}", self, lenient=False)
        except Gone as gone:
            return gone_table(self.memory(self.path), gone)

    def order(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
        table, largest = self._table(), max(tokenizer.get_vocab().values())
        log.info("%s", table.summary)
        eos = tokenizer.eos_token_id if self.eos_token_id is None else self.eos_token_id
        fingerprint = fingerprint_of("ids/1", table.fingerprint, self.ids_key, how.length, largest, eos)
        folder = cache_root(self.cache_dir) / "ids" / f"{table.title}-{fingerprint[:24]}"
        dtype = np.dtype("<u2" if largest < 2**16 else "<u4")

        def make(temporary: Path) -> None:
            self._write(temporary / "ids.bin", table, how.length, largest, dtype)

        watch = table.made(folder, make, self.memory(self.path))
        rows = IdRows(folder / "ids.bin", table.title, fingerprint, dtype, eos, how, watch)
        return epochs_of(rows, self, how)

    def _write(self, file: Path, table: Table, length: int, largest: int, dtype: np.dtype) -> None:
        with file.open("wb") as out:
            for row, at in table.rows:
                if isinstance(row, BadRow):
                    raise ConfigError(f"dataset: {row.message}")
                try:
                    out.write(self._ids(row.get(self.ids_key), length, largest).astype(dtype).tobytes())
                except ValueError as error:
                    has = "" if self.ids_key in row else f"; its columns are {', '.join(row)}"
                    raise ConfigError(f"dataset: {at}: {self.ids_key}: {error}{has}") from None

    @staticmethod
    def _ids(found: object, length: int, largest: int) -> NDArray[np.int64]:
        """Return the ids in a row; raise ValueError."""
        if not isinstance(found, list) or not all(type(each) is int for each in found):
            raise ValueError(f"is {found!r:.60}, and must be a list of token ids")
        if len(found) < length:
            raise ValueError(f"has {len(found)} tokens, and max_seq_len is {length}; lower it, or join short rows")
        ids = np.array(found[:length], dtype=np.int64)
        if ids.min() < 0 or ids.max() > largest:
            wrong = ids.max() if ids.min() >= 0 else ids.min()
            raise ValueError(f"has the id {wrong}, and the tokenizer's end at {largest}; name the one that made it")
        return ids


class IdRows(Rows):
    """Rows of a file of ids. The label of a token is the next token; the last token has none."""

    def __init__(
        self, file: Path, title: str, fingerprint: str, dtype: np.dtype, eos_token_id: int, how: How, watch: Watch
    ) -> None:
        self.title, self.fingerprint, self.length, self.documents = title, fingerprint, how.length, how.documents
        self._ids, self._dtype, self._eos, self._watch = OpenFile(file), dtype, eos_token_id, watch
        self._row_bytes = dtype.itemsize * how.length
        n_rows = self._ids.size // self._row_bytes
        if not n_rows:
            raise ConfigError(f"dataset {title}: has no rows")
        self.n_rows = self.n_full = n_rows
        self.n_tokens = n_rows * (how.length - 1)

    def put(self, number: int, out: Block, i: int) -> None:
        self._watch.check()
        tokens = out.tokens[i]
        if number < self.n_rows:
            start = number * self._row_bytes
            tokens[:] = np.frombuffer(self._ids.read(start, start + self._row_bytes), self._dtype)
        else:
            tokens[:] = self._eos
        out.labels[i, :-1] = tokens[1:] if number < self.n_rows else IGNORE
        out.labels[i, -1] = IGNORE
        if out.documents is not None:
            out.documents[i, 0] = 0
            np.cumsum(tokens[:-1] == self._eos, out=out.documents[i, 1:])
