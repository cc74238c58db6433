"""Write one part of a token stream to disk, shard by shard, so that a killed run can continue.

A part is a whole source, or some of its files (`--part 2/8`: one of eight machines). Its folder holds shards and
`state.json`, which is replaced whenever a shard is complete. It holds the shards so far, the number of documents that
had ended by then, and the position in the stream at which the last of these ended. To continue, these documents are
read again, but not tokenized.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from llmfoundry.atomic import atomic_write
from llmfoundry.config import ConfigError, ResourceError
from llmfoundry.data.encoding import encoded
from llmfoundry.data.sieve import Counts
from llmfoundry.data.sources import Source
from llmfoundry.data.tokenizer import Encoder
from llmfoundry.progress import Advance
from llmfoundry.strict_json import read_mapping, whole_number

SHARD_TOKENS = 2**27


class Share(NamedTuple):
    """Which part of a source: the files whose bytes lie in it. `Share()` is the whole source."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Parse `2/8`: the second of eight parts.

        Raises:
            ConfigError: if the text does not have this form.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ConfigError(f"--part {text}: write I/N, e.g. 2/8 for the second of eight parts")
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number} of {self.of}"


class Shard(NamedTuple):
    """One file of the stream."""

    tokens: int
    sha256: str


class State(NamedTuple):
    """The progress of a part."""

    shards: list[Shard]
    counts: Counts  # of the documents that end in these shards
    place: int  # where the last of them ends, in the part's tokens
    done: bool = False


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"tokens-{number:05d}.bin"


def documents_of(source: Source, share: Share) -> tuple[list[Iterator[str]], Iterator[str]]:
    """Return the documents of the files before a part, and those of the part.

    Raises:
        ConfigError: if the source has fewer files than there are parts.
    """
    if share.of == 1:
        return [], source.read()
    if len(source.pieces) < share.of:
        raise ConfigError(
            f"--part {share.number}/{share.of}: dataset {source.title} has {len(source.pieces)} files that can be "
            "divided; ask for no more parts, or split its files"
        )
    bounds = _bounds([piece.n_bytes for piece in source.pieces], share.of)
    first, last = bounds[share.number - 1], bounds[share.number]
    before = [piece.read() for piece in source.pieces[:first]]
    return before, itertools.chain.from_iterable(piece.read() for piece in source.pieces[first:last])


def _bounds(sizes: list[int], n: int) -> list[int]:
    """Return the files at which parts start, and the end. Parts have about equal size and at least one file each."""
    ends = list(itertools.accumulate(sizes))
    bounds = [0]
    for part in range(1, n):
        wanted = ends[-1] * part / n
        at = next(i for i, end in enumerate(ends) if end >= wanted) + 1
        bounds.append(min(max(at, bounds[-1] + 1), len(sizes) - (n - part)))
    return [*bounds, len(sizes)]


def write_part(
    folder: Path, source: Source, share: Share, encoder: Encoder, eos: int, dtype: np.dtype, workers: int,
    advance: Advance,
) -> State:  # fmt: skip
    """Tokenize a part, from where an earlier run stopped. If the data are wrong, nothing of the part is left.

    Args:
        workers: see `encoded`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = read_state(folder)
    if state.done:
        return state
    try:
        return _write(folder, source, share, encoder, eos, dtype, workers, advance, state)
    except ConfigError:
        shutil.rmtree(folder)
        raise


def _write(
    folder: Path, source: Source, share: Share, encoder: Encoder, eos: int, dtype: np.dtype, workers: int,
    advance: Advance, state: State,
) -> State:  # fmt: skip
    before, documents = documents_of(source, share)
    sieve = source.sieve()
    if source.dedup:
        for each in before:
            sieve.see(each)
    sieve.see(itertools.islice(documents, state.counts.read))
    if not source.dedup:
        next(itertools.islice(documents, state.counts.read, state.counts.read), None)
    writer = _Writer(folder, dtype, state)
    bos = encoder.special.bos
    nothing, end = np.array([], dtype), np.array([eos], dtype)
    opens = nothing if bos is None else np.array([bos], dtype)  # starts each document
    opening = end if bos is None and share.number == 1 and state.place == 0 else opens
    advance(state.counts.kept_bytes)
    for (text, counts), ids in encoded(sieve.through(documents, state.counts), encoder, dtype, workers):
        writer.write(np.concatenate([opening, ids, nothing if counts is None else end]))
        opening = nothing if counts is None else opens
        if counts is not None:
            writer.ended(counts)
        advance(len(text) if text.isascii() else len(text.encode()), len(ids))
    return writer.finish(sieve.last)


def read_state(folder: Path) -> State:
    """Read the progress of a part; if there is none, the part starts at its beginning."""
    try:
        found = cast(dict, read_mapping(folder / "state.json"))
        shards = [Shard(whole_number(tokens), str(sha256)) for tokens, sha256 in found["shards"]]
        place = whole_number(found["place"])
        return State(shards, Counts(*map(whole_number, found["counts"])), place, bool(found["done"]))
    except FileNotFoundError:
        return State([], Counts(), 0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'state.json'}: is damaged ({error}); delete {folder} to make it again") from None


class _Writer:
    """Writes a part as files of SHARD_TOKENS, starting at the position of a state."""

    def __init__(self, folder: Path, dtype: np.dtype, state: State) -> None:
        self._folder, self._dtype = folder, dtype
        self._shards, self._counts, self._ended = list(state.shards), state.counts, state.place
        self._place = state.place
        self._skip = sum(shard.tokens for shard in state.shards) - state.place  # tokens that are already on disk
        self._file: BinaryIO | None = None

    def write(self, ids: NDArray) -> None:
        self._place += len(ids)
        skipped = min(self._skip, len(ids))
        self._skip -= skipped
        ids = ids[skipped:]
        while len(ids):
            if self._file is None:
                self._check_room()
                self._file = (self._folder / shard_name(len(self._shards))).open("wb", buffering=2**20)
                self._sha, self._tokens = hashlib.sha256(), 0
            part, ids = np.split(ids, [SHARD_TOKENS - self._tokens])
            data = part.tobytes()
            self._file.write(data)
            self._sha.update(data)
            self._tokens += len(part)
            if self._tokens == SHARD_TOKENS:
                self._close()
                self._save(State(self._shards, self._counts, self._ended))

    def ended(self, counts: Counts) -> None:
        """Record that a document ends here."""
        self._counts, self._ended = counts, self._place

    def finish(self, counts: Counts) -> State:
        self._close()
        state = State(self._shards, counts, self._place, done=True)
        self._save(state)
        return state

    def _check_room(self) -> None:
        """Stop before the disk is full, which would break other programs too. The first shard may be short."""
        need, free = SHARD_TOKENS * self._dtype.itemsize, shutil.disk_usage(self._folder).free
        if self._shards and free < need:
            raise ResourceError(
                f"{self._folder}: the next shard of tokens needs {need / 1e9:.2f} GB, and the disk has "
                f"{free / 1e9:.2f} GB free; make room and start again ({self._place:,} tokens are kept), set cache_dir "
                "to a larger disk, read less, or read MDS from a store (docs/data.md, More than the disk holds)"
            )

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self._shards.append(Shard(self._tokens, self._sha.hexdigest()))

    def _save(self, state: State) -> None:
        atomic_write(self._folder / "state.json", [json.dumps(state._asdict()).encode()], sync=True)
