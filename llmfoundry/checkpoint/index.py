"""tensors.json: the dtype, shape and layout number of every tensor; its size does not grow with the number of ranks.

A layout says which rank wrote which box. Tensors of the same shape share a layout, and boxes at equal distances form
one entry of it. The position of a box in its file is given by the file's own header.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llmfoundry.checkpoint.manifest import INDEX
from llmfoundry.strict_json import Json, read_mapping, whole_number, whole_numbers

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
DTYPE_NAMES = {dtype: name for name, dtype in SAVED_DTYPES.items()}


class Box(NamedTuple):
    """A part of a tensor that one rank holds."""

    rank: int
    offsets: tuple[int, ...]  # in the tensor
    shape: tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a tensor, and the file that contains it."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """One tensor of a checkpoint. Tensors with the same layout share `chunks`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Laid(NamedTuple):
    """A tensor, and the number of its layout."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: int


def file_of(group: str, rank: int) -> str:
    """Return the name of the file that a rank writes for a group of tensors."""
    return f"{group}-{rank:05d}.safetensors"


def index_of(tensors: Mapping[str, Laid], layouts: Sequence[Sequence[Box]]) -> bytes:
    """Return the contents of tensors.json.

    Raises:
        ValueError: if the boxes of a layout do not cover the tensors that use it.
    """
    for layout, shape in {(laid.layout, laid.shape) for laid in tensors.values()}:
        _check_boxes(layouts[layout], shape)
    listed = {
        name: {"dtype": DTYPE_NAMES[laid.dtype], "shape": laid.shape, "layout": laid.layout}
        for name, laid in tensors.items()
    }
    return json.dumps({"layouts": [list(_runs(boxes)) for boxes in layouts], "tensors": listed}).encode()


def _runs(boxes: Sequence[Box]) -> Iterator[dict[str, object]]:
    """Yield boxes of the same shape whose ranks and offsets increase by constant steps as one entry."""
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


_MOST = 2**17  # boxes per layout: more than the ranks of any run


def read_index(folder: Path) -> dict[str, Entry]:
    """Return the tensors of a checkpoint by name.

    Raises:
        ValueError: if the index is malformed, refers to files outside of the folder, or does not cover a tensor.
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
            raise ValueError(f"{name!r:.80} is {said!r:.80}, which is not a tensor")
        dtype, shape = SAVED_DTYPES[said["dtype"]], whole_numbers(said["shape"])
        if "chunks" in said:  # the format of earlier versions
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
            chunks[group, layout] = tuple(Chunk(file_of(group, rank), *box) for rank, *box in layouts[layout])
            if any(chunk.file != os.path.basename(chunk.file) for chunk in chunks[group, layout]):
                raise ValueError(f"{name!r:.80} is in a file outside of this folder")
        entries[name] = Entry(dtype, shape, chunks[group, layout])
    return entries


def _boxes(runs: Json) -> tuple[Box, ...]:
    found: list[Box] = []
    for run in runs if isinstance(runs, list) else [runs]:
        if not isinstance(run, dict):
            raise ValueError(f"{run!r:.80} is not a layout")
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
            raise ValueError(f"{said!r:.80} is not a chunk")
        if said["file"] != os.path.basename(said["file"]):
            raise ValueError(f"{said['file']!r:.80} is outside of this folder")
        found.append(Chunk(said["file"], whole_numbers(said["offsets"]), whole_numbers(said["shape"])))
    _check_boxes([Box(0, chunk.offsets, chunk.shape) for chunk in found], shape)
    return tuple(found)


def _check_boxes(boxes: Sequence[Box], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the boxes cover every element of a tensor of this shape exactly once."""
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
    """Return whether any two of N boxes overlap. They lie within a tensor, and their sizes add up to its size.

    Args:
        offsets: (N, dims).
        sizes: (N, dims).
    """
    n, dims = offsets.shape
    if n < 2 or dims == 0:
        return n > 1
    if len(np.unique(np.concatenate([offsets, sizes], axis=1), axis=0)) < n:
        return True
    if all(_are_apart(offsets[:, dim], sizes[:, dim]) for dim in range(dims)):
        return False  # as meshes divide: in each dim, two boxes are equal or disjoint; so two boxes are disjoint
    order = np.lexsort(offsets.T[::-1])
    offsets, sizes = offsets[order], sizes[order]
    for i in range(n - 1):
        end = int(np.searchsorted(offsets[:, 0], offsets[i, 0] + sizes[i, 0]))
        others, theirs = offsets[i + 1 : end], sizes[i + 1 : end]
        if ((others < offsets[i] + sizes[i]) & (offsets[i] < others + theirs)).all(axis=1).any():
            return True
    return False


def _are_apart(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
    """Return whether distinct intervals are disjoint."""
    found = np.unique(np.stack([starts, sizes], axis=1), axis=0)
    return bool((found[:-1, 0] + found[:-1, 1] <= found[1:, 0]).all())
