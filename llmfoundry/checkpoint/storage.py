"""Tensors on disk: safetensors files, one per group of tensors and rank, and an index that does not grow with ranks.

- `GROUP-RANK.safetensors`: what rank RANK wrote of the tensors named `GROUP/...` (`model`, `optimizer`, `rng`), under
  the rest of their names. `safetensors.torch.load_file` loads a checkpoint of one process; one of many processes is
  loaded by any reader that knows DCP's sharding entry, e.g. `torch.distributed.checkpoint.HuggingFaceStorageReader`.
- `tensors.json`: of every tensor its dtype, its shape and the number of its layout. A layout says which rank wrote
  which box. Tensors of one shape share a layout, and boxes that follow each other at equal distances are one entry of
  it. Where in its file a box begins, the file's own header says.

Nobody plans for all: each rank knows from the placement of its tensors what it writes, and of parameters that several
ranks hold alike, one writes (`plan_save`). To load, it reads the headers of those files that have a part of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmfoundry import runtime
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
from llmfoundry.dtensor import local_shard
from llmfoundry.hf.files import Stored, read_header
from llmfoundry.strict_json import Json, read_mapping, whole_number, whole_numbers
from llmfoundry.tree import Tree

SAVED_DTYPES = {
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
_DTYPE_NAMES = {dtype: name for name, dtype in SAVED_DTYPES.items()}


class Box(NamedTuple):
    """A part of a tensor that one rank has."""

    rank: int
    offsets: tuple[int, ...]  # in the tensor
    shape: tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a tensor, and the file that it is in."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """One tensor of a checkpoint. Those of one layout share `chunks`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Laid(NamedTuple):
    """A tensor, and the number of its layout."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: int


class Part(NamedTuple):
    """What this rank writes of a tensor."""

    name: str
    offsets: tuple[int, ...]  # in the whole
    tensor: Tensor


class SavePlan(NamedTuple):
    """A save as one rank sees it.

    Attributes:
        tensors: all, the same on every rank.
        boxes: what this rank writes, by layout; None: nothing.
        parts: the same, by tensor.
    """

    tensors: dict[str, Laid]
    boxes: list[Box | None]
    parts: list[Part]


class _Held(NamedTuple):
    """What a rank holds of the tensors of one shape and placement."""

    offsets: tuple[int, ...]
    copies: int  # ranks that hold the same
    number: int  # of this rank, among them


RNG = "rng/"  # a tensor of which each rank has a row


def plan_save(tensors: Mapping[str, Tensor]) -> SavePlan:
    """Decide what this rank writes; every rank calls it with the same names, and none asks another.

    Of a tensor that several ranks hold alike, one writes: they take turns, by bytes. What is no DTensor is alike on all
    ranks, and rank 0 writes it; but of `rng/...`, each rank has its own.
    """
    plan = SavePlan({}, [], [])
    numbers: dict[object, int] = {}
    held: dict[object, _Held] = {}
    given: dict[int, list[int]] = {}  # bytes that each of so many copies writes
    for name, tensor in tensors.items():
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
        plan.tensors[name] = Laid(tensor.dtype, shape, layout)
        if layout == len(plan.boxes):
            plan.boxes.append(Box(runtime.rank(), offsets, tuple(part.shape)) if writes else None)
        if writes:
            plan.parts.append(Part(name, offsets, part))
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
    """What a rank tells rank 0 of its part in a save."""

    boxes: list[Box | None]
    files: dict[str, Written]
    failure: str  # empty: none
    not_finite: str  # the tensor, if that is the failure
    tensors: str  # a hash of what it takes the tensors to be


def save_parts(
    plan: SavePlan,
    open_folder: Callable[[], Path],
    commit: Callable[[Path, dict[str, Written]], Path],
    shared: bool,
    ranks: Tree | None,
) -> Path:
    """Write a save's tensors, all ranks together, each its part.

    Args:
        open_folder: makes the folder and returns it; called on rank 0 before any rank writes.
        commit: called on rank 0 when every rank has written, with all files; returns where they are now.
        shared: whether all ranks see the folder that rank 0 has made; else each makes its own.

    Returns:
        What `commit` returned.

    Raises:
        SaveError: on all ranks, with the first rank's reason. An interrupt goes on as what it is, when all have ended.
        NotFiniteError: on all ranks, with the name of a tensor.
    """
    folder = _on_rank0(open_folder, ranks)
    files: dict[str, Written] = {}
    failure: BaseException | None = None
    try:
        if not shared:
            folder.mkdir(parents=True, exist_ok=True)
        files = write_parts(folder, plan.parts)
    except BaseException as error:  # the other ranks wait for what this one says
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


def index_of(tensors: Mapping[str, Laid], layouts: Sequence[Sequence[Box]]) -> bytes:
    """What tensors.json says.

    Raises:
        ValueError: the boxes of a layout do not make up the tensors that are laid out so.
    """
    for layout, shape in {(laid.layout, laid.shape) for laid in tensors.values()}:
        _check_boxes(layouts[layout], shape)
    listed = {
        name: {"dtype": _DTYPE_NAMES[laid.dtype], "shape": laid.shape, "layout": laid.layout}
        for name, laid in tensors.items()
    }
    return json.dumps({"layouts": [list(_runs(boxes)) for boxes in layouts], "tensors": listed}).encode()


def _runs(boxes: Sequence[Box]) -> Iterator[dict[str, object]]:
    """Boxes of one shape whose ranks and offsets grow by the same steps, as one entry each."""
    waiting = sorted(boxes, key=lambda box: (box.offsets, box.rank))
    start = 0
    while start < len(waiting):
        first, end, rank_step, steps = waiting[start], start + 1, 0, [0] * len(waiting[start].offsets)
        while end < len(waiting) and waiting[end].shape == first.shape:
            step = [b - a for a, b in zip(waiting[end - 1].offsets, waiting[end].offsets, strict=True)]
            apart = waiting[end].rank - waiting[end - 1].rank
            if end > start + 1 and (step != steps or apart != rank_step):
                break
            steps, rank_step, end = step, apart, end + 1
        run: dict[str, object] = {"rank": first.rank, "offsets": first.offsets, "shape": first.shape}
        yield run | ({"count": end - start, "rank_step": rank_step, "steps": steps} if end - start > 1 else {})
        start = end


def write_parts(folder: Path, parts: Sequence[Part]) -> dict[str, Written]:
    """Write what this rank has of a save: a file for each group of tensors."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.name.partition("/")[0], []).append(part)

    def write(group: str) -> tuple[str, Written]:
        file = _file_of(group, runtime.rank())
        return file, _write_file(folder / file, groups[group])

    with ThreadPoolExecutor() as threads:  # one file waits for the disk while another is filled
        return dict(threads.map(write, groups))


def _file_of(group: str, rank: int) -> str:
    return f"{group}-{rank:05d}.safetensors"


def _write_file(path: Path, parts: list[Part]) -> Written:
    """Write one safetensors file, one tensor at a time, so that no rank holds a second copy of its part."""
    # Widest elements first, as safetensors itself orders them: everything then lies aligned.
    parts = sorted(parts, key=lambda part: -part.tensor.dtype.itemsize)
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
            on_host = part.tensor.detach().cpu().contiguous()
            if not is_finite(on_host):  # here, where it costs no training step any time
                raise NotFiniteError(part.name)
            put(on_host.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return Written(n_bytes, digest.hexdigest())


def _header(parts: list[Part]) -> bytes:
    """The head of a safetensors file that holds `parts`, in this order."""
    tensors: dict[str, dict[str, object]] = {}
    sharding: dict[str, dict[str, list[int]]] = {}
    position = 0
    for name, offsets, tensor in parts:
        key = name.partition("/")[2]
        end = position + tensor.numel() * tensor.dtype.itemsize
        tensors[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        sharding[key] = {"saved_offsets": list(offsets)}
        position = end
    notes = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(sharding)}
    text = json.dumps({"__metadata__": notes} | tensors).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. A sum that is shows it, several times as fast as a look at each."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


_MOST = 2**17  # boxes of a layout: more than ranks that a run may have


def read_index(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint by name.

    Raises:
        ValueError: the index is malformed, points out of the folder, or leaves a part of a tensor out.
    """
    try:
        said = read_mapping(folder / INDEX, follow=False)
        listed, layouts = said["tensors"], said.get("layouts", [])
        if not isinstance(listed, dict) or not isinstance(layouts, list):
            raise ValueError("tensors must be a mapping, and layouts a list")
        return _entries(listed, [_boxes(layout) for layout in layouts])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder / INDEX}: malformed ({type(error).__name__}: {error})") from None


def _entries(listed: dict[str, Json], layouts: list[tuple[Box, ...]]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    chunks: dict[tuple[str, int], tuple[Chunk, ...]] = {}  # by group and layout
    checked: set[tuple[int, tuple[int, ...]]] = set()
    for name, said in listed.items():
        if not isinstance(said, dict) or not isinstance(said["dtype"], str) or said["dtype"] not in SAVED_DTYPES:
            raise ValueError(f"{name!r:.80} is {said!r:.80}, which is no tensor")
        dtype, shape = SAVED_DTYPES[said["dtype"]], whole_numbers(said["shape"])
        if "chunks" in said:  # as it was written by earlier versions
            entries[name] = Entry(dtype, shape, _earlier(said["chunks"], shape))
            continue
        layout = whole_number(said["layout"])
        if layout >= len(layouts):
            raise ValueError(f"{name} is laid out as {layout}, and there are {len(layouts)} layouts")
        if (layout, shape) not in checked:
            _check_boxes(layouts[layout], shape)
            checked.add((layout, shape))
        group = name.partition("/")[0]
        if (group, layout) not in chunks:
            chunks[group, layout] = tuple(Chunk(_file_of(group, rank), *box) for rank, *box in layouts[layout])
            if any(chunk.file != os.path.basename(chunk.file) for chunk in chunks[group, layout]):
                raise ValueError(f"{name!r:.80} is in a file outside of this folder")
        entries[name] = Entry(dtype, shape, chunks[group, layout])
    return entries


def _boxes(runs: Json) -> tuple[Box, ...]:
    found: list[Box] = []
    for run in runs if isinstance(runs, list) else [runs]:
        if not isinstance(run, dict):
            raise ValueError(f"{run!r:.80} is no layout")
        rank, offsets, shape = whole_number(run["rank"]), whole_numbers(run["offsets"]), whole_numbers(run["shape"])
        count = whole_number(run.get("count", 1))
        if len(found) + count > _MOST:
            raise ValueError(f"a layout has more than {_MOST} boxes")
        rank_step, steps = run.get("rank_step", 0), run.get("steps", [0] * len(offsets))
        if type(rank_step) is not int or not isinstance(steps, list) or len(steps) != len(offsets):
            raise ValueError(f"{run!r:.80} has no steps from box to box")
        moves = [step for step in steps if type(step) is int]
        if len(moves) != len(steps):
            raise ValueError(f"{run!r:.80} has steps that are not whole numbers")
        found += [
            Box(rank + i * rank_step, tuple(at + i * move for at, move in zip(offsets, moves, strict=True)), shape)
            for i in range(count)
        ]
    return tuple(found)


def _earlier(listed: Json, shape: tuple[int, ...]) -> tuple[Chunk, ...]:
    found = []
    for said in listed if isinstance(listed, list) else [listed]:
        if not isinstance(said, dict) or not isinstance(said["file"], str):
            raise ValueError(f"{said!r:.80} is no chunk")
        if said["file"] != os.path.basename(said["file"]):
            raise ValueError(f"{said['file']!r:.80} is outside of this folder")
        found.append(Chunk(said["file"], whole_numbers(said["offsets"]), whole_numbers(said["shape"])))
    _check_boxes([Box(0, chunk.offsets, chunk.shape) for chunk in found], shape)
    return tuple(found)


def _check_boxes(boxes: Sequence[Box], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless boxes make up a tensor of a shape, each element once."""
    whole = f"a tensor of {shape}"
    if any(box.rank < 0 or len(box.offsets) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        raise ValueError(f"a box is of no rank, or has not the dimensions of {whole}")
    try:
        offsets, sizes = (
            np.array([box[i] for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape)) for i in (1, 2)
        )
        full = np.array(shape, dtype=np.int64)
    except OverflowError:
        raise ValueError(f"a box of {whole} is too large") from None
    if (offsets < 0).any() or (sizes < 1).any() or (sizes > full - offsets).any():
        raise ValueError(f"a box is outside of {whole}")
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        raise ValueError(f"boxes do not make up {whole}")
    if _overlap(offsets, sizes):
        raise ValueError(f"boxes of {whole} overlap")


def _overlap(offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Whether two of N boxes have an element in common; they lie within a tensor, and add up to its size.

    Args:
        offsets: (N, dims); sizes: (N, dims).
    """
    n, dims = offsets.shape
    if n < 2 or dims == 0:
        return n > 1
    if len(np.unique(np.concatenate([offsets, sizes], axis=1), axis=0)) < n:
        return True
    if all(_are_apart(offsets[:, dim], sizes[:, dim]) for dim in range(dims)):
        return False  # as meshes divide: in each dimension two boxes are the same, or apart; so two boxes are apart
    order = np.lexsort(offsets.T[::-1])
    offsets, sizes = offsets[order], sizes[order]
    for i in range(n - 1):
        end = int(np.searchsorted(offsets[:, 0], offsets[i, 0] + sizes[i, 0]))
        others, theirs = offsets[i + 1 : end], sizes[i + 1 : end]
        if ((others < offsets[i] + sizes[i]) & (offsets[i] < others + theirs)).all(axis=1).any():
            return True
    return False


def _are_apart(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Whether intervals that differ have nothing in common."""
    found = np.unique(np.stack([starts, sizes], axis=1), axis=0)
    return bool((found[:-1, 0] + found[:-1, 1] <= found[1:, 0]).all())


class Wanted(NamedTuple):
    """A part of a chunk, and where it goes."""

    chunk: Chunk
    name: str
    offsets: tuple[int, ...]  # in the chunk
    target: Tensor


class TensorReader:
    """Reads boxes of a checkpoint's tensors; of files that have none of them, not even the header.

    Args:
        folder: the checkpoint; its files are verified before.
        entries: `read_index(folder)`.
    """

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self._folder = folder
        self._entries = entries
        self._headers: dict[str, dict[str, Stored]] = {}

    def stored(self, name: str, chunk: Chunk) -> Stored:
        """A chunk of a tensor in its file.

        Raises:
            DamagedError: the file's header is malformed, or says otherwise than the index.
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
            ConfigError: as `stored`, or a file has become shorter.
        """
        for file, boxes in sorted(self.wanted(tensors).items()):
            with open(self._folder / file, "rb", buffering=0) as handle:
                for each in boxes:
                    stored = self.stored(each.name, each.chunk)
                    each.target.copy_(_read_box(handle.fileno(), stored, each.offsets, tuple(each.target.shape)))

    def wanted(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Wanted]]:
        """What is to be read for this rank's parts of tensors, by file."""
        by_file: dict[str, list[Wanted]] = {}
        parts: dict[object, list[Chunk]] = {}  # which chunks a part meets is the same for all tensors laid out alike
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
        """Check that some files hold what the index says of them.

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
    """A part of a stored box; of the first dimension, no other rows are read."""
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
