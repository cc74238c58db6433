"""Parts of tensors that may be sharded over ranks: a plain tensor counts as its own only part.

A sharded parameter is a `DTensor`. Code that works on either kind asks here and does not test for the type itself.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner_helpers import _create_chunk_from_dtensor
from torch.distributed.tensor import DTensor


class LocalShard(NamedTuple):
    """The part of a tensor that this rank holds, and where it stands in the whole."""

    local: Tensor  # the storage itself, detached
    shape: torch.Size  # of the whole tensor
    offsets: tuple[int, ...]  # of `local` in the whole, one per dim


@overload
def local_part(tensor: Tensor) -> Tensor: ...
@overload
def local_part(tensor: Tensor | None) -> Tensor | None: ...
def local_part(tensor: Tensor | None) -> Tensor | None:
    """The part of a tensor that this rank holds; gradients flow through. None (a missing parameter) stays None."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> LocalShard:
    """The part of a tensor that this rank holds, with its place in the whole."""
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor.detach(), tensor.shape, (0,) * tensor.dim())
    # The one place that knows how FSDP over expert parallelism strides its shards: torch's function for it is private,
    # and the parity tests prove it.
    return LocalShard(tensor.to_local().detach(), tensor.shape, tuple(_create_chunk_from_dtensor(tensor).offsets))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU and detached. A collective if it is sharded: every rank must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
