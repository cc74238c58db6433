"""Tensors on disk: safetensors files, one per group of tensors and rank, and an index.

- `GROUP-RANK.safetensors`: what rank RANK wrote of the tensors named `GROUP/...` (`model`, `optimizer`, `rng`), under
  the rest of their names. `safetensors.torch.load_file` loads a checkpoint of one process; one of many processes can be
  loaded by any reader of DCP's sharding metadata, e.g. `torch.distributed.checkpoint.HuggingFaceStorageReader`.
- `tensors.json`: which rank wrote which part of which tensor (index.py).

There is no global planning: each rank derives what it writes from the placement of its tensors, and of parameters that
several ranks replicate, one rank writes (`plan_save`). To load, a rank reads only the headers of files that contain
parts of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmfoundry import runtime
from llmfoundry.checkpoint.index import DTYPE_NAMES, SAVED_DTYPES, Box, Chunk, Entry, Laid, file_of, index_of
from llmfoundry.checkpoint.manifest import (
    INDEX,
    DamagedError,
    NotFiniteError,
    SaveError,
    TakenOver,
    Written,
    write_file,
)
from llmfoundry.config import ConfigError
from llmfoundry.dtensor import local_part, local_shard
from llmfoundry.hf.files import Stored, read_header
from llmfoundry.kernels.halves import Halves, join_into
from llmfoundry.tree import Tree


class Part(NamedTuple):
    """What this rank writes of a tensor."""

    name: str
    offsets: tuple[int, ...]  # in the full tensor
    tensor: Tensor
    low: Tensor | None = None  # the low half of a float32 weight whose high half is `tensor`

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return self.tensor.dtype if self.low is None else torch.float32

    def copy_to(self, memory: Tensor) -> None:
        """Copy it to memory of its shape and `dtype`; with pinned memory, the host does not wait."""
        if self.low is None:
            memory.copy_(self.tensor, non_blocking=True)
        else:
            join_into(memory, Halves(self.tensor, self.low))

    def on_host(self) -> Tensor:
        """Return what is written, contiguous in host memory; not a copy if it already is."""
        if self.low is None:
            return self.tensor.detach().cpu().contiguous()
        memory = torch.empty(self.tensor.shape, dtype=self.dtype)
        self.copy_to(memory)
        if self.tensor.is_cuda:
            torch.cuda.current_stream(self.tensor.device).synchronize()
        return memory


class SavePlan(NamedTuple):
    """A save from the point of view of one rank.

    Attributes:
        tensors: all tensors, the same on every rank.
        boxes: what this rank writes, by layout; None: nothing.
        parts: the same, by tensor.
    """

    tensors: dict[str, Laid]
    boxes: list[Box | None]
    parts: list[Part]


class _Held(NamedTuple):
    """What a rank holds of the tensors of one shape and placement."""

    offsets: tuple[int, ...]
    copies: int  # number of ranks that hold the same
    number: int  # index of this rank among them


RNG = "rng/"  # prefix of tensors of which each rank has a row


def plan_save(tensors: Mapping[str, Tensor | Halves]) -> SavePlan:
    """Decide what this rank writes, without communication; every rank must call this with the same names.

    Tensors that several ranks replicate are written by one of them, balanced by bytes. A tensor that is not a DTensor
    is the same on all ranks, and rank 0 writes it; except `rng/...`, of which each rank has its own.
    """
    plan = SavePlan({}, [], [])
    numbers: dict[object, int] = {}
    held: dict[object, _Held] = {}
    given: dict[int, list[int]] = {}  # bytes written so far by each replica, by number of replicas
    for name, kept in tensors.items():
        tensor, low = kept if isinstance(kept, Halves) else (kept, None)
        key: object
        if name.startswith(RNG):
            shape, offsets = (runtime.world_size(), *tensor.shape), (runtime.rank(), *(0 for _ in tensor.shape))
            part, key, writes = tensor.detach()[None], ("a row of each rank", shape), True
        elif isinstance(tensor, DTensor):
            shape, part = tuple(tensor.shape), tensor.to_local().detach()
            alike = (shape, tensor.placements, tensor.device_mesh)
            if alike not in held:
                held[alike] = _held(tensor)
            offsets, copies, number = held[alike]
            bytes_of = given.setdefault(copies, [0] * copies)
            writer = bytes_of.index(min(bytes_of))
            bytes_of[writer] += tensor.numel() * tensor.dtype.itemsize
            key, writes = (*alike, writer), number == writer and part.numel() > 0
        else:
            shape, part, offsets = tuple(tensor.shape), tensor.detach(), (0,) * tensor.dim()
            key, writes = ("rank 0", shape), runtime.is_rank0() and tensor.numel() > 0
        layout = numbers.setdefault(key, len(numbers))
        plan.tensors[name] = Laid(tensor.dtype if low is None else torch.float32, shape, layout)
        if layout == len(plan.boxes):
            plan.boxes.append(Box(runtime.rank(), offsets, tuple(part.shape)) if writes else None)
        if writes:
            plan.parts.append(Part(name, offsets, part, None if low is None else local_part(low)))
    return plan


def _held(tensor: DTensor) -> _Held:
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    copies, number = 1, 0
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies, number = copies * mesh.size(dim), number * mesh.size(dim) + coordinate[dim]
    return _Held(local_shard(tensor).offsets, copies, number)


class _Wrote(NamedTuple):
    """What a rank reports to rank 0 about its part of a save."""

    boxes: list[Box | None]
    files: dict[str, Written]
    failure: str  # empty if there was none
    not_finite: str  # name of the tensor, if that is the failure
    tensors: str  # hash of the tensors that this rank expects


def save_parts(
    plan: SavePlan,
    open_folder: Callable[[], Path],
    commit: Callable[[Path, dict[str, Written]], Path],
    shared: bool,
    ranks: Tree | None,
) -> Path:
    """Write a save's tensors; all ranks call this, each writes its part.

    Args:
        plan: from `plan_save`.
        open_folder: creates the folder and returns it; called on rank 0 before any rank writes.
        commit: called on rank 0 after every rank has written, with all files; returns their final folder.
        shared: whether all ranks see rank 0's folder; otherwise each creates its own.
        ranks: the group for communication; None for a single process.

    Returns:
        What `commit` returned.

    Raises:
        SaveError: on all ranks, with the first failing rank's reason. An interrupt is raised as itself, after all ranks
            are done.
        NotFiniteError: on all ranks, with the name of a tensor.
    """
    folder = _on_rank0(open_folder, ranks)
    files: dict[str, Written] = {}
    failure: BaseException | None = None
    try:
        if not shared:
            folder.mkdir(parents=True, exist_ok=True)
        files = write_parts(folder, plan.parts)
    except BaseException as error:  # the other ranks wait for this rank's report
        failure = error
    alike = hashlib.sha256(repr(plan.tensors).encode()).hexdigest()
    name = str(failure) if isinstance(failure, NotFiniteError) else ""
    wrote = _Wrote(plan.boxes, files, _one_line(failure) if failure is not None else "", name, alike)
    found = [wrote] if ranks is None else ranks.gather(wrote)
    try:
        return _on_rank0(lambda: _finish(folder, plan, found, commit), ranks)
    except SaveError:
        if failure is not None and not isinstance(failure, Exception):
            raise failure from None
        raise


def _on_rank0(ask: Callable[[], Path], ranks: Tree | None) -> Path:
    def said() -> Path:
        try:
            return ask()
        except (SaveError, TakenOver, NotFiniteError):
            raise
        except Exception as error:
            raise SaveError(f"{_of_rank(0)}{_one_line(error)}") from error

    return runtime.on_rank0(said, ranks)


def _finish(
    folder: Path, plan: SavePlan, found: list[_Wrote], commit: Callable[[Path, dict[str, Written]], Path]
) -> Path:
    """Write the index, and complete the folder; on rank 0."""
    for rank, wrote in enumerate(found):
        if wrote.not_finite:
            raise NotFiniteError(wrote.not_finite)
        if wrote.failure:
            raise SaveError(f"{_of_rank(rank)}{wrote.failure}")
        if wrote.tensors != found[0].tensors:
            raise SaveError(f"{_of_rank(rank)}has other tensors than rank 0")
    layouts = [
        [box for box in boxes if box is not None] for boxes in zip(*(wrote.boxes for wrote in found), strict=True)
    ]
    files = {name: written for wrote in found for name, written in wrote.files.items()}
    files[INDEX] = write_file(folder / INDEX, index_of(plan.tensors, layouts))
    return commit(folder, files)


def _of_rank(rank: int) -> str:
    return f"rank {rank}: " if runtime.world_size() > 1 else ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def write_parts(folder: Path, parts: Sequence[Part]) -> dict[str, Written]:
    """Write this rank's parts of a save, one file per group of tensors."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.name.partition("/")[0], []).append(part)

    def write(group: str) -> tuple[str, Written]:
        file = file_of(group, runtime.rank())
        return file, _write_file(folder / file, groups[group])

    with ThreadPoolExecutor() as threads:  # one file waits for the disk while another is filled
        return dict(threads.map(write, groups))


def _write_file(path: Path, parts: list[Part]) -> Written:
    """Write one safetensors file, one tensor at a time, so that no rank holds a second copy of its parts."""
    # Widest dtypes first, as in the safetensors library, so that everything is aligned.
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    digest = hashlib.sha256()
    n_bytes = 0
    with open(path, "xb") as file, ThreadPoolExecutor(1) as hasher:

        def put(content: bytes | memoryview) -> None:
            nonlocal n_bytes
            hashed = hasher.submit(digest.update, content)  # hashing takes about as long as writing
            file.write(content)
            n_bytes += len(content)
            hashed.result()

        put(_header(parts))
        for part in parts:
            on_host = part.on_host()
            if not is_finite(on_host):  # checked here, where it does not slow down training
                raise NotFiniteError(part.name)
            put(on_host.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return Written(n_bytes, digest.hexdigest())


def _header(parts: list[Part]) -> bytes:
    """Return the header of a safetensors file that holds `parts` in this order."""
    tensors: dict[str, dict[str, object]] = {}
    sharding: dict[str, dict[str, list[int]]] = {}
    position = 0
    for part in parts:
        key, tensor = part.name.partition("/")[2], part.tensor
        end = position + tensor.numel() * part.dtype.itemsize
        tensors[key] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        sharding[key] = {"saved_offsets": list(part.offsets)}
        position = end
    notes = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    text = json.dumps({"__metadata__": notes} | tensors).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. A finite sum proves it, several times faster than checking each value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


class Wanted(NamedTuple):
    """A part of a chunk, and where to copy it."""

    chunk: Chunk
    name: str
    offsets: tuple[int, ...]  # in the chunk
    target: Tensor


class TensorReader:
    """Reads boxes of a checkpoint's tensors. Files that contain none of them are not opened.

    Args:
        folder: the checkpoint; its files must have been verified.
        entries: `read_index(folder)`.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self._folder = folder
        self._entries = entries
        self._headers: dict[str, dict[str, Stored]] = {}

    def stored(self, name: str, chunk: Chunk) -> Stored:
        """Return the position of a tensor's chunk in its file.

        Raises:
            DamagedError: if the file's header is malformed, or contradicts the index.
        """
        if chunk.file not in self._headers:
            try:
                self._headers[chunk.file] = read_header(self._folder / chunk.file, SAVED_DTYPES)
            except (ConfigError, OSError) as error:
                raise DamagedError(str(error)) from None
        found = self._headers[chunk.file].get(name.partition("/")[2])
        if found is None or found.spec != (self._entries[name].dtype, chunk.shape):
            raise DamagedError(f"{self._folder / chunk.file}: has not what {INDEX} says of {name}")
        return found._replace(offsets=chunk.offsets)

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill this rank's parts of tensors, in place.

        Raises:
            ConfigError: as `stored`, or if a file has become shorter.
        """
        for file, boxes in sorted(self.wanted(tensors).items()):
            with open(self._folder / file, "rb", buffering=0) as handle:
                for each in boxes:
                    stored = self.stored(each.name, each.chunk)
                    each.target.copy_(_read_box(handle.fileno(), stored, each.offsets, tuple(each.target.shape)))

    def wanted(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Wanted]]:
        """Return what to read for this rank's parts of tensors, by file."""
        by_file: dict[str, list[Wanted]] = {}
        parts: dict[object, list[Chunk]] = {}  # the overlapping chunks, shared by tensors with the same layout
        for name, tensor in tensors.items():
            local, _, offsets = local_shard(tensor)
            if name.startswith(RNG) and len(self._entries[name].shape) > local.dim():
                local, offsets = local[None], (runtime.rank(), *offsets)
            chunks, shape = self._entries[name].chunks, tuple(local.shape)
            key = (id(chunks), offsets, shape)
            if key not in parts:
                parts[key] = [chunk for chunk in chunks if local.numel() and _meets(chunk, offsets, shape)]
            for chunk in parts[key]:
                by_file.setdefault(chunk.file, []).append(_wanted(name, chunk, local, offsets))
        return by_file

    def check_headers(self, files: Sequence[str]) -> None:
        """Check that files contain what the index says.

        Raises:
            DamagedError: as `stored`.
        """
        looked_at = set(files)
        found: dict[int, list[Chunk]] = {}
        for name, entry in self._entries.items():
            if id(entry.chunks) not in found:
                found[id(entry.chunks)] = [chunk for chunk in entry.chunks if chunk.file in looked_at]
            for chunk in found[id(entry.chunks)]:
                self.stored(name, chunk)


def _meets(chunk: Chunk, offsets: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(
        a < b + n and b < a + m for a, m, b, n in zip(chunk.offsets, chunk.shape, offsets, shape, strict=True)
    )  # fmt: skip


def _wanted(name: str, chunk: Chunk, local: Tensor, offsets: tuple[int, ...]) -> Wanted:
    inner, target = [], local
    for dim, (there, size, here) in enumerate(zip(chunk.offsets, chunk.shape, offsets, strict=True)):
        first, end = max(there, here), min(there + size, here + local.shape[dim])
        inner.append(first - there)
        target = target.narrow(dim, first - here, end - first)
    return Wanted(chunk, name, tuple(inner), target)


def _read_box(handle: int, stored: Stored, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
    """Read a part of a stored box; of the first dim, only the required rows are read."""
    dtype, shape = stored.spec
    first, rows = (offsets[0], lengths[0]) if shape else (0, 1)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    data = torch.empty(rows * row_bytes, dtype=torch.uint8)
    view, position = data.numpy().data, stored.start + first * row_bytes
    while view:
        count = os.preadv(handle, [view[: 1 << 30]], position)
        if count == 0:
            raise ConfigError(f"{stored.file}: has become shorter while it was read")
        view, position = view[count:], position + count
    box = data.view(dtype).reshape((rows, *shape[1:]) if shape else ())
    for dim in range(1, len(shape)):
        box = box.narrow(dim, offsets[dim], lengths[dim])
    return box
