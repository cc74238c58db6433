"""The `mds` dataset: folders of mosaicml-streaming, as rows of tokens, or as texts that are packed like others.

Samples are found by their number, so row n is a function of (seed, n) here too, on any number of ranks.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import Config, ConfigError, ResourceError, is_url
from llmfoundry.data.interleave import exact
from llmfoundry.data.mds import MDSFolder, Sample
from llmfoundry.data.mixture import Mixture, MixtureConfig, Part
from llmfoundry.data.packing import pack
from llmfoundry.data.provenance import Gone
from llmfoundry.data.rows import IGNORE, Block, How, Order, Rows, RowsConfig, StreamRows, epochs_of
from llmfoundry.data.sources import Source, fingerprint_of, gone_source
from llmfoundry.runtime import cache_root

log = logging.getLogger(__name__)
TokenEncoding = Literal["int64", "int32", "int16", "uint16", "uint32"]

# Keys of mosaicml-streaming that tune how shards are fetched and shuffled, which works differently here.
TUNING = (
    "shuffle_algo", "num_canonical_nodes", "predownload", "partition_algo",
    "sampling_method", "sampling_granularity", "batching_method", "download_retry", "download_timeout",
    "validate_hash", "keep_zip", "epoch_size", "allow_unsafe_types", "replication", "stream_name", "stream_config",
)  # fmt: skip


class Stream(Config):
    """One folder of a dataset with several. At most one of the last three keys may be given."""

    local: str | None = None  # a folder of MDS shards, or of one folder per split
    remote: str | None = None  # used if local has no shards: a folder, or a URL whose shards are fetched
    split: str | None = None  # None: the dataset's split
    proportion: float | None = Field(default=None, gt=0)  # share of the rows of an epoch
    repeat: float | None = Field(default=None, gt=0)  # how often an epoch reads each row of this stream
    choose: int | None = Field(default=None, ge=1)  # rows of this stream in an epoch

    @model_validator(mode="wrap")
    @classmethod
    def _tuning(cls, data: object, check: ModelWrapValidatorHandler[Self]) -> Self:
        return check(without_tuning(data))

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        given = [key for key in ("proportion", "repeat", "choose") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how many rows are read; keep one")
        return self


class Folders(RowsConfig):
    """Base of the datasets that can be read from MDS folders; the keys are mosaicml-streaming's."""

    local: str | None = None  # a folder of MDS shards, or of one folder per split
    remote: str | None = None  # used if local has no shards: a folder, or a URL whose shards are fetched
    streams: dict[str, Stream] | None = Field(
        None, min_length=1
    )  # several folders, by name, in place of local and remote

    @model_validator(mode="wrap")
    @classmethod
    def _tuning(cls, data: object, check: ModelWrapValidatorHandler[Self]) -> Self:
        return check(without_tuning(data))

    def folders(self) -> list[MDSFolder]:
        """Open the folders.

        Raises:
            ConfigError: if a folder is damaged.
            Gone: if a folder does not exist.
        """
        if self.streams is None:
            return [self._open(Stream(local=self.local, remote=self.remote), "dataset")]
        return [self._open(stream, f"dataset.streams.{name}") for name, stream in self.streams.items()]

    def _open(self, stream: Stream, where: str) -> MDSFolder:
        split = self._split if stream.split is None else stream.split
        tried: list[str] = []
        for key, root in (("local", stream.local), ("remote", stream.remote)):
            if root is None:
                continue
            if is_url(root) and key == "local":
                raise ConfigError(f"{where}.local: {root}: is a URL; name it in remote")
            if is_url(root):
                url, cache = "/".join([root.rstrip("/"), *([split] if split else [])]), cache_root(self.cache_dir)
                store = self.store()
                try:
                    files = store.find(url)
                except (ConfigError, ResourceError) as error:
                    raise Gone(error) from None
                place = Path(url.partition("://")[2])
                return MDSFolder(place, cache / "mds", check_hashes=True, remote=(files, store))
            folder = Path(root).expanduser() / split
            if (folder / "index.json").is_file():
                return MDSFolder(folder, cache_root(self.cache_dir) / "mds", check_hashes=True)
            tried.append(str(folder))
        if not tried:
            raise ConfigError(f"{where}: names neither local nor remote")
        raise Gone(
            ConfigError(
                f"{where}: there is no index.json in {' or '.join(tried)}; name an MDS folder in local or remote"
            )
        )

    def places(self) -> list[str]:
        """Return the paths and URLs that the dataset reads."""
        streams = [Stream(local=self.local, remote=self.remote), *(self.streams or {}).values()]
        return [place for stream in streams for place in (stream.local, stream.remote) if place is not None]

    @property
    def _split(self) -> str:
        """The split's folder below local and remote."""
        return self.split if "split" in self.model_fields_set else ""

    def heap(self) -> str:
        return json.dumps(self.model_dump(mode="json", include={"name", "local", "remote", "streams", "split"}))


def without_tuning(data: object) -> object:
    """Drop keys that have no effect here, with a note."""
    if not isinstance(data, dict):
        return data
    if data.get("epoch_size") is not None:
        raise ValueError(
            f"epoch_size: {data['epoch_size']!r} is not supported: an epoch is every row; leave it out, and end the "
            "run by max_duration"
        )
    found = [key for key in TUNING if key in data]
    if found:
        log.info("dataset: %s: left out, shards are fetched as their rows are read", ", ".join(found))
    return {key: value for key, value in data.items() if key not in found}


class MDSConfig(Folders, names=("mds",)):
    """MDS folders with a column `tokens` (rows of max_seq_len ids) or `text`. `name: mds` may be left out."""

    # Dtype of a token column that is stored as bytes
    token_encoding_type: TokenEncoding = "int64"
    # The id that ends documents inside rows of tokens; None: the tokenizer's
    eos_token_id: int | None = Field(default=None, ge=-1, lt=2**32)
    # The id that starts documents, instead of eos_token_id
    bos_token_id: int | None = Field(default=None, ge=-1, lt=2**32)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.streams is not None and (self.local or self.remote):
            raise ValueError("local or remote are given together with streams; move them into streams")
        if self.streams is None and self.local is None and self.remote is None:
            raise ValueError("local, remote or streams is missing")
        if self.eos_token_id is not None and self.bos_token_id is not None:
            raise ValueError("eos_token_id and bos_token_id both mark document boundaries; keep one")
        return self

    def build(self) -> Source:
        """Return the texts of all folders."""
        memory = self.memory(*self.places())
        try:
            folders = self.folders()
        except Gone as gone:
            return gone_source(memory, gone)
        return Source(
            f"mds-{self._split or 'all'}",
            fingerprint_of("mds/1", *(folder.fingerprint for folder in folders)),
            lambda: _texts(folders),
            files=frozenset((folder.folder / "index.json").resolve() for folder in folders),
            memory=memory,
        )

    def order(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
        try:
            folders = self.folders()
        except Gone:
            return self._packed(tokenizer, how)  # the token ids of texts may be cached
        tokens = {"tokens" in folder.columns for folder in folders}
        if len(tokens) > 1:
            raise ConfigError("dataset.streams: some hold tokens and others text; make two datasets of them")
        streams = list(self.streams.values()) if self.streams is not None else [Stream()]
        plain = all(s.proportion is None and s.repeat is None and s.choose is None for s in streams)
        if not tokens.pop():
            if not plain:
                raise ConfigError(
                    "dataset.streams: proportion, repeat and choose count rows, and these streams hold text, which is "
                    "packed into rows here; make each a dataset with a weight"
                )
            return self._packed(tokenizer, how)
        each = [_TokenRows(folder, self, tokenizer, how) for folder in folders]
        if plain:
            return epochs_of(_Joined(each), self, how)
        return self._mixed(streams, each, how)

    def _packed(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
        source = self.build()
        if source.summary:
            log.info("%s", source.summary)
        stream = pack(source, tokenizer, cache_root(self.cache_dir), how.special)
        return epochs_of(StreamRows(stream, source.title, how), self, how)

    def _mixed(self, streams: list[Stream], rows: Sequence[Rows], how: How) -> Order:
        """Streams with a number of rows per epoch, as a mixture in that ratio."""
        proportions = [stream.proportion for stream in streams]
        if any(proportions) and not all(proportions):
            raise ConfigError("dataset.streams: some have a proportion and others do not; give it to all, or to none")
        total = sum(each.n_rows for each in rows)
        parts, orders, counts = [], [], []
        assert self.streams is not None
        for name, stream, each in zip(self.streams, streams, rows, strict=True):
            if stream.proportion is not None:
                chosen = exact(stream.proportion) / sum(map(exact, filter(None, proportions))) * total
            else:
                chosen = Fraction(stream.choose) if stream.choose else exact(stream.repeat or 1.0) * each.n_rows
            parts.append(Part(dataset=self, label=name, weight=float(chosen)))
            orders.append(epochs_of(each, self, how))
            counts.append(chosen)
        mixture = Mixture(MixtureConfig(name="mixture", datasets=parts), orders)
        mixture.rows_per_epoch = int(sum(counts))
        return mixture


def _texts(folders: Sequence[MDSFolder]) -> Iterator[str]:
    for folder in folders:
        if folder.columns.get("text") != "str":
            holds = ", ".join(f"{name} ({encoding})" for name, encoding in folder.columns.items())
            raise ConfigError(f"{folder.folder}: has no column text of str; it holds {holds}")
        for number in range(len(folder)):
            yield str(folder.sample(number)["text"])


def samples(folders: Sequence[MDSFolder]) -> Iterator[Sample]:
    """Yield all samples, in order."""
    for folder in folders:
        yield from (folder.sample(number) for number in range(len(folder)))


class _TokenRows(Rows):
    """Samples of max_seq_len tokens, one per row. The label of a token is the next token; the last has none."""

    def __init__(self, folder: MDSFolder, config: MDSConfig, tokenizer: PreTrainedTokenizerBase, how: How) -> None:
        self.title, self.length = str(folder.folder), how.length
        self._folder, self.documents = folder, how.documents
        self._dtype = np.dtype(config.token_encoding_type).newbyteorder("<")
        self._bos = config.bos_token_id
        self._eos = tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        self._largest = max(tokenizer.get_vocab().values())
        ends = ("bos", self._bos) if self._bos is not None else ("eos", self._eos)
        self.fingerprint = fingerprint_of("mds-tokens/1", folder.fingerprint, self._dtype.str, *ends)
        self.n_rows = self.n_full = len(folder)
        self.n_tokens = len(folder) * (how.length - 1)

    def put(self, number: int, out: Block, i: int) -> None:
        tokens = out.tokens[i]
        tokens[:] = self._tokens(number) if number < self.n_rows else self._eos
        out.labels[i, :-1] = tokens[1:] if number < self.n_rows else IGNORE
        out.labels[i, -1] = IGNORE
        if out.documents is not None and self._bos is not None:
            np.cumsum(tokens == self._bos, out=out.documents[i])
        elif out.documents is not None:
            out.documents[i, 0] = 0
            np.cumsum(tokens[:-1] == self._eos, out=out.documents[i, 1:])

    def _tokens(self, number: int) -> NDArray[np.int64]:
        found = self._folder.sample(number)["tokens"]
        if isinstance(found, bytes):
            if len(found) % self._dtype.itemsize:
                raise ConfigError(
                    f"{self.title}: sample {number}: {len(found)} bytes are not a whole number of {self._dtype.name}; "
                    "set dataset.token_encoding_type"
                )
            found = np.frombuffer(found, self._dtype)
        row = np.asarray(found, dtype=np.int64).reshape(-1)[: self.length]
        if len(row) < self.length:
            raise ConfigError(
                f"{self.title}: sample {number} has {len(row)} tokens, and max_seq_len is {self.length}; lower it"
            )
        if row.min() < 0 or row.max() > self._largest:
            wrong = int(row.max() if row.min() >= 0 else row.min())
            raise ConfigError(
                f"{self.title}: sample {number} has the token {wrong}, and the "
                f"tokenizer ends at {self._largest}; name the tokenizer that made it, or set "
                "dataset.token_encoding_type"
            )
        return row


class _Joined(Rows):
    """Several sets of rows, concatenated."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(part.n_rows for part in parts)]
        self.title, self.length, self.documents = parts[0].title, parts[0].length, parts[0].documents
        self.fingerprint = (
            parts[0].fingerprint if len(parts) == 1 else fingerprint_of("joined/1", *(p.fingerprint for p in parts))
        )
        self.n_rows = self.n_full = self._starts[-1]
        self.n_tokens = sum(part.n_tokens for part in parts)

    def put(self, number: int, out: Block, i: int) -> None:
        part = min(bisect_right(self._starts, number) - 1, len(self._parts) - 1)
        self._parts[part].put(number - self._starts[part], out, i)
