"""The rule engine: maps blocks of llmfoundry tensors to blocks of another framework's tensors.

A `Piece` equates a block of an llmfoundry tensor with a block of a Hugging Face tensor. Each axis of the block runs
along some dim of either tensor, from a start index and with a step; so a piece can stack, concatenate, interleave and
transpose. The pieces tile the tensors of both sides exactly. They therefore form an invertible map, which serves
reading, writing, and reading only the part that a rank holds: intersect the pieces with the wanted box, and copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmfoundry.dtensor import LocalShard

ROWS_AT_A_TIME = 2**14  # when averaging a matrix

Index = int | slice  # slices may have a step on the Hugging Face side, but not on the llmfoundry side


class Spec(NamedTuple):
    """The dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Part(NamedTuple):
    """A box of a tensor, with its values."""

    offsets: tuple[int, ...]  # of the box in the tensor
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the box."""
        return tuple(self.values.shape)

    def blocks(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Part]:
        """Yield itself, since it is in memory."""
        yield self


class Kept(Protocol):
    """A box of a tensor, wherever its values are stored."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """The offsets of the box in the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the box."""

    def blocks(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Part]:
        """Yield a smaller box of the tensor, read in parts; they may include neighboring values."""


class TensorSource(Protocol):
    """Tensors that can be read piece by piece."""

    specs: Mapping[str, Spec]

    def parts(self, name: str) -> Iterable[Kept]:
        """Return the boxes that store a tensor; together they cover it."""


class Axis(NamedTuple):
    """The dim, start and step of a block's axis in a tensor."""

    dim: int
    start: int
    step: int


class Side(NamedTuple):
    """The position of a block in one of the two tensors."""

    name: str
    axes: tuple[Axis, ...]  # one for each axis of the block, in the block's order
    fixed: tuple[tuple[int, int], ...] = ()  # (dim, index) of the tensor's other dims


class Piece(NamedTuple):
    """A block that two tensors share."""

    sizes: tuple[int, ...]
    ours: Side
    theirs: Side


class Copy(NamedTuple):
    """A piece with a direction."""

    sizes: tuple[int, ...]
    target: Side
    source: Side

    def to_box(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Copy | None:
        """Return the part that writes to a box of the target; None if there is none."""
        return self._cut(_inside(self.target, self.sizes, offsets, shape))

    def from_box(self, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Copy | None:
        """Return the part that reads from a box of the source; None if there is none."""
        return self._cut(_inside(self.source, self.sizes, offsets, shape))

    def _cut(self, ranges: list[range] | None) -> Copy | None:
        if ranges is None:
            return None
        sides = (
            side._replace(
                axes=tuple(a._replace(start=a.start + r.start * a.step) for a, r in zip(side.axes, ranges, strict=True))
            )
            for side in (self.target, self.source)
        )
        return Copy(tuple(map(len, ranges)), *sides)


def _inside(side: Side, sizes: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]) -> list[range] | None:
    """Return the range of block indices that lie in a box of the tensor, one per axis; None if there are none."""
    if any(not offsets[dim] <= index < offsets[dim] + shape[dim] for dim, index in side.fixed):
        return None
    ranges = []
    for axis, size in zip(side.axes, sizes, strict=True):
        before = offsets[axis.dim] - axis.start
        low = max(0, -(-before // axis.step))
        high = min(size, -(-(before + shape[axis.dim]) // axis.step))
        if low >= high:
            return None
        ranges.append(range(low, high))
    return ranges


def _view(tensor: Tensor, side: Side, sizes: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
    """Return the block as a view of a tensor that starts at `offsets` of the whole; dims are in the block's order."""
    index: list[Index] = [0] * tensor.dim()
    for dim, at in side.fixed:
        index[dim] = at - offsets[dim]
    for axis, size in zip(side.axes, sizes, strict=True):
        start = axis.start - offsets[axis.dim]
        index[axis.dim] = slice(start, start + (size - 1) * axis.step + 1, axis.step)
    dims = sorted(axis.dim for axis in side.axes)
    return tensor[tuple(index)].permute([dims.index(axis.dim) for axis in side.axes])


def runs(
    offsets: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...], limit: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Split a box of a tensor into boxes that are contiguous in memory, in memory order.

    Args:
        whole: the tensor's shape.
        limit: maximum number of values in a box.

    Yields:
        Offsets and shapes. If the box takes a part of short rows, whole rows are returned: reading is faster than
        seeking.
    """
    if not whole:
        yield (), ()
        return
    row = math.prod(whole[1:])
    if row <= (limit if shape[1:] == whole[1:] else limit // 16):
        rows, end = max(1, limit // max(1, row)), offsets[0] + shape[0]
        for start in range(offsets[0], end, rows):
            yield (start, *(0 for _ in whole[1:])), (min(rows, end - start), *whole[1:])
        return
    for index in range(offsets[0], offsets[0] + shape[0]):
        for inner, size in runs(offsets[1:], shape[1:], whole[1:], limit):
            yield (index, *inner), (1, *size)


def _bounds(side: Side, sizes: tuple[int, ...], n_dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the smallest box of a tensor that contains a block."""
    offsets, shape = [0] * n_dims, [1] * n_dims
    for dim, index in side.fixed:
        offsets[dim] = index
    for axis, size in zip(side.axes, sizes, strict=True):
        offsets[axis.dim], shape[axis.dim] = axis.start, (size - 1) * axis.step + 1
    return tuple(offsets), tuple(shape)


@torch.no_grad()
def fill(out: Tensor, offsets: tuple[int, ...], copies: Iterable[Copy], source: TensorSource) -> None:
    """Fill a box of a tensor, reading no more than necessary.

    Args:
        out: the box, on any device and of any dtype; may be empty.
        offsets: of the box in the whole tensor.
        copies: all copies whose target is that tensor.
        source: the tensors to read from.
    """
    if out.numel() == 0:
        return
    for copy in copies:
        wanted = copy.to_box(offsets, tuple(out.shape))
        if wanted is None:
            continue
        for kept in source.parts(wanted.source.name):
            here = wanted.from_box(kept.offsets, kept.shape)
            if here is None:
                continue
            for part in kept.blocks(*_bounds(here.source, here.sizes, len(kept.shape))):
                there = here.from_box(part.offsets, part.shape)
                if there is not None:
                    target = _view(out, there.target, there.sizes, offsets)
                    target.copy_(_view(part.values, there.source, there.sizes, part.offsets))


@torch.no_grad()
def fill_grown(out: LocalShard, copies: Iterable[Copy], source: TensorSource, n_rows: int) -> None:
    """Fill this rank's part of a matrix that has more rows than its source; new rows are the mean of the stored ones.

    Args:
        out: this rank's part of the (N, D) matrix.
        copies: the copies that fill the first rows.
        source: the tensors to read from.
        n_rows: the number of stored rows, less than N.
    """
    copies, (first, column) = list(copies), out.offsets
    rows, columns = out.local.shape
    old = min(max(n_rows - first, 0), rows)
    if old:
        fill(out.local[:old], out.offsets, copies, source)
    if old == rows:
        return
    total = torch.zeros(columns, dtype=torch.float64)
    for start in range(0, n_rows, ROWS_AT_A_TIME):
        block = torch.empty(min(ROWS_AT_A_TIME, n_rows - start), columns)
        fill(block, (start, column), copies, source)
        total += block.sum(0, dtype=torch.float64)
    out.local[old:] = (total / n_rows).to(out.local.dtype).to(out.local.device)


def box_of(tensor: Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return a view of a box of a tensor."""
    return tensor[tuple(slice(start, start + n) for start, n in zip(offsets, shape, strict=True))]


def values_of(parts: Iterable[Kept]) -> Iterator[Part]:
    """Yield all values of a tensor, part by part."""
    for kept in parts:
        yield from kept.blocks(kept.offsets, kept.shape)


def whole_of(spec: Spec, parts: Iterable[Kept]) -> Tensor:
    """Read a whole tensor into memory."""
    whole = torch.empty(spec.shape, dtype=spec.dtype)
    for part in values_of(parts):
        box_of(whole, part.offsets, part.shape).copy_(part.values)
    return whole


class Pieces:
    """The pieces between an llmfoundry model and a Hugging Face model. A family calls `add` for each block.

    Args:
        shapes: of the llmfoundry tensors.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.pieces: list[Piece] = []
        self.left: dict[str, int] = {}  # unused rows by Hugging Face tensor, see `leave`

    def leave(self, theirs: str, rows: int) -> None:
        """Mark the first rows of a Hugging Face matrix as unused: they are not read, and written as zeros."""
        self.left[theirs] = rows

    def add(
        self,
        ours: str,
        theirs: str,
        at: tuple[Index, ...] = (),
        there: tuple[slice, ...] = (),
        transposed: bool = False,
    ) -> None:
        """Equate a block of an llmfoundry tensor with a block of a Hugging Face tensor.

        Args:
            ours: name of the llmfoundry tensor.
            theirs: name of the Hugging Face tensor.
            at: the block in the llmfoundry tensor, an index or slice per dim. The Hugging Face tensor lacks indexed
                dims. Omitted dims are taken whole.
            there: a slice with the start and step of the block per Hugging Face dim; omitted dims start at 0 with step
                1.
            transposed: whether the last two dims of the Hugging Face tensor are swapped.
        """
        shape = self.shapes[ours]
        whole: tuple[Index, ...] = at + (slice(None),) * (len(shape) - len(at))
        fixed = tuple((dim, index) for dim, index in enumerate(whole) if isinstance(index, int))
        spans = [
            (dim, range(n)[s]) for dim, (s, n) in enumerate(zip(whole, shape, strict=True)) if isinstance(s, slice)
        ]
        assert all(span.step == 1 and len(span) > 0 for _, span in spans), (ours, at, shape)
        their_dims = list(range(len(spans)))
        if transposed:
            their_dims[-2:] = their_dims[-1], their_dims[-2]
        starts = there + (slice(None),) * (len(spans) - len(there))
        self.pieces.append(
            Piece(
                tuple(len(span) for _, span in spans),
                Side(ours, tuple(Axis(dim, span.start, 1) for dim, span in spans), fixed),
                Side(theirs, tuple(Axis(d, starts[d].start or 0, starts[d].step or 1) for d in their_dims)),
            )
        )

    @classmethod
    def identity(cls, specs: Mapping[str, Spec]) -> dict[str, list[Copy]]:
        """Return the copies for a source that already has llmfoundry's names and shapes."""
        pieces = cls({name: spec.shape for name, spec in specs.items()})
        for name in specs:
            pieces.add(name, name)
        return pieces.reading()

    def reading(self) -> dict[str, list[Copy]]:
        """Return the copies that fill each llmfoundry tensor."""
        copies: dict[str, list[Copy]] = {}
        for piece in self.pieces:
            copies.setdefault(piece.ours.name, []).append(Copy(piece.sizes, piece.ours, piece.theirs))
        return copies

    def writing(self) -> dict[str, list[Copy]]:
        """Return the copies that fill each Hugging Face tensor."""
        copies: dict[str, list[Copy]] = {}
        for piece in self.pieces:
            copies.setdefault(piece.theirs.name, []).append(Copy(piece.sizes, piece.theirs, piece.ours))
        return copies

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the Hugging Face tensors, as implied by the pieces."""
        shapes: dict[str, list[int]] = {}
        for piece in self.pieces:
            shape = shapes.setdefault(piece.theirs.name, [0] * len(piece.theirs.axes))
            for axis, size in zip(piece.theirs.axes, piece.sizes, strict=True):
                shape[axis.dim] = max(shape[axis.dim], axis.start + (size - 1) * axis.step + 1)
        return {name: tuple(shape) for name, shape in shapes.items()}

    def check(self) -> None:
        """Assert that the pieces cover as many values as the tensors of each side have."""
        nothing: dict[str, int] = {}
        for copies, shapes, left in (
            (self.reading(), self.shapes, nothing),
            (self.writing(), self.their_shapes(), self.left),
        ):
            for name, shape in shapes.items():
                covered = sum(math.prod(copy.sizes) for copy in copies.get(name, ()))
                covered += left.get(name, 0) * math.prod(shape[1:])
                assert covered == math.prod(shape), f"{name}: the pieces cover {covered} values of {shape}"
