"""Folders of safetensors files: read block by block, written as streams, and created atomically.

A file begins with the length of its header (8 bytes) and the header (JSON: dtype, shape and byte range of each tensor),
followed by the tensors' bytes. Headers are checked against the file size before any tensor is read; nothing is
unpickled. Only the requested rows are read. A writer first writes the header, which follows from shapes and dtypes, and
then streams the tensors box by box, so that only a few buffers are held in memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmfoundry.atomic import FORBIDDEN, NO_ROOM, os_error
from llmfoundry.config import ConfigError
from llmfoundry.hf.pieces import Part, Spec, runs
from llmfoundry.strict_json import parse_json, read_mapping, whole_numbers

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_BYTES = 2**20  # read at a time: fits in the core's cache while it is copied, and malloc reuses the same memory
BUFFER_BYTES = 2**26  # written at a time

# Dtypes of unquantized weights. Integers and 8-bit floats would need scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_ALIGNED = 2**16  # bytes; a multiple of every disk's block size

Advance = Callable[[int], object]  # called with the number of bytes done
FillBox = Callable[[str, tuple[int, ...], Tensor], object]  # (name, offsets, out): writes a box of a tensor to `out`


class Stored(NamedTuple):
    """A box of a tensor, stored in a file."""

    spec: Spec  # of the box
    file: Path
    start: int  # byte offset in the file
    offsets: tuple[int, ...]  # of the box in the tensor
    once: bool = False  # each block is read only once, so that it can be dropped from the page cache afterwards

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the box."""
        return self.spec.shape

    def blocks(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Part]:
        """Read a smaller box of the tensor, block by block.

        Raises:
            ConfigError: if the file ends too early.
        """
        size = self.spec.dtype.itemsize
        inner = tuple(there - here for there, here in zip(offsets, self.offsets, strict=True))
        # Not mapped: page faults took longer than all the copying.
        with open(self.file, "rb", buffering=0) as file:
            for at, box in runs(inner, shape, self.shape, BLOCK_BYTES // size):
                values = torch.empty(box, dtype=self.spec.dtype)
                place = 0
                for index, length in zip(at, self.shape, strict=True):
                    place = place * length + index
                _read(file, _bytes_of(values), self.start + place * size)
                if self.once and sys.platform == "linux":
                    os.posix_fadvise(file.fileno(), self.start + place * size, values.nbytes, os.POSIX_FADV_DONTNEED)
                yield Part(tuple(a + b for a, b in zip(at, self.offsets, strict=True)), values)


def _read(file: FileIO, content: memoryview, start: int) -> None:
    while content:
        count = os.preadv(file.fileno(), [content], start)
        if count == 0:
            raise ConfigError(f"{file.name}: has become shorter while it was read")
        content, start = content[count:], start + count


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Folder:
    """The tensors of a folder of safetensors files, as a `TensorSource`.

    Args:
        path: a folder with `model.safetensors`, or with an index and the files that it names.
        once: each tensor is read only once, by this process alone.

    Raises:
        ConfigError: if a file is missing, truncated or malformed, or lies outside of the folder.
    """

    def __init__(self, path: Path, once: bool = False) -> None:
        self.path = path
        self._stored: dict[str, Stored] = {}
        for file, expected in _files(path).items():
            found = read_header(file)
            for name in expected - found.keys():
                raise ConfigError(f"{file}: has no tensor {name!r}, which {INDEX} says is in it")
            for name, stored in found.items():
                if name in self._stored:
                    raise ConfigError(f"{file}: has tensor {name!r}, and {self._stored[name].file.name} has it too")
                self._stored[name] = stored._replace(once=once)
        self.specs: Mapping[str, Spec] = {name: stored.spec for name, stored in self._stored.items()}

    def parts(self, name: str) -> list[Stored]:
        """Return the box that holds the tensor."""
        return [self._stored[name]]


def _files(path: Path) -> dict[Path, set[str]]:
    """Return the weight files of a folder, each with the tensors that the index places in it."""
    index = path / INDEX
    if not index.exists():
        if (path / WEIGHTS).is_file():
            return {path / WEIGHTS: set()}
        pickled = sorted(file.name for file in path.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never opened: save it as safetensors first" if pickled else ""
        raise ConfigError(f"{path}: holds neither {WEIGHTS} nor {INDEX}{hint}")
    try:
        weight_map = read_mapping(index)["weight_map"]
        if not isinstance(weight_map, dict):
            raise ValueError("weight_map must be a mapping")
        names = {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{index}: is malformed ({type(error).__name__}: {error})") from None
    files: dict[Path, set[str]] = {}
    for name, file in names.items():
        if file != os.path.basename(file) or "\\" in file or "\0" in file or file in ("", ".", ".."):
            raise ConfigError(f"{index}: says that {name!r} is in {file!r}, which is outside of this folder")
        files.setdefault(path / file, set()).add(name)
    for path_of in files:
        try:
            is_there = path_of.is_file()
        except (OSError, ValueError) as error:  # e.g. a name that is too long
            raise ConfigError(f"{index}: names {path_of.name!r:.80}: {error!s:.80}") from None
        if not is_there:
            raise ConfigError(f"{path_of}: is missing; {INDEX} names it")
    return files


def read_header(file: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, Stored]:
    """Read the header of a safetensors file. Its tensors must fill it without gaps, as the library requires.

    Args:
        dtypes: the allowed dtypes; by default, those of unquantized weights.

    Raises:
        ConfigError: if the file is truncated or malformed.
    """
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConfigError(f"{file}: is cut short or not a safetensors file ({size} bytes, a header of {length})")
        if length > _MAX_HEADER:
            raise ConfigError(f"{file}: has a header of {length} bytes; {_MAX_HEADER} is the most that is read")
        text = handle.read(length)
    try:
        entries = parse_json(text)
        if not isinstance(entries, dict) or text[:1] != b"{":
            raise ValueError("it must be a mapping")
        notes = entries.pop("__metadata__", None) or {}
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ValueError("__metadata__ must be texts by name")
        found = {}
        for name, entry in entries.items():
            if not isinstance(entry, dict):
                raise ValueError(f"tensor {name!r:.80} is not a mapping")
            begin, end = whole_numbers(entry["data_offsets"])
            shape = whole_numbers(entry["shape"])
            if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
                raise ConfigError(
                    f"{file}: tensor {name!r} has dtype {entry['dtype']}; weights are one of {', '.join(dtypes)} "
                    "(of a quantised checkpoint, take the unquantised one)"
                )
            spec = Spec(dtypes[entry["dtype"]], shape)
            if end - begin != spec.nbytes:
                raise ValueError(f"tensor {name!r} does not fill its place")
            if 8 + length + end > size:
                raise ConfigError(
                    f"{file}: is cut short: it has {size} bytes and tensor {name!r} ends at {8 + length + end}"
                )
            found[str(name)] = Stored(spec, file, 8 + length + begin, (0,) * len(shape))
        _check_filled(8 + length, size, found)
    except (ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: has a malformed header ({type(error).__name__}: {error})") from None
    return found


def _check_filled(start: int, end: int, tensors: Mapping[str, Stored]) -> None:
    """Raise ValueError unless the tensors cover the bytes from `start` to `end` without gaps or overlaps."""
    places = sorted((each.start, each.start + each.spec.nbytes, name) for name, each in tensors.items())
    check_apart(places)
    for begin, after, name in places:
        if begin > start:
            raise ValueError(f"{begin - start} bytes before tensor {name!r} belong to none")
        start = after
    if start != end:
        raise ValueError(f"{end - start} bytes at the end belong to no tensor")


def check_apart(places: Iterable[tuple[int, int, str]]) -> None:
    """Raise ValueError if two of the (start, end, name) byte ranges overlap."""
    last, reached = "", 0
    for start, end, name in sorted(places):
        if start < reached:
            raise ValueError(f"tensors {last!r} and {name!r} overlap")
        last, reached = name, end


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder that appears only when it is complete.

    Yields:
        A temporary folder beside `path` to fill. It is renamed to `path` at the end, and deleted on any error.

    Raises:
        ConfigError: if `path` is in use, or cannot be written, e.g. because the disk is full.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: is in use; name a folder that does not exist, or an empty one")
    temporary = path.absolute().with_name(f"{path.absolute().name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        temporary.rename(path)  # also replaces an empty folder
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        found = os_error(error)
        if found is None or found.errno not in (*NO_ROOM, *FORBIDDEN):
            raise
        if found.filename is not None and not str(found.filename).startswith(str(temporary)):
            raise  # the error is about reading another file
        advice = "make room, or name another disk" if found.errno in NO_ROOM else "name another folder"
        raise ConfigError(f"{path}: cannot be written: {found.strerror}; {advice}") from None


class Placed(NamedTuple):
    """The position of a tensor in a file that is being written."""

    name: str
    spec: Spec
    start: int  # byte offset in the file


def header(tensors: Mapping[str, Spec], notes: Mapping[str, str]) -> tuple[bytes, list[Placed]]:
    """Return the header of a safetensors file and its tensors in order: widest dtypes first, to keep them aligned."""
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(notes)}
    position, places = 0, []
    for name, spec in order:
        end = position + spec.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end],
        }  # fmt: skip
        places.append((name, spec, position))
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, [Placed(name, spec, len(head) + start) for name, spec, start in places]


class Filed(NamedTuple):
    """A file that has been written and synced to disk."""

    places: list[Placed]
    bytes: int
    sha256: str  # empty if not requested


def write_files(
    folder: Path,
    files: Mapping[str, Mapping[str, Spec]],
    fill_box: FillBox,
    advance: Advance = lambda count: None,
    hashed: bool = False,
) -> dict[str, Filed]:
    """Write safetensors files as streams, and sync them to disk.

    Args:
        files: the tensors of each file, by file name.
        fill_box: writes a tensor's values to a buffer. It is called for the boxes in the order in which they lie in the
            files.
        advance: called with the number of bytes done.
        hashed: compute the SHA-256 of each file.
    """
    buffers = deque(torch.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=torch.uint8) for _ in range(3))
    filed = {}
    for name, tensors in files.items():
        head, places = header(tensors, {"format": "pt"})
        with _Stream(folder / name, buffers, hashed) as stream:
            for start in range(0, len(head), _ALIGNED):
                part = head[start : start + _ALIGNED]
                stream.space(len(part)).copy_(torch.frombuffer(bytearray(part), dtype=torch.uint8))
            for place in places:
                for offsets, spec in boxes(place.spec):
                    fill_box(place.name, offsets, stream.space(spec.nbytes).view(spec.dtype).view(spec.shape))
                    advance(spec.nbytes)
            filed[name] = Filed(places, *stream.finish())
    return filed


def boxes(spec: Spec) -> Iterator[tuple[tuple[int, ...], Spec]]:
    """Yield the boxes that a tensor is written in, with their offsets."""
    limit = (BUFFER_BYTES - _ALIGNED) // spec.dtype.itemsize
    for offsets, shape in runs((0,) * len(spec.shape), spec.shape, spec.shape, limit):
        yield offsets, Spec(spec.dtype, shape)


class _Stream:
    """A new file, written from rotating buffers: one is filled while the previous ones are hashed and written.

    Where the file system allows it, the file bypasses the page cache (O_DIRECT): copying into new pages of the cache
    took more CPU time than SHA-256, and syncing them stalled the end. Direct writes begin and end at multiples of a
    block. The remainder moves to the next buffer, and at the end is written through the cache.

    Args:
        path: the file, which must not exist.
        buffers: each aligned to a memory page.
        hashed: compute the SHA-256 of the file.
    """

    def __init__(self, path: Path, buffers: deque[Tensor], hashed: bool) -> None:
        self._buffers, self._filled, self._written = buffers, 0, 0
        self._digest = hashlib.sha256() if hashed else None
        self._busy: deque[list[Future[None]]] = deque()
        self._direct = False
        self._stack = ExitStack()
        self._file = self._stack.enter_context(open(path, "xb", buffering=0))
        # Closed in reverse order: the threads finish before the file is closed.
        self._writer, self._hasher = (self._stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        with suppress(OSError):
            self._go_direct(True)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def space(self, n_bytes: int) -> Tensor:
        """Return the buffer for the file's next bytes, to be filled before the next call; at most BUFFER_BYTES."""
        if self._filled + n_bytes > BUFFER_BYTES:
            self._send()
        self._filled += n_bytes
        return self._buffers[0][self._filled - n_bytes : self._filled]

    def finish(self) -> tuple[int, str]:
        """Write and sync what is left; return the file's size in bytes and its SHA-256."""
        self._send()
        while self._busy:
            self._wait()
        self._go_direct(False)
        rest = _bytes_of(self._buffers[0][: self._filled])
        self._write(rest)
        self._hash(rest)
        os.fsync(self._file.fileno())
        return self._written, self._digest.hexdigest() if self._digest is not None else ""

    def _send(self) -> None:
        """Submit the full blocks of the current buffer for writing, and switch to the next buffer."""
        end = self._filled // _ALIGNED * _ALIGNED
        blocks, rest = _bytes_of(self._buffers[0][:end]), self._buffers[0][end : self._filled]
        self._busy.append([self._writer.submit(self._write, blocks), self._hasher.submit(self._hash, blocks)])
        self._buffers.rotate(-1)
        if len(self._busy) == len(self._buffers):
            self._wait()
        self._filled = len(rest)
        self._buffers[0][: self._filled] = rest

    def _wait(self) -> None:
        for task in self._busy.popleft():
            task.result()

    def _write(self, content: memoryview) -> None:
        while content:
            try:
                count = self._file.write(content)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._go_direct(False)  # the file system accepts the flag but rejects the write
                continue
            content, self._written = content[count:], self._written + count

    def _hash(self, content: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(content)

    def _go_direct(self, on: bool) -> None:
        flags, direct = fcntl.fcntl(self._file, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
        self._direct = on


def shards(tensors: Mapping[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """Split tensors into files of at most `max_bytes`, in order. A larger tensor gets a file of its own."""
    files: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if files[-1] and size + spec.nbytes > max_bytes:
            files.append({})
            size = 0
        files[-1][name] = spec
        size += spec.nbytes
    return files


def write_weights(
    folder: Path,
    tensors: Mapping[str, Spec],
    fill_box: FillBox,
    max_shard_bytes: int,
    advance: Advance = lambda count: None,
) -> None:
    """Write `model.safetensors`, or several files and an index, into a folder."""
    parts = shards(tensors, max_shard_bytes)
    if len(parts) == 1:
        write_files(folder, {WEIGHTS: parts[0]}, fill_box, advance)
        return
    files = {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, 1)}
    write_files(folder, files, fill_box, advance)
    weight_map = {name: file for file, part in files.items() for name in part}
    notes = {
        "total_parameters": sum(math.prod(spec.shape) for spec in tensors.values()),
        "total_size": sum(spec.nbytes for spec in tensors.values()),
    }
    (folder / INDEX).write_text(json.dumps({"metadata": notes, "weight_map": weight_map}, indent=2) + "\n")
