"""Tensors on disk: torch DCP plans who writes and reads what; the files are safetensors, without pickle.

DCP's own files hold pickles (`.metadata`, `torch.save` records) and so run whatever an author put there.
These two classes use DCP's planners, its resharding and its error protocol, and replace only the bytes:

- `GROUP-RANK.safetensors`: what rank RANK wrote of the tensors named `GROUP/...` (`model`, `optimizer`, `rng`), under
  the rest of their names. `safetensors.torch.load_file` loads a checkpoint of one process; one of many processes is
  loaded by any reader that knows DCP's sharding entry, e.g. `torch.distributed.checkpoint.HuggingFaceStorageReader`.
- `tensors.json`: for every tensor its dtype, shape and chunks (file, byte offset, offsets and shape within the tensor).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llmfoundry.checkpoint.manifest import INDEX, Written, write_file
from llmfoundry.hf.files import check_apart
from llmfoundry.strict_json import Json, read_mapping, whole_number, whole_numbers

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Chunk(NamedTuple):
    """A box of one tensor and where its bytes lie."""

    file: str
    start: int  # byte in the file
    offsets: tuple[int, ...]  # of the box in the tensor
    shape: tuple[int, ...]  # of the box


class Entry(NamedTuple):
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


class StagedPlanner(DefaultSavePlanner):
    """Plans on the live tensors and writes copies of them: their shapes and places do not change, their values do.

    Args:
        staged: this rank's part of each tensor, on the CPU.
    """

    def __init__(self, staged: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._staged[write_item.index.fqn]


class TensorWriter(StorageWriter):
    """Writes this rank's part of a save into a folder that rank 0 makes.

    Args:
        open_folder: makes the folder and returns it; called on rank 0 before any rank writes.
        commit: called on rank 0 when every rank has written, with all files; returns where they are
            now. Whatever it raises fails the save on all ranks. `dcp.save` returns its answer
            to all of them, as `storage_meta.checkpoint_id`.
        shared: whether all ranks see the folder that rank 0 has made; else each makes its own.
    """

    def __init__(
        self,
        open_folder: Callable[[], Path],
        commit: Callable[[Path, dict[str, Written]], Path],
        shared: bool = True,
    ) -> None:
        self._shared = shared
        self._open_folder = open_folder
        self._commit = commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # A rank past the end of an uneven split holds an empty box; DCP may take it for another's full one.
        return dataclasses.replace(plan, items=[item for item in plan.items if not _is_empty_part(item)])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._folder = self._open_folder()
        return [dataclasses.replace(plan, storage_data=(self._folder, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder, rank = plan.storage_data
        if not self._shared:
            folder.mkdir(parents=True, exist_ok=True)
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            groups.setdefault(item.index.fqn.partition("/")[0], []).append(item)

        def write(group: str) -> list[WriteResult]:
            return _write_file(folder / f"{group}-{rank:05d}.safetensors", groups[group], planner)

        with ThreadPoolExecutor() as threads:  # one file waits for the disk while another is filled
            results = [result for of_file in threads.map(write, groups) for result in of_file]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files: dict[str, Written] = {}
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            chunk, written = result.storage_data
            chunks[result.index.fqn].append(chunk)
            files[chunk.file] = written
        entries = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), f"{name} is not a tensor"
            entries[name] = {
                "dtype": _DTYPE_NAMES[tensor.properties.dtype],
                "shape": list(tensor.size),
                "chunks": [chunk._asdict() for chunk in chunks[name]],
            }
        files[INDEX] = write_file(self._folder / INDEX, json.dumps({"tensors": entries}).encode())
        metadata.storage_meta = StorageMeta(checkpoint_id=self._commit(self._folder, files))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _is_empty_part(item: WriteItem) -> bool:
    data = item.tensor_data
    return data is not None and math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


def _write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write one safetensors file, one tensor at a time, so that no rank holds a second copy of its part."""
    # Widest elements first, as safetensors itself orders them: everything then lies aligned.
    boxes = [(item, data) for item in items if (data := item.tensor_data) is not None]
    boxes.sort(key=lambda box: -box[1].properties.dtype.itemsize)
    header = _header(boxes)
    digest = hashlib.sha256()
    start = len(header)
    chunks = []
    with open(path, "xb") as file, ThreadPoolExecutor(1) as hasher:

        def put(content: bytes | memoryview) -> None:
            hashed = hasher.submit(digest.update, content)  # hashing takes about as long as writing
            file.write(content)
            hashed.result()

        put(header)
        for item, data in boxes:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            put(_bytes_of(tensor))
            chunks.append(Chunk(path.name, start, tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
            start += _bytes_in(data)
        file.flush()
        os.fsync(file.fileno())
    written = Written(start, digest.hexdigest())
    return [
        WriteResult(index=item.index, size_in_bytes=written.bytes, storage_data=(chunk, written))
        for (item, _), chunk in zip(boxes, chunks, strict=True)
    ]


def _header(boxes: list[tuple[WriteItem, TensorWriteData]]) -> bytes:
    """The head of a safetensors file whose tensors are `boxes`, in this order."""
    tensors: dict[str, dict[str, object]] = {}
    sharding: dict[str, dict[str, list[int]]] = {}
    position = 0
    for item, data in boxes:
        key = item.index.fqn.partition("/")[2]
        assert key not in tensors, f"{key}: two boxes of one tensor on one rank"
        tensors[key] = {
            "dtype": _DTYPE_NAMES[data.properties.dtype],
            "shape": list(data.chunk.sizes),
            "data_offsets": [position, position + _bytes_in(data)],
        }
        sharding[key] = {"saved_offsets": list(data.chunk.offsets)}
        position += _bytes_in(data)
    notes = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    text = json.dumps({"__metadata__": notes} | tensors).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_in(data: TensorWriteData) -> int:
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_index(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint by name.

    Raises:
        ValueError: the index is malformed, points out of the folder, or leaves a part of a tensor out.
    """
    try:
        listed = read_mapping(folder / INDEX, follow=False)["tensors"]
        if not isinstance(listed, dict):
            raise ValueError("tensors must be a mapping")
        entries = {name: _entry(said) for name, said in listed.items()}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder / INDEX}: malformed ({type(error).__name__}: {error})") from None
    for name, entry in entries.items():
        if sum(math.prod(chunk.shape) for chunk in entry.chunks) != math.prod(entry.shape):
            raise ValueError(f"{folder / INDEX}: the chunks of {name} do not make up its shape {entry.shape}")
        for chunk in entry.chunks:
            box = zip(chunk.offsets, chunk.shape, entry.shape, strict=False)
            inside = len(chunk.offsets) == len(chunk.shape) == len(entry.shape) and all(
                0 <= offset and 0 < size and offset + size <= full for offset, size, full in box
            )
            if not inside or chunk.start < 0 or chunk.file != os.path.basename(chunk.file):
                raise ValueError(f"{folder / INDEX}: {name} has a chunk outside its bounds ({chunk})")
        if _overlap(entry.chunks):
            raise ValueError(f"{folder / INDEX}: chunks of {name} overlap")
    _check_bytes(folder, entries)
    return entries


def _entry(said: Json) -> Entry:
    if not isinstance(said, dict) or not isinstance(said["chunks"], list):
        raise ValueError(f"{said!r:.80} is no tensor")
    dtype = said["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{dtype!r:.40} is no dtype")
    return Entry(_DTYPES[dtype], whole_numbers(said["shape"]), [_chunk(each) for each in said["chunks"]])


def _chunk(said: Json) -> Chunk:
    if not isinstance(said, dict) or not isinstance(said["file"], str):
        raise ValueError(f"{said!r:.80} is no chunk")
    start, offsets, shape = whole_number(said["start"]), whole_numbers(said["offsets"]), whole_numbers(said["shape"])
    return Chunk(said["file"], start, offsets, shape)


def _overlap(chunks: list[Chunk]) -> bool:
    """Whether two boxes of a tensor have an element in common; they lie within it and add up to its size."""
    if len(chunks) < 2 or not chunks[0].shape:
        return len(chunks) > 1
    differing = [
        dim for dim in range(len(chunks[0].shape)) if len({(c.offsets[dim], c.shape[dim]) for c in chunks}) > 1
    ]
    if len(differing) == 1:  # as FSDP and experts divide: along one dim
        ends = sorted((c.offsets[differing[0]], c.shape[differing[0]]) for c in chunks)
        return any(start + size > following for (start, size), (following, _) in pairwise(ends))
    boxes = sorted(chunks, key=lambda chunk: chunk.offsets)
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            if other.offsets[0] >= one.offsets[0] + one.shape[0]:
                break
            if all(a < b + n and b < a + m for a, m, b, n in
                   zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)):  # fmt: skip
                return True
    return False


def _check_bytes(folder: Path, entries: dict[str, Entry]) -> None:
    """Raise ValueError if two chunks share bytes of a file."""
    files: dict[str, list[tuple[int, int, str]]] = {}
    for name, entry in entries.items():
        for chunk in entry.chunks:
            end = chunk.start + math.prod(chunk.shape) * entry.dtype.itemsize
            files.setdefault(chunk.file, []).append((chunk.start, end, name))
    for file, places in files.items():
        try:
            check_apart(places)
        except ValueError as error:
            raise ValueError(f"{folder / INDEX}: in {file}, {error}") from None


class TensorReader(StorageReader):
    """Reads from a checkpoint folder what DCP planned for this rank; the folder is verified before.

    Args:
        folder: the checkpoint.
        entries: `read_index(folder)`.
    """

    def __init__(self, folder: Path, entries: dict[str, Entry]) -> None:
        self._folder = folder
        self._entries = entries
        self._chunks = {
            MetadataIndex(name, chunk.offsets): (entry.dtype, chunk)
            for name, entry in entries.items()
            for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks],
                )
                for name, entry in self._entries.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self._chunks[item.storage_index][1].file, []).append(item)
        for name, items in per_file.items():
            with open(self._folder / name, "rb", buffering=0) as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(self._read_box(file.fileno(), item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_box(self, handle: int, item: ReadItem) -> Tensor:
        """The part of a stored chunk that `item` asks for; of the first dimension, no other rows are read."""
        dtype, chunk = self._chunks[item.storage_index]
        first, rows = (item.storage_offsets[0], item.lengths[0]) if chunk.shape else (0, 1)
        row_bytes = math.prod(chunk.shape[1:]) * dtype.itemsize
        data = torch.empty(rows * row_bytes, dtype=torch.uint8)
        view, position = data.numpy().data, chunk.start + first * row_bytes
        while view:
            count = os.preadv(handle, [view[: 1 << 30]], position)
            if count == 0:
                raise EOFError(f"{self._folder / chunk.file}: ends before the bytes of {item.storage_index.fqn}")
            view, position = view[count:], position + count
        box = data.view(dtype).reshape((rows, *chunk.shape[1:]) if chunk.shape else ())
        for dim in range(1, len(chunk.shape)):
            box = box.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        return box

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
