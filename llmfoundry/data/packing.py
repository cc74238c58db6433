"""Text to token shards on disk, once; after that every run maps them into memory.

The stream is `eos, document, eos, document, eos, ...`: the first eos is there so that every token of every
document is predicted from something, and eos thereby opens each document. With a BOS token, which then opens each
document, the stream is `bos, document, eos, bos, document, eos, ...`. A shard is a file of little-endian
uint16 (uint32 for vocabularies beyond 65536) with `index.json` beside them: counts, sizes and checksums. The
stream knows nothing of rows; row length, order and epochs are the loader's.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.cache import made_once
from llmfoundry.data.sources import DatasetConfig, Source
from llmfoundry.data.tokenizer import PLAIN_TEXT, Encoder, SpecialTokens, pieces
from llmfoundry.progress import progress
from llmfoundry.runtime import cache_root

log = logging.getLogger(__name__)

SHARD_TOKENS = 2**27
# Characters handed to the tokenizer at a time: enough to keep all cores busy, little enough to stay in
# memory.
BATCH_CHARACTERS = 2**22


class ShardFile(NamedTuple):
    """One file of the stream."""

    tokens: int
    sha256: str


class TokenStream:
    """A tokenised dataset: one long row of token ids in memory-mapped files."""

    def __init__(self, folder: Path) -> None:
        """Open and check sizes against the index.

        Raises:
            ConfigError: the index is damaged, or a shard is missing or not as long as the index says.
        """
        self.folder = folder
        index = _read_index(folder)
        self.fingerprint: str = index["fingerprint"]  # of the documents and the tokenizer
        self.n_tokens: int = index["n_tokens"]  # with every eos
        self.n_bytes: int = index["n_bytes"]  # of the documents as UTF-8, without any eos
        self.eos_token_id: int = index["eos_token_id"]
        self.opening_token_id: int = index.get("bos_token_id", self.eos_token_id)  # the first of each document
        self._shard_tokens: int = index["shard_tokens"]
        self._shards = [ShardFile(*shard) for shard in index["shards"]]
        dtype = np.dtype(index["dtype"])
        self._maps = [self._open(number, shard, dtype) for number, shard in enumerate(self._shards)]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"tokens [{start}, {stop}) of a stream of {self.n_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        done = start
        while done < stop:
            number, offset = divmod(done, self._shard_tokens)
            part = self._maps[number][offset : offset + stop - done]
            out[done - start : done - start + len(part)] = part
            done += len(part)
        return out

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            ConfigError: a shard is not what was written.
        """
        for number, shard in enumerate(self._shards):
            path = self.folder / _shard_name(number)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                expected = shard.sha256[:12]
                raise ConfigError(f"{path}: checksum {found[:12]}, expected {expected}; {self._remedy()}")

    def _open(self, number: int, shard: ShardFile, dtype: np.dtype) -> NDArray:
        path = self.folder / _shard_name(number)
        expected = shard.tokens * dtype.itemsize
        actual = path.stat().st_size if path.is_file() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise ConfigError(f"{path}: {found}, expected {expected} bytes; {self._remedy()}")
        return np.memmap(path, dtype=dtype, mode="r", shape=(shard.tokens,))

    def _remedy(self) -> str:
        return f"delete the folder {self.folder}, it is made again"


def pack(
    source: Source, tokenizer: PreTrainedTokenizerBase, cache: Path, special: SpecialTokens = PLAIN_TEXT
) -> TokenStream:
    """Tokenise a source into shards under `cache`, unless that was done before.

    Args:
        source: the documents.
        tokenizer: with `eos_token_id` set.
        cache: the cache folder (see `cache_root`).
        special: the rule for special tokens.
    """
    encoder = Encoder(tokenizer, special)
    eos = tokenizer.eos_token_id
    key = ["tokens/1", source.fingerprint, encoder.fingerprint(), eos]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = cache / "tokens" / f"{source.title}-{fingerprint[:24]}"
    if not folder.exists():
        next(source.documents())  # no data, or unreadable: refused before the cache is touched
        # len(), because vocab_size leaves added tokens out; max(), because ids may have gaps.
        largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
        dtype = np.dtype("<u2" if largest < 2**16 else "<u4")
        made_once(folder, lambda temporary: _write(temporary, source, encoder, eos, dtype, fingerprint))
    return TokenStream(folder)


def prepare(
    dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens = PLAIN_TEXT
) -> TokenStream:
    """Tokenise a dataset ahead of time, so that a run only opens it; shards already there are verified.

    Run it once per dataset of a YAML (`train_loader.dataset`, `eval_loader.dataset`) with the run's
    tokenizer.
    """
    source = dataset.build()
    if source.summary:
        log.info("%s", source.summary)
    stream = pack(source, tokenizer, cache_root(dataset.cache_dir), special)
    stream.verify()
    return stream


def _write(folder: Path, source: Source, encoder: Encoder, eos: int, dtype: np.dtype, fingerprint: str) -> None:
    log.info("tokenizing %s", source.title)
    writer = _ShardWriter(folder, dtype)
    bos = encoder.special.bos
    opening = [eos] if bos is None else [bos]  # what the next piece begins with
    n_documents = n_bytes = 0
    with progress(f"tokenizing {source.title}", source.n_bytes, "bytes") as advance:
        for batch in _batches(source):
            ids = encoder.encode([text for text, _ in batch])
            for (text, ends_document), piece in zip(batch, ids, strict=True):
                closing = [eos] if ends_document else []
                writer.write(np.array([*opening, *piece, *closing], dtype=dtype))
                opening = [bos] if ends_document and bos is not None else []
                n_bytes += (size := len(text.encode()))
                n_documents += ends_document
                advance(size)
    shards = writer.finish()
    index = {
        "format": 1,
        "source": source.title,
        "fingerprint": fingerprint,
        "dtype": dtype.str,
        "eos_token_id": eos,
        **({} if bos is None else {"bos_token_id": bos}),
        "n_tokens": sum(shard.tokens for shard in shards),
        "n_bytes": n_bytes,
        "n_documents": n_documents,
        "shard_tokens": SHARD_TOKENS,
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index | {"checksum": _checksum(index)}, indent=1))
    log.info("%s: %d documents, %d bytes, %d tokens", source.title, n_documents, n_bytes, index["n_tokens"])


def _batches(source: Source) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents with whether each ends its document, in batches of bounded size."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in source.documents():
        parts = list(pieces(document))
        for number, piece in enumerate(parts):
            batch.append((piece, number == len(parts) - 1))
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Cuts a stream of ids into files of SHARD_TOKENS."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._shards: list[ShardFile] = []
        self._file: BinaryIO | None = None

    def write(self, ids: NDArray) -> None:
        while len(ids):
            if self._file is None:
                self._file = (self._folder / _shard_name(len(self._shards))).open("wb")
                self._sha, self._tokens = hashlib.sha256(), 0
            part, ids = np.split(ids, [SHARD_TOKENS - self._tokens])
            self._file.write(part.tobytes())
            self._sha.update(part.tobytes())
            self._tokens += len(part)
            if self._tokens == SHARD_TOKENS:
                self._close()

    def finish(self) -> list[ShardFile]:
        self._close()
        return self._shards

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._shards.append(ShardFile(self._tokens, self._sha.hexdigest()))


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


def _checksum(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _read_index(folder: Path) -> dict:
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
        intact = index.pop("checksum") == _checksum(index) and index["format"] == 1
    except (OSError, ValueError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise ConfigError(f"{path}: is missing or damaged; delete the folder {folder}, it is made again")
    return index
