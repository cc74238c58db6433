"""The indexed datasets of Megatron-LM: `NAME.bin` holds token ids, `NAME.idx` says where sequences and documents begin.

An index is `MMIDIDX\\0\\0`, `uint64 version` (1), `uint8` for the type of the ids, `uint64 sequences`, `uint64 bounds`,
then `int32 lengths[sequences]` in tokens, `int64 pointers[sequences]` in bytes of the .bin, and `int64
documents[bounds]`: document i is the sequences [documents[i], documents[i + 1]). All numbers are little endian. Both
files are read in place; of the index, every 1024th number is kept, so that of 5 G documents takes 80 MB.

Source: the format as of Megatron-Core 0.12 (https://github.com/NVIDIA/Megatron-LM), megatron/core/datasets.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from llmfoundry.config import ConfigError
from llmfoundry.data.open_file import OpenFile
from llmfoundry.data.stored_file import StoredFile

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)
_CHUNK = 2**20  # index entries checked at once
_BLOCK = 2**10  # one entry in this many is kept in memory
_SAMPLED = 2**14  # bytes of the .bin included in its fingerprint


class _Column:
    """A sorted column of numbers of an index, in its file."""

    def __init__(self, file: OpenFile, start: int, n: int) -> None:
        """Locate the column.

        Args:
            start: the byte at which it starts.
            n: number of values.
        """
        self._file, self._start, self._n = file, start, n
        self._every = np.empty(-(-n // _BLOCK), "<i8")  # one per _BLOCK, filled by `chunks`

    def chunks(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield all values in chunks, each with the position of its first value."""
        for first in range(0, self._n, _CHUNK):
            chunk = self.read(first, min(first + _CHUNK, self._n))
            self._every[first // _BLOCK : -(-(first + len(chunk)) // _BLOCK)] = chunk[::_BLOCK]
            yield first, chunk

    def read(self, first: int, stop: int) -> NDArray[np.int64]:
        """Read values [first, stop)."""
        return np.frombuffer(self._file.read(self._start + 8 * first, self._start + 8 * stop), "<i8")

    def at(self, place: int) -> int:
        """Read one value."""
        return int(self.read(place, place + 1)[0])

    def search(self, value: int) -> int:
        """Return the first position whose value is at least `value`; the number of values if there is none."""
        block = max(int(np.searchsorted(self._every, value)) - 1, 0)
        first = block * _BLOCK
        return first + int(np.searchsorted(self.read(first, min(first + _BLOCK, self._n)), value))


class MegatronFile:
    """The tokens of one .bin file and their documents."""

    def __init__(self, index: Path, tokens: Path | StoredFile) -> None:
        """Open both files, and check the index.

        Args:
            index: the .idx.
            tokens: the .bin, here or in a store.

        Raises:
            ConfigError: if a file is missing, or the index is malformed or does not fit the .bin.
        """
        self.path, self._index = tokens if isinstance(tokens, Path) else tokens.path, index
        try:
            self._tokens = OpenFile(tokens) if isinstance(tokens, Path) else tokens
            size, n_bytes = index.stat().st_size, self._tokens.size
            with index.open("rb") as file:
                header = file.read(_HEADER.size)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            self._refuse(
                "is not an index of Megatron's (it does not start with MMIDIDX); name the prefix of a .bin/.idx pair"
            )
        _, version, code, n_sequences, n_bounds = _HEADER.unpack(header)
        if version != 1:
            self._refuse(f"has version {version}, and only 1 is known")
        if code not in _DTYPES:
            what = "numbers with a fraction, not token ids" if code in _FLOATS else "a type that is not known"
            self._refuse(f"has the type code {code}, {what}")
        expected = _HEADER.size + 12 * n_sequences + 8 * n_bounds
        # Multimodal datasets add a byte per sequence.
        if size not in (expected, expected + n_sequences) or n_sequences == 0 or n_bounds < 2:
            self._refuse(
                f"is damaged: {size:,} bytes do not hold the {n_sequences:,} sequences and {max(n_bounds, 1) - 1:,} "
                f"documents of its header ({expected:,} bytes); copy or make it again"
            )
        self.dtype = np.dtype(_DTYPES[code])
        at = _HEADER.size
        try:
            places = OpenFile(index)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
        self._pointers = _Column(places, at + 4 * n_sequences, n_sequences)
        self._bounds = _Column(places, at + 12 * n_sequences, n_bounds)
        self.n_documents = n_bounds - 1
        self._check(places, n_sequences, n_bytes)
        self.n_tokens = n_bytes // self.dtype.itemsize
        self.fingerprint = self._fingerprint()

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read tokens [start, stop).

        Raises:
            ConfigError: if the .bin has become shorter, or cannot be read.
        """
        size = self.dtype.itemsize
        return np.frombuffer(self._tokens.read(start * size, stop * size), self.dtype).astype(np.int64)

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document starts in [start, stop), in order. An empty document starts where the next one does."""
        size = self.dtype.itemsize
        first, last = (self._pointers.search(place * size) for place in (start, stop))
        low, high = (self._bounds.search(sequence) for sequence in (first, last))
        sequences = self._bounds.read(low, min(high, self.n_documents))  # in [first, last)
        if not len(sequences):
            return np.empty(0, np.int64)
        return np.unique(self._pointers.read(first, last)[sequences - first]) // size

    def document_at(self, place: int) -> int:
        """Return the start of the first document at or after a token, or the number of tokens if there is none."""
        bound = self._bounds.search(self._pointers.search(place * self.dtype.itemsize))
        if bound >= self.n_documents:
            return self.n_tokens
        sequence = self._bounds.at(bound)
        return self._pointers.at(sequence) // self.dtype.itemsize

    def _check(self, index: OpenFile, n_sequences: int, n_bytes: int) -> None:
        """Check that the index is consistent and fits the .bin, a part at a time."""
        size, end = self.dtype.itemsize, 0
        for i, pointers in self._pointers.chunks():
            at = _HEADER.size + 4 * i
            lengths = np.frombuffer(index.read(at, at + 4 * len(pointers)), "<i4").astype(np.int64)
            if lengths.min() < 0:
                self._refuse(f"is damaged: sequence {i + int(lengths.argmin()):,} has {lengths.min()} tokens")
            ends = end + np.cumsum(lengths) * size
            wrong = np.flatnonzero(pointers != np.concatenate([[end], ends[:-1]]))
            if len(wrong):
                self._refuse(
                    f"is damaged: sequence {i + int(wrong[0]):,} does not begin where the one before it ends, "
                    "as Megatron writes them"
                )
            end = int(ends[-1])
        if end != n_bytes:
            self._refuse(f"does not fit {self.path.name}: it lists {end:,} bytes, and that has {n_bytes:,}")
        if n_bytes == 0:
            self._refuse("lists no tokens")
        before = 0
        for i, chunk in self._bounds.chunks():
            bounds = np.concatenate([[before], chunk])
            if (np.diff(bounds) < 0).any() or (i == 0 and bounds[1] != 0):
                self._refuse("is damaged: its documents are not in order")
            before = int(bounds[-1])
        if before != n_sequences:
            self._refuse(f"is damaged: its documents end at sequence {before:,} of {n_sequences:,}")

    def _fingerprint(self) -> str:
        """Return a fingerprint of the index and of some tokens: from the start, the middle and the end."""
        with self._index.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        size = self.n_tokens * self.dtype.itemsize
        for at in (0, size // 2, max(0, size - _SAMPLED)):
            digest.update(self._tokens.sample(at, min(at + _SAMPLED, size)))
        return digest.hexdigest()

    def _refuse(self, why: str) -> NoReturn:
        raise ConfigError(f"{self._index}: {why}")
