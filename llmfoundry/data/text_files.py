"""The `text_files` dataset: a folder, a glob or one file of text."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

from pydantic import Field

from llmfoundry.config import ConfigError, is_url
from llmfoundry.data.cache import made_once
from llmfoundry.data.files import File, ahead, checked_digest, find_or_gone, kind_of, said_of, unpacked
from llmfoundry.data.provenance import stamps_of
from llmfoundry.data.remote import DataPath
from llmfoundry.data.sources import Piece, Source, fingerprint_of
from llmfoundry.data.split import FEW_BYTES, cut, filling_both, keeps, select, share
from llmfoundry.data.tables import BadRow, check_parquet, read_table
from llmfoundry.data.texts import TextsConfig
from llmfoundry.progress import progress
from llmfoundry.runtime import cache_root
from llmfoundry.strict_json import read_json

log = logging.getLogger(__name__)

# From this size on, the digests of files are cached by names, sizes and times.
REMEMBER_BYTES = 2**24


class _Part(NamedTuple):
    """The files of one split."""

    files: list[str]
    how: str  # for the log; empty: all files, whole
    rows: float | None = None  # fraction of rows held out by hash
    text: float | None = None  # fraction held out at the end of each text


class TextFilesConfig(TextsConfig, names=("text_files",)):
    """A folder, a glob or one file: .txt and .md (a document each), .jsonl, .json, .csv, .tsv, .parquet (one per row).

    All but .parquet may be compressed. docs/data.md says which part of it a split is given.
    """

    path: DataPath  # a folder, a glob or one file; also a URL: s3://bucket/folder
    text_key: str = "text"  # the text column of tables; `doc.text` for a nested one
    # Number of unreadable rows to skip, count and report before the data is refused
    skip_bad_rows: int = Field(default=0, ge=0)

    def heap(self) -> str:
        return self.path if is_url(self.path) else os.path.realpath(self.path)

    def places(self) -> list[str]:
        return [self.path]

    def found(self) -> Source:
        files, skipped = find_or_gone(self.path, self.store())
        stamps = stamps_of(file.path for file in files.values() if file.remote is None)
        sizes = {name: file.size for name, file in files.items()}
        part = self._part(files, sizes)
        title = f"{self.name}-{self.split}"
        chosen = {name: files[name] for name in part.files}
        digests = self._digests(chosen)
        contents = [(_reader(chosen[name].path), digest) for name, digest in digests if sizes[name]]
        tables = any(not reader.startswith("text") for reader, _ in contents)
        hashed = part.rows is not None and tables
        rule = (self.split, part.rows or 0.0, part.text or 0.0) if hashed or part.text is not None else ("whole",)
        n_bytes = sum(sizes[name] for name in chosen)
        endings = Counter(Path(name).suffix.casefold() for name in chosen)
        counts = ", ".join(f"{n} {ending}" for ending, n in endings.items())
        return Source(
            title,
            fingerprint_of("text_files/2", self.text_key if tables else "", *rule, *contents),
            lambda: self._read(chosen, part, title),
            n_bytes,
            f"{title}: reads {self.path} ({counts}; {n_bytes:,} bytes){part.how}{said_of(skipped)}",
            frozenset(file.real for file in chosen.values()),
            tuple(Piece(sizes[name], partial(self._read, {name: file}, part, title)) for name, file in chosen.items()),
            stamps=stamps,
        )

    def _part(self, files: dict[str, File], sizes: dict[str, int]) -> _Part:
        """Choose the files of this split, by their names or else by `validation_fraction`."""
        given = self.split == "validation" and self._is_whole
        by_name = select(sizes, self.split, given_for_validation=given)
        if by_name is not None:
            return _Part(by_name.kept, by_name.said(self.split))
        if self._is_whole:
            return _Part(list(files), "")
        return self._by_hash(files, sizes)

    def _by_hash(self, files: dict[str, File], sizes: dict[str, int]) -> _Part:
        """Hold out `validation_fraction` of the documents, by a hash of a file's name or of a row's text."""
        fraction, said = self.fraction, "; held out for validation: "
        filled = [name for name in files if sizes[name]]
        plain = [name for name in filled if _is_plain(files[name].path)]
        tables = [name for name in filled if not _is_plain(files[name].path)]
        if 0 < fraction < 1 and sum(sizes[name] for name in tables) <= FEW_BYTES:
            rows = (
                row for name in tables for row in read_table(files[name].here(), self.text_key) if isinstance(row, str)
            )
            shares = {share(key) for keys in (plain, rows) for key in keys if key}
            if len(shares) == 1:
                return _Part(filled, f"{said}the last {fraction:.3g} of its text", text=fraction)
            fraction = filling_both(shares, fraction) if shares else fraction
        held_out = [name for name in plain if keeps(name, "validation", fraction)]
        if not tables:
            said += f"{len(held_out)} of {len(plain)} files, by a hash of their names"
        else:
            said += f"{fraction:.3g} of the rows and files, by hash"
        kept = {*tables, *(held_out if self.split == "validation" else set(plain) - set(held_out))}
        return _Part([name for name in filled if name in kept], said, rows=fraction)

    def _read(self, files: dict[str, File], part: _Part, title: str) -> Iterator[str]:
        first, bad = "", 0
        for path in ahead(files.values()):
            for row in _documents(path, self.text_key):
                if isinstance(row, BadRow):
                    first, bad = first or row.message, bad + 1
                    if bad > self.skip_bad_rows:
                        raise self._bad(row, bad)
                elif part.text is not None:
                    yield cut(row, self.split, part.text)
                elif part.rows is None or _is_plain(path) or keeps(row, self.split, part.rows):
                    yield row
        if bad:
            log.warning("%s: skipped %d of at most %d bad rows; the first: %s", title, bad, self.skip_bad_rows, first)

    def _bad(self, row: BadRow, count: int) -> ConfigError:
        if not self.skip_bad_rows:
            return ConfigError(f"dataset.text_key: {row.message}; skip_bad_rows: N skips up to N such rows")
        return ConfigError(f"dataset.skip_bad_rows: {row.message}; this is bad row {count}; raise it, or fix the data")

    def _digests(self, files: dict[str, File]) -> list[tuple[str, str]]:
        """Return (name, SHA-256) of each file. For large data they are stored, so only the first use reads it all."""
        total = sum(file.size for file in files.values())

        def digests() -> list[tuple[str, str]]:
            with progress(f"checking {self.path}", total, "bytes") as advance:
                paths = zip(files, ahead(files.values()), strict=True)
                return [(name, _checked(path, self.skip_bad_rows > 0, advance)) for name, path in paths]

        # Remote files are not fetched a second time for their digests.
        if total < REMEMBER_BYTES and not is_url(self.path):
            return digests()
        listing = [(name, str(file.path.absolute()), file.size, file.stamp) for name, file in files.items()]
        known = cache_root(self.cache_dir) / "listings" / fingerprint_of("listing/1", *listing)[:24]
        if not known.exists():
            log.info("checking %d files of %s, %.1f GB; once, until one of them changes", len(files), self.path,
                     total / 1e9)  # fmt: skip
        made_once(known, lambda folder: _write_json(folder / "digests.json", digests()))
        return _remembered(known / "digests.json", list(files))


def _remembered(file: Path, names: list[str]) -> list[tuple[str, str]]:
    try:
        found = read_json(file)
        if not isinstance(found, list):
            raise ValueError("it must hold a list")
        digests = [(str(name), str(digest)) for name, digest in cast(list[list[str]], found)]
        if [name for name, _ in digests] != names:
            raise ValueError("it lists other files")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: is damaged ({error}); delete the folder {file.parent} to make it again") from None
    return digests


def _checked(path: Path, lenient: bool, advance: Callable[[int], None]) -> str:
    if _reader(path) == "parquet":
        check_parquet(path)
    return checked_digest(path, lenient=lenient, advance=advance)


def _reader(path: Path) -> str:
    """Everything besides a file's bytes that decides its documents."""
    kind = kind_of(path)
    assert kind is not None
    return kind.format + kind.compression


def _is_plain(path: Path) -> bool:
    return _reader(path).startswith("text")


def _documents(path: Path, text_key: str) -> Iterator[str | BadRow]:
    if not _is_plain(path):
        yield from read_table(path, text_key)
        return
    kind = kind_of(path)
    assert kind is not None
    with path.open("rb") as raw:
        yield unpacked(raw, kind.compression).read().decode("utf-8-sig")


def _write_json(path: Path, data: list[tuple[str, str]]) -> None:
    path.write_text(json.dumps(data))
