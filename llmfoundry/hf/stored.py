"""Map the tensors of a `transformers` module to those in its files, where experts are separate and matrices split.

`transformers` converts between the two forms with its own operations. They are run here once, towards the files, on
tensors without values that share one storage. The results are views, and the place of a view shows which block of which
tensor it is. So no value is read or moved, and a rank reads only what it holds.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmfoundry.hf.pieces import Axis, Piece, Side

Shape = tuple[int, ...]


def stored(module: PreTrainedModel, prefix: str = "") -> dict[str, list[Piece]]:
    """Return the pieces that connect the tensors of a module with those of its files, by the files' names.

    Args:
        module: the module, on the meta device.
        prefix: prefix of llmfoundry's names of its tensors.

    Raises:
        ValueError: if a tensor's stored form is not a block of a module's tensor, e.g. because it is interleaved.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    views = _Views(shapes)
    with views:
        theirs = revert_weight_conversion(module, dict(views.tensors))
    return {name: [*views.pieces(name, tensor, prefix)] for name, tensor in theirs.items()}


class _Views(TorchFunctionMode):
    """Tensors without values that share one storage. No operation copies; a concatenation gets a new place in it."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        ends = list(accumulate((math.prod(shape) for shape in shapes.values()), initial=0))
        self._starts, self._names, self._shapes = ends[:-1], list(shapes), list(shapes.values())
        self._next = ends[-1]  # place of the next concatenation
        self._joined: dict[int, list[tuple[int, Tensor]]] = {}  # by place: the start of each part, and the part
        self._storage = torch.empty(2 * ends[-1] + 1, device="meta")
        self.tensors = {
            name: self._placed(start, shape)
            for name, start, shape in zip(self._names, self._starts, self._shapes, strict=True)
        }

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        if func is torch.Tensor.contiguous:
            return args[0]
        given = cast(dict[str, object], kwargs or {})
        if func is torch.cat:
            return self._cat(cast(list[Tensor], args[0]), cast(int, given.get("dim", args[1] if args[1:] else 0)))
        return func(*args, **given)

    def pieces(self, theirs: str, tensor: Tensor, prefix: str) -> Iterator[Piece]:
        """Return the blocks that make up a tensor of the files."""
        parts = self._joined.get(int(tensor.storage_offset())) if self._is_here(tensor) else None
        if parts is None:
            yield self._piece(theirs, tensor, prefix, (0,) * tensor.dim())
            return
        dim = _dim_of_joining(tensor, parts)
        for start, part in parts:
            yield self._piece(theirs, part, prefix, tuple(start * (d == dim) for d in range(part.dim())))

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() == self._storage.untyped_storage().nbytes()

    def _placed(self, start: int, shape: Shape) -> Tensor:
        return self._storage[start : start + math.prod(shape)].view(shape)

    def _cat(self, parts: list[Tensor], dim: int) -> Tensor:
        shape = list(parts[0].shape)
        ends = list(accumulate((part.shape[dim] for part in parts), initial=0))
        shape[dim] = ends[-1]
        place, self._next = self._next, self._next + math.prod(shape)
        self._joined[place] = list(zip(ends, parts, strict=False))
        return self._placed(place, tuple(shape))

    def _piece(self, theirs: str, view: Tensor, prefix: str, starts: Shape) -> Piece:
        """Return a view as a block of the tensor that contains it, at `starts` in the Hugging Face tensor."""
        number = bisect.bisect_right(self._starts, view.storage_offset()) - 1
        name, shape = self._names[number], self._shapes[number]
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        inside = view.storage_offset() - self._starts[number]
        at = [inside // stride % size for stride, size in zip(strides, shape, strict=True)]
        free = list(range(len(shape)))
        dims = dict[int, int]()  # dims of the module's tensor, by those of the file's
        for axis in sorted(range(view.dim()), key=lambda axis: view.shape[axis] == 1):
            if view.shape[axis] > 1:
                fits = [dim for dim in free if strides[dim] == view.stride(axis) and shape[dim] > 1]
            else:  # any dim will do, preferably one that has no other index
                fits = sorted(free, key=lambda dim: shape[dim] != 1)
            if not fits or not self._is_here(view) or at[fits[0]] + view.shape[axis] > shape[fits[0]]:
                raise ValueError(f"{theirs} is stored in a form of its own, which is not read here")
            dims[axis] = fits[0]
            free.remove(fits[0])
        axes = tuple(Axis(dims[axis], at[dims[axis]], 1) for axis in range(view.dim()))
        return Piece(
            tuple(view.shape),
            Side(prefix + name, axes, tuple((dim, at[dim]) for dim in free)),
            Side(theirs, tuple(Axis(dim, start, 1) for dim, start in enumerate(starts))),
        )


def _dim_of_joining(tensor: Tensor, parts: list[tuple[int, Tensor]]) -> int:
    return next((dim for dim, size in enumerate(tensor.shape) if parts[0][1].shape[dim] != size), 0)
