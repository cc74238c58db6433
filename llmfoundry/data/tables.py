"""Read texts from .jsonl, .json, .csv and .parquet tables; only the text column is decoded.

A row that cannot be read is returned as a value, not raised, so that it can be skipped and counted.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from llmfoundry.config import ConfigError
from llmfoundry.data.files import LINE_BYTES, UNREADABLE, kind_of, unpacked

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_ROWS = 256  # .parquet rows decoded at once


Row = dict[str, object]  # values by column


class BadRow(NamedTuple):
    """A row without a text."""

    message: str  # the file, the row, and what is wrong


class _Broken(Exception):
    """What is wrong with a row."""


def read_table(path: Path, text_key: str) -> Iterator[str | BadRow]:
    """Stream the texts of one file.

    Args:
        text_key: the column. A dot leads into nested columns (`doc.text`), unless a column has exactly that name.

    Raises:
        ConfigError: if the file itself cannot be read.
    """
    for found, at in _found(path, text_key):
        yield BadRow(f"{at}: {found}") if isinstance(found, _Broken) else cast(str, found)


def read_rows(path: Path) -> Iterator[tuple[Row | BadRow, str]]:
    """Stream the whole rows of one file, each with its place: the file and the row's number.

    Raises:
        ConfigError: if the file itself cannot be read.
    """
    for found, at in _found(path, None):
        yield BadRow(f"{at}: {found}") if isinstance(found, _Broken) else cast(Row, found), at


def _found(path: Path, key: str | None) -> Iterator[tuple[object, str]]:
    """Yield what a reader finds, and where. `key` is the text column; None: whole rows."""
    kind = kind_of(path)
    assert kind is not None
    if kind.format == "text":
        raise ConfigError(
            f"dataset.path: {path}: is not a table; rows are read from .jsonl, .json, .csv, .tsv and .parquet"
        )
    read = {"lines": _lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet}[kind.format]
    row = 0
    try:
        for found, line in read(path, key):
            if isinstance(found, str) and (surrogate := lone_surrogate(found)):
                found = _Broken(f"{key!r} has a lone surrogate, {surrogate!r}, which is not a valid character")
            if isinstance(found, _Broken) and line:
                found = _Broken(f"{found} (line {line})")
            yield found, f"{path}: row {row}"
            row += 1
    except (*UNREADABLE, ValueError, NotImplementedError, csv.Error, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        why = error.msg if isinstance(error, json.JSONDecodeError) else " ".join(str(error).split())[:300]
        raise ConfigError(f"dataset.path: {path}: row {row}: cannot be read: {why}") from error


Rows = Iterator[tuple[object, int | None]]  # a text, a row, or an error; and the line where it ends


def lone_surrogate(text: str) -> str | None:
    """Return the first lone surrogate in a text, which no tokenizer accepts; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def _text_of(row: object, key: str | None) -> object:
    """Return the text in a decoded row, or the whole row."""
    if not isinstance(row, dict):
        has = "of columns" if key is None else f"with {key!r}"
        return _Broken(f"is a {type(row).__name__}, not a mapping {has}: {row!r:.80}")
    if key is None:
        return row
    try:
        text = _look(row, key)
    except KeyError:
        return _Broken(f"{key!r} is not among {_known(row)}{hint_of_chats(row)}")
    return text if isinstance(text, str) else _Broken(f"{key!r} is {text!r:.80}, not text")


def _look(row: dict[str, object], key: str) -> object:
    if key in row:
        return row[key]
    for i, letter in enumerate(key):
        below = row.get(key[:i]) if letter == "." else None
        if isinstance(below, dict):
            try:
                return _look(below, key[i + 1 :])
            except KeyError:
                continue
    raise KeyError(key)


def _known(row: dict[str, object], path: str = "") -> str:
    names = [_known(below, f"{path}{name}.") if isinstance(below, dict) and below else repr(f"{path}{name}")
             for name, below in row.items()]  # fmt: skip
    return ", ".join(names) or "no columns at all"


def hint_of_chats(columns: Iterable[str]) -> str:
    """Return advice for a table whose columns hold conversations; empty for others."""
    is_chats = not {"messages", "conversations", "conversation"}.isdisjoint(columns)
    return "; for conversations, set name: finetuning in the loader" if is_chats else ""


def _why(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _open(path: Path, raw: BinaryIO) -> BinaryIO:
    kind = kind_of(path)
    assert kind is not None
    return unpacked(raw, kind.compression)


def _bounded_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield lines with their line breaks; None for a line that is too long."""
    while line := file.readline(LINE_BYTES + 1):
        if len(line) <= LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(2**20)
        yield None


def _lines(path: Path, key: str | None) -> Rows:
    """Read JSON with one value per line; empty lines are skipped."""
    with path.open("rb") as raw:
        for number, line in enumerate(_bounded_lines(_open(path, raw)), 1):
            if line is None:
                yield _Broken(f"has more than {LINE_BYTES:,} bytes, the longest line that is read"), number
            elif line := (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
                try:
                    yield _text_of(json.loads(line.decode()), key), number
                except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
                    yield _Broken(f"cannot be read: {_why(error)}"), number


def _json(path: Path, key: str | None) -> Rows:
    """Read one array, or consecutive values. A file with a value per line is read like .jsonl."""
    with path.open("rb") as raw:
        start = next(filter(bytes.strip, map(bytes, filter(None, _bounded_lines(_open(path, raw))))), b"")
    start = start.removeprefix(b"\xef\xbb\xbf").strip()
    if not start.startswith(b"["):
        try:
            json.loads(start.decode())
        except (ValueError, RecursionError):
            pass
        else:
            yield from _lines(path, key)
            return
    with path.open("rb") as raw:
        for value in _values(io.TextIOWrapper(_open(path, raw), encoding="utf-8-sig")):
            yield _text_of(value, key), None


def _values(file: io.TextIOBase) -> Iterator[object]:
    """Yield the values of a JSON document, with at most one of them in memory."""
    decoder, text, at, ended = json.JSONDecoder(), "", 0, False

    def more() -> None:
        nonlocal text, at, ended
        text, at = text[at:], 0
        if len(text) > LINE_BYTES:
            raise ValueError(f"a value has more than {LINE_BYTES:,} characters, the longest that is read")
        piece = file.read(max(2**16, len(text)))  # doubled, to limit the number of attempts
        text, ended = text + piece, not piece

    def peek() -> str:
        nonlocal at
        while True:
            while at < len(text):
                if text[at] not in " \t\r\n":
                    return text[at]
                at += 1
            if ended:
                return ""
            more()

    array = peek() == "["
    at += array
    while (letter := peek()) and not (array and letter == "]"):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            cut_short = error.msg.startswith("Unterminated string") or error.pos > len(text) - len("-Infinity")
            if ended or not cut_short:
                raise
            end = len(text)
        if end == len(text) and not ended:  # the value may continue
            more()
            continue
        at = end
        yield value
        if array and peek() == ",":
            at += 1
        elif array and peek() != "]":
            raise ValueError(f"expected ',' or ']', found {peek() or 'the end of the file'!r}")
    if array and not peek():
        raise ValueError("ends before its array does")
    at += array
    if array and peek():
        raise ValueError(f"text after the array: {peek()!r}")


def _csv(path: Path, key: str | None) -> Rows:
    """Read a header and rows, with cells separated by commas or, in .tsv, by tabs.

    Cells missing at the end of a row are absent columns. Cells beyond the header must be empty.
    """
    kind = kind_of(path)
    assert kind is not None
    delimiter = "\t" if kind.format == "tsv" else ","
    with path.open("rb") as raw:
        records = _records(_open(path, raw), delimiter)
        header = [name.removeprefix("\ufeff") for name in next(records, ([], 0))[0]]
        _check_columns(path, header, key)
        for cells, line in records:
            if any(cells[len(header) :]):
                wrong = (
                    f"has {len(cells)} cells, and the header has {len(header)}; text with {delimiter!r} needs quotes"
                )
                yield _Broken(wrong), line
            elif cells:
                yield _text_of(dict(zip(header, cells, strict=False)), key), line


def _records(file: BinaryIO, delimiter: str) -> Iterator[tuple[list[str], int]]:
    """Yield the cells of each row of a .csv, and the line at which the row ends."""
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        for line in _bounded_lines(file):
            if line is None:
                raise ValueError(f"a line has more than {LINE_BYTES:,} bytes, the longest that is read")
            yield line.decode()
        ended = True
        yield "end"  # a row of its own, unless a quote is still open

    csv.field_size_limit(LINE_BYTES)
    reader = csv.reader(lines(), delimiter=delimiter)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except csv.Error as error:
            raise ValueError(f"the row that starts on line {first}: {error}; a quote may be missing") from None
        if ended and cells != ["end"]:
            raise ValueError(f"the row that starts on line {first} has a quote that is never closed")
        if ended:
            return
        yield cells, reader.line_num


def _check_columns(path: Path, names: list[str], key: str | None) -> None:
    """Refuse a table whose columns are ambiguous."""
    twice = next((name for name in names if name and names.count(name) > 1 and key in (None, name)), None)
    if twice is not None:
        raise ConfigError(f"dataset.path: {path}: {names.count(twice)} columns are named {twice!r}; rename them")


def check_parquet(path: Path) -> None:
    """Read the footer.

    Raises:
        ConfigError: if the footer is damaged or missing.
    """
    import pyarrow.parquet  # imported here, because it is slow to import and most runs do not need it

    try:
        pyarrow.parquet.read_metadata(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ConfigError(f"dataset.path: {path}: cannot be read: {' '.join(str(error).split())}") from error


def _parquet(path: Path, key: str | None) -> Rows:
    """Read one column, part of a row group at a time. Text may be stored as bytes that are not marked as UTF-8."""
    import pyarrow

    try:
        yield from _column_of(path, key)
    except pyarrow.ArrowException as error:  # many types: NotImplementedError, KeyError, TypeError, MemoryError
        raise ValueError(" ".join(str(error).split())) from error


def _column_of(path: Path, key: str | None) -> Rows:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if not file.metadata.num_rows:
            return
        _check_columns(path, file.schema_arrow.names, key)
        if key is None:
            for batch in file.iter_batches(BATCH_ROWS):
                yield from ((row, None) for row in batch.to_pylist())
            return
        where = _column(file.schema_arrow, key)
        if where is None:
            names = ", ".join(_names(file.schema_arrow))
            hint = hint_of_chats(file.schema_arrow.names)
            raise ConfigError(f"dataset.text_key: {path}: {key!r} is not among {names}{hint}")
        for group in range(file.num_row_groups):
            if not file.metadata.row_group(group).num_rows:
                continue
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[".".join(where)]):
                for value in _values_of(batch, where):
                    yield _decoded(value, key), None


def _column(schema: pyarrow.Schema | pyarrow.StructType, key: str) -> list[str] | None:
    """Return the path to a column, through structs."""
    import pyarrow

    names = schema.names
    if names.count(key) == 1:
        return [key]
    for i, letter in enumerate(key):
        if letter == "." and names.count(key[:i]) == 1 and pyarrow.types.is_struct(schema.field(key[:i]).type):
            below = _column(schema.field(key[:i]).type, key[i + 1 :])
            if below is not None:
                return [key[:i], *below]
    return None


def _names(schema: pyarrow.Schema | pyarrow.StructType, path: str = "") -> Iterator[str]:
    import pyarrow

    for i, name in enumerate(schema.names):
        kind = schema.field(i).type
        if pyarrow.types.is_struct(kind):
            yield from _names(kind, f"{path}{name}.")
        else:
            yield repr(path + name)


def _values_of(batch: pyarrow.RecordBatch, where: list[str]) -> list[object]:
    import pyarrow
    import pyarrow.compute

    column = batch.column(batch.schema.get_field_index(where[0]))
    for name in where[1:]:
        column = pyarrow.compute.struct_field(column, name)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())  # so that a damaged text only affects its row, not the batch
    return column.to_pylist()


def _decoded(value: object, key: str) -> str | _Broken:
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else _Broken(f"{key!r} is {value!r:.80}, not text")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return _Broken(f"{key!r} is not UTF-8 (byte {error.start}): {value[:40]!r}")
