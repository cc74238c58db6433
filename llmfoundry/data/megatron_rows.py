"""The `megatron` dataset: token ids that Megatron-LM's preprocess_data.py has written. They are not tokenized again.

The files of a path form one stream, which is cut every `max_seq_len` tokens, like texts that are tokenized here. The
first token of a document is predicted from the end-of-text token before it; without that token (`--append-eod` was
left out), it is not predicted.
"""

from __future__ import annotations

import glob
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError, is_url
from llmfoundry.data.megatron import MegatronFile
from llmfoundry.data.remote import DataPath
from llmfoundry.data.rows import IGNORE, Block, How, Order, Rows, RowsConfig, epochs_of
from llmfoundry.data.sources import Source, fingerprint_of
from llmfoundry.data.stored_file import StoredFile

_ENDINGS = (".bin", ".idx")


class MegatronConfig(RowsConfig, names=("megatron",)):
    """Megatron-LM's `.bin` and `.idx` files. Where both loaders read the same, the last documents are held out."""

    path: DataPath  # the common prefix of a .bin and an .idx, or a folder or a glob of such pairs; also a URL
    # The id after which a document starts; None: the tokenizer's end of text
    eos_token_id: int | None = Field(default=None, ge=-1, lt=2**32)

    def of_split(self, split: str) -> Self:
        return self.model_copy(update={"split": split})

    def heap(self) -> str:
        return json.dumps(["megatron", self.path if is_url(self.path) else str(Path(self.path).resolve())])

    def opened(self) -> Joined:
        """Open the part of the files that belongs to this split.

        Raises:
            ConfigError: if the split is empty, or a file is damaged.
        """
        if is_url(self.path):
            return Joined(self._fetched(), self._held_out())
        path = Path(self.path)
        found = [path, *path.rglob("*.idx")] if path.is_dir() else [path, *map(Path, glob.glob(self.path))]
        prefixes = {each.with_suffix("") if each.suffix in _ENDINGS else each for each in found}
        pairs = sorted(str(each) for each in prefixes if any(Path(f"{each}{ending}").is_file() for ending in _ENDINGS))
        if not pairs:
            raise ConfigError(f"dataset.path: {self.path}: finds no .bin and .idx")
        return Joined([MegatronFile(Path(f"{each}.idx"), Path(f"{each}.bin")) for each in pairs], self._held_out())

    def _fetched(self) -> list[MegatronFile]:
        store, url = self.store(), self.path
        for ending in _ENDINGS:
            url = url.removesuffix(ending)
        try:
            found = store.find(url)  # a folder
        except ConfigError:
            found = store.find(f"{url}.*")
        pairs = sorted(name.removesuffix(".idx") for name in found if name.endswith(".idx"))
        missing = next((name for name in pairs if f"{name}.bin" not in found), None)
        if missing is not None or not pairs:
            raise ConfigError(f"dataset.path: {self.path}: finds no {missing or ''}.bin beside an .idx")
        return [
            MegatronFile(store.fetch(found[f"{name}.idx"]), StoredFile(found[f"{name}.bin"], store)) for name in pairs
        ]

    def _held_out(self) -> tuple[float, float]:
        """Return the part of the text that is read, as fractions of the whole."""
        if self._is_whole or self.split not in ("train", "validation"):
            return 0.0, 1.0
        return (0.0, 1.0 - self.fraction) if self.split == "train" else (1.0 - self.fraction, 1.0)

    def build(self) -> Source:
        """Return a source without text, whose fingerprint tells whether two loaders read the same."""
        stream = self.opened()
        title = f"megatron-{self.split}"
        return Source(title, stream.fingerprint, self._no_text, files=frozenset(stream.paths))

    def _no_text(self) -> Iterator[str]:
        raise ConfigError(
            f"dataset.path: {self.path}: holds token ids, and no text that a tokenizer could learn from; name the "
            "tokenizer that made them in tokenizer.name"
        )

    def order(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
        eos = tokenizer.eos_token_id if self.eos_token_id is None else self.eos_token_id
        largest = max(tokenizer.get_vocab().values())
        return epochs_of(MegatronRows(self.opened(), f"megatron-{self.split}", eos, largest, how), self, how)


class Joined:
    """The tokens of several files, concatenated, from one document boundary to another."""

    def __init__(self, files: Sequence[MegatronFile], part: tuple[float, float] = (0.0, 1.0)) -> None:
        """Join files.

        Args:
            part: the fractions of the tokens that are read; it starts and ends at document boundaries.
        """
        self._files = files
        self._firsts = [0, *accumulate(file.n_tokens for file in files)]
        self._first = 0
        self.n_tokens = self._firsts[-1]
        low, high = (self._document_at(round(at * self.n_tokens)) for at in part)
        self._first, self.n_tokens = low, high - low
        self.fingerprint = fingerprint_of("megatron/1", *(file.fingerprint for file in files), low, high)
        self.paths = [file.path.resolve() for file in files]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read tokens [start, stop)."""
        parts = [file.read(low, high) for file, _, low, high in self._inside(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document starts in [start, stop), in order."""
        parts = [file.starts(low, high) + shift for file, shift, low, high in self._inside(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def where(self, place: int) -> str:
        """Return the file of a token and the token's position in it, for messages."""
        ((file, _, low, _),) = self._inside(place, place + 1)
        return f"{file.path}: token {low:,}"

    def _inside(self, start: int, stop: int) -> Iterator[tuple[MegatronFile, int, int, int]]:
        """Yield the files of a range, the place of each, and the range in it."""
        start, stop = start + self._first, stop + self._first
        at = bisect_right(self._firsts, start) - 1
        while start < stop:
            first, end = self._firsts[at], min(stop, self._firsts[at + 1])
            yield self._files[at], first - self._first, start - first, end - first
            start, at = end, at + 1

    def _document_at(self, place: int) -> int:
        """Return the start of the first document at a place or after it."""
        at = min(bisect_right(self._firsts, place), len(self._files)) - 1
        return self._firsts[at] + self._files[at].document_at(place - self._firsts[at])


class MegatronRows(Rows):
    """Row i is tokens [i*S, i*S + S + 1) of the files."""

    def __init__(self, stream: Joined, title: str, eos_token_id: int, largest: int, how: How) -> None:
        """Cut a stream into rows.

        Args:
            largest: the largest token id of the tokenizer.

        Raises:
            ConfigError: if an id in the first or the last row is larger than `largest`.
        """
        self.title, self.length, self.documents = title, how.length, how.documents
        self._stream, self._eos, self._largest = stream, eos_token_id, largest
        self.fingerprint = fingerprint_of("megatron-rows/1", stream.fingerprint, eos_token_id)
        self.n_tokens = max(stream.n_tokens - 1, 0)
        self.n_rows, self.n_full = -(-self.n_tokens // how.length), self.n_tokens // how.length
        for start in (0, max(0, stream.n_tokens - how.length)):
            self._tokens(start, min(start + how.length, stream.n_tokens))

    def put(self, number: int, out: Block, i: int) -> None:
        start = min(number * self.length, self._stream.n_tokens - 1)
        stop = min(start + self.length + 1, self._stream.n_tokens)
        found = self._tokens(start, stop)
        n = len(found) - 1
        out.tokens[i, :n], out.tokens[i, n:] = found[:-1], self._eos
        out.labels[i, :n], out.labels[i, n:] = found[1:], IGNORE
        begins = self._stream.starts(start + 1, stop) - start  # 1..n, where documents start in this row
        opened = found[begins - 1] == self._eos
        out.labels[i, begins[~opened] - 1] = IGNORE
        if out.documents is not None:
            marks = np.zeros(self.length + 1, dtype=np.int32)
            marks[begins - opened] = 1  # the end-of-text token before a document is its first token
            np.cumsum(marks[:-1], out=out.documents[i])

    def _tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        found = self._stream.read(start, stop)
        wrong = np.flatnonzero((found < 0) | (found > self._largest))
        if len(wrong):
            raise ConfigError(
                f"{self._stream.where(start + int(wrong[0]))} is {found[wrong[0]]}, and the tokenizer's ids end at "
                f"{self._largest}; name the tokenizer that made the file"
            )
        return found
