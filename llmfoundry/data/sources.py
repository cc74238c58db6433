"""Sources of text: each dataset is a list of documents in a fixed order, with a fingerprint.

A path that is given for one purpose is read whole. If both loaders of a run read the same text, a part of it is held
out for validation (`paired`, and data/split.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, Field

from llmfoundry.config import Choice, ConfigError, LocalPath, is_url
from llmfoundry.data.provenance import Gone, Provenance, Stamps, check_unchanged, recalled, remember, said_of_gone
from llmfoundry.data.remote import Store, n_bytes
from llmfoundry.data.sieve import Sieve
from llmfoundry.data.split import Split, keeps
from llmfoundry.runtime import cache_root, seed_of

HELD_OUT = 0.05  # fraction of the text that both loaders read


class Piece(NamedTuple):
    """A part of a source that can be read separately: a file."""

    n_bytes: int
    read: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order."""

    title: str  # for messages and folder names, e.g. "python_stdlib-train"
    fingerprint: str  # hex; equal for equal documents
    read: Callable[[], Iterator[str]]  # may yield empty documents
    n_bytes: int | None = None  # approximate size of the text, to estimate time; None: unknown
    summary: str = ""  # what is read, skipped and held out, for the log
    files: frozenset[Path] = frozenset()  # real paths of the files that are read
    pieces: tuple[Piece, ...] = ()  # the same documents by file, if there are files
    dedup: bool = False  # keep only the first of identical documents
    keep: Callable[[str], bool] | None = None  # whether to keep a document; None: keep all
    stamps: Stamps = ()  # for the fingerprint
    memory: Path | None = None  # where `remember` writes to

    def documents(self) -> Iterator[str]:
        """Yield every document that is kept; none is empty.

        Raises:
            ConfigError: if no document is kept.
        """
        empty = True
        for document, _ in self.sieve().through(self.read()):
            empty = False
            yield document
        if empty:
            raise self.nothing()

    def check_unchanged(self) -> None:
        """Check that the files have not changed since their fingerprint was taken; call it after reading them.

        Raises:
            ConfigError: if a file has changed; the message names the first one.
        """
        check_unchanged(self.title, self.stamps)

    def remember(self) -> None:
        """Record what this source was, so that a run can continue from cached tokens when its files are gone."""
        if self.memory is not None:
            remember(self.memory, Provenance(self.title, self.fingerprint, self.n_bytes, self.files))

    def sieve(self) -> Sieve:
        """Return a new sieve with this source's rules."""
        return Sieve(self.dedup, self.keep)

    def nothing(self) -> ConfigError:
        """Return the error message if no document is kept."""
        rules = ", or check dedup and filter" if self.dedup or self.keep is not None else ""
        return ConfigError(
            f"dataset {self.title}: holds no text; add documents, raise or lower validation_fraction, "
            f"or give this split its own path{rules}"
        )

    def text_bytes(self, limit: int | None = None) -> bytes:
        """Return all documents as UTF-8, joined, or their first `limit` bytes: input for a compressor."""
        text = bytearray()
        for document in self.documents():
            text += document.encode()
            if limit is not None and len(text) >= limit:
                return bytes(text[:limit])
        return bytes(text)


def _a_size(size: int | str | None) -> int | str | None:
    n_bytes(size)
    return size


class DatasetConfig(Choice, tag="name"):
    """A dataset: which documents, which of its two splits, and how its rows are served."""

    name: str  # the kind of data
    split: Split = "train"  # in an eval_loader, the default is validation
    # Fraction to hold out if train_loader and eval_loader read the same text (None: 0.05), or if a train_loader sets
    # it. Names of splits (train/, val-00000.parquet) take precedence.
    validation_fraction: float | None = Field(default=None, ge=0.0, le=1.0)
    max_seq_len: int | None = Field(default=None, ge=1)  # tokens per row; None: the run's max_seq_len
    shuffle: bool | None = None  # None: shuffle the train split, but not the validation split
    shuffle_seed: int | None = None  # None: the run's seed
    # Number of rows to shuffle together, read from 16 places in the data. Shards in a store are then fetched about once
    # per epoch, even if the cache holds few of them. None: all rows.
    shuffle_block_size: int | None = Field(default=None, ge=16)
    cache_dir: LocalPath | None = None  # None: $LLMFOUNDRY_CACHE, or ~/.cache/llmfoundry
    # Maximum size of the local cache of remote files, e.g. 50gb; None: 100gb
    cache_limit: Annotated[int | str | None, AfterValidator(_a_size)] = None

    def build(self) -> Source:
        """Find the documents and read them once for their fingerprint, which is all that may be written."""
        raise NotImplementedError

    def store(self) -> Store:
        """Return the store that fetches remote files."""
        return Store(cache_root(self.cache_dir), n_bytes(self.cache_limit))

    def memory(self, *places: str | None, rules: Sequence[str] = ()) -> Path:
        """Return where the record of this dataset's source is kept once it is tokenized.

        Args:
            places: paths and URLs that the dataset reads.
            rules: everything else that decides its documents.
        """
        served = {"cache_dir", "cache_limit", "max_seq_len", "shuffle", "shuffle_seed", "shuffle_block_size"}
        settings = json.dumps(self.model_dump(mode="json", exclude=served))
        real = [place if is_url(place) else os.path.realpath(os.path.expanduser(place)) for place in places if place]
        name = fingerprint_of("source/2", settings, *real, *rules)[:24]
        return cache_root(self.cache_dir) / "sources" / f"{name}.json"

    def heap(self) -> str:
        """Return a name for the text that both splits come from. It is equal for datasets that read the same text."""
        return json.dumps(self.model_dump(mode="json", exclude=set(DatasetConfig.model_fields) - {"name"}))

    def parts(self) -> list[DatasetConfig]:
        """Return the datasets of a mixture; for any other dataset, only itself."""
        return [self]

    def with_parts(self, parts: Sequence[DatasetConfig]) -> DatasetConfig:
        """Return a copy with other parts."""
        (only,) = parts
        return only

    def of_split(self, split: Split) -> Self:
        """Return a copy for the other (or the same) split."""
        return self.model_copy(update={"split": split})

    def whole(self) -> Self:
        """Return a copy that reads all of its text for its split."""
        return self._holding_out(0.0 if self.split == "train" else 1.0)

    def _holding_out(self, fraction: float) -> Self:
        return self.model_copy(update={"validation_fraction": fraction})

    @property
    def fraction(self) -> float:
        return HELD_OUT if self.validation_fraction is None else self.validation_fraction

    @property
    def _is_whole(self) -> bool:
        return self.fraction == (0.0 if self.split == "train" else 1.0)


def paired(train: DatasetConfig, evaluation: DatasetConfig | None) -> tuple[DatasetConfig, DatasetConfig | None]:
    """Return the datasets of a run, with the `validation_fraction` of each resolved.

    Text that only one loader reads is read whole, unless a train loader asks for a part to be held out. If both loaders
    read a text, one fraction of it is held out. If all of it was trained on (fraction 0), a validation split that
    states no fraction reads all of it too.

    Raises:
        ConfigError: if the two state different fractions of the same text.
    """
    stated = train.validation_fraction
    if evaluation is None or evaluation.heap() != train.heap():
        alone = train.whole() if stated is None else train
        return alone, None if evaluation is None else _as_evaluation(evaluation).whole()
    evaluation = _as_evaluation(evaluation)
    other = evaluation.validation_fraction
    if stated == 0.0 and other is None and evaluation.split == "validation":
        return train, evaluation.whole()
    if stated is not None and other is not None and stated != other and (stated, other) != (0.0, 1.0):
        raise ConfigError(
            f"eval_loader.dataset.validation_fraction: {other:.12g} of a text of which train_loader holds out "
            f"{stated:.12g}; write the same number in both, or in one of them"
        )
    if stated is None:
        stated = HELD_OUT if other is None else other
    return train._holding_out(stated), evaluation._holding_out(stated if other is None else other)


def paired_run(train: DatasetConfig, evaluations: Sequence[DatasetConfig]) -> tuple[DatasetConfig, list[DatasetConfig]]:
    """Do the same as `paired` for each dataset of a mixture and any number of evaluation datasets."""
    parts, others = train.parts(), []
    shared = set()
    for evaluation in evaluations:
        same = next((i for i, part in enumerate(parts) if part.heap() == evaluation.heap()), None)
        pair = paired(parts[same or 0], evaluation)
        if same is not None:
            parts[same] = pair[0]
            shared.add(same)
        assert pair[1] is not None
        others.append(pair[1])
    parts = [part if i in shared else paired(part, None)[0] for i, part in enumerate(parts)]
    return train.with_parts(parts), others


def _as_evaluation(dataset: DatasetConfig) -> DatasetConfig:
    return dataset if "split" in dataset.model_fields_set else dataset.of_split("validation")


def check_apart(train: DatasetConfig, evaluation: DatasetConfig | None = None) -> None:
    """Refuse a run that would evaluate on its training text. Both datasets are read for their fingerprints.

    Raises:
        ConfigError: if the two contain the same documents, or read the same file.
    """
    if evaluation is None:
        return
    if train.parts() != [train]:
        for part in train.parts():
            check_apart(part, evaluation)
        return
    one, other = train.build(), evaluation.build()
    if one.fingerprint == other.fingerprint:
        raise ConfigError(
            f"eval_loader.dataset: holds the same documents as train_loader.dataset ({one.title}), so evaluation would "
            "measure the training text; give eval_loader a path of its own, or split: validation and "
            f"validation_fraction: {HELD_OUT} in both; without an eval_loader nothing is held out"
        )
    divided = train.heap() == evaluation.heap() and train.validation_fraction == evaluation.validation_fraction
    common = one.files & other.files
    if common and not divided:
        raise ConfigError(
            f"eval_loader.dataset: {min(common)} is read by train_loader too; move it out of what train_loader reads, "
            "or give both loaders the same path: then part of it is held out, or name a subfolder or file of it "
            "validation"
        )


class PythonStdlibConfig(DatasetConfig, names=("python_stdlib",)):
    """The source of the running interpreter's own standard library, about 12 MB; its tests are left out."""

    def build(self) -> Source:
        root = Path(sysconfig.get_paths()["stdlib"])
        outside = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        names = []
        for folder, inside, files in os.walk(root):
            inside[:] = set(inside) - outside
            # _sysconfigdata*.py is generated when Python is built: paths and flags, not source code.
            found = [file for file in files if file.endswith(".py") and not file.startswith("_sysconfigdata")]
            names += [Path(folder, file).relative_to(root).as_posix() for file in found]
        if not names:
            raise ConfigError(f"dataset.name: python_stdlib: {root} holds no .py files; use text_files")
        chosen = sorted(name for name in names if keeps(name, self.split, self.fraction))
        contents = [(name, _digest(root / name)) for name in chosen]
        title = f"{self.name}-{self.split}"
        return Source(
            title,
            fingerprint_of("python_stdlib/1", *contents),
            lambda: (_read_python(root / name) for name in chosen),
            sum((root / name).stat().st_size for name in chosen),
            f"{title}: reads {len(chosen)} of {len(names)} files",
        )


class SyntheticConfig(DatasetConfig, names=("synthetic",)):
    """Generated text with a rule that can be learned: a Markov chain over words, each with four successors.

    A model that knows the rule needs 1.74 bits per word; one that knows only the words, log2(vocab_size).
    """

    vocab_size: int = Field(default=64, ge=2, le=10**6)  # number of different words
    n_documents: int = Field(default=2000, ge=1, le=10**8)  # documents in both splits together
    document_words: int = Field(default=200, ge=1, le=10**6)  # words per document
    seed: int = 0  # seed of the rule and of the text

    def build(self) -> Source:
        settings = (self.vocab_size, self.n_documents, self.document_words, self.seed)
        part: tuple[str | float, ...] = ("whole",) if self._is_whole else (self.split, self.fraction)
        return Source(f"{self.name}-{self.split}", fingerprint_of("synthetic/1", *settings, *part), self._read)

    def _read(self) -> Iterator[str]:
        words = np.array([_word(i) for i in range(self.vocab_size)])
        rule = np.random.default_rng(seed_of(self.seed, "rule"))
        successors = rule.integers(0, self.vocab_size, (self.vocab_size, 4))
        edges = np.cumsum([0.5, 0.25, 0.15])  # the fourth has the remaining 0.1
        for index in range(self.n_documents):
            if not keeps(f"document-{index}", self.split, self.fraction):
                continue
            draws = np.random.default_rng(seed_of(self.seed, "document", index)).random(self.document_words)
            choices = np.searchsorted(edges, draws, side="right")
            state = index % self.vocab_size
            states = np.empty(self.document_words, dtype=np.int64)
            for i, choice in enumerate(choices):
                states[i] = state
                state = successors[state, choice]
            yield " ".join(words[states])


def fingerprint_of(*parts: str | int | float | tuple[str | int, ...]) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def gone_source(memory: Path, gone: Gone) -> Source:
    """Return the record of a source whose files are gone; it cannot be read.

    Raises:
        ConfigError, ResourceError: if the source was never tokenized on this machine.
    """
    known = recalled(memory, gone)

    def read() -> Iterator[str]:
        raise gone.error

    return Source(known.title, known.fingerprint, read, known.n_bytes, said_of_gone(gone, known.title), known.files)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_python(path: Path) -> str:
    with tokenize.open(path) as file:  # honors a file's coding line
        return file.read()


def _word(index: int) -> str:
    """Return a pronounceable name for a number: ba, be, bi, ..., one syllable per digit in base 80."""
    syllables = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]
    word = ""
    while not word or index:
        index, digit = divmod(index, len(syllables))
        word = syllables[digit] + word
    return word
