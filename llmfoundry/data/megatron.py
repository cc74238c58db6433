"""The indexed datasets of Megatron-LM: `NAME.bin` holds token ids, `NAME.idx` says where sequences and documents begin.

An index is `MMIDIDX\\0\\0`, `uint64 version` (1), `uint8` for the type of the ids, `uint64 sequences`, `uint64 bounds`,
then `int32 lengths[sequences]` in tokens, `int64 pointers[sequences]` in bytes of the .bin, and `int64
documents[bounds]`: document i is the sequences [documents[i], documents[i + 1]). All numbers are little endian. Both
files are mapped into memory, so an index of any size takes none.

Source: the format as of Megatron-Core 0.12 (https://github.com/NVIDIA/Megatron-LM), megatron/core/datasets.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from llmfoundry.config import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = (6, 7)
_CHUNK = 2**20  # entries of an index that are checked at once
_SAMPLED = 2**14  # bytes of the .bin that are part of its fingerprint


class MegatronFile:
    """The tokens of one .bin and their documents."""

    def __init__(self, index: Path, tokens: Path) -> None:
        """Map both files.

        Args:
            index: the .idx.
            tokens: the .bin.

        Raises:
            ConfigError: one is missing, or the index is malformed or does not fit the .bin.
        """
        self.path, self._index = tokens, index
        try:
            size, n_bytes = index.stat().st_size, tokens.stat().st_size
            with index.open("rb") as file:
                header = file.read(_HEADER.size)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
        if len(header) < _HEADER.size or header[:9] != _MAGIC:
            self._refuse(
                "is no index of Megatron's (it does not begin with MMIDIDX); name the prefix of a .bin/.idx pair"
            )
        _, version, code, n_sequences, n_bounds = _HEADER.unpack(header)
        if version != 1:
            self._refuse(f"has version {version}, and only 1 is known")
        if code not in _DTYPES:
            what = "numbers with a fraction, not token ids" if code in _FLOATS else "a type that is not known"
            self._refuse(f"has the type code {code}, {what}")
        expected = _HEADER.size + 12 * n_sequences + 8 * n_bounds
        # Datasets of several modalities add a byte per sequence.
        if size not in (expected, expected + n_sequences) or n_sequences == 0 or n_bounds < 2:
            self._refuse(
                f"is damaged: {size:,} bytes do not hold the {n_sequences:,} sequences and {max(n_bounds, 1) - 1:,} "
                f"documents of its header ({expected:,} bytes); copy or make it again"
            )
        self.dtype = np.dtype(_DTYPES[code])
        at = _HEADER.size
        self._lengths = np.memmap(index, "<i4", "r", at, (n_sequences,))
        self._pointers = np.memmap(index, "<i8", "r", at + 4 * n_sequences, (n_sequences,))
        self._bounds = np.memmap(index, "<i8", "r", at + 12 * n_sequences, (n_bounds,))
        self.n_documents = n_bounds - 1
        self._check(n_bytes)
        self.n_tokens = n_bytes // self.dtype.itemsize
        self._tokens = np.memmap(tokens, self.dtype, "r", shape=(self.n_tokens,))
        self.fingerprint = self._fingerprint()

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop)."""
        return self._tokens[start:stop].astype(np.int64)

    def starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where documents begin in [start, stop), in order; an empty document begins where the next one does."""
        size = self.dtype.itemsize
        first, last = np.searchsorted(self._pointers, (start * size, stop * size))
        low, high = np.searchsorted(self._bounds, (first, last))
        sequences = np.asarray(self._bounds[low : min(high, self.n_documents)])
        return np.unique(np.asarray(self._pointers[sequences])) // size

    def document_at(self, place: int) -> int:
        """The start of the first document that begins at a token or after it; the number of tokens if none does."""
        sequence = int(np.searchsorted(self._pointers, place * self.dtype.itemsize))
        bound = int(np.searchsorted(self._bounds, sequence))
        if bound >= self.n_documents:
            return self.n_tokens
        return int(self._pointers[self._bounds[bound]]) // self.dtype.itemsize

    def _check(self, n_bytes: int) -> None:
        """Compare the index with itself and the .bin, a part at a time."""
        size, end = self.dtype.itemsize, 0
        for i in range(0, len(self._lengths), _CHUNK):
            lengths = self._lengths[i : i + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                self._refuse(f"is damaged: sequence {i + int(lengths.argmin()):,} has {lengths.min()} tokens")
            ends = end + np.cumsum(lengths) * size
            wrong = np.flatnonzero(self._pointers[i : i + _CHUNK] != np.concatenate([[end], ends[:-1]]))
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
        for i in range(0, len(self._bounds), _CHUNK):
            bounds = np.concatenate([[before], self._bounds[i : i + _CHUNK]])
            if (np.diff(bounds) < 0).any() or (i == 0 and bounds[1] != 0):
                self._refuse("is damaged: its documents are not in order")
            before = int(bounds[-1])
        if before != len(self._lengths):
            self._refuse(f"is damaged: its documents end at sequence {before:,} of {len(self._lengths):,}")

    def _fingerprint(self) -> str:
        """Of the index, and of some of the tokens: their start, middle and end."""
        with self._index.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        with self.path.open("rb") as file:
            size = self.n_tokens * self.dtype.itemsize
            for at in (0, size // 2, max(0, size - _SAMPLED)):
                file.seek(at)
                digest.update(file.read(_SAMPLED))
        return digest.hexdigest()

    def _refuse(self, why: str) -> NoReturn:
        raise ConfigError(f"{self._index}: {why}")
