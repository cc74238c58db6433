"""MDS, the shard format of mosaicml-streaming: a reader with random access, and a writer.

A folder holds index.json and shards. A shard is `uint32 n`, `uint32 offsets[n + 1]` from the file's start, a JSON
header, and the samples. A sample is the `uint32` lengths of its columns of variable size, then the bytes of all columns
in order. All numbers are little endian. Shards may be compressed whole; they are then unpacked once, into a cache.

Source: the format as of mosaicml-streaming 0.13 (https://github.com/mosaicml/streaming), version 2.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from llmfoundry.config import ConfigError, reason
from llmfoundry.data.cache import made_once
from llmfoundry.data.open_file import OpenFile
from llmfoundry.data.remote import RemoteFile, Store, put
from llmfoundry.strict_json import parse_json, read_plain, whole_number

Value = str | bytes | int | float | NDArray | object  # of one column
Sample = dict[str, Value]

_SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_ARRAY_CODES = {
    8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32", 34: "float32",
    64: "uint64", 65: "int64", 66: "float64",
}  # fmt: skip
_SHAPE_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_SAMPLED = 16 * 1024  # bytes
_OPEN_SHARDS = 16  # shards kept open
REFUSED = ("pkl", "pil", "jpeg", "png", "jpeg_array", "jpegarray", "list[pil]", "list[jpeg]", "list[png]")


def _sampled(path: Path) -> bytes:
    """Some bytes of a file: from its start, its middle and its end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        found = []
        for start in (0, size // 2, max(0, size - _SAMPLED)):
            file.seek(start)
            found.append(file.read(_SAMPLED))
    return b"".join(found)


class Shard(NamedTuple):
    """One shard of samples, as index.json lists it."""

    name: str
    samples: int
    n_bytes: int  # of the unpacked file
    hashes: dict[str, str]  # of the unpacked file
    packed: str | None  # name of the compressed file
    packed_hashes: dict[str, str]
    compression: str | None


class MDSFolder:
    """The samples of a folder, in order.

    Args:
        folder: holds index.json.
        cache: where compressed shards are unpacked.
        check_hashes: read each shard whole before its first use, and compare the hashes that the index has.
        remote: the folder's files by their names, and what fetches them; `folder` is then for messages.

    Raises:
        ConfigError: if index.json is missing or malformed, or has columns that would need code or images.
    """

    def __init__(
        self, folder: Path, cache: Path, check_hashes: bool = False,
        remote: tuple[Mapping[str, RemoteFile], Store] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self._cache, self._check_hashes = folder, cache, check_hashes
        self._store = None if remote is None else remote[1]
        self._elsewhere = {} if remote is None else remote[0]
        text, index = _read_index(self._here("index.json") or folder / "index.json", folder / "index.json")
        try:
            entries = index["shards"]
            first = entries[0] if entries else {"column_names": [], "column_encodings": []}
            self.columns: dict[str, str] = _columns(first)
            self.shards = [_shard(entry) for entry in entries]
            kinds = {(entry["format"], entry["version"], tuple(entry["column_encodings"])) for entry in entries}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"{folder / 'index.json'}: is malformed: {type(error).__name__}: {error}") from None
        if any(kind[:2] != ("mds", 2) for kind in kinds):
            raise ConfigError(f"{folder / 'index.json'}: holds shards that are not MDS version 2: {sorted(kinds)}")
        for name, encoding in self.columns.items():
            if encoding in REFUSED:
                raise ConfigError(f"{folder}: column {name!r} is {encoding}, which is not read here (code or images)")
        self._decoders = [_decoder(encoding, self.folder) for encoding in self.columns.values()]
        self.fingerprint = self._fingerprint(text)
        self._starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self._open: OrderedDict[int, tuple[OpenFile, NDArray[np.uint32]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, number: int) -> Sample:
        """Read one sample by its number in the folder.

        Raises:
            IndexError: if the number is out of range.
            ConfigError: if the sample's shard is missing or damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.folder}: sample {number} of {len(self)}")
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        data, offsets = self._shard(at)
        within = number - int(self._starts[at])
        row = data.read(int(offsets[within]), int(offsets[within + 1]))
        try:
            return self._decode(row)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ConfigError(
                f"{self.folder / self.shards[at].name}: sample {within} is damaged: {type(error).__name__}: {error}"
            ) from None

    def _has(self, name: str) -> bool:
        return name in self._elsewhere if self._store is not None else (self.folder / name).is_file()

    def _here(self, name: str) -> Path | None:
        """Return the local path of a file of the folder, fetched first if it is remote; None if it does not exist."""
        if not self._has(name):
            return None
        return self.folder / name if self._store is None else self._store.fetch(self._elsewhere[name])

    def _fingerprint(self, text: bytes) -> str:
        """Return a fingerprint of the index, which lists each shard's size and usually its hashes.

        Of a shard without hashes some bytes are read; of a remote one, the store's version of the file is used.
        """
        digest = hashlib.sha256(text)
        for shard in self.shards:
            if shard.hashes or shard.packed_hashes:
                continue
            found = next((name for name in (shard.name, shard.packed) if name is not None and self._has(name)), None)
            if found is not None and self._store is not None:
                digest.update(self._elsewhere[found].version.encode())
            elif found is not None:
                digest.update(_sampled(self.folder / found))
        return digest.hexdigest()

    def _decode(self, row: bytes) -> Sample:
        variable = [size for size, _ in self._decoders if size is None]
        lengths = iter(np.frombuffer(row, "<u4", len(variable)).tolist())
        at, found = 4 * len(variable), {}
        for name, (size, decode) in zip(self.columns, self._decoders, strict=True):
            length = next(lengths) if size is None else size
            if at + length > len(row):
                raise ValueError(f"column {name!r} reaches beyond the sample")
            found[name] = decode(row[at : at + length])
            at += length
        return found

    def _shard(self, at: int) -> tuple[OpenFile, NDArray[np.uint32]]:
        if at in self._open:
            self._open.move_to_end(at)
            return self._open[at]
        shard = self.shards[at]
        data = self._opened(shard)
        n = int.from_bytes(data.read(0, 4), "little") if data.size >= 4 else -1
        end = 4 + 4 * (n + 1)
        if n != shard.samples or end > data.size:
            raise ConfigError(
                f"{self.folder / shard.name}: is damaged: {n} samples, where the index has {shard.samples}"
            )
        offsets = np.frombuffer(data.read(4, end), "<u4")
        if int(offsets[-1]) != data.size or int(offsets[0]) < end or (np.diff(offsets.astype(np.int64)) < 0).any():
            raise ConfigError(f"{self.folder / shard.name}: is damaged: its offsets do not fit its {data.size} bytes")
        self._open[at] = data, offsets
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return data, offsets

    def _opened(self, shard: Shard) -> OpenFile:
        path = self._here(shard.name) or self._unpacked(shard)
        try:
            data = OpenFile(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {reason(error)}") from None
        if data.size != shard.n_bytes:
            raise ConfigError(f"{path}: is damaged: {data.size} bytes, where the index has {shard.n_bytes}")
        if self._check_hashes:
            _check_hashes(path, data.read(0, data.size), shard.hashes)
        return data

    def _unpacked(self, shard: Shard) -> Path:
        """Return the decompressed shard, from the cache."""
        name = shard.packed
        if name is None or not self._has(name):
            raise ConfigError(f"{self.folder / shard.name}: is missing")

        def write(target: Path) -> None:
            packed = self._here(name)
            assert packed is not None
            content = packed.read_bytes()
            if self._check_hashes:
                _check_hashes(packed, content, shard.packed_hashes)
            target.write_bytes(_unpack(packed, content, shard))

        if self._store is not None:
            return self._store.keep(f"unpacked {self.fingerprint} {name}", shard.name, shard.n_bytes, write)
        folder = self._cache / f"{self.fingerprint[:24]}-{shard.name}"
        return made_once(folder, lambda temporary: write(temporary / "shard.mds")) / "shard.mds"


def _read_index(file: Path, path: Path) -> tuple[bytes, dict]:
    """Read the index from a file; `path` is its place, for messages."""
    try:
        text = read_plain(file)
        index = parse_json(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from None
    if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
        raise ConfigError(f"{path}: lists no shards")
    return text, index


def _columns(entry: Mapping) -> dict[str, str]:
    columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    if not all(isinstance(word, str) for column in columns.items() for word in column):
        raise ValueError(f"{columns!r:.80} are not names and encodings of columns")
    return columns


def _shard(entry: Mapping) -> Shard:
    raw, packed = entry["raw_data"], entry.get("zip_data")
    names = [raw["basename"], *([packed["basename"]] if packed else [])]
    if any(Path(name).name != name or name in ("", ".", "..") for name in names):
        raise ValueError(f"a shard is named {names}")  # the index must not refer to files outside of its folder
    return Shard(
        raw["basename"], whole_number(entry["samples"]), whole_number(raw["bytes"]), dict(raw.get("hashes") or {}),
        packed["basename"] if packed else None, dict(packed.get("hashes") or {}) if packed else {},
        entry.get("compression"),
    )  # fmt: skip


def _check_hashes(path: Path, content: bytes | NDArray[np.uint8], hashes: dict[str, str]) -> None:
    for algorithm, expected in hashes.items():
        if _hash(algorithm, content) != expected:
            raise ConfigError(f"{path}: is damaged: its {algorithm} is not the one in index.json")


def _hash(algorithm: str, content: bytes | NDArray[np.uint8]) -> str:
    if algorithm.startswith("xxh"):
        return str(getattr(importlib.import_module("xxhash"), algorithm)(content).hexdigest())
    try:
        return hashlib.new(algorithm, cast(bytes, content)).hexdigest()
    except ValueError:
        known = ", ".join(sorted(hashlib.algorithms_guaranteed))
        raise ConfigError(f"hash {algorithm!r} is not known here; known: xxh64, {known}") from None


_LEVELS = {"zstd": range(1, 23), "gz": range(10), "bz2": range(1, 10), "br": range(12)}


def _codec(compression: str, pack: bool) -> Callable[[bytes], bytes]:
    name, _, level = compression.partition(":")
    levels = _LEVELS.get(name, range(0))
    if pack and level and not (level.isdecimal() and int(level) in levels):
        known = f"has levels {levels[0]} to {levels[-1]}" if levels else "takes no level"
        raise ConfigError(f"compression {compression!r}: {name} {known}")
    if name == "zstd":
        return zstandard.ZstdCompressor(int(level or 3)).compress if pack else _unpack_zstd
    if name == "gz":
        return (lambda data: gzip.compress(data, int(level or 9), mtime=0)) if pack else gzip.decompress
    if name == "bz2":
        return (lambda data: bz2.compress(data, int(level or 9))) if pack else bz2.decompress
    if name not in ("br", "snappy"):
        raise ConfigError(f"compression {compression!r} is not known; known: zstd, gz, bz2, br, snappy")
    try:
        cramjam = importlib.import_module("cramjam")
    except ImportError:
        raise ConfigError(f"compression {compression!r} needs cramjam: pip install cramjam") from None
    if name == "br":
        return (lambda data: bytes(cramjam.brotli.compress(data, level=int(level or 11)))) if pack else (
            lambda data: bytes(cramjam.brotli.decompress(data))
        )  # fmt: skip
    return lambda data: bytes((cramjam.snappy.compress_raw if pack else cramjam.snappy.decompress_raw)(data))


def _unpack_zstd(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def _unpack(path: Path, content: bytes, shard: Shard) -> bytes:
    if shard.compression is None:
        raise ConfigError(f"{path}: index.json does not say how it is compressed")
    unpack = _codec(shard.compression, pack=False)
    try:
        data = unpack(content)
    except Exception as error:  # each codec raises its own types
        raise ConfigError(f"{path}: is not whole {shard.compression}: {error}") from None
    if len(data) != shard.n_bytes:
        raise ConfigError(f"{path}: unpacks to {len(data)} bytes, where the index has {shard.n_bytes}")
    return data


Decoder = tuple[int | None, Callable[[bytes], Value]]  # (number of bytes if fixed, function)


def _decoder(encoding: str, where: Path) -> Decoder:
    """Return the function that decodes a column.

    Raises:
        ConfigError: if the encoding is not known.
    """
    if encoding == "int":
        return 8, lambda data: int(np.frombuffer(data, "<i8")[0])
    if encoding in _SCALARS:
        dtype = np.dtype(encoding).newbyteorder("<")
        return dtype.itemsize, lambda data: np.frombuffer(data, dtype)[0].item()
    if encoding.startswith("ndarray"):
        return _array_decoder(encoding, where)
    simple: dict[str, Callable[[bytes], Value]] = {
        "str": lambda data: data.decode("utf-8"),
        "bytes": lambda data: data,
        "json": json.loads,
        "str_int": lambda data: int(data.decode()),
        "str_float": lambda data: float(data.decode()),
    }
    if encoding not in simple:
        raise ConfigError(f"{where}: column encoding {encoding!r} is not known here")
    return None, simple[encoding]


def _array_decoder(encoding: str, where: Path) -> Decoder:
    _, *parts = encoding.split(":")
    if parts and parts[0] not in _SCALARS:
        raise ConfigError(f"{where}: column encoding {encoding!r} is not known here")
    if len(parts) == 2:
        dtype, shape = np.dtype(parts[0]).newbyteorder("<"), tuple(int(n) for n in parts[1].split(","))
        size = dtype.itemsize * int(np.prod(shape))
        return size, lambda data: np.frombuffer(data, dtype).reshape(shape)

    def decode(data: bytes) -> NDArray:
        at = 0 if parts else 1
        dtype = np.dtype(parts[0] if parts else _ARRAY_CODES[data[0]]).newbyteorder("<")
        n_dims, code = data[at] >> 2, data[at] & 3
        of_shape = np.dtype(_SHAPE_DTYPES[code]).newbyteorder("<")
        values = at + 1 + n_dims * of_shape.itemsize
        shape = np.frombuffer(data[at + 1 : values], of_shape).tolist()
        return np.frombuffer(data[values:], dtype).reshape(shape)

    return None, decode


def _encode(encoding: str, value: Value) -> bytes:
    if encoding == "int":
        return np.array(value, "<i8").tobytes()
    if encoding in _SCALARS:
        return np.array(value, np.dtype(encoding).newbyteorder("<")).tobytes()
    if encoding.startswith("ndarray"):
        return _encode_array(encoding, np.asarray(value))
    if encoding == "bytes":
        return bytes(cast(bytes, value))
    return (json.dumps(value) if encoding == "json" else str(value)).encode("utf-8")


def _encode_array(encoding: str, array: NDArray) -> bytes:
    _, *parts = encoding.split(":")
    if array.size == 0:
        raise ValueError("an array without values: mosaicml-streaming cannot hold one")
    dtype = np.dtype(parts[0]) if parts else array.dtype
    content = array.astype(dtype.newbyteorder("<"), copy=False).tobytes()
    if len(parts) == 2:
        shape = tuple(int(n) for n in parts[1].split(","))
        if array.shape != shape:
            raise ValueError(f"an array of shape {array.shape} in a column of {encoding}")
        return content
    largest = max(array.shape, default=0)
    code = next(i for i, name in enumerate(_SHAPE_DTYPES) if largest <= np.iinfo(name).max)
    of_shape = np.dtype(_SHAPE_DTYPES[code]).newbyteorder("<")
    head = bytes([array.ndim << 2 | code]) + np.array(array.shape, of_shape).tobytes()
    kind = b"" if parts else bytes([next(k for k, name in _ARRAY_CODES.items() if name == dtype.name)])
    return kind + head + content


class MDSWriter:
    """Writes a folder that mosaicml-streaming reads. Use it in a with block; index.json is written at the end.

    Args:
        out: a folder that does not exist, or is empty.
        columns: encoding of each column, in order, e.g. {"tokens": "ndarray:int32"}.
        compression: null, zstd[:level], gz[:level], bz2[:level], br[:level] or snappy.
        hashes: names of hashlib or xxhash functions; the index keeps these hashes of every file.
        size_limit: bytes of a shard before compression.
        url: a folder in a store; each file is moved there when it is complete.

    Raises:
        ConfigError: if the folder is not empty, or a column's encoding or the compression is not known.
    """

    def __init__(
        self,
        out: Path,
        columns: Mapping[str, str],
        compression: str | None = None,
        hashes: Sequence[str] = (),
        size_limit: int = 2**26,
        url: str | None = None,
    ) -> None:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out}: is not empty; choose another folder")
        self._sizes = [_decoder(encoding, out)[0] for encoding in columns.values()]
        self._pack = None if compression is None else _codec(compression, pack=True)
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.columns, self._url = out, dict(columns), url
        self.compression, self.hashes, self.size_limit = compression, list(hashes), size_limit
        self._rows: list[bytes] = []
        self._header = json.dumps(self._facts(), sort_keys=True).encode()
        self._empty = 4 + 4 + len(self._header)  # size of a shard without samples
        self._bytes = self._empty
        self._shards: list[dict] = []

    def write(self, sample: Mapping[str, Value]) -> None:
        """Add a sample, which must have a value for each column."""
        parts = [_encode(encoding, sample[name]) for name, encoding in self.columns.items()]
        lengths = [len(part) for part, size in zip(parts, self._sizes, strict=True) if size is None]
        row = np.array(lengths, "<u4").tobytes() + b"".join(parts)
        if self._rows and self._bytes + 4 + len(row) > self.size_limit:
            self._close_shard()
        self._rows.append(row)
        self._bytes += 4 + len(row)

    def finish(self) -> None:
        """Write the last shard and the index."""
        if self._rows:
            self._close_shard()
        index = {"version": 2, "shards": self._shards}
        self._put("index.json", json.dumps(index, sort_keys=True).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def _facts(self) -> dict[str, object]:
        return {
            "version": 2, "format": "mds", "compression": self.compression, "hashes": self.hashes,
            "size_limit": self.size_limit, "column_names": list(self.columns),
            "column_encodings": list(self.columns.values()), "column_sizes": self._sizes,
        }  # fmt: skip

    def _close_shard(self) -> None:
        rows, self._rows, self._bytes = self._rows, [], self._empty
        first = 4 + 4 * (len(rows) + 1) + len(self._header)
        offsets = np.cumsum([first, *map(len, rows)]).astype("<u4")
        content = np.array(len(rows), "<u4").tobytes() + offsets.tobytes() + self._header + b"".join(rows)
        name = f"shard.{len(self._shards):05d}.mds"
        entry = self._facts() | {"samples": len(rows), "raw_data": self._described(name, content), "zip_data": None}
        if self._pack is not None and self.compression is not None:
            packed_name, packed = f"{name}.{self.compression.partition(':')[0]}", self._pack(content)
            self._put(packed_name, packed)
            entry["zip_data"] = self._described(packed_name, packed)
        else:
            self._put(name, content)
        self._shards.append(entry)

    def _put(self, name: str, content: bytes) -> None:
        path = self.out / name
        path.write_bytes(content)
        if self._url is not None:
            put(path, f"{self._url}/{name}")
            path.unlink()

    def _described(self, name: str, content: bytes) -> dict[str, object]:
        return {"basename": name, "bytes": len(content), "hashes": {h: _hash(h, content) for h in self.hashes}}
