"""Folders of safetensors files: read through memory maps, written as streams, complete or not there at all.

A file begins with the length of its header (8 bytes) and the header (JSON: dtype, shape and place of each tensor), and
then holds the tensors' bytes one after another. Headers are checked against the file before anything is read; nothing
is unpickled. Reading maps a file and touches just the pages that are asked for. Writing puts the header, which follows
from shapes and dtypes, and then slab after slab of tensors: no more than one slab is held in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmfoundry.config import ConfigError
from llmfoundry.hf.pieces import Copy, Part, Source, Spec, fill

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SLAB_BYTES = 2**26  # of an output tensor at a time; larger ones are no faster

# Weights as they are trained. Integers and 8-bit floats are quantised ones, which need scales beside them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 2**30

Advance = Callable[[int], object]  # told of bytes done
Slabs = Callable[[str], Iterator[Tensor]]  # the values of a tensor, slabs of its first dim in turn


class Mapped:
    """A file in memory, page by page as it is read."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def tensor(self, start: int, spec: Spec) -> Tensor:
        """The tensor whose bytes begin at `start`. It must not be written to."""
        count = math.prod(spec.shape)
        if count == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=spec.dtype, count=count, offset=start)
        return flat.view(spec.shape)

    def release(self) -> None:
        """Give back the pages that were read; they come again when they are read again."""
        self._map.madvise(mmap.MADV_DONTNEED)


class _Stored(NamedTuple):
    """A tensor in a file."""

    spec: Spec
    file: Path
    start: int  # byte in the file


class Folder:
    """The tensors of a folder of safetensors files, as a `Source`.

    Args:
        path: it holds `model.safetensors`, or an index and the files that it names.

    Raises:
        ConfigError: a file is missing, cut short or malformed, or named outside of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored: dict[str, _Stored] = {}
        self._maps: dict[Path, Mapped] = {}
        for file, expected in _files(path).items():
            found = read_header(file)
            for name in expected - found.keys():
                raise ConfigError(f"{file}: has no tensor {name!r}, which {INDEX} says is in it")
            for name, stored in found.items():
                if name in self._stored:
                    raise ConfigError(f"{file}: has tensor {name!r}, and {self._stored[name].file.name} has it too")
                self._stored[name] = stored
        self.specs: Mapping[str, Spec] = {name: stored.spec for name, stored in self._stored.items()}

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._stored[name].file

    def parts(self, name: str) -> list[Part]:
        """The tensor, mapped."""
        stored = self._stored[name]
        if stored.file not in self._maps:
            self._maps[stored.file] = Mapped(stored.file)
        return [Part((0,) * len(stored.spec.shape), self._maps[stored.file].tensor(stored.start, stored.spec))]

    def release(self) -> None:
        """Give back what was read."""
        for mapped in self._maps.values():
            mapped.release()


def _files(path: Path) -> dict[Path, set[str]]:
    """The weight files of a folder, and the tensors that the index says are in each."""
    index = path / INDEX
    if not index.exists():
        if (path / WEIGHTS).is_file():
            return {path / WEIGHTS: set()}
        pickled = sorted(file.name for file in path.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never opened: save it as safetensors first" if pickled else ""
        raise ConfigError(f"{path}: holds neither {WEIGHTS} nor {INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index}: is malformed ({type(error).__name__}: {error})") from None
    files: dict[Path, set[str]] = {}
    for name, file in names.items():
        if file != os.path.basename(file) or "\\" in file or "\0" in file or file in ("", ".", ".."):
            raise ConfigError(f"{index}: says that {name!r} is in {file!r}, which is outside of this folder")
        files.setdefault(path / file, set()).add(name)
    for path_of in files:
        if not path_of.is_file():
            raise ConfigError(f"{path_of}: is missing; {INDEX} names it")
    return files


def read_header(file: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file, each within it.

    Raises:
        ConfigError: the file is cut short or malformed.
    """
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConfigError(f"{file}: is cut short or no safetensors file ({size} bytes, a header of {length})")
        if length > _MAX_HEADER:
            raise ConfigError(f"{file}: has a header of {length} bytes; {_MAX_HEADER} is the most that is read")
        text = handle.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            begin, end = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            if entry["dtype"] not in DTYPES:
                raise ConfigError(
                    f"{file}: tensor {name!r} has dtype {entry['dtype']}; weights are one of {', '.join(DTYPES)} "
                    "(of a quantised checkpoint, take the unquantised one)"
                )
            spec = Spec(DTYPES[entry["dtype"]], shape)
            if begin < 0 or min(shape, default=0) < 0 or end - begin != spec.nbytes:
                raise ValueError(f"tensor {name!r} does not fill its place")
            if 8 + length + end > size:
                raise ConfigError(
                    f"{file}: is cut short: it has {size} bytes and tensor {name!r} ends at {8 + length + end}"
                )
            found[str(name)] = _Stored(spec, file, 8 + length + begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file}: has a malformed header ({type(error).__name__}: {error})") from None
    return found


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears when it is complete.

    Yields:
        A temporary folder beside `path`, to be filled. It gets its name at the end, and is deleted on any error.

    Raises:
        ConfigError: there is something at `path`.
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
        temporary.rename(path)  # over an empty folder too
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Room:
    """Memory for two slabs in turn: one is filled while the one before it is written. Fresh memory takes longer to get
    than to fill."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(SLAB_BYTES, dtype=torch.uint8) for _ in range(2)]

    def slab(self, spec: Spec) -> Tensor:
        """A tensor whose values are those of the slab before the last."""
        if spec.nbytes > SLAB_BYTES:
            return torch.empty(spec.shape, dtype=spec.dtype)
        self._buffers.reverse()
        return self._buffers[0][: spec.nbytes].view(spec.dtype).view(spec.shape)


def slabs_of(name: str, spec: Spec, copies: list[Copy], source: Source, room: Room | None = None) -> Iterator[Tensor]:
    """The values of an output tensor, on the CPU, in slabs of its first dim of about `SLAB_BYTES`.

    Args:
        spec: what the tensor is to be; values are converted to its dtype.
        copies: all that lead to it.
        room: where the slabs are to be, for a caller that keeps none beyond the next; None: in memory of their own.
    """
    rows = spec.shape[0] if spec.shape else 1
    step = max(1, SLAB_BYTES // max(1, spec.nbytes // max(1, rows)))
    for start in range(0, rows, step):
        part = Spec(spec.dtype, (min(step, rows - start), *spec.shape[1:]) if spec.shape else ())
        slab = torch.empty(part.shape, dtype=part.dtype) if room is None else room.slab(part)
        fill(slab, (start, *(0 for _ in spec.shape[1:])), copies, source)
        source.release()
        yield slab


class Placed(NamedTuple):
    """A tensor's place in a file that is to be written."""

    name: str
    spec: Spec
    start: int  # byte in the file


def header(tensors: Mapping[str, Spec], notes: Mapping[str, str]) -> tuple[bytes, list[Placed]]:
    """The head of a safetensors file, and its tensors in order: widest dtypes first, so that all lie aligned."""
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


def write_file(
    path: Path,
    tensors: Mapping[str, Spec],
    slabs: Slabs,
    advance: Advance = lambda count: None,
    digest: Callable[[bytes | memoryview], object] = lambda content: None,
    notes: Mapping[str, str] | None = None,
) -> list[Placed]:
    """Write one safetensors file as a stream, and sync it.

    A slab is read while the one before it is written and digested, each in a thread of its own: all three take about as
    long as each other.

    Args:
        digest: is fed every byte in order.
        notes: the file's metadata, beside `format`.
    """
    head, places = header(tensors, {"format": "pt"} | dict(notes or {}))
    with open(path, "xb") as file, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as digester:
        file.write(head)
        digest(head)
        before: list[Future[object]] = []
        for place in places:
            for slab in slabs(place.name):
                content = slab.contiguous().reshape(-1).view(torch.uint8).numpy().data
                for future in before:
                    future.result()
                before = [writer.submit(file.write, content), digester.submit(digest, content)]
                advance(len(content))
        for future in before:
            future.result()
        file.flush()
        os.fsync(file.fileno())
    return places


def shards(tensors: Mapping[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """Tensors shared out to files of at most `max_bytes`, in order; one that is larger has a file of its own."""
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
    folder: Path, tensors: Mapping[str, Spec], slabs: Slabs, max_shard_bytes: int, advance: Advance = lambda count: None
) -> None:
    """Write `model.safetensors`, or several files and their index, into a folder."""
    files = shards(tensors, max_shard_bytes)
    if len(files) == 1:
        write_file(folder / WEIGHTS, files[0], slabs, advance)
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / name, file, slabs, advance)
        weight_map |= dict.fromkeys(file, name)
    notes = {
        "total_parameters": sum(math.prod(spec.shape) for spec in tensors.values()),
        "total_size": sum(spec.nbytes for spec in tensors.values()),
    }
    (folder / INDEX).write_text(json.dumps({"metadata": notes, "weight_map": weight_map}, indent=2) + "\n")
