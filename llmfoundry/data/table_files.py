"""The rows of tables in a folder, a glob or a file, for one split of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from llmfoundry.config import ConfigError
from llmfoundry.data.files import File, ahead, checked_digest, find_or_gone, kind_of, said_of
from llmfoundry.data.provenance import (
    Gone,
    Provenance,
    Stamps,
    check_unchanged,
    recalled,
    remember,
    said_of_gone,
    stamps_of,
)
from llmfoundry.data.sealed import sealed_once
from llmfoundry.data.sources import DatasetConfig, fingerprint_of
from llmfoundry.data.split import FEW_BYTES, filling_both, keeps, select, share
from llmfoundry.data.tables import BadRow, Row, read_rows
from llmfoundry.data.watch import Watch


class Table(NamedTuple):
    """Rows, before they are converted."""

    title: str
    fingerprint: str
    rows: Iterator[tuple[Row | BadRow, str]]  # with the location of each, for messages
    summary: str = ""
    files: frozenset[Path] = frozenset()
    stamps: Stamps = ()

    def made(self, folder: Path, make: Callable[[Path], None], memory: Path) -> Watch:
        """Make a cache folder from the rows if it does not exist.

        Args:
            make: fills the temporary folder that it is given.
            memory: the dataset's record, for when its files are gone.

        Raises:
            ConfigError: if the rows cannot be read, or their files have changed in the meantime.
        """

        def checked(temporary: Path) -> None:
            make(temporary)
            check_unchanged(self.title, self.stamps)

        watch = sealed_once(folder, checked)
        remember(memory, Provenance(self.title, self.fingerprint, None, self.files))
        return watch


def gone_table(memory: Path, gone: Gone) -> Table:
    """Return the record of a table whose files are gone; it cannot be read.

    Raises:
        ConfigError, ResourceError: if the table was never tokenized on this machine.
    """
    known = recalled(memory, gone)

    def rows() -> Iterator[tuple[Row | BadRow, str]]:
        raise gone.error
        yield  # makes this a generator

    return Table(known.title, known.fingerprint, rows(), said_of_gone(gone, known.title), known.files)


def table_of(where: str, title: str, dataset: DatasetConfig, *, lenient: bool) -> Table:
    """Find the rows of a dataset's split.

    Args:
        where: a folder, a glob or one file, also by URL.
        dataset: gives the split, the fraction that is held out, and the cache.
        lenient: report damage to a file row by row.

    Raises:
        ConfigError: if no table was found.
        Gone: if the place does not exist.
    """
    found, skipped = find_or_gone(where, dataset.store())
    files = {name: file for name, file in found.items() if _is_table(file.path)}
    if not files:
        raise ConfigError(f"dataset.path: {where}: holds no .jsonl, .json, .csv, .tsv or .parquet")
    side: Literal["train", "validation"] = "train" if dataset.split.startswith("train") else "validation"
    whole = dataset.fraction == (0.0 if side == "train" else 1.0)
    stamps = stamps_of(file.path for file in files.values() if file.remote is None)
    sizes = {name: file.size for name, file in files.items()}
    by_name = select(sizes, side, given_for_validation=side == "validation" and whole)
    kept = {name: files[name] for name in (by_name.kept if by_name is not None else files)}
    fraction = None if whole or by_name is not None else dataset.fraction
    digests = [checked_digest(path, lenient=lenient, advance=lambda n: None) for path in ahead(kept.values())]
    if fraction is not None and 0 < fraction < 1 and sum(sizes[name] for name in kept) <= FEW_BYTES:
        fraction = _filling_both(where, kept.values(), fraction)
    divided = "" if by_name is None else by_name.said(side)
    if fraction is not None:
        divided = f"; held out for validation: {fraction:.3g} of the rows, by hash"

    def rows() -> Iterator[tuple[Row | BadRow, str]]:
        for path in ahead(kept.values()):
            for row, at in read_rows(path):
                if fraction is None or isinstance(row, BadRow) or keeps(_key(row), side, fraction):
                    yield row, at

    rule = ("whole",) if fraction is None else (side, str(fraction))
    return Table(
        title, fingerprint_of("chat-files/1", *rule, *digests), rows(),
        f"{title}: reads {len(kept)} files of {where}{divided}{said_of(skipped)}",
        frozenset(file.real for file in kept.values()), stamps,
    )  # fmt: skip


def _filling_both(where: str, files: Iterable[File], fraction: float) -> float:
    """Return the fraction of rows to hold out of small files so that both splits get a row.

    Raises:
        ConfigError: if there is only one row for two splits.
    """
    rows = (row for path in ahead(files) for row, _ in read_rows(path) if not isinstance(row, BadRow))
    shares = {share(_key(row)) for row in rows}
    if len(shares) == 1:
        raise ConfigError(
            f"dataset.path: {where}: holds one row, or equal ones, so none can be held out for evaluation; add rows, "
            "leave eval_loader out, or give it a path of its own"
        )
    return filling_both(shares, fraction) if shares else fraction


def _is_table(path: Path) -> bool:
    kind = kind_of(path)
    return kind is not None and kind.format != "text"


def _key(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)
