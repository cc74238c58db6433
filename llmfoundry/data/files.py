"""Find text files below a path, tell their kinds, and check that each is complete and UTF-8.

Every file is read once when a dataset is built, to compute its digest. The same pass finds problems that reading would
find late or never: other encodings, truncated archives, and lines or archives that would fill the memory.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, cast

import zstandard
from typing_extensions import Buffer

from llmfoundry.config import ConfigError, ResourceError, is_url, reason
from llmfoundry.data.provenance import Gone
from llmfoundry.data.remote import Store

# File endings, and how each type is read: as one document, or as a table with a document per row.
FORMATS = {
    ".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".md": "text",
}  # fmt: skip
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")  # after any ending but .parquet
KNOWN = f"{', '.join(FORMATS)}, compressed or not ({', '.join(COMPRESSIONS)})"
LINE_BYTES = 2**26  # maximum length of a .jsonl line or .json value
# Compressed text that unpacks to more than both limits is rejected: text shrinks by 3 to 20 times, and a 1 KB zip bomb
# would take minutes to tokenize.
TEXT_BYTES, TEXT_RATIO = 2**26, 200
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Kind(NamedTuple):
    """How a file is read."""

    ending: str  # in lowercase, without that of the compression
    compression: str

    @property
    def format(self) -> str:
        """The file's format: one of FORMATS."""
        return FORMATS[self.ending]


class File(NamedTuple):
    """A file of a dataset, on this machine or elsewhere."""

    path: Path  # the local path; for remote files the part after `://`, for its ending and for messages
    size: int  # bytes
    stamp: str  # changes when the contents change
    real: Path  # equal for equal files
    remote: Callable[[], Path] | None = None  # fetches the file

    def here(self) -> Path:
        """Return the file's path on this machine; a remote file is fetched first."""
        return self.path if self.remote is None else self.remote()


class Found(NamedTuple):
    """The files below a path."""

    files: dict[str, File]  # by name relative to the folder, sorted
    skipped: dict[str, list[str]]  # names of files that are not read, by ending


class Readable(Protocol):
    """A source of bytes: a file, or a stream that decompresses one."""

    def read(self, size: int = -1, /) -> bytes: ...


def kind_of(path: Path) -> Kind | None:
    """Return how to read a file, by its name's ending; None if it is not a text file."""
    *_, first, last = ["", "", *(suffix.casefold() for suffix in path.suffixes)]
    if last in FORMATS:
        return Kind(last, "")
    return Kind(first, last) if last in COMPRESSIONS and FORMATS.get(first, "parquet") != "parquet" else None


def file_at(path: Path) -> File:
    """Return a file on this machine."""
    stat = path.stat()
    return File(path, stat.st_size, str(stat.st_mtime_ns), path.resolve())


def ahead(files: Iterable[File]) -> Iterator[Path]:
    """Yield the paths of files; while one is read, the next is fetched."""
    with ThreadPoolExecutor(1, "fetch-ahead") as thread:
        following: Future[Path] | None = None
        for file, after in pairwise([*files, None]):
            assert file is not None
            path = file.here() if following is None else following.result()
            following = thread.submit(after.here) if after is not None and after.remote is not None else None
            yield path


def find(where: str, store: Store) -> Found:
    """Find the files below a folder, of a glob, or one file. Hidden files and a folder's README.md are left out.

    Args:
        where: a path or a URL.
        store: fetches remote files.

    Raises:
        ConfigError: if no readable file was found, or a link is broken.
    """
    if is_url(where):
        return _elsewhere(where, store)
    path = Path(where).expanduser()
    listed: list[Path] = []
    if path.is_dir():
        root, listed = path, list(_walk(path))
    else:
        root = path.parent if path.is_file() else _fixed(path)
        for match in [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True)):
            _refuse_broken_link(match)
            listed += _walk(match) if match.is_dir() else [match]
    files: dict[str, Path] = {}
    skipped: dict[str, list[str]] = defaultdict(list)
    for file in sorted(set(listed)):
        name = file.relative_to(root).as_posix()
        if path.is_dir() and file.name.casefold() == "readme.md":  # describes the data
            skipped["README.md"].append(name)
        elif kind_of(file) is None:
            skipped[file.suffix.casefold() or "without ending"].append(name)
        elif file.is_file():
            files[name] = file
    if not files:
        if path.is_file():
            raise ConfigError(f"dataset.path: {path}: not a text file; known: {KNOWN}")
        has = "holds" if path.is_dir() else "finds"
        empty = f"{has} no files that end in {KNOWN}{said_of(skipped)}"
        none = "no such file or folder; put texts there, or set train_loader.dataset.path and eval_loader.dataset.path"
        raise ConfigError(f"dataset.path: {path}: {empty if listed or path.is_dir() else none}")
    return Found({name: file_at(files[name]) for name in sorted(files)}, dict(skipped))


def find_or_gone(where: str, store: Store) -> Found:
    """Do the same as `find` for a source whose tokens may be in the cache.

    Raises:
        ConfigError: if the files cannot be read.
        Gone: if the source does not exist or cannot be reached.
    """
    try:
        return find(where, store)
    except (ConfigError, ResourceError) as error:
        if not is_url(where) and glob.glob(os.path.expanduser(where)):
            raise
        raise Gone(error) from None


def _elsewhere(url: str, store: Store) -> Found:
    """Do the same as `find` for a URL."""
    found = store.find(url)
    files: dict[str, File] = {}
    skipped: dict[str, list[str]] = defaultdict(list)
    for name, file in found.items():
        path = Path(file.url.partition("://")[2])
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        if len(found) > 1 and path.name.casefold() == "readme.md":
            skipped["README.md"].append(name)
        elif kind_of(path) is None:
            skipped[path.suffix.casefold() or "without ending"].append(name)
        else:
            stamp = json.dumps([file.url, file.version])
            files[name] = File(path, file.size, stamp, Path(file.url), partial(store.fetch, file))
    if not files:
        raise ConfigError(f"dataset.path: {url}: holds no files that end in {KNOWN}{said_of(skipped)}")
    return Found(dict(sorted(files.items())), dict(skipped))


def said_of(skipped: dict[str, list[str]]) -> str:
    """Return a note on skipped files, e.g. `; skipped: 12 .png (e.g. images/a.png)`."""
    parts = [f"{len(names)} {ending} (e.g. {names[0]})" for ending, names in skipped.items()]
    return f"; skipped: {', '.join(parts)}" if parts else ""


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files below a folder; links to folders are followed."""
    real = folder.resolve()
    if real in above:  # a link to a parent folder, whose files are already listed
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"dataset.path: {folder}: cannot be read: {reason(error)}") from error
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
        raise ConfigError(
            f"dataset.path: {path}: is a link to {os.readlink(path)}, which is not there; fix or delete the link"
        )


def _fixed(pattern: Path) -> Path:
    """Return the folders of a glob that come before its first wildcard."""
    parts = []
    for part in pattern.parts[:-1]:
        if glob.escape(part) != part:
            break
        parts.append(part)
    return Path(*parts)


def unpacked(raw: Readable, compression: str) -> BinaryIO:
    """Decompress as a stream, in bounded memory; damage raises one of UNREADABLE."""
    file = cast(BinaryIO, raw)
    if compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(file))
    if compression == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    return cast(BinaryIO, io.BufferedReader(_Zstd(raw), 2**17)) if compression == ".zst" else file


class _Zstd(io.RawIOBase):
    """The contents of consecutive zstd frames. zstandard's own reader does not notice a truncated file."""

    def __init__(self, packed: Readable) -> None:
        self._packed, self._rest, self._ready = packed, b"", memoryview(b"")
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self._ready:
            # In small pieces: a block of 4 bytes may unpack to 128 KiB.
            data = self._rest or self._packed.read(2**9)
            if not data and self._frame is None:
                return 0
            if not data:
                raise EOFError("is not a complete zstd file; fetch or compress it again")
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except zstandard.ZstdError as error:
                raise OSError(f"is not a complete zstd file ({error}); fetch or compress it again") from error
            self._rest = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        into = memoryview(buffer).cast("B")
        n = min(len(into), len(self._ready))
        into[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


class _Hashed:
    """Reads a file and computes its digest along the way."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance, self.sha = file, advance, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self.sha.update(data)
        self._advance(len(data))
        return data


def checked_digest(path: Path, *, lenient: bool, advance: Callable[[int], None]) -> str:
    """Compute the SHA-256 of a file and check that it is complete and holds UTF-8 text in lines of bounded length.

    Args:
        lenient: do not check the rows of .jsonl; the reader reports bad rows.
        advance: called with the number of bytes read.

    Raises:
        ConfigError: if a check failed; the message says where and what to do.
    """
    kind = kind_of(path)
    assert kind is not None
    try:
        with path.open("rb") as raw:
            file = _Hashed(raw, advance)
            if kind.format != "parquet":
                _check_text(path, kind, unpacked(file, kind.compression), lenient and kind.format == "lines")
            while file.read(2**20):
                pass
        return file.sha.hexdigest()
    except UNREADABLE as error:
        raise ConfigError(f"dataset.path: {path}: cannot be read: {reason(error)}") from error


def _check_text(path: Path, kind: Kind, file: Readable, lenient: bool) -> None:
    decoder, seen, pending, line = codecs.getincrementaldecoder("utf-8")(), 0, 0, 0
    limit = max(TEXT_BYTES, TEXT_RATIO * path.stat().st_size) if kind.compression else None
    try:
        while piece := file.read(2**20):
            if not seen:
                _refuse_wide(path, kind, piece[:4096])
            pending = len(decoder.getstate()[0])  # bytes of a character that started in the previous piece
            if limit is not None and seen + len(piece) > limit:
                raise ConfigError(
                    f"dataset.path: {path}: unpacks to more than {limit:,} bytes, {limit // path.stat().st_size:,} "
                    "times its size, which is too much for text; take it out of the folder, or unpack it first"
                )
            if not lenient:
                decoder.decode(piece)
            seen += len(piece)
            if lenient:
                continue
            line = len(piece) - 1 - newline if (newline := piece.rfind(b"\n")) >= 0 else line + len(piece)
            if kind.format == "lines" and line > LINE_BYTES:
                raise ConfigError(
                    f"dataset.path: {path}: has a line of more than {LINE_BYTES:,} bytes, the longest that is read; "
                    "split that document, or skip such rows with skip_bad_rows: N"
                )
        pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 (byte {seen - pending + error.start})"
        raise _convert(path, kind, found, "latin1", "convert it, e.g. ") from None


def _refuse_wide(path: Path, kind: Kind, start: bytes) -> None:
    """Refuse UTF-16 and UTF-32, found by the byte order mark or by the zero bytes of most texts."""
    marks = {
        codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
        codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
    }  # fmt: skip
    for mark, name in marks.items():
        if start.startswith(mark):
            raise _convert(path, kind, f"is {name} (by its byte order mark), not UTF-8", name.lower())
    units = len(start) // 4
    zero = [2 * start[i : units * 4 : 4].count(0) > units for i in range(4)]  # mostly zero at byte i of 4
    if units > 1 and any(zero):
        low, high = not zero[0] and zero[3], zero[0] and not zero[3]
        width = 32 if zero[2] and low or zero[1] and high else 16
        if (low or high) and (width == 32 or zero[1] == low and zero[2] == high):
            found = f"looks like UTF-{width} without a byte order mark, not UTF-8"
            raise _convert(path, kind, found, f"utf-{width}{'le' if low else 'be'}")


def _convert(path: Path, kind: Kind, found: str, encoding: str, how: str = "convert it: ") -> ConfigError:
    tools = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
    unpack = f"{tools[kind.compression]} -dc '{path.name}' | " if kind.compression else ""
    name = "" if unpack else f" '{path.name}'"
    return ConfigError(
        f"dataset.path: {path}: {found}; {how}{unpack}iconv -f {encoding} -t utf-8{name} > new{kind.ending}, "
        "or take it out of the folder"
    )
