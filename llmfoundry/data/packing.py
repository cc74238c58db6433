"""Tokenize text into shards on disk, once; every later run reads the shards in place.

The stream is `eos, document, eos, document, eos, ...`. It starts with eos so that every token of every document has a
token before it that predicts it; eos thereby opens each document. With a BOS token, which then opens each document,
the stream is `bos, document, eos, bos, document, eos, ...`. A shard is a file of little-endian uint16 (uint32 for
vocabularies beyond 65536) with `index.json` beside them: counts, sizes and checksums. The stream does not know rows;
row length, order and epochs belong to the loader.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, count
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.cache import made_once, writing
from llmfoundry.data.open_file import OpenFile
from llmfoundry.data.parts import SHARD_TOKENS, Shard, Share, read_state, shard_name, write_part
from llmfoundry.data.sieve import Counts
from llmfoundry.data.sources import DatasetConfig, Source
from llmfoundry.data.tokenizer import PLAIN_TEXT, Encoder, SpecialTokens
from llmfoundry.data.watch import Damaged, Watch, moved_aside
from llmfoundry.progress import progress
from llmfoundry.runtime import cache_root
from llmfoundry.strict_json import read_mapping

log = logging.getLogger(__name__)

_BYTES_PER_TOKEN = 4  # of text, approximately
_OPEN_SHARDS = 256  # over all streams, kept open: the number of files per process is limited
open_shards: dict[int, OpenFile] = {}  # keyed by `TokenStream.first_shard + number`, unique in the process
_streams = count()


class TokenStream:
    """A tokenized dataset: one long sequence of token ids in files."""

    def __init__(self, folder: Path) -> None:
        """Open the stream and compare its shards with the index, at once or during the run (data/watch.py).

        Raises:
            Damaged: if the index or a shard is missing, or is not what was written.
        """
        self.folder = folder
        index = _read_index(folder)
        self.fingerprint: str = index["fingerprint"]  # of the documents and the tokenizer
        self.n_tokens: int = index["n_tokens"]  # including every eos
        self.n_bytes: int = index["n_bytes"]  # of the documents in UTF-8, without eos
        self.eos_token_id: int = index["eos_token_id"]
        self.opening_token_id: int = index.get("bos_token_id", self.eos_token_id)  # the first token of each document
        self.counts = Counts(*index["counts"]) if "counts" in index else None  # counts of documents read and left out
        self._shards = [Shard(*shard) for shard in index["shards"]]
        self.n_shards = len(self._shards)
        self.first_shard = next(_streams) << 32
        self.starts = [0, *accumulate(shard.tokens for shard in self._shards)]  # start of each shard, and the end
        self.dtype = np.dtype(index["dtype"])
        for number, shard in enumerate(self._shards):
            self._check_size(number, shard)
        self._watch = Watch(folder, self.n_tokens * self.dtype.itemsize, self.n_shards, self._check_bytes)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read tokens [start, stop) of the stream.

        Raises:
            ConfigError: if a shard has become shorter, or was found to be damaged.
        """
        self.check()
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"tokens [{start}, {stop}) of a stream of {self.n_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        done, number = start, bisect_right(self.starts, start) - 1
        while done < stop:
            first = done - self.starts[number]
            last = min(first + stop - done, self._shards[number].tokens)
            size = self.dtype.itemsize
            part = np.frombuffer(self.file(number).read(first * size, last * size), self.dtype)
            out[done - start : done - start + len(part)] = part
            done, number = done + len(part), number + 1
        return out

    @property
    def is_watched(self) -> bool:
        """Whether checksums of the shards are still being compared."""
        return self._watch.is_running

    def check(self) -> None:
        """Raise an error if a checksum did not match so far."""
        self._watch.check()

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            Damaged: if a shard is not what was written.
        """
        for number in range(self.n_shards):
            self._check_bytes(number)

    def _check_bytes(self, number: int) -> None:
        path, expected = self.folder / shard_name(number), self._shards[number].sha256
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(f"{path}: cannot be read: {error.strerror}; {self.remedy}") from None
        if found != expected:
            raise Damaged(f"{path}: checksum {found[:12]}, expected {expected[:12]}; {self.remedy}")

    def _check_size(self, number: int, shard: Shard) -> None:
        path = self.folder / shard_name(number)
        expected = shard.tokens * self.dtype.itemsize
        actual = path.stat().st_size if path.is_file() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise Damaged(f"{path}: {found}, expected {expected} bytes; {self.remedy}")

    def file(self, number: int) -> OpenFile:
        """Open a shard. If too many are open, the one that was opened first is closed.

        Raises:
            Damaged: if the shard cannot be opened.
        """
        found = open_shards.get(self.first_shard + number)
        if found is not None:
            return found
        path = self.folder / shard_name(number)
        try:
            found = OpenFile(path)
        except OSError as error:
            raise Damaged(f"{path}: cannot be read: {error.strerror}; {self.remedy}") from None
        if len(open_shards) >= _OPEN_SHARDS:
            open_shards.pop(next(iter(open_shards)), None)
        open_shards[self.first_shard + number] = found
        return found

    @property
    def remedy(self) -> str:
        """What the user can do about damage."""
        return f"delete the folder {self.folder} to make it again"


def pack(
    source: Source, tokenizer: PreTrainedTokenizerBase, cache: Path, special: SpecialTokens = PLAIN_TEXT
) -> TokenStream:
    """Tokenize a source into shards under `cache`, unless the cache already has them.

    Args:
        source: the documents.
        tokenizer: with `eos_token_id` set.
        cache: the cache folder (see `cache_root`).
        special: the rule for special tokens.
    """
    stream = pack_part(source, tokenizer, cache, special, Share())
    assert stream is not None
    return stream


def pack_part(
    source: Source, tokenizer: PreTrainedTokenizerBase, cache: Path, special: SpecialTokens, share: Share,
    workers: int = 0,
) -> TokenStream | None:  # fmt: skip
    """Tokenize one part of a source, unless that was done before; the last part to finish assembles the stream.

    The stream does not depend on the number of parts and workers.

    Args:
        share: which part.
        workers: see data/encoding.py.

    Returns:
        The stream; None while other parts are missing.
    """
    encoder = Encoder(tokenizer, special)
    eos = tokenizer.eos_token_id
    key = ["tokens/1", source.fingerprint, encoder.fingerprint(), eos]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    folder = cache / "tokens" / f"{source.title}-{fingerprint[:24]}"
    if (stream := _cached(folder, source)) is not None:
        source.remember()
        return stream
    if share.of == 1:
        next(source.documents())  # raises if there is no data or it is unreadable, before the cache is touched
    # len(), because vocab_size excludes added tokens; max(), because ids may have gaps.
    largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    dtype = np.dtype("<u2" if largest < 2**16 else "<u4")
    parts = [folder.with_name(f"{folder.name}.part-{i}-of-{share.of}") for i in range(1, share.of + 1)]
    bos = {} if special.bos is None else {"bos_token_id": special.bos}
    index = {"source": source.title, "fingerprint": fingerprint, "dtype": dtype.str, "eos_token_id": eos, **bos}

    def write() -> None:
        log.info("tokenizing %s%s", source.title, f", part {share}" if share.of > 1 else "")
        size = source.n_bytes if share.of == 1 or source.n_bytes is None else source.n_bytes // share.of
        expected, free = (size or 0) // _BYTES_PER_TOKEN * dtype.itemsize, shutil.disk_usage(folder.parent).free
        if expected > free:
            log.warning(
                "%s: some %.0f GB of tokens are expected, and %s has %.0f GB free; set cache_dir to a larger disk, or "
                "read less", source.title, expected / 1e9, folder.parent, free / 1e9,
            )  # fmt: skip
        with progress(f"tokenizing {source.title}", size, "bytes") as advance:
            write_part(parts[share.number - 1], source, share, encoder, eos, dtype, workers, advance)
        try:
            source.check_unchanged()
        except ConfigError:
            shutil.rmtree(parts[share.number - 1], ignore_errors=True)
            raise

    def make(temporary: Path) -> None:
        if share.of == 1:
            write()
        counts = reduce(Counts.plus, (read_state(part).counts for part in parts))
        if not counts.kept:
            raise source.nothing()
        assemble(temporary, parts, index, counts)
        log.info("%s: %s", source.title, counts)

    if share.of > 1:
        with writing(folder):
            parts[0].parent.mkdir(parents=True, exist_ok=True)
            with FileLock(_lock_of(parts[share.number - 1])):
                write()
        if not all(read_state(part).done for part in parts):
            return None
    made_once(folder, make)
    source.remember()
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
        _lock_of(part).unlink(missing_ok=True)
    return TokenStream(folder)


def _cached(folder: Path, source: Source) -> TokenStream | None:
    """Open the stream in the cache. A damaged one is removed and made again if its source can be read."""
    if not folder.exists():
        return None
    try:
        return TokenStream(folder)
    except Damaged as error:
        damage = error
    try:
        next(source.documents())
    except ConfigError as error:
        raise Damaged(f"{damage}; but it cannot be made again: {error}") from None
    away = moved_aside(folder, lambda: TokenStream(folder))
    if away is not None:
        log.error("DAMAGED TOKENS: %s; making them again from the source", damage)
        shutil.rmtree(away, ignore_errors=True)
    return None


def prepare(
    dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens = PLAIN_TEXT, workers: int = 0
) -> TokenStream:
    """Tokenize a dataset ahead of time, so that a run only opens it; existing shards are verified.

    Run it once per dataset of a YAML (`train_loader.dataset`, `eval_loader.dataset`) with the run's
    tokenizer.
    """
    stream = prepare_part(dataset, tokenizer, special, Share(), workers)
    assert stream is not None
    return stream


def prepare_part(
    dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, share: Share, workers: int
) -> TokenStream | None:
    """Do the same as `prepare` for one part; return None while other parts are missing."""
    source = dataset.build()
    if source.summary:
        log.info("%s", source.summary)
    stream = pack_part(source, tokenizer, cache_root(dataset.cache_dir), special, share, workers)
    if stream is not None:
        stream.verify()
    return stream


def assemble(folder: Path, parts: Sequence[Path], index: dict, counts: Counts) -> None:
    """Put the shards of all parts into one folder, by hard links where the file system supports them."""
    shards: list[Shard] = []
    for part in parts:
        for number, shard in enumerate(read_state(part).shards):
            source, target = part / shard_name(number), folder / shard_name(len(shards))
            try:
                target.hardlink_to(source)
            except OSError:
                shutil.copyfile(source, target)
            shards.append(shard)
    uniform = all(shard.tokens == SHARD_TOKENS for shard in shards[:-1])
    index |= {
        "format": 1 if uniform else 2,  # 2: shards differ in length
        "n_tokens": sum(shard.tokens for shard in shards),
        "n_bytes": counts.kept_bytes,
        "n_documents": counts.kept,
        "counts": counts,
        "shard_tokens": SHARD_TOKENS,
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index | {"checksum": _checksum(index)}, indent=1))


def _lock_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.lock")


def _checksum(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _read_index(folder: Path) -> dict:
    path = folder / "index.json"
    try:
        index = read_mapping(path)
        intact = index.pop("checksum") == _checksum(index) and index["format"] in (1, 2)
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        raise Damaged(f"{path}: is missing or damaged; delete the folder {folder} to make it again")
    return index
