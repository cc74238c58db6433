"""Where text comes from: each dataset is a list of documents in a fixed order, with a fingerprint.

A document goes to the train or the validation split by a hash of its file's name (of its text, where one file
holds many documents), so a split does not change when other documents come or go.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import logging
import os
import sysconfig
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import zstandard
from pydantic import Field

from llmfoundry.config import Choice, ConfigError
from llmfoundry.data.cache import cache_root, made_once
from llmfoundry.runtime import seed_of

log = logging.getLogger(__name__)

Split = Literal["train", "validation"]

# File endings and the reader in `datasets` for each.
TABLES = {".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".parquet": "parquet"}
ENDINGS = (".txt", *TABLES)
# From this many bytes on, the content hash of a set of files is remembered by their names, sizes and times.
REMEMBER_BYTES = 2**28


class Readable(Protocol):
    """What bytes are read from: a file, or a stream that unpacks one."""

    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order."""

    title: str  # in messages and folder names, e.g. "python_stdlib-train"
    fingerprint: str  # hex; equal fingerprints, equal documents
    read: Callable[[], Iterator[str]]  # may give empty documents

    def documents(self) -> Iterator[str]:
        """Every document that is not empty.

        Raises:
            ConfigError: there is none.
        """
        empty = True
        for document in self.read():
            if document:
                empty = False
                yield document
        if empty:
            raise ConfigError(
                f"dataset {self.title}: holds no text; add documents, change validation_fraction, or give "
                "this split its own path (with validation_fraction: 0 all of it is train, with 1 validation)"
            )

    def text_bytes(self, limit: int | None = None) -> bytes:
        """All documents as UTF-8, one after the other, or their first `limit` bytes: what a compressor is given."""
        text = bytearray()
        for document in self.documents():
            text += document.encode()
            if limit is not None and len(text) >= limit:
                return bytes(text[:limit])
        return bytes(text)


class DatasetConfig(Choice, tag="name"):
    """A dataset: which documents, which of its two splits, and how its rows are served."""

    name: str
    split: Split = "train"
    validation_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    max_seq_len: int | None = Field(default=None, ge=1)  # tokens a row; None: the run's max_seq_len
    shuffle: bool | None = None  # None: the train split is shuffled, the validation split is not
    shuffle_seed: int | None = None  # None: the run's seed
    cache_dir: str | None = None  # None: $LLMFOUNDRY_CACHE, or ~/.cache/llmfoundry

    def build(self) -> Source:
        """Find the documents; reads them once for their fingerprint and writes at most that fingerprint."""
        raise NotImplementedError

    def of_split(self, split: Split) -> DatasetConfig:
        """The same dataset's other (or same) split."""
        return self.model_copy(update={"split": split})

    def _keeps(self, key: str) -> bool:
        return (_share(key) < self.validation_fraction) == (self.split == "validation")


class PythonStdlibConfig(DatasetConfig, names=("python_stdlib",)):
    """The source of the running interpreter's own standard library, about 12 MB; its tests are left out."""

    def build(self) -> Source:
        root = Path(sysconfig.get_paths()["stdlib"])
        outside = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        names = []
        for folder, inside, files in os.walk(root):
            inside[:] = set(inside) - outside
            # _sysconfigdata*.py is written by each build of Python: paths and flags, no source.
            found = [file for file in files if file.endswith(".py") and not file.startswith("_sysconfigdata")]
            names += [Path(folder, file).relative_to(root).as_posix() for file in found]
        if not names:
            raise ConfigError(f"dataset.name: python_stdlib: {root} holds no .py files; use text_files")
        chosen = sorted(filter(self._keeps, names))
        contents = [(name, _digest(root / name)) for name in chosen]
        return Source(
            f"{self.name}-{self.split}",
            _fingerprint("python_stdlib/1", *contents),
            lambda: (_read_python(root / name) for name in chosen),
        )


class TextFilesConfig(DatasetConfig, names=("text_files",)):
    """A folder, a glob or one file of text: .txt (a document each), .jsonl, .jsonl.gz, .jsonl.zst, .parquet.

    A folder with subfolders `train` and `validation` is split by them, anything else by hash.
    """

    path: str
    text_key: str = "text"  # the column of .jsonl and .parquet that holds the text

    def build(self) -> Source:
        files, by_folder = self._files()
        plain = [name for name in files if name.endswith(".txt")]
        kept = set(plain if by_folder else filter(self._keeps, plain))
        # A few files may all hash to the train side: validation then gets the one with text nearest to it.
        filled = [name for name in plain if files[name].stat().st_size]
        if not by_folder and len(plain) == len(files) and len(filled) > 1 and 0 < self.validation_fraction < 1:
            nearest = min(filled, key=_share)
            kept = kept | {nearest} if self.split == "validation" else kept - {nearest}
        chosen = {name: path for name, path in files.items() if name in kept or name not in plain}

        def read() -> Iterator[str]:
            for name, path in chosen.items():
                if name in kept:
                    yield path.read_bytes().decode("utf-8-sig")
                    continue
                for text in _read_table(path, self.text_key):
                    if by_folder or self._keeps(text):
                        yield text

        rule = "by folder" if by_folder else f"{self.split} {self.validation_fraction}"
        contents = self._contents(chosen)
        return Source(
            f"{self.name}-{self.split}",
            _fingerprint("text_files/1", self.text_key, rule, *contents),
            read,
        )

    def _files(self) -> tuple[dict[str, Path], bool]:
        """Files by relative name, sorted, and whether this split is a folder of its own."""
        path = Path(self.path).expanduser()
        by_folder = (path / "train").is_dir() and (path / "validation").is_dir()
        if by_folder:
            path = path / self.split
        if path.is_dir():
            found = [file for file in _walk(path) if _ending(file)]
            root = path
        else:
            names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
            found = [Path(name) for name in names]
            root = path.parent if path.is_file() else _fixed(path)
            for file in found:
                _refuse_broken_link(file)
            unknown = [file for file in found if file.is_file() and not _ending(file)]
            if unknown:
                raise ConfigError(f"dataset.path: {unknown[0]}: not a text file; known: {', '.join(ENDINGS)}")
        files = {file.relative_to(root).as_posix(): file for file in found if file.is_file()}
        if not files:
            empty = f"holds no files that end in {', '.join(ENDINGS)}"
            raise ConfigError(f"dataset.path: {path}: {empty if path.is_dir() else 'no such file or folder'}")
        return {name: files[name] for name in sorted(files)}, by_folder

    def _contents(self, files: dict[str, Path]) -> list[tuple[str, str]]:
        """(name, SHA-256) of each file; remembered for big data, so that only its first use reads it all."""
        stats = {name: path.stat() for name, path in files.items()}
        listing = [(name, str(files[name].absolute()), s.st_size, s.st_mtime_ns) for name, s in stats.items()]

        def digests() -> list[tuple[str, str]]:
            try:
                for path in files.values():
                    _refuse_damaged(path)
                return [(name, _digest(path)) for name, path in files.items()]
            except OSError as error:
                raise ConfigError(f"dataset.path: cannot be read: {error}") from error

        if sum(s.st_size for s in stats.values()) < REMEMBER_BYTES:
            return digests()
        log.info("hashing %d files of %s", len(files), self.path)
        known = cache_root(self.cache_dir) / "listings" / _fingerprint("listing/1", *listing)[:24]
        made_once(known, lambda folder: _write_json(folder / "digests.json", digests()))
        return [(name, digest) for name, digest in json.loads((known / "digests.json").read_text())]


class SyntheticConfig(DatasetConfig, names=("synthetic",)):
    """Made-up text with a rule that can be learned: a Markov chain over words, four possible after each.

    A model that knows the rule needs 1.74 bits a word; one that knows only the words, log2(vocab_size).
    """

    vocab_size: int = Field(default=64, ge=2)  # different words
    n_documents: int = Field(default=2000, ge=1)  # both splits together
    document_words: int = Field(default=200, ge=1)
    seed: int = 0  # of the rule and of the text

    def build(self) -> Source:
        settings = (self.vocab_size, self.n_documents, self.document_words, self.seed)
        rule = (self.split, self.validation_fraction)
        return Source(f"{self.name}-{self.split}", _fingerprint("synthetic/1", *settings, *rule), self._read)

    def _read(self) -> Iterator[str]:
        words = np.array([_word(i) for i in range(self.vocab_size)])
        rule = np.random.default_rng(seed_of(self.seed, "rule"))
        successors = rule.integers(0, self.vocab_size, (self.vocab_size, 4))
        edges = np.cumsum([0.5, 0.25, 0.15])  # the fourth has the remaining 0.1
        for index in range(self.n_documents):
            if not self._keeps(f"document-{index}"):
                continue
            draws = np.random.default_rng(seed_of(self.seed, "document", index)).random(self.document_words)
            choices = np.searchsorted(edges, draws, side="right")
            state = index % self.vocab_size
            states = np.empty(self.document_words, dtype=np.int64)
            for i, choice in enumerate(choices):
                states[i] = state
                state = successors[state, choice]
            yield " ".join(words[states])


def _share(key: str) -> float:
    """A number in [0, 1) that is a function of the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:7], "big") / 2**56


def _fingerprint(*parts: str | int | float | tuple[str | int, ...]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Files below a folder, through links to folders too; what begins with a dot is left out."""
    real = folder.resolve()
    if real in above:  # a link back up, to files that are had already
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"dataset.path: cannot be read: {error}") from error
    for path in inside:
        if path.name.startswith("."):
            continue
        _refuse_broken_link(path)
        if path.is_dir():
            yield from _walk(path, (*above, real))
        else:
            yield path


def _refuse_broken_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"dataset.path: {path}: is a link to {os.readlink(path)}, which is not there; mend or delete")


def _ending(path: Path) -> str | None:
    return next((ending for ending in ENDINGS if path.name.endswith(ending)), None)


def _fixed(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.escape(part) != part:
            break
        parts.append(part)
    return Path(*parts)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_damaged(path: Path) -> None:
    """Find before anything is written what reading would find late (no UTF-8) or never (a .zst cut short)."""
    ending = _ending(path)
    with path.open("rb") as file:
        if ending in (".txt", ".jsonl"):
            _refuse_not_utf8(path, file)
        elif ending == ".jsonl.gz":
            try:
                _refuse_not_utf8(path, gzip.GzipFile(fileobj=file))
            except (EOFError, OSError, zlib.error) as error:
                raise ConfigError(f"dataset.path: {path}: cannot be read: {error}") from error
        elif ending == ".jsonl.zst":
            if not _is_whole_zstd(file):
                raise ConfigError(f"dataset.path: {path}: is no whole zstd file; fetch or compress it again")
            file.seek(0)
            _refuse_not_utf8(path, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))


def _refuse_not_utf8(path: Path, file: Readable) -> None:
    decoder, seen, pending = codecs.getincrementaldecoder("utf-8")(), 0, 0
    try:
        while piece := file.read(2**20):
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the piece before
            decoder.decode(piece)
            seen += len(piece)
        pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        unpack = {".gz": f"gzip -dc '{path.name}' | ", ".zst": f"zstd -dc '{path.name}' | "}.get(path.suffix, "")
        name = "" if unpack else f" '{path.name}'"
        raise ConfigError(
            f"dataset.path: {path}: is not UTF-8 (byte {seen - pending + error.start}); convert it, e.g. {unpack}"
            f"iconv -f latin1 -t utf-8{name} > new{'.txt' if path.suffix == '.txt' else '.jsonl'}, "
            "or take it out of the folder"
        ) from None


def _is_whole_zstd(file: BinaryIO) -> bool:
    """Whether the last frame ends: `datasets` (fsspec) takes a file that was cut short for a shorter one."""
    frame = None
    while rest := file.read(2**16):
        while rest:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                frame.decompress(rest)
            except zstandard.ZstdError:
                return False
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    return frame is None


def _read_python(path: Path) -> str:
    with tokenize.open(path) as file:  # honours a file's coding line
        return file.read()


def _read_table(path: Path, text_key: str) -> Iterator[str]:
    """The texts of one .jsonl or .parquet file, streamed."""
    where = f"dataset.text_key: {path}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for number, row in enumerate(_rows(path, text_key, scratch)):
                text = row.get(text_key)
                if text_key not in row:
                    known = ", ".join(map(repr, row))
                    raise ConfigError(f"{where}: row {number}: {text_key!r} is not among {known}")
                if not isinstance(text, str):
                    raise ConfigError(f"{where}: row {number}: {text_key!r} is {text!r:.80}, not text")
                yield text
        except ConfigError:
            raise
        except Exception as error:  # pyarrow's, zlib's, zstandard's and pandas' own kinds
            why = " ".join(str(error).split())[:300]
            raise ConfigError(f"dataset.path: {path}: cannot be read: {why}") from error


def _rows(path: Path, text_key: str, scratch: str) -> Iterator[dict[str, object]]:
    """The rows of a table through `datasets`, which leaves lock files in `scratch` even when it streams."""
    import datasets  # here, because they take seconds to import and most runs do not need them
    import pyarrow.parquet

    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs an error before it raises it
    builder, columns = TABLES[_ending(path) or ""], {}
    if builder == "parquet":
        columns = {"columns": [text_key]}
        names = pyarrow.parquet.read_schema(path).names
        if text_key not in names:
            known = ", ".join(map(repr, names))
            raise ConfigError(f"dataset.text_key: {path}: {text_key!r} is not among {known}")
    # A name with brackets would be taken for a pattern that finds nothing.
    file = glob.escape(str(path))
    try:
        yield from datasets.load_dataset(
            builder, data_files=[file], split="train", streaming=True, cache_dir=scratch, **columns
        )
    except StopIteration:  # how `datasets` meets an empty file
        return


def _word(index: int) -> str:
    """A pronounceable name for a number: ba, be, bi, ..., one syllable a digit in base 80."""
    syllables = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]
    word = ""
    while not word or index:
        index, digit = divmod(index, len(syllables))
        word = syllables[digit] + word
    return word


def _write_json(path: Path, data: list[tuple[str, str]]) -> None:
    path.write_text(json.dumps(data))
